"""The decoder: layers of attention and experts around a residual stream.

x += attention(norm(x));  x += mlp_or_experts(norm(x))

In training the last MLP or mixture is computed only of tokens whose logits are wanted: nothing else of what
it adds is seen, so losses and gradients are the same. Its routers are asked about all tokens, as their own
losses and counts need.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from duomo.model.attention import Attention
from duomo.model.config import ModelConfig
from duomo.model.experts import MLP, Experts
from duomo.model.inputs import Batch, KVCache
from duomo.model.layers import RMSNorm
from duomo.model.rope import Rotation, decoder_rotation


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, has_experts: bool) -> None:
        super().__init__()
        self.input_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.post_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp: Experts | MLP = (
            Experts(config)
            if has_experts
            else MLP(config.hidden_size, config.intermediate_size, config.use_bias)
        )

    def forward(
        self, hidden_TD: Tensor, rotation: Rotation, layer_index: int, batch: Batch, cache: KVCache
    ) -> Tensor:
        attended = self.attention(self.input_norm(hidden_TD), rotation, layer_index, batch, cache)
        hidden_TD = hidden_TD + attended
        chosen_TK = None if batch.expert_ids_LTK is None else batch.expert_ids_LTK[layer_index]
        return hidden_TD + self.mlp(self.post_norm(hidden_TD), batch, chosen_TK)  # type: ignore[no-any-return]


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(DecoderLayer(config, has_experts) for has_experts in config.expert_layers)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, hidden_TD: Tensor, batch: Batch, cache: KVCache) -> Tensor:
        """Final states, normed, of all tokens, or of `batch.logit_rows` where only some are asked for."""
        rotation = decoder_rotation(batch.positions_3T, self.config)
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            if index == last and torch.is_grad_enabled():
                batch = replace(batch, mixed_rows=batch.logit_rows)
            hidden_TD = layer(hidden_TD, rotation, index, batch, cache)
        if batch.logit_rows is not None:
            hidden_TD = hidden_TD.index_select(0, batch.logit_rows)
        return self.norm(hidden_TD)  # type: ignore[no-any-return]
