"""Every loss of `dpo_loss_type`, and what weighs pairs: TRL's own in the limit."""

import pytest
from helpers import matrix, tiny
from helpers.matrix import Cell
from transformers import LlamaForCausalLM

from axolotl_edpo.config.validate import check_recipe
from axolotl_edpo.losses.preference import LOSSES, REFUSED, SFT
from axolotl_edpo.losses.reference_free import REFERENCE_FREE

TITLE = "Losses"
INTRO = """
Each has the pair's own β̃ wherever it has a β. With ε of 1e-9 its losses and gradients
are those of `rl: dpo` (TRL's own code) to 1e-5.
"""
NOTES = {
    "sigmoid": "the default",
    "exo_pair": "needs `dpo_label_smoothing` above 0",
    "bco_pair": "without a shift, as in TRL",
    "discopop": "with TRL's default temperature: axolotl has no key for it",
}
SMOOTHING = {"exo_pair": 1e-3, "robust": 0.1}


def keys_of(name: str) -> dict:
    smoothing = {"dpo_label_smoothing": SMOOTHING[name]} if name in SMOOTHING else {}
    return {"dpo_loss_type": [name], **smoothing}


TYPES = [
    Cell(f"`dpo_loss_type: [{name}]`", keys_of(name), note=NOTES.get(name, ""))
    for name in LOSSES
]
OTHERS = [
    Cell(
        "`dpo_loss_type: [sigmoid, sft]`, `dpo_loss_weights: [1.0, 0.5]` (RPO)",
        {"dpo_loss_type": ["sigmoid", SFT], "dpo_loss_weights": [1.0, 0.5]},
        note="`sft` is a mean over the chosen tokens of the optimizer step, however it "
        "is cut into micro-batches",
    ),
    Cell(
        "`dpo_loss_type: [sigmoid, bco_pair, sft]`, `dpo_loss_weights: [0.8, 0.2, 1.0]`"
        " (MPO)",
        {
            "dpo_loss_type": ["sigmoid", "bco_pair", SFT],
            "dpo_loss_weights": [0.8, 0.2, 1.0],
        },
    ),
    Cell(
        "`dpo_ld_alpha: 0.5` (LD-DPO)",
        {"dpo_ld_alpha": 0.5},
        note="refused where axolotl does not have it",
        missing=matrix.without("dpo_ld_alpha"),
    ),
    Cell("`dpo_use_weighting: true` (WPO)", {"dpo_use_weighting": True}),
    Cell(
        "`dpo_use_weighting: true`, `dpo_loss_type: [ipo, nca_pair]`",
        {"dpo_use_weighting": True, "dpo_loss_type": ["ipo", "nca_pair"]},
    ),
]
NO_REFERENCE = [
    Cell(
        f"`dpo_loss_type: [{name}]`, `edpo_control: fixed`",
        {
            "dpo_loss_type": [name],
            "edpo_control": "fixed",
            "edpo_epsilon": None,
            **({} if loss.has_beta else {"beta": None}),
        },
        note="without a reference: no second model is loaded",
    )
    for name, loss in REFERENCE_FREE.items()
]
WPO_HINGE = Cell(
    "`dpo_use_weighting: true`, `dpo_loss_type: [hinge]`",
    {"dpo_use_weighting": True, "dpo_loss_type": ["hinge"]},
    note="`rl: dpo` stops here: TRL changes in place what autograd needs",
)
SMOOTHED = Cell(
    "`dpo_label_smoothing: 0.2` (conservative DPO)",
    {"dpo_label_smoothing": 0.2},
    note="TRL takes it with `sigmoid` and leaves it without effect",
)
PENALIZED = Cell(
    "`edpo_length_penalty: 0.03` (R-DPO)",
    {"edpo_length_penalty": 0.03},
    note="TRL has no such loss; with `sigmoid` and `robust`, and any `edpo_control`",
)
LIGER = Cell(
    "`dpo_use_liger_kernel: true`",
    {"dpo_use_liger_kernel": True},
    note="accepted: this head takes the place of Liger's loss, said once",
)
LIGER_PLUGIN = "axolotl.integrations.liger.LigerPlugin"
LIGER_MODEL = Cell(
    "`liger_fused_linear_cross_entropy: true` (Liger's plugin)",
    {
        "plugins": [LIGER_PLUGIN, "axolotl_edpo.EDPOPlugin"],
        "liger_fused_linear_cross_entropy": True,
    },
    note="has no effect: the head is not run by the model's own forward",
)
LIGER_KERNELS = Cell(
    "`liger_rope`, `liger_rms_norm`, `liger_glu_activation` and the like",
    untested="Liger's Triton kernels need a GPU",
)
CUT_CROSS_ENTROPY = Cell(
    "`cut_cross_entropy` (its plugin), `cut_cross_entropy_accum_c_fp32`, "
    "`cut_cross_entropy_c_grad_chunk_size`",
    untested="axolotl's fork of cut-cross-entropy, and a GPU",
    note="the last two keys are of axolotl 0.20 and later",
)
WRONG = [
    *(
        Cell(f"`dpo_loss_type: [{n}]`", {"dpo_loss_type": [n]}, n, note=REFUSED[n])
        for n in REFUSED
    ),
    Cell(
        "`dpo_loss_type: [sft]`",
        {"dpo_loss_type": ["sft"]},
        r"add one with a β",
        note="it has no β: there would be nothing for ε-DPO to do",
    ),
    Cell(
        "`dpo_loss_type: [simpo]`",
        {"dpo_loss_type": ["simpo"]},
        "set `edpo_control: fixed`",
        note="without a reference, nothing says how β should move",
    ),
    Cell(
        "`dpo_loss_type: [cpo, sigmoid]`",
        {"dpo_loss_type": ["cpo", "sigmoid"], "edpo_control": "fixed"},
        "stand alone",
        note="rewards and NLL are of one loss",
    ),
    Cell(
        "`dpo_loss_type: [sigmoidd]`",
        {"dpo_loss_type": ["sigmoidd"]},
        r"`dpo_loss_type: sigmoidd`.*use one of sigmoid, ",
        note="no such loss",
    ),
    Cell(
        "`dpo_loss_type: [hinge]`, `dpo_label_smoothing: 0.1`",
        {"dpo_loss_type": ["hinge"], "dpo_label_smoothing": 0.1},
        r"`dpo_label_smoothing: 0.1`.*only sigmoid, robust, exo_pair",
        note="it would have no effect",
    ),
    Cell(
        "`dpo_loss_type: [ipo]`, `edpo_length_penalty: 0.03`",
        {"dpo_loss_type": ["ipo"], "edpo_length_penalty": 0.03},
        r"`edpo_length_penalty: 0.03`.*only sigmoid, robust",
        note="it would have no effect",
    ),
    Cell(
        "`dpo_loss_type: [exo_pair]` without `dpo_label_smoothing`",
        {"dpo_loss_type": ["exo_pair"]},
        r"`dpo_label_smoothing: 0.0`.*above 0",
        note="the loss would be infinite",
    ),
    Cell(
        "`dpo_use_weighting: true`, `dpo_loss_type: [sigmoid, sft]`",
        {"dpo_use_weighting": True, "dpo_loss_type": ["sigmoid", "sft"]},
        r"`dpo_use_weighting: true`.*mean over tokens",
        note="`sft` is a mean over tokens: a pair has no share that could be weighted",
    ),
    Cell(
        "`dpo_loss_weights` of another length than `dpo_loss_type`",
        {"dpo_loss_type": ["sigmoid"], "dpo_loss_weights": [1.0, 2.0]},
        r"`dpo_loss_weights: \[1.0, 2.0\]`.*of which there are 1",
        note="which weight is whose?",
    ),
    Cell(
        "`dpo_loss_weights: [0.0]`",
        {"dpo_loss_weights": [0.0]},
        r"`dpo_loss_weights: \[0.0\]`.*above 0",
        note="nothing would be learnt",
    ),
]
CELLS = [
    *TYPES,
    *OTHERS,
    *NO_REFERENCE,
    WPO_HINGE,
    SMOOTHED,
    PENALIZED,
    LIGER,
    LIGER_MODEL,
    LIGER_KERNELS,
    CUT_CROSS_ENTROPY,
    *WRONG,
]


