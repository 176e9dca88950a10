#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Stock vLLM against the Mirage overlay, measured in the same run, alternating A B A B.

    benchmark_mirage.py --prompts test_prompts.txt --max-tokens 50 --batch-sizes 1 2 4     # --level serve
    benchmark_mirage.py --level step --model 8B --json step.json                           # GPU only
    benchmark_mirage.py --level kernel --json kernel.json                                  # GPU only
    benchmark_mirage.py --from-json step.json --plot step.png --compare old.json           # no GPU, no vLLM

serve   real prompts through LLM.generate: latency, time to first token, time per output token, tokens/s
step    GPU time of one decode step: replays the CUDA graphs that the engine captured, no host time in it
kernel  each fused op by itself against the stock path and against the memory floor, weights cold

Exit status: 0 measured, 1 a measurement failed or --compare found a regression, 2 wrong input, 130 interrupted (what was
measured is kept).
BENCHMARK_GUIDE.md explains every option and how to read the report.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from mirage_codegen.models import LAYER_OPS, QWEN3_SIZES

SCHEMA = 1
ARMS = ("stock", "mirage")
DEVICE = "cuda:0"
EPS = 1e-6  # rms_norm_eps of every Qwen3
TINY_MODELS = ("tiny", "tiny-0.6b")
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes of one element
CONTEXT = 256  # kernel: cached tokens of each request that attention reads
PREFILL = (8, 2048)  # step: prompts prefilled in one step, and their length
MIXED = (32, 96)  # step: requests that decode, and prompt tokens prefilled in the same step: 128 tokens, a captured size
LAUNCHES = 96  # in one graph at least, so that the gap between two replays of it does not count
DEFAULT_ROUNDS = {"serve": 5, "step": 10, "kernel": 20}
DEFAULT_BATCHES = {"serve": [1, 2, 4], "step": [1, 2, 4, 8, 16, 24, 32, 64], "kernel": [1, 2, 4, 8, 16, 24, 32, 64]}
NO_GPU = "no GPU here, so this compares fallbacks and a ratio would mean nothing for GPUs"


class UsageError(Exception):
    """Input that cannot be measured; the message is the one sentence printed (exit 2)."""


class MeasurementError(Exception):
    """A measurement that failed; the message is the one sentence printed (exit 1)."""


# ---------------------------------------------------------------------------------------- statistics


def summarize(samples: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile and count of the samples of one arm."""
    p10, median, p90 = np.percentile(samples, [10, 50, 90])
    return {"median": float(median), "p10": float(p10), "p90": float(p90), "n": len(samples)}


def bootstrap_interval(statistic: Callable[[np.random.Generator, int], np.ndarray]) -> tuple[float, float]:
    """95 % percentile interval of `statistic(rng, resamples)`, which returns one value for each resample."""
    low, high = np.percentile(statistic(np.random.default_rng(0), 10_000), [2.5, 97.5])
    return float(low), float(high)


def paired_speedup(stock: list[float], mirage: list[float], better: str = "lower") -> dict[str, Any]:
    """Speed-up of mirage over stock: median of the ratios round by round (> 1: mirage is better).

    Both arms measure the same thing in each round, so that drift and the choice of prompts cancel in the ratio.
    Resampling is over rounds. Fewer than 5 rounds cannot carry a 95 % interval of a median.
    """
    if len(stock) != len(mirage):
        raise ValueError(f"{len(stock)} stock and {len(mirage)} mirage samples are no pairs")
    ratios = np.asarray(stock) / np.asarray(mirage)
    if better == "higher":
        ratios = 1 / ratios
    result: dict[str, Any] = {"ratio": float(np.median(ratios)), "low": None, "high": None}
    if len(ratios) < 5:
        return result | {"verdict": f"{len(ratios)} rounds: too few for an interval"}

    def resample(rng: np.random.Generator, count: int) -> np.ndarray:
        return np.median(ratios[rng.integers(0, len(ratios), (count, len(ratios)))], axis=1)

    low, high = bootstrap_interval(resample)
    return result | {"low": low, "high": high, "verdict": verdict(low, high)}


def verdict(low: float, high: float) -> str:
    """What an interval of a speed-up says; an interval that holds 1 says that nothing was shown."""
    if low <= 1 <= high:
        return "no difference"
    return "faster" if low > 1 else "slower"


def slowdown(old: list[float], new: list[float]) -> tuple[float, float, float]:
    """new / old of the medians with its 95 % interval; the two runs share no rounds, so each is resampled alone."""
    old_array, new_array = np.asarray(old), np.asarray(new)

    def resample(rng: np.random.Generator, count: int) -> np.ndarray:
        draws = [np.median(a[rng.integers(0, len(a), (count, len(a)))], axis=1) for a in (new_array, old_array)]
        return draws[0] / draws[1]

    low, high = bootstrap_interval(resample)
    return float(np.median(new_array) / np.median(old_array)), low, high


# ---------------------------------------------------------------------------- what is measured: models


@dataclass
class Model:
    """A model as vLLM gets it. `dummy`: random weights made at load; `vocab` in tokens."""

    name: str
    path: str
    dummy: bool
    has_tokenizer: bool
    vocab: int
    max_len: int
    kv_elements: int  # elements of K and V that one token leaves in the cache, all layers together


def write_dummy_config(size: str, folder: Path) -> Path:
    """Write the config.json of a Qwen3 size; load_format="dummy" needs nothing else."""
    hidden, intermediate, layers, heads, kv_heads, tied = QWEN3_SIZES[size]
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu", "head_dim": 128,
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "tie_word_embeddings": tied,
        "vocab_size": 151936, "rms_norm_eps": EPS, "rope_theta": 1000000, "max_position_embeddings": 40960,
        "attention_bias": False, "torch_dtype": "bfloat16", "bos_token_id": 151643, "eos_token_id": 151645,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def resolve_model(name: str, dtype: str, scratch: Path) -> Model:
    """Find or make the model called `name`; UsageError when there is none."""
    if name in QWEN3_SIZES:
        return describe_model(f"Qwen3-{name}", write_dummy_config(name, scratch / name))
    if name in TINY_MODELS:
        maker = importlib.import_module("test_mirage_qwen3")
        folder = scratch / name
        maker.make_tiny_qwen3(str(folder), size=name, dtype=dtype)
        return describe_model(name, folder)
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise UsageError(f"The folder {name} holds no config.json, so it is no model: give a model's folder.")
        return describe_model(Path(name).resolve().name, Path(name).resolve())
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return describe_hub_model(name)
    known = ", ".join((*TINY_MODELS, *QWEN3_SIZES))
    raise UsageError(f"Unknown model {name!r}: give a folder, a hub id such as Qwen/Qwen3-0.6B, or one of {known}.")


def describe_model(name: str, folder: Path, hub_id: str | None = None) -> Model:
    """Read what the benchmark needs of a model from its config.json; without weight files it is a dummy."""
    config = json.loads((folder / "config.json").read_text())
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    kv_heads = config.get("num_key_value_heads", heads)
    return Model(
        name=name,
        path=hub_id or str(folder),
        dummy=hub_id is None and not any(p.suffix in (".safetensors", ".bin", ".pt") for p in folder.iterdir()),
        has_tokenizer=hub_id is not None or any((folder / f).is_file() for f in ("tokenizer.json", "vocab.json")),
        vocab=config["vocab_size"],
        max_len=config.get("max_position_embeddings", 4096),
        kv_elements=2 * config["num_hidden_layers"] * kv_heads * head_dim,
    )


def describe_hub_model(hub_id: str) -> Model:
    """Fetch a hub model's config.json (from the local cache when HF_HUB_OFFLINE=1)."""
    try:
        from huggingface_hub import hf_hub_download

        config = Path(hf_hub_download(hub_id, "config.json"))
    except Exception as error:  # the hub client has a dozen kinds; each means: no such model from here
        raise UsageError(
            f"Unknown model {hub_id!r}: neither a folder here nor a model on the hub ({type(error).__name__})."
        ) from error
    return describe_model(hub_id, config.parent, hub_id)


def read_prompts(path: Path) -> list[str]:
    """One prompt a line; UsageError when the file is missing or holds none."""
    try:
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"Cannot read the prompts in {path} ({error}): give a UTF-8 file to --prompts.") from error
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise UsageError(f"The prompts file {path} is empty: expected at least one prompt, one on each line.")
    return prompts


