"""Runs with axolotl's LoRA kernels are the runs without them.

What the kernels compute, layer by layer: tests/unit/models/test_attached_kernels.py.
"""

import pytest
from axolotl.evaluate import evaluate
from helpers import tiny
from helpers.lora_kernels import KERNELS, on_this_machine
from helpers.releases import needs_late_kernels
from helpers.tiers import first
from helpers.tiny import CACHED, LORA, NF4

from axolotl_edpo.models.attached_kernels import attached_kernels

pytestmark = needs_late_kernels

PACKED = {"sample_packing": True}
SLOW = "gradient_checkpointing"
WAYS = {
    "packed": PACKED,
    "padded": {},
    "checkpointing": {SLOW: True},
    "reentrant": {SLOW: True, f"{SLOW}_kwargs": {"use_reentrant": True}},
    "cached": {**PACKED, **CACHED},
    "dropout": {"lora_dropout": 0.5},
    "head": {"lora_modules_to_save": ["lm_head"]},
    "eager": {**PACKED, "attn_implementation": "eager"},
    "sft": {**PACKED, "dpo_loss_type": ["sigmoid", "sft"]},
}


@pytest.fixture(autouse=True)
def kernels_run_here():
    with on_this_machine():
        yield


def assert_same_run(fused, plain) -> None:
    """And at the first step, policy and reference are equal to the last bit."""
    assert attached_kernels(fused.model) == {*KERNELS}
    assert attached_kernels(plain.model) == set()
    own, expected = tiny.logs(fused), tiny.logs(plain)
    assert len(own) == len(expected) == 3
    assert own[0]["kl/p_epsilon_steps"] == own[0]["kl/n_epsilon_steps"] == 0.0
    assert own[0]["kl/policy_ref"] == own[0]["rewards/margins"] == 0.0
    for name in ("loss", "kl/beta", "kl/p_epsilon_steps", "rewards/margins"):
        assert [log[name] for log in own] == pytest.approx(
            [log[name] for log in expected], abs=1e-5
        ), name
    norms = [[log["grad_norm"] for log in logs] for logs in (own, expected)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert own[2]["kl/policy_ref"] > 1e-4


@pytest.mark.parametrize("way", first([*WAYS]))
def test_a_run_with_kernels_is_the_run_without(recipe, tmp_path, way):
    keys = recipe(**LORA, **WAYS[way], max_steps=3)
    plain = tiny.train(tmp_path, keys)
    fused = tiny.train(tmp_path, keys | KERNELS | {"output_dir": str(tmp_path / "o")})
    assert_same_run(fused, plain)


@pytest.mark.rest
def test_an_adapter_is_trained_further_from_its_start(recipe, tmp_path):
    start = tmp_path / "start"
    tiny.train(tmp_path, recipe(**LORA, max_steps=3, output_dir=str(start)))
    further = recipe(**LORA, max_steps=3, lora_model_dir=str(start))
    plain = tiny.train(tmp_path, further)
    assert_same_run(tiny.train(tmp_path, further | KERNELS), plain)


@pytest.mark.rest
def test_an_evaluation_compares_an_adapter_with_its_base(recipe, parts, tmp_path):
    keys = recipe(**LORA, max_steps=3, test_datasets=tiny.dataset(parts["eval"]))
    start = tiny.train(tmp_path, keys).args.output_dir
    keys |= {"output_dir": str(tmp_path / "other"), "lora_model_dir": start}

    def evaluated(**more) -> dict[str, float]:
        cfg = tiny.load_config(tmp_path, keys | more)
        metrics = evaluate(cfg=cfg, dataset_meta=tiny.load_data(cfg))
        names = ("eval_loss", "eval_kl/policy_ref", "eval_rewards/margins")
        return {name: metrics[name] for name in names}

    expected = evaluated()
    assert expected["eval_kl/policy_ref"] > 1e-4
    assert evaluated(**KERNELS) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="`lora_mlp_kernel: true`.*`lora_model_dir`"):
        del keys["lora_model_dir"]
        evaluated(**KERNELS)


@pytest.mark.rest
def test_weights_of_4_bits_are_read_by_kernels_that_pytorch_computes(recipe, tmp_path):
    """Quantized once: what is quantized twice is read by a kernel for GPUs."""
    once = {"bnb_config_kwargs": {"bnb_4bit_use_double_quant": False}}
    used = {**KERNELS, "lora_mlp_kernel": False}  # no bf16 in the interpreter
    keys = recipe(**NF4, **once, max_steps=3)
    plain, fused = (tiny.train(tmp_path, keys | more) for more in ({}, used))
    assert attached_kernels(fused.model) == {"lora_qkv_kernel", "lora_o_kernel"}
    (first, *later), expected = tiny.logs(fused), tiny.logs(plain)
    assert first["kl/p_epsilon_steps"] == first["kl/n_epsilon_steps"] == 0.0
    assert first["kl/policy_ref"] == 0.0 < later[1]["kl/policy_ref"]
    for own, other in zip([first, *later], expected, strict=True):
        assert own["loss"] == pytest.approx(other["loss"], abs=2e-3)
        assert own["grad_norm"] == pytest.approx(other["grad_norm"], rel=2e-2)
