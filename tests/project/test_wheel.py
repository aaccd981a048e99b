"""The wheel: what it holds, and that installing it changes no other package."""

import json
import shutil
import subprocess
import sys
from email.parser import Parser
from zipfile import ZipFile

import pytest
from helpers.paths import ROOT
from helpers.tiers import rest

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """As the next version, so that pip takes it for an upgrade where one is there."""
    source = tmp_path_factory.mktemp("source")
    shutil.copytree(ROOT / "axolotl_edpo", source / "axolotl_edpo")
    for name in ("LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    project = (ROOT / "pyproject.toml").read_text()
    version = 'version = "0.1.0"'
    assert version in project
    (source / "pyproject.toml").write_text(project.replace(version, 'version = "99"'))
    words = ["wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "dist", "."]
    subprocess.run([*PIP, *words], cwd=source, check=True)
    (made,) = (source / "dist").iterdir()
    return made


@rest
def test_installing_it_installs_nothing_else(wheel):
    words = ["install", "--dry-run", "--no-index", "-q", "--report", "-", str(wheel)]
    done = subprocess.run([*PIP, *words], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    planned = [entry["metadata"] for entry in json.loads(done.stdout)["install"]]
    assert [(p["name"], p["version"]) for p in planned] == [("axolotl-edpo", "99")]


@rest
def test_it_holds_the_page_the_types_and_both_entry_points(wheel):
    with ZipFile(wheel) as files:
        names = files.namelist()
        points = files.read("axolotl_edpo-99.dist-info/entry_points.txt").decode()
        metadata = files.read("axolotl_edpo-99.dist-info/METADATA").decode()
    for name in ("report/page.html", "report/style.css", "py.typed"):
        assert f"axolotl_edpo/{name}" in names
    assert "[axolotl.plugins]\nedpo = axolotl_edpo:EDPOPlugin\n" in points
    assert "[axolotl.cli_commands]\nedpo-inspect = " in points
    for command in ("memory", "report", "score"):
        assert f"\nedpo-{command} = " in points
    required = Parser().parsestr(metadata).get_all("Requires-Dist")
    assert "axolotl<0.22,>=0.19" in required


@pytest.mark.parametrize(
    ("after", "lost"),
    [
        (["trl==1", "torch==2", "edpo==1"], None),
        (["torch==2"], "trl==1"),
        (["trl==1", "torch==2.1"], "torch==2"),
    ],
)
def test_packages_that_an_installation_changed_are_named(tmp_path, after, lost):
    for name, lines in (("before", ["torch==2", "trl==1"]), ("after", after)):
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
    done = subprocess.run(
        [sys.executable, ROOT / "tools/compare_freezes.py", "before", "after"],
        cwd=tmp_path,
        text=True,
        capture_output=True,
    )
    if lost:
        assert done.returncode == 1
        assert done.stderr == f"changed or removed: {lost}\n"
    else:
        assert (done.returncode, done.stdout) == (0, "2 packages as before, 1 new\n")
