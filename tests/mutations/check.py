"""Do the tests notice small mistakes? Makes each one of mutations.yml and runs them.

    python tests/mutations/check.py              all of them
    python tests/mutations/check.py ops data     those of files with such names

For each, a copy of the checkout gets the mistake. First the test files that the list
names run there, then, if they pass, all that `make test` runs. Ends with 1 if a mistake
passed, or if the text that it replaces is not in its file once.
"""

import argparse
import contextlib
import importlib
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
LIST = Path(__file__).with_name("mutations.yml")
COPIED = ("axolotl_edpo", "benchmarks", "docs", "examples", "tests", "tools")
FILES = (
    "Makefile",
    "README.md",
    "CHANGELOG.md",
    "LICENSE",
    "mkdocs.yml",
    "pyproject.toml",
)
COMPILED = shutil.ignore_patterns("__pycache__")
# What nearly all tests import, and nothing of this project: a process that is forked
# from here imports the package of its copy.
IMPORTED = ("axolotl.train", "trl", "deepspeed", "bitsandbytes", "pandas", "trackio")
FIRST_TIER = ["-x", "-m", "not rest", "-p", "no:cacheprovider"]
TWO_PROCESSES = ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]


def mutations(words: list[str]) -> list[dict]:
    """Those of files whose name holds one of the words; of all without a word.

    Raises:
        ValueError: If a text is not in its file, or more than once.
    """
    listed = yaml.safe_load(LIST.read_text())
    for entry in listed:
        found = (ROOT / "axolotl_edpo" / entry["file"]).read_text().count(entry["was"])
        if found != 1:
            raise ValueError(f"{entry['file']}: {found} times: {entry['was']!r}")
    return [e for e in listed if not words or any(w in e["file"] for w in words)]


def mutate(folder: Path, entry: dict) -> None:
    """Makes a copy of the checkout with a mistake."""
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=COMPILED)
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    file = folder / "axolotl_edpo" / entry["file"]
    file.write_text(file.read_text().replace(entry["was"], entry["now"]))


def test_here(folder: Path, words: list[str]) -> None:
    """In a forked process: runs pytest in a copy; ends with its exit code."""
    os.chdir(folder)
    with (folder / "printed").open("w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    os.environ["PYTHONPATH"] = str(folder)
    sys.path.insert(0, str(folder))
    sys.exit(pytest.main(words))


def noticed(entry: dict) -> str:
    """Which test noticed a mistake; "" if none did."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as made:
        folder = Path(made)
        mutate(folder, entry)
        for name in entry["tests"]:
            words = [str(Path("tests") / name), *FIRST_TIER]
            fork = multiprocessing.get_context("fork")
            process = fork.Process(target=test_here, args=(folder, words))
            process.start()
            process.join()
            if process.exitcode:
                return failed(folder / "printed")
        with (folder / "printed").open("w") as file:
            done = subprocess.run(
                [sys.executable, "-m", "pytest", *FIRST_TIER, *TWO_PROCESSES],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": str(folder)},
                stdout=file,
            )
        return failed(folder / "printed") if done.returncode else ""


def failed(printed: Path) -> str:
    """The first test that failed, of what pytest printed."""
    lines = printed.read_text().splitlines()
    for line in lines:
        if line.startswith(("FAILED ", "ERROR ")):
            return line.split(" ")[1]
    return " ".join(lines[-1:])


def import_much() -> None:
    """Imports what is slow, with the variables that the tests set before."""
    variables = runpy.run_path(str(ROOT / "tests" / "helpers" / "surroundings.py"))
    os.environ.update(variables["VALUES"])
    if not importlib.import_module("torch").cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    with contextlib.redirect_stdout(sys.stderr):
        for name in IMPORTED:
            importlib.import_module(name)
    assert "axolotl_edpo" not in sys.modules  # each process imports that of its copy


def main() -> int:
    """Checks the mutations that the command line names, and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="parts of file names")
    asked = mutations(parser.parse_args().words)
    import_much()
    escaped = 0
    for number, entry in enumerate(asked, 1):
        began = time.monotonic()
        test = noticed(entry)
        escaped += not test
        seconds, said = time.monotonic() - began, test or "NOTHING NOTICED"
        print(f"{number}/{len(asked)} {seconds:.0f} s {entry['file']}: ", end="")
        print(f"{entry['what']}: {said}", flush=True)
    print(f"{len(asked) - escaped} of {len(asked)} were noticed")
    return int(escaped > 0)


if __name__ == "__main__":
    raise SystemExit(main())
