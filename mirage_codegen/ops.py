# SPDX-License-Identifier: Apache-2.0
"""The fused ops as μGraphs.

Names in the graphs, with dims (M is the token capacity) and strides where they are not row-major:

    X      hidden states, or a projection's input        [M, K]
    R      residual stream                               [M, K], or [M, N] where it is added to the output
    S      X + R, the new residual stream                [M, K]
    G      γ, the norm's weight                          [1, K]
    W      a weight, in vLLM's place: [N, K] row-major   [K, N] with strides (1, K)
    O      the op's output                               [M, N]

Two things are said at the kernel level because Mirage 0.2.2 cannot say them inside the threadblock graph; our
lowering runs them in the same kernel all the same (MuGraph.prologue(), MuGraph.epilogue()):

- S = X + R: S is an output of the op, and a threadblock graph's outputs must come after the for-loop, while S exists
  tile by tile inside it.
- O = P + R of linear_residual: a tile that is loaded counts as "before accumulation", and Mirage refuses to combine
  it with a value from after the loop. Accumulating R would add it once per iteration.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirage_codegen.mirage_api import KernelGraph, ThreadblockGraph
from mirage_codegen.mugraph import REPLICATE, Annotations, MuGraph, RuntimeEps, View, column_major, row_major

GRAPHS_DIR = Path(__file__).parent / "graphs"
REPLICATED = (REPLICATE, REPLICATE, REPLICATE)
COLUMNS = (1, REPLICATE, REPLICATE)
"""Tile map: grid x splits the columns (dim 1)."""
ROWS = (0, REPLICATE, REPLICATE)
"""Tile map: grid x splits the rows (dim 0), a block for each token."""
GATE_UP = (View("W_gate", "W_gate_up"), View("W_up", "W_gate_up"))


@dataclass(frozen=True)
class Shape:
    """What an op is built for. n counts the columns of one weight (gate_up: I, not 2I)."""

    num_tokens: int
    k: int
    n: int
    grid: int
    forloop_range: int
    threads: int = 128
    dtype: str = "bf16"

    def block(self) -> ThreadblockGraph:
        """An empty threadblock graph on this schedule."""
        return ThreadblockGraph((self.grid, 1, 1), (self.threads, 1, 1), self.forloop_range)


def rms_norm_linear(shape: Shape, *, residual: bool = True) -> KernelGraph:
    """O = rms_norm(X + R)·γ @ W and S = X + R; without residual O = rms_norm(X)·γ @ W.

    The division by the rms moves behind the matmul, where it is one division per output instead of one per input:
    (s·γ / rms) @ W = ((s·γ) @ W) / rms, because rms is one number per token.
    """
    name = "rms_norm_linear" if residual else "rms_norm_linear_first"
    graph = KernelGraph(name, Annotations(eps=(RuntimeEps("rms", "eps"),)))
    stream = _residual_stream(graph, shape) if residual else _activations(graph, "X", shape.num_tokens, shape.k, shape)
    gamma = _activations(graph, "G", 1, shape.k, shape)
    weight = _weight(graph, "W", shape)
    block = shape.block()
    normed, rms_input = _scaled_by_gamma(block, stream, gamma)
    w = block.new_input("w", weight, COLUMNS, forloop_dim=0)
    product = block.forloop_accum("acc", block.matmul("product", normed, w))
    rms = block.forloop_accum("rms", rms_input, "rms")
    block.new_output("O", block.div("out", product, rms), COLUMNS)
    graph.customized([stream, gamma, weight], block)
    graph.mark_output("O", row_major((shape.num_tokens, shape.n)))
    if residual:
        graph.mark_output(stream, row_major((shape.num_tokens, shape.k)))
    return graph


def rms_norm(shape: Shape, *, residual: bool = True) -> KernelGraph:
    """O = rms_norm(X + R)·γ and S = X + R, a block for each token; without residual O = rms_norm(X)·γ.

    With `linear` behind it, the same op as rms_norm_linear in two kernels: every block of that one repeats the norm of
    all tokens, which stops paying as tokens grow. There is no matmul, so shape.n does not count.
    """
    name = "rms_norm" if residual else "rms_norm_first"
    graph = KernelGraph(name, Annotations(eps=(RuntimeEps("rms", "eps"),)))
    stream = _residual_stream(graph, shape) if residual else _activations(graph, "X", shape.num_tokens, shape.k, shape)
    gamma = _activations(graph, "G", 1, shape.k, shape)
    block = shape.block()
    s = block.new_input("s", stream, ROWS, forloop_dim=REPLICATE)
    g = block.new_input("g", gamma, REPLICATED, forloop_dim=REPLICATE)
    scaled = block.forloop_accum("acc", block.mul("s_scaled", s, g))
    rms = block.forloop_accum("rms", s, "rms")
    block.new_output("O", block.div("out", scaled, rms), ROWS)
    graph.customized([stream, gamma], block)
    graph.mark_output("O", row_major((shape.num_tokens, shape.k)))
    if residual:
        graph.mark_output(stream, row_major((shape.num_tokens, shape.k)))
    return graph


def rms_norm_gate_up_silu(shape: Shape, *, residual: bool = True) -> KernelGraph:
    """O = silu(h @ W_gate)·(h @ W_up) with h = rms_norm(X + R)·γ, and S = X + R; without residual h = rms_norm(X)·γ.

    vLLM holds gate and up in one parameter W_gate_up [2I, K], the I gate rows first. A block needs the gate and the up
    rows of the same columns, two tiles that lie I rows apart; a tile map cuts one tensor into equal consecutive parts
    and cannot say that. So they are two inputs of the graph, annotated as the two halves of W_gate_up.
    """
    name = "rms_norm_gate_up_silu" if residual else "rms_norm_gate_up_silu_first"
    graph = KernelGraph(name, Annotations(eps=(RuntimeEps("rms", "eps"),), views=GATE_UP))
    stream = _residual_stream(graph, shape) if residual else _activations(graph, "X", shape.num_tokens, shape.k, shape)
    gamma = _activations(graph, "G", 1, shape.k, shape)
    weights = _gate_up_weights(graph, shape)
    block = shape.block()
    normed, rms_input = _scaled_by_gamma(block, stream, gamma)
    accumulated = _gate_up(block, normed, weights)
    rms = block.forloop_accum("rms", rms_input, "rms")
    gate, up = (block.div(part, acc, rms) for part, acc in zip(("gate", "up"), accumulated, strict=True))
    block.new_output("O", block.mul("out", block.silu("gate_silu", gate), up), COLUMNS)
    graph.customized([stream, gamma, *weights], block)
    graph.mark_output("O", row_major((shape.num_tokens, shape.n)))
    if residual:
        graph.mark_output(stream, row_major((shape.num_tokens, shape.k)))
    return graph


def gate_up_silu(shape: Shape) -> KernelGraph:
    """O = silu(X @ W_gate)·(X @ W_up): rms_norm_gate_up_silu behind a norm kernel of its own."""
    graph = KernelGraph("gate_up_silu", Annotations(views=GATE_UP))
    x = _activations(graph, "X", shape.num_tokens, shape.k, shape)
    weights = _gate_up_weights(graph, shape)
    block = shape.block()
    gate, up = _gate_up(block, block.new_input("x", x, REPLICATED, forloop_dim=1), weights)
    block.new_output("O", block.mul("out", block.silu("gate_silu", gate), up), COLUMNS)
    graph.customized([x, *weights], block)
    graph.mark_output("O", row_major((shape.num_tokens, shape.n)))
    return graph


def linear_residual(shape: Shape, *, residual: bool = True) -> KernelGraph:
    """O = X @ W + R, R [M, N]; without residual (tensor parallel adds it after the all-reduce) O = X @ W."""
    graph = KernelGraph("linear_residual" if residual else "linear")
    x = _activations(graph, "X", shape.num_tokens, shape.k, shape)
    weight = _weight(graph, "W", shape)
    block = shape.block()
    tiles = block.new_input("x", x, REPLICATED, forloop_dim=1), block.new_input("w", weight, COLUMNS, forloop_dim=0)
    block.new_output("P" if residual else "O", block.forloop_accum("acc", block.matmul("product", *tiles)), COLUMNS)
    graph.customized([x, weight], block)
    if residual:
        graph.add("O", "P", _activations(graph, "R", shape.num_tokens, shape.n, shape))
    graph.mark_output("O", row_major((shape.num_tokens, shape.n)))
    return graph


def _gate_up_weights(graph: KernelGraph, shape: Shape) -> list[str]:
    return [_weight(graph, view.tensor, shape) for view in GATE_UP]


def _gate_up(block: ThreadblockGraph, operand: str, weights: list[str]) -> list[str]:
    """The accumulated products of the operand with the gate and the up weights."""
    accumulated = []
    for part, weight in zip(("gate", "up"), weights, strict=True):
        w = block.new_input(f"w_{part}", weight, COLUMNS, forloop_dim=0)
        accumulated.append(block.forloop_accum(f"acc_{part}", block.matmul(f"product_{part}", operand, w)))
    return accumulated


def _residual_stream(graph: KernelGraph, shape: Shape) -> str:
    x, r = (_activations(graph, name, shape.num_tokens, shape.k, shape) for name in ("X", "R"))
    return graph.add("S", x, r)


def _activations(graph: KernelGraph, name: str, rows: int, columns: int, shape: Shape) -> str:
    return graph.new_input(name, (rows, columns), row_major((rows, columns)), shape.dtype)


def _weight(graph: KernelGraph, name: str, shape: Shape) -> str:
    return graph.new_input(name, (shape.k, shape.n), column_major((shape.k, shape.n)), shape.dtype)


def _scaled_by_gamma(block: ThreadblockGraph, stream: str, gamma: str) -> tuple[str, str]:
    """The tile s·γ, and the tile s itself, which the rms is taken of. Every block holds all K columns."""
    s = block.new_input("s", stream, REPLICATED, forloop_dim=1)
    g = block.new_input("g", gamma, REPLICATED, forloop_dim=1)
    return block.mul("s_scaled", s, g), s


# The stored graphs

Builder = Callable[[Shape], KernelGraph]

OPS: dict[str, Builder] = {
    "rms_norm_linear": rms_norm_linear,
    "rms_norm_linear_first": lambda shape: rms_norm_linear(shape, residual=False),
    "rms_norm": rms_norm,
    "rms_norm_first": lambda shape: rms_norm(shape, residual=False),
    "rms_norm_gate_up_silu": rms_norm_gate_up_silu,
    "rms_norm_gate_up_silu_first": lambda shape: rms_norm_gate_up_silu(shape, residual=False),
    "gate_up_silu": gate_up_silu,
    "linear_residual": linear_residual,
    "linear": lambda shape: linear_residual(shape, residual=False),
}

CANONICAL: dict[str, Shape] = {
    # Qwen3-8B's projections: qkv, qkv of the first layer, gate_up, o_proj, and o_proj's tensor-parallel half.
    "rms_norm_linear": Shape(16, 4096, 6144, grid=128, forloop_range=16),
    "rms_norm_linear_first": Shape(16, 4096, 6144, grid=128, forloop_range=16),
    "rms_norm": Shape(16, 4096, 4096, grid=16, forloop_range=1),
    "rms_norm_first": Shape(16, 4096, 4096, grid=16, forloop_range=1),
    "rms_norm_gate_up_silu": Shape(16, 4096, 12288, grid=128, forloop_range=32),
    "rms_norm_gate_up_silu_first": Shape(16, 4096, 12288, grid=128, forloop_range=32),
    "gate_up_silu": Shape(16, 4096, 12288, grid=128, forloop_range=32),
    "linear_residual": Shape(16, 4096, 4096, grid=128, forloop_range=16),
    "linear": Shape(16, 2048, 4096, grid=128, forloop_range=16),
}
"""The shape that each op's stored graph has; MuGraph.resized() makes the others of it, without Mirage."""


