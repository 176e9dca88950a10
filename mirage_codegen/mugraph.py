# SPDX-License-Identifier: Apache-2.0
"""The data model of an exported μGraph: what Mirage planned, as plain immutable data.

A μGraph has two levels, and so has this model:

    MuGraph            kernel level: tensors in device memory and operators over them
      └ KernelOperator   input, output, add, mul, … or `customized`, which owns a
          └ BlockGraph     threadblock graph: grid, for-loop range, tiles in shared memory, operators over tiles

Operator kinds are Mirage's own names without prefix and suffix (`tb_forloop_accum_red_ld_rms_op` is
`forloop_accum_red_ld_rms`). Everything Mirage knows stands in the graph. What an operator's definition needs and
Mirage 0.2.2 has no field for stands beside it, in `Annotations`, so that nobody mistakes it for Mirage's.

Dims and strides count elements. The first dim of the activations is the token capacity of the graph; a kernel
lowered from it serves any num_tokens from 1 to that capacity.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

DTYPES = ("bf16", "fp16", "fp32")
UNARY = ("exp", "silu", "square", "sqrt")
BINARY = ("add", "mul", "div")
ACCUM_NO_RED = "forloop_accum_no_red"
ACCUM_SUM = "forloop_accum_red_ld_sum"
ACCUM_MEAN = "forloop_accum_red_ld_mean"
ACCUM_RMS = "forloop_accum_red_ld_rms"
ACCUMULATORS = (ACCUM_NO_RED, ACCUM_SUM, ACCUM_MEAN, ACCUM_RMS)
KERNEL_KINDS = ("input", "output", "customized", *UNARY, *BINARY)
BLOCK_KINDS = ("input", "output", "matmul", *UNARY, *BINARY, *ACCUMULATORS)

REPLICATE = -1
"""In a tile map: this grid dimension does not split the tensor. As for-loop dim: loaded once, whole."""

ONCE, LOOP, ACCUMULATE, AFTER_LOOP = "once", "loop", "accumulate", "after_loop"
"""When a threadblock operator runs: see BlockGraph.phase()."""


class GraphError(ValueError):
    """A μGraph that contradicts itself, or JSON that is not a μGraph; the message is one sentence."""


@dataclass(frozen=True)
class Tensor:
    """A tensor in device memory."""

    name: str
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Tile:
    """A tile in shared memory or registers: what one block holds in one iteration (or after the loop).

    Its dtype is not recorded: Mirage gives each tile its inputs' dtype, and our lowering accumulates in fp32 whatever
    Mirage says.
    """

    name: str
    dims: tuple[int, ...]


@dataclass(frozen=True)
class BlockOperator:
    """An operator of a threadblock graph.

    `tensor`, `grid_map` and `forloop_dim` belong to `input` and `output`: the device tensor, for each of the grid's
    x, y, z the tensor dim that it splits (REPLICATE: none), and the tensor dim that the for-loop splits.
    """

    kind: str
    inputs: tuple[str, ...] = ()
    output: str | None = None
    tensor: str | None = None
    grid_map: tuple[int, int, int] | None = None
    forloop_dim: int | None = None


@dataclass(frozen=True)
class Schedule:
    """The numbers that a lowering needs besides the operators.

    k, n: the contraction and the output columns of *one* weight (a graph with gate and up weights has n = I, not 2I).
    """

    num_tokens: int
    k: int
    n: int
    grid: tuple[int, int, int]
    threads: int
    forloop_range: int
    k_per_iteration: int
    n_per_block: int


@dataclass(frozen=True)
class BlockGraph:
    """The threadblock graph of a customized operator."""

    grid_dim: tuple[int, int, int]
    block_dim: tuple[int, int, int]
    forloop_range: int
    reduction_dimx: int
    tiles: tuple[Tile, ...]
    operators: tuple[BlockOperator, ...]

    def tile(self, name: str) -> Tile:
        """The tile of that name; KeyError if there is none."""
        return _by_name(self.tiles, name)

    def producer(self, tile: str) -> BlockOperator:
        """The operator that makes that tile; KeyError if none does."""
        for operator in self.operators:
            if operator.output == tile:
                return operator
        raise KeyError(tile)

    def consumers(self, tile: str) -> tuple[BlockOperator, ...]:
        """The operators that read that tile, in graph order."""
        return tuple(operator for operator in self.operators if tile in operator.inputs)

    def of_kind(self, *kinds: str) -> tuple[BlockOperator, ...]:
        """The operators of those kinds, in graph order."""
        return tuple(operator for operator in self.operators if operator.kind in kinds)

    def phase(self, operator: BlockOperator) -> str:
        """When a block runs that operator.

        ONCE        before the loop: inputs that the loop does not split, and what is computed from those alone
        LOOP        in each iteration
        ACCUMULATE  in each iteration, into a value that is complete only after the loop
        AFTER_LOOP  once, after the last iteration
        """
        if operator.kind == "input":
            return ONCE if operator.forloop_dim == REPLICATE else LOOP
        if operator.kind in ACCUMULATORS:
            return ACCUMULATE
        sources = {self.phase(self.producer(tile)) for tile in operator.inputs}
        if sources & {ACCUMULATE, AFTER_LOOP}:
            return AFTER_LOOP
        return LOOP if LOOP in sources else ONCE

    def in_phase(self, *phases: str) -> tuple[BlockOperator, ...]:
        """The operators that run in those phases, in graph order."""
        return tuple(operator for operator in self.operators if self.phase(operator) in phases)

    def with_inferred_tiles(self, tensors: Iterable[Tensor]) -> BlockGraph:
        """The same operators over tiles of the dims that they give; GraphError where those do not fit together."""
        by_name = {tensor.name: tensor for tensor in tensors}
        tiles: dict[str, tuple[int, ...]] = {}
        for op in self.operators:
            _check_available(op.inputs, set(tiles), op.kind)
            if op.output is not None:
                tiles[op.output] = _tile_dims(op, self, tiles, by_name)
        return dataclasses.replace(self, tiles=tuple(Tile(name, dims) for name, dims in tiles.items()))

    def weights(self) -> tuple[BlockOperator, ...]:
        """The input operators whose tile is the right operand of a matmul: the streamed weights, in graph order."""
        right_operands = {matmul.inputs[1] for matmul in self.of_kind("matmul")}
        return tuple(operator for operator in self.of_kind("input") if operator.output in right_operands)


@dataclass(frozen=True)
class KernelOperator:
    """An operator of the kernel level; `block_graph` is set for `customized` alone."""

    kind: str
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    block_graph: BlockGraph | None = None


@dataclass(frozen=True)
class RuntimeEps:
    """The rms accumulator `tile` is sqrt(mean(x²) + eps), eps being the runtime argument of that name.

    Mirage 0.2.2's rms has no eps.
    """

    tile: str
    argument: str


@dataclass(frozen=True)
class View:
    """The input `tensor` is no runtime argument of its own: it is a part of the argument `source`.

    The views of one source lie in it one behind the other, in the order in which they are annotated. Mirage 0.2.2
    cannot take two tiles that lie apart from one tensor in one block, so such parts are tensors of their own there.
    """

    tensor: str
    source: str


@dataclass(frozen=True)
class Annotations:
    """What the operator's definition needs and Mirage 0.2.2 has no field for."""

    eps: tuple[RuntimeEps, ...] = ()
    views: tuple[View, ...] = ()


