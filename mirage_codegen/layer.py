# SPDX-License-Identifier: Apache-2.0
"""A decode step of Qwen3 decoder layers on this machine's GPU, without an engine: what plans are measured in.

A kernel's time by itself says little: in a step it starts under its predecessor and its successor starts under it. So the step is measured
whole: layers with weights and KV caches of their own, together several times the L2, in one CUDA graph, each op by its kernel or by the
stock path (what Inductor makes of the stock layer, cuBLAS, vLLM's own cache write and FlashAttention).
"""

from __future__ import annotations

import functools
import math
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from mirage_codegen.models import LAYER_OPS as OPS
from mirage_codegen.models import QWEN3_SIZES

sys.path.insert(0, str(Path(__file__).parent.parent / "patches/vllm/model_executor/layers"))
import mirage_kernels
from mirage_kernels import compiler, plans

EPS, PAGE, HEAD_DIM = 1e-6, 16, plans.HEAD_DIM
GEMMS = ("norm_qkv", "o_proj", "norm_gate_up", "down_proj")
PROJECTIONS = ("o_proj", "down_proj")
# blocks on each multiprocessor, and their threads; an H200 liked the first best at 50 MB
BARE_READS = ((2, 512), (4, 256), (8, 128))


@dataclass(frozen=True)
class LayerShape:
    """A decoder layer of one tensor-parallel rank."""

    hidden: int
    heads: int
    kv_heads: int
    intermediate: int

    def sharded(self, ranks: int) -> LayerShape:
        """What one of `ranks` tensor-parallel ranks holds."""
        return LayerShape(self.hidden, self.heads // ranks, max(1, self.kv_heads // ranks), self.intermediate // ranks)

    def gemm(self, op: str) -> tuple[str, int, int]:
        """(kernel op, K, N of one weight) of an op of the layer."""
        return {
            "norm_qkv": ("rms_norm_linear", self.hidden, (self.heads + 2 * self.kv_heads) * HEAD_DIM),
            "o_proj": ("linear", self.heads * HEAD_DIM, self.hidden),
            "norm_gate_up": ("rms_norm_gate_up_silu", self.hidden, self.intermediate),
            "down_proj": ("linear", self.intermediate, self.hidden),
        }[op]

    def prepare(
        self, op: str, device: torch.device, package: Any = mirage_kernels, *, adds_residual: bool = False, alone: bool = False, **how: Any
    ) -> Any:
        """The bf16 kernel of an op, or a sentence why there is none.

        package: mirage_kernels, wherever it was imported from.  adds_residual: the kernel of a projection that does.  alone: with the
        plans for an op behind one of the stock path; attention's are the same.
        """
        if op == "attention":
            return package.prepare_attention(heads=self.heads, kv_heads=self.kv_heads, dtype=torch.bfloat16, device=device, **how)
        kind, k, n = self.gemm(op)
        kind = "linear_residual" if adds_residual else kind
        return package.prepare(kind, k=k, n=n, dtype=torch.bfloat16, device=device, alone=alone, **how)

    def weight_bytes(self) -> int:
        """Bytes of the layer's four weights in a 16-bit dtype."""
        return sum(2 * plans.GEMM_OPS[kind].weights * k * n for kind, k, n in map(self.gemm, GEMMS))


MODELS = {name: LayerShape(size.hidden, size.heads, size.kv_heads, size.intermediate) for name, size in QWEN3_SIZES.items()}


def any_tokens(x: torch.Tensor) -> torch.Tensor:
    """x, compiled for any number of tokens but one by itself, as vLLM compiles: one compilation for all token limits."""
    if x.shape[0] > 1:
        torch._dynamo.mark_dynamic(x, 0)
    return x


@torch.compile
def stock_norm(hidden_states: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Residual add and RMSNorm with vLLM's rounding points."""
    stream = hidden_states.float() + residual.float()
    normed = stream * torch.rsqrt(stream.pow(2).mean(-1, keepdim=True) + EPS)
    return normed.to(weight.dtype) * weight, stream.to(weight.dtype)


@torch.compile
def stock_silu(gate_up: torch.Tensor) -> torch.Tensor:
    """SiLU·mul of the two halves."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


@torch.compile
def stock_rope(
    qkv: torch.Tensor, positions: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, angles: torch.Tensor, heads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """q/k RMSNorm and RoPE: (q, k), [num_tokens, heads, head_dim]."""
    x = qkv.view(qkv.shape[0], -1, HEAD_DIM)
    kv_heads = (x.shape[1] - heads) // 2
    cos, sin = angles[positions].unsqueeze(1).chunk(2, -1)

    def one(part: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        normed = (part.float() * torch.rsqrt(part.float().pow(2).mean(-1, keepdim=True) + EPS)).to(weight.dtype) * weight
        low, high = normed.chunk(2, -1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)

    return one(x[:, :heads], q_weight), one(x[:, heads : heads + kv_heads], k_weight)


def rms_norm(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """x [..., n] in float64, normalised."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * gamma.double()


def relative_error(out: torch.Tensor, exact: torch.Tensor) -> float:
    """‖out − exact‖ / ‖exact‖ in float64; NaN where out has NaN."""
    return ((out.double() - exact).norm() / exact.norm()).item()


def op_bytes(shape: LayerShape, op: str, num_tokens: int, context: int) -> int:
    """The fewest bytes that one call must move: weights, or cached keys and values, and activations, once each."""
    if op == "attention":
        return 2 * num_tokens * HEAD_DIM * (2 * shape.kv_heads * context + 2 * shape.heads + 4 * shape.kv_heads)
    kind, k, n = shape.gemm(op)
    norm = kind != "linear"
    return 2 * (plans.GEMM_OPS[kind].weights * n * k + num_tokens * (n + k * (3 if norm else 1)) + (k if norm else 0))


class Cache:
    """A paged KV cache of one layer, and what a decode step over it needs.

    A request's pages lie one behind the other, as in a fresh engine.  Over scattered pages no plan lost at 8,192 tokens; in an engine one
    for 32 requests did.
    """

    def __init__(self, shape: LayerShape, num_tokens: int, context: int, device: torch.device):
        pages_each = math.ceil(context / PAGE)
        pages = num_tokens * pages_each
        memory = torch.empty((pages, PAGE, shape.kv_heads, 2 * HEAD_DIM), dtype=torch.bfloat16, device=device).normal_()
        self.kv_cache = memory.permute(0, 2, 1, 3)  # vLLM's logical order over its default memory order
        self.block_table = torch.arange(pages, device=device).int().view(num_tokens, pages_each)
        self.seq_lens = torch.full((num_tokens,), context, dtype=torch.int32, device=device)
        self.positions = torch.full((num_tokens,), context - 1, dtype=torch.int64, device=device)
        self.slots = self.block_table[:, (context - 1) // PAGE].long() * PAGE + (context - 1) % PAGE


def _with_stream(outputs: tuple[torch.Tensor, torch.Tensor | None], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A norm kernel's outputs with the residual stream, which is x where it had nothing to add."""
    out, stream = outputs
    return out, x if stream is None else stream


class Step:
    """A decode step of `num_tokens` requests with `context` tokens each; `copies` layers take turns (0: four times what the L2 holds).

    Only what `ops` need is allocated.
    """

    def __init__(self, shape: LayerShape, num_tokens: int, context: int, device: torch.device, copies: int = 0, ops: tuple[str, ...] = OPS):
        self.shape, self.num_tokens, self.context, self.device = shape, num_tokens, context, device
        cache_bytes = num_tokens * context * shape.kv_heads * 2 * HEAD_DIM * 2
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        self.copies = copies or max(3, math.ceil(4 * l2 / (shape.weight_bytes() + cache_bytes)))
        torch.manual_seed(0)

        def draw(*size: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.empty(size, dtype=torch.bfloat16, device=device)).normal_(0, scale)

        self.weights = [
            {op: draw(n * plans.GEMM_OPS[kind].weights, k, scale=k**-0.5) for op in GEMMS if op in ops for kind, k, n in [shape.gemm(op)]}
            for _ in range(self.copies)
        ]
        self.gammas = [1 + draw(shape.hidden, scale=0.2) for _ in range(2)]
        self.head_gammas = [1 + draw(HEAD_DIM, scale=0.2) for _ in range(2)]
        self.caches = [Cache(shape, num_tokens, context, device) for _ in range(self.copies if "attention" in ops else 0)]
        angle = torch.arange(context, device=device)[:, None] * 1e6 ** (-torch.arange(64, device=device) / 64)[None]
        self.angles = torch.cat([angle.cos(), angle.sin()], -1).bfloat16()
        self.hidden_states, self.residual = draw(num_tokens, shape.hidden), draw(num_tokens, shape.hidden)
        self._flash: Any = None
        self._inputs: dict[str, torch.Tensor] = {}

    # One op of one layer, by a kernel or by the stock path

    def norm_qkv(self, kernel: Any, i: int, x: torch.Tensor, r: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        weight = self.weights[i]["norm_qkv"]
        if kernel is not None:
            return _with_stream(kernel(x, r, self.gammas[0], weight, EPS), x)
        normed, r = self._stock_norm(x, r, self.gammas[0])
        return F.linear(normed, weight), r

    def norm_gate_up(self, kernel: Any, i: int, x: torch.Tensor, r: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        weight = self.weights[i]["norm_gate_up"]
        if kernel is not None:
            return _with_stream(kernel(x, r, self.gammas[1], weight, EPS), x)
        normed, r = self._stock_norm(x, r, self.gammas[1])
        return stock_silu(any_tokens(F.linear(normed, weight))), r

    def _stock_norm(self, x: torch.Tensor, r: torch.Tensor | None, gamma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if r is None:
            raise ValueError("the stock path adds the residual in its norms: projections add it only where kernels normalise")
        return stock_norm(any_tokens(x), any_tokens(r), gamma)

    def project(self, op: str, kernel: Any, i: int, x: torch.Tensor, r: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(the projection, the residual), or (their sum, None) with a kernel that adds."""
        if getattr(kernel, "adds_residual", False):
            return kernel(x, self.weights[i][op], r), None
        return self.linear(op, kernel, i, x), r

    def linear(self, op: str, kernel: Any, i: int, x: torch.Tensor) -> torch.Tensor:
        weight = self.weights[i][op]
        return kernel(x, weight) if kernel is not None else F.linear(x, weight)

    def attention(self, kernel: Any, i: int, qkv: torch.Tensor) -> torch.Tensor:
        cache = self.caches[i]
        out = qkv.new_empty((self.num_tokens, self.shape.heads * HEAD_DIM))
        if kernel is None:
            return self._stock_attention(cache, qkv, out)
        kernel(
            qkv,
            cache.positions,
            *self.head_gammas,
            self.angles,
            cache.kv_cache,
            cache.slots,
            cache.block_table,
            cache.seq_lens,
            EPS,
            HEAD_DIM**-0.5,
            out,
        )
        return out

    def _stock_attention(self, cache: Cache, qkv: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        from vllm import _custom_ops as vllm_ops
        from vllm.v1.attention.backends import fa_utils

        if self._flash is None:  # lengths and splits as vLLM's metadata builder asks for them under CUDA graphs
            self._starts = torch.arange(self.num_tokens + 1, dtype=torch.int32, device=self.device)
            self._one = torch.ones((), device=self.device)
            self._schedule = None
            version = fa_utils.get_flash_attn_version()
            if version == 3:
                self._schedule = fa_utils.get_scheduler_metadata(
                    batch_size=self.num_tokens,
                    max_seqlen_q=1,
                    max_seqlen_k=self.context,
                    num_heads_q=self.shape.heads,
                    num_heads_kv=self.shape.kv_heads,
                    headdim=HEAD_DIM,
                    cache_seqlens=cache.seq_lens,
                    qkv_dtype=qkv.dtype,
                    cu_seqlens_q=self._starts,
                    page_size=PAGE,
                    causal=True,
                    window_size=(-1, -1),
                    num_splits=32,
                )
            self._flash = version
        gamma_q, gamma_k = self.head_gammas
        q, k = stock_rope(any_tokens(qkv), any_tokens(cache.positions), gamma_q, gamma_k, self.angles, self.shape.heads)
        v = qkv.view(self.num_tokens, -1, HEAD_DIM)[:, -self.shape.kv_heads :]
        keys, values = cache.kv_cache.transpose(1, 2).split(HEAD_DIM, dim=-1)
        vllm_ops.reshape_and_cache_flash(k, v, keys, values, cache.slots, "auto", self._one, self._one)
        fa_utils.flash_attn_varlen_func(
            q=q,
            k=keys,
            v=values,
            out=out.view(self.num_tokens, -1, HEAD_DIM),
            cu_seqlens_q=self._starts,
            max_seqlen_q=1,
            seqused_k=cache.seq_lens,
            max_seqlen_k=self.context,
            softmax_scale=HEAD_DIM**-0.5,
            causal=True,
            window_size=[-1, -1],
            block_table=cache.block_table,
            scheduler_metadata=self._schedule,
            fa_version=self._flash,
            num_splits=32 if self._flash == 3 else 0,
        )
        return out

    def layer(
        self, kernels: Mapping[str, Any], i: int, x: torch.Tensor, r: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One decoder layer with weights i; kernels by op, None for the stock path: (hidden_states, residual).

        The residual is None where it has been added: by down_proj's kernel, in the layer before or in this one.
        """
        qkv, stream = self.norm_qkv(kernels["norm_qkv"], i, x, r)
        x, r = self.project("o_proj", kernels["o_proj"], i, self.attention(kernels["attention"], i, qkv), stream)
        x, stream = self.norm_gate_up(kernels["norm_gate_up"], i, x, r)
        return self.project("down_proj", kernels["down_proj"], i, x, stream)

    # One op by itself

    def run(self, op: str, kernel: Any, i: int) -> torch.Tensor:
        """The output of one op with weights (or cache) i on the same inputs each time."""
        if op == "attention":
            return self.attention(kernel, i, self._input(op))
        if op in PROJECTIONS:
            return self.project(op, kernel, i, self._input(op), self.residual)[0]
        return getattr(self, op)(kernel, i, self.hidden_states, self.residual)[0]

    def _input(self, op: str) -> torch.Tensor:
        if op not in self._inputs:
            width = self.shape.gemm("norm_qkv")[2] if op == "attention" else self.weights[0][op].shape[1]
            self._inputs[op] = torch.empty((self.num_tokens, width), dtype=torch.bfloat16, device=self.device).normal_()
        return self._inputs[op]

    def memory(self, op: str, i: int) -> torch.Tensor:
        """What a call with weights (or cache) i cannot do without reading."""
        return self.caches[i].kv_cache if op == "attention" else self.weights[i][op]

    def exact(self, op: str) -> torch.Tensor:
        """What run(op, …, 0) should give, in float64 from the same inputs; without the residual that a projection's kernel may add."""
        if op == "attention":
            return self._exact_attention(self._input(op).double(), self.caches[0])
        weight = self.weights[0][op].double()
        if op in PROJECTIONS:
            return self._input(op).double() @ weight.t()
        stream = self.hidden_states.double() + self.residual.double()
        out = rms_norm(stream, self.gammas[0 if op == "norm_qkv" else 1]) @ weight.t()
        if op == "norm_qkv":
            return out
        gate, up = out.chunk(2, -1)
        return F.silu(gate) * up

    def _exact_attention(self, qkv: torch.Tensor, cache: Cache) -> torch.Tensor:
        shape, tokens = self.shape, self.num_tokens
        cos, sin = self.angles[cache.positions].double().unsqueeze(1).chunk(2, -1)

        def rotated(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
            low, high = rms_norm(x, gamma).chunk(2, -1)
            return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)

        q, k, v = qkv.view(tokens, -1, HEAD_DIM).split([shape.heads, shape.kv_heads, shape.kv_heads], 1)
        q, k = rotated(q, self.head_gammas[0]), rotated(k, self.head_gammas[1])
        memory = cache.kv_cache.permute(0, 2, 1, 3)  # [pages, page, kv_heads, key and value]
        out = []
        for token in range(tokens):
            length = int(cache.seq_lens[token])
            cached = memory[cache.block_table[token].long()].flatten(0, 1)[:length].double()
            keys, values = cached.split(HEAD_DIM, -1)
            keys, values = keys.clone(), values.clone()
            keys[-1], values[-1] = k[token], v[token]
            grouped = q[token].view(shape.kv_heads, -1, HEAD_DIM)
            weights = (torch.einsum("hgd,thd->hgt", grouped, keys) * HEAD_DIM**-0.5).softmax(-1)
            out.append(torch.einsum("hgt,thd->hgd", weights, values).flatten())
        return torch.stack(out)

    # Measuring

    def time_us(self, kernels: Mapping[str, Any], replays: int = 7, layers: int = 16) -> float:
        """Median time of one layer in µs, from replays of one CUDA graph of at least that many layers in a row."""
        state: tuple[torch.Tensor, torch.Tensor | None] = self.hidden_states, self.residual

        def run(i: int) -> None:
            nonlocal state
            state = self.layer(kernels, i % self.copies, *(state if i else (self.hidden_states, self.residual)))

        return graph_time_us(run, self.copies * math.ceil(layers / self.copies), replays)


@functools.cache
def bare_readers(device: torch.device) -> list[Callable[[torch.Tensor], None]]:
    """Kernels that only read a tensor's memory, one for each launch shape of BARE_READS."""
    from mirage_kernels.launcher import LoadedKernel

    gpu = torch.cuda.get_device_properties(device)
    out = torch.zeros(1, dtype=torch.int32, device=device)

    source, arch = str(Path(__file__).with_name("bare_read.cu")), f"sm_{gpu.major}{gpu.minor}"
    shapes = [(("MIRAGE_BLOCKS", blocks * gpu.multi_processor_count), ("MIRAGE_THREADS", threads)) for blocks, threads in BARE_READS]
    cubins = compiler.CubinCache(plans.cache_folder()).get([compiler.Build(source, shape, arch) for shape in shapes])

    def reader(cubin: bytes) -> Callable[[torch.Tensor], None]:
        kernel = LoadedKernel(cubin, "bare_read", ["begin", "end", "out", "num_tokens"], device, overlap=False)
        return lambda x: kernel(x.data_ptr(), x.data_ptr() + x.nbytes, out.data_ptr(), 1)

    return [reader(cubin) for cubin in cubins]


def graph_time_us(run: Callable[[int], object], count: int, replays: int = 5) -> float:
    """Median time of run(i) in µs, from replays of one CUDA graph of run(0) … run(count - 1)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # what fills the inputs may still run: 32B's positions were read before they were there
    with torch.cuda.stream(stream):
        run(0)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(count):
                run(i)
        graph.replay()
        times = []
        for _ in range(replays):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / count)
    return statistics.median(times)
