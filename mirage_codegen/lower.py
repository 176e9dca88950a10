# SPDX-License-Identifier: Apache-2.0
"""Lowers a μGraph to CUDA: operators become the kernel's body, tile maps and loop become its schedule.

Two forms of kernel come out, both over the device runtime `mirage_runtime.cuh`:

    GEMM   prologue → skinny GEMM → epilogue. The prologue is everything elementwise between the graph's inputs and the left operand
           of its matmuls, at the kernel level (S = X + R) or in the loop (s·γ); the epilogue is everything after the loop.
           The runtime multiplies by mma or, for one or two tokens, by FMAs; the plan says which.
    row    no matmul: each block holds whole rows of its inputs (the grid splits the tokens). A GEMM kernel reads what comes out, so it
           lies in that kernel's tiles (`tiled_index` of the runtime), and further blocks may ask that kernel's weights into L2
           (`warm_next_weights`): their address is an argument that no operator reads.

The body depends on the operators alone. Every length (K, N, grid, for-loop range, …) is a macro that the plan binds when the kernel is
compiled, so one source serves all shapes; `defines()` says what a graph's own dims, tile maps and loop bind them to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from mirage_codegen.mugraph import (
    ACCUM_NO_RED,
    ACCUM_RMS,
    BINARY,
    REPLICATE,
    UNARY,
    BlockGraph,
    BlockOperator,
    MuGraph,
    Tensor,
)

REPLICATED = (REPLICATE, REPLICATE, REPLICATE)
ROWS_OVER_GRID = (0, REPLICATE, REPLICATE)
COLUMNS_OVER_GRID = (1, REPLICATE, REPLICATE)
FORMULAS = {
    "add": "{0} + {1}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "exp": "expf({0})",
    "silu": "silu({0})",
    "square": "{0} * {0}",
    "sqrt": "sqrtf({0})",
}


NEXT_WEIGHTS = "next_weights"  # of the kernel behind a row kernel


class LoweringError(ValueError):
    """A μGraph that no form of kernel can run; the message is one sentence with the operator at fault."""


@dataclass(frozen=True)
class Kernel:
    """A lowered op: CUDA text, its entry, and the names of its arguments in the order of its parameter struct.

    Arguments are the graph's inputs and outputs under their names there, a row kernel's NEXT_WEIGHTS, then `num_tokens` (int) and, where
    the graph needs one, the runtime arguments of its annotations (`eps`, float).
    """

    name: str
    source: str
    arguments: tuple[str, ...]


def defines(graph: MuGraph) -> dict[str, int]:
    """The schedule macros that the graph itself decides; a plan adds the lowering's own (cluster, warps, stages, …), and may give some
    blocks a pair of rows less, which a graph, whose blocks are all of one size, cannot say."""
    block = graph.block_graph
    if not block.of_kind("matmul"):
        return {"MIRAGE_K": graph.tensor(_Row(graph).activations[0]).dims[1]}
    _check_gemm_maps(graph)
    schedule = graph.schedule()
    return {
        "MIRAGE_K": schedule.k,
        "MIRAGE_N": schedule.n,
        "MIRAGE_TOKENS": schedule.num_tokens,
        "MIRAGE_GRID": schedule.grid[0],
        "MIRAGE_FORLOOP": schedule.forloop_range,
    }


def lower(graph: MuGraph) -> Kernel:
    """The CUDA kernel of a μGraph. LoweringError where it is neither of the two forms."""
    graph.validate()
    form: _Gemm | _Row = _Gemm(graph) if graph.block_graph.of_kind("matmul") else _Row(graph)
    tensors = (*(t.name for t in graph.outputs), *graph.arguments, *((NEXT_WEIGHTS,) if isinstance(form, _Row) else ()))
    arguments = (*tensors, "num_tokens", *sorted({e.argument for e in graph.annotations.eps}))
    struct = [_field(graph, name) for name in arguments]
    lines = [
        "// SPDX-License-Identifier: Apache-2.0",
        f"// Generated from the μGraph {graph.name} by `python -m mirage_codegen generate`; not to be edited.",
        *_describe(graph),
        '#include "mirage_runtime.cuh"',
        "",
        "struct Arguments {",
        *(f"  {line};" for line in struct),
        "};",
        "",
        *form.lines(),
    ]
    return Kernel(graph.name, "\n".join(lines) + "\n", arguments)


def _field(graph: MuGraph, name: str) -> str:
    if name == "num_tokens":
        return "int num_tokens"
    if name in {item.argument for item in graph.annotations.eps}:
        return f"float {name}"
    return f"void *{name}" if name in {tensor.name for tensor in graph.outputs} else f"void const *{name}"


def _describe(graph: MuGraph) -> Iterator[str]:
    """The graph's operators as comments, a line each."""
    for op in graph.operators:
        if op.block_graph is None:
            if op.kind in (*UNARY, *BINARY):
                yield f"//   {op.outputs[0]} = {op.kind}({', '.join(op.inputs)})"
            continue
        yield f"//   {', '.join(op.outputs)} = for each block and iteration:"
        for inner in op.block_graph.operators:
            target = inner.output or inner.tensor
            sources = inner.inputs or (inner.tensor or "",)
            yield f"//     {target} = {inner.kind}({', '.join(sources)})"


