"""Everything that is to be measured on a GPU, in a quarter of an hour on one.

    python benchmarks/gpu.py --out DIR --budget 400      # seconds, all in all
    python benchmarks/gpu.py --out DIR --only probe,numbers
    python benchmarks/gpu.py --record DIR/gpu.json       # into RESULTS.md, anywhere

Sections run in the order of their value, each in a process of its own: an error or a
fault of CUDA costs that section only. `gpu.json` and `gpu.md` in DIR are written anew
whenever something was found, so that a run that is cut has left all it had. A section
does not start when less than it needs is left of the budget, and is stopped when the
budget is used up. All of them need twelve minutes; where one command may not take so
long, run the second half with --only, and record both files together.

The machine may have no network: wheels that `make gpu-wheels` collected are installed
in `build/gpu-site`, for this benchmark alone. Where flash-attn and wandb are missing,
`stand_ins` has what is needed of them. Without a .git folder, EDPO_COMMIT names the
commit. On a CPU the same runs at toy sizes, which only shows that it runs.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from gpu_child import end, replace
from measure import RESULTS, append_results, commit, device_name, today

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
WHEELS, SITE = ROOT / "build" / "gpu-wheels", ROOT / "build" / "gpu-site"
ON_GPU = torch.cuda.is_available()
TOY_SECONDS = 5  # what a section needs on a CPU, at least
RESERVE = 5.0  # seconds kept for ending a process, writing and cleaning up
PACKAGES = ("torch", "triton", "transformers", "accelerate", "peft", "bitsandbytes")
PACKAGES += ("axolotl", "trl", "liger-kernel", "flash-attn", "axolotl-edpo")
LOG_LINES = 12


class Section(NamedTuple):
    """What is measured together.

    Attributes:
        function: `module:function`, which gets a `gpu_child.Notes`.
        seconds: What it needs on an H100, as measured, and a little more.
        purpose: One line.
        needs_gpu: Whether there is nothing to run on a CPU.
    """

    function: str
    seconds: int
    purpose: str
    needs_gpu: bool = False


SECTIONS = {
    "probe": Section(
        "gpu_op:probe", 10, "what this device and this torch reach: copies, products"
    ),
    "numbers": Section(
        "gpu_op:numbers", 25, "the head's values, gradients and steps against float64"
    ),
    "tests": Section(
        "gpu_op:tests", 140, "tests of kernels, log-probabilities and attention"
    ),
    "head": Section(
        "gpu_op:head", 35, "the head's time relative to the products it needs"
    ),
    "attention": Section(
        "gpu_op:attention", 40, "a packed row of shared prompts through one layer"
    ),
    "sanitizer": Section(
        "gpu_op:sanitizer", 30, "memcheck of the kernels, counters of one of them", True
    ),
    "sync": Section(
        "gpu_training:sync",
        40,
        "where the host waits for the GPU, and how busy that keeps it",
        needs_gpu=True,
    ),
    "train": Section(
        "gpu_training:train", 170, "training steps beside axolotl's `rl: dpo`"
    ),
    "large": Section(
        "gpu_training:large", 110, "LoRA on a model of Llama-3-8B's shape"
    ),
    "rest": Section(
        "gpu_training:rest",
        120,
        "QLoRA, LoRA kernels, fp16, and one rank with DDP and FSDP2",
    ),
}


# --- the machine -----------------------------------------------------------------


def install_wheels() -> str:
    """Installs what `make gpu-wheels` collected, if axolotl is missing.

    Returns:
        What came of it.
    """
    wheels = [str(path) for path in sorted(WHEELS.glob("*.whl"))]
    if not wheels or importlib.util.find_spec("axolotl") is not None:
        return "none"
    options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--upgrade"]
    command = [sys.executable, "-m", "pip", "install", *options]
    command += ["--target", str(SITE), *wheels]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:  # what needs none of them can still be measured
        return f"not installed: {done.stderr.strip()[-500:]}"
    sys.path.insert(0, str(SITE))  # before the machine's own, as for the children
    importlib.invalidate_caches()
    return f"{len(wheels)} installed"


def search_path() -> list[str]:
    """Where sections find modules: here, this package, wheels, and stand-ins."""
    stand_ins = [
        str(HERE / "stand_ins" / name)
        for name in ("wandb", "flash_attn")
        if importlib.util.find_spec(name) is None
    ]
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    site = [str(SITE)] if str(SITE) in sys.path else []
    return [str(HERE), str(ROOT), *filter(None, given), *site, *stand_ins]


def child_environment(work: Path) -> dict[str, str]:
    """One device, no network; what is cached goes with the work folder."""
    return {
        "CUDA_VISIBLE_DEVICES": "0",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(search_path()),
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(work / "datasets"),
        "AXOLOTL_DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TMPDIR": str(work),
    }


def versions() -> dict[str, str]:
    """Of the packages that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def about(wheels: str) -> dict[str, Any]:
    """What the results were found on and with, and what came of the wheels."""
    return {
        "date": today(),
        "device": device_name(),
        "gpu": ON_GPU,
        "commit": commit(),
        "versions": versions(),
        "wheels": wheels,
    }


