"""The encoder: near what theory allows, exact on what it wrote itself, decoding by the definition."""

import numpy as np
import pytest

from duomo.errors import ConfigError, ShapeMismatch
from duomo.trellis import LCC2_10, LCC2_12, TrellisTensor, encode_matrix, viterbi
from duomo.trellis.tensor import decode_streams, symbols_to_levels


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_decoding_is_the_definition():
    code, symbols = LCC2_12, np.random.default_rng(2).integers(0, 4, (3, 40), dtype=np.uint8)
    levels = decode_streams(symbols, code)
    for stream in range(3):
        for step in range(40):
            window = 0
            for age in range(6):
                window |= int(symbols[stream, (step - age) % 40]) << (2 * age)
            index = 0
            for bit in range(12):
                index ^= code.columns[bit] * (window >> bit & 1)
            assert levels[stream, step] == code.codebook[index]


def test_distortion_of_a_gaussian():
    code = LCC2_10
    targets = gaussian(32, 256) / np.float32(code.unit)
    symbols = viterbi.encode_fixed(viterbi.fixed_point(targets, code), code)
    error = np.mean((decode_streams(symbols, code) - targets) ** 2) * code.unit**2
    assert 0.0625 < error < 0.074  # the rate-distortion bound, and this sample's spread above 0.0709


def test_a_decodable_stream_is_found_again():
    code, rng = LCC2_10, np.random.default_rng(5)
    levels = decode_streams(rng.integers(0, 4, (8, 64), dtype=np.uint8), code)
    symbols = viterbi.encode_fixed(viterbi.fixed_point(levels.astype(np.float32), code), code)
    np.testing.assert_array_equal(decode_streams(symbols, code), levels)


def test_turning_the_seam_only_brings_circles_nearer():
    code, targets = LCC2_10, gaussian(12, 40, seed=8) / np.float32(LCC2_10.unit)
    fixed = viterbi.fixed_point(targets, code).astype(np.int64)

    def cost(num_turns):
        symbols = viterbi.encode_fixed(fixed.astype(np.uint16), code, seam_steps=8, num_turns=num_turns)
        levels = (decode_streams(symbols, code).astype(np.int64) + 64) << 8
        return ((levels - fixed) ** 2 >> 16).sum(1)

    once, twice = cost(1), cost(2)
    assert (twice <= once).all() and (twice < once).any()


@pytest.mark.parametrize("rows, columns", [(64, 64), (128, 48)])
def test_matrix_round_trip(rows, columns):
    weight = gaussian(rows, columns, seed=3) * np.float32(0.02)
    tensor = encode_matrix(weight, LCC2_10, seed=7)
    assert np.mean((tensor.decode() - weight) ** 2) / weight.var() < 0.085
    assert tensor.num_bytes == rows * columns // 4 + 2 * rows


def test_levels_do_not_depend_on_the_rotation_of_memory():
    tensor = encode_matrix(gaussian(64, 32), LCC2_10, seed=None)
    from duomo.trellis import packing

    symbols = packing.unpack(tensor.codes, 64, 32, LCC2_10)
    np.testing.assert_array_equal(symbols_to_levels(symbols, LCC2_10, tensor.chain), tensor.levels())
    np.testing.assert_array_equal(tensor.decode(), tensor.levels() * tensor.row_multiplier()[:, None])


def test_rows_of_zeros_stay_zeros_and_nan_is_refused():
    weight = gaussian(64, 32)
    weight[5] = 0
    assert (encode_matrix(weight, LCC2_10).decode()[5] == 0).all()
    weight[0, 0] = np.nan
    with pytest.raises(ConfigError, match="finite"):
        encode_matrix(weight, LCC2_10)


def test_a_tensor_of_the_wrong_size_is_refused():
    tensor = encode_matrix(gaussian(64, 32), LCC2_10)
    with pytest.raises(ShapeMismatch, match="bytes of codes"):
        TrellisTensor(LCC2_10, tensor.codes[:-1], tensor.row_scale, (64, 32), None)
    with pytest.raises(ShapeMismatch, match="chains of 3"):
        TrellisTensor(LCC2_10, tensor.codes, tensor.row_scale, (64, 32), None, chain=3)
