# SPDX-License-Identifier: Apache-2.0
"""The ops, the switch, the eligibility and the decoder layer of the overlay, without an engine."""

import importlib
import importlib.util
import json
import os
import sys
import types
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

EPS = 1e-6
HIDDEN, QKV = 256, 512  # the tiny model's


@pytest.fixture(scope="module")
def engine_config(ops, tiny_model, tmp_path_factory):
    """vLLM's configuration for the tiny model, with a process group of one."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import cleanup_dist_env_and_memory, ensure_model_parallel_initialized
    from vllm.distributed.parallel_state import init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(model=str(tiny_model), max_model_len=256, enforce_eager=True).create_engine_config()
    store = tmp_path_factory.mktemp("store") / "rendezvous"
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{store}", 0, backend="gloo")
        ensure_model_parallel_initialized(1, 1)
        yield config
    cleanup_dist_env_and_memory()


@pytest.fixture
def use(monkeypatch, ops):
    """use("1"): set the switch for this test; plans and kernels of the test are forgotten afterwards."""
    monkeypatch.delenv("VLLM_MIRAGE_OPS", raising=False)
    monkeypatch.setattr(ops, "_plans", {})
    monkeypatch.setattr(ops, "_kernels", {})
    return lambda value: monkeypatch.setenv("VLLM_USE_MIRAGE", value)


class KeepQuery(nn.Module):
    """In place of the attention, which needs an engine's KV cache."""

    def forward(self, q, k, v):
        return q


@pytest.fixture
def build_layer(engine_config):
    """build_layer(cls): a bf16 decoder layer with random weights and no KV cache."""
    from vllm.utils.torch_utils import set_default_torch_dtype

    def build(cls, name="model.layers.0"):
        engine_config.compilation_config.static_forward_context.clear()
        torch.manual_seed(0)
        hf_config = engine_config.model_config.hf_config
        with set_default_torch_dtype(torch.bfloat16):
            layer = cls(hf_config, cache_config=engine_config.cache_config, prefix=name)
        layer.self_attn.attn = KeepQuery()
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        return layer

    return build


def layer_class():
    from vllm.model_executor.models import qwen3

    return qwen3.Qwen3DecoderLayer


def finish_loading(layer):
    """What vLLM does after loading; on the CPU it packs the linear weights and empties the parameters."""
    for module in layer.modules():
        if hasattr(module, "quant_method"):
            module.quant_method.process_weights_after_loading(module)


def layer_inputs(residual):
    """positions, hidden_states, residual or None."""
    generator = torch.Generator().manual_seed(1)
    x, r = torch.randn(2, 5, HIDDEN, generator=generator).to(torch.bfloat16)
    return torch.arange(5), x, r if residual else None


# ------------------------------------------------------------------------------------------------------------- ops
def inputs(tokens, k, n, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, residual = torch.randn(2, tokens, k, generator=generator).to(dtype)
    gamma = (1 + 0.25 * torch.randn(k, generator=generator)).to(dtype)
    weight = (torch.randn(n, k, generator=generator) * k**-0.5).to(dtype)
    return x, residual, gamma, weight


def in_float64(x, residual, gamma, weight):
    total = x.double() if residual is None else x.double() + residual.double()
    normed = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + EPS) * gamma.double()
    return F.linear(normed, weight.double()), total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_ops_keep_torchs_contract(ops, tokens, dtype):
    x, residual, gamma, weight = inputs(tokens, 64, 96, dtype)
    torch.library.opcheck(torch.ops.vllm_mirage.norm_qkv, (x, gamma, weight, EPS))
    torch.library.opcheck(torch.ops.vllm_mirage.add_norm_qkv, (x, residual, gamma, weight, EPS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "k", "n"), [(1, 256, 512), (7, 1000, 96), (64, 1024, 640)])
