# SPDX-License-Identifier: Apache-2.0
"""The μGraph data model, the stored graphs, and the adapter over mirage-project.

Tests with the `mirage` fixture need mirage-project in this interpreter or in MIRAGE_PYTHON; without it they are
skipped, and mirage_codegen/install_mirage.sh installs it.
"""

import dataclasses
import json
from types import SimpleNamespace

import pytest

from mirage_codegen import mirage_api, ops
from mirage_codegen.mirage_api import KernelGraph, Mirage, MirageError, ThreadblockGraph
from mirage_codegen.mugraph import (
    ACCUMULATE,
    AFTER_LOOP,
    LOOP,
    ONCE,
    Annotations,
    BlockGraph,
    GraphError,
    MuGraph,
    RuntimeEps,
    Schedule,
    View,
)
from mirage_codegen.ops import Shape


@pytest.fixture(scope="module")
def mirage() -> str:
    version = mirage_api.mirage_version()
    if version is None:
        pytest.skip("mirage-project is not installed: mirage_codegen/install_mirage.sh PYTHON")
    return version


def with_block(graph: MuGraph, **fields: object) -> MuGraph:
    """The graph with fields of its threadblock graph replaced."""
    block = dataclasses.replace(graph.block_graph, **fields)  # type: ignore[arg-type]
    operators = [dataclasses.replace(op, block_graph=block) if op.block_graph else op for op in graph.operators]
    return dataclasses.replace(graph, operators=tuple(operators))


def with_operator(graph: MuGraph, output: str | None, **fields: object) -> MuGraph:
    """The graph with fields replaced in the threadblock operator that makes that tile (None: the output)."""
    return with_block(
        graph,
        operators=tuple(
            dataclasses.replace(op, **fields) if op.output == output else op  # type: ignore[arg-type]
            for op in graph.block_graph.operators
        ),
    )


# The stored graphs


@pytest.mark.parametrize("op", ops.OPS)
def test_stored_graph_survives_json_unchanged(op):
    text = (ops.GRAPHS_DIR / f"{op}.json").read_text()
    assert MuGraph.from_json(text).to_json() == text


def test_every_stored_graph_belongs_to_an_op():
    assert {path.stem for path in ops.GRAPHS_DIR.glob("*.json")} == set(ops.OPS)


def test_json_does_not_depend_on_the_order_of_its_keys():
    text = (ops.GRAPHS_DIR / "rms_norm_linear.json").read_text()
    shuffled = json.dumps(dict(reversed(json.loads(text).items())))
    assert MuGraph.from_json(shuffled).to_json() == text


# What a lowering reads


def test_schedule_of_the_qkv_graph():
    assert ops.load("rms_norm_linear").schedule() == Schedule(
        num_tokens=16,
        k=4096,
        n=6144,
        grid=(128, 1, 1),
        threads=128,
        forloop_range=16,
        k_per_iteration=256,
        n_per_block=48,
    )


def test_schedule_counts_the_columns_of_one_weight():
    graph = ops.load("rms_norm_gate_up_silu")
    assert graph.schedule().n == 12288
    assert [op.tensor for op in graph.block_graph.weights()] == ["W_gate", "W_up"]


def test_phases_of_the_qkv_graph():
    block = ops.load("rms_norm_linear").block_graph
    phases = {op.output or op.tensor: block.phase(op) for op in block.operators}
    loop = dict.fromkeys(("s", "g", "s_scaled", "w", "product"), LOOP)
    assert phases == loop | {"acc": ACCUMULATE, "rms": ACCUMULATE, "out": AFTER_LOOP, "O": AFTER_LOOP}


def test_what_the_loop_does_not_split_runs_once():
    graph = with_operator(ops.load("rms_norm_linear"), "g", forloop_dim=-1)
    block = graph.block_graph
    assert [op.output for op in block.in_phase(ONCE)] == ["g"]
    assert block.phase(block.producer("s_scaled")) == LOOP


def test_residual_adds_are_prologue_and_epilogue():
    norm, linear = ops.load("rms_norm_linear"), ops.load("linear_residual")
    assert [op.outputs for op in norm.prologue()] == [("S",)]
    assert norm.epilogue() == ()
    assert linear.prologue() == ()
    assert [op.outputs for op in linear.epilogue()] == [("O",)]


