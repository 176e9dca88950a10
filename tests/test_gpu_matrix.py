# SPDX-License-Identifier: Apache-2.0
"""What vLLM can do with a Qwen3 on a GPU, in the real engine: the answers with VLLM_USE_MIRAGE=1 against those with 0.

The model has four random layers in the shapes of Qwen3-0.6B, in bf16. A row of ROWS says which ops must be fused, each with a kernel
that ran, and why the others are not; a test below it proves that the feature was in use. The rows run in several processes at once
(matrix_worker.py), only those of the tests that were selected: `-k sleep` starts two engines.

Where no kernel of ours runs, the tokens are equal. Elsewhere the two arms round at other places: the rule for bf16 of
test_mirage_qwen3.py tells that from an error.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PATCHES
from engine_worker import PROMPTS
from engines import OPS, environment
from matrix_worker import MAX_TOKENS
from test_matrix import LORA, Row, as_case, make_adapter, make_models

from test_mirage_qwen3 import TINY_SIZES, TOLERANCE, Comparison, compare_completions, make_tiny_qwen3

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

WORKER = Path(__file__).parent / "matrix_worker.py"
LIMIT_S = 240  # of one process
SIZE = "tiny-0.6b"
LAYERS = TINY_SIZES[SIZE].layers
GEMMS = tuple(op for op in OPS if op != "attention")


# ------------------------------------------------------------------------------------------------------------ rows
@dataclass(frozen=True)
class GpuRow(Row):
    """One use of a model; `reason` is said of each op that is not fused and that VLLM_MIRAGE_OPS does not leave out."""

    fused: tuple[str, ...] = OPS  # each with a kernel
    called: tuple[str, ...] = ()  # whose kernels must run: these, or all that are fused
    tolerance: float = TOLERANCE["bfloat16"]  # nats
    gpus: int = 1


ENGINE = {"dtype": "bfloat16", "max_model_len": 512, "kv_cache_memory_bytes": 64 << 20, "gpu_memory_utilization": 0.05}
COMPILED = {"enforce_eager": False}
# NCCL over the loopback device, and no other way to add: what stands between our kernels is not what is tested. No multicast in any case:
# on a machine shared with others it can put their GPUs out of service.
TWO_GPUS = {**COMPILED, "disable_custom_all_reduce": True}
TWO_GPUS_ENV = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "NCCL_SOCKET_IFNAME": "lo",
    "GLOO_SOCKET_IFNAME": "lo",
}
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 2}
ROWS = {
    "eager": GpuRow("mixed_lengths"),
    "compiled": GpuRow("mixed_lengths", llm=COMPILED),
    "prefix caching": GpuRow("twice", llm={"enable_prefix_caching": True, "block_size": 32}),
    "chunked prefill": GpuRow("long_prompts", llm={"max_num_batched_tokens": 24, "enable_chunked_prefill": True}),
    # a step that verifies has more than one token for each request, which is not the attention kernel's
    "n-gram": GpuRow("lookup", llm={"speculative_config": NGRAM}, called=GEMMS),
    "draft": GpuRow("long_prompts", llm={"speculative_config": {"model": "plain", "num_speculative_tokens": 3}}, called=GEMMS),
    "wrong draft": GpuRow("long_prompts", llm={"speculative_config": {"model": "other", "num_speculative_tokens": 3}}, called=GEMMS),
    "lora": GpuRow("adapters", llm=LORA, adapters="q_proj", fused=("attention",), reason="LoRA"),
    "lora on o_proj": GpuRow(
        "adapters",
        llm={**LORA, "lora_target_modules": ["o_proj"]},
        adapters="o_proj",
        fused=("norm_qkv", "attention", "norm_gate_up", "down_proj"),
        reason="LoRA",
    ),
    # Activations rounded to fp8 make of attention's last bit in bf16 up to 1.75 nats (simulated, 384 positions; without fp8 0.24). So fp8
    # runs once without our attention, with equal tokens, and once with it and twice that tolerance.
    "fp8": GpuRow(model="fp8", env={"VLLM_MIRAGE_OPS": ",".join(GEMMS)}, fused=(), reason="is quantised ("),
    "fp8 behind our attention": GpuRow(model="fp8", fused=("attention",), reason="is quantised (", tolerance=3.5),
    "awq": GpuRow(model="awq", fused=("attention",), reason="is quantised ("),
    "gptq": GpuRow(model="gptq", fused=("attention",), reason="is quantised ("),
    "bias": GpuRow(model="bias", fused=OPS[1:], reason="qkv_proj has a bias"),
    # a cache so large that what other processes take meanwhile does not hide what was freed
    "sleep": GpuRow("sleep", llm={"enable_sleep_mode": True, "kv_cache_memory_bytes": 8 << 30}),
    "reload": GpuRow("reload"),
    "embedding": GpuRow("embed", llm={"runner": "pooling", "convert": "embed"}, called=GEMMS),
    "moe": GpuRow("experts", model="moe", path=None, fused=()),
    "batch-invariant": GpuRow("batch_invariant", env={"VLLM_BATCH_INVARIANT": "1"}, fused=(), reason="VLLM_BATCH_INVARIANT"),
    "tensor parallel": GpuRow(llm={**TWO_GPUS, "tensor_parallel_size": 2}, env=TWO_GPUS_ENV, gpus=2),
    "pipeline parallel": GpuRow(llm={**TWO_GPUS, "pipeline_parallel_size": 2}, env=TWO_GPUS_ENV, gpus=2),
}
# The rows that share a process. Any other one has a process for each arm, because it compiles, or because vLLM allows for one such
# engine in a process (sleep mode).
SHARED = (
    ("eager", "prefix caching", "chunked prefill", "reload"),
    ("draft", "wrong draft", "n-gram", "embedding"),
    ("bias", "lora", "lora on o_proj", "moe"),
    ("fp8", "fp8 behind our attention", "awq", "gptq"),
    ("batch-invariant",),  # it stays in the process
)


# ------------------------------------------------------------------------------------------------------- processes
def visible_gpus() -> list[str]:
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return chosen.split(",") if chosen else [str(i) for i in range(torch.cuda.device_count())]


def why_not(row: GpuRow, package: Path) -> str:
    """Why the row cannot run on this machine; empty if it can."""
    if row.gpus > torch.cuda.device_count():
        return f"needs {row.gpus} GPUs"
    if row.model == "moe" and not list(package.glob("_moe_C*")):
        return f"{package} was packed without vLLM's MoE kernels (_moe_C)"
    return ""


def processes(names: Iterable[str]) -> list[list[tuple[str, str]]]:
    """What each process runs, in this order: (row, VLLM_USE_MIRAGE)."""
    names = list(names)
    shared = [[(name, switch) for name in group if name in names for switch in "01"] for group in SHARED]
    alone = [[(name, switch)] for name in names if not any(name in group for group in SHARED) for switch in "01"]
    return [runs for runs in [*alone, *shared] if runs]


def run_process(folder: Path, site: Path, cases: list[dict[str, Any]], **values: str) -> dict[str, dict[str, Any]]:
    """{name: result}; what the process did not get to has an error that says how it ended."""
    folder.mkdir(parents=True)
    (folder / "cases.json").write_text(json.dumps(cases))
    results, started = folder / "results.json", time.perf_counter()
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, str(WORKER), str(folder / "cases.json"), str(results)],
            env=environment(site, **values),
            stdout=log,
            stderr=subprocess.STDOUT,
            process_group=0,  # its workers end with it
        )
        try:
            end = f"ended with exit status {process.wait(LIMIT_S)}"
        except subprocess.TimeoutExpired:
            end = f"was stopped after {LIMIT_S} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    print(f"{', '.join(case['name'] for case in cases)}: {end}, {time.perf_counter() - started:.0f} s in all, {folder / 'log'}")
    done = json.loads(results.read_text()) if results.exists() else {}
    log_end = (folder / "log").read_text(errors="replace")[-6000:]
    lost = {"error": f"its process {end} before this row was done", "trace": log_end}
    return {case["name"]: done.get(case["name"], lost) for case in cases}


def run_rows(root: Path, site: Path, names: Iterable[str], gpus: list[str], **engine: Any) -> dict[str, dict[str, Any]]:
    """{"row=switch": result} of these rows, all processes at once, each on the next GPU."""
    plain, other = make_tiny_qwen3(root / "plain", SIZE), make_tiny_qwen3(root / "other", SIZE, seed=1)
    models = make_models(root, plain, plain, other)
    shapes = {"q_proj": (2048, 1024), "o_proj": (1024, 2048)}
    adapters = {
        name: [make_adapter(root / name / str(seed), seed, {name: shape}, LAYERS) for seed in (1, 2)] for name, shape in shapes.items()
    }

    def run(number: int, runs: list[tuple[str, str]]) -> dict[str, dict[str, Any]]:
        rows = [ROWS[name] for name, _ in runs]
        cases = [
            {"name": f"{name}={switch}", **as_case(row, switch, models, adapters, **ENGINE, **engine)}
            for row, (name, switch) in zip(rows, runs, strict=True)
        ]
        values = dict(set.intersection(*(set(row.env.items()) for row in rows)))  # some are read when vLLM is imported
        if gpus:
            first = number % len(gpus)
            values["CUDA_VISIBLE_DEVICES"] = ",".join([*gpus[first:], *gpus[:first]][: max(row.gpus for row in rows)])
        cache = os.environ.get("VLLM_CACHE_ROOT", str(root / "cache"))  # one that is warm saves seconds
        values.update(VLLM_CACHE_ROOT=cache, VLLM_USE_FLASHINFER_SAMPLER="0", VLLM_HOST_IP="127.0.0.1", OMP_NUM_THREADS="2")
        return run_process(root / f"process-{number}", site, cases, **values)

    planned = processes(names)
    with ThreadPoolExecutor(max(1, len(planned))) as pool:
        return {name: result for results in pool.map(run, range(len(planned)), planned) for name, result in results.items()}


@pytest.fixture(scope="module")
def site(request: pytest.FixtureRequest) -> Path:
    """The folder of a vLLM with this checkout's overlay: the installed one if it has it, else a copy."""
    import importlib.util

    found = importlib.util.find_spec("vllm")
    assert found is not None and found.origin is not None, "vLLM is not installed"
    package = Path(found.origin).parent
    ours = [path for path in PATCHES.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    installed = ((package / path.relative_to(PATCHES), path) for path in ours)
    if all(there.exists() and there.read_bytes() == path.read_bytes() for there, path in installed):
        return package.parent
    return request.getfixturevalue("vllm_overlay")


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, site: Path) -> dict[str, dict[str, Any]]:
    """{"row=switch": result} of the rows that the selected tests name; "skip" in place of a row that this machine cannot run."""
    selected = [item.callspec.params["name"] for item in request.session.items if item.module is request.module]  # type: ignore[attr-defined]
    skipped = {name: reason for name in dict.fromkeys(selected) if (reason := why_not(ROWS[name], site / "vllm"))}
    names = [name for name in dict.fromkeys(selected) if name not in skipped]
    ran = run_rows(tmp_path_factory.mktemp("gpu-matrix"), site, names, visible_gpus())
    return ran | {f"{name}={switch}": {"skip": reason} for name, reason in skipped.items() for switch in "01"}