def test_ops_err_no_more_than_the_unfused_path(ops, tokens, k, n, dtype):
    from vllm.ir.ops.layernorm import fused_add_rms_norm, rms_norm

    x, residual, gamma, weight = inputs(tokens, k, n, dtype)
    exact, exact_residual = in_float64(x, residual, gamma, weight)
    qkv, residual_out = torch.ops.vllm_mirage.add_norm_qkv(x, residual, gamma, weight, EPS)
    unfused, unfused_residual = fused_add_rms_norm.impls["native"].impl_fn(x, residual, gamma, EPS)
    error = (qkv.double() - exact).abs().max()
    assert error <= 1.01 * (F.linear(unfused, weight).double() - exact).abs().max()
    assert error > 0 and torch.equal(residual_out, unfused_residual)
    assert (residual_out.double() - exact_residual).abs().max() <= torch.finfo(dtype).eps * exact_residual.abs().max()

    exact, _ = in_float64(x, None, gamma, weight)
    unfused = rms_norm.impls["native"].impl_fn(x, gamma, EPS)
    error = (torch.ops.vllm_mirage.norm_qkv(x, gamma, weight, EPS).double() - exact).abs().max()
    assert 0 < error <= 1.01 * (F.linear(unfused, weight).double() - exact).abs().max()


def test_ops_leave_their_inputs_alone(ops):
    arguments = inputs(3, 64, 96, torch.float32)
    before = [tensor.clone() for tensor in arguments]
    qkv, residual_out = torch.ops.vllm_mirage.add_norm_qkv(*arguments, EPS)
    assert all(map(torch.equal, arguments, before))
    storages = {tensor.untyped_storage().data_ptr() for tensor in (*arguments, qkv, residual_out)}
    assert len(storages) == 5  # x and residual of `inputs` share one


def test_a_nan_row_stays_in_its_row(ops):
    x, residual, gamma, weight = inputs(4, 64, 96, torch.bfloat16)
    x[2, 5] = float("nan")
    qkv, residual_out = torch.ops.vllm_mirage.add_norm_qkv(x, residual, gamma, weight, EPS)
    assert qkv[2].isnan().all() and residual_out[2, 5].isnan()
    others = [0, 1, 3]
    assert not qkv[others].isnan().any() and not residual_out[others].isnan().any()


@pytest.mark.parametrize("lead", [(0,), (3,), (2, 3)])
def test_fakes_have_the_shapes_of_the_results(ops, lead):
    x, residual, gamma, weight = inputs(6, 64, 96, torch.bfloat16)
    x = x[: lead[0]] if len(lead) == 1 else x.view(*lead, 64)
    residual = residual[: lead[0]] if len(lead) == 1 else residual.view(*lead, 64)
    add_norm_qkv = torch.ops.vllm_mirage.add_norm_qkv
    real = add_norm_qkv(x, residual, gamma, weight, EPS)
    with FakeTensorMode() as mode:
        fake = add_norm_qkv(*map(mode.from_tensor, (x, residual, gamma, weight)), EPS)
    described = [[(t.shape, t.stride(), t.dtype) for t in outputs] for outputs in (real, fake)]
    assert described[0] == described[1]


# --------------------------------------------------------------------------------------------------------- kernels
class RecordingKernel:
    """A kernel as mirage_kernels.prepare returns it; computes nothing."""

    name, max_tokens, source_hash = "recording", 4, "0" * 64

    def __call__(self, hidden_states, residual, norm_weight, weight, eps):
        qkv = hidden_states.new_full((hidden_states.shape[0], weight.shape[0]), 7.0)
        return qkv, None if residual is None else residual.clone()


def test_the_kernel_takes_small_batches_and_torch_the_rest(ops, use):
    x, residual, gamma, weight = inputs(8, 64, 96, torch.bfloat16)
    ops._kernels[64, 96, torch.bfloat16, x.device] = RecordingKernel()
    wide = torch.zeros(4, 128, dtype=torch.bfloat16)
    unaligned = torch.zeros(4 * 64 + 1, dtype=torch.bfloat16)[1:].view(4, 64)

    def took_kernel(hidden_states):
        before = ops.mirage_report()["calls"]
        qkv = torch.ops.vllm_mirage.norm_qkv(hidden_states, gamma, weight, EPS)
        after = ops.mirage_report()["calls"]
        kernel, plain = (after[f"norm_qkv.{body}"] - before[f"norm_qkv.{body}"] for body in ("kernel", "torch"))
        assert kernel + plain == 1
        assert bool((qkv == 7).all()) == bool(kernel) or not qkv.numel()
        return bool(kernel)

    assert took_kernel(x[:1]) and took_kernel(x[:4])
    assert not took_kernel(x[:5])
    assert not took_kernel(x[:0])
    assert not took_kernel(wide[:, :64])
    assert not took_kernel(unaligned)
    assert not took_kernel(x[:4].view(2, 2, 64))
    assert (torch.ops.vllm_mirage.add_norm_qkv(x[:2], residual[:2], gamma, weight, EPS)[0] == 7).all()