def test_consumers_and_producers():
    graph = ops.load("rms_norm_linear")
    assert [op.kind for op in graph.consumers("S")] == ["customized", "output"]
    assert [op.output for op in graph.block_graph.consumers("s")] == ["s_scaled", "rms"]
    assert graph.producer("S").inputs == ("X", "R")
    with pytest.raises(KeyError):
        graph.block_graph.producer("no_such_tile")


def test_gate_and_up_are_halves_of_one_argument():
    graph = ops.load("rms_norm_gate_up_silu")
    assert graph.arguments == ("X", "R", "G", "W_gate_up")
    assert graph.argument_of("W_gate") == ("W_gate_up", 0)
    assert graph.argument_of("W_up") == ("W_gate_up", 12288 * 4096)
    assert graph.argument_of("G") == ("G", 0)


def test_eps_is_annotated_on_the_rms():
    graph = ops.load("rms_norm_linear")
    assert graph.eps_of("rms") == "eps"
    assert graph.eps_of("acc") is None


# Refusals


def mutated(change):
    return change(ops.load("rms_norm_linear"))


REFUSALS = {
    "two tensors of one name": (
        lambda g: dataclasses.replace(g, tensors=(*g.tensors, g.tensors[0])),
        "There are two tensors of rms_norm_linear named X.",
    ),
    "tensor from nowhere": (
        lambda g: dataclasses.replace(g, operators=g.operators[1:]),
        "The add operator reads X before any operator makes it.",
    ),
    "unknown dtype": (lambda g: g.with_dtype("fp8"), "has dtype fp8, expected one of bf16, fp16, fp32."),
    "padded strides": (
        lambda g: dataclasses.replace(
            g, tensors=tuple(dataclasses.replace(t, strides=(8192, 1)) if t.name == "X" else t for t in g.tensors)
        ),
        "has strides [8192, 1], expected dense row-major or column-major ones.",
    ),
    "grid that does not divide": (
        lambda g: with_block(g, grid_dim=(100, 1, 1)),
        "Dim 1 of W, 6144 long, does not divide into 100 tiles.",
    ),
    "tile of the wrong size": (
        lambda g: with_block(g, forloop_range=32),
        "The dims of tile s are [16, 256], expected [16, 128].",
    ),
    "weight split along k by the grid": (
        lambda g: with_operator(g, "w", grid_map=(0, -1, -1)),
        "The dims of tile w are [256, 48], expected [2, 6144].",
    ),
    "tile map out of range": (
        lambda g: with_operator(g, "w", grid_map=(2, -1, -1)),
        "The input of W names dim 2, expected -1 to 1.",
    ),
    "output without accumulator": (
        lambda g: with_operator(g, None, inputs=("product",)),
        "Output O is taken from product, which no for-loop accumulator has completed.",
    ),
    "accumulator of an accumulator": (
        lambda g: with_operator(g, "rms", inputs=("acc",)),
        "The accumulator rms reads acc, which is complete only after the loop.",
    ),
    "mix of loop and after the loop": (
        lambda g: with_operator(g, "out", inputs=("acc", "product")),
        "The div operator out mixes values from inside and after the for-loop.",
    ),
    "output that all blocks write": (
        lambda g: with_operator(g, None, grid_map=(-1, -1, -1)),
        "Output O is written by 128 blocks at the same place.",
    ),
    "output rows in the place of columns": (
        lambda g: with_operator(g, None, grid_map=(0, -1, -1)),
        "The dims of tensor O are [16, 6144], expected [2048, 48].",
    ),
    "unknown operator": (lambda g: with_operator(g, "out", kind="pow"), "A threadblock operator is of kind pow"),
    "eps beside an rms": (
        lambda g: dataclasses.replace(g, annotations=Annotations(eps=(RuntimeEps("acc", "eps"),))),
        "The eps eps is annotated on acc, which is no rms accumulator.",
    ),
    "view of an intermediate": (
        lambda g: dataclasses.replace(g, annotations=Annotations(views=(View("S", "all"),))),
        "The view S of all is no input of the graph.",
    ),
    "swapped operands of customized": (
        lambda g: dataclasses.replace(
            g,
            operators=tuple(dataclasses.replace(op, inputs=("W", "G", "S")) if op.block_graph else op for op in g.operators),
        ),
        "The customized operator's inputs are ['W', 'G', 'S'], its threadblock graph's ['S', 'G', 'W'].",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_validate_refuses(case):
    change, message = REFUSALS[case]
    with pytest.raises(GraphError) as error:
        mutated(change).validate()
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "This is not the JSON of a μGraph (JSONDecodeError"),
        ("[]", "This is not the JSON of a μGraph"),
        ('{"name": "x"}', "This is not the JSON of a μGraph (KeyError: 'annotations')"),
        ('{"name": "x", "colour": 1}', "The JSON of a MuGraph has unknown fields: colour."),
    ],
)
def test_from_json_refuses_what_is_no_graph(text, message):
    with pytest.raises(GraphError) as error:
        MuGraph.from_json(text)
    assert message in str(error.value)