def result_of(results: dict[str, Any], name: str, switch: str) -> dict[str, Any]:
    """The result of one arm; skips or fails where there is none."""
    result = results[f"{name}={switch}"]
    if "skip" in result:
        pytest.skip(result["skip"])
    if "error" in result:
        arms = [f"VLLM_USE_MIRAGE={arm}" for arm in "01" if "error" in results[f"{name}={arm}"]]
        pytest.fail(f"{name} failed with {' and '.join(arms)}: {result['error']}\n{result.get('trace', '')[-6000:]}", pytrace=False)
    return result


# ----------------------------------------------------------------------------------------------- paths and answers
def bodies_run(result: dict[str, Any], row: GpuRow) -> list[set[str]]:
    """The bodies of ops that ran in each worker: while it answered, or with CUDA graphs, which replay without a call, since the start."""
    compiled = not row.llm.get("enforce_eager", True)
    counts = [report["calls"] for report in result["reports"]] if compiled else result["calls"]
    return [{body for body, count in calls.items() if count} for calls in counts]


@pytest.mark.parametrize("name", ROWS)
def test_the_ops_take_the_rows_path(results, name):
    row, ours, stock = ROWS[name], result_of(results, name, "1"), result_of(results, name, "0")
    assert bodies_run(stock, row) == [set()] * len(stock["reports"])
    for ran in bodies_run(ours, row):
        assert {body.partition(".")[0] for body in ran} <= set(row.fused), "an op ran that is not to be fused"
        assert {f"{op}.kernel" for op in row.called or row.fused} <= ran
    if row.path is None:
        return
    layers = [layer for report in ours["reports"] for layer in report["layers"]]
    assert len({layer["name"] for layer in layers}) == (2 * LAYERS if "draft" in name else LAYERS)
    print(f"{name}: " + "; ".join(sorted({f"{layer['op']} {layer['path']} ({layer['kernel'] or layer['reason']})" for layer in layers})))
    enabled = row.env.get("VLLM_MIRAGE_OPS", ",".join(OPS)).split(",")
    for layer in layers:
        if layer["op"] in row.fused:
            assert layer["path"] == "fused" and layer["kernel"], layer
        else:
            reason = row.reason if layer["op"] in enabled else "VLLM_MIRAGE_OPS leaves it out"
            assert layer["path"] == "stock" and reason in layer["reason"], layer
    reasons = {(layer["path"], layer["reason"]) for report in stock["reports"] for layer in report["layers"]}
    assert reasons == {("stock", "VLLM_USE_MIRAGE=0")}


