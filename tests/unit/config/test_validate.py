"""validate.py: every bad recipe is one line with key, value and remedy."""

import pytest
from helpers.releases import needs_late_kernels

from axolotl_edpo.config.args import EDPOArgs
from axolotl_edpo.config.typos import misspelt
from axolotl_edpo.config.validate import (
    check_foreign_recipe,
    check_recipe,
    check_without_gpu,
)
from axolotl_edpo.upstream import default_fsdp_version, patches_adapters_late

CHAT = {"path": "a", "type": "chat_template.default"}
LATE = patches_adapters_late()
FUSED = {"adapter": "qlora", "lora_qkv_kernel": True, "lora_mlp_kernel": True}
WRONG = [
    ({"edpo_epsilon": 1.5}, r"`edpo_epsilon: 1.5`.*less than 1.*between 0 and 1"),
    ({"edpo_epsilon": 0}, r"`edpo_epsilon: 0`.*greater than 0"),
    ({"edpo_epsilon": -0.1}, r"`edpo_epsilon: -0.1`"),
    ({"edpo_epsilon": "small"}, r"`edpo_epsilon: small`.*number"),
    ({"edpo_epsilon": True}, r"`edpo_epsilon: true`.*number"),
    ({"edpo_epsilon": float("nan")}, r"`edpo_epsilon: \.nan`"),
    ({"edpo_epsilonn": 0.1}, r"`edpo_epsilonn: 0.1`.*did you mean `edpo_epsilon`"),
    ({"edpo_mean": "harmonic"}, r"did you mean `edpo_beta_mean`"),
    ({"edpo_beta_mean": "geometric"}, r"`edpo_beta_mean: geometric`.*'arithmetic'"),
    ({"beta": 0}, r"`beta: 0`.*greater than 0"),
    ({"beta": float("inf")}, r"`beta: \.inf`"),
    ({"rl_beta": -1}, r"`rl_beta: -1`.*greater than 0"),
    ({"trl": {"beta": "x"}}, r"`trl.beta: x`"),
    ({"beta": 0.1, "rl_beta": 0.2}, r"`beta: 0.1` and `rl_beta: 0.2`.*keep one"),
    ({"beta": 0.1, "dpo_beta": 0.5}, r"`beta: 0.1` and `dpo_beta: 0.5`.*keep one"),
    ({"dpo_beta": -1}, r"`dpo_beta: -1`.*greater than 0"),
    ({"rl_beta": 0.1, "trl": {"beta": 0.2}}, r"`rl_beta: 0.1` and `trl.beta: 0.2`"),
    ({"sample_packing": "yes"}, r"`sample_packing: yes`.*true, false or auto"),
    ({"eval_sample_packing": "auto"}, r"`eval_sample_packing: auto`"),
    (
        {"sample_packing": True, "edpo_sample_packing": "auto"},
        r"`sample_packing: true` and `edpo_sample_packing: auto`.*disagree",
    ),
    ({"edpo_prefix_sharing": "on"}, r"`edpo_prefix_sharing: on`.*true, false or auto"),
    ({"edpo_prefix_sharing": True}, r"`edpo_prefix_sharing: true`.*dpo_padding_free"),
    (
        {"precompute_ref_log_probs": True, "trl": {"sync_ref_model": True}},
        r"`precompute_ref_log_probs: true`.*`trl.sync_ref_model`",
    ),
    (
        {
            "precompute_ref_log_probs": True,
            "unfrozen_parameters": ["lm_head", "model.embed_tokens.weight$[5:9]"],
        },
        r"`precompute_ref_log_probs: true`.*`unfrozen_parameters: .*\$\[5:9\]`",
    ),
    ({"precompute_ref_log_probs": "yes, please"}, r"true or false"),
    (
        {"edpo_reference_cache": "cache"},
        r"`edpo_reference_cache: cache`.*set `precompute_ref_log_probs: true`",
    ),
    (
        {"precompute_ref_log_probs": True, "edpo_reference_cache": __file__},
        r"`edpo_reference_cache: .*test_validate.py`.*this is a file",
    ),
    (
        {"precompute_ref_log_probs": True, "edpo_reference_cache": 3},
        r"`edpo_reference_cache: 3`.*string",
    ),
    ({"reference_free": True}, r"`reference_free: true`.*cpo, slic, .* no reference"),
    ({"edpo_control": "free"}, r"`edpo_control: free`.*'epsilon', 'fixed'"),
    (
        {"edpo_control": "fixed", "edpo_epsilon": 0.1},
        r"`edpo_epsilon: 0.1`.*remove it.*`edpo_control: fixed`",
    ),
    (
        {"edpo_control": "batch_margin", "edpo_beta_mean": "harmonic"},
        r"`edpo_beta_mean: harmonic`.*`edpo_control: batch_margin`",
    ),
    ({"edpo_margin_weight": 0.5}, r"`edpo_margin_weight: 0.5`.*`edpo_control: epsil"),
    (
        {"edpo_control": "batch_margin", "edpo_margin_keep": 0},
        r"`edpo_margin_keep: 0`.*greater than 0",
    ),
    (
        {"edpo_control": "batch_margin", "edpo_margin_momentum": 1},
        r"`edpo_margin_momentum: 1`.*less than 1",
    ),
    ({"edpo_control": "batch_margin", "beta": 1e-4}, r"`beta: 0.0001`.*set 0.001"),
    (
        {
            "edpo_control": "batch_margin",
            "edpo_margin_keep": 0.8,
            "dpo_loss_type": ["sigmoid", "sft"],
        },
        r"`edpo_margin_keep: 0.8`.*`sft`",
    ),
    (
        {
            "edpo_control": "batch_margin",
            "edpo_margin_keep": "8e-1",  # which YAML reads as a string
            "dpo_loss_type": ["sigmoid", "sft"],
        },
        r"`edpo_margin_keep: 8e-1`.*`sft`",
    ),
    ({"edpo_log_pairs": 0}, r"`edpo_log_pairs: 0`.*greater than 0"),
    ({"edpo_log_pairs": True}, r"`edpo_log_pairs: true`"),
    ({"edpo_max_kl": 0}, r"`edpo_max_kl: 0`.*greater than 0.*nats per token"),
    ({"edpo_max_kl": True}, r"`edpo_max_kl: true`.*a number, not true or false"),
    ({"edpo_length_penalty": -1}, "`edpo_length_penalty: -1`.*or equal to 0.*R-DPO"),
    ({"edpo_length_penalty": ".inf"}, "`edpo_length_penalty: .inf`.*number"),
    ({"edpo_length_penalty": True}, "`edpo_length_penalty: true`.*a number, not true"),
    (
        {"edpo_length_penalty": "5e-2", "dpo_loss_type": ["ipo", "hinge"]},
        "`edpo_length_penalty: 0.05`.*remove it: .* only sigmoid, robust",
    ),
    ({"dpo_label_smoothing": 0.5}, r"`dpo_label_smoothing: 0.5`.*below 0.5"),
    ({"fsdp": ["full_shard"]}, "`fsdp: .*`fsdp_version: 2`"),
    ({"context_parallel": {"size": "no"}}, "`context_parallel.size: no`.*integer"),
    ({"context_parallel": 2}, "`context_parallel: 2`: lines with keys"),
    ({"expert_parallel_size": 2}, "`expert_parallel_size: 2`.*set `.*: 1`: .*experts"),
    ({"dpo_ld_alpha": 2}, "`dpo_ld_alpha: 2`.*less than or equal to 1"),
    ({"use_dft": True}, "`use_dft: true`.*supervised training only"),
    ({"use_eaft": True}, "`use_eaft: true`.*supervised training only"),
    ({"balance_labels": True}, "`balance_labels: true`.*supervised training only"),
    ({"diffusion_lm": {"gamma": 1.0}}, "`diffusion_lm: .*log-probability"),
    (
        {"datasets": [{"path": "a", "weight": 0.5}]},
        r"`datasets: weight: 0.5`.*`split: train\[:50%\]`",
    ),
    (
        {"fsdp_version": 1, "fsdp_config": {"offload_params": True}},
        "`fsdp_version: 1`.*version: 2`",
    ),
    (
        {
            "fsdp_version": 2,
            "fsdp_config": {"reshard_after_forward": True},
            "adapter": "lora",
            "lora_modules_to_save": ["lm_head"],
        },
        r"`lora_modules_to_save: \[lm_head\]`.*deepspeed.*FSDP2",
    ),
    (
        {"use_ray": True, "ray_num_workers": 4},
        "`ray_num_workers: 4`.*`ddp: true`.*4 times",
    ),
    (
        {"accelerator_config": {"dispatch_batches": True}},
        "`accelerator_config.dispatch_batches: true`.*remove it",
    ),
    ({"neftune_noise_alpha": 5.0}, r"`neftune_noise_alpha: 5.0`.*noise.*log-prob"),
    ({"relora": True}, r"`relora: true`.*remove it.*supervised training only"),
    ({"peft_init_lora_weights": "pissa"}, r"`peft_init_lora_weights: pissa`"),
    (
        {"peft": {"loftq_config": {"loftq_bits": 4}}},
        r"`peft.loftq_config: \{loftq_bits: 4\}`",
    ),
    (
        {"trl": {"sync_ref_model": True}, "adapter": "lora"},
        r"`trl.sync_ref_model: true`.*without its adapter",
    ),
    (
        {"trl": {"sync_ref_model": True, "ref_model_mixup_alpha": 0}},
        r"`trl.ref_model_mixup_alpha: 0`",
    ),
    (
        {"trl": {"sync_ref_model": True, "ref_model_sync_steps": 0}},
        r"`trl.ref_model_sync_steps: 0`",
    ),
    ({"dataset_shard_num": 2}, r"`dataset_shard_num: 2`.*`split: train\[:10%\]`"),
    (
        {"datasets": [{"path": "a", "preprocess_shards": 2}]},
        "`datasets: preprocess_shards: 2`.*ignored, remove it",
    ),
    (
        {"datasets": [{**CHAT, "message_field_role": "from"}]},
        "`datasets: message_field_role: from`.*name it `role`",
    ),
    (
        {"datasets": [CHAT, {**CHAT, "chat_template_jinja": "{{ 1 }}"}]},
        "`datasets: chat_template_jinja: {{ 1 }}`.*whole recipe",
    ),
    (
        {"datasets": [{**CHAT, "chat_template": "tokenizer_default"}]}
        | {"chat_template": "llama3"},
        "`datasets: chat_template: tokenizer_default`",
    ),
    (
        {"test_datasets": [{**CHAT, "roles": {"user": ["human"]}}]},
        "`test_datasets: roles: .*in the data",
    ),
    (
        {"test_datasets": [{"path": "a", "type": {"prompt_format": "Q: {prompt}"}}]},
        "`test_datasets: type: .*Q: .*axolotl removes its keys.*without `type`",
    ),
    ({"trl": "x"}, "`trl: x`: lines with keys"),
    ({"qat": True}, "`qat: true`: lines with keys"),
    ({"trl": {"ref_model_sync_steps": "often"}}, "`trl.ref_model_sync_steps: often`"),
    ({"context_parallel_size": "2"}, "`context_parallel_size: 2`"),
    ({"tensor_parallel_size": "auto"}, "`tensor_parallel_size: auto`.*integer"),
    ({"dpo_loss_weights": 1.0}, "`dpo_loss_weights: 1.0`.*list"),
    ({"dpo_loss_type": [["sigmoid"]]}, r"`dpo_loss_type: \[sigmoid\]`.*string"),
    ({"dpo_label_smoothing": "abc"}, "`dpo_label_smoothing: abc`.*number"),
    ({"fsdp_version": "v2", "fsdp_config": {"a": 1}}, "`fsdp_version: v2`.*integer"),
    ({"val_set_size": 4}, "`val_set_size: 4`.*less than 1"),
    (
        {"datasets": [{**CHAT, "roles": ["user"]}]},
        r"`datasets: roles: \[user\]`.*ignored",
    ),
    ({"tensor_parallel_size": 2}, r"`tensor_parallel_size: 2`"),
    ({"lora_model_dir": "a"}, r"`lora_model_dir: a`.*adapter: lora"),
    (
        {"lora_model_dir": "a", "adapter": "lora", "rl_adapter_ref_model": True},
        r"`rl_adapter_ref_model: true`.*own start",
    ),
    (
        {"lora_mlp_kernel": True, "adapter": None if LATE else "lora"},
        "`lora_mlp_kernel: true`.*remove it, or "
        + ("set `adapter: lora`" if LATE else "install axolotl 0.21.*adds later"),
    ),
    ({"lora_o_kernel": True, "adapter": "mixlora"}, "`lora_o_kernel: true`.*remove it"),
    (
        {"lora_embedding_kernel": True, "adapter": "lora"},
        "`lora_embedding_kernel: true`.*remove it"
        + (", or set `lora_mlp_kernel: true`" if LATE else ": .*supervised"),
    ),
    ({"relora": True}, r"`relora: true`.*supervised training only"),
    ({"adapter": "llama-adapter"}, r"`adapter: llama-adapter`.*`adapter: lora`"),
    ({"adapter": "lora", "load_in_4bit": True}, r"`load_in_4bit: true`.*qlora"),
    (
        {"adapter": "lora", "unfrozen_parameters": ["lm_head"]},
        r"`unfrozen_parameters: \[lm_head\]`.*`lora_modules_to_save`",
    ),
    ({"peft_autocast_adapter_dtype": False}, r"`peft_autocast_adapter_dtype: false`"),
    (
        {"qat": {"fake_quant_after_n_steps": 5}},
        r"`qat.fake_quant_after_n_steps: 5`.*reference",
    ),
]


