# SPDX-License-Identifier: Apache-2.0
"""All layers of Qwen3-0.6B's shape over hundreds of decode steps on a GPU: kernels and stock path against float64, errors compared.

Rounding errors of one layer are inputs of the next, and keys and values stay in the cache for all later steps: what a single op's test
cannot see. The stock path is the tuner's (mirage_codegen/layer.py): Inductor, cuBLAS, vLLM's cache write and FlashAttention.
"""

import copy
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

LAYERS, STEPS = 28, 512


class Exact:
    """The same layers in float64, with caches of their own."""

    def __init__(self, step, layer):
        self.step, self.layer = step, layer
        self.weights = [{op: weight.double() for op, weight in weights.items()} for weights in step.weights]
        shape = step.shape
        self.keys, self.values = torch.zeros(
            (2, len(step.weights), step.num_tokens, STEPS, shape.kv_heads, 128), dtype=torch.float64, device=step.device
        )

    def rotated(self, x, gamma, position):
        cos, sin = self.step.angles[position].double().chunk(2, -1)
        low, high = self.layer.rms_norm(x, gamma).chunk(2, -1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)

    def __call__(self, i, stream, position):
        step, shape, weights = self.step, self.step.shape, self.weights[i]
        qkv = (self.layer.rms_norm(stream, step.gammas[0]) @ weights["norm_qkv"].t()).view(step.num_tokens, -1, 128)
        q, k, v = qkv.split([shape.heads, shape.kv_heads, shape.kv_heads], 1)
        self.keys[i][:, position], self.values[i][:, position] = self.rotated(k, step.head_gammas[1], position), v
        q = self.rotated(q, step.head_gammas[0], position).view(step.num_tokens, shape.kv_heads, -1, 128)
        scores = torch.einsum("mhgd,mthd->mhgt", q, self.keys[i][:, : position + 1]) * 128**-0.5
        out = torch.einsum("mhgt,mthd->mhgd", scores.softmax(-1), self.values[i][:, : position + 1])
        stream = stream + out.reshape(step.num_tokens, -1) @ weights["o_proj"].t()
        gate, up = (self.layer.rms_norm(stream, step.gammas[1]) @ weights["norm_gate_up"].t()).chunk(2, -1)
        return stream + (torch.nn.functional.silu(gate) * up) @ weights["down_proj"].t()


def at(step, position):
    """Sets the step's caches to a decode step at that position."""
    for cache in step.caches:
        cache.seq_lens.fill_(position + 1)
        cache.positions.fill_(position)
        cache.slots.copy_(cache.block_table[:, position // 16].long() * 16 + position % 16)
    step._flash = None  # FlashAttention's schedule depends on the lengths


@pytest.mark.parametrize("num_tokens", [1, 8])
def test_the_final_hidden_state_errs_little_more_than_stocks(num_tokens, record_property):
    from mirage_codegen import layer

    device, shape = torch.device("cuda", 0), layer.MODELS["0.6B"]
    fused = layer.Step(shape, num_tokens, STEPS, device, copies=LAYERS)
    stock, adding = copy.copy(fused), copy.copy(fused)
    for step in (stock, adding):
        step.caches = [layer.Cache(shape, num_tokens, STEPS, device) for _ in range(LAYERS)]
    kernels = {op: shape.prepare(op, device) for op in layer.OPS}
    assert not [kernel for kernel in kernels.values() if isinstance(kernel, str)]
    projections = {op: shape.prepare(op, device, plans=kernels[op].plans, adds_residual=True) for op in layer.PROJECTIONS}
    assert not [kernel for kernel in projections.values() if isinstance(kernel, str)]
    arms = {
        "kernels": (fused, kernels),
        "residual in the projections": (adding, {**kernels, **projections}),
        "stock": (stock, dict.fromkeys(layer.OPS)),
    }

    exact = Exact(fused, layer)
    squares = dict.fromkeys(arms, 0.0)
    for position in range(STEPS):
        start = torch.randn(num_tokens, shape.hidden, device=device).bfloat16()
        stream = start.double()
        for i in range(LAYERS):
            stream = exact(i, stream, position)
        for name, (step, chosen) in arms.items():
            at(step, position)
            x: torch.Tensor = start
            r: torch.Tensor | None = torch.zeros_like(start)
            for i in range(LAYERS):
                x, r = step.layer(chosen, i, x, r)
            error = ((x.double() if r is None else x.double() + r.double()) - stream).norm() / stream.norm()
            assert error < 0.1, (name, position)
            squares[name] += error.item() ** 2
    ratios = {name: (total / squares["stock"]) ** 0.5 for name, total in squares.items()}
    root = {name: (total / STEPS) ** 0.5 for name, total in squares.items()}
    record_property("errors", root)
    errors = ", ".join(f"{name} {value:.2e}" for name, value in root.items())
    print(f"{num_tokens} requests, {LAYERS} layers, {STEPS} steps: errors {errors}, ratio {ratios['kernels']:.3f}")
    assert max(ratios.values()) <= 1.1, ratios
