# SPDX-License-Identifier: Apache-2.0
"""The ops, the switch, the eligibility and the decoder layer of the overlay, without an engine."""

import copy
import importlib
import importlib.util
import json
import os
import sys
import types
from types import SimpleNamespace
from typing import Any, NamedTuple

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
    """use("1"): set the switch for this test; plans, kernels and calls of the test are forgotten afterwards."""
    monkeypatch.delenv("VLLM_MIRAGE_OPS", raising=False)
    monkeypatch.setattr(ops, "_plans", {})
    monkeypatch.setattr(ops.mirage_ops, "kernels", {})
    monkeypatch.setattr(ops.mirage_ops, "calls", dict.fromkeys(ops.mirage_ops.calls, 0))
    return lambda value: monkeypatch.setenv("VLLM_USE_MIRAGE", value)


class KeepQuery(nn.Module):
    """In place of the attention, which needs an engine's KV cache."""

    def forward(self, q, k, v):
        return q


@pytest.fixture
def build_layer(engine_config):
    """build_layer(cls): a decoder layer with random weights; without `attention`, which needs a KV cache, q is attention's output."""
    from vllm.utils.torch_utils import set_default_torch_dtype

    def build(cls, name="model.layers.0", attention=False, dtype=torch.bfloat16):
        engine_config.compilation_config.static_forward_context.clear()
        torch.manual_seed(0)
        hf_config = engine_config.model_config.hf_config
        with set_default_torch_dtype(dtype):
            layer = cls(hf_config, cache_config=engine_config.cache_config, prefix=name)
        layer.self_attn.rotary_emb = copy.deepcopy(layer.self_attn.rotary_emb)  # vLLM shares one among all layers
        if not attention:
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


def layer_inputs(residual, dtype=torch.bfloat16):
    """positions, hidden_states, residual or None."""
    generator = torch.Generator().manual_seed(1)
    x, r = torch.randn(2, 5, HIDDEN, generator=generator).to(dtype)
    return torch.arange(5), x, r if residual else None


def calls_of(ops, body="torch"):
    """How often that body of each op ran, where it did."""
    return {name.removesuffix(f".{body}"): n for name, n in ops.mirage_report()["calls"].items() if n and name.endswith(f".{body}")}


# ------------------------------------------------------------------------------------------------------------- ops
class Op(NamedTuple):
    """A torch op around a GEMM."""

    kernel: str  # its name in mirage_kernels
    counter: str
    norm: bool = True
    residual: bool = True
    gated: bool = False
    adds: bool = False  # a residual to its output

    def arguments(self, x, residual, gamma, weight):
        """What the op takes of those."""
        if self.adds:
            return x, weight, as_wide(residual, weight), self.counter
        inputs = [x, *([residual] if self.residual else []), *([gamma] if self.norm else []), weight]
        return *inputs, EPS if self.norm else self.counter


