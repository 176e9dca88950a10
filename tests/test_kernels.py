# SPDX-License-Identifier: Apache-2.0
"""The generated kernels without a GPU: their own source runs on the CPU, equals its μGraph, and compiles for every architecture."""

import itertools
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "patches/vllm/model_executor/layers")]

from mirage_kernels import compiler, kernels, plans  # noqa: E402
from mirage_kernels.arguments import ARGUMENTS  # noqa: E402

from mirage_codegen import emulate, generate, lower, ops  # noqa: E402
from mirage_codegen.interpret import interpret  # noqa: E402
from mirage_codegen.layer import GEMMS, MODELS  # noqa: E402
from mirage_codegen.mugraph import MuGraph  # noqa: E402

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
EPS = 1e-6
needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("emulated")


def nvrtc():
    try:
        return compiler.nvrtc_version()
    except compiler.CompileError as error:
        return str(error)


def plan(tokens=8, grid=2, forloop=4, cluster=1, warps=4, stages=2, prefetch=0, schedule="split", **form):
    early = stages if schedule == "split" else 0
    return plans.Plan(tokens, schedule, grid, forloop, cluster, warps, stages, early, prefetch, 1, **form)


def graph_for(op: str, k: int, n: int, chosen: plans.Plan) -> MuGraph:
    tokens = plans.round_up(chosen.max_num_tokens, plans.COLUMNS)
    grid = chosen.grid if n % chosen.grid == 0 else 1  # a graph's blocks are all of one size
    return ops.load_for(op, ops.Shape(tokens, k, n, grid, chosen.forloop_range, chosen.warps * 32))


def draw(graph: MuGraph, num_tokens: int, seed: int = 0):
    """Random arguments in bf16, activations with num_tokens rows, by the graph's names."""
    random = np.random.default_rng(seed)
    arguments = {}
    for name in graph.arguments:
        tensors = graph.inputs_in(name)
        rows, columns = tensors[0].dims
        if tensors[0].strides[0] == 1 and rows > 1:  # a weight, [N, K] in memory
            arguments[name] = random.standard_normal((columns * len(tensors), rows)) * 0.05
        elif rows == 1:
            arguments[name] = 1 + 0.25 * random.standard_normal((1, columns))
        else:
            arguments[name] = random.standard_normal((num_tokens, columns)) * np.exp(random.standard_normal((num_tokens, 1)))
    return {name: emulate.to_bf16(value) for name, value in arguments.items()}


def expected(graph: MuGraph, arguments, num_tokens: int):
    """The graph's outputs in float64; rows beyond num_tokens are zero in the graph's input and left out of its output."""
    capacity = graph.outputs[0].dims[0]

    def full(name):
        values = emulate.from_bf16(arguments[name])
        if graph.inputs_in(name)[0].dims[0] == capacity and values.shape[0] == num_tokens:
            values = np.concatenate([values, np.zeros((capacity - num_tokens, values.shape[1]))])
        return values

    outputs = interpret(graph, {name: full(name) for name in graph.arguments}, {"eps": EPS})
    return {name: value[:num_tokens] for name, value in outputs.items()}


def run(kernel, graph, arguments, num_tokens, *, delayed, seed):
    """The kernel's outputs; fails if it writes beyond its rows."""
    outputs = {tensor.name: emulate.poisoned((num_tokens + 3, tensor.dims[1])) for tensor in graph.outputs}
    kernel({**arguments, **outputs, "num_tokens": num_tokens, "eps": EPS}, delayed=delayed, seed=seed)
    for name, bits in outputs.items():
        assert (bits[num_tokens:] == 0x7FFF).all(), f"{name} was written beyond row {num_tokens}"
    return {name: emulate.from_bf16(bits[:num_tokens]) for name, bits in outputs.items()}


def worst_error(outputs, reference):
    errors = [np.linalg.norm(outputs[name] - reference[name]) / np.linalg.norm(reference[name]) for name in reference]
    return float(np.max(errors))  # NaN wins


