# SPDX-License-Identifier: Apache-2.0
"""The torch ops that the fused path of Qwen3 calls: kernels where one fits the call, PyTorch elsewhere.

    norm_qkv, add_norm_qkv      RMSNorm (of hidden_states + residual) and a projection
    norm_gate_up_silu,
    add_norm_gate_up_silu       the same, with SiLU·mul behind a gate-and-up projection
    linear, linear_residual     a projection without bias (and + residual)
    qk_norm_rope, write_cache   q/k RMSNorm and RoPE; keys and values into the KV cache: nothing where the next op's kernel does all of it
    decode_attention            that kernel, or vLLM's attention

Each is opaque to torch.compile: which body runs is decided when it is called (or captured), by the number of tokens and the forward
context.  Where vLLM compiles for more tokens than any kernel takes, `mirage_compile.py` gives Inductor their PyTorch bodies instead.
Weights are arguments: with a layer's name instead, Inductor could not reuse one compiled piece for all layers.  `fused_mirage_ops.py`
decides which layers call them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.library import Library, infer_schema
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention.attention import (
    get_attention_context,
    unified_attention_with_output,
    unified_kv_cache_update,
)
from vllm.triton_utils import HAS_TRITON, tl, triton
from vllm.utils.torch_utils import LayerNameType, _resolve_layer_name

OP_SCHEMA = 5  # raise it with every change of an op's schema or fake: it is part of the compile-cache key
OPS = ("norm_qkv", "attention", "o_proj", "norm_gate_up", "down_proj")
"""What VLLM_MIRAGE_OPS names: the parts of a layer that may be fused."""
HEAD_DIM = 128  # of the decode-attention kernel

# How often each body ran, counted in Python: a replayed CUDA graph counts once, when it is captured.
calls = {f"{op}.{body}": 0 for op in OPS for body in ("kernel", "torch")}

# --------------------------------------------------------------------------------------------------------- kernels
# One entry for each shape prepared in this process: the kernel, or the reason why there is none.
kernels: dict[tuple, Any] = {}
contexts: dict[tuple, int] = {}  # of an attention kernel's entry: the tokens that a request of any engine here may reach


def prepare_gemm(op: str, k: int, n: int, dtype: torch.dtype, device: torch.device, alone: bool = False) -> Any:
    """Compile or load the kernel of a GEMM op (mirage_kernels.plans.GEMM_OPS) for weights [n, k] now, before any graph capture.

    alone: it will run behind an op of the stock path.  Of layers that differ in this the first decides for all: an op finds its kernel
    by the shape.
    Returns the kernel, or a sentence saying why there is none.
    """
    shape = {"k": k, "n": n, "dtype": dtype, "device": device}
    return _prepared((op, *shape.values()), lambda module: module.prepare(op, **shape, alone=alone))


def prepare_attention(heads: int, kv_heads: int, dtype: torch.dtype, device: torch.device, max_context: int = 0) -> Any:
    """The same for decode attention over requests of up to `max_context` tokens."""
    shape = {"heads": heads, "kv_heads": kv_heads, "dtype": dtype, "device": device}
    key = ("decode_attention", *shape.values())
    if contexts.get(key, -1) < max_context:  # a draft model, prepared later, may allow shorter contexts than its target
        contexts[key] = max_context
        kernels.pop(key, None)
    return _prepared(key, lambda module: module.prepare_attention(**shape, max_context=contexts[key]))


def _prepared(key: tuple, prepare: Any) -> Any:
    if key not in kernels:
        kernels[key] = _prepare(key[-1], prepare)
    return kernels[key]


def _prepare(device: torch.device, prepare: Any) -> Any:
    if device.type != "cuda":
        return f"the weights are on the {device.type}, not on a GPU"
    try:
        from vllm.model_executor.layers import mirage_kernels
    except ImportError as error:
        return f"mirage_kernels cannot be imported ({error})"
    return prepare(mirage_kernels)


def _gemm_for(op: str, weights: int, x: torch.Tensor, weight: torch.Tensor, *others: torch.Tensor) -> Any:
    """The kernel that can take this call, or None: the PyTorch body runs."""
    rows, k = weight.shape
    kernel = kernels.get((op, k, rows // weights, x.dtype, x.device))
    if kernel is None or isinstance(kernel, str):
        return None
    if x.dim() != 2 or not 0 < x.shape[0] <= kernel.max_tokens:
        return None
    return kernel if _addressable(x, weight, *others) else None


def _addressable(*tensors: torch.Tensor) -> bool:
    return all(tensor.is_contiguous() and tensor.data_ptr() % 16 == 0 for tensor in tensors)


# ----------------------------------------------------------------------------------------------------- norm bodies
@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    residual_out_ptr,
    eps,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """One row: out = (x + residual) / rms · weight, residual_out = x + residual; sums in fp32."""
    columns = tl.arange(0, BLOCK)
    inside = columns < HIDDEN
    offsets = tl.program_id(0).to(tl.int64) * HIDDEN + columns
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        tl.store(residual_out_ptr + offsets, x.to(residual_out_ptr.dtype.element_ty), mask=inside)
    x *= tl.rsqrt(tl.sum(x * x, axis=0) / HIDDEN + eps)
    x = x.to(weight.dtype).to(tl.float32) * weight.to(tl.float32)
    tl.store(out_ptr + offsets, x.to(out_ptr.dtype.element_ty), mask=inside)


def rms_norm_triton(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One kernel, one row a program, the row in registers: what Inductor makes of the stock layer's add + norm.

    vLLM's C++ op adds in place, so a functional op would need two copies before it.
    """
    x = x.contiguous()
    residual = residual if residual is None else residual.contiguous()
    out = torch.empty_like(x)
    residual_out = x if residual is None else torch.empty_like(residual)
    hidden = weight.shape[0]
    rows = x.numel() // hidden
    if rows:
        block = triton.next_power_of_2(hidden)
        warps = min(16, max(4, block // 256))  # 8 elements a thread: one 16-byte load
        _rms_norm_kernel[(rows,)](
            x, residual, weight, out, residual_out, eps, hidden, block, residual is not None, num_warps=warps
        )
    return out, residual_out


def rms_norm_native(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with PyTorch's own operators, for the CPU.  Rounds where vLLM's native norm rounds."""
    total = x.to(torch.float32)
    if residual is not None:
        total = total + residual.to(torch.float32)
    normed = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + eps)
    return normed.to(weight.dtype) * weight, total.to(x.dtype).contiguous()


def _rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(normalised x or x + residual, x + residual), both like x: [num_tokens, hidden]."""
    body = rms_norm_triton if x.is_cuda and HAS_TRITON else rms_norm_native
    return body(x, residual, weight, eps)


# ----------------------------------------------------------------------------------------------- norm + projection
def _norm_qkv(
    hidden_states: torch.Tensor, norm_weight: torch.Tensor, qkv_weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """The first layer's op.  [..., hidden] → qkv [..., (q+2kv)·head_dim]."""
    if (kernel := _gemm_for("rms_norm_linear", 1, hidden_states, qkv_weight, norm_weight)) is not None:
        calls["norm_qkv.kernel"] += 1
        return kernel(hidden_states, None, norm_weight, qkv_weight, eps)[0]
    calls["norm_qkv.torch"] += 1
    normed, _ = _rms_norm(hidden_states, None, norm_weight, eps)
    return F.linear(normed, qkv_weight)


def _norm_qkv_fake(hidden_states, norm_weight, qkv_weight, eps):
    return hidden_states.new_empty((*hidden_states.shape[:-1], qkv_weight.shape[0]))


def _add_norm_qkv(
    hidden_states: torch.Tensor,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    qkv_weight: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The other layers' op: (qkv [..., (q+2kv)·head_dim], hidden_states + residual [..., hidden]).

    Two ops, not one with an optional residual: that one would return its own input, which a functional op may not.
    """
    if (kernel := _gemm_for("rms_norm_linear", 1, hidden_states, qkv_weight, norm_weight, residual)) is not None:
        calls["norm_qkv.kernel"] += 1
        return kernel(hidden_states, residual, norm_weight, qkv_weight, eps)
    calls["norm_qkv.torch"] += 1
    normed, residual_out = _rms_norm(hidden_states, residual, norm_weight, eps)
    return F.linear(normed, qkv_weight), residual_out


def _add_norm_qkv_fake(hidden_states, residual, norm_weight, qkv_weight, eps):
    qkv = hidden_states.new_empty((*hidden_states.shape[:-1], qkv_weight.shape[0]))
    return qkv, torch.empty_like(residual, memory_format=torch.contiguous_format)


def _norm_gate_up_silu(
    hidden_states: torch.Tensor, norm_weight: torch.Tensor, gate_up_weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """The op where o_proj has added the residual.  [..., hidden] → silu(gate)·up [..., intermediate]."""
    kernel = _gemm_for("rms_norm_gate_up_silu", 2, hidden_states, gate_up_weight, norm_weight)
    if kernel is not None:
        calls["norm_gate_up.kernel"] += 1
        return kernel(hidden_states, None, norm_weight, gate_up_weight, eps)[0]
    calls["norm_gate_up.torch"] += 1
    normed, _ = _rms_norm(hidden_states, None, norm_weight, eps)
    return _silu_and_mul(F.linear(normed, gate_up_weight))


def _norm_gate_up_silu_fake(hidden_states, norm_weight, gate_up_weight, eps):
    return hidden_states.new_empty((*hidden_states.shape[:-1], gate_up_weight.shape[0] // 2))


def _add_norm_gate_up_silu(
    hidden_states: torch.Tensor,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    gate_up_weight: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(silu(gate)·up [..., intermediate], hidden_states + residual [..., hidden]); gate_up_weight [2·intermediate, hidden]."""
    kernel = _gemm_for("rms_norm_gate_up_silu", 2, hidden_states, gate_up_weight, norm_weight, residual)
    if kernel is not None:
        calls["norm_gate_up.kernel"] += 1
        return kernel(hidden_states, residual, norm_weight, gate_up_weight, eps)
    calls["norm_gate_up.torch"] += 1
    normed, residual_out = _rms_norm(hidden_states, residual, norm_weight, eps)
    return _silu_and_mul(F.linear(normed, gate_up_weight)), residual_out


@triton.jit
def _silu_and_mul_kernel(gate_up_ptr, out_ptr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK columns of one row: out = silu(gate)·up in fp32, up HALF columns behind gate."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < HALF
    gate = tl.load(gate_up_ptr + row * 2 * HALF + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * HALF + HALF + columns, mask=inside, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * HALF + columns, out.to(out_ptr.dtype.element_ty), mask=inside)


def silu_and_mul_triton(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate)·up of [..., 2·intermediate], one pass with 16-byte loads, as Inductor makes of the stock layer's."""
    half = gate_up.shape[-1] // 2
    out = gate_up.new_empty((*gate_up.shape[:-1], half))
    if out.numel():
        block = 1024  # 8 elements a thread
        _silu_and_mul_kernel[(out.numel() // half, triton.cdiv(half, block))](gate_up, out, half, block, num_warps=4)
    return out


def silu_and_mul_native(gate_up: torch.Tensor) -> torch.Tensor:
    """The same with PyTorch's own operators, for the CPU."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    body = silu_and_mul_triton if gate_up.is_cuda and HAS_TRITON else silu_and_mul_native
    return body(gate_up)


def _add_norm_gate_up_silu_fake(hidden_states, residual, norm_weight, gate_up_weight, eps):
    out = hidden_states.new_empty((*hidden_states.shape[:-1], gate_up_weight.shape[0] // 2))
    return out, torch.empty_like(residual, memory_format=torch.contiguous_format)


def _linear(x: torch.Tensor, weight: torch.Tensor, name: str) -> torch.Tensor:
    """x [..., k] → [..., n]; name: "o_proj" or "down_proj", for counting."""
    if (kernel := _gemm_for("linear", 1, x, weight)) is not None:
        calls[f"{name}.kernel"] += 1
        return kernel(x, weight)
    calls[f"{name}.torch"] += 1
    return F.linear(x, weight)


def _linear_fake(x, weight, name):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _linear_residual(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, name: str) -> torch.Tensor:
    """x [..., k], residual [..., n] → x @ weight.T + residual [..., n]; name as of linear."""
    if (kernel := _gemm_for("linear_residual", 1, x, weight, residual)) is not None:
        calls[f"{name}.kernel"] += 1
        return kernel(x, weight, residual)
    calls[f"{name}.torch"] += 1
    return F.linear(x, weight) + residual


def _linear_residual_fake(x, weight, residual, name):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


# ------------------------------------------------------------------------------------------------------- attention
def _decode_kernel(qkv: torch.Tensor, num_heads: int, num_kv_heads: int, layer_name: str) -> Any:
    """The attention kernel, if it can take this step: one new token for each request, and a graph (if any) captured for such steps only.

    All three attention ops ask, and get the same answer: it depends on the forward context alone.
    """
    kernel = kernels.get(("decode_attention", num_heads, num_kv_heads, qkv.dtype, qkv.device))
    if kernel is None or isinstance(kernel, str) or not 0 < qkv.shape[0] <= kernel.max_tokens:
        return None
    if get_forward_context().cudagraph_runtime_mode == CUDAGraphMode.PIECEWISE:  # captured once for every kind of batch
        return None
    metadata, _, kv_cache, slot_mapping = get_attention_context(layer_name)
    if metadata is None or slot_mapping is None:  # a profiling run
        return None
    if metadata.max_query_len != 1 or getattr(metadata, "use_cascade", False) or getattr(metadata, "causal", True) is not True:
        return None
    if getattr(metadata, "rswa_window", None) is not None:  # reference sliding windows, which not every token sees through
        return None
    if min(metadata.seq_lens.shape[0], metadata.block_table.shape[0], slot_mapping.shape[0]) < qkv.shape[0]:
        return None
    if kv_cache.dim() != 4 or kv_cache.shape[3] != 2 * HEAD_DIM or kv_cache.stride(3) != 1 or kv_cache.shape[2] % 16:
        return None
    if kv_cache.dtype != qkv.dtype or not _addressable(qkv):
        return None
    if kv_cache.data_ptr() % 16 or any(stride % 8 for stride in kv_cache.stride()[:3]):  # its rows are read 16 bytes at a time
        return None
    if metadata.block_table.dtype != torch.int32 or metadata.seq_lens.dtype != torch.int32 or slot_mapping.dtype != torch.int64:
        return None
    if any(numbers.stride(-1) != 1 for numbers in (metadata.block_table, metadata.seq_lens, slot_mapping)):
        return None
    return kernel


def _check_decode_arguments(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor],
    cos_sin_cache: torch.Tensor,
    output: torch.Tensor,
    num_heads: int,
) -> None:
    """Raises ValueError if the kernel would read or write elsewhere: what the layer was built with cannot be declined any more."""
    tokens, dtype = qkv.shape[0], qkv.dtype
    head = (HEAD_DIM,)
    expected = {  # name: (tensor, dtype, shape, bytes that are read or written at a time)
        "positions": (positions, torch.int64, (tokens,), 8),
        "q_norm": (weights[0], dtype, head, 16),
        "k_norm": (weights[1], dtype, head, 16),
        "cos_sin_cache": (cos_sin_cache, dtype, (cos_sin_cache.shape[0], HEAD_DIM), 16),
        "output": (output, dtype, (tokens, num_heads * HEAD_DIM), 4),
    }
    wrong = [
        f"{name} {tensor.dtype} {list(tensor.shape)}"
        for name, (tensor, its_dtype, shape, at_once) in expected.items()
        if tensor.dtype != its_dtype or tensor.shape != shape or not tensor.is_contiguous() or tensor.data_ptr() % at_once
    ]
    if wrong:
        raise ValueError(f"decode_attention of {qkv.dtype} {list(qkv.shape)} cannot take {', '.join(wrong)}")


@triton.jit
def _qk_norm_rope_kernel(
    qkv_ptr,
    positions_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_sin_ptr,
    q_ptr,
    k_ptr,
    qkv_stride,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One token and ROWS of its q and k heads: each head over its rms, times γ, rotated by halves."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    low = tl.arange(0, HALF)[None, :]
    inside = heads < HEADS + KV_HEADS
    offsets = heads * 2 * HALF + low
    x1 = tl.load(qkv_ptr + token * qkv_stride + offsets, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(qkv_ptr + token * qkv_stride + offsets + HALF, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt((tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1)) / (2 * HALF) + eps)[:, None]
    is_q = heads < HEADS
    w1 = tl.where(is_q, tl.load(q_weight_ptr + low), tl.load(k_weight_ptr + low)).to(tl.float32)
    w2 = tl.where(is_q, tl.load(q_weight_ptr + low + HALF), tl.load(k_weight_ptr + low + HALF)).to(tl.float32)
    x1 = x1 * scale * w1
    x2 = x2 * scale * w2
    position = tl.load(positions_ptr + token)
    cos = tl.load(cos_sin_ptr + position * 2 * HALF + low).to(tl.float32)
    sin = tl.load(cos_sin_ptr + position * 2 * HALF + HALF + low).to(tl.float32)
    out1 = (x1 * cos - x2 * sin).to(q_ptr.dtype.element_ty)
    out2 = (x2 * cos + x1 * sin).to(q_ptr.dtype.element_ty)
    q = q_ptr + token * HEADS * 2 * HALF + offsets
    k = k_ptr + (token * KV_HEADS - HEADS) * 2 * HALF + offsets
    tl.store(q, out1, mask=is_q)
    tl.store(q + HALF, out2, mask=is_q)
    tl.store(k, out1, mask=inside & (heads >= HEADS))
    tl.store(k + HALF, out2, mask=inside & (heads >= HEADS))


def qk_norm_rope_triton(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    eps: float,
    num_heads: int,
    num_kv_heads: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """qkv [num_tokens, (heads + 2 kv_heads)·head_dim] → q [num_tokens, heads·head_dim] and k [num_tokens, kv_heads·head_dim].

    One kernel, where Inductor makes two of the stock layer's.
    """
    head_dim = q_weight.shape[0]
    q, k = _empty_qk(qkv, head_dim, num_heads, num_kv_heads)
    rows = 8  # heads of a program
    if qkv.shape[0]:
        _qk_norm_rope_kernel[(qkv.shape[0], triton.cdiv(num_heads + num_kv_heads, rows))](
            qkv,
            positions,
            q_weight,
            k_weight,
            cos_sin_cache,
            q,
            k,
            qkv.stride(0),
            eps,
            num_heads,
            num_kv_heads,
            head_dim // 2,
            rows,
            num_warps=2,  # 8 elements a thread of each half: 16-byte loads
        )
    return q, k


def _empty_qk(qkv: torch.Tensor, head_dim: int, num_heads: int, num_kv_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    return qkv.new_empty((qkv.shape[0], num_heads * head_dim)), qkv.new_empty((qkv.shape[0], num_kv_heads * head_dim))


def qk_norm_rope_native(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    eps: float,
    num_heads: int,
    num_kv_heads: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with PyTorch's own operators, for the CPU and for Inductor.

    Rounds where vLLM's native norm and rotary embedding round. One tensor for q and k, rotated in fp32, cost Inductor two more passes
    over both: prefill of 8B took 4 % longer (H200).
    """
    head_dim = q_weight.shape[0]
    cos, sin = cos_sin_cache.index_select(0, positions).unsqueeze(1).chunk(2, dim=-1)  # [tokens, 1, head_dim / 2]

    def rotated(heads: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        by_head = heads.unflatten(-1, (-1, head_dim))
        low, high = rms_norm_native(by_head, None, weight, eps)[0].chunk(2, dim=-1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1).flatten(1)

    q, k, _ = qkv.split([num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim], dim=-1)
    return rotated(q, q_weight), rotated(k, k_weight)


def _qk_norm_rope(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    eps: float,
    num_heads: int,
    num_kv_heads: int,
    layer_name: LayerNameType,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [num_tokens, heads·head_dim] and k [num_tokens, kv_heads·head_dim], normalised per head and rotated.

    Where decode_attention will run its kernel, that does this: the result is then not computed and not read.
    """
    if _decode_kernel(qkv, num_heads, num_kv_heads, _resolve_layer_name(layer_name)) is not None:
        return _empty_qk(qkv, q_weight.shape[0], num_heads, num_kv_heads)
    if {q_weight.dtype, k_weight.dtype, cos_sin_cache.dtype} != {qkv.dtype} or len(positions) != len(qkv):
        raise ValueError(
            f"qk_norm_rope of {qkv.dtype} [{len(qkv)}, …] cannot take weights {q_weight.dtype} and {k_weight.dtype}, "
            f"angles {cos_sin_cache.dtype} and {len(positions)} positions"
        )
    body = qk_norm_rope_triton if qkv.is_cuda and HAS_TRITON else qk_norm_rope_native
    return body(qkv, positions, q_weight, k_weight, cos_sin_cache, eps, num_heads, num_kv_heads)


def _qk_norm_rope_fake(qkv, positions, q_weight, k_weight, cos_sin_cache, eps, num_heads, num_kv_heads, layer_name):
    return _empty_qk(qkv, q_weight.shape[0], num_heads, num_kv_heads)


def _write_cache(qkv: torch.Tensor, k: torch.Tensor, num_heads: int, num_kv_heads: int, layer_name: LayerNameType) -> torch.Tensor:
    """Writes the keys k and the values of qkv into the KV cache, unless decode_attention's kernel will.

    Returns an empty tensor: an argument of decode_attention, so that the order is kept.
    """
    if _decode_kernel(qkv, num_heads, num_kv_heads, _resolve_layer_name(layer_name)) is None:
        unified_kv_cache_update(*_key_and_value(qkv, k, num_heads, num_kv_heads), layer_name)
    return qkv.new_empty(0)


def _write_cache_fake(qkv, k, num_heads, num_kv_heads, layer_name):
    return qkv.new_empty(0)


def _key_and_value(qkv: torch.Tensor, k: torch.Tensor, num_heads: int, num_kv_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Both [num_tokens, kv_heads, head_dim]."""
    tokens, head_dim = qkv.shape[0], qkv.shape[1] // (num_heads + 2 * num_kv_heads)
    value = qkv[:, (num_heads + num_kv_heads) * head_dim :]
    return k.view(tokens, num_kv_heads, head_dim), value.view(tokens, num_kv_heads, head_dim)


def _decode_attention(
    qkv: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    written: torch.Tensor,
    positions: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    output: torch.Tensor,
    eps: float,
    num_heads: int,
    num_kv_heads: int,
    layer_name: LayerNameType,
) -> None:
    """Writes attention's output [num_tokens, heads·head_dim].  q, k, written: what the two ops before returned for the same step.

    The output is an argument, as in vLLM's own attention op: between two piecewise graphs its address must stay the same.
    """
    name = _resolve_layer_name(layer_name)
    if (kernel := _decode_kernel(qkv, num_heads, num_kv_heads, name)) is not None:
        _check_decode_arguments(qkv, positions, (q_weight, k_weight), cos_sin_cache, output, num_heads)
        calls["attention.kernel"] += 1
        metadata, layer, kv_cache, slot_mapping = get_attention_context(name)
        kernel(
            qkv,
            positions,
            q_weight,
            k_weight,
            cos_sin_cache,
            kv_cache,
            slot_mapping,
            metadata.block_table,
            metadata.seq_lens,
            eps,
            layer.impl.scale,
            output,
        )
        return
    calls["attention.torch"] += 1
    key, value = _key_and_value(qkv, k, num_heads, num_kv_heads)
    query = q.view(q.shape[0], num_heads, key.shape[2])
    unified_attention_with_output(query, key, value, output.view(query.shape), layer_name)


def _decode_attention_fake(
    qkv, q, k, written, positions, q_weight, k_weight, cos_sin_cache, output, eps, num_heads, num_kv_heads, layer_name
):
    return None


_library = Library("vllm_mirage", "FRAGMENT")  # the registrations live as long as this object
for _name, _body, _fake, _mutates in (
    ("norm_qkv", _norm_qkv, _norm_qkv_fake, ()),
    ("add_norm_qkv", _add_norm_qkv, _add_norm_qkv_fake, ()),
    ("norm_gate_up_silu", _norm_gate_up_silu, _norm_gate_up_silu_fake, ()),
    ("add_norm_gate_up_silu", _add_norm_gate_up_silu, _add_norm_gate_up_silu_fake, ()),
    ("linear", _linear, _linear_fake, ()),
    ("linear_residual", _linear_residual, _linear_residual_fake, ()),
    ("qk_norm_rope", _qk_norm_rope, _qk_norm_rope_fake, ()),
    ("write_cache", _write_cache, _write_cache_fake, ()),
    ("decode_attention", _decode_attention, _decode_attention_fake, ("output",)),
):
    _library.define(_name + infer_schema(_body, mutates_args=_mutates))
    # One body for CPU and CUDA, never decomposed by the tracer.
    _library.impl(_name, _body, "CompositeExplicitAutograd")
    _library._register_fake(_name, _fake)