@pytest.mark.parametrize(("keys", "message"), WRONG, ids=lambda v: str(v)[:40])
def test_a_wrong_recipe_is_one_line_with_key_value_and_remedy(keys, message):
    with pytest.raises(ValueError, match=message) as caught:
        check_recipe({"rl": "edpo", **keys})
    assert "\n" not in str(caught.value)


@needs_late_kernels
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"peft_use_dora": True}, "before the first step"),
        ({"bnb_config_kwargs": {"bnb_4bit_quant_type": "fp4"}}, "4 bits as `nf4`"),
    ],
)
def test_what_lora_kernels_would_not_compute_is_refused(keys, message):
    size = {"lora_r": 4, "lora_target_linear": True}
    recipe = {"rl": "edpo", **size, **FUSED, **keys}
    with pytest.raises(ValueError, match=f"remove it, or .*{message}") as caught:
        check_recipe(recipe)
    assert next(iter(keys)) in str(caught.value)
    assert "`lora_mlp_kernel: true`" in str(caught.value)
    check_recipe({**recipe, "lora_qkv_kernel": False, "lora_mlp_kernel": False})


@pytest.mark.parametrize("key", [key for key in FUSED if key != "adapter"])
def test_lora_kernels_need_a_gpu(key):
    with pytest.raises(ValueError, match=f"`{key}: true` needs a GPU: remove it"):
        check_without_gpu({"adapter": "lora", key: True})