def compare(stock: list[dict[str, Any]], ours: list[dict[str, Any]], tolerance: float = TOLERANCE["bfloat16"]) -> Comparison:
    comparison = Comparison()
    compare_completions(stock, ours, tolerance, comparison)
    return comparison


@pytest.mark.parametrize("name", [name for name in ROWS if name != "embedding"])
def test_the_answers_are_stocks(results, name, record_property):
    ours, stock = result_of(results, name, "1"), result_of(results, name, "0")
    rounds = [compare(*pair, ROWS[name].tolerance) for pair in zip(stock["rounds"], ours["rounds"], strict=True)]
    tokens, of_tokens, largest = (f(getattr(c, key) for c in rounds) for f, key in ((sum, "tokens"), (sum, "of_tokens"), (max, "largest")))
    seconds = ", ".join(f"{result['seconds']:.1f} s" for result in (stock, ours))
    print(f"{name}: {tokens} of {of_tokens} tokens compared, log-probabilities at most {largest:.3g} apart; stock and fused ran {seconds}")
    record_property("largest", largest)
    assert not [failure for comparison in rounds for failure in comparison.failures]
    if not ROWS[name].fused:
        assert ours["tokens"] == stock["tokens"]


@pytest.mark.parametrize("name", ["embedding"])
def test_embeddings_are_stocks(results, name):
    ours, stock = (torch.tensor(result_of(results, name, switch)["vectors"]) for switch in "10")
    cosine = torch.nn.functional.cosine_similarity(ours, stock)
    print(f"{name}: cosine {cosine.min():.6f}, elements at most {(ours - stock).abs().max():.2g} apart")
    assert cosine.min() > 0.999
    torch.testing.assert_close(ours, stock, rtol=0, atol=5e-3)  # of about 0.03: vectors of length 1 with 1024 elements
    assert torch.nn.functional.cosine_similarity(ours[:1], ours[1:]).max() < 0.99  # the prompts differ


