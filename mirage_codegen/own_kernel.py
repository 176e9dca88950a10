# SPDX-License-Identifier: Apache-2.0
"""Mirage's own CUDA for rms_norm_linear, compiled as it is, for comparison.

`build()` has Mirage transpile the μGraph that our kernels are lowered from and compiles the text that it emits, with Mirage's own
runtime headers, CUTLASS and optimisation flags, into a library for each shape and token count. `load()` makes them callable where
there is a GPU and no Mirage; `check()` measures their error and time. Launches, barriers, schedule, arithmetic and missing eps stay
Mirage's, and the emitted text lies beside each library.

Five things are not as Mirage's Python package does them, because otherwise nothing compiles, loads or launches; no emitted line is
edited, and index.json holds the same list (CHANGES):

    direct-driver-call   a macro of CUTLASS, without which Mirage's copy of it does not compile with CUDA 13
    no-cublas            a stand-in for cublas_v2.h: the headers ask for cuBLAS, and none of these graphs calls it
    architecture         compiled for one named GPU architecture instead of the build machine's (`-arch=native`)
    stream               launched on the caller's stream instead of the default stream, which a graph capture cannot record
    fp16                 called with fp16 tensors: Mirage takes a bf16 graph, and emits half-precision code for it

The schedule is given, as it is for our kernels: 128 blocks of 128 threads, a loop over K in steps of 256. Mirage's search for a better
one (superoptimize) is not part of this.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mirage_codegen import mirage_api, ops

if TYPE_CHECKING:
    import torch

Key = tuple[int, int, int]
"""K, N, tokens."""

SHAPES = ((1024, 4096), (2048, 4096), (2560, 6144), (4096, 6144))
TOKENS = (1, 8, 16)
GRID, THREADS, STEP = 128, 128, 256
ARCH = "sm_90"
ENTRY = "mirage_own_launch"
INDEX = "index.json"
EPS = 1e-6  # of the definition that errors are measured against; Mirage's rms has none
REPEATS = 20

ARCH_FLAGS = ("-gencode", f"arch=compute_{ARCH[3:]},code={ARCH}")
FLAGS = (
    *("-O3", "-std=c++17", "-use_fast_math", "--expt-relaxed-constexpr", "-shared", "-Xcompiler=-fPIC"),  # Mirage's own
    *("-DCUTLASS_ENABLE_DIRECT_CUDA_DRIVER_CALL", "-Xlinker=--wrap=__cudaPushCallConfiguration"),  # CHANGES
    *ARCH_FLAGS,
    *("-cudart", "shared", "-Xlinker=-Bsymbolic", "-w", "-Xcompiler=-w"),  # libraries side by side in PyTorch's process; no warnings
)

CHANGES = {
    "direct-driver-call": {
        "what": "-DCUTLASS_ENABLE_DIRECT_CUDA_DRIVER_CALL",
        "why": "does not compile with CUDA 13 otherwise: CUTLASS names PFN_cuTensorMapEncodeTiled, a type that CUDA 13 no longer has; "
        "the host function it is in is never called",
    },
    "no-cublas": {
        "what": "a stand-in for cublas_v2.h in the place of cuBLAS",
        "why": "Mirage's headers include it for matrix products outside of customized kernels, which these graphs have none of, and "
        "create a cuBLAS handle while the library is loaded; without it neither cuBLAS's headers nor its library are needed",
    },
    "architecture": {
        "what": f"{' '.join(ARCH_FLAGS)} instead of -arch=native, -cudart shared, -Bsymbolic, no -lcublas and no Python module",
        "why": "built without a GPU for the one that is measured; PyTorch's CUDA runtime must be the one that launches",
    },
    "stream": {
        "what": "the linker's --wrap replaces the stream of each kernel launch by the caller's",
        "why": "Mirage launches on the default stream, which cannot be captured into a CUDA graph",
    },
    "fp16": {
        "what": "called with float16 tensors",
        "why": "the μGraph is bfloat16, which Mirage takes, but the text it emits for it computes on half_t, with fp16 accumulation",
    },
}

CUBLAS_STAND_IN = """\
#pragma once
#include <cuda_fp16.h>
#include <library_types.h>
enum cublasComputeType_t { CUBLAS_COMPUTE_16F = 64, CUBLAS_COMPUTE_16F_PEDANTIC, CUBLAS_COMPUTE_32F = 68, CUBLAS_COMPUTE_32F_PEDANTIC };
enum cublasOperation_t { CUBLAS_OP_N, CUBLAS_OP_T };
enum cublasGemmAlgo_t { CUBLAS_GEMM_DEFAULT = -1 };
enum cublasStatus_t { CUBLAS_STATUS_SUCCESS, CUBLAS_STATUS_NOT_SUPPORTED = 15 };
typedef struct cublasContext *cublasHandle_t;
static inline cublasStatus_t cublasCreate(cublasHandle_t *) { return CUBLAS_STATUS_SUCCESS; }
static inline cublasStatus_t cublasDestroy(cublasHandle_t) { return CUBLAS_STATUS_SUCCESS; }
static inline const char *cublasGetStatusName(cublasStatus_t) { return "CUBLAS_STATUS_NOT_SUPPORTED"; }
static inline const char *cublasGetStatusString(cublasStatus_t) { return "built without cuBLAS"; }
template <typename... Arguments>
cublasStatus_t cublasGemmStridedBatchedEx(Arguments...) { return CUBLAS_STATUS_NOT_SUPPORTED; }
"""

LAUNCHER = """\
// The emitted text, unchanged, and what calls it. Every <<<...>>> passes its configuration to __cudaPushCallConfiguration, which the
// linker redirects to the __wrap_ function below.
#include "%(emitted)s"