@needs_late_kernels
def test_lora_kernels_are_taken_beside_an_adapter():
    size = {"lora_r": 4, "lora_target_linear": True, "lora_embedding_kernel": True}
    once = {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}
    check_recipe({"rl": "edpo", **FUSED, **size, "bnb_config_kwargs": once})
    check_recipe({"rl": "edpo", **FUSED, **size, "adapter": "lora"})


@pytest.mark.parametrize(
    ("keys", "beta"),
    [
        ({}, None),
        ({"beta": 0.01}, 0.01),
        ({"rl_beta": "1e-2"}, 0.01),  # YAML reads 1e-2 as a string
        ({"trl": {"beta": 0.5}}, 0.5),
        ({"dpo_beta": 0.5}, 0.5),
        ({"edpo_control": "batch_margin", "beta": 0.001}, 0.001),  # its lowest β
        ({"beta": 0.1, "rl_beta": 0.1, "trl": {"beta": 0.1}}, 0.1),
        ({"trl": None, "dpo_loss_type": ["sigmoid"], "sample_packing": False}, None),
        ({"peft_init_lora_weights": True, "torch_compile": True}, None),
        ({"sample_packing": "auto", "edpo_prefix_sharing": True}, None),
        ({"dpo_padding_free": True, "edpo_prefix_sharing": True}, None),
        ({"eval_sample_packing": True, "edpo_prefix_sharing": "auto"}, None),
        ({"fsdp_version": 2, "fsdp_config": {"reshard_after_forward": True}}, None),
        ({"fsdp_config": {"version": 2}}, None),
        ({"use_ray": True, "ray_num_workers": 4, "ddp": True}, None),
        ({"group_by_length": True, "early_stopping_patience": 3}, None),
        ({"dpo_loss_type": ["sigmoid"], "dpo_label_smoothing": 0.1}, None),
        ({"dpo_loss_type": ["ipo", "robust"], "edpo_length_penalty": "5e-2"}, None),
        ({"dpo_loss_type": ["ipo"], "edpo_length_penalty": 0}, None),
        ({"dpo_ld_alpha": 1.0, "context_parallel": {"size": 1}}, None),
        ({"expert_parallel_size": 1, "datasets": [{"path": "a", "weight": 1}]}, None),
    ],
)
def test_all_ways_to_write_beta_mean_the_same(keys, beta):
    assert check_recipe({"rl": "edpo", **keys}) == beta