def as_wide(residual, weight):
    """residual [..., k], repeated to [..., n] of weight [n, k]."""
    n, k = weight.shape
    return residual.repeat(*[1] * (residual.dim() - 1), n // k + 1)[..., :n].clone(memory_format=torch.contiguous_format)


GEMMS = {
    "norm_qkv": Op("rms_norm_linear", "norm_qkv", residual=False),
    "add_norm_qkv": Op("rms_norm_linear", "norm_qkv"),
    "add_norm_gate_up_silu": Op("rms_norm_gate_up_silu", "norm_gate_up", gated=True),
    "norm_gate_up_silu": Op("rms_norm_gate_up_silu", "norm_gate_up", residual=False, gated=True),
    "linear": Op("linear", "down_proj", norm=False, residual=False),
    "linear_residual": Op("linear_residual", "o_proj", norm=False, residual=False, adds=True),
}
each_gemm = pytest.mark.parametrize("name", GEMMS)


def call(name, x, residual, gamma, weight):
    """The op's outputs as a tuple: the GEMM's, and x + residual where the op gives it."""
    outputs = getattr(torch.ops.vllm_mirage, name)(*GEMMS[name].arguments(x, residual, gamma, weight))
    return outputs if isinstance(outputs, tuple | list) else (outputs,)


def inputs(tokens, k, n, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, residual = torch.randn(2, tokens, k, generator=generator).to(dtype)
    gamma = (1 + 0.25 * torch.randn(k, generator=generator)).to(dtype)
    weight = (torch.randn(n, k, generator=generator) * k**-0.5).to(dtype)
    return x, residual, gamma, weight


def silu_and_mul(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def in_float64(name, x, residual, gamma, weight):
    """(the op's output, x + residual)"""
    op, total = GEMMS[name], x.double()
    if op.residual:
        total = total + residual.double()
    normed = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + EPS) * gamma.double() if op.norm else total
    out = F.linear(normed, weight.double())
    if op.adds:
        out = out + as_wide(residual, weight).double()
    return silu_and_mul(out) if op.gated else out, total


def unfused(name, x, residual, gamma, weight):
    """The same by vLLM's own norms, one operator after the other."""
    from vllm.ir.ops.layernorm import fused_add_rms_norm, rms_norm

    op, total = GEMMS[name], x
    if op.residual:
        x, total = fused_add_rms_norm.impls["native"].impl_fn(x, residual, gamma, EPS)
    elif op.norm:
        x = rms_norm.impls["native"].impl_fn(x, gamma, EPS)
    out = F.linear(x, weight)
    if op.adds:
        out = out + as_wide(residual, weight)
    return silu_and_mul(out) if op.gated else out, total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [0, 1, 5])
@each_gemm
def test_ops_keep_torchs_contract(ops, name, tokens, dtype):
    torch.library.opcheck(getattr(torch.ops.vllm_mirage, name), GEMMS[name].arguments(*inputs(tokens, 64, 96, dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "k", "n"), [(1, 256, 512), (7, 1000, 96), (64, 1024, 640)])
@each_gemm
def test_ops_err_no_more_than_the_unfused_path(ops, name, tokens, k, n, dtype):
    given = inputs(tokens, k, n, dtype)
    exact, exact_residual = in_float64(name, *given)
    out, *residual_out = call(name, *given)
    theirs, their_residual = unfused(name, *given)
    error = (out.double() - exact).abs().max()
    assert 0 < error <= 1.01 * (theirs.double() - exact).abs().max()
    assert len(residual_out) == GEMMS[name].residual
    for total in residual_out:
        assert torch.equal(total, their_residual)
        assert (total.double() - exact_residual).abs().max() <= torch.finfo(dtype).eps * exact_residual.abs().max()


@each_gemm
def test_ops_leave_their_inputs_alone(ops, name):
    given = inputs(3, 64, 96, torch.float32)
    before = [tensor.clone() for tensor in given]
    outputs = call(name, *given)
    assert all(map(torch.equal, given, before))
    storages = {tensor.untyped_storage().data_ptr() for tensor in (*given, *outputs)}
    assert len(storages) == 3 + len(outputs)  # x and residual of `inputs` share one


@each_gemm
def test_a_nan_row_stays_in_its_row(ops, name):
    given = inputs(4, 64, 96, torch.bfloat16)
    given[0][2, 5] = float("nan")
    out, *residual_out = call(name, *given)
    assert out[2].isnan().all() and not out[[0, 1, 3]].isnan().any()
    assert all(total.isnan().nonzero().tolist() == [[2, 5]] for total in residual_out)


@pytest.mark.parametrize("lead", [(0,), (3,), (2, 3)])
@each_gemm
def test_fakes_have_the_shapes_of_the_results(ops, name, lead):
    x, residual, gamma, weight = inputs(6, 64, 96, torch.bfloat16)
    x, residual = (tensor[: lead[0]] if len(lead) == 1 else tensor.view(*lead, 64) for tensor in (x, residual))
    real = call(name, x, residual, gamma, weight)
    with FakeTensorMode() as mode:
        fake = call(name, *map(mode.from_tensor, (x, residual, gamma, weight)))
    described = [[(t.shape, t.stride(), t.dtype) for t in outputs] for outputs in (real, fake)]
    assert described[0] == described[1]


# --------------------------------------------------------------------------------------------------------- kernels
class RecordingKernel:
    """A GEMM kernel as mirage_kernels.prepare returns it; computes nothing."""

    name, max_tokens = "recording", 4

    def __init__(self, n=96):
        self.n = n

    def __call__(self, x, *others):
        out = x.new_full((x.shape[0], self.n), 7.0)
        if len(others) <= 2:  # a projection: its weight, and perhaps the residual
            return out
        return out, None if others[0] is None else others[0].clone()


@each_gemm
def test_the_kernel_takes_small_batches_and_torch_the_rest(ops, use, name):
    op = GEMMS[name]
    x, _, gamma, weight = inputs(8, 64, 96, torch.bfloat16)
    n = 96 // (1 + op.gated)
    ops.mirage_ops.kernels[op.kernel, 64, n, torch.bfloat16, x.device] = RecordingKernel(n)
    wide = torch.zeros(4, 128, dtype=torch.bfloat16)
    unaligned = torch.zeros(4 * 64 + 1, dtype=torch.bfloat16)[1:].view(4, 64)

    def took_kernel(x, residual=None, weight=weight):
        ops.mirage_ops.calls.update(dict.fromkeys(ops.mirage_ops.calls, 0))
        out = call(name, x, torch.zeros_like(x) if residual is None else residual, gamma, weight)[0]
        [(body, count)] = [(body, n) for body in ("kernel", "torch") for n in calls_of(ops, body).items()]
        assert count == (op.counter, 1)
        assert bool((out == 7).all()) == (body == "kernel") or not out.numel()
        return body == "kernel"

    assert took_kernel(x[:1]) and took_kernel(x[:4])
    assert not took_kernel(x[:5])
    assert not took_kernel(x[:0])
    assert not took_kernel(wide[:, :64])
    assert not took_kernel(unaligned)
    assert not took_kernel(x[:4].view(2, 2, 64))
    assert not took_kernel(x[:4], weight=weight.repeat(1, 2)[:, :64])
    assert took_kernel(x[:4], unaligned) != op.residual


def test_a_kernel_of_another_op_or_dtype_is_not_taken(ops, use):
    x, _, _, weight = inputs(2, 64, 96, torch.bfloat16)
    for op, dtype in (("rms_norm_linear", torch.bfloat16), ("linear", torch.float16), ("linear_residual", torch.bfloat16)):
        ops.mirage_ops.kernels[op, 64, 96, dtype, x.device] = RecordingKernel()
    ops.mirage_ops.kernels["linear", 64, 96, torch.bfloat16, x.device] = "a reason"
    assert not (torch.ops.vllm_mirage.linear(x, weight, "o_proj") == 7).any()


def test_without_a_kernel_the_reason_is_kept(ops, use, monkeypatch):
    prepare_gemm, prepare_attention = ops.mirage_ops.prepare_gemm, ops.mirage_ops.prepare_attention
    assert "not on a GPU" in prepare_gemm("linear", 64, 96, torch.bfloat16, torch.device("cpu"))
    assert "not on a GPU" in prepare_attention(4, 2, torch.bfloat16, torch.device("cpu"))
    from vllm.model_executor import layers

    monkeypatch.delattr(layers, "mirage_kernels", raising=False)
    monkeypatch.setitem(sys.modules, "vllm.model_executor.layers.mirage_kernels", None)
    assert "cannot be imported" in prepare_gemm("linear", 64, 96, torch.bfloat16, torch.device("cuda", 0))

    asked = []

    def prepare(*op, **shape):
        asked.append((op, shape))
        return RecordingKernel()

    stub: Any = types.ModuleType("mirage_kernels")
    stub.prepare = stub.prepare_attention = prepare
    monkeypatch.setitem(sys.modules, "vllm.model_executor.layers.mirage_kernels", stub)
    monkeypatch.setattr(layers, "mirage_kernels", stub, raising=False)
    place = {"dtype": torch.bfloat16, "device": torch.device("cuda", 0)}
    for _ in range(2):  # the second time nothing is asked
        prepare_gemm("rms_norm_linear", k=64, n=128, **place)
        prepare_attention(4, 2, **place, max_context=512)
    attention = {"heads": 4, "kv_heads": 2, **place}
    gemm = {"k": 64, "n": 128, **place, "alone": False}
    assert asked == [(("rms_norm_linear",), gemm), ((), {**attention, "max_context": 512})]
    for longest in (1024, 1024, 512):  # an engine for longer contexts, and its draft model for shorter ones
        prepare_attention(4, 2, **place, max_context=longest)
    assert asked[2:] == [((), {**attention, "max_context": 1024})]
    described = ops.mirage_report()["kernels"]
    assert [(entry["op"], entry["shape"], entry["kernel"]) for entry in described] == [
        ("linear", "64x96", None),
        ("decode_attention", "4x2", None),
        ("linear", "64x96", None),
        ("rms_norm_linear", "64x128", "recording"),
        ("decode_attention", "4x2", "recording"),
    ]
    json.dumps(described)


# ------------------------------------------------------------------------------------------------------- attention
HEADS, KV_HEADS, HEAD_DIM, TOKENS, NAME = 4, 2, 128, 3, "model.layers.0.self_attn.attn"


class StubAttention:
    """vLLM's attention layer and its implementation in one: keeps what it is given, and answers with 5."""

    scale = 0.5

    def __init__(self):
        self.impl, self.kv_cache = self, torch.zeros(9, KV_HEADS, 16, 2 * HEAD_DIM, dtype=torch.bfloat16)
        self.updates, self.queries = [], []

    def do_kv_cache_update(self, layer, key, value, kv_cache, slots):
        self.updates.append((key, value, kv_cache, slots))

    def forward(self, layer, query, key, value, kv_cache, metadata, output, **scales):
        self.queries.append((query, key, value, kv_cache, metadata))
        output.fill_(5)


class StubKernel:
    """A decode-attention kernel that keeps what it is given, and answers with 7."""

    name, max_tokens = "recording", 4

    def __init__(self):
        self.given = []

    def __call__(self, *arguments):
        self.given.append(arguments)
        arguments[-1].fill_(7)


@pytest.fixture
def step(ops, use):
    """A decode step of three requests with an attention kernel, its forward context set; what it holds may be changed."""
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import override_forward_context

    torch.manual_seed(0)
    layer, kernel = StubAttention(), StubKernel()
    metadata = SimpleNamespace(
        max_query_len=1,
        seq_lens=torch.full((TOKENS,), 20, dtype=torch.int32),
        block_table=torch.zeros(TOKENS, 2, dtype=torch.int32),
        use_cascade=False,
        causal=True,
    )
    context = SimpleNamespace(
        no_compile_layers={NAME: layer},
        attn_metadata={NAME: metadata},
        slot_mapping={NAME: torch.arange(TOKENS)},
        cudagraph_runtime_mode=CUDAGraphMode.NONE,
        virtual_engine=0,
    )
    ops.mirage_ops.kernels["decode_attention", HEADS, KV_HEADS, torch.bfloat16, torch.device("cpu")] = kernel
    qkv = torch.randn(TOKENS, (HEADS + 2 * KV_HEADS) * HEAD_DIM).bfloat16()
    weights = [(1 + 0.2 * torch.randn(HEAD_DIM)).bfloat16() for _ in range(2)]
    angle = torch.arange(32)[:, None] * 100.0 ** (-torch.arange(HEAD_DIM // 2) / 64)
    angles = torch.cat([angle.cos(), angle.sin()], -1).bfloat16()
    norm_and_rotation = (torch.tensor([19, 0, 7]), *weights, angles)
    with override_forward_context(context):
        yield SimpleNamespace(layer=layer, kernel=kernel, metadata=metadata, context=context, qkv=qkv, norm_and_rotation=norm_and_rotation)


def run_attention(step):
    """(q and k as the first op returns them, attention's output)"""
    tail = (EPS, HEADS, KV_HEADS, NAME)
    qk = torch.ops.vllm_mirage.qk_norm_rope(step.qkv, *step.norm_and_rotation, *tail)
    written = torch.ops.vllm_mirage.write_cache(step.qkv, qk[1], *tail[1:])
    output = torch.zeros(step.qkv.shape[0], HEADS * HEAD_DIM, dtype=torch.bfloat16)
    torch.ops.vllm_mirage.decode_attention(step.qkv, *qk, written, *step.norm_and_rotation, output, *tail)
    return qk, output


def test_the_attention_kernel_does_the_whole_step(ops, step):
    (q, k), output = run_attention(step)
    assert q.shape == (TOKENS, HEADS * HEAD_DIM) and k.shape == (TOKENS, KV_HEADS * HEAD_DIM) and (output == 7).all()
    [given] = step.kernel.given
    expected = (step.qkv, *step.norm_and_rotation, step.layer.kv_cache, step.context.slot_mapping[NAME])
    expected += (step.metadata.block_table, step.metadata.seq_lens, EPS, step.layer.scale, output)
    assert all(a is b or a == b if isinstance(a, float) else a.data_ptr() == b.data_ptr() for a, b in zip(given, expected, strict=True))
    assert not step.layer.updates and not step.layer.queries
    assert calls_of(ops, "kernel") == {"attention": 1} and calls_of(ops) == {}


def test_without_the_kernel_vllms_attention_gets_normalised_and_rotated_heads(ops, step):
    step.metadata.max_query_len = 2
    qk, output = run_attention(step)
    native = ops.mirage_ops.qk_norm_rope_native(step.qkv, *step.norm_and_rotation, EPS, HEADS, KV_HEADS)
    assert all(torch.equal(ours, expected) for ours, expected in zip(qk, native, strict=True))
    q, k = (part.view(TOKENS, -1, HEAD_DIM) for part in qk)
    v = step.qkv.view(TOKENS, -1, HEAD_DIM)[:, -KV_HEADS:]
    [(key, value, _, slots)], [(query, key_again, value_again, _, metadata)] = step.layer.updates, step.layer.queries
    assert torch.equal(query, q) and torch.equal(key, k) and torch.equal(value, v)
    assert torch.equal(key_again, k) and torch.equal(value_again, v)
    assert slots is step.context.slot_mapping[NAME] and metadata is step.metadata
    assert (output == 5).all() and not step.kernel.given
    assert calls_of(ops) == {"attention": 1} and calls_of(ops, "kernel") == {}


def _mode(name):
    def change(step):
        step.context.cudagraph_runtime_mode = type(step.context.cudagraph_runtime_mode)[name]

    return change


def _metadata(**values):
    return lambda step: step.metadata.__dict__.update(values)


def _cache(*shape, strided=False):
    def change(step):
        step.layer.kv_cache = torch.zeros(*shape, dtype=torch.bfloat16)[..., :: 2 if strided else 1]

    return change


@pytest.mark.parametrize(
    ("change", "takes"),
    [
        (lambda step: None, True),
        (_mode("FULL"), True),
        (_mode("PIECEWISE"), False),
        (_metadata(max_query_len=2), False),
        (_metadata(use_cascade=True), False),
        (_metadata(causal=False), False),
        (_metadata(seq_lens=torch.ones(TOKENS - 1, dtype=torch.int32)), False),
        (_metadata(seq_lens=torch.ones(TOKENS + 1, dtype=torch.int32)), True),  # graphs see longer ones than the batch
        (_metadata(seq_lens=torch.ones(TOKENS, dtype=torch.int64)), False),
        (_metadata(block_table=torch.ones(TOKENS - 1, 2, dtype=torch.int32)), False),
        (_metadata(block_table=torch.ones(TOKENS, 2, dtype=torch.int64)), False),
        (lambda step: step.context.slot_mapping.update({NAME: torch.arange(TOKENS - 1)}), False),
        (lambda step: step.context.slot_mapping.update({NAME: torch.arange(TOKENS).int()}), False),
        (lambda step: step.context.slot_mapping.clear(), False),  # a profiling run
        (lambda step: setattr(step.context, "attn_metadata", None), False),
        (_cache(9, KV_HEADS, 32, 2 * HEAD_DIM), True),
        (_cache(9, KV_HEADS, 24, 2 * HEAD_DIM), False),
        (_cache(9, KV_HEADS, 16, HEAD_DIM), False),
        (_cache(9, KV_HEADS, 16, 4 * HEAD_DIM, strided=True), False),
        (_cache(2, 9, 16, KV_HEADS, HEAD_DIM), False),  # vLLM's older layout: keys and values apart
        (lambda step: setattr(step, "qkv", step.qkv.repeat(2, 1)), False),  # more tokens than the kernel takes
        (lambda step: setattr(step, "qkv", step.qkv[:0]), False),
        (lambda step: setattr(step, "qkv", step.qkv.half()), False),  # no kernel for this dtype
    ],
)
def test_which_steps_the_attention_kernel_takes(ops, step, change, takes):
    change(step)
    assert ops.mirage_ops._decode_kernel(step.qkv, HEADS, KV_HEADS, NAME) is (step.kernel if takes else None)


def test_attention_fakes_have_the_shapes_of_the_results(ops, step):
    tail = (EPS, HEADS, KV_HEADS, NAME)
    with FakeTensorMode() as mode:
        given = list(map(mode.from_tensor, (step.qkv, *step.norm_and_rotation)))
        fake = torch.ops.vllm_mirage.qk_norm_rope(*given, *tail)
        written = torch.ops.vllm_mirage.write_cache(given[0], fake[1], *tail[1:])
        output = torch.empty(TOKENS, HEADS * HEAD_DIM)
        torch.ops.vllm_mirage.decode_attention(given[0], *fake, written, *given[1:], output, *tail)
    for takes in (1, 2):
        step.metadata.max_query_len = takes
        for promised, real in zip(fake, run_attention(step)[0], strict=True):
            assert (promised.shape, promised.stride(), promised.dtype) == (real.shape, real.stride(), real.dtype)


@pytest.mark.parametrize("takes", [True, False])
def test_attention_ops_keep_torchs_contract(ops, step, takes):
    step.metadata.max_query_len = 1 if takes else 2
    tail = (EPS, HEADS, KV_HEADS, NAME)
    checks = ("test_schema", "test_faketensor")
    qk = torch.ops.vllm_mirage.qk_norm_rope(step.qkv, *step.norm_and_rotation, *tail)
    output = torch.zeros(TOKENS, HEADS * HEAD_DIM, dtype=torch.bfloat16)
    attention = (step.qkv, *qk, step.qkv.new_empty(0), *step.norm_and_rotation, output, *tail)
    torch.library.opcheck(torch.ops.vllm_mirage.decode_attention, attention, test_utils=checks)
    torch.library.opcheck(torch.ops.vllm_mirage.qk_norm_rope, (step.qkv, *step.norm_and_rotation, *tail), test_utils=checks[1:])
    torch.library.opcheck(torch.ops.vllm_mirage.write_cache, (step.qkv, qk[1], *tail[1:]), test_utils=checks)


def test_the_bodies_for_large_batches_give_what_the_ops_give(ops, step):
    step.metadata.max_query_len = 2  # no attention kernel
    compiled, mirage = ops.mirage_compile, torch.ops.vllm_mirage
    x, residual, gamma, weight = inputs(5, 64, 96, torch.bfloat16)
    qk_arguments = (step.qkv, *step.norm_and_rotation, EPS, HEADS, KV_HEADS, NAME)
    cases = {
        mirage.norm_qkv.default: (x, gamma, weight, EPS),
        mirage.add_norm_qkv.default: (x, residual, gamma, weight, EPS),
        mirage.add_norm_gate_up_silu.default: (x, residual, gamma, weight, EPS),
        mirage.norm_gate_up_silu.default: (x, gamma, weight, EPS),
        mirage.linear.default: (x, weight, "o_proj"),
        mirage.linear_residual.default: (x, weight, as_wide(residual, weight), "o_proj"),
        mirage.qk_norm_rope.default: qk_arguments,
    }
    assert set(cases) == set(compiled.BODIES)
    for op, arguments in cases.items():
        torch.testing.assert_close(compiled.BODIES[op](*arguments), op(*arguments), rtol=0, atol=0)


@pytest.mark.parametrize(("start", "replaced"), [(1, False), (65, True), (65, "untraceable")])
def test_ops_are_replaced_in_graphs_for_more_tokens_than_kernels_take(ops, start, replaced, monkeypatch):
    from torch.fx.experimental.proxy_tensor import make_fx

    if replaced == "untraceable":
        monkeypatch.setitem(ops.mirage_compile.BODIES, torch.ops.vllm_mirage.linear.default, lambda x, weight, name: bool(x.sum()))
    def layer(x, residual, gamma, weight):
        qkv, residual = torch.ops.vllm_mirage.add_norm_qkv(x, residual, gamma, weight, EPS)
        return torch.ops.vllm_mirage.linear(qkv, weight.t().contiguous(), "o_proj"), residual

    arguments = inputs(70, 64, 96, torch.float32)
    module = make_fx(layer, tracing_mode="fake")(*arguments)
    change = ops.mirage_compile.LargeBatches(64)
    assert change.is_applicable_for_range(SimpleNamespace(start=start, end=4096)) == bool(replaced)
    if replaced:
        with torch._inductor.virtualized.V.set_fake_mode(next(iter(module.graph.nodes)).meta["val"].fake_mode):
            change(module.graph)
        module.recompile()
    left = [str(node.target) for node in module.graph.nodes if "vllm_mirage" in str(node.target)]
    kept = {False: ["vllm_mirage.add_norm_qkv.default", "vllm_mirage.linear.default"], "untraceable": ["vllm_mirage.linear.default"]}
    assert left == kept.get(replaced, [])
    for ours, expected in zip(module(*arguments), layer(*arguments), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(("start", "left"), [(1, ["linear_residual", "qk_norm_rope"]), (33, ["qk_norm_rope"]), (65, [])])
def test_between_the_gemms_kernels_and_attentions_only_the_gemms_are_replaced(ops, step, start, left):
    from torch.fx.experimental.proxy_tensor import make_fx
    from vllm.compilation.passes.inductor_pass import pass_context

    def layer(qkv, weight, residual):
        out = torch.ops.vllm_mirage.linear_residual(qkv, weight, residual, "o_proj")
        q, _ = torch.ops.vllm_mirage.qk_norm_rope(qkv, *step.norm_and_rotation, EPS, HEADS, KV_HEADS, NAME)
        return out, q

    arguments = step.qkv, torch.randn(32, step.qkv.shape[1]).bfloat16(), torch.randn(TOKENS, 32).bfloat16()
    step.metadata.max_query_len = 2  # no attention kernel
    module = make_fx(layer, tracing_mode="fake", _allow_non_fake_inputs=True)(*arguments)
    change, tokens = ops.mirage_compile.LargeBatches(64, 32), SimpleNamespace(start=start)
    assert change.is_applicable_for_range(tokens) == (start > 32)
    if start > 32:
        fake_mode = next(iter(module.graph.nodes)).meta["val"].fake_mode
        with torch._inductor.virtualized.V.set_fake_mode(fake_mode), pass_context(tokens):
            change(module.graph)
        module.recompile()
    targets = [str(node.target).split(".") for node in module.graph.nodes if "vllm_mirage" in str(node.target)]
    assert [name for _, name, _ in targets] == left


def test_a_compile_range_ends_where_kernels_do_and_a_users_pass_is_kept(ops, engine_config, monkeypatch):
    from vllm.config import CompilationMode

    compilation = engine_config.compilation_config
    monkeypatch.setattr(compilation, "compile_ranges_endpoints", [2048])
    monkeypatch.setattr(compilation, "inductor_compile_config", {})
    ops.mirage_compile.settle(attention=False)
    assert compilation.compile_ranges_endpoints == [2048]  # eager
    monkeypatch.setattr(compilation, "mode", CompilationMode.VLLM_COMPILE)
    for _ in range(2):
        ops.mirage_compile.settle(attention=False)
    assert compilation.compile_ranges_endpoints == [64, 2048]
    [added] = compilation.inductor_compile_config.values()
    assert type(added) is ops.mirage_compile.LargeBatches and len(added.uuid()) == 64
    monkeypatch.setattr(compilation, "compile_ranges_endpoints", [2048])
    monkeypatch.setattr(compilation, "inductor_compile_config", {"post_grad_custom_post_pass": "the user's"})
    ops.mirage_compile.settle(attention=False)
    assert compilation.compile_ranges_endpoints == [2048]


def test_a_step_without_tokens_has_heads_of_no_rows(ops, step):
    positions, *others = step.norm_and_rotation
    q, k = ops.mirage_ops.qk_norm_rope_native(step.qkv[:0], positions[:0], *others, EPS, HEADS, KV_HEADS)
    assert q.shape == (0, HEADS * HEAD_DIM) and k.shape == (0, KV_HEADS * HEAD_DIM)


@pytest.mark.parametrize(
    ("before", "limits", "ends", "pass_limits"),
    [
        ([2048], [32], [32, 64, 2048], (64, 32)),
        ([2048], [32, 16, None], [16, 32, 64, 2048], (64, 16)),  # the lowest counts
        ([2048], [None, 64], [64, 2048], (64, 64)),
        ([50], [32], [32, 50], (64, 32)),  # an engine for few tokens
        ([24], [32], [24], None),
    ],
)
def test_a_range_more_ends_where_projections_that_add_have_kernels(ops, engine_config, monkeypatch, before, limits, ends, pass_limits):
    from vllm.config import CompilationMode

    compilation = engine_config.compilation_config
    for name, value in {
        "mode": CompilationMode.VLLM_COMPILE,
        "compile_ranges_endpoints": before,
        "inductor_compile_config": {},
    }.items():
        monkeypatch.setattr(compilation, name, value)
    for limit in (None, *limits):  # the other ops of the layer come first
        ops.mirage_compile.settle(attention=False, gemms=limit)
    assert compilation.compile_ranges_endpoints == ends
    found = [(change.last, change.gemms) for change in compilation.inductor_compile_config.values()]
    assert found == ([] if pass_limits is None else [pass_limits])
    for change in compilation.inductor_compile_config.values():
        assert (change.uuid() == ops.mirage_compile.LargeBatches(64).uuid()) == (pass_limits == (64, 64))


@pytest.mark.parametrize(("largest_graph", "ends"), [(512, [64, 2048]), (8, [8, 2048]), (0, [2048]), (None, [2048])])
def test_on_a_gpu_the_ops_stay_only_in_batches_that_a_cuda_graph_holds(ops, engine_config, monkeypatch, largest_graph, ends):
    from vllm.config import CompilationMode

    compilation = engine_config.compilation_config
    monkeypatch.setattr(ops.mirage_compile, "current_platform", SimpleNamespace(is_cpu=lambda: False, pass_key="pass"))
    for name, value in {
        "mode": CompilationMode.VLLM_COMPILE,
        "compile_ranges_endpoints": [2048],
        "inductor_compile_config": {},
        "max_cudagraph_capture_size": largest_graph,
    }.items():
        monkeypatch.setattr(compilation, name, value)
    ops.mirage_compile.settle(attention=False)
    assert compilation.compile_ranges_endpoints == ends
    change = compilation.inductor_compile_config["pass"]
    last = ends[0] if len(ends) == 2 else 0
    assert [change.is_applicable_for_range(SimpleNamespace(start=start)) for start in (last, last + 1)] == [False, True]
    assert change.uuid() != ops.mirage_compile.LargeBatches(last + 1).uuid()


def test_heads_are_normalised_and_rotated_as_vllm_does_it(ops, use, build_layer):
    a = build_layer(layer_class()).self_attn
    tokens, heads = 7, a.num_heads + a.num_kv_heads
    qkv = (3 * torch.randn(tokens, a.q_size + 2 * a.kv_size)).bfloat16()
    positions = torch.tensor([0, 1, 2, 5, 60, 200, 200])
    weights, angles, eps = (a.q_norm.weight, a.k_norm.weight), a.rotary_emb.cos_sin_cache, a.q_norm.variance_epsilon
    ours = ops.mirage_ops.qk_norm_rope_native(qkv, positions, *weights, angles, eps, a.num_heads, a.num_kv_heads)

    x = qkv.view(tokens, -1, a.head_dim)[:, :heads]
    q, k = (norm(part) for norm, part in zip((a.q_norm, a.k_norm), x.split([a.num_heads, a.num_kv_heads], 1), strict=True))
    q, k = a.rotary_emb.forward_native(positions, q.reshape(tokens, -1), k.reshape(tokens, -1))
    assert torch.equal(ours[0], q) and torch.equal(ours[1], k)  # the same rounding, too


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
    assert ops.enabled_ops() == set(ops.OPS) == set(ops.mirage_ops.OPS)
    for value, expected in (("all", set(ops.OPS)), (" norm_qkv , o_proj", {"norm_qkv", "o_proj"}), ("none", set())):
        monkeypatch.setenv("VLLM_MIRAGE_OPS", value)
        assert ops.enabled_ops() == expected
    for value in ("norm_kqv", "all,none", ""):
        monkeypatch.setenv("VLLM_MIRAGE_OPS", value)
        with pytest.raises(ValueError, match="comma list of norm_qkv, attention, o_proj, norm_gate_up, down_proj was expected"):
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


def subclass(module, name):
    """Make `module` an object of a subclass of its class."""
    module.__class__ = type(name, (type(module),), {})


def with_config(monkeypatch, ops, **values):
    """Let the eligibility checks see this configuration of the engine."""
    config = SimpleNamespace(**{"compilation_config": passes(), "lora_config": None, "kv_transfer_config": None, **values})
    monkeypatch.setattr(ops, "get_current_vllm_config_or_none", lambda: config)


def test_every_op_of_qwen3s_layer_is_eligible(ops, use, build_layer):
    layer = build_layer(layer_class(), attention=True)
    assert {op: ops._why_not_op(op, layer) for op in ops.OPS} == dict.fromkeys(ops.OPS)


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
    ("compilation", "tensor_parallel", "expected"),
    [
        (passes(enable_sp=True), 2, "sequence-parallel"),
        (passes(fuse_allreduce_rms=True), 2, "all-reduce"),
        (passes(fuse_allreduce_rms=True), 1, None),
        (passes(fuse_norm_quant=True), 1, None),
        (passes(), 2, None),
    ],
)
def test_engine_settings_that_must_see_the_norm_decline(ops, use, build_layer, monkeypatch, compilation, tensor_parallel, expected):
    layer = build_layer(layer_class())
    layer.self_attn.qkv_proj.tp_size = layer.mlp.gate_up_proj.tp_size = tensor_parallel
    with_config(monkeypatch, ops, compilation_config=compilation)
    for op in ("norm_qkv", "norm_gate_up"):
        reason = ops._why_not_op(op, layer)
        assert reason is None if expected is None else expected in reason
    monkeypatch.setattr(ops, "get_current_vllm_config_or_none", lambda: None)
    assert ops._why_not_op("norm_qkv", layer) is None


@pytest.mark.parametrize(
    ("targets", "declined"),
    [
        (None, {"norm_qkv", "o_proj", "norm_gate_up", "down_proj"}),
        (["qkv_proj"], {"norm_qkv"}),
        (["q_proj"], {"norm_qkv"}),
        (["self_attn.v_proj"], {"norm_qkv"}),
        (["o_proj"], {"o_proj"}),
        (["gate_up_proj"], {"norm_gate_up"}),
        (["gate_proj", "down_proj"], {"norm_gate_up", "down_proj"}),
        (["embed_tokens"], set()),
    ],
)
def test_lora_declines_the_projections_that_it_will_wrap(ops, use, build_layer, monkeypatch, targets, declined):
    layer = build_layer(layer_class())
    with_config(monkeypatch, ops, lora_config=SimpleNamespace(target_modules=targets))
    reasons = {op: ops._why_not_op(op, layer) for op in ops.OPS if op != "attention"}
    assert {op for op, reason in reasons.items() if reason} == declined
    assert all("LoRA is enabled and will wrap" in reasons[op] for op in declined)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda proj: subclass(proj, "RowWithLoRA"), "RowWithLoRA"),
        (lambda proj: setattr(proj, "quant_method", type("Fp8LinearMethod", (), {})()), "Fp8LinearMethod"),
        (lambda proj: setattr(proj, "bias", nn.Parameter(torch.zeros(HIDDEN))), "bias"),
        (lambda proj: setattr(proj, "input_is_parallel", False), "splits its input"),
        (lambda proj: setattr(proj, "reduce_results", False), "unreduced"),
        (lambda proj: setattr(proj, "weight", nn.Parameter(proj.weight.double())), "float64"),
    ],
)
def test_an_ineligible_projection_has_a_reason(ops, use, build_layer, change, expected):
    layer = build_layer(layer_class())
    for op, proj in (("o_proj", layer.self_attn.o_proj), ("down_proj", layer.mlp.down_proj)):
        change(proj)
        assert expected in ops._why_not_op(op, layer)


@pytest.mark.parametrize(("tensor_parallel", "expected"), [(1, None), (2, "GEMM + communication")])
def test_the_fusion_of_gemms_and_communication_must_see_a_sharded_projection(ops, use, build_layer, monkeypatch, tensor_parallel, expected):
    layer = build_layer(layer_class())
    layer.mlp.down_proj.tp_size = tensor_parallel
    with_config(monkeypatch, ops, compilation_config=passes(fuse_gemm_comms=True))
    reason = ops.why_not_linear(layer.mlp.down_proj)
    assert reason is None if expected is None else expected in reason


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda layer: subclass(layer.mlp.act_fn, "GeluAndMul"), "the activation is GeluAndMul"),
        (lambda layer: subclass(layer.mlp.gate_up_proj, "MergedWithLoRA"), "MergedWithLoRA"),
        (lambda layer: setattr(layer.post_attention_layernorm, "has_weight", False), "no weight"),
    ],
)
def test_an_ineligible_mlp_has_a_reason(ops, use, build_layer, change, expected):
    layer = build_layer(layer_class())
    change(layer)
    assert expected in ops._why_not_op("norm_gate_up", layer)
    assert ops._why_not_op("norm_qkv", layer) is None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda a: subclass(a.q_norm, "GemmaRMSNorm"), "GemmaRMSNorm"),
        (lambda a: setattr(a.k_norm, "has_weight", False), "no weight"),
        (lambda a: setattr(a.k_norm, "variance_epsilon", 1e-5), "different eps"),
        (lambda a: subclass(a.attn, "ChunkedLocalAttention"), "ChunkedLocalAttention"),
        (lambda a: subclass(a.rotary_emb, "YaRNScalingRotaryEmbedding"), "YaRNScalingRotaryEmbedding"),
        (lambda a: setattr(a.rotary_emb, "is_neox_style", False), "in halves"),
        (lambda a: setattr(a.rotary_emb, "rotary_dim", a.head_dim // 2), "whole heads"),
        (lambda a: setattr(a.rotary_emb, "cos_sin_cache", a.rotary_emb.cos_sin_cache.float()), "angles are torch.float32"),
        (lambda a: setattr(a.attn, "attn_backend", SimpleNamespace(forward_includes_kv_cache_update=True)), "writes the KV cache"),
        (lambda a: setattr(a.attn, "kv_sharing_target_layer_name", "model.layers.1"), "shares another layer's"),
        (lambda a: setattr(a.attn, "kv_cache_dtype", "fp8"), "the KV cache is fp8"),
        (lambda a: setattr(a.attn, "query_quant", nn.Identity()), "the KV cache is"),
        (lambda a: setattr(a.attn, "calculate_kv_scales", True), "the KV cache is"),
    ],
)
def test_an_ineligible_attention_has_a_reason(ops, use, build_layer, change, expected):
    layer = build_layer(layer_class(), attention=True)
    change(layer.self_attn)
    assert expected in ops.why_not_attention(layer.self_attn)
    assert ops.why_not_fused(layer.input_layernorm, layer.self_attn.qkv_proj) is None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, None),
        ({"head_size": 64}, "64 elements, the kernel takes 128"),
        ({"sliding_window": (4095, 0)}, "sliding window"),
        ({"alibi_slopes": [0.5]}, "ALiBi"),
        ({"logits_soft_cap": 30.0}, "soft cap"),
        ({"sinks": torch.zeros(4)}, "sinks"),
        ({"dcp_world_size": 2}, "decode context parallelism"),
    ],
)
def test_variants_of_flash_attention_decline(ops, use, monkeypatch, change, expected):
    plain = {"head_size": 128, "sliding_window": (-1, -1), "alibi_slopes": None, "logits_soft_cap": 0}
    impl = type("FlashAttentionImpl", (), {**plain, **change})()
    assert ops._why_not_impl(impl) is None  # on the CPU vLLM's attention runs behind the op
    monkeypatch.setattr(ops, "current_platform", SimpleNamespace(is_cuda=lambda: True, is_cpu=lambda: False))
    reason = ops._why_not_impl(impl)
    assert reason is None if expected is None else expected in reason
    assert "FlashInferImpl, not FlashAttention" in ops._why_not_impl(type("FlashInferImpl", (), plain)())


