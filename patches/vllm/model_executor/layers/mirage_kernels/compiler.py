# SPDX-License-Identifier: Apache-2.0
"""CUDA source -> cubin through NVRTC, kept in a cache folder.

NVRTC and its Python bindings come with torch's CUDA build: no nvcc and no host compiler are needed. An entry of the cache is
named by the hash of everything that decides its content (source, runtime, options, architecture, NVRTC version) and holds the
hash of its cubin; an entry that is damaged, or that another user could have written, is compiled anew.
"""

import hashlib
import os
import stat
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

HERE = Path(__file__).parent
RUNTIME = "mirage_runtime.cuh"
_MAGIC = b"mirage-cubin-1\n"


class CompileError(RuntimeError):
    """NVRTC refused a source, or NVRTC itself is missing. The message is one sentence with the first error."""


@dataclass(frozen=True)
class Build:
    """One kernel to compile: `source` is a file beside this module, `defines` its schedule, `arch` such as "sm_90"."""

    source: str
    defines: tuple[tuple[str, int], ...]
    arch: str

    def options(self) -> list[str]:
        return [f"--gpu-architecture={self.arch}", "--std=c++17", *(f"-D{name}={value}" for name, value in self.defines)]

    def key(self, version: str) -> str:
        """Hash of everything that decides the cubin."""
        parts = [(HERE / self.source).read_text(), (HERE / RUNTIME).read_text(), *self.options(), version]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _nvrtc():
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise CompileError(
            f"NVRTC is not usable ({error}); torch's CUDA build brings it: pip install cuda-bindings nvidia-cuda-nvrtc"
        ) from error
    return nvrtc


def nvrtc_version() -> str:
    """Version of the NVRTC that compiles, "major.minor". CompileError if there is none."""
    nvrtc = _nvrtc()
    try:
        result, major, minor = nvrtc.nvrtcVersion()
    except RuntimeError as error:  # cuda-bindings found no libnvrtc
        raise CompileError(f"NVRTC is not usable ({str(error).splitlines()[0]}); mend with: pip install nvidia-cuda-nvrtc") from error
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise CompileError(f"NVRTC does not tell its version ({result.name})")
    return f"{major}.{minor}"


def compile_cubin(build: Build) -> bytes:
    """Compiles now, past the cache. CompileError with NVRTC's first error line."""
    nvrtc = _nvrtc()

    def checked(result, *values):
        if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CompileError(f"NVRTC failed on {build.source}: {result.name}")
        return values[0] if values else None

    text, runtime = (HERE / build.source).read_text().encode(), (HERE / RUNTIME).read_text().encode()
    program = checked(*nvrtc.nvrtcCreateProgram(text, build.source.encode(), 1, [runtime], [RUNTIME.encode()]))
    try:
        options = [option.encode() for option in build.options()]
        (result,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = b" " * checked(*nvrtc.nvrtcGetProgramLogSize(program))
            checked(*nvrtc.nvrtcGetProgramLog(program, log))
            lines = log.decode(errors="replace").strip("\0 \n").splitlines()
            first = next((line for line in lines if "error" in line), lines[0] if lines else result.name)
            raise CompileError(f"NVRTC refused {build.source} for {build.arch}: {first}")
        cubin = b" " * checked(*nvrtc.nvrtcGetCUBINSize(program))
        checked(*nvrtc.nvrtcGetCUBIN(program, cubin))
        return cubin
    finally:
        nvrtc.nvrtcDestroyProgram(program)


class CubinCache:
    """Cubins under `folder` (made with mode 700). Safe when several processes compile the same kernel at once: one of them does."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def get(self, builds: list[Build], on_compile=lambda count: None) -> list[bytes]:
        """The cubins of `builds`, compiling what is missing in parallel threads. `on_compile(count)` is called before that."""
        version = nvrtc_version()
        paths = [self.folder / f"{build.key(version)}.cubin" for build in builds]
        found = [_read(path) for path in paths]
        if None in found:
            with FileLock(str(self.folder / "compile.lock")):
                found = [cubin or _read(path) for cubin, path in zip(found, paths, strict=True)]  # another process may have
                missing = [i for i, cubin in enumerate(found) if cubin is None]
                if missing:
                    on_compile(len(missing))
                    with ThreadPoolExecutor(min(len(missing), os.cpu_count() or 1)) as pool:
                        for i, cubin in zip(missing, pool.map(lambda i: compile_cubin(builds[i]), missing), strict=True):
                            _write(paths[i], cubin)
                            found[i] = cubin
        return [cubin for cubin in found if cubin is not None]

    def fill(self, build: Build) -> None:
        """Compiles one entry if it is missing, without the lock: for a tuner that fills the cache from many threads."""
        path = self.folder / f"{build.key(nvrtc_version())}.cubin"
        if _read(path) is None:
            _write(path, compile_cubin(build))


def _read(path: Path) -> bytes | None:
    """The cubin, or None if the entry is absent, not a plain file of this user alone, or damaged."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe in its place must not block
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
            return None
        content = file.read()
    head, cubin = content[: len(_MAGIC) + 32], content[len(_MAGIC) + 32 :]
    return cubin if head == _MAGIC + hashlib.sha256(cubin).digest() else None


def _write(path: Path, cubin: bytes) -> None:
    """Whole or not at all: a reader never sees half an entry."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem[:8])
    with os.fdopen(descriptor, "wb") as file:
        file.write(_MAGIC + hashlib.sha256(cubin).digest() + cubin)
    os.replace(temporary, path)
