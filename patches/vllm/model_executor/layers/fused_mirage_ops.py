# SPDX-License-Identifier: Apache-2.0
"""The fused path of a Qwen3 decoder layer: the switch, what may be fused, the modules' stand-ins, the plan of each layer.

Read from top to bottom: switch → compile-cache key → eligibility → stand-ins (`FusedRMSNormQKV` and its siblings) → plan
of a layer → report.  The torch ops that the stand-ins call are in `mirage_ops.py`; `models/qwen3.py` is the only user.

    VLLM_USE_MIRAGE   0 (default)  every layer takes the stock path
                      1            a layer that may be fused takes the fused path
                      strict       the same, but a layer that may not, or that has no kernel, is an error at start
    VLLM_MIRAGE_OPS   all (default), none, or a comma list of op names: the ops that may be used

Nothing here owns a parameter.  The fused computation is opaque to torch.compile; inside an op a compiled kernel runs
where one was prepared and the batch is small enough, and otherwise PyTorch.  On a GPU an op without
a kernel is not used at all: the layer's own modules run.
"""

import os
import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from vllm import envs
from vllm.config import CUDAGraphMode, get_current_vllm_config_or_none
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank, tensor_model_parallel_all_reduce
from vllm.distributed.utils import get_pp_indices
from vllm.logger import init_logger
from vllm.model_executor.layers import mirage_compile, mirage_ops
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
from vllm.model_executor.layers.utils import default_unquantized_gemm
from vllm.platforms import current_platform
from vllm.utils.torch_utils import _encode_layer_name

logger = init_logger(__name__)

OVERLAY_VERSION = "0.2.0"

# ---------------------------------------------------------------------------------------------------------- switch
SWITCH, OPS_SWITCH = "VLLM_USE_MIRAGE", "VLLM_MIRAGE_OPS"
OPS = mirage_ops.OPS


def mirage_switch() -> str:
    """The value of VLLM_USE_MIRAGE: "0", "1" or "strict".  Raises ValueError for any other."""
    value = os.environ.get(SWITCH, "0")
    if value not in ("0", "1", "strict"):
        raise ValueError(f"{SWITCH}={value!r} was found, but 0, 1 or strict was expected: export {SWITCH}=1")
    return value


def is_mirage_enabled() -> bool:
    """Whether a model built now may take the fused path."""
    return mirage_switch() != "0"


def set_use_mirage(use: bool) -> None:
    """Set VLLM_USE_MIRAGE for the models built from now on, here and in processes started from here.

    True keeps `strict` if that is set.  A model that is already built (and perhaps compiled) keeps its path.
    """
    if use != is_mirage_enabled():
        os.environ[SWITCH] = "1" if use else "0"


def enabled_ops() -> frozenset[str]:
    """The ops named by VLLM_MIRAGE_OPS.  Raises ValueError for a name that is no op."""
    value = os.environ.get(OPS_SWITCH, "all")
    names = {name.strip() for name in value.split(",")}
    if names == {"all"}:
        return frozenset(OPS)
    if names == {"none"}:
        return frozenset()
    if unknown := names.difference(OPS):
        raise ValueError(
            f"{OPS_SWITCH}={value!r} names {', '.join(sorted(map(repr, unknown)))}, but all, none or a comma list "
            f"of {', '.join(OPS)} was expected: unset {OPS_SWITCH}"
        )
    return frozenset(names)


# ----------------------------------------------------------------------------------------------- compile-cache key
def _graph_state() -> str:
    """What decides the traced graph: the op schemas and which paths the live layers take.

    A kernel's presence is left out on purpose: the op hides it, the graph is the same.  No layer names either:
    the ranks of a pipeline then share one key, as vLLM intends.
    """
    paths = sorted({f"{plan.op}={plan.path()}{'+residual' * plan.adds_residual()}" for plan in _plans.values()})
    return f"{mirage_ops.OP_SCHEMA}:{'+'.join(paths)}"


