"""The compiled encoder finds exactly the symbols of the numpy one, on every instruction set there is."""

import numpy as np
import pytest

from duomo.trellis import LCC2_10, LCC2_12, LCC2_14, LCC4_12, encoder, viterbi

native = encoder.native()
pytestmark = pytest.mark.skipif(native is None, reason="duomo._native is not built")
SHAPES = [(0, 7), (1, 1), (1, 5), (16, 64), (17, 31), (33, 40), (50, 130)]


def encode(targets, code, isa, seam_steps=viterbi.SEAM_STEPS, num_threads=1):
    fixed = viterbi.fixed_point(targets / np.float32(code.unit), code)
    return encoder.encode_native(native, fixed, code, seam_steps, num_threads, isa)


def targets(shape, spread=1.3, seed=0):
    return (np.random.default_rng(seed).standard_normal(shape) * spread).astype(np.float32)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("code", [LCC2_10, LCC2_12, LCC4_12], ids=lambda code: code.name)
def test_same_symbols_as_numpy(code, shape, isa):
    x = targets(shape)
    expected = viterbi.encode_fixed(viterbi.fixed_point(x / np.float32(code.unit), code), code)
    np.testing.assert_array_equal(encode(x, code, isa), expected)


def test_instruction_sets_agree_on_outliers_and_long_windows():
    x = targets((40, 150), spread=30, seed=1)  # most targets are clipped and most metrics saturate
    expected = encode(x, LCC2_14, "portable")
    np.testing.assert_array_equal(encode(x, LCC2_14, "avx2"), expected)
    np.testing.assert_array_equal(encode(x, LCC2_14, "avx512"), expected)


def test_threads_and_neighbours_do_not_matter():
    x = targets((70, 60), seed=2)
    together = encode(x, LCC2_10, "", num_threads=3)
    alone = np.concatenate([encode(x[i : i + 1], LCC2_10, "") for i in range(70)])
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"bits": 3}, "2 or 4 bits"),
        ({"seam_steps": -1}, "seam_steps"),
        ({"num_turns": 0}, "num_turns"),
        ({"columns": [1] * 12}, "newest and oldest"),
    ],
)
def test_the_binding_refuses_what_it_cannot_do(change, words):
    arguments = {
        "targets": np.zeros((1, 8), np.uint16),
        "columns": np.array(LCC2_12.columns, np.uint8),
        "levels": np.zeros(64, np.uint16),
        "bits": 2,
        "seam_steps": 8,
        "num_turns": 1,
        "num_threads": 1,
        "isa": "",
    } | {key: np.array(value, np.uint8) if key == "columns" else value for key, value in change.items()}
    with pytest.raises(ValueError, match=words):
        native.viterbi_encode(**arguments)
