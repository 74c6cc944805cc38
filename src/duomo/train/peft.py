"""Adapters in the files of PEFT: written, and attached to a model that trains (`checkpoints.adapters` reads).

Names are those of the PT layout, each expert by itself (`mlp.experts.{0..}.gate_proj`, vision experts after
the text ones), so that an adapter reads the same whatever the base is stored as.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from duomo.checkpoints.adapters import PREFIX, SETTINGS, WEIGHTS, AdapterFile, open_adapter
from duomo.checkpoints.names import pt_entries
from duomo.errors import MissingTensor, ShapeMismatch, TrainingError, UnexpectedTensor
from duomo.model import Ernie, ModelConfig
from duomo.train.groups import group_of
from duomo.train.lora import LoraBank, LoraLinear, LoraPlan, adapters_of, attach


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
        tensors[f"{PREFIX}{pair.module}.lora_A.weight"] = pair.a.detach().contiguous().clone()
        tensors[f"{PREFIX}{pair.module}.lora_B.weight"] = pair.b.detach().contiguous().clone()
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
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
    (folder / SETTINGS).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def load_adapter(model: Ernie, folder: Path) -> LoraPlan:
    """Attaches an adapter, ours or PEFT's. Every factor must have a place in the model and fit it.

    A module that the adapter leaves out gets factors of zero; one rank and scale a group, as `LoraPlan` says.
    """
    file = open_adapter(folder)
    plan = _plan_of(model.config, file)
    attach(model, plan)
    waiting = set(file.factors)
    with torch.no_grad():
        for pair in _pairs(model):
            found = file.factors.get(pair.module)
            if found is None:
                if "duomo" in file.fields:
                    name = f"{PREFIX}{pair.module}.lora_A.weight"
                    raise MissingTensor(f"the adapter in {folder} lacks {name}", name=name)
                pair.a.zero_()
                continue
            waiting.discard(pair.module)
            for letter, target in (("A", pair.a), ("B", pair.b)):
                if found[letter].shape != target.shape:
                    name = f"{PREFIX}{pair.module}.lora_{letter}.weight"
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