def _check_map(op: BlockOperator, grid_map: tuple[int, int, int], forloop_dim: int, what: str) -> None:
    if (op.grid_map, op.forloop_dim) != (grid_map, forloop_dim):
        raise LoweringError(
            f"The {what} {op.tensor} is tiled by grid {op.grid_map} and loop {op.forloop_dim}, expected {grid_map} and {forloop_dim}."
        )


def _check_gemm_maps(graph: MuGraph) -> None:
    block = graph.block_graph
    weights = block.weights()
    for op in block.of_kind("input"):
        if op in weights:
            _check_map(op, COLUMNS_OVER_GRID, 0, "weight")
        else:
            _check_map(op, REPLICATED, 1, "activation")
    for op in block.of_kind("output"):
        _check_map(op, COLUMNS_OVER_GRID, REPLICATE, "output")
    if block.grid_dim[1:] != (1, 1):
        raise LoweringError(f"The grid of {graph.name} is {block.grid_dim}, expected its columns along x alone.")


def _launch_shape(blocks: str, blocks_of_token: int, cluster: str) -> Iterator[str]:
    """The numbers of a launch, readable from the cubin: the loader needs no second copy of them."""
    yield 'extern "C" __device__ const int mirage_launch_shape[5] = {'
    yield f"    {blocks}, {blocks_of_token}, Plan::THREADS, {cluster}, Plan::SHARED_BYTES}};"


@dataclass
class _Values:
    """Values by name as C expressions, and the statements that compute them, each once.

    `inverses` are numbers of a row of which the reciprocal `inverse_NAME` is at hand: a division by one is a product.
    """

    expression: dict[str, str] = field(default_factory=dict)
    statements: list[str] = field(default_factory=list)
    inverses: frozenset[str] = frozenset()

    def compute(self, name: str, kind: str, sources: tuple[str, ...]) -> None:
        if kind == "div" and sources[1] in self.inverses:
            formula = f"{self.expression[sources[0]]} * inverse_{sources[1]}"
        else:
            formula = FORMULAS[kind].format(*(self.expression[source] for source in sources))
        self.statements.append(f"const float {name} = {formula};")
        self.expression[name] = name


def _is_vector(tensor: Tensor) -> bool:
    """A weight vector [1, K], as against an activation [num_tokens, K]."""
    return tensor.dims[0] == 1