@pytest.mark.parametrize(
    ("compilation", "others", "expected"),
    [
        ({"cudagraph_mode": "FULL_AND_PIECEWISE"}, {}, None),
        ({"cudagraph_mode": "FULL_DECODE_ONLY"}, {}, None),
        ({"cudagraph_mode": "NONE"}, {}, None),
        ({"cudagraph_mode": "FULL"}, {}, "cudagraph_mode FULL"),
        ({"use_inductor_graph_partition": True}, {}, "Inductor partitions"),
        ({"pass_config": SimpleNamespace(fuse_attn_quant=True)}, {}, "quantisation fusion"),
        ({}, {"parallel_config": SimpleNamespace(use_ubatching=True)}, "dual-batch overlap"),
        ({}, {"kv_transfer_config": object()}, "transferred between engines"),
    ],
)
def test_attention_declines_graphs_that_serve_two_kinds_of_batches(ops, use, monkeypatch, compilation, others, expected):
    from vllm.config import CUDAGraphMode

    values = {"cudagraph_mode": "NONE", "use_inductor_graph_partition": False, "pass_config": SimpleNamespace(), **compilation}
    values["cudagraph_mode"] = CUDAGraphMode[values["cudagraph_mode"]]
    with_config(monkeypatch, ops, **{"compilation_config": SimpleNamespace(**values), "parallel_config": SimpleNamespace(), **others})
    reason = ops._why_not_graphs()
    assert reason is None if expected is None else expected in reason


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
GEMM_OPS = ("norm_qkv", "o_proj", "norm_gate_up", "down_proj")


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("op", [*GEMM_OPS, "all"])
def test_fused_and_stock_forward_agree(ops, use, build_layer, monkeypatch, op, residual):
    use("1")
    monkeypatch.setenv("VLLM_MIRAGE_OPS", op)
    layer = build_layer(layer_class())
    finish_loading(layer)
    assert calls_of(ops) == {}
    fused = layer(*layer_inputs(residual))
    expected = dict.fromkeys(GEMM_OPS if op == "all" else [op], 1)
    assert calls_of(ops) == expected
    layer.fused.clear()
    stock = layer(*layer_inputs(residual))
    assert calls_of(ops) == expected
    for ours, theirs in zip(fused, stock, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


def test_attention_is_called_with_qkv_and_positions(ops, use, build_layer, monkeypatch):
    """The wiring alone: what attention computes is above, and in the engine's tests."""
    use("1")
    layer = build_layer(layer_class(), attention=True)
    finish_loading(layer)
    positions, x, residual = layer_inputs(True)
    given = []

    def answer(self, *arguments):
        given.append(arguments)
        return torch.zeros(5, self.attention.q_size, dtype=torch.bfloat16)

    monkeypatch.setattr(ops.FusedAttention, "__call__", answer)
    out, _ = layer(positions, x, residual)
    qkv, _ = layer.fused["norm_qkv"](x, residual)
    assert given[0][0] is positions and torch.equal(given[0][1], qkv)
    assert out.shape == x.shape
    assert calls_of(ops) == {**dict.fromkeys(GEMM_OPS, 1), "norm_qkv": 2}


def test_switched_off_the_layer_is_stock(ops, use, build_layer):
    use("0")
    layer = build_layer(layer_class())
    assert layer.fused == {} and layer.fused_norm_qkv is None
    stock = {"name": "model.layers.0", "path": "stock", "kernel": None, "reason": "VLLM_USE_MIRAGE=0"}
    assert ops.mirage_report()["layers"] == [{**stock, "op": op} for op in ops.OPS]


@pytest.mark.parametrize("op", ["norm_qkv", "attention", "o_proj", "norm_gate_up", "down_proj"])
def test_single_ops_can_be_chosen(ops, use, build_layer, monkeypatch, op):
    use("1")
    monkeypatch.setenv("VLLM_MIRAGE_OPS", op)
    layer = build_layer(layer_class(), attention=True)
    assert set(layer.fused) == {op} and (layer.fused_norm_qkv is not None) == (op == "norm_qkv")
    for entry in ops.mirage_report()["layers"]:
        assert (entry["path"] == "fused") == (entry["op"] == op)
        assert ("VLLM_MIRAGE_OPS" in entry["reason"]) == (entry["op"] != op)


@pytest.mark.parametrize(
    ("chosen", "alone"),
    [
        ("all", set()),
        ("norm_qkv", {"norm_qkv"}),
        ("norm_qkv,down_proj", {"down_proj"}),  # the norm runs behind the down_proj of the layer before
        ("norm_qkv,attention,o_proj", {"norm_qkv"}),
        ("o_proj,norm_gate_up", {"o_proj"}),
    ],
)
def test_an_op_behind_a_stock_one_asks_for_the_plans_for_that(ops, use, build_layer, monkeypatch, chosen, alone):
    use("1")
    monkeypatch.setenv("VLLM_MIRAGE_OPS", chosen)
    asked = {}

    def prepare(op, k, n, dtype, device, alone=False):
        asked[op, k] = alone
        return "asked"

    monkeypatch.setattr(ops.mirage_ops, "prepare_gemm", prepare)
    layer = build_layer(layer_class(), attention=True)
    keys = {
        "norm_qkv": ("rms_norm_linear", HIDDEN),
        "o_proj": ("linear", layer.self_attn.o_proj.weight.shape[1]),
        "norm_gate_up": ("rms_norm_gate_up_silu", HIDDEN),
        "down_proj": ("linear", layer.mlp.down_proj.weight.shape[1]),
    }
    fused = [op for op in GEMM_OPS if op in layer.fused]
    assert {op for op in fused if asked[keys[op]]} == alone


def test_on_a_gpu_an_op_without_a_kernel_is_stock(ops, use, build_layer, monkeypatch):
    use("1")
    cuda = SimpleNamespace(is_cuda=lambda: True, is_cpu=lambda: False)
    monkeypatch.setattr(ops, "current_platform", cuda)
    linear_method = build_layer(layer_class()).mlp.down_proj.quant_method
    monkeypatch.setattr(ops, "default_unquantized_gemm", getattr(linear_method, "_gemm_impl", None))
    layer = build_layer(layer_class())  # a report tells of living layers alone
    assert layer.fused == {}
    report = {entry["op"]: entry for entry in ops.mirage_report()["layers"]}
    assert {entry["path"] for entry in report.values()} == {"stock"}
    assert all(report[op]["reason"].startswith("no kernel: ") for op in GEMM_OPS)
    monkeypatch.setattr(ops.mirage_ops, "_prepare", lambda *shape: RecordingKernel())
    ops.mirage_ops.kernels.clear()
    assert set(build_layer(layer_class()).fused) == set(GEMM_OPS)  # the CPU's attention is not FlashAttention


# ----------------------------------------------------------------------------------- the residual in the projections
class AddingKernel:
    """In place of a kernel of linear_residual: adds with PyTorch's operators."""

    max_tokens = 32

    def __init__(self, k, n):
        self.name = f"linear_residual {k}→{n}"

    def __call__(self, x, weight, residual):
        return F.linear(x, weight) + residual


@pytest.fixture
def adding(ops, use, engine_config, monkeypatch):
    """An engine that compiles for ranges of token counts, on a machine whose plan table lets projections add the residual."""
    from vllm.config import CompilationMode

    use("1")
    compilation, prepared = engine_config.compilation_config, ops.mirage_ops._prepared
    monkeypatch.setattr(compilation, "mode", CompilationMode.VLLM_COMPILE)
    monkeypatch.setattr(compilation, "compile_ranges_endpoints", [2048])
    monkeypatch.setattr(compilation, "inductor_compile_config", {})

    def has_adding_kernels(key, prepare):
        if key[0] != "linear_residual":
            return prepared(key, prepare)
        return ops.mirage_ops.kernels.setdefault(key, AddingKernel(*key[1:3]))

    monkeypatch.setattr(ops.mirage_ops, "_prepared", has_adding_kernels)
    return compilation


def adders(layer):
    """The projections of a layer that add the residual."""
    return {op for op in ("o_proj", "down_proj") if op in layer.fused and layer.fused[op].adds_residual}


def test_projections_add_the_residual_where_that_was_measured_to_be_faster(ops, adding, build_layer):
    layers = [build_layer(layer_class(), f"model.layers.{index}") for index in range(3)]
    assert [adders(layer) for layer in layers] == [{"o_proj", "down_proj"}] * 2 + [{"o_proj"}]
    assert adding.compile_ranges_endpoints == [32, 64, 2048]
    report = {(entry["name"][-1], entry["op"]): entry for entry in ops.mirage_report()["layers"]}
    for (index, op), entry in report.items():
        adds = op == "o_proj" or (op == "down_proj" and index != "2")
        assert entry["path"] == ("stock" if op == "attention" else "fused")  # build_layer took the attention away
        assert (entry["kernel"] or "").startswith("linear_residual") == adds
    assert "down_proj: kernel linear_residual" in ops._summary(list(ops._plans.values()))
    json.dumps(ops.mirage_report())


def test_without_such_a_measurement_nothing_changes(ops, use, adding, build_layer, monkeypatch):
    """Neither the graph's key, nor the report, nor the ranges."""
    described = []
    for reason in ("nobody measured", None):
        ops.mirage_ops.kernels.clear()
        ops._plans.clear()
        adding.compile_ranges_endpoints = [2048]
        adding.inductor_compile_config.clear()
        monkeypatch.setattr(ops, "why_not_residual", lambda proj, last: None if reason else "never asked")  # noqa: B023
        monkeypatch.setattr(ops.mirage_ops, "_prepared", lambda key, prepare: ops.mirage_ops.kernels.setdefault(key, "nobody measured"))
        layer = build_layer(layer_class())
        assert adders(layer) == set()
        [change] = adding.inductor_compile_config.values()
        report = {name: value for name, value in ops.mirage_report().items() if name != "calls"}
        described.append((report, ops._graph_state(), adding.compile_ranges_endpoints, change.uuid()))
    assert described[0] == described[1]
    assert "residual" not in json.dumps(described[0])


def test_the_compile_cache_key_tells_where_the_residual_is_added(ops, adding, build_layer):
    first = build_layer(layer_class())
    state = ops._graph_state()
    assert "down_proj=fused+residual" in state and "o_proj=fused+residual" in state
    first.mlp.down_proj = Wrapper(first.mlp.down_proj)
    assert "down_proj=stock" in ops._graph_state() and "down_proj=fused" not in ops._graph_state()
    first.fused["o_proj"].adds_residual = False
    assert "residual" not in ops._graph_state()


NO_ADAPTIVE = SimpleNamespace(enable_adaptive_verification=False)  # all that building a layer asks of it


def _shorter_kernels(ops, monkeypatch, engine_config):
    monkeypatch.setattr(ops.FusedRMSNormQKV, "prepare", lambda self, alone=False: SimpleNamespace(name="longer", max_tokens=64))


@pytest.mark.parametrize(
    ("change", "adds"),
    [
        (lambda ops, monkeypatch, config: None, {"o_proj", "down_proj"}),
        (lambda ops, monkeypatch, config: monkeypatch.setenv("VLLM_MIRAGE_OPS", "o_proj,down_proj"), set()),
        (lambda ops, monkeypatch, config: monkeypatch.setenv("VLLM_MIRAGE_OPS", "o_proj,norm_gate_up"), {"o_proj"}),
        (lambda ops, monkeypatch, config: monkeypatch.setenv("VLLM_MIRAGE_OPS", "norm_qkv,down_proj"), {"down_proj"}),
        (lambda ops, monkeypatch, config: monkeypatch.setattr(config, "speculative_config", NO_ADAPTIVE), set()),
        (lambda ops, monkeypatch, config: monkeypatch.setattr(config.compilation_config, "mode", 0), set()),
        (lambda ops, monkeypatch, config: monkeypatch.setattr(config.compilation_config, "compile_ranges_endpoints", None), set()),
        (
            lambda ops, monkeypatch, config: config.compilation_config.inductor_compile_config.update(post_grad_custom_post_pass="theirs"),
            set(),
        ),
        (_shorter_kernels, set()),
        (lambda ops, monkeypatch, config: monkeypatch.setattr(ops, "_is_last_layer", lambda *_: True), {"o_proj"}),
    ],
    ids=[
        *("nothing", "no norm is fused", "attention's side", "the MLP's side", "speculative decoding", "eager", "no ranges"),
        *("the user's own pass", "kernels that end earlier", "the last layer"),
    ],
)
def test_what_forbids_a_projection_to_add_the_residual(ops, adding, build_layer, engine_config, monkeypatch, change, adds):
    change(ops, monkeypatch, engine_config)
    assert adders(build_layer(layer_class())) == adds


def test_a_sharded_projection_leaves_the_residual_behind_the_all_reduce(ops, adding, build_layer):
    layer = build_layer(layer_class())
    layer.mlp.down_proj.tp_size = 2
    assert "all-reduce" in ops.why_not_residual(layer.mlp.down_proj, last=False)
    assert ops.why_not_residual(layer.self_attn.o_proj, last=False) is None


def subsets(names):
    return [{name for i, name in enumerate(names) if mask >> i & 1} for mask in range(1 << len(names))]


@pytest.mark.parametrize("first", [False, True])
def test_whatever_is_in_place_two_layers_answer_as_stock(ops, adding, build_layer, first):
    """Each combination of fused ops in a layer and the next (or, where one projection adds, none and all there).

    LoRA, for one, may take any op away after the layers were built.
    """
    layers = [build_layer(layer_class(), f"model.layers.{index}", dtype=torch.float32) for index in range(2)]
    for layer in layers:
        finish_loading(layer)
    built = [dict(layer.fused) for layer in layers]
    positions, x, residual = layer_inputs(not first, torch.float32)

    def run(*in_place):
        state = x, residual
        for layer, stand_ins, ops_there in zip(layers, built, in_place, strict=True):
            layer.fused = {op: stand_in for op, stand_in in stand_ins.items() if op in ops_there}
            state = layer(positions, *state)
        return state[0] if state[1] is None else state[0] + state[1]

    stock = run(set(), set())
    for adds in subsets(("o_proj", "down_proj")):
        for stand_ins in built:
            for op in ("o_proj", "down_proj"):
                stand_ins[op].adds_residual = op in adds
        for here in subsets(GEMM_OPS):
            for there in subsets(GEMM_OPS) if len(adds) == 2 else (set(), set(GEMM_OPS)):
                torch.testing.assert_close(run(here, there), stock, rtol=1e-5, atol=1e-5, msg=f"{adds} {here} {there}")


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("part", "name"), [("self_attn", "qkv_proj"), ("self_attn", "o_proj"), ("mlp", "gate_up_proj"), ("mlp", "down_proj")]
)
def test_a_replaced_projection_counts_where_the_residual_is_added_before_it(ops, adding, build_layer, part, name, compiled):
    layer = build_layer(layer_class(), dtype=torch.float32)
    assert adders(layer) == {"o_proj", "down_proj"}
    finish_loading(layer)
    torch._dynamo.reset()  # it counts recompilations of a forward, whichever layer's
    run = torch.compile(layer, backend="eager", fullgraph=True) if compiled else layer
    given = layer_inputs(True, torch.float32)
    before, nothing = run(*given)
    assert nothing is None and calls_of(ops, "kernel") == {"o_proj": 1, "down_proj": 1}
    setattr(getattr(layer, part), name, Wrapper(getattr(getattr(layer, part), name)))
    hidden_states, residual = run(*given)
    after = hidden_states if residual is None else hidden_states + residual
    layer.fused = {}
    stock, residual = layer(*given)
    torch.testing.assert_close(after, stock + residual, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, after)


