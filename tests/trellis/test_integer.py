"""Six and eight bits with one scale a row."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duomo.errors import ConfigError, ShapeMismatch
from duomo.trellis import encode_int, int_tensor
from duomo.trellis.integer import IntTensor, pack_six, unpack_six


@given(st.integers(0, 3), st.integers(0, 5), st.integers(0, 99))
def test_six_bits_round_trip(rows, quads, seed):
    levels = np.random.default_rng(seed).integers(-31, 32, (rows, 4 * quads)).astype(np.int8)
    packed = pack_six(levels)
    assert packed.nbytes * 8 == levels.size * 6
    np.testing.assert_array_equal(unpack_six(packed), levels)


def test_six_bits_lie_in_the_file_as_its_format_says():
    """FORMAT.md: four levels plus 32 in three bytes, low bits first; 1, 32, 37 and 63 are 01 58 fe."""
    tensor = int_tensor(np.array([[-31, 0, 5, 31]], np.int8), np.ones(1, np.float16), 6, None)
    assert tensor.codes.tobytes() == bytes.fromhex("0158fe")
    assert tensor.shape == (1, 4) and tensor.num_bytes == 3 + 2
    assert tensor.levels().tolist() == tensor.decode().tolist() == [[-31, 0, 5, 31]]


@pytest.mark.parametrize("bits, bound", [(8, 2e-4), (6, 2e-3)])
@pytest.mark.parametrize("seed", [None, 5])
def test_error_is_that_of_the_bits(bits, bound, seed):
    weight = np.random.default_rng(0).standard_normal((2, 8, 128)).astype(np.float32)
    tensor = encode_int(weight, bits, seed)
    assert tensor.shape == (2, 8, 128)
    assert np.mean((tensor.decode() - weight) ** 2) < bound


def test_zeros_nan_and_odd_sizes():
    assert (encode_int(np.zeros((2, 16), np.float32)).decode() == 0).all()
    with pytest.raises(ConfigError, match="finite"):
        encode_int(np.full((1, 4), np.inf, np.float32))
    with pytest.raises(ConfigError, match="there are 6 and 8"):
        IntTensor(np.zeros((1, 4), np.int8), np.ones(1, np.float16), 5, None)
    with pytest.raises(ShapeMismatch, match="multiple of 4"):
        pack_six(np.zeros((1, 6), np.int8))
    with pytest.raises(ConfigError, match="6 bits as int8"):
        IntTensor(np.zeros((1, 3), np.int8), np.ones(1, np.float16), 6, None)
    with pytest.raises(ShapeMismatch, match="three for four"):
        IntTensor(np.zeros((1, 4), np.uint8), np.ones(1, np.float16), 6, None)
