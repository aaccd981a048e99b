"""The shape of the package and of its tests, read from their source.

Which part may import which is in pyproject.toml; import-linter checks it, here as in
`make lint`. How long functions are and who uses which private name is counted in the
syntax trees of `helpers/syntax.py`.
"""

import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path, PurePosixPath

import pytest
from helpers import architecture
from helpers.paths import ROOT, TESTS
from helpers.syntax import (
    RECEIVERS,
    Function,
    Module,
    Use,
    bases,
    functions,
    imported_modules,
    modules_below,
    private_members,
    private_uses,
)

from axolotl_edpo.trainer import EDPOTrainer

PACKAGE = "axolotl_edpo"

MODULE_LINES, TRAINER_LINES = 420, 260
MEDIAN_LINES, NINTH_TENTH_LINES, METHOD_LINES = 7, 25, 25

# Names with an underscore that Python documents as public, of named tuples.
NAMED_TUPLE = {"_asdict", "_fields", "_make", "_replace"}

# Private attributes of transformers' and TRL's trainer that EDPOTrainer uses on itself,
# beside the methods that it overrides.
OF_THE_TRAINER = {
    "_metrics": "the means that TRL logs next; it offers no other way in",
    "_get_output_dir": "the folder of checkpoints; a hyperparameter search changes it",
}

# Other private names of the stack that are used outside upstream.py, by file.
OF_THE_STACK: dict[tuple[str, str], str] = {}

# Tests below tests/unit that have no module of their name, and why.
OF_NO_MODULE = {
    "data/test_random_templates.py": "about all of how pairs are made of messages",
    "test_structure.py": "about all modules",
}


@cache
def package() -> list[Module]:
    return modules_below(ROOT / PACKAGE, ROOT)


@cache
def suite() -> list[Module]:
    return modules_below(TESTS, ROOT)


@cache
def all_functions() -> list[Function]:
    return [function for module in package() for function in functions(module)]


def trainer() -> Module:
    (module,) = (m for m in package() if m.name == f"{PACKAGE}.trainer")
    return module


def listed(offenders: Iterable) -> str:
    """A failure message: an offender per line."""
    return "\n".join(["", *map(str, offenders)])


# --- layers --------------------------------------------------------------------------


def lint_imports(folder: Path) -> subprocess.CompletedProcess:
    """Checks the contracts of pyproject.toml in a checkout."""
    command = Path(sys.executable).with_name("lint-imports")
    return subprocess.run(
        [command, "--no-cache"], cwd=folder, capture_output=True, text=True
    )


def test_imports_run_downwards_and_in_no_circle():
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 kept, 0 broken" in done.stdout


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"losses/new.py": "from .. import trainer"},
            "axolotl_edpo.losses is not allowed to import axolotl_edpo.trainer",
        ),
        (
            {"data/new.py": "def f():\n    from ..tools import memory"},
            "axolotl_edpo.data is not allowed to import axolotl_edpo.tools",
        ),
        (
            {"ops/a.py": "from . import b", "ops/b.py": "from .a import c"},
            "No cycles are allowed in axolotl_edpo.ops",
        ),
        ({"new.py": ""}, "axolotl_edpo.new"),
    ],
    ids=["upwards", "sideways, in a function", "circle", "a part without a place"],
)
def test_a_wrong_import_and_a_part_without_a_place_are_found(tmp_path, files, message):
    """In a copy of the package that has these files as well."""
    shutil.copytree(ROOT / PACKAGE, tmp_path / PACKAGE)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name, source in files.items():
        (tmp_path / PACKAGE / name).write_text(source)
    done = lint_imports(tmp_path)
    assert done.returncode == 1, done.stderr
    assert message in " ".join(done.stdout.split())


# --- sizes ---------------------------------------------------------------------------


def test_no_module_is_longer_than_420_lines():
    """All lines of the file count."""
    lengths = {m.path: len(m.source.splitlines()) for m in package()}
    assert len(lengths) > 40
    long = [f"{p}:{n} lines" for p, n in lengths.items() if n > MODULE_LINES]
    assert not long, listed(long)


def test_trainer_py_has_at_most_260_lines():
    lines = len(trainer().source.splitlines())
    assert lines <= TRAINER_LINES, f"{PACKAGE}/trainer.py:{lines} lines"


