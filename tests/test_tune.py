# SPDX-License-Identifier: Apache-2.0
"""The tuner's decisions without a GPU: its step, whose times are made up, and everything behind it as it is."""

import argparse
import contextlib
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mirage_codegen import layer, tune

from mirage_kernels import plans  # isort: skip  (layer.py puts it on the path)

SHAPE = layer.LayerShape(256, 4, 2, 1024)
GPU = tune.Gpu(torch.device("cpu"), "sm_90", 8)
STOCK_US = 10.0  # what every op takes by the stock path


class MadeUpStep:
    """Each op takes STOCK_US, or what its kernel says; attention's kernel is slower than stock beyond short contexts."""

    def __init__(self, shape, num_tokens, context, device, copies=0, ops=layer.OPS):
        self.num_tokens, self.context = num_tokens, context

    residual = torch.zeros(4)
    copies = 3

    def time_us(self, kernels, replays=7, layers=16):
        return sum(STOCK_US if kernel is None else kernel.time_us(self.context) for kernel in kernels.values())

    def exact(self, op):
        return torch.ones(4)

    def run(self, op, kernel, i):
        return torch.full((4,), 1.001) if kernel is None else torch.full((4,), kernel.answer)


def made_up_kernel(op, plan):
    """Two warps or 16 are right and fast, 8 warps fast and wrong; from 32 tokens on down_proj's kernels are slow."""

    def time_us(context):
        if op == "attention":
            fast_up_to = {1: 10**6, 2: 10**6, 4: 10**6, 8: 5000, 16: 1000}
            return 4.0 if context < fast_up_to.get(plan.max_num_tokens, 0) else 11.0
        slow = op == "down_proj" and plan.max_num_tokens >= 32
        return 12.0 if slow else {4: 8.0, 8: 1.0, 16: 6.0}.get(plan.warps, 9.0)

    answer = 1.5 if op != "attention" and plan.warps == 8 else 1.001
    return SimpleNamespace(time_us=time_us, answer=answer, max_tokens=plan.max_num_tokens)


@pytest.fixture
def tuned(monkeypatch, tmp_path, capsys):
    """The table that the tuner writes for SHAPE, and what it printed."""
    monkeypatch.setattr(tune, "Step", MadeUpStep)
    monkeypatch.setattr(tune, "compile_all", lambda *_: None)
    monkeypatch.setattr(tune, "known_shapes", lambda: {"small": SHAPE})
    monkeypatch.setattr(tune.Gpu, "current", staticmethod(lambda: GPU))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "made up")
    monkeypatch.setattr(tune.Tuner, "alone_us", lambda self, op, plan: float(abs(plan.stages - 2) * 100 + plan.prefetch))
    prepare = lambda self, op, device, plans, adds_residual=False: made_up_kernel(op, plans[-1])  # noqa: E731
    monkeypatch.setattr(layer.LayerShape, "prepare", prepare)
    output = tmp_path / "plans.json"
    assert tune.run(argparse.Namespace(models=["small"], candidates=64, measures=["step"], output=str(output))) == 0
    return json.loads(output.read_text())["sm_90"], capsys.readouterr().out


def test_the_fastest_right_plan_of_each_limit_is_kept(tuned):
    table, printed = tuned
    for kind, k, n in map(SHAPE.gemm, ("norm_qkv", "norm_gate_up", "o_proj")):
        entries = table[kind][f"{k}x{n}"]
        limits = [limit for limit in tune.LIMITS if tune.gemm_candidates(kind, k, n, limit, 64, GPU)]
        assert [entry["max_num_tokens"] for entry in entries] == limits and limits[:4] == [1, 2, 8, 16]
        assert {entry["warps"] for entry in entries} <= {16, 4}  # 8 are faster, and wrong
    assert "left out, please report it" in printed