static thread_local CUstream_st *mirage_own_stream;
extern "C" unsigned __real___cudaPushCallConfiguration(dim3, dim3, size_t, CUstream_st *);
extern "C" unsigned __wrap___cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, CUstream_st *) {
  return __real___cudaPushCallConfiguration(grid, block, shared_bytes, mirage_own_stream);
}

// 0, or the CUDA error found before or after the launches, which Mirage itself does not look at.
extern "C" int %(entry)s(void const **inputs, void **outputs, void *buffer, void *stream) {
  if (cudaError_t error = cudaPeekAtLastError()) return error;
  mirage_own_stream = (CUstream_st *)stream;
  execute_mugraph_wrapper(inputs, %(inputs)d, outputs, %(outputs)d, buffer);
  return cudaGetLastError();
}
extern "C" char const *mirage_own_error(int error) { return cudaGetErrorString((cudaError_t)error); }
"""


class OwnKernelError(RuntimeError):
    """Mirage's own kernel cannot be built, loaded or launched; the message is one sentence."""


# Building: needs Mirage and nvcc


def build(folder: Path, shapes: Sequence[tuple[int, int]] = SHAPES, tokens: Sequence[int] = TOKENS) -> Path:
    """Builds a library for each (K, N) and token count in `folder`, with the emitted text beside it; returns the index file.

    A text that does not compile is an answer too: it goes into the index under "not_compiled". MirageError without Mirage;
    OwnKernelError without nvcc, or where no text compiles.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise OwnKernelError("nvcc was not found: put the CUDA toolkit's bin folder into PATH.")
    keys = [(k, n, count) for k, n in shapes for count in tokens]
    exports = [_export(*key) for key in keys]
    include = _mirage_include()
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        entries = list(pool.map(lambda key, export: _compile(nvcc, include, folder, key, export), keys, exports))
    if all("failed" in entry for entry in entries):
        raise OwnKernelError(f"nothing that Mirage emitted compiles: {entries[0]['failed']}")
    index = {
        "mirage": exports[0].mirage_version,
        "nvcc": _nvcc_version(nvcc),
        "arch": ARCH,
        "flags": list(FLAGS),
        "changes": CHANGES,
        "kernels": [entry for entry in entries if "failed" not in entry],
        "not_compiled": [entry for entry in entries if "failed" in entry],
    }
    path = folder / INDEX
    path.write_text(json.dumps(index, indent=1) + "\n")
    return path


def _export(k: int, n: int, tokens: int) -> mirage_api.Export:
    if k % STEP or n % GRID:
        raise OwnKernelError(f"the shape {k}x{n} does not divide: K must be a multiple of {STEP}, N of {GRID}.")
    return ops.rms_norm_linear(ops.Shape(tokens, k, n, GRID, k // STEP, THREADS)).export()


def _mirage_include() -> Path:
    """The folder of headers in the Mirage package of the interpreter that mirage_api uses."""
    python = os.environ.get("MIRAGE_PYTHON", sys.executable)
    find = "import importlib.util; print(importlib.util.find_spec('mirage').origin)"
    result = subprocess.run([python, "-c", find], capture_output=True, text=True, check=True)
    return Path(result.stdout.strip()).parent / "include"


def _nvcc_version(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release .+", text)
    return found[0] if found else text.strip()


def _compile(nvcc: str, include: Path, folder: Path, key: Key, export: mirage_api.Export) -> dict[str, Any]:
    """Compiles one emitted text and returns its entry of the index, {"failed": sentence} in it where that fails."""
    name = "{}x{}_{}".format(*key)
    emitted, library = folder / f"{name}.cu", folder / f"{name}.so"
    emitted.write_text(export.source)
    counts = {"inputs": len(export.graph.inputs), "outputs": len(export.graph.outputs)}
    with tempfile.TemporaryDirectory() as text_folder:
        work = Path(text_folder)
        (work / "cublas_v2.h").write_text(CUBLAS_STAND_IN)
        launcher = work / "launcher.cu"
        launcher.write_text(LAUNCHER % {"emitted": emitted.resolve(), "entry": ENTRY, **counts})
        includes = (work, include / "include/mirage/transpiler/runtime", include / "deps/cutlass/include")
        command = [nvcc, str(launcher), *FLAGS, *(f"-I{path}" for path in includes), "-o", str(library)]
        result = subprocess.run(command, capture_output=True, text=True)
    entry = {
        "k": key[0],
        "n": key[1],
        "tokens": key[2],
        "dtype": _dtype(export.source),
        "source": emitted.name,
        "source_sha256": hashlib.sha256(export.source.encode()).hexdigest(),
        "kernels": _kernels(export.source),
        "grid": GRID,
        "threads": THREADS,
        "forloop_range": key[0] // STEP,
        "smem_bytes": export.smem_bytes,
        "buffer_bytes": export.buffer_bytes,
    }
    if result.returncode != 0:
        errors = re.findall(r".*error.*", result.stderr) or [f"nvcc ended with status {result.returncode}"]
        return entry | {"failed": f"does not compile: {errors[0].strip()}"}
    return entry | {"library": library.name, "entry": ENTRY, "changes": list(CHANGES)}


def _dtype(source: str) -> str:
    """What the emitted kernels take, whatever dtype the graph was given."""
    types = set(re.findall(r"\b(half_t|bfloat16_t)\b", source))
    if types != {"half_t"}:
        raise OwnKernelError(f"Mirage's text computes on {sorted(types)}, expected half_t alone, as 0.2.2 emits it.")
    return "float16"


def _kernels(source: str) -> list[str]:
    """The kernels that the emitted text launches, in order: of Mirage's library (kn::…), and generated ones."""
    return [library or generated for library, generated in re.findall(r"using kernel = (kn::\w+)|(\w+)<<<", source)]


