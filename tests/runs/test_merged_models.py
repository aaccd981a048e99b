"""What is saved is what was trained: adapters, and what `axolotl merge-lora` makes.

A recipe is trained; then the logits of the trained model, of its adapter over
`base_model`, and of the merged model are compared in float32.
"""

import shutil

import pytest
import torch
from axolotl.cli.merge_lora import do_cli
from helpers import tiny
from helpers.tiers import first
from helpers.tiny import LORA
from peft import PeftModel
from transformers import AutoTokenizer
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from axolotl_edpo.models import merging
from axolotl_edpo.upstream import merges_token_rows

LETTERS = tiny.byte_tokenizer().convert_tokens_to_ids(["a", "e", "s"])
BOTH = {"lora_modules_to_save": ["embed_tokens", "lm_head"]}
HEAD = {"lora_target_linear": None, "lora_target_modules": ["q_proj", "lm_head"]}
EMBEDDING = HEAD | {"lora_target_modules": ["q_proj", "embed_tokens"]}
TYING = {"peft_ensure_weight_tying": True}
ROWS = {"peft_trainable_token_indices": LETTERS}
NEW = {"tokens": ["<new>"]}
LEGACY = {"merge_method": "legacy"}
# Rows of tokens are merged by the default method from axolotl 0.21 on.
METHOD = {} if merges_token_rows() else LEGACY
ROUNDING = 2e-5


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        True: tiny.save_model(folder / "tied", tie_word_embeddings=True),
        False: tiny.save_model(folder / "untied"),
    }


@torch.no_grad()
def logits(model) -> torch.Tensor:
    ids = torch.tensor([[*LETTERS, *range(60, 90)]])
    return model.eval()(input_ids=ids).logits


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def train(recipe, tmp_path, base, **keys):
    """The trained model's logits, and the recipe."""
    keys = recipe(base_model=str(base), max_steps=3, learning_rate=1e-2, **keys)
    return logits(tiny.train(tmp_path, keys).model), keys


def merged(tmp_path, keys: dict):
    """The model that `axolotl merge-lora` makes of the trained adapter."""
    out = tmp_path / "out"
    shutil.rmtree(out / "merged", ignore_errors=True)
    do_cli(config=str(tiny.write(tmp_path, keys)), lora_model_dir=str(out))
    return AutoModelForCausalLM.from_pretrained(out / "merged")


@pytest.mark.parametrize(
    ("tied", "keys"),
    first(
        [
            (True, BOTH | TYING),
            (True, BOTH | LEGACY),
            (True, NEW | BOTH | TYING | LEGACY),
            (True, ROWS | METHOD),
            (False, EMBEDDING | LEGACY),
            (True, {}),
            (True, {"peft_use_dora": True} | BOTH | TYING),
            (True, {"lora_modules_to_save": ["lm_head"]} | TYING),
            (True, {"lora_modules_to_save": ["embed_tokens"]} | TYING),
            (True, BOTH | TYING | LEGACY),
            (False, BOTH),
            (False, HEAD),
            (False, ROWS | METHOD),
            (False, {"peft_use_dora": True} | HEAD),
        ],
        5,
    ),
)
def test_the_merged_model_is_the_trained_one(recipe, models, tmp_path, tied, keys):
    start = AutoModelForCausalLM.from_pretrained(models[tied])
    first_logits, known = logits(start), start.config.vocab_size
    trained, keys = train(recipe, tmp_path, models[tied], **{**LORA, **keys})
    assert apart(trained[..., :known], first_logits) > 0.1
    model = merged(tmp_path, keys)
    assert logits(model).shape == trained.shape
    assert apart(logits(model), trained) < ROUNDING
    if "tokens" not in keys:  # PEFT does not enlarge the base
        adapter = PeftModel.from_pretrained(start, tmp_path / "out")
        assert apart(logits(adapter), trained) < ROUNDING


@pytest.mark.parametrize(
    ("tied", "keys"),
    first([(True, BOTH), (True, HEAD), (False, EMBEDDING), (True, EMBEDDING | TYING)]),
)
def test_what_is_refused_would_become_another_model(
    recipe, models, tmp_path, monkeypatch, tied, keys
):
    if tied:
        with pytest.raises(ValueError, match="are one weight of this model"):
            train(recipe, tmp_path, models[tied], **{**LORA, **keys})
    monkeypatch.setattr(merging, "check_recipe_adapter", lambda cfg: None)
    trained, keys = train(recipe, tmp_path, models[tied], **{**LORA, **keys})
    with pytest.raises(ValueError, match="leave out|cannot be merged"):
        merged(tmp_path, keys)
    monkeypatch.setattr(merging, "check_merge", lambda recipe: None)
    assert apart(logits(merged(tmp_path, keys)), trained) > 0.1


def test_new_tokens_stay_in_the_tokenizer_of_the_merged_model(recipe, models, tmp_path):
    _, keys = train(recipe, tmp_path, models[False], **LORA, **NEW, **BOTH)
    with pytest.raises(ValueError, match="the new tokens `<new>` of the tokenizer"):
        merged(tmp_path, keys)
    model = merged(tmp_path, keys | LEGACY)
    words = AutoTokenizer.from_pretrained(tmp_path / "out" / "merged").get_vocab()
    assert words["<new>"] == model.config.vocab_size - 1


@pytest.mark.parametrize("more", first([{}, NEW]))
def test_a_tied_model_is_saved_as_it_was_trained(recipe, models, tmp_path, more):
    trained, _ = train(recipe, tmp_path, models[True], **more)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert saved.config.tie_word_embeddings
    assert apart(logits(saved), trained) == 0
