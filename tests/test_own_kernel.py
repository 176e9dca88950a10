# SPDX-License-Identifier: Apache-2.0
"""Mirage's own kernels: what is emitted is what is compiled, the index is complete, and a crash stops no other kernel.

The build test needs mirage-project in this interpreter or in MIRAGE_PYTHON, and nvcc; it is skipped without them. What needs a GPU is
`python -m mirage_codegen own --check DIR`.
"""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mirage_codegen import __main__ as command_line
from mirage_codegen import mirage_api, own_kernel
from mirage_codegen.own_kernel import CHANGES, OwnKernelError

SMALL = (256, 1024, 8)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not in PATH: Mirage's own kernel cannot be compiled")
    if mirage_api.mirage_version() is None:
        pytest.skip("mirage-project is not installed: mirage_codegen/install_mirage.sh PYTHON")
    folder = tmp_path_factory.mktemp("own")
    k, n, tokens = SMALL
    assert command_line.main(["own", "--output", str(folder), "--shapes", f"{k}x{n}", "--tokens", str(tokens)]) == 0
    return folder


def test_the_index_says_what_was_built_and_every_change(built):
    index = own_kernel.read_index(built)
    assert index["mirage"] == mirage_api.mirage_version()
    assert index["arch"] == "sm_90" and index["nvcc"].startswith("release")
    assert index["changes"] == CHANGES and all(change["what"] and change["why"] for change in CHANGES.values())
    assert index["not_compiled"] == []
    (entry,) = index["kernels"]
    assert (entry["k"], entry["n"], entry["tokens"], entry["dtype"]) == (*SMALL, "float16")
    assert entry["kernels"] == ["kn::ElementBinaryKernel", "custom_kernel_0"]
    assert (entry["grid"], entry["threads"], entry["forloop_range"], entry["buffer_bytes"]) == (128, 128, 1, 0)
    assert 0 < entry["smem_bytes"] <= 163 * 1024
    assert set(entry["changes"]) == set(CHANGES)


def test_the_emitted_text_is_kept_unchanged(built):
    (entry,) = own_kernel.read_index(built)["kernels"]
    text = (built / entry["source"]).read_text()
    assert text == own_kernel._export(*SMALL).source
    assert hashlib.sha256(text.encode()).hexdigest() == entry["source_sha256"]


def test_the_library_holds_sm_90_code_and_its_entry(built):
    (entry,) = own_kernel.read_index(built)["kernels"]
    library = (built / entry["library"]).read_bytes()
    for symbol in (entry["entry"], "mirage_own_error", "__wrap___cudaPushCallConfiguration", "custom_kernel_0"):
        assert symbol.encode() in library, symbol
    if cuobjdump := shutil.which("cuobjdump"):
        listed = subprocess.run([cuobjdump, "--list-elf", str(built / entry["library"])], capture_output=True, text=True).stdout
        assert "sm_90" in listed


