"""The seams of axolotl, TRL and transformers that this package leans on.

A failure here after an upgrade says what moved; mend the place it names.
"""

import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import re
from pathlib import Path
from types import MethodType, SimpleNamespace

import axolotl
import axolotl.train as axolotl_train
import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderShard
from accelerate.utils import DynamoBackend, operations
from accelerate.utils import other as accelerate_utils
from axolotl.core.builders.base import TrainerBuilderBase
from axolotl.core.builders.causal import HFCausalTrainerBuilder
from axolotl.core.builders.rl import HFRLTrainerBuilder
from axolotl.core.trainers.dpo import DPOStrategy
from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer
from axolotl.integrations import base
from axolotl.integrations.base import BasePlugin
from axolotl.integrations.config import merge_input_args
from axolotl.loaders import ModelLoader
from axolotl.monkeypatch.accelerate import fsdp2
from axolotl.train import save_trained_model, setup_model_and_trainer, train
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.config import AxolotlInputConfig
from axolotl.utils.schemas.datasets import DPODataset
from axolotl.utils.schemas.validation import RLValidationMixin
from datasets import Dataset
from helpers import tiny
from helpers.releases import needs_divided_rows, needs_images, needs_late_kernels
from peft import LoraConfig, LoraModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn
from torch.nn.attention import varlen
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MambaForCausalLM,
    PreTrainedModel,
    Trainer,
    dynamic_module_utils,
    masking_utils,
)
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_flash_attention_utils import _flash_attention_forward
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.mixtral import modeling_mixtral
from trl import DPOConfig, DPOTrainer
from trl.data_utils import is_conversational
from trl.models.utils import _ForwardRedirection
from trl.trainer import dpo_trainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import disable_dropout_in_model

from axolotl_edpo import upstream, upstream_data
from axolotl_edpo.config import rules
from axolotl_edpo.config.args import HANDED_ON, Moving
from axolotl_edpo.config.dataset_entries import FIELDS, IGNORED
from axolotl_edpo.losses.preference import LOSSES, REFUSED, SFT
from axolotl_edpo.models.attached_kernels import attached_kernels
from axolotl_edpo.plugin import PLUGIN
from axolotl_edpo.upstream import (
    attention_name,
    automatic_plugins,
    deepspeed_optimizer_files,
    is_remote_code,
    is_repeated_blocks,
    keep_adapter_in_float32,
    loss_watchdog,
    recipe_keys,
    size_in_words,
    varlen_shares_heads,
)


def source(thing) -> str:
    return inspect.getsource(thing)


def test_the_builder_hands_model_and_reference_to_trainer_cls():
    text = source(HFRLTrainerBuilder._get_trainer_cls)
    assert "trainer_cls_args.append(self.model_ref)" in text, "plugin.py: lowering"
    assert "get_cls_from_module_str(self.cfg.trainer_cls)" in text, "plugin.py"


def test_the_builder_passes_beta_and_the_plugins_training_arguments():
    text = source(HFRLTrainerBuilder._build_training_arguments)
    assert 'training_args_kwargs["beta"] = self.cfg.rl_beta' in text, "args.py: beta"
    assert "plugin_manager.get_training_args(self.cfg)" in text, "plugin.py: use_cpu"


def test_the_plugin_hooks_exist():
    for name in (
        "register",
        "get_input_args",
        "get_training_args",
        "add_callbacks_post_trainer",
        "post_trainer_create",
    ):
        assert hasattr(BasePlugin, name), f"plugin.py: {name}"


def test_an_installed_plugin_is_registered_for_every_recipe():
    """From 0.21 on, whose `plugins:` raises where 0.20 goes on without a plugin."""
    group = getattr(base, "PLUGIN_ENTRY_POINT_GROUP", None)
    assert group in (None, "axolotl.plugins"), "pyproject.toml: entry points"
    assert (PLUGIN in automatic_plugins()) == bool(group), "upstream.py"
    text = source(importlib.import_module("axolotl.utils.config").prepare_plugins)
    asked = "(*builtin_plugins, *configured_plugins)" if group else 'cfg.get("plugins")'
    assert asked in text and ".register(cfg)" in text, "plugin.py: register"


def test_the_command_line_drops_what_it_does_not_know_under_one_launcher_only():
    text = source(importlib.import_module("axolotl.cli.main"))
    assert '"ignore_unknown_options": True' in text, "upstream.py: dropped_words"
    launch = importlib.import_module("axolotl.cli.utils.train")
    for name in ("_launch_accelerate_training", "_launch_torchrun_training"):
        assert "launcher_args" in source(getattr(launch, name)), "plugin.py"
    assert "launcher_args" not in source(launch._launch_python_training), "plugin.py"


def test_axolotl_hands_these_keys_to_supervised_training_only():
    given = source(HFCausalTrainerBuilder)
    for key in (*HANDED_ON, "early_stopping_patience", "loss_watchdog_threshold"):
        assert f"cfg.{key}" in given, f"args.py: {key}"
        for builder in (HFRLTrainerBuilder, TrainerBuilderBase):
            assert f"cfg.{key}" not in source(builder), f"args.py: {key} is superfluous"


