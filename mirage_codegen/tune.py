# SPDX-License-Identifier: Apache-2.0
"""Measures plans on this machine's GPU, in the decode step where they will run (layer.py), and writes the plan table.

For each model and token limit the ops of a layer are tuned in turn, the others held: every candidate plan is checked against float64 and
the whole step is timed with it; the fastest stays. An op whose best kernel does not make the step faster takes the stock path from that
limit on, so a kernel is in the table only where it was faster than stock in place. Each op is also measured by itself, for engines that
leave the op before it to the stock path.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mirage_codegen.layer import GEMMS, MODELS, OPS, PROJECTIONS, LayerShape, Step, graph_time_us, op_bytes, relative_error

from mirage_kernels import plans  # isort: skip  (layer.py puts it on the path)
from mirage_kernels.compiler import Build, CompileError, CubinCache  # isort: skip

LIMITS = (1, 2, 8, 16, 32, 48, 64)
ATTENTION_LIMITS = (1, 2, 4, 8, 16, 32, 64)
CONTEXT = 256  # tokens of each request while plans are chosen
LONG_CONTEXTS = (8192, plans.MANY_REQUESTS_CONTEXT)  # where attention must not lose either; if it does at the first, at least at the second
WORTH = 1.005  # a kernel must make the step this much faster to enter the table
TIE = 1.003  # plans whose steps differ by less are equal in the step: the one that is fastest by itself stays
LOSS = 0.99  # the other form of a residual may lose this much at one limit, if it gains over all limits
AGAIN = 6  # candidates that are measured again: in the step once the other ops have changed, alone the best of each form
WARMTHS = (256, 512, 1024)  # bytes of each weight row that a norm kernel may ask into L2; 2048 took the norm's time (H200)


def known_shapes() -> dict[str, LayerShape]:
    """Qwen3 0.6B to 32B and their tensor-parallel shards over 2, 4 and 8 GPUs, by name such as 8B or 8B/2."""
    named = {f"{name}/{ranks}": shape.sharded(ranks) for name, shape in MODELS.items() for ranks in (2, 4, 8)}
    return {**MODELS, **named}


@dataclass(frozen=True)
class Gpu:
    """The GPU that is tuned for."""

    device: torch.device
    arch: str
    multiprocessors: int

    @staticmethod
    def current() -> Gpu:
        """RuntimeError without one."""
        if not torch.cuda.is_available():
            raise RuntimeError("tuning measures on the GPU and there is none here; the shipped plan table needs no tuning.")
        device = torch.device("cuda", torch.cuda.current_device())
        found = torch.cuda.get_device_properties(device)
        return Gpu(device, f"sm_{found.major}{found.minor}", found.multi_processor_count)


def gemm_candidates(kind: str, k: int, n: int, limit: int, count: int, gpu: Gpu) -> list[plans.Plan]:
    """The most promising plans, the same number of each form; of each (cluster, warps, room for the next kernel) the best few."""
    chosen: list[plans.Plan] = []
    forms: dict[plans.Form, list[plans.Plan]] = {}
    for schedule in plans.GEMM_OPS[kind].sources:
        if schedule == "fused" and limit > 16:
            continue  # measured: 32 tokens normalised by every block never win
        for plan in plans.candidates(kind, k, n, limit, schedule, gpu.multiprocessors, gpu.arch):
            forms.setdefault(plan.form, []).append(plan)
    for found in forms.values():
        ranked = sorted(found, key=lambda plan: plans.distance(kind, plan, k, n, gpu.multiprocessors))
        seen: dict[tuple, int] = {}
        kept = []
        for plan in ranked:
            key = plan.cluster, plan.warps, plan.blocks_per_sm, min(plan.stages, 3), plan.early > 0, plan.prefetch > 0, plan.buffered > 0
            if seen.setdefault(key, 0) < 2:
                seen[key] += 1
                kept.append(plan)
        chosen += kept[:count]
    return chosen


def attention_candidates(shape: LayerShape, limit: int, gpu: Gpu) -> Iterator[plans.AttentionPlan]:
    """Clusters and warps: up to four blocks for each multiprocessor."""
    for cluster in (1, 2, 4, 8):
        fills = limit * shape.kv_heads * cluster <= 4 * gpu.multiprocessors
        if cluster == 1 or (fills and cluster <= plans.largest_cluster(gpu.arch)):
            yield from (plans.AttentionPlan(limit, cluster, warps) for warps in (2, 4, 8))


class Check:
    """Holds kernels against float64 on the inputs of one step."""

    def __init__(self, step: Step):
        self.step = step
        self.exact: dict[str, tuple[torch.Tensor, float]] = {}  # outputs in float64, and the stock path's error

    def wrong(self, op: str, kernel: Any) -> str | None:
        """How the kernel errs more than the stock path does, or None."""
        if op not in self.exact:
            exact = self.step.exact(op)
            self.exact[op] = exact, relative_error(self.step.run(op, None, 0), exact)
        exact, allowed = self.exact[op]
        error = relative_error(self.step.run(op, kernel, 0), exact)
        return None if error <= 1.1 * allowed else f"it errs {error:.2e}, stock {allowed:.2e}"


def right_kernels(op: str, candidates: Iterable[Any], prepare: Callable[[Any], Any], check: Check) -> Iterator[tuple[Any, Any]]:
    """The plans that this GPU can run and that are right, with their kernels, one after the other; a wrong one is said."""
    for plan in candidates:
        kernel = prepare(plan)
        if isinstance(kernel, str):
            continue  # it needs more registers or shared memory than this GPU has
        if problem := check.wrong(op, kernel):
            print(f"left out, please report it: {op} {plan}: {problem}")
        else:
            yield plan, kernel


def in_table(shape: LayerShape, op: str, gpu: Gpu, alone: bool = False) -> list[plans.Plan]:
    """The plans that this GPU would run now."""
    found = plans.plans_for(*shape.gemm(op), gpu.arch, alone)
    return found if isinstance(found, list) else []


def for_limit(limit: int, known: Iterable[plans.Plan | None]) -> list[plans.Plan]:
    """Those plans whose kernels take `limit` tokens as they are compiled, for that limit."""
    moved = ((plan, replace(plan, max_num_tokens=limit)) for plan in known if plan is not None)
    return [after for before, after in moved if after.tokens == before.tokens]


class Alone:
    """One op of a layer shape by itself: weights from memory, no overlap with its own next call."""

    def __init__(self, shape: LayerShape, op: str, limit: int, gpu: Gpu):
        self.shape, self.op, self.gpu = shape, op, gpu
        l2 = torch.cuda.get_device_properties(gpu.device).L2_cache_size
        self.step = Step(shape, limit, CONTEXT, gpu.device, max(2, math.ceil(4 * l2 / op_bytes(shape, op, 0, 0))), (op,))
        self.check = Check(self.step)

    def prepare(self, plan: plans.Plan) -> Any:
        """The kernel, or a sentence why it cannot run."""
        return self.shape.prepare(self.op, self.gpu.device, plans=[plan], overlap=False)

    def time_us(self, kernel: Any, replays: int = 5) -> float:
        """Median µs of a call; None is the stock path."""
        copies = self.step.copies
        return graph_time_us(lambda i: self.step.run(self.op, kernel, i % copies), copies * math.ceil(48 / copies), replays)

    def fastest(self, candidates: Iterable[plans.Plan], replays: int) -> list[tuple[float, plans.Plan]]:
        """Those that are right, by rising time."""
        right = right_kernels(self.op, dict.fromkeys(candidates), self.prepare, self.check)
        return sorted(((self.time_us(kernel, replays), plan) for plan, kernel in right), key=lambda entry: entry[0])

    def best(self, candidates: Iterable[plans.Plan]) -> tuple[float, plans.Plan] | None:
        """µs and plan of the fastest, the next kernel's weights warmed or not; None if no candidate is right."""
        forms: dict[plans.Form, list[plans.Plan]] = {}
        for _, plan in self.fastest(candidates, 3):
            forms.setdefault(plan.form, []).append(plan)
        first = [plan for of_form in forms.values() for plan in of_form[:AGAIN]]  # of each: warming favours what loses without
        warm = [replace(plan, warm=warm) for plan in first if can_warm(plan, self.op, self.gpu) for warm in WARMTHS]
        again = [plan for _, plan in self.fastest([*first, *warm], 7)[:AGAIN]]
        return next(iter(self.fastest(again, 25)), None)


