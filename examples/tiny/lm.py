"""The tiny world's language model: tokenizer, model, training, sampling, scoring.

A Llama of 1.1 million parameters, trained as any base for DPO is: supervised, on
requests with answers of mixed quality. It learns to write fluent sentences, and it
learns that one fact in five is false, that some people say "Whatever.", and so on.
What it should prefer among these is left for preference training.
"""

import random
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from world import write_answer

SPECIAL = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for m in messages %}"
    "{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LONGEST_ANSWER = 48  # tokens
LEARNING_RATE = 3e-3


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, in which nearly every word is one token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=768,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=128,
    )


def new_model(
    tokenizer: PreTrainedTokenizerFast, hidden_size: int = 192, layers: int = 2
) -> LlamaForCausalLM:
    """The untrained model, in float32; `hidden_size` is a multiple of 48."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=3 * hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=hidden_size // 48,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def load(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A model and its tokenizer, as `save_pretrained` wrote them."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), PreTrainedTokenizerFast.from_pretrained(folder)


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    steps: int,
    batch_size: int,
    rng: random.Random,
) -> None:
    """Supervised training: cross-entropy of answers, drawn anew for every batch."""
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=LEARNING_RATE,
        betas=(0.9, 0.95),
        weight_decay=0.01,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=LEARNING_RATE, total_steps=steps, pct_start=0.1
    )
    model.train()
    bar = tqdm(range(steps), desc="language model", unit="step", mininterval=1.0)
    for _ in bar:
        asked = rng.choices(prompts, k=batch_size)
        answers = [write_answer(prompt, rng) for prompt in asked]
        ids, is_answer = (x.to(model.device) for x in encode(tokenizer, asked, answers))
        labels = ids.masked_fill(~is_answer, -100)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval()


def sample_answers(model, tokenizer, prompts: list[str]) -> list[str]:
    """One answer to each prompt, at temperature 1, from torch's global generator."""
    return decode(tokenizer, sample(model, tokenizer, prompts))


class Sampled(NamedTuple):
    """Answers as they were sampled.

    Attributes:
        ids: Prompts, padded left, and answers; shape (answers, length).
        attention: 1 on prompt and answer, shape (answers, length).
        is_answer: True on the answer's tokens, the end included; the same shape.
    """

    ids: torch.Tensor
    attention: torch.Tensor
    is_answer: torch.Tensor


@torch.no_grad()
def sample(model, tokenizer, prompts: list[str]) -> Sampled:
    """One answer to each prompt, at temperature 1, from torch's global generator."""
    texts = tokenizer.apply_chat_template(
        [[_user(prompt)] for prompt in prompts],
        add_generation_prompt=True,
        tokenize=False,
    )
    batch = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    batch = batch.to(model.device)
    ids = model.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        do_sample=True,
        top_k=0,
        max_new_tokens=LONGEST_ANSWER,
    )
    is_answer = torch.zeros_like(ids, dtype=torch.bool)
    answers = ids[:, batch.input_ids.shape[1] :]
    ends = answers == tokenizer.eos_token_id
    is_answer[:, batch.input_ids.shape[1] :] = ends.cumsum(1) - ends.long() == 0
    attention = is_answer.long()
    attention[:, : batch.input_ids.shape[1]] = batch.attention_mask
    return Sampled(ids, attention, is_answer)


def decode(tokenizer, sampled: Sampled) -> list[str]:
    """The answers as text."""
    answers = sampled.ids.masked_fill(~sampled.is_answer, tokenizer.pad_token_id)
    return tokenizer.batch_decode(answers, skip_special_tokens=True)


@torch.no_grad()
def compare(policy, reference, tokenizer, prompts: list[str], answers: list[str]):
    """How two models differ on answers.

    Returns:
        log π(answer) - log π_ref(answer), shape (answers,), and at every token of
        every answer KL(π ‖ π_ref), exact over the vocabulary, shape (tokens,).
    """
    encoded = encode(tokenizer, prompts, answers)
    ids, is_answer = (x.to(policy.device) for x in encoded)
    targets, is_answer = ids[:, 1:, None], is_answer[:, 1:]
    log_p = policy(input_ids=ids).logits[:, :-1].log_softmax(-1)
    log_q = reference(input_ids=ids).logits[:, :-1].log_softmax(-1)
    log_ratios = (log_p - log_q).gather(-1, targets).squeeze(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return (log_ratios * is_answer).sum(-1), kl[is_answer]


def encode(tokenizer, prompts, answers) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of the chats, padded right, and which of them are the answer's.

    A causal model needs no attention mask here: what it says about the answer cannot
    see the padding behind it.
    """
    chats = [
        [_user(prompt), {"role": "assistant", "content": answer}]
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    texts = tokenizer.apply_chat_template(chats, tokenize=False)
    ids = tokenizer(texts, padding=True, return_tensors="pt").input_ids
    marker = ids == tokenizer.convert_tokens_to_ids("<|assistant|>")
    after_marker = (marker.cumsum(1) > 0) & ~marker
    return ids, after_marker & (ids != tokenizer.pad_token_id)


def _user(prompt: str) -> dict[str, str]:
    return {"role": "user", "content": prompt}
