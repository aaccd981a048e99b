"""reference_free.py: by hand, and with a model against TRL's CPO and ORPO trainers."""

import math

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from helpers import tiny
from transformers import LlamaConfig, LlamaForCausalLM
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from axolotl_edpo.data.collator import PairCollator
from axolotl_edpo.losses.beta_controller import ControllerSettings, make_controller
from axolotl_edpo.losses.preference import Answers, PreferenceLoss
from axolotl_edpo.losses.reference_free import REFERENCE_FREE, Terms
from axolotl_edpo.models.completion_forward import CompletionForward
from axolotl_edpo.reference.no_reference import NoReference
from axolotl_edpo.training.pair_outcomes import MeanOverStep, pair_outcomes
from axolotl_edpo.training.scoring import PairScorer

# log π of two pairs: 4 and 2 tokens against 2 and 5
ANSWERS = Answers(
    chosen=torch.tensor([-2.0, -3.0]),
    rejected=torch.tensor([-2.5, -2.5]),
    chosen_tokens=torch.tensor([4, 2]),
    rejected_tokens=torch.tensor([2, 5]),
    betas=torch.tensor([2.0, 2.0]),
)
TEXTS = {
    "prompt": ["t5 t6 t7", "t8"],
    "chosen": [" t20 t21 t22", " t30 t31 t32 t33 t34"],
    "rejected": [" t40", " t41 t42 t43"],
}


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def log_odds(mean: float) -> float:
    return mean - math.log(1 - math.exp(mean))


# Sums differ by 0.5 and -0.5; means are -0.5, -1.5 against -1.25, -0.5.
BY_HAND = {
    "cpo": [softplus(-2 * 0.5), softplus(2 * 0.5)],
    "slic": [0.75 - 0.5, 0.75 + 0.5],
    "rrhf": [0.0, 1.0],
    "simpo": [softplus(-(2 * 0.75 - 1.4)), softplus(-(2 * -1.0 - 1.4))],
    "orpo": [
        0.3 * softplus(log_odds(-1.25) - log_odds(-0.5)),
        0.3 * softplus(log_odds(-0.5) - log_odds(-1.5)),
    ],
}
TERMS = Terms(gamma=1.4, delta=0.75, odds_weight=0.3)


@pytest.mark.parametrize("name", BY_HAND)
def test_losses_worked_by_hand(name):
    loss = PreferenceLoss((name,), terms=TERMS)
    expected = torch.tensor(BY_HAND[name])
    torch.testing.assert_close(loss.losses(ANSWERS), expected)
    twice = PreferenceLoss((name,), (2.0,), terms=TERMS)
    torch.testing.assert_close(twice.losses(ANSWERS), 2 * expected)


def test_slic_stops_at_its_margin_and_rrhf_at_the_right_order():
    chosen = torch.tensor([-1.0, -2.0], requires_grad=True)
    answers = ANSWERS._replace(chosen=chosen)  # ahead by 1.5 and 0.5; means are not
    for name, expected in (("slic", [0.0, -1.0]), ("rrhf", [0.0, -0.5])):
        losses = PreferenceLoss((name,), terms=TERMS).losses(answers)
        (gradient,) = torch.autograd.grad(losses.sum(), chosen)
        assert gradient.tolist() == expected, name


def test_the_odds_of_an_answer_that_is_certain_stay_finite():
    chosen = torch.zeros(2, requires_grad=True)
    losses = PreferenceLoss(("orpo",)).losses(ANSWERS._replace(chosen=chosen))
    (gradient,) = torch.autograd.grad(losses.sum(), chosen)
    assert losses.isfinite().all() and gradient.tolist() == [0.0, 0.0]


def test_rewards_are_beta_times_what_is_compared():
    rewards = {
        name: PreferenceLoss((name,)).rewards(ANSWERS) for name in REFERENCE_FREE
    }
    for name in ("cpo", "slic"):
        assert [r.tolist() for r in rewards[name]] == [[-4, -6], [-5, -5]]
    for name in ("rrhf", "simpo"):
        assert [r.tolist() for r in rewards[name]] == [[-1, -3], [-2.5, -1]]
    expected = [2 * log_odds(-0.5), 2 * log_odds(-1.5)]
    assert rewards["orpo"][0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "alpha", "weight"),
    [
        *(("cpo", alpha, weight) for alpha, weight in ((None, 3.0), (0.5, 1.5))),
        *(("simpo", alpha, weight) for alpha, weight in ((None, 0.0), (0.5, 1.5))),
        *(("slic", None, 3.0), ("rrhf", 0.0, 0.0), ("orpo", None, 3.0)),
    ],
)
def test_the_weight_of_the_nll_is_that_of_the_paper_or_of_the_recipe(
    name, alpha, weight
):
    loss = PreferenceLoss((name,), (3.0,), terms=Terms(nll_weight=alpha))
    assert loss.sft_weight == weight


