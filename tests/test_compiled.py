# SPDX-License-Identifier: Apache-2.0
"""The overlay in the real V1 engine on the CPU under torch.compile, against stock vLLM; as test_engine.py, which is eager."""

from pathlib import Path

import pytest
from engines import LAYERS, assert_path, assert_same_answers, case, paths, run_engines

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def stock(work, vllm_stock, make_tiny):
    """Answers of stock vLLM, eager."""
    return run_engines(work / "stock", vllm_stock, [case("eager", make_tiny(dtype="float32"), long=[48, 100])])["eager"]


# ---------------------------------------------------------------------------------------------- compiled, disk cache
def test_each_switch_runs_its_own_graph_over_one_compile_cache(work, vllm_overlay, make_tiny, stock):
    """0, 1, 0, 1 over one cache folder: an undeclared switch would load the graph of the run before."""
    loads, long = [], []
    for turn, switch in enumerate("0101"):
        options = {"enforce_eager": False, "distributed_executor_backend": "uni"}
        compiled = case("compiled", make_tiny(dtype="float32"), switch, llm=options, piecewise=True, long=[100])
        result = run_engines(work / f"piecewise{turn}", vllm_overlay, [compiled], VLLM_CACHE_ROOT=str(work / "cache"))["compiled"]
        assert_path(result, "stock" if switch == "0" else "fused")
        assert_same_answers(result, stock)
        loads.append("Directly load AOT compilation" in result["log"])
        long.append(result["long"][0]["tokens"])
        # beyond what kernels take, only the op that splits the graph is called: the others were compiled as stock's modules are
        called = calls_between(result["reports"], result["long"][0]["reports"])
        assert called == ({} if switch == "0" else {"attention.torch": len(LAYERS)})
    assert loads == [False, False, True, True]
    assert long == [stock["long"][1]["tokens"]] * 4


def calls_between(before, after):
    """What the single worker's ops were called in between, without zeros."""
    [before], [after] = before, after
    return {name: count - before["calls"][name] for name, count in after["calls"].items() if count != before["calls"][name]}


# -------------------------------------------------------------------------------- the residual in the projections
RESIDUAL_WORKER = Path(__file__).parent / "residual_worker.py"


def assert_projections_add(result):
    """Every o_proj, and every down_proj but that of a rank's last layer, took the kernel that adds the residual."""
    for report in result["reports"]:
        kernels = {(layer["name"], layer["op"]): layer["kernel"] or "" for layer in report["layers"]}
        last = max(name for name, _ in kernels)
        adds = {place for place, kernel in kernels.items() if kernel.startswith("linear_residual")}
        assert adds == {(name, op) for name, op in kernels if op == "o_proj" or (op == "down_proj" and name != last)}


def test_where_projections_add_the_residual_answers_equal_stocks(work, vllm_overlay, make_tiny, stock):
    """Compiled: up to 32 tokens by the kernels, up to 64 by the GEMMs' PyTorch bodies, beyond by all bodies."""
    options = {"enforce_eager": False, "distributed_executor_backend": "uni"}
    adding = case("adding", make_tiny(dtype="float32"), "1", llm=options, long=[48, 100])
    result = run_engines(work / "adding", vllm_overlay, [adding], RESIDUAL_WORKER)["adding"]
    assert_path(result, "fused")
    assert_projections_add(result)
    assert_same_answers(result, stock)
    [report] = result["reports"]
    assert report["calls"]["o_proj.kernel"] * 2 == report["calls"]["down_proj.kernel"] * 3 > 0  # two of three layers
    before = result["reports"]
    for step, expected in zip(result["long"], stock["long"], strict=True):
        assert step["tokens"] == expected["tokens"]
        assert calls_between(before, step["reports"]) == {"attention.torch": len(LAYERS)}
        before = step["reports"]


def test_pipeline_ranks_whose_projections_add_the_residual_hand_on_both_tensors(work, vllm_overlay, make_tiny, stock):
    options = {"pipeline_parallel_size": 2, "enforce_eager": False}
    parallel = case("pp", make_tiny(dtype="float32"), "1", llm=options)
    result = run_engines(work / "adding-pp", vllm_overlay, [parallel], RESIDUAL_WORKER, VLLM_ENABLE_V1_MULTIPROCESSING="1")["pp"]
    assert_path(result, "fused")
    assert len(result["reports"]) == 2
    assert_projections_add(result)
    assert_same_answers(result, stock)


# ------------------------------------------------------------------------------------------------- several processes
def test_pipeline_parallel_workers_fuse_their_own_layers(work, vllm_overlay, make_tiny, stock):
    """Compiled, since stock's eager mode fails with two pipeline ranks on the CPU too."""
    options = {"pipeline_parallel_size": 2, "enforce_eager": False}
    parallel = case("pp", make_tiny(dtype="float32"), "1", llm=options)
    result = run_engines(work / "pp", vllm_overlay, [parallel], VLLM_ENABLE_V1_MULTIPROCESSING="1")["pp"]
    assert_path(result, "fused")
    names = [set(paths(report)) for report in result["reports"]]
    assert len(names) == 2 and not names[0] & names[1]
    assert "layers fused" in result["log"] and "on pipeline rank 1" in result["log"]
    assert_same_answers(result, stock)