def test_plans_that_tie_in_the_step_are_decided_by_the_op_alone(monkeypatch):
    tuner: Any = object.__new__(tune.Tuner)
    tuner.shape, tuner.gpu, tuner.step, tuner.ranked = SHAPE, GPU, MadeUpStep(SHAPE, 8, 256, GPU.device), {}
    tuner.kernels, tuner.check = dict.fromkeys(layer.OPS), tune.Check(tuner.step)
    tuner.plan = dict(tuner.kernels)
    steps = {1: 8.0, 2: 8.1, 3: 8.3}  # by stages: of 48, 48.1 and 48.3 µs the first two tie
    monkeypatch.setattr(layer.LayerShape, "prepare", lambda self, op, device, plans: SimpleNamespace(
        time_us=lambda _: steps[plans[0].stages], answer=1.001))  # fmt: skip
    monkeypatch.setattr(tuner, "alone_us", lambda op, plan: -plan.stages)
    tuner.tune("o_proj", [plans.Plan(8, "split", 2, 4, 1, 4, stages, 1, 0, 1) for stages in (3, 1, 2)])
    assert tuner.plan["o_proj"].stages == 2


def test_the_tables_plans_stay_where_they_are_faster_together(monkeypatch):
    tuner: Any = object.__new__(tune.Tuner)
    tuner.shape, tuner.gpu, tuner.step, tuner.limit = SHAPE, GPU, MadeUpStep(SHAPE, 8, 256, GPU.device), 8
    found = chosen(8)
    tuner.plan = {**{op: found[op][0] for op in layer.GEMMS}, "attention": None}
    tuner.kernels = {op: plan and made_up_kernel(op, plan) for op, plan in tuner.plan.items()}
    tuner.check, tuner.best = tune.Check(tuner.step), 42.0  # four ops of 8 µs and attention
    monkeypatch.setattr(layer.LayerShape, "prepare", lambda self, op, device, plans: made_up_kernel(op, plans[0]))
    slower, better = ({op: plans_of[0] for op, plans_of in chosen(8, warps=warps).items() if op != "attention"} for warps in (4, 16))
    for offered, best in ((slower, 42.0), ({}, 42.0), (better, 34.0)):
        tuner.keep_if_better(offered)
        assert tuner.best == best
    assert {tuner.plan[op].warps for op in layer.GEMMS} == {16}
    tuner.keep_if_better({op: plans_of[0] for op, plans_of in chosen(8, warps=8).items() if op != "attention"})  # wrong answers
    assert {tuner.plan[op].warps for op in layer.GEMMS} == {16}


@pytest.fixture
def alone(monkeypatch):
    """alone(op, gains, between): plans behind a stock op, and the report; gains: µs in a step whose other ops are stock, by limit."""

    class StockStep(MadeUpStep):
        def time_us(self, kernels, replays=7, layers=16):
            assert set(kernels) == set(layer.OPS)
            gained = [given["gains"][self.num_tokens] for kernel in kernels.values() if kernel is not None]
            assert len(gained) <= 1
            return 50.0 - sum(gained)

    given: dict[str, Any] = {}
    by_itself = {("split", False): 7.0, ("split", True): 7.1, ("fused", False): 6.9, ("fused", True): 6.8}

    def time_us(self, kernel, replays=5):
        if kernel is None:
            return STOCK_US
        plan = kernel.plan
        return by_itself[plan.schedule, plan.pipelined] - {0: 0, 256: 0.3, 512: 0.5, 1024: -1}[plan.warm] - 0.01 * plan.warps

    def prepare(self, op, device, plans, overlap=True):
        return SimpleNamespace(plan=plans[0], answer=1.5 if plans[0].warps == 16 else 1.001)

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=0))
    monkeypatch.setattr(tune, "Step", StockStep)
    monkeypatch.setattr(tune.Alone, "time_us", time_us)
    monkeypatch.setattr(layer.LayerShape, "prepare", prepare)

    def run(op, gains, between=()):
        given["gains"] = dict(zip(tune.LIMITS, gains, strict=False))
        return tune.tune_alone(SHAPE, op, GPU, 64, list(between))

    return run


def test_behind_a_stock_op_the_plan_that_is_fastest_by_itself_runs_with_its_weights_warmed(alone):
    found, lines = alone("norm_qkv", (1.0,) * len(tune.LIMITS))
    assert [plan.max_num_tokens for plan in found] == list(tune.LIMITS)[: len(found)] and len(found) >= 4
    assert {(plan.schedule, plan.warm) for plan in found} == {("split", 512)} and found[0].warps == 8  # 16 are faster, and wrong
    assert "alone  10.00 →   6.42 µs, in a stock step   50.00 →   49.00, split grid" in lines[0]
    assert {plan.warm for plan in alone("o_proj", (1.0,) * len(tune.LIMITS))[0]} == {0}  # there is no norm kernel