def test_trl_switches_modules_of_dropout_off_and_no_numbers():
    text = source(disable_dropout_in_model)
    assert "isinstance(module, torch.nn.Dropout)" in text, "forward.py: dropout"
    assert "attention_dropout" not in text, "forward.py: dropout is superfluous"


def test_auto_resume_is_decided_after_the_trainer_is_made():
    text = source(train)
    assert text.index("setup_model_and_trainer(") < text.index(
        "determine_last_checkpoint(cfg)"
    ), "plugin.py: post_trainer_create"
    assert "post_trainer_create(cfg, trainer)" in source(setup_model_and_trainer)


def test_trainer_state_is_the_last_file_of_a_checkpoint():
    text = source(Trainer._save_checkpoint)
    written = text.index("self.state.save_to_json")
    for earlier in ("save_model", "_save_optimizer_and_scheduler", "_save_rng_state"):
        assert text.index(f"self.{earlier}(") < written, "checkpoint.py: is_complete"
    assert 'f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"' in text


def test_the_whole_optimizer_step_is_counted_before_its_first_micro_batch():
    text = source(Trainer.get_batch_samples)
    assert "self._get_num_items_in_batch(batch_samples, device)" in text, (
        "trainer.py: _get_num_items_in_batch"
    )
    step = source(Trainer.training_step)
    asked = ("if not loss_is_scaled_for_ga:", "not self.model_accepts_loss_kwargs or")
    assert any(line in step for line in asked), "upstream.py: loss scale"


def test_a_data_loader_says_which_micro_batch_is_its_last_when_it_hands_it_over():
    """And signs off only when it is asked for another."""
    text = source(DataLoaderShard.__iter__)
    last = text[text.index("self.end_of_dataloader = True") :]
    assert last.index("yield current_batch") < last.index("self.end()"), (
        "batching.py: _until_data_end"
    )
    text = source(Trainer.get_batch_samples)
    assert "for _ in range(num_batches):" in text, "batching.py: _until_data_end"


def test_every_loss_is_looked_at_unless_told_otherwise():
    text = source(Trainer._run_epoch)
    assert "self.args.logging_nan_inf_filter" in text, "trainer.py is superfluous"


def test_beta_moves_between_the_optimizer_step_and_the_log():
    text = source(Trainer._run_epoch)
    order = ("self.optimizer.step()", ".on_step_end(", "_maybe_log_save_evaluate(")
    places = [text.index(name) for name in order]
    assert places == sorted(places), "callbacks.py: EDPOCallback"


def test_the_dpo_trainer_logs_plain_means_of_its_lists():
    text = source(DPOTrainer.log)
    assert "sum(val) / len(val)" in text, "trainer.py: log"
    assert "self._metrics[mode].clear()" in text, "trainer.py: log"


def test_axolotls_training_step_adds_only_the_cache_flush():
    """Up to 0.20; then it has none."""
    step = vars(AxolotlDPOTrainer).get("training_step")
    body = [line.strip() for line in source(step).splitlines()][-4:] if step else []
    assert body in (
        [],
        [
            "loss: torch.Tensor = super().training_step("
            "model, inputs, num_items_in_batch)",
            "gc.collect()",
            "torch.cuda.empty_cache()",
            "return loss",
        ],
    ), "trainer.py: training_step"


def test_an_adapter_is_kept_in_float32_where_the_loader_makes_it():
    """From 0.20 on, and beside `rl: dpo` the loader makes none."""
    text = source(ModelLoader.load)
    known = "lora_fp32_gradients" in AxolotlInputConfig.model_fields
    assert ("upcast_lora_parameters(self.model)" in text) == known, (
        "plugin.py: post_trainer_create"
    )
    if known:
        adapter = LoraConfig(r=1, target_modules=["0"])
        model = get_peft_model(nn.Sequential(nn.Linear(2, 2)).bfloat16(), adapter)
        model.bfloat16()
        keep_adapter_in_float32(model)
        for name, weight in model.named_parameters():
            dtype = torch.float32 if "lora_" in name else torch.bfloat16
            assert weight.dtype == dtype, (
                f"upstream.py: keep_adapter_in_float32, {name}"
            )


def test_axolotl_knows_its_keys_by_name_and_by_alias():
    keys = recipe_keys()
    assert {*AxolotlInputConfig.model_fields} <= keys, "upstream.py: recipe_keys"
    aliases = {field.alias for field in AxolotlInputConfig.model_fields.values()}
    assert aliases - {None} <= keys, "upstream.py: recipe_keys"


def test_axolotl_merges_the_keys_of_its_plugins_into_its_own(recipe, tmp_path):
    tiny.load_config(tmp_path, recipe())
    merged = merge_input_args()[1].model_fields
    aliases = {field.alias for field in merged.values()} - {None}
    assert recipe_keys() == {*merged} | aliases, "upstream.py: recipe_keys"
    assert "edpo_epsilon" in merged


