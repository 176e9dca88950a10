# SPDX-License-Identifier: Apache-2.0
"""The ops on inputs that nobody would think of: each answers like its float64 reference or raises, whatever it is given.

A new op is one more entry of OPS.
"""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from test_gpu_ops import heads_in_float64
from test_ops import EPS, HEAD_DIM, NAME, StubAttention, StubKernel
from torch._subclasses.fake_tensor import FakeTensorMode

Tensors = tuple[torch.Tensor, ...]


# ------------------------------------------------------------------------------------------------------------- ops
class Op(NamedTuple):
    """One op: shapes are the sizes of each tensor argument by name, "lead" standing for any number of dimensions."""

    shapes: tuple[str, ...]
    reference: Callable[..., Tensors]  # of float64 tensors and the last argument
    last: tuple[float | str, ...] = (1e-6, 1e-5, 1e-2)  # values of the last argument: eps


def rms_norm(x: torch.Tensor, gamma: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * gamma


def norm_qkv(x: torch.Tensor, gamma: torch.Tensor, weight: torch.Tensor, eps: float) -> Tensors:
    return (rms_norm(x, gamma, eps) @ weight.T,)


def add_norm_qkv(x: torch.Tensor, residual: torch.Tensor, gamma: torch.Tensor, weight: torch.Tensor, eps: float) -> Tensors:
    return rms_norm(x + residual, gamma, eps) @ weight.T, x + residual


def add_norm_gate_up_silu(x: torch.Tensor, residual: torch.Tensor, gamma: torch.Tensor, weight: torch.Tensor, eps: float) -> Tensors:
    gate_up, total = add_norm_qkv(x, residual, gamma, weight, eps)
    half = gate_up.shape[-1] // 2
    return F.silu(gate_up[..., :half]) * gate_up[..., half:], total


def norm_gate_up_silu(x: torch.Tensor, gamma: torch.Tensor, weight: torch.Tensor, eps: float) -> Tensors:
    return add_norm_gate_up_silu(x, torch.zeros_like(x), gamma, weight, eps)[:1]


def linear(x: torch.Tensor, weight: torch.Tensor, name: str) -> Tensors:
    return (x @ weight.T,)


def linear_residual(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, name: str) -> Tensors:
    return (x @ weight.T + residual,)


OPS = {
    "norm_qkv": Op(("lead k", "k", "n k"), norm_qkv),
    "add_norm_qkv": Op(("lead k", "lead k", "k", "n k"), add_norm_qkv),
    "add_norm_gate_up_silu": Op(("lead k", "lead k", "k", "2n k"), add_norm_gate_up_silu),
    "norm_gate_up_silu": Op(("lead k", "k", "2n k"), norm_gate_up_silu),
    "linear": Op(("lead k", "n k"), linear, ("o_proj", "down_proj")),
    "linear_residual": Op(("lead k", "n k", "lead n"), linear_residual, ("o_proj", "down_proj")),
}

# ---------------------------------------------------------------------------------------------------------- inputs
DTYPES = {torch.float32: 1e-4, torch.float16: 0.03, torch.bfloat16: 0.2}  # and how far one output may be off, of numbers near 1
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {  # the same numbers, elsewhere in memory
    "contiguous": lambda t: t.clone(),
    "transposed": lambda t: t.mT.clone(memory_format=torch.contiguous_format).mT if t.dim() > 1 else t.clone(),
    "every second": lambda t: t.repeat_interleave(2, dim=-1)[..., ::2],
    "unaligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    "one row": lambda t: t[..., :1, :].clone().expand(t.shape) if t.dim() > 1 and t.numel() else t.clone(),  # stride 0
}


class Call(NamedTuple):
    tensors: list[torch.Tensor]
    last: float | str


@st.composite
def calls(draw: st.DrawFn, op: Op) -> Call:
    """Arguments that belong together."""
    lead = tuple(draw(st.lists(st.integers(0, 5), min_size=1, max_size=3)))
    sizes = {"k": draw(st.integers(0, 70)), "n": (n := draw(st.integers(0, 40))), "2n": 2 * n}
    dtype = draw(st.sampled_from(list(DTYPES)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.0, 1e-3, 1.0, 30.0]))

    def tensor(names: list[str]) -> torch.Tensor:
        shape = sum((lead if name == "lead" else (sizes[name],) for name in names), ())
        values = torch.randn(shape, generator=generator)
        # activations of any size; norm weights near 1 and projections with gain 1 keep the outputs near 1
        values = values * scale if "lead" in names else 1 + 0.25 * values if len(shape) == 1 else values * max(sizes["k"], 1) ** -0.5
        return LAYOUTS[draw(st.sampled_from(list(LAYOUTS)))](values.to(dtype))

    return Call([tensor(names.split()) for names in op.shapes], draw(st.sampled_from(op.last)))


