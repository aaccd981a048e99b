"""Marks of tests about what `rl: edpo` refuses with an earlier axolotl."""

import pytest

from axolotl_edpo import upstream, upstream_data

needs_late_kernels = pytest.mark.skipif(
    not upstream.patches_adapters_late(),
    reason="LoRA kernels are refused before axolotl 0.21",
)
needs_images = pytest.mark.skipif(
    not upstream_data.takes_images(), reason="images are refused before axolotl 0.21"
)
needs_divided_rows = pytest.mark.skipif(
    not upstream.has_context_parallelism(),
    reason="context parallelism is refused before axolotl 0.20",
)
