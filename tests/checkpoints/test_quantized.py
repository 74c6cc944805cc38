"""The quantized file: round trips, readable by safetensors itself, and every kind of damage named."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open

from duomo.checkpoints.quantized import (
    QuantizedFile,
    dequantize,
    open_quantized,
    read_quantized,
    write_quantized,
)
from duomo.errors import CorruptFile, MissingTensor
from duomo.trellis import LCC2_10, LCC4_12, TrellisBank, encode_int, encode_matrix


def gaussian(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module")
def tensors():
    experts = [encode_matrix(gaussian(64, 32) * (1 + e), LCC2_10, seed=9) for e in range(2)]
    return {
        "layer.gate_up": TrellisBank.of(experts),
        "layer.q": encode_matrix(gaussian(64, 16), LCC4_12, seed=None),
        "embed.weight": encode_int(gaussian(8, 16), 8, seed=4),
        "head.weight": encode_int(gaussian(8, 16), 6, seed=4),
        "norm.weight": torch.randn(16),
        "router.bias": torch.randn(3).bfloat16(),
    }


@pytest.fixture
def path(tensors, tmp_path):
    path = tmp_path / "model.safetensors"
    assert write_quantized(path, tensors) == path.stat().st_size
    return path


def test_round_trip(tensors, path):
    file = QuantizedFile(path)
    assert file.names() and set(file.names()) == set(tensors)
    for name, tensor in tensors.items():
        read = file.read(name)
        assert type(read) is type(tensor)
        torch.testing.assert_close(dequantize(read), dequantize(tensor), rtol=0, atol=0)
        assert file.shape(name) == tuple(tensor.shape)
    assert file.num_bytes("layer.gate_up") == tensors["layer.gate_up"].num_bytes
    assert file.num_bytes("head.weight") == tensors["head.weight"].num_bytes == 8 * 12 + 16


def test_six_bits_stay_packed_in_the_file(tensors, path):
    read = QuantizedFile(path).read("head.weight")
    np.testing.assert_array_equal(read.codes, tensors["head.weight"].codes)
    assert read.codes.shape == (8, 12) and not read.codes.flags.owndata and not read.codes.flags.writeable


def test_a_folder_is_the_union_of_its_files(tensors, tmp_path):
    for index, (name, tensor) in enumerate(tensors.items()):
        write_quantized(tmp_path / f"part-{index}.safetensors", {name: tensor})
    assert {name for name, _ in read_quantized(tmp_path)} == set(tensors)
    write_quantized(tmp_path / "again.safetensors", {"layer.q": tensors["layer.q"]})
    with pytest.raises(CorruptFile, match=r"layer.q is in both again.safetensors"):
        open_quantized(tmp_path)


def test_a_file_is_read_by_its_own_code_tables(tmp_path):
    """Shipped tables may improve: a file written before goes on meaning what it meant."""
    older = replace(LCC2_10, codebook=tuple(-level for level in LCC2_10.codebook), unit=0.05)
    tensor = encode_matrix(gaussian(64, 32), older, seed=9)
    write_quantized(tmp_path / "old.safetensors", {"w": tensor})
    read = QuantizedFile(tmp_path / "old.safetensors").read("w")
    assert read.code == older != LCC2_10
    torch.testing.assert_close(dequantize(read), dequantize(tensor), rtol=0, atol=0)


def test_safetensors_can_read_it(tensors, path):
    with safe_open(path, "pt") as file:
        assert file.metadata()["format"] == "duomo-quantized"
        expected = torch.from_numpy(tensors["layer.q"].codes)
        torch.testing.assert_close(file.get_tensor("layer.q.codes"), expected)


def test_writing_leaves_no_partial_file(path):
    assert [p.name for p in path.parent.iterdir()] == ["model.safetensors"]


def test_a_missing_tensor_is_named(path):
    with pytest.raises(MissingTensor, match=r"'layer\.k'"):
        QuantizedFile(path).read("layer.k")


def test_every_flipped_byte_is_noticed(tensors, path):
    good = path.read_bytes()
    length = 8 + int.from_bytes(good[:8], "little")
    places = [*range(0, length, 7), *range(length, len(good), 11)]
    for place in places:
        for flip in (0x01, 0x80):
            bad = bytearray(good)
            bad[place] ^= flip
            path.write_bytes(bad)
            with pytest.raises(CorruptFile) as caught:
                file = QuantizedFile(path)
                for name in file.names():
                    file.read(name)
            if place >= length:
                assert any(name in caught.value.message for name in tensors)


@pytest.mark.parametrize("left", [0, 7, 100, -1, -100])
def test_a_cut_file_is_noticed(path, left):
    good = path.read_bytes()
    path.write_bytes(good[: left if left >= 0 else len(good) + left])
    with pytest.raises(CorruptFile, match=r"cut short" if left < 0 else "model.safetensors"):
        QuantizedFile(path)


def test_a_cut_file_names_the_tensor_it_cuts(path):
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptFile) as caught:
        QuantizedFile(path)
    assert caught.value.tensor.startswith("layer.") or caught.value.tensor.startswith("head.")


@pytest.mark.parametrize(
    "key, value, words", [("version", "2", "format version 2"), ("format", "x", "format is 'x'")]
)
def test_an_unknown_version_is_refused(path, key, value, words):
    good = path.read_bytes()
    length = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + length])
    header["__metadata__"][key] = value
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + good[8 + length :])
    with pytest.raises(CorruptFile, match=words):
        QuantizedFile(path)
