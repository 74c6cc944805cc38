"""Attention through pages against the plain version, and its promise: a token's bits are its own."""

import pytest
import torch

from duomo.errors import KernelError
from duomo.kernels import cpu, reference

native = pytest.importorskip("duomo._native", reason="the native module is not built")
PAGE, NUM_PAGES, HEADS, GROUPS = 4, 30, 6, 2


def cache(dtype: torch.dtype, head_dim: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(head_dim)
    wide = torch.randn(2, NUM_PAGES * PAGE, GROUPS, head_dim, generator=generator)
    if dtype is not torch.int8:
        return wide.to(dtype), None
    scale = wide.abs().amax(-1) / 127
    return (wide / scale[..., None]).round().to(torch.int8), scale


def batch(lengths: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(cached, new) of each sequence -> page table, sequence and number of keys of each token."""
    pages = torch.randperm(NUM_PAGES, generator=torch.Generator().manual_seed(0))
    table = pages[: len(lengths) * 10].reshape(len(lengths), 10)
    sequence = [s for s, (_, new) in enumerate(lengths) for _ in range(new)]
    keys = [cached + i + 1 for cached, new in lengths for i in range(new)]
    return table, torch.tensor(sequence, dtype=torch.int64), torch.tensor(keys, dtype=torch.int64)


@pytest.fixture(params=["portable", "avx2", "avx512", "neon"])
def isa(request):
    native.set_isa(request.param)
    if native.current_isa() != request.param:
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    native.set_isa("")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("head_dim", [16, 48, 128])
@pytest.mark.parametrize(
    "lengths", [[(0, 0)], [(0, 1)], [(0, 13)], [(39, 1), (5, 1), (0, 1)], [(7, 11), (33, 3)]]
)
def test_agrees_with_the_plain_version(isa, dtype, head_dim, lengths):
    store, scale = cache(dtype, head_dim)
    table, sequence, keys = batch(lengths)
    query = torch.randn(len(keys), HEADS, head_dim, generator=torch.Generator().manual_seed(1))
    fast = cpu.paged_attention(query, store, scale, table, PAGE, sequence, keys)
    plain = reference.paged_attention(query, store, scale, table, PAGE, sequence, keys)
    torch.testing.assert_close(fast, plain, rtol=2e-5, atol=2e-6)


def test_a_token_does_not_depend_on_batch_or_chunk(isa):
    store, scale = cache(torch.float32, 32)
    table, sequence, keys = batch([(7, 11), (33, 3)])
    query = torch.randn(14, HEADS, 32, generator=torch.Generator().manual_seed(2))
    together = cpu.paged_attention(query, store, scale, table, PAGE, sequence, keys)
    for token in range(14):
        one = slice(token, token + 1)
        alone = cpu.paged_attention(query[one], store, scale, table, PAGE, sequence[one], keys[one])
        assert torch.equal(alone, together[one])


def test_pages_outside_the_cache_are_refused():
    store, scale = cache(torch.float32, 16)
    table, sequence, keys = batch([(0, 2)])
    query = torch.zeros(2, HEADS, 16)
    with pytest.raises(KernelError, match="outside"):
        cpu.paged_attention(query, store, scale, table + NUM_PAGES, PAGE, sequence, keys)
    with pytest.raises(KernelError, match="outside"):
        cpu.paged_attention(query, store, scale, table, PAGE, sequence, keys + 1000)
