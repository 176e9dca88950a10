# SPDX-License-Identifier: Apache-2.0
"""benchmark_mirage.py: statistics, refusals, comparison, pictures, and one run of the default level on a CPU."""

import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import numpy as np
import pytest

import benchmark_mirage as bench

ROOT = Path(__file__).parent.parent
PNG = b"\x89PNG"


def noise(mean: float, count: int, seed: int, spread: float = 0.01) -> list[float]:
    return list(mean * (1 + spread * np.random.default_rng(seed).standard_normal(count)))


def report(level: str = "step", stock: float = 2.0, mirage: float = 1.6, rounds: int = 10, seed: int = 0) -> dict:
    """A finished GPU report with made-up samples: batch sizes 1 and 4."""
    rows = []
    for batch in (1, 4):
        line = bench.row("Qwen3-0.6B", bench.PLOTTED[level], batch, "ms", floor=0.2)
        line["samples"] = {
            "stock": noise(stock, rounds, seed + batch),
            "mirage": noise(mirage, rounds, seed + batch + 100),
        }
        rows.append(line)
    layer = {"name": "model.layers.0", "op": "norm_qkv", "path": "fused", "kernel": "k", "reason": None}
    empty = {"switch": "0", "overlay_version": "0", "layers": [], "calls": {"norm_qkv.kernel": 0}}
    result = {
        "schema": bench.SCHEMA,
        "level": level,
        "command": "benchmark_mirage.py",
        "date": "today",
        "rows": rows,
        "environment": {"gpu": "made up", "torch": "2", "vllm": "0", "cuda": "13"},
        "settings": {"num_iterations": rounds, "num_warmup": 1, "dtype": "?", "fresh": False, "enforce_eager": False},
        "peak_memory_bytes": {"stock": 1 << 30, "mirage": 1 << 30},
        "reports": {"stock": empty, "mirage": {**empty, "layers": [layer], "calls": {"norm_qkv.kernel": 7}}},
    }
    bench.finish(result)
    return result


# --- statistics


def test_summary_is_median_and_outer_deciles() -> None:
    assert bench.summarize([float(n) for n in range(11)]) == {"median": 5.0, "p10": 1.0, "p90": 9.0, "n": 11}


def test_interval_of_a_clear_speedup_holds_the_truth_and_not_one() -> None:
    speedup = bench.paired_speedup(noise(2.0, 40, 1), noise(1.6, 40, 2))
    assert 1 < speedup["low"] <= 1.25 <= speedup["high"]
    assert speedup["verdict"] == "faster"
    assert bench.paired_speedup(noise(1.6, 40, 2), noise(2.0, 40, 1))["verdict"] == "slower"


def test_equal_arms_show_no_difference() -> None:
    assert bench.paired_speedup(noise(2.0, 40, 1), noise(2.0, 40, 2))["verdict"] == "no difference"


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    hits = 0
    for seed in range(200):
        speedup = bench.paired_speedup(noise(1.0, 10, 2 * seed, 0.05), noise(1.0, 10, 2 * seed + 1, 0.05))
        hits += speedup["low"] <= 1 <= speedup["high"]
    assert hits >= 180  # nominal 190 of 200


def test_drift_that_both_arms_share_cancels() -> None:
    drift = np.linspace(1, 3, 20)
    speedup = bench.paired_speedup(list(drift * noise(1.1, 20, 1)), list(drift * noise(1.0, 20, 2)))
    assert speedup["low"] > 1.05
    assert speedup["high"] < 1.15


def test_more_tokens_per_second_is_faster() -> None:
    speedup = bench.paired_speedup(noise(100, 20, 1), noise(120, 20, 2), better="higher")
    assert speedup["verdict"] == "faster"
    assert speedup["ratio"] == pytest.approx(1.2, rel=0.02)


