# SPDX-License-Identifier: Apache-2.0
"""The generated part of `mirage_kernels/`: a CUDA source for each op that the overlay runs, and their arguments."""

from __future__ import annotations

import json
from pathlib import Path

from mirage_codegen import ops
from mirage_codegen.lower import lower

KERNELS_DIR = Path(__file__).parent.parent / "patches/vllm/model_executor/layers/mirage_kernels"
HANDWRITTEN = {
    "decode_attention": [
        *("O", "QKV", "G_q", "G_k", "cos_sin", "positions", "cache", "slots", "block_table", "seq_lens"),
        *("page_stride", "token_stride", "head_stride", "page_size", "table_stride", "num_tokens", "eps", "scale"),
    ]
}
"""Kernels that no μGraph describes (their sources say why), with the fields of their struct."""
SHIPPED = (
    *("rms_norm_linear", "rms_norm_linear_first", "rms_norm_gate_up_silu", "rms_norm_gate_up_silu_first", "gate_up_silu"),
    *("rms_norm", "rms_norm_first", "linear", "linear_residual"),
)


def generated_files() -> dict[Path, str]:
    """What each generated file should hold, from the stored graphs. Needs no Mirage."""
    kernels = [lower(ops.load(name)) for name in SHIPPED]
    files = {KERNELS_DIR / f"{kernel.name}.cu": kernel.source for kernel in kernels}
    arguments = {kernel.name: list(kernel.arguments) for kernel in kernels} | HANDWRITTEN
    files[KERNELS_DIR / "kernels.json"] = json.dumps(arguments, indent=2) + "\n"
    return files


def stale_files() -> list[str]:
    """One sentence for each generated file that differs from what its μGraph gives, or that nothing generates."""
    fresh = generated_files()
    present = {path for path in KERNELS_DIR.glob("*.cu") if path.stem not in HANDWRITTEN} | {KERNELS_DIR / "kernels.json"}
    return [
        f"{path.relative_to(KERNELS_DIR.parents[5])} differs from its μGraph: run python -m mirage_codegen generate."
        for path in sorted(fresh.keys() | present)
        if not path.exists() or path.read_text() != fresh.get(path)
    ]


def write_files() -> list[Path]:
    """Writes every generated file anew; returns their paths."""
    files = generated_files()
    for path, text in files.items():
        path.write_text(text)
    return list(files)