def test_axolotls_watchdog_takes_threshold_and_patience_from_the_config():
    cfg = DictDefault(loss_watchdog_threshold=2.5, loss_watchdog_patience=4)
    watchdog = loss_watchdog(cfg)
    assert (watchdog.threshold, watchdog.patience) == (2.5, 4), "upstream.py"


def test_a_pretrained_adapter_gets_a_reference_copy_named_ref():
    assert 'model.add_adapter("ref", default_config)' in source(DPOTrainer.__init__), (
        "forward.py: REFERENCE_ADAPTER"
    )


def test_a_reference_is_loaded_by_two_functions_that_are_replaced():
    """axolotl's after the policy is loaded; TRL's where it is given none."""
    source = inspect.getsource(setup_model_and_trainer)
    policy, reference = (
        "setup_model_and_tokenizer(cfg)",
        "= setup_reference_model(cfg, ",
    )
    assert source.index(policy) < source.index(reference), "upstream.py"
    hook = inspect.getsource(ModelLoader.load)
    assert "pre_model_load(self.cfg)" in hook, "plugin.py: pre_model_load"
    source = inspect.getsource(DPOTrainer.__init__)
    *_, own = source.partition("if ref_model is None:")
    assert "self.ref_model = create_model_from_path(" in own, "upstream.py"
    assert own.count("create_model_from_path(") == 1
    load = dpo_trainer.create_model_from_path
    with upstream.reference_of_trl(False):
        assert dpo_trainer.create_model_from_path("a", dtype=None) is None
    assert dpo_trainer.create_model_from_path is load
    with upstream.reference_of_trl(True):
        assert dpo_trainer.create_model_from_path is load


def test_axolotls_reference_is_asked_for_where_it_is_wanted(monkeypatch):
    monkeypatch.setattr(axolotl_train, "setup_reference_model", lambda *args: args)
    for _ in range(2):  # replaced once
        upstream.load_reference_if(lambda cfg: cfg["wanted"])
    asked = axolotl_train.setup_reference_model
    assert asked({"wanted": False}, 1, 2) is None
    assert asked({"wanted": True}, 1, 2) == ({"wanted": True}, 1, 2)
    assert not hasattr(asked.of_axolotl, "of_axolotl")


def test_axolotl_passes_orpo_alpha_on_as_beta_and_a_plugin_comes_later():
    source = inspect.getsource(HFRLTrainerBuilder._build_training_arguments)
    as_beta = 'training_args_kwargs["beta"] = self.cfg.orpo_alpha'
    later = "training_args_kwargs.update(plugin_training_args)"
    assert source.index(as_beta) < source.index(later), "config/args.py: handed_on"


def test_the_forward_redirection_restores_before_it_calls():
    text = source(_ForwardRedirection.__call__)
    assert text.index("original_module.forward = original_forward") < text.index(
        "out = method("
    ), "upstream.py: forward_redirection"
    names = [*inspect.signature(_ForwardRedirection.__call__).parameters]
    first = ["self", "wrapper_module", "original_module", "method"]
    assert names[:4] == first, "upstream.py: forward_redirection"


def test_fsdp2_shards_by_a_function_that_axolotl_replaces_in_accelerates_module():
    prepare = source(Accelerator)
    assert "= fsdp2_prepare_model(self, model)" in prepare, "upstream.py: shard_fsdp2"
    replaced = "accelerate.accelerator.fsdp2_prepare_model = fsdp2_prepare_model"
    assert replaced in source(fsdp2), "upstream.py: shard_fsdp2"


def test_a_config_is_loaded_without_the_engine_that_one_function_prepares(
    recipe, tmp_path
):
    from axolotl.cli import config

    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 3}}')
    keys = recipe(deepspeed=str(tmp_path / "zero.json"))
    prepare = config.prepare_optim_env
    with upstream.without_engine():
        stages = [
            tiny.load_config(tmp_path, keys).deepspeed["zero_optimization"]["stage"]
            for _ in range(2)
        ]
    assert stages == [3, 3] and "ACCELERATE_USE_DEEPSPEED" not in os.environ
    assert config.prepare_optim_env is prepare
    assert "prepare_optim_env(cfg)" in source(config.load_cfg)


def test_accelerate_compiles_lists_of_layers_of_one_class():
    assert hasattr(accelerate_utils, "is_repeated_blocks"), (
        "upstream.py: is_repeated_blocks"
    )
    blocks = torch.nn.ModuleList([torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)])
    assert is_repeated_blocks(blocks) and not is_repeated_blocks(blocks[0])


def test_deepspeed_keeps_these_attributes_on_a_weight_that_zero3_has_sharded():
    """Read as text: to import DeepSpeed takes seconds, and not everyone has it."""
    found = importlib.util.find_spec("deepspeed")
    if found is None or found.origin is None:
        pytest.skip("there is no DeepSpeed")
    file = Path(found.origin).parent / "runtime" / "zero" / "partition_parameters.py"
    text = file.read_text(encoding="utf-8")
    for line in (
        "AVAILABLE = 1",
        "param.ds_status = ZeroParamStatus.AVAILABLE",
        "param.ds_id = ",
        "param.ds_tensor = ",
        "param.ds_secondary_tensor = ",
        "class GatheredParameters:",
    ):
        assert line in text, f"distributed.py: {line}"
    for way in ("coalesced", "sequential"):
        line = f"def _allgather_params_{way}(self, param_list, hierarchy=0"
        assert line in text, f"upstream.py: wait_for_every_gather: {line}"


