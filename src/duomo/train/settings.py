"""What a RECIPE.yaml says, checked before anything is loaded: `Settings`, frozen.

`read_settings` takes the file and `key=value` overrides (`lora.ranks.attention=8`). ERNIEKit's keys are read
too: those that mean something here are translated, the others are named in a warning, never dropped silently.
A key that nobody knows is an error with the nearest name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import msgspec

from duomo.errors import TrainingError
from duomo.train.erniekit import translate
from duomo.train.lora import LoraPlan

Stage = Literal["text", "vision", "joint", "thinking", "sft", "dpo", "grpo"]
PerModality = float | dict[Literal["text", "vision"], float]


class LoraSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Ranks by group; the added weight is `scale` * B A. A rate for a group's adapters is in `rates`."""

    ranks: dict[str, int] = msgspec.field(default_factory=lambda: LoraPlan.usual(8))
    scale: float = 2.0


class LossSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Coefficients; a number is for both modalities, {text: .., vision: ..} for each."""

    balance: PerModality = 0.0
    router_z: PerModality = 0.0
    orthogonality: PerModality = 0.0
    decoupled: bool = False  # orthogonality as a step of its own after the optimizer's
    bias_update: PerModality = 0.0  # of the correction bias; no loss
    token_balanced: bool = False


class PreferenceSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    loss: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5
    dpop_weight: float = 50.0
    answer_weight: float = 0.0  # of cross-entropy on the chosen answer, beside the preference


class RewardSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """GRPO: `group_size` answers a question, drawn by the engine, judged by `reward`."""

    reward: str = "exact"
    group_size: int = 8
    temperature: float = 1.0
    max_new_tokens: int = 64
    clip: float = 0.2
    kl: float = 0.0  # of the distance to the model that the run began with
    shuffled: bool = False  # a control: every reward is given to another answer


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One run. Paths are relative to where the command is run."""

    stage: Stage
    output: str
    data: list[str]
    model: str = ""  # a checkpoint's folder, plain or 2-bit; "" is the embedded model
    eval_data: list[str] = []
    init: Literal["weights", "random"] = "weights"  # random keeps the checkpoint's sizes alone
    seed: int = 0
    steps: int = 0  # 0: by `epochs`
    epochs: float = 1.0
    max_tokens: int = 2048  # of a pack
    max_patches: int = 16384  # of a pack, through the vision tower
    packs_per_step: int = 1
    packing: Literal["best_fit", "naive", "none"] = "best_fit"
    too_long: Literal["error", "leave_out"] = "error"
    train: list[str] = []  # groups; empty: those of the stage
    lora: LoraSettings | None = None
    adapter: str = ""  # an adapter's folder to go on from
    optimizer: Literal["adamw", "muon"] = "adamw"
    rate: float = 1e-4
    rates: dict[str, float] = {}
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    floor: float = 0.1  # of the rate, at the end
    warmup_steps: int = 0
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip: float = 1.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "cpu"
    vision_from_text: bool = False  # vision experts start as the first channels of the text experts
    losses: LossSettings = LossSettings()
    preference: PreferenceSettings = PreferenceSettings()
    grpo: RewardSettings = RewardSettings()
    save_every: int = 200
    save_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    eval_every: int = 0
    report_every: int = 10
    tensorboard: bool = True

    def __post_init__(self) -> None:
        def need(condition: bool, said: str) -> None:
            if not condition:
                raise TrainingError(said)

        need(bool(self.data), "data must name at least one .jsonl file")
        need(self.rate > 0, f"rate is {self.rate}; it must be above zero")
        need(self.steps >= 0 and self.epochs > 0, "steps must be 0 or more, epochs above 0")
        for name in ("max_tokens", "max_patches", "packs_per_step", "save_every", "report_every"):
            need(getattr(self, name) > 0, f"{name} must be above zero")
        need(not (self.lora and self.train), "give either lora or train: with lora the adapter alone trains")
        need(not self.adapter or self.lora is not None, "adapter goes on training an adapter; say lora too")
        need(self.init == "weights" or self.lora is None, "an adapter on random weights learns nothing")
        need(self.stage != "grpo" or self.packing == "none", "grpo takes one question a pack: packing=none")
        need(self.grpo.group_size > 1, "grpo.group_size must be above one: answers are compared")

    @property
    def folder(self) -> Path:
        return Path(self.output)


def coefficient(value: PerModality, modality: str) -> float:
    return value if isinstance(value, (int, float)) else value.get(modality, 0.0)  # type: ignore[call-overload]


@dataclass(frozen=True, slots=True)
class Reading:
    """Settings and what was found odd while reading them."""

    settings: Settings
    warnings: tuple[str, ...]


def read_settings(
    recipe: Path | Mapping[str, Any], overrides: Sequence[str] = (), base: Mapping[str, Any] | None = None
) -> Reading:
    """A file or a mapping, `base` under it, `key=value` over it. TrainingError names the wrong key."""
    fields = dict(base or {}) | (dict(recipe) if isinstance(recipe, Mapping) else _read_file(recipe))
    for override in overrides:
        _override(fields, override)
    fields, warnings = translate(fields)
    for name in fields:
        if name not in Settings.__struct_fields__:
            near = get_close_matches(name, Settings.__struct_fields__, n=1)
            hint = (
                f"did you mean {near[0]}?" if near else f"known are {', '.join(Settings.__struct_fields__)}"
            )
            raise TrainingError(f"the recipe has {name!r}, which means nothing; {hint}", key=name)
    for name in ("data", "eval_data", "train"):
        if name in fields and fields[name] is None:
            fields[name] = []
        if isinstance(fields.get(name), str):
            fields[name] = [part for part in str(fields[name]).split(",") if part]
    try:
        return Reading(msgspec.convert(fields, Settings, strict=True), tuple(warnings))
    except msgspec.ValidationError as error:
        raise TrainingError(f"the recipe cannot be right: {error}") from error


def to_fields(settings: Settings) -> dict[str, Any]:
    """Plain values, as a recipe would say them."""
    return msgspec.to_builtins(settings)  # type: ignore[no-any-return]


def _read_file(path: Path) -> dict[str, Any]:
    import yaml

    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TrainingError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TrainingError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(fields, dict) or not all(isinstance(key, str) for key in fields):
        raise TrainingError(f"{path} must be a list of `key: value` lines")
    return _numbers(fields)  # type: ignore[no-any-return]


def _override(fields: dict[str, Any], text: str) -> None:
    import yaml

    path, sign, value = text.partition("=")
    if not sign or not path:
        raise TrainingError(f"{text!r} is no override; write key=value, as rate=1e-4 or lora.scale=1")
    *parents, last = path.split(".")
    home = fields
    for parent in parents:
        inner = home.get(parent)
        home[parent] = dict(inner) if isinstance(inner, Mapping) else {}
        home = home[parent]
    try:
        home[last] = _numbers(yaml.safe_load(value))
    except yaml.YAMLError as error:
        raise TrainingError(f"the value of {path!r} is no YAML: {value!r}") from error


def _numbers(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 as a text; people mean the number."""
    if isinstance(value, dict):
        return {key: _numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_numbers(inner) for inner in value]
    if isinstance(value, str):
        mantissa, sign, exponent = value.lower().partition("e")
        if sign and mantissa.replace(".", "", 1).isdigit() and exponent.lstrip("+-").isdigit():
            return float(value)
    return value
