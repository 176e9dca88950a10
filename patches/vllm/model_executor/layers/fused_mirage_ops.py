# SPDX-License-Identifier: Apache-2.0
"""RMSNorm + QKV projection as one op for Qwen3: the switch, the plan of each layer, the ops, the module.

Read from top to bottom: switch → compile-cache key → kernels → eligibility → norm bodies → ops and fakes →
`FusedRMSNormQKV` → plan of a layer → report.  `models/qwen3.py` is the only user.

    VLLM_USE_MIRAGE   0 (default)  every layer takes the stock path
                      1            a layer that may be fused takes the fused path
                      strict       the same, but a layer that may not, or that has no kernel, is an error at start
    VLLM_MIRAGE_OPS   all (default), none, or a comma list of op names: the ops that may be used

Nothing here owns a parameter.  The fused computation is opaque to torch.compile; inside the op a compiled kernel
runs where one was prepared and the batch is small enough, and otherwise PyTorch at stock vLLM's cost.
"""

import os
import weakref
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.library import Library, infer_schema
from vllm import envs
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank
from vllm.distributed.utils import get_pp_indices
from vllm.logger import init_logger
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.utils import default_unquantized_gemm
from vllm.platforms import current_platform
from vllm.triton_utils import HAS_TRITON, tl, triton

logger = init_logger(__name__)

OVERLAY_VERSION = "0.1.0"
OP_SCHEMA = 1  # raise it with every change of an op's schema or fake: it is part of the compile-cache key

# ---------------------------------------------------------------------------------------------------------- switch
SWITCH, OPS_SWITCH = "VLLM_USE_MIRAGE", "VLLM_MIRAGE_OPS"
OPS = ("norm_qkv",)


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
    return f"{OP_SCHEMA}:{'+'.join(sorted({plan.path() for plan in _plans.values()}))}"


# vLLM keys its torch.compile cache on the variables that it knows (envs.compile_factors calls each of these).
# Undeclared, a graph compiled with VLLM_USE_MIRAGE=0 would be loaded from disk for VLLM_USE_MIRAGE=1.
envs.environment_variables.update(
    {
        SWITCH: lambda: os.environ.get(SWITCH, "0"),
        OPS_SWITCH: lambda: os.environ.get(OPS_SWITCH, "all"),
        "VLLM_MIRAGE_GRAPH_STATE": _graph_state,
    }
)

# --------------------------------------------------------------------------------------------------------- kernels
# One entry for each (k, n, dtype, device) prepared in this process: the kernel, or the reason why there is none.
_kernels: dict[tuple[int, int, torch.dtype, torch.device], Any] = {}


def prepare_kernel(k: int, n: int, dtype: torch.dtype, device: torch.device) -> Any:
    """Compile or load the kernel of one weight shape [n, k] now, before any graph capture.

    Returns the kernel, or a sentence saying why there is none.
    """
    key = (k, n, dtype, device)
    if key not in _kernels:
        _kernels[key] = _prepare(k, n, dtype, device)
    return _kernels[key]


def _prepare(k: int, n: int, dtype: torch.dtype, device: torch.device) -> Any:
    if device.type != "cuda":
        return f"the weights are on the {device.type}, not on a GPU"
    try:
        from vllm.model_executor.layers import mirage_kernels
    except ImportError as error:
        return f"mirage_kernels cannot be imported ({error})"
    return mirage_kernels.prepare("rms_norm_linear", k=k, n=n, dtype=dtype, device=device)


def _kernel_for(hidden_states: torch.Tensor, qkv_weight: torch.Tensor, *others: torch.Tensor) -> Any:
    """The kernel that can take this call, or None: the PyTorch body runs."""
    n, k = qkv_weight.shape
    kernel = _kernels.get((k, n, hidden_states.dtype, hidden_states.device))
    if kernel is None or isinstance(kernel, str):
        return None
    if hidden_states.dim() != 2 or not 0 < hidden_states.shape[0] <= kernel.max_tokens:
        return None
    for tensor in (hidden_states, qkv_weight, *others):
        if not tensor.is_contiguous() or tensor.data_ptr() % 16:
            return None
    return kernel