def test_without_a_kernel_the_reason_is_kept(ops, use, monkeypatch):
    assert "not on a GPU" in ops.prepare_kernel(64, 96, torch.bfloat16, torch.device("cpu"))
    from vllm.model_executor import layers

    monkeypatch.delattr(layers, "mirage_kernels", raising=False)
    monkeypatch.setitem(sys.modules, "vllm.model_executor.layers.mirage_kernels", None)
    assert "cannot be imported" in ops.prepare_kernel(64, 96, torch.bfloat16, torch.device("cuda", 0))

    asked = []

    def prepare(op, **shape):
        asked.append((op, shape))
        return RecordingKernel()

    stub: Any = types.ModuleType("mirage_kernels")
    stub.prepare = prepare
    monkeypatch.setitem(sys.modules, "vllm.model_executor.layers.mirage_kernels", stub)
    monkeypatch.setattr(layers, "mirage_kernels", stub, raising=False)
    shape = {"k": 64, "n": 128, "dtype": torch.bfloat16, "device": torch.device("cuda", 0)}
    assert ops.prepare_kernel(**shape) is ops.prepare_kernel(**shape)
    assert asked == [("rms_norm_linear", shape)]
    described = ops.mirage_report()["kernels"]
    assert [entry["kernel"] for entry in described] == [None, None, "recording"]
    json.dumps(described)


# ---------------------------------------------------------------------------------------------------------- switch
@pytest.mark.parametrize("value", ["2", "", "true", "Strict", " 1"])
def test_another_switch_value_is_an_error_naming_the_three(ops, use, value):
    use(value)
    with pytest.raises(ValueError, match="0, 1 or strict was expected"):
        ops.is_mirage_enabled()


def test_set_use_mirage_sets_the_switch_and_keeps_strict(ops, use, monkeypatch):
    use("0")
    ops.set_use_mirage(True)
    assert os.environ["VLLM_USE_MIRAGE"] == "1" and ops.is_mirage_enabled()
    ops.set_use_mirage(False)
    assert os.environ["VLLM_USE_MIRAGE"] == "0" and not ops.is_mirage_enabled()
    use("strict")
    ops.set_use_mirage(True)
    assert os.environ["VLLM_USE_MIRAGE"] == "strict"
    monkeypatch.delenv("VLLM_USE_MIRAGE")
    assert not ops.is_mirage_enabled()


def test_single_ops_can_be_switched_off_by_name(ops, use, monkeypatch):
    assert ops.enabled_ops() == {"norm_qkv"}
    for value, expected in (("all", {"norm_qkv"}), (" norm_qkv ", {"norm_qkv"}), ("none", set())):
        monkeypatch.setenv("VLLM_MIRAGE_OPS", value)
        assert ops.enabled_ops() == expected
    for value in ("norm_kqv", "all,none", ""):
        monkeypatch.setenv("VLLM_MIRAGE_OPS", value)
        with pytest.raises(ValueError, match="comma list of norm_qkv was expected"):
            ops.enabled_ops()


def test_switch_and_paths_are_in_vllms_compile_cache_key(ops, use, build_layer, monkeypatch):
    from vllm import envs

    def key():
        return {name: value for name, value in envs.compile_factors().items() if "MIRAGE" in name}

    use("0")
    stock = build_layer(layer_class())
    keys = [key()]
    use("1")
    keys.append(key())
    monkeypatch.setenv("VLLM_MIRAGE_OPS", "none")
    keys.append(key())
    monkeypatch.delenv("VLLM_MIRAGE_OPS")
    fused = build_layer(layer_class())
    keys.append(key())
    assert set(keys[0]) == {"VLLM_USE_MIRAGE", "VLLM_MIRAGE_OPS", "VLLM_MIRAGE_GRAPH_STATE"}
    assert len({json.dumps(k, sort_keys=True) for k in keys}) == 4
    assert stock.fused_norm_qkv is None and fused.fused_norm_qkv is not None  # alive until here
    assert keys[1]["VLLM_MIRAGE_GRAPH_STATE"] != keys[3]["VLLM_MIRAGE_GRAPH_STATE"]


