# SPDX-License-Identifier: Apache-2.0
"""Graph = the op's definition: the float64 interpreter runs each graph, numpy the definition, and both agree.

The definitions below are written from vLLM's layers, not from the graphs. The mutations at the end show that a graph
with a mistake in it does not pass.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mirage_codegen import ops
from mirage_codegen.interpret import interpret
from mirage_codegen.mugraph import (
    ACCUM_MEAN,
    ACCUM_SUM,
    Annotations,
    GraphError,
    MuGraph,
    RuntimeEps,
    View,
)
from mirage_codegen.ops import Shape

Arrays = dict[str, np.ndarray]


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """vLLM's RMSNorm: x / sqrt(mean(x²) + eps) · weight."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def silu(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # exp(-x) is infinite for very negative x: the quotient is then 0, as it should be
        return x / (1 + np.exp(-x))


def define_rms_norm_linear(a: Arrays, eps: float) -> Arrays:
    residual = a["X"] + a["R"]
    return {"O": rms_norm(residual, a["G"], eps) @ a["W"].T, "S": residual}


def define_rms_norm_linear_first(a: Arrays, eps: float) -> Arrays:
    return {"O": rms_norm(a["X"], a["G"], eps) @ a["W"].T}


def define_rms_norm(a: Arrays, eps: float) -> Arrays:
    residual = a["X"] + a["R"]
    return {"O": rms_norm(residual, a["G"], eps), "S": residual}


def define_rms_norm_first(a: Arrays, eps: float) -> Arrays:
    return {"O": rms_norm(a["X"], a["G"], eps)}


def define_rms_norm_gate_up_silu(a: Arrays, eps: float) -> Arrays:
    residual = a["X"] + a["R"]
    gate, up = np.split(rms_norm(residual, a["G"], eps) @ a["W_gate_up"].T, 2, axis=-1)
    return {"O": silu(gate) * up, "S": residual}


def define_rms_norm_gate_up_silu_first(a: Arrays, eps: float) -> Arrays:
    gate, up = np.split(rms_norm(a["X"], a["G"], eps) @ a["W_gate_up"].T, 2, axis=-1)
    return {"O": silu(gate) * up}


def define_gate_up_silu(a: Arrays, eps: float) -> Arrays:
    gate, up = np.split(a["X"] @ a["W_gate_up"].T, 2, axis=-1)
    return {"O": silu(gate) * up}


def define_linear_residual(a: Arrays, eps: float) -> Arrays:
    return {"O": a["X"] @ a["W"].T + a["R"]}


def define_linear(a: Arrays, eps: float) -> Arrays:
    return {"O": a["X"] @ a["W"].T}


DEFINITIONS: dict[str, Callable[[Arrays, float], Arrays]] = {
    "rms_norm_linear": define_rms_norm_linear,
    "rms_norm_linear_first": define_rms_norm_linear_first,
    "rms_norm": define_rms_norm,
    "rms_norm_first": define_rms_norm_first,
    "rms_norm_gate_up_silu": define_rms_norm_gate_up_silu,
    "rms_norm_gate_up_silu_first": define_rms_norm_gate_up_silu_first,
    "gate_up_silu": define_gate_up_silu,
    "linear_residual": define_linear_residual,
    "linear": define_linear,
}


def random_arguments(op: str, shape: Shape, seed: int, scale: float = 1.0) -> Arrays:
    """Arguments as vLLM holds them: weights [N, K] row-major, γ [K]. The scale is the activations'."""
    rng = np.random.default_rng(seed)
    m, k, n = shape.num_tokens, shape.k, shape.n
    residual = (m, n) if op == "linear_residual" else (m, k)
    arrays = {
        "X": rng.normal(size=(m, k)) * scale,
        "R": rng.normal(size=residual) * scale,
        "G": rng.normal(1.0, 0.3, size=k),
        "W": rng.normal(size=(n, k)) / np.sqrt(k),
        "W_gate_up": rng.normal(size=(2 * n, k)) / np.sqrt(k),
    }
    return {name: arrays[name] for name in ops.load(op).arguments}


def agrees(graph: MuGraph, op: str, shape: Shape, eps: float = 0.5, seed: int = 0, scale: float = 1.0) -> bool:
    """Do the graph and the definition give the same outputs?"""
    arguments = random_arguments(op, shape, seed, scale)
    found = interpret(graph, arguments, {"eps": eps})
    expected = DEFINITIONS[op](arguments, eps)
    assert found.keys() == expected.keys()
    return all(np.allclose(found[name], expected[name], rtol=1e-11, atol=1e-12 * scale) for name in expected)