class Tuner:
    """One layer shape at one token limit."""

    def __init__(self, shape: LayerShape, limit: int, gpu: Gpu, count: int, known: dict[str, Any]):
        self.shape, self.limit, self.gpu, self.count = shape, limit, gpu, count
        self.step = Step(shape, limit, CONTEXT, gpu.device)
        self.kernels: dict[str, Any] = dict.fromkeys(OPS)
        self.plan: dict[str, Any] = dict.fromkeys(OPS)
        self.known = known  # plans of the limit below: good candidates here
        self.ranked: dict[str, list[tuple[float, Any]]] = {}
        self.check = Check(self.step)
        self.alone: dict[str, Alone] = {}
        self.stock = self.step.time_us(self.kernels)
        self.best = self.stock

    def candidates(self, op: str) -> list[Any]:
        if op == "attention":
            return list(attention_candidates(self.shape, self.limit, self.gpu))
        found = gemm_candidates(*self.shape.gemm(op), self.limit, self.count, self.gpu)
        found += for_limit(self.limit, (self.known.get(op), *in_table(self.shape, op, self.gpu)))
        return list(dict.fromkeys(found))

    def tune(self, op: str, candidates: list[Any]) -> None:
        """Keeps the plan of `op` that makes the step fastest, or the stock path."""
        baseline = self.step.time_us({**self.kernels, op: None})
        right = right_kernels(op, candidates, lambda plan: self.shape.prepare(op, self.gpu.device, plans=[plan]), self.check)
        timed = [(self.step.time_us({**self.kernels, op: kernel}, replays=5), plan, kernel) for plan, kernel in right]
        timed.sort(key=lambda entry: entry[0])
        # the fastest few once more: the first of many candidates is partly the luckiest
        again = [(self.step.time_us({**self.kernels, op: kernel}, replays=15), plan, kernel) for _, plan, kernel in timed[:5]]
        best = min(again, key=lambda entry: entry[0], default=None)
        if best is not None and op != "attention":
            equal = [entry for entry in again if entry[0] <= best[0] * TIE]
            best = min(equal, key=lambda entry: self.alone_us(op, entry[1])) if len(equal) > 1 else best
        self.ranked[op] = [(spent, plan) for spent, plan, _ in timed]
        if best is not None and baseline / best[0] >= WORTH:
            self.best, self.plan[op], self.kernels[op] = best
        else:
            self.best, self.plan[op], self.kernels[op] = baseline, None, None

    def alone_us(self, op: str, plan: Any) -> float:
        """The op's time by itself."""
        if op not in self.alone:
            self.alone[op] = Alone(self.shape, op, self.limit, self.gpu)
        return self.alone[op].time_us(self.alone[op].prepare(plan))

    def run(self) -> None:
        """Two rounds over the ops, the second over each op's best candidates; then what the table holds, as a whole."""
        for op in ("norm_gate_up", "down_proj", "norm_qkv", "attention", "o_proj"):
            self.tune(op, self.candidates(op))
        for op in ("norm_gate_up", "down_proj", "norm_qkv", "o_proj"):
            self.tune(op, [plan for _, plan in self.ranked[op][:AGAIN]])
        table = {op: in_table(self.shape, op, self.gpu) for op in GEMMS}
        self.keep_if_better({op: plan for op in GEMMS for plan in table[op] if plan.max_num_tokens == self.limit})

    def keep_if_better(self, chosen: dict[str, plans.Plan]) -> None:
        """Takes these plans where they make the step faster. One op after the other ends in a local optimum: 0.6B's plans for 16 tokens
        made vLLM's step 5 % slower than those before them (H200)."""
        kernels = {op: self.shape.prepare(op, self.gpu.device, plans=[plan]) for op, plan in chosen.items()}
        if not chosen or any(isinstance(kernel, str) or self.check.wrong(op, kernel) for op, kernel in kernels.items()):
            return
        both = [[self.step.time_us({**self.kernels, **form}, replays=15) for form in ({}, kernels)] for _ in range(3)]  # in turn
        found, before = map(statistics.median, zip(*both, strict=True))
        if before < found:
            self.best, self.plan, self.kernels = before, {**self.plan, **chosen}, {**self.kernels, **kernels}


