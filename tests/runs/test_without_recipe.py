"""The op and the trainer without a recipe: docs/api.md, run as written."""

import json

import pytest
import torch
import torch.nn.functional as F
from axolotl.core.trainers.dpo.args import AxolotlDPOConfig
from axolotl.integrations.base import PluginManager
from helpers import tiny
from helpers.pages import blocks
from helpers.paths import ROOT
from trl import DPOConfig

from axolotl_edpo.trainer import EDPOTrainer

OP, TRAINER = blocks(ROOT / "docs" / "api.md", "python")


def run(example: str) -> dict:
    """Runs an example of the page; returns its variables."""
    variables: dict = {}
    exec(compile(example, "docs/api.md", "exec"), variables)
    return variables


def test_the_example_of_the_op_is_a_step_of_edpo():
    torch.manual_seed(0)
    found = run(OP)
    policy = found["policy"].detach().double().requires_grad_()
    weight = found["head"].weight.double()
    logits, reference = policy @ weight.T, found["reference"].double() @ weight.T

    def difference(logits):
        logps = -F.cross_entropy(logits, found["targets"], reduction="none")
        chosen, rejected = logps.view(2, 8, 16).sum(-1)
        return chosen - rejected

    z = {k: difference(reference + k * (logits - reference)) for k in (0.99, 1, 1.01)}
    up, down = z[1.01] > z[1], z[0.99] > z[1]
    assert 0 < up.sum() < 8
    betas = 0.1 / (1 + 0.01 * (up.double() - down.double()))
    loss = -F.logsigmoid(betas * (z[1] - difference(reference))).mean()
    torch.testing.assert_close(found["loss"].double(), loss, rtol=1e-5, atol=0)
    assert found["beta"] == pytest.approx(betas.mean().item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, policy)
    given = found["policy"].grad.double()
    torch.testing.assert_close(given, gradient, rtol=1e-4, atol=1e-7)


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """What the example reads, small."""
    build = tmp_path / "examples" / "tiny" / "build"
    tiny.save_model(build / "model")
    rows = [
        {"prompt": f"What is {n}?", "chosen": f" {n} is {n}.", "rejected": f" No {n}."}
        for n in range(40)
    ]
    (build / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("demo")
def test_the_example_of_the_trainer_trains():
    trainer = run(TRAINER)["trainer"]
    log = tiny.logs(trainer)
    assert trainer.state.global_step == 10 and len(log) == 1
    assert trainer.controller.beta != 0.1 and log[0]["kl/p_epsilon_steps"] > 0
    assert log[0]["kl/policy_ref"] > 0


@pytest.mark.usefixtures("demo")
def test_the_example_with_lora_and_packing():
    lines = TRAINER.splitlines()
    (reference,) = (i for i, line in enumerate(lines) if "# the reference" in line)
    lines[reference] = "    peft_config=LoraConfig(target_modules=['q_proj']),"
    lines.insert(0, "from axolotl_edpo.data.layout import LayoutSettings")
    lines.insert(0, "from peft import LoraConfig")
    packed = "epsilon=0.01), LayoutSettings(packs=True, balances=True))"
    example = "\n".join(lines).replace("epsilon=0.01))", packed)
    trainer = run(example)["trainer"]
    (log,) = tiny.logs(trainer)
    assert trainer.ref_model is None and trainer.batcher.layout.packs
    assert trainer.controller.beta != 0.1 and log["kl/policy_ref"] > 0


def test_a_config_of_trl_is_refused():
    message = "`args` is a DPOConfig: pass an AxolotlDPOConfig"
    with pytest.raises(ValueError, match=message):
        EDPOTrainer(None, args=DPOConfig(bf16=False, use_cpu=True))


def test_neither_settings_nor_a_recipe(monkeypatch, tmp_path):
    monkeypatch.setattr(PluginManager.get_instance(), "_cfg", None)
    args = AxolotlDPOConfig(str(tmp_path), bf16=False, use_cpu=True)
    with pytest.raises(ValueError, match="`settings` is missing, and axolotl runs no"):
        EDPOTrainer(None, args=args)
