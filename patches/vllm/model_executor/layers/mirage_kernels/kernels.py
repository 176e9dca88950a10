# SPDX-License-Identifier: Apache-2.0
"""The kernels as Python callables: each allocates its outputs and launches what its plan says on the current stream.

Tensors are contiguous, 16-byte aligned and of one dtype (bf16 or fp16); sums are in fp32. Nothing here checks that: the ops do.
"""

import logging
import time
from bisect import bisect_left
from collections.abc import Sequence

import torch

from .arguments import ARGUMENTS
from .compiler import Build, CubinCache
from .plans import COLUMNS, AttentionPlan, Plan, cache_folder, kernels_of, round_up

logger = logging.getLogger(__name__)
Wanted = tuple[str, dict[str, int], bool]  # source, macros, may start before its predecessor on the stream has finished


def load(wanted: Sequence[Wanted], dtype: torch.dtype, device: torch.device, what: str) -> list:
    """Compiles or finds, and loads; equal entries once. `what` names the kernels in the log line of a first start."""
    from .launcher import LoadedKernel

    major, minor = torch.cuda.get_device_capability(device)
    arch = f"sm_{major}{minor}"
    element = {"MIRAGE_FP16": 1} if dtype == torch.float16 else {}
    distinct = {_key(entry): entry for entry in wanted}
    builds = [Build(f"{name}.cu", tuple(sorted({**macros, **element}.items())), arch) for name, macros, _ in distinct.values()]
    started = time.perf_counter()

    def say(count: int) -> None:
        logger.info("Mirage: compiling %d of %d kernels for %s, %s (first start only) …", count, len(builds), arch, what)

    cubins = CubinCache(cache_folder()).get(builds, say)
    loaded = {
        key: LoadedKernel(cubin, name, ARGUMENTS[name], device, early and major >= 9)
        for cubin, (key, (name, _, early)) in zip(cubins, distinct.items(), strict=True)
    }
    logger.debug("Mirage: %d kernels ready in %.1f s", len(loaded), time.perf_counter() - started)
    return [loaded[_key(entry)] for entry in wanted]


def _key(entry: Wanted) -> tuple:
    name, macros, early = entry
    return name, tuple(sorted(macros.items())), early


class Gemm:
    """What the GEMM ops share: one list of kernels for each plan and variant."""

    adds_residual = False  # to the output of a projection

    def __init__(self, op: str, k: int, n: int, dtype: torch.dtype, device: torch.device, plans: list[Plan], overlap: bool):
        self.n, self.plans = n, plans
        self.max_tokens = plans[-1].max_num_tokens
        self.name = f"{op} {k}→{n} {str(dtype).removeprefix('torch.')}, up to {self.max_tokens} tokens"
        self._limits = [plan.max_num_tokens for plan in plans]
        wanted: list[Wanted] = []
        shape: list[list[range]] = []
        for plan in plans:
            variants = []
            for sources in kernels_of(op, plan, k, n):
                start = len(wanted)
                for name, macros in sources:
                    # behind its own norm kernel a GEMM always overlaps
                    wanted.append((name, macros, overlap or len(wanted) > start))
                variants.append(range(start, len(wanted)))
            shape.append(variants)
        loaded = load(wanted, dtype, device, f"{op} {k}→{n}")
        self._kernels = [[[loaded[i] for i in variant] for variant in variants] for variants in shape]

    def kernels_for(self, num_tokens: int, variant: int = 0) -> list:
        """The kernels that run for that many tokens, in order."""
        return self._kernels[bisect_left(self._limits, num_tokens)][variant]