class _Prologue:
    """The elementwise operators between the graph's inputs and the tiles that its loop uses."""

    def __init__(self, graph: MuGraph):
        self.graph, self.block = graph, graph.block_graph
        weights = {op.tensor for op in self.block.weights()}
        self.kernel_level = graph.prologue()
        leaves: list[str] = []
        for op in self.block.of_kind("input"):
            assert op.tensor is not None
            if op.tensor not in weights:
                leaves += [leaf for leaf in self._leaves(op.tensor) if leaf not in leaves]
        self.activations = [leaf for leaf in leaves if not _is_vector(graph.tensor(leaf))]
        self.vectors = [leaf for leaf in leaves if _is_vector(graph.tensor(leaf))]

    def _leaves(self, tensor: str) -> Iterator[str]:
        producer = self.graph.producer(tensor)
        if producer.kind == "input":
            yield tensor
        elif producer.kind in (*UNARY, *BINARY):
            for source in producer.inputs:
                yield from self._leaves(source)
        else:
            raise LoweringError(f"The prologue of {self.graph.name} needs {tensor}, which a {producer.kind} operator makes.")

    def values(self, index: str) -> _Values:
        """Every tile of the loop as an expression of element `index` of the inputs (arrays under their names)."""
        values = _Values({leaf: f"{leaf}[{index}]" for leaf in (*self.activations, *self.vectors)})
        for op in self.kernel_level:
            values.compute(op.outputs[0], op.kind, op.inputs)
        for inner in self.block.in_phase("once", "loop"):
            if inner.kind == "input" and inner not in self.block.weights():
                assert inner.output is not None and inner.tensor is not None
                values.expression[inner.output] = values.expression[inner.tensor]
            elif inner.kind in (*UNARY, *BINARY):
                assert inner.output is not None
                values.compute(inner.output, inner.kind, inner.inputs)
        return values

    @property
    def stored(self) -> list[str]:
        """Outputs of the graph that the prologue makes, such as the new residual stream."""
        made = {op.outputs[0] for op in self.kernel_level}
        return [tensor.name for tensor in self.graph.outputs if tensor.name in made]

    @property
    def row_sums(self) -> list[BlockOperator]:
        """The accumulators over whole rows, each a sum of squares."""
        return list(self.block.of_kind(ACCUM_RMS))

    def rms_lines(self, op: BlockOperator, total: str) -> Iterator[str]:
        """The rms of a row and its reciprocal, `total` being the sum of squares."""
        assert op.output is not None
        eps = self.graph.eps_of(op.output)
        yield f"const float square_of_{op.output} = {total} * (1.0f / Plan::K){f' + args.{eps}' if eps else ''};"
        if self._uses(op.output):
            yield f"const float {op.output} = sqrtf(square_of_{op.output});"
        yield f"const float inverse_{op.output} = inverse_sqrt(square_of_{op.output});"

    def _uses(self, rms: str) -> bool:
        """Whether anything but a division by it needs the rms."""
        users = [inner for inner in self.block.in_phase("after_loop") if rms in inner.inputs]
        return any((inner.kind, inner.inputs.index(rms)) != ("div", 1) for inner in users)

    def after_loop(self, known: dict[str, str]) -> _Values:
        """The threadblock graph's operators after the loop, from the accumulators in `known`."""
        rms = {op.output or "" for op in self.row_sums}
        values = _Values({**known, **{name: name for name in rms}}, inverses=frozenset(rms))
        for inner in self.block.in_phase("after_loop"):
            if inner.kind in FORMULAS:
                values.compute(inner.output or "", inner.kind, inner.inputs)
        return values


def _accumulators_known(graph: MuGraph, block: BlockGraph) -> None:
    for op in block.in_phase("accumulate"):
        if op.kind not in (ACCUM_NO_RED, ACCUM_RMS):
            raise LoweringError(f"The operator {op.kind} of {graph.name} has no lowering yet.")