def load(op: str) -> MuGraph:
    """The stored graph of an op, as Mirage exported it for its canonical shape."""
    return MuGraph.from_json((GRAPHS_DIR / f"{op}.json").read_text())


def load_for(op: str, shape: Shape) -> MuGraph:
    """An op's graph for another shape, from the stored one. GraphError when the tiles do not divide."""
    graph = load(op).with_dtype(shape.dtype)
    return graph.resized(
        num_tokens=shape.num_tokens,
        k=shape.k,
        n=shape.n,
        grid=(shape.grid, 1, 1),
        threads=shape.threads,
        forloop_range=shape.forloop_range,
    )


def export_all() -> dict[str, str]:
    """The JSON of every op's canonical graph by file name, built by Mirage now. MirageError if Mirage is missing."""
    return {f"{op}.json": OPS[op](CANONICAL[op]).export().graph.to_json() for op in OPS}


def stale_graphs() -> list[str]:
    """One sentence for each stored graph that is not what Mirage makes of ops.py, or that nothing makes."""
    fresh = export_all()
    stored = {path.name: path.read_text() for path in GRAPHS_DIR.glob("*.json")}
    return [
        f"mirage_codegen/graphs/{name} {_difference(name, stored, fresh)}: run python -m mirage_codegen graphs."
        for name in sorted(fresh.keys() | stored.keys())
        if stored.get(name) != fresh.get(name)
    ]


def _difference(name: str, stored: dict[str, Any], fresh: dict[str, Any]) -> str:
    if name not in stored:
        return "is missing"
    return "differs from what Mirage exports" if name in fresh else "belongs to no op"


def write_graphs() -> list[Path]:
    """Rebuild every stored graph with Mirage; returns the files written."""
    GRAPHS_DIR.mkdir(exist_ok=True)
    written = []
    for name, text in export_all().items():
        (GRAPHS_DIR / name).write_text(text)
        written.append(GRAPHS_DIR / name)
    return written
