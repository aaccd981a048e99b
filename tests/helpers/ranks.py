"""axolotl's training on several CPU ranks, with the real engines over gloo.

accelerate and axolotl choose DeepSpeed and FSDP only where they see a GPU. The plugin
`CpuRanks` changes which device and backend they choose, and nothing of the engines. A
recipe that names it beside `axolotl_edpo.EDPOPlugin` goes through any launcher.

`run` forks the ranks, as `helpers.processes` does, so a tiny run takes seconds.
"""

import gc
import importlib
import json
import os
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed reads it when it is imported

import torch
import torch.multiprocessing as mp
from accelerate import parallelism_config, state
from accelerate.utils import DistributedType
from axolotl import utils
from axolotl.cli import config
from axolotl.integrations.base import BasePlugin

from axolotl_edpo.distributed import local_part
from helpers import processes, tiny

# A CUDA build of torch would ask the driver, which a forked process must not do.
torch.cuda.can_device_access_peer = lambda *args: True

# A DeepSpeed file without `zero_optimization`, and the `fsdp_config` of a recipe.
ZERO = {
    "bf16": {"enabled": "auto"},
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "zero_force_ds_cpu_optimizer": False,  # its kernel would be compiled first
}
FSDP2 = {
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
    "state_dict_type": "FULL_STATE_DICT",
    "reshard_after_forward": True,
}


class BrokenGradient(BasePlugin):
    """In the second optimizer step, the gradient of one weight becomes NaN."""

    def post_trainer_create(self, cfg, trainer) -> None:
        """Adds a hook to the last weight."""

        def broken(gradient: torch.Tensor) -> torch.Tensor:
            return gradient * float("nan") if trainer.state.global_step else gradient

        *_, last = trainer.model.parameters()
        last.register_hook(broken)


class BrokenReference(BasePlugin):
    """The last weight of the reference is half of what it was, where rank 1 has it."""

    def post_trainer_create(self, cfg, trainer) -> None:
        """Changes the weight, or this rank's shard of it."""
        if os.environ.get("RANK") == "1":
            *_, last = trainer.ref_model.parameters()
            local_part(last).mul_(0.5)


class FolderOfTheRank(BasePlugin):
    """Each rank works in a folder of `FOLDERS`, as on machines that share no disk."""

    def post_trainer_create(self, cfg, trainer) -> None:
        """Changes the working folder."""
        folder = Path(os.environ["FOLDERS"], f"rank{os.environ['RANK']}")
        folder.mkdir()
        os.chdir(folder)


class CpuRanks(BasePlugin):
    """Lets the engine that a recipe names run on CPU ranks."""

    def register(self, cfg: dict) -> None:
        """Changes what accelerate and axolotl would choose for this engine."""
        gc.freeze()  # axolotl and DeepSpeed collect often; imports are never garbage
        _leave_placement_to_accelerate()
        if cfg.get("deepspeed"):
            _use_gloo_alone()
            _choose_cpu(DistributedType.MULTI_CPU)
        elif cfg.get("fsdp_config") or cfg.get("context_parallel_size", 1) > 1:
            _choose_cpu(DistributedType.MULTI_GPU)
            os.environ["ACCELERATE_BYPASS_DEVICE_MAP"] = "true"  # DDP names no GPU
        else:
            os.environ["ACCELERATE_USE_CPU"] = "true"

    def post_trainer_create(self, cfg, trainer) -> None:
        """Keeps the trainer until the process ends.

        axolotl destroys the process group first, and DDP's reducer then holds the last
        reference to it. Freeing the reducer joins gloo's threads with the GIL held. A
        thread that waits for the GIL, to free a tensor, would never end.
        """
        _kept.append(trainer)


_kept: list[Any] = []


def _leave_placement_to_accelerate() -> None:
    """Keeps axolotl from putting the model on GPU number LOCAL_RANK.

    The device of accelerate is the CPU without a number: checkpoints cannot be loaded
    to a CPU with one.
    """
    torch.cuda.set_device = lambda *args, **kwargs: None
    state.PartialState.set_device = lambda self: setattr(self, "device", _CPU)
    normalize = config.normalize_config
    for module in (config, utils.config):  # one is for workers of Ray
        module.normalize_config = lambda cfg: (normalize(cfg), cfg.pop("device_map"))[0]


def _choose_cpu(kind: DistributedType) -> None:
    """Makes accelerate set up gloo, and meshes of CPUs."""
    state.PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", kind)
    parallel = parallelism_config.ParallelismConfig
    build = parallel.build_device_mesh
    parallel.build_device_mesh = lambda self, device: build(self, "cpu")


_CPU = torch.device("cpu")


def _use_gloo_alone() -> None:
    """Keeps DeepSpeed to what gloo does.

    In float32, ZeRO-1 and ZeRO-2 gather from a shard that requires a gradient. gloo
    refuses that, and DeepSpeed's other way to gather detaches. And a part of DeepSpeed
    that only CPU ranks have, sums in shared memory, would be compiled first, for a
    minute; a rank that is killed meanwhile leaves a lock on which all later ones wait.
    """
    import deepspeed

    deepspeed.comm.has_all_gather_into_tensor = lambda: False
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def run(folder: Path, keys: dict, ranks: int = 2, probe: str | None = None) -> list:
    """Trains a recipe on CPU ranks.

    Args:
        folder: Where the recipe and the ranks' results are put.
        keys: The recipe.
        ranks: Processes; with one, the recipe names no engine.
        probe: `module:function`, called on every rank. Its argument is a function
            that trains and returns the trainer. It returns the trainer, and a dict
            that is added to the result.

    Returns:
        A result per rank: the entries that the trainer logged as `log`, β at the end
        as `beta`, and what the probe adds.

    Raises:
        ProcessRaisedException: If a rank failed; it holds the traceback.
        TimeoutError: If a rank hangs.
    """
    processes.wait(start(folder, keys, ranks, probe))
    return results(folder, ranks)


def start(
    folder: Path, keys: dict, ranks: int = 2, probe: str | None = None
) -> mp.ProcessContext:
    """Starts the ranks of `run` and does not wait for them."""
    folder.mkdir(parents=True, exist_ok=True)
    port = processes.free_port()
    return processes.start(_rank, ranks, port, folder, keys, probe, count=ranks)


def results(folder: Path, ranks: int = 2) -> list:
    """The results of ranks that `start` started there and that have ended."""
    files = [folder / f"rank{rank}.json" for rank in range(ranks)]
    return [json.loads(file.read_text()) for file in files]


def _rank(rank: int, ranks: int, port: int, folder: Path, keys: dict, probe) -> None:
    if ranks > 1:
        become(rank, ranks, port)
    keys = {**keys, "plugins": [*keys.get("plugins", []), "helpers.ranks.CpuRanks"]}

    def train():
        return tiny.train(folder / f"rank{rank}", keys)

    (folder / f"rank{rank}").mkdir(exist_ok=True)
    if probe is None:
        trainer, more = train(), {}
    else:
        module, _, function = probe.partition(":")
        trainer, more = getattr(importlib.import_module(module), function)(train)
    result = {"log": trainer.state.log_history, "beta": trainer.controller.beta, **more}
    (folder / f"rank{rank}.json").write_text(json.dumps(result))


def become(rank: int, ranks: int, port: int) -> None:
    """Makes this process a rank as torchrun starts them: by its variables."""
    values: dict[str, Any] = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=ranks)
    values |= dict(LOCAL_WORLD_SIZE=ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ |= {name: str(value) for name, value in values.items()}