@dataclass(frozen=True)
class MuGraph:
    """A fused op as Mirage's μGraph, with our annotations beside it."""

    name: str
    tensors: tuple[Tensor, ...]
    operators: tuple[KernelOperator, ...]
    annotations: Annotations = Annotations()

    # Lookup

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name; KeyError if there is none."""
        return _by_name(self.tensors, name)

    def producer(self, tensor: str) -> KernelOperator:
        """The operator that makes that tensor; KeyError if none does."""
        for operator in self.operators:
            if tensor in operator.outputs:
                return operator
        raise KeyError(tensor)

    def consumers(self, tensor: str) -> tuple[KernelOperator, ...]:
        """The operators that read that tensor, in graph order."""
        return tuple(operator for operator in self.operators if tensor in operator.inputs)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The graph's input tensors, in Mirage's order."""
        return tuple(self.tensor(op.outputs[0]) for op in self.operators if op.kind == "input")

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        """The graph's output tensors, in Mirage's order."""
        return tuple(self.tensor(op.inputs[0]) for op in self.operators if op.kind == "output")

    @property
    def customized(self) -> KernelOperator:
        """The one customized operator; GraphError when there is not exactly one."""
        found = [operator for operator in self.operators if operator.kind == "customized"]
        if len(found) != 1:
            raise GraphError(f"{self.name} has {len(found)} customized operators where exactly 1 is expected.")
        return found[0]

    @property
    def block_graph(self) -> BlockGraph:
        """The threadblock graph of the one customized operator."""
        block_graph = self.customized.block_graph
        assert block_graph is not None  # validate() ensures it
        return block_graph

    def prologue(self) -> tuple[KernelOperator, ...]:
        """Kernel-level elementwise operators before the customized one: a lowering runs them in its prologue."""
        at = self.operators.index(self.customized)
        return tuple(op for op in self.operators[:at] if op.kind in (*UNARY, *BINARY))

    def epilogue(self) -> tuple[KernelOperator, ...]:
        """Kernel-level elementwise operators after the customized one: a lowering runs them in its epilogue."""
        at = self.operators.index(self.customized)
        return tuple(op for op in self.operators[at:] if op.kind in (*UNARY, *BINARY))

    def eps_of(self, tile: str) -> str | None:
        """The runtime argument added under that rms accumulator's root, or None."""
        return next((item.argument for item in self.annotations.eps if item.tile == tile), None)

    def argument_of(self, tensor: str) -> tuple[str, int]:
        """The runtime argument that holds that input, and at which element the input starts in it."""
        source = next((view.source for view in self.annotations.views if view.tensor == tensor), None)
        if source is None:
            return tensor, 0
        parts = [view.tensor for view in self.annotations.views if view.source == source]
        return source, sum(math.prod(self.tensor(part).dims) for part in parts[: parts.index(tensor)])

    def inputs_in(self, argument: str) -> tuple[Tensor, ...]:
        """The graph's inputs that lie in that runtime argument."""
        return tuple(tensor for tensor in self.inputs if self.argument_of(tensor.name)[0] == argument)

    @property
    def arguments(self) -> tuple[str, ...]:
        """The names of the runtime tensors that a caller passes, in the order of the inputs that lie in them."""
        return tuple(dict.fromkeys(self.argument_of(tensor.name)[0] for tensor in self.inputs))

    def schedule(self) -> Schedule:
        """The numbers of the graph's skinny GEMM; GraphError when there is no matmul or two disagree."""
        block = self.block_graph
        found = {self._schedule_of(block, matmul) for matmul in block.of_kind("matmul")}
        if len(found) != 1:
            raise GraphError(f"{self.name} has {len(found)} different matmul schedules where exactly 1 is expected.")
        return found.pop()

    def _schedule_of(self, block: BlockGraph, matmul: BlockOperator) -> Schedule:
        weight = block.producer(matmul.inputs[1])
        if weight.tensor is None:
            raise GraphError(f"The right operand {matmul.inputs[1]} of a matmul is {weight.kind}, expected an input.")
        k, n = self.tensor(weight.tensor).dims
        k_tile, n_tile = block.tile(matmul.inputs[1]).dims
        num_tokens = block.tile(matmul.inputs[0]).dims[0]
        return Schedule(num_tokens, k, n, block.grid_dim, math.prod(block.block_dim), block.forloop_range, k_tile, n_tile)

    def resized(self, *, num_tokens: int, k: int, n: int, grid: tuple[int, int, int], threads: int, forloop_range: int) -> MuGraph:
        """The graph of the same op for another shape and schedule; GraphError if its tiles do not divide.

        Equal to what Mirage exports for those numbers (tested), but needs no Mirage. A graph without matmul has no n.
        The graph must not have a token capacity, k or n of 1: a dim of 1 could not be told from a broadcast one.
        """
        sizes = _DimClasses(self).sizes({"m": num_tokens, "k": k, "n": n})
        tensors = tuple(_resized_tensor(tensor, sizes) for tensor in self.tensors)
        block = dataclasses.replace(self.block_graph, grid_dim=grid, block_dim=(threads, 1, 1), forloop_range=forloop_range)
        block = block.with_inferred_tiles(tensors)
        operators = tuple(dataclasses.replace(op, block_graph=block) if op.kind == "customized" else op for op in self.operators)
        return dataclasses.replace(self, tensors=tensors, operators=operators).validate()

    def with_dtype(self, dtype: str) -> MuGraph:
        """The same graph over tensors of another dtype."""
        tensors = tuple(dataclasses.replace(tensor, dtype=dtype) for tensor in self.tensors)
        return dataclasses.replace(self, tensors=tensors).validate()

    # Checks

    def validate(self) -> MuGraph:
        """Return the graph itself; GraphError with one sentence for the first contradiction in it."""
        _validate_kernel_level(self)
        _validate_annotations(self)
        return self

    # JSON

    def to_json(self) -> str:
        """Text that is equal for equal graphs, with sorted keys and one operator a line, ending in a newline."""
        return _format(_drop_unset(dataclasses.asdict(self))) + "\n"

    @staticmethod
    def from_json(text: str) -> MuGraph:
        """The validated graph that to_json wrote; GraphError with one sentence otherwise."""
        try:
            graph = _graph_from(json.loads(text))
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise GraphError(f"This is not the JSON of a μGraph ({type(error).__name__}: {error}).") from error
        return graph.validate()


