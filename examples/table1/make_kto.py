"""Writes the answers of all pairs of a recipe, as axolotl's `rl: kto` takes them.

    python examples/table1/make_kto.py RECIPE FILE

Both answers of a pair become lines of FILE, labelled by whether they were chosen.
Prompt and answer are text, as the chat template of the recipe's model has them.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import yaml
from datasets import load_dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase


def rows(recipe: dict, tokenizer: PreTrainedTokenizerBase) -> Iterator[dict]:
    """Two rows for each pair: `prompt`, `completion` and `label`.

    Args:
        recipe: Has one data set, whose pairs are whole conversations.
        tokenizer: Of the recipe's model.
    """
    (entry,) = recipe["datasets"]
    columns = {entry["field_chosen"]: True, entry["field_rejected"]: False}
    for pair in load_dataset(entry["path"], split=entry["split"]):
        for column, label in columns.items():
            prompt = _text(tokenizer, pair[column][:-1], add_generation_prompt=True)
            whole = _text(tokenizer, pair[column])
            completion = whole.removeprefix(prompt)
            yield {"prompt": prompt, "completion": completion, "label": label}


def _text(tokenizer: PreTrainedTokenizerBase, messages: list[dict], **options) -> str:
    """The text of messages, without the token that tokenizing puts before it."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    return text.removeprefix(tokenizer.bos_token or "")


def main() -> None:
    """Reads the command line, and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path, help="a recipe that trains on pairs")
    parser.add_argument("file", type=Path, help="what to write, such as kto.jsonl")
    given = parser.parse_args()
    recipe = yaml.safe_load(given.recipe.read_text())
    tokenizer = AutoTokenizer.from_pretrained(recipe["base_model"])
    given.file.parent.mkdir(parents=True, exist_ok=True)
    with given.file.open("w") as file:
        for row in rows(recipe, tokenizer):
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