# ----------------------------------------------------------------------------------------------------- eligibility
def why_not_fused(norm_layer: RMSNorm, qkv_proj: QKVParallelLinear) -> str | None:
    """The reason why this pair must stay on the stock path, or None.

    A quantised projection is declined, so vLLM's norm + quantisation fusion loses nothing that it could match.
    """
    if not (current_platform.is_cuda() or current_platform.is_cpu()):
        return f"the platform is {current_platform.device_name}, not CUDA or CPU"
    if envs.VLLM_BATCH_INVARIANT:
        return "batch-invariant mode (VLLM_BATCH_INVARIANT) prescribes its own norm and GEMM"
    return _why_not_norm(norm_layer) or _why_not_projection(norm_layer, qkv_proj) or _why_not_config(qkv_proj)


def _why_not_norm(norm_layer: RMSNorm) -> str | None:
    if type(norm_layer) is not RMSNorm:
        return f"the norm is {type(norm_layer).__name__}, not RMSNorm"
    if norm_layer.variance_size_override is not None:
        return "the norm's variance covers only part of a row"
    if not norm_layer.has_weight:
        return "the norm has no weight"
    return None


def _why_not_projection(norm_layer: RMSNorm, qkv_proj: QKVParallelLinear) -> str | None:
    if type(qkv_proj) is not QKVParallelLinear:  # a LoRA wrapper, a vendor's class
        return f"qkv_proj is {type(qkv_proj).__name__}, not QKVParallelLinear"
    method = qkv_proj.quant_method
    if type(method) is not UnquantizedLinearMethod:  # before any look at .weight: it may not exist
        return f"qkv_proj is quantised ({type(method).__name__})"
    # vLLM 0.28 and later can be told to use another library's GEMM for all unquantised layers.
    if current_platform.is_cuda() and getattr(method, "_gemm_impl", default_unquantized_gemm) is not (
        default_unquantized_gemm
    ):
        return "the linear backend is not vLLM's default"
    if qkv_proj.bias is not None:
        return "qkv_proj has a bias"
    if qkv_proj.gather_output:
        return "qkv_proj gathers its output"
    weight = qkv_proj.weight
    if tuple(weight.shape[1:]) != tuple(norm_layer.weight.shape):
        return f"qkv_proj.weight is {list(weight.shape)} but the norm has {list(norm_layer.weight.shape)}"
    dtypes = {"cuda": (torch.bfloat16, torch.float16), "cpu": (torch.bfloat16, torch.float16, torch.float32)}
    if weight.dtype != norm_layer.weight.dtype or weight.dtype not in dtypes.get(weight.device.type, ()):
        return f"qkv_proj is {weight.dtype} and the norm {norm_layer.weight.dtype} on {weight.device.type}"
    return None


def _why_not_config(qkv_proj: QKVParallelLinear) -> str | None:
    """Reasons in the engine's configuration.  Outside an engine (tests) there is none."""
    config = get_current_vllm_config_or_none()
    if config is None:
        return None
    passes = config.compilation_config.pass_config
    if getattr(passes, "enable_sp", False):  # vLLM <= 0.30: the pass shards the residual that the op would hold
        return "the sequence-parallel pass must see the norm"
    if qkv_proj.tp_size > 1 and getattr(passes, "fuse_allreduce_rms", False):
        return "the all-reduce + RMSNorm fusion must see the norm"
    if config.lora_config is not None and _lora_takes_qkv(config.lora_config.target_modules):
        return "LoRA is enabled and will wrap qkv_proj"
    return None


def _lora_takes_qkv(target_modules: list[str] | None) -> bool:
    """target_modules: module suffixes that LoRA may wrap; None: every module."""
    return target_modules is None or any(name.endswith(("q_proj", "k_proj", "v_proj")) for name in target_modules)