# Loading: needs PyTorch with CUDA


class OwnKernel:
    """Mirage's own rms_norm_linear for one weight shape and exactly `tokens` tokens.

    Called with hidden_states and residual [tokens, K], norm_weight [K] and weight [N, K], contiguous CUDA tensors of `dtype`; returns
    (out [tokens, N], residual_out [tokens, K]). Launches on the current stream and may be captured into a CUDA graph.
    """

    def __init__(self, library: Path, entry: dict[str, Any]):
        import torch

        self.k, self.n, self.tokens = entry["k"], entry["n"], entry["tokens"]
        self.dtype: torch.dtype = getattr(torch, entry["dtype"])
        self.name = f"Mirage's own {self.k}→{self.n}, {self.tokens} tokens"
        try:
            loaded = ctypes.CDLL(str(library))
            self._launch, self._error = getattr(loaded, entry["entry"]), loaded.mirage_own_error
        except (OSError, AttributeError) as error:
            raise OwnKernelError(f"{library} does not load: {error}.") from error
        self._launch.argtypes = [ctypes.POINTER(ctypes.c_void_p)] * 2 + [ctypes.c_void_p] * 2
        self._error.restype = ctypes.c_char_p
        self._buffer = torch.empty(entry["buffer_bytes"], dtype=torch.uint8, device="cuda") if entry["buffer_bytes"] else None

    def __call__(
        self, hidden_states: torch.Tensor, residual: torch.Tensor, norm_weight: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        rows = (self.tokens, self.k)
        for tensor, shape in ((hidden_states, rows), (residual, rows), (norm_weight, (self.k,)), (weight, (self.n, self.k))):
            if tensor.shape != shape or tensor.dtype != self.dtype or not (tensor.is_cuda and tensor.is_contiguous()):
                found = f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"
                raise OwnKernelError(f"{self.name} got a tensor {found}, expected a contiguous {list(shape)} {self.dtype} on the GPU.")
        out, residual_out = hidden_states.new_empty((self.tokens, self.n)), torch.empty_like(residual)
        inputs = (ctypes.c_void_p * 4)(*(tensor.data_ptr() for tensor in (hidden_states, residual, norm_weight, weight)))
        outputs = (ctypes.c_void_p * 2)(out.data_ptr(), residual_out.data_ptr())
        buffer = None if self._buffer is None else self._buffer.data_ptr()
        status = self._launch(inputs, outputs, buffer, torch.cuda.current_stream().cuda_stream)
        if status != 0:
            raise OwnKernelError(f"{self.name} did not launch: CUDA error {status}, {self._error(status).decode()}.")
        return out, residual_out


def load(folder: Path | str) -> dict[Key, OwnKernel]:
    """The kernels of a folder that build() wrote, by (K, N, tokens). OwnKernelError when they cannot run here."""
    _require_gpu()
    return {key: _load_one(Path(folder), entry) for key, entry in _entries(read_index(folder)).items()}


def _require_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise OwnKernelError("Mirage's own kernels need a GPU, and PyTorch finds none.")


def _load_one(folder: Path, entry: dict[str, Any]) -> OwnKernel:
    _load_cuda_runtime()
    return OwnKernel(folder.resolve() / entry["library"], entry)


def _entries(index: dict[str, Any]) -> dict[Key, dict[str, Any]]:
    return {(entry["k"], entry["n"], entry["tokens"]): entry for entry in index["kernels"]}


def read_index(folder: Path | str) -> dict[str, Any]:
    """index.json of a folder. OwnKernelError when there is none."""
    path = Path(folder) / INDEX
    if not path.is_file():
        raise OwnKernelError(f"there is no {path}: python -m mirage_codegen own --output {folder} builds it.")
    return json.loads(path.read_text())


@functools.cache
def _load_cuda_runtime() -> None:
    """Makes PyTorch's CUDA runtime the one that the libraries find."""
    import torch

    name = f"libcudart.so.{(torch.version.cuda or '').split('.')[0]}"
    packages = Path(torch.__file__).parents[1] / "nvidia"
    for candidate in (name, *map(str, packages.rglob(name)), f"/usr/local/cuda/lib64/{name}"):
        try:
            ctypes.CDLL(candidate, mode=ctypes.RTLD_GLOBAL)
            return
        except OSError:
            continue
    raise OwnKernelError(f"PyTorch's CUDA runtime {name} was not found.")


# Checking: each kernel in a subprocess, because an illegal access ends the CUDA context and may end the process


def check(folder: Path, keys: Sequence[Key], patience: float = 120) -> list[dict[str, Any]]:
    """Measures kernels on the GPU, one entry each: what _measure gives, or {"failed": sentence}.

    patience: seconds without a result after which a kernel counts as hung (the first result waits for PyTorch's import and compiler)
    """
    results: dict[Key, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as text_folder:
        report = Path(text_folder) / "report.jsonl"
        while left := [key for key in keys if key not in results]:
            report.write_text("")
            command = [sys.executable, "-m", "mirage_codegen.own_kernel", str(folder), str(report), json.dumps(left)]
            root = str(Path(__file__).resolve().parents[1])
            path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
            process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path})
            ending = _wait(process, report, patience)
            for line in report.read_text().splitlines():
                entry = json.loads(line)
                results[entry["k"], entry["n"], entry["tokens"]] = entry
            unfinished = [key for key in left if key not in results]
            if unfinished:  # the first of them is the one it ended in
                k, n, tokens = unfinished[0]
                results[unfinished[0]] = {"k": k, "n": n, "tokens": tokens, "failed": ending}
    return [results[key] for key in keys]


