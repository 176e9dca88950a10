#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Prints the documents' tables of what docs/results holds: python docs/tables.py"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from mirage_codegen.models import QWEN3_SIZES

RESULTS = Path(__file__).parent / "results"
MODELS = ("0.6B", "1.7B", "4B", "8B")
BATCHES = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (2000, 8000)


def rows(level: str, model: str, metric: str, case: str = "") -> dict[int, dict]:
    """The rows of one metric (of one op) in a report, by batch size."""
    report = json.loads((RESULTS / f"{level}-{model}.json").read_text())
    return {line["batch"]: line for line in report["rows"] if line["metric"] == metric and line["case"].endswith(case)}


def table(corner: str, columns: list, lines: list[list[str]]) -> list[str]:
    heads = [corner, *map(str, columns)]
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *lines)]


def ratio(line: dict | None) -> str:
    return f"{line['speedup']['ratio']:.2f}×" if line and line.get("speedup") else "stock"


def step_table() -> list[str]:
    """README: speed-ups by batch size, and the time and share of the memory floor at batch 1."""
    lines = []
    for model in MODELS:
        found = rows("step", model, "decode step")
        first = found[1]
        times = f"{first['stock']['median']:.3f} → {first['mirage']['median']:.3f} ({first['floor']:.3f})"
        lines.append([f"Qwen3-{model}", *(ratio(found[batch]) for batch in BATCHES), times])
    return table("decode step, batch", [*BATCHES, "batch 1, ms: stock → Mirage (floor)"], lines)


def context_table() -> list[str]:
    """BENCHMARK_GUIDE: speed-ups of a decode step at longer contexts."""
    lines = []
    for model in ("0.6B", "8B"):
        for context in CONTEXTS:
            found = rows("context", model, f"decode step, {context} tokens before it")
            lines.append([f"Qwen3-{model}, {context:,} tokens", *(ratio(line) for line in found.values())])
    return table("decode step, batch", list(found), lines)


def serve_table() -> list[str]:
    """BENCHMARK_GUIDE: what arrives of it through LLM.generate: ms for each output token, and tokens/s."""
    lines = []
    for model in ("0.6B", "8B"):
        for metric in ("time per output token", "throughput"):
            cells = []
            for line in rows("serve", model, metric).values():
                digits = 2 if line["unit"] == "ms" else 0
                both = (f"{line[side]['median']:.{digits}f}" for side in ("stock", "mirage"))
                cells.append(f"{' → '.join(both)} ({line['speedup']['ratio']:.2f}×, {line['speedup']['verdict']})")
            lines.append([f"Qwen3-{model}, {metric}, {line['unit']}", *cells])
    return table("through `LLM.generate`, batch", [1, 2, 4], lines)


def kernel_table() -> list[str]:
    """BENCHMARK_GUIDE: norm_qkv by itself, stock / ours, beside what Mirage's own transpiled kernel takes (fp16)."""
    own = {(entry["k"], entry["tokens"]): entry for entry in json.loads((RESULTS / "mirage-own-h200.json").read_text())["results"]}
    batches = (1, 2, 4, 8, 16, 24, 32, 64)
    lines = []
    for model in MODELS:
        found = rows("kernel", model, "kernel", "norm_qkv")
        lines.append([f"Qwen3-{model}", *(ratio(found[batch]) for batch in batches)])
        overlapping = [
            f"{line['stock']['median'] / line['overlapping']:.2f}×" if line.get("overlapping") else "stock" for line in found.values()
        ]
        lines.append(["overlapping with itself", *overlapping])
        if any(line.get("bare_read") for line in found.values()):
            reads = (line.get("bare_read") and line["bare_read"] / line["mirage"]["median"] for line in found.values())
            lines.append(["share of a bare read", *(f"{share:.0%}" if share else "–" for share in reads)])
        theirs = [own.get((QWEN3_SIZES[model].hidden, batch)) for batch in batches]
        lines.append(["Mirage's own, error", *(f"{e['stock_us'] / e['us']:.2f}×, {e['error']:.1e}" if e else "–" for e in theirs)])
    return table("`norm_qkv` by itself, tokens", list(batches), lines)


def bench_table() -> list[str]:
    """BENCHMARK_GUIDE: what `vllm bench serve` says of a server of each arm."""
    results = json.loads((RESULTS / "bench-serve.json").read_text())["results"]
    columns = {"median_tpot_ms": 2, "output_throughput": 0, "median_ttft_ms": 1}
    lines = []
    for model, arms in results.items():
        cells = [f"{arms['stock'][name]:.{digits}f} → {arms['mirage'][name]:.{digits}f}" for name, digits in columns.items()]
        cells[0] += f" ({arms['stock']['median_tpot_ms'] / arms['mirage']['median_tpot_ms']:.2f}×)"
        lines.append([f"Qwen3-{model}", *cells])
    heads = ["time per output token, ms (median)", "output tokens/s", "time to first token, ms (median)"]
    return table("`vllm bench serve`, 4 requests at a time", heads, lines)


if __name__ == "__main__":
    for made in (step_table, context_table, serve_table, kernel_table, bench_table):
        print(made.__doc__, *made(), "", sep="\n")
