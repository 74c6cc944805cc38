"""Attention through pages by csrc/attention*.cpp; the reference says what it is.

The kernel follows page numbers blindly, so they are checked here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from duomo.errors import KernelError

STORED = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
HEAD_MULTIPLE = 16


def paged_attention(
    query_TNH: Tensor,
    store: Tensor,
    scale: Tensor | None,
    page_table_SM: Tensor,
    page_size: int,
    sequence_T: Tensor,
    num_keys_T: Tensor,
) -> Tensor:
    from duomo import _native

    tokens, num_heads, head_dim = query_TNH.shape
    _, num_slots, groups, _ = store.shape
    query, pages = query_TNH.float().contiguous(), page_table_SM.to(torch.int64).contiguous()
    sequence, num_keys = sequence_T.to(torch.int64).contiguous(), num_keys_T.to(torch.int64).contiguous()
    out = torch.empty(query.shape)
    if not tokens:
        return out
    if store.dtype not in STORED or not store[0].is_contiguous() or head_dim % HEAD_MULTIPLE:
        raise KernelError(f"a cache of {store.dtype} with heads of {head_dim} is not one the kernel reads")
    fits = (
        int(sequence.min()) >= 0
        and int(sequence.max()) < pages.shape[0]
        and int(num_keys.min()) >= 1
        and int(num_keys.max()) <= pages.shape[1] * page_size
        and int(pages.min()) >= 0
        and (int(pages.max()) + 1) * page_size <= num_slots
    )
    if not fits:
        raise KernelError("a token's sequence, length or page lies outside the cache")
    scales = (0, 0) if scale is None else (scale[0].data_ptr(), scale[1].data_ptr())
    sides = (store[0].data_ptr(), store[1].data_ptr(), *scales, STORED[store.dtype])
    table = (pages.data_ptr(), pages.shape[1], page_size)
    sizes = (tokens, num_heads, groups, head_dim)
    places = (sequence.data_ptr(), num_keys.data_ptr())
    _native.paged_attention(query.data_ptr(), *sides, *table, *places, *sizes, out.data_ptr())
    return out