def test_models_say_in_private_names_what_their_layers_are():
    config = LlamaConfig(attn_implementation="eager")
    name = getattr(config, "_attn_implementation", None)
    assert name == "eager", "upstream.py: attention_name"
    for kind, stateful, flash in (
        (LlamaForCausalLM, False, True),
        (MambaForCausalLM, True, False),
    ):
        found = getattr(kind, "_is_stateful", None)
        assert found is stateful, "upstream.py: carries_state"
        found = getattr(kind, "_supports_flash_attn", None)
        assert found is flash, "upstream.py: takes_boundaries"
    recorded = getattr(modeling_mixtral.MixtralModel, "_can_record_outputs", None)
    assert "router_logits" in (recorded or ()), "upstream.py: recorded_outputs"


def test_adapters_are_saved_through_the_trainers_model():
    assert "trainer.model.save_pretrained(cfg.output_dir)" in source(
        save_trained_model
    ), "start.py: resolve_reference_adapter"


def test_axolotl_refuses_packing_beside_rl_before_a_plugin_is_asked():
    text = source(RLValidationMixin.check_sample_packing_w_rl)
    assert 'data.get("sample_packing") and data.get("rl")' in text, "args.py: LOWERED"


def test_trl_switches_padding_free_off_and_makes_the_collator_of_pairs():
    text = source(DPOTrainer.__init__)
    assert "self.padding_free = False" in text, "plugin.py: padding_free"
    assert "DataCollatorForPreference(" in text, "assembly.py: make_batcher"
    names = inspect.signature(DataCollatorForPreference).parameters
    assert {"pad_token_id", "max_length", "pad_to_multiple_of"} <= names.keys()
    text = source(DataCollatorForPreference.torch_call)
    assert text.count('padding_side="right"') == 3, "packing.py: pairs_of"


def test_every_loss_type_of_trl_is_known_here():
    names = set(re.findall(r'loss_type == "(\w+)"', source(DPOTrainer._compute_loss)))
    assert names == {*LOSSES, *REFUSED, SFT}, "preference.py: LOSSES"


def test_trl_weighs_pairs_as_wpo_does():
    text = source(DPOTrainer._compute_loss)
    for line in (
        "log_denom = lse2 - 2.0 * lse1",
        "aligned_logps = (per_token_logps - log_denom) * shift_completion_mask",
        "per_sequence_loss *= chosen_weights * rejected_weights",
    ):
        assert line in text, "preference.py: wpo_weights"


def test_trls_loss_options_have_the_names_that_are_read():
    text = source(DPOTrainer.__init__)
    for name in ("loss_types", "loss_weights", "label_smoothing", "use_weighting"):
        assert f"self.{name} = args." in text, f"trainer.py: PreferenceLoss, {name}"


def test_a_router_loss_is_asked_for_and_averaged_where_it_was():
    text = source(DPOTrainer.__init__)
    assert "self.aux_loss_enabled = " in text, "trainer.py: router"
    assert "self.router_aux_loss_coef = " in text, "trainer.py: router"
    text = source(DPOTrainer._compute_loss)
    assert "loss + self.router_aux_loss_coef * aux_loss" in text, "trainer.py: router"
    average = modeling_mixtral.load_balancing_loss_func
    names = ["gate_logits", "num_experts", "top_k", "attention_mask"]
    assert list(inspect.signature(average).parameters) == names, "moe.py"
    assert "flat_mask = attention_mask.reshape(-1)" in source(average), "moe.py"


def test_trl_lets_the_reference_follow_and_axolotl_says_so_to_grpo_only():
    text = source(DPOTrainer.__init__)
    assert "SyncRefModelCallback(ref_model=self.ref_model" in text, "args.py: Moving"
    text = source(DPOStrategy.set_training_args_kwargs)
    assert "sync_ref_model" not in text, "args.py: Moving is axolotl's own now"
    names = inspect.signature(DPOConfig).parameters
    assert Moving.model_fields.keys() <= names.keys(), "args.py: Moving"


def test_optimizer_and_schedule_are_loaded_under_every_engine():
    text = source(Trainer._prepare_for_training)
    line = "            self._load_optimizer_and_scheduler(resume_from_checkpoint)\n"
    assert line in text, "trainer.py: _load_optimizer_and_scheduler"


def test_axolotl_keeps_of_an_entry_of_datasets_what_dpo_datasets_have():
    assert "DPODataset(**ds_cfg)" in source(validate_config), (
        "dataset_entries.py: IGNORED"
    )
    fields = upstream_data.entry_keys()
    assert fields == DPODataset.model_fields.keys(), "upstream_data.py: entry_keys"
    assert not IGNORED.keys() & fields, "dataset_entries.py: IGNORED"
    assert FIELDS.keys() <= fields, "dataset_entries.py: FIELDS"


