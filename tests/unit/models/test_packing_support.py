"""packing_support.py: what a model can do of what a recipe asks for."""

import pytest
import torch
from helpers import tiny
from helpers.attention import VOCAB, flash_varlen, packing_model
from transformers import AttentionInterface, LlamaConfig, MambaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from axolotl_edpo.data.layout import LayoutSettings
from axolotl_edpo.distributed import RowGroup
from axolotl_edpo.models.packing_support import (
    PackingError,
    check_layers,
    check_packing,
    prepare_models,
    refusal,
    resolve_layout,
)


def settled(wanted: LayoutSettings, lm) -> LayoutSettings:
    return resolve_layout(prepare_models(wanted, [lm]), RowGroup(), lm)


def test_sharing_is_on_wherever_pairs_are_packed_and_off_elsewhere():
    lm = packing_model()
    assert settled(LayoutSettings(), lm).shares is False
    assert settled(LayoutSettings(packs=True), lm).shares is True
    assert settled(LayoutSettings(eval_packs=True), lm).shares is True
    off = LayoutSettings(packs=True, shares=False)
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
    return flash_varlen(
        module, query, key[:, :, seen], value[:, :, seen], None, **keywords
    )


def test_an_attention_that_packs_but_cannot_share_packs_under_auto(caplog):
    AttentionInterface.register("flash_top_left", top_left)
    lm = packing_model(attention="flash_top_left")
    found = settled(LayoutSettings(packs=True), lm)
    assert found.packs and found.shares is False
    assert "`edpo_prefix_sharing: auto`: prompts are not shared, as" in caplog.text
    with pytest.raises(ValueError, match="`edpo_prefix_sharing: true`.*change each"):
        settled(LayoutSettings(packs=True, shares=True), lm)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        (LayoutSettings(packs=True, balances=True), "sample_packing"),
        (LayoutSettings(packs=True), "dpo_padding_free"),
        (LayoutSettings(eval_packs=True), "eval_sample_packing"),
    ],
)
def test_a_refusal_names_the_key_the_reason_and_the_remedy(settings, key):
    message = str(refusal(settings, PackingError("it has three legs")))
    assert message.startswith(f"`{key}: true`")
    assert "it has three legs" in message and "`sample_packing: auto`" in message


def test_a_row_taken_for_one_sequence_is_noticed(monkeypatch):
    """What check_packing is for: an attention that ignores the segments."""
    lm = packing_model()
    check_packing(lm, share=True)
    AttentionInterface.register("deaf", causal)
    lm.config._attn_implementation = "deaf"
    for share in (True, False):
        with pytest.raises(PackingError, match="change each other.*%"):
            check_packing(lm, share)


def causal(module, query, key, value, attention_mask, scaling=None, **_):
    """Causal over the whole row."""
    return sdpa_attention_forward(module, query, key, value, None, scaling=scaling)


def test_a_separate_reference_takes_packed_rows_as_the_policy_does():
    """Eager attention is renamed in the config of each of the two."""
    models = [
        AutoModelForCausalLM.from_config(
            LlamaConfig(vocab_size=VOCAB, **tiny.SIZES), attn_implementation="eager"
        )
        for _ in range(2)
    ]
    prepare_models(LayoutSettings(packs=True), models)
    for lm in models:
        check_packing(lm, share=True)


def test_layers_that_are_no_plain_attention_are_named():
    mamba = AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1)
    )
    with pytest.raises(PackingError, match="carry a state or a mask \\(linear_att"):
        check_layers(type(mamba), mamba.config)
    lm = packing_model()
    lm.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(PackingError, match="linear_attention"):
        check_layers(type(lm), lm.config)
    lm.config.layer_types = None
    lm.config.attention_chunk_size = 8
    with pytest.raises(PackingError, match="no boundaries"):
        check_layers(type(lm), lm.config)


def test_an_attention_that_reads_the_mask_of_a_packed_row_fails():
    lm = packing_model()
    AttentionInterface.register("mask_reader", sdpa_attention_forward)
    lm.config._attn_implementation = "mask_reader"
    with pytest.raises(
        PackingError,
        match="does not take several sequences in one row .*size of tensor",
    ):
        check_packing(lm, share=False)
