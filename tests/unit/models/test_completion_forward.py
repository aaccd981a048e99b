"""completion_forward.py: what a forward ends with."""

import pytest
import torch
from accelerate import Accelerator
from helpers import tiny
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2VLImageProcessorPil,
)

from axolotl_edpo.data.collator import PairCollator, padded_batch
from axolotl_edpo.models.completion_forward import CompletionForward
from axolotl_edpo.models.lm_head_reader import head_of

PAIR = {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 9], "rejected_ids": [10]}
# Of Qwen2.5-VL, whose processor needs torchvision: so its batches are made here.
START, IMAGE, END = 260, 261, 262
# tokens of an image: pixels / patch² / merge²
PATCH, MERGE = 4, 2


@pytest.mark.parametrize("casts", [False, True])
def test_hidden_states_leave_in_the_dtype_in_which_the_model_multiplies(casts):
    """Autocast leaves residuals in float32: twice the size, for no digit of a logit."""
    torch.manual_seed(0)
    lm = LlamaForCausalLM(LlamaConfig(vocab_size=100, **tiny.SIZES)).eval()
    forward = CompletionForward(Accelerator(cpu=True))
    batch = PairCollator(pad_token_id=0)([PAIR])
    chosen = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=casts):
        states = forward.states(lm, batch)
        expected = lm.model(chosen).last_hidden_state[0, 1:4]
    assert expected.dtype == torch.float32
    assert states.dtype == (torch.bfloat16 if casts else torch.float32)
    torch.testing.assert_close(states[:3], expected.to(states.dtype))


@pytest.fixture(scope="module")
def qwen():
    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    config = AutoConfig.for_model(
        "qwen2_5_vl",
        text_config={**tiny.SIZES, "vocab_size": 264, "rope_parameters": rope},
        vision_config=dict(
            depth=2,
            hidden_size=16,
            intermediate_size=32,
            num_heads=2,
            out_hidden_size=tiny.SIZES["hidden_size"],
            patch_size=PATCH,
            spatial_merge_size=MERGE,
            window_size=16,
            fullatt_block_indexes=[1],
        ),
        vision_start_token_id=START,
        vision_end_token_id=END,
        image_token_id=IMAGE,
        video_token_id=263,
    )
    return AutoModelForImageTextToText.from_config(config).eval()


def batch_of(sizes: list[list[tuple[int, int]]]) -> dict:
    """A batch as TRL's collator makes it: a pair for each list of image sizes."""
    processor = Qwen2VLImageProcessorPil(
        patch_size=PATCH, merge_size=MERGE, min_pixels=64, max_pixels=4096
    )
    images = [Image.effect_noise(size, 90).convert("RGB") for s in sizes for size in s]
    made = processor(images=[*images, *images], return_tensors="pt")
    counts = (made["image_grid_thw"].prod(1) // MERGE**2).tolist()
    rows, taken = [], iter(counts)
    for answer in ([7, 8, 9], [9, 8]):
        for pair in sizes:
            prompt = [5]
            for _ in pair:
                prompt += [START, *[IMAGE] * next(taken), END]
            rows.append(([*prompt, 6], answer))
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.full((len(rows), length), 2)
    mask, completion = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, (prompt, answer) in enumerate(rows):
        whole = [*prompt, *answer]
        ids[row, : len(whole)] = torch.tensor(whole)
        mask[row, : len(whole)] = 1
        completion[row, len(prompt) : len(whole)] = 1
    return {
        **made,
        "input_ids": ids,
        "attention_mask": mask,
        "completion_mask": completion,
        "mm_token_type_ids": (ids == IMAGE).long(),
    }


@pytest.mark.parametrize("dropped", [(), ("pixel_values", "image_grid_thw")])
def test_the_head_on_hidden_states_gives_the_models_logits(qwen, dropped):
    """Its positions of three axes come from image sizes, and it keeps some of them.

    Batches have other sizes one after the other. Without pixels the logits differ.
    """
    forward = CompletionForward(Accelerator(cpu=True))
    for sizes in ([[(16, 16)], [(24, 16), (16, 32)]], [[(32, 32)], [(16, 24)]]):
        raw = batch_of(sizes)
        laid_out = padded_batch(raw, [{}] * len(sizes))
        laid_out["images"] = {
            k: v for k, v in laid_out["images"].items() if k not in dropped
        }
        del raw["completion_mask"]
        with torch.no_grad():
            expected = qwen(**raw).logits.flatten(0, 1)[laid_out["positions"]]
            logits = head_of(qwen).logits(forward.states(qwen, laid_out))
        if dropped:
            assert (logits - expected).abs().max() > 1e-3
        else:
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
