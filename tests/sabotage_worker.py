# SPDX-License-Identifier: Apache-2.0
"""engine_worker.py with an overlay that computes something else: what test_mirage_qwen3.py must notice.

A case has a "spec" for generate() of test_mirage_qwen3.py in place of "llm", and may have "sabotage", a name in SABOTAGES.
"""

import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import engine_worker
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import test_mirage_qwen3 as script

# Each takes the right __call__ of its stand-in and what that is called with.


def gamma_forgotten(right: Any, op: Any, *arguments: Any) -> Any:
    weight = op.norm_layer.weight
    kept, weight.data = weight.data, torch.ones_like(weight.data)
    out = right(op, *arguments)
    weight.data = kept
    return out


def residual_dropped(right: Any, op: Any, hidden_states: Any, residual: Any) -> Any:
    return right(op, hidden_states, None)


def normalised_twice(right: Any, op: Any, hidden_states: Any, residual: Any) -> Any:
    total = hidden_states if residual is None else hidden_states + residual
    qkv, _ = right(op, op.norm_layer(total), None)
    return qkv, total


def large_eps_in_the_first_layer(right: Any, op: Any, hidden_states: Any, residual: Any) -> Any:
    if residual is not None:
        return right(op, hidden_states, residual)
    with patch.object(op.norm_layer, "variance_epsilon", 1e-3):
        return right(op, hidden_states, residual)


def no_residual_before_the_mlp(right: Any, op: Any, hidden_states: Any, residual: Any) -> Any:
    return right(op, hidden_states, torch.zeros_like(residual))


def positions_one_too_far(right: Any, op: Any, positions: Any, qkv: Any) -> Any:
    return right(op, positions + (positions > 3), qkv)


def one_column_of_a_projection_lost(right: Any, op: Any, x: Any, residual: Any) -> Any:
    return right(op, x * (torch.arange(x.shape[1]) > 0), residual)


SABOTAGES = {  # name: (the stand-in whose __call__ it replaces, it)
    wrong.__name__: (stand_in, wrong)
    for stand_in, wrong in (
        ("FusedRMSNormQKV", gamma_forgotten),
        ("FusedRMSNormQKV", residual_dropped),
        ("FusedRMSNormQKV", normalised_twice),
        ("FusedRMSNormQKV", large_eps_in_the_first_layer),
        ("FusedRMSNormGateUpSiLU", no_residual_before_the_mlp),
        ("FusedAttention", positions_one_too_far),
        ("FusedLinear", one_column_of_a_projection_lost),
    )
}


def run(case: dict[str, Any]) -> dict[str, Any]:
    from vllm.model_executor.layers import fused_mirage_ops

    if "sabotage" not in case:
        return script.generate(case["spec"])
    name, wrong = SABOTAGES[case["sabotage"]]
    stand_in = getattr(fused_mirage_ops, name)
    right = stand_in.__call__
    with patch.object(stand_in, "__call__", lambda op, *arguments: wrong(right, op, *arguments)):
        return script.generate(case["spec"])


if __name__ == "__main__":
    engine_worker.main(run)