# ----------------------------------------------------------------------------------------------------- eligibility
def passes(**values):
    return SimpleNamespace(pass_config=SimpleNamespace(**values))


def test_an_eligible_pair_has_no_reason(ops, use, build_layer):
    layer = build_layer(layer_class())
    assert ops.why_not_fused(layer.input_layernorm, layer.self_attn.qkv_proj) is None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda norm, qkv: setattr(norm, "__class__", type("GemmaRMSNorm", (type(norm),), {})), "GemmaRMSNorm"),
        (lambda norm, qkv: setattr(norm, "variance_size_override", 64), "part of a row"),
        (lambda norm, qkv: setattr(norm, "has_weight", False), "no weight"),
        (lambda norm, qkv: setattr(qkv, "__class__", type("QKVWithLoRA", (type(qkv),), {})), "QKVWithLoRA"),
        (lambda norm, qkv: setattr(qkv, "quant_method", type("Fp8LinearMethod", (), {})()), "Fp8LinearMethod"),
        (lambda norm, qkv: setattr(qkv, "bias", nn.Parameter(torch.zeros(QKV))), "bias"),
        (lambda norm, qkv: setattr(qkv, "gather_output", True), "gathers"),
        (lambda norm, qkv: setattr(qkv, "weight", nn.Parameter(torch.zeros(QKV, 2 * HIDDEN))), "512, 512"),
        (lambda norm, qkv: setattr(qkv, "weight", nn.Parameter(torch.zeros(QKV, HIDDEN).double())), "float64"),
        (lambda norm, qkv: setattr(norm, "weight", nn.Parameter(torch.zeros(HIDDEN))), "float32"),
        (lambda norm, qkv: setattr(qkv, "weight", nn.Parameter(qkv.weight.to("meta"))), "meta"),
    ],
)
def test_an_ineligible_pair_has_a_reason(ops, use, build_layer, change, expected):
    layer = build_layer(layer_class())
    norm, qkv = layer.input_layernorm, layer.self_attn.qkv_proj
    change(norm, qkv)
    assert expected in ops.why_not_fused(norm, qkv)
    with pytest.raises(ValueError, match=expected):
        ops.FusedRMSNormQKV(norm, qkv)


@pytest.mark.parametrize(
    ("compilation", "lora", "tensor_parallel", "expected"),
    [
        (passes(enable_sp=True), None, 2, "sequence-parallel"),
        (passes(fuse_allreduce_rms=True), None, 2, "all-reduce"),
        (passes(fuse_allreduce_rms=True), None, 1, None),
        (passes(fuse_norm_quant=True), None, 1, None),
        (passes(), SimpleNamespace(target_modules=None), 1, "LoRA"),
        (passes(), SimpleNamespace(target_modules=["o_proj", "qkv_proj"]), 1, "LoRA"),
        (passes(), SimpleNamespace(target_modules=["q_proj"]), 1, "LoRA"),
        (passes(), SimpleNamespace(target_modules=["o_proj", "gate_up_proj"]), 1, None),
        (passes(), None, 2, None),
    ],
)
def test_engine_settings_that_must_see_the_norm_decline(ops, use, build_layer, monkeypatch, compilation, lora, tensor_parallel, expected):
    layer = build_layer(layer_class())
    layer.self_attn.qkv_proj.tp_size = tensor_parallel
    config = SimpleNamespace(compilation_config=compilation, lora_config=lora)
    monkeypatch.setattr(ops, "get_current_vllm_config_or_none", lambda: config)
    reason = ops.why_not_fused(layer.input_layernorm, layer.self_attn.qkv_proj)
    assert reason is None if expected is None else expected in reason
    monkeypatch.setattr(ops, "get_current_vllm_config_or_none", lambda: None)
    assert ops.why_not_fused(layer.input_layernorm, layer.self_attn.qkv_proj) is None


