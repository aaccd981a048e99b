"""merging.py: which adapters are refused, before training and before a merge.

tests/runs/test_merged_models.py shows that a merge of the others is right, and of these
wrong.
"""

import pytest
from axolotl.utils.dict import DictDefault
from helpers import tiny
from helpers.tiers import first
from peft import LoraConfig, get_peft_model
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from axolotl_edpo.models import merging
from axolotl_edpo.models.merging import check_merge, check_recipe_adapter

TYING = {"peft_ensure_weight_tying": True}
LEGACY = {"merge_method": "legacy"}
GPT2 = dict(kind="gpt2", n_inner=64)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "tied": tiny.save_model(folder / "tied", tie_word_embeddings=True),
        "untied": tiny.save_model(folder / "untied"),
        "gpt2": tiny.save_model(folder / "gpt2", **GPT2, tie_word_embeddings=True),
    }


def saved(*names: str) -> dict:
    return {"lora_modules_to_save": [*names]}


def adapted(*names: str) -> dict:
    return {"lora_target_modules": [*names]}


def rows(indices) -> dict:
    return {"peft_trainable_token_indices": indices}


def check(models, model: str, keys: dict) -> None:
    recipe = {"base_model": str(models[model]), "adapter": "lora", **keys}
    check_recipe_adapter(DictDefault(recipe))


WRONG = [
    (
        saved("embed_tokens", "lm_head"),
        "`lora_modules_to_save: [embed_tokens, lm_head]` does not work with `rl: edpo`:"
        " `embed_tokens` and `lm_head` are one weight of this model, which would be "
        "trained as two and merged as one: set `peft_ensure_weight_tying: true`",
    ),
    (saved("lm_head"), "lora_modules_to_save: [lm_head]"),
    (saved("model.embed_tokens"), "lora_modules_to_save: [model.embed_tokens]"),
    (
        adapted("q_proj", "lm_head"),
        "`lora_target_modules: [q_proj, lm_head]` does not work with `rl: edpo`: "
        "`embed_tokens` and `lm_head` are one weight of this model, and LoRA on it "
        "cannot be merged: leave it out, or set `lora_modules_to_save: [lm_head]` and "
        "`peft_ensure_weight_tying: true`",
    ),
    (adapted("embed_tokens") | TYING, "lora_target_modules: [embed_tokens]"),
    (adapted("lm_head") | LEGACY, "lora_target_modules: [lm_head]"),
    ({"lora_target_modules": ".*(q_proj|lm_head)"}, "lora_target_modules: .*(q_proj"),
    (
        rows({"lm_head": [5]}) | LEGACY,
        "`peft_trainable_token_indices: {lm_head: [5]}` does not work with `rl: edpo`: "
        "`embed_tokens` and `lm_head` are one weight of this model: name "
        "`embed_tokens` alone, which trains both",
    ),
    (rows({"embed_tokens": [5], "lm_head": [5]}), "`peft_trainable_token_indices: {"),
]
RIGHT = [
    {},
    {"lora_target_linear": True},
    {"lora_target_modules": "all-linear"},
    {"lora_target_modules": r".*\.q_proj"},
    adapted("q_proj", "down_proj"),
    saved("norm"),
    saved("embed_tokens") | TYING,
    saved("lm_head") | TYING,
    saved("embed_tokens", "lm_head") | TYING,
    saved("embed_tokens", "lm_head") | LEGACY,
    adapted("lm_head", "q_proj") | saved("lm_head") | TYING,
    rows([5]),
    rows({"embed_tokens": [5]}),
    rows({"embed_tokens": [5], "lm_head": [5]}) | LEGACY,
]


@pytest.mark.parametrize(("keys", "message"), WRONG)
def test_what_a_tied_weight_would_lose_is_refused(models, keys, message):
    with pytest.raises(ValueError) as error:
        check(models, "tied", keys)
    assert message in str(error.value)
    check(models, "untied", keys)
    check(models, "tied", keys | {"adapter": None})
    check(models, "tied", keys | {"lora_model_dir": "it has its own modules"})


@pytest.mark.parametrize("keys", RIGHT)
def test_what_is_kept_is_not_refused(models, keys):
    check(models, "tied", keys)
    check(models, "untied", keys)


def test_an_embedding_of_another_name_is_tied_by_the_name_of_the_head(models):
    """PEFT looks for `embed_tokens` and `lm_head` alone."""
    for keys in (saved("wte"), saved("wte") | TYING):
        with pytest.raises(ValueError, match=r"set `lora_modules_to_save: \[lm_head\]"):
            check(models, "gpt2", keys)
    check(models, "gpt2", saved("lm_head") | TYING)


