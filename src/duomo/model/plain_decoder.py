"""A plain fp32 decoder in service: a step through the engine's cache is one native call.

Borrowed weights stay the modules' own parameters where they lie: what is written into them is seen at once,
and a module or parameter put in another's place, or moved, is noticed before a step. Panels are a copy, for
weights that do not change any more. With gradients, on another device or below fp32, the layers are asked one
by one, in torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from duomo import kernels
from duomo.kernels import BankWeights, DenseForm, DenseWeight, FusedDecoder, LayerWeights, NextTokens
from duomo.model.attention import Attention
from duomo.model.decoder import Decoder, DecoderLayer
from duomo.model.ernie import Embedding, Ernie
from duomo.model.experts import MLP, ExpertBank, Experts, Router
from duomo.model.fused_decoder import OneCallDecoder, sizes_of
from duomo.model.layers import Linear, RMSNorm
from duomo.model.seen import Seen, is_plain


def fuse(model: Ernie, form: DenseForm = DenseForm.BORROWED) -> None:
    """Gives a plain model a decoder that is one call where it can be; any other model stays as it is."""
    is_wide_enough = model.config.head_dim % kernels.HEAD_MULTIPLE == 0
    if not kernels.is_native or not is_wide_enough or type(model.decoder) is not Decoder:
        return
    model.decoder = decoder = PlainDecoder(model.decoder, form)
    head = model.embed if model.head is None else model.head
    if form is not DenseForm.BORROWED and is_plain(head, Embedding):
        head.panels = DenseWeight(head.weight, form=form)
        if is_plain(model.embed, Embedding):
            decoder.ends = (model.embed.weight, head.panels)


def is_bfloat16(model: Ernie) -> bool:
    """All matrices are fp32 of bf16 values, so panels lose nothing; routers stay fp32."""
    routers = {id(x) for router in model.modules() if isinstance(router, Router) for x in router.parameters()}
    matrices = [x for x in model.parameters() if x.ndim > 1 and id(x) not in routers]
    return all(
        x.dtype == torch.float32 and not bool((x.detach().view(torch.int32) & 0xFFFF).any()) for x in matrices
    )


class PlainDecoder(OneCallDecoder):
    def __init__(self, decoder: Decoder, form: DenseForm = DenseForm.BORROWED) -> None:
        super().__init__(decoder)
        self.form = form
        self.ends: tuple[Tensor, DenseWeight] | None = None  # embedding and head, where they are copies, too
        self._fused: FusedDecoder | None = None
        self._seen: Seen | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For copies: the native part is made again."""
        return {**self.__dict__, "_fused": None, "_seen": None}

    def _fused_for(self, hidden_TD: Tensor) -> FusedDecoder | None:
        if torch.is_grad_enabled() or hidden_TD.dtype != torch.float32 or hidden_TD.device.type != "cpu":
            return None
        is_copy = self.form is not DenseForm.BORROWED and self._fused is not None
        if not is_copy and (self._seen is None or not self._seen.still_stands()):
            self._build()
        return self._fused

    def next(self, num_sequences: int, tokens: NextTokens, last_position: int) -> bool:
        """A step of one token of text a sequence, ids to logits. False where it is not one native call."""
        if self._fused is None or not self._fused.has_ends:
            return False
        self._fused.next(num_sequences, tokens, self._angles.addresses(last_position))
        return True

    def _build(self) -> None:
        self._seen, self._fused = Seen(self, has_tensors=True), None
        layers = [_layer_weights(layer, self.form) for layer in self.layers]
        whole = [layer for layer in layers if layer is not None]
        if len(whole) == len(layers) and is_plain(self.norm, RMSNorm):
            self._fused = FusedDecoder(sizes_of(self.config), self.norm.weight, whole, self.ends)


def _layer_weights(layer: nn.Module, form: DenseForm) -> LayerWeights | None:
    """None where a module is not the plain one: an adapter's, or a recipe's."""
    assert isinstance(layer, DecoderLayer)
    attention, mlp = layer.attention, layer.mlp
    are_norms = is_plain(layer.input_norm, RMSNorm) and is_plain(layer.post_norm, RMSNorm)
    if not are_norms or not is_plain(attention, Attention):
        return None
    norms = (layer.input_norm.weight, layer.post_norm.weight)
    linears = _linears(form, attention.q, attention.k, attention.v, attention.o)
    if linears is None:
        return None
    q, k, v, o = linears
    if isinstance(mlp, MLP):
        dense = _mlp_weights(mlp, form)
        return None if dense is None else LayerWeights(norms, (q, k, v, o), None, None, dense)
    if not is_plain(mlp, Experts) or not isinstance(mlp.text, ExpertBank):
        return None
    text, vision = _bank_weights(mlp.text, form), _bank_weights(mlp.vision, form)
    shared = None if mlp.shared is None else _mlp_weights(mlp.shared, form)
    if text is None or (mlp.vision and vision is None) or (mlp.shared and shared is None):
        return None
    return LayerWeights(norms, (q, k, v, o), text, vision, shared)


def _linears(form: DenseForm, *modules: nn.Module) -> list[DenseWeight] | None:
    if not all(is_plain(module, Linear) for module in modules):
        return None
    return [DenseWeight(module.weight, module.bias, form) for module in modules]  # type: ignore[arg-type]


def _mlp_weights(mlp: nn.Module, form: DenseForm) -> tuple[DenseWeight, DenseWeight, DenseWeight] | None:
    if not is_plain(mlp, MLP):
        return None
    linears = _linears(form, mlp.gate, mlp.up, mlp.down)  # type: ignore[arg-type]
    return None if linears is None else (linears[0], linears[1], linears[2])


def _bank_weights(bank: nn.Module | None, form: DenseForm) -> BankWeights | None:
    if (
        not isinstance(bank, ExpertBank)
        or not is_plain(bank, ExpertBank)
        or not is_plain(bank.router, Router)
    ):
        return None
    gate_up, down = (DenseWeight(x, form=form) for x in (bank.gate_up, bank.down))
    return BankWeights(bank.router.weight, bank.router.bias, gate_up, down)