def test_half_of_all_functions_have_at_most_7_lines_and_nine_tenths_at_most_25():
    """Lines of code of the body: no signature, docstring, blank line or comment.

    A nested function counts as a function, and as part of the one around it.
    """
    lines = sorted(function.lines for function in all_functions())
    longest = sorted(all_functions(), key=lambda f: f.lines, reverse=True)
    long = [function for function in longest if function.lines > NINTH_TENTH_LINES]
    median = statistics.median(lines)
    print(f"\n{len(lines)} functions, median {median}, {len(long)} over 25 lines")
    print(listed(long))
    assert median <= MEDIAN_LINES, listed(longest[: len(longest) // 2])
    assert len(long) <= len(lines) / 10, listed(long)


def test_no_method_of_the_trainer_has_more_than_25_lines():
    methods = [f for f in functions(trainer()) if f.name.startswith("EDPOTrainer.")]
    assert len(methods) > 5
    long = [method for method in methods if method.lines > METHOD_LINES]
    assert not long, listed(long)


def test_the_trainer_is_one_class_of_this_project():
    mro = EDPOTrainer.__mro__
    in_package = [kind for kind in mro if kind.__module__.startswith(PACKAGE)]
    names = (f"{kind.__module__}.{kind.__name__}" for kind in in_package)
    assert in_package == [EDPOTrainer], listed(names)


CODE = '''
"""A file."""
# no code

def short(): return 1


@cache
def long(
    a,
    b,
):
    """Two

    paragraphs.
    """

    text = """two
    lines"""  # with a comment
    # a comment

    @cache
    def inner():
        """Says nothing."""
        return [
            a,
        ]

    return text, inner


class Kind:
    """A class."""

    def method(self):
        """No code."""
'''


def module_of(source: str, name: str = "example") -> Module:
    return Module(Path(f"{name}.py"), name, source)


def test_lines_of_code_are_counted_by_hand():
    found = functions(module_of(CODE))
    assert [(f.name, f.lines) for f in found] == [
        ("short", 1),
        ("long", 8),  # two of text, two to begin `inner`, three in it, one to return
        ("long.inner", 3),
        ("Kind.method", 0),
    ]
    assert found[0].where == "example.py:5"


# --- private names -------------------------------------------------------------------


def misused(modules: list[Module]) -> list[str]:
    """Private names that are used where they do not belong, and whose they are.

    A class may use the private names that it or a base of it in the package defines, on
    any object: a tree says nothing of types, and the object is mostly of that class.
    """
    owners = owners_of_private_names(modules)
    members = members_with_bases(modules)
    found = []
    for use in (use for module in modules for use in private_uses(module)):
        if use.name in NAMED_TUPLE or use.name in members.get(use.owner, ()):
            continue
        if is_of_the_stack(use):
            continue
        whose = ", ".join(sorted(owners.get(use.name, ())))
        found.append(f"{use}: private to {whose or 'the stack'}")
    return found


def owners_of_private_names(modules: list[Module]) -> dict[str, set[str]]:
    """The files and classes that define each private name."""
    owners: dict[str, set[str]] = {}
    for module in modules:
        for kind, names in private_members(module).items():
            for name in names:
                owners.setdefault(name, set()).add(f"{module.name}.{kind}".rstrip("."))
    return owners


def members_with_bases(modules: list[Module]) -> dict[str, set[str]]:
    """The private names of every class, and of its bases in the package."""
    members: dict[str, set[str]] = {}
    above: dict[str, set[str]] = {}
    for module in modules:
        names = private_members(module)
        for kind, kinds_above in bases(module).items():
            members.setdefault(kind, set()).update(names[kind])
            above.setdefault(kind, set()).update(kinds_above - {kind})

    def of(kind: str) -> set[str]:
        return members.get(kind, set()).union(*map(of, above.get(kind, ())))

    return {kind: of(kind) for kind in members}


def is_of_the_stack(use: Use) -> bool:
    """Whether a name may be one of the stack, where it is used.

    upstream.py and upstream_data.py know no class of the package, so that what they use
    is the stack's.
    """
    if use.module.name in (f"{PACKAGE}.upstream", f"{PACKAGE}.upstream_data"):
        return True
    if use.owner == "EDPOTrainer" and use.receiver in RECEIVERS:
        return use.name in OF_THE_TRAINER
    return (use.module.name, use.name) in OF_THE_STACK


def test_private_names_are_used_by_their_own_class_and_those_of_the_stack_in_upstream():
    assert sum(len(private_uses(module)) for module in package()) > 100
    found = misused(package())
    advice = "A name of the stack belongs in upstream.py, or in OF_THE_STACK above."
    assert not found, listed([advice, *found])


def test_every_exception_is_still_needed():
    uses = [use for module in package() for use in private_uses(module)]
    inherited = {use.name for use in uses if use.owner == "EDPOTrainer"}
    assert OF_THE_TRAINER.keys() <= inherited
    assert OF_THE_STACK.keys() <= {(use.module.name, use.name) for use in uses}


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("self._mine + Kind._mine + other._mine", ""),
        ("self._above", ""),
        ("pair._replace(a=1)", ""),
        ("other.__class__", ""),
        ("other._hidden", "private to example.Hidden"),
        ("self._hidden", "private to example.Hidden"),
        ("getattr(other, '_hidden')", "private to example.Hidden"),
        ("module._helper()", "private to example"),
        ("config._attn_implementation", "private to the stack"),
        ("hasattr(config, '_attn_implementation')", "private to the stack"),
        ("self._metrics", "private to the stack"),  # this class is no trainer
    ],
)
def test_use_of_a_private_name_is_told_from_misuse(line, found):
    source = f"""
def _helper():
    return 1

class Base:
    _above = 1

class Hidden:
    def __init__(self):
        self._hidden = 1

class Kind(Base):
    def _mine(self, other, config, module, pair):
        return {line}
"""
    problems = misused([module_of(source)])
    if not found:
        assert problems == []
        return
    (problem,) = problems
    where, _, whose = problem.partition(": ")
    assert where.startswith("example.py:14 ") and whose.startswith(found)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("from .first import public", 0),
        ("from .first import _helper", 1),
        ("from torch._subclasses import fake_tensor", 0),
        ("from torch.distributed.fsdp import _shard", 1),
        ("import torch._dynamo", 1),
    ],
)
def test_an_import_of_a_private_name_is_a_use(line, found):
    first = module_of("def _helper(): ...\n", "first")
    assert len(misused([first, module_of(line)])) == found


