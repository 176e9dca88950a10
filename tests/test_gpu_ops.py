# SPDX-License-Identifier: Apache-2.0
"""The ops' PyTorch path on a GPU: the Triton kernels against float64, CUDA graphs, and what a call launches."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

EPS = 1e-6
HIDDENS = [1000, 1024, 2048, 2560, 4096, 5120]  # 1000: a row that is no multiple of a 16-byte load
ROWS = [0, 1, 3, 64, 2048]


def inputs(rows, hidden, dtype, qkv=384):
    generator = torch.Generator("cuda").manual_seed(rows + hidden)
    x, residual = (torch.randn(2, rows, hidden, generator=generator, device="cuda") * 3).to(dtype)
    gamma = (1 + 0.25 * torch.randn(hidden, generator=generator, device="cuda")).to(dtype)
    weight = (torch.randn(qkv, hidden, generator=generator, device="cuda") * hidden**-0.5).to(dtype)
    return x, residual, gamma, weight


def norm_in_float64(x, residual, gamma):
    total = x.double() if residual is None else x.double() + residual.double()
    return total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + EPS) * gamma.double()


def worst(value, exact):
    return (value.double() - exact).abs().max().item() if exact.numel() else 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden", HIDDENS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("with_residual", [False, True])
def test_the_triton_norm_errs_no_more_than_pytorchs(ops, rows, hidden, dtype, with_residual):
    x, residual, gamma, _ = inputs(rows, hidden, dtype)
    residual = residual if with_residual else None
    exact = norm_in_float64(x, residual, gamma)
    ours, ours_residual = ops.mirage_ops.rms_norm_triton(x, residual, gamma, EPS)
    theirs, theirs_residual = ops.mirage_ops.rms_norm_native(x, residual, gamma, EPS)
    assert torch.equal(ours_residual, theirs_residual)
    # The same roundings; only the order of the sum differs, which can move a value across a rounding boundary.
    assert worst(ours, exact) <= 1.05 * worst(theirs, exact) + torch.finfo(dtype).tiny


@pytest.mark.parametrize("hidden", HIDDENS)
def test_a_nan_row_stays_in_its_row(ops, hidden):
    x, residual, gamma, _ = inputs(5, hidden, torch.bfloat16)
    x[2, hidden // 2] = float("nan")
    out, _ = ops.mirage_ops.rms_norm_triton(x, residual, gamma, EPS)
    assert out[2].isnan().all() and not out[[0, 1, 3, 4]].isnan().any()


@pytest.mark.parametrize("hidden", [1024, 5120])
def test_strided_inputs_give_the_same_rows(ops, hidden):
    x, residual, gamma, _ = inputs(8, hidden, torch.bfloat16)
    out, total = ops.mirage_ops.rms_norm_triton(x[::2], residual[::2], gamma, EPS)
    expected, expected_total = ops.mirage_ops.rms_norm_triton(x[::2].clone(), residual[::2].clone(), gamma, EPS)
    assert torch.equal(out, expected) and torch.equal(total, expected_total)


HEADS = [(16, 8), (32, 8), (40, 8), (64, 8), (2, 1)]  # Qwen3 0.6B to 32B, and a narrow shard


def heads_in_float64(qkv, positions, weights, angles, heads, kv_heads):
    x = qkv.double().unflatten(1, (heads + 2 * kv_heads, 128))[:, : heads + kv_heads]
    gamma = torch.cat([weight.double().expand(count, -1) for weight, count in zip(weights, (heads, kv_heads), strict=True)])
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * gamma
    cos, sin = angles[positions].double().unsqueeze(1).chunk(2, -1)
    low, high = normed.chunk(2, -1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1).flatten(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("rows", ROWS)
def test_the_triton_rope_errs_no_more_than_pytorchs(ops, rows, heads, kv_heads, dtype):
    generator = torch.Generator("cuda").manual_seed(rows + heads)
    wide = torch.randn(rows, (heads + 2 * kv_heads) * 128 + 64, generator=generator, device="cuda").mul(3).to(dtype)
    weights = [(1 + 0.25 * torch.randn(128, generator=generator, device="cuda")).to(dtype) for _ in range(2)]
    angle = torch.arange(4096, device="cuda")[:, None] * 1e6 ** (-torch.arange(64, device="cuda") / 64)
    angles = torch.cat([angle.cos(), angle.sin()], -1).to(dtype)
    positions = torch.randint(4096, (rows,), generator=generator, device="cuda")
    for qkv in (wide[:, :-64].contiguous(), wide[:, :-64]):  # rows may lie apart
        ours = ops.mirage_ops.qk_norm_rope_triton(qkv, positions, *weights, angles, EPS, heads, kv_heads)
        theirs = ops.mirage_ops.qk_norm_rope_native(qkv.contiguous(), positions, *weights, angles, EPS, heads, kv_heads)
        assert [(*part.shape,) for part in ours] == [(rows, heads * 128), (rows, kv_heads * 128)]
        ours, theirs = torch.cat(ours, 1), torch.cat(theirs, 1)
        exact = heads_in_float64(qkv.contiguous(), positions, weights, angles, heads, kv_heads)
        assert (ours.double() - exact).norm() <= 1.05 * (theirs.double() - exact).norm()
        assert (theirs.double() - exact).norm() <= 0.01 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("half", [1000, 3072, 12288])  # 1000: less than a block, and no multiple of a 16-byte load
@pytest.mark.parametrize("rows", ROWS)
def test_the_triton_silu_errs_no_more_than_pytorchs(ops, rows, half, dtype):
    generator = torch.Generator("cuda").manual_seed(rows + half)
    gate_up = torch.randn(rows, 2 * half, generator=generator, device="cuda").mul(3).to(dtype)
    gate_up[:, :2] = torch.tensor([-300.0, 300.0], device="cuda", dtype=dtype)  # exp() of these leaves fp32's range
    gate, up = gate_up.double().chunk(2, -1)
    exact = F.silu(gate) * up
    ours, theirs = ops.mirage_ops.silu_and_mul_triton(gate_up), ops.mirage_ops.silu_and_mul_native(gate_up)
    assert ours.shape == theirs.shape == (rows, half)
    assert (ours.double() - exact).norm() <= 1.05 * (theirs.double() - exact).norm()


GEMMS = {  # torch op → (kernel op, weights, the kernels that its PyTorch path launches)
    "norm_qkv": ("rms_norm_linear", 1, 2),
    "add_norm_qkv": ("rms_norm_linear", 1, 2),
    "add_norm_gate_up_silu": ("rms_norm_gate_up_silu", 2, 3),
    "norm_gate_up_silu": ("rms_norm_gate_up_silu", 2, 3),
    "linear": ("linear", 1, 1),
    "linear_residual": ("linear_residual", 1, 2),  # eager mode never uses it: compiled, its add is part of the next norm
}
each_gemm = pytest.mark.parametrize("name", GEMMS)


def as_wide(residual, weight):
    """residual [rows, k], repeated to [rows, n] of weight [n, k]."""
    n, k = weight.shape
    return residual.repeat(1, n // k + 1)[:, :n].contiguous()


def arguments(name, x, residual, gamma, weight):
    """What the op takes of those."""
    if name == "linear":
        return x, weight, "o_proj"
    if name == "linear_residual":
        return x, weight, as_wide(residual, weight), "o_proj"
    return x, *([residual] if name.startswith("add") else []), gamma, weight, EPS


def call(name, *given):
    """The op's outputs as a tuple."""
    outputs = getattr(torch.ops.vllm_mirage, name)(*arguments(name, *given))
    return outputs if isinstance(outputs, tuple | list) else (outputs,)


