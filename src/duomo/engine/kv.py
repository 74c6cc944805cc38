"""The paged KV cache: fp32, bf16 or int8 (one scale a token and head), and attention through its pages.

A token's result has the same bits whatever the batch, the chunk or the page layout. Three rules make it so:
queries come in rows of 16 as in `kernels.linear`; keys come in blocks of 256 whose sums are added in order
(blocks beyond a token's own end add exact zeros); the maximum of the softmax is exact in any order.
Page 0 belongs to nobody: padding reads from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from duomo import kernels
from duomo.model.config import ModelConfig
from duomo.model.inputs import Batch

KEY_BLOCK = 256
QUERY_BLOCK = 16
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


class PagedCache:
    """Implements `model.KVCache`. Slots are page * page_size + offset."""

    def __init__(self, config: ModelConfig, num_pages: int, page_size: int, dtype: str = "float32") -> None:
        assert KEY_BLOCK % page_size == 0, f"a page of {page_size} tokens does not divide {KEY_BLOCK}"
        self.page_size, self.dtype = page_size, _DTYPES[dtype]
        shape = (config.num_layers, (num_pages + 1) * page_size, config.num_kv_heads)
        self.store = _untouched_zeros((2, *shape, config.head_dim), self.dtype)
        self.scale = _untouched_zeros((2, *shape), torch.float32) if self.dtype is torch.int8 else None

    @property
    def num_bytes(self) -> int:
        scale = 0 if self.scale is None else self.scale.numel() * 4
        return self.store.numel() * self.store.element_size() + scale

    def touch(self) -> None:
        """Writes every page, as a full cache would have been; for measuring memory."""
        for x in (self.store, self.scale):
            if x is not None:
                x.zero_()

    def slots(self, pages: Sequence[int]) -> Tensor:
        """Slots of whole pages, in order."""
        first = torch.tensor(pages, dtype=torch.int64)[:, None] * self.page_size
        return (first + torch.arange(self.page_size)).flatten()

    def copy_out(self, pages: Sequence[int]) -> list[Tensor]:
        """The content of pages, for `copy_in` into others."""
        slots = self.slots(pages)
        return [x[:, :, slots].clone() for x in (self.store, self.scale) if x is not None]

    def copy_in(self, pages: Sequence[int], content: list[Tensor]) -> None:
        slots = self.slots(pages)
        for x, saved in zip((self.store, self.scale), content, strict=False):
            assert x is not None, "content of another kind of cache"
            x[:, :, slots] = saved

    def attend(
        self, layer_index: int, query_TNH: Tensor, key_TGH: Tensor, value_TGH: Tensor, batch: Batch
    ) -> Tensor:
        assert batch.slots_T is not None and batch.page_table_SM is not None, "a paged batch has slots"
        self._write(layer_index, batch.slots_T, key_TGH, value_TGH)
        if kernels.is_native and query_TNH.shape[-1] % 16 == 0:
            return self._attend_native(layer_index, query_TNH, batch)
        outputs: list[Tensor] = []
        first = start = 0
        counts = batch.num_new
        while first < len(counts):  # runs of sequences with equally many new tokens share one product
            last = first + 1
            while last < len(counts) and counts[last] == counts[first] and counts[first] <= QUERY_BLOCK:
                last += 1
            stop = start + counts[first] * (last - first)
            query_STNH = query_TNH[start:stop].unflatten(0, (last - first, counts[first]))
            cached = torch.tensor(batch.num_cached[first:last])
            outputs.append(self._attend(layer_index, query_STNH, cached, batch.page_table_SM[first:last]))
            first, start = last, stop
        return torch.cat(outputs).to(query_TNH.dtype)

    def _attend_native(self, layer_index: int, query_TNH: Tensor, batch: Batch) -> Tensor:
        """The same three rules hold: `csrc/attention.hpp` computes every token from its own keys alone."""
        assert (
            batch.page_table_SM is not None and batch.sequence_T is not None and batch.num_keys_T is not None
        )
        scale = None if self.scale is None else self.scale[:, layer_index]
        store = self.store[:, layer_index]
        pages = (batch.page_table_SM, self.page_size)
        out = kernels.paged_attention(query_TNH, store, scale, *pages, batch.sequence_T, batch.num_keys_T)
        return out.to(query_TNH.dtype)

    def _write(self, layer_index: int, slots_T: Tensor, key_TGH: Tensor, value_TGH: Tensor) -> None:
        for side, x_TGH in enumerate((key_TGH, value_TGH)):
            if self.scale is None:
                self.store[side, layer_index, slots_T] = x_TGH.to(self.dtype)
                continue
            wide = x_TGH.float()
            scale = wide.abs().amax(-1).clamp(min=1e-12) / 127.0
            self.store[side, layer_index, slots_T] = (wide / scale[..., None]).round().to(torch.int8)
            self.scale[side, layer_index, slots_T] = scale

    def _read(self, side: int, layer_index: int, slots: Tensor) -> Tensor:
        x = self.store[side, layer_index][slots].float()
        return x if self.scale is None else x * self.scale[side, layer_index][slots][..., None]

    def _attend(self, layer: int, query_STNH: Tensor, cached_S: Tensor, pages_SM: Tensor) -> Tensor:
        """Sequences of equal T: [S, T, N, H] -> [S*T, N, H]."""
        num_seqs, num_new, num_heads, head_dim = query_STNH.shape
        num_keys = int(cached_S.max()) + num_new
        num_blocks = -(-num_keys // KEY_BLOCK)
        num_pages = num_blocks * KEY_BLOCK // self.page_size
        pages = F.pad(pages_SM, (0, max(0, num_pages - pages_SM.shape[1])))[:, :num_pages]
        slots_SU = (pages[..., None] * self.page_size + torch.arange(self.page_size)).flatten(1)
        keys = self._read(0, layer, slots_SU).permute(0, 2, 3, 1)  # S G H U
        values = self._read(1, layer, slots_SU).permute(0, 2, 1, 3)  # S G U H
        groups = keys.shape[1]
        share = num_heads // groups
        rows = query_STNH.float().unflatten(2, (groups, share)).permute(0, 2, 1, 3, 4).flatten(2, 3)
        num_rows = rows.shape[2]
        rows = F.pad(rows, (0, 0, 0, -num_rows % QUERY_BLOCK))
        position = cached_S[:, None] + torch.arange(rows.shape[2]) // share  # of each row's token
        is_hidden = torch.arange(slots_SU.shape[1]) > position[..., None]
        scores = (rows @ keys) * head_dim**-0.5
        scores = scores.masked_fill(is_hidden[:, None], float("-inf"))
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        total = torch.zeros(())
        out = torch.zeros(())
        for block in range(num_blocks):
            part = slice(block * KEY_BLOCK, (block + 1) * KEY_BLOCK)
            weight = weights[..., part].contiguous()
            total = total + weight.sum(-1, keepdim=True)
            out = out + weight @ values[:, :, part].contiguous()
        out = (out / total)[:, :, :num_rows].unflatten(2, (num_new, share))
        packed: Tensor = out.permute(0, 2, 1, 3, 4).reshape(num_seqs * num_new, num_heads, head_dim)
        return packed


def _untouched_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that cost memory only where they are written: torch.zeros would touch every page at once."""
    num_bytes = prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, np.uint8)).view(dtype).view(shape)
