"""Which checkpoint to resume, and what is in one besides transformers' files."""

from pathlib import Path

from accelerate.utils import gather_object
from axolotl.utils.logging import get_logger
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import nn

from ..distributed import gathered, write
from ..run_files import STATE, checkpoints, is_complete, last_complete, newest_complete

LOG = get_logger(__name__)

REFERENCE = "reference.safetensors"
_PEFT_PREFIX = "base_model.model."


def mark_incomplete(checkpoint: Path) -> None:
    """Called before a save: what an earlier run left here no longer counts."""
    (checkpoint / STATE).unlink(missing_ok=True)


def require_complete(checkpoint: Path) -> None:
    """Refuses to resume what an interrupted save left behind.

    Raises:
        ValueError: Names the directory and the newest complete one beside it.
    """
    if is_complete(checkpoint):
        return
    if not checkpoint.exists():
        raise ValueError(
            f"`resume_from_checkpoint: {checkpoint}`: there is no such folder: name a "
            "checkpoint, or remove it to start anew"
        )
    other = last_complete(checkpoint.parent)
    remedy = f"set it to {other}" if other else "remove the directory to start anew"
    raise ValueError(
        f"`resume_from_checkpoint: {checkpoint}`: its {STATE} is missing "
        f"or cut short, so the save was interrupted: {remedy}"
    )


def require_ranks(checkpoint: Path, ranks: int) -> None:
    """Refuses a checkpoint that DeepSpeed divided among another number of ranks.

    Raises:
        ValueError: Names the directory and both numbers.
    """
    saved = len({*checkpoint.glob("global_step*/*zero_pp_rank_*_optim_states.pt")})
    if saved not in (0, ranks):
        raise ValueError(
            f"`resume_from_checkpoint: {checkpoint}`: DeepSpeed divided its optimizer "
            f"among {saved} ranks, and there are {ranks}: use {saved} ranks, or remove "
            "`deepspeed:` to go on with its weights and β and a new optimizer"
        )


def _require_the_same(output_dir: str, complete: Path | None) -> None:
    """Ranks that start from different steps would wait for each other for ever."""
    everywhere = set(gather_object([str(complete)]))
    if len(everywhere) > 1:
        raise ValueError(
            f"`output_dir: {output_dir}`: ranks find different checkpoints to resume "
            f"({', '.join(sorted(everywhere))}): it must be on a file system that all "
            "machines share"
        )


def choose_auto_resume(cfg) -> None:
    """For `auto_resume_from_checkpoints`: the newest complete checkpoint.

    axolotl takes the newest directory, complete or not.

    Args:
        cfg: axolotl's config; `resume_from_checkpoint` is set where it was absent.
            Without a complete checkpoint there is nothing to resume.
    """
    if cfg.resume_from_checkpoint:
        return
    found = checkpoints(Path(cfg.output_dir))
    complete = newest_complete(found)
    _require_the_same(cfg.output_dir, complete)
    if not found:
        return
    if complete is None:
        cfg.auto_resume_from_checkpoints = False
    else:
        cfg.resume_from_checkpoint = str(complete)
    if complete != found[-1]:
        instead = f"resuming from {complete}" if complete else "starting anew"
        LOG.warning(f"{found[-1]} was not saved to its end; {instead}")


def save_reference(folder: Path, reference: nn.Module, writes: bool) -> None:
    """Adds a reference that moves to a checkpoint.

    Args:
        folder: Of the checkpoint.
        reference: Sharded or not.
        writes: Whether this rank does; the others help to gather.
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
    """Gives a reference the weights it had when a checkpoint was saved."""
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
    """Gives the weights of a saved adapter the names under which PEFT looks for them.

    With FSDP2, axolotl 0.19 saves those of the model inside the PEFT model: loaded
    again, it would be an adapter without training.

    Args:
        output_dir: Of a run that is over; without an adapter nothing happens.
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