ROW_OPS = ("rms_norm", "rms_norm_first")
"""A block for each group of rows, no matmul, and so no for-loop."""
GEMM_OPS = [op for op in ops.OPS if op not in ROW_OPS]


@st.composite
def shapes(draw: st.DrawFn, op: str) -> Shape:
    grid, forloop_range = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    if op in ROW_OPS:
        rows, k = grid * draw(st.integers(1, 3)), draw(st.integers(1, 30))
        return Shape(rows, k, k, grid=grid, forloop_range=1)
    k, n = forloop_range * draw(st.integers(1, 7)), grid * draw(st.integers(1, 7))
    return Shape(draw(st.integers(1, 9)), k, n, grid=grid, forloop_range=forloop_range)


@pytest.mark.parametrize("op", ops.OPS)
@settings(deadline=None, max_examples=60)
@given(
    data=st.data(),
    eps=st.sampled_from([0.0, 1e-6, 1e-5, 0.5]),
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([1e-4, 1.0, 1e3]),
)
def test_graph_equals_the_definition(op, data, eps, seed, scale):
    shape = data.draw(shapes(op))
    assert agrees(ops.load_for(op, shape), op, shape, eps, seed, scale)


def test_canonical_graph_equals_the_definition_at_full_size():
    """The stored graph itself, 4096→6144 with 128 blocks and 16 iterations."""
    assert agrees(ops.load("rms_norm_linear"), "rms_norm_linear", ops.CANONICAL["rms_norm_linear"], eps=1e-6)


def test_nan_stays_in_its_row():
    shape = Shape(3, 8, 6, grid=2, forloop_range=2)
    arguments = random_arguments("rms_norm_linear", shape, seed=1)
    clean = interpret(ops.load_for("rms_norm_linear", shape), arguments, {"eps": 1e-6})["O"]
    arguments["X"][1, 5] = np.nan
    poisoned = interpret(ops.load_for("rms_norm_linear", shape), arguments, {"eps": 1e-6})["O"]
    assert np.isnan(poisoned[1]).all()
    assert np.array_equal(poisoned[[0, 2]], clean[[0, 2]])


def test_grid_may_split_columns_in_two_dimensions():
    """Two grid dims over one tensor dim: x cuts first, y cuts what x left."""
    shape = Shape(2, 6, 12, grid=6, forloop_range=3)
    graph = ops.load_for("linear", shape)
    maps = {"w": (1, 1, -1), None: (1, 1, -1)}
    graph = _edit(graph, lambda op: dataclasses.replace(op, grid_map=maps.get(op.output, op.grid_map)), (2, 3, 1))
    assert agrees(graph, "linear", shape)


def test_missing_argument_and_scalar_are_named():
    shape = Shape(2, 4, 4, grid=2, forloop_range=2)
    graph = ops.load_for("rms_norm_linear_first", shape)
    arguments = random_arguments("rms_norm_linear_first", shape, seed=0)
    with pytest.raises(GraphError, match="needs the scalar eps"):
        interpret(graph, arguments)
    del arguments["G"]
    with pytest.raises(GraphError, match="needs the argument G, got W, X"):
        interpret(graph, arguments, {"eps": 0.0})


def test_argument_of_another_size_is_refused():
    shape = Shape(2, 4, 4, grid=2, forloop_range=2)
    arguments = random_arguments("rms_norm_gate_up_silu", shape, seed=0)
    arguments["W_gate_up"] = arguments["W_gate_up"][:-1]
    with pytest.raises(GraphError, match="W_gate_up has 28 elements, expected 32"):
        interpret(ops.load_for("rms_norm_gate_up_silu", shape), arguments, {"eps": 0.0})


# Mutations: each is a mistake that somebody could make in ops.py. "refused": validate() sees that the graph
# contradicts itself. "wrong": the graph is well-formed, and only the comparison with the definition sees it.

SHAPE = Shape(3, 12, 8, grid=4, forloop_range=3)


def _edit(graph: MuGraph, change: Callable, grid: tuple[int, int, int] | None = None) -> MuGraph:
    """The graph with each threadblock operator changed (None: dropped), and tiles of the dims that this gives."""
    block = graph.block_graph
    operators = tuple(new for op in block.operators if (new := change(op)) is not None)
    block = dataclasses.replace(block, operators=operators, grid_dim=grid or block.grid_dim)
    block = block.with_inferred_tiles(graph.tensors)
    kernel = tuple(dataclasses.replace(op, block_graph=block) if op.block_graph else op for op in graph.operators)
    return dataclasses.replace(graph, operators=kernel).validate()