# ----------------------------------------------------------------------------------------------------- norm bodies
@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    residual_out_ptr,
    eps,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """One row: out = (x + residual) / rms · weight, residual_out = x + residual; sums in fp32."""
    columns = tl.arange(0, BLOCK)
    inside = columns < HIDDEN
    offsets = tl.program_id(0).to(tl.int64) * HIDDEN + columns
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        tl.store(residual_out_ptr + offsets, x.to(residual_out_ptr.dtype.element_ty), mask=inside)
    x *= tl.rsqrt(tl.sum(x * x, axis=0) / HIDDEN + eps)
    x = x.to(weight.dtype).to(tl.float32) * weight.to(tl.float32)
    tl.store(out_ptr + offsets, x.to(out_ptr.dtype.element_ty), mask=inside)


def _rms_norm_triton(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One kernel, one row a program, the row in registers: what Inductor makes of the stock layer's add + norm.

    vLLM's C++ op adds in place, so a functional op would need two copies before it.
    """
    x = x.contiguous()
    residual = residual if residual is None else residual.contiguous()
    out = torch.empty_like(x)
    residual_out = x if residual is None else torch.empty_like(residual)
    hidden = weight.shape[0]
    rows = x.numel() // hidden
    if rows:
        block = triton.next_power_of_2(hidden)
        warps = min(16, max(4, block // 256))  # 8 elements a thread: one 16-byte load
        _rms_norm_kernel[(rows,)](
            x, residual, weight, out, residual_out, eps, hidden, block, residual is not None, num_warps=warps
        )
    return out, residual_out


def _rms_norm_native(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with PyTorch's own operators, for the CPU.  Rounds where vLLM's native norm rounds."""
    total = x.to(torch.float32)
    if residual is not None:
        total = total + residual.to(torch.float32)
    normed = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + eps)
    return normed.to(weight.dtype) * weight, total.to(x.dtype)


def _rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(normalised x or x + residual, x + residual), both like x: [num_tokens, hidden]."""
    body = _rms_norm_triton if x.is_cuda and HAS_TRITON else _rms_norm_native
    return body(x, residual, weight, eps)


# --------------------------------------------------------------------------------------------------- ops and fakes
# How often each body ran, counted in Python: a replayed CUDA graph counts once, when it is captured.
_calls = {f"{op}.{body}": 0 for op in OPS for body in ("kernel", "torch")}


def _norm_qkv(
    hidden_states: torch.Tensor, norm_weight: torch.Tensor, qkv_weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """The first layer's op.  [..., hidden] → qkv [..., (q+2kv)·head_dim]."""
    if (kernel := _kernel_for(hidden_states, qkv_weight, norm_weight)) is not None:
        _calls["norm_qkv.kernel"] += 1
        return kernel(hidden_states, None, norm_weight, qkv_weight, eps)[0]
    _calls["norm_qkv.torch"] += 1
    normed, _ = _rms_norm(hidden_states, None, norm_weight, eps)
    return F.linear(normed, qkv_weight)


def _norm_qkv_fake(
    hidden_states: torch.Tensor, norm_weight: torch.Tensor, qkv_weight: torch.Tensor, eps: float
) -> torch.Tensor:
    return hidden_states.new_empty((*hidden_states.shape[:-1], qkv_weight.shape[0]))


