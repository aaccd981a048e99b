"""tools/ and the Makefile: which Python `make` takes, on a PATH of the test's own."""

import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from helpers.paths import ROOT

NEEDED = ("sort", "dirname")
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.fixture
def machine(tmp_path):
    """One with no Python: a folder for PATH and an empty home."""
    (tmp_path / "bin").mkdir()
    for name in NEEDED:
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    return tmp_path


def script(path: Path, line: str) -> Path:
    """A command that runs a line of shell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{shutil.which('sh')}\n{line}\n")
    path.chmod(0o755)
    return path


def python(path: Path, version: str) -> Path:
    """Says its version to any code."""
    return script(path, f"echo {version}")


def run(machine: Path, *words: str, **environment: str):
    path = f"{machine / 'shims'}:{machine / 'bin'}"
    return subprocess.run(
        words,
        env={"PATH": path, "HOME": str(machine), **environment},
        cwd=machine,
        text=True,
        capture_output=True,
    )


def find(machine: Path, *versions: str, **environment: str):
    return run(machine, str(ROOT / "tools/find-python"), *versions, **environment)


def test_this_python_is_found_under_any_of_its_names(machine):
    for name in (f"python{HERE}", "python3", "python"):
        link = machine / "bin" / name
        link.symlink_to(sys.executable)
        assert find(machine).stdout == f"{link}\n"
        link.unlink()


def test_3_12_is_before_3_13_and_both_are_before_3_11(machine):
    for version in ("3.11", "3.13", "3.12"):
        made = python(machine / "bin" / f"python{version}", version)
        assert find(machine).stdout == f"{made}\n"
    assert find(machine, "3.11").stdout == f"{machine}/bin/python3.11\n"


def test_a_plain_name_comes_at_the_place_of_its_version(machine):
    python(machine / "bin" / "python3.13", "3.13")
    old = python(machine / "bin" / "python3", "3.11")
    assert find(machine).stdout == f"{machine}/bin/python3.13\n"
    python(old, "3.12")
    assert find(machine).stdout == f"{old}\n"
    python(old, "3.14")
    assert find(machine).stdout == f"{machine}/bin/python3.13\n"


def test_a_name_that_does_not_start_hides_no_other_of_that_name(machine):
    script(machine / "shims" / "python3.12", "echo pyenv: not found >&2; exit 127")
    python(machine / "bin" / "python3.11", "3.11")
    assert find(machine).stdout == f"{machine}/bin/python3.11\n"
    real = python(machine / "bin" / "python3.12", "3.12")
    assert find(machine).stdout == f"{real}\n"


@pytest.mark.parametrize("root", [".pyenv", "elsewhere"])
def test_pyenvs_newest_comes_after_what_is_on_path(machine, root):
    versions = machine / root / "versions"
    for version in ("3.12.9", "3.12.10", "3.12.11-dev", "3.13.0t"):
        python(versions / version / "bin" / "python3", version[:4])
    where = {} if root == ".pyenv" else {"PYENV_ROOT": str(machine / root)}
    found = find(machine, **where).stdout
    assert found == f"{versions}/3.12.10/bin/python3\n"
    on_path = python(machine / "bin" / "python3.12", "3.12")
    assert find(machine, **where).stdout == f"{on_path}\n"


def test_a_machine_without_python_is_told_in_one_sentence(machine):
    done = find(machine)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "No Python 3.12 3.13 3.11 with venv is on PATH or in pyenv's folder: "
        "install one, or name one with PYTHON=.\n"
    )


@pytest.fixture
def made(machine):
    """An environment is there, of this Python."""
    venv.create(machine / ".venv", symlinks=True)
    return machine


def make_venv(machine: Path, *words: str):
    return run(machine, str(ROOT / "tools/make-venv"), ".venv", *words)


def test_the_environment_is_made_with_the_python_that_is_found(machine):
    (machine / "bin" / "python3").symlink_to(sys.executable)
    done = make_venv(machine)
    assert done.returncode == 0, done.stderr
    made = run(machine, ".venv/bin/python", "-m", "pip", "--version")
    assert f"(python {HERE})" in made.stdout


def test_an_environment_that_is_there_is_kept_and_no_python_looked_for(made):
    assert make_venv(made).returncode == 0
    assert make_venv(made, sys.executable).returncode == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("echo 3.12.99", "PYTHON=asked is 3.12.99: `rm -r .venv` begins anew.\n"),
        ("echo 3.10.1", "PYTHON=asked is Python 3.10.1, and this package takes 3.11"),
        ("exit 127", "PYTHON=asked does not start.\n"),
    ],
)
def test_another_python_than_can_be_had_stops_in_one_sentence(made, line, message):
    script(made / "bin" / "asked", line)
    done = make_venv(made, "asked")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert message in done.stderr
    assert (made / ".venv/bin/python").exists()


def test_an_environment_that_does_not_start_is_named(made):
    (made / ".venv/bin/python").unlink()
    done = make_venv(made)
    assert done.returncode == 1
    assert "The Python of .venv does not start: `rm -r .venv`" in done.stderr


@pytest.mark.parametrize("target", ["demo", "test"])
def test_make_asks_before_it_installs_anything(machine, target):
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, machine)
    shutil.copytree(ROOT / "tools", machine / "tools")
    done = run(machine, shutil.which("make"), target)
    assert done.returncode == 2 and "No Python 3.12 3.13 3.11" in done.stderr
    python(machine / "bin" / "old", "3.10.1")
    done = run(machine, shutil.which("make"), target, "PYTHON=old")
    assert "PYTHON=old is Python 3.10.1" in done.stderr
    assert not (machine / ".venv").exists()