@st.composite
def spoiled_calls(draw: st.DrawFn, op: Op) -> Call:
    """Arguments of which one does not fit the others: another size, dtype or number of dimensions."""
    call = draw(calls(op))
    tensors = list(call.tensors)
    index = draw(st.integers(0, len(tensors) - 1))
    tensor, spoil = tensors[index], draw(st.sampled_from(["size", "dtype", "more", "fewer"]))
    if spoil == "size":
        dim = draw(st.integers(0, tensor.dim() - 1))
        size = draw(st.integers(0, 7))
        shape = [*tensor.shape[:dim], size, *tensor.shape[dim + 1 :]]
        tensors[index] = torch.ones(shape, dtype=tensor.dtype)
    elif spoil == "dtype":
        tensors[index] = tensor.to(draw(st.sampled_from([torch.float64, torch.float32, torch.float16, torch.int32, torch.bool])))
    elif spoil == "more":
        tensors[index] = tensor.unsqueeze(0)
    else:
        tensors[index] = tensor.flatten()[:1].squeeze() if tensor.dim() == 1 else tensor.flatten(0, 1)
    return Call(tensors, call.last)


# ----------------------------------------------------------------------------------------------------------- tests
def answer(name: str, call: Call) -> Tensors:
    """The op's outputs, always as a tuple."""
    outputs = getattr(torch.ops.vllm_mirage, name)(*call.tensors, call.last)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def assert_near(outputs: Tensors, exact: Tensors, tolerance: float) -> None:
    """Within `tolerance` of numbers near 1, and of larger ones in proportion to the largest."""
    assert len(outputs) == len(exact)
    for output, expected in zip(outputs, exact, strict=True):
        size = expected.abs().nan_to_num(0, 0, 0).max().item() if expected.numel() else 0.0
        torch.testing.assert_close(
            output.double(), expected.to(output.dtype).double(), rtol=0, atol=tolerance * max(1.0, size), equal_nan=True
        )


@pytest.mark.parametrize("name", OPS)
def test_every_layout_gives_the_references_answer(ops, name):
    op = OPS[name]

    @settings(max_examples=300, deadline=None, derandomize=True, database=None)
    @given(calls(op))
    def check(call):
        before = [tensor.clone() for tensor in call.tensors]
        outputs = answer(name, call)
        dtype = call.tensors[0].dtype
        assert all(output.dtype == dtype for output in outputs)
        assert_near(outputs, op.reference(*(tensor.double() for tensor in call.tensors), call.last), DTYPES[dtype])
        assert all(map(torch.equal, call.tensors, before))

    check()


