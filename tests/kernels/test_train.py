"""Training's native kernels against the plain ones: results, gradients; one set of bits by any threads.

A size of zero, of one and primes among them; where a head must be of a multiple of 16, that.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from duomo import kernels
from duomo.kernels import reference

native = pytest.importorskip("duomo._native", reason="the native module is not built")
pytestmark = pytest.mark.skipif(not kernels.trains_natively(), reason="no AVX-512 with BF16")
fast = kernels.cpu.train


def random(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def with_gradients(call: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The result, and the gradient of each input for a random one of the result."""
    own = [x.clone().requires_grad_() for x in inputs]
    out = call(*own)
    gradients = torch.autograd.grad(out, own, random(*out.shape), allow_unused=True)
    return [
        out.detach(),
        *(torch.zeros_like(x) if g is None else g for x, g in zip(own, gradients, strict=True)),
    ]


def assert_near(one: Callable[..., Tensor], other: Callable[..., Tensor], *inputs: Tensor) -> None:
    for ours, plain in zip(with_gradients(one, inputs), with_gradients(other, inputs), strict=True):
        assert ours.shape == plain.shape
        assert (
            ours - plain
        ).norm() <= 2e-6 * plain.norm() + 2e-5  # a lone key's gradient is zero up to rounding


@pytest.mark.parametrize(
    "tokens,inputs,outputs", [(0, 5, 3), (1, 1, 1), (13, 7, 5), (101, 331, 67), (64, 512, 48)]
)
def test_a_linear_map(tokens, inputs, outputs):
    x, weight = random(tokens, inputs), random(outputs, inputs)
    assert_near(fast.linear, reference.linear, x, weight)
    with fast.rounded_products():
        assert_near(fast.linear, reference.rounded_linear, x, weight)
        assert_near(
            fast.linear, lambda x, w, b: reference.rounded_linear(x, w) + b, x, weight, random(outputs)
        )


def test_a_product_remembers_its_rounding_for_its_gradients():
    x, weight = (random(*shape).requires_grad_() for shape in ((7, 33), (5, 33)))
    with fast.rounded_products():
        out = fast.linear(x, weight)
    gradients = torch.autograd.grad(out, (x, weight), torch.ones_like(out))
    plain = reference.rounded_linear(x, weight)
    for ours, expected in zip(
        gradients, torch.autograd.grad(plain, (x, weight), torch.ones_like(out)), strict=True
    ):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    "tokens,num_experts,chosen,width,size",
    [(0, 3, 2, 16, 8), (1, 3, 2, 5, 7), (53, 7, 3, 37, 29), (300, 2, 1, 64, 48)],
)
def test_a_bank_of_experts(tokens, num_experts, chosen, width, size):
    generator = torch.Generator().manual_seed(tokens)
    ids = (
        torch.rand(tokens, num_experts, generator=generator)
        .argsort(-1)[:, :chosen]
        .clamp(max=num_experts - 2)
    )
    inputs = (random(tokens, width), random(tokens, chosen), random(num_experts, 2 * size, width, scale=0.2))
    assert_near(
        lambda x, w, gate_up, down: fast.experts(x, ids, w, gate_up, down),
        lambda x, w, gate_up, down: reference.experts(x, ids, w, gate_up, down) + 0 * down.sum(),
        *inputs, random(num_experts, width, size),
    )  # fmt: skip


def test_frozen_weights_get_no_gradient_and_let_the_others_pass():
    hidden, weights = random(11, 32).requires_grad_(), torch.ones(11, 2)
    gate_up, down = random(4, 32, 32), random(4, 32, 16).requires_grad_()
    ids = torch.arange(22).reshape(11, 2) % 4
    fast.experts(hidden, ids, weights, gate_up, down).sum().backward()
    assert hidden.grad is not None and down.grad is not None and gate_up.grad is None
    fast.linear(hidden, gate_up[0]).sum().backward()
    assert gate_up.grad is None


@pytest.mark.parametrize("lengths", [(1,), (17,), (32, 5, 77), (1, 1, 300)])
@pytest.mark.parametrize("heads,groups,dim", [(6, 2, 32), (3, 3, 16), (2, 1, 128)])
@pytest.mark.parametrize("is_causal", [True, False])
def test_attention_within(lengths, heads, groups, dim, is_causal):
    tokens = sum(lengths)
    inputs = random(tokens, heads, dim), random(tokens, groups, dim), random(tokens, groups, dim, scale=2)
    assert_near(
        lambda q, k, v: fast.attention_within(q, k, v, lengths, is_causal),
        lambda q, k, v: reference.attention_within(q, k, v, lengths, is_causal),
        *inputs,
    )