# Checking


def _validate_kernel_level(graph: MuGraph) -> None:
    _check_unique(f"tensors of {graph.name}", [tensor.name for tensor in graph.tensors])
    tensors = {tensor.name: tensor for tensor in graph.tensors}
    for tensor in graph.tensors:
        _check_tensor(tensor)
    made: set[str] = set()
    for operator in graph.operators:
        _check_known(operator.kind, KERNEL_KINDS, f"kernel-level operator of {graph.name}")
        _check_available(operator.inputs, made, operator.kind)
        for name in operator.outputs:
            if name not in tensors:
                raise GraphError(f"The {operator.kind} operator makes {name}, which is not among the graph's tensors.")
            if name in made:
                raise GraphError(f"Tensor {name} is made twice.")
            made.add(name)
        _check_kernel_operator(operator, tensors)
    for name in tensors:
        if name not in made:
            raise GraphError(f"Tensor {name} is made by no operator.")


def _check_kernel_operator(operator: KernelOperator, tensors: Mapping[str, Tensor]) -> None:
    kind = operator.kind
    if kind == "customized":
        if operator.block_graph is None:
            raise GraphError("A customized operator has no threadblock graph.")
        _validate_block_graph(operator, operator.block_graph, tensors)
        return
    if operator.block_graph is not None:
        raise GraphError(f"The {kind} operator has a threadblock graph, which only customized ones have.")
    _check_count(kind, "inputs", operator.inputs, {"input": 0, "output": 1}.get(kind, 2 if kind in BINARY else 1))
    _check_count(kind, "outputs", operator.outputs, 0 if kind == "output" else 1)
    if kind in (*UNARY, *BINARY):
        expected = _broadcast(kind, [tensors[name].dims for name in operator.inputs])
        _check_dims(f"tensor {operator.outputs[0]}", tensors[operator.outputs[0]].dims, expected)