# vLLM keys its torch.compile cache on the variables that it knows (envs.compile_factors calls each of these).
# Undeclared, a graph compiled with VLLM_USE_MIRAGE=0 would be loaded from disk for VLLM_USE_MIRAGE=1.
envs.environment_variables.update(
    {
        SWITCH: lambda: os.environ.get(SWITCH, "0"),
        OPS_SWITCH: lambda: os.environ.get(OPS_SWITCH, "all"),
        "VLLM_MIRAGE_GRAPH_STATE": _graph_state,
    }
)

# ----------------------------------------------------------------------------------------------------- eligibility
DTYPES = {"cuda": (torch.bfloat16, torch.float16), "cpu": (torch.bfloat16, torch.float16, torch.float32)}


def why_not_fused(norm_layer: RMSNorm, qkv_proj: QKVParallelLinear) -> str | None:
    """The reason why this norm and projection must stay on the stock path, or None.

    A quantised projection is declined, so vLLM's norm + quantisation fusion loses nothing that it could match.
    """
    return _why_not_norm_gemm(norm_layer, qkv_proj, QKVParallelLinear, ("q_proj", "k_proj", "v_proj"))


def _why_not_norm_gemm(norm_layer: RMSNorm, proj: Any, cls: type, lora_names: tuple[str, ...]) -> str | None:
    if reason := _why_not_platform() or _why_not_norm(norm_layer) or _why_not_projection(proj, cls):
        return reason
    name = _suffix(proj)
    if proj.gather_output:
        return f"{name} gathers its output"
    if tuple(proj.weight.shape[1:]) != tuple(norm_layer.weight.shape):
        return f"{name}.weight is {list(proj.weight.shape)} but the norm has {list(norm_layer.weight.shape)}"
    if proj.weight.dtype != norm_layer.weight.dtype:
        return f"{name} is {proj.weight.dtype} and the norm {norm_layer.weight.dtype} on {proj.weight.device.type}"
    config = get_current_vllm_config_or_none()
    if config is not None:  # outside an engine (tests) there is none
        passes = config.compilation_config.pass_config
        if getattr(passes, "enable_sp", False):  # vLLM <= 0.30: the pass shards the residual that the op would hold
            return "the sequence-parallel pass must see the norm"
        if proj.tp_size > 1 and getattr(passes, "fuse_allreduce_rms", False):
            return "the all-reduce + RMSNorm fusion must see the norm"
    return _why_not_lora(name, lora_names)


def why_not_linear(proj: RowParallelLinear) -> str | None:
    """The same for a row-parallel projection by itself."""
    if reason := _why_not_platform() or _why_not_projection(proj, RowParallelLinear):
        return reason
    if not proj.input_is_parallel or not proj.reduce_results:
        return f"{_suffix(proj)} splits its input or leaves its output unreduced"
    config = get_current_vllm_config_or_none()
    if config is not None and proj.tp_size > 1 and getattr(config.compilation_config.pass_config, "fuse_gemm_comms", False):
        return "the GEMM + communication fusion must see the projection"
    return _why_not_lora(_suffix(proj), (_suffix(proj),))


def why_not_residual(proj: RowParallelLinear, last: bool) -> str | None:
    """The reason why a fused projection must leave the residual to the norm that follows, or None.

    last: the projection ends the last layer of a pipeline rank, behind which vLLM's own norm or the next rank wants both tensors.
    """
    if proj.tp_size > 1:
        return "the all-reduce lies between"
    if last:
        return "it ends the last layer"
    config = get_current_vllm_config_or_none()
    if config is not None and config.speculative_config is not None:
        return "speculative decoding may read the states between layers"
    return mirage_compile.why_not_replaced()  # beyond its kernels the add would be a kernel of its own