@matrix.cells([*TYPES, *OTHERS])
def test_with_a_tiny_epsilon_a_loss_is_trls_own(cell, recipe, tmp_path):
    keys = dict(micro_batch_size=8, gradient_accumulation_steps=1, max_steps=4)
    own = recipe(**keys, **cell.keys, edpo_epsilon=1e-9)
    ours = tiny.train(tmp_path, own)
    trls = tiny.train(tmp_path, recipe(**keys, **cell.keys, **tiny.DPO))
    rows = zip(tiny.logs(ours, "loss"), tiny.logs(trls, "loss"), strict=True)
    for a, b in rows:
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5, abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4, abs=1e-5)


@matrix.cells([WPO_HINGE, SMOOTHED, PENALIZED, LIGER])
def test_it_trains(cell, recipe, tmp_path):
    matrix.assert_cell(cell, tmp_path, recipe(**cell.keys))


@matrix.cells(NO_REFERENCE)
def test_it_trains_without_a_reference(cell, recipe, tmp_path):
    trainer = tiny.train(tmp_path, recipe(**cell.keys, max_steps=2))
    assert trainer.ref_model is None
    for log in tiny.logs(trainer):
        assert log["grad_norm"] > 0 and log["rewards/chosen"] < 0


@matrix.cells([LIGER_MODEL])
def test_a_forward_of_ligers_is_left_aside(cell, recipe, tmp_path, monkeypatch):
    own = LlamaForCausalLM.forward
    monkeypatch.setattr(LlamaForCausalLM, "forward", own)  # Liger's stays no longer
    matrix.assert_cell(cell, tmp_path, recipe(**cell.keys))
    assert LlamaForCausalLM.forward is not own


def test_that_ligers_loss_is_replaced_is_said_once(recipe, tmp_path, caplog):
    tiny.train(tmp_path, recipe(**LIGER.keys, max_steps=1))
    said = [r for r in caplog.records if "takes the place of Liger's" in r.message]
    assert len(said) == 1


@matrix.cells(WRONG)
def test_what_would_not_be_what_it_says_is_refused(cell):
    with pytest.raises(ValueError, match=cell.refused):
        check_recipe({"rl": "edpo", **cell.keys})