def compile_all(shapes: list[LayerShape], gpu: Gpu, count: int) -> None:
    """Compiles every candidate in parallel, before anything is measured."""
    wanted: set[tuple[str, tuple[tuple[str, int], ...]]] = set()
    for shape in shapes:
        for limit, op in itertools.product(LIMITS, GEMMS):
            kind, k, n = shape.gemm(op)
            for plan in gemm_candidates(kind, k, n, limit, count, gpu):
                warmths = (0, *WARMTHS) if can_warm(plan, op, gpu) else (0,)
                forms = (plans.kernels_of(kind, replace(plan, warm=warm), k, n) for warm in warmths)
                for name, macros in itertools.chain.from_iterable(itertools.chain.from_iterable(forms)):
                    wanted.add((name, tuple(sorted(macros.items()))))
        for limit in ATTENTION_LIMITS:
            for plan in attention_candidates(shape, limit, gpu):
                wanted.add(("decode_attention", tuple(sorted(plan.defines(shape.heads, shape.kv_heads).items()))))
    cache, started = CubinCache(plans.cache_folder()), time.perf_counter()

    def compile_one(entry: tuple[str, tuple[tuple[str, int], ...]]) -> None:
        try:
            cache.fill(Build(f"{entry[0]}.cu", entry[1], gpu.arch))
        except CompileError as error:
            print(f"skipped: {error}")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sorted(wanted)))
    print(f"{len(wanted)} candidates compiled for {gpu.arch} in {time.perf_counter() - started:.0f} s", flush=True)