def test_a_config_of_no_known_class_has_the_usual_names(models, monkeypatch):
    monkeypatch.setattr(merging, "MODEL_FOR_CAUSAL_LM_MAPPING", {})
    with pytest.raises(ValueError, match="`embed_tokens` and `lm_head` are one weight"):
        check(models, "tied", saved("lm_head"))
    check(models, "untied", saved("lm_head"))


# --- before a merge ------------------------------------------------------------------


def merge(models, folder, model: str, method=None, tokens=(), **adapter) -> None:
    """Saves an adapter of this config, and checks its merge."""
    lm = AutoModelForCausalLM.from_pretrained(models[model])
    modules = ["c_attn"] if model == "gpt2" else ["q_proj"]
    config = LoraConfig(**{"target_modules": modules, **adapter})
    get_peft_model(lm, config).save_pretrained(folder)
    if tokens:
        tokenizer = tiny.byte_tokenizer()
        tokenizer.add_tokens(tokens)
        tokenizer.save_pretrained(folder)
    keys = {"base_model": str(models[model]), "output_dir": str(folder)}
    check_merge(DictDefault(keys | ({"merge_method": method} if method else {})))


BOTH = ["embed_tokens", "lm_head"]
LOST = [
    ("tied", dict(modules_to_save=BOTH), "one of `embed_tokens` and `lm_head`"),
    ("tied", dict(modules_to_save=["lm_head"]), "one of `embed_tokens`"),
    ("untied", dict(target_modules=["embed_tokens"]), "LoRA on `embed_tokens`"),
    ("untied", dict(tokens=["<new>"]), "the new tokens `<new>` of the tokenizer"),
    (
        "tied",
        dict(trainable_token_indices={"embed_tokens": [5], "lm_head": [5]}),
        "rows of ",
    ),
]


@pytest.mark.parametrize(("model", "adapter", "what"), first(LOST, 4))
def test_a_merge_that_leaves_something_out_names_the_method_that_does_not(
    models, tmp_path, model, adapter, what
):
    with pytest.raises(ValueError) as error:
        merge(models, tmp_path, model, **adapter)
    assert f"leave out {what}" in str(error.value) or "rows of tokens" in str(error)
    assert str(error.value).startswith("`merge_method: memory_efficient` does not work")
    assert str(error.value).endswith(": set `merge_method: legacy`")
    merge(models, tmp_path, model, method="legacy", **adapter)


@pytest.mark.parametrize("method", [None, "legacy"])
@pytest.mark.parametrize(
    ("model", "adapter", "what"),
    [
        ("tied", dict(target_modules=["lm_head"]), "LoRA on `embed_tokens` and"),
        ("tied", dict(trainable_token_indices={"lm_head": [5]}), "rows of `lm_head`"),
        ("untied", dict(layer_replication=[[0, 2], [1, 2]]), "the repeated layers"),
    ],
)
def test_what_cannot_be_merged_is_refused_with_any_method(
    models, tmp_path, model, adapter, what, method
):
    with pytest.raises(ValueError, match=f"`lora_model_dir: .*{what}.*with PEFT"):
        merge(models, tmp_path, model, method=method, **adapter)


@pytest.mark.parametrize(
    ("model", "adapter"),
    [
        ("tied", {}),
        ("tied", dict(modules_to_save=BOTH, ensure_weight_tying=True)),
        ("gpt2", dict(modules_to_save=["lm_head"], ensure_weight_tying=True)),
        ("untied", dict(modules_to_save=BOTH)),
        ("untied", dict(target_modules=["lm_head"])),
    ],
)
def test_a_merge_that_loses_nothing_is_not_refused(models, tmp_path, model, adapter):
    merge(models, tmp_path, model, **adapter)
    merge(models, tmp_path, model, method="legacy", **adapter)


@pytest.mark.parametrize("merges", [True, False])
def test_rows_of_tokens_are_merged_by_the_releases_that_can(
    models, tmp_path, monkeypatch, merges
):
    monkeypatch.setattr(merging, "merges_token_rows", lambda: merges)
    if merges:
        merge(models, tmp_path, "tied", trainable_token_indices=[5])
    else:
        with pytest.raises(ValueError, match="leave out the trained rows of tokens"):
            merge(models, tmp_path, "tied", trainable_token_indices=[5])


def test_a_folder_without_an_adapter_is_left_to_axolotl(tmp_path):
    check_merge(DictDefault(output_dir=str(tmp_path)))