class _Gemm:
    """prologue → skinny GEMM → epilogue"""

    def __init__(self, graph: MuGraph):
        _check_gemm_maps(graph)
        _accumulators_known(graph, graph.block_graph)
        self.graph, self.block, self.prologue = graph, graph.block_graph, _Prologue(graph)
        self.matmuls = self.block.of_kind("matmul")
        left = {op.inputs[0] for op in self.matmuls}
        if len(left) != 1:
            raise LoweringError(f"The matmuls of {graph.name} have {len(left)} left operands, expected one.")
        self.operand = left.pop()
        places = [graph.argument_of(self._weight_tensor(op)) for op in self.matmuls]
        size = graph.schedule().k * graph.schedule().n
        if places != [(places[0][0], i * size) for i in range(len(places))]:
            raise LoweringError(f"The weights of {graph.name} lie at {places}, expected one behind the other in one tensor.")
        self.weight = places[0][0]
        # inputs of the epilogue, such as the residual stream
        self.late = [name for op in graph.epilogue() for name in op.inputs if graph.producer(name).kind == "input"]

    def _weight_tensor(self, matmul: BlockOperator) -> str:
        tensor = self.block.producer(matmul.inputs[1]).tensor
        assert tensor is not None
        return tensor

    def lines(self) -> Iterator[str]:
        name, p = self.graph.name, self.prologue
        counts = f"{len(self.matmuls)}, {len(p.activations)}, {len(p.vectors)}, {len(p.row_sums)}"
        yield "using Plan = mirage::Schedule<MIRAGE_K, MIRAGE_N, MIRAGE_TOKENS, MIRAGE_GRID, MIRAGE_FORLOOP, MIRAGE_CLUSTER, MIRAGE_WARPS,"
        yield "                              MIRAGE_STAGES, MIRAGE_EARLY, MIRAGE_PREFETCH, MIRAGE_BUFFERED, MIRAGE_TILED, MIRAGE_LINES,"
        yield f"                              MIRAGE_PIPELINED, MIRAGE_GEMV, {counts}>;"
        yield ""
        yield from _launch_shape("Plan::GRID * Plan::CLUSTER", 0, "Plan::CLUSTER")
        yield ""
        yield f'extern "C" __global__ void __launch_bounds__(Plan::THREADS, MIRAGE_OCCUPANCY) {name}(Arguments args) {{'
        yield "  using namespace mirage;"
        yield "  MIRAGE_SHARED(shared);"
        yield "  const Position<Plan> at;"
        yield "  if (Plan::CLUSTER > 1) cluster_arrive();"
        yield f"  Gemm<Plan> gemm(args.{self.weight}, shared, at);"
        yield f"  gemm.start_early(args.{self.weight}, at);"
        yield "  release_next_kernel();"
        yield "  wait_for_previous_kernel();"
        for tensor in self.late:
            yield f"  const LateInput<Plan> {tensor}_late(at, args.{tensor}, args.num_tokens);"
        yield from self._load_step()
        yield from self._prologue()
        yield from self._after_prologue()
        yield "  gemm.run(load_step, prologue, after_prologue);"
        yield from self._finish()
        yield "}"

    def _load_step(self) -> Iterator[str]:
        p = self.prologue
        yield "  auto load_step = [&](int step, Fragments<Plan> &f) {"
        for i, vector in enumerate(p.vectors):
            yield f"    f.vector[{i}] = load_vector<Plan>(at, args.{vector}, step);"
        yield "    MIRAGE_UNROLL"
        yield "    for (int c = 0; c < Plan::TOKEN_TILES; ++c) {"
        for i, tensor in enumerate(p.activations):
            yield f"      f.input[{i}][c] = load_input<Plan>(at, args.{tensor}, args.num_tokens, c, step);"
        yield "    }"
        yield "  };"

    def _prologue(self) -> Iterator[str]:
        p = self.prologue
        for i, _ in enumerate(p.row_sums):
            yield f"  float sum_{i}[Plan::TOKEN_TILES][Plan::GROUP] = {{}};"
        values = p.values("e")
        operand = values.expression[self.operand]
        if not p.row_sums and not p.stored and operand == f"{p.activations[0]}[e]":  # nothing to compute: the fragment is the operand
            yield "  auto prologue = [&](int, int c, Fragments<Plan> const &f) { return f.input[0][c]; };"
            return
        yield "  auto prologue = [&](int step, int c, Fragments<Plan> const &f) {"
        arrays = [*p.activations, *p.vectors, *(f"{name}_out" for name in p.stored), "operand"]
        yield f"    float {', '.join(f'{name}[kVector]' for name in arrays)};"
        for i, tensor in enumerate(p.activations):
            yield f"    unpack(f.input[{i}][c], {tensor});"
        for i, vector in enumerate(p.vectors):
            yield f"    unpack(f.vector[{i}], {vector});"
        yield "    MIRAGE_UNROLL"
        yield "    for (int e = 0; e < kVector; ++e) {"
        yield from (f"      {statement}" for statement in values.statements)
        for i, op in enumerate(p.row_sums):
            value = values.expression[op.inputs[0]]
            yield f"      sum_{i}[c][step % Plan::GROUP] += {value} * {value};"
        for name in p.stored:
            yield f"      {name}_out[e] = {name};"
        yield f"      operand[e] = {operand};"
        yield "    }"
        for name in p.stored:
            yield f"    store_output<Plan>(at, args.{name}, args.num_tokens, c, step, {name}_out);"
        yield "    return pack(operand);"
        yield "  };"

    def _after_prologue(self) -> Iterator[str]:
        yield "  auto after_prologue = [&] {"
        yield "    if (Plan::CLUSTER > 1) cluster_wait();  // the other blocks have started: their shared memory may be written"
        for i, _ in enumerate(self.prologue.row_sums):
            yield "    MIRAGE_UNROLL"
            yield f"    for (int c = 0; c < Plan::TOKEN_TILES; ++c) store_row_sum<Plan>(shared, at, {i}, c, sum_{i}[c]);"
        yield "  };"

    def _finish(self) -> Iterator[str]:
        block, graph = self.block, self.graph
        yield f"  gemm.finish(shared, at, args.num_tokens, [&](int token, int n, float (&acc)[{len(self.matmuls)}][2]) {{"
        for i, op in enumerate(self.prologue.row_sums):
            yield from (f"    {line}" for line in self.prologue.rms_lines(op, f"row_sum<Plan>(shared, {i}, token)"))
        for tensor in self.late:
            yield f"    const uint32_t {tensor}_pair = {tensor}_late.pair(at, args.{tensor}, token, n);"
        (output,) = block.of_kind("output")
        result = [tensor.name for tensor in graph.outputs if tensor.name not in self.prologue.stored]
        if len(result) != 1:
            raise LoweringError(f"{graph.name} has {len(result)} outputs after its matmul, expected one.")
        yield "    float result[2];"
        yield "    MIRAGE_UNROLL"
        yield "    for (int j = 0; j < 2; ++j) {"
        accumulated = {}
        for i, op in enumerate(self.matmuls):
            (accumulator,) = block.consumers(op.output or "")
            if accumulator.kind != ACCUM_NO_RED:
                raise LoweringError(f"The matmul {op.output} is accumulated by {accumulator.kind}, expected {ACCUM_NO_RED}.")
            accumulated[accumulator.output or ""] = f"acc[{i}][j]"
        values = self.prologue.after_loop(accumulated)
        values.expression[output.tensor or ""] = values.expression[output.inputs[0]]
        for tensor in self.late:
            values.expression[tensor] = f"(j == 0 ? low_to_float({tensor}_pair) : high_to_float({tensor}_pair))"
        for outer in graph.epilogue():
            values.compute(outer.outputs[0], outer.kind, outer.inputs)
        yield from (f"      {statement}" for statement in values.statements)
        yield f"      result[j] = {values.expression[result[0]]};"
        yield "    }"
        yield f"    store_global(element(args.{result[0]}, static_cast<uint64_t>(token) * Plan::N + n), to_pair(result[0], result[1]));"
        yield "  });"