class Wrapper(nn.Module):
    """What LoRA, for one, puts in a projection's place after the layer was built."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x):
        out, bias = self.base_layer(x)
        return out + 1, bias


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("op", "part", "name"),
    [
        ("norm_qkv", "self_attn", "qkv_proj"),
        ("o_proj", "self_attn", "o_proj"),
        ("norm_gate_up", "mlp", "gate_up_proj"),
        ("down_proj", "mlp", "down_proj"),
    ],
)
def test_a_replaced_projection_takes_the_stock_path(ops, use, build_layer, op, part, name, compiled):
    """A wrapper that is not called would be ignored silently."""
    use("1")
    layer = build_layer(layer_class())
    finish_loading(layer)
    torch._dynamo.reset()  # it counts recompilations of a forward, whichever layer's
    run = torch.compile(layer, backend="eager", fullgraph=True) if compiled else layer
    before = run(*layer_inputs(True))
    assert calls_of(ops) == dict.fromkeys(GEMM_OPS, 1)

    setattr(getattr(layer, part), name, Wrapper(getattr(getattr(layer, part), name)))
    after = run(*layer_inputs(True))
    assert calls_of(ops) == {**dict.fromkeys(GEMM_OPS, 2), op: 1}
    assert not torch.allclose(before[0], after[0])
    report = {entry["op"]: entry for entry in ops.mirage_report()["layers"]}
    assert (report[op]["path"], report[op]["kernel"]) == ("stock", None)
    assert report[op]["reason"] == f"{name} was replaced by Wrapper after the layer was built"
    assert all(report[other]["path"] == "fused" for other in GEMM_OPS if other != op)


def test_a_subclass_with_its_own_forward_takes_the_stock_path(ops, use, build_layer):
    use("1")
    base: Any = layer_class()

    class Eagle(base):
        def forward(self, positions, embeds, hidden_states, residual):
            raise NotImplementedError

    class Plain(base):
        pass

    eagle = build_layer(Eagle)
    assert eagle.fused == {}
    assert "Eagle has a forward of its own" in ops.mirage_report()["layers"][0]["reason"]
    assert set(build_layer(Plain).fused) == set(ops.OPS)


def test_strict_refuses_a_layer_without_a_kernel(ops, use, build_layer, monkeypatch):
    use("strict")
    sentence = r"norm_qkv of model\.layers\.0 cannot run a Mirage kernel: no kernel: the weights are on the cpu"
    with pytest.raises(RuntimeError, match=sentence):
        build_layer(layer_class())
    monkeypatch.setattr(ops.mirage_ops, "_prepare", lambda *shape: RecordingKernel())
    ops.mirage_ops.kernels.clear()
    layer = build_layer(layer_class(), attention=True)
    assert set(layer.fused) == set(ops.OPS)
    kinds = {(entry["path"], entry["kernel"], entry["reason"]) for entry in ops.mirage_report()["layers"]}
    assert kinds == {("fused", "recording", None)}


def test_strict_accepts_ops_that_were_switched_off(ops, use, build_layer, monkeypatch):
    use("strict")
    monkeypatch.setenv("VLLM_MIRAGE_OPS", "none")
    assert build_layer(layer_class()).fused == {}
    monkeypatch.setenv("VLLM_MIRAGE_OPS", "down_proj")
    with pytest.raises(RuntimeError, match=r"down_proj of model\.layers\.0 cannot run"):
        build_layer(layer_class())


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
    assert all(set(layer.fused) == set(ops.OPS) for layer in ours.model.layers)
    stock_layer = qwen3.Qwen3DecoderLayer.__mro__[1]
    monkeypatch.setattr(qwen3.stock, "Qwen3DecoderLayer", stock_layer)
    monkeypatch.setattr(qwen3.stock.Qwen3Model, "decoder_layer_type", stock_layer, raising=False)
    stock = build_model()
    assert type(stock.model.layers[0]) is stock_layer
    assert names(ours) == names(stock)


ALL_OPS = "norm_qkv, attention, o_proj, norm_gate_up, down_proj"
NO_KERNEL = "no kernel: the weights are on the cpu, not on a GPU; PyTorch runs inside the op"


@pytest.mark.parametrize(
    ("switch", "change", "expected"),
    [
        ("0", lambda layer: None, f"0 of 3 layers fused ({ALL_OPS}: stock, VLLM_USE_MIRAGE=0)"),
        ("1", lambda layer: None, f"3 of 3 layers fused ({ALL_OPS}: {NO_KERNEL})"),
        (
            "1",
            lambda layer: subclass(layer.mlp, "LongMLP") if "layers.1." in layer.self_attn.qkv_proj.prefix else None,
            f"2 of 3 layers fused ({ALL_OPS}: {NO_KERNEL}; {ALL_OPS}: stock, a part of the layer is LongMLP, not Qwen2MLP)",
        ),
    ],
)
def test_one_line_tells_how_many_layers_are_fused(ops, use, build_model, monkeypatch, switch, change, expected):
    lines: list[str] = []
    fuse_layer = ops.fuse_layer

    def changed(layer, *arguments):
        change(layer)
        return fuse_layer(layer, *arguments)

    monkeypatch.setattr(ops, "fuse_layer", changed)
    monkeypatch.setattr(ops.logger, "info", lambda message, *values: lines.append(message % values))
    use(switch)
    model = build_model()
    assert [line for line in lines if line.startswith("Mirage")] == [f"Mirage: {expected}"]
    assert len(ops.mirage_report()["layers"]) == len(ops.OPS) * len(model.model.layers) == 15
    json.dumps(ops.mirage_report())


@pytest.mark.parametrize(("chosen", "added"), [("all", True), ("norm_qkv", False)])
def test_piecewise_graphs_stop_before_fused_attention(ops, use, build_model, engine_config, monkeypatch, chosen, added):
    use("1")
    monkeypatch.setenv("VLLM_MIRAGE_OPS", chosen)
    vllms = ["vllm::unified_attention_with_output"]
    monkeypatch.setattr(engine_config.compilation_config, "splitting_ops", [*vllms])
    for _ in range(2):  # three layers, and a second model of the same configuration: still named once
        model = build_model()
        assert engine_config.compilation_config.splitting_ops == vllms + ["vllm_mirage::decode_attention"] * added
    assert model.model.layers[0].fused


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
