"""FORMAT.md tells the truth: its decoder, retyped from the page, and its worked example."""

import re
from pathlib import Path

import numpy as np
import pytest

from duomo.checkpoints.quantized import VERSION, write_quantized
from duomo.trellis import LCC2_10, LCC2_12, LCC4_12, TrellisBank, TrellisTensor, encode_matrix

PAGE = (Path(__file__).parents[2] / "FORMAT.md").read_text()


def page_decoder():
    (source,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names = {}
    exec(source, names)  # our own page
    return names["read"]


def gaussian(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("code", [LCC2_10, LCC4_12], ids=lambda code: code.name)
@pytest.mark.parametrize("rows, columns, seed", [(64, 16, None), (128, 96, 3), (192, 192, 2**63 + 5)])
def test_the_decoder_of_the_page(code, rows, columns, seed, tmp_path):
    tensor = encode_matrix(gaussian(rows, columns), code, seed)
    bank = TrellisBank.of([tensor, encode_matrix(gaussian(rows, columns) * 3, code, seed)])
    write_quantized(tmp_path / "x.safetensors", {"a.b": tensor, "c": bank})
    read = dict(page_decoder()(tmp_path / "x.safetensors"))
    assert set(read) == {"a.b", "c"}
    np.testing.assert_allclose(read["a.b"], tensor.decode(), atol=1e-5)
    np.testing.assert_allclose(read["c"], bank.decode(), atol=1e-5)


def test_the_worked_example():
    (text,) = re.findall(r"`((?:[0-9a-f]{2} ?){4})`, the symbols", PAGE)
    codes = np.zeros(256, np.uint8)
    codes[::64] = list(bytes.fromhex(text))
    tensor = TrellisTensor(LCC2_12, codes, np.ones(64, np.float16), (64, 16), None)
    rows = re.findall(r"\| \d \| (\d+), (\d+) \| `([01 ]+)` \| (\d+) \| (-?\d+) \|", PAGE)
    assert len(rows) == 5
    for row, column, window, index, level in rows:
        assert LCC2_12.hash_table()[int(window.replace(" ", ""), 2)] == int(index)
        assert tensor.levels()[int(row), int(column)] == int(level) == LCC2_12.codebook[int(index)]


def test_the_page_is_of_this_version():
    assert PAGE.startswith(f"# The quantized checkpoint, version {VERSION}\n")
