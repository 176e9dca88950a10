# SPDX-License-Identifier: Apache-2.0
"""How vLLM compiles the fused path: where its graphs are split, and what runs beyond the kernels.

vLLM compiles a model once for each range of token counts.  One range is made to end where the kernels do, or where CUDA graphs do.
Beyond it the ops are replaced by their PyTorch bodies before Inductor lowers the graph, so that it compiles them as it compiles the
stock layer (the kernels of a prefill are then stock's, one for one), and no call of Python remains in between.  Where there are no
ranges (eager mode) the ops stay, and run those bodies by themselves.

Where projections add the residual, a range more ends where their kernels do, and beyond it the GEMMs' ops are replaced: Inductor then adds
in the norm that follows, as in the stock layer, while attention keeps its kernel.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch._inductor.pattern_matcher import CallFunctionVarArgs, Match, PatternMatcherPass, register_graph_pattern
from vllm.compilation.passes.inductor_pass import InductorPass, get_pass_context
from vllm.config import CompilationMode, get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.model_executor.layers.mirage_ops import qk_norm_rope_native, rms_norm_native, silu_and_mul_native
from vllm.platforms import current_platform

logger = init_logger(__name__)

SMALL_BATCH = 64  # tokens; no kernel takes more
SPLITTING_OP = "vllm_mirage::decode_attention"
"""Named beside vLLM's own attention ops: piecewise graphs must not capture what depends on the kind of batch."""


def norm_qkv(hidden_states, norm_weight, qkv_weight, eps):
    return F.linear(rms_norm_native(hidden_states, None, norm_weight, eps)[0], qkv_weight)


def add_norm_qkv(hidden_states, residual, norm_weight, qkv_weight, eps):
    normed, residual = rms_norm_native(hidden_states, residual, norm_weight, eps)
    return F.linear(normed, qkv_weight), residual


def norm_gate_up_silu(hidden_states, norm_weight, gate_up_weight, eps):
    return silu_and_mul_native(norm_qkv(hidden_states, norm_weight, gate_up_weight, eps))


def add_norm_gate_up_silu(hidden_states, residual, norm_weight, gate_up_weight, eps):
    gate_up, residual = add_norm_qkv(hidden_states, residual, norm_weight, gate_up_weight, eps)
    return silu_and_mul_native(gate_up), residual


def linear(x, weight, name):
    return F.linear(x, weight)


def linear_residual(x, weight, residual, name):
    return F.linear(x, weight) + residual


def qk_norm_rope(qkv, positions, q_weight, k_weight, cos_sin_cache, eps, num_heads, num_kv_heads, layer_name):
    return qk_norm_rope_native(qkv, positions, q_weight, k_weight, cos_sin_cache, eps, num_heads, num_kv_heads)


BODIES: dict[Any, Callable[..., Any]] = {
    getattr(torch.ops.vllm_mirage, body.__name__).default: body
    for body in (norm_qkv, add_norm_qkv, norm_gate_up_silu, add_norm_gate_up_silu, linear, linear_residual, qk_norm_rope)
}
ATTENTION = torch.ops.vllm_mirage.qk_norm_rope.default
"""The op of BODIES that belongs to attention's kernel, not to a GEMM's."""


def last_small_batch(compilation: Any) -> int:
    """Tokens of the largest batch whose graph keeps the ops.

    A batch that no CUDA graph holds calls each op through Python: prompts of some 20 tokens then took 37 instead of 21 ms to the first
    token (0.6B, graphs up to 8 tokens, H200).
    """
    return SMALL_BATCH if current_platform.is_cpu() else min(SMALL_BATCH, compilation.max_cudagraph_capture_size or 0)


class LargeBatches(InductorPass):
    """Replaces the ops by their bodies in graphs for more than `last` tokens; those of the GEMMs for more than `gemms`, if that is less."""

    def __init__(self, last: int, gemms: int | None = None) -> None:
        self.last = last
        self.gemms = last if gemms is None else min(gemms, last)

    def is_applicable_for_range(self, compile_range: Any) -> bool:
        return compile_range.start > self.gemms

    def uuid(self) -> str:
        bodies = (*BODIES.values(), qk_norm_rope_native, rms_norm_native, silu_and_mul_native)
        return InductorPass.hash_source(self, str((self.last, self.gemms)), *bodies)

    def __call__(self, graph: fx.Graph) -> None:
        every = self.gemms == self.last or get_pass_context().compile_range.start > self.last
        patterns = PatternMatcherPass("mirage_large_batches")
        replaced = [op for op in BODIES if every or op is not ATTENTION]
        register_graph_pattern(CallFunctionVarArgs(replaced), pass_dict=patterns)(self._replace)
        patterns.apply(graph)

    @staticmethod
    def _replace(match: Match, *_: Any, **__: Any) -> None:
        [node] = match.nodes
        body, given = BODIES[node.target], node.args
        # tensors are traced; numbers and names are constants of the body, which ignores the names
        at = [i for i, value in enumerate(given) if isinstance(value, fx.Node) and isinstance(value.meta["val"], torch.Tensor)]

        def traced(*tensors: torch.Tensor) -> Any:
            arguments = list(given)
            for i, tensor in zip(at, tensors, strict=True):
                arguments[i] = tensor
            return body(*arguments)

        try:
            match.replace_by_example(traced, [given[i] for i in at])
        except Exception as error:  # a torch that traces otherwise: the op stays, and runs its body by itself
            logger.warning("Mirage: %s stays opaque in graphs for large batches (%s: %s)", node.target, type(error).__name__, error)


def why_not_replaced() -> str | None:
    """Why the ops cannot be replaced beyond their kernels in the engine that is being built, or None."""
    config = get_current_vllm_config_or_none()
    compilation = None if config is None else config.compilation_config
    if compilation is None or compilation.mode != CompilationMode.VLLM_COMPILE or not compilation.compile_ranges_endpoints:
        return "vLLM does not compile for ranges of token counts"
    if type(compilation.inductor_compile_config.get(current_platform.pass_key)) not in (type(None), LargeBatches):
        return "a pass of the user's own has the place of ours"
    return None


def settle(attention: bool, gemms: int | None = None) -> None:
    """Makes the compilation of the engine that is being built fit our ops.  Repeating it changes nothing.

    gemms: tokens beyond which the GEMMs' ops are replaced as well.
    """
    config = get_current_vllm_config_or_none()
    if config is None:
        return
    compilation = config.compilation_config
    if attention and compilation.splitting_ops and SPLITTING_OP not in compilation.splitting_ops:
        compilation.splitting_ops.append(SPLITTING_OP)
    if why_not_replaced() is not None:
        return
    ends, passes = compilation.compile_ranges_endpoints, compilation.inductor_compile_config
    before = passes.get(current_platform.pass_key)
    limits = [limit for limit in (gemms, before and before.gemms) if limit is not None]
    change = LargeBatches(last_small_batch(compilation), min(limits, default=None))
    if max(ends) > change.gemms:
        compilation.compile_ranges_endpoints = sorted({*ends, *(n for n in (change.gemms, change.last) if 0 < n < max(ends))})
        passes[current_platform.pass_key] = change
