# SPDX-License-Identifier: Apache-2.0
"""How vLLM compiles the fused path: where its graphs are split, and what runs beyond the kernels.

vLLM compiles a model once for each range of token counts.  One range is made to end where the kernels do, or where CUDA graphs do.
Beyond it the ops are replaced by their PyTorch bodies before Inductor lowers the graph, so that it compiles them as it compiles the
stock layer (the kernels of a prefill are then stock's, one for one), and no call of Python remains in between.  Where there are no
ranges (eager mode) the ops stay, and run those bodies by themselves.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch._inductor.pattern_matcher import CallFunctionVarArgs, Match, PatternMatcherPass, register_graph_pattern
from vllm.compilation.passes.inductor_pass import InductorPass
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


def add_norm_gate_up_silu(hidden_states, residual, norm_weight, gate_up_weight, eps):
    gate_up, residual = add_norm_qkv(hidden_states, residual, norm_weight, gate_up_weight, eps)
    return silu_and_mul_native(gate_up), residual


def linear(x, weight, name):
    return F.linear(x, weight)


def qk_norm_rope(qkv, positions, q_weight, k_weight, cos_sin_cache, eps, num_heads, num_kv_heads, layer_name):
    return qk_norm_rope_native(qkv, positions, q_weight, k_weight, cos_sin_cache, eps, num_heads, num_kv_heads)


BODIES: dict[Any, Callable[..., Any]] = {
    getattr(torch.ops.vllm_mirage, body.__name__).default: body
    for body in (norm_qkv, add_norm_qkv, add_norm_gate_up_silu, linear, qk_norm_rope)
}


def last_small_batch(compilation: Any) -> int:
    """Tokens of the largest batch whose graph keeps the ops.

    A batch that no CUDA graph holds calls each op through Python: prompts of some 20 tokens then took 37 instead of 21 ms to the first
    token (0.6B, graphs up to 8 tokens, H200).
    """
    return SMALL_BATCH if current_platform.is_cpu() else min(SMALL_BATCH, compilation.max_cudagraph_capture_size or 0)


class LargeBatches(InductorPass):
    """Replaces the ops by their bodies in graphs for more than `last` tokens."""

    def __init__(self, last: int) -> None:
        self.last = last

    def is_applicable_for_range(self, compile_range: Any) -> bool:
        return compile_range.start > self.last

    def uuid(self) -> str:
        bodies = (*BODIES.values(), qk_norm_rope_native, rms_norm_native, silu_and_mul_native)
        return InductorPass.hash_source(self, str(self.last), *bodies)

    def __call__(self, graph: fx.Graph) -> None:
        patterns = PatternMatcherPass("mirage_large_batches")
        register_graph_pattern(CallFunctionVarArgs(list(BODIES)), pass_dict=patterns)(self._replace)
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


def settle(attention: bool) -> None:
    """Makes the compilation of the engine that is being built fit our ops.  Repeating it changes nothing."""
    config = get_current_vllm_config_or_none()
    if config is None:
        return
    compilation = config.compilation_config
    if attention and compilation.splitting_ops and SPLITTING_OP not in compilation.splitting_ops:
        compilation.splitting_ops.append(SPLITTING_OP)
    if compilation.mode != CompilationMode.VLLM_COMPILE:  # no ranges
        return
    ends, passes = getattr(compilation, "compile_ranges_endpoints", None), compilation.inductor_compile_config
    last = last_small_batch(compilation)
    if ends and max(ends) > last and current_platform.pass_key not in passes:  # a user's own pass keeps its place
        compilation.compile_ranges_endpoints = sorted({*ends, *([last] if last else [])})
        passes[current_platform.pass_key] = LargeBatches(last)