@pytest.mark.parametrize("lengths", [(1,), (17, 40), (32, 5, 77)])
def test_attention_of_blocks(lengths):
    """Zeros at the beginning are seen by all that follows; a block sees them and itself."""
    tokens = sum(lengths)
    blocks = torch.cat([torch.arange(length, dtype=torch.int32).div(13).int() for length in lengths])
    inputs = random(tokens, 6, 32), random(tokens, 2, 32), random(tokens, 2, 32)
    assert_near(
        lambda q, k, v: fast.attention_within(q, k, v, lengths, blocks_T=blocks),
        lambda q, k, v: reference.attention_within(q, k, v, lengths, blocks_T=blocks),
        *inputs,
    )
    if max(lengths) > 13:
        plain = fast.attention_within(*inputs, lengths)
        assert not torch.allclose(plain, fast.attention_within(*inputs, lengths, blocks_T=blocks))


def test_attention_with_scores_far_apart():
    query, key, value = random(40, 1, 16, scale=30), random(40, 1, 16, scale=30), random(40, 1, 16)
    plain = with_gradients(lambda *x: reference.attention_within(*x, (40,)), (query, key, value))
    ours = with_gradients(lambda *x: fast.attention_within(*x, (40,)), (query, key, value))
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("tokens,width", [(0, 16), (1, 1), (77, 19), (65, 192)])
def test_rows(tokens, width):
    x, weight = random(tokens, width), random(width)
    assert_near(lambda *x: fast.rmsnorm(*x, 1e-5), lambda *x: reference.rmsnorm(*x, 1e-5), x, weight)
    assert_near(fast.gated, reference.gated, 9 * x, random(tokens, width))
    cos, sin = random(tokens, 8), random(tokens, 8)
    assert_near(
        lambda x: fast.rotate_pairs(x, cos, sin),
        lambda x: reference.rotate_pairs(x, cos, sin),
        random(tokens, 3, 16),
    )


@pytest.mark.parametrize(
    "tokens,width,num_experts,chosen", [(0, 16, 4, 2), (1, 1, 1, 1), (53, 19, 7, 3), (40, 64, 64, 8)]
)
@pytest.mark.parametrize("norm_min", [1e-12, 0.5])
def test_a_router(tokens, width, num_experts, chosen, norm_min):
    """Losses of its own have gradients by the logits, too. Some sums lie below the larger minimum."""
    inputs, bias = (random(tokens, width), random(num_experts, width)), random(num_experts, scale=0.05)

    def routed(kernel):
        def call(*x):
            ids, weights, logits = kernel(*x, bias, chosen, norm_min)
            return torch.cat((ids.float(), weights, logits.logsumexp(-1, keepdim=True)), dim=-1)

        return call

    assert_near(routed(fast.route), routed(reference.route), *inputs)
    with fast.rounded_products():
        assert_near(routed(fast.route), routed(reference.route), *inputs)


def test_a_router_takes_the_first_of_equals_and_keeps_within_the_bank():
    hidden = torch.zeros(3, 4, requires_grad=True)
    hidden.data[2] = torch.nan
    ids = fast.route(hidden, torch.ones(20, 4), torch.zeros(20), 3).expert_ids_TK
    assert ids[:2].tolist() == 2 * [[0, 1, 2]] and ((ids >= 0) & (ids < 20)).all()


@pytest.mark.parametrize("tokens,words", [(0, 5), (1, 1), (37, 97), (5, 4096)])
def test_cross_entropy(tokens, words):
    labels = torch.arange(tokens) * 31 % words
    labels[: tokens // 3] = -100
    logits = random(tokens, words, scale=8)
    assert_near(lambda x: fast.cross_entropy(x, labels), lambda x: reference.cross_entropy(x, labels), logits)


def test_a_step_has_the_same_bits_by_any_number_of_threads():
    ids = torch.arange(200).reshape(100, 2) % 5
    bank = random(100, 48), torch.rand(100, 2), random(5, 64, 48), random(5, 48, 32)
    heads = random(100, 4, 16), random(100, 2, 16), random(100, 2, 16)
    found = []
    threads, pool = torch.get_num_threads(), native.num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        native.set_num_threads(count)
        found.append(
            with_gradients(lambda h, w, g, d: fast.experts(h, ids, w, g, d), bank)
            + with_gradients(lambda *x: fast.attention_within(*x, (60, 40)), heads)
            + with_gradients(lambda *x: fast.rmsnorm(*x, 1e-5), (bank[0], random(48)))
        )
    torch.set_num_threads(threads)
    native.set_num_threads(pool)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
