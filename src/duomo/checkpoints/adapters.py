"""An adapter in the files of PEFT, read: `adapter_config.json` and `adapter_model.safetensors`.

Names are those of the PT layout, each expert by itself; transformers' prefixes are taken too. `AdapterFile`
is what service, training and merging share, so that all three give an adapter the same scale; `read_adapter`
is for service. Whatever the file has that is not a low-rank pair of one of this model's matrices is refused
by name: a pair that silently does nothing would be an adapter that nobody can trust.
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
PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")
_NAME = re.compile(r"[\w.]+")
_EXPERT = re.compile(r"(.+)\.experts\.(\d+)\.(gate|up|down)_proj")


class AdapterFile:
    """An adapter's factors by module of the PT layout, with the scale of each; ours or PEFT's own."""

    def __init__(self, fields: dict[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> None:
        self.fields, self.folder = fields, folder
        self.factors: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            found = _FACTOR.fullmatch(name)
            if found is None:
                raise UnexpectedTensor(f"the adapter in {folder} has {name}, which is no factor", name=name)
            self.factors.setdefault(_plain_name(found[1]), {})[found[2]] = tensor
        for module, pair in self.factors.items():
            for letter in "AB":
                if letter not in pair:
                    name = f"{PREFIX}{module}.lora_{letter}.weight"
                    raise MissingTensor(f"the adapter in {folder} lacks {name}", name=name)
            if pair["A"].ndim != 2 or pair["B"].ndim != 2 or pair["A"].shape[0] != pair["B"].shape[1]:
                raise ShapeMismatch(f"the factors of {module} do not fit each other")
        self._waiting = set(self.factors)

    def scale(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) for rank-stabilised adapters; patterns name single modules."""
        rank = self.factors[module]["A"].shape[0]
        try:
            alpha = float(_matched(self.fields.get("alpha_pattern") or {}, module, self.fields["lora_alpha"]))
        except (AttributeError, KeyError, TypeError, ValueError, re.error) as error:
            raise CorruptFile(f"{self.folder}/{SETTINGS} has no usable lora_alpha") from error
        return alpha / (math.sqrt(rank) if self.fields.get("use_rslora") else rank)

    def take(self, module: str) -> Tensor | None:
        """scale * B A, fp32, of a module that the adapter has."""
        if module not in self.factors:
            return None
        self._waiting.discard(module)
        pair = self.factors[module]
        return self.scale(module) * (pair["B"].float() @ pair["A"].float())

    def unused(self) -> list[str]:
        return sorted(self._waiting)


def open_adapter(folder: Path) -> AdapterFile:
    """CorruptFile for what is no adapter; UnexpectedTensor, MissingTensor or ShapeMismatch name a factor."""
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
    try:
        float(fields["lora_alpha"])
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFile(f"{folder}/{SETTINGS} has no usable lora_alpha") from error
    return AdapterFile(fields, tensors, folder)


def read_adapter(folder: Path, config: ModelConfig, dtype: torch.dtype) -> Adapter:
    """Factors in `dtype`, the scale folded into B.

    CorruptFile, UnexpectedTensor, MissingTensor or ShapeMismatch, with the name of what is wrong.
    """
    file = open_adapter(folder)
    shapes = pt_shapes(config)
    ours = {entry.name: entry.ours for entry in pt_entries(config)}
    adapter = Adapter()
    for module, pair in file.factors.items():
        a, b, name = pair["A"], pair["B"], f"{module}.weight"
        if name not in ours or len(shapes[name]) != 2 or "embed_tokens" in name or ".mlp.gate." in name:
            raise UnexpectedTensor(f"the adapter in {folder} changes {module}; no adapter can", name=module)
        out_size, in_size = shapes[name]
        if a.shape[1] != in_size or b.shape[0] != out_size:
            raise ShapeMismatch(
                f"the adapter's {module} is {tuple(b.shape)} times {tuple(a.shape)}; "
                f"the weight is {out_size} x {in_size}"
            )
        low = LowRank(a.float(), b.float() * file.scale(module))
        _place(adapter, config, name, ours[name], low.to(dtype))
    return adapter


def _matched(patterns: Mapping[str, Any], module: str, usual: Any) -> Any:
    """PEFT's patterns are names or expressions, for a whole module or its end; whole names first.

    Ours name every expert, so a plain name is compared as text: an expression for each would take minutes.
    """
    if module in patterns:
        return patterns[module]
    for key, value in patterns.items():
        is_name = _NAME.fullmatch(key) is not None
        if module.endswith(f".{key}") if is_name else re.search(rf"(^|\.){key}$", module):
            return value
    return usual


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