def test_trl_drops_pairs_in_prepare_dataset():
    names = list(inspect.signature(DPOTrainer._prepare_dataset).parameters)
    own = ["self", "dataset", "processing_class", "args", "dataset_name"]
    assert names == own, "trainer.py: _prepare_dataset"


def test_trl_tells_messages_from_text_by_any_column_it_knows():
    text = source(is_conversational)
    assert '"completion", "messages"]' in text, "checks.py: preference_columns"
    assert "example_keys.pop()" in text, "checks.py: preference_columns"


def test_the_training_loop_runs_over_what_get_batch_samples_returns():
    text = source(Trainer._run_epoch)
    assert "self.get_batch_samples(" in text, "trainer.py: get_batch_samples"
    assert "for i, inputs in enumerate(batch_samples)" in text


def test_a_mask_of_four_dimensions_is_handed_on_as_it_is():
    text = source(masking_utils._preprocess_mask_arguments)
    early = text.index("len(attention_mask.shape) == 4")
    assert early < text.index("find_packed_sequence_indices"), "packing.py: no_mask"


def test_flash_attention_takes_boundaries_and_passes_keywords_on():
    names = inspect.signature(_flash_attention_forward).parameters
    for side in "qk":
        assert f"cu_seq_lens_{side}" in names, "packed_attention: _boundaries"
        assert f"max_length_{side}" in names, "packed_attention: _boundaries"
    assert "**kwargs" in source(flash_attention_forward), "packed_attention: _varlen"


def test_torchs_varlen_attention_has_these_arguments_and_asks_no_cudnn_for_them():
    names = [*inspect.signature(varlen.varlen_attn).parameters]
    first = ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert names[:7] == first, "packed_attention: _varlen"
    assert {"scale", "window_size"} <= {*names[7:]}, "packed_attention: _varlen"
    assert varlen_shares_heads() == {
        name: True for name in names if name == "enable_gqa"
    }, "upstream.py: varlen_shares_heads"
    text = source(varlen)
    assert "is_causal = window_size == (-1, 0)" in text, "packed_attention: _varlen"
    # 2.14 asks cuDNN, but not where a window ends on the right
    asked = getattr(varlen, "_can_use_cudnn", None)
    if asked:
        line = "if window_size != [-1, -1]:\n        return False"
        assert line in source(asked), "packed_attention: _varlen"
    else:
        assert "True" not in source(varlen._should_use_cudnn), (
            "packed_attention: _varlen"
        )


def test_sdpa_is_looked_up_when_it_is_called_and_takes_no_cap_and_no_sink():
    text = source(sdpa_attention_forward)
    assert "torch.nn.functional.scaled_dot_product_attention(" in text, (
        "packed_attention"
    )
    assert "softcap" not in text and "s_aux" not in text, (
        "packed_attention: BEYOND_VARLEN"
    )
    names = inspect.signature(sdpa_attention_forward).parameters
    assert {"dropout", "is_causal"} <= names.keys(), "packed_attention: _takes_varlen"


def test_gradient_checkpointing_keeps_the_keywords_of_a_layer():
    text = source(GradientCheckpointingLayer.__call__)
    assert "partial(super().__call__, **kwargs)" in text, "packed_attention: segments"


def test_a_flag_on_modules_says_what_is_checkpointed():
    text = source(PreTrainedModel.is_gradient_checkpointing.fget)
    assert "m.gradient_checkpointing for m in self.modules()" in text, "switches.py"
    text = source(GradientCheckpointingLayer.__call__)
    assert "if self.gradient_checkpointing and self.training:" in text, "switches.py"


def test_peft_takes_adapters_into_use_by_walks_over_all_modules():
    """They set attributes of modules, and `requires_grad`, which has no forward."""
    for name in ("enable_adapters", "set_adapter"):
        text = source(getattr(BaseTunerLayer, name))
        assert "_set_layer_requires_grad(layer, " in text, "switches.py: _record"
    text = source(BaseTuner._enable_adapter_layers)
    assert "for module in self.model.modules():" in text, "switches.py is superfluous"
    assert "_enable_adapter_layers" not in vars(LoraModel), "switches.py: LoraModel"


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "gemma2"])
def test_models_bring_their_own_eager_attention_and_name_the_window(kind):
    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    assert callable(module.eager_attention_forward), "upstream.py: eager_attention"
    windowed = kind == "llama" or "sliding_window=" in source(module)
    assert windowed, "packed_attention: sliding_window"


def test_gradients_pass_through_the_norm():
    text = source(Trainer._run_epoch)
    order = "_set_sync_gradients( training_step( _get_grad_norm( optimizer.step("
    places = [text.index(name) for name in order.split()]
    assert places == sorted(places), "trainer.py: where a run is stopped"