def _fastest_fair(timed: list[tuple[list[float], Any]], stock: list[float], long: int) -> Any:
    """Of (times at each context, plan) the one that short contexts like best, among those that lose nothing at context number `long`."""
    fair = [entry for entry in timed if entry[0][long] <= stock[long] * TIE]
    return min(fair, key=lambda entry: entry[0][0] * entry[0][long] ** 0.15, default=None)


def tune_attention(shape: LayerShape, gpu: Gpu, kernels: dict[str, Any]) -> tuple[list[plans.AttentionPlan], list[str]]:
    """Attention's plans by rising limit, in a step whose other ops run `kernels` where they take so many tokens.

    A plan that loses at the longest context but not at the next one is for engines whose requests stay below that.
    """
    found: list[plans.AttentionPlan] = []
    lines = []
    for limit in ATTENTION_LIMITS:
        others = {op: kernel if kernel is not None and limit <= kernel.max_tokens else None for op, kernel in kernels.items()}
        contexts = (CONTEXT, *LONG_CONTEXTS)
        steps = [Step(shape, limit, context, gpu.device, copies) for context, copies in zip(contexts, (0, 2, 2), strict=True)]
        stock = [step.time_us({**others, "attention": None}) for step in steps]
        candidates = attention_candidates(shape, limit, gpu)
        right = right_kernels("attention", candidates, lambda plan: shape.prepare("attention", gpu.device, plans=[plan]), Check(steps[0]))
        timed = [([step.time_us({**others, "attention": kernel}, replays=5) for step in steps], plan) for plan, kernel in right]
        best, max_context = _fastest_fair(timed, stock, 1), None
        if best is None:
            best, max_context = _fastest_fair(timed, stock, 2), LONG_CONTEXTS[1]
        for times, plan in sorted(timed, key=lambda entry: entry[0][0])[:3]:
            cases = zip(contexts, times, stock, strict=True)
            shown = ", ".join(f"{context} tokens {spent:.2f} of {whole:.2f}" for context, spent, whole in cases)
            lines.append(f"  attention {limit:3} requests: cluster {plan.cluster} warps {plan.warps}: a layer takes µs at {shown}")
        if best is None or stock[0] / best[0][0] < WORTH:
            lines.append(f"  attention {limit:3} requests: stock path from here on")
            break
        found.append(replace(best[1], max_context=max_context))
    return found, lines


def tune_shape(shape: LayerShape, gpu: Gpu, count: int) -> tuple[dict[str, list], list[str]]:
    """Plans by op of one layer shape, and a line of report for each limit."""
    found: dict[str, list] = {op: [] for op in GEMMS}
    ended: set[str] = set()
    lines: list[str] = []
    known: dict[str, Any] = {}
    for limit in LIMITS:
        tuner = Tuner(shape, limit, gpu, count, known)
        tuner.run()
        known = tuner.plan
        ratio = tuner.stock / tuner.best
        lines.append(f"  {limit:3} tokens: a layer takes {tuner.stock:7.2f} µs by the stock path, {tuner.best:7.2f} fused: {ratio:.2f}×")
        for op in GEMMS:
            plan = tuner.plan[op]
            lines.append(f"      {op:12} {_short(plan)}")
            if plan is None:
                ended.add(op)
            elif op not in ended:  # limits rise without a gap: one measured loss ends an op's kernels
                found[op].append(plan)
    kernels = {op: shape.prepare(op, gpu.device, plans=found[op]) if found[op] else None for op in GEMMS}
    found["attention"], more = tune_attention(shape, gpu, kernels)
    return found, lines + more


