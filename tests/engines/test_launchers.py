"""Several ranks through axolotl's own command line, and what is left when one dies."""

import json
import signal
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest
from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.config import load_cfg
from axolotl.cli.train import ray_train_func
from helpers import processes, ranks, tiny
from helpers.commands import installed
from helpers.killed_runs import dying
from helpers.tiers import first, rest
from torch.multiprocessing import ProcessExitedException

from axolotl_edpo.training.checkpointing import last_complete

# `--standalone`: at a port that is free; without it, all launches want the same one
TWO_RANKS = ("--launcher", "torchrun", "--", "--standalone", "--nproc_per_node=2")
SHARDED = {**ranks.FSDP2, "state_dict_type": "SHARDED_STATE_DICT"}
ENGINES = {
    "ddp": {},
    "fsdp2": dict(fsdp_version=2, fsdp_config=SHARDED),
    "zero3": dict(deepspeed="zero3.json"),
}
ZERO3 = {
    **ranks.ZERO,
    "zero_optimization": {
        "stage": 3,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}


def betas(entries: list[dict]) -> list[float]:
    return [entry["kl/beta"] for entry in entries if "kl/beta" in entry]


def saved_betas(checkpoint: Path) -> list[float]:
    """β at every step up to a checkpoint, and the next."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    saved = state["stateful_callbacks"]["EDPO"]["beta"]
    return [*betas(state["log_history"]), saved]


def launch(folder: Path, keys: dict) -> tuple[int, str, float]:
    """`axolotl train` on two CPU ranks.

    Returns:
        Exit code, what was printed, when it ended.
    """
    tiny.write(folder, keys)
    done = installed(folder, "train", "recipe.yml", *TWO_RANKS)
    return done.returncode, done.stdout, time.time()


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    forkserver.ensure_running()  # imports while the launcher does
    folder = tmp_path_factory.mktemp("launchers")
    (folder / "zero3.json").write_text(json.dumps(ZERO3))
    tiny.save_model(folder / "model")
    tiny.save_pairs(folder / "pairs.jsonl", 40)
    return folder


@pytest.fixture(scope="module")
def recipe(shared):
    """Makes a recipe of ten steps of eight pairs on two ranks."""

    def make(folder: Path, engine: str = "ddp", **keys):
        folder.mkdir(exist_ok=True)
        keys = {
            **ENGINES[engine],
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "num_epochs": 2,
            "adam_epsilon": 1e-4,
            "save_strategy": "steps",
            "save_steps": 2,
            "output_dir": str(folder / "out"),
            "auto_resume_from_checkpoints": True,
            **keys,
        }
        if "deepspeed" in keys:
            keys["deepspeed"] = str(shared / keys["deepspeed"])
        return tiny.recipe(shared, shared / "model", shared / "pairs.jsonl", **keys)

    return make


@pytest.fixture(scope="module")
def alone(shared, recipe):
    """β at every step of one process that makes batches as large."""
    folder = shared / "alone"
    trainer = tiny.train(folder, recipe(folder, micro_batch_size=4))
    assert trainer.state.global_step == 10
    assert trainer.controller.beta < 0.09
    return [*betas(trainer.state.log_history), trainer.controller.beta]


@pytest.fixture(scope="module")
def launchable(shared, recipe):
    """A recipe in a folder that two ranks take from a launcher."""
    folder = shared / "launched"
    keys = recipe(folder, "fsdp2")
    return folder, {**keys, "plugins": [*keys["plugins"], "helpers.ranks.CpuRanks"]}


@pytest.fixture(scope="module")
def killed(launchable):
    """Rank 1 is killed after step 7: what came of it, and the last checkpoint."""
    folder, keys = launchable
    return launch(folder, dying(keys, rank=1, step=7)), last_complete(folder / "out")


@rest
def test_a_launch_ends_when_a_rank_dies_and_names_it(killed):
    (code, printed, ended), kept = killed
    assert code == 1, printed[-3000:]
    assert "rank      : 1 (local_rank: 1)" in printed
    assert f"exitcode  : {-signal.SIGKILL}" in printed
    assert kept.name == "checkpoint-6"
    saved = (kept / "trainer_state.json").stat().st_mtime
    assert 0 < ended - saved < 30  # nobody waits for the dead rank


@rest
def test_the_same_command_again_ends_as_one_process_that_was_never_killed(
    launchable, killed, alone
):
    kept = killed[1]
    code, printed, _ = launch(*launchable)
    assert code == 0, printed[-3000:]
    assert printed.count("'kl/beta'") == 4  # steps 7 to 10
    assert saved_betas(kept.parent / "checkpoint-10") == alone


@pytest.mark.parametrize("engine", first(["ddp", "zero3"]))
def test_a_checkpoint_counts_when_every_rank_has_written_its_part(
    shared, recipe, alone, engine
):
    """Rank 1 dies over its part of step 6; the others have long written theirs.

    Over 20 s where its ranks are the first: what forks them imports everything.
    """
    folder = shared / engine
    keys = recipe(folder, engine)
    with pytest.raises(ProcessExitedException, match=r"process 1 .*SIGKILL"):
        ranks.run(folder, dying(keys, rank=1, save=6))
    cut = folder / "out" / "checkpoint-6"
    assert (cut / "rng_state_1.pth").stat().st_size == 100
    assert not (cut / "trainer_state.json").exists()
    assert last_complete(folder / "out").name == "checkpoint-4"
    for result in ranks.run(folder, keys):
        assert [*betas(result["log"]), result["beta"]] == alone


def ray_worker(rank: int, port: int, cfg: dict) -> None:
    """What a worker of Ray does: axolotl's function, in variables like torchrun's."""
    ranks.become(rank, 2, port)
    ray_train_func({"cfg": cfg, "cli_args": TrainerCliArgs()})


def test_workers_of_ray_take_the_config_that_the_driver_has_lowered(
    shared, recipe, alone
):
    """Ray itself only starts them; its driver loads the recipe on one process."""
    folder = shared / "ray"
    keys = recipe(folder, sample_packing=True)
    # without `ddp`, axolotl 0.19 counts the steps of one worker and trains two
    # workers for twice the epochs
    keys |= {"use_ray": True, "ray_num_workers": 2, "ddp": True}
    cfg = load_cfg(str(tiny.write(folder, keys))).to_dict()
    assert (cfg["rl"], cfg["edpo_sample_packing"]) == ("dpo", True)
    cfg["plugins"].append("helpers.ranks.CpuRanks")
    processes.run(ray_worker, processes.free_port(), cfg, count=2)
    assert saved_betas(folder / "out" / "checkpoint-10") == alone
