# SPDX-License-Identifier: Apache-2.0
"""The adapter over mirage-project: records a μGraph, has Mirage build and check it, and exports what Mirage made.

Recording mirrors Mirage's Python API (new_input, matmul, forloop_accum, customized, mark_output, …), with a name for
each tensor, because Mirage itself knows only numbers. Nothing here imports Mirage: `KernelGraph.export()` replays the
recorded calls in a subprocess, because Mirage reports every error by a C++ assert that ends the process. There Mirage
checks shapes and shared memory while the graph is built, and transpiles it, and the structure that comes back is
Mirage's own (`get_graph_structure`), not the recording.

The interpreter that has Mirage is this one, or MIRAGE_PYTHON.

Versions: 0.2.2 (the registry's newest) and 0.2.4 (a checkout). What 0.2.4 changed for us:
    CyKNGraph.get_input_dtensor_layout(t) -> strides is now get_input_dtensor_shape_and_stride(t) -> (dims, strides)
    generate_cuda_program reports some failures by an `error_type` other than 0 beside empty code, not by an assert
    `import mirage` needs a working torch, where 0.2.2 only needs the name torch.float16
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirage_codegen import mugraph
from mirage_codegen.mugraph import Annotations, BlockGraph, BlockOperator, KernelOperator, MuGraph, Tensor, Tile

INSTALL_HINT = "install it with mirage_codegen/install_mirage.sh PYTHON"
TARGET_CC = 80
"""What Mirage transpiles for: 0.2.2 implements no newer one, and its sm_80 code compiles for sm_90 too."""

_ACCUMULATORS = {
    None: mugraph.ACCUM_NO_RED,
    "sum": mugraph.ACCUM_SUM,
    "mean": mugraph.ACCUM_MEAN,
    "rms": mugraph.ACCUM_RMS,
}


class MirageError(RuntimeError):
    """Mirage is missing, or refused a graph; the message is one sentence."""


@dataclass(frozen=True)
class Export:
    """What Mirage made of a recorded graph.

    source: the CUDA text of Mirage's own transpiler (for comparison; our kernels are lowered from `graph`)
    smem_bytes: the shared memory a block of that text needs
    buffer_bytes: the device memory that it wants for tensors between its kernels
    """

    graph: MuGraph
    mirage_version: str
    source: str
    smem_bytes: int
    buffer_bytes: int


class ThreadblockGraph:
    """Records a threadblock graph: Mirage's TBGraph, with tile names in the place of tile objects."""

    def __init__(
        self,
        grid_dim: tuple[int, int, int],
        block_dim: tuple[int, int, int],
        forloop_range: int,
        reduction_dimx: int = 64,
    ) -> None:
        self.header = {
            "grid_dim": grid_dim,
            "block_dim": block_dim,
            "forloop_range": forloop_range,
            "reduction_dimx": reduction_dimx,
        }
        self.calls: list[dict[str, Any]] = []

    def new_input(self, name: str, tensor: str, input_map: tuple[int, int, int], forloop_dim: int) -> str:
        """Load a tile of `tensor`; the map names for grid x, y, z the dim it splits, or -1."""
        return self._record("new_input", name, tensor=tensor, grid_map=input_map, forloop_dim=forloop_dim)

    def new_output(self, name: str, tile: str, output_map: tuple[int, int, int]) -> None:
        """Store `tile` into the new kernel-level tensor `name`."""
        self._record("new_output", name, inputs=(tile,), grid_map=output_map)

    def matmul(self, name: str, a: str, b: str) -> str:
        """a [M, K] times b [K, N]."""
        return self._record("matmul", name, inputs=(a, b))

    def add(self, name: str, a: str, b: str) -> str:
        """a + b, dims of 1 broadcast."""
        return self._record("add", name, inputs=(a, b))

    def mul(self, name: str, a: str, b: str) -> str:
        """a · b, dims of 1 broadcast."""
        return self._record("mul", name, inputs=(a, b))

    def div(self, name: str, a: str, b: str) -> str:
        """a / b, dims of 1 broadcast."""
        return self._record("div", name, inputs=(a, b))

    def silu(self, name: str, a: str) -> str:
        """a · sigmoid(a)."""
        return self._record("silu", name, inputs=(a,))

    def forloop_accum(self, name: str, a: str, acc: str | None = None) -> str:
        """Accumulate over the for-loop: None keeps the tile's dims; "sum", "mean" and "rms" reduce the last one."""
        if acc not in _ACCUMULATORS:
            raise MirageError(f"forloop_accum got acc={acc!r}, expected None, 'sum', 'mean' or 'rms'.")
        return self._record("forloop_accum", name, inputs=(a,), acc=acc)

    def _record(self, call: str, name: str, **fields: Any) -> str:
        self.calls.append({"call": call, "name": name, **fields})
        return name


