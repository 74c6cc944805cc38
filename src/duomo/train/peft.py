"""Adapters in the files of PEFT: `adapter_config.json` and `adapter_model.safetensors`.

Names are those of the PT layout, each expert by itself (`mlp.experts.{0..}.gate_proj`, vision experts after
the text ones), so that an adapter reads the same whatever the base is stored as.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from duomo.checkpoints.names import pt_entries
from duomo.errors import CorruptFile, MissingTensor, ShapeMismatch, UnexpectedTensor
from duomo.model import Ernie, ModelConfig
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
        "target_modules": sorted({module.rsplit(".", 1)[1] for module in ranks}),
        "bias": "none",
        "lora_dropout": 0.0,
        "duomo": {"ranks": dict(plan.ranks), "scale": plan.scale},
    }
    (folder / "adapter_config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def load_adapter(model: Ernie, folder: Path) -> LoraPlan:
    """Attaches the adapter of a folder that `save_adapter` wrote. Every tensor must be there and fit."""
    try:
        fields = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        plan = LoraPlan(fields["duomo"]["ranks"], float(fields["duomo"]["scale"]))
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CorruptFile(f"{folder} holds no adapter of duomo: {type(error).__name__}: {error}") from error
    attach(model, plan)
    with torch.no_grad():
        for pair in _pairs(model):
            for letter, target in (("A", pair.a), ("B", pair.b)):
                name = f"{_PREFIX}{pair.module}.lora_{letter}.weight"
                if name not in tensors:
                    raise MissingTensor(f"the adapter in {folder} lacks {name}", name=name)
                found = tensors.pop(name)
                if found.shape != target.shape:
                    raise ShapeMismatch(f"{name} is {tuple(found.shape)}; it must be {tuple(target.shape)}")
                target.copy_(found)
    if tensors:
        name = sorted(tensors)[0]
        raise UnexpectedTensor(f"the adapter in {folder} has {name}, which its plan does not", name=name)
    return plan


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