# --- sections --------------------------------------------------------------------


class Results:
    """What was found so far, as `gpu.json` and `gpu.md` in a folder.

    Args:
        out: The folder.
        about: See `about`.
        names: Of all sections, in order.
    """

    def __init__(self, out: Path, about: dict[str, Any], names: Sequence[str]):
        self._out = out
        self._all = {
            "about": about,
            "sections": {name: {"status": "not run"} for name in names},
        }
        out.mkdir(parents=True, exist_ok=True)
        self._write()

    def put(self, name: str, **entries: Any) -> None:
        """Replaces what there is of a section."""
        self._all["sections"][name] = entries
        self._write()

    def _write(self) -> None:
        text = json.dumps(self._all, indent=1, ensure_ascii=False)
        replace(self._out / "gpu.json", text)
        replace(self._out / "gpu.md", f"# GPU run\n\n{markdown(self._all)}\n")


def run_section(section: Section, seconds: float, work: Path, put) -> None:
    """Runs a section in a process, at most so many seconds.

    Args:
        section: Which.
        seconds: After which it is stopped.
        work: A new folder for it, which exists.
        put: Gets the section's entries in the results, as often as they change.
    """
    part, log = work / "part.json", work / "log"
    began, state = time.monotonic(), {}

    def told(**more: Any) -> None:
        spent = round(time.monotonic() - began, 1)
        put(**{"status": "running", **state, "seconds": spent, **more})

    command = [sys.executable, "-c", "import gpu_child; gpu_child.main()"]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, section.function, str(part)],
            stdin=subprocess.PIPE,  # closed when this process ends, however it does
            stdout=output,
            stderr=subprocess.STDOUT,
            env=child_environment(work),
            cwd=work,
        )
    stopped = False
    try:
        while (code := process.poll()) is None:
            stopped = time.monotonic() - began > seconds
            if stopped:
                break
            time.sleep(0.1)
            if part.exists() and (found := json.loads(part.read_text())) != state:
                state = found
                told()
    finally:
        end(process.pid)
        process.wait()
    if part.exists():
        state = json.loads(part.read_text())
    lines = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
    if "status" in state:
        told()
    elif stopped:
        told(status="stopped", reason=f"the budget ended after {seconds:.0f} s of it")
    else:
        told(status="failed", reason=f"its process ended with {code}", traceback=lines)


def unrun(
    name: str, section: Section, asked: Sequence[str], left: float
) -> dict[str, str]:
    """Why a section does not run with so many seconds left; empty where it does."""
    if name not in asked:
        return {"status": "not asked for"}
    if section.needs_gpu and not ON_GPU:
        return {"status": "needs a GPU"}
    needs = section.seconds if ON_GPU else min(section.seconds, TOY_SECONDS)
    if left < needs:
        left = max(left, 0)
        reason = f"it needs about {needs} s, and {left:.0f} s were left"
        return {"status": "no time", "reason": reason}
    return {}


def run(
    sections: dict[str, Section], asked: Sequence[str], out: Path, budget: float
) -> None:
    """Runs the sections that are asked for, in order, within the budget.

    Args:
        sections: All there are.
        asked: Names of those to run.
        out: Folder for `gpu.json` and `gpu.md`.
        budget: Seconds, counted from the start of this process.
    """
    # not from here: imports are part of what a lent machine's time is spent on
    finish = psutil.Process().create_time() + budget - RESERVE
    results = Results(out, about(install_wheels()), list(sections))
    with tempfile.TemporaryDirectory(prefix="edpo_gpu_") as folder:
        for name, section in sections.items():
            left = finish - time.time()
            shown = Shown(name, results)
            if why := unrun(name, section, asked, left):
                shown(**why)
            else:
                print(f"{name}: {section.purpose} ...", flush=True)
                work = Path(folder, name)
                work.mkdir()
                run_section(section, left, work, shown)
            if name in asked:
                print(f"{name}: {shown.summary()}", flush=True)