def _change(output: str | None, **fields) -> Callable[[MuGraph], MuGraph]:
    return lambda graph: _edit(graph, lambda op: dataclasses.replace(op, **fields) if op.output == output else op)


def _read_x_for_s(graph: MuGraph) -> MuGraph:
    """The norm reads X and the residual is lost, while S is still stored."""
    outer = [dataclasses.replace(op, inputs=("X", *op.inputs[1:])) if op.block_graph else op for op in graph.operators]
    return _change("s", tensor="X")(dataclasses.replace(graph, operators=tuple(outer)))


def _load_everything_in_each_iteration(graph: MuGraph) -> MuGraph:
    return _edit(graph, lambda op: dataclasses.replace(op, forloop_dim=-1) if op.kind == "input" else op)


def _without_accumulator(graph: MuGraph) -> MuGraph:
    """The product goes straight to the division."""
    return _edit(
        graph,
        lambda op: None if op.output == "acc" else dataclasses.replace(op, inputs=("product", "rms")) if op.output == "out" else op,
    )


def _annotated(**fields) -> Callable[[MuGraph], MuGraph]:
    return lambda graph: dataclasses.replace(graph, annotations=Annotations(**fields)).validate()


def _accumulates(kind: str) -> Callable[[MuGraph], MuGraph]:
    """Another accumulator in the place of the rms, without the eps that only an rms can have."""
    return lambda graph: _change("rms", kind=kind)(_annotated()(graph))


NORM, GATE_UP = "rms_norm_linear", "rms_norm_gate_up_silu"
EPS = (RuntimeEps("rms", "eps"),)
MUTATIONS: dict[str, tuple[str, Callable[[MuGraph], MuGraph], str]] = {
    "w split along k by the grid": (NORM, _change("w", grid_map=(0, -1, -1)), "refused"),
    "w not split by the grid": (NORM, _change("w", grid_map=(-1, -1, -1)), "refused"),
    "w split along n by the for-loop": (NORM, _change("w", forloop_dim=1), "refused"),
    "w not split by the for-loop": (NORM, _change("w", forloop_dim=-1), "refused"),
    "s split along the tokens by the for-loop": (NORM, _change("s", forloop_dim=0), "refused"),
    "output map of another dim": (NORM, _change(None, grid_map=(0, -1, -1)), "refused"),
    "output map of another grid dim": (NORM, _change(None, grid_map=(-1, 1, -1)), "refused"),
    "no accumulator of the product": (NORM, _without_accumulator, "refused"),
    "nothing split by the for-loop": (NORM, _load_everything_in_each_iteration, "refused"),
    "γ of the first k tile in each iteration": (NORM, _change("g", forloop_dim=-1), "refused"),
    "rms of s·γ": (NORM, _change("rms", inputs=("s_scaled",)), "wrong"),
    "mean in the place of rms": (NORM, _accumulates(ACCUM_MEAN), "wrong"),
    "sum in the place of rms": (NORM, _accumulates(ACCUM_SUM), "wrong"),
    "no γ": (NORM, _change("product", inputs=("s", "w")), "wrong"),
    "multiplied by the rms": (NORM, _change("out", kind="mul"), "wrong"),
    "residual not added": (NORM, _read_x_for_s, "wrong"),
    "no eps": (NORM, _annotated(), "wrong"),
    "gate and up swapped": (
        GATE_UP,
        _annotated(eps=EPS, views=(View("W_up", "W_gate_up"), View("W_gate", "W_gate_up"))),
        "wrong",
    ),
    "silu of up": (GATE_UP, _change("gate_silu", inputs=("up",)), "wrong"),
    "up times w_gate": (GATE_UP, _change("product_up", inputs=("s_scaled", "w_gate")), "wrong"),
    "up not divided by the rms": (GATE_UP, _change("out", inputs=("gate_silu", "acc_up")), "wrong"),
    "x by w's second iteration": ("linear", _change("x", forloop_dim=0), "refused"),
}


@pytest.mark.parametrize("case", MUTATIONS)
def test_a_mistake_in_the_graph_is_found(case):
    op, mutate, verdict = MUTATIONS[case]
    graph = ops.load_for(op, SHAPE)
    if verdict == "refused":
        with pytest.raises(GraphError):
            mutate(graph)
    else:
        eps = 0.5 if case == "no eps" else 0.0
        assert not agrees(mutate(graph), op, SHAPE, eps)


@pytest.mark.parametrize("op", GEMM_OPS)
def test_an_edit_that_changes_nothing_is_no_mistake(op):
    """The control of the test above: _edit itself does not make a graph wrong."""
    assert agrees(_edit(ops.load_for(op, SHAPE), lambda operator: operator), op, SHAPE)
