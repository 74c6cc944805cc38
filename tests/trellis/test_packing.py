"""Byte layout and streams: both directions, and each against its definition written as loops."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duomo.errors import ShapeMismatch
from duomo.trellis import LCC2_10, LCC2_12, packing
from duomo.trellis.code import TrellisCode

FOUR_BITS = TrellisCode(
    "four", 4, 12, (8, 16, 32, 64, 1, 2, 4, 3, 8, 16, 32, 64), (*range(-63, 64), 63), 0.05
)
shapes = st.tuples(st.integers(1, 4), st.integers(1, 6))


@settings(deadline=None, max_examples=25)
@given(shapes, st.sampled_from([LCC2_10, FOUR_BITS]), st.integers(0, 99))
def test_pack_round_trip(shape, code, seed):
    rows, columns = shape[0] * code.row_multiple, shape[1] * 16
    symbols = np.random.default_rng(seed).integers(0, 1 << code.bits, (rows, columns), dtype=np.uint8)
    packed = packing.pack(symbols, code)
    assert packed.nbytes == rows * columns * code.bits // 8
    np.testing.assert_array_equal(packing.unpack(packed, rows, columns, code), symbols)


def test_a_byte_lies_where_the_format_says():
    rows, columns = 128, 48
    symbols = np.random.default_rng(0).integers(0, 4, (rows, columns), dtype=np.uint8)
    packed = packing.pack(symbols, LCC2_12)
    for block, j, group, row, lane in [(0, 0, 0, 0, 0), (2, 1, 3, 15, 3), (1, 0, 2, 7, 1)]:
        byte = packed[((block * (rows // 64) + j) * 4 + group) * 64 + 4 * row + lane]
        column = 16 * block + 4 * group + lane
        for phase in range(4):
            assert byte >> (6 - 2 * phase) & 3 == symbols[64 * j + 16 * phase + row, column]


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
def test_streams_round_trip(steps, chains, chain, seed):
    rows, columns = 16 * steps, 16 * chains * chain
    matrix = np.random.default_rng(seed).integers(0, 255, (rows, columns))
    streams = packing.to_streams(matrix, chain)
    assert streams.shape == (64 * chains, 4 * steps * chain)
    np.testing.assert_array_equal(packing.from_streams(streams, rows, columns, chain), matrix)


def test_a_stream_runs_through_groups_then_blocks():
    rows, columns, chain = 64, 64, 2
    matrix = np.arange(rows * columns).reshape(rows, columns)
    streams = packing.to_streams(matrix, chain)
    chain_index, lane, row = 1, 2, 5
    expected = [
        matrix[16 * t + row, 16 * (chain_index * chain + block) + 4 * group + lane]
        for block in range(chain)
        for group in range(4)
        for t in range(rows // 16)
    ]
    np.testing.assert_array_equal(streams[chain_index * 64 + lane * 16 + row], expected)


@pytest.mark.parametrize(
    "rows, columns, chain",
    [
        (3072, 2560, 1),
        (1024, 2560, 1),
        (2560, 512, 1),
        (512, 512, 1),
        (192, 192, 3),
        (128, 192, 4),
        (64, 64, 4),
    ],
)
def test_default_chains(rows, columns, chain):
    assert packing.default_chain(rows, columns, LCC2_12) == chain


@pytest.mark.parametrize("rows, columns", [(63, 16), (64, 15), (0, 16), (64, 0)])
def test_shapes_that_do_not_fit_say_what_would(rows, columns):
    with pytest.raises(ShapeMismatch, match="multiple of 64, columns of 16"):
        packing.check_shape(rows, columns, LCC2_12)