def _add_norm_qkv(
    hidden_states: torch.Tensor,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    qkv_weight: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The other layers' op: (qkv [..., (q+2kv)·head_dim], hidden_states + residual [..., hidden])."""
    if (kernel := _kernel_for(hidden_states, qkv_weight, norm_weight, residual)) is not None:
        _calls["norm_qkv.kernel"] += 1
        return kernel(hidden_states, residual, norm_weight, qkv_weight, eps)
    _calls["norm_qkv.torch"] += 1
    normed, residual_out = _rms_norm(hidden_states, residual, norm_weight, eps)
    return F.linear(normed, qkv_weight), residual_out


def _add_norm_qkv_fake(
    hidden_states: torch.Tensor,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    qkv_weight: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    qkv = hidden_states.new_empty((*hidden_states.shape[:-1], qkv_weight.shape[0]))
    return qkv, torch.empty_like(residual, memory_format=torch.contiguous_format)


# Two ops, not one with an optional residual: that one would return its own input, which a functional op may not.
# The weights are arguments: with a layer's name instead, Inductor could not reuse one compiled piece for all layers.
_library = Library("vllm_mirage", "FRAGMENT")  # the registrations live as long as this object
for _name, _body, _fake in (
    ("norm_qkv", _norm_qkv, _norm_qkv_fake),
    ("add_norm_qkv", _add_norm_qkv, _add_norm_qkv_fake),
):
    _library.define(_name + infer_schema(_body, mutates_args=()))
    # One body for CPU and CUDA, never decomposed by the tracer.
    _library.impl(_name, _body, "CompositeExplicitAutograd")
    _library._register_fake(_name, _fake)


# ---------------------------------------------------------------------------------------------------------- module
class FusedRMSNormQKV:
    """A decoder layer's input_layernorm and qkv_proj as one op, by reference.

    A plain object on purpose.  As an nn.Module it would register both layers a second time: new names in
    named_parameters() and state_dict(), and LoRA would wrap the second path and be ignored.
    Raises ValueError for a pair that may not be fused.
    """

    def __init__(self, norm_layer: RMSNorm, qkv_proj: QKVParallelLinear) -> None:
        if reason := why_not_fused(norm_layer, qkv_proj):
            raise ValueError(f"RMSNorm and QKV projection cannot be fused: {reason}")
        self.norm_layer = norm_layer
        self.qkv_proj = qkv_proj
        # After loading, vLLM's CPU backend packs the weight and leaves `qkv_proj.weight` empty: keep the loaded
        # parameter there, and only there.  On CUDA the weight is looked up at each call, so that reloading and
        # sleep mode stay right.
        self._cpu_weight = qkv_proj.weight if qkv_proj.weight.device.type == "cpu" else None

    def __call__(self, hidden_states: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden_states, residual: [num_tokens, hidden] → (qkv, the new residual)."""
        norm_weight, eps = self.norm_layer.weight, self.norm_layer.variance_epsilon
        qkv_weight = self.qkv_proj.weight if self._cpu_weight is None else self._cpu_weight
        if residual is None:
            return torch.ops.vllm_mirage.norm_qkv(hidden_states, norm_weight, qkv_weight, eps), hidden_states
        return torch.ops.vllm_mirage.add_norm_qkv(hidden_states, residual, norm_weight, qkv_weight, eps)


# ------------------------------------------------------------------------------------------------- plan of a layer
@dataclass(frozen=True)
class LayerPlan:
    """What was decided for one op of one layer when it was built."""

    name: str  # "model.layers.0"
    op: str
    layer: weakref.ReferenceType
    fused: FusedRMSNormQKV | None
    kernel: str | None
    reason: str | None  # why the stock path, or why no kernel

    def replaced(self) -> str | None:
        """The class now standing in qkv_proj's place, if the layer was changed after it was built."""
        layer = self.layer()
        if self.fused is None or layer is None or layer.self_attn.qkv_proj is self.fused.qkv_proj:
            return None
        return type(layer.self_attn.qkv_proj).__name__

    def path(self) -> str:
        return "stock" if self.fused is None or self.replaced() else "fused"

    def report(self) -> dict[str, str | None]:
        kernel, reason = self.kernel, self.reason
        if replacement := self.replaced():
            kernel, reason = None, f"qkv_proj was replaced by {replacement} after the layer was built"
        return {"name": self.name, "op": self.op, "path": self.path(), "kernel": kernel, "reason": reason}


_plans: dict[str, LayerPlan] = {}


def fuse_norm_qkv(layer: Any, forward: Any, num_layers: int) -> FusedRMSNormQKV | None:
    """Decide the path of a decoder layer that was just built; None is the stock path.

    forward: the forward that knows `fused_norm_qkv`; a subclass with another one takes the stock path.
    num_layers: decoder layers of the whole model; after this rank's last one the engine's INFO line is logged.
    Raises RuntimeError with VLLM_USE_MIRAGE=strict when the layer may not be fused or has no kernel.
    """
    name = layer.self_attn.qkv_proj.prefix.removesuffix(".self_attn.qkv_proj")
    if name in _plans:  # a new model in this process: the former one's plans and calls are history
        _plans.clear()
        _calls.update(dict.fromkeys(_calls, 0))
    plan = _plan_norm_qkv(name, layer, forward)
    _plans[name] = plan
    if mirage_switch() == "strict" and plan.kernel is None and plan.op in enabled_ops():
        raise RuntimeError(
            f"{SWITCH}=strict, but {name} cannot run a Mirage kernel: {plan.reason}; "
            f"export {SWITCH}=1 to let it run without"
        )
    _answer_collective_rpc()
    _log_when_last(name, num_layers)
    return plan.fused


def _plan_norm_qkv(name: str, layer: Any, forward: Any) -> LayerPlan:
    fused, kernel, reason = None, None, _why_not_layer(layer, forward)
    if reason is None:
        fused = FusedRMSNormQKV(layer.input_layernorm, layer.self_attn.qkv_proj)
        weight = layer.self_attn.qkv_proj.weight
        n, k = weight.shape
        prepared = prepare_kernel(k, n, weight.dtype, weight.device)
        if isinstance(prepared, str):
            reason = f"no kernel for {k}→{n} {str(weight.dtype).removeprefix('torch.')}: {prepared}"
        else:
            kernel = prepared.name
    return LayerPlan(name, "norm_qkv", weakref.ref(layer), fused, kernel, reason)


def _why_not_layer(layer: Any, forward: Any) -> str | None:
    if not is_mirage_enabled():
        return f"{SWITCH}=0"
    if "norm_qkv" not in enabled_ops():
        return f"{OPS_SWITCH} leaves norm_qkv out"
    if type(layer).forward is not forward:
        return f"{type(layer).__name__} has a forward of its own"
    return why_not_fused(layer.input_layernorm, layer.self_attn.qkv_proj)


# ---------------------------------------------------------------------------------------------------------- report
def mirage_report() -> dict[str, Any]:
    """What runs in this process, ready for JSON.

    layers: one entry for each decoder layer of the model built last on this rank.  calls: how often each body of
    an op ran in Python since that model was begun (a replayed CUDA graph counts once, when it is captured).
    """
    return {
        "switch": mirage_switch(),
        "overlay_version": OVERLAY_VERSION,
        "rank": torch.distributed.get_rank() if torch.distributed.is_initialized() else 0,
        "layers": [plan.report() for plan in _plans.values()],
        "kernels": [_describe(key, kernel) for key, kernel in _kernels.items()],
        "calls": dict(_calls),
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


def _describe(key: tuple[int, int, torch.dtype, torch.device], kernel: Any) -> dict[str, Any]:
    k, n, dtype, device = key
    shape = {"k": k, "n": n, "dtype": str(dtype).removeprefix("torch."), "device": str(device)}
    if isinstance(kernel, str):
        return {**shape, "kernel": None, "reason": kernel}
    return {**shape, "kernel": kernel.name, "max_tokens": kernel.max_tokens, "source_hash": kernel.source_hash}


def _log_when_last(name: str, num_layers: int) -> None:
    """One INFO line for each engine and pipeline rank, when the rank's last layer is built."""
    group = get_pp_group()
    stem, _, index = name.rpartition(".")
    _, end = get_pp_indices(num_layers, group.rank_in_group, group.world_size)
    if index == str(end - 1) and get_tensor_model_parallel_rank() == 0:
        rank = f" on pipeline rank {group.rank_in_group}" if group.world_size > 1 else ""
        logger.info("Mirage: %s%s", _summary([p for p in _plans.values() if p.name.startswith(f"{stem}.")]), rank)


def _summary(plans: list[LayerPlan]) -> str:
    """ "28 of 28 layers fused (norm_qkv, kernel …)", or why not."""
    fused = sum(plan.fused is not None for plan in plans)
    notes = []
    for plan in plans:
        note = f"kernel {plan.kernel}" if plan.kernel else str(plan.reason)
        if plan.fused is not None:
            note = f"{plan.op}, {note}" + ("" if plan.kernel else "; PyTorch runs inside the op")
        if note not in notes:
            notes.append(note)
    return f"{fused} of {len(plans)} layers fused ({'; '.join(notes)})"
