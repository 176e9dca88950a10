# SPDX-License-Identifier: Apache-2.0
"""How a kernel runs on an architecture: the plan table, and the heuristic for shapes that are not in it.

`plans.json` holds what was measured, by architecture, op and KxN; the tuner writes it. A table of the user's own, from
`./install.sh --tune`, lies in the cache folder and wins over the shipped one.

There are two measures, and what is best by one may lose by the other. In a step whose ops are all kernels each starts while the one before
it still runs; those plans lie under their op. Behind an op of the stock path nothing overlaps; plans for that lie under "alone".
"""

import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

TABLE = Path(__file__).parent / "plans.json"
COLUMNS = 8  # tokens of one mma
ROW_TILE = 16  # weight rows of one mma
STEP = 32  # k of one 16-byte load by four lanes
GEMV_TOKENS = 2  # with 4 it is no faster than mma in a step (H200)
GEMV_BUFFER = 32768  # bytes of buffered rows on a multiprocessor: 4096x6144 takes 12.7 µs so, 13.3 with twice as many, 13.5 with none
# what bytes of a row that are asked for together cost, of the time of a bare read that asks for 1024 and more (4096x6144, H200)
PIECEMEAL = ((128, 0.42), (256, 0.08), (512, 0.03))
HEAD_DIM = 128  # the head that decode_attention.cu is written for
# 32 requests: 1.05 of stock's speed at 2,000 tokens each, 0.97 at 8,000; between them 1 lies at some 4,700 (a decode step of 8B, H200)
MANY_REQUESTS_CONTEXT = 4096
ROW_KERNELS = ("rms_norm", "rms_norm_first")
REGISTERS = 65536  # 32-bit registers of a multiprocessor, sm_80 and up
SHARED_BYTES = 99 * 1024  # shared memory of a block that every architecture from sm_80 on grants


@dataclass(frozen=True)
class GemmOp:
    """An op around a skinny GEMM.

    weights   weights [n, k] that lie one behind the other in the weight tensor; n counts the columns of one
    sources   by schedule: for each variant (with residual; where the op has it, without) the kernels that run in order
    measured_only   a shape that nobody measured has no plan: the op is a choice that may as well be slower
    """

    weights: int
    sources: dict[str, tuple[tuple[str, ...], ...]]
    measured_only: bool = False


GEMM_OPS = {
    "rms_norm_linear": GemmOp(
        1,
        {
            "fused": (("rms_norm_linear",), ("rms_norm_linear_first",)),
            "split": (("rms_norm", "linear"), ("rms_norm_first", "linear")),
        },
    ),
    "rms_norm_gate_up_silu": GemmOp(
        2,
        {
            "fused": (("rms_norm_gate_up_silu",), ("rms_norm_gate_up_silu_first",)),
            "split": (("rms_norm", "gate_up_silu"), ("rms_norm_first", "gate_up_silu")),
        },
    ),
    "linear": GemmOp(1, {"split": (("linear",),)}),
    "linear_residual": GemmOp(1, {"split": (("linear_residual",),)}, measured_only=True),
}


Form = tuple[str, bool, bool, bool]  # Plan.form


@dataclass(frozen=True)
class AttentionPlan:
    """How decode attention runs for up to `max_num_tokens` requests.

    cluster       blocks that share a KV head of a request
    warps         warps of a block
    max_context   tokens of a request up to which this is faster than stock, None: any number. A CUDA graph is captured once for all
                  contexts, so an engine that allows longer ones takes the stock path instead
    """

    max_num_tokens: int
    cluster: int
    warps: int
    max_context: int | None = None

    def defines(self, heads: int, kv_heads: int) -> dict[str, int]:
        """The macros that bind decode_attention.cu to this plan."""
        return {
            "MIRAGE_HEADS": heads,
            "MIRAGE_KV_HEADS": kv_heads,
            "MIRAGE_CLUSTER": self.cluster,
            "MIRAGE_WARPS": self.warps,
        }


