"""What a run needs to go on to the bit after it was killed: one file, replaced whole.

Weights that train, the routers' correction biases, the optimizer, the random states, expert usage and the
step, which is the whole data cursor (`packing.PackOrder` is a function of it). Weights that do not train are
read from the checkpoint again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from duomo.errors import TrainingError
from duomo.train.processes import Processes
from duomo.train.routing import Usage
from duomo.train.settings import Settings, to_fields

FREE_KEYS = frozenset({"save_every", "eval_every", "report_every", "tensorboard", "output", "device"})


def changing(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a run may change: what trains, and biases that are nudged."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or name.endswith(".router.bias")
    }


def save_state(
    path: Path,
    step: int,
    settings: Settings,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    usage: Usage,
    processes: Processes,
) -> None:
    """Everybody must call it; the first process writes."""
    parameters = changing(model)
    named = {name: processes.whole(p, p) for name, p in parameters.items()}
    moments = _mapped(optimizer, optimizer.state_dict(), processes.whole)
    if processes.rank:
        return
    fields = {
        "step": step,
        "settings": json.dumps(to_fields(settings)),
        "parameters": named,
        "optimizer": moments,
        "random": torch.get_rng_state(),
        "usage": {f"{place.layer}/{place.modality}": c for place, c in usage.counts.items()},
    }
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        torch.save(fields, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _mapped(
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    change: Callable[[nn.Parameter, torch.Tensor], torch.Tensor],
) -> dict[str, Any]:
    """A state dict of `optimizer` with every tensor changed by the parameter it belongs to."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = {
        index: {key: change(parameters[index], value) for key, value in moments.items()}
        for index, moments in sorted(state["state"].items())
    }
    return {**state, "state": tensors}


def read_state(path: Path, settings: Settings) -> dict[str, Any]:
    """TrainingError if the run in this folder was started with other settings."""
    try:
        fields: dict[str, Any] = torch.load(path, weights_only=True)
        before, now = json.loads(fields["settings"]), json.loads(json.dumps(to_fields(settings)))
    except Exception as error:  # torch raises anything for a damaged file
        raise TrainingError(f"{path} is no state of a run: {type(error).__name__}") from error
    other = [key for key in now if key not in FREE_KEYS and before.get(key) != now[key]]
    if other:
        key = other[0]
        raise TrainingError(
            f"the run in {path.parent} was started with {key}={before.get(key)!r}, not {now[key]!r}; "
            "give another output, or the same settings to go on"
        )
    return fields


@torch.no_grad()
def restore(
    fields: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    usage: Usage,
    processes: Processes,
) -> int:
    """Puts everything back, in each process its part; returns the steps already done."""
    parameters = changing(model)
    if parameters.keys() != fields["parameters"].keys():
        raise TrainingError("the state of the run is of another model")
    for name, parameter in parameters.items():
        parameter.copy_(processes.part(parameter, fields["parameters"][name]))
    optimizer.load_state_dict(_mapped(optimizer, fields["optimizer"], processes.part))
    torch.set_rng_state(fields["random"])
    for place, counts in usage.counts.items():
        counts.copy_(fields["usage"][f"{place.layer}/{place.modality}"])
    return int(fields["step"])
