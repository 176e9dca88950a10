# SPDX-License-Identifier: Apache-2.0
"""A float64 interpreter of exported μGraphs: the oracle between an op's definition and its kernel.

It does what the graph says and nothing more clever: for each block of the grid it cuts tiles by the tile maps, runs
the for-loop, accumulates, runs what comes after the loop and stores by the output map. A wrong tile map, for-loop dim
or accumulator therefore gives a wrong result here, as it would on the GPU.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from mirage_codegen.mugraph import (
    ACCUM_MEAN,
    ACCUM_NO_RED,
    ACCUM_RMS,
    ACCUMULATE,
    ACCUMULATORS,
    AFTER_LOOP,
    LOOP,
    ONCE,
    REPLICATE,
    BlockGraph,
    BlockOperator,
    GraphError,
    KernelOperator,
    MuGraph,
)

Array = npt.NDArray[np.float64]

_ELEMENTWISE: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "mul": np.multiply,
    "div": np.divide,
    "exp": np.exp,
    "square": np.square,
    "sqrt": np.sqrt,
    "silu": lambda x: x * 0.5 * (1.0 + np.tanh(0.5 * x)),  # x / (1 + exp(-x)) without its overflow
}


def interpret(graph: MuGraph, arguments: Mapping[str, npt.ArrayLike], scalars: Mapping[str, float] | None = None) -> dict[str, Array]:
    """Run a μGraph in float64; returns its outputs by name.

    arguments: an array for each of graph.arguments, as it lies in memory: row-major tensors as they are, a weight
        [K, N] with strides (1, K) as the [N, K] array that vLLM holds, a source of views as one array.
    scalars: the runtime scalars by name, here eps.
    GraphError for a missing or wrongly sized argument, and when the graph leaves an output element unwritten.
    """
    device = {tensor.name: _input_array(graph, tensor.name, arguments) for tensor in graph.inputs}
    for operator in graph.operators:
        if operator.kind == "customized":
            device.update(_run_customized(graph, operator, device, scalars or {}))
        elif operator.kind in _ELEMENTWISE:
            device[operator.outputs[0]] = _ELEMENTWISE[operator.kind](*(device[name] for name in operator.inputs))
    return {tensor.name: device[tensor.name] for tensor in graph.outputs}


def _input_array(graph: MuGraph, name: str, arguments: Mapping[str, npt.ArrayLike]) -> Array:
    """The input as an array indexed by its dims, cut out of its argument's memory by its strides."""
    tensor = graph.tensor(name)
    argument, offset = graph.argument_of(name)
    if argument not in arguments:
        raise GraphError(f"{graph.name} needs the argument {argument}, got {', '.join(sorted(arguments))}.")
    memory = np.ascontiguousarray(arguments[argument], dtype=np.float64).reshape(-1)
    size = math.prod(tensor.dims)
    end = max(graph.argument_of(other.name)[1] + math.prod(other.dims) for other in graph.inputs_in(argument))
    if memory.size != end:
        raise GraphError(f"The argument {argument} has {memory.size} elements, expected {end}.")
    strides = [stride * memory.itemsize for stride in tensor.strides]
    return np.lib.stride_tricks.as_strided(memory[offset : offset + size], tensor.dims, strides, writeable=False)


def _run_customized(
    graph: MuGraph, operator: KernelOperator, device: Mapping[str, Array], scalars: Mapping[str, float]
) -> dict[str, Array]:
    block = operator.block_graph
    assert block is not None  # MuGraph.validate() ensures it
    outputs = {name: np.full(graph.tensor(name).dims, np.nan) for name in operator.outputs}
    written = {name: np.zeros(graph.tensor(name).dims, dtype=bool) for name in operator.outputs}
    for index in itertools.product(*(range(blocks) for blocks in block.grid_dim)):
        tiles = _Block(graph, block, index, device, scalars).run()
        for op in block.of_kind("output"):
            assert op.tensor is not None
            place = _place(op, block, index, 0, outputs[op.tensor].shape)
            outputs[op.tensor][place] = tiles[op.inputs[0]]
            written[op.tensor][place] = True
    for name, done in written.items():
        if not done.all():
            raise GraphError(f"{graph.name} leaves {done.size - done.sum()} of {done.size} elements of {name} unwritten.")
    return outputs


@dataclass
class _Block:
    """One thread block: its place in the grid, and the tiles it holds."""

    graph: MuGraph
    block: BlockGraph
    index: tuple[int, ...]
    device: Mapping[str, Array]
    scalars: Mapping[str, float]
    tiles: dict[str, Array] = field(default_factory=dict)
    sums: dict[str, Array] = field(default_factory=dict)

    def run(self) -> dict[str, Array]:
        """All tiles as they are when the block ends."""
        self._run_phase(ONCE, iteration=0)
        for iteration in range(self.block.forloop_range):
            self._run_phase(LOOP, iteration)
            for op in self.block.in_phase(ACCUMULATE):
                self._accumulate(op)
        for op in self.block.in_phase(ACCUMULATE):
            self._finish(op)
        self._run_phase(AFTER_LOOP, iteration=0)
        return self.tiles

    def _run_phase(self, phase: str, iteration: int) -> None:
        for op in self.block.in_phase(phase):
            if op.output is not None:
                self.tiles[op.output] = self._evaluate(op, iteration)

    def _evaluate(self, op: BlockOperator, iteration: int) -> Array:
        if op.kind == "input":
            assert op.tensor is not None
            tensor = self.device[op.tensor]
            return tensor[_place(op, self.block, self.index, iteration, tensor.shape)]
        operands = [self.tiles[name] for name in op.inputs]
        if op.kind == "matmul":
            return operands[0] @ operands[1]
        return _ELEMENTWISE[op.kind](*operands)

    def _accumulate(self, op: BlockOperator) -> None:
        assert op.output is not None and op.kind in ACCUMULATORS
        tile = self.tiles[op.inputs[0]]
        if op.kind == ACCUM_RMS:
            tile = np.square(tile)
        if op.kind != ACCUM_NO_RED:
            tile = tile.sum(axis=-1, keepdims=True)
        self.sums[op.output] = self.sums.get(op.output, 0.0) + tile

    def _finish(self, op: BlockOperator) -> None:
        assert op.output is not None
        total = self.sums[op.output]
        if op.kind in (ACCUM_MEAN, ACCUM_RMS):
            total = total / (self.block.tile(op.inputs[0]).dims[-1] * self.block.forloop_range)
        if op.kind == ACCUM_RMS:
            total = np.sqrt(total + self._eps(op.output))
        self.tiles[op.output] = total

    def _eps(self, tile: str) -> float:
        argument = self.graph.eps_of(tile)
        if argument is None:
            return 0.0
        if argument not in self.scalars:
            raise GraphError(f"{self.graph.name} needs the scalar {argument}.")
        return self.scalars[argument]


def _place(op: BlockOperator, block: BlockGraph, index: tuple[int, ...], iteration: int, dims: tuple[int, ...]) -> tuple[slice, ...]:
    """Where in a device tensor of those dims the tile lies: the grid cuts first, the for-loop cuts the block's part."""
    assert op.grid_map is not None and op.forloop_dim is not None
    start, length = [0] * len(dims), list(dims)
    cuts = list(zip(op.grid_map, block.grid_dim, index, strict=True))
    cuts.append((op.forloop_dim, block.forloop_range, iteration))
    for dim, parts, part in cuts:
        if dim != REPLICATE:
            length[dim] //= parts
            start[dim] += part * length[dim]
    return tuple(slice(s, s + n) for s, n in zip(start, length, strict=True))