def test_a_config_names_its_attention_and_a_model_has_its_layers_in_a_list():
    config = LlamaConfig(
        hidden_size=8,
        num_attention_heads=1,
        num_hidden_layers=2,
        vocab_size=8,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config)
    assert attention_name(model.config) == "eager", "upstream.py: attention_name"
    (layers,) = filter(is_repeated_blocks, model.modules())
    assert layers is model.model.layers, "upstream.py: is_repeated_blocks"


def test_code_that_comes_with_a_model_is_imported_below_one_module():
    assert not is_remote_code(LlamaForCausalLM), "upstream.py: is_remote_code"
    text = source(dynamic_module_utils.get_cached_module_file)
    assert "TRANSFORMERS_DYNAMIC_MODULE_NAME" in text, "upstream.py: is_remote_code"


def test_datasets_writes_sizes_with_a_unit():
    assert size_in_words(2**16) == "64.00 KiB", "upstream.py: size_in_words"


def test_deepspeed_names_optimizer_states_by_rank(tmp_path):
    (package,) = importlib.util.find_spec("deepspeed").submodule_search_locations
    engine = (Path(package) / "runtime" / "engine.py").read_text()
    for part in ("zero_pp_rank_{dp_rank}", "_optim_states.pt", 'f"global_step{'):
        assert part in engine, f"upstream.py: deepspeed_optimizer_files: {part}"
    (tmp_path / "global_step7").mkdir()
    for name in ("bf16_zero_pp_rank_0_mp_rank_00_optim", "mp_rank_00_model"):
        (tmp_path / "global_step7" / f"{name}_states.pt").touch()
    assert len(deepspeed_optimizer_files(tmp_path)) == 1, "checkpointing.py: ranks"


def test_releases_of_axolotl_differ_where_upstream_says_so():
    release = tuple(map(int, importlib.metadata.version("axolotl").split(".")[:2]))
    found = upstream.default_fsdp_version()
    assert found == (1 if release == (0, 19) else 2), "upstream.py: fsdp_version"
    assert upstream.patches_adapters_late() == (release >= (0, 21)), "rules.py: kernels"
    assert upstream_data.takes_images() == (release >= (0, 21)), "rules.py: images"
    assert upstream.has_context_parallelism() == (release >= (0, 20)), "rules.py: rows"
    assert upstream.merges_token_rows() == (release >= (0, 21)), "merging.py: rows"


@needs_late_kernels
def test_lora_kernels_are_methods_of_single_modules():
    from axolotl.kernels import lora
    from axolotl.monkeypatch import lora_kernels

    source = inspect.getsource(lora_kernels)
    names = re.findall(r"types\.MethodType\(\s*(\w+)", source)
    assert {*names} == {
        "original_apply_qkv_optional_v",
        "original_apply_qkv",
        "original_apply_o",
        "apply_lora_qkv",
        "apply_lora_qk",
        "apply_lora_o",
        "apply_lora_mlp_relu2",
        "apply_fn",  # a value of APPLY_FN_MAPPING
        "apply_lora_embedding",
        "_make_apply_lora_gdn_in_proj",
        "_make_apply_lora_linear",
    }, "models/attached_kernels.py"
    layer = nn.Module()
    layer.child = nn.Linear(1, 1)
    assert attached_kernels(layer) == set()
    for kind, function in lora_kernels.APPLY_FN_MAPPING.items():
        layer.forward = MethodType(function, layer)
        assert attached_kernels(layer) == {"lora_mlp_kernel"}, kind
    layer.child.apply_o = MethodType(lora.apply_lora_o, layer.child)
    layer.child.apply_in_proj_fused = MethodType(print, layer.child)
    kernels = {"lora_mlp_kernel", "lora_o_kernel", "lora_qkv_kernel"}
    assert attached_kernels(layer) == kernels
    builder = inspect.getsource(HFRLTrainerBuilder.build)
    attached = builder.index("hook_post_create_trainer")
    assert attached < builder.index("get_post_trainer_create_callbacks"), "plugin.py"
    parameters = inspect.getsource(lora.get_lora_parameters)
    assert "proj.disable_adapters or proj.merged" in parameters, (
        "config/lora_kernels.py"
    )


def test_plugins_of_a_recipe_may_be_named_with_a_colon():
    names = {"plugins": ["axolotl_edpo:EDPOPlugin", "a.B"]}
    assert upstream.named_plugins(names) == [PLUGIN, "a.B"], "upstream.py: plugins"
    assert upstream.named_plugins({}) == []


def test_the_config_of_the_running_recipe_is_the_plugin_managers():
    manager = base.PluginManager.get_instance()
    before, manager.cfg = manager.cfg, DictDefault(rl="edpo")
    try:
        assert upstream.recipe_config() is manager.cfg, "trainer.py: settings"
    finally:
        manager.cfg = before


def test_losses_are_left_as_they_are_by_an_attribute_that_transformers_reads():
    class Made:
        pass

    upstream.leave_losses_as_they_are(made := Made())
    text = source(Trainer.training_step) + source(Trainer.compute_loss)
    names = [name for name in vars(made) if f"self.{name}" in text]
    assert names and all(vars(made).values()), "upstream.py: losses"


