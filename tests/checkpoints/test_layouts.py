"""One model in every layout loads to the same logits; a round trip changes no bit; damage is told by name."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from duomo.checkpoints import load_config, load_model, save_model
from duomo.checkpoints.names import pt_entries
from duomo.errors import (
    CheckpointError,
    ConfigError,
    CorruptFile,
    Error,
    MissingTensor,
    ShapeMismatch,
    UnexpectedTensor,
)
from duomo.model import Ernie, ModelConfig, preset
from tests.tiny import TINY, TINY_DENSE, TINY_TEXT, tiny_model

IDS = [5, 6, 7, 252, 8, 9]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(tiny_model(), tmp_path / "pt")
    return tmp_path / "pt"


def logits(folder: Path) -> Tensor:
    return load_model(folder).logits(IDS)


@pytest.mark.parametrize("config", [TINY, TINY_TEXT, TINY_DENSE, replace(TINY, tie_embeddings=False)])
def test_a_round_trip_is_bit_identical(config: ModelConfig, tmp_path: Path) -> None:
    model = tiny_model(config)
    save_model(model, tmp_path, max_shard_bytes=50_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    again = load_model(tmp_path)
    assert again.config == replace(config, name=tmp_path.name)
    for (name, ours), theirs in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_bf16_keeps_the_routers_in_fp32(tmp_path: Path) -> None:
    save_model(tiny_model(), tmp_path, dtype=torch.bfloat16)
    stored = load_file(tmp_path / "model.safetensors")
    for name, tensor in stored.items():
        kept = ".gate.weight" in name or "e_score_correction_bias" in name
        assert tensor.dtype == (torch.float32 if kept else torch.bfloat16), name
    assert load_model(tmp_path).embed.weight.dtype == torch.bfloat16


def to_paddle(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The -Paddle layout, written here from the specification alone (section 2.2)."""
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ".q_proj." in name:
            rows = [tensors[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            out["ernie." + name[6:].replace("q_proj", "qkv_proj")] = torch.cat(rows).T
        elif ".gate_proj." in name:
            rows = [tensor, tensors[name.replace("gate_proj", "up_proj")]]
            out["ernie." + name[6:].replace("gate_proj", "up_gate_proj")] = torch.cat(rows).T
        elif any(part in name for part in (".k_proj.", ".v_proj.", ".up_proj.")):
            continue
        else:
            kept = tensor.ndim != 2 or any(part in name for part in ("embed_tokens", ".gate.", "e_score"))
            key = "ernie." + name[6:] if name.startswith("model.") else name
            out[key] = tensor if kept else tensor.T
    return {name: tensor.contiguous() for name, tensor in out.items()}


def to_saved_by_transformers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("vision_model.", "model.vision_model."): tensor for name, tensor in tensors.items()}


def with_a_copied_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}


