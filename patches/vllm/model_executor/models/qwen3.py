# SPDX-License-Identifier: Apache-2.0
"""Qwen3 whose decoder layer can take the fused path: vLLM's own module plus one subclass.

The release's own file stands beside this one as `qwen3_stock.py` (install.sh moves it there) and is used as it
is: its attention, MLP, model, weight loading.  Only `Qwen3DecoderLayer` is subclassed, and its stock forward runs
whenever the layer has no `fused_norm_qkv`, which is always so with VLLM_USE_MIRAGE=0.
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
    """norm → qkv → attention → o_proj → norm → mlp, the first two as one op where the layer may be fused."""

    def __init__(self, config, *args, **kwargs) -> None:
        super().__init__(config, *args, **kwargs)
        # None: stock path.  A plain object, not a module: it adds no parameter and no name.
        self.fused_norm_qkv = mirage.fuse_norm_qkv(self, Qwen3DecoderLayer.forward, config.num_hidden_layers)

    def forward(
        self,
        positions: torch.Tensor,  # [num_tokens]; [3, num_tokens] with mrope
        hidden_states: torch.Tensor,  # [num_tokens, hidden]
        residual: torch.Tensor | None,  # [num_tokens, hidden]; None in the first layer
    ) -> tuple[torch.Tensor, torch.Tensor]:
        attn, fused = self.self_attn, self.fused_norm_qkv
        # LoRA, for one, puts a wrapper in the projection's place after the layer was built.
        if fused is None or fused.qkv_proj is not attn.qkv_proj:
            return super().forward(positions, hidden_states, residual)

        qkv, residual = fused(hidden_states, residual)  # [num_tokens, (q+2kv)·head_dim], [num_tokens, hidden]

        q, k, v = qkv.split([attn.q_size, attn.kv_size, attn.kv_size], dim=-1)
        q = attn.q_norm(q.view(*q.shape[:-1], -1, attn.head_dim)).view(q.shape)  # normalised per head
        k = attn.k_norm(k.view(*k.shape[:-1], -1, attn.head_dim)).view(k.shape)
        q, k = attn.rotary_emb(positions, q, k)
        hidden_states, _ = attn.o_proj(attn.attn(q, k, v))  # [num_tokens, hidden]

        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        hidden_states = self.mlp(hidden_states)
        return hidden_states, residual


stock.Qwen3DecoderLayer = Qwen3DecoderLayer  # up to 0.31 the model looks the layer up in its module
stock.ALL_DECODER_LAYER_TYPES["attention"] = Qwen3DecoderLayer
if hasattr(stock.Qwen3Model, "decoder_layer_type"):  # from 0.32 on, in its class
    stock.Qwen3Model.decoder_layer_type = Qwen3DecoderLayer