def _check_tensor(tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise GraphError(f"Tensor {tensor.name} has dtype {tensor.dtype}, expected one of {', '.join(DTYPES)}.")
    if not tensor.dims or min(tensor.dims) < 1:
        raise GraphError(f"Tensor {tensor.name} has dims {list(tensor.dims)}, expected positive ones.")
    if tensor.strides not in (row_major(tensor.dims), column_major(tensor.dims)):
        raise GraphError(
            f"Tensor {tensor.name} of dims {list(tensor.dims)} has strides {list(tensor.strides)}, "
            "expected dense row-major or column-major ones."
        )


def _validate_block_graph(operator: KernelOperator, block: BlockGraph, tensors: Mapping[str, Tensor]) -> None:
    for label, values in (("grid_dim", block.grid_dim), ("block_dim", block.block_dim)):
        if len(values) != 3 or min(values) < 1:
            raise GraphError(f"{label} is {list(values)}, expected three positive numbers.")
    if block.forloop_range < 1:
        raise GraphError(f"forloop_range is {block.forloop_range}, expected 1 or more.")
    _check_unique("tiles", [tile.name for tile in block.tiles])
    stated = {tile.name: tile.dims for tile in block.tiles}
    made: set[str] = set()
    for op in block.operators:
        _check_block_operator(op, made)
        if op.output is not None:
            if op.output in made:
                raise GraphError(f"Tile {op.output} is made twice.")
            if op.output not in stated:
                raise GraphError(f"The {op.kind} operator makes {op.output}, which is not among the graph's tiles.")
            _check_dims(f"tile {op.output}", stated[op.output], _tile_dims(op, block, stated, tensors))
            made.add(op.output)
        _check_phases(op, block)
    for name in stated:
        if name not in made:
            raise GraphError(f"Tile {name} is made by no operator.")
    _check_boundary("inputs", operator.inputs, [op.tensor for op in block.of_kind("input")])
    _check_boundary("outputs", operator.outputs, [op.tensor for op in block.of_kind("output")])
    for op in block.of_kind("output"):
        _check_output(op, block, stated, tensors)


def _check_block_operator(op: BlockOperator, made: set[str]) -> None:
    _check_known(op.kind, BLOCK_KINDS, "threadblock operator")
    binary = op.kind == "matmul" or op.kind in BINARY
    _check_count(op.kind, "inputs", op.inputs, 0 if op.kind == "input" else 2 if binary else 1)
    _check_count(op.kind, "outputs", () if op.output is None else (op.output,), 0 if op.kind == "output" else 1)
    _check_available(op.inputs, made, op.kind)
    placed = op.kind in ("input", "output")
    for field in ("tensor", "grid_map", "forloop_dim"):
        if (getattr(op, field) is not None) != placed:
            raise GraphError(f"The {op.kind} operator {'lacks' if placed else 'must not have'} {field}.")


def _check_phases(op: BlockOperator, block: BlockGraph) -> None:
    sources = [block.phase(block.producer(tile)) for tile in op.inputs]
    after = [source in (ACCUMULATE, AFTER_LOOP) for source in sources]
    if op.kind == "output" and not all(after):
        raise GraphError(f"Output {op.tensor} is taken from {op.inputs[0]}, which no for-loop accumulator has completed.")
    if op.kind in ACCUMULATORS and any(after):
        raise GraphError(f"The accumulator {op.output} reads {op.inputs[0]}, which is complete only after the loop.")
    if op.kind in (ACCUM_NO_RED, ACCUM_SUM) and sources == [ONCE] and block.forloop_range > 1:
        raise GraphError(
            f"The accumulator {op.output} adds {op.inputs[0]} {block.forloop_range} times, because the loop splits "
            "nothing that it is made of."
        )
    if any(after) and not all(after):
        raise GraphError(f"The {op.kind} operator {op.output} mixes values from inside and after the for-loop.")


def _check_output(op: BlockOperator, block: BlockGraph, stated: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> None:
    assert op.tensor is not None and op.grid_map is not None  # _check_block_operator ensures it
    if op.forloop_dim != REPLICATE:
        raise GraphError(f"Output {op.tensor} is split by the for-loop, but it exists only after the loop.")
    dims = list(stated[op.inputs[0]])
    for blocks, dim in zip(block.grid_dim, _checked_map(op, len(dims)), strict=True):
        if blocks > 1 and dim == REPLICATE:
            raise GraphError(f"Output {op.tensor} is written by {blocks} blocks at the same place.")
        if blocks > 1:
            dims[dim] *= blocks
    _check_dims(f"tensor {op.tensor}", tensors[op.tensor].dims, tuple(dims))


def _tile_dims(
    op: BlockOperator, block: BlockGraph, tiles: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]
) -> tuple[int, ...]:
    """The dims that an operator's output tile must have."""
    operands = [tiles[name] for name in op.inputs]
    if op.kind == "input":
        return _input_tile_dims(op, block, tensors)
    if op.kind == "matmul":
        (m, k), (k_right, n) = operands
        if k != k_right:
            raise GraphError(f"The matmul {op.output} multiplies [{m}, {k}] by [{k_right}, {n}].")
        return (m, n)
    if op.kind in ACCUMULATORS:
        return operands[0] if op.kind == ACCUM_NO_RED else (*operands[0][:-1], 1)
    return _broadcast(op.kind, operands)


def _input_tile_dims(op: BlockOperator, block: BlockGraph, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    if op.tensor is None or op.tensor not in tensors:
        raise GraphError(f"Tile {op.output} is loaded from {op.tensor}, which is not among the graph's tensors.")
    dims = list(tensors[op.tensor].dims)
    splits = [(blocks, dim) for blocks, dim in zip(block.grid_dim, _checked_map(op, len(dims)), strict=True)]
    assert op.forloop_dim is not None  # _check_block_operator ensures it
    _check_dim_index(op, op.forloop_dim, len(dims))
    for parts, dim in (*splits, (block.forloop_range, op.forloop_dim)):
        if dim == REPLICATE:
            continue
        if dims[dim] % parts:
            raise GraphError(f"Dim {dim} of {op.tensor}, {dims[dim]} long, does not divide into {parts} tiles.")
        dims[dim] //= parts
    return tuple(dims)


def _checked_map(op: BlockOperator, num_dims: int) -> tuple[int, int, int]:
    assert op.grid_map is not None  # _check_block_operator ensures it
    if len(op.grid_map) != 3:
        raise GraphError(f"The tile map of {op.tensor} is {list(op.grid_map)}, expected one entry each for x, y and z.")
    for dim in op.grid_map:
        _check_dim_index(op, dim, num_dims)
    return op.grid_map


def _check_dim_index(op: BlockOperator, dim: int, num_dims: int) -> None:
    if not REPLICATE <= dim < num_dims:
        raise GraphError(f"The {op.kind} of {op.tensor} names dim {dim}, expected -1 to {num_dims - 1}.")


def _validate_annotations(graph: MuGraph) -> None:
    accumulators = {
        op.output for operator in graph.operators if operator.block_graph is not None for op in operator.block_graph.of_kind(ACCUM_RMS)
    }
    for item in graph.annotations.eps:
        if item.tile not in accumulators:
            raise GraphError(f"The eps {item.argument} is annotated on {item.tile}, which is no rms accumulator.")
    inputs = {tensor.name for tensor in graph.inputs}
    for view in graph.annotations.views:
        if view.tensor not in inputs:
            raise GraphError(f"The view {view.tensor} of {view.source} is no input of the graph.")
        if view.source in inputs:
            raise GraphError(f"The source {view.source} of the view {view.tensor} is an input of the graph itself.")
    _check_unique("views", [view.tensor for view in graph.annotations.views])


def _check_unique(what: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise GraphError(f"There are two {what} named {name}.")
        seen.add(name)


def _check_known(kind: str, known: tuple[str, ...], what: str) -> None:
    if kind not in known:
        raise GraphError(f"A {what} is of kind {kind}, expected one of {', '.join(known)}.")


def _check_available(names: Iterable[str], made: set[str], kind: str) -> None:
    for name in names:
        if name not in made:
            raise GraphError(f"The {kind} operator reads {name} before any operator makes it.")


def _check_count(kind: str, what: str, names: tuple[str, ...], expected: int) -> None:
    if len(names) != expected:
        raise GraphError(f"The {kind} operator has {len(names)} {what}, expected {expected}.")


def _check_dims(what: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise GraphError(f"The dims of {what} are {list(found)}, expected {list(expected)}.")


def _check_boundary(what: str, outside: tuple[str, ...], inside: list[str | None]) -> None:
    if list(outside) != inside:
        raise GraphError(f"The customized operator's {what} are {list(outside)}, its threadblock graph's {inside}.")


def _broadcast(kind: str, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    result = shapes[0]
    for shape in shapes[1:]:
        if len(shape) != len(result) or any(a != b and 1 not in (a, b) for a, b in zip(result, shape, strict=True)):
            raise GraphError(f"The {kind} operator combines {list(result)} with {list(shape)}.")
        result = tuple(max(a, b) for a, b in zip(result, shape, strict=True))
    return result


# Resizing


class _DimClasses:
    """Which dims of a graph are the same dim: all token dims, all contraction dims, all output column dims."""

    def __init__(self, graph: MuGraph) -> None:
        self._graph = graph
        # One block and one iteration: there a tile has its tensor's dims, and only what is broadcast has a dim of 1.
        whole = dataclasses.replace(graph.block_graph, grid_dim=(1, 1, 1), forloop_range=1)
        self._block = whole.with_inferred_tiles(graph.tensors)
        self._parent: dict[tuple[str, str, int], tuple[str, str, int]] = {}
        for operator in graph.operators:
            if operator.kind in (*UNARY, *BINARY):
                self._unify_elementwise("tensor", operator.outputs[0], operator.inputs)
        for op in self._block.operators:
            self._unify_block_operator(op)

    def sizes(self, wanted: Mapping[str, int]) -> dict[tuple[str, int], int]:
        """The new size of each (tensor, dim) that is a token (m), contraction (k) or output column (n) dim."""
        named = self._named_dims()
        if any(self._dims(level, name)[dim] == 1 for level, name, dim in named.values()):
            raise GraphError(f"{self._graph.name} has a dim of 1 and cannot be resized, because that could be a broadcast dim.")
        roots = {self._root(node): letter for letter, node in named.items()}
        if len(roots) != len(named):
            raise GraphError(f"{self._graph.name} ties its {', '.join(named)} dims together and cannot be resized.")
        return {
            (tensor.name, dim): wanted[roots[root]]
            for tensor in self._graph.tensors
            for dim in range(len(tensor.dims))
            if (root := self._root(("tensor", tensor.name, dim))) in roots
        }

    def _named_dims(self) -> dict[str, tuple[str, str, int]]:
        """A tensor dim for each of m, k and n: rows of the output, dims of the weight (without one: output columns)."""
        out = self._graph.customized.outputs[0]
        weights = self._block.weights()
        if not weights:
            return {"m": ("tensor", out, 0), "k": ("tensor", out, 1)}
        weight = weights[0].tensor
        assert weight is not None  # validate() ensures it
        return {"m": ("tensor", out, 0), "k": ("tensor", weight, 0), "n": ("tensor", weight, 1)}

    def _root(self, node: tuple[str, str, int]) -> tuple[str, str, int]:
        while node in self._parent:
            node = self._parent[node]
        return node

    def _unify(self, a: tuple[str, str, int], b: tuple[str, str, int]) -> None:
        a, b = self._root(a), self._root(b)
        if a != b:
            self._parent[a] = b

    def _dims(self, level: str, name: str) -> tuple[int, ...]:
        return (self._graph.tensor(name) if level == "tensor" else self._block.tile(name)).dims

    def _unify_elementwise(self, level: str, output: str, inputs: Iterable[str]) -> None:
        for name in inputs:
            pairs = zip(self._dims(level, output), self._dims(level, name), strict=True)
            for dim, (size, operand) in enumerate(pairs):
                if size == operand:
                    self._unify((level, output, dim), (level, name, dim))

    def _unify_block_operator(self, op: BlockOperator) -> None:
        if op.kind == "matmul":
            assert op.output is not None  # validate() ensures it
            self._unify(("tile", op.inputs[0], 0), ("tile", op.output, 0))
            self._unify(("tile", op.inputs[0], 1), ("tile", op.inputs[1], 0))
            self._unify(("tile", op.inputs[1], 1), ("tile", op.output, 1))
        elif op.tensor is not None:
            tile = op.output if op.output is not None else op.inputs[0]
            for dim in range(len(self._graph.tensor(op.tensor).dims)):
                self._unify(("tensor", op.tensor, dim), ("tile", tile, dim))
        elif op.output is not None:
            self._unify_elementwise("tile", op.output, op.inputs)


def _resized_tensor(tensor: Tensor, sizes: Mapping[tuple[str, int], int]) -> Tensor:
    dims = tuple(sizes.get((tensor.name, i), size) for i, size in enumerate(tensor.dims))
    layout = row_major if tensor.strides == row_major(tensor.dims) else column_major
    return dataclasses.replace(tensor, dims=dims, strides=layout(dims))


# Small helpers


def row_major(dims: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a dense tensor whose last dim is contiguous."""
    return tuple(math.prod(dims[i + 1 :]) for i in range(len(dims)))


def column_major(dims: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a dense tensor whose first dim is contiguous."""
    return tuple(math.prod(dims[:i]) for i in range(len(dims)))


def _by_name(items: Iterable[Any], name: str) -> Any:
    for item in items:
        if item.name == name:
            return item
    raise KeyError(name)


# JSON


def _drop_unset(value: Any) -> Any:
    """The same data without None entries: an operator shows only the fields that its kind has."""
    if isinstance(value, dict):
        return {key: _drop_unset(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_drop_unset(item) for item in value]
    return value


def _format(value: Any, indent: str = "") -> str:
    """JSON with sorted keys; whatever fits on one line stays on one line."""
    line = json.dumps(value, sort_keys=True, ensure_ascii=False)
    if not isinstance(value, dict | list) or len(indent) + len(line) <= 130:
        return line
    inner = indent + "  "
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return f"{opening}\n" + ",\n".join(inner + item for item in _items(value, inner)) + f"\n{indent}{closing}"


def _items(value: dict[str, Any] | list[Any], indent: str) -> Iterator[str]:
    if isinstance(value, dict):
        for key in sorted(value):
            yield f"{json.dumps(key)}: {_format(value[key], indent)}"
    else:
        for item in value:
            yield _format(item, indent)


def _graph_from(data: dict[str, Any]) -> MuGraph:
    _only(data, MuGraph)
    notes = data["annotations"]
    _only(notes, Annotations)
    return MuGraph(
        name=data["name"],
        tensors=tuple(Tensor(**_tuples(item)) for item in data["tensors"]),
        operators=tuple(_kernel_operator_from(item) for item in data["operators"]),
        annotations=Annotations(
            eps=tuple(RuntimeEps(**item) for item in notes["eps"]),
            views=tuple(View(**item) for item in notes["views"]),
        ),
    )


def _kernel_operator_from(data: dict[str, Any]) -> KernelOperator:
    block = data.get("block_graph")
    plain = {key: value for key, value in data.items() if key != "block_graph"}
    return KernelOperator(**_tuples(plain), block_graph=None if block is None else _block_graph_from(block))


def _block_graph_from(data: dict[str, Any]) -> BlockGraph:
    _only(data, BlockGraph)
    nested = ("tiles", "operators")
    return BlockGraph(
        **_tuples({key: value for key, value in data.items() if key not in nested}),
        tiles=tuple(Tile(**_tuples(item)) for item in data["tiles"]),
        operators=tuple(BlockOperator(**_tuples(item)) for item in data["operators"]),
    )


def _tuples(data: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}


def _only(data: dict[str, Any], cls: type) -> None:
    unknown = sorted(set(data) - {field.name for field in dataclasses.fields(cls)})
    if unknown:
        raise GraphError(f"The JSON of a {cls.__name__} has unknown fields: {', '.join(unknown)}.")
