# SPDX-License-Identifier: Apache-2.0
"""The numbers in README.md are the measured ones of docs/results/."""

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"


def readme_row(first_cell: str) -> list[str]:
    """The cells behind the first one of README's only row that starts so."""
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith(f"| {first_cell} |")]
    assert len(rows) == 1, first_cell
    return [cell.strip() for cell in rows[0].strip("|").split("|")[1:]]


def test_decode_steps_are_the_measured_ones():
    results = json.loads((RESULTS / "step-h200.json").read_text())
    for model in ("0.6B", "8B"):
        ratios = results[model]["kernel"]
        assert readme_row(f"Qwen3-{model}") == [f"{ratios[batch]:.2f}" for batch in readme_row("batch")]


def test_kernel_ratios_are_the_measured_ones():
    rows = json.loads((RESULTS / "kernel-h200.json").read_text())["rows"]
    measured = {(row["k"], row["n"], row["tokens"]): row for row in rows}
    for shape in ("1024→4096 (0.6B)", "2048→4096 (1.7B)", "2560→6144 (4B)", "4096→6144 (8B)"):
        k, n = map(int, shape.split()[0].split("→"))
        expected = [measured[k, n, int(tokens)] for tokens in readme_row("tokens")]
        assert readme_row(shape) == [f"{row['stock_us'] / row['kernel_us']:.2f}" for row in expected]


def test_the_plan_table_ends_where_the_stock_path_was_faster():
    rows = json.loads((RESULTS / "kernel-h200.json").read_text())["rows"]
    table = json.loads((ROOT / "patches/vllm/model_executor/layers/mirage_kernels/plans.json").read_text())["sm_90"]["rms_norm_linear"]
    for row in rows:
        limits = [plan["max_num_tokens"] for plan in table[f"{row['k']}x{row['n']}"]]
        assert (limits[-1] < row["tokens"]) == ("used" in row)
