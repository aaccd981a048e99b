"""rows.py: what a model can do of what a recipe wants."""

from types import SimpleNamespace

import pytest
import torch
from helpers.attention import model, varlen
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from axolotl_edpo.models.packed_attention import PackingError
from axolotl_edpo.models.packing_support import RowSettings, prepare, tried


def recipe(**keys) -> SimpleNamespace:
    base = dict(
        dpo_padding_free=None,
        edpo_sample_packing=False,
        edpo_eval_sample_packing=None,
        edpo_prefix_sharing="auto",
    )
    return SimpleNamespace(**{**base, **keys})


@pytest.mark.parametrize(
    ("keys", "packs", "deals", "eval_packs"),
    [
        ({}, False, False, False),
        ({"dpo_padding_free": True}, True, False, True),
        ({"edpo_sample_packing": True}, True, True, True),
        ({"edpo_sample_packing": "auto"}, True, True, True),
        (
            {"edpo_sample_packing": True, "edpo_eval_sample_packing": False},
            True,
            True,
            False,
        ),
        ({"edpo_eval_sample_packing": True}, False, False, True),
        (
            {"dpo_padding_free": True, "edpo_eval_sample_packing": False},
            True,
            False,
            False,
        ),
    ],
    ids=str,
)
def test_a_recipe_says_how_training_and_evaluation_lay_rows(
    keys, packs, deals, eval_packs
):
    settings = RowSettings.of(recipe(**keys))
    found = settings.packs, settings.deals, settings.eval_packs
    assert found == (packs, deals, eval_packs)
    assert settings.may_pad == ("auto" in keys.values())


def settled(wanted: RowSettings, lm) -> RowSettings:
    return tried(prepare(wanted, [lm]), lm)


def test_sharing_is_on_wherever_pairs_are_packed_and_off_elsewhere():
    lm = model()
    assert settled(RowSettings(), lm).shares is False
    assert settled(RowSettings(packs=True), lm).shares is True
    assert settled(RowSettings(eval_packs=True), lm).shares is True
    off = RowSettings(packs=True, shares=False)
    assert settled(off, lm).shares is False


def top_left(module, query, key, value, attention_mask, **keywords):
    """A varlen attention of before FlashAttention 2.1: query i sees keys up to i."""
    if "cu_seq_lens_q" not in keywords:
        return sdpa_attention_forward(module, query, key, value, None, **keywords)
    starts, lengths = keywords["cu_seq_lens_k"], keywords["cu_seq_lens_q"].diff()
    seen = torch.cat(
        [torch.arange(a, a + n) for a, n in zip(starts, lengths, strict=False)]
    )
    keywords["cu_seq_lens_k"] = keywords["cu_seq_lens_q"]
    keywords["max_length_k"] = keywords["max_length_q"]
    return varlen(module, query, key[:, :, seen], value[:, :, seen], None, **keywords)


def test_an_attention_that_packs_but_cannot_share_packs_under_auto(caplog):
    AttentionInterface.register("flash_top_left", top_left)
    lm = model(attention="flash_top_left")
    found = settled(RowSettings(packs=True), lm)
    assert found.packs and found.shares is False
    assert "`edpo_prefix_sharing: auto`: prompts are not shared, as" in caplog.text
    with pytest.raises(ValueError, match="`edpo_prefix_sharing: true`.*change each"):
        settled(RowSettings(packs=True, shares=True), lm)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        (RowSettings(packs=True, deals=True), "sample_packing"),
        (RowSettings(packs=True), "dpo_padding_free"),
        (RowSettings(eval_packs=True), "eval_sample_packing"),
    ],
)
def test_a_refusal_names_the_key_the_reason_and_the_remedy(settings, key):
    message = str(settings.refusal(PackingError("it has three legs")))
    assert message.startswith(f"`{key}: true`")
    assert "it has three legs" in message and "`sample_packing: auto`" in message
