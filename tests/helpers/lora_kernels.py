"""axolotl's LoRA kernels on a machine without a GPU.

Two of the three are PyTorch. The third has Triton kernels, which the interpreter runs
on the CPU, in float32 and float16; of bf16 it multiplies the bit patterns.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from axolotl.kernels import geglu, swiglu
from axolotl.monkeypatch import lora_kernels

from axolotl_edpo.config import rules
from axolotl_edpo.models.attached_kernels import attached_kernels

KERNELS = dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), True)


@contextmanager
def on_this_machine() -> Iterator[None]:
    """Within it, the kernels run, and recipes may have them; it undoes all at the end.

    axolotl rewrites the forward of the attention's class, with which other models of
    the process cannot run: here they keep theirs. Triton parts allocate on `cuda`.
    """
    rewrite, forwards = lora_kernels.patch_self_attn_lora, {}

    def rewrite_for_kernels(cfg) -> None:
        kind = lora_kernels.get_attention_cls_from_config(cfg)
        before = kind.forward
        rewrite(cfg)
        if kind not in forwards:
            forwards[kind] = before
            kind.forward = _either(before, kind.forward)

    needs_gpu = dict(rules.NEEDS_GPU)
    lora_kernels.patch_self_attn_lora = rewrite_for_kernels
    if not torch.cuda.is_available():
        for key in KERNELS:
            del rules.NEEDS_GPU[key]
        swiglu.torch = geglu.torch = SimpleNamespace(empty=_empty)
    try:
        yield
    finally:
        lora_kernels.patch_self_attn_lora = rewrite
        swiglu.torch = geglu.torch = torch
        rules.NEEDS_GPU.update(needs_gpu)
        for kind, forward in forwards.items():
            kind.forward = forward
            del kind._original_forward


def _either(plain: Callable, rewritten: Callable) -> Callable:
    """A forward for layers with kernels and for those without."""

    def forward(self, *arguments, **keywords):
        chosen = rewritten if hasattr(self, "apply_qkv") else plain
        return chosen(self, *arguments, **keywords)

    return forward


def _empty(*shape, dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype)


def probe(train: Callable) -> tuple:
    """For `ranks.run`: trains with the kernels, and adds which are attached."""
    with on_this_machine():
        trainer = train()
    model = trainer.accelerator.unwrap_model(trainer.model)
    return trainer, {"kernels": sorted(attached_kernels(model))}