def to_tiles(rows):
    """[num_tokens, k] as a norm kernel leaves it for its GEMM, poisoned where there is no token."""
    padded = emulate.poisoned((plans.round_up(rows.shape[0], plans.COLUMNS), rows.shape[1]))
    padded[: rows.shape[0]] = rows
    return np.ascontiguousarray(padded.reshape(-1, plans.COLUMNS, rows.shape[1] // plans.STEP, plans.STEP).swapaxes(1, 2))


def from_tiles(tiles, num_tokens):
    """The reverse; fails if anything was written where there is no token."""
    k = tiles.size // plans.round_up(num_tokens, plans.COLUMNS)
    rows = tiles.reshape(-1, k // plans.STEP, plans.COLUMNS, plans.STEP).swapaxes(1, 2).reshape(-1, k)
    assert (rows[num_tokens:] == 0x7FFF).all()
    return rows[:num_tokens]


def row_macros(k, next_rows=0, warm=0):
    return plans.row_defines(k, next_rows, warm) | {"MIRAGE_THREADS": 64}


def run_row(kernel, graph, arguments, num_tokens, next_weights=None):
    """The same of a norm kernel, whose O is in tiles."""
    k = graph.outputs[0].dims[1]
    arguments = {**arguments, "next_weights": emulate.poisoned((1, k)) if next_weights is None else next_weights}
    outputs = {tensor.name: emulate.poisoned((plans.round_up(num_tokens, plans.COLUMNS), k)) for tensor in graph.outputs}
    kernel({**arguments, **outputs, "num_tokens": num_tokens, "eps": EPS}, delayed=True, seed=1)
    if "S" in outputs:
        assert (outputs["S"][num_tokens:] == 0x7FFF).all()
    rows = {name: from_tiles(bits, num_tokens) if name == "O" else bits[:num_tokens] for name, bits in outputs.items()}
    return {name: emulate.from_bf16(bits) for name, bits in rows.items()}


BF16 = 4e-3  # one rounding of the operand and one of the output, each at most 2^-9 and uniform: 2.4e-3 in the norm


@needs_gxx
@pytest.mark.parametrize("delayed", [False, True])
@pytest.mark.parametrize(
    "op, k, n, num_tokens, chosen",
    [
        ("rms_norm_linear", 512, 64, 1, plan()),
        ("rms_norm_linear", 512, 64, 8, plan(forloop=2)),  # two steps side by side
        ("rms_norm_linear", 512, 96, 13, plan(tokens=16, grid=3, cluster=2)),
        ("rms_norm_linear", 1024, 64, 23, plan(tokens=24, grid=1, forloop=8, cluster=4, stages=1)),
        ("rms_norm_linear_first", 512, 64, 5, plan(stages=4)),
        ("linear", 512, 64, 3, plan(schedule="split", prefetch=2)),
        ("linear", 1024, 96, 32, plan(tokens=32, grid=2, forloop=8, cluster=2, stages=3)),
        ("linear_residual", 512, 64, 7, plan(cluster=2)),
        ("linear_residual", 512, 96, 13, plan(tokens=16, grid=3)),
        ("linear_residual", 1024, 192, 29, plan(tokens=32, grid=2, forloop=8, cluster=2)),  # a thread finishes several pairs
        ("rms_norm_gate_up_silu", 512, 64, 11, plan(tokens=16, cluster=2)),
        ("rms_norm_gate_up_silu_first", 512, 64, 11, plan(tokens=16, cluster=2, schedule="fused")),
        ("gate_up_silu", 512, 96, 5, plan(grid=3, warps=8, forloop=2)),
        # clusters of other sizes than whole tiles of 16 rows, some with a pair less than others
        ("rms_norm_linear", 512, 40, 3, plan(grid=5)),
        ("rms_norm_linear", 512, 50, 9, plan(tokens=16, grid=3, forloop=2, schedule="fused", pipelined=True, lines=True)),
        ("linear", 512, 46, 8, plan(grid=2, stages=3)),
        ("linear", 1024, 48, 11, plan(tokens=16, grid=2, forloop=8, cluster=2)),
        ("linear_residual", 512, 76, 5, plan(grid=3, prefetch=2, stages=1)),
        ("rms_norm_gate_up_silu", 512, 38, 6, plan(grid=2, pipelined=True)),
        ("gate_up_silu", 512, 50, 3, plan(grid=4)),
    ],
    ids=lambda value: value if isinstance(value, (str, int)) else f"{value.grid}x{value.cluster}",
)
def test_kernel_equals_its_graph(folder, op, k, n, num_tokens, chosen, delayed):
    graph = graph_for(op, k, n, chosen)
    kernel = emulate.EmulatedKernel(lower.lower(graph), chosen.defines(k, n), folder)
    arguments = draw(graph, num_tokens)
    reference = expected(graph, arguments, num_tokens)
    results = [run(kernel, graph, arguments, num_tokens, delayed=delayed, seed=seed) for seed in (1, 2)]
    assert worst_error(results[0], reference) < BF16
    for name in reference:  # the order in which warps run must not show
        assert (results[0][name] == results[1][name]).all()


def pipelined(**shape):
    return plan(schedule="fused", pipelined=True, **shape)


@needs_gxx
@pytest.mark.parametrize("delayed", [False, True])
@pytest.mark.parametrize(
    "op, k, n, num_tokens, chosen",
    [
        ("rms_norm_linear", 128, 64, 3, pipelined(forloop=1)),  # one step
        ("rms_norm_linear", 256, 64, 8, pipelined(forloop=2, stages=1)),  # two
        ("rms_norm_linear", 256, 64, 1, pipelined(forloop=1)),  # two that are both in flight
        ("rms_norm_linear", 640, 64, 7, pipelined(forloop=5, stages=2)),  # steps that no whole number of rounds holds
        ("rms_norm_linear", 1280, 64, 5, pipelined(forloop=5, stages=4)),  # the same of ten in pairs
        ("rms_norm_linear", 768, 64, 5, replace(pipelined(forloop=6), early=1)),  # some weights asked for early
        ("rms_norm_linear", 768, 64, 6, replace(pipelined(forloop=6), early=2)),  # all
        ("rms_norm_linear", 1024, 96, 13, pipelined(tokens=16, grid=3, cluster=2, forloop=8, stages=1)),
        ("rms_norm_linear", 1024, 64, 23, pipelined(tokens=24, grid=1, cluster=4, forloop=8, stages=4)),
        ("rms_norm_linear_first", 768, 64, 9, pipelined(tokens=16, cluster=2, forloop=6, stages=1)),
        ("rms_norm_gate_up_silu", 896, 64, 3, pipelined(forloop=7, stages=4)),
        ("rms_norm_gate_up_silu_first", 640, 96, 11, pipelined(tokens=16, grid=3, forloop=5, stages=2)),
        ("linear", 768, 64, 19, plan(tokens=24, forloop=6, stages=3, pipelined=True)),
        ("linear_residual", 1024, 64, 5, plan(forloop=8, cluster=2, pipelined=True)),
        ("gate_up_silu", 768, 64, 3, plan(forloop=6, stages=1, pipelined=True)),
    ],
    ids=lambda value: value if isinstance(value, (str, int)) else f"{value.grid}x{value.cluster}-{value.stages}",
)
def test_a_pipelined_kernel_equals_the_plain_one(folder, op, k, n, num_tokens, chosen, delayed):
    graph = graph_for(op, k, n, chosen)
    forms = [replace(chosen, pipelined=form) for form in (True, False)]
    assert [form.defines(k, n)["MIRAGE_PIPELINED"] for form in forms] == [1, 0]
    kernel = lower.lower(graph)
    kernels = [emulate.EmulatedKernel(kernel, form.defines(k, n), folder) for form in forms]
    arguments = draw(graph, num_tokens)
    reference = expected(graph, arguments, num_tokens)
    results = [run(kernel, graph, arguments, num_tokens, delayed=delayed, seed=seed) for seed, kernel in enumerate(kernels)]
    assert worst_error(results[0], reference) < BF16
    for name in reference:  # the same sums in the same order
        assert (results[0][name] == results[1][name]).all()


@needs_gxx
@pytest.mark.parametrize("delayed", [False, True])
@pytest.mark.parametrize(
    "op, k, n, num_tokens, chosen",
    [
        ("rms_norm_linear", 512, 64, 7, plan(forloop=2, schedule="fused")),
        ("rms_norm_linear", 1024, 64, 13, plan(tokens=16, forloop=2, stages=4, schedule="fused")),  # two lines a warp in an iteration
        ("rms_norm_linear", 1536, 64, 23, plan(tokens=24, forloop=6, cluster=2, schedule="fused")),
        ("rms_norm_linear", 2048, 64, 1, replace(plan(forloop=8, cluster=4, schedule="fused"), early=1)),
        ("rms_norm_linear_first", 1024, 64, 5, plan(forloop=4, schedule="fused")),
        ("rms_norm_gate_up_silu", 512, 64, 11, plan(tokens=16, forloop=2, schedule="fused")),
        ("linear", 1024, 96, 32, plan(tokens=32, grid=3, forloop=4, cluster=2)),
        ("linear_residual", 1024, 64, 3, plan(forloop=4)),
        ("rms_norm_linear", 256, 64, 7, pipelined(forloop=1)),  # one line
        ("rms_norm_linear", 1280, 64, 6, pipelined(forloop=5)),
        ("rms_norm_linear", 2048, 96, 13, replace(pipelined(tokens=16, grid=3, cluster=2, forloop=8, stages=4), early=3)),
        ("rms_norm_gate_up_silu_first", 1536, 64, 9, pipelined(tokens=16, forloop=6, stages=4)),  # no whole number of rounds
    ],
    ids=lambda value: value if isinstance(value, (str, int)) else f"{value.grid}x{value.cluster}-{value.stages}",
)
def test_a_kernel_that_reads_whole_lines_equals_its_graph(folder, op, k, n, num_tokens, chosen, delayed):
    graph = graph_for(op, k, n, chosen)
    kernel = lower.lower(graph)
    arguments = draw(graph, num_tokens)
    reference = expected(graph, arguments, num_tokens)
    forms = [emulate.EmulatedKernel(kernel, replace(chosen, lines=lines).defines(k, n), folder) for lines in (True, False)]
    results = [run(form, graph, arguments, num_tokens, delayed=delayed, seed=seed) for seed, form in enumerate(forms)]
    assert worst_error(results[0], reference) < BF16
    for name in {"S", *(("O",) if "norm" not in op else ())} & reference.keys():  # sums over rows are added in another order
        assert (results[0][name] == results[1][name]).all()


def gemv(grid=2, warps=1, slices=1, stages=2, tokens=1, schedule="fused", early=0, buffered=0):
    return plans.Plan(tokens, schedule, grid, slices, 1, warps, stages, early, 0, 1, gemv=True, buffered=buffered)


@needs_gxx
@pytest.mark.parametrize("delayed", [False, True])
@pytest.mark.parametrize(
    "op, k, n, chosen",
    [
        ("rms_norm_linear", 512, 64, gemv(warps=2)),  # 32 rows of a block, summed in two parts
        ("rms_norm_linear", 256, 30, gemv(grid=3, stages=4, early=4)),  # 10 rows
        ("rms_norm_linear", 1536, 50, gemv(grid=7, warps=2, slices=3, stages=3, early=2)),  # 25 pairs of rows over 7 blocks
        ("rms_norm_linear", 512, 38, gemv(grid=4, warps=2, tokens=3)),
        ("rms_norm_linear_first", 768, 24, gemv(grid=5, warps=3, stages=1)),
        ("rms_norm_gate_up_silu", 512, 44, gemv(grid=3, warps=2, stages=5)),
        ("rms_norm_gate_up_silu_first", 512, 48, gemv(grid=3, slices=2, tokens=2)),
        ("linear", 1024, 64, gemv(grid=9, warps=4, schedule="split", early=2)),
        ("linear", 512, 6, gemv(grid=3, warps=2, stages=9)),  # fewer rows than stages
        ("linear_residual", 512, 50, gemv(grid=6, warps=2, schedule="split", tokens=2)),
        ("linear_residual", 256, 150, gemv(grid=1, tokens=1)),  # a thread finishes several pairs
        ("rms_norm_linear", 512, 64, gemv(warps=2, tokens=2, buffered=3)),
        ("rms_norm_linear", 1536, 50, gemv(grid=7, warps=2, slices=3, stages=3, buffered=2)),
        ("rms_norm_gate_up_silu", 512, 44, gemv(grid=3, warps=2, stages=5, early=5, buffered=4)),
        ("linear", 512, 6, gemv(grid=3, warps=2, stages=1, early=1, schedule="split", buffered=9)),  # more than there are
    ],
    ids=lambda value: value if isinstance(value, (str, int)) else f"{value.grid}-{value.warps}-{value.stages}",
)
def test_a_gemv_equals_its_graph(folder, op, k, n, chosen, delayed):
    graph = graph_for(op, k, n, chosen)
    kernel = emulate.EmulatedKernel(lower.lower(graph), chosen.defines(k, n), folder)
    for num_tokens in range(1, chosen.max_num_tokens + 1):
        arguments = draw(graph, num_tokens)
        reference = expected(graph, arguments, num_tokens)
        results = [run(kernel, graph, arguments, num_tokens, delayed=delayed, seed=seed) for seed in (1, 2)]
        assert worst_error(results[0], reference) < BF16
        for name in reference:
            assert (results[0][name] == results[1][name]).all()


@needs_gxx
@pytest.mark.parametrize(
    ("op", "chosen"),
    [
        ("linear", plan(forloop=8, prefetch=2, stages=1)),
        ("linear", plan(forloop=8, cluster=2, prefetch=3, stages=1)),
        ("linear", plan(forloop=4, prefetch=3, stages=2)),  # two steps an iteration, 1,536 bytes of a row
        ("gate_up_silu", plan(forloop=8, prefetch=9, stages=3)),  # more than there are
    ],
)
def test_a_gemm_asks_ahead_for_the_iterations_behind_its_first_loads_once(folder, op, chosen):
    k, n, num_tokens = 1024, 64, 3
    graph = graph_for(op, k, n, chosen)
    kernel = emulate.EmulatedKernel(lower.lower(graph), chosen.defines(k, n), folder)
    arguments = draw(graph, num_tokens)
    run(kernel, graph, arguments, num_tokens, delayed=True, seed=1)
    (weights,) = (value for name, value in arguments.items() if name.startswith("W"))
    asked = (np.array(kernel.prefetched()) - weights.ctypes.data) // 64
    assert len(set(asked.tolist())) == len(asked)
    row, iteration = k * 2 // 64, k * 2 // 64 // chosen.forloop_range  # in requests of 64 bytes
    early = -(-chosen.early * chosen.warps // iteration) * iteration
    place = np.arange(weights.size * 2 // 64) % (row // chosen.cluster)
    wanted = (place >= early) & (place < early + chosen.prefetch * iteration)
    assert sorted(asked.tolist()) == np.flatnonzero(wanted).tolist()


@needs_gxx
@pytest.mark.parametrize("op", ["rms_norm", "rms_norm_first"])
@pytest.mark.parametrize("k", [256, 768])  # 768: a row that is no multiple of the threads' vectors
def test_row_kernel_equals_its_graph(folder, op, k):
    graph = ops.load_for(op, ops.Shape(8, k, k, 8, 1))
    arguments = draw(graph, 5)
    results = []
    for macros in (row_macros(k), row_macros(k, next_rows=150, warm=128)):
        kernel = emulate.EmulatedKernel(lower.lower(graph), macros, folder)
        results.append(run_row(kernel, graph, arguments, 5))
        assert worst_error(results[-1], expected(graph, arguments, 5)) < BF16
    assert all((results[0][name] == results[1][name]).all() for name in results[0])


@needs_gxx
@pytest.mark.parametrize(("warm", "next_rows"), [(0, 150), (64, 150), (512, 150), (64, 5000)])  # 5000: more than there are threads
def test_a_row_kernel_warms_the_start_of_every_row_of_the_next_weights_once(folder, warm, next_rows):
    k = 256
    graph = ops.load_for("rms_norm", ops.Shape(8, k, k, 8, 1))
    kernel = emulate.EmulatedKernel(lower.lower(graph), row_macros(k, next_rows, warm), folder)
    weights = emulate.poisoned((next_rows, k))
    run_row(kernel, graph, draw(graph, 3), 3, next_weights=weights)
    assert sorted(kernel.prefetched()) == [weights.ctypes.data + row * k * 2 + at for row in range(next_rows) for at in range(0, warm, 64)]


@needs_gxx
@pytest.mark.parametrize("op", ["linear", "gate_up_silu"])
@pytest.mark.parametrize("chosen", [plan(tokens=24, cluster=2), plan(tokens=24, forloop=2, stages=1)], ids=["cluster", "two steps"])
def test_a_gemm_reads_the_tiles_that_a_norm_leaves(folder, op, chosen):
    k, n, num_tokens = 512, 64, 19
    graph = graph_for(op, k, n, chosen)
    kernel = emulate.EmulatedKernel(lower.lower(graph), {**chosen.defines(k, n), "MIRAGE_TILED": 1}, folder)
    arguments = draw(graph, num_tokens)
    results = run(kernel, graph, {**arguments, "X": to_tiles(arguments["X"])}, num_tokens, delayed=True, seed=1)
    assert worst_error(results, expected(graph, arguments, num_tokens)) < BF16


@needs_gxx
@pytest.mark.parametrize(
    ("chosen", "num_tokens"),
    [(plan(tokens=16), 9), (plan(tokens=16, forloop=2, lines=True), 9), (gemv(tokens=2, warps=2), 2)],
    ids=["halves", "lines", "gemv"],
)
def test_nan_stays_in_its_row(folder, chosen, num_tokens):
    graph = graph_for("rms_norm_linear", 512, 64, chosen)
    kernel = emulate.EmulatedKernel(lower.lower(graph), chosen.defines(512, 64), folder)
    arguments = draw(graph, num_tokens)
    arguments["X"][num_tokens // 2, 17] = 0x7FFF
    outputs = run(kernel, graph, arguments, num_tokens, delayed=True, seed=1)
    rows = np.isnan(outputs["O"]).any(axis=1)
    assert np.isnan(outputs["O"][num_tokens // 2]).all() and rows.sum() == 1
    assert np.isnan(outputs["S"]).sum() == 1


@needs_gxx
def test_nan_of_the_residual_stays_in_its_place(folder):
    chosen = plan(tokens=16)
    graph = graph_for("linear_residual", 512, 64, chosen)
    kernel = emulate.EmulatedKernel(lower.lower(graph), chosen.defines(512, 64), folder)
    arguments = draw(graph, 9)
    for row, column in ((0, 3), (8, 62)):  # what a thread finishes first, and later
        arguments["R"][row, column] = 0x7FFF
    outputs = run(kernel, graph, arguments, 9, delayed=True, seed=1)
    assert np.argwhere(np.isnan(outputs["O"])).tolist() == [[0, 3], [8, 62]]


@needs_gxx
@pytest.mark.parametrize("dtype", ["fp16"])
def test_float16_runs_through_the_split_schedule(folder, dtype):
    k, n, chosen = 512, 64, plan()
    norm_graph, graph = ops.load_for("rms_norm", ops.Shape(8, k, k, 8, 1)), graph_for("linear", k, n, chosen)
    norm = emulate.EmulatedKernel(lower.lower(norm_graph), {**row_macros(k), "MIRAGE_FP16": 1}, folder)
    gemm = emulate.EmulatedKernel(lower.lower(graph), {**chosen.defines(k, n), "MIRAGE_FP16": 1, "MIRAGE_TILED": 1}, folder)
    random = np.random.default_rng(3)
    x, r = (emulate.to_fp16(1e3 * random.standard_normal((3, k))) for _ in range(2))  # products of these leave fp16's range
    g, w = emulate.to_fp16(1 + 0.2 * random.standard_normal((1, k))), emulate.to_fp16(0.05 * random.standard_normal((n, k)))
    normed, stream, out = emulate.poisoned((8, k)), emulate.poisoned((3, k)), emulate.poisoned((3, n))
    norm({"X": x, "R": r, "G": g, "O": normed, "S": stream, "next_weights": w, "num_tokens": 3, "eps": EPS}, delayed=True, seed=1)
    gemm({"X": normed, "W": w, "O": out, "num_tokens": 3}, delayed=True, seed=1)
    total = emulate.from_fp16(x) + emulate.from_fp16(r)
    reference = total / np.sqrt((total**2).mean(1, keepdims=True) + EPS) * emulate.from_fp16(g) @ emulate.from_fp16(w).T
    assert np.linalg.norm(emulate.from_fp16(out) - reference) / np.linalg.norm(reference) < 6e-4


def _without(text: str, statement: str, occurrence: int) -> str:
    at = [match.start() for match in re.finditer(re.escape(statement), text)][occurrence]
    return text[:at] + text[at + len(statement) :]


@needs_gxx
@pytest.mark.parametrize(
    "statement, chosen",
    [
        ("block_barrier();\n  constexpr int PAIRS", plan()),
        ("block_barrier();\n  constexpr int PAIRS", gemv(warps=2)),
        ("cluster_barrier<S>();\n  }\n  for", plan(cluster=2)),
    ],
    ids=["partial sums of the warps", "partial sums of a GEMV's warps", "partial sums of the cluster"],
)
@pytest.mark.parametrize("op", ["rms_norm_linear", "linear_residual"])
def test_a_barrier_removed_from_the_gemm_is_caught(folder, op, statement, chosen):
    graph = graph_for(op, 512, 64, chosen)
    runtime = emulate.RUNTIME.read_text()
    barrier = statement.split("\n")[0]
    assert runtime.count(statement) == 1
    broken = runtime.replace(statement, statement[len(barrier) :])
    kernel = emulate.EmulatedKernel(lower.lower(graph), chosen.defines(512, 64), folder, runtime=broken)
    num_tokens = chosen.max_num_tokens
    arguments = draw(graph, num_tokens)
    reference = expected(graph, arguments, num_tokens)
    errors = [worst_error(run(kernel, graph, arguments, num_tokens, delayed=True, seed=seed), reference) for seed in range(3)]
    assert not max(errors) < BF16


@needs_gxx
def test_a_gemv_that_does_not_wait_for_its_copies_is_caught(folder):
    chosen = gemv(warps=2, buffered=2)
    graph = graph_for("rms_norm_linear", 512, 64, chosen)
    statement, runtime = "step == S::STAGES) wait_for_copies();", emulate.RUNTIME.read_text()
    assert runtime.count(statement) == 1
    broken = runtime.replace(statement, "step == S::STAGES) {}")
    kernel = emulate.EmulatedKernel(lower.lower(graph), chosen.defines(512, 64), folder, runtime=broken)
    arguments = draw(graph, 1)
    assert not worst_error(run(kernel, graph, arguments, 1, delayed=False, seed=1), expected(graph, arguments, 1)) < BF16


@needs_gxx
def test_a_barrier_removed_from_the_row_kernel_is_caught(folder):
    graph = ops.load_for("rms_norm", ops.Shape(8, 256, 256, 8, 1))
    broken = _without(emulate.RUNTIME.read_text(), "  block_barrier();\n  sum = 0.0f;", 0)
    kernel = emulate.EmulatedKernel(lower.lower(graph), row_macros(256), folder, runtime=broken)
    arguments = draw(graph, 4)
    assert not worst_error(run_row(kernel, graph, arguments, 4), expected(graph, arguments, 4)) < BF16


def test_shipped_sources_are_what_the_graphs_give():
    assert generate.stale_files() == []


def test_the_body_depends_on_the_operators_alone():
    chosen = plan(tokens=24, grid=4, forloop=8)
    for op in generate.SHIPPED[:2]:
        assert lower.lower(graph_for(op, 1024, 256, chosen)).source == lower.lower(ops.load(op)).source


def table_plans():
    """(op, K, N, plan) for every plan of a GEMM in the shipped table."""
    for measured in plans.read_table(plans.TABLE).values():
        for ops_of, op in itertools.product((measured, measured["alone"]), plans.GEMM_OPS):
            for shape, entries in ops_of.get(op, {}).items():
                k, n = map(int, shape.split("x"))
                yield from ((op, k, n, plans.Plan(**entry)) for entry in entries)


def gemm_of(op, chosen):
    """The source that holds the GEMM of an op."""
    return plans.GEMM_OPS[op].sources[chosen.schedule][0][-1]


def test_every_plan_is_a_tiling_of_its_graph():
    seen = set()
    for op, k, n, chosen in table_plans():
        graph = graph_for(gemm_of(op, chosen), k, n, chosen)
        macros, tiling = chosen.defines(k, n), lower.defines(graph)
        if n % chosen.grid:  # a graph's blocks are all of one size, a kernel's may differ by a pair of rows
            assert 0 < chosen.grid < n // 2 and chosen.cluster == 1
            del tiling["MIRAGE_GRID"]
        if chosen.gemv:  # it is compiled for no more tokens than it takes
            assert tiling.pop("MIRAGE_TOKENS") == plans.COLUMNS >= chosen.tokens
        assert {name: macros[name] for name in tiling} == tiling
        seen.add(op)
    assert seen == set(plans.GEMM_OPS)


def local_bytes(cubin):
    """Local memory of a thread, registers that did not fit or arrays with an index of run time, in bytes: EIATTR_FRAME_SIZE of .nv.info."""
    (at,) = (match.end() for match in re.finditer(rb"\x04\x11\x08\x00", cubin))
    return int.from_bytes(cubin[at + 4 : at + 8], "little")


def test_a_gemv_keeps_its_rows_in_registers():
    """Once a loop was no longer unrolled, the ring lay in local memory and a layer of 14B took 299 µs, by plans that fitted 163 (H200)."""
    large = [(op, k, n, chosen) for op, k, n, chosen in table_plans() if chosen.gemv and "norm" in op and k >= 4096]
    assert len(large) >= 8
    for op, k, n, chosen in large:
        build = compiler.Build(f"{gemm_of(op, chosen)}.cu", tuple(sorted(chosen.defines(k, n).items())), "sm_90")
        assert local_bytes(compiler.compile_cubin(build)) == 0, chosen


@pytest.mark.parametrize("model", ["0.6B", "8B"])
def test_plan_limits_rise_and_the_shapes_of_qwen3_are_there(model):
    table, shape = plans.read_table(plans.TABLE)["sm_90"], MODELS[model]
    keys = [(kind, f"{k}x{n}") for kind, k, n in map(shape.gemm, GEMMS)] + [("decode_attention", f"{shape.heads}x{shape.kv_heads}")]
    for op, key in keys:
        limits = [entry["max_num_tokens"] for entry in table[op][key]]
        assert limits == sorted(set(limits)) and limits[-1] >= 16, (op, key)


@pytest.mark.parametrize("op", plans.GEMM_OPS)
def test_heuristic_gives_plans_for_shapes_that_nobody_measured(op):
    for k, n in ((3072, 5120), (1536, 2304), (8192, 10240), (896, 1152)):
        for limit in (8, 16):
            chosen = plans.heuristic(op, k, n, limit)
            assert chosen is not None and chosen.max_num_tokens == limit
            graph_for(gemm_of(op, chosen), k, n, chosen)  # GraphError if it does not tile


def test_the_heuristic_avoids_small_pieces_of_rows():
    k, n = 5120, 25600  # 32B's gate_up: in pairs of steps with one in flight it was slower than stock
    pairs, steps = (plans.Plan(8, "split", 264, loop, 1, 4, 1, 1, 0, 2) for loop in (20, 40))
    assert {pairs, steps} <= set(plans.candidates("rms_norm_gate_up_silu", k, n, 8, "split"))
    assert plans.distance("rms_norm_gate_up_silu", pairs, k, n) > plans.distance("rms_norm_gate_up_silu", steps, k, n)
    assert plans.heuristic("rms_norm_gate_up_silu", k, n, 8) == steps


def test_a_projection_adds_the_residual_only_where_that_was_measured(monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    sentence = "nobody measured that linear_residual is faster for {} on sm_{}"
    assert plans.plans_for("linear_residual", 2048, 1024, "sm_90") == plans.plans_for("linear", 2048, 1024, "sm_90")  # 0.6B gains
    for k, n, arch in ((2048, 1024, 80), (4096, 4096, 90), (4096, 1024, 90)):
        assert plans.plans_for("linear_residual", k, n, f"sm_{arch}") == sentence.format(f"{k}x{n}", arch)
    entries = plans.read_table(plans.TABLE)["sm_90"]["linear"]["2048x1024"]
    plans.user_table().parent.mkdir(parents=True)
    plans.user_table().write_text(json.dumps({"sm_90": {"linear_residual": {"2048x1024": entries, "3072x1024": []}}}))
    assert plans.plans_for("linear_residual", 2048, 1024, "sm_90") == plans.plans_for("linear", 2048, 1024, "sm_90")
    for shape in ((3072, 1024), (4096, 1024)):
        assert "nobody measured" in plans.plans_for("linear_residual", *shape, "sm_90")


def test_behind_a_stock_op_the_plans_for_that_run_where_somebody_measured_them(monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    shape, unmeasured = (4096, 6144, "sm_90"), (5120, 7168, "sm_90")
    between = plans.plans_for("rms_norm_linear", *shape)
    behind = plans.plans_for("rms_norm_linear", *shape, alone=True)
    assert not isinstance(between, str) and not isinstance(behind, str)
    assert behind != between and any(plan.warm for plan in behind) and not any(plan.warm for plan in between)
    assert plans.plans_for("rms_norm_linear", *unmeasured, alone=True) == plans.plans_for("rms_norm_linear", *unmeasured)
    plans.user_table().parent.mkdir(parents=True)
    plans.user_table().write_text(json.dumps({"sm_90": {"alone": {"rms_norm_linear": {"4096x6144": []}}}}))
    none = "no kernel was faster than the stock path for 4096x6144 on sm_90"
    assert plans.plans_for("rms_norm_linear", *shape, alone=True) == none
    assert plans.plans_for("rms_norm_linear", *shape) == between
    plans.user_table().write_text(json.dumps({"sm_90": {"rms_norm_linear": {"4096x6144": []}}}))  # what this GPU says wins
    assert plans.plans_for("rms_norm_linear", *shape, alone=True) == plans.plans_for("rms_norm_linear", *shape) == none


def test_a_table_leaves_out_what_is_as_in_most_plans():
    chosen = plan()
    form = {"warm": 512, "pipelined": True, "lines": True}
    [entry], [other] = plans.to_table([chosen]), plans.to_table([replace(chosen, **form)])
    assert not form.keys() & entry.keys() and other == {**entry, **form}
    assert plans.Plan(**entry) == chosen


def test_no_plan_divides_a_shape_of_odd_size():
    assert all(plans.heuristic(op, 1000, 96, 8) is None for op in plans.GEMM_OPS)
    assert plans.plans_for("linear", 1000, 96, "sm_90") == "no plan divides K 1000 and N 96"


def test_attention_has_measured_plans_or_the_heuristics(monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    found = plans.attention_plans_for(16, 8, "sm_90")
    assert not isinstance(found, str) and all(isinstance(entry, plans.AttentionPlan) for entry in found)
    assert [entry.max_num_tokens for entry in plans.attention_plans_for(20, 4, "sm_90")] == [1, 2, 4]
    unmeasured = plans.attention_plans_for(40, 8, "sm_90")
    assert [(entry.max_num_tokens, entry.cluster, entry.warps) for entry in unmeasured] == [
        (1, 8, 8), (2, 8, 8), (4, 4, 8), (8, 2, 8), (16, 1, 8), (32, 1, 4),
    ]  # fmt: skip
    for entries in (found, unmeasured):
        assert all(entry.max_context == (None if entry.max_num_tokens <= 16 else 4096) for entry in entries)
    assert "no plan is measured for sm_80" in plans.attention_plans_for(16, 8, "sm_80")


def test_attention_leaves_out_the_plans_that_lose_at_the_engines_contexts(monkeypatch):
    import mirage_kernels

    monkeypatch.setattr(mirage_kernels, "_prepare", lambda dtype, device, build: build("sm_90", device))
    monkeypatch.setattr(mirage_kernels, "DecodeAttention", lambda *shape: SimpleNamespace(name="attention", plans=shape[4]))
    entries = [plans.AttentionPlan(limit, 1, 4, longest) for limit, longest in ((8, None), (16, 8192), (32, 4096))]

    def prepare(max_context, entries=entries):
        place = {"dtype": torch.bfloat16, "device": torch.device("cuda", 0)}
        return mirage_kernels.prepare_attention(heads=16, kv_heads=8, **place, max_context=max_context, plans=entries)

    for max_context, limits in ((0, [8, 16, 32]), (4096, [8, 16, 32]), (4097, [8, 16]), (8193, [8])):
        kernel = prepare(max_context)
        assert [entry.max_num_tokens for entry in kernel.plans] == limits
        assert ("where max_model_len is at most" in kernel.name) == (len(limits) < 3)
    assert prepare(4097).name.endswith("(32 where max_model_len is at most 4096, here 4097)")
    assert prepare(9000, entries[1:]) == "the stock path is faster for requests of up to 9000 tokens"


def test_blocks_share_no_cluster_where_the_architecture_has_none():
    for op, k, n in (("linear", 4096, 768), ("rms_norm_linear", 4096, 768), ("rms_norm_gate_up_silu", 4096, 768)):
        assert max(plan.cluster for plan in plans.candidates(op, k, n, 8, "split")) > 1
        assert {plan.cluster for plan in plans.candidates(op, k, n, 8, "split", arch="sm_86")} == {1}
        assert plans.heuristic(op, k, n, 8, "sm_86").cluster == 1
    assert plans.attention_heuristic(8, 1, "sm_86").cluster == 1


def test_an_architecture_without_measurements_has_no_plan(monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    assert plans.plans_for("rms_norm_linear", 1024, 4096, "sm_80") == (
        "no plan is measured for sm_80; ./install.sh --tune measures them on this GPU"
    )


def test_a_damaged_plan_table_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    plans.user_table().parent.mkdir(parents=True)
    plans.user_table().write_text("{")
    with pytest.raises(ValueError, match=r"cannot be read .*; delete it"):
        plans.plans_for("rms_norm_linear", 1024, 4096, "sm_90")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_source_compiles_for(arch):
    if not re.fullmatch(r"\d+\.\d+", nvrtc()):
        pytest.fail(f"{nvrtc()}; the tests compile every kernel: pip install -r tests/requirements.txt")
    cluster = 1 if arch in ("sm_80", "sm_86", "sm_89") else 2
    gemm, attention = plan(grid=128, forloop=8, cluster=cluster, warps=8), plans.AttentionPlan(8, cluster, 4)
    rows = plans.row_defines(4096, 6144, 512)
    special = dict.fromkeys(("rms_norm", "rms_norm_first"), rows) | {"decode_attention": attention.defines(32, 8)}
    for name in (*generate.SHIPPED, *generate.HANDWRITTEN):
        macros = special.get(name, gemm.defines(4096, 6144))
        lines = {"MIRAGE_LINES": 1, "MIRAGE_FORLOOP": 4}
        for form in ({}, {"MIRAGE_FP16": 1}, lines | {"MIRAGE_PIPELINED": 1})[: 2 if name in special else 3]:
            assert compiler.compile_cubin(compiler.Build(f"{name}.cu", tuple(sorted({**macros, **form}.items())), arch))


@pytest.fixture
def calls():
    """Arguments by name of every launch of a kernel that `recording` made."""
    return []


@pytest.fixture
def recorder(calls):
    """recorder(name): in place of a loaded kernel; calls get its arguments by name."""
    return lambda name: lambda *values: calls.append({"kernel": name} | dict(zip(ARGUMENTS[name], values, strict=True)))


def bare(cls, loaded, limits):
    """A kernel object around `loaded`, without a GPU."""
    kernel = object.__new__(cls)
    kernel.n, kernel._limits, kernel._kernels = 6, limits, loaded
    return kernel


@pytest.mark.parametrize("schedule", ["fused", "split"])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("op", ["rms_norm_linear", "rms_norm_gate_up_silu"])
def test_a_norm_gemm_passes_its_tensors_in_the_order_of_the_kernels_arguments(op, residual, schedule, calls, recorder):
    variants = plans.GEMM_OPS[op].sources[schedule]
    kernel = bare(kernels.NormGemm, [[list(map(recorder, variant)) for variant in variants]], [8])
    x, r, g, w = torch.ones(3, 4), torch.ones(3, 4), torch.ones(4), torch.ones(6 * plans.GEMM_OPS[op].weights, 4)
    out, residual_out = kernel(x, r if residual else None, g, w, EPS)
    assert out.shape == (3, 6) and (residual_out is not None) == residual
    assert [call["kernel"] for call in calls] == list(variants[not residual])
    assert calls[0]["X"] == x.data_ptr() and calls[0]["G"] == g.data_ptr() and calls[0]["eps"] == EPS
    weight = "W" if op == "rms_norm_linear" else "W_gate_up"
    assert calls[-1][weight] == w.data_ptr() and calls[-1]["O"] == out.data_ptr()
    assert all(call["num_tokens"] == 3 for call in calls)
    if residual:
        assert calls[0]["R"] == r.data_ptr() and calls[0]["S"] == residual_out.data_ptr()
    if schedule == "split":
        assert calls[1]["X"] == calls[0]["O"] != out.data_ptr()
        assert calls[0]["next_weights"] == w.data_ptr()


def test_a_linear_passes_its_tensors_in_the_order_of_the_kernels_arguments(calls, recorder):
    x, w = torch.ones(3, 4), torch.ones(6, 4)
    out = bare(kernels.Linear, [[[recorder("linear")]]], [8])(x, w)
    assert out.shape == (3, 6)
    assert calls == [{"kernel": "linear", "O": out.data_ptr(), "X": x.data_ptr(), "W": w.data_ptr(), "num_tokens": 3}]


def test_a_linear_with_residual_passes_its_tensors_in_the_order_of_the_kernels_arguments(calls, recorder):
    x, w, r = torch.ones(3, 4), torch.ones(6, 4), torch.ones(3, 6)
    out = bare(kernels.LinearResidual, [[[recorder("linear_residual")]]], [8])(x, w, r)
    assert out.shape == (3, 6)
    given = {"O": out, "X": x, "W": w, "R": r}
    assert calls == [{"kernel": "linear_residual", "num_tokens": 3} | {name: tensor.data_ptr() for name, tensor in given.items()}]


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_attention_passes_its_tensors_in_the_order_of_the_kernels_arguments(layout, calls, recorder):
    memory = torch.zeros(5, 16, 2, 256) if layout == "NHD" else torch.zeros(5, 2, 16, 256)
    cache = memory.transpose(1, 2) if layout == "NHD" else memory  # [pages, kv_heads, page_size, 256]
    given = {"QKV": torch.zeros(3, 8 * 128), "positions": torch.zeros(3, dtype=torch.int64), "G_q": torch.ones(128), "G_k": torch.ones(128)}
    given |= {"cos_sin": torch.zeros(9, 128), "cache": cache, "slots": torch.zeros(3, dtype=torch.int64)}
    given |= {"block_table": torch.zeros(3, 7, dtype=torch.int32), "seq_lens": torch.ones(3, dtype=torch.int32)}
    output = torch.zeros(3, 4 * 128)
    bare(kernels.DecodeAttention, [None, recorder("decode_attention")], [1, 8])(*given.values(), EPS, 0.5, output)
    head_stride, token_stride = (256, 512) if layout == "NHD" else (16 * 256, 256)
    assert calls == [
        {name: tensor.data_ptr() for name, tensor in {**given, "O": output}.items()}
        | {"page_stride": 16 * 2 * 256, "head_stride": head_stride, "token_stride": token_stride, "page_size": 16, "table_stride": 7}
        | {"kernel": "decode_attention", "num_tokens": 3, "eps": EPS, "scale": 0.5}
    ]


def test_the_plan_with_the_next_limit_runs():
    kernel = bare(kernels.Linear, [[["up to 1"]], [["up to 8"]]], [1, 8])
    assert [kernel.kernels_for(num_tokens) for num_tokens in (1, 2, 8)] == [["up to 1"], ["up to 8"], ["up to 8"]]


def test_the_cache_compiles_once_and_trusts_no_damaged_entry(tmp_path, monkeypatch):
    compiled = []

    def fake(build):
        compiled.append(build)
        return b"cubin of " + build.source.encode()

    monkeypatch.setattr(compiler, "compile_cubin", fake)
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: "13.0")
    cache = compiler.CubinCache(tmp_path / "cache")
    builds = [compiler.Build("linear.cu", (("MIRAGE_K", 1024),), "sm_90"), compiler.Build("rms_norm.cu", (), "sm_90")]
    said: list[int] = []
    first = cache.get(builds, said.append)
    assert first == cache.get(builds, said.append) and said == [2] and len(compiled) == 2
    entries = sorted((tmp_path / "cache").glob("*.cubin"))
    whole = entries[0].read_bytes()
    for damage in (whole[:-1], whole[:20], b"", whole[:-1] + bytes([whole[-1] ^ 1]), b"x" + whole):
        entries[0].write_bytes(damage)
        assert cache.get(builds) == first
        assert entries[0].read_bytes() == whole
    entries[0].chmod(0o666)  # another user could have written it
    count = len(compiled)
    assert cache.get(builds) == first and len(compiled) == count + 1
    target = tmp_path / "elsewhere"
    target.write_bytes(whole)
    entries[0].unlink()
    entries[0].symlink_to(target)
    assert cache.get(builds) == first and len(compiled) == count + 2 and not entries[0].is_symlink()


def test_the_cache_key_holds_everything_that_decides_a_cubin():
    base = compiler.Build("linear.cu", (("MIRAGE_K", 1024),), "sm_90")
    others = [
        compiler.Build("rms_norm.cu", base.defines, base.arch),
        compiler.Build(base.source, (("MIRAGE_K", 2048),), base.arch),
        compiler.Build(base.source, base.defines, "sm_80"),
    ]
    assert len({build.key("13.0") for build in (base, *others)} | {base.key("12.8")}) == 5
