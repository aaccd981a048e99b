"""The seams of axolotl, TRL and transformers that this package leans on.

A failure here after an upgrade says what moved; mend the place it names.
"""

import importlib
import inspect
import re

import pytest
from accelerate.data_loader import DataLoaderShard
from axolotl.core.builders.base import TrainerBuilderBase
from axolotl.core.builders.causal import HFCausalTrainerBuilder
from axolotl.core.builders.rl import HFRLTrainerBuilder
from axolotl.core.trainers.dpo import DPOStrategy
from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer
from axolotl.integrations import base
from axolotl.integrations.base import BasePlugin
from axolotl.loaders import ModelLoader
from axolotl.train import save_trained_model, setup_model_and_trainer, train
from axolotl.utils.config import validate_config
from axolotl.utils.schemas.config import AxolotlInputConfig
from axolotl.utils.schemas.datasets import DPODataset
from axolotl.utils.schemas.validation import RLValidationMixin
from peft import LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch.nn.attention import varlen
from transformers import PreTrainedModel, Trainer, masking_utils
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_flash_attention_utils import _flash_attention_forward
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.mixtral import modeling_mixtral
from trl import DPOConfig, DPOTrainer
from trl.data_utils import is_conversational
from trl.models.utils import _ForwardRedirection
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import disable_dropout_in_model

from axolotl_edpo.config.args import HANDED_ON, Moving
from axolotl_edpo.config.dataset_entries import FIELDS, IGNORED
from axolotl_edpo.losses.preference import LOSSES, REFUSED, SFT
from axolotl_edpo.plugin import PLUGIN
from axolotl_edpo.upstream import automatic_plugins, varlen_shares_heads


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
    assert "isinstance(module, torch.nn.Dropout)" in text, "backbone.py: dropout"
    assert "attention_dropout" not in text, "backbone.py: dropout is superfluous"


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
    assert "self._get_num_items_in_batch(batch_samples, device)" in text, "feed.py"
    step = source(Trainer.training_step)
    asked = ("if not loss_is_scaled_for_ga:", "not self.model_accepts_loss_kwargs or")
    assert any(line in step for line in asked), "upstream.py: loss scale"


def test_a_data_loader_says_which_micro_batch_is_its_last_when_it_hands_it_over():
    """And signs off only when it is asked for another."""
    text = source(DataLoaderShard.__iter__)
    last = text[text.index("self.end_of_dataloader = True") :]
    assert last.index("yield current_batch") < last.index("self.end()"), "feed.py"
    text = source(Trainer.get_batch_samples)
    assert "for _ in range(num_batches):" in text, "feed.py: _until_data_end"


def test_every_loss_is_looked_at_unless_told_otherwise():
    text = source(Trainer._run_epoch)
    assert "self.args.logging_nan_inf_filter" in text, "trainer.py is superfluous"


def test_beta_moves_between_the_optimizer_step_and_the_log():
    text = source(Trainer._run_epoch)
    order = ("self.optimizer.step()", ".on_step_end(", "_maybe_log_save_evaluate(")
    places = [text.index(name) for name in order]
    assert places == sorted(places), "run.py: BetaCallback"


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
    ), "feed.py: training_step"


def test_an_adapter_is_kept_in_float32_where_the_loader_makes_it():
    """From 0.20 on, and beside `rl: dpo` the loader makes none."""
    text = source(ModelLoader.load)
    known = "lora_fp32_gradients" in AxolotlInputConfig.model_fields
    assert ("upcast_lora_parameters(self.model)" in text) == known, (
        "plugin.py: post_trainer_create"
    )


def test_a_pretrained_adapter_gets_a_reference_copy_named_ref():
    assert 'model.add_adapter("ref", default_config)' in source(DPOTrainer.__init__), (
        "backbone.py: REFERENCE_ADAPTER"
    )


def test_the_forward_redirection_restores_before_it_calls():
    text = source(_ForwardRedirection.__call__)
    assert text.index("original_module.forward = original_forward") < text.index(
        "out = method("
    ), "engine.py"


def test_adapters_are_saved_through_the_trainers_model():
    assert "trainer.model.save_pretrained(cfg.output_dir)" in source(
        save_trained_model
    ), "reference.py: _settle_reference_adapter"


def test_axolotl_refuses_packing_beside_rl_before_a_plugin_is_asked():
    text = source(RLValidationMixin.check_sample_packing_w_rl)
    assert 'data.get("sample_packing") and data.get("rl")' in text, "args.py: LOWERED"


def test_trl_switches_padding_free_off_and_makes_the_collator_of_pairs():
    text = source(DPOTrainer.__init__)
    assert "self.padding_free = False" in text, "plugin.py: padding_free"
    assert "DataCollatorForPreference(" in text, "feed.py: _start_feed"
    names = inspect.signature(DataCollatorForPreference).parameters
    assert {"pad_token_id", "max_length", "pad_to_multiple_of"} <= names.keys()
    text = source(DataCollatorForPreference.torch_call)
    assert text.count('padding_side="right"') == 3, "batch.py: pack"


def test_every_loss_type_of_trl_is_known_here():
    names = set(re.findall(r'loss_type == "(\w+)"', source(DPOTrainer._compute_loss)))
    assert names == {*LOSSES, *REFUSED, SFT}, "loss_types.py: LOSSES"


def test_trl_weighs_pairs_as_wpo_does():
    text = source(DPOTrainer._compute_loss)
    for line in (
        "log_denom = lse2 - 2.0 * lse1",
        "aligned_logps = (per_token_logps - log_denom) * shift_completion_mask",
        "per_sequence_loss *= chosen_weights * rejected_weights",
    ):
        assert line in text, "loss_types.py: wpo_weights"


