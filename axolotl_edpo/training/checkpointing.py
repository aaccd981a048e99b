"""Chooses and checks the checkpoint to resume; saves and loads what we add to it."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from axolotl.utils.logging import get_logger
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerState
from transformers.trainer import SCHEDULER_NAME

from ..distributed import gathered, write
from ..run_files import (
    PREFIX,
    STATE,
    checkpoints,
    is_complete,
    last_complete,
    newest_complete,
)
from ..upstream import deepspeed_optimizer_files

LOG = get_logger(__name__)

REFERENCE = "reference.safetensors"
# Prefix of the names of weights in PEFT's file of an adapter.
_PEFT_PREFIX = "base_model.model."


def mark_incomplete(checkpoint: Path) -> None:
    """Marks a folder as incomplete before a save: an earlier run may have used it."""
    (checkpoint / STATE).unlink(missing_ok=True)


def require_complete(checkpoint: Path) -> None:
    """Refuses a checkpoint that is missing or was not saved to its end.

    Raises:
        ValueError: Names the directory and the newest complete checkpoint beside it.
    """
    if is_complete(checkpoint):
        return
    if not checkpoint.exists():
        raise ValueError(
            f"`resume_from_checkpoint: {checkpoint}`: there is no such folder: name a "
            "checkpoint, or remove it to start anew"
        )
    complete = last_complete(checkpoint.parent)
    start_anew = "remove the directory to start anew"
    remedy = f"set it to {complete}" if complete else start_anew
    raise ValueError(
        f"`resume_from_checkpoint: {checkpoint}`: its {STATE} is missing "
        f"or cut short, so the save was interrupted: {remedy}"
    )


def require_ranks(checkpoint: Path, ranks: int) -> None:
    """Refuses a checkpoint that DeepSpeed divided among another number of ranks.

    Raises:
        ValueError: Names the directory and both numbers.
    """
    saved = len(deepspeed_optimizer_files(checkpoint))
    if saved not in (0, ranks):
        raise ValueError(
            f"`resume_from_checkpoint: {checkpoint}`: DeepSpeed divided its optimizer "
            f"among {saved} ranks, and there are {ranks}: use {saved} ranks, or remove "
            "`deepspeed:` to go on with its weights and β and a new optimizer"
        )


def _require_same_on_all_ranks(output_dir: str, complete: Path | None) -> None:
    """Refuses ranks that found different checkpoints: they would deadlock."""
    choices = set(gather_object([str(complete)]))
    if len(choices) > 1:
        raise ValueError(
            f"`output_dir: {output_dir}`: ranks find different checkpoints to resume "
            f"({', '.join(sorted(choices))}): it must be on a file system that all "
            "machines share"
        )


def choose_auto_resume(cfg) -> None:
    """Chooses the newest complete checkpoint, for `auto_resume_from_checkpoints`.

    axolotl would choose the newest directory, complete or not.

    Args:
        cfg: axolotl's config, changed in place. Sets `resume_from_checkpoint` if it is
            absent. Switches `auto_resume_from_checkpoints` off if no checkpoint is
            complete.

    Raises:
        ValueError: On every rank, if the ranks do not find the same checkpoint.
    """
    if cfg.resume_from_checkpoint:
        return
    saved = checkpoints(Path(cfg.output_dir))
    complete = newest_complete(saved)
    _require_same_on_all_ranks(cfg.output_dir, complete)
    if not saved:
        return
    if complete is None:
        cfg.auto_resume_from_checkpoints = False
    else:
        cfg.resume_from_checkpoint = str(complete)
    if complete != saved[-1]:
        instead = f"resuming from {complete}" if complete else "starting anew"
        LOG.warning(f"{saved[-1]} was not saved to its end; {instead}")


def folder_of(output_dir: str, state: TrainerState) -> Path:
    """The folder of the checkpoint that transformers saves at this step."""
    return Path(output_dir) / f"{PREFIX}{state.global_step}"


def begin_save(
    folder: Path,
    accelerator: Accelerator,
    writes: bool,
    moving_reference: nn.Module | None,
) -> None:
    """Called on all ranks before transformers saves a checkpoint.

    Args:
        folder: The checkpoint's folder.
        accelerator: The run's accelerator.
        writes: Whether this rank writes files.
        moving_reference: The reference of TR-DPO, sharded or not; else None.
    """
    if writes:
        mark_incomplete(folder)
    accelerator.wait_for_everyone()  # no rank writes before the folder is marked
    if moving_reference is not None:
        save_reference(folder, moving_reference, writes)


def require_resumable(checkpoint: Any, deepspeed_ranks: int | None) -> None:
    """Refuses a checkpoint that cannot be resumed.

    Args:
        checkpoint: `resume_from_checkpoint`. Only paths are checked: transformers also
            accepts true, false and None.
        deepspeed_ranks: Number of ranks under DeepSpeed; None without DeepSpeed.

    Raises:
        ValueError: Names the folder and what to do.
    """
    if not isinstance(checkpoint, str | Path):
        return
    require_complete(Path(checkpoint))
    if deepspeed_ranks is not None:
        require_ranks(Path(checkpoint), deepspeed_ranks)


def load_deepspeed_schedule(folder: Path, scheduler: Any) -> None:
    """Restores the learning rate from a checkpoint that DeepSpeed saved.

    The optimizer of such a checkpoint cannot be read without DeepSpeed. So a new
    optimizer starts, and a warning says so.

    Args:
        folder: The checkpoint's folder; if another engine saved it, nothing happens.
        scheduler: The run's scheduler of the learning rate.
    """
    if not any(folder.glob("global_step*")):
        return
    LOG.warning(
        f"{folder} was saved by another engine: weights, β and learning rate "
        "are those of the checkpoint, the optimizer starts anew. To continue "
        "with it, use the same `deepspeed:` and as many ranks."
    )
    if (schedule := folder / SCHEDULER_NAME).exists():
        scheduler.load_state_dict(torch.load(schedule, weights_only=True))


def save_reference(folder: Path, reference: nn.Module, writes: bool) -> None:
    """Saves the reference of TR-DPO (`trl.sync_ref_model`) in a checkpoint.

    All ranks must call it, as gathering sharded weights is a collective.

    Args:
        folder: The checkpoint's folder.
        reference: The model without its engine, sharded or not.
        writes: Whether this rank writes the file.
    """
    weights = {}
    for name, parameter in reference.named_parameters():
        with gathered([parameter]) as (whole,):
            if writes:
                weights[name] = whole.detach().to("cpu", copy=True).contiguous()
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, folder / REFERENCE)


def load_reference(folder: Path, reference: nn.Module) -> None:
    """Loads the weights that `save_reference` saved into a reference.

    Args:
        folder: The checkpoint's folder. If it has no saved reference, a warning is
            logged and nothing is loaded.
        reference: The model without its engine, sharded or not.
    """
    if not (folder / REFERENCE).exists():
        LOG.warning(
            f"{folder} holds no {REFERENCE}: it was saved without "
            "`trl.sync_ref_model`; the reference starts as `base_model`."
        )
        return
    weights = load_file(folder / REFERENCE)
    for name, parameter in reference.named_parameters():
        write(parameter, weights[name])


def name_as_peft(output_dir: Path) -> None:
    """Renames the weights of a saved adapter to the names that PEFT expects.

    With FSDP2, axolotl 0.19 saves names without the prefix of the PEFT model. PEFT
    would find none of them, and load an untrained adapter.

    Args:
        output_dir: The run's output folder. If it has no adapter, nothing happens.
    """
    file = output_dir / SAFETENSORS_WEIGHTS_NAME
    if not file.exists():
        return
    weights = load_file(file)
    if all(name.startswith(_PEFT_PREFIX) for name in weights):
        return
    named = {
        _PEFT_PREFIX + name.removeprefix(_PEFT_PREFIX): weight
        for name, weight in weights.items()
    }
    partial = file.with_suffix(".partial")
    save_file(named, partial)
    partial.replace(file)