@needs_divided_rows
def test_context_parallelism_is_left_to_our_batches():
    """axolotl replaces the same two methods; accelerate and transformers call them."""
    # its trainer.py imports ringmaster, which is not installed
    package = importlib.util.find_spec("axolotl.integrations.context_parallel")
    theirs = Path(package.origin).with_name("trainer.py").read_text()

    class Made:
        accelerator = Accelerator(cpu=True)

    upstream.leave_rows_as_they_are(made := Made())
    assert made.accelerator._prepare_cp(1, 2) == (1, 2)
    context, inputs = made._prepare_context_parallel_inputs(None, {"a": 1})
    with context():
        assert inputs == {"a": 1}
    for name in ("_prepare_cp", "_prepare_context_parallel_inputs"):
        assert f'"{name}"' in theirs, "upstream.py: rows"
    assert "self._prepare_cp(" in source(Accelerator.prepare), "upstream.py: rows"
    call = "self._prepare_context_parallel_inputs("
    assert call in source(Trainer.training_step), "upstream.py: rows"


def test_an_engine_that_axolotl_names_by_a_string_has_its_type_again():
    accelerator = Accelerator(cpu=True)
    before = accelerator.distributed_type
    accelerator.state.distributed_type = before.value
    upstream.restore_engine(accelerator)
    assert accelerator.state.distributed_type is before
    assert "distributed_type.value" in source(operations), "upstream.py: restore_engine"


def test_a_mixture_of_experts_has_its_router_loss_in_its_module():
    found = upstream.load_balancing_loss(object.__new__(modeling_mixtral.MixtralModel))
    assert found is modeling_mixtral.load_balancing_loss_func, "moe.py"
    assert upstream.load_balancing_loss(nn.Linear(1, 1)) is None


def test_accelerate_keeps_what_to_compile_and_which_models_it_prepared():
    accelerator = Accelerator(cpu=True)
    plugin = accelerator.state.dynamo_plugin
    before = plugin.backend
    try:
        plugin.backend = DynamoBackend.NO
        assert upstream.take_compile_options(accelerator) == {}
        plugin.backend = DynamoBackend.EAGER
        options = upstream.take_compile_options(accelerator)
        assert options["backend"] == "eager", "upstream.py: take_compile_options"
        assert plugin.backend == DynamoBackend.NO
    finally:
        plugin.backend = before
    first, second = nn.Linear(1, 1), nn.Linear(1, 1)
    accelerator.prepare(first, second)
    upstream.forget_model(accelerator, first)
    assert accelerator._models == [second], "upstream.py: forget_model"


def test_axolotl_prepares_fsdp2_for_an_evaluation_from_0_21_on(monkeypatch):
    import axolotl.evaluate

    name, prepared = "prepare_fsdp2_model_for_eval", []
    release = tuple(map(int, importlib.metadata.version("axolotl").split(".")[:2]))
    assert release < (0, 21) or hasattr(axolotl.evaluate, name), "upstream.py: fsdp2"
    monkeypatch.setattr(axolotl.evaluate, name, prepared.append, raising=False)
    upstream.prepare_for_evaluation(trainer := SimpleNamespace(is_fsdp_enabled=True))
    assert prepared == [trainer]
    monkeypatch.delattr(axolotl.evaluate, name)
    with pytest.raises(ValueError, match="install axolotl 0.21"):
        upstream.prepare_for_evaluation(trainer)
    upstream.prepare_for_evaluation(SimpleNamespace(is_fsdp_enabled=False))


def test_axolotl_makes_trainer_and_models_by_three_functions_of_their_own():
    from axolotl import train
    from axolotl.cli import main

    text = source(train.setup_model_and_trainer)
    for name in ("setup_model_and_tokenizer", "setup_reference_model", "setup_trainer"):
        assert f"= {name}(" in text, "scores/score.py"
    assert ".post_trainer_create(cfg, trainer)" in text, "scores/score.py"
    assert {*main.LAUNCHER_COMMAND_MAPPING} == {"accelerate", "torchrun"}


def test_every_function_of_upstream_is_pinned_here():
    text = Path(__file__).read_text()
    functions = [
        name
        for module in (upstream, upstream_data)
        for name, function in inspect.getmembers(module, inspect.isroutine)
        if getattr(function, "__module__", None) == module.__name__
    ]
    assert len(functions) > 20
    assert [name for name in functions if not re.search(rf"\b{name}\b", text)] == []


def test_axolotl_prepares_pairs_with_functions_that_are_replaced(recipe, tmp_path):
    """By name, in these Python modules; `preparing_with` puts each back."""
    from axolotl.common import datasets
    from axolotl.utils.data import rl

    load = source(datasets.load_preference_datasets)
    assert "= prepare_preference_datasets(cfg, tokenizer)" in load
    split, data = source(rl._load_or_create_dataset_split), source(rl._load_split)
    assert "= _load_split(cfg, split=split)" in split
    assert "= load_dpo(_type, cfg, dataset_idx=i)" in data
    assert "_drop_long_sequences,\n" in data and "_truncate_long_sequences_rl," in data
    for text in (split, data):
        assert "= generate_dataset_hash_from_config(\n" in text
    whole = rl.load_dpo
    tiny.load_data(tiny.load_config(tmp_path, recipe()))
    assert rl.load_dpo is whole, "upstream_data.py: preparing_with"
    assert datasets.prepare_preference_datasets.of_axolotl.__module__ == rl.__name__, (
        "upstream_data.py: prepare_pairs_with"
    )


