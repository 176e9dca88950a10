# SPDX-License-Identifier: Apache-2.0
"""How a kernel runs on an architecture: the plan table, and the heuristic for shapes that are not in it.

`plans.json` holds what was measured, by architecture, op and KxN; the tuner writes it. A table of the user's own, from
`./install.sh --tune`, lies in the cache folder and wins over the shipped one.
"""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

TABLE = Path(__file__).parent / "plans.json"
COLUMNS = 8  # tokens of one mma
ROW_TILE = 16  # weight rows of one mma
STEP = 32  # k of one 16-byte load by four lanes
REGISTERS = 65536  # 32-bit registers of a multiprocessor, sm_80 and up
SHARED_BYTES = 99 * 1024  # shared memory of a block that every architecture from sm_80 on grants


@dataclass(frozen=True)
class Plan:
    """How one op runs for up to `max_num_tokens` tokens.

    schedule        "fused": one kernel, in which every block normalises all tokens for itself; "split": a norm kernel and a GEMM that
                    streams its weights while the norm runs. Fused is faster for few tokens and small K.
    grid            clusters along N: each computes N / grid columns (× 2 for gate and up)
    forloop_range   iterations of the μGraph's loop over K
    cluster         blocks that share a cluster's iterations (sm_90 and up; 1 elsewhere)
    warps           warps of a block; they share an iteration's K
    stages          steps of 32 k that a warp has in flight
    prefetch        further iterations asked into L2 at the start
    blocks_per_sm   blocks that must fit on a multiprocessor
    """

    max_num_tokens: int
    schedule: str
    grid: int
    forloop_range: int
    cluster: int
    warps: int
    stages: int
    prefetch: int
    blocks_per_sm: int

    def defines(self, k: int, n: int) -> dict[str, int]:
        """The macros that bind a GEMM source to this plan."""
        return {
            "MIRAGE_K": k,
            "MIRAGE_N": n,
            "MIRAGE_TOKENS": round_up(self.max_num_tokens, COLUMNS),
            "MIRAGE_GRID": self.grid,
            "MIRAGE_FORLOOP": self.forloop_range,
            "MIRAGE_CLUSTER": self.cluster,
            "MIRAGE_WARPS": self.warps,
            "MIRAGE_STAGES": self.stages,
            # behind a norm kernel the first weights may be loaded before the activations are there; in front of its own prologue
            # that mostly makes the activations wait (H200: K 1024, 8 tokens 4.9 against 4.6 µs; K 4096, 1 token 14.9 against 15.0)
            "MIRAGE_EARLY": self.stages if self.schedule == "split" else 0,
            "MIRAGE_PREFETCH": self.prefetch,
            "MIRAGE_OCCUPANCY": self.blocks_per_sm,
        }


def round_up(value: int, multiple: int) -> int:
    """The next multiple at or above value."""
    return (value + multiple - 1) // multiple * multiple