def why_not_attention(attention: Any) -> str | None:
    """The same for q/k norm, RoPE, cache write and attention of a Qwen3Attention."""
    attn, rope = attention.attn, attention.rotary_emb
    if reason := _why_not_platform() or _why_not_norm(attention.q_norm) or _why_not_norm(attention.k_norm):
        return reason
    if attention.q_norm.variance_epsilon != attention.k_norm.variance_epsilon:
        return "q_norm and k_norm have different eps"
    if type(attn) is not Attention:
        return f"the attention is {type(attn).__name__}, not Attention"
    if type(rope) is not RotaryEmbedding or not rope.is_neox_style or rope.rotary_dim != attention.head_dim:
        return f"the rotary embedding is {type(rope).__name__}, not a plain one over whole heads in halves"
    if rope.cos_sin_cache.dtype != attention.q_norm.weight.dtype:
        return f"the rotary embedding's angles are {rope.cos_sin_cache.dtype}, the model {attention.q_norm.weight.dtype}"
    if attn.attn_backend.forward_includes_kv_cache_update or attn.kv_sharing_target_layer_name is not None:
        return "the attention backend writes the KV cache by itself, or shares another layer's"
    scaled = attn.query_quant is not None or getattr(attn, "calculate_kv_scales", False)  # the latter up to 0.31
    if scaled or attn.kv_cache_dtype not in ("auto", "bfloat16", "float16"):
        return f"the KV cache is {attn.kv_cache_dtype}"
    return _why_not_impl(attn.impl) or _why_not_graphs()


def _why_not_impl(impl: Any) -> str | None:
    """FlashAttention without any of its variants.  On the CPU vLLM's own attention runs behind the op, whatever it does."""
    if current_platform.is_cpu():
        return None
    if type(impl).__name__ != "FlashAttentionImpl":
        return f"the attention backend is {type(impl).__name__}, not FlashAttention"
    if impl.head_size != mirage_ops.HEAD_DIM:
        return f"heads have {impl.head_size} elements, the kernel takes {mirage_ops.HEAD_DIM}"
    variants = {
        "a sliding window": tuple(impl.sliding_window) != (-1, -1),
        "ALiBi": impl.alibi_slopes is not None,
        "a soft cap": bool(impl.logits_soft_cap),
        "sinks": getattr(impl, "sinks", None) is not None,
        "decode context parallelism": getattr(impl, "dcp_world_size", 1) > 1,
    }
    return next((f"the attention has {name}" for name, there in variants.items() if there), None)


def _why_not_graphs() -> str | None:
    """How vLLM captures: the op decides by the kind of batch, so no graph may serve two kinds."""
    config = get_current_vllm_config_or_none()
    if config is None:
        return None
    compilation, parallel = config.compilation_config, config.parallel_config
    if compilation.cudagraph_mode == CUDAGraphMode.FULL:
        return "one full CUDA graph serves decode and mixed batches (cudagraph_mode FULL)"
    if compilation.use_inductor_graph_partition:
        return "Inductor partitions the graph"
    if getattr(compilation.pass_config, "fuse_attn_quant", False):
        return "the attention + quantisation fusion must see the attention"
    if getattr(envs, "VLLM_USE_BREAKABLE_CUDAGRAPH", False):
        return "CUDA graphs are breakable"
    if getattr(parallel, "use_ubatching", False):
        return "batches are split in two (dual-batch overlap)"
    return "keys and values are transferred between engines" if config.kv_transfer_config is not None else None


def _why_not_platform() -> str | None:
    if not (current_platform.is_cuda() or current_platform.is_cpu()):
        return f"the platform is {current_platform.device_name}, not CUDA or CPU"
    if envs.VLLM_BATCH_INVARIANT:
        return "batch-invariant mode (VLLM_BATCH_INVARIANT) prescribes its own norm and GEMM"
    return None


def _why_not_norm(norm_layer: RMSNorm) -> str | None:
    if type(norm_layer) is not RMSNorm:
        return f"the norm is {type(norm_layer).__name__}, not RMSNorm"
    if norm_layer.variance_size_override is not None:
        return "the norm's variance covers only part of a row"
    if not norm_layer.has_weight:
        return "the norm has no weight"
    return None


def _suffix(proj: Any) -> str:
    """ "qkv_proj" of "model.layers.0.self_attn.qkv_proj"."""
    path: str = getattr(proj, "prefix", "") or getattr(proj, "layer_name", "")
    return path.rpartition(".")[2] or "the projection"


