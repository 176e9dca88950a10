# SPDX-License-Identifier: Apache-2.0
"""Runs a generated kernel on the CPU: its own source, compiled by g++ over `mirage_emulator.h`. For tests, on small shapes."""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mirage_codegen.generate import KERNELS_DIR
from mirage_codegen.lower import Kernel

sys.path.insert(0, str(KERNELS_DIR.parent))
from mirage_kernels.arguments import blocks_of, struct_of

HERE = Path(__file__).parent
RUNTIME = KERNELS_DIR / "mirage_runtime.cuh"
DRIVER = """
#include "kernel.cu"
static Arguments arguments;
static void body() {{ {entry}(arguments); }}
extern "C" int emulate(Arguments const *given, int blocks, int delayed, int seed) {{
  arguments = *given;
  mirage::emulator::delayed = delayed;
  srand(seed);  // of the order in which warps run
  const int *shape = mirage_launch_shape;
  if (shape[4] > mirage::emulator::kShared) return 2;
  for (int block = 0; block < blocks; block += shape[3])
    if (mirage::emulator::run_cluster(block, shape[3], shape[2], body)) return 1;
  return 0;
}}
extern "C" unsigned long long prefetched(unsigned long long *out) {{  // addresses; without `out` their number
  auto const &list = mirage::emulator::prefetched;
  for (size_t i = 0; out && i < list.size(); ++i) out[i] = reinterpret_cast<uintptr_t>(list[i]);
  return list.size();
}}
extern "C" int const *launch_shape() {{ return mirage_launch_shape; }}
"""


class EmulationError(RuntimeError):
    """The kernel does not compile, deadlocks, or asks for more shared memory than there is."""


class EmulatedKernel:
    """A kernel compiled for the CPU with the given macros. `runtime` replaces the device runtime (to break it on purpose)."""

    def __init__(self, kernel: Kernel, macros: Mapping[str, int], folder: Path, runtime: str | None = None):
        self.kernel = kernel
        runtime = runtime if runtime is not None else RUNTIME.read_text()
        key = hashlib.sha256(repr((kernel.source, sorted(macros.items()), runtime)).encode()).hexdigest()[:16]
        build = folder / key
        library = build / "kernel.so"
        if not library.exists():
            build.mkdir(parents=True, exist_ok=True)
            (build / "kernel.cu").write_text(kernel.source)
            (build / "mirage_runtime.cuh").write_text(runtime)
            (build / "driver.cpp").write_text(DRIVER.format(entry=kernel.name))
            defines = [f"-D{name}={value}" for name, value in macros.items()]
            flags = ["-std=c++17", "-O2", "-w", "-fPIC", "-shared", "-DMIRAGE_EMULATE", f"-I{build}", f"-I{HERE}"]
            command = ["g++", *flags, *defines, str(build / "driver.cpp"), "-o", str(library)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                first = next(iter(done.stderr.splitlines()), f"exit code {done.returncode}")
                raise EmulationError(f"g++ refused {kernel.name}: {first}")
        self._library = ctypes.CDLL(str(library))
        self._library.launch_shape.restype = ctypes.POINTER(ctypes.c_int * 5)
        self._launch_shape = tuple(self._library.launch_shape().contents)
        self._struct = struct_of(kernel.arguments)

    def __call__(self, values: Mapping[str, npt.NDArray[np.uint16] | int | float], *, delayed: bool, seed: int) -> None:
        """Runs every block. Arrays hold bf16 or fp16 bits, contiguous; outputs are written in place."""
        for value in values.values():
            assert not isinstance(value, np.ndarray) or (value.flags.c_contiguous and value.ctypes.data % 16 == 0)
        ordered = [values[name] for name in self.kernel.arguments]
        given = [value.ctypes.data if isinstance(value, np.ndarray) else value for value in ordered]
        blocks = blocks_of(self._launch_shape, int(values["num_tokens"]))
        status = self._library.emulate(ctypes.byref(self._struct(*given)), blocks, int(delayed), seed)
        if status:
            raise EmulationError(f"{self.kernel.name} {'deadlocks' if status == 1 else 'needs more shared memory than a block has'}.")

    def prefetched(self) -> list[int]:
        """The address of each request of all calls so far to have memory in L2."""
        self._library.prefetched.restype = ctypes.c_uint64
        addresses = np.empty(self._library.prefetched(None), np.uint64)
        self._library.prefetched(ctypes.c_void_p(addresses.ctypes.data))
        return addresses.tolist()


def to_bf16(values: npt.ArrayLike) -> npt.NDArray[np.uint16]:
    """bf16 bits of float values, rounded to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return aligned((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)


def from_bf16(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float64]:
    """The values of bf16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def to_fp16(values: npt.ArrayLike) -> npt.NDArray[np.uint16]:
    """fp16 bits of float values."""
    return aligned(np.asarray(values).astype(np.float16).view(np.uint16))


def from_fp16(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float64]:
    """The values of fp16 bits."""
    return bits.view(np.float16).astype(np.float64)


def aligned(bits: npt.NDArray) -> npt.NDArray[np.uint16]:
    """A 16-byte aligned copy, as CUDA's allocator gives."""
    memory = np.empty(bits.size + 8, np.uint16)
    start = (-memory.ctypes.data % 16) // 2
    out = memory[start : start + bits.size].reshape(bits.shape)
    out[...] = bits
    return out


def poisoned(shape: Sequence[int]) -> npt.NDArray[np.uint16]:
    """An aligned array of NaN (in bf16 and in fp16)."""
    return aligned(np.full(shape, 0x7FFF, np.uint16))
