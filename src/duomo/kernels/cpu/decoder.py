"""All layers of a packed or plain decoder as one native call, by csrc/decoder.cpp.

The specification is `model/decoder.py`, module by module: `tests/kernels/test_decoder.py` asks for its bits
where matrices are packed, `test_dense.py` for its numbers where they are plain.
Pointers go down unchecked, so shapes are settled here; rows, slots and pages before the first layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from duomo.errors import KernelError
from duomo.kernels.cpu.paged_attention import STORED
from duomo.kernels.weights import DenseWeight, TrellisWeight

Matrix = TrellisWeight | DenseWeight


class BankWeights(NamedTuple):
    """Router [E, D] and correction bias [E], fp32; gate_up [E, 2F, D], down [E, D, F]."""

    router: Tensor
    bias: Tensor
    gate_up: Matrix
    down: Matrix


class LayerWeights(NamedTuple):
    """Norms [D] fp32; q, k, v, o; the banks; gate, up, down of the dense or shared MLP. None: no such.

    Matrices are packed or plain, all of a model alike.
    """

    norms: tuple[Tensor, Tensor]
    attention: tuple[Matrix, Matrix, Matrix, Matrix]
    text: BankWeights | None
    vision: BankWeights | None
    mlp: tuple[Matrix, Matrix, Matrix] | None


class DecoderSizes(NamedTuple):
    width: int
    num_heads: int
    groups: int
    head_dim: int
    chosen: int
    eps: float
    norm_min: float


class PackedStep(NamedTuple):
    """A step's tokens, `T` of `S` sequences: angles fp32 [T, H/2], the rest int64.

    store is [2, layers, slots, G, H] fp32, bf16 or int8; scale fp32 [2, layers, slots, G] for int8 or None.
    `text_rows`, `vision_rows` and `wanted_rows` rise; the last have their final states asked for, None all.
    """

    cos_TP: Tensor
    sin_TP: Tensor
    store: Tensor
    scale: Tensor | None
    page_size: int
    slots_T: Tensor
    page_table_SM: Tensor
    sequence_T: Tensor
    num_keys_T: Tensor
    text_rows: Tensor
    vision_rows: Tensor
    wanted_rows: Tensor | None = None


class NextTokens:
    """Room for a step in which each of up to `capacity` sequences computes one token of text.

    numbers  int64 [3, S]: the token's id, its position, and how many keys it sees, itself included
    pages    int64 [S, M]: the pages of each sequence; what follows them is not read, but lies in the cache
    logits   fp32 [S, V], and `likeliest` int64 [S], the first of the largest of each row: what comes out

    It is made once and for one cache, since finding an array's address takes longer than filling it.
    """

    def __init__(
        self, capacity: int, width: int, vocab_size: int, store: Tensor, scale: Tensor | None, page_size: int
    ) -> None:
        self.capacity, self.width = capacity, width
        self.numbers = np.zeros((3, capacity), np.int64)
        self.pages = np.zeros((capacity, width), np.int64)
        self.logits = np.zeros((capacity, vocab_size), np.float32)
        self.likeliest = np.zeros(capacity, np.int64)
        self.inputs = tuple(row.ctypes.data for row in self.numbers)
        self.store = _store_of(store, scale, page_size)
        self.table = (self.pages.ctypes.data, width)
        self.outputs = (self.logits.ctypes.data, self.likeliest.ctypes.data)
        self._alive = (store, scale)


class FusedDecoder:
    """Built once of a model's weights, which it keeps alive; `run` or `next` once a step.

    `ends`, the embedding fp32 [V, D] and the head, are for `next` alone, and for plain matrices.
    """

    def __init__(
        self,
        sizes: DecoderSizes,
        norm: Tensor,
        layers: Sequence[LayerWeights],
        ends: tuple[Tensor, DenseWeight] | None = None,
    ) -> None:
        from duomo import _native

        self.sizes, self.num_layers = sizes, len(layers)
        is_plain = isinstance(layers[0].attention[0], DenseWeight)
        native: Any = _native.DenseDecoder if is_plain else _native.Decoder
        self._native = native(norm=_array(norm), **sizes._asdict())
        for layer in layers:
            self._native.add_layer(
                norms=tuple(_array(x) for x in layer.norms),
                attention=tuple(weight.native for weight in layer.attention),
                text=_bank(layer.text),
                vision=_bank(layer.vision),
                mlp=None if layer.mlp is None else tuple(weight.native for weight in layer.mlp),
            )
        self.has_ends = ends is not None
        if ends is not None:
            self._native.set_ends(_array(ends[0]), ends[1].native)

    def next(self, num_sequences: int, tokens: NextTokens, angles: tuple[int, int, int]) -> None:
        """A whole step: embedding, layers, head and the likeliest next tokens, written into `tokens`.

        `angles` are the addresses of cos and sin fp32 [P, H/2] of every position, and P. The logits are those
        of `run` between embedding and head. KernelError where an id, position, length or page lies outside.
        """
        fits = self._native.next(
            num_sequences, *tokens.inputs, angles, tokens.store, tokens.table, *tokens.outputs
        )
        if not fits:
            raise KernelError("a token's id, position, length or page lies outside the model or its cache")

    def run(self, hidden_TD: Tensor, step: PackedStep, expert_ids_LTK: Tensor) -> Tensor:
        """Final hidden states, normed, of the wanted rows: fp32 [T, D]. Writes keys, values, experts chosen.

        A row that is not wanted chooses no experts in the last layer; nothing is written there for it.
        KernelError where a token's slot, sequence, length or page lies outside the cache.
        """
        tokens = hidden_TD.shape[0]
        wanted = None if step.wanted_rows is None else _as(torch.int64, step.wanted_rows)
        out = torch.empty(tokens if wanted is None else wanted.numel(), hidden_TD.shape[1])
        if not tokens:
            return out
        hidden = hidden_TD.detach().float().clone(memory_format=torch.contiguous_format)
        angles = [_as(torch.float32, x) for x in (step.cos_TP, step.sin_TP)]
        self._check(tokens, step, expert_ids_LTK)
        table = step.slots_T, step.page_table_SM, step.sequence_T, step.num_keys_T
        slots, pages, sequence, num_keys = (_as(torch.int64, x) for x in table)
        text, vision = (_as(torch.int64, x) for x in (step.text_rows, step.vision_rows))
        fits = self._native.run(
            hidden.data_ptr(),
            out.data_ptr(),
            tokens,
            tuple(x.data_ptr() for x in angles),
            _store_of(step.store, step.scale, step.page_size),
            (
                slots.data_ptr(),
                pages.data_ptr(),
                *pages.shape,
                sequence.data_ptr(),
                num_keys.data_ptr(),
            ),
            (text.data_ptr(), vision.data_ptr(), text.numel(), vision.numel()),
            expert_ids_LTK.data_ptr(),
            (0, -1) if wanted is None else (wanted.data_ptr(), wanted.numel()),
        )
        if not fits:
            raise KernelError("a token's slot, sequence, length or page lies outside the cache")
        return out

    def _check(self, tokens: int, step: PackedStep, expert_ids_LTK: Tensor) -> None:
        _, layers, _, groups, head_dim = step.store.shape
        sizes = self.sizes
        assert (layers, groups, head_dim) == (self.num_layers, sizes.groups, sizes.head_dim), "another cache"
        assert step.store.is_contiguous() and step.store.dtype in STORED, "a cache the kernel does not read"
        assert (step.scale is not None) == (step.store.dtype is torch.int8), "int8 has scales"
        assert step.cos_TP.shape == step.sin_TP.shape == (tokens, head_dim // 2), "one angle a token and pair"
        assert expert_ids_LTK.shape == (layers, tokens, sizes.chosen) and expert_ids_LTK.is_contiguous()
        assert expert_ids_LTK.dtype is torch.int64
        assert step.text_rows.numel() + step.vision_rows.numel() == tokens, "every token has one bank"
        are_rows = step.slots_T.numel() == step.sequence_T.numel() == step.num_keys_T.numel() == tokens
        assert are_rows and step.page_table_SM.ndim == 2, "one slot, sequence and length a token"


def _store_of(store: Tensor, scale: Tensor | None, page_size: int) -> tuple[int, ...]:
    """[2, layers, slots, G, H] and the scales of int8 as the native side takes them."""
    scales = (0, 0) if scale is None else (scale[0].data_ptr(), scale[1].data_ptr())
    sides = (store[0].data_ptr(), store[1].data_ptr())
    return (*sides, *scales, STORED[store.dtype], store.shape[2], page_size)


def _as(dtype: torch.dtype, x: Tensor) -> Tensor:
    return x if x.dtype is dtype and x.is_contiguous() else x.to(dtype).contiguous()


def _array(x: Tensor) -> Any:
    return x.detach().float().contiguous().numpy()


def _bank(bank: BankWeights | None) -> tuple[Any, ...] | None:
    if bank is None:
        return None
    return _array(bank.router), _array(bank.bias), bank.gate_up.native, bank.down.native