class Shown:
    """Puts a section into the results and prints what is new of it."""

    def __init__(self, name: str, results: Results):
        self._name, self._results = name, results
        self._entries: dict[str, Any] = {}

    def __call__(self, **entries: Any) -> None:
        before = self._entries.get("found", {})
        for key, value in entries.get("found", {}).items():
            if key not in before:
                print(f"  {key}: {cell(value)}", flush=True)
        self._entries = entries
        self._results.put(self._name, **entries)

    def summary(self) -> str:
        """How the section ended."""
        status, reason = (self._entries.get(key) for key in ("status", "reason"))
        spent = f"{self._entries['seconds']} s" if "seconds" in self._entries else ""
        return ", ".join(filter(None, [status, spent, reason]))


# --- report ----------------------------------------------------------------------


def cell(value: Any) -> str:
    """A value in a line of text."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {cell(each)}" for key, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(cell, value))
    return str(value).replace("|", r"\|").replace("\n", " ")


def tables(found: dict[str, Any]) -> list[str]:
    """Values as a list, then rows with the same columns as one table."""
    lines = [
        f"- {cell(name)}: {cell(value)}"
        for name, value in found.items()
        if not isinstance(value, dict)
    ]
    rows = {name: value for name, value in found.items() if isinstance(value, dict)}
    for columns in dict.fromkeys(map(tuple, rows.values())):
        lines += ["", row("", *columns), row(*["---"] * (len(columns) + 1))]
        lines += [
            row(*map(cell, [name, *value.values()]))
            for name, value in rows.items()
            if tuple(value) == columns
        ]
    return lines


def row(*cells: object) -> str:
    """A row of a markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def section_text(name: str, entries: dict[str, Any]) -> str:
    """A section; one that found nothing is not measured, and why."""
    status, found = entries["status"], entries.get("found", {})
    why = ": ".join(filter(None, [status, entries.get("reason")]))
    lines = [f"### {name}", ""]
    if not found:
        return "\n".join([*lines, f"Not measured: {why}."])
    told = "" if status == "done" else f"{why[0].upper()}{why[1:]}. "
    lines += [f"{told}{entries.get('seconds', 0):.0f} s.", "", *tables(found)]
    if trace := entries.get("traceback"):
        lines += ["", "```", *trace, "```"]
    return "\n".join(lines)


def header(about: dict[str, Any]) -> str:
    """Date, device, versions and commit, in one line."""
    with_ = (f"{name} {version}" for name, version in about["versions"].items())
    line = [about["date"], about["device"], *with_, f"commit {about['commit']}"]
    return ", ".join(line)


def markdown(results: dict[str, Any]) -> str:
    """All sections."""
    toy = [] if results["about"]["gpu"] else ["Toy sizes: no speed follows from them."]
    sections = results["sections"].items()
    texts = [section_text(name, entries) for name, entries in sections]
    return "\n\n".join([header(results["about"]), *toy, *texts])


def merged(files: Sequence[Path]) -> dict[str, Any]:
    """Runs of one commit on one device as one; of a section, the last that ran.

    Raises:
        ValueError: If commit, device or versions differ, or there was no GPU.
    """
    first, *others = (json.loads(file.read_text()) for file in files)
    for other in (first, *others):
        alike = ("device", "commit", "versions")
        if any(other["about"][key] != first["about"][key] for key in alike):
            raise ValueError(f"the runs differ in {', '.join(alike)}: not one result")
        if not other["about"]["gpu"]:
            raise ValueError("a run at toy sizes on a CPU is no result of a GPU")
        first["sections"] |= {
            name: entries
            for name, entries in other["sections"].items()
            if "found" in entries or name not in first["sections"]
        }
    return first


def record(files: Sequence[Path], into: Path) -> None:
    """Writes finished runs into a RESULTS.md, in place of the last of that device."""
    results = merged(files)
    title = f"GPU run, {results['about']['device']}"
    append_results(title, markdown(results), into)


# --- options ---------------------------------------------------------------------


def names(text: str) -> list[str]:
    """Sections of the command line."""
    given = [name for name in text.split(",") if name]
    if unknown := sorted(set(given) - SECTIONS.keys()):
        known = ", ".join(SECTIONS)
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: none of {known}")
    return given or list(SECTIONS)


def main() -> None:
    """Measures or records, as the command line says."""
    described = "\n".join(f"  {n:<10} {s.purpose}" for n, s in SECTIONS.items())
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n", 1)[0],
        epilog=f"sections:\n{described}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, default=ROOT / "build" / "gpu", help="folder of results")
    add("--budget", type=float, default=400, help="seconds, all in all")
    add("--only", type=names, default=list(SECTIONS), help="sections, comma-separated")
    add("--record", type=Path, nargs="+", metavar="FILE", help="gpu.json of a run")
    add("--into", type=Path, default=RESULTS, help="where --record writes")
    args = parser.parse_args()
    if args.record:
        record(args.record, args.into)
    else:
        run(SECTIONS, args.only, args.out.resolve(), args.budget)


if __name__ == "__main__":
    main()
