"""Error feedback: against its definition, and against rounding without it on inputs it did not see."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duomo.errors import ConfigError
from duomo.quant.feedback import (
    column_order,
    feed_back,
    inverse_factor,
    output_error,
    quantize_bank,
    quantize_matrices,
)
from duomo.quant.hessian import Gram, damp, rotate, rotate_hessian, shrink, shrinkage
from duomo.trellis import LCC2_10, encode_matrix, hadamard


def inputs(num_tokens, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=torch.Generator().manual_seed(99))
    mixing = mixing * torch.logspace(0, -1.5, size)
    return torch.randn(num_tokens, size, generator=generator) @ mixing.T


def test_feedback_is_the_exact_answer_to_each_rounding():
    # Rounding column by column: the columns left minimise (w - q) H (w - q)^T given those already rounded.
    x = inputs(50, 6).double()
    hessian = damp((x.T @ x)[None], 0.01)
    weights = torch.randn(1, 3, 6, dtype=torch.float64)
    upper = torch.linalg.cholesky_ex(torch.linalg.inv(hessian), upper=True)[0]
    rounded = weights.clone()
    feed_back(rounded, upper, 1, lambda first, last, targets: targets.round())
    expected = weights[0].clone()
    for column in range(6):
        expected[:, column] = expected[:, column].round()
        done, left = slice(0, column + 1), slice(column + 1, 6)
        error = (expected - weights[0])[:, done]
        free = -torch.linalg.solve(hessian[0, left, left], hessian[0, left, done] @ error.T).T
        expected[:, left] = weights[0][:, left] + free
    torch.testing.assert_close(rounded[0], expected)


def test_lazy_updates_change_nothing(monkeypatch):
    x = inputs(400, 64)
    upper, weights = inverse_factor((x.T @ x)[None], 0.05), torch.randn(1, 16, 64)
    results = []
    for lazy in (4, 16, 64):
        monkeypatch.setattr("duomo.quant.feedback.LAZY_COLUMNS", lazy)
        results.append(weights.clone())
        feed_back(results[-1], upper, 4, lambda first, last, targets: targets)
    for result in results:
        torch.testing.assert_close(result, weights)


@given(st.integers(1, 4), st.integers(1, 3))
def test_column_order_is_a_permutation_by_streams(chains, chain):
    order = column_order(16 * chains * chain, chain)
    assert sorted(order.tolist()) == list(range(16 * chains * chain))
    first = order[: 4 * chain].tolist()
    assert first == [16 * block + 4 * group for block in range(chain) for group in range(4)]


def test_feedback_beats_rounding_on_unseen_inputs():
    seen, unseen = inputs(4000, 64), inputs(4000, 64, seed=1)
    weights = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(5))
    hessians = (seen.T @ seen).expand(2, 64, 64)
    judge = unseen.T @ unseen
    tensors = quantize_matrices(weights, hessians, LCC2_10, 3, 0.05)
    for weight, tensor in zip(weights, tensors, strict=True):
        plain = encode_matrix(weight.numpy(), LCC2_10, seed=3)
        ours = output_error(weight, torch.from_numpy(tensor.decode()), judge)
        theirs = output_error(weight, torch.from_numpy(plain.decode()), judge)
        assert ours < 0.7 * theirs


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_bank_is_its_experts_whatever_the_threads(count):
    weights = torch.randn(count, 64, 64, generator=torch.Generator().manual_seed(count))
    hessians = [x.T @ x for x in (inputs(300, 64, seed=expert) for expert in range(count))]
    one, three = (quantize_bank(weights, hessians, LCC2_10, 3, 0.05, num_threads) for num_threads in (1, 3))
    assert len(one) == len(three) == count
    for weight, hessian, first, second in zip(weights, hessians, one, three, strict=True):
        assert np.array_equal(first.codes, second.codes)
        assert np.array_equal(first.row_scale, second.row_scale)
        assert output_error(weight, torch.from_numpy(first.decode()), hessian) < 0.08


def test_without_feedback_it_is_plain_rounding_with_fitted_scales():
    weights, eye = torch.randn(1, 64, 32), torch.eye(32)[None]
    (tensor,) = quantize_matrices(weights, eye, LCC2_10, 3, 0.0, has_feedback=False, sweeps=1)
    plain = encode_matrix(weights[0].numpy(), LCC2_10, seed=3)
    error = np.mean((tensor.decode() - weights[0].numpy()) ** 2)
    np.testing.assert_allclose(error, np.mean((plain.decode() - weights[0].numpy()) ** 2), rtol=0.02)


@settings(deadline=None, max_examples=10)
@given(st.sampled_from([16, 48, 64, 192]), st.integers(0, 9))
def test_torch_rotation_is_the_trellis_rotation(width, seed):
    x = torch.randn(3, width)
    np.testing.assert_allclose(rotate(x, seed).numpy(), hadamard.rotate(x.numpy(), seed), atol=1e-5)
    gram = rotate(x, seed).T @ rotate(x, seed)
    torch.testing.assert_close(rotate_hessian(x.T @ x, seed), gram, atol=1e-4, rtol=1e-4)


def test_an_expert_without_tokens_takes_the_layers_hessian():
    layer, expert = Gram(4), Gram(4)
    layer.add(torch.randn(20, 4))
    torch.testing.assert_close(shrink(expert, layer), layer.matrix)
    expert.add(torch.randn(20, 4), torch.full((20,), 0.5))
    assert 0 < shrinkage(10_000, 4) < shrinkage(20, 4) < shrinkage(0, 4) == 1
    assert shrink(expert, layer).diagonal().mean().item() == pytest.approx(expert.scale, rel=1e-4)


def test_what_is_not_finite_is_refused():
    eye = torch.eye(16)[None]
    with pytest.raises(ConfigError, match="weights"):
        quantize_matrices(torch.full((1, 64, 16), torch.nan), eye, LCC2_10, 0, 0.1)
    with pytest.raises(ConfigError, match="calibration"):
        quantize_matrices(torch.randn(1, 64, 16), eye * torch.inf, LCC2_10, 0, 0.1)