def test_four_rounds_give_a_ratio_but_no_interval() -> None:
    speedup = bench.paired_speedup([2.0] * 4, [1.0] * 4)
    assert speedup["ratio"] == 2
    assert speedup["low"] is None
    assert "too few" in speedup["verdict"]


def test_samples_that_are_no_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="no pairs"):
        bench.paired_speedup([1.0] * 5, [1.0] * 6)


# --- when no speed-up may be printed


def test_a_report_gives_the_speedup_when_the_fused_path_ran(capsys: pytest.CaptureFixture[str]) -> None:
    result = report()
    bench.print_report(result)
    assert result["reason"] is None
    assert {line["speedup"]["verdict"] for line in result["rows"]} == {"faster"}
    assert "No speed-up" not in capsys.readouterr().out


def break_gpu(result: dict[str, Any]) -> None:
    result["environment"]["gpu"] = None


def break_layers(result: dict[str, Any]) -> None:
    result["reports"]["mirage"]["layers"][0] |= {"path": "stock", "kernel": None, "reason": "LoRA is active"}


def break_calls(result: dict[str, Any]) -> None:
    result["reports"]["mirage"]["calls"] = {"norm_qkv.kernel": 0, "norm_qkv.torch": 9}


def break_stock(result: dict[str, Any]) -> None:
    result["reports"]["stock"]["calls"] = {"norm_qkv.kernel": 3}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (break_gpu, "no GPU"),
        (break_layers, "LoRA is active"),
        (break_calls, "no Mirage kernel was launched"),
        (break_stock, "stock arm launched"),
    ],
)
def test_without_the_fused_path_the_reason_stands_in_place_of_a_speedup(
    change: Any, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    result = report()
    change(result)
    bench.finish(result)
    assert [line["speedup"] for line in result["rows"]] == [None, None]
    bench.print_report(result)
    out = capsys.readouterr().out
    assert "No speed-up is reported: " in out
    assert said in out
    assert "1.25" not in out


def test_kernel_level_without_any_kernel_says_why() -> None:
    result = report("kernel")
    for line in result["rows"]:
        line |= {"note": "sm_75 is too old", "samples": {"stock": [], "mirage": []}}
    bench.finish(result)
    assert result["reason"] == "sm_75 is too old"


# --- wrong input


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "benchmark_mirage.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, check=False)


def test_wrong_input_is_one_sentence_and_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "no.json").write_text("[]")
    cases = [
        (["--batch-sizes", "0"], "expected a whole number from 1, found '0'"),
        (["--batch-sizes", "1", "two"], "found 'two'"),
        (["--num-iterations", "-3"], "found '-3'"),
        (["--level", "all"], "invalid choice: 'all'"),
        (["--prompts", str(tmp_path / "missing.txt")], "missing.txt"),
        (["--prompts", str(tmp_path / "empty.txt")], "is empty"),
        (["--model", "Qwen4"], "Unknown model 'Qwen4'"),
        (["--model", str(tmp_path)], "holds no config.json"),
        (["--max-tokens", "5000"], "raise --max-model-len"),
        (["--level", "kernel", "--profile", "a.png"], "--profile"),
        (["--from-json", str(tmp_path / "missing.json")], "missing.json"),
        (["--compare", str(tmp_path / "no.json")], "no report of this benchmark"),
    ]
    for arguments, said in cases:
        assert bench.main(arguments) == 2, arguments
        error = capsys.readouterr().err.strip()
        assert said in error, arguments
        assert len(error.splitlines()) == 1, error


