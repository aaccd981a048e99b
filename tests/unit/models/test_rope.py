"""rope.py: from which length on positions depend on a batch."""

import pytest
from transformers import LlamaConfig

from axolotl_edpo.models.rope import stretches_beyond


@pytest.mark.parametrize(
    ("rope", "length"),
    [
        ({"rope_type": "default"}, None),
        ({"rope_type": "linear", "factor": 2.0}, None),
        ({"rope_type": "dynamic", "factor": 2.0}, 4096),
        (
            {
                "rope_type": "longrope",
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "original_max_position_embeddings": 512,
            },
            512,
        ),
    ],
)
def test_rope_that_stretches(rope, length):
    rope = {"rope_theta": 10000.0, **rope}
    sizes = dict(hidden_size=32, num_attention_heads=4, max_position_embeddings=4096)
    assert stretches_beyond(LlamaConfig(**sizes, rope_parameters=rope)) == length