def test_trls_loss_options_have_the_names_that_are_read():
    text = source(DPOTrainer.__init__)
    for name in ("loss_types", "loss_weights", "label_smoothing", "use_weighting"):
        assert f"self.{name} = args." in text, f"trainer.py: LossSettings, {name}"


def test_a_router_loss_is_asked_for_and_averaged_where_it_was():
    text = source(DPOTrainer.__init__)
    assert "self.aux_loss_enabled = " in text, "trainer.py: router"
    assert "self.router_aux_loss_coef = " in text, "trainer.py: router"
    text = source(DPOTrainer._compute_loss)
    assert "loss + self.router_aux_loss_coef * aux_loss" in text, "trainer.py: router"
    average = modeling_mixtral.load_balancing_loss_func
    names = ["gate_logits", "num_experts", "top_k", "attention_mask"]
    assert list(inspect.signature(average).parameters) == names, "router.py"
    assert "flat_mask = attention_mask.reshape(-1)" in source(average), "router.py"


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
    assert line in text, "run.py: _load_optimizer_and_scheduler"


def test_axolotl_keeps_of_an_entry_of_datasets_what_dpo_datasets_have():
    assert "DPODataset(**ds_cfg)" in source(validate_config), "entries.py: IGNORED"
    fields = DPODataset.model_fields.keys()
    assert not IGNORED.keys() & fields, "entries.py: IGNORED"
    assert FIELDS.keys() <= fields, "entries.py: FIELDS"


def test_trl_drops_pairs_in_prepare_dataset():
    names = list(inspect.signature(DPOTrainer._prepare_dataset).parameters)
    own = ["self", "dataset", "processing_class", "args", "dataset_name"]
    assert names == own, "feed.py: _prepare_dataset"


def test_trl_tells_messages_from_text_by_any_column_it_knows():
    text = source(is_conversational)
    assert '"completion", "messages"]' in text, "feed.py: _prepare_dataset"
    assert "example_keys.pop()" in text, "feed.py: _prepare_dataset"


def test_the_training_loop_runs_over_what_get_batch_samples_returns():
    text = source(Trainer._run_epoch)
    assert "self.get_batch_samples(" in text, "feed.py: get_batch_samples"
    assert "for i, inputs in enumerate(batch_samples)" in text


def test_a_mask_of_four_dimensions_is_handed_on_as_it_is():
    text = source(masking_utils._preprocess_mask_arguments)
    early = text.index("len(attention_mask.shape) == 4")
    assert early < text.index("find_packed_sequence_indices"), "batch.py: pack"


def test_flash_attention_takes_boundaries_and_passes_keywords_on():
    names = inspect.signature(_flash_attention_forward).parameters
    for side in "qk":
        assert f"cu_seq_lens_{side}" in names, "attention.py: _boundaries"
        assert f"max_length_{side}" in names, "attention.py: _boundaries"
    assert "**kwargs" in source(flash_attention_forward), "attention.py: _varlen"


def test_torchs_varlen_attention_has_these_arguments_and_asks_no_cudnn_for_them():
    names = [*inspect.signature(varlen.varlen_attn).parameters]
    first = ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert names[:7] == first, "attention.py: _varlen"
    assert {"scale", "window_size"} <= {*names[7:]}, "attention.py: _varlen"
    assert varlen_shares_heads() == {
        name: True for name in names if name == "enable_gqa"
    }, "upstream.py: varlen_shares_heads"
    text = source(varlen)
    assert "is_causal = window_size == (-1, 0)" in text, "attention.py: _varlen"
    # 2.14 asks cuDNN, but not where a window ends on the right
    asked = getattr(varlen, "_can_use_cudnn", None)
    if asked:
        line = "if window_size != [-1, -1]:\n        return False"
        assert line in source(asked), "attention.py: _varlen"
    else:
        assert "True" not in source(varlen._should_use_cudnn), "attention.py: _varlen"


def test_sdpa_is_looked_up_when_it_is_called_and_takes_no_cap_and_no_sink():
    text = source(sdpa_attention_forward)
    assert "torch.nn.functional.scaled_dot_product_attention(" in text, "attention.py"
    assert "softcap" not in text and "s_aux" not in text, "attention.py: BEYOND_VARLEN"
    names = inspect.signature(sdpa_attention_forward).parameters
    assert {"dropout", "is_causal"} <= names.keys(), "attention.py: _takes_varlen"


def test_gradient_checkpointing_keeps_the_keywords_of_a_layer():
    text = source(GradientCheckpointingLayer.__call__)
    assert "partial(super().__call__, **kwargs)" in text, "attention.py: segments"


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
    assert callable(module.eager_attention_forward), "attention.py: _eager"
    windowed = kind == "llama" or "sliding_window=" in source(module)
    assert windowed, "attention.py: sliding_window"


def test_plugins_load_data_first_and_gradients_pass_through_the_norm():
    text = source(importlib.import_module("axolotl.cli.train").do_train)
    assert text.index("plugin_manager.load_datasets(") < text.index(
        "load_preference_datasets_fn("
    ), "plugin.py: load_datasets"
    text = source(Trainer._run_epoch)
    order = "_set_sync_gradients( training_step( _get_grad_norm( optimizer.step("
    places = [text.index(name) for name in order.split()]
    assert places == sorted(places), "trainer.py: where a run is stopped"
