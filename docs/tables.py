#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Prints the README's table of measured decode steps from docs/results: python docs/tables.py"""

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
MODELS = ("0.6B", "1.7B", "4B", "8B")
BATCHES = (1, 2, 4, 8, 16, 32, 64)


def decode_steps(model: str) -> dict[int, dict]:
    """The report's decode-step rows by batch size."""
    report = json.loads((RESULTS / f"step-{model}.json").read_text())
    return {line["batch"]: line for line in report["rows"] if line["metric"] == "decode step"}


def step_table() -> list[str]:
    """Speed-ups by batch size, and the time and share of the memory floor at batch 1; one line for each model."""
    lines = [
        "| decode step, batch | " + " | ".join(map(str, BATCHES)) + " | batch 1, ms: stock → Mirage (floor) |",
        "| --- |" + " --- |" * (len(BATCHES) + 1),
    ]
    for model in MODELS:
        rows = decode_steps(model)
        ratios = [f"{rows[batch]['speedup']['ratio']:.2f}×" for batch in BATCHES]
        first = rows[1]
        times = f"{first['stock']['median']:.3f} → {first['mirage']['median']:.3f} ({first['floor']:.3f})"
        lines.append(f"| Qwen3-{model} | " + " | ".join(ratios) + f" | {times} |")
    return lines


if __name__ == "__main__":
    print("\n".join(step_table()))