@dataclass(frozen=True)
class Plan:
    """How one op runs for up to `max_num_tokens` tokens.

    schedule        "fused": one kernel, in which every block normalises all tokens for itself; "split": a norm kernel and a GEMM that
                    streams its weights while the norm runs. Fused is faster for few tokens.
    grid            clusters along N: each computes N / grid columns (× 2 for gate and up), in whole pairs; a cluster of one block may have
                    one pair less than others
    forloop_range   iterations of the μGraph's loop over K
    cluster         blocks that share a cluster's iterations (sm_90 and up; 1 elsewhere)
    warps           warps of a block; they share an iteration's K
    stages          steps of 32 k that a warp has in flight
    early           steps of weights asked for before the previous kernel has finished
    prefetch        further iterations asked into L2 before that
    blocks_per_sm   blocks that must fit on a multiprocessor; more than the grid fills leave room for the next kernel to start in
    warm            bytes of every weight row that the norm kernel asks into L2 for its GEMM (split; sm_90 and up)
    pipelined       a step's activations are asked for and made the operand a step ahead, before its weights are waited for
    lines           activations are read in whole lines, two steps at once (where they lie in rows: not behind a norm kernel)
    gemv            the threads of a block share one weight row after the other, by FMAs: `stages` and `early` count rows, an iteration is 8
                    elements for each thread
    buffered        rows of a GEMV that are asked for right behind its first `stages` and wait in shared memory
    """

    max_num_tokens: int
    schedule: str
    grid: int
    forloop_range: int
    cluster: int
    warps: int
    stages: int
    early: int
    prefetch: int
    blocks_per_sm: int
    warm: int = 0
    pipelined: bool = False
    lines: bool = False
    gemv: bool = False
    buffered: int = 0

    @property
    def form(self) -> Form:
        """What of a plan is another program, not another tiling."""
        return self.schedule, self.pipelined, self.lines, self.gemv

    @property
    def tokens(self) -> int:
        """Tokens that the kernel is compiled for: those of whole mmas, or with FMAs no more than it must take."""
        return self.max_num_tokens if self.gemv else round_up(self.max_num_tokens, COLUMNS)

    def defines(self, k: int, n: int) -> dict[str, int]:
        """The macros that bind a GEMM source to this plan."""
        return {
            "MIRAGE_K": k,
            "MIRAGE_N": n,
            "MIRAGE_TOKENS": self.tokens,
            "MIRAGE_GRID": self.grid,
            "MIRAGE_FORLOOP": self.forloop_range,
            "MIRAGE_CLUSTER": self.cluster,
            "MIRAGE_WARPS": self.warps,
            "MIRAGE_STAGES": self.stages,
            "MIRAGE_EARLY": self.early,
            "MIRAGE_PREFETCH": self.prefetch,
            "MIRAGE_OCCUPANCY": self.blocks_per_sm,
            "MIRAGE_BUFFERED": self.buffered,
            "MIRAGE_TILED": 0,
            "MIRAGE_LINES": int(self.lines),
            "MIRAGE_PIPELINED": int(self.pipelined),
            "MIRAGE_GEMV": int(self.gemv),
        }


def round_up(value: int, multiple: int) -> int:
    """The next multiple at or above value."""
    return (value + multiple - 1) // multiple * multiple


def largest_cluster(arch: str) -> int:
    """Blocks of a cluster at most: clusters came with sm_90."""
    return 8 if int(arch.removeprefix("sm_")) >= 90 else 1


def kernels_of(op: str, plan: Plan, k: int, n: int) -> list[list[tuple[str, dict[str, int]]]]:
    """For each variant of an op the kernels that run in order, with their macros; a GEMM behind a norm kernel reads that one's tiles."""
    row = row_defines(k, n * GEMM_OPS[op].weights, plan.warm)
    return [
        [(name, row if name in ROW_KERNELS else plan.defines(k, n) | {"MIRAGE_TILED": int(name != names[0])}) for name in names]
        for names in GEMM_OPS[op].sources[plan.schedule]
    ]