def tune_alone(shape: LayerShape, op: str, gpu: Gpu, count: int, between: list[plans.Plan]) -> tuple[list[plans.Plan], list[str]]:
    """Plans of an op behind a stock one by rising limit, and a line of report for each. between: its plans between kernels.

    The plan that is fastest by itself, as long as it is faster than stock, also in a step whose other ops are stock: for 32 tokens the
    kernel of 8B's gate_up gained 5 % by itself and made such a step 2 % slower (H200). Where it makes that step notably slower than the
    plan between kernels does, that one.
    """
    found: list[plans.Plan] = []
    lines: list[str] = []
    for limit in LIMITS:
        alone = Alone(shape, op, limit, gpu)
        before = alone.time_us(None, 15)
        known = for_limit(limit, [*between, *in_table(shape, op, gpu, alone=True)])
        best = alone.best([*gemm_candidates(*shape.gemm(op), limit, count, gpu), *known])
        if best is None:
            lines.append(f"  {op:12} {limit:3} tokens: no kernel, the stock path from here on")
            break
        spent, plan = best
        stock = statistics.median((before, alone.time_us(None, 15)))
        fallback = [replace(other, max_num_tokens=limit) for other in between if other.max_num_tokens >= limit][:1]  # what runs without
        in_step = times_in_a_stock_step(shape, op, limit, gpu, [None, plan, *fallback])
        if fallback and in_step[plan] * LOSS > in_step[fallback[0]]:
            plan = fallback[0]
        faster = stock / spent >= WORTH and in_step[plan] <= in_step[None]
        times = f"fastest alone {stock:6.2f} → {spent:6.2f} µs, in a stock step {in_step[None]:7.2f} → {in_step[plan]:7.2f}"
        lines.append(f"  {op:12} {limit:3} tokens: {times}, {_short(plan) if faster else 'the stock path from here on'}")
        if not faster:
            break
        found.append(plan)
    return found, lines


def times_in_a_stock_step(shape: LayerShape, op: str, limit: int, gpu: Gpu, tried: list[Any]) -> dict[Any, float]:
    """µs of a layer whose ops are all stock but this one, by its plan (None: stock too), measured in turn."""
    step = Step(shape, limit, CONTEXT, gpu.device)
    kernels = {plan: None if plan is None else shape.prepare(op, gpu.device, plans=[plan]) for plan in tried}
    runs = [[step.time_us({**dict.fromkeys(OPS), op: kernel}, replays=9) for kernel in kernels.values()] for _ in range(3)]
    return dict(zip(kernels, map(statistics.median, zip(*runs, strict=True)), strict=True))


def can_warm(plan: plans.Plan, op: str, gpu: Gpu) -> bool:
    """Whether a plan has a norm kernel that does not warm weights yet, and its GEMM may start under that one (sm_90 and up)."""
    return plan.schedule == "split" and op not in PROJECTIONS and not plan.warm and plans.largest_cluster(gpu.arch) > 1


def projections_add(shape: LayerShape, gpu: Gpu, found: dict[str, list]) -> tuple[bool, list[str]]:
    """Whether o_proj and down_proj should add the residual themselves, with the plans that were found, and lines of report.

    They should where that makes the steps faster by what counts, in the geometric mean over the limits, and none notably slower. Beyond
    their kernels all GEMMs are compiled otherwise (mirage_compile.py), so the kernels of all four must end together.
    """
    limits = {max((plan.max_num_tokens for plan in found[op]), default=0) for op in GEMMS}
    if len(limits) > 1 or limits == {0}:
        return False, [f"  residual: added by the norms, since the GEMMs' kernels end at {', '.join(map(str, sorted(limits)))} tokens"]
    kernels = {op: shape.prepare(op, gpu.device, plans=found[op]) for op in OPS if found[op]}
    adding = {op: shape.prepare(op, gpu.device, plans=found[op], adds_residual=True) for op in PROJECTIONS}
    if reasons := [kernel for kernel in adding.values() if isinstance(kernel, str)]:
        return False, [f"  residual: added by the norms, since {reasons[0]}"]
    ratios, lines = [], []
    for limit in (limit for limit in LIMITS if limit <= max(limits)):
        step = Step(shape, limit, CONTEXT, gpu.device)
        for op, kernel in adding.items():
            exact = step.exact(op) + step.residual.double()
            error, allowed = (relative_error(out, exact) for out in (step.run(op, kernel, 0), step.run(op, None, 0) + step.residual))
            if not error <= 1.1 * allowed:
                return False, [f"left out, please report it: {op} with residual errs {error:.2e}, stock {allowed:.2e}"]
        norms = {op: kernels[op] if op in kernels and limit <= kernels[op].max_tokens else None for op in OPS}
        runs = [[step.time_us({**norms, **form}, replays=15) for form in ({}, adding)] for _ in range(3)]  # in turn
        before, after = map(statistics.median, zip(*runs, strict=True))
        ratios.append(before / after)
        lines.append(f"  residual {limit:3} tokens: a layer takes {before:7.2f} µs with it in the norms, {after:7.2f} in the projections")
    adds = min(ratios) >= LOSS and statistics.geometric_mean(ratios) >= WORTH
    return adds, [*lines, f"  residual: added by the {'projections' if adds else 'norms'}"]


