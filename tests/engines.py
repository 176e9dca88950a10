# SPDX-License-Identifier: Apache-2.0
"""Engines in processes of their own, for the tests that compare the overlay's answers with stock vLLM's on the CPU."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).parent / "engine_worker.py"
LIMIT_S = 400  # of one process (that of test_matrix.py took 155 s beside two others on two cores), and until a server is ready
LAYERS = [f"model.layers.{index}" for index in range(3)]
OPS = ("norm_qkv", "attention", "o_proj", "norm_gate_up", "down_proj")


def environment(site, **values):
    """For a process that imports vLLM from `site`; the caller's switch does not leak in."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    paths = [str(site), os.environ.get("PYTHONPATH", "")]
    return {
        **inherited,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "VLLM_CACHE_ROOT": str(site / "cache"),  # what vLLM finds out about a model in a process of its own is found out once
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # or vLLM refuses two workers on two cores
        **values,
    }


def run_engines(folder, site, cases, worker=WORKER, **values):
    """Run the cases in one process that imports vLLM from `site`; {name: result}."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(cases))
    with (folder / "log").open("w") as log:
        done = subprocess.run(
            [sys.executable, str(worker), str(folder / "cases.json"), str(folder / "results.json")],
            env=environment(site, **values),
            stdout=log,
            stderr=subprocess.STDOUT,
            timeout=LIMIT_S,
        )
    text = (folder / "log").read_text()
    assert done.returncode == 0, text[-4000:]
    results = json.loads((folder / "results.json").read_text())
    return {name: {**result, "log": text} for name, result in results.items()}


def case(name, model, switch=None, env=None, **more):
    engine = {"model": str(model), "enforce_eager": True, "dtype": "float32", **more.pop("llm", {})}
    switches = {} if switch is None else {"VLLM_USE_MIRAGE": switch}
    return {"name": name, "env": {**switches, **(env or {})}, "llm": engine, **more}


def paths(report):
    """(layer, op) → path"""
    return {(layer["name"], layer["op"]): layer["path"] for layer in report["layers"]}


def ops_called(report):
    """The ops of which a body ran in this worker."""
    return {name.partition(".")[0] for name, count in report["calls"].items() if count}


def assert_path(result, path, ops=OPS, reason=""):
    """Those ops of every layer took `path`, whichever worker holds it; each worker called the ops that it fused, and no other."""
    assert "error" not in result, result["error"]
    entries = [layer for report in result["reports"] for layer in report["layers"]]
    assert {(layer["name"], layer["op"]) for layer in entries} == {(layer, op) for layer in LAYERS for op in OPS}
    ours = [layer for layer in entries if layer["op"] in ops]
    assert {layer["path"] for layer in ours} == {path}
    assert all(reason in (layer["reason"] or "") for layer in ours)
    for report in result["reports"]:
        assert ops_called(report) == {layer["op"] for layer in report["layers"] if layer["path"] == "fused"}


def assert_same_answers(ours, stock):
    assert ours["tokens"] == stock["tokens"]
    torch.testing.assert_close(torch.tensor(ours["logprobs"]), torch.tensor(stock["logprobs"]), rtol=0, atol=1e-3)


@contextmanager
def serving(site, model, log_path, **more):
    """(address, process) of an OpenAI server on this fp32 model, engine in its own process, the fused path where it may run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--enforce-eager", "--max-model-len", "256", "--kv-cache-memory-bytes", str(32 << 20)]
    settings = {"VLLM_USE_MIRAGE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_SERVER_DEV_MODE": "1", **more}
    with log_path.open("w") as log:
        process = subprocess.Popen(command, env=environment(site, **settings), stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}/health", process, log_path)
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_healthy(url, process, log_path):
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log_path.read_text()[-4000:]
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    pytest.fail(f"the server was not ready after {LIMIT_S} s: {log_path.read_text()[-4000:]}")


def reports_of(url):
    """mirage_report() of the server's workers."""
    request = urllib.request.Request(f"{url}/collective_rpc", b'{"method": "mirage_report"}', {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)["results"]
