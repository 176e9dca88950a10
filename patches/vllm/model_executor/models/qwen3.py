# SPDX-License-Identifier: Apache-2.0
"""Qwen3 whose decoder layer can take the fused path: vLLM's own module plus one subclass.

The release's own file stands beside this one as `qwen3_stock.py` (install.sh moves it there) and is used as it
is: its attention, MLP, model, weight loading.  Only `Qwen3DecoderLayer` is subclassed, and its stock forward runs
whenever none of its ops is fused, which is always so with VLLM_USE_MIRAGE=0.
"""

import torch
from vllm.model_executor.layers import fused_mirage_ops as mirage

NO_STOCK_FILE = (
    "vLLM's own qwen3.py was expected beside the Mirage overlay as qwen3_stock.py, but it is missing or is the "
    "overlay itself: reinstall vLLM, then run ./install.sh in the vLLM-Mirage checkout"
)

try:
    from .qwen3_stock import *  # noqa: F403  everything that other vLLM files import from this module
except ModuleNotFoundError as error:
    if error.name != f"{__package__}.qwen3_stock":
        raise
    raise ImportError(NO_STOCK_FILE) from None

from . import qwen3_stock as stock  # noqa: E402  after the check above

if not hasattr(stock, "Qwen3ForCausalLM"):
    raise ImportError(NO_STOCK_FILE)


class Qwen3DecoderLayer(stock.Qwen3DecoderLayer):
    """norm → qkv → attention → o_proj → norm → mlp, each step an op of the fused path or vLLM's own modules."""

    def __init__(self, config, *args, **kwargs) -> None:
        super().__init__(config, *args, **kwargs)
        # Stand-ins by op; empty: stock path.  Plain objects, not modules: they add no parameter and no name.
        self.fused = mirage.fuse_layer(
            self, Qwen3DecoderLayer.forward, stock.Qwen3Attention, stock.Qwen3MLP, config.num_hidden_layers
        )
        self.fused_norm_qkv = self.fused.get("norm_qkv")

    def forward(
        self,
        positions: torch.Tensor,  # [num_tokens]; [3, num_tokens] with mrope
        hidden_states: torch.Tensor,  # [num_tokens, hidden]
        residual: torch.Tensor | None,  # [num_tokens, hidden]; None in the first layer, and where down_proj has added it
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        # LoRA, for one, puts a wrapper in a projection's place after the layer was built.
        fused = {op: stand_in for op, stand_in in self.fused.items() if stand_in.in_place(self)}
        if not fused:
            return super().forward(positions, hidden_states, residual)
        attn, mlp = self.self_attn, self.mlp

        if "norm_qkv" in fused:
            qkv, residual = fused["norm_qkv"](hidden_states, residual)  # [num_tokens, (q+2kv)·head_dim], [num_tokens, hidden]
        else:
            hidden_states, residual = normalised(self.input_layernorm, hidden_states, residual)
            qkv, _ = attn.qkv_proj(hidden_states)

        if "attention" in fused and positions.dim() == 1 and positions.dtype == torch.int64:
            hidden_states = fused["attention"](positions, qkv)  # [num_tokens, q·head_dim]
        else:
            q, k, v = qkv.split([attn.q_size, attn.kv_size, attn.kv_size], dim=-1)
            q = attn.q_norm(q.view(*q.shape[:-1], -1, attn.head_dim)).view(q.shape)  # normalised per head
            k = attn.k_norm(k.view(*k.shape[:-1], -1, attn.head_dim)).view(k.shape)
            q, k = attn.rotary_emb(positions, q, k)
            hidden_states = attn.attn(q, k, v)

        if "o_proj" in fused:
            hidden_states, residual = fused["o_proj"](hidden_states, residual)  # [num_tokens, hidden], the same or None: added
        else:
            hidden_states, _ = attn.o_proj(hidden_states)

        if "norm_gate_up" in fused:
            hidden_states, residual = fused["norm_gate_up"](hidden_states, residual)  # [num_tokens, intermediate], …
        else:
            hidden_states, residual = normalised(self.post_attention_layernorm, hidden_states, residual)
            hidden_states = mlp.act_fn(mlp.gate_up_proj(hidden_states)[0])

        if "down_proj" in fused:
            return fused["down_proj"](hidden_states, residual)
        return mlp.down_proj(hidden_states)[0], residual


def normalised(
    norm: torch.nn.Module, hidden_states: torch.Tensor, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm of hidden_states + residual, that sum), as stock does it: without residual hidden_states are the sum."""
    return (norm(hidden_states), hidden_states) if residual is None else norm(hidden_states, residual)


stock.Qwen3DecoderLayer = Qwen3DecoderLayer  # up to 0.31 the model looks the layer up in its module
stock.ALL_DECODER_LAYER_TYPES["attention"] = Qwen3DecoderLayer
if hasattr(stock.Qwen3Model, "decoder_layer_type"):  # from 0.32 on, in its class
    stock.Qwen3Model.decoder_layer_type = Qwen3DecoderLayer