def _why_not_projection(proj: Any, cls: type) -> str | None:
    name, found = _suffix(proj), type(proj)
    if found is not cls:  # a LoRA wrapper, a vendor's class
        return f"{name} is {found.__name__}, not {cls.__name__}"
    method = proj.quant_method
    if type(method) is not UnquantizedLinearMethod:  # before any look at .weight: it may not exist
        return f"{name} is quantised ({type(method).__name__})"
    # vLLM 0.28 and later can be told to use another library's GEMM for all unquantised layers.
    if current_platform.is_cuda() and getattr(method, "_gemm_impl", default_unquantized_gemm) is not (
        default_unquantized_gemm
    ):
        return "the linear backend is not vLLM's default"
    if proj.bias is not None:
        return f"{name} has a bias"
    if proj.weight.dtype not in DTYPES.get(proj.weight.device.type, ()):
        return f"{name} is {proj.weight.dtype} on {proj.weight.device.type}"
    return None


def _why_not_lora(name: str, lora_names: tuple[str, ...]) -> str | None:
    config = get_current_vllm_config_or_none()
    if config is None or config.lora_config is None:
        return None
    targets = config.lora_config.target_modules  # suffixes of modules; None: every module
    taken = targets is None or any(target.endswith(lora_names) for target in targets)
    return f"LoRA is enabled and will wrap {name}" if taken else None


# ------------------------------------------------------------------------------------------------------- stand-ins
class _StandIn:
    """Part of a decoder layer as one op, by reference.

    A plain object on purpose.  As an nn.Module it would register its layers a second time: new names in
    named_parameters() and state_dict(), and LoRA would wrap the second path and be ignored.
    """

    op: str
    proj: Any  # the module that LoRA, for one, may put a wrapper in place of after the layer was built

    def _refer_to(self, proj: LinearBase) -> None:
        self.proj = proj
        # On CUDA the weight is looked up at each call, so that reloading and sleep mode stay right.
        self._cpu_weight = None
        if proj.weight.device.type == "cpu":
            self._keep_cpu_weight(proj)

    def _keep_cpu_weight(self, proj: Any) -> None:
        """After loading, vLLM's CPU backend packs the weight and leaves `proj.weight` empty: keep what was loaded, each time."""
        self._cpu_weight = proj.weight
        pack = proj.quant_method.process_weights_after_loading

        def keep_and_pack(layer: Any) -> None:
            self._cpu_weight = layer.weight
            pack(layer)

        proj.quant_method.process_weights_after_loading = keep_and_pack

    def _weight(self) -> torch.Tensor:
        return self.proj.weight if self._cpu_weight is None else self._cpu_weight

    def standing(self, layer: Any) -> Any:
        """What now stands in `proj`'s place in the layer."""
        raise NotImplementedError

    def in_place(self, layer: Any) -> bool:
        return self.standing(layer) is self.proj


