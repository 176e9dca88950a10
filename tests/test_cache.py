# SPDX-License-Identifier: Apache-2.0
"""The cubin cache among other users, other processes and dead ones. test_kernels.py holds damaged, writable and symlinked entries."""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

KERNELS = Path(__file__).parent.parent / "patches/vllm/model_executor/layers/mirage_kernels"
PROCESSES = 8

# A process of its own: compiles through the cache as soon as the file `go` is there. Without torch, so that it starts fast.
COMPILE = """
import hashlib, json, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import compiler, plans
folder, go, compiled = Path(sys.argv[2]), Path(sys.argv[3]), []
builds = [compiler.Build("rms_norm.cu", tuple(sorted(plans.row_defines(1024).items())), "sm_90")]
compiler.nvrtc_version()
(folder.parent / f"ready-{sys.argv[4]}").touch()
while not go.exists():
    time.sleep(0.001)
cubins = compiler.CubinCache(folder).get(builds, compiled.append)
print(json.dumps([sum(compiled), [hashlib.sha256(cubin).hexdigest() for cubin in cubins]]))
"""

# Dies holding the lock, in the middle of the first compilation.
DIE = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import compiler
compiler.nvrtc_version = lambda: "13.0"
compiler.compile_cubin = lambda build: os.kill(os.getpid(), 9)
compiler.CubinCache(Path(sys.argv[2])).get([compiler.Build("linear.cu", (), "sm_90")])
"""


@pytest.fixture
def compiler():
    """compiler.py as a module of this test's own, so that nothing patched in it outlives the test."""
    spec: Any = importlib.util.spec_from_file_location("cache_under_test", KERNELS / "compiler.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def compiled(compiler, monkeypatch):
    """The builds that were compiled, by a stand-in for NVRTC."""
    seen = []

    def compile_cubin(build):
        seen.append(build.source)
        return build.source.encode()

    monkeypatch.setattr(compiler, "compile_cubin", compile_cubin)
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: "13.0")
    return seen


def test_an_entry_of_another_user_is_compiled_anew(compiler, compiled, tmp_path, monkeypatch):
    cache, builds = compiler.CubinCache(tmp_path), [compiler.Build("linear.cu", (), "sm_90")]
    own = os.getuid()
    assert cache.get(builds) == cache.get(builds) == [b"linear.cu"] and len(compiled) == 1
    monkeypatch.setattr(compiler.os, "getuid", lambda: own + 1)
    assert cache.get(builds) == [b"linear.cu"] and len(compiled) == 2


def test_a_folder_in_an_entrys_place_is_an_error_at_once(compiler, compiled, tmp_path):
    cache, builds = compiler.CubinCache(tmp_path), [compiler.Build("linear.cu", (), "sm_90")]
    (tmp_path / f"{builds[0].key('13.0')}.cubin").mkdir()
    with pytest.raises(IsADirectoryError):
        cache.get(builds)


def test_a_pipe_in_an_entrys_place_is_compiled_anew(compiler, compiled, tmp_path):
    cache, builds = compiler.CubinCache(tmp_path), [compiler.Build("linear.cu", (), "sm_90")]
    entry, found = tmp_path / f"{builds[0].key('13.0')}.cubin", []
    os.mkfifo(entry, 0o600)
    reader = threading.Thread(target=lambda: found.extend(cache.get(builds)), daemon=True)
    reader.start()
    reader.join(1)
    in_time = list(found)
    while reader.is_alive():  # it opens the entry twice: each time an end of file
        with contextlib.suppress(OSError):
            os.close(os.open(entry, os.O_WRONLY | os.O_NONBLOCK))
        time.sleep(0.01)
    assert in_time == [b"linear.cu"] and entry.is_file()


def test_processes_that_compile_the_same_kernel_at_once_compile_it_once(tmp_path):
    """For real, through NVRTC: the workers of a tensor-parallel engine all start like this."""
    command = [sys.executable, "-c", COMPILE, str(KERNELS), str(tmp_path / "cache"), str(tmp_path / "go")]
    processes = [subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, text=True) for i in range(PROCESSES)]
    try:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("ready-*"))) < PROCESSES and time.monotonic() < deadline:
            time.sleep(0.01)
        (tmp_path / "go").touch()
        answers = [json.loads(process.communicate(timeout=120)[0]) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert sorted(count for count, _ in answers) == [0] * (PROCESSES - 1) + [1]
    assert len({tuple(hashes) for _, hashes in answers}) == 1
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} <= {".cubin", ".lock"}  # no temporary file is left


def test_a_process_that_comes_in_the_middle_waits_for_the_rest(compiler, compiled, tmp_path, monkeypatch):
    builds = [compiler.Build(source, (), "sm_90") for source in ("linear.cu", "rms_norm.cu")]
    compile_cubin, go_on = compiler.compile_cubin, threading.Event()

    def slow(build):
        cubin = compile_cubin(build)
        if build.source == "rms_norm.cu":
            go_on.wait(5)
        return cubin

    monkeypatch.setattr(compiler, "compile_cubin", slow)
    first = threading.Thread(target=lambda: compiler.CubinCache(tmp_path).get(builds))
    second = threading.Thread(target=lambda: compiler.CubinCache(tmp_path).get(builds))
    first.start()
    while not list(tmp_path.glob("*.cubin")):
        time.sleep(0.001)
    second.start()
    time.sleep(0.2)
    go_on.set()
    first.join()
    second.join()
    assert sorted(compiled) == ["linear.cu", "rms_norm.cu"]


def test_a_process_that_died_while_compiling_stops_nobody(compiler, compiled, tmp_path):
    died = subprocess.run([sys.executable, "-c", DIE, str(KERNELS), str(tmp_path)])
    assert died.returncode == -9 and list(tmp_path.glob("*.lock")) and not list(tmp_path.glob("*.cubin"))
    builds = [compiler.Build("linear.cu", (), "sm_90")]
    assert compiler.CubinCache(tmp_path).get(builds) == [b"linear.cu"]
