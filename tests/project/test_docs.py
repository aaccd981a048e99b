"""README.md and docs/: tables of the code, and links, recipes, commands that exist."""

import importlib
import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from axolotl.cli.main import cli
from axolotl.utils.schemas.config import AxolotlInputConfig
from helpers import docs_tables, tiny
from helpers.pages import DOCS, FENCE, PAGES, blocks, commands, name
from helpers.paths import ROOT

from axolotl_edpo.config.args import LOWERED

# Pages that others link to; their own links are checked, too.
LINKED = [
    *PAGES,
    ROOT / "CHANGELOG.md",
    ROOT / "benchmarks" / "RESULTS.md",
    *sorted((ROOT / "examples").rglob("*.md")),
]
LINK = re.compile(r"\]\(([^)\s]+)\)")
# Key of a part of a recipe on a page -> keys that it needs beside it.
NEEDED = {
    "lora_target_modules": {"adapter": "lora", "lora_r": 8},
    "edpo_control": {"edpo_epsilon": None},
}
# Keys on the pages that axolotl has from 0.21 on; the pages say so.
NEWER = {"eval_on_start"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def anchors(path: Path) -> set[str]:
    """What may stand behind `#` in a link to the page, as GitHub names headings."""
    text = FENCE.sub("", path.read_text())
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", title.lower()) for title in titles)
    return {title.replace(" ", "-") for title in plain}


def broken(path: Path, link: str) -> bool:
    """Whether a link leads nowhere; those to other hosts are not looked at."""
    if "://" in link:
        return False
    file, _, anchor = link.partition("#")
    target = (path.parent / file).resolve() if file else path
    if not target.exists() or not target.is_relative_to(ROOT):
        return True
    return bool(anchor) and anchor not in anchors(target)


# --- tables and links ----------------------------------------------------------------


@pytest.mark.parametrize("path", docs_tables.PAGES, ids=name)
def test_tables_are_those_of_the_code(path):
    text = path.read_text()
    assert text.count("<!-- table: ") == len(docs_tables.FRAME.findall(text)) > 0
    assert docs_tables.written_anew(text) == text, (
        "run `python tests/helpers/docs_tables.py`"
    )


@pytest.mark.parametrize("recipe", docs_tables.RECIPES)
def test_a_recipe_says_what_memory_is_calculated_for_it(recipe):
    """Its comment and the README have the same GPUs and the same figure."""
    text = (ROOT / "examples" / f"{recipe}.yml").read_text()
    example = docs_tables.RECIPES[recipe]
    assert f"Hardware: {example.gpus} GPU" in text and example.card in text
    said = " ".join(text.replace("\n#", "").split())
    assert f"{docs_tables.gib_of_recipe(recipe)} GiB" in said


def test_readme_is_at_most_150_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("path", LINKED, ids=name)
def test_links_lead_to_files_and_headings_that_are_there(path):
    links = LINK.findall(FENCE.sub("", path.read_text()))
    assert [link for link in links if broken(path, link)] == []


@pytest.mark.parametrize(
    ("link", "found"),
    [
        ("docs/method.md", False),
        ("docs/method.md#when-a-run-fails", False),
        ("docs/troubleshooting.md#β-falls-all-through-the-run", False),
        ("https://arxiv.org/abs/2502.13177", False),
        ("docs/methods.md", True),
        ("docs/method.md#no-such-heading", True),
        ("../elsewhere.md", True),
    ],
)
def test_a_broken_link_is_told_from_a_good_one(link, found):
    assert broken(ROOT / "README.md", link) is found


def test_every_page_is_in_the_readme_and_on_the_site():
    site = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader=WithoutTags)
    listed = {page for entry in site["nav"] for page in leaves(entry)}
    readme = (ROOT / "README.md").read_text()
    for page in DOCS:
        assert page.name in listed, f"mkdocs.yml: {page.name} is missing"
        assert f"docs/{page.name}" in readme, f"README.md: {page.name} is missing"
    assert listed - {p.name for p in DOCS} == {
        "index.md",
        "CHANGELOG.md",
        "benchmarks/RESULTS.md",
        "examples/table1/README.md",
        "examples/study/README.md",
        "examples/study/PLAN.md",
        "examples/study/RESULTS.md",
        "examples/study/SWEEP.md",
    }