def test_wrong_input_ends_the_process_with_status_2() -> None:
    answer = run("--batch-sizes", "0")
    assert answer.returncode == 2
    assert answer.stdout == ""
    assert "Traceback" not in answer.stderr


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
@pytest.mark.parametrize("level", ["step", "kernel"])
def test_gpu_levels_refuse_a_machine_without_a_gpu(level: str, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert bench.main(["--level", level]) == 2
    assert "no NVIDIA GPU" in capsys.readouterr().err


# --- comparing, drawing, the JSON


def test_compare_flags_what_became_slower_and_nothing_else() -> None:
    sentences, regressions = bench.compare(report(mirage=1.6), report(mirage=1.8, seed=7))
    assert regressions == 2
    assert [s for s in sentences if s.startswith("REGRESSION")] == [s for s in sentences if ", mirage:" in s]
    assert bench.compare(report(), report(seed=7))[1] == 0
    assert any(s.startswith("Improvement") for s in bench.compare(report(), report(mirage=1.2))[0])


def test_compare_exits_with_1_on_a_regression_and_0_without(tmp_path: Path) -> None:
    old, same, slow = (tmp_path / name for name in ("old.json", "same.json", "slow.json"))
    old.write_text(json.dumps(report()))
    same.write_text(json.dumps(report(seed=7)))
    slow.write_text(json.dumps(report(mirage=1.9)))
    assert bench.main(["--from-json", str(same), "--compare", str(old)]) == 0
    assert bench.main(["--from-json", str(slow), "--compare", str(old)]) == 1


def test_compare_refuses_another_level_and_names_another_gpu() -> None:
    with pytest.raises(bench.UsageError, match="Cannot compare level"):
        bench.compare(report("step"), report("kernel"))
    other = report()
    other["environment"]["gpu"] = "another"
    assert "Different gpu: made up then, another now." in bench.compare(report(), other)[0]


@pytest.mark.parametrize("level", ["serve", "step", "kernel"])
def test_an_earlier_report_can_be_drawn_elsewhere(level: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "old.json").write_text(json.dumps(report(level)))
    assert bench.main(["--from-json", str(tmp_path / "old.json"), "--plot", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)


def test_several_models_share_one_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = report("kernel")
    result["rows"] += [{**line, "case": "Qwen3-8B"} for line in result["rows"]]
    bench.draw(result, tmp_path / "k.png")
    assert (tmp_path / "k.png").read_bytes().startswith(PNG)


def layer_events(layers: int) -> list[dict[str, Any]]:
    names = ["triton_red_fused_add_rms", "nvjet_qkv", "reshape_and_cache_flash_kernel", "flash_fwd", "nvjet_o_proj"]
    return [{"name": name, "start": 100.0 + 5 * i, "duration": 4.0} for i, name in enumerate(names * layers)]


def test_a_layer_is_cut_from_one_cache_write_to_the_next() -> None:
    layer = bench.one_layer(layer_events(6))
    assert [event["start_us"] for event in layer] == [0, 5, 10, 15, 20]
    kinds = ["KV cache write", "attention", "linear layer", "norm, RoPE, activation", "linear layer"]
    assert [event["kind"] for event in layer] == kinds
    with pytest.raises(bench.MeasurementError, match="no timeline"):
        bench.one_layer(layer_events(1))


def test_every_generated_kernel_counts_as_ours_and_vllms_own_do_not() -> None:
    folder = ROOT / "patches" / "vllm" / "model_executor" / "layers" / "mirage_kernels"
    assert {bench.kernel_kind(path.stem) for path in folder.glob("*.cu")} == {"Mirage kernel"}
    stock = ("void vllm::fused_add_rms_norm_kernel<bf16>", "triton_red_fused_add_mul_rms_norm_0", "nvjet_linear_tst")
    assert "Mirage kernel" not in {bench.kernel_kind(name) for name in stock}


def test_the_timeline_is_drawn_from_a_report(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = report()
    layer = bench.one_layer(layer_events(6))
    result["timeline"] = {"batch": 1, "stock": layer, "mirage": layer[:-1]}
    bench.draw_timeline(result, tmp_path / "t.png")
    assert (tmp_path / "t.png").read_bytes().startswith(PNG)


def test_both_arms_get_the_same_prompts_and_every_prompt_has_its_turn() -> None:
    turns = [bench.pick_prompts(9, 2, number, seed=0) for number in range(9)]
    assert turns == [bench.pick_prompts(9, 2, number, seed=0) for number in range(9)]
    assert {i for turn in turns for i in turn} == set(range(9))
    assert bench.pick_prompts(9, 2, -1, seed=0) == turns[0]


def test_equal_tokens_are_counted_and_dummy_weights_prove_nothing() -> None:
    pair = ([[1, 2], [3, 4]], [[1, 2], [3, 5]])
    assert bench.compare_tokens([pair], dummy=False)["text"] == "1 of 2 sequences have equal tokens in both arms"
    assert "proves nothing" in bench.compare_tokens([pair], dummy=True)["text"]


# --- the worker


def engine_with(runner: Any) -> bench.Bench:
    """A Bench whose engine holds the given model runner where vLLM holds it."""
    worker = bench.Bench()
    executor = SimpleNamespace(driver_worker=SimpleNamespace(worker=SimpleNamespace(model_runner=runner)))
    core = SimpleNamespace(engine_core=SimpleNamespace(model_executor=executor))
    worker.llm = SimpleNamespace(llm_engine=SimpleNamespace(engine_core=core))
    return worker


def test_only_decode_graphs_are_replayed() -> None:
    @dataclasses.dataclass(frozen=True)
    class Descriptor:
        num_tokens: int
        num_reqs: int | None
        num_ubatches: int = 1

    captured = {Descriptor(1, 1): "one", Descriptor(8, 8): "eight", Descriptor(8, None): "piecewise"}
    captured |= {Descriptor(16, 8): "two tokens each", Descriptor(8, 8, 2): "split in two"}
    manager = SimpleNamespace(graphs=captured)
    worker = engine_with(SimpleNamespace(cudagraph_manager=manager))
    assert worker._decode_graphs() == {1: "one", 8: "eight"}
    worker.filled = 8, 128  # requests that decode, and their context
    assert worker._graph() == "eight"


def test_an_engine_without_decode_graphs_is_refused() -> None:
    with pytest.raises(bench.MeasurementError, match="V1 model runner"):
        engine_with(SimpleNamespace())._decode_graphs()
    with pytest.raises(bench.MeasurementError, match="no decode graph"):
        engine_with(SimpleNamespace(cudagraph_manager=SimpleNamespace(graphs={})))._decode_graphs()


def test_a_worker_reports_its_failure_and_its_death(tmp_path: Path) -> None:
    worker = bench.Worker("mirage", tmp_path, offline=True)
    try:
        worker.call("random_prompts", lengths=[3], vocab=10, seed=0)
        with pytest.raises(bench.MeasurementError, match=r"The mirage arm failed: AssertionError: no batch decodes"):
            worker.call("step", replays=1)
        worker.process.kill()
        with pytest.raises(bench.MeasurementError, match="ended with status -9"):
            worker.call("describe")
    finally:
        worker.close()


# --- the GPU levels with the GPU's answers made up: everything but the device itself


DESCRIPTION = {"gpu": "made up", "cuda": "13", "torch": "2", "vllm": "0", "peak_memory_bytes": 1}


class MadeUpWorker:
    """Answers as a worker on a GPU would; mirage takes 0.8 of stock's time."""

    turns: ClassVar[list[tuple[str, int]]] = []  # arm and requests of each decode step, in order
    fills: ClassVar[list[tuple[str, int, int]]] = []  # arm, requests and context, where a worker held others
    starts: ClassVar[list[str]] = []  # arms

    def __init__(self, arm: str, *_: Any, **__: Any) -> None:
        self.arm, self.process = arm, SimpleNamespace(pid=id(self))
        self.filled = 0, 0

    def call(self, command: str, **arguments: Any) -> Any:
        return getattr(self, command)(**arguments)

    def close(self) -> None:
        pass

    def start(self, engine: dict[str, Any]) -> float:
        self.starts.append(self.arm)
        return 9.0

    def fill(self, batch: int, context: int, vocab: int, seed: int) -> list[int]:
        if self.filled != (batch, context):
            self.fills.append((self.arm, batch, context))
            self.filled = batch, context
        return [1, 2, 4, 32]

    def step(self, replays: int) -> float:
        self.turns.append((self.arm, self.filled[0]))
        return (1.0 if self.arm == "stock" else 0.8) * self.filled[0]

    def launch(self, times: int) -> dict[str, float]:
        assert self.filled[0] == 1
        return {"host": 0.2, "whole": 1.0}

    def timeline(self) -> list[dict[str, Any]]:
        return [{"name": f"{self.arm} {self.filled}"}]

    def copy_bandwidth(self) -> float:
        return 4e12

    def layer_bytes(self) -> int:
        return 2 * 10**9

    def prefill(self, vocab: int, seed: int) -> dict[str, float]:
        return {"wall": 10.0, "kernels": 8.0}

    def mixed(self, vocab: int, seed: int, steps: int) -> dict[str, float]:
        return {"wall": 5.0, "kernels": 2.0}

    def kernel(self, size: str, op: str, batch: int, rounds: int, **_: Any) -> dict[str, Any]:
        if batch == 4:
            raise bench.MeasurementError("log\nThe mirage arm failed: illegal address")
        if batch == 2:
            return {"reason": "no kernel for 2 tokens"}
        samples = {"stock": [5.0] * rounds, "mirage": [4.0] * rounds}
        answer = {"samples": samples, "errors": {"stock": 1e-3, "mirage": 1e-3}, "copies": 9, "kernel": "k"}
        return answer | {"bytes": 8_000_000, "overlapping": 3.0, "bare_read": 3.2}

    def describe(self) -> dict[str, Any]:
        return DESCRIPTION | {"report": report()["reports"][self.arm]}


MODEL = bench.Model("made up", "/", True, False, 100, 4096, 1)


def unfinished(level: str) -> dict[str, Any]:
    return report(level) | {"rows": [], "reports": {}, "environment": {}, "peak_memory_bytes": {}}


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> bench.Session:
    """Both arms as made-up workers that live side by side."""
    monkeypatch.setattr(bench, "Worker", MadeUpWorker)
    for seen in (MadeUpWorker.turns, MadeUpWorker.fills, MadeUpWorker.starts):
        cast(list, seen).clear()
    session = bench.Session(Path("."), {}, True, fresh=False)
    session.workers = {arm: cast(bench.Worker, MadeUpWorker(arm)) for arm in bench.ARMS}
    return session


def test_the_step_level_alternates_and_compares_with_the_floor(made_up: bench.Session) -> None:
    options = bench.parse(["--level", "step", "--batch-sizes", "1", "4", "--num-iterations", "5", "--num-warmup", "2"])
    result = unfinished("step")
    bench.run_step(made_up, options, MODEL, result, bench.Screen(result))
    bench.finish(result)
    assert MadeUpWorker.turns == [("stock", 1), ("mirage", 1)] * 7 + [("stock", 4), ("mirage", 4)] * 7
    assert [line["speedup"]["ratio"] for line in result["rows"]] == [1.25, 1.25, 1.0, 1.0]
    assert [line["stock"]["median"] for line in result["rows"][:2]] == [1.0, 4.0]
    assert [line["floor"] for line in result["rows"]] == [0.5, 0.5, None, None]  # ms: 2 GB at 4 TB/s
    assert bench.floor_text(result["rows"][0], "floor").endswith("(50%, 62%)")
    options.batch_sizes = [3]
    with pytest.raises(bench.UsageError, match=r"No decode graph is captured for batch \[3\]"):
        bench.run_step(made_up, options, MODEL, unfinished("step"), bench.Screen(result))


def test_each_batch_size_is_measured_while_exactly_so_many_requests_decode(made_up: bench.Session) -> None:
    options = bench.parse(["--level", "step", "--batch-sizes", "1", "4", "--num-iterations", "5", "--input-len", "64", "300"])
    result = unfinished("step")
    bench.run_step(made_up, options, MODEL, result, bench.Screen(result))
    filled = [(batch, context) for context in (64, 300) for batch in (1, 4)]
    assert MadeUpWorker.fills == [(arm, *what) for what in filled for arm in bench.ARMS]  # once for all of its rounds
    layers = bench.profile_layers(made_up, options, MODEL)
    assert [layers[arm] for arm in bench.ARMS] == [[{"name": f"{arm} (1, 300)"}] for arm in bench.ARMS]


def test_a_fresh_process_measures_every_batch_size_in_its_turn(made_up: bench.Session) -> None:
    made_up.fresh = True
    options = bench.parse(["--level", "step", "--batch-sizes", "1", "4", "--num-iterations", "5", "--num-warmup", "1", "--fresh"])
    result = unfinished("step")
    bench.run_step(made_up, options, MODEL, result, bench.Screen(result))
    assert MadeUpWorker.starts == ["stock", "mirage"] * 5
    assert MadeUpWorker.turns == [(arm, batch) for arm in bench.ARMS for batch in (1, 4, 1, 4)] * 5  # the warm-up round first
    assert all(len(line["samples"][arm]) == 5 for line in result["rows"] for arm in bench.ARMS)


def test_an_interrupted_run_keeps_its_whole_rounds(made_up: bench.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    options = bench.parse(["--level", "step", "--batch-sizes", "1", "4", "--num-iterations", "5", "--num-warmup", "1"])
    rounds = MadeUpWorker.step

    def measured(turns: int) -> dict[str, Any]:
        def step(self: MadeUpWorker, replays: int) -> float:
            if len(MadeUpWorker.turns) == turns:
                raise KeyboardInterrupt
            return rounds(self, replays)

        MadeUpWorker.turns.clear()
        monkeypatch.setattr(MadeUpWorker, "step", step)
        result = unfinished("step")
        with pytest.raises(KeyboardInterrupt):
            bench.run_step(made_up, options, MODEL, result, bench.Screen(result))
        bench.keep_whole_rounds(result)
        bench.finish(result)
        return result

    result = measured(12 + 2 + 5)  # batch 4 in its third round, mirage's turn
    assert result["interrupted"] and result["reason"] is None
    decode = [line for line in result["rows"] if line["metric"] == "decode step"]
    assert [(line["batch"], line["stock"]["n"], line["mirage"]["n"]) for line in decode] == [(1, 5, 5), (4, 2, 2)]
    assert [line["speedup"]["ratio"] for line in decode] == [1.25, 1.25]
    for turns in (0, 2, 11):  # before the arms have described themselves
        with pytest.raises(KeyboardInterrupt):
            measured(turns)


def test_an_interrupted_run_writes_its_report_and_exits_with_130(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "report.json"
    monkeypatch.setattr(bench, "measure", lambda *_: report() | {"interrupted": True})
    arguments = ["--level", "step", "--json", str(path), "--profile", str(tmp_path / "layer.png")]
    assert bench.main(arguments) == 130
    assert len(json.loads(path.read_text())["rows"]) == 2
    assert "Interrupted: these are the whole rounds measured until then." in capsys.readouterr().out

    def nothing(*_: Any) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGTERM)  # as `timeout` does
        raise AssertionError

    monkeypatch.setattr(bench, "measure", nothing)
    assert bench.main(arguments) == 130
    assert capsys.readouterr().err == "Interrupted before anything was measured.\n"

    def drawn(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    path.unlink()
    monkeypatch.setattr(bench, "measure", lambda *_: report())
    monkeypatch.setattr(bench, "print_report", drawn)
    assert bench.main(arguments) == 130
    assert capsys.readouterr().err == "Interrupted.\n" and len(json.loads(path.read_text())["rows"]) == 2


@pytest.mark.parametrize(("contexts", "more"), [(["128"], 4), (["64", "256"], 4), (["256", "300"], 0)])
def test_the_step_level_takes_several_contexts_and_adds_prefill_to_short_ones(
    contexts: list[str], more: int, made_up: bench.Session
) -> None:
    options = bench.parse(["--level", "step", "--batch-sizes", "1", "32", "--num-iterations", "5", "--input-len", *contexts])
    result = unfinished("step")
    bench.run_step(made_up, options, MODEL, result, bench.Screen(result))
    bench.finish(result)
    decode = [line for line in result["rows"] if line["floor"]]
    assert [line["batch"] for line in decode] == [1, 32] * len(contexts) and len({line["metric"] for line in decode}) == len(contexts)
    assert len(result["rows"]) == len(decode) + 2 + more
    assert all(len(line["samples"][arm]) == 5 for line in result["rows"] for arm in bench.ARMS)


def test_the_kernel_level_goes_on_after_a_crash_and_says_what_has_no_kernel(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "Worker", MadeUpWorker)
    options = bench.parse(["--level", "kernel", "--model", "8B", "--batch-sizes", "1", "2", "4", "8"])
    result = unfinished("kernel")
    bench.run_kernel(options, tmp_path, result, bench.Screen(result))
    bench.finish(result)
    bench.print_report(result)
    notes = [None, "no kernel for 2 tokens", "The mirage arm failed: illegal address", None]
    assert [line["note"] for line in result["rows"]] == notes * len(bench.LAYER_OPS)
    ratios = [line["speedup"] and line["speedup"]["ratio"] for line in result["rows"]]
    assert ratios == [1.25, None, None, 1.25] * len(bench.LAYER_OPS)
    assert result["rows"][0]["floor"] == 2.0  # µs: 8 MB at 4 TB/s
    header, lines = bench.table(result)
    assert [line[header.index("bare read (share reached)")] for line in lines[:4]] == ["3.200 (64%, 80%)", "-", "-", "3.200 (64%, 80%)"]
    assert "stock 1.0e-03, mirage 1.0e-03" in capsys.readouterr().out


def test_the_kernel_level_checks_both_sides_against_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from mirage_codegen import layer

    class TwiceTooLarge:
        name, max_tokens = "wrong", 16

        def __call__(self, hidden: Any, residual: Any, gamma: Any, weight: Any, eps: float) -> tuple[Any, Any]:
            normed, stream = layer.stock_norm(hidden, residual, gamma)
            return 2 * torch.nn.functional.linear(normed, weight), stream

    package = SimpleNamespace(prepare=lambda op, alone, **_: TwiceTooLarge())
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__path__=[], __spec__=None))
    for name in ("vllm.model_executor", "vllm.model_executor.layers"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(__path__=[], __spec__=None))
    monkeypatch.setitem(sys.modules, "vllm.model_executor.layers.mirage_kernels", package)
    monkeypatch.setitem(layer.MODELS, "small", layer.LayerShape(64, 2, 1, 64))
    monkeypatch.setattr(layer, "stock_norm", layer.stock_norm._torchdynamo_orig_callable)  # type: ignore[attr-defined]  # not compiled
    read: list[int] = []  # addresses
    monkeypatch.setattr(layer, "bare_readers", lambda device: [lambda weight: read.append(weight.data_ptr())] * 3)
    monkeypatch.setattr(bench, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=1 << 16))
    monkeypatch.setattr(bench, "capture", lambda call: call)
    monkeypatch.setattr(bench, "replay_us", lambda graph, replays: (graph(), 8.0)[1])
    case: dict[str, Any] = {"size": "small", "op": "norm_qkv", "rounds": 5, "warmup": 1, "seed": 0}
    answer = bench.Bench().kernel(batch=2, **case)
    assert answer["errors"]["stock"] < 1e-2
    assert answer["errors"]["mirage"] == answer["errors"]["overlapping"] == pytest.approx(1, abs=1e-2)
    assert answer["bytes"] == 2 * (64 * 512 + 64 + 2 * (3 * 64 + 512))
    assert answer["copies"] == 4  # four times an L2 of 64 KiB
    assert answer["samples"] == {"stock": [8 / 96] * 5, "mirage": [8 / 96] * 5}  # 96 launches in a graph
    assert answer["overlapping"] == answer["bare_read"] == 8 / 96
    assert len(set(read)) == 4 and read == read[:4] * (len(read) // 4)  # the copies in turn
    assert "kernels end at 16 tokens" in bench.Bench().kernel(batch=17, **case)["reason"]
    package.prepare = lambda op, **_: TwiceTooLarge()  # of an overlay that was installed before plans behind a stock op
    assert "older than this script" in bench.Bench().kernel(batch=2, **case)["reason"]


# --- the bare read


BARE_READ = ROOT / "mirage_codegen" / "bare_read.cu"


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("vectors", [1, 8, 500, 517, 1993])  # of 16 bytes
def test_a_bare_read_reads_everything_once(vectors: int, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from mirage_codegen import emulate
    from mirage_codegen.lower import Kernel

    kernel = Kernel("bare_read", BARE_READ.read_text(), ("begin", "end", "out", "num_tokens"))
    emulated = emulate.EmulatedKernel(kernel, {"MIRAGE_BLOCKS": 3, "MIRAGE_THREADS": 32}, tmp_path)
    memory, out = emulate.aligned(np.zeros((vectors + 1, 8), np.uint16)), emulate.aligned(np.zeros(2, np.uint16))
    words, last = memory.view(np.uint32), memory.ctypes.data + 16 * vectors
    for place in range(0, vectors + 1, 1 if vectors < 1000 else 7):  # a thread writes what it read if that is this number in all, so once
        words[:], out[:] = 0, 0
        words[place, place % 4] = 0x12345678
        emulated({"begin": memory, "end": last, "out": out, "num_tokens": 1}, delayed=False, seed=0)
        assert out.view(np.uint32) == [0x12345678 if place < vectors else 0]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
def test_a_bare_read_compiles_for(arch: str) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    from mirage_codegen import layer

    for blocks, threads in layer.BARE_READS:
        build = layer.compiler.Build(str(BARE_READ), (("MIRAGE_BLOCKS", 132 * blocks), ("MIRAGE_THREADS", threads)), arch)
        assert layer.compiler.compile_cubin(build)


@pytest.mark.engine
def test_default_level_runs_on_this_machine(
    vllm_overlay: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(vllm_overlay))
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(vllm_overlay / "cache"))
    answer = run(
        "--model", "tiny", "--max-tokens", "6", "--batch-sizes", "1", "2", "--num-warmup", "1",
        "--num-iterations", "5", "--json", str(tmp_path / "r.json"),
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    result = json.loads((tmp_path / "r.json").read_text())
    assert {(line["metric"], line["batch"]) for line in result["rows"]} == {
        (metric, batch) for metric in bench.SERVE_UNITS for batch in (1, 2)
    }
    for line in result["rows"]:
        assert len(line["samples"]["stock"]) == len(line["samples"]["mirage"]) == 5
        assert all(value > 0 for arm in bench.ARMS for value in line["samples"][arm])
    assert result["reports"]["mirage"]["switch"] == "1"
    assert result["reports"]["stock"]["switch"] == "0"
    assert {"gpu", "torch", "vllm", "cuda", "python", "state_after"} <= set(result["environment"])
    assert result["tokens"]["sequences"] == 15
    if result["environment"]["gpu"] is None:
        assert result["tokens"]["equal"] == 15  # float32: fallback and stock agree token by token
        assert {line["speedup"] for line in result["rows"]} == {None}
        assert "this compares fallbacks" in answer.stdout