def row_defines(k: int) -> dict[str, int]:
    """The macros of a norm kernel: a thread for each 8 neighbouring elements of the row, 1024 at most."""
    return {"MIRAGE_K": k, "MIRAGE_THREADS": min(1024, round_up(k // COLUMNS, 32))}


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


def plans_for(op: str, k: int, n: int, arch: str) -> list[Plan] | str:
    """Plans by rising token limit, or one sentence why there are none. Above the last limit the stock path is faster or unmeasured."""
    shape, known = f"{k}x{n}", set()
    for path in (user_table(), TABLE):
        ops = read_table(path).get(arch, {})
        known |= ops.keys()
        if shape in ops.get(op, {}):
            plans = [Plan(**entry) for entry in ops[op][shape]]
            return plans or f"no kernel was faster than the stock path for {shape} on {arch}"
    if op not in known:
        return f"no plan is measured for {arch}; ./install.sh --tune measures them on this GPU"
    plans = [plan for limit in (8, 16) if (plan := heuristic(k, n, limit)) is not None]
    return plans or f"no plan divides K {k} and N {n}"


def to_table(plans: list[Plan]) -> list[dict]:
    """Plans as the table holds them."""
    return [asdict(plan) for plan in plans]


def candidates(k: int, n: int, max_num_tokens: int, schedule: str, multiprocessors: int = 132) -> Iterator[Plan]:
    """Every plan worth measuring for a shape: tiles that divide, registers and shared memory that fit, most multiprocessors busy."""
    found = list(_fitting(k, n, max_num_tokens, schedule, multiprocessors))
    busy = [plan for plan in found if plan.grid * plan.cluster >= 0.72 * multiprocessors * plan.blocks_per_sm]
    if not busy and found:  # a narrow shard: as many blocks as it gives
        most = max(plan.grid * plan.cluster for plan in found)
        fewest = min(plan.blocks_per_sm for plan in found if plan.grid * plan.cluster == most)
        busy = [plan for plan in found if plan.grid * plan.cluster == most and plan.blocks_per_sm == fewest]
    yield from busy


def _fitting(k: int, n: int, max_num_tokens: int, schedule: str, multiprocessors: int) -> Iterator[Plan]:
    tokens = round_up(max_num_tokens, COLUMNS)
    columns = tokens // COLUMNS
    for cluster in (1, 2, 4):
        for warps in (4, 8, 16):
            if k % (cluster * warps * STEP):
                continue
            steps = k // (cluster * warps * STEP)
            for blocks_per_sm in (1, 2, 3):
                if not 8 <= warps * blocks_per_sm <= 32:
                    continue
                for tiles in (t for t in range(1, 17) if n % (t * ROW_TILE) == 0 and t * ROW_TILE % (2 * cluster) == 0):
                    grid = n // (tiles * ROW_TILE)
                    if grid * cluster > multiprocessors * blocks_per_sm:
                        continue
                    registers = min(255, REGISTERS // (warps * 32 * blocks_per_sm))
                    per_stage = tiles * 8 + (columns * 8 + 4 if schedule == "fused" else columns * 4)
                    stages = min(steps, (registers - tiles * columns * 4 - 28) // per_stage)
                    rows = tiles * ROW_TILE
                    shared = warps * tokens * (rows + 4) * 4 + tokens * warps * cluster * 4 + tokens * rows * 4
                    if stages < 1 or shared * blocks_per_sm > 220 * 1024 or shared > SHARED_BYTES:
                        continue
                    # two steps side by side read whole 128-byte lines: 4.6 against 5.0 µs (K 1024, 8 tokens, H200)
                    for units in (2, 1) if steps % 2 == 0 else (1,):
                        for stage in sorted({stages, min(stages, 2), 1}):
                            for prefetch in (0, 2) if schedule == "split" and steps > stage and units == 1 else (0,):
                                iterations = steps // units * cluster
                                yield Plan(max_num_tokens, schedule, grid, iterations, cluster, warps, stage, prefetch, blocks_per_sm)


def distance(plan: Plan, k: int, n: int) -> float:
    """How far a plan is from what won on an H200: every multiprocessor busy and some 48 KB of weights in flight on each; fused with 16
    warps a block; split with several blocks a multiprocessor, and in clusters of 2 from 9 tokens and K 2560 on."""
    row_tiles = n // plan.grid // ROW_TILE
    in_flight = plan.blocks_per_sm * plan.warps * plan.stages * row_tiles * ROW_TILE * STEP * 2
    idle = 1 - min(1.0, plan.grid * plan.cluster / (132 * plan.blocks_per_sm))
    if plan.schedule == "fused":
        cluster, shape = 1, 0.5 * (plan.warps != 16) + 0.2 * (plan.blocks_per_sm - 1)
    else:
        cluster = 2 if plan.max_num_tokens > COLUMNS and k >= 2560 else 1
        shape = 0.2 * (plan.blocks_per_sm == 1) + 0.1 * (plan.warps == 16)
    return 4 * idle + 0.5 * abs(math.log2(plan.cluster / cluster)) + 0.2 * abs(math.log2(in_flight / 49152)) + shape


def heuristic(k: int, n: int, max_num_tokens: int) -> Plan | None:
    """A plan for a shape that nobody measured."""
    return min(candidates(k, n, max_num_tokens, "split"), key=lambda plan: distance(plan, k, n), default=None)