class NormGemm(Gemm):
    """rms_norm(hidden_states + residual)·γ, then the op's GEMM and epilogue, for up to `max_tokens` tokens on one device."""

    def __call__(
        self, hidden_states: torch.Tensor, residual: torch.Tensor | None, norm_weight: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states, residual [num_tokens, K], norm_weight [K], weight [n or 2n, K] → (out [num_tokens, n], the sum or None)."""
        num_tokens = hidden_states.shape[0]
        kernels = self.kernels_for(num_tokens, residual is None)
        out = hidden_states.new_empty((num_tokens, self.n))
        residual_out = None if residual is None else torch.empty_like(residual)
        # addresses in the order of kernels.json: outputs, inputs, scalars
        written = () if residual_out is None else (residual_out.data_ptr(),)
        read = (hidden_states.data_ptr(), *(() if residual is None else (residual.data_ptr(),)), norm_weight.data_ptr())
        if len(kernels) == 1:
            kernels[0](out.data_ptr(), *written, *read, weight.data_ptr(), num_tokens, eps)
        else:
            normed = hidden_states.new_empty((round_up(num_tokens, COLUMNS), hidden_states.shape[1]))  # in whole tiles
            kernels[0](normed.data_ptr(), *written, *read, weight.data_ptr(), num_tokens, eps)
            kernels[1](out.data_ptr(), normed.data_ptr(), weight.data_ptr(), num_tokens)
        return out, residual_out


class Linear(Gemm):
    """x @ weight.T for up to `max_tokens` tokens on one device."""

    def __call__(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x [num_tokens, K], weight [n, K] → [num_tokens, n]"""
        num_tokens = x.shape[0]
        out = x.new_empty((num_tokens, self.n))
        self.kernels_for(num_tokens)[0](out.data_ptr(), x.data_ptr(), weight.data_ptr(), num_tokens)
        return out


class LinearResidual(Gemm):
    """x @ weight.T + residual for up to `max_tokens` tokens on one device."""

    adds_residual = True

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """x [num_tokens, K], weight [n, K], residual [num_tokens, n] → [num_tokens, n]"""
        num_tokens = x.shape[0]
        out = x.new_empty((num_tokens, self.n))
        self.kernels_for(num_tokens)[0](out.data_ptr(), x.data_ptr(), weight.data_ptr(), residual.data_ptr(), num_tokens)
        return out


class DecodeAttention:
    """q/k RMSNorm + RoPE + KV-cache write + paged attention for one new token of each of up to `max_tokens` requests on one device."""

    def __init__(self, heads: int, kv_heads: int, dtype: torch.dtype, device: torch.device, plans: list[AttentionPlan], overlap: bool):
        self.plans = plans
        self.max_tokens = plans[-1].max_num_tokens
        self.name = f"decode_attention {heads}/{kv_heads} heads {str(dtype).removeprefix('torch.')}, up to {self.max_tokens} tokens"
        self._limits = [plan.max_num_tokens for plan in plans]
        wanted = [("decode_attention", plan.defines(heads, kv_heads), overlap) for plan in plans]
        self._kernels = load(wanted, dtype, device, f"attention with {heads} heads over {kv_heads}")

    def __call__(
        self,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        q_norm_weight: torch.Tensor,
        k_norm_weight: torch.Tensor,
        cos_sin_cache: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        eps: float,
        scale: float,
        output: torch.Tensor,
    ) -> None:
        """Writes the new tokens' keys and values into kv_cache, and output [num_tokens, heads · 128].

        qkv [num_tokens, (heads + 2 kv_heads) · 128], as the projection made it; positions, slot_mapping int64 [num_tokens]; kv_cache
        [pages, kv_heads, page_size, 256] in any order in memory, a token's key before its value; block_table int32 [num_tokens, …];
        seq_lens int32 [num_tokens], the new token included, 0 for a row of padding (its output is 0).
        """
        num_tokens = qkv.shape[0]
        page_stride, head_stride, token_stride, _ = kv_cache.stride()
        self._kernels[bisect_left(self._limits, num_tokens)](
            output.data_ptr(),
            qkv.data_ptr(),
            q_norm_weight.data_ptr(),
            k_norm_weight.data_ptr(),
            cos_sin_cache.data_ptr(),
            positions.data_ptr(),
            kv_cache.data_ptr(),
            slot_mapping.data_ptr(),
            block_table.data_ptr(),
            seq_lens.data_ptr(),
            page_stride,
            token_stride,
            head_stride,
            kv_cache.shape[2],
            block_table.stride(0),
            num_tokens,
            eps,
            scale,
        )