def test_behind_a_stock_op_kernels_end_where_a_stock_step_gains_nothing(alone):
    found, lines = alone("norm_qkv", (1.0, 0.5, -0.1, 1.0))
    assert [plan.max_num_tokens for plan in found] == [1, 2]
    assert len(lines) == 3 and "in a stock step   50.00 →   50.10" in lines[2]


@pytest.mark.parametrize(("between_us", "taken"), [(47.0, "between"), (47.8, "alone"), (50.5, "alone")])  # alone: 48 µs of 50
def test_behind_a_stock_op_the_plan_between_kernels_stays_where_it_makes_that_step_notably_faster(alone, monkeypatch, between_us, taken):
    between, for_more = plans.Plan(1, "split", 2, 4, 1, 8, 2, 2, 0, 1), plans.Plan(8, "split", 4, 4, 1, 8, 2, 2, 0, 1)

    def times(shape, op, limit, gpu, tried):
        without = replace(between if limit == 1 else for_more, max_num_tokens=limit)  # what would run without a plan of its own
        assert limit > 8 or tried[-1] == without
        return {None: 50.0, **dict.fromkeys(tried[1:], 48.0), between: between_us}

    monkeypatch.setattr(tune, "times_in_a_stock_step", times)
    found, _ = alone("norm_qkv", (), [between, for_more])
    assert (found[0] == between) == (taken == "between")


def test_both_measures_reach_the_table_each_where_it_belongs(monkeypatch, tmp_path):
    monkeypatch.setattr(tune, "compile_all", lambda *_: None)
    monkeypatch.setattr(tune, "known_shapes", lambda: {"small": SHAPE})
    monkeypatch.setattr(tune.Gpu, "current", staticmethod(lambda: GPU))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "made up")
    monkeypatch.setattr(tune, "tune_shape", lambda *_: (chosen(1, 8), []))
    monkeypatch.setattr(tune, "projections_add", lambda *_: (False, []))
    between: dict[str, Any] = {}

    def tune_alone(shape, op, gpu, count, plans_between):
        between[op] = plans_between
        return chosen(1, warps=8)[op], [f"alone {op}"]

    monkeypatch.setattr(tune, "tune_alone", tune_alone)
    output = tmp_path / "plans.json"
    for measures in (["alone"], ["step"]):  # the second keeps what the first found
        assert tune.run(argparse.Namespace(models=["small"], candidates=1, measures=measures, output=str(output))) == 0
        table = json.loads(output.read_text())["sm_90"]
        assert ("linear" in table) == (measures == ["step"])
    kind, k, n = SHAPE.gemm("norm_qkv")
    [entry] = table["alone"][kind][f"{k}x{n}"]
    assert entry["warps"] == 8 and [entry["warps"] for entry in table[kind][f"{k}x{n}"]] == [4, 4]
    assert tune.run(argparse.Namespace(models=["small"], candidates=1, measures=["step", "alone"], output=str(tmp_path / "new.json"))) == 0
    assert between == {op: chosen(1, 8)[op] for op in layer.GEMMS}  # those just found, which no table on disk has yet


def test_an_op_ends_where_the_stock_path_is_faster(tuned):
    table, printed = tuned
    _, k, n = SHAPE.gemm("down_proj")
    assert [entry["max_num_tokens"] for entry in table["linear"][f"{k}x{n}"]] == [1, 2, 8, 16]
    limits = [(entry["max_num_tokens"], entry.get("max_context")) for entry in table["decode_attention"]["4x2"]]
    assert limits == [(1, None), (2, None), (4, None), (8, 4096)]  # beyond, it loses at long contexts
    assert "attention  16 requests: stock path from here on" in printed


def test_projections_leave_the_residual_to_the_norms_where_kernels_do_not_end_together(tuned):
    table, printed = tuned
    assert table["linear_residual"] == {f"{k}x{n}": [] for _, k, n in map(SHAPE.gemm, layer.PROJECTIONS)}
    assert "residual: added by the norms, since the GEMMs' kernels end at 16, " in printed