def test_launches_go_to_the_stream_that_was_given(built, tmp_path):
    """The library runs against a CUDA runtime that only records what it is asked for."""
    (entry,) = own_kernel.read_index(built)["kernels"]
    source, runtime = tmp_path / "runtime.c", tmp_path / "libcudart.so.13"
    source.write_text(FAKE_RUNTIME)
    versions = tmp_path / "versions"
    versions.write_text("libcudart.so.13 { global: *; };")
    link = ["-shared", "-fPIC", "-Wl,-soname,libcudart.so.13", f"-Wl,--version-script={versions}"]
    subprocess.run(["gcc", *link, str(source), "-o", str(runtime)], check=True)
    script = tmp_path / "launch.py"
    script.write_text(LAUNCH)
    arguments = [sys.executable, str(script), str(runtime), str(built / entry["library"]), entry["entry"]]
    answer = json.loads(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout)
    assert answer == {
        "status": 0,
        "streams": [77, 77],
        "blocks": [-(-SMALL[0] * SMALL[2] // 512), 128],
        "threads": [512, 128],
        "shared": [0, entry["smem_bytes"]],
        "failed": 719,
    }


FAKE_RUNTIME = r"""
#include <stddef.h>
typedef struct { unsigned x, y, z; } dim3;
int launches, threads[8], blocks[8], shared[8], error;
size_t streams[8];
static dim3 grid, block; static size_t bytes; static void *stream;
unsigned __cudaPushCallConfiguration(dim3 g, dim3 b, size_t s, void *t) { grid = g; block = b; bytes = s; stream = t; return 0; }
int __cudaPopCallConfiguration(dim3 *g, dim3 *b, size_t *s, void *t) { *g = grid; *b = block; *s = bytes; *(void **)t = stream; return 0; }
int cudaLaunchKernel(const void *f, dim3 g, dim3 b, void **a, size_t s, void *t) {
  blocks[launches] = g.x; threads[launches] = b.x; shared[launches] = s; streams[launches++] = (size_t)t; return 0;
}
int __cudaLaunchKernel(void *f, dim3 g, dim3 b, void **a, size_t s, void *t) { return cudaLaunchKernel(f, g, b, a, s, t); }
int __cudaGetKernel(void **kernel, const void *f) { *kernel = (void *)f; return 0; }
int cudaFuncSetAttribute(const void *f, int attribute, int value) { return 0; }
int cudaGetLastError(void) { return error; }
int cudaPeekAtLastError(void) { return error; }
const char *cudaGetErrorString(int e) { return "recorded"; }
void **__cudaRegisterFatBinary(void *b) { static void *handle; return &handle; }
void __cudaRegisterFatBinaryEnd(void **h) {}
void __cudaUnregisterFatBinary(void **h) {}
void __cudaRegisterFunction(void) {}
void __cudaRegisterVar(void) {}
char __cudaInitModule(void **h) { return 1; }
"""

LAUNCH = """
import ctypes, json, sys
runtime = ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
launch = getattr(ctypes.CDLL(sys.argv[2]), sys.argv[3])
launch.argtypes = [ctypes.POINTER(ctypes.c_void_p)] * 2 + [ctypes.c_void_p] * 2
inputs, outputs = (ctypes.c_void_p * 4)(16, 32, 48, 64), (ctypes.c_void_p * 2)(80, 96)
answer = {"status": launch(inputs, outputs, None, 77)}
count = ctypes.c_int.in_dll(runtime, "launches").value
for name, kind in (("streams", ctypes.c_size_t), ("blocks", ctypes.c_int), ("threads", ctypes.c_int), ("shared", ctypes.c_int)):
    answer[name] = list((kind * 8).in_dll(runtime, name))[:count]
ctypes.c_int.in_dll(runtime, "error").value = 719
answer["failed"] = launch(inputs, outputs, None, 77)
print(json.dumps(answer))
"""


FAILING_NVCC = """#!/bin/sh
[ $1 = --version ] && echo 'release 1.0' && exit
case $* in *8.so) echo 'x(1): error: no' >&2; exit 1; esac
"""


def test_a_text_that_does_not_compile_is_reported(monkeypatch, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(FAILING_NVCC)
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    export = SimpleNamespace(
        mirage_version="0.2.2",
        source="half_t custom_kernel_0<<<grid_dim>>>",
        smem_bytes=1,
        buffer_bytes=0,
        graph=SimpleNamespace(inputs=range(4), outputs=range(2)),
    )
    monkeypatch.setattr(own_kernel, "_export", lambda *key: export)
    monkeypatch.setattr(own_kernel, "_mirage_include", lambda: tmp_path)
    path = own_kernel.build(tmp_path / "out", [(256, 1024)], [1, 8])
    index = json.loads(path.read_text())
    assert [entry["tokens"] for entry in index["kernels"]] == [1]
    assert [(entry["tokens"], entry["failed"]) for entry in index["not_compiled"]] == [(8, "does not compile: x(1): error: no")]
    with pytest.raises(OwnKernelError, match="nothing that Mirage emitted compiles"):
        own_kernel.build(tmp_path / "out", [(256, 1024)], [8])


def test_text_of_another_dtype_is_refused():
    with pytest.raises(OwnKernelError, match="bfloat16_t"):
        own_kernel._dtype("bfloat16_t *x; half_t *y;")


def test_a_crash_or_a_hang_stops_no_other_kernel(monkeypatch, tmp_path):
    """The worker is replaced by one that dies in the second of four kernels, hangs in the third and reports the others."""
    worker = tmp_path / "worker"
    worker.write_text(f"#!{sys.executable}\n{TROUBLED}")
    worker.chmod(0o755)
    monkeypatch.setattr(own_kernel.sys, "executable", str(worker))
    keys = [(256, 1024, tokens) for tokens in (1, 8, 16, 32)]
    results = own_kernel.check(tmp_path, keys, patience=2)
    assert [entry["tokens"] for entry in results] == [1, 8, 16, 32]
    endings = [None, "the process ended with status -6", "the kernel hung: no result in 2 s", None]
    assert [entry.get("failed") for entry in results] == endings


TROUBLED = """
import json, os, sys, time
report, keys = sys.argv[-2:]
for k, n, tokens in json.loads(keys):
    if tokens == 8:
        os.abort()
    if tokens == 16:
        time.sleep(600)
    with open(report, "a") as stream:
        stream.write(json.dumps({"k": k, "n": n, "tokens": tokens}) + "\\n")
"""


def test_the_table_shows_errors_times_and_failures():
    place = {"k": 256, "n": 1024, "dtype": "float16"}
    good = place | {"tokens": 8, "error": 1e-2, "stock_error": 3e-4, "us": 10.0, "stock_us": 5.0, "repeats_equal": 20}
    good |= {"replay_error": 1e-2, "residual_equal": True}
    wrong = good | {"tokens": 1, "error": None, "replay_error": None}
    not_captured = good | {"replay_error": None}
    lines = own_kernel.table([good, wrong, not_captured, place | {"tokens": 16, "failed": "the process ended"}]).splitlines()[1:]
    assert "1.00e-02" in lines[0] and "3.00e-04" in lines[0] and "0.50×" in lines[0] and lines[0].endswith("20 of 20")
    assert "not finite" in lines[1] and lines[1].endswith("20 of 20")
    assert lines[2].endswith("a replayed graph errs not finite")
    assert lines[3].endswith("the process ended")


@pytest.mark.parametrize("shape", ["300x1024", "256x1000"])
def test_shapes_that_do_not_divide_are_refused(shape):
    k, n = own_kernel._shape(shape)
    with pytest.raises(OwnKernelError, match="K must be a multiple of 256, N of 128"):
        own_kernel._export(k, n, 8)


def test_a_check_without_a_gpu_says_so(monkeypatch, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / own_kernel.INDEX).write_text('{"kernels": []}')
    assert command_line.main(["own", "--check", str(tmp_path)]) == 2
    assert "need a GPU, and PyTorch finds none" in capsys.readouterr().err


def test_a_folder_without_an_index_names_the_command(tmp_path, capsys):
    assert command_line.main(["own", "--check", str(tmp_path)]) == 2
    assert f"own --output {tmp_path} builds it" in capsys.readouterr().err
