"""An adapter in the files of PEFT, read for service: `adapter_config.json` and `adapter_model.safetensors`.

Names are those of the PT layout, each expert by itself; transformers' prefixes are taken too. Whatever the
file has that is not a low-rank pair of one of this model's matrices is refused by name: a pair that silently
does nothing would be an adapter that nobody can trust.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from duomo.checkpoints.names import pt_entries, pt_shapes
from duomo.errors import CorruptFile, MissingTensor, ShapeMismatch, UnexpectedTensor
from duomo.model import ModelConfig
from duomo.model.lowrank import Adapter, LowRank

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
_PAIR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_EXPERT = re.compile(r"(.+)\.experts\.(\d+)\.(gate|up|down)_proj")


def read_adapter(folder: Path, config: ModelConfig, dtype: torch.dtype) -> Adapter:
    """Factors in `dtype`, the scale folded into B.

    CorruptFile, UnexpectedTensor, MissingTensor or ShapeMismatch, with the name of what is wrong.
    """
    fields, tensors = _files(folder)
    shapes = pt_shapes(config)
    ours = {entry.name: entry.ours for entry in pt_entries(config)}
    adapter = Adapter()
    for module, (a, b) in _pairs(folder, tensors).items():
        name = f"{_plain_name(module)}.weight"
        if name not in ours or len(shapes[name]) != 2 or "embed" in name or ".mlp.gate." in name:
            raise UnexpectedTensor(f"the adapter in {folder} changes {module}; no adapter can", name=module)
        out_size, in_size = shapes[name]
        if a.ndim != 2 or a.shape[1] != in_size or tuple(b.shape) != (out_size, a.shape[0]):
            raise ShapeMismatch(
                f"the adapter's {module} is {tuple(b.shape)} times {tuple(a.shape)}; "
                f"the weight is {out_size} x {in_size}"
            )
        scale = _scale(folder, fields, module, a.shape[0])
        _place(adapter, config, name, ours[name], LowRank(a.float(), b.float() * scale).to(dtype))
    return adapter


def _files(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        fields = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise CorruptFile(f"{folder} holds no adapter: {type(error).__name__}: {error}") from error
    if not isinstance(fields, dict) or fields.get("peft_type") != "LORA":
        raise CorruptFile(f"{folder}/{SETTINGS} describes no LoRA (peft_type)")
    for name in ("use_dora", "fan_in_fan_out", "lora_bias"):
        if fields.get(name):
            raise CorruptFile(f"{folder}/{SETTINGS} asks for {name}, which duomo does not do")
    return fields, tensors


def _pairs(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found = _PAIR.fullmatch(name)
        if found is None:
            raise UnexpectedTensor(f"the adapter in {folder} has {name}, which is no factor", name=name)
        halves.setdefault(found[1], {})[found[2]] = tensor
    for module, both in halves.items():
        for letter in "AB":
            if letter not in both:
                name = f"base_model.model.{module}.lora_{letter}.weight"
                raise MissingTensor(f"the adapter in {folder} lacks {name}", name=name)
    return {module: (both["A"], both["B"]) for module, both in halves.items()}


def _scale(folder: Path, fields: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / r as PEFT has it, patterns by the end of a module's name first."""
    try:
        alpha = float(_matching(fields.get("alpha_pattern") or {}, module, fields["lora_alpha"]))
    except (KeyError, TypeError, ValueError, re.error) as error:
        raise CorruptFile(f"{folder}/{SETTINGS} has no usable lora_alpha") from error
    return alpha / (math.sqrt(rank) if fields.get("use_rslora") else rank)


def _matching(patterns: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    if module in patterns:
        return patterns[module]
    return next((v for key, v in patterns.items() if module.endswith("." + key)), otherwise)


def _plain_name(module: str) -> str:
    """Without the prefixes that transformers' model puts before language model and tower."""
    for theirs, plain in (("model.language_model.", "model."), ("model.vision_model.", "vision_model.")):
        if module.startswith(theirs):
            return plain + module.removeprefix(theirs)
    return module


def _place(adapter: Adapter, config: ModelConfig, name: str, ours: str, low: LowRank) -> None:
    found = _EXPERT.fullmatch(name.removesuffix(".weight"))
    if found is None:
        adapter.linears[ours.removesuffix(".weight")] = low
        return
    bank, expert = ours.rpartition(".")[0], int(found[2])
    if bank.endswith(".vision"):
        assert config.text_experts is not None
        expert -= config.text_experts.num_experts
    adapter.experts.setdefault(bank, {}).setdefault(expert, {})[found[3]] = low
