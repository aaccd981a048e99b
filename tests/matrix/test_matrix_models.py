"""Every family of models, at a few thousand parameters: padded, packed and shared."""

from dataclasses import dataclass, field

import pytest
from axolotl.utils.logging import MultiProcessAdapter
from helpers import matrix, tiny
from helpers.matrix import Cell
from helpers.tiny import EXPERTS, FALCON_H1
from transformers.models.granitemoe.modeling_granitemoe import GraniteMoeModel

TITLE = "Models"
INTRO = """
Random models of two layers, padded and with `sample_packing: true`, which give the
same; where a model cannot be packed, `sample_packing: auto` pads it.
"""
HYBRID = "`sample_packing: true` is refused, as its layers carry a state; `auto` pads"
ROUTER = "the router loss of each micro-batch is kept, packed as padded"
# Not before transformers 5.20.
GRANITE = "router_logits" in (GraniteMoeModel._can_record_outputs or ())
WINDOW = {"sliding_window": 24}


@dataclass(frozen=True)
class Model(Cell):
    """A cell with a model.

    Attributes:
        kind: Its `model_type`.
        config: What its config has besides tiny.SIZES.
        router: Whether a router loss is logged.
        unpackable: Regular expression of what refuses `sample_packing: true`.
    """

    kind: str = ""
    config: dict = field(default_factory=dict)
    router: bool = False
    unpackable: str = ""


# With heads, windows, routers and layers that differ.
SOON = ("llama", "mistral", "gemma2", "cohere", "mixtral", "gpt_oss", "falcon_h1")
CELLS = [
    Model("Llama", kind="llama"),
    Model("Mistral", kind="mistral", config=WINDOW),
    Model("Qwen2.5", kind="qwen2"),
    Model("Qwen3", kind="qwen3"),
    Model("Gemma 2", kind="gemma2", config=WINDOW),
    Model("Gemma 3, text", kind="gemma3_text", config=WINDOW),
    Model("Phi-3", kind="phi3"),
    Model("Cohere", kind="cohere", config={"logit_scale": 0.3}),
    Model("Granite", kind="granite", config={"logits_scaling": 2.0}),
    Model("Mixtral", kind="mixtral", config=EXPERTS, router=True, note=ROUTER),
    Model(
        "Qwen3 MoE",
        kind="qwen3_moe",
        config={**EXPERTS, "num_experts": 4, "moe_intermediate_size": 32},
        router=True,
        note=ROUTER,
    ),
    Model(
        "gpt-oss",
        {"attn_implementation": "eager"},
        kind="gpt_oss",
        config={**EXPERTS, **WINDOW},
        router=True,
        note=ROUTER,
    ),
    Model(
        "Granite MoE",
        kind="granitemoe",
        config=EXPERTS,
        router=GRANITE,
        note=ROUTER if GRANITE else "a warning says that it has no router loss",
    ),
    Model(
        "Falcon-H1",
        kind="falcon_h1",
        config=FALCON_H1,
        unpackable="layers that carry a state",
        note=HYBRID,
    ),
]


@matrix.cells(CELLS, lambda cell: cell.kind in SOON)
def test_a_model_trains_padded_and_packed_alike(cell, recipe, tmp_path):
    model = tiny.save_model(tmp_path / "model", cell.kind, **cell.config)
    # one micro-batch, as a router loss is one of a micro-batch
    whole = dict(micro_batch_size=8, gradient_accumulation_steps=1, adam_epsilon=1e-4)
    keys = recipe(base_model=str(model), **whole, **cell.keys)
    padded = matrix.assert_cell(cell, tmp_path, keys)
    packing = {"sample_packing": True}
    if cell.unpackable:
        with pytest.raises(ValueError, match=cell.unpackable):
            tiny.train(tmp_path, {**keys, **packing})
        packing = {"sample_packing": "auto"}
    packed = matrix.assert_cell(cell, tmp_path, {**keys, **packing})
    assert packed.batcher.layout.packs != bool(cell.unpackable)
    for a, b in zip(tiny.logs(padded), tiny.logs(packed), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["kl/beta"] == b["kl/beta"]
        assert ("aux_loss" in a) == ("aux_loss" in b) == cell.router
        assert a.get("aux_loss", 0) == pytest.approx(b.get("aux_loss", 0), rel=1e-5)


def test_a_router_loss_without_gradient_is_said_once(recipe, tmp_path, caplog):
    """Reentrant checkpointing runs its forward without one, also with TRL."""
    MultiProcessAdapter.warning_once.cache_clear()
    model = tiny.save_model(tmp_path / "model", "mixtral", **EXPERTS)
    reentrant = {"use_reentrant": True}
    keys = dict(gradient_checkpointing=True, gradient_checkpointing_kwargs=reentrant)
    tiny.train(tmp_path, recipe(base_model=str(model), **keys, max_steps=2))
    said = [r for r in caplog.records if "the router loss" in r.message]
    assert len(said) == 1 and "trains nothing" in said[0].message


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_the_router_loss_is_that_of_plain_dpo(kind, recipe, tmp_path):
    """Where the first step's DPO loss is log 2, the rest is the router's."""
    model = tiny.save_model(tmp_path / "model", kind, **EXPERTS)
    attention = "eager" if kind == "gpt_oss" else "sdpa"
    keys = dict(base_model=str(model), attn_implementation=attention, max_steps=2)
    ours = tiny.train(tmp_path, recipe(**keys, edpo_epsilon=1e-9))
    trls = tiny.train(tmp_path, recipe(**keys, **tiny.DPO))
    for a, b in zip(tiny.logs(ours), tiny.logs(trls, "loss"), strict=True):
        for name in ("loss", "aux_loss", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-4), name
    assert tiny.logs(ours)[0]["loss"] > 0.6931 + 1e-4