class KernelGraph:
    """Records a kernel graph: Mirage's KNGraph, with tensor names in the place of tensor objects."""

    def __init__(self, name: str, annotations: Annotations | None = None) -> None:
        self.name = name
        self.annotations = annotations or Annotations()
        self.calls: list[dict[str, Any]] = []

    def new_input(self, name: str, dims: tuple[int, ...], strides: tuple[int, ...], dtype: str) -> str:
        """An input tensor; strides in elements, dense row-major or column-major."""
        return self._record("new_input", name, dims=dims, strides=strides, dtype=dtype)

    def add(self, name: str, a: str, b: str) -> str:
        """a + b, dims of 1 broadcast."""
        return self._record("add", name, inputs=(a, b))

    def customized(self, inputs: Sequence[str], block: ThreadblockGraph) -> None:
        """One kernel: `block` over `inputs`. Its outputs get the names given to new_output."""
        outputs = tuple(call["name"] for call in block.calls if call["call"] == "new_output")
        self._record("customized", "", inputs=tuple(inputs), outputs=outputs, header=block.header, calls=block.calls)

    def mark_output(self, tensor: str, strides: tuple[int, ...]) -> None:
        """Make `tensor` an output of the graph."""
        self._record("mark_output", tensor, strides=strides)

    def _record(self, call: str, name: str, **fields: Any) -> str:
        self.calls.append({"call": call, "name": name, **fields})
        return name

    def export(self) -> Export:
        """Build, check and transpile the graph with Mirage. MirageError when Mirage is missing or refuses it."""
        answer = _run_worker(self.name, {"calls": self.calls, "target_cc": TARGET_CC})
        graph = _graph_of(self, answer).validate()
        return Export(graph, answer["version"], answer["source"], answer["smem_bytes"], answer["buffer_bytes"])


# The parent's side: run the subprocess, turn Mirage's structure into a MuGraph


def mirage_version() -> str | None:
    """The version of the Mirage that export() would use, or None when there is none."""
    try:
        return _run_worker("version", None)["version"]
    except MirageError:
        return None