@pytest.mark.parametrize("rewrite", [to_paddle, to_saved_by_transformers, with_a_copied_head])
def test_other_layouts_give_identical_logits(
    rewrite: Callable[[dict[str, Tensor]], dict[str, Tensor]], folder: Path
) -> None:
    expected = logits(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(rewrite(tensors), folder / "model.safetensors")
    assert torch.equal(logits(folder), expected)


def test_paddles_uint16_is_bfloat16(tmp_path: Path) -> None:
    save_model(tiny_model(), tmp_path, dtype=torch.bfloat16)
    expected = logits(tmp_path)
    raw = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(raw.replace(b'"BF16"', b'"U16" '))
    assert torch.equal(logits(tmp_path), expected)


def test_a_file_saved_by_transformers_loads(tmp_path: Path) -> None:
    from tests.model.test_oracle import build_case, build_oracle, oracle_logits, pour

    ours, oracle = tiny_model(), build_oracle(TINY)
    pour(ours, oracle, "model.language_model.")
    oracle.save_pretrained(tmp_path)
    case = build_case([])
    again = load_model(tmp_path)
    assert (again.logits(case.ids) - oracle_logits(oracle, case)).abs().max().item() <= 1e-5
    native = {**oracle.state_dict()}
    native.pop("lm_head.weight")
    save_file({name: tensor.contiguous() for name, tensor in native.items()}, tmp_path / "model.safetensors")
    assert torch.equal(load_model(tmp_path).logits(case.ids), again.logits(case.ids))


def test_all_names_of_the_28b_come_from_its_config() -> None:
    config = preset("vl-28b-a3b")
    with torch.device("meta"):
        parameters = dict(Ernie(config).named_parameters())
    shapes = {e.name: tuple(e.view(parameters[e.ours]).shape) for e in pt_entries(config) if e.row is None}
    biases = {e.name: (2, 64) for e in pt_entries(config) if e.row is not None}
    shapes |= biases
    assert len(shapes) == 11_105
    assert sum(prod(shape) for shape in shapes.values()) == 29_399_294_336
    assert shapes["model.layers.27.mlp.gate.weight_1"] == (2560, 64)
    assert shapes["model.layers.1.mlp.experts.127.down_proj.weight"] == (2560, 512)
    assert shapes["vision_model.patch_embed.proj.weight"] == (1280, 588)
    assert shapes["model.resampler_model.temporal_linear.0.weight"] == (5120, 10240)


def change_tensors(**changes: Tensor | None) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors: dict[str, Any] = load_file(folder / "model.safetensors") | changes
        kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        save_file(kept, folder / "model.safetensors")

    return damage


def change_bytes(edit: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(edit(path.read_bytes()))

    return damage


def change_config(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        fields = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(fields))

    return damage


def write_index(weight_map: dict[str, str]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return damage


NORM = "model.norm.weight"
BAD = {
    "missing": (change_tensors(**{NORM: None}), MissingTensor, f"1 tensor is missing \\({NORM}\\)"),
    "unexpected": (change_tensors(extra=torch.ones(1)), UnexpectedTensor, "extra"),
    "shape": (
        change_tensors(**{NORM: torch.ones(3)}),
        ShapeMismatch,
        "shape \\(3,\\); the config asks for \\(64,\\)",
    ),
    "cut off": (change_bytes(lambda raw: raw[:-100]), CorruptFile, "tensor .*: 100 of its bytes are cut off"),
    "cut in the header": (change_bytes(lambda raw: raw[:50]), CorruptFile, "header is longer than the file"),
    "empty": (change_bytes(lambda raw: b""), CorruptFile, "header is longer"),
    "not json": (change_bytes(lambda raw: struct.pack("<Q", 4) + b"oops"), CorruptFile, "not JSON"),
    "a pickle": (change_bytes(lambda raw: b"\x80\x04" + raw), CorruptFile, "safetensors"),
    "unknown dtype": (change_bytes(lambda raw: raw.replace(b'"F32"', b'"F99"')), CorruptFile, "F99"),
    "unknown architecture": (change_config(model_type="llama"), ConfigError, "duomo runs"),
    "no config": (lambda folder: (folder / "config.json").unlink(), CheckpointError, "no config.json"),
    "config not json": (
        lambda folder: (folder / "config.json").write_text("{"),
        ConfigError,
        "not readable JSON",
    ),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        CheckpointError,
        "no .safetensors",
    ),
    "index outside": (write_index({"a": "../x.safetensors"}), CorruptFile, "not a file beside it"),
    "index to nothing": (
        write_index({"a": "gone.safetensors"}),
        CheckpointError,
        "gone.safetensors, which is not",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_damage_is_told_in_one_line(kind: str, folder: Path) -> None:
    damage, error, message = BAD[kind]
    damage(folder)
    with pytest.raises(error, match=message) as raised:
        load_model(folder)
    assert isinstance(raised.value, Error) and "\n" not in str(raised.value)


def test_a_folder_that_is_not_there() -> None:
    with pytest.raises(CheckpointError, match="no config"):
        load_config("/nowhere")