class _Row:
    """One block for each token: everything elementwise, with sums over the row. The loop has one iteration, the row."""

    def __init__(self, graph: MuGraph):
        block = graph.block_graph
        _accumulators_known(graph, block)
        self.graph, self.block, self.prologue = graph, block, _Prologue(graph)
        self.activations = self.prologue.activations
        if block.forloop_range != 1:
            raise LoweringError(f"{graph.name} has no matmul and a for-loop of {block.forloop_range}, expected 1.")
        for op in block.of_kind("input"):
            assert op.tensor is not None
            vector = _is_vector(graph.tensor(op.tensor))
            if op.grid_map != (REPLICATED if vector else ROWS_OVER_GRID):
                raise LoweringError(f"The input {op.tensor} is tiled by grid {op.grid_map}, expected a block for each token.")

    def lines(self) -> Iterator[str]:
        p = self.prologue
        yield "using Plan = mirage::RowSchedule<MIRAGE_K, MIRAGE_THREADS, MIRAGE_NEXT_ROWS, MIRAGE_WARM>;"
        yield ""
        yield from _launch_shape("Plan::WARM_BLOCKS", 1, "1")
        yield ""
        yield f'extern "C" __global__ void __launch_bounds__(Plan::THREADS) {self.graph.name}(Arguments args) {{'
        yield "  using namespace mirage;"
        yield "  MIRAGE_SHARED(shared);"
        yield "  release_next_kernel();"
        yield f"  if (warm_next_weights<Plan>(args.{NEXT_WEIGHTS}, args.num_tokens)) return;  // a block behind those of the tokens"
        yield "  wait_for_previous_kernel();"
        yield "  const uint64_t row = static_cast<uint64_t>(blockIdx.x) * Plan::K;"
        kept = self._kept()
        yield f"  float {', '.join(f'{name}_kept[Plan::VECTORS_PER_THREAD][kVector]' for name in kept)};"
        for i, _ in enumerate(p.row_sums):
            yield f"  float sum_{i} = 0.0f;"
        yield from self._first_pass(kept)
        for i, op in enumerate(p.row_sums):
            yield from (f"  {line}" for line in p.rms_lines(op, f"block_sum<Plan>(shared, sum_{i})"))
            if i + 1 < len(p.row_sums):
                yield "  block_barrier();"
        yield from self._second_pass()
        yield "}"

    def _kept(self) -> list[str]:
        """What the second pass needs of the first: the sources of the accumulators that are used after the loop."""
        return [op.inputs[0] for op in self.block.of_kind(ACCUM_NO_RED)]

    @staticmethod
    def _each_vector() -> Iterator[str]:
        yield "  MIRAGE_UNROLL"
        yield "  for (int v = 0; v < Plan::VECTORS_PER_THREAD; ++v) {"
        yield "    const int k = (v * Plan::THREADS + threadIdx.x) * kVector;"
        yield "    if (Plan::K % (Plan::THREADS * kVector) != 0 && k >= Plan::K) continue;"

    def _first_pass(self, kept: list[str]) -> Iterator[str]:
        p = self.prologue
        yield from self._each_vector()
        yield f"    float {', '.join(f'{name}[kVector]' for name in (*p.activations, *p.vectors, *(f'{name}_out' for name in p.stored)))};"
        for vector in p.vectors:
            yield f"    const Vec {vector}_fragment = load_global(element(args.{vector}, k));"
        for tensor in p.activations:
            yield f"    const Vec {tensor}_fragment = load_global(element(args.{tensor}, row + k));"
        for tensor in p.activations:
            yield f"    unpack({tensor}_fragment, {tensor});"
        for vector in p.vectors:
            yield f"    unpack({vector}_fragment, {vector});"
        yield "    MIRAGE_UNROLL"
        yield "    for (int e = 0; e < kVector; ++e) {"
        values = p.values("e")
        yield from (f"      {statement}" for statement in values.statements)
        for i, op in enumerate(p.row_sums):
            yield f"      sum_{i} += {values.expression[op.inputs[0]]} * {values.expression[op.inputs[0]]};"
        for name in kept:
            yield f"      {name}_kept[v][e] = {values.expression[name]};"
        for name in p.stored:
            yield f"      {name}_out[e] = {name};"
        yield "    }"
        for name in p.stored:
            yield f"    store_global(element(args.{name}, row + k), pack({name}_out));"
        yield "  }"

    def _second_pass(self) -> Iterator[str]:
        block = self.block
        (output,) = block.of_kind("output")
        values = self.prologue.after_loop({op.output or "": f"{op.inputs[0]}_kept[v][e]" for op in block.of_kind(ACCUM_NO_RED)})
        yield from self._each_vector()
        yield "    float result[kVector];"
        yield "    MIRAGE_UNROLL"
        yield "    for (int e = 0; e < kVector; ++e) {"
        yield from (f"      {statement}" for statement in values.statements)
        yield f"      result[e] = {values.expression[output.inputs[0]]};"
        yield "    }"
        yield f"    store_global(element(args.{output.tensor}, tiled_index(blockIdx.x, k, Plan::K)), pack(result));"
        yield "  }"
