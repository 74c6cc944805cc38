"""Adapters in the files of PEFT: `adapter_config.json` and `adapter_model.safetensors`.

Names are those of the PT layout, each expert by itself (`mlp.experts.{0..}.gate_proj`, vision experts after
the text ones), so that an adapter reads the same whatever the base is stored as.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from duomo.checkpoints.names import pt_entries
from duomo.errors import CorruptFile, MissingTensor, ShapeMismatch, TrainingError, UnexpectedTensor
from duomo.model import Ernie, ModelConfig
from duomo.train.groups import group_of
from duomo.train.lora import LoraBank, LoraLinear, LoraPlan, adapters_of, attach

_PREFIX = "base_model.model."


class _Pair(NamedTuple):
    """One module of the PT layout and the views of our A and B that belong to it."""

    module: str
    a: Tensor
    b: Tensor


def save_adapter(model: Ernie, plan: LoraPlan, folder: Path, base_name: str = "") -> None:
    """Writes the attached adapter."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = list(_pairs(model))
    tensors: dict[str, Tensor] = {}
    for pair in pairs:
        tensors[f"{_PREFIX}{pair.module}.lora_A.weight"] = pair.a.detach().contiguous().clone()
        tensors[f"{_PREFIX}{pair.module}.lora_B.weight"] = pair.b.detach().contiguous().clone()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    ranks = {pair.module: pair.a.shape[0] for pair in pairs}
    usual = max(ranks.values(), default=1)
    other = {module: rank for module, rank in ranks.items() if rank != usual}
    fields: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": usual,
        "lora_alpha": plan.scale * usual,
        "rank_pattern": other,
        "alpha_pattern": {module: plan.scale * rank for module, rank in other.items()},
        "target_modules": sorted(ranks),
        "bias": "none",
        "lora_dropout": 0.0,
        "duomo": {"ranks": dict(plan.ranks), "scale": plan.scale},
    }
    (folder / "adapter_config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


class AdapterFile:
    """An adapter's factors by module of the PT layout, with the scale of each; ours or PEFT's own."""

    def __init__(self, fields: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> None:
        self.fields, self.folder = fields, folder
        self.factors: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight", name)
            if match is None:
                raise UnexpectedTensor(
                    f"{folder} has {name}, which is no factor of a low-rank adapter", name=name
                )
            # transformers' multimodal class says model.language_model where the files say model.
            module = match[1].replace("model.language_model.", "model.")
            self.factors.setdefault(module, {})[match[2]] = tensor
        for module, pair in self.factors.items():
            for letter in "AB":
                if letter not in pair:
                    name = f"{_PREFIX}{module}.lora_{letter}.weight"
                    raise MissingTensor(f"the adapter in {folder} lacks {name}", name=name)
            if pair["A"].ndim != 2 or pair["B"].ndim != 2 or pair["A"].shape[0] != pair["B"].shape[1]:
                raise ShapeMismatch(f"the factors of {module} do not fit each other")
        self._waiting = set(self.factors)

    def scale(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) for rank-stabilised adapters; patterns name single modules."""
        fields = self.fields
        rank = self.factors[module]["A"].shape[0]
        alpha = float(_matched(fields.get("alpha_pattern") or {}, module, fields["lora_alpha"]))
        return alpha / (rank**0.5 if fields.get("use_rslora") else rank)

    def take(self, module: str) -> Tensor | None:
        """scale * B A, fp32, of a module that the adapter has."""
        if module not in self.factors:
            return None
        self._waiting.discard(module)
        pair = self.factors[module]
        return self.scale(module) * (pair["B"].float() @ pair["A"].float())

    def unused(self) -> list[str]:
        return sorted(self._waiting)


def _matched(pattern: dict[str, Any], module: str, usual: Any) -> Any:
    """PEFT's patterns are whole names, or their ends."""
    for key, value in pattern.items():
        if module == key or re.search(rf"(^|\.){key}$", module):
            return value
    return usual


def read_adapter(folder: Path) -> AdapterFile:
    """CorruptFile for what is no adapter; UnexpectedTensor, MissingTensor or ShapeMismatch name a factor."""
    try:
        fields = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        if fields["peft_type"] != "LORA":
            raise ValueError(f"its type is {fields['peft_type']}, and only LORA is read")
        for name in ("use_dora", "fan_in_fan_out", "lora_bias"):
            if fields.get(name):
                raise ValueError(f"it asks for {name}, which is not done here")
        float(fields["lora_alpha"])
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CorruptFile(f"{folder} holds no adapter: {type(error).__name__}: {error}") from error
    return AdapterFile(fields, tensors, folder)


def load_adapter(model: Ernie, folder: Path) -> LoraPlan:
    """Attaches an adapter, ours or PEFT's. Every factor must have a place in the model and fit it.

    A module that the adapter leaves out gets factors of zero; one rank and scale a group, as `LoraPlan` says.
    """
    file = read_adapter(folder)
    plan = _plan_of(model.config, file)
    attach(model, plan)
    waiting = set(file.factors)
    with torch.no_grad():
        for pair in _pairs(model):
            found = file.factors.get(pair.module)
            if found is None:
                if "duomo" in file.fields:
                    name = f"{_PREFIX}{pair.module}.lora_A.weight"
                    raise MissingTensor(f"the adapter in {folder} lacks {name}", name=name)
                pair.a.zero_()
                continue
            waiting.discard(pair.module)
            for letter, target in (("A", pair.a), ("B", pair.b)):
                if found[letter].shape != target.shape:
                    name = f"{_PREFIX}{pair.module}.lora_{letter}.weight"
                    said = f"{name} is {tuple(found[letter].shape)}; it must be {tuple(target.shape)}"
                    raise ShapeMismatch(said, name=name)
                target.copy_(found[letter])
    if waiting:
        name = sorted(waiting)[0]
        raise UnexpectedTensor(f"the adapter in {folder} has {name}, which this model does not", name=name)
    return plan


def _plan_of(config: ModelConfig, file: AdapterFile) -> LoraPlan:
    """Ranks by group; TrainingError where a group has several ranks, or the adapter several scales."""
    groups = {entry.name.removesuffix(".weight"): group_of(entry.ours) for entry in pt_entries(config)}
    ranks: dict[str, int] = {}
    scales: set[float] = set()
    for module, pair in file.factors.items():
        if module not in groups:
            raise UnexpectedTensor(
                f"the adapter in {file.folder} has {module}, which this model does not", name=module
            )
        rank, group = pair["A"].shape[0], groups[module]
        if ranks.setdefault(group, rank) != rank and "duomo" not in file.fields:
            raise TrainingError(f"{file.folder} has several ranks in {group}; one a group can be trained on")
        scales.add(round(file.scale(module), 9))
    if "duomo" in file.fields:
        said = file.fields["duomo"]
        return LoraPlan(said["ranks"], float(said["scale"]))
    if len(scales) != 1:
        raise TrainingError(f"{file.folder} has several scales; `duomo merge` takes it, training does not")
    return LoraPlan(ranks, scales.pop())


def _pairs(model: Ernie) -> Iterator[_Pair]:
    names = _linear_names(model.config)
    for ours, adapter in adapters_of(model).items():
        if isinstance(adapter, LoraLinear):
            yield _Pair(names[ours], adapter.a, adapter.b)
        else:
            yield from _bank_pairs(model.config, ours, adapter)


def _linear_names(config: ModelConfig) -> dict[str, str]:
    """Our linear modules to those of the PT layout."""
    return {
        entry.ours.removesuffix(".weight"): entry.name.removesuffix(".weight")
        for entry in pt_entries(config)
        if entry.ours.endswith(".weight")
    }


def _bank_pairs(config: ModelConfig, ours: str, adapter: LoraBank) -> Iterator[_Pair]:
    layer = ours.split(".")[2]
    is_vision = ours.endswith(".vision")
    assert config.text_experts is not None
    first = config.text_experts.num_experts if is_vision else 0
    for expert in range(adapter.gate_a.shape[0]):
        theirs = f"model.layers.{layer}.mlp.experts.{first + expert}"
        yield _Pair(f"{theirs}.gate_proj", adapter.gate_a[expert], adapter.gate_b[expert])
        yield _Pair(f"{theirs}.up_proj", adapter.up_a[expert], adapter.up_b[expert])
        yield _Pair(f"{theirs}.down_proj", adapter.down_a[expert], adapter.down_b[expert])