@needs_images
def test_the_builder_makes_a_collator_of_images_from_three_attributes():
    """`image_collator` gives it no more; its batches: tests/runs/test_images.py."""
    from axolotl.core.builders.rl import HFRLTrainerBuilder as Builder

    for made in (Builder._build_vision_collator, Builder._prepare_vision_processor):
        read = {*re.findall(r"\bself\.(\w+)", source(made))}
        assert read <= {"cfg", "tokenizer", "processor"}, (
            "upstream_data.py: image_collator"
        )


def test_the_loader_of_pairs_is_axolotls_own(recipe, tmp_path):
    tiny.load_config(tmp_path, recipe())  # with ours around it
    assert upstream_data.pairs_loader().__module__ == "axolotl.utils.data.rl"


def test_a_trainer_tokenizes_pairs_with_its_tokenizer_and_three_arguments():
    tokenizes = source(DPOTrainer._prepare_dataset)
    used = {*re.findall(r"\bself\.(\w+)", tokenizes)}
    assert used == {"_tokenizer"}, "upstream_data.py: tokenize_pairs"
    arguments = {*re.findall(r"\bargs\.(\w+)", tokenizes)}
    assert arguments == {"dataset_num_proc", "max_length", "truncation_mode"}
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    tokenizer = tiny.byte_tokenizer()
    made = upstream_data.tokenize_pairs(DPOTrainer, rows, tokenizer, "train", 9, None)
    assert made["chosen_ids"][:] == [tokenizer("b</s>")["input_ids"]]


def test_entries_and_prepared_data(tmp_path):
    assert upstream_data.text_type_keys() == {
        *("field_system", "field_prompt", "field_chosen", "field_rejected"),
        *("prompt_format", "chosen_format", "rejected_format"),
    }
    assert {"chat_template", "chatml", "llama3", "zephyr"} <= upstream_data.pair_types()
    assert [*map(upstream_data.file_type, ("a.jsonl", "a.csv"))] == ["json", "csv"]
    cfg = DictDefault(dataset_prepared_path=str(tmp_path))
    assert upstream_data.prepared_root(cfg) == tmp_path
    assert upstream_data.prepared_path(cfg, "a") == tmp_path / "a"
    unset = upstream_data.prepared_root(DictDefault())
    assert unset == Path("last_run_prepared"), "docs/reference.md: the cache"


# Code of axolotl that runs in supervised training only.
SUPERVISED = (
    "core/builders/causal.py",
    "core/datasets.py",
    "processing_strategies.py",
    "prompt_strategies/",
    "utils/collators",
    "utils/data/sft.py",
    "utils/data/streaming.py",
    "utils/data/wrappers.py",
    "utils/samplers",
)
# Keys that only such code reads -> what else makes them effective, or refuses them.
ANSWERED = {
    "chat_template_kwargs": "data/preparation.py",
    "early_stopping_patience": "plugin.py",
    "load_best_model_at_end": "args.py: handed_on",
    "dataset_shard_idx": "goes with dataset_shard_num, refused",
    "eaft_alpha": "goes with use_eaft, refused",
    "eaft_k": "goes with use_eaft, refused",
    "image_resize_algorithm": "data/preparation.py, by axolotl's builder",
    "label_balance_window_optim_steps": "goes with balance_labels, refused",
    "lisa_layers_attribute": "goes with lisa_step_interval, refused",
    "lisa_n_layers": "goes with lisa_step_interval, refused",
    "relora_prune_ratio": "goes with relora, refused",
    "streaming": "needs max_steps, and changes nothing: see test_matrix_data.py",
}


def test_keys_of_supervised_training_have_an_answer():
    """From axolotl's schema and sources: a new key fails here until it has one."""
    root = Path(axolotl.__file__).parent
    keys, reading = AxolotlInputConfig.model_fields.keys(), {}
    read = re.compile(r"""cfg(?:\.get\(\s*["']|\[\s*["']|\.)(\w+)""")
    for file in root.rglob("*.py"):
        for key in keys & {*read.findall(file.read_text())}:
            reading.setdefault(key, set()).add(str(file.relative_to(root)))
    supervised = {
        key
        for key, files in reading.items()
        if all(f.startswith((*SUPERVISED, "utils/schemas")) for f in files)
        and any(f.startswith(SUPERVISED) for f in files)
    }
    answers = {*ANSWERED, *HANDED_ON, *rules.WITHOUT_EFFECT, *rules.UNSUPPORTED}
    assert "train_on_inputs" in supervised and supervised <= answers