# --- TRL -----------------------------------------------------------------------------


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = {**tiny.SIZES, "vocab_size": 256, "initializer_range": 0.15}
    return LlamaForCausalLM(LlamaConfig(**config))


def trl_trainer(kind, config, model, folder, **keys):
    """A trainer of TRL over two pairs, and its batch of both."""
    plain = dict(bf16=False, use_cpu=True, report_to=[], gradient_checkpointing=False)
    trainer = kind(
        model=model,
        args=config(str(folder), per_device_train_batch_size=2, **plain, **keys),
        train_dataset=Dataset.from_dict(TEXTS),
        processing_class=tiny.reference_tokenizer(),
    )
    return trainer, next(iter(trainer.get_train_dataloader()))


def pairs_of(batch: dict) -> list[dict]:
    """The pairs of a batch of TRL, as our collator takes them."""
    rows = []
    for i in range(2):
        row = {}
        for answer in ("chosen", "rejected"):
            seen = batch[f"{answer}_attention_mask"][i].bool()
            ids, scored = (
                batch[f"{answer}_{part}"][i][seen] for part in ("input_ids", "labels")
            )
            row[f"{answer}_ids"] = ids[scored != -100].tolist()
            row["prompt_ids"] = ids[scored == -100].tolist()
        rows.append(row)
    return rows


def ours(model, rows, loss: PreferenceLoss, beta: float) -> torch.Tensor:
    """The loss of our path, on one packed row."""
    forward = CompletionForward(Accelerator(cpu=True))
    batch = PairCollator(pad_token_id=2)(rows)
    no_reference = NoReference(forward)
    score = PairScorer(
        forward, no_reference, None, sum_sq_probs=False, router_loss=False
    )
    stats, _ = score(model, batch)
    controller = make_controller(ControllerSettings(beta, control="fixed"))
    pairs = pair_outcomes(stats, batch["lengths"], controller, loss)
    return MeanOverStep(sft_weight=loss.sft_weight)(pairs, batch, None, None)


def assert_same_gradient(model, own: torch.Tensor, trls: torch.Tensor) -> None:
    """Within 1e-6; gradients within 1e-6 of the largest."""
    torch.testing.assert_close(own, trls, rtol=1e-6, atol=1e-6)
    weights = [*model.parameters()]
    found, expected = (torch.autograd.grad(loss, weights) for loss in (own, trls))
    largest = max(gradient.abs().max().item() for gradient in expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * largest)
    assert largest > 1e-2


@pytest.mark.parametrize(
    ("name", "keys", "terms"),
    [
        ("cpo", dict(beta=0.2, cpo_alpha=1.0), Terms()),
        ("simpo", dict(beta=2.5, simpo_gamma=0.8, cpo_alpha=0.0), Terms(gamma=0.8)),
        ("simpo", dict(beta=2.0, cpo_alpha=0.5), Terms(nll_weight=0.5)),
        ("slic", dict(beta=1.0, cpo_alpha=0.7), Terms(nll_weight=0.7)),
    ],
    ids=["cpo", "simpo", "simpo with NLL", "slic"],
)
def test_values_and_gradients_are_those_of_trls_cpo_trainer(
    name, keys, terms, model, tmp_path
):
    """Its hinge with β of 1 is SLiC with δ of 1."""
    trl_name = {"cpo": "sigmoid", "slic": "hinge"}.get(name, name)
    trainer, batch = trl_trainer(
        CPOTrainer, CPOConfig, model, tmp_path, loss_type=trl_name, **keys
    )
    trls, metrics = trainer.get_batch_loss_metrics(model, batch)
    loss = PreferenceLoss((name,), terms=terms)
    assert_same_gradient(model, ours(model, pairs_of(batch), loss, keys["beta"]), trls)
    assert trls.item() > 0.1 and metrics["rewards/chosen"] < 0


def test_values_and_gradients_are_those_of_trls_orpo_trainer(model, tmp_path):
    """But for the NLL, in which TRL has the tokens of prompts, too."""
    trainer, batch = trl_trainer(ORPOTrainer, ORPOConfig, model, tmp_path, beta=0.3)
    chosen, rejected, *_ = trainer.concatenated_forward(model, batch)
    odds = -trainer.odds_ratio_loss(chosen, rejected)[0].mean()
    tokens = (batch["chosen_labels"] != -100).sum(dim=1)
    nll = -(chosen * tokens).sum() / tokens.sum()
    loss = PreferenceLoss(("orpo",), terms=Terms(odds_weight=0.3))
    assert_same_gradient(model, ours(model, pairs_of(batch), loss, 1.0), odds + nll)