# ------------------------------------------------------------------------------- the features were in use, in both arms
def of_rows(*names: str) -> Any:
    return pytest.mark.parametrize("name", names)


@pytest.mark.parametrize("switch", "01")
class TestTheFeatureWasInUse:
    @of_rows("compiled", "tensor parallel", "pipeline parallel")
    def test_full_graphs(self, results, name, switch):
        """A decode step is a replay, in which no op is called."""
        result = result_of(results, name, switch)
        assert result["graphs"] == "FULL_AND_PIECEWISE"
        assert not any(calls.get("attention.kernel") for calls in result["calls"])

    @of_rows("prefix caching")
    def test_prefix_caching(self, results, name, switch):
        assert result_of(results, name, switch)["cached"] == [[0], [64]]

    @of_rows("chunked prefill")
    def test_chunked_prefill(self, results, name, switch):
        batches = result_of(results, name, switch)["batches"]
        assert max(map(sum, batches)) <= 24
        assert sum(max(batch) > 1 for batch in batches) >= 8  # 2 prompts of 96 tokens

    @of_rows("n-gram", "draft", "wrong draft")
    def test_speculation(self, results, name, switch):
        result = result_of(results, name, switch)
        verified = [batch for batch in result["batches"][1:] if max(batch) > 1]
        assert verified and max(map(max, verified)) == 4
        if name == "draft":
            assert result["steps"] < MAX_TOKENS

    @of_rows("lora", "lora on o_proj")
    def test_adapters(self, results, name, switch):
        none, first, mixed, second, removed = result_of(results, name, switch)["rounds"]
        assert len({str(answers[0]["token_ids"]) for answers in (none, first, second)}) == 3
        assert not compare([second[0], first[0], second[0]], mixed).failures
        assert not compare(none, removed).failures

    @of_rows("sleep")
    def test_sleep(self, results, name, switch):
        result = result_of(results, name, switch)
        before, *after = result["rounds"]
        assert min(result["freed"]) > 4 << 30
        assert not [failure for answers in after for failure in compare(before, answers).failures]
        assert result["cached"] == [[0] * len(PROMPTS)] * 3  # computed again

    @of_rows("reload")
    def test_reload(self, results, name, switch):
        before, other, after = result_of(results, name, switch)["rounds"]
        assert not compare(before, after).failures
        assert [answer["token_ids"] for answer in before] != [answer["token_ids"] for answer in other]

    @of_rows("moe")
    def test_experts(self, results, name, switch):
        modules = result_of(results, name, switch)["modules"]
        assert "Qwen3MoeDecoderLayer" in modules and "Qwen3DecoderLayer" not in modules

    @of_rows("batch-invariant")
    def test_batch_invariant(self, results, name, switch):
        assert result_of(results, name, switch)["mode"] is True

    @of_rows("tensor parallel", "pipeline parallel")
    def test_each_gpu_has_its_part(self, results, name, switch):
        reports = result_of(results, name, switch)["reports"]
        parts = [{layer["name"] for layer in report["layers"]} for report in reports]
        assert sorted(report["rank"] for report in reports) == [0, 1]
        assert [len(part) for part in parts] == ([LAYERS] * 2 if name == "tensor parallel" else [LAYERS // 2] * 2)
        assert len(set.union(*parts)) == LAYERS


@of_rows("eager", "sleep", "reload", "lora", "lora on o_proj")
def test_kernels_ran_each_time(results, name):
    """Also after the engine slept, loaded other weights or lost an adapter."""
    kernels = result_of(results, name, "1")["kernels"]
    assert min(kernels) > 0, kernels
