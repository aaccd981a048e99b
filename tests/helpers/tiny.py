"""Tokenizers, models, pairs and recipes that train in a second.

Nothing is a mock: recipes go through axolotl's loader, builder and train loop.
"""

import json
import random
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from axolotl_edpo.plugin import PLUGIN
from axolotl_edpo.upstream import automatic_plugins
from helpers import quick

quick.install()

# The special tokens of both tokenizers, by id.
REFERENCE_SPECIAL = {0: "<s>", 1: "</s>", 2: "<pad>"}
SPECIAL = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>")
CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
# Config keys of the models.
SIZES = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=2048,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
)
# Keys that recipes of tests add or, with None, remove.
LORA = dict(adapter="lora", lora_r=4, lora_alpha=8, lora_target_linear=True)
NF4 = {**LORA, "adapter": "qlora", "load_in_4bit": True, "bf16": True}
DPO = dict(rl="dpo", rl_beta=0.1, plugins=None, beta=None, edpo_epsilon=None)
CACHED = {"precompute_ref_log_probs": True}
# Config keys of a Llama of 8.1 million weights, 32 MB in float32, of which 1.6 million
# are outside of the layers.
LLAMA_8M = dict(
    hidden_size=384,
    intermediate_size=1024,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=48,
    vocab_size=2048,
    initializer_range=0.02,
)
# Config keys of a mixture of experts, beside SIZES.
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
# Config keys of a model with layers that carry a state, beside SIZES.
FALCON_H1 = dict(
    mamba_d_ssm=32,
    mamba_n_heads=4,
    mamba_d_state=8,
    mamba_chunk_size=16,
    mamba_d_conv=2,
)


def reference_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of tests/data/reference_run.

    It has 256 tokens, each a word: 0 begins a text, 1 ends it, 2 pads.
    """
    vocab = {token: i for i, token in REFERENCE_SPECIAL.items()}
    vocab |= {f"t{i}": i for i in range(3, 256)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="t3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def reference_text(ids: list[int]) -> str:
    """The text that `reference_tokenizer` turns into these ids."""
    return "".join(f" {REFERENCE_SPECIAL.get(i, f't{i}')}" for i in ids)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with a token per byte, so that it takes any text, and a template."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in REFERENCE_SPECIAL.items()}
    vocab |= {letter: i + 3 for i, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE, **SPECIAL
    )


def save_model(directory: Path, kind: str = "llama", **config) -> Path:
    """Saves a random model and the byte tokenizer.

    Args:
        directory: Where to.
        kind: As `model_type` of transformers.
        **config: Config keys that differ from SIZES.

    Returns:
        The directory, for `base_model`.
    """
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "initializer_range": 0.15, **SIZES}
    model_config = AutoConfig.for_model(kind, **{**sizes, **config})
    AutoModelForCausalLM.from_config(model_config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def save_pairs(path: Path, count: int, seed: int = 0) -> Path:
    """Writes random pairs with the columns of princeton-nlp/llama3-ultrafeedback."""
    rng = random.Random(seed)
    words = "red blue small big cat dog runs sleeps well today".split()

    def text(low: int, high: int) -> str:
        return " ".join(rng.choice(words) for _ in range(rng.randint(low, high)))

    def answer(question: str) -> list[dict]:
        return [
            {"role": "user", "content": question},
            {"role": "assistant", "content": text(2, 8)},
        ]

    with path.open("w") as file:
        for _ in range(count):
            q = text(2, 6)
            row = {"prompt": q, "chosen": answer(q), "rejected": answer(q)}
            file.write(json.dumps(row) + "\n")
    return path


def dataset(path: Path) -> list[dict]:
    """The `datasets:` entry for a file of `save_pairs`."""
    entry = {"path": str(path), "ds_type": "json", "type": "chat_template.default"}
    return [{**entry, "field_messages": "prompt", "split": "train"}]


def recipe(folder: Path, model: Path, pairs: Path, **keys) -> dict:
    """An ε-DPO recipe for tiny parts; keys are added or replaced, None removes."""
    base = dict(
        base_model=str(model),
        plugins=[PLUGIN],
        rl="edpo",
        beta=0.1,
        edpo_epsilon=0.05,
        datasets=dataset(pairs),
        dataset_prepared_path=str(folder / "prepared"),
        output_dir=str(folder / "out"),
        dataset_num_proc=0,
        dataloader_num_workers=0,
        sequence_len=256,
        micro_batch_size=4,
        gradient_accumulation_steps=2,
        num_epochs=1,
        optimizer="adamw_torch",
        learning_rate=1e-3,
        lr_scheduler="constant",
        attn_implementation="sdpa",
        bf16=False,
        tf32=False,
        logging_steps=1,
        save_strategy="no",
        seed=7,
    )
    return {k: v for k, v in {**base, **keys}.items() if v is not None}


def named(keys: dict) -> dict:
    """The recipe, with `plugins:` where this release of axolotl needs it."""
    if keys.get("rl") != "edpo" or PLUGIN in automatic_plugins():
        return keys
    return {"plugins": [PLUGIN], **keys}


def write(folder: Path, keys: dict) -> Path:
    """Writes a recipe as a YAML file and returns its path."""
    path = folder / "recipe.yml"
    path.write_text(yaml.safe_dump(keys, sort_keys=False))
    return path


def load_config(folder: Path, keys: dict):
    """The config that axolotl makes of a recipe."""
    from axolotl.cli.config import load_cfg

    return load_cfg(str(write(folder, keys)))


def load_data(cfg):
    """The data sets of a config, as `axolotl train` loads them."""
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.common.datasets import load_preference_datasets

    return load_preference_datasets(cfg=cfg, cli_args=TrainerCliArgs())


def train_on(cfg, meta):
    """Runs axolotl's train loop and returns the trainer."""
    from axolotl.train import train as axolotl_train

    return axolotl_train(cfg=cfg, dataset_meta=meta)[2]


def train(folder: Path, keys: dict):
    """Trains a recipe in this process, as `axolotl train` does after its launcher.

    Returns:
        The trainer.
    """
    torch.manual_seed(0)  # LoRA's weights are drawn before the trainer sets the seed
    cfg = load_config(folder, keys)
    return train_on(cfg, load_data(cfg))


def build(folder: Path, keys: dict):
    """The trainer that axolotl makes of a recipe, before it trains."""
    from axolotl.train import setup_model_and_trainer

    torch.manual_seed(0)
    cfg = load_config(folder, keys)
    return setup_model_and_trainer(cfg=cfg, dataset_meta=load_data(cfg))[0]


def logs(trainer, key: str = "kl/beta") -> list[dict]:
    """The logged entries of a trainer that have a key."""
    return [entry for entry in trainer.state.log_history if key in entry]
