# SPDX-License-Identifier: Apache-2.0
"""The dense Qwen3 models (transformers' Qwen3Config) and the parts of their layers that may be fused."""

from typing import NamedTuple

LAYER_OPS = ("norm_qkv", "attention", "o_proj", "norm_gate_up", "down_proj")


class Qwen3(NamedTuple):
    """A model's shape; head_dim is 128."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    tied: bool
    """Whether lm_head is the embedding."""


QWEN3_SIZES = {
    "0.6B": Qwen3(1024, 3072, 28, 16, 8, True),
    "1.7B": Qwen3(2048, 6144, 28, 16, 8, True),
    "4B": Qwen3(2560, 9728, 36, 32, 8, True),
    "8B": Qwen3(4096, 12288, 36, 32, 8, False),
    "14B": Qwen3(5120, 17408, 40, 40, 8, False),
    "32B": Qwen3(5120, 25600, 64, 64, 8, False),
}