def row_defines(k: int, next_rows: int = 0, warm: int = 0) -> dict[str, int]:
    """The macros of a norm kernel: a thread for each 8 neighbouring elements of the row, 1024 at most.

    warm: bytes of each of the next kernel's `next_rows` weight rows that it asks into L2.
    """
    threads = min(1024, round_up(k // COLUMNS, 32))
    return {"MIRAGE_K": k, "MIRAGE_THREADS": threads, "MIRAGE_NEXT_ROWS": next_rows if warm else 0, "MIRAGE_WARM": warm}


def cache_folder() -> Path:
    """Where cubins and the user's own plans lie: mirage_kernels/ in vLLM's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "vllm"
    return Path(os.environ.get("VLLM_CACHE_ROOT", default)).expanduser() / "mirage_kernels"


def user_table() -> Path:
    """The plan table of this user's own measurements."""
    return cache_folder() / "plans.json"


def read_table(path: Path) -> dict:
    """A plan table, {} if there is none. ValueError with one sentence if it is damaged."""
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"The plan table {path} cannot be read ({error}); delete it or run ./install.sh --tune again.") from error


def plans_for(op: str, k: int, n: int, arch: str, alone: bool = False) -> list[Plan] | str:
    """Plans by rising token limit, or one sentence why there are none. Above the last limit the stock path is faster or unmeasured.

    alone: behind an op of the stock path; where nobody measured that, as between kernels.
    """
    found = _measured(op, f"{k}x{n}", arch, alone)
    if GEMM_OPS[op].measured_only and not isinstance(found, list):
        return f"nobody measured that {op} is faster for {k}x{n} on {arch}"
    if isinstance(found, str):
        return found
    if found is not None:
        return [Plan(**entry) for entry in found]
    plans = [plan for limit in (8, 16) if (plan := heuristic(op, k, n, limit, arch)) is not None]
    return plans or f"no plan divides K {k} and N {n}"


def attention_plans_for(heads: int, kv_heads: int, arch: str) -> list[AttentionPlan] | str:
    """The same for decode attention with that many heads on this GPU."""
    found = _measured("decode_attention", f"{heads}x{kv_heads}", arch)
    if isinstance(found, str):
        return found
    if found is None:
        # with 4 KV heads nothing was as fast as stock for 8 requests of 8192 tokens (H200)
        limits = (1, 2, 4, 8, 16, 32) if kv_heads >= 8 else (1, 2, 4)
        return [attention_heuristic(kv_heads, limit, arch) for limit in limits]
    return [AttentionPlan(**entry) for entry in found]


def attention_heuristic(kv_heads: int, max_num_tokens: int, arch: str) -> AttentionPlan:
    """A plan for heads that nobody measured: near what won for 8 KV heads on an H200, a block for each of its multiprocessors."""
    cluster = max(1, min(largest_cluster(arch), 128 // (max_num_tokens * kv_heads)))
    few = max_num_tokens <= 16
    return AttentionPlan(max_num_tokens, 1 << cluster.bit_length() - 1, 8 if few else 4, None if few else MANY_REQUESTS_CONTEXT)


def _measured(op: str, shape: str, arch: str, alone: bool = False) -> list[dict] | str | None:
    """The table's entry for a shape, the user's before the shipped one; None if nobody measured it; a sentence if no kernel should run."""
    known: set[str] = set()
    for path in (user_table(), TABLE):
        ops = read_table(path).get(arch, {})
        known |= ops.keys()
        for entries in (ops.get("alone", {}), ops) if alone else (ops,):
            if shape in entries.get(op, {}):
                return entries[op][shape] or f"no kernel was faster than the stock path for {shape} on {arch}"
    return None if op in known else f"no plan is measured for {arch}; ./install.sh --tune measures them on this GPU"


def to_table(plans: Iterable[Plan] | Iterable[AttentionPlan]) -> list[dict]:
    """Plans as the table holds them: without what is as in most."""
    return [{field.name: value for field in fields(plan) if (value := getattr(plan, field.name)) != field.default} for plan in plans]


def candidates(
    op: str, k: int, n: int, max_num_tokens: int, schedule: str, multiprocessors: int = 132, arch: str = "sm_90"
) -> Iterator[Plan]:
    """Every plan worth measuring for a shape: tiles that divide, registers and shared memory that fit, most multiprocessors busy."""
    fitting = [_fitting(op, k, n, max_num_tokens, schedule, multiprocessors)]
    if max_num_tokens <= GEMV_TOKENS:
        fitting.append(_fitting_gemv(op, k, n, max_num_tokens, schedule, multiprocessors))
    found = [plan for plan in itertools.chain.from_iterable(fitting) if plan.cluster <= largest_cluster(arch)]
    busy = [plan for plan in found if plan.grid * plan.cluster >= 0.72 * multiprocessors]
    if not busy and found:  # a narrow shard: as many blocks as it gives
        most = max(plan.grid * plan.cluster for plan in found)
        busy = [plan for plan in found if plan.grid * plan.cluster == most]
    yield from busy


def _fitting(op: str, k: int, n: int, max_num_tokens: int, schedule: str, multiprocessors: int) -> Iterator[Plan]:
    weights = GEMM_OPS[op].weights
    rows_in = len(GEMM_OPS[op].sources[schedule][0]) == 1  # no norm kernel leaves tiles
    tokens = round_up(max_num_tokens, COLUMNS)
    columns = tokens // COLUMNS
    for cluster, warps, blocks_per_sm in itertools.product((1, 2, 4), (4, 8, 16), (1, 2, 3, 4)):
        if k % (cluster * warps * STEP) or not 8 <= warps * blocks_per_sm <= 32:
            continue
        steps = k // (cluster * warps * STEP)
        for grid, rows in _shares(n, cluster, multiprocessors * blocks_per_sm):
            row_tiles = -(-rows // ROW_TILE) * weights
            if row_tiles > 16 or grid * cluster > multiprocessors * blocks_per_sm:
                continue
            registers = min(255, REGISTERS // (warps * 32 * blocks_per_sm))
            per_stage = -(-rows // 8) * weights * 4 + (columns * 8 + 4 if schedule == "fused" else columns * 4)
            stages = min(steps, (registers - row_tiles * columns * 4 - 28) // per_stage)
            shared = warps * tokens * (row_tiles * ROW_TILE + 4) * 4 + tokens * warps * cluster * 4 + tokens * rows * weights * 4
            if stages < 1 or shared * blocks_per_sm > 220 * 1024 or shared > SHARED_BYTES:
                continue
            # two steps side by side read whole 128-byte lines: 4.6 against 5.0 µs (K 1024, 8 tokens, H200)
            for units in (2, 1) if steps % 2 == 0 else (1,):
                iterations = steps // units * cluster
                usual = {stages, min(stages, 2), 1}  # whole lines may also take the even number below the most that fit
                for stage in sorted(usual | ({stages // 2 * 2} - {0})):
                    for early in (stage, 0) if schedule == "fused" else (stage,):
                        for prefetch in (0, 2, steps) if steps > early else (0,):
                            plan = Plan(max_num_tokens, schedule, grid, iterations, cluster, warps, stage, early, prefetch, blocks_per_sm)
                            whole_lines = rows_in and units % 2 == 0 and stage % 2 == 0
                            for lines in [False] * (stage in usual) + [True] * whole_lines:
                                yield replace(plan, lines=lines)
                                if steps > 1:
                                    yield replace(plan, lines=lines, pipelined=True)


def _shares(n: int, cluster: int, slots: int, smallest: int = 8) -> Iterator[tuple[int, int]]:
    """Ways to share N rows: (clusters, rows of a cluster at most). Equal ones, and as even as `slots` blocks can have them."""
    for rows in (2, 4, 6, 8, 12, 24, 40, *range(16, 257, 16)):
        if rows >= smallest and n % rows == 0 and rows % (2 * cluster) == 0:
            yield n // rows, rows
    if cluster == 1 and n % (2 * slots) and slots < n // 2:
        yield slots, -(-n // 2 // slots) * 2


def _fitting_gemv(op: str, k: int, n: int, max_num_tokens: int, schedule: str, multiprocessors: int) -> Iterator[Plan]:
    if len(GEMM_OPS[op].sources[schedule][0]) > 1:
        return  # by themselves one kernel took 13.9 and 9.2 µs, two 14.4 and 9.8 (K 4096 and 2560, N 6144, 1 token, H200)
    weights = GEMM_OPS[op].weights
    for warps, blocks_per_sm in itertools.product(range(1, 21), range(1, 9)):
        if k % (warps * 32 * COLUMNS) or not 8 <= warps * blocks_per_sm <= 48:
            continue
        slices = k // (warps * 32 * COLUMNS)
        for grid, rows in _shares(n, 1, blocks_per_sm * multiprocessors, smallest=2):
            rows *= weights
            if grid > blocks_per_sm * multiprocessors:
                continue
            part = math.gcd(rows, 16)  # Gemv::PART
            shared = warps * max_num_tokens * (rows + 5) * 4
            if rows > 96:
                continue
            for stages in (stages for stages in (2, 3, 4, 6, 8) if stages <= rows):
                registers = max_num_tokens * (8 * slices + part) + stages * slices * 4 + 16
                if registers > min(255, REGISTERS // (warps * 32 * blocks_per_sm)):
                    continue
                buffered = {min(count, rows - stages) for count in (1, 2, 4) if count * k * 2 * blocks_per_sm <= 2 * GEMV_BUFFER}
                for early, waiting in itertools.product((stages, 0) if schedule == "fused" else (stages,), sorted({0} | buffered)):
                    plan = Plan(max_num_tokens, schedule, grid, slices, 1, warps, stages, early, 0, blocks_per_sm, gemv=True)
                    if shared + waiting * k * 2 <= SHARED_BYTES:
                        yield replace(plan, buffered=waiting)


def distance(op: str, plan: Plan, k: int, n: int, multiprocessors: int = 132) -> float:
    """How unpromising a plan looks before anybody has measured it: multiprocessors idle, few bytes of a row asked for together, far from
    48 KB of weights in flight on each."""
    blocks = plan.grid * plan.cluster
    per_sm = math.ceil(blocks / multiprocessors)
    if plan.gemv:  # 80 KB: what won lay between 60 and 120
        imbalance = math.ceil(n / 2 / plan.grid) * per_sm * multiprocessors / (n / 2) - 1
        buffer = per_sm * plan.buffered * k * 2
        waiting = 0.03 * abs(math.log2(buffer / GEMV_BUFFER)) if buffer else 0.06
        return 2 * imbalance + 0.2 * abs(math.log2(per_sm * plan.stages * k * 2 / 81920)) + waiting + 0.03 * math.log2(plan.forloop_range)
    in_flight = per_sm * plan.warps * plan.stages * GEMM_OPS[op].weights * n / plan.grid * STEP * 2
    idle = 1 - blocks / (multiprocessors * per_sm)
    units = k // (plan.forloop_range * plan.warps * STEP)
    together = plan.warps * STEP * 2 * units if plan.stages >= units else STEP * 2
    piecemeal = next((cost for most, cost in PIECEMEAL if together <= most), 0)
    return 4 * idle + piecemeal + 0.3 * math.log2(plan.cluster) + 0.2 * abs(math.log2(in_flight / 49152)) + 0.1 * (plan.prefetch > 0)


def heuristic(op: str, k: int, n: int, max_num_tokens: int, arch: str = "sm_90") -> Plan | None:
    """A plan for a shape that nobody measured."""
    found = candidates(op, k, n, max_num_tokens, "split", arch=arch)
    return min(found, key=lambda plan: (distance(op, plan, k, n), not plan.lines), default=None)
