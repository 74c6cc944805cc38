"""Attention of packed tokens through the pages of a KV cache, one token at a time: the specification.

A token sees the first `num_keys` keys of its sequence. Its result depends on nothing else: not on the batch,
not on how a prompt was cut into chunks, not on where its pages lie.
"""

from __future__ import annotations

import torch
from torch import Tensor


def paged_attention(
    query_TNH: Tensor,
    store: Tensor,
    scale: Tensor | None,
    page_table_SM: Tensor,
    page_size: int,
    sequence_T: Tensor,
    num_keys_T: Tensor,
) -> Tensor:
    """Returns fp32 [T, N, H]; the softmax scale is H**-0.5.

    store      [2, slots, G, H], a layer's keys and values: fp32, bf16, int8; slot = page * page_size + offset
    scale      fp32 [2, slots, G] for int8, else None
    page_table_SM, sequence_T, num_keys_T    int64; tokens of a sequence side by side, num_keys rising
    """
    num_heads, groups = query_TNH.shape[1], store.shape[2]
    out = torch.zeros(query_TNH.shape, dtype=torch.float32)
    for token in range(query_TNH.shape[0]):
        place = torch.arange(int(num_keys_T[token]))
        slots = page_table_SM[sequence_T[token], place // page_size] * page_size + place % page_size
        key, value = store[:, slots].float() * (1.0 if scale is None else scale[:, slots][..., None])
        query = query_TNH[token].float().unflatten(0, (groups, num_heads // groups))
        weights = (torch.einsum("gnh,ugh->gnu", query, key) * query.shape[-1] ** -0.5).softmax(-1)
        out[token] = torch.einsum("gnu,ugh->gnh", weights, value).flatten(0, 1)
    return out