# --- tests ---------------------------------------------------------------------------


def test_no_test_imports_from_another_test_or_from_conftest():
    """`helpers/matrix.py` finds the areas of the matrix by name, as pytest does."""
    names = {m.path.stem for m in suite() if m.path.name.startswith("test_")}
    assert len(names) > 40
    names.add("conftest")
    found = [
        f"{module.path}:{line} {name}"
        for module in suite()
        for line, name in imported_modules(module)
        if names & {*name.split(".")} and not name.startswith(PACKAGE)
    ]
    assert not found, listed(found)


def test_files_of_unit_tests_are_named_after_modules_in_folders_of_the_same_name():
    modules = {m.path.relative_to(PACKAGE).as_posix() for m in package()}
    unit = {
        PurePosixPath(m.path.relative_to("tests/unit").as_posix())
        for m in suite()
        if m.path.is_relative_to("tests/unit")
    }
    wanted = {p: str(p.with_name(p.name.removeprefix("test_"))) for p in unit}
    lost = {str(path) for path, module in wanted.items() if module not in modules}
    assert lost == OF_NO_MODULE.keys(), listed(f"tests/unit/{p}:1" for p in lost)


# --- docs/architecture.md ------------------------------------------------------------


def test_the_picture_of_the_folders_is_drawn_from_the_imports():
    assert architecture.picture().count("-->") > 10
    drawn = architecture.page() == architecture.PAGE.read_text()
    assert drawn, "run `python tests/helpers/architecture.py`"


def test_the_way_of_a_batch_names_what_is_there():
    """Each `file.py`: `Name` or `Name.method` of the page is defined in that file."""
    text = architecture.PAGE.read_text()
    named = re.findall(r"`([\w/]+\.py)`: `([\w.]+)`", text)
    assert len(named) > 8
    for file, name in named:
        source = (ROOT / PACKAGE / file).read_text()
        for member in name.split("."):
            assert re.search(rf"(def|class) {member}\b", source), (file, name)
    for file in re.findall(r"`((?:\w+/)*\w+\.py)`", text):
        assert (ROOT / PACKAGE / file).exists() or (ROOT / file).exists(), file