def _run_worker(name: str, request: dict[str, Any] | None) -> dict[str, Any]:
    python = os.environ.get("MIRAGE_PYTHON", sys.executable)
    root = Path(__file__).resolve().parents[1]
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    try:
        result = subprocess.run(
            [python, "-m", "mirage_codegen.mirage_api"],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
    except OSError as error:
        raise MirageError(f"The interpreter {python} does not run ({error}): set MIRAGE_PYTHON to one.") from error
    if result.returncode != 0:
        raise MirageError(_reason_of_death(name, result))
    answer = json.loads(result.stdout)
    if "missing" in answer:
        raise MirageError(answer["missing"])
    if "error" in answer:
        raise MirageError(f"Mirage refused {name}{_last_call(result.stderr)}: {answer['error']}.")
    return answer


def _reason_of_death(name: str, result: subprocess.CompletedProcess[str]) -> str:
    """One sentence with the call that Mirage was at and its assert, taken from what it printed before it aborted."""
    at = _last_call(result.stderr)
    found = re.search(r"([^\s:]+:\d+): .*?(Assertion .+ failed)", result.stderr)
    if found:
        where = re.sub(r"^.*?(src|include)/", r"\1/", found[1])
        return f"Mirage refused {name}{at}: {found[2]} ({where})."
    last_line = (result.stderr.strip().splitlines() or ["no message"])[-1]
    return f"Mirage ended with status {result.returncode} for {name}{at}: {last_line}"


def _last_call(stderr: str) -> str:
    calls = re.findall(r"^mirage_api: (.+)$", stderr, re.MULTILINE)
    return f" at {calls[-1]}" if calls else ""


def _graph_of(recorded: KernelGraph, answer: Mapping[str, Any]) -> MuGraph:
    """Mirage's exported structure under the recorded names; MirageError where it is not what was recorded."""
    names: dict[int, str] = {int(guid): name for guid, name in answer["names"].items()}
    calls = recorded.calls
    _check_same_operators(recorded.name, calls, answer["structure"])
    tensors: dict[str, Tensor] = {}
    operators = []
    for call, info in zip(calls, answer["structure"], strict=True):
        inputs, outputs = ([names[t["guid"]] for t in info[key]] for key in ("input_tensors", "output_tensors"))
        if call["call"] == "mark_output":
            outputs = []  # Mirage gives its output operator a tensor of its own, which nothing can read
        for name, tensor in zip(outputs, info["output_tensors"], strict=False):
            tensors[name] = _tensor_of(name, tuple(tensor["dim"]), answer)
        block = _block_graph_of(call, info["bgraph"], names) if call["call"] == "customized" else None
        operators.append(KernelOperator(_kind(info["op_type"]), tuple(inputs), tuple(outputs), block))
    return MuGraph(recorded.name, tuple(tensors.values()), tuple(operators), recorded.annotations)


def _tensor_of(name: str, dims: tuple[int, ...], answer: Mapping[str, Any]) -> Tensor:
    # Mirage gives strides to inputs and outputs; what lies between is row-major in its kernel-level convention.
    strides = answer["strides"].get(name, mugraph.row_major(dims))
    return Tensor(name, dims, tuple(strides), answer["dtypes"][name])


def _block_graph_of(call: Mapping[str, Any], info: Mapping[str, Any], names: Mapping[int, str]) -> BlockGraph:
    """Mirage copies a threadblock graph into the customized operator with new guids: its operators keep their order."""
    _check_same_operators("the threadblock graph", call["calls"], info["operators"])
    tile_names: dict[int, str] = {}
    tiles, operators = [], []
    for recorded, operator in zip(call["calls"], info["operators"], strict=True):
        for tensor in operator["output_tensors"]:
            tile_names[tensor["guid"]] = recorded["name"]
            tiles.append(Tile(recorded["name"], tuple(tensor["dim"])))
        operators.append(_block_operator_of(operator, tile_names, names))
    header = call["header"]
    return BlockGraph(
        grid_dim=_xyz(info["grid_dim"]),
        block_dim=tuple(header["block_dim"]),  # Mirage does not export the block
        forloop_range=info["forloop_range"],
        reduction_dimx=header["reduction_dimx"],
        tiles=tuple(tiles),
        operators=tuple(operators),
    )


def _block_operator_of(info: Mapping[str, Any], tile_names: Mapping[int, str], names: Mapping[int, str]) -> BlockOperator:
    grid_map = info.get("input_map", info.get("output_map"))
    outputs = [tile_names[t["guid"]] for t in info["output_tensors"]]
    return BlockOperator(
        kind=_kind(info["op_type"]),
        inputs=tuple(tile_names[t["guid"]] for t in info["input_tensors"]),
        output=outputs[0] if outputs else None,
        tensor=names[info["dtensor"]["guid"]] if grid_map else None,
        grid_map=_xyz(grid_map) if grid_map else None,
        forloop_dim=info.get("forloop_dim"),
    )


def _check_same_operators(what: str, calls: Sequence[Mapping[str, Any]], structure: Sequence[Mapping[str, Any]]) -> None:
    recorded = [_kind_of_call(call) for call in calls]
    exported = [_kind(info["op_type"]) for info in structure]
    if recorded != exported:
        raise MirageError(f"Mirage exported the operators {exported} for {what}, expected {recorded}.")


def _kind_of_call(call: Mapping[str, Any]) -> str:
    if call["call"] == "forloop_accum":
        return _ACCUMULATORS[call["acc"]]
    return {"new_input": "input", "new_output": "output", "mark_output": "output"}.get(call["call"], call["call"])


def _kind(op_type: str) -> str:
    return op_type.removeprefix("kn_").removeprefix("tb_").removesuffix("_op")


def _xyz(value: Mapping[str, int]) -> tuple[int, int, int]:
    return value["x"], value["y"], value["z"]


# The subprocess's side: the only code here that touches Mirage


class Mirage:
    """The installed mirage-project, 0.2.2 or 0.2.4, behind the calls of one version."""

    def __init__(self, module: Any, version: str) -> None:
        self.module = module
        self.version = version

    @staticmethod
    def load() -> Mirage:
        """Import Mirage. MirageError when it is not installed or does not load."""
        from importlib import metadata

        try:
            version = metadata.version("mirage-project")
        except metadata.PackageNotFoundError as error:
            raise MirageError(f"mirage-project is not installed for {sys.executable}: {INSTALL_HINT}.") from error
        if version == "0.2.2":
            # Its only use of torch at import is a default argument, and importing the real one takes seconds.
            from types import ModuleType

            torch = ModuleType("torch")
            torch.float16 = None  # type: ignore[attr-defined]
            sys.modules.setdefault("torch", torch)
        try:
            import mirage
        except ImportError as error:
            raise MirageError(f"mirage-project {version} does not load ({error}): {INSTALL_HINT}.") from error
        return Mirage(mirage, version)

    def input_strides(self, graph: Any) -> list[tuple[int, ...]]:
        """The strides of a kernel graph's inputs, in order."""
        cygraph = graph.cygraph
        tensors = cygraph.get_input_dtensors()
        if hasattr(cygraph, "get_input_dtensor_layout"):
            return [tuple(cygraph.get_input_dtensor_layout(tensor)) for tensor in tensors]
        return [tuple(cygraph.get_input_dtensor_shape_and_stride(tensor)[1]) for tensor in tensors]

    def transpile(self, graph: Any, target_cc: int) -> dict[str, Any]:
        """Mirage's CUDA text for a kernel graph, with `max_smem_size` and `output_directives`."""
        result = self.module.generate_cuda_program(graph.cygraph, target_cc=target_cc, input_strides=self.input_strides(graph))
        if result.get("error_type", 0) != 0 or not result["code"]:
            raise MirageError(f"The transpiler failed with error type {result.get('error_type')}")
        return result

    def dtype(self, name: str) -> Any:
        """Mirage's dtype object for bf16, fp16 or fp32."""
        return getattr(self.module, {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[name])


class _Replay:
    """Replays recorded calls on Mirage and collects what get_graph_structure leaves out."""

    def __init__(self, mirage: Mirage) -> None:
        self.mirage = mirage
        self.graph = mirage.module.new_kernel_graph()
        self.tensors: dict[str, Any] = {}
        self.outputs: dict[str, tuple[int, ...]] = {}

    def run(self, calls: Sequence[Mapping[str, Any]], target_cc: int) -> dict[str, Any]:
        for call in calls:
            _progress(call)
            self._kernel_call(call)
        names = {tensor.guid: name for name, tensor in self.tensors.items()}
        inputs = [call["name"] for call in calls if call["call"] == "new_input"]
        strides = dict(zip(inputs, self.mirage.input_strides(self.graph), strict=True))
        structure = self.graph.cygraph.get_graph_structure()
        _progress({"call": "generate_cuda_program", "name": ""})
        program = self.mirage.transpile(self.graph, target_cc)
        return {
            "version": self.mirage.version,
            "names": names,
            "dtypes": {name: str(tensor.dtype) for name, tensor in self.tensors.items()},
            "strides": strides | self._output_strides(program),
            "structure": structure,
            "source": program["code"],
            "smem_bytes": program["max_smem_size"],
            "buffer_bytes": program["buf_size"],
        }

    def _output_strides(self, program: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        directives = program["output_directives"]
        return {name: tuple(d["strides"]) for name, d in zip(self.outputs, directives, strict=True)}

    def _kernel_call(self, call: Mapping[str, Any]) -> None:
        name = call["name"]
        if call["call"] == "new_input":
            self.tensors[name] = self.graph.new_input(
                dims=tuple(call["dims"]), strides=tuple(call["strides"]), dtype=self.mirage.dtype(call["dtype"])
            )
        elif call["call"] == "mark_output":
            self.outputs[name] = tuple(call["strides"])
            self.graph.mark_output(self.tensors[name], self.outputs[name])
        elif call["call"] == "customized":
            block = self._threadblock_graph(call)
            made = self.graph.customized([self.tensors[tensor] for tensor in call["inputs"]], block)
            self.tensors.update(zip(call["outputs"], made, strict=True))
        else:
            operands = [self.tensors[tensor] for tensor in call["inputs"]]
            self.tensors[name] = getattr(self.graph, call["call"])(*operands)

    def _threadblock_graph(self, customized: Mapping[str, Any]) -> Any:
        header = customized["header"]
        block = self.mirage.module.new_threadblock_graph(
            grid_dim=tuple(header["grid_dim"]),
            block_dim=tuple(header["block_dim"]),
            forloop_range=header["forloop_range"],
            reduction_dimx=header["reduction_dimx"],
        )
        tiles: dict[str, Any] = {}
        for call in customized["calls"]:
            _progress(call)
            tiles[call["name"]] = self._block_call(block, call, tiles)
        return block

    def _block_call(self, block: Any, call: Mapping[str, Any], tiles: Mapping[str, Any]) -> Any:
        if call["call"] == "new_input":
            tensor = self.tensors[call["tensor"]]
            return block.new_input(tensor, tuple(call["grid_map"]), call["forloop_dim"])
        operands = [tiles[tile] for tile in call["inputs"]]
        if call["call"] == "new_output":
            return block.new_output(operands[0], tuple(call["grid_map"]))
        if call["call"] == "forloop_accum":
            return block.forloop_accum(operands[0], call["acc"])
        return getattr(block, call["call"])(*operands)


def _progress(call: Mapping[str, Any]) -> None:
    """Say on stderr which call comes next: after an abort the parent reads there where Mirage stopped."""
    print(f"mirage_api: {call['call']} {call['name']}".rstrip(), file=sys.stderr, flush=True)


@contextmanager
def _clean_stdout() -> Iterator[Any]:
    """A stream to the real stdout, while whatever Mirage prints there goes to stderr."""
    with os.fdopen(os.dup(1), "w") as stream:
        os.dup2(2, 1)
        yield stream


def _worker() -> None:
    """Read one request from stdin, write one answer to stdout."""
    request = json.load(sys.stdin)
    with _clean_stdout() as stdout:
        json.dump(_answer(request), stdout)


def _answer(request: dict[str, Any] | None) -> dict[str, Any]:
    """Mirage's export, or {"missing": sentence}, or {"error": what Mirage's Python half raised}."""
    try:
        mirage = Mirage.load()
    except MirageError as error:
        return {"missing": str(error)}
    if request is None:
        return {"version": mirage.version}
    try:
        return _Replay(mirage).run(request["calls"], request["target_cc"])
    except Exception as error:  # whatever it is, the parent raises it as one sentence
        return {"error": f"{type(error).__name__} {error}".strip()}


if __name__ == "__main__":
    _worker()