class FusedRMSNormQKV(_StandIn):
    """A decoder layer's input_layernorm and qkv_proj.  Raises ValueError for a pair that may not be fused."""

    op = "norm_qkv"

    def __init__(self, norm_layer: RMSNorm, qkv_proj: QKVParallelLinear) -> None:
        if reason := why_not_fused(norm_layer, qkv_proj):
            raise ValueError(f"RMSNorm and QKV projection cannot be fused: {reason}")
        self.norm_layer = norm_layer
        self.qkv_proj = qkv_proj
        self._refer_to(qkv_proj)

    def standing(self, layer: Any) -> Any:
        return layer.self_attn.qkv_proj

    def prepare(self, alone: bool = False) -> Any:
        """The kernel, compiled now, or a sentence why there is none.  alone: it will run behind an op of the stock path."""
        n, k = self.proj.weight.shape
        return mirage_ops.prepare_gemm("rms_norm_linear", k, n, self.proj.weight.dtype, self.proj.weight.device, alone)

    def __call__(self, hidden_states: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden_states, residual: [num_tokens, hidden] → (qkv [num_tokens, (q+2kv)·head_dim], the new residual)."""
        norm_weight, eps = self.norm_layer.weight, self.norm_layer.variance_epsilon
        if residual is None:
            return torch.ops.vllm_mirage.norm_qkv(hidden_states, norm_weight, self._weight(), eps), hidden_states
        return torch.ops.vllm_mirage.add_norm_qkv(hidden_states, residual, norm_weight, self._weight(), eps)


class FusedRMSNormGateUpSiLU(_StandIn):
    """A decoder layer's post_attention_layernorm, gate_up_proj and SiLU·mul."""

    op = "norm_gate_up"

    def __init__(self, norm_layer: RMSNorm, gate_up_proj: MergedColumnParallelLinear) -> None:
        self.norm_layer = norm_layer
        self._refer_to(gate_up_proj)

    def standing(self, layer: Any) -> Any:
        return layer.mlp.gate_up_proj

    def prepare(self, alone: bool = False) -> Any:
        weight = self.proj.weight
        rows, k = weight.shape
        return mirage_ops.prepare_gemm("rms_norm_gate_up_silu", k, rows // 2, weight.dtype, weight.device, alone)

    def __call__(self, hidden_states: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden_states, residual: [num_tokens, hidden] → (silu(gate)·up [num_tokens, intermediate], the new residual)."""
        norm_weight, eps = self.norm_layer.weight, self.norm_layer.variance_epsilon
        if residual is None:
            return torch.ops.vllm_mirage.norm_gate_up_silu(hidden_states, norm_weight, self._weight(), eps), hidden_states
        return torch.ops.vllm_mirage.add_norm_gate_up_silu(hidden_states, residual, norm_weight, self._weight(), eps)


class FusedLinear(_StandIn):
    """A decoder layer's o_proj or down_proj: K is split inside a block or cluster, so that no second kernel adds the parts.

    The residual is added by the norm that follows, in the kernel that normalises, or by the projection itself, whichever was measured to
    be faster.  Then hidden_states are the residual stream, and there is no other tensor for the norm: what the first layer is called with.
    """

    adds_residual = False  # decided when the layer is built; why_not_residual() says where it may be

    def __init__(self, proj: RowParallelLinear) -> None:
        self.op = _suffix(proj)
        self._refer_to(proj)

    def standing(self, layer: Any) -> Any:
        return layer.self_attn.o_proj if self.op == "o_proj" else layer.mlp.down_proj

    def prepare(self, alone: bool = False, kind: str = "linear") -> Any:
        n, k = self.proj.weight.shape
        return mirage_ops.prepare_gemm(kind, k, n, self.proj.weight.dtype, self.proj.weight.device, alone)

    def __call__(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [num_tokens, k] → ([num_tokens, n], summed over the tensor-parallel ranks; the residual, None once it is added)."""
        if self.adds_residual:
            return torch.ops.vllm_mirage.linear_residual(x, self._weight(), residual, self.op), None
        out = torch.ops.vllm_mirage.linear(x, self._weight(), self.op)
        return tensor_model_parallel_all_reduce(out) if self.proj.tp_size > 1 else out, residual


class FusedAttention(_StandIn):
    """A decoder layer's q_norm, k_norm, rotary_emb, KV-cache write and attention."""

    op = "attention"

    def __init__(self, attention: Any) -> None:
        self.attention = attention
        self.proj = attention.attn
        self.layer_name = _encode_layer_name(attention.attn.layer_name)

    def standing(self, layer: Any) -> Any:
        return layer.self_attn.attn

    def prepare(self, alone: bool = False) -> Any:
        """alone changes nothing: attention has one set of plans."""
        weight, config = self.attention.q_norm.weight, get_current_vllm_config_or_none()
        longest = 0 if config is None else config.model_config.max_model_len
        heads = self.attention.num_heads, self.attention.num_kv_heads
        return mirage_ops.prepare_attention(*heads, weight.dtype, weight.device, longest)

    def __call__(self, positions: torch.Tensor, qkv: torch.Tensor) -> torch.Tensor:
        """positions [num_tokens], qkv [num_tokens, (q+2kv)·head_dim] → [num_tokens, q·head_dim]"""
        a = self.attention
        angles, eps = a.rotary_emb.cos_sin_cache, a.q_norm.variance_epsilon
        weights = a.q_norm.weight, a.k_norm.weight
        heads = a.num_heads, a.num_kv_heads
        q, k = torch.ops.vllm_mirage.qk_norm_rope(qkv, positions, *weights, angles, eps, *heads, self.layer_name)
        written = torch.ops.vllm_mirage.write_cache(qkv, k, *heads, self.layer_name)
        output = torch.empty((qkv.shape[0], a.q_size), dtype=qkv.dtype, device=qkv.device)
        torch.ops.vllm_mirage.decode_attention(qkv, q, k, written, positions, *weights, angles, output, eps, *heads, self.layer_name)
        return output


# ------------------------------------------------------------------------------------------------- plan of a layer
@dataclass(frozen=True)
class LayerPlan:
    """What was decided for one op of one layer when it was built."""

    name: str  # "model.layers.0"
    op: str
    layer: weakref.ReferenceType
    fused: Any  # a stand-in, or None
    kernel: str | None
    reason: str | None  # why the stock path, or why no kernel

    def replaced(self) -> str | None:
        """The class now standing in the projection's place, if the layer was changed after it was built."""
        layer = self.layer()
        if self.fused is None or layer is None or self.fused.in_place(layer):
            return None
        return type(self.fused.standing(layer)).__name__

    def path(self) -> str:
        return "stock" if self.fused is None or self.replaced() else "fused"

    def adds_residual(self) -> bool:
        return self.path() == "fused" and getattr(self.fused, "adds_residual", False)

    def report(self) -> dict[str, str | None]:
        kernel, reason = self.kernel, self.reason
        if replacement := self.replaced():
            kernel, reason = None, f"{_suffix(self.fused.proj)} was replaced by {replacement} after the layer was built"
        return {"name": self.name, "op": self.op, "path": self.path(), "kernel": kernel, "reason": reason}


_plans: dict[tuple[str, str], LayerPlan] = {}


def fuse_layer(layer: Any, forward: Any, attention_class: type, mlp_class: type, num_layers: int) -> dict[str, Any]:
    """Decide the path of each op of a decoder layer that was just built: the stand-ins by op; an op that is not there is stock.

    forward: the forward that knows the stand-ins; a subclass with another one takes the stock path, and so does a layer
    whose attention or MLP is another class than those two.  num_layers: decoder layers of the whole model; after this
    rank's last one the engine's INFO line is logged.
    Raises RuntimeError with VLLM_USE_MIRAGE=strict when an op may not be fused or has no kernel.
    """
    name = layer.self_attn.qkv_proj.prefix.removesuffix(".self_attn.qkv_proj")
    if (name, OPS[0]) in _plans:  # a new model in this process: the former one's plans and calls are history
        _plans.clear()
        mirage_ops.calls.update(dict.fromkeys(mirage_ops.calls, 0))
    common = _why_not_layer(layer, forward, attention_class, mlp_class)
    reasons = {op: common or _why_not_op(op, layer) for op in OPS}
    for op in OPS:
        plan = _plan_op(op, name, layer, reasons[op], alone=reasons[BEFORE[op]] is not None)
        _plans[name, op] = plan
        if mirage_switch() == "strict" and plan.kernel is None and op in enabled_ops():
            raise RuntimeError(
                f"{SWITCH}=strict, but {op} of {name} cannot run a Mirage kernel: {plan.reason}; "
                f"export {SWITCH}=1 to let it run without"
            )
    for op, norm in NORM_BEHIND.items():
        _choose_where_the_residual_is_added(op, norm, name, num_layers)
    _answer_collective_rpc()
    _log_when_last(name, num_layers)
    return {op: _plans[name, op].fused for op in OPS if _plans[name, op].fused is not None}


BEFORE = {
    "norm_qkv": "down_proj",  # of the layer before, which is like this one
    "attention": "norm_qkv",
    "o_proj": "attention",
    "norm_gate_up": "o_proj",
    "down_proj": "norm_gate_up",
}
"""The op that a decode step runs before each."""


def _plan_op(op: str, name: str, layer: Any, reason: str | None, alone: bool) -> LayerPlan:
    """reason: why it must stay stock.  alone: the op before it may not be fused; one that may and has no kernel counts as fused."""
    fused, kernel = None, None
    if reason is None:
        fused = _stand_in(op, layer)
        prepared = fused.prepare(alone)
        if isinstance(prepared, str):
            reason = f"no kernel: {prepared}"
            if not current_platform.is_cpu():
                fused = None  # stock; on the CPU the op runs all the same, which is how it is tested without a GPU
        else:
            kernel = prepared.name
        if fused is not None:
            mirage_compile.settle(attention=op == "attention")
    return LayerPlan(name, op, weakref.ref(layer), fused, kernel, reason)


NORM_BEHIND = {BEFORE[norm]: norm for norm in ("norm_gate_up", "norm_qkv")}
RESIDUAL = "linear_residual"  # the kernel op


def _choose_where_the_residual_is_added(op: str, norm: str, name: str, num_layers: int) -> None:
    """Lets a projection of a layer add it, where the plan table has measured plans for that and nothing forbids it."""
    plan = _plans[name, op]
    if plan.fused is None or _plans[name, norm].fused is None:
        return
    reason = why_not_residual(plan.fused.proj, op == "down_proj" and _is_last_layer(name, num_layers))
    kernel = reason or plan.fused.prepare(kind=RESIDUAL)
    if not isinstance(kernel, str) and kernel.max_tokens < _last_of_the_gemms_kernels(name):
        kernel = f"{kernel.name}, while the layer's other kernels take more"
    if isinstance(kernel, str):
        logger.debug("Mirage: %s of %s leaves the residual to the norm: %s", op, name, kernel)
        return
    plan.fused.adds_residual = True
    _plans[name, op] = replace(plan, kernel=kernel.name, reason=None)
    mirage_compile.settle(attention=False, gemms=kernel.max_tokens)  # beyond, no op of a GEMM is left


def _last_of_the_gemms_kernels(name: str) -> int:
    """The most tokens that a GEMM's kernel of a layer takes."""
    stand_ins = [_plans[name, op].fused for op in OPS if op != "attention"]
    kernels = [stand_in.prepare() for stand_in in stand_ins if stand_in is not None]  # prepared already
    return max((kernel.max_tokens for kernel in kernels if not isinstance(kernel, str)), default=0)


def _why_not_op(op: str, layer: Any) -> str | None:
    if op not in enabled_ops():
        return f"{OPS_SWITCH} leaves it out"
    attention, mlp = layer.self_attn, layer.mlp
    if op == "norm_qkv":
        return why_not_fused(layer.input_layernorm, attention.qkv_proj)
    if op == "attention":
        return why_not_attention(attention)
    if op == "o_proj":
        return why_not_linear(attention.o_proj)
    if op == "down_proj":
        return why_not_linear(mlp.down_proj)
    if type(mlp.act_fn) is not SiluAndMul:
        return f"the activation is {type(mlp.act_fn).__name__}, not SiluAndMul"
    names = ("gate_proj", "up_proj")
    return _why_not_norm_gemm(layer.post_attention_layernorm, mlp.gate_up_proj, MergedColumnParallelLinear, names)


def _stand_in(op: str, layer: Any) -> Any:
    if op == "norm_qkv":
        return FusedRMSNormQKV(layer.input_layernorm, layer.self_attn.qkv_proj)
    if op == "attention":
        return FusedAttention(layer.self_attn)
    if op == "norm_gate_up":
        return FusedRMSNormGateUpSiLU(layer.post_attention_layernorm, layer.mlp.gate_up_proj)
    return FusedLinear(layer.self_attn.o_proj if op == "o_proj" else layer.mlp.down_proj)


def _why_not_layer(layer: Any, forward: Any, attention_class: type, mlp_class: type) -> str | None:
    if not is_mirage_enabled():
        return f"{SWITCH}=0"
    if type(layer).forward is not forward:
        return f"{type(layer).__name__} has a forward of its own"
    for part, expected in ((layer.self_attn, attention_class), (layer.mlp, mlp_class)):
        if type(part) is not expected:
            return f"a part of the layer is {type(part).__name__}, not {expected.__name__}"
    return None


# ---------------------------------------------------------------------------------------------------------- report
def mirage_report() -> dict[str, Any]:
    """What runs in this process, ready for JSON.

    layers: one entry for each op of each decoder layer of the dense Qwen3 model built last on this rank.  calls: how often each body
    of an op ran in Python since that model was begun (a replayed CUDA graph counts once, when it is captured).
    """
    return {
        "switch": mirage_switch(),
        "overlay_version": OVERLAY_VERSION,
        "rank": torch.distributed.get_rank() if torch.distributed.is_initialized() else 0,
        "layers": [plan.report() for plan in _plans.values()],
        # that nobody measured a projection with residual is no news
        "kernels": [_describe(*item) for item in mirage_ops.kernels.items() if item[0][0] != RESIDUAL or not isinstance(item[1], str)],
        "calls": dict(mirage_ops.calls),
    }


def collect_reports(llm: Any) -> list[dict[str, Any]]:
    """mirage_report() of every worker of an `LLM`, wherever the workers run.  Needs a Qwen3 model in them."""
    return llm.collective_rpc("mirage_report")


def _answer_collective_rpc() -> None:
    """Give this process's worker a method `mirage_report`.

    Called by name, it needs no pickled function, which vLLM refuses between processes by default.
    """
    from vllm.v1.worker.worker_base import WorkerBase  # not at import: it would close an import cycle

    WorkerBase.mirage_report = lambda worker: mirage_report()


def _describe(key: tuple, kernel: Any) -> dict[str, Any]:
    op, first, second, dtype, device = key  # K and N of a GEMM, heads and KV heads of attention
    shape = {"op": op, "shape": f"{first}x{second}", "dtype": str(dtype).removeprefix("torch."), "device": str(device)}
    if isinstance(kernel, str):
        return {**shape, "kernel": None, "reason": kernel}
    return {**shape, "kernel": kernel.name, "max_tokens": kernel.max_tokens}


def _log_when_last(name: str, num_layers: int) -> None:
    """One INFO line for each engine and pipeline rank, when the rank's last layer is built."""
    if _is_last_layer(name, num_layers) and get_tensor_model_parallel_rank() == 0:
        group, stem = get_pp_group(), name.rpartition(".")[0]
        rank = f" on pipeline rank {group.rank_in_group}" if group.world_size > 1 else ""
        logger.info("Mirage: %s%s", _summary([p for p in _plans.values() if p.name.startswith(f"{stem}.")]), rank)


def _is_last_layer(name: str, num_layers: int) -> bool:
    """Whether "model.layers.27" is the last one of this pipeline rank."""
    group = get_pp_group()
    _, end = get_pp_indices(num_layers, group.rank_in_group, group.world_size)
    return name.rpartition(".")[2] == str(end - 1)


def _summary(plans: list[LayerPlan]) -> str:
    """ "28 of 28 layers fused (norm_qkv: kernel …; attention: …)", or why not; an op's layers in one clause where they agree."""
    layers = {plan.name for plan in plans}
    fused = {plan.name for plan in plans if plan.fused is not None}
    clauses: dict[str, list[str]] = {}
    for plan in plans:
        if plan.fused is None:
            note = f"stock, {plan.reason}"
        else:
            note = f"kernel {plan.kernel}" if plan.kernel else f"{plan.reason}; PyTorch runs inside the op"
        ops = clauses.setdefault(note, [])
        if plan.op not in ops:
            ops.append(plan.op)
    text = "; ".join(f"{', '.join(ops)}: {note}" for note, ops in clauses.items())
    return f"{len(fused)} of {len(layers)} layers fused ({text})"