def chosen(*limits, warps=4):
    """Plans with those limits, by op of a layer."""
    found = {op: [plans.Plan(limit, "split", 2, 4, 1, warps, 2, 2, 0, 1) for limit in limits] for op in layer.GEMMS}
    return {**found, "attention": [plans.AttentionPlan(4, 1, 4)]}


@pytest.fixture
def decide(monkeypatch):
    """decide(found, gains, answer): the tuner's decision where adding in the projections gains that many µs, by tokens."""

    given: dict[str, Any] = {}

    class AddingStep(MadeUpStep):
        def time_us(self, kernels, replays=7, layers=16):
            adding = [kernel for kernel in kernels.values() if getattr(kernel, "adds_residual", False)]
            assert all(kernel is None or kernel.max_tokens >= self.num_tokens for kernel in kernels.values())
            assert len(adding) in (0, 2)
            return 40.0 - (given["gains"][self.num_tokens] if adding else 0)

    def prepare(self, op, device, plans, adds_residual=False):
        answer = given["answer"] if adds_residual else 1.001
        return SimpleNamespace(max_tokens=plans[-1].max_num_tokens, adds_residual=adds_residual, answer=answer)

    monkeypatch.setattr(tune, "Step", AddingStep)
    monkeypatch.setattr(layer.LayerShape, "prepare", prepare)

    def run(found, gains, answer=1.001):
        given.update(gains=dict(zip(tune.LIMITS, gains, strict=False)), answer=answer)
        return tune.projections_add(SHAPE, GPU, found)

    return run


@pytest.mark.parametrize(
    ("gains", "adds"),
    [
        ((1.0, 1.0, 0.5, 0.3), True),
        ((1.0, 0.0, 0.0, -0.1), True),  # 0.5 % in the mean
        ((0.1, 0.1, 0.1, 0.1), False),  # not what counts
        ((4.0, 1.0, 0.5, -0.5), False),  # one loses 1.2 %
    ],
)
def test_projections_add_the_residual_where_steps_gain_and_none_loses_notably(decide, gains, adds):
    decided, lines = decide(chosen(1, 2, 8, 16), gains)
    assert decided == adds
    assert [line.split()[1] for line in lines[:-1]] == ["1", "2", "8", "16"]
    assert lines[-1] == f"  residual: added by the {'projections' if adds else 'norms'}"


def test_projections_add_the_residual_only_with_right_kernels_that_end_together(decide):
    gains = (1.0,) * 5
    assert decide(chosen(8, 16), gains)[0] is True
    for shorter in layer.GEMMS:
        found = chosen(1, 8, 16)
        found[shorter].pop()
        assert decide(found, gains) == (False, ["  residual: added by the norms, since the GEMMs' kernels end at 8, 16 tokens"])
    assert decide({**chosen(), "attention": []}, gains)[0] is False
    assert decide({**chosen(1, 8), "attention": []}, gains)[0] is True
    decided, [line] = decide(chosen(1, 8), gains, answer=1.5)
    assert not decided and "left out, please report it: o_proj with residual" in line


def test_the_table_takes_the_projections_plans(monkeypatch, tmp_path):
    monkeypatch.setattr(tune, "compile_all", lambda *_: None)
    monkeypatch.setattr(tune, "known_shapes", lambda: {"small": SHAPE, "small/2": SHAPE.sharded(2)})
    monkeypatch.setattr(tune.Gpu, "current", staticmethod(lambda: GPU))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "made up")
    monkeypatch.setattr(tune, "tune_shape", lambda *_: (chosen(1, 8), []))
    monkeypatch.setattr(tune, "projections_add", lambda *_: (True, []))
    output = tmp_path / "plans.json"
    assert tune.run(argparse.Namespace(models=["small", "small/2"], candidates=1, measures=["step"], output=str(output))) == 0
    table = json.loads(output.read_text())["sm_90"]
    assert table["linear_residual"] == {key: table["linear"][key] for key in ("512x256", "1024x256")}  # no shard's
    assert set(table["linear"]) == {"512x256", "1024x256", "256x256"}


