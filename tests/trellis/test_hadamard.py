"""The rotation: orthonormal, its own inverse up to signs, and the signs everybody must agree on."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duomo.trellis import hadamard


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.integers(0, 2**64 - 1))
def test_rotation_preserves_products(sixteenths, seed):
    rng = np.random.default_rng(seed)
    weight, x = rng.standard_normal((2, 3, 16 * sixteenths)).astype(np.float32)
    rotated = hadamard.rotate(weight, seed) @ hadamard.rotate(x, seed).T
    np.testing.assert_allclose(rotated, weight @ x.T, atol=1e-3)
    np.testing.assert_allclose(hadamard.unrotate(hadamard.rotate(x, seed), seed), x, atol=1e-5)


@pytest.mark.parametrize(
    "width, block", [(2560, 128), (1536, 128), (512, 128), (576, 64), (192, 64), (588, 4), (7, 1)]
)
def test_blocks(width, block):
    assert hadamard.block_size(width) == block


def test_transform_is_the_hadamard_matrix():
    matrix = np.array([[1.0]])
    while len(matrix) < 16:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    np.testing.assert_allclose(hadamard.transform(np.eye(16, dtype=np.float32)), matrix / 4, atol=1e-7)


def test_signs_follow_splitmix64():
    # First output of splitmix64 seeded with 1234567, from its author's published test vector.
    first = 6457827717110365317
    expected = [-1.0 if first >> k & 1 else 1.0 for k in range(64)]
    assert hadamard.signs(1234567, 64).tolist() == expected
    assert hadamard.signs(1234567, 70)[:64].tolist() == expected