def _wait(process: subprocess.Popen[bytes], report: Path, patience: float) -> str:
    """Waits for the end of a process that adds lines to `report`, or ends it; says how it ended."""
    size, since = 0, time.monotonic()
    while process.poll() is None:
        time.sleep(0.1)
        if report.stat().st_size != size:
            size, since = report.stat().st_size, time.monotonic()
        elif time.monotonic() - since > patience:
            process.kill()
            process.wait()
            return f"the kernel hung: no result in {patience:.0f} s"
    return f"the process ended with status {process.returncode}"


def _worker(folder: str, report: str, keys: str) -> int:
    """The subprocess: measures one kernel after the other; ends after the first failure, which the CUDA context may not survive."""
    import torch

    torch._dynamo.config.cache_size_limit = 64  # one graph for each K and token count
    entries = _entries(read_index(folder))
    for k, n, tokens in json.loads(keys):
        entry = {"k": k, "n": n, "tokens": tokens}
        try:
            entry |= _measure(_load_one(Path(folder), entries[k, n, tokens]))
        except (OwnKernelError, RuntimeError) as error:
            entry["failed"] = str(error).splitlines()[0]
        with open(report, "a") as stream:
            stream.write(json.dumps(entry) + "\n")
        print(json.dumps(entry), file=sys.stderr, flush=True)  # kept where the whole check is cut short
        if "failed" in entry:
            os._exit(0)  # an orderly end would touch the CUDA context
    return 0