@pytest.mark.parametrize("rows", [1, 64])
@each_gemm
def test_ops_pass_opcheck(ops, name, rows):
    torch.library.opcheck(getattr(torch.ops.vllm_mirage, name), arguments(name, *inputs(rows, 1024, torch.bfloat16)))


@each_gemm
def test_ops_pass_opcheck_with_their_kernel(ops, monkeypatch, name):
    monkeypatch.setattr(ops.mirage_ops, "kernels", {})
    monkeypatch.setattr(ops.mirage_ops, "calls", dict.fromkeys(ops.mirage_ops.calls, 0))
    kind, weights, _ = GEMMS[name]
    given = inputs(4, 1024, torch.bfloat16, qkv=3072 * weights)
    place = {"dtype": torch.bfloat16, "device": given[0].device}
    kernel = ops.mirage_ops.prepare_gemm("linear" if name == "linear_residual" else kind, 1024, 3072, *place.values())
    if isinstance(kernel, str):
        pytest.skip(kernel)
    if name == "linear_residual":  # with linear's plans, since it has measured ones alone
        from vllm.model_executor.layers import mirage_kernels

        adding = mirage_kernels.prepare(kind, k=1024, n=3072, plans=kernel.plans, **place)
        ops.mirage_ops.kernels[(kind, 1024, 3072, *place.values())] = adding
    torch.library.opcheck(getattr(torch.ops.vllm_mirage, name), arguments(name, *given))
    counter = {"rms_norm_linear": "norm_qkv", "rms_norm_gate_up_silu": "norm_gate_up"}.get(kind, "o_proj")
    assert [body for body, count in ops.mirage_ops.calls.items() if count] == [f"{counter}.kernel"]


