"""R-DPO and LD-DPO: losses and gradients of a real model, whose policy has learned.

The other side is computed in float64 from full logits: R-DPO by its formula in plain
PyTorch, LD-DPO by TRL's own trainer. Here everything is float32.
"""

import copy
import math

import pandas
import pytest
import torch
import torch.nn.functional as F
from helpers import oracle, tiny
from helpers.controls import FIXED, HALF_TAILS, MARGIN
from helpers.tiers import only
from helpers.tiny import DPO

ROWS = {"padded": {}, "packed": {"sample_packing": True}}
BETA, EPSILON, PENALTY, SMOOTHING = 0.1, 0.05, 0.03, 0.1
COUNT = 8  # pairs of the batch


def learned(trainer):
    """Moves the policy away from its reference."""
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in trainer.model.parameters():
            weight += 0.02 * torch.randn_like(weight)
    return trainer


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: weight.grad for name, weight in model.named_parameters()}


def of_a_batch(trainer) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of a batch as this trainer computes it, and its gradients."""
    model = trainer.model.train()
    trainer.prepare(model)
    trainer.records.begin(1, removes=False)  # the policy has learned
    rows = [trainer.train_dataset[row] for row in range(COUNT)]
    batch = trainer.batcher.collators["train"](rows)
    counts = trainer.batcher.count([batch])[:2]
    loss = trainer.compute_loss(model, batch, num_items_in_batch=counts)
    loss.backward()
    return loss.item(), gradients(model)


def assert_same(found, expected) -> None:
    """The loss and the whole gradient to 1e-6; that of a single weight to 2e-6."""
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found[1].keys() == expected[1].keys()
    errors, norms = [], []
    for name, gradient in expected[1].items():
        errors.append((found[1][name].double() - gradient).norm())
        norms.append(gradient.norm())
        assert errors[-1] <= 2e-6 * norms[-1] > 0, name
    assert torch.stack(errors).norm() <= 1e-6 * torch.stack(norms).norm()


def r_dpo(trainer, loss_of) -> tuple[float, dict[str, torch.Tensor]]:
    """The mean of `loss_of(x)`, x = β̃(w - l) + α(|w| - |l|), in float64."""
    policy, reference = (
        copy.deepcopy(model).double() for model in (trainer.model, trainer.ref_model)
    )
    rows = [trainer.train_dataset[row] for row in range(COUNT)]
    ids, attention, completion = oracle.batch(rows)
    y, mask = ids[:, 1:], completion[:, 1:]
    a = policy(input_ids=ids, attention_mask=attention).logits[:, :-1]
    with torch.no_grad():
        b = reference(input_ids=ids, attention_mask=attention).logits[:, :-1]
        plus, minus = oracle.released_differences(a, b, y, mask, EPSILON)
    logps = [x.log_softmax(-1).gather(-1, y[..., None])[..., 0] * mask for x in (a, b)]
    chosen, rejected = (logps[0].sum(1) - logps[1].sum(1)).chunk(2)
    betas = BETA * torch.ones(COUNT, dtype=torch.float64)
    if trainer.controller.settings.control == "epsilon":
        steps = ((plus > 0) & (minus < 0)).long() - ((plus < 0) & (minus > 0)).long()
        assert {1, -1} <= {*steps.tolist()}
        betas = BETA / (1 + EPSILON * steps)
    lengths = completion.sum(1)
    longer = lengths[:COUNT] - lengths[COUNT:]
    assert longer.min() < 0 < longer.max()
    loss = loss_of(betas * (chosen - rejected) + PENALTY * longer).mean()
    loss.backward()
    return loss.item(), gradients(policy)


def smoothed(alpha: float):
    return lambda x: -(1 - alpha) * F.logsigmoid(x) - alpha * F.logsigmoid(-x)


CASES = {
    "epsilon": ({}, smoothed(0.0)),
    "epsilon, smoothed": ({"dpo_label_smoothing": SMOOTHING}, smoothed(SMOOTHING)),
    "fixed": (FIXED, smoothed(0.0)),
    "fixed, robust": (
        {
            **FIXED,
            "dpo_loss_type": ["robust"],
            "dpo_label_smoothing": SMOOTHING,
        },
        smoothed(-SMOOTHING / (1 - 2 * SMOOTHING)),
    ),
}


@pytest.mark.parametrize(
    "case", only([*CASES], lambda case: case in ("epsilon", "fixed, robust"))
)
def test_r_dpo_is_its_formula_from_full_logits(recipe, tmp_path, case):
    keys, loss_of = CASES[case]
    for rows in ROWS.values():
        penalized = recipe(**keys, **rows, edpo_length_penalty=PENALTY)
        trainer = learned(tiny.build(tmp_path, penalized))
        expected = r_dpo(trainer, loss_of)
        assert_same(of_a_batch(trainer), expected)


@pytest.mark.parametrize(
    "keys",
    only([{}, FIXED, MARGIN], lambda keys: keys is not FIXED),
    ids=["epsilon", "fixed", "batch_margin"],
)
def test_only_the_loss_has_the_length_and_no_other_number(recipe, tmp_path, keys):
    """Of each step, from its trace: rewards and β are made of log-ratios alone."""
    run = recipe(**keys, edpo_length_penalty=PENALTY, edpo_log_pairs=1, num_epochs=2)
    trainer = tiny.train(tmp_path, run)
    logs = tiny.logs(trainer)
    trace = pandas.read_parquet(f"{trainer.args.output_dir}/edpo_pairs")
    assert len(logs) == trace["global_step"].nunique() == 10
    for entry, (_, pairs) in zip(logs, trace.groupby("global_step"), strict=True):
        longer = pairs["chosen_tokens"] - pairs["rejected_tokens"]
        x = pairs["margin"] + PENALTY * longer
        loss = sum(math.log1p(math.exp(-value)) for value in x) / len(pairs)
        assert entry["loss"] == pytest.approx(loss, rel=1e-6)
        margin = pairs["margin"].mean()
        assert entry["rewards/margins"] == pytest.approx(margin, rel=1e-5, abs=1e-6)
    assert logs[0]["loss"] != pytest.approx(math.log(2), abs=1e-3)
    assert logs[0]["rewards/margins"] == 0.0


def test_ld_dpo_is_trls_own(recipe, tmp_path):
    """`ld_alpha: 0.5` of TRL's DPOTrainer, by the recipe of `rl: dpo`."""
    keys = {**DPO, "plugins": HALF_TAILS[1:]}
    plain = learned(tiny.build(tmp_path, recipe(**keys)))
    assert plain.ld_alpha == 0.5
    model, plain.ref_model = plain.model.double().train(), plain.ref_model.double()
    rows = [plain.train_dataset[row] for row in range(COUNT)]
    loss = plain.compute_loss(model, plain._prepare_inputs(plain.data_collator(rows)))
    loss.backward()
    expected = loss.item(), gradients(model)
    for rows in ROWS.values():
        own = recipe(**rows, **FIXED, plugins=HALF_TAILS)
        trainer = learned(tiny.build(tmp_path, own))
        assert trainer.loss.ld_alpha == 0.5
        assert_same(of_a_batch(trainer), expected)
        trainer.model.zero_grad()
        trainer.loss = type(trainer.loss)()
        whole = of_a_batch(trainer)[0]
        assert abs(whole - expected[0]) > 1e-3