def _measure(kernel: OwnKernel) -> dict[str, Any]:
    """Error and time of one kernel, and of the stock path on the same tensors.

    error, stock_error   ‖out − expected‖ / ‖expected‖, expected in float64 with eps 1e-6; None where out is not finite
    replay_error         the same for a CUDA graph's replay after its inputs have changed sign
    repeats_equal        of 20 launches on the same inputs, how many gave the first one's bits
    us, stock_us         of a launch: CUDA-graph replays over copies of the weight that exceed the L2
    """
    import torch
    from torch.nn import functional

    from mirage_codegen.layer import any_tokens, graph_time_us, stock_norm

    k, n, tokens, device = kernel.k, kernel.n, kernel.tokens, torch.device("cuda")
    random = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=random, device=device)

    copies = max(2, math.ceil(3 * torch.cuda.get_device_properties(device).L2_cache_size / (2 * k * n)))
    weights = [(draw(n, k) * 0.02).to(kernel.dtype) for _ in range(copies)]
    norm_weight = (1 + 0.2 * draw(k)).to(kernel.dtype)
    hidden_states, residual = (draw(tokens, k) * torch.exp(draw(tokens, 1))).to(kernel.dtype), draw(tokens, k).to(kernel.dtype)
    stream = hidden_states.double() + residual.double()
    normed = stream * torch.rsqrt(stream.pow(2).mean(-1, keepdim=True) + EPS) * norm_weight.double()
    expected = normed @ weights[0].double().t()

    def error(out: torch.Tensor, sign: int = 1) -> float | None:
        value = ((out.double() - sign * expected).norm() / expected.norm()).item()
        return value if math.isfinite(value) else None

    def own(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return kernel(hidden_states, residual, norm_weight, weights[i])

    def stock(i: int) -> torch.Tensor:
        return functional.linear(stock_norm(any_tokens(hidden_states), any_tokens(residual), norm_weight)[0], weights[i])

    launches = copies * math.ceil(144 / copies)
    measured: dict[str, Any] = {"dtype": str(kernel.dtype).removeprefix("torch.")}
    measured["stock_error"] = error(stock(0))
    measured["stock_us"] = graph_time_us(lambda i: stock(i % copies), launches)
    first, residual_out = own(0)
    torch.cuda.synchronize()
    measured["error"] = error(first)
    measured["residual_equal"] = torch.equal(residual_out, hidden_states + residual)
    measured["repeats_equal"] = sum(torch.equal(own(0)[0].view(torch.int16), first.view(torch.int16)) for _ in range(REPEATS))
    measured["us"] = graph_time_us(lambda i: own(i % copies), launches)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, _ = own(0)
    captured.fill_(math.nan)
    hidden_states.neg_()
    residual.neg_()
    graph.replay()
    torch.cuda.synchronize()
    measured["replay_error"] = error(captured, sign=-1)
    return measured


def table(results: Sequence[dict[str, Any]]) -> str:
    """What check() found, a line for each kernel."""
    lines = ["  K→N       tokens  dtype       error     stock error      µs   stock µs   stock/own   repeats equal"]
    for entry in results:
        place = f"{entry['k']:5}→{entry['n']:<5} {entry['tokens']:5}  "
        if "failed" in entry:
            lines.append(f"{place}  {entry['failed']}")
            continue
        errors = f"{_error_text(entry['error'])}    {_error_text(entry['stock_error'])}"
        times = f"{entry['us']:9.2f}  {entry['stock_us']:9.2f}  {entry['stock_us'] / entry['us']:9.2f}×"
        lines.append(f"{place}  {entry['dtype']}  {errors}  {times}   {entry['repeats_equal']:6} of {REPEATS}{_remarks(entry)}")
    return "\n".join(lines)


def _error_text(value: float | None) -> str:
    return "not finite" if value is None else f"{value:10.2e}"


def _remarks(entry: dict[str, Any]) -> str:
    followed = (entry["replay_error"] is None) == (entry["error"] is None)
    if followed and entry["error"] is not None:
        followed = entry["replay_error"] <= 2 * entry["error"]
    remarks = [] if followed else [f"a replayed graph errs {_error_text(entry['replay_error']).strip()}"]
    remarks += [] if entry["residual_equal"] else ["residual_out is not the sum"]
    return "   " + "; ".join(remarks) if remarks else ""


# The command line


def run(arguments: argparse.Namespace) -> int:
    """`own --output DIR` builds, `own --check DIR` measures; 1 when a kernel could not be measured."""
    shapes = [_shape(text) for text in arguments.shapes or ()]
    if arguments.output:
        path = build(Path(arguments.output), shapes or SHAPES, arguments.tokens or TOKENS)
        for entry in read_index(path.parent)["not_compiled"]:
            print(f"{entry['k']}x{entry['n']}, {entry['tokens']} tokens {entry['failed']}", file=sys.stderr)
        print(f"wrote {path}")
        return 0
    index = read_index(arguments.check)
    _require_gpu()
    keys = [key for key in _entries(index) if (not shapes or key[:2] in shapes) and (not arguments.tokens or key[2] in arguments.tokens)]
    results = check(Path(arguments.check), keys) + index["not_compiled"]
    print(f"Mirage {index['mirage']}'s own kernels, compiled for {index['arch']} by nvcc {index['nvcc']}\n{table(results)}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"mirage": index["mirage"], "changes": index["changes"], "results": results}, indent=1))
    return int(any("failed" in entry for entry in results))


def _shape(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if found is None:
        raise ValueError(f"the shape {text} is not of the form KxN, such as 4096x6144.")
    return int(found[1]), int(found[2])


if __name__ == "__main__":
    sys.exit(_worker(*sys.argv[1:]))