class WithoutTags(yaml.SafeLoader):
    """Reads `!!python/name:…` of mkdocs.yml as None."""


WithoutTags.add_multi_constructor("", lambda loader, tag, node: None)


def leaves(entry) -> list[str]:
    """The pages of an entry of `nav`."""
    if isinstance(entry, str):
        return [entry]
    (value,) = entry.values()
    return [
        page
        for e in (value if isinstance(value, list) else [value])
        for page in leaves(e)
    ]


# --- recipes -------------------------------------------------------------------------


def parts_of_recipes() -> list:
    """The YAML of all pages; of a diff what it adds."""
    found = []
    for path in PAGES:
        texts = blocks(path, "yaml")
        for text in blocks(path, "diff"):
            lines = text.splitlines()
            texts.append("\n".join(line[1:] for line in lines if line[0] == "+"))
        parsed = [(text, yaml.safe_load(text)) for text in texts]
        # a comment that an editor reads is no part of a recipe
        keys = [k for text, k in parsed if k or not text.startswith("# yaml-language")]
        found += [pytest.param(k, id=f"{name(path)}-{i}") for i, k in enumerate(keys)]
    return found


@pytest.mark.parametrize("keys", parts_of_recipes())
def test_yaml_on_a_page_is_read_by_axolotl_as_part_of_a_recipe(keys, recipe, tmp_path):
    """A tiny recipe with these keys is valid, and its config has their values.

    axolotl reads no data here, so paths of data need not exist.
    """
    assert keys
    needed = {k: v for key in keys for k, v in NEEDED.get(key, {}).items()}
    cfg = tiny.load_config(tmp_path, recipe(**{**needed, **keys}))
    unknown = NEWER - AxolotlInputConfig.model_fields.keys()
    for key, given in keys.items():
        # `rl` becomes axolotl's own; entries get defaults
        if key in {"rl", "plugins", "datasets", "test_datasets", *unknown}:
            continue
        assert_contains(cfg[LOWERED.get(key, key)], given)
    assert cfg.trainer_cls == "axolotl_edpo.trainer.EDPOTrainer"


def assert_contains(found, given) -> None:
    """A config may have more keys than were given."""
    if isinstance(given, dict):
        for key, value in given.items():
            assert_contains(found[key], value)
    else:
        assert found == given


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_json_and_python_on_a_page_can_be_parsed(path):
    for text in blocks(path, "json"):
        assert isinstance(json.loads(text), dict)
    for text in blocks(path, "python"):
        compile(text, name(path), "exec")


# --- commands ------------------------------------------------------------------------


def options_of(name: str) -> set[str]:
    """The options of a command of axolotl or of this plugin."""
    added = PROJECT["entry-points"]["axolotl.cli_commands"]
    if name in added:
        module, _, function = added[name].partition(":")
        command = getattr(importlib.import_module(module), function)
    else:
        command = cli.commands[name]
    return {o for p in command.params for o in [*p.opts, *p.secondary_opts]}


@pytest.mark.parametrize(("page", "words"), commands())
def test_a_command_on_a_page_exists_with_its_options(page, words):
    program, first, *rest = words
    if program == "make":
        makefile = (ROOT / "Makefile").read_text()
        assert re.search(rf"^{first}:", makefile, re.MULTILINE)
    elif program == "axolotl":
        used = {word for word in rest if word.startswith("--")}
        assert used <= options_of(first)
    elif program == "python":
        module = Path(first if first != "-m" else rest[0].replace(".", "/"))
        assert (ROOT / module).exists() or (ROOT / module.with_suffix(".py")).exists()
    else:
        assert (program, first) == ("pip", "install")


def test_extras_on_the_pages_are_those_of_the_package():
    text = "".join(path.read_text() for path in PAGES)
    extras = set(re.findall(r"axolotl-edpo\[([\w-]+)\]", text))
    assert extras == {"deepspeed", "flash-attn"} <= {*PROJECT["optional-dependencies"]}
