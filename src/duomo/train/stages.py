"""What a run starts from: the model, which of it trains, and the checkpoint's words and pictures.

Each stage has groups that train; `train:` in a recipe names others, `lora:` trains an adapter alone. A 2-bit
base is opened as it is (`train.frozen`), so only an adapter can be trained over it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from duomo.checkpoints import load_model
from duomo.checkpoints.load import load_config
from duomo.checkpoints.stream import is_quantized
from duomo.errors import TrainingError
from duomo.model import Ernie, init_weights
from duomo.model.config import SMALL
from duomo.model.experts import ExpertBank, Experts
from duomo.train.frozen import open_packed
from duomo.train.groups import GROUPS, freeze_all_but, parameters_by_group
from duomo.train.lora import LoraPlan, attach
from duomo.train.peft import load_adapter
from duomo.train.samples import Renderer
from duomo.train.settings import Settings

EMBEDDED = Path(__file__).parents[1] / "assets" / "tiny"
STAGE_GROUPS: dict[str, tuple[str, ...]] = {
    "text": ("text_experts", "text_routers", "shared", "attention", "dense", "norms", "embeddings"),
    "vision": ("vision_experts", "vision_routers", "resampler"),
    "joint": GROUPS,
    "thinking": GROUPS,
    "sft": GROUPS,
    "dpo": GROUPS,
    "grpo": GROUPS,
}
VISION_DOWN_SCALE = 1 / 6  # as ERNIEKit has it: the smaller expert starts as a faint copy
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(slots=True)
class Trained:
    """A model with what trains marked by `requires_grad`; `plan` where that is an adapter."""

    model: Ernie
    folder: Path
    renderer: Renderer
    plan: LoraPlan | None


def open_trained(settings: Settings, say: Callable[[str], None] = lambda line: None) -> Trained:
    """TrainingError for what cannot train, CheckpointError for a folder that is no model."""
    folder = Path(settings.model) if settings.model else EMBEDDED
    model = _open(settings, folder)
    if settings.vision_from_text:
        say(f"{vision_from_text(model)} vision experts start as their text experts")
    plan = None
    if settings.lora:
        plan = LoraPlan(dict(settings.lora.ranks), settings.lora.scale)
        if settings.adapter:
            plan = load_adapter(model, Path(settings.adapter))
        else:
            attach(model, plan, settings.seed)
    else:
        freeze_all_but(model, settings.train or _present(model, settings.stage))
    model.to(settings.device)
    return Trained(model, folder, Renderer.of(folder, model.config), plan)


def _open(settings: Settings, folder: Path) -> Ernie:
    if settings.init == "random":
        return init_weights(Ernie(load_config(folder)), settings.seed)
    if is_quantized(folder):
        if settings.lora is None:
            raise TrainingError(
                f"{folder} is quantized, and packed codes cannot train; give lora for an adapter over them"
            )
        model = load_model(folder)
        open_packed(model)
        return model
    # A full run keeps fp32 weights to step on. Under an adapter the base may rest in bf16, which saves memory
    # where it is large; torch computes in it slowly on a CPU (`train.precision`), so a small one does not.
    model = load_model(folder, _DTYPES[settings.dtype] if settings.lora else torch.float32)
    is_small = sum(parameter.numel() for parameter in model.parameters()) < SMALL
    return model.float() if settings.device == "cpu" and is_small else model


def _present(model: Ernie, stage: str) -> list[str]:
    present = parameters_by_group(model)
    found = [group for group in STAGE_GROUPS[stage] if group in present]
    if stage == "vision" and "vision_experts" not in found:
        raise TrainingError("the vision stage needs vision experts, and this model has none")
    return found


@torch.no_grad()
def vision_from_text(model: Ernie, down_scale: float = VISION_DOWN_SCALE) -> int:
    """Each vision expert becomes the first channels of the text expert of its number; returns how many.

    TrainingError where the banks differ in number, or vision experts are the wider ones.
    """
    count = 0
    for module in model.modules():
        if not isinstance(module, Experts) or module.vision is None:
            continue
        text, vision = module.text, module.vision
        if not isinstance(text, ExpertBank) or not isinstance(vision, ExpertBank):
            raise TrainingError("vision_from_text copies plain weights, and these are packed")
        (num_text, _, width), (num_vision, _, size) = text.down.shape, vision.down.shape
        if num_text != num_vision or size > width:
            raise TrainingError(
                f"vision_from_text needs as many experts of each kind and wider ones for text; this model "
                f"has {num_text} of {width} and {num_vision} of {size}"
            )
        vision.gate_up[:, :size] = text.gate_up[:, :size]
        vision.gate_up[:, size:] = text.gate_up[:, width : width + size]
        vision.down.copy_(text.down[:, :, :size] * down_scale)
        count += num_vision
    if not count:
        raise TrainingError("vision_from_text matches nothing: this model has no vision experts")
    return count