@pytest.mark.parametrize("name", OPS)
def test_the_fake_tells_shape_dtype_and_layout(ops, name):
    """Inductor plans memory by the fake: an output with other strides would be read wrong."""

    @settings(max_examples=60, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
    @given(calls(OPS[name]))
    def check(call):
        outputs = answer(name, call)
        with FakeTensorMode() as mode:
            fakes = answer(name, Call([mode.from_tensor(tensor) for tensor in call.tensors], call.last))
        for output, fake in zip(outputs, fakes, strict=True):
            assert (output.shape, output.dtype) == (fake.shape, fake.dtype)
            assert output.is_contiguous() == fake.is_contiguous()  # strides of empty or single-row tensors are free

    check()


@pytest.mark.parametrize("name", OPS)
def test_arguments_that_do_not_fit_raise_or_give_the_references_answer(ops, name):
    op = OPS[name]
    seen = {"raised": 0, "answered": 0}

    @settings(max_examples=300, deadline=None, derandomize=True, database=None)
    @given(spoiled_calls(op))
    def check(call):
        try:
            outputs = answer(name, call)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            assert str(error)
            seen["raised"] += 1
            return
        exact = op.reference(*(tensor.double() for tensor in call.tensors), call.last)  # raises if the op should have
        tolerance = max(DTYPES.get(tensor.dtype, 0.0) for tensor in (*call.tensors, *outputs))
        assert_near(outputs, exact, tolerance or math.inf)
        seen["answered"] += 1

    check()
    assert min(seen.values()) > 10, seen


# ------------------------------------------------------------------------------------------------------- attention
@st.composite
def decode_steps(draw: st.DrawFn) -> SimpleNamespace:
    """A decode step; each of its tensors may have another dtype, layout, size or alignment than the kernel reads."""
    tokens, kv_heads = draw(st.integers(0, StubKernel.max_tokens + 1)), draw(st.sampled_from([1, 2]))
    heads, dtype = kv_heads * draw(st.sampled_from([1, 2])), draw(st.sampled_from([torch.bfloat16, torch.float16]))
    odd = draw(st.sets(st.sampled_from(["positions", "weight", "angles", "cache", "table", "lens", "slots", "qkv", "output"]), max_size=2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def layout(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name not in odd:
            return tensor
        change = draw(st.sampled_from(["unaligned", "every second", "dtype", "shorter"]))
        if change == "dtype":
            return tensor.to(draw(st.sampled_from([torch.float32, torch.int32, torch.int64])))
        return tensor[: max(0, len(tensor) - 1)] if change == "shorter" else LAYOUTS[change](tensor)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    page = draw(st.sampled_from([16, 32, 24]))
    layer = StubAttention()
    layer.kv_cache = layout("cache", random(4, page, kv_heads, 2 * HEAD_DIM).transpose(1, 2))
    return SimpleNamespace(
        heads=heads, kv_heads=kv_heads, tokens=tokens, dtype=dtype, odd=odd,
        mode=draw(st.sampled_from(["NONE", "FULL", "PIECEWISE"])),
        layer=layer, kernel=StubKernel(),
        qkv=layout("qkv", random(tokens, (heads + 2 * kv_heads) * HEAD_DIM)),
        positions=layout("positions", torch.randint(32, (tokens,), generator=generator)),
        weights=(layout("weight", 1 + 0.2 * random(HEAD_DIM)), 1 + 0.2 * random(HEAD_DIM)),
        angles=layout("angles", random(32, HEAD_DIM)),
        output=layout("output", torch.zeros(tokens, heads * HEAD_DIM, dtype=dtype)),
        slots=layout("slots", torch.arange(tokens)),
        metadata=SimpleNamespace(
            max_query_len=draw(st.sampled_from([1, 1, 2])), use_cascade=False, causal=True,
            seq_lens=layout("lens", torch.full((tokens,), 20, dtype=torch.int32)),
            block_table=layout("table", torch.zeros(tokens, 2, dtype=torch.int32)),
        ),
    )  # fmt: skip


def assert_readable(step: SimpleNamespace, given: tuple) -> None:
    """What the kernel was given is what it reads and writes by address: see DecodeAttention.__call__."""
    qkv, positions, q_weight, k_weight, angles, cache, slots, table, lens, *_, output = given
    tokens, width = qkv.shape
    assert 0 < tokens <= StubKernel.max_tokens and width == (step.heads + 2 * step.kv_heads) * HEAD_DIM
    for tensor, shape in ((q_weight, (HEAD_DIM,)), (k_weight, (HEAD_DIM,)), (angles, (len(angles), HEAD_DIM)), (qkv, qkv.shape)):
        assert tensor.dtype == step.dtype and tensor.shape == shape and tensor.is_contiguous() and tensor.data_ptr() % 16 == 0
    assert output.dtype == step.dtype and output.shape == (tokens, step.heads * HEAD_DIM) and output.is_contiguous()
    assert positions.dtype == slots.dtype == torch.int64 and table.dtype == lens.dtype == torch.int32
    assert positions.shape == (tokens,) and min(map(len, (slots, table, lens))) >= tokens
    assert all(numbers.stride(-1) == 1 for numbers in (positions, slots, table, lens))
    assert cache.dtype == step.dtype and cache.shape[3] == 2 * HEAD_DIM and cache.shape[2] % 16 == 0
    assert cache.stride(3) == 1 and cache.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in cache.stride()[:3])


def test_attention_is_launched_on_what_it_can_read_or_answers_like_stock_or_raises(ops, monkeypatch):
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import override_forward_context

    monkeypatch.setattr(ops.mirage_ops, "kernels", {})
    mirage = torch.ops.vllm_mirage
    seen = {"launched": 0, "stock": 0, "raised": 0}

    @settings(max_examples=600, deadline=None, derandomize=True, database=None)
    @given(decode_steps())
    def check(step):
        place = ("decode_attention", step.heads, step.kv_heads, step.dtype, torch.device("cpu"))
        ops.mirage_ops.kernels[place] = step.kernel
        context = SimpleNamespace(
            no_compile_layers={NAME: step.layer}, attn_metadata={NAME: step.metadata}, slot_mapping={NAME: step.slots},
            cudagraph_runtime_mode=CUDAGraphMode[step.mode], virtual_engine=0,
        )  # fmt: skip
        heads = (step.heads, step.kv_heads, NAME)
        rope = (step.positions, *step.weights, step.angles)
        try:
            with override_forward_context(context):
                q, k = mirage.qk_norm_rope(step.qkv, *rope, EPS, *heads)
                written = mirage.write_cache(step.qkv, k, *heads)
                mirage.decode_attention(step.qkv, q, k, written, *rope, step.output, EPS, *heads)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            assert str(error) and not step.kernel.given
            seen["raised"] += 1
            return
        launched, updates, queries = step.kernel.given, step.layer.updates, step.layer.queries
        assert len(launched) + len(queries) == 1 and len(updates) == len(queries)  # the cache is written once
        if launched:
            seen["launched"] += 1
            assert_readable(step, launched[0])
            return
        seen["stock"] += 1
        query, key, value, *_ = queries[0]
        exact = heads_in_float64(step.qkv, step.positions, step.weights, step.angles, step.heads, step.kv_heads)
        assert_near((torch.cat([query.flatten(1), key.flatten(1)], 1),), (exact,), DTYPES[step.dtype])
        assert torch.equal(value.flatten(1), step.qkv[:, (step.heads + step.kv_heads) * HEAD_DIM :])

    check()
    assert min(seen.values()) > 40, seen