USUAL = dict(
    chat_template="tokenizer_default",
    message_property_mappings={"role": "role", "content": "content"},
    message_field_content="content",
    roles={"user": ["human", "user"], "assistant": ["assistant"]},
    ds_type="json",
    field_chosen="yes",
)


@pytest.mark.parametrize(
    "keys",
    [
        {"datasets": [{**CHAT, **USUAL}], "test_datasets": [{**CHAT, **USUAL}]},
        {"datasets": [{**CHAT, "chat_template": "gemma"}], "chat_template": "gemma"},
        {"datasets": [{"path": "a", "type": "chatml.icr", "chat_template": "gemma"}]},
        {"datasets": [{"path": "a", "shards": None}], "dataset_shard_num": None},
        {"datasets": [CHAT], "test_datasets": [{"path": "b", "type": "chatml.icr"}]},
        {"datasets": [{**CHAT, "field_chosen": "chosen"}], "test_datasets": [CHAT]},
    ],
)
def test_ignored_options_that_change_nothing_are_taken(keys):
    assert check_recipe({"rl": "edpo", **keys}) is None


def test_our_keys_in_a_recipe_of_plain_dpo_are_refused():
    with pytest.raises(ValueError, match=r"`edpo_epsilon: 0.01`.*`rl: dpo`.*remove"):
        check_foreign_recipe({"rl": "dpo", "edpo_epsilon": 0.01})
    check_foreign_recipe({"rl": "dpo", "rl_beta": 0.1})