def test_from_json_refuses_an_unknown_field_of_an_operator():
    text = ops.load("linear").to_json().replace('"forloop_range"', '"forloop_rage"')
    with pytest.raises(GraphError, match="unknown fields: forloop_rage"):
        MuGraph.from_json(text)


# Resizing


@pytest.mark.parametrize("op", ops.OPS)
def test_resized_to_its_own_shape_is_the_same_graph(op):
    assert ops.load_for(op, ops.CANONICAL[op]) == ops.load(op)


def test_resized_graph_refuses_a_grid_that_does_not_divide():
    with pytest.raises(GraphError, match="does not divide into 100 tiles"):
        ops.load_for("rms_norm_linear", Shape(16, 4096, 6144, grid=100, forloop_range=16))


def test_graph_with_a_dim_of_one_refuses_to_be_resized():
    one_token = ops.load_for("linear", Shape(1, 64, 64, grid=4, forloop_range=2))
    with pytest.raises(GraphError, match="has a dim of 1 and cannot be resized"):
        one_token.resized(num_tokens=2, k=64, n=64, grid=(4, 1, 1), threads=128, forloop_range=2)


# Mirage


def test_stored_graphs_are_what_mirage_exports(mirage):
    assert ops.stale_graphs() == []


@pytest.mark.parametrize(
    ("op", "shape"),
    [
        # Qwen3 0.6B, 4B, 8B at TP 8, 14B, 32B, and shapes with odd token capacities
        ("rms_norm_linear", Shape(1, 1024, 4096, grid=128, forloop_range=8)),
        ("rms_norm_linear", Shape(7, 2560, 6144, grid=192, forloop_range=20)),
        ("rms_norm_linear", Shape(16, 4096, 768, grid=96, forloop_range=16)),
        ("rms_norm_linear_first", Shape(64, 5120, 7168, grid=128, forloop_range=80, threads=256)),
        ("rms_norm_linear", Shape(16, 5120, 10240, grid=128, forloop_range=40, dtype="fp16")),
        ("rms_norm_gate_up_silu", Shape(8, 1024, 3072, grid=96, forloop_range=8)),
        ("rms_norm_gate_up_silu", Shape(16, 5120, 25600, grid=128, forloop_range=80)),
        ("linear_residual", Shape(5, 3072, 1024, grid=128, forloop_range=12)),
        ("linear_residual", Shape(16, 25600, 5120, grid=128, forloop_range=100)),
        ("rms_norm", Shape(64, 5120, 5120, grid=64, forloop_range=1, threads=256)),
        ("rms_norm_first", Shape(33, 1024, 1024, grid=11, forloop_range=1)),
        ("linear", Shape(3, 1024, 5120, grid=160, forloop_range=4)),
    ],
    ids=str,
)
def test_resized_graph_is_what_mirage_exports_for_that_shape(mirage, op, shape):
    assert ops.load_for(op, shape) == ops.OPS[op](shape).export().graph


def test_mirage_transpiles_the_graph(mirage):
    export = ops.rms_norm_linear(ops.CANONICAL["rms_norm_linear"]).export()
    assert "__global__" in export.source
    assert 0 < export.smem_bytes <= 163 * 1024  # a block of sm_80


