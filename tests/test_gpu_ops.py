# SPDX-License-Identifier: Apache-2.0
"""The ops' PyTorch path on a GPU: the Triton norm against float64, CUDA graphs, and what a call launches."""

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
    ours, ours_residual = ops._rms_norm_triton(x, residual, gamma, EPS)
    theirs, theirs_residual = ops._rms_norm_native(x, residual, gamma, EPS)
    assert torch.equal(ours_residual, theirs_residual)
    # The same roundings; only the order of the sum differs, which can move a value across a rounding boundary.
    assert worst(ours, exact) <= 1.05 * worst(theirs, exact) + torch.finfo(dtype).tiny


@pytest.mark.parametrize("hidden", HIDDENS)
def test_a_nan_row_stays_in_its_row(ops, hidden):
    x, residual, gamma, _ = inputs(5, hidden, torch.bfloat16)
    x[2, hidden // 2] = float("nan")
    out, _ = ops._rms_norm_triton(x, residual, gamma, EPS)
    assert out[2].isnan().all() and not out[[0, 1, 3, 4]].isnan().any()


@pytest.mark.parametrize("hidden", [1024, 5120])
def test_strided_inputs_give_the_same_rows(ops, hidden):
    x, residual, gamma, _ = inputs(8, hidden, torch.bfloat16)
    out, total = ops._rms_norm_triton(x[::2], residual[::2], gamma, EPS)
    expected, expected_total = ops._rms_norm_triton(x[::2].clone(), residual[::2].clone(), gamma, EPS)
    assert torch.equal(out, expected) and torch.equal(total, expected_total)


@pytest.mark.parametrize("rows", [1, 64])
def test_ops_pass_opcheck(ops, rows):
    x, residual, gamma, weight = inputs(rows, 1024, torch.bfloat16)
    torch.library.opcheck(torch.ops.vllm_mirage.norm_qkv, (x, gamma, weight, EPS))
    torch.library.opcheck(torch.ops.vllm_mirage.add_norm_qkv, (x, residual, gamma, weight, EPS))


@pytest.mark.parametrize("rows", [1, 16, 64])
@pytest.mark.parametrize("hidden", [1024, 4096])
def test_a_captured_graph_follows_its_inputs(ops, rows, hidden):
    """Work launched on another stream would be missing from the graph, and the replay would keep the old result."""
    x, residual, gamma, weight = inputs(rows, hidden, torch.bfloat16)
    add_norm_qkv = torch.ops.vllm_mirage.add_norm_qkv
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # warm up off the default stream, as vLLM does
        captured_from = add_norm_qkv(x, residual, gamma, weight, EPS)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        qkv, total = add_norm_qkv(x, residual, gamma, weight, EPS)
    x.copy_(torch.randn_like(x))
    residual.copy_(torch.randn_like(residual))
    graph.replay()
    torch.cuda.synchronize()
    expected = F.linear(norm_in_float64(x, residual, gamma), weight.double())
    assert not torch.equal(total, captured_from[1])
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(qkv.double(), expected, rtol=0.02, atol=0.02)


def test_the_fallback_launches_one_norm_kernel_and_the_gemm(ops):
    """The cost promised: no copy, no separate add."""
    x, residual, gamma, weight = inputs(64, 1024, torch.bfloat16, qkv=4096)
    add_norm_qkv = torch.ops.vllm_mirage.add_norm_qkv
    add_norm_qkv(x, residual, gamma, weight, EPS)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        add_norm_qkv(x, residual, gamma, weight, EPS)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    norms = [name for name in kernels if "rms_norm" in name]
    splits = [name for name in kernels if "splitK" in name or "reduce" in name]  # part of some of cuBLAS's GEMMs
    assert len(norms) == 1 and len(kernels) - len(splits) <= 2, kernels
