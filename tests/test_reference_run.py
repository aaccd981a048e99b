"""The released trainer's trajectories, number by number (tests/data/reference_run)."""

import json

import pytest
import torch
from axolotl.core.trainers.dpo.args import AxolotlDPOConfig
from conftest import DATA
from datasets import Dataset
from tiny import reference_text, reference_tokenizer
from transformers import AutoModelForCausalLM

from axolotl_edpo.controller import ControllerSettings
from axolotl_edpo.trainer import EDPOTrainer

RUN = DATA / "reference_run"
RUNS = sorted(path.stem for path in RUN.glob("*_eps*.json"))


PAIRS = json.loads((RUN / "pairs.json").read_text())


def train(expected, output_dir, micro_batch_size=4, steps=None):
    steps = steps or len(expected["steps"])
    trainer = EDPOTrainer(
        AutoModelForCausalLM.from_pretrained(RUN / "model"),
        AutoModelForCausalLM.from_pretrained(RUN / "model"),
        args=AxolotlDPOConfig(
            output_dir=str(output_dir),
            per_device_train_batch_size=micro_batch_size,
            gradient_accumulation_steps=16 // micro_batch_size,
            max_steps=steps,
            learning_rate=expected["learning_rate"],
            lr_scheduler_type="constant",
            optim="adamw_torch",
            weight_decay=0.0,
            max_grad_norm=1.0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            remove_unused_columns=False,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(
            [
                {key[:-4]: reference_text(ids) for key, ids in pair.items()}
                for pair in PAIRS
            ]
        ),
        processing_class=reference_tokenizer(),
        settings=ControllerSettings(
            expected["beta"], expected["epsilon"], expected["beta_mean"]
        ),
    )
    assert [
        {key: row[key] for key in PAIRS[0]} for row in trainer.train_dataset
    ] == PAIRS
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "kl/beta" in entry]
    return trainer, logs


@pytest.mark.parametrize("run", RUNS)
def test_trajectory_of_the_released_trainer(run, tmp_path):
    expected = json.loads((RUN / f"{run}.json").read_text())
    trainer, logs = train(expected, tmp_path)
    assert len(logs) == len(expected["steps"])
    for step, (ours, theirs) in enumerate(zip(logs, expected["steps"], strict=True)):
        for name, value in theirs.items():
            if name in ("kl/p_epsilon_steps", "kl/n_epsilon_steps"):
                tolerance = 0.0
            elif name == "kl/beta":
                tolerance = 1e-5 * value
            else:
                tolerance = 1e-3
            assert abs(ours[name] - value) <= tolerance, (step + 1, name)
    assert trainer.controller.beta == pytest.approx(expected["final_beta"], rel=1e-5)


def test_the_cut_of_a_step_into_micro_batches_changes_nothing(tmp_path):
    expected = json.loads((RUN / "arithmetic_eps0.2.json").read_text())
    runs = [train(expected, tmp_path, size, steps=8) for size in (16, 4, 1)]
    whole, logs = runs[0]
    for cut, cut_logs in runs[1:]:
        for ours, theirs in zip(cut_logs, logs, strict=True):
            for name in ("kl/beta", "kl/p_epsilon_steps", "kl/n_epsilon_steps"):
                assert ours[name] == theirs[name]
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert cut.controller.beta == whole.controller.beta
        for a, b in zip(cut.model.parameters(), whole.model.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