def test_every_option_has_a_description():
    assert all(field.description for field in EDPOArgs.model_fields.values())


KNOWN = {"learning_rate", "datasets", "num_epochs", "lora_alpha", "beta"}


@pytest.mark.parametrize(
    "key",
    ["learning_rat", "learning_ratee", "learning_rafe", "learnign_rate"]
    + ["learning-rate", "Learning_rate"],
)
def test_a_key_one_slip_from_another_is_refused(key):
    with pytest.raises(ValueError, match=rf"`{key}` is .*mean `learning_rate`"):
        misspelt({key: 1}, KNOWN)
    (line,) = misspelt({key: 1, "learning_rate": 2}, KNOWN)  # or an anchor
    assert "has no effect: did you mean `learning_rate`" in line


def test_keys_that_are_like_no_other_are_left_alone():
    helpers = {"_learning_rate": 1, "x-datasets": 1, "defaults": 1, "lr": 1}
    assert misspelt(dict.fromkeys(KNOWN) | helpers, KNOWN) == []
    assert misspelt(helpers, KNOWN) == []


def test_two_slips_are_a_warning():
    (line,) = misspelt({"lerning_rte": 1}, KNOWN)
    assert line == (
        "`lerning_rte` is not an option of axolotl and has no effect: "
        "did you mean `learning_rate`?"
    )


def test_fsdp_of_no_version_is_what_the_release_takes_it_for():
    """Version 1 in axolotl 0.19; then 2, and there is no other."""
    recipe = {"rl": "edpo", "fsdp_config": {"reshard_after_forward": True}}
    if default_fsdp_version() == 2:
        assert check_recipe(recipe) is None
    else:
        with pytest.raises(ValueError, match="`fsdp_version: 1`.*version: 2`"):
            check_recipe(recipe)


@pytest.mark.parametrize("key", ["dpo_ld_alphaa", "dpo_of_a_later_release"])
def test_a_loss_option_of_another_release_is_refused(key):
    """A recipe that is shared would train another loss here, without a word."""
    with pytest.raises(ValueError, match=f"`{key}` is not an option of this release"):
        misspelt({key: 0.5}, {"dpo_use_weighting", "rl_beta"})


def test_an_empty_key_of_ours_says_nothing_beside_another_rl():
    check_foreign_recipe({"rl": "dpo", "edpo_epsilon": None})
