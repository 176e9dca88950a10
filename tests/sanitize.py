# SPDX-License-Identifier: Apache-2.0
"""What tests/sanitize.sh watches: each plan and variant of every op at a few shapes, for full and ragged token counts.

    python sanitize.py [small]

Inputs are made on the CPU and copied, outputs copied back: initcheck, told to watch our kernels alone, takes what PyTorch's kernels
write for uninitialised.  `small` leaves out the large shapes, under which initcheck needs many minutes.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "patches/vllm/model_executor/layers"))
import mirage_kernels
from mirage_kernels import plans

DEVICE = torch.device("cuda", 0)
GEMMS = [  # (op, K, N): a model's few and many columns, and a narrow shard whose plans are not in the table
    ("rms_norm_linear", 1024, 4096),
    ("rms_norm_linear", 4096, 6144),
    ("rms_norm_linear", 1024, 512),
    ("rms_norm_gate_up_silu", 1024, 3072),
    ("rms_norm_gate_up_silu", 1024, 768),
    ("rms_norm_gate_up_silu", 4096, 768),
    ("linear", 2048, 1024),
    ("linear", 3072, 1024),
    ("linear", 1024, 4096),
    ("linear", 1024, 512),
    ("linear_residual", 2048, 1024),
    ("linear_residual", 1024, 512),
]
HEADS = [(16, 8), (32, 8), (5, 1), (8, 1)]
SMALL = 1 << 20  # elements of a weight
SEQ_LENS = (0, 1, 16, 17, 100, 257)
CLUSTERS = (1, 2, 4, 8)


def token_counts(plan: plans.Plan | plans.AttentionPlan) -> set[int]:
    return {plan.max_num_tokens, max(1, plan.max_num_tokens - 3)}


def random(*size: int) -> torch.Tensor:
    return torch.randn(size).bfloat16().to(DEVICE)


def table_plans(op: str, k: int, n: int) -> list[plans.Plan]:
    major, minor = torch.cuda.get_device_capability(DEVICE)
    found = plans.plans_for("linear" if op == "linear_residual" else op, k, n, f"sm_{major}{minor}")
    assert not isinstance(found, str), found
    return found


def form_plans(op: str, k: int, n: int) -> list[list[plans.Plan]]:
    """A plan for 8 tokens and one for 16, of a GEMV one for 2, of every form that an op has, whatever the table holds; with equal shares of
    N and with uneven ones, with rows in shared memory and without; where there is a norm kernel, it warms."""
    forms: dict[tuple[plans.Form, bool, bool], dict[int, plans.Plan]] = {}
    for limit in (2, 8, 16):
        for schedule, sources in plans.GEMM_OPS[op].sources.items():
            warm = 512 if len(sources[0]) > 1 else 0
            for plan in plans.candidates(op, k, n, limit, schedule):
                if plan.gemv == (limit == 2):
                    form = plan.form, n % (2 * plan.grid) > 0, plan.buffered > 0
                    forms.setdefault(form, {}).setdefault(limit, replace(plan, warm=warm))
    return [list(by_limit.values()) for by_limit in forms.values()]


def run_gemm(op: str, k: int, n: int, found: list[plans.Plan]) -> int:
    """The number of calls."""
    kernel = mirage_kernels.prepare(op, k=k, n=n, dtype=torch.bfloat16, device=DEVICE, plans=found)
    assert not isinstance(kernel, str), kernel
    weight, norm_weight, calls = random(n * plans.GEMM_OPS[op].weights, k), random(k), 0
    for num_tokens in sorted(set().union(*map(token_counts, kernel.plans))):
        x = random(num_tokens, k)
        if op == "linear":
            outs = [kernel(x, weight)]
        elif op == "linear_residual":
            outs = [kernel(x, weight, random(num_tokens, n))]
        else:
            outs = [kernel(x, residual, norm_weight, weight, 1e-6)[0] for residual in (random(num_tokens, k), None)]
        assert all(bool(out.cpu().isfinite().all()) for out in outs)
        calls += len(outs)
    return calls


def run_attention(heads: int, kv_heads: int, page: int) -> int:
    """The number of calls; every cluster size, over a cache that holds just what the requests need."""
    found = [
        plans.AttentionPlan(limit, cluster, warps) for limit, cluster, warps in zip((2, 4, 8, 16), CLUSTERS, (8, 4, 4, 2), strict=True)
    ]
    kernel = mirage_kernels.prepare_attention(heads=heads, kv_heads=kv_heads, dtype=torch.bfloat16, device=DEVICE, plans=found)
    assert not isinstance(kernel, str), kernel
    counts = sorted(set().union(*map(token_counts, found)))
    for num_tokens in counts:
        lengths = [SEQ_LENS[(num_tokens + i) % len(SEQ_LENS)] for i in range(num_tokens)]
        pages_each = -(-max(SEQ_LENS) // page)
        cache = random(num_tokens * pages_each, page, kv_heads, 256).transpose(1, 2)
        table = torch.randperm(num_tokens * pages_each).int().view(num_tokens, pages_each)
        seq_lens = torch.tensor(lengths, dtype=torch.int32)
        last = (seq_lens.long() - 1).clamp(min=0)
        slots = torch.where(seq_lens > 0, table.gather(1, (last // page)[:, None])[:, 0] * page + last % page, -1)
        last, slots, table, seq_lens = (tensor.to(DEVICE) for tensor in (last, slots, table, seq_lens))
        out = torch.empty(num_tokens, heads * 128, dtype=torch.bfloat16, device=DEVICE)
        qkv = random(num_tokens, (heads + 2 * kv_heads) * 128)
        kernel(qkv, last, random(128), random(128), random(max(SEQ_LENS), 128), cache, slots, table, seq_lens, 1e-6, 128**-0.5, out)
        assert bool(out.cpu().isfinite().all())
    return len(counts)


def main() -> None:
    small = "small" in sys.argv[1:]
    calls = sum(run_gemm(*case, table_plans(*case)) for case in GEMMS if not small or case[1] * case[2] <= SMALL)
    calls += sum(run_gemm(*case, form) for case in GEMMS if case[1] * case[2] <= SMALL for form in form_plans(*case))
    calls += sum(run_attention(*heads, page) for heads, page in zip(HEADS, (16, 32, 16, 32), strict=True))
    torch.cuda.synchronize()
    print(f"{calls} calls")


if __name__ == "__main__":
    main()
