"""Attention over one sequence at a time; softmax in fp32 inside torch's scaled_dot_product_attention.

Sequences are never padded into one another: a token's result does not depend on what runs beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence


def attention(query_TNH: Tensor, key_UGH: Tensor, value_UGH: Tensor, is_causal: bool = True) -> Tensor:
    """T queries over U keys, U >= T; when causal, the last query sees all keys. Returns [T, N, H].

    N query heads share G key heads, N/G consecutive ones each. Scale is H**-0.5.
    """
    num_new, num_all = query_TNH.shape[0], key_UGH.shape[0]
    query, key, value = (x.transpose(0, 1)[None] for x in (query_TNH, key_UGH, value_UGH))
    # One query sees every key, and equal lengths have torch's own causal path; only a chunk needs a mask.
    mask = _lower_right(num_new, num_all) if is_causal and 1 < num_new < num_all else None
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=is_causal and num_new == num_all,
        enable_gqa=query_TNH.shape[1] != key_UGH.shape[1],
    )
    return out[0].transpose(0, 1)


def attention_within(
    query_TNH: Tensor,
    key_TGH: Tensor,
    value_TGH: Tensor,
    lengths: Sequence[int],
    is_causal: bool = True,
    blocks_T: Tensor | None = None,
) -> Tensor:
    """Whole sequences of `lengths` side by side, each within itself. Returns [T, N, H]."""
    if blocks_T is not None:
        assert is_causal, "blocks follow one another"
        return _blocks_within(query_TNH, key_TGH, value_TGH, lengths, blocks_T)
    if not is_causal:
        return _full_within(query_TNH, key_TGH, value_TGH, lengths)
    pieces = zip(*(x.split(list(lengths)) for x in (query_TNH, key_TGH, value_TGH)), strict=True)
    return torch.cat([attention(query, key, value) for query, key, value in pieces])


def _blocks_within(
    query_TNH: Tensor, key_TGH: Tensor, value_TGH: Tensor, lengths: Sequence[int], blocks_T: Tensor
) -> Tensor:
    """All sequences filled up to the longest, as one batch under one mask."""
    counts = list(lengths)
    query, key, value, blocks_SL = (
        pad_sequence(x.split(counts), batch_first=True) for x in (query_TNH, key_TGH, value_TGH, blocks_T)
    )
    own, other = blocks_SL[:, :, None], blocks_SL[:, None, :]
    size = blocks_SL.shape[1]
    is_before = torch.ones(size, size, dtype=torch.bool, device=blocks_SL.device).tril()
    mask_S1LL = (is_before & ((other == 0) | (other == own)))[:, None]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    is_shared = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask_S1LL, enable_gqa=is_shared)
    return torch.cat([one[:count] for one, count in zip(out.transpose(1, 2), counts, strict=True)])


def _full_within(query_TNH: Tensor, key_TNH: Tensor, value_TNH: Tensor, lengths: Sequence[int]) -> Tensor:
    """Neighbours of one length as one batch, which torch computes at the speed of a long one."""
    outputs, start = [], 0
    for length, run in groupby(lengths):
        count = len(list(run))
        stop = start + length * count
        query, key, value = (
            x[start:stop].unflatten(0, (count, length)).transpose(1, 2)
            for x in (query_TNH, key_TNH, value_TNH)
        )
        out = F.scaled_dot_product_attention(query, key, value, enable_gqa=query.shape[1] != key.shape[1])
        outputs.append(out.transpose(1, 2).flatten(0, 1))
        start = stop
    return torch.cat(outputs)


def _lower_right(num_new: int, num_all: int) -> Tensor:
    # Imported late: it brings in torch's compiler, half of the time and 70 MB of what importing duomo takes.
    from torch.nn.attention.bias import causal_lower_right

    return causal_lower_right(num_new, num_all)
