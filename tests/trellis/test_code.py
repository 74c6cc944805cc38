"""The codes are linear, partition their codebooks, and refuse what they cannot be."""

from dataclasses import replace

import numpy as np
import pytest

from duomo.errors import ConfigError
from duomo.trellis import LCC2_12, PRESETS, preset

CODES = list(PRESETS.values())


@pytest.mark.parametrize("code", CODES, ids=lambda code: code.name)
def test_hash_is_linear(code):
    table = code.hash_table()
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 1 << code.window, (2, 500))
    np.testing.assert_array_equal(table[a ^ b], table[a] ^ table[b])


@pytest.mark.parametrize("code", CODES, ids=lambda code: code.name)
def test_hash_is_the_xor_of_columns(code):
    for window in (0, 1, 5, (1 << code.window) - 1, 0b1011001 % (1 << code.window)):
        expected = 0
        for bit in range(code.window):
            if window >> bit & 1:
                expected ^= code.columns[bit]
        assert code.hash_table()[window] == expected


@pytest.mark.parametrize("code", CODES, ids=lambda code: code.name)
def test_branches_of_a_state_fall_into_different_parts_of_the_codebook(code):
    table = code.hash_table().astype(int)
    branches = 1 << code.bits
    part = len(code.codebook) // branches
    windows = np.arange(1 << code.window)
    leaving = table[windows.reshape(-1, branches)] // part
    entering = table[windows.reshape(branches, -1).T] // part
    for parts in (leaving, entering):
        np.testing.assert_array_equal(np.sort(parts, axis=1), np.tile(np.arange(branches), (len(parts), 1)))


@pytest.mark.parametrize("code", CODES, ids=lambda code: code.name)
def test_every_codebook_entry_is_used_equally(code):
    counts = np.bincount(code.hash_table(), minlength=len(code.codebook))
    assert (counts == counts[0]).all()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"bits": 3}, "2 or 4"),
        ({"window": 18}, "at most 16"),
        ({"window": 11}, "whole 2-bit symbols"),
        ({"columns": (1, 2)}, "2 columns"),
        ({"columns": (16, 32, 64, *LCC2_12.columns[3:])}, "outside"),
        ({"columns": (1, *LCC2_12.columns[1:])}, "newest"),
        ({"codebook": (64,) * 64}, "outside"),
        ({"codebook": (1, 2, 3)}, "codebook of 3"),
        ({"unit": 0.0}, "positive"),
    ],
)
def test_impossible_codes_are_refused(change, words):
    with pytest.raises(ConfigError, match=words):
        replace(LCC2_12, **change)


def test_an_unknown_preset_names_those_there_are():
    with pytest.raises(ConfigError, match="lcc2-12"):
        preset("lcc3")
