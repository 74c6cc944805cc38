"""Parameters by the names people use: `text_experts`, `vision_experts`, `shared`, `attention`, ...

Every parameter is in exactly one group; `routers` selects those of both modalities, `all` every group.
Selecting a group that a model does not have is an error: a selector that silently matches nothing is how
experts stay frozen while everybody thinks they train.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import nn

from duomo.errors import TrainingError

_PATTERNS: tuple[tuple[str, str], ...] = (
    ("text_routers", r"\.mlp\.text(\.base)?\.router\."),
    ("vision_routers", r"\.mlp\.vision(\.base)?\.router\."),
    ("text_experts", r"\.mlp\.text\."),
    ("vision_experts", r"\.mlp\.vision\."),
    ("shared", r"\.mlp\.shared\."),
    ("vision_tower", r"^vision_tower\."),
    ("resampler", r"^resampler\."),
    ("attention", r"\.attention\."),
    ("dense", r"\.mlp\.(gate|up|down)\."),
    ("norms", r"norm"),
    ("embeddings", r"^(embed|head)\."),
)
GROUPS = tuple(name for name, _ in _PATTERNS)
ALIASES: dict[str, tuple[str, ...]] = {"routers": ("text_routers", "vision_routers"), "all": GROUPS}


class GroupSize(NamedTuple):
    """Tensors and values of one group."""

    num_tensors: int
    num_values: int


def group_of(name: str) -> str:
    """The group of a parameter's name."""
    for group, pattern in _PATTERNS:
        if re.search(pattern, name):
            return group
    raise AssertionError(f"{name} belongs to no group")


def parameters_by_group(model: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """All groups that the model has, in the order of GROUPS."""
    found: dict[str, list[tuple[str, nn.Parameter]]] = {group: [] for group in GROUPS}
    for name, parameter in model.named_parameters():
        found[group_of(name)].append((name, parameter))
    return {group: members for group, members in found.items() if members}


def group_sizes(model: nn.Module) -> dict[str, GroupSize]:
    return {
        group: GroupSize(len(members), sum(parameter.numel() for _, parameter in members))
        for group, members in parameters_by_group(model).items()
    }


def freeze_all_but(model: nn.Module, groups: Iterable[str]) -> None:
    """Only these groups train afterwards. The routers' correction biases never take a gradient."""
    present = parameters_by_group(model)
    wanted = select(groups, present)
    for group, members in present.items():
        for name, parameter in members:
            parameter.requires_grad_(group in wanted and not name.endswith(".router.bias"))


def optimizer_groups(
    model: nn.Module, rate: float, rates: Mapping[str, float], weight_decay: float
) -> list[dict[str, object]]:
    """Groups for torch's optimizers: `rates` are factors of `rate` by group; vectors are not decayed."""
    present = parameters_by_group(model)
    factors = {group: factor for name, factor in rates.items() for group in select([name], present)}
    found: list[dict[str, object]] = []
    for group, members in present.items():
        for decays in (True, False):
            chosen = [p for _, p in members if p.requires_grad and (p.ndim > 1) == decays]
            if chosen:
                decay = weight_decay if decays and group != "embeddings" else 0.0
                found.append(
                    {
                        "params": chosen,
                        "lr": rate * factors.get(group, 1.0),
                        "weight_decay": decay,
                        "group": group,
                    }
                )
    if not found:
        raise TrainingError("nothing would train: every parameter is frozen; name at least one group")
    return found


def select(names: Iterable[str], present: Mapping[str, object]) -> set[str]:
    """The groups that selectors name. TrainingError for one that is unknown or matches nothing."""
    found: set[str] = set()
    for name in names:
        members = [group for group in ALIASES.get(name, (name,)) if group in present]
        if not members:
            known = name in GROUPS or name in ALIASES
            kind = "matches nothing in this model" if known else "is unknown"
            raise TrainingError(f"the group {name!r} {kind}; it has {', '.join(present)}", group=name)
        found |= set(members)
    return found
