"""Attention over one sequence at a time; softmax in fp32 inside torch's scaled_dot_product_attention.

Sequences are never padded into one another: a token's result does not depend on what runs beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


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


def causal_attention(query_TNH: Tensor, key_TGH: Tensor, value_TGH: Tensor, lengths: Sequence[int]) -> Tensor:
    """Whole sequences of `lengths` side by side, each causally within itself. Returns [T, N, H]."""
    pieces = zip(*(x.split(list(lengths)) for x in (query_TNH, key_TGH, value_TGH)), strict=True)
    return torch.cat([attention(query, key, value) for query, key, value in pieces])


def _lower_right(num_new: int, num_all: int) -> Tensor:
    # Imported late: it brings in torch's compiler, half of the time and 70 MB of what importing duomo takes.
    from torch.nn.attention.bias import causal_lower_right

    return causal_lower_right(num_new, num_all)
