# SPDX-License-Identifier: Apache-2.0
"""What tests/sanitize.sh watches: each plan of a few shapes, with and without residual, for full and ragged token counts."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "patches/vllm/model_executor/layers"))
import mirage_kernels

SHAPES = [(1024, 4096), (4096, 6144), (1024, 512)]  # one wave, clusters of 2, clusters of 4


def main() -> None:
    device, calls = torch.device("cuda", 0), 0
    for k, n in SHAPES:
        kernel = mirage_kernels.prepare("rms_norm_linear", k=k, n=n, dtype=torch.bfloat16, device=device)
        assert not isinstance(kernel, str), kernel
        weight = torch.randn(n, k, device=device).bfloat16()
        norm_weight = torch.randn(k, device=device).bfloat16()
        for plan in kernel.plans:
            for num_tokens in {plan.max_num_tokens, max(1, plan.max_num_tokens - 3)}:
                hidden_states = torch.randn(num_tokens, k, device=device).bfloat16()
                residual = torch.randn(num_tokens, k, device=device).bfloat16()
                for given in (residual, None):
                    out, _ = kernel(hidden_states, given, norm_weight, weight, 1e-6)
                    assert bool(out.isfinite().all())
                    calls += 1
    torch.cuda.synchronize()
    print(f"{calls} calls")


if __name__ == "__main__":
    main()
