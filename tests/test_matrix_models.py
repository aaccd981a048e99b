"""Every family of models, at a few thousand parameters: padded, packed and shared."""

from dataclasses import dataclass, field

import matrix
import tiny
from matrix import Cell

TITLE = "Models"
INTRO = """
Random models of two layers, padded and with `sample_packing: true`; both give the same.
"""


@dataclass(frozen=True)
class Model(Cell):
    """A cell with a model: its `model_type` and what its config has besides SIZES."""

    kind: str = ""
    config: dict = field(default_factory=dict)


CELLS = [
    Model("Llama", kind="llama"),
    Model("Mistral", kind="mistral", config={"sliding_window": 24}),
    Model("Qwen2.5", kind="qwen2"),
    Model("Qwen3", kind="qwen3"),
    Model("Gemma 2", kind="gemma2", config={"sliding_window": 24}),
    Model("Gemma 3, text", kind="gemma3_text", config={"sliding_window": 24}),
    Model("Phi-3", kind="phi3", config={"pad_token_id": 2}),
    Model("Cohere", kind="cohere", config={"logit_scale": 0.3}),
    Model("Granite", kind="granite", config={"logits_scaling": 2.0}),
]


@matrix.cells(CELLS)
def test_a_model_trains_padded_and_packed_alike(cell, recipe, tmp_path):
    model = tiny.save_model(tmp_path / "model", cell.kind, **cell.config)
    keys = recipe(base_model=str(model), **cell.keys)
    padded = matrix.assert_cell(cell, tmp_path, keys)
    packed = matrix.assert_cell(cell, tmp_path, {**keys, "sample_packing": True})
    for a, b in zip(tiny.logs(padded), tiny.logs(packed), strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-5
        assert a["kl/beta"] == b["kl/beta"]