@pytest.mark.parametrize(
    ("shape", "at", "text"),
    [
        (Shape(16, 4096, 6144, grid=100, forloop_range=16), "new_input w", "tensor.dim[dim_idx] % dim_div == 0"),
        (Shape(16, 4096, 6144, grid=128, forloop_range=3), "new_input s", "bgraph->forloop_range == 0"),
        # more shared memory than Mirage plans with
        (Shape(16, 4096, 6144, grid=128, forloop_range=4), "new_input w", "op != nullptr"),
        (Shape(16, 4096, 6144, grid=6144, forloop_range=16), "customized", "MAX_NUM_THREADBLOCKS_PER_KERNEL"),
    ],
)
def test_mirage_abort_becomes_an_error_with_its_assert(mirage, shape, at, text):
    with pytest.raises(MirageError) as error:
        ops.rms_norm_linear(shape).export()
    message = str(error.value)
    assert message.startswith(f"Mirage refused rms_norm_linear at {at}: Assertion `")
    assert text in message
    assert "\n" not in message


def test_mirage_refuses_a_residual_added_inside_the_threadblock_graph(mirage):
    """Why linear_residual adds at the kernel level: once Mirage takes this, the add can move inside."""
    graph = KernelGraph("inside")
    for name, dims in (("X", (16, 64)), ("R", (16, 128))):
        graph.new_input(name, dims, (dims[1], 1), "bf16")
    graph.new_input("W", (64, 128), (1, 64), "bf16")
    block = ThreadblockGraph((2, 1, 1), (128, 1, 1), forloop_range=2)
    block.new_input("x", "X", (-1, -1, -1), 1)
    block.new_input("w", "W", (1, -1, -1), 0)
    block.new_input("r", "R", (1, -1, -1), -1)
    block.forloop_accum("acc", block.matmul("product", "x", "w"))
    block.new_output("O", block.add("sum", "acc", "r"), (1, -1, -1))
    graph.customized(["X", "W", "R"], block)
    graph.mark_output("O", (128, 1))
    with pytest.raises(MirageError, match="at add sum: Assertion"):
        graph.export()


def test_python_error_in_mirage_becomes_an_error(mirage):
    graph = KernelGraph("padded")
    graph.new_input("X", (16, 64), (128, 1), "bf16")
    with pytest.raises(MirageError, match=r"^Mirage refused padded at new_input X: AssertionError\.$"):
        graph.export()


def test_missing_mirage_names_the_command_that_installs_it(monkeypatch, tmp_path):
    """An interpreter whose site-packages are hidden has no Mirage, whatever this one has."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{mirage_api.sys.executable}" -S "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("MIRAGE_PYTHON", str(python))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with pytest.raises(MirageError) as error:
        ops.linear_residual(ops.CANONICAL["linear"]).export()
    assert str(error.value).startswith("mirage-project is not installed for ")
    assert "install_mirage.sh" in str(error.value)
    assert mirage_api.mirage_version() is None


def test_interpreter_that_does_not_run_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("MIRAGE_PYTHON", str(tmp_path / "python"))
    with pytest.raises(MirageError, match=r"does not run .*: set MIRAGE_PYTHON to one"):
        ops.linear_residual(ops.CANONICAL["linear"]).export()


def test_unknown_accumulator_is_refused():
    with pytest.raises(MirageError, match="expected None, 'sum', 'mean' or 'rms'"):
        ThreadblockGraph((1, 1, 1), (128, 1, 1), 1).forloop_accum("acc", "x", "max")


# The versions of Mirage


def fake_graph(**methods):
    return SimpleNamespace(cygraph=SimpleNamespace(get_input_dtensors=lambda: ["x", "w"], **methods))


@pytest.mark.parametrize(
    "methods",
    [
        {"get_input_dtensor_layout": {"x": (4, 1), "w": (1, 4)}.__getitem__},
        {"get_input_dtensor_shape_and_stride": {"x": ((2, 4), (4, 1)), "w": ((4, 8), (1, 4))}.__getitem__},
    ],
    ids=["0.2.2", "0.2.4"],
)
def test_input_strides_under_either_name(methods):
    assert Mirage(None, "any").input_strides(fake_graph(**methods)) == [(4, 1), (1, 4)]


def test_transpiler_error_of_0_2_4_is_an_error():
    module = SimpleNamespace(generate_cuda_program=lambda graph, **_: {"error_type": 2, "code": ""})
    graph = fake_graph(get_input_dtensor_layout=lambda tensor: (1,))
    with pytest.raises(MirageError, match="transpiler failed with error type 2"):
        Mirage(module, "0.2.4").transpile(graph, target_cc=80)


def test_block_graph_lookup_of_a_missing_tile():
    block: BlockGraph = ops.load("linear").block_graph
    with pytest.raises(KeyError):
        block.tile("no_such_tile")