# ------------------------------------------------------------------ worker: one process for each arm


class Bench:
    """Runs inside a worker process; every public method is one command and returns JSON-serialisable data."""

    def __init__(self) -> None:
        self.llm: Any = None
        self.prompts: list[list[int]] = []  # token ids
        self.filled: tuple[int, int] | None = None  # requests that decode, and their context: the batch in the engine's buffers
        self.added: list[str] = []  # ids of requests that may not have finished

    def start(self, engine: dict[str, Any]) -> float:
        """Start the engine in this process (LLM keyword arguments in `engine`); the seconds that took."""
        from vllm import LLM

        started = time.perf_counter()
        self.llm = LLM(**engine)
        return time.perf_counter() - started

    def load_prompts(self, texts: list[str], limit: int) -> dict[str, Any]:
        """Tokenize the prompts, at most `limit` tokens each."""
        tokenizer = self.llm.get_tokenizer()
        ids = [tokenizer.encode(text) for text in texts]
        self.prompts = [prompt[:limit] for prompt in ids]
        return {"lengths": [len(p) for p in self.prompts], "truncated": sum(len(p) > limit for p in ids)}

    def random_prompts(self, lengths: list[int], vocab: int, seed: int) -> None:
        """Prompts of the given lengths in random token ids: the same in both arms."""
        rng = random.Random(seed)
        self.prompts = [rng.choices(range(min(100, vocab // 2), vocab), k=length) for length in lengths]

    def generate(self, prompts: list[list[int]], max_tokens: int) -> list[Any]:
        """Greedy decoding of exactly max_tokens tokens for each prompt."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        return self.llm.generate(inputs, params, use_tqdm=False)

    def serve(self, indices: list[int], max_tokens: int) -> dict[str, Any]:
        """One batch: latency, time to first token and time per output token in ms, tokens/s, the tokens."""
        start = time.perf_counter()
        outputs = self.generate([self.prompts[i] for i in indices], max_tokens)
        seconds = time.perf_counter() - start
        metrics = [output.metrics for output in outputs]
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        times = {"latency": seconds * 1e3, "throughput": sum(map(len, tokens)) / seconds}
        times["time to first token"] = float(np.mean([m.first_token_latency for m in metrics])) * 1e3
        if max_tokens > 1:
            decode = [(m.last_token_ts - m.first_token_ts) / (max_tokens - 1) for m in metrics]
            times["time per output token"] = float(np.mean(decode)) * 1e3
        return {"times": times, "tokens": tokens}

    def _runner(self) -> Any:
        """vLLM's model runner, reachable because the engine runs in this process."""
        engine = self.llm.llm_engine.engine_core.engine_core
        return engine.model_executor.driver_worker.worker.model_runner

    def _decode_graphs(self) -> dict[int, Any]:
        """The captured decode graphs, {batch size: torch.cuda.CUDAGraph}.

        Model runner V2 (the default for Qwen3) keeps them in its cudagraph_manager, in vLLM 0.26 as in 0.33; a graph
        in which every request has one token is a decode graph.
        """
        manager = getattr(self._runner(), "cudagraph_manager", None)
        if manager is None:
            raise MeasurementError(
                "This vLLM ran its V1 model runner, whose graphs the step level cannot replay: "
                "unset VLLM_USE_V2_MODEL_RUNNER and use vLLM 0.26 or newer."
            )
        graphs = {
            desc.num_tokens: graph
            for desc, graph in manager.graphs.items()
            if desc.num_reqs == desc.num_tokens and getattr(desc, "num_ubatches", 1) == 1
        }
        if not graphs:
            raise MeasurementError("The engine captured no decode graph: run without --enforce-eager.")
        return graphs

    def _add(self, ids: list[int], max_tokens: int) -> str:
        """Give the engine a request without running it; its id."""
        from vllm import SamplingParams

        name = f"bench-{len(self.added)}"
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        self.llm.llm_engine.add_request(name, {"prompt_token_ids": ids}, params)
        self.added.append(name)
        return name

    def _finish(self) -> None:
        """End what `_add` began."""
        engine = self.llm.llm_engine
        engine.abort_request(self.added)
        while engine.has_unfinished_requests():
            engine.step()
        self.filled = None

    def fill(self, batch: int, context: int, vocab: int, seed: int) -> list[int]:
        """Prefill `batch` prompts of `context` tokens until all of them decode together; returns the captured batch sizes.

        The engine stops there: its buffers, FlashAttention's schedule among them, hold this batch, and only its graph may be replayed.
        """
        import torch

        if self.filled != (batch, context):
            self._finish()
            self.random_prompts([context] * batch, vocab, seed)
            engine, waiting = self.llm.llm_engine, {self._add(ids, max_tokens=120) for ids in self.prompts}
            while waiting:
                waiting -= {output.request_id for output in engine.step()}
            for _ in range(4):  # steps in flight were scheduled before the last one had its first token
                engine.step()
            torch.cuda.synchronize()
            self.filled = batch, context
        return sorted(self._decode_graphs())

    def _graph(self) -> Any:
        """The decode graph of the batch that decodes now (`fill`)."""
        assert self.filled, "no batch decodes"
        return self._decode_graphs()[self.filled[0]]

    def step(self, replays: int) -> float:
        """GPU time of one decode step in ms: mean of `replays` replays between two events."""
        import torch

        graph = self._graph()
        for _ in range(3):
            graph.replay()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / replays

    def launch(self, times: int) -> dict[str, float]:
        """One decode step at a time on an idle GPU, in ms: the host's part of the launch, and the whole by wall clock; medians."""
        import torch

        graph, host, whole = self._graph(), [], []
        for _ in range(times):
            torch.cuda.synchronize()
            start = time.perf_counter()
            graph.replay()
            host.append((time.perf_counter() - start) * 1e3)
            torch.cuda.synchronize()
            whole.append((time.perf_counter() - start) * 1e3)
        return {"host": float(np.median(host)), "whole": float(np.median(whole))}

    def prefill(self, vocab: int, seed: int) -> dict[str, float]:
        """PREFILL's prompts, prefilled in one step: ms by wall clock, and of its kernels alone."""
        self._finish()
        count, length = PREFILL
        self.random_prompts([length] * count, vocab, seed)
        return {"wall": wall_ms(self._prefill), "kernels": self._kernels_ms(self._prefill)}

    def _prefill(self) -> None:
        self.generate(self.prompts, max_tokens=1)

    def mixed(self, vocab: int, seed: int, steps: int) -> dict[str, float]:
        """A step that decodes for MIXED[0] requests and prefills MIXED[1] tokens of a new one: medians of `steps`, as `prefill`."""
        self._finish()
        engine, (decodes, chunk) = self.llm.llm_engine, MIXED
        rng = random.Random(seed)

        def draw(length: int) -> list[int]:
            return rng.choices(range(min(100, vocab // 2), vocab), k=length)

        for _ in range(decodes):
            self._add(draw(64), max_tokens=2 * steps + 16)
        for _ in range(4):
            engine.step()
        spent: dict[str, list[float]] = {"wall": [], "kernels": []}
        for name, measured in (("wall", wall_ms), ("kernels", self._kernels_ms)):
            for _ in range(steps):
                self._add(draw(chunk), max_tokens=1)
                spent[name].append(measured(engine.step))
        self._finish()
        return {name: float(np.median(times)) for name, times in spent.items()}

    def _kernels_ms(self, step: Callable[[], Any]) -> float:
        """What a step's kernels take in ms, one by one: no time of the host in it, and no gap between kernels."""
        return sum(event["duration"] for event in self._profile(step)) / 1e3

    def timeline(self) -> list[dict[str, Any]]:
        """Kernels of one layer of a decode step as CUPTI saw them: name, kind, start and duration in µs."""
        graph = self._graph()
        graph.replay()
        return one_layer(self._profile(graph.replay))

    def kernels(self, batches: list[int], context: int, vocab: int) -> dict[str, dict[str, int]]:
        """How often each kernel runs in a decode step of each batch size, and in a prefill of PREFILL's prompts."""
        found = {}
        for batch in batches:
            self.fill(batch, context, vocab, seed=0)
            found[str(batch)] = self._counts(self._graph().replay)
        self.prefill(vocab, seed=0)
        return found | {"prefill": self._counts(self._prefill)}

    def _counts(self, step: Callable[[], Any]) -> dict[str, int]:
        return dict(Counter(event["name"] for event in self._profile(step)))

    @staticmethod
    def _profile(step: Callable[[], Any]) -> list[dict[str, Any]]:
        """Kernels of a step by their start: name, start and duration in µs."""
        import torch
        from torch.profiler import ProfilerActivity, profile

        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            step()
            torch.cuda.synchronize()
        events = [
            {"name": event.name, "start": event.time_range.start, "duration": event.time_range.elapsed_us()}
            for event in profiler.events()
            if event.device_type == torch.autograd.DeviceType.CUDA
        ]
        return sorted(events, key=lambda event: event["start"])

    def layer_bytes(self) -> int:
        """Bytes of the decoder layers' weights: what every decode step must read at least once."""
        parameters = self._runner().get_model().named_parameters()
        return sum(p.numel() * p.element_size() for name, p in parameters if ".layers." in name)

    def copy_bandwidth(self) -> float:
        """Bytes/s that a device copy of 1 GiB moves."""
        import torch

        bandwidth = measure_copy(1 << 30)
        torch.cuda.empty_cache()  # the buffers must not stay with an engine that is being measured
        return bandwidth

    def kernel(self, size: str, op: str, batch: int, rounds: int, warmup: int, seed: int) -> dict[str, Any]:
        """One fused op of one layer on `batch` tokens in bf16: µs of each round, errors against float64, µs of a bare read.

        Weights (or KV caches) rotate through more than the L2 holds, so that each call reads them from memory as in a
        model. All sides are replayed as CUDA graphs in turn. Kernels run the plans for an op behind a stock
        one, where those were measured.
        """
        import torch

        try:
            kernels = importlib.import_module("vllm.model_executor.layers.mirage_kernels")
        except ImportError as error:
            return {"reason": f"no kernels are installed ({error})"}
        if "alone" not in inspect.signature(kernels.prepare).parameters:
            return {"reason": "the installed overlay is older than this script: run ./install.sh again"}
        layer = importlib.import_module("mirage_codegen.layer")
        shape, device = layer.MODELS[size], torch.device(DEVICE)
        # a kernel that overlaps with its own last run starts on a GPU that is half its own: that is a second column
        sides: dict[str, Any] = {"stock": None}
        for side, overlap in (("mirage", False), ("overlapping", True)):
            found = shape.prepare(op, device, overlap=overlap, package=kernels, alone=True)
            if isinstance(found, str):
                return {"reason": found}
            if batch > found.max_tokens:
                return {"reason": f"the stock path runs (kernels end at {found.max_tokens} tokens)"}
            sides[side] = found
        torch._dynamo.reset()  # each shape compiles alone
        torch.manual_seed(seed)
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        bytes_moved = layer.op_bytes(shape, op, batch, CONTEXT)
        copies = max(2, math.ceil(4 * l2 / bytes_moved))
        step = layer.Step(shape, batch, CONTEXT, device, copies=copies, ops=(op,))
        exact = step.exact(op)
        runs: dict[str, Callable[[int], Any]] = {side: functools.partial(step.run, op, kernel) for side, kernel in sides.items()}
        errors = {side: layer.relative_error(run(0), exact) for side, run in runs.items()}
        reads = {f"read {n}": lambda i, read=read: read(step.memory(op, i)) for n, read in enumerate(layer.bare_readers(device))}
        runs |= reads
        calls = math.ceil(LAUNCHES / copies) * copies

        def all_copies(run: Callable[[int], Any]) -> None:
            for i in range(calls):
                run(i % copies)

        graphs = {name: capture(functools.partial(all_copies, run)) for name, run in runs.items()}
        samples: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(warmup + rounds):
            for name, graph in graphs.items():
                microseconds = replay_us(graph, 2) / calls
                if turn >= warmup:
                    samples[name].append(microseconds)
        medians = {name: float(np.median(times)) for name, times in samples.items()}
        return {
            "samples": {arm: samples[arm] for arm in ARMS}, "errors": errors, "copies": copies, "kernel": sides["mirage"].name,
            "overlapping": medians["overlapping"], "bare_read": min(medians[read] for read in reads), "bytes": bytes_moved,
        }  # fmt: skip

    def describe(self) -> dict[str, Any]:
        """Versions, device, peak memory and the overlay's own report, all as this arm sees them."""
        import torch
        import vllm

        gpu = torch.cuda.is_available()
        ops = importlib.import_module("vllm.model_executor.layers.fused_mirage_ops")
        return {
            "gpu": torch.cuda.get_device_name() if gpu else None,
            "cuda": torch.version.cuda,
            "torch": torch.__version__,
            "vllm": vllm.__version__,
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if gpu else None,
            "report": ops.mirage_report(),
        }


def wall_ms(step: Callable[[], Any]) -> float:
    """Wall time of a step in ms, until the GPU has finished it."""
    import torch

    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def capture(call: Callable[[], Any]) -> Any:
    """CUDA graph of one call, after three warm-up calls on a side stream."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def replay_us(graph: Any, replays: int) -> float:
    """Mean GPU time of one replay in µs, after one that is not timed."""
    import torch

    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graph.replay()
    begin.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) * 1e3 / replays


def measure_copy(size: int) -> float:
    """Bytes/s read plus written while a kernel streams `size` bytes from one buffer to another, median of 20.

    Not a plain copy: in a CUDA graph that is a memcpy node, which moved 2.8 TB/s on an H200 where kernels move 4.3.
    """
    import torch

    source = torch.zeros(size // 4, dtype=torch.int32, device=DEVICE)
    target = torch.empty_like(source)
    graph = capture(lambda: torch.neg(source, out=target))
    return 2 * size / (float(np.median([replay_us(graph, 1) for _ in range(20)])) * 1e-6)


KERNEL_KINDS = (  # the first pattern found in a kernel's name, in lower case, says its kind
    # extern "C", named as their files
    ("Mirage kernel", r"^rms_norm(_linear)?(_first)?$|^(rms_norm_)?gate_up_silu(_first)?$|^linear(_residual)?$|^decode_attention$|mirage"),
    ("KV cache write", r"reshape_and_cache"),
    ("attention", r"flash|fmha|attention"),
    ("linear layer", r"nvjet|gemm|gemv|cutlass|splitk|cublas"),
    ("norm, RoPE, activation", r"triton|norm|rotary|silu"),
)


def kernel_kind(name: str) -> str:
    """Kind of a CUDA kernel, by its name."""
    return next((kind for kind, pattern in KERNEL_KINDS if re.search(pattern, name.lower())), "other")


def one_layer(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The kernels of one layer in the middle of a step, from one KV cache write to the next, starting at 0 µs.

    Every layer writes the cache once, in a kernel of its own or in the fused attention, so that both arms are cut at
    the same place.
    """
    marks = [i for i, event in enumerate(events) if re.search(r"reshape_and_cache|^decode_attention$", event["name"])]
    if len(marks) < 2:
        raise MeasurementError("The profile shows no kernel that repeats once a layer: no timeline can be cut.")
    middle = len(marks) // 2 - 1
    window = events[marks[middle] : marks[middle + 1]]
    origin = window[0]["start"]
    return [
        {
            "name": event["name"][:120],
            "kind": kernel_kind(event["name"]),
            "start_us": event["start"] - origin,
            "duration_us": event["duration"],
        }
        for event in window
    ]


def worker_main() -> None:
    """Answer commands, one JSON line each, until stdin closes; vLLM's own output goes to the log."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    bench = Bench()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = {"value": getattr(bench, request["command"])(**request["arguments"])}
        except MeasurementError as error:
            reply = {"error": str(error)}
        except Exception as error:
            import traceback

            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


class Worker:
    """The parent's handle of one worker process."""

    def __init__(self, arm: str, scratch: Path, offline: bool, **environment: str) -> None:
        self.arm = arm
        self.log = scratch / f"{arm}.log"
        env = os.environ | {
            "VLLM_USE_MIRAGE": "1" if arm == "mirage" else "0",
            "VLLM_CACHE_ROOT": str(scratch / f"cache-{arm}"),  # never share compiled graphs between the arms
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the step level reaches into the engine
        }
        for name, value in {"VLLM_NO_USAGE_STATS": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0"}.items():
            env.setdefault(name, value)
        if offline:
            env["HF_HUB_OFFLINE"] = "1"
        env |= environment
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, os.path.abspath(__file__), "--worker"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=env,
            )  # fmt: skip

    def send(self, command: str, **arguments: Any) -> None:
        """Start a command; `receive` waits for its value."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # receive then reports the death with its log
            self.process.stdin.write(json.dumps({"command": command, "arguments": arguments}) + "\n")
            self.process.stdin.flush()

    def receive(self) -> Any:
        """Value of the last command; MeasurementError with the end of the log when it failed."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        reply = json.loads(line) if line else {"error": f"the process ended with status {self.process.wait()}"}
        if "error" in reply:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-25:])
            raise MeasurementError(f"{tail}\nThe {self.arm} arm failed: {reply['error']}")
        return reply["value"]

    def call(self, command: str, **arguments: Any) -> Any:
        """Run one command and wait for its value."""
        self.send(command, **arguments)
        return self.receive()

    def close(self) -> None:
        """Let the worker end; kill it if it does not."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Session:
    """Both arms with their engines: kept alive side by side, or one fresh process for each turn."""

    def __init__(self, scratch: Path, engine: dict[str, Any], offline: bool, fresh: bool) -> None:
        self.scratch, self.engine, self.offline, self.fresh = scratch, engine, offline, fresh
        self.workers: dict[str, Worker] = {}
        self.start_seconds: dict[str, float] = {}

    def start(self, together: bool) -> None:
        """Start both engines, at once or one after the other; fresh processes start later, at each turn.

        At once is safe on a GPU: kv_cache_memory_bytes is given, so that neither engine profiles the free memory.
        """
        for arm in () if self.fresh else ARMS:
            self.workers[arm] = Worker(arm, self.scratch, self.offline)
            self.workers[arm].send("start", engine=self.engine)
            if not together:
                self.start_seconds[arm] = self.workers[arm].receive()
        for arm, worker in self.workers.items() if together else ():
            self.start_seconds[arm] = worker.receive()

    @contextlib.contextmanager
    def arm(self, name: str) -> Iterator[Worker]:
        """The worker of an arm, its engine started."""
        if not self.fresh:
            yield self.workers[name]
            return
        worker = Worker(name, self.scratch, self.offline)
        try:
            worker.call("start", engine=self.engine)
            yield worker
        finally:
            worker.close()

    def close(self) -> None:
        """End both workers."""
        for worker in self.workers.values():
            worker.close()


# -------------------------------------------------------------------------------------- the three levels


def engine_arguments(options: argparse.Namespace, model: Model, gpu: bool) -> dict[str, Any]:
    """Keyword arguments of vllm.LLM, the same for both arms."""
    sequences = max(options.batch_sizes)
    context = max(options.input_len or [0])
    if options.level == "step":
        needed = context + 128
        length = min(max(PREFILL[1] + 256, needed), model.max_len)  # attention kernels are chosen for the longest context
        if needed > length:
            raise UsageError(
                f"--input-len {context} needs {needed} positions but {model.name} has {model.max_len}: "
                f"give at most {model.max_len - 128}."
            )
    else:
        needed = length = min(options.max_model_len, model.max_len)
    tokens = max(sequences * (needed + 256), length)  # 256: a spare block for each request, also the CPU's large ones
    engine: dict[str, Any] = {
        "model": model.path, "dtype": options.dtype, "seed": options.seed,
        "max_model_len": length, "max_num_seqs": sequences, "enable_prefix_caching": False,
        "kv_cache_memory_bytes": tokens * model.kv_elements * DTYPES[options.dtype] + (64 << 20),
        "enforce_eager": options.enforce_eager, "disable_log_stats": options.level != "serve",
    }  # fmt: skip
    if gpu:
        engine["gpu_memory_utilization"] = 0.1  # only a check at start-up: the cache's size is given above
    if options.level == "step":
        engine["max_num_batched_tokens"] = PREFILL[0] * PREFILL[1]
    if model.dummy:
        engine["load_format"] = "dummy"
    if not model.has_tokenizer:
        engine["skip_tokenizer_init"] = True
    return engine


def row(case: str, metric: str, batch: int, unit: str, **more: Any) -> dict[str, Any]:
    """One line of the report; `samples` gets one value for each arm and round."""
    return {
        "case": case, "metric": metric, "batch": batch, "unit": unit, "better": "lower", "floor": None,
        "note": None, "samples": {arm: [] for arm in ARMS},
    } | more  # fmt: skip


def alternate(
    session: Session, options: argparse.Namespace, turn: Callable[[Worker, int], None], screen: Screen
) -> None:
    """Rounds A B A B of `turn(worker, round)`; negative rounds are warm-up. Fresh processes warm up each time."""
    if session.fresh:
        for number in range(options.num_iterations):
            for arm in ARMS:
                screen.status(f"round {number + 1} of {options.num_iterations}: fresh {arm} process")
                with session.arm(arm) as worker:
                    for warm in range(options.num_warmup):
                        turn(worker, warm - options.num_warmup)
                    turn(worker, number)
        return
    for number in range(-options.num_warmup, options.num_iterations):
        for arm in ARMS:
            stage = f"warm-up {number + options.num_warmup + 1} of {options.num_warmup}"
            if number >= 0:
                stage = f"round {number + 1} of {options.num_iterations}"
            screen.status(f"{stage}: {arm}")
            turn(session.workers[arm], number)
        screen.refresh()


def pick_prompts(count: int, batch: int, number: int, seed: int) -> list[int]:
    """Indices of the prompts of a round: a seeded order, cut into batches, repeated when it ends."""
    order = random.Random(f"{seed}-{batch}").sample(range(count), count)
    first = max(number, 0) * batch  # warm-up runs what the first round will run
    return [order[(first + i) % count] for i in range(batch)]


SERVE_UNITS = {"latency": "ms", "time to first token": "ms", "time per output token": "ms", "throughput": "tokens/s"}


def run_serve(
    session: Session, options: argparse.Namespace, model: Model, result: dict[str, Any], screen: Screen
) -> None:
    """Real prompts through LLM.generate, the same prompts in both arms of a round."""
    metrics = [m for m in SERVE_UNITS if options.max_tokens > 1 or m != "time per output token"]
    rows = {
        (metric, batch): row(model.name, metric, batch, SERVE_UNITS[metric])
        for batch in options.batch_sizes
        for metric in metrics
    }
    for (metric, _), line in rows.items():
        line["better"] = "higher" if metric == "throughput" else "lower"
    result["rows"] = list(rows.values())
    texts = [] if options.input_len else read_prompts(options.prompts)
    count = len(texts) or 64
    limit = session.engine["max_model_len"] - options.max_tokens
    loaded: set[int] = set()  # processes that hold the prompts
    tokens: dict[tuple[int, int], dict[str, list[list[int]]]] = {}

    def load(worker: Worker) -> None:
        if texts and model.has_tokenizer:
            answer = worker.call("load_prompts", texts=texts, limit=limit)
            result["prompts"] = {"count": count, "truncated": answer["truncated"], "kind": "text"}
            result["prompts"]["tokens"] = summarize(answer["lengths"])
            return
        wanted = [max(1, len(text.encode()) // 4) for text in texts] or options.input_len * count
        lengths = [min(length, limit) for length in wanted]
        worker.call("random_prompts", lengths=lengths, vocab=model.vocab, seed=options.seed)
        truncated = sum(length > limit for length in wanted)
        result["prompts"] = {"count": count, "truncated": truncated, "kind": "random token ids"}
        result["prompts"]["tokens"] = summarize([float(length) for length in lengths])

    def turn(worker: Worker, number: int) -> None:
        if worker.process.pid not in loaded:
            load(worker)
            loaded.add(worker.process.pid)
        for batch in options.batch_sizes:
            indices = pick_prompts(count, batch, number, options.seed)
            answer = worker.call("serve", indices=indices, max_tokens=options.max_tokens)
            if number < 0:
                continue
            tokens.setdefault((number, batch), {})[worker.arm] = answer["tokens"]
            for metric, value in answer["times"].items():
                rows[metric, batch]["samples"][worker.arm].append(value)
        if number >= 0:
            describe(worker, result)

    alternate(session, options, turn, screen)
    result["tokens"] = compare_tokens([(pair["stock"], pair["mirage"]) for pair in tokens.values()], model.dummy)


def compare_tokens(pairs: list[tuple[list[list[int]], list[list[int]]]], dummy: bool) -> dict[str, Any]:
    """How many of the generated sequences are the same in both arms."""
    sequences = [(a, b) for stock, mirage in pairs for a, b in zip(stock, mirage, strict=True)]
    equal = sum(a == b for a, b in sequences)
    text = f"{equal} of {len(sequences)} sequences have equal tokens in both arms"
    if dummy:
        text += " (dummy weights pick one token at every step, so this proves nothing)"
    return {"equal": equal, "sequences": len(sequences), "dummy": dummy, "text": text}


def run_step(
    session: Session, options: argparse.Namespace, model: Model, result: dict[str, Any], screen: Screen
) -> None:
    """GPU time of one decode step of exactly as many requests as each captured batch size, one context after the other."""
    contexts, batches = options.input_len, options.batch_sizes
    names = {context: "decode step" if len(contexts) == 1 else f"decode step, {context} tokens before it" for context in contexts}
    rows = {(c, batch): row(model.name, names[c], batch, "ms") for c in contexts for batch in batches}
    launches = {
        kind: row(model.name, metric, batches[0], "ms")
        for kind, metric in (("host", "launch of a decode step, host"), ("whole", "decode step from an idle GPU, wall clock"))
    }
    others = {}
    if max(batches) >= MIXED[0] and max(contexts) <= 256:  # the KV cache is sized for the batch: it holds these, too
        said = {"prefill": (f"prefill of {PREFILL[1]} tokens each", PREFILL[0])}
        said["mixed"] = f"decode beside {MIXED[1]} prompt tokens", MIXED[0]
        for name, (metric, batch) in said.items():
            others[name, "wall"] = row(model.name, f"{metric}, wall clock", batch, "ms")
            others[name, "kernels"] = row(model.name, f"{metric}, kernels", batch, "ms")
    result["rows"] = [*rows.values(), *launches.values(), *others.values()]

    def decode(context: int, group: list[int], worker: Worker, number: int) -> None:
        for batch in group:
            captured = worker.call("fill", batch=batch, context=context, vocab=model.vocab, seed=options.seed)
            missing = sorted(set(batches) - set(captured))
            if missing:
                raise UsageError(f"No decode graph is captured for batch {missing}: choose --batch-sizes from {captured}.")
            ms = worker.call("step", replays=options.replays)
            if number >= 0:
                rows[context, batch]["samples"][worker.arm].append(ms)
            if (context, batch) == (contexts[0], batches[0]):
                for kind, ms in worker.call("launch", times=20).items():
                    if number >= 0:
                        launches[kind]["samples"][worker.arm].append(ms)
        if number == options.num_iterations - 1:
            describe(worker, result)
        if "floor" not in result:
            bandwidth, size = worker.call("copy_bandwidth"), worker.call("layer_bytes")
            result["floor"] = {"copy_bandwidth_bytes_per_s": bandwidth, "layer_weight_bytes": size}
            for line in rows.values():
                line["floor"] = size / bandwidth * 1e3

    def prefill(worker: Worker, number: int) -> None:
        for name, more in (("prefill", {}), ("mixed", {"steps": 10})):
            for kind, ms in worker.call(name, vocab=model.vocab, seed=number + 1000, **more).items():
                if number >= 0:
                    others[name, kind]["samples"][worker.arm].append(ms)

    # a fresh process fills itself with each batch in its turn; two that stay alive fill once for all rounds of a batch
    groups = [batches] if session.fresh else [[batch] for batch in batches]
    for context, group in itertools.product(contexts, groups):
        alternate(session, options, functools.partial(decode, context, group), screen)
    if others:
        alternate(session, options, prefill, screen)


def run_kernel(options: argparse.Namespace, scratch: Path, result: dict[str, Any], screen: Screen) -> None:
    """Each fused op, at every Qwen3 shape (or the one of --model) and batch size."""
    sizes = list(QWEN3_SIZES) if options.model is None else [options.model]
    worker = Worker("mirage", scratch, offline=True)
    try:
        bandwidth = worker.call("copy_bandwidth")
        result["floor"] = {"copy_bandwidth_bytes_per_s": bandwidth}
        describe(worker, result)  # now for a run that is interrupted, and again when the peak of memory is known
        for size, op, batch in itertools.product(sizes, LAYER_OPS, options.batch_sizes):
            screen.status(f"{op}, Qwen3-{size}, {batch} tokens")
            counts = {"rounds": options.num_iterations, "warmup": options.num_warmup, "seed": options.seed}
            try:
                answer = worker.call("kernel", size=size, op=op, batch=batch, **counts)
            except MeasurementError as error:  # a CUDA error poisons the process: the other cases get a new one
                answer = {"reason": str(error).splitlines()[-1]}
                worker.close()
                worker = Worker("mirage", scratch, offline=True)
            line = row(f"Qwen3-{size} {op}", "kernel", batch, "µs", note=answer.pop("reason", None))
            if answer:
                line |= {"floor": answer.pop("bytes") / bandwidth * 1e6} | answer
            result["rows"].append(line)
            screen.refresh()
        describe(worker, result)
    finally:
        worker.close()


def describe(worker: Worker, result: dict[str, Any]) -> None:
    """Ask a worker for versions, memory and the overlay's report."""
    answer = worker.call("describe")
    result["reports"][worker.arm] = answer.pop("report")
    result["peak_memory_bytes"][worker.arm] = answer.pop("peak_memory_bytes")
    result["environment"] |= answer


def reason_not_fused(result: dict[str, Any]) -> str | None:
    """Why no speed-up may be printed; None when the fused path ran in the mirage arm, and there only."""
    if result["environment"]["gpu"] is None:
        return NO_GPU
    if result["level"] == "kernel":
        reasons = [line["note"] for line in result["rows"]]
        return reasons[0] if all(reasons) else None
    report, stock = result["reports"]["mirage"], result["reports"]["stock"]
    fused = [layer for layer in report["layers"] if layer["path"] == "fused"]
    if not fused:
        reasons = [layer["reason"] for layer in report["layers"] if layer["reason"]]
        return f"no layer took the fused path: {reasons[0] if reasons else 'the model has no Qwen3 layers'}"
    if kernel_calls(report) == 0:
        reasons = [layer["reason"] for layer in fused if layer["reason"]]
        return f"no Mirage kernel was launched: {reasons[0] if reasons else 'the op took its fallback every time'}"
    if kernel_calls(stock):
        return "the stock arm launched Mirage kernels too: it compares nothing"
    return None


def kernel_calls(report: dict[str, Any]) -> int:
    """Launches of Mirage kernels that a mirage_report counts."""
    return sum(count for name, count in report["calls"].items() if name.endswith(".kernel"))


# ------------------------------------------------------------------------------------------- the report


def finish(result: dict[str, Any]) -> None:
    """Compute what the report says from the samples; a speed-up only if the fused path ran."""
    result["reason"] = reason_not_fused(result)
    for line in result["rows"]:
        samples = line["samples"]
        for arm in ARMS:
            line[arm] = summarize(samples[arm]) if samples[arm] else None
        complete = all(samples.values()) and result["reason"] is None
        line["speedup"] = paired_speedup(samples["stock"], samples["mirage"], line["better"]) if complete else None


def gpu_state() -> dict[str, str] | None:
    """Driver, clocks, power limit and temperature of the first GPU; None without nvidia-smi."""
    fields = ["driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "temperature.gpu"]
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        return None
    return dict(zip(fields, answer.stdout.splitlines()[0].split(", "), strict=False))


def digits(value: float) -> str:
    """Four significant digits, no exponent."""
    decimals = max(0, 3 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:.{decimals}f}"


def spread(summary: dict[str, float] | None) -> str:
    """Median with 10th and 90th percentile."""
    if summary is None:
        return "-"
    return f"{digits(summary['median'])} ({digits(summary['p10'])} to {digits(summary['p90'])})"


def speedup_text(speedup: dict[str, Any] | None) -> str:
    """The ratio with its interval, or a dash."""
    if speedup is None:
        return "-"
    if speedup["low"] is None:
        return f"{speedup['ratio']:.3f}"
    return f"{speedup['ratio']:.3f} ({speedup['low']:.3f} to {speedup['high']:.3f})"


def table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the report's table."""
    stock = "stock path" if result["level"] == "kernel" else "stock"
    header = ["model", "batch", "measured", "unit", stock, "mirage", "speed-up (95 %)", "verdict"]
    floors = any(line["floor"] for line in result["rows"])
    lines = []
    for line in result["rows"]:
        said = line["speedup"]["verdict"] if line.get("speedup") else line["note"] or "-"
        cells = [line["case"], str(line["batch"]), line["metric"], line["unit"], spread(line.get("stock"))]
        cells += [spread(line.get("mirage")), speedup_text(line.get("speedup")), said]
        if floors:
            cells.append(floor_text(line, "floor"))
        if result["level"] == "kernel":
            cells.append(floor_text(line, "bare_read"))
            cells.append(digits(line["overlapping"]) if line.get("overlapping") else "-")
            errors = line.get("errors")
            cells.append(f"{errors['mirage']:.2e} ({errors['stock']:.2e})" if errors else "-")
        lines.append(cells)
    header += ["floor (share reached)"] if floors else []
    return header + (["bare read (share reached)", "with overlap", "error (stock's)"] if result["level"] == "kernel" else []), lines


def floor_text(line: dict[str, Any], floor: str) -> str:
    """The floor (or the bare read) and what share of it each arm reached."""
    if not line.get(floor):
        return "-"
    shares = [f"{line[floor] / line[arm]['median']:.0%}" for arm in ARMS if line.get(arm)]
    return digits(line[floor]) + (f" ({', '.join(shares)})" if shares else "")


def print_table(header: list[str], lines: list[list[str]]) -> None:
    """The table on stdout; aligned text where rich is not installed."""
    if importlib.util.find_spec("rich"):
        from rich.console import Console

        width = None if sys.stdout.isatty() else 180
        Console(width=width).print(rich_table(header, lines))
        return
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    for line in [header, *lines]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def rich_table(header: list[str], lines: list[list[str]]) -> Any:
    """The same as a rich table."""
    from rich.table import Table

    grid = Table(*header)
    for line in lines:
        grid.add_row(*line)
    return grid


def print_report(result: dict[str, Any]) -> None:
    """Table, then where it was measured and what ran."""
    print_table(*table(result))
    env, prompts = result["environment"], result.get("prompts")
    before, after = env.get("state_before") or {}, env.get("state_after") or {}
    print(f"Command: {result['command']}  ({result['date']})")
    print(f"Device: {env['gpu'] or 'CPU'}; torch {env['torch']}, CUDA {env['cuda']}, vLLM {env['vllm']}.")
    if after:
        print(
            f"Driver {after['driver_version']}, SM clock {before.get('clocks.sm', '?')} before and "
            f"{after['clocks.sm']} after (at most {after['clocks.max.sm']}), memory {after['clocks.mem']}, "
            f"power limit {after['power.limit']}, {after['temperature.gpu']} °C."
        )
    settings = result["settings"]
    print(
        f"{settings['num_iterations']} rounds after {settings['num_warmup']} warm-up, "
        f"{settings['dtype']}, {'fresh processes' if settings['fresh'] else 'both arms alive'}"
        f"{', eager' if settings['enforce_eager'] else ''}; median (10th to 90th percentile)."
    )
    if prompts:
        cut = f", {prompts['truncated']} cut to fit" if prompts["truncated"] else ""
        print(f"Prompts: {prompts['count']}, {prompts['kind']}, median {prompts['tokens']['median']:.0f} tokens{cut}.")
    memory = {arm: size for arm, size in result["peak_memory_bytes"].items() if size}
    if memory and result["level"] != "kernel":
        print("Peak GPU memory: " + ", ".join(f"{arm} {size / 2**30:.2f} GiB" for arm, size in memory.items()) + ".")
    if starts := result.get("start_seconds"):
        said = ", ".join(f"{arm} {seconds:.0f} s" for arm, seconds in starts.items())
        print(f"Engine start with empty compile caches{', both at once' if env['gpu'] else ''}: {said}.")
    print(f"Overlay: {overlay_text(result['reports']['mirage'])}")
    errors = [line["errors"] for line in result["rows"] if line.get("errors")]
    if errors:
        worst = {arm: max(error[arm] for error in errors) for arm in ARMS}
        print(f"Largest error against float64: stock {worst['stock']:.1e}, mirage {worst['mirage']:.1e} (relative).")
    if result.get("tokens"):
        print(f"Tokens: {result['tokens']['text']}.")
    if result["reason"]:
        print(f"No speed-up is reported: {result['reason']}.")
    if result.get("interrupted"):
        print("Interrupted: these are the whole rounds measured until then.")


def overlay_text(report: dict[str, Any]) -> str:
    """One sentence on which path and kernel each op took."""
    paths: dict[str, int] = {}
    for layer in report["layers"]:
        key = f"{layer['op']} {layer['path']}" + (f" ({layer['kernel'] or layer['reason']})")
        paths[key] = paths.get(key, 0) + 1
    layers = "; ".join(f"{count} layers {key}" for key, count in paths.items()) or "no layers"
    return f"version {report['overlay_version']}; {layers}; calls {report['calls']}."


class Screen:
    """Progress: a live table with rich on a terminal, else one line for each stage on stderr."""

    def __init__(self, result: dict[str, Any]) -> None:
        self.result, self.live, self.text = result, None, ""
        if sys.stderr.isatty() and importlib.util.find_spec("rich"):
            from rich.console import Console
            from rich.live import Live

            self.live = Live(console=Console(stderr=True), transient=True, refresh_per_second=4)

    def __enter__(self) -> Screen:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def status(self, text: str) -> None:
        """Say what is being done."""
        self.text = text
        if self.live is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self._draw()

    def refresh(self) -> None:
        """Show the medians so far."""
        if self.live:
            self._draw()

    def _draw(self) -> None:
        from rich.console import Group

        for line in self.result["rows"]:
            for arm in ARMS:
                line[arm] = summarize(line["samples"][arm]) if line["samples"][arm] else None
        assert self.live is not None
        self.live.update(Group(rich_table(*table(self.result)), self.text))


# ------------------------------------------------------------------------------- comparing and drawing


def load_result(path: Path) -> dict[str, Any]:
    """A report written by --json; UsageError when it is none."""
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"Cannot read {path} ({error}): expected a file written by --json.") from error
    if not isinstance(result, dict) or result.get("schema") != SCHEMA:
        raise UsageError(f"{path} is no report of this benchmark (schema {SCHEMA}): write one with --json.")
    return result


def together(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Several reports of one level as one: the first, with the rows of all. UsageError when they do not belong together."""
    first = results[0]
    for other in results[1:]:
        if other["level"] != first["level"] or other["environment"]["gpu"] != first["environment"]["gpu"]:
            raise UsageError("Reports shown together must be of one level and one kind of GPU.")
    return first | {"rows": [line for result in results for line in result["rows"]]}


def compare(old: dict[str, Any], new: dict[str, Any]) -> tuple[list[str], int]:
    """Sentences on what changed from old to new beyond the 95 % interval, and the number of regressions."""
    if old["level"] != new["level"]:
        raise UsageError(f"Cannot compare level {new['level']} with level {old['level']}: run the same level again.")
    said = [
        f"Different {key}: {old['environment'].get(key)} then, {new['environment'].get(key)} now."
        for key in ("gpu", "torch", "vllm")
        if old["environment"].get(key) != new["environment"].get(key)
    ]
    before = {(line["case"], line["metric"], line["batch"]): line for line in old["rows"]}
    regressions = compared = 0
    for line in new["rows"]:
        past = before.get((line["case"], line["metric"], line["batch"]))
        for arm in ARMS:
            if past is None or line["better"] != "lower" or not past["samples"][arm] or not line["samples"][arm]:
                continue
            compared += 1
            ratio, low, high = slowdown(past["samples"][arm], line["samples"][arm])
            if low <= 1 <= high:
                continue
            regressions += low > 1
            said.append(
                f"{'REGRESSION' if low > 1 else 'Improvement'}: {line['case']} {line['metric']} at batch "
                f"{line['batch']}, {arm}: {digits(past[arm]['median'])} to {digits(line[arm]['median'])} "
                f"{line['unit']} ({ratio - 1:+.1%}, 95 % {low - 1:+.1%} to {high - 1:+.1%})."
            )
    if not compared:
        raise UsageError("The two reports share no measurement: compare runs of the same model and batch sizes.")
    return [*said, f"{compared} measurements compared, {regressions} regressions."], regressions


def pyplot() -> Any:
    """matplotlib's pyplot without a display; UsageError when it is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(
            "matplotlib is not installed: write --json FILE here and draw elsewhere with --from-json FILE --plot."
        )
    import matplotlib

    matplotlib.use("Agg")
    return importlib.import_module("matplotlib.pyplot")


PLOTTED = {"serve": "time per output token", "step": "decode step", "kernel": "kernel"}
COLOURS = {"stock": "#7f7f7f", "mirage": "#0072b2", "floor": "#d55e00"}


def draw(result: dict[str, Any], path: Path) -> None:
    """Time of both arms (and the floor) on the left, speed-up with its interval on the right, against batch size.

    Several models share one pair of axes, and the share of the floor stands in place of the time.
    """
    plt = pyplot()
    metric = PLOTTED[result["level"]]
    plotted = re.compile(rf"{metric}(, .*)?")  # a decode step may name its context
    lines = [line for line in result["rows"] if plotted.fullmatch(line["metric"]) and any(line[arm] for arm in ARMS)]
    lines = [line | {"case": line["case"] + line["metric"].removeprefix(metric)} for line in lines]
    cases = list(dict.fromkeys(line["case"] for line in lines))
    batches = sorted({line["batch"] for line in lines})
    if not lines:
        raise UsageError(f"The report holds no {metric!r} to draw.")
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    if len(cases) == 1:
        draw_times(left, result, lines, batches)
        draw_speedups(right, result, lines, batches, COLOURS["mirage"], cases[0])
    else:
        for index, case in enumerate(cases):
            mine = [line for line in lines if line["case"] == case]
            draw_shares(left, mine, batches, f"C{index}", case, "the stock path" if result["level"] == "kernel" else "stock")
            draw_speedups(right, result, mine, batches, f"C{index}", case)
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, ncols=min(5, len(cases)), loc="outside lower center", frameon=False, fontsize="small")
    name = f"{cases[0]}, {metric}" if len(cases) == 1 else metric
    left.set_title(f"{name}: time" if len(cases) == 1 else f"{name}: share of the memory floor reached")
    right.set_title(f"{name}: speed-up over {'the stock path' if result['level'] == 'kernel' else 'stock'}")
    env = result["environment"]
    figure.suptitle(f"{env['gpu'] or 'CPU'}, vLLM {env['vllm']}, torch {env['torch']}, {result['settings']['dtype']}")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_times(axes: Any, result: dict[str, Any], lines: list[dict[str, Any]], batches: list[int]) -> None:
    """Medians with 10th to 90th percentile as bars around them."""
    for arm in ARMS:
        mine = [line for line in lines if line[arm]]
        if not mine:
            continue
        middle = [line[arm]["median"] for line in mine]
        low = [line[arm]["median"] - line[arm]["p10"] for line in mine]
        high = [line[arm]["p90"] - line[arm]["median"] for line in mine]
        label = "stock path" if arm == "stock" and result["level"] == "kernel" else arm
        x = [batches.index(line["batch"]) + (0.05 if arm == "mirage" else -0.05) for line in mine]
        axes.errorbar(x, middle, [low, high], color=COLOURS[arm], label=label, marker="o", ms=4, capsize=3)
    floors = [(batches.index(line["batch"]), line["floor"]) for line in lines if line["floor"]]
    if floors:
        axes.plot(*zip(*floors, strict=True), color=COLOURS["floor"], ls="--", label="memory floor")
    label_batches(axes, batches)
    axes.set_ylabel(lines[0]["unit"])
    axes.set_ylim(bottom=0)
    axes.legend()


def draw_shares(
    axes: Any, lines: list[dict[str, Any]], batches: list[int], colour: str, case: str, stock: str
) -> None:
    """Floor / median of one model: solid for mirage, dashed for stock."""
    for arm, style in (("mirage", "-"), ("stock", "--")):
        mine = [line for line in lines if line[arm]]
        x = [batches.index(line["batch"]) for line in mine]
        shares = [100 * line["floor"] / line[arm]["median"] for line in mine]
        axes.plot(x, shares, style, color=colour, marker=".", label=case if arm == "mirage" else None)
    label_batches(axes, batches)
    axes.set_ylabel(f"% (solid mirage, dashed {stock})")
    axes.set_ylim(0, 105)


def draw_speedups(
    axes: Any, result: dict[str, Any], lines: list[dict[str, Any]], batches: list[int], colour: str, label: str
) -> None:
    """Ratios with their 95 % interval; the reason where there are none."""
    mine = [line for line in lines if line["speedup"] and line["speedup"]["low"] is not None]
    if not mine:
        said = textwrap.fill(result["reason"] or "too few rounds for an interval", 48)
        axes.text(0.5, 0.5, said, ha="center", va="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    label_batches(axes, batches)
    ratios = [line["speedup"]["ratio"] for line in mine]
    low = [max(0.0, line["speedup"]["ratio"] - line["speedup"]["low"]) for line in mine]
    high = [max(0.0, line["speedup"]["high"] - line["speedup"]["ratio"]) for line in mine]
    x = [batches.index(line["batch"]) for line in mine]
    axes.errorbar(x, ratios, [low, high], color=colour, marker="o", ms=4, capsize=3, label=label)
    axes.axhline(1, color=COLOURS["stock"], lw=1)
    axes.set_ylabel("× with 95 % interval (above 1: faster)")


def label_batches(axes: Any, batches: list[int]) -> None:
    """Batch sizes as evenly spaced labels."""
    axes.set_xticks(range(len(batches)), [str(batch) for batch in batches])
    axes.set_xlim(-0.3, len(batches) - 0.7)
    axes.set_xlabel("batch size (tokens in the step)")
    axes.grid(alpha=0.3)


def draw_timeline(result: dict[str, Any], path: Path) -> None:
    """One decoder layer before and after: a bar for each kernel, coloured by its kind."""
    plt = pyplot()
    timeline = result.get("timeline")
    if not timeline:
        raise UsageError("The report holds no timeline: measure it on a GPU with --profile FILE.png --json FILE.")
    kinds = [kind for kind, _ in KERNEL_KINDS] + ["other"]
    palette = ("#0072b2", "#cc79a7", "#e69f00", "#999999", "#009e73", "#000000")
    colours = dict(zip(kinds, palette, strict=True))
    figure, axes = plt.subplots(figsize=(12, 3.2), layout="constrained")
    for height, arm in enumerate(reversed(ARMS)):
        for event in timeline[arm]:
            bar = (event["start_us"], event["duration_us"])
            axes.broken_barh([bar], (height - 0.3, 0.6), color=colours[event["kind"]], edgecolor="white", lw=0.5)
        end = max(event["start_us"] + event["duration_us"] for event in timeline[arm])
        axes.text(end, height, f"  {end:.1f} µs, {len(timeline[arm])} kernels", va="center")
    used = [kind for kind in kinds if any(e["kind"] == kind for arm in ARMS for e in timeline[arm])]
    handles = [plt.Rectangle((0, 0), 1, 1, color=colours[kind]) for kind in used]
    figure.legend(handles, used, ncols=len(used), loc="outside lower center", frameon=False)
    axes.set_yticks(range(len(ARMS)), list(reversed(ARMS)))
    axes.set_xlabel("µs since the layer's KV cache write")
    axes.set_xlim(0, 1.16 * max(e["start_us"] + e["duration_us"] for arm in ARMS for e in timeline[arm]))
    case, batch = result["rows"][0]["case"], timeline["batch"]
    axes.set_title(f"{case}, one decoder layer of a decode step at batch {batch}, {result['environment']['gpu']}")
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ------------------------------------------------------------------------------------------ command line


class Parser(argparse.ArgumentParser):
    """argparse that reports wrong input in one sentence."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message[0].upper()}{message[1:]} (benchmark_mirage.py --help lists every option).")


def positive(text: str) -> int:
    """A whole number from 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, found {text!r}")
    return int(text)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Options, with defaults that do not depend on the machine; UsageError for what cannot be."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, here = parser.add_argument, Path(__file__).resolve().parent
    add("--level", choices=DEFAULT_ROUNDS, default="serve", help="what is measured (default: serve)")
    add("--model", help="folder, hub id, tiny, tiny-0.6b, or 0.6B 1.7B 4B 8B 14B 32B with dummy weights "
        "(default: 0.6B, without a GPU tiny; level kernel: all shapes)")  # fmt: skip
    add("--dtype", choices=DTYPES, help="default: bfloat16, without a GPU float32")
    add("--prompts", type=Path, default=here / "test_prompts.txt", help="serve: one prompt on each line")
    add("--max-tokens", type=positive, default=50, help="serve: tokens generated for each prompt (default: 50)")
    add("--batch-sizes", type=positive, nargs="+", help="default: 1 2 4 (serve), 1 to 64 (step, kernel)")
    add("--num-warmup", type=positive, default=3, help="rounds that are not counted (default: 3)")
    add("--num-iterations", type=positive, help="rounds measured (default: serve 5, step 10, kernel 20)")
    add("--replays", type=positive, default=20, help="step: graph replays in one sample (default: 20)")
    add("--input-len", type=positive, nargs="+", help="serve: random prompts of this many tokens instead of --prompts; "
        "step: context before decoding, one or several (default: 128)")  # fmt: skip
    add("--max-model-len", type=positive, default=4096, help="serve: longest prompt plus output (default: 4096)")
    add("--seed", type=int, default=0, help="order of prompts, random tokens and weights (default: 0)")
    add("--enforce-eager", action="store_true", help="no torch.compile, no CUDA graphs (always without a GPU)")
    add("--fresh", action="store_true", help="a fresh process for each turn, for models that do not fit twice")
    add("--json", type=Path, metavar="FILE", help="write the whole report with every sample")
    add("--plot", type=Path, metavar="FILE.png", help="draw times and speed-ups against the batch size")
    add("--profile", type=Path, metavar="FILE.png", help="draw one layer before and after, as profiled (GPU only)")
    add("--compare", type=Path, metavar="OLD.json", help="flag what became slower than in an older report (exit 1)")
    add("--from-json", type=Path, nargs="+", metavar="FILE",
        help="measure nothing: show, --plot, --compare an earlier report, or several of one level together")  # fmt: skip
    options = parser.parse_args(arguments)
    options.num_iterations = options.num_iterations or DEFAULT_ROUNDS[options.level]
    options.batch_sizes = sorted(set(options.batch_sizes or DEFAULT_BATCHES[options.level]))
    if options.level == "step":
        options.input_len = sorted(set(options.input_len or [128]))
    return options


def check(options: argparse.Namespace, gpu: bool) -> None:
    """Refuse before any engine starts what could only fail after it."""
    if not gpu and (options.level != "serve" or options.profile):
        what = "--profile" if options.profile else f"--level {options.level}"
        raise UsageError(f"{what} measures GPU time and torch finds no NVIDIA GPU here: use --level serve.")
    if options.profile and options.level == "kernel":
        raise UsageError("--profile draws an engine's step: use it with --level serve or step.")
    if options.level == "kernel" and options.model not in (None, *QWEN3_SIZES):
        raise UsageError(f"--level kernel knows shapes, not models: give --model one of {', '.join(QWEN3_SIZES)}.")
    if options.enforce_eager and (options.level == "step" or options.profile):
        raise UsageError("--enforce-eager captures no CUDA graph to replay: leave it out.")
    if options.level == "serve" and len(options.input_len or [0]) > 1:
        raise UsageError("--level serve draws prompts of one length: give --input-len one number.")
    if options.level == "serve" and not options.input_len:
        read_prompts(options.prompts)
    if options.level == "serve" and options.max_tokens >= options.max_model_len:
        raise UsageError(f"--max-tokens {options.max_tokens} leaves no room for a prompt: raise --max-model-len.")
    if (options.plot or options.profile) and not options.json:
        pyplot()  # without --json a missing matplotlib would lose the whole measurement


def check_overlay() -> None:
    """UsageError unless this Python has a vLLM with the overlay in it."""
    vllm = importlib.util.find_spec("vllm")
    if vllm is None or vllm.origin is None:
        raise UsageError(f"{sys.executable} has no vLLM: install vLLM, then run ./install.sh.")
    folder = Path(vllm.origin).parent
    if not (folder / "model_executor/layers/fused_mirage_ops.py").is_file():
        raise UsageError(f"The vLLM in {folder} holds no overlay to compare with: run ./install.sh.")


def measure(options: argparse.Namespace, command: str, scratch: Path) -> dict[str, Any]:
    """Run one level; returns the report."""
    import torch

    gpu = torch.cuda.is_available()
    options.dtype = options.dtype or ("bfloat16" if gpu else "float32")
    options.enforce_eager = options.enforce_eager or not gpu
    check(options, gpu)
    if options.level != "kernel":
        options.model = options.model or ("0.6B" if gpu else "tiny")
        model = resolve_model(options.model, options.dtype, scratch)
        engine = engine_arguments(options, model, gpu)
    check_overlay()
    names = ("dtype", "batch_sizes", "num_warmup", "num_iterations", "input_len", "max_tokens", "seed", "fresh")
    result: dict[str, Any] = {
        "schema": SCHEMA, "level": options.level, "command": command, "rows": [], "reports": {},
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"), "peak_memory_bytes": {},
        "environment": {"python": sys.version.split()[0], "state_before": gpu_state()},
        "settings": {name: getattr(options, name) for name in (*names, "enforce_eager", "replays")},
    }  # fmt: skip
    with Screen(result) as screen:
        try:
            if options.level == "kernel":
                run_kernel(options, scratch, result, screen)
            else:
                screen.status(f"starting {model.name} in both arms")
                session = Session(scratch, engine, Path(model.path).is_dir(), options.fresh)
                run_engines(session, options, model, result, screen, together=gpu)
        except KeyboardInterrupt:
            keep_whole_rounds(result)
    result["environment"]["state_after"] = gpu_state()
    finish(result)
    return result


def run_engines(
    session: Session, options: argparse.Namespace, model: Model, result: dict[str, Any], screen: Screen, together: bool
) -> None:
    """The serve or step level, and the profile where one is asked for, in engines that start here (`together`: at once) and end here."""
    try:
        session.start(together)
        result["start_seconds"] = session.start_seconds
        level = run_serve if options.level == "serve" else run_step
        level(session, options, model, result, screen)
        if options.profile:
            result["timeline"] = profile_layers(session, options, model)
    finally:
        session.close()


def keep_whole_rounds(result: dict[str, Any]) -> None:
    """Make an interrupted run's report one of what it has measured; KeyboardInterrupt again if that is nothing."""
    for line in result["rows"]:
        whole = min(map(len, line["samples"].values()))
        line["samples"] = {arm: samples[:whole] for arm, samples in line["samples"].items()}
    result["rows"] = [line for line in result["rows"] if line["samples"]["stock"] or line["note"]]
    described = {"mirage"} if result["level"] == "kernel" else set(ARMS)  # with its first row
    if not result["rows"] or described - result["reports"].keys():
        raise KeyboardInterrupt
    result["interrupted"] = True


def profile_layers(session: Session, options: argparse.Namespace, model: Model) -> dict[str, Any]:
    """One layer of a decode step in both arms, at the smallest batch size asked for."""
    batch = options.batch_sizes[0]
    layers: dict[str, Any] = {"batch": batch}
    context = max(options.input_len or [128])
    for arm in ARMS:
        with session.arm(arm) as worker:
            worker.call("fill", batch=batch, context=context, vocab=model.vocab, seed=options.seed)
            layers[arm] = worker.call("timeline")
    return layers


def show(options: argparse.Namespace, result: dict[str, Any]) -> int:
    """Print, draw and compare a report; returns the exit status."""
    print_report(result)
    for path, drawing in ((options.plot, draw), (options.profile, draw_timeline)):
        if path and not (drawing is draw_timeline and result.get("interrupted")):
            drawing(result, path)
            print(f"Drawn: {path}")
    if not options.compare:
        return 0
    sentences, regressions = compare(load_result(options.compare), result)
    print("\n".join(sentences))
    return 1 if regressions else 0


def main(arguments: list[str]) -> int:
    """The command line; returns the exit status."""
    if arguments == ["--worker"]:
        worker_main()
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what was measured is kept
    try:
        options = parse(arguments)
        if options.compare:
            load_result(options.compare)
        if options.from_json:
            return show(options, together([load_result(path) for path in options.from_json]))
        with tempfile.TemporaryDirectory(prefix="mirage-bench-") as scratch:
            try:
                result = measure(options, shlex.join(["benchmark_mirage.py", *arguments]), Path(scratch))
            except KeyboardInterrupt:
                print("Interrupted before anything was measured.", file=sys.stderr)
                return 130
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
            print(f"Written: {options.json}")
        status = show(options, result)
        return 130 if result.get("interrupted") else status
    except KeyboardInterrupt:  # while the report was written or drawn
        print("Interrupted.", file=sys.stderr)
        return 130
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    except MeasurementError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