def test_batch_invariance_and_foreign_platforms_decline(ops, use, build_layer, monkeypatch):
    layer = build_layer(layer_class())
    pair = layer.input_layernorm, layer.self_attn.qkv_proj
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert "batch-invariant" in ops.why_not_fused(*pair)
    monkeypatch.delenv("VLLM_BATCH_INVARIANT")
    rocm = SimpleNamespace(is_cuda=lambda: False, is_cpu=lambda: False, device_name="rocm")
    monkeypatch.setattr(ops, "current_platform", rocm)
    assert "rocm" in ops.why_not_fused(*pair)
    cuda = SimpleNamespace(is_cuda=lambda: True, is_cpu=lambda: False)
    monkeypatch.setattr(ops, "current_platform", cuda)
    layer.self_attn.qkv_proj.quant_method._gemm_impl = F.linear
    assert "linear backend" in ops.why_not_fused(*pair)


# ---------------------------------------------------------------------------------------------------------- layers
@pytest.mark.parametrize("residual", [False, True])
def test_fused_and_stock_forward_agree(ops, use, build_layer, residual):
    use("1")
    layer = build_layer(layer_class())
    finish_loading(layer)
    calls = ops.mirage_report()["calls"]["norm_qkv.torch"]
    fused = layer(*layer_inputs(residual))
    assert ops.mirage_report()["calls"]["norm_qkv.torch"] == calls + 1
    layer.fused_norm_qkv = None
    stock = layer(*layer_inputs(residual))
    assert ops.mirage_report()["calls"]["norm_qkv.torch"] == calls + 1
    for ours, theirs in zip(fused, stock, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


def test_switched_off_the_layer_is_stock(ops, use, build_layer):
    use("0")
    layer = build_layer(layer_class())
    assert layer.fused_norm_qkv is None
    [entry] = ops.mirage_report()["layers"]
    assert entry == {
        "name": "model.layers.0",
        "op": "norm_qkv",
        "path": "stock",
        "kernel": None,
        "reason": "VLLM_USE_MIRAGE=0",
    }


@pytest.mark.parametrize("compiled", [False, True])
def test_a_replaced_projection_takes_the_stock_path(ops, use, build_layer, compiled):
    """LoRA replaces qkv_proj after the layer was built: a wrapper that is not called would be ignored silently."""
    use("1")
    layer = build_layer(layer_class())
    finish_loading(layer)
    run = torch.compile(layer, backend="eager", fullgraph=True) if compiled else layer
    calls = ops.mirage_report()["calls"]["norm_qkv.torch"]
    before = run(*layer_inputs(True))
    assert ops.mirage_report()["calls"]["norm_qkv.torch"] == calls + 1

    class Wrapper(nn.Module):
        def __init__(self, base_layer):
            super().__init__()
            self.base_layer = base_layer

        def forward(self, x):
            qkv, bias = self.base_layer(x)
            return qkv + 1, bias

    layer.self_attn.qkv_proj = Wrapper(layer.self_attn.qkv_proj)
    calls = ops.mirage_report()["calls"]["norm_qkv.torch"]
    after = run(*layer_inputs(True))
    assert ops.mirage_report()["calls"]["norm_qkv.torch"] == calls
    assert not torch.allclose(before[0], after[0])
    [entry] = ops.mirage_report()["layers"]
    assert (entry["path"], entry["kernel"]) == ("stock", None)
    assert "replaced by Wrapper" in entry["reason"]


def test_a_subclass_with_its_own_forward_takes_the_stock_path(ops, use, build_layer):
    use("1")
    base: Any = layer_class()

    class Eagle(base):
        def forward(self, positions, embeds, hidden_states, residual):
            raise NotImplementedError

    class Plain(base):
        pass

    assert build_layer(Eagle).fused_norm_qkv is None
    assert "Eagle has a forward of its own" in ops.mirage_report()["layers"][0]["reason"]
    assert build_layer(Plain).fused_norm_qkv is not None


def test_strict_refuses_a_layer_without_a_kernel(ops, use, build_layer, monkeypatch):
    use("strict")
    sentence = r"model\.layers\.0 cannot run a Mirage kernel: no kernel for 256→512 bfloat16"
    with pytest.raises(RuntimeError, match=sentence):
        build_layer(layer_class())
    monkeypatch.setattr(ops, "_prepare", lambda *shape: RecordingKernel())
    ops._kernels.clear()
    layer = build_layer(layer_class())
    [entry] = ops.mirage_report()["layers"]
    assert layer.fused_norm_qkv is not None
    assert (entry["path"], entry["kernel"], entry["reason"]) == ("fused", "recording", None)


def test_strict_accepts_an_op_that_was_switched_off(ops, use, build_layer, monkeypatch):
    use("strict")
    monkeypatch.setenv("VLLM_MIRAGE_OPS", "none")
    assert build_layer(layer_class()).fused_norm_qkv is None


# ---------------------------------------------------------------------------------------------------------- models
@pytest.fixture
def build_model(engine_config):
    from vllm.utils.torch_utils import set_default_torch_dtype

    def build():
        qwen3: Any = importlib.import_module("vllm.model_executor.models.qwen3")
        engine_config.compilation_config.static_forward_context.clear()
        with set_default_torch_dtype(torch.bfloat16):
            return qwen3.Qwen3ForCausalLM(vllm_config=engine_config)

    return build


def names(model):
    return {
        "parameters": [name for name, _ in model.named_parameters()],
        "duplicates": [name for name, _ in model.named_parameters(remove_duplicate=False)],
        "state_dict": list(model.state_dict()),
        "modules": [name for name, _ in model.named_modules(remove_duplicate=False)],
    }


def test_the_model_has_exactly_stocks_names(ops, use, build_model, monkeypatch):
    from vllm.model_executor.models import qwen3

    use("1")
    ours = build_model()
    assert all(layer.fused_norm_qkv is not None for layer in ours.model.layers)
    stock_layer = qwen3.Qwen3DecoderLayer.__mro__[1]
    monkeypatch.setattr(qwen3.stock, "Qwen3DecoderLayer", stock_layer)
    monkeypatch.setattr(qwen3.stock.Qwen3Model, "decoder_layer_type", stock_layer, raising=False)
    stock = build_model()
    assert type(stock.model.layers[0]) is stock_layer
    assert names(ours) == names(stock)


def test_one_line_tells_how_many_layers_are_fused(ops, use, build_model, monkeypatch):
    lines = []
    monkeypatch.setattr(ops.logger, "info", lambda message, *values: lines.append(message % values))
    for value, expected in (
        ("0", "Mirage: 0 of 3 layers fused (VLLM_USE_MIRAGE=0)"),
        (
            "1",
            "Mirage: 3 of 3 layers fused (norm_qkv, no kernel for 256→512 bfloat16: the weights are on the cpu, "
            "not on a GPU; PyTorch runs inside the op)",
        ),
    ):
        use(value)
        lines.clear()
        model = build_model()
        assert [line for line in lines if line.startswith("Mirage")] == [expected]
        assert len(ops.mirage_report()["layers"]) == len(model.model.layers) == 3
    json.dumps(ops.mirage_report())


# ---------------------------------------------------------------------------------------------------- installation
def execute_overlay_module():
    """Run qwen3.py of the overlay as a second module beside the imported one."""
    from vllm.model_executor.models import qwen3

    spec: Any = importlib.util.spec_from_file_location("vllm.model_executor.models.qwen3", qwen3.__file__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.parametrize("found", [None, types.ModuleType("qwen3_stock")], ids=["missing", "not-vllms"])
def test_without_vllms_own_file_the_import_says_what_to_run(ops, monkeypatch, found):
    from vllm.model_executor import models
    from vllm.model_executor.models import qwen3  # noqa: F401  so that qwen3_stock is there to be replaced

    monkeypatch.setitem(sys.modules, "vllm.model_executor.models.qwen3_stock", found)
    monkeypatch.setattr(models, "qwen3_stock", found)
    with pytest.raises(ImportError, match=r"expected beside the Mirage overlay.*run \./install\.sh"):
        execute_overlay_module()