def test_a_step_gives_the_same_stream_wherever_the_residual_is_added(monkeypatch):
    """Its kernels are PyTorch's operators here, in the kernels' form."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=0))
    step = layer.Step(SHAPE, 3, 16, torch.device("cpu"), copies=2)

    def norm_gemm(x, r, gamma, weight, eps):
        stream = x if r is None else x + r
        out = layer.rms_norm(stream.double(), gamma).bfloat16() @ weight.t()
        return layer.stock_silu(out) if weight.shape[0] == 2 * SHAPE.intermediate else out, None if r is None else stream

    def attention(qkv, *others):
        others[-1].copy_(qkv[:, : others[-1].shape[1]])

    class Adding:
        adds_residual = True

        def __call__(self, x, weight, r):
            return x @ weight.t() + r

    norms = {"norm_qkv": norm_gemm, "norm_gate_up": norm_gemm, "attention": attention}
    streams = []
    for projection in (lambda x, weight: x @ weight.t(), Adding()):
        kernels = {**norms, "o_proj": projection, "down_proj": projection}
        x: torch.Tensor = step.hidden_states
        r: torch.Tensor | None = step.residual
        for i in range(2):
            x, r = step.layer(kernels, i, x, r)
        assert (r is None) == isinstance(projection, Adding)
        streams.append(x if r is None else x + r)
    torch.testing.assert_close(streams[0], streams[1], rtol=0.02, atol=0.02)
    with pytest.raises(ValueError, match="adds the residual in its norms"):
        step.layer({**kernels, "norm_qkv": None}, 0, x, r)


@pytest.mark.parametrize("limit", (1, 2, 8))
def test_every_form_is_offered(limit):
    count, either = 8, (False, True)
    for op in layer.GEMMS:
        kind, k, n = SHAPE.gemm(op)
        found = tune.gemm_candidates(kind, k, n, limit, count, GPU)
        forms = [plan.form for plan in found]
        projects = op in layer.PROJECTIONS
        # behind a norm kernel activations lie in tiles, which are whole lines
        split = {("split", pipelined, lines, False) for pipelined in either for lines in (either if projects else (False,))}
        fused = {("fused", pipelined, lines, False) for pipelined in either for lines in either if not projects}
        gemv = {("split" if projects else "fused", False, False, True)} if limit <= plans.GEMV_TOKENS else set()
        assert set(forms) == fused | split | gemv
        assert all(0 < forms.count(form) <= count for form in forms)


def test_a_plan_is_tried_at_another_limit_where_its_kernel_is_the_same():
    by_mma, gemv = plans.Plan(8, "split", 2, 4, 1, 4, 2, 2, 0, 1), plans.Plan(2, "split", 2, 1, 1, 4, 2, 2, 0, 1, gemv=True)
    for limit, tried in ((1, [by_mma]), (2, [by_mma, gemv]), (8, [by_mma]), (9, [])):
        assert tune.for_limit(limit, [by_mma, gemv, None]) == [replace(plan, max_num_tokens=limit) for plan in tried]


def test_candidates_fit_the_gpu():
    small = tune.Gpu(torch.device("cpu"), "sm_86", 8)
    for limit in tune.LIMITS:
        for op in layer.GEMMS:
            found = tune.gemm_candidates(*SHAPE.gemm(op), limit, 64, small)
            assert (found or limit > 32) and all(plan.cluster == 1 and plan.grid <= 8 * plan.blocks_per_sm for plan in found)
    assert {plan.cluster for plan in tune.attention_candidates(SHAPE, 1, small)} == {1}


def test_a_measurement_waits_for_what_fills_its_inputs(monkeypatch):
    """Inputs are filled on the current stream, the measured calls run on another."""
    happened: list[Any] = []

    class Event:
        def __init__(self, **_):
            pass

        record = synchronize = lambda self: None
        elapsed_time = lambda self, _: 0.006  # noqa: E731  ms, of two calls

    stream = SimpleNamespace(wait_stream=lambda other: happened.append(other))
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "current")
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert layer.graph_time_us(happened.append, 2, replays=1) == 3.0
    assert happened == ["current", 0, 0, 1]