def _short(plan: Any) -> str:
    if plan is None:
        return "stock path"
    form = plan.schedule + " pipelined" * plan.pipelined + " lines" * plan.lines + " gemv" * plan.gemv
    return (
        f"{form} grid {plan.grid}×{plan.cluster} loop {plan.forloop_range} warps {plan.warps} stages {plan.stages} early {plan.early} "
        f"prefetch {plan.prefetch} buffered {plan.buffered} warm {plan.warm} ({plan.blocks_per_sm} a multiprocessor)"
    )


def _tune_in_the_step(name: str, shape: LayerShape, gpu: Gpu, count: int, entries: dict[str, dict]) -> list[str]:
    """Puts the plans of a layer whose ops are all kernels into the table's entries; lines of report."""
    found, lines = tune_shape(shape, gpu, count)
    for op in GEMMS:
        kind, k, n = shape.gemm(op)
        entries.setdefault(kind, {})[f"{k}x{n}"] = plans.to_table(found[op])
    if "/" not in name:  # behind a shard's projections comes an all-reduce
        adds, more = projections_add(shape, gpu, found)
        lines += more
        for _, k, n in map(shape.gemm, PROJECTIONS):
            of_linear = entries["linear"][f"{k}x{n}"]
            entries.setdefault("linear_residual", {})[f"{k}x{n}"] = of_linear if adds else []
    entries.setdefault("decode_attention", {})[f"{shape.heads}x{shape.kv_heads}"] = plans.to_table(found["attention"])
    return lines


def run(arguments: argparse.Namespace) -> int:
    """Tunes the models that were asked for and merges them into the table. RuntimeError without a GPU."""
    known, names = known_shapes(), arguments.models or list(MODELS)
    if unknown := set(names) - set(known):
        raise ValueError(f"the models {', '.join(sorted(unknown))} are none of {', '.join(known)}.")
    shapes, gpu = {name: known[name] for name in names}, Gpu.current()
    output = Path(arguments.output) if arguments.output else plans.user_table()
    table = plans.read_table(output)
    entries = table.setdefault(gpu.arch, {})
    compile_all(list(shapes.values()), gpu, arguments.candidates)
    for name, shape in shapes.items():
        started = time.perf_counter()
        torch._dynamo.reset()  # the stock path is compiled for this shape's lengths, not for any
        lines = []
        if "step" in arguments.measures:
            lines += _tune_in_the_step(name, shape, gpu, arguments.candidates, entries)
        for op in GEMMS if "alone" in arguments.measures else ():
            kind, k, n = shape.gemm(op)
            measured = entries.get(kind, {}).get(f"{k}x{n}")  # just now, or in an earlier run into this table
            between = in_table(shape, op, gpu) if measured is None else [plans.Plan(**entry) for entry in measured]
            found, more = tune_alone(shape, op, gpu, arguments.candidates, between)
            entries.setdefault("alone", {}).setdefault(kind, {})[f"{k}x{n}"] = plans.to_table(found)
            lines += more
        print("\n".join([f"{name} ({time.perf_counter() - started:.0f} s)", *lines]), flush=True)
        entries["measured"] = f"{torch.cuda.get_device_name(gpu.device)}, torch {torch.__version__}, {datetime.date.today()}"
        output.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        output.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    print(f"wrote {output}")
    return 0