def output_in_float64(name, x, residual, gamma, weight):
    normed = x.double() if name.startswith("linear") else norm_in_float64(x, residual if name.startswith("add") else None, gamma)
    out = F.linear(normed, weight.double())
    if name == "linear_residual":
        return out + as_wide(residual, weight).double()
    if not name.endswith("gate_up_silu"):
        return out
    gate, up = out.chunk(2, -1)
    return F.silu(gate) * up


@pytest.mark.parametrize("rows", [1, 16, 64])
@pytest.mark.parametrize("hidden", [1024, 4096])
@each_gemm
def test_a_captured_graph_follows_its_inputs(ops, name, rows, hidden):
    """Work launched on another stream would be missing from the graph, and the replay would keep the old result."""
    given = inputs(rows, hidden, torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # warm up off the default stream, as vLLM does
        before = call(name, *given)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = call(name, *given)
    x, residual, *_ = given
    x.copy_(torch.randn_like(x))
    residual.copy_(torch.randn_like(residual))
    graph.replay()
    torch.cuda.synchronize()
    assert not any(map(torch.equal, captured, before))
    assert len(captured) == 1 or torch.equal(captured[1], x + residual)
    torch.testing.assert_close(captured[0].double(), output_in_float64(name, *given), rtol=0.02, atol=0.02)


@each_gemm
def test_the_fallback_launches_what_stock_launches_and_no_more(ops, monkeypatch, name):
    """Above the kernel's limit: one norm kernel where there is a norm, the GEMM, SiLU·mul or the add where there is one. No copy."""
    kind, weights, expected = GEMMS[name]
    given = inputs(64, 1024, torch.bfloat16, qkv=4096)
    kernel = SimpleNamespace(max_tokens=63)  # not callable: taking it would fail
    monkeypatch.setattr(ops.mirage_ops, "kernels", {(kind, 1024, 4096 // weights, torch.bfloat16, given[0].device): kernel})
    op, given = getattr(torch.ops.vllm_mirage, name), arguments(name, *given)
    op(*given)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        op(*given)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    splits = [name for name in kernels if "splitK" in name or "reduce" in name]  # part of some of cuBLAS's GEMMs
    assert sum("rms_norm" in name for name in kernels) == (not kind.startswith("linear")), kernels
    assert sum("silu" in name or "act_and_mul" in name for name in kernels) == (weights == 2), kernels
    assert len(kernels) - len(splits) <= expected, kernels
