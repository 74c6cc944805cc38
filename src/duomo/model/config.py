"""The sizes and rules of one ERNIE-4.5 model, from either dialect of config.json.

Baidu's own files say `ernie4_5_moe_vl` (also `ernie4_5_moe`, `ernie4_5`), those of transformers say
`ernie4_5_vl_moe`; both become one frozen `ModelConfig`, and `to_json` writes Baidu's dialect back.
Text-only and dense siblings are the same model with no vision tower, one bank, or none.
A fact worth knowing: layer kinds are explicit here (`expert_layers`), since the two dialects count them
differently and Baidu's `moe_layer_end_index` may lie beyond the last layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from duomo.errors import ConfigError

VL_TYPES = ("ernie4_5_moe_vl", "ernie4_5_vl_moe", "ernie4_5_vl")
SMALL = 1 << 30  # parameters below which a model computes in fp32, if nobody says otherwise
TEXT_TYPES = ("ernie4_5_moe", "ernie4_5")


class VisionRule(Enum):
    """Which tokens go to the vision experts. Released weights were trained with one of the two (spec 3.5)."""

    PATCHES_AND_DELIMITERS = "A"  # placeholders and the four start/end markers
    FROM_IM_PATCH_ID = "B"  # every id >= im_patch_id, location tokens too


@dataclass(frozen=True, slots=True)
class BankConfig:
    """One bank of routed experts: how many, and the width F of each."""

    num_experts: int
    expert_size: int


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """The vision tower (ViT with 2D rotary positions) and the merges of the resampler."""

    num_layers: int = 32
    hidden_size: int = 1280
    intermediate_size: int = 5120
    num_heads: int = 16
    in_channels: int = 3
    patch_px: int = 14
    spatial_merge: int = 2
    temporal_merge: int = 2
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0

    @property
    def patch_size(self) -> int:
        """Values of one patch, 3*14*14."""
        return self.in_channels * self.patch_px * self.patch_px


@dataclass(frozen=True, slots=True)
class SpecialIds:
    """Ids the model itself must know. Videos use Baidu's shared placeholder unless the file has its own."""

    pad: int = 0
    bos: int = 1
    eos: int = 2
    image_patch: int = 100295
    video_patch: int = 100295
    image_start: int = 101304
    image_end: int = 101305
    video_start: int = 101306
    video_end: int = 101307

    @property
    def vision(self) -> tuple[int, ...]:
        markers = (self.image_start, self.image_end, self.video_start, self.video_end)
        return tuple(dict.fromkeys((self.image_patch, self.video_patch, *markers)))


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Everything that determines the shapes and the arithmetic of a model."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    expert_layers: tuple[bool, ...]
    text_experts: BankConfig | None = None
    vision_experts: BankConfig | None = None
    num_chosen: int = 0
    shared_size: int = 0  # width of the fused shared experts; 0: none
    vision: VisionConfig | None = None
    norm_eps: float = 1e-5
    router_norm_min: float = 1e-12
    rope_theta: float = 500000.0
    rope_section: tuple[int, int, int] | None = None  # pairs for (h, w, t); None: one-dimensional
    max_positions: int = 131072
    initializer_range: float = 0.02
    use_bias: bool = False
    tie_embeddings: bool = True
    ids: SpecialIds = field(default_factory=SpecialIds)
    vision_rule: VisionRule = VisionRule.PATCHES_AND_DELIMITERS
    name: str = ""  # a preset's or a folder's, for people

    def __post_init__(self) -> None:
        _check(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> ModelConfig:
        """Reads either dialect. ConfigError for an unknown architecture or sizes that contradict."""
        kind = fields.get("model_type")
        if kind not in VL_TYPES + TEXT_TYPES:
            known = ", ".join(VL_TYPES[:2] + TEXT_TYPES)
            raise ConfigError(f"model_type is {kind!r}; duomo runs {known}", model_type=kind)
        try:
            if "text_config" in fields:
                return _from_native(fields)
            return _from_baidu(fields)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"config.json of a {kind}: {type(error).__name__}: {error}") from error

    def to_json(self) -> dict[str, Any]:
        """Baidu's dialect, which `from_json` reads back to an equal config."""
        return _to_baidu(self)

    @property
    def is_multimodal(self) -> bool:
        return self.vision is not None

    @property
    def num_expert_layers(self) -> int:
        return sum(self.expert_layers)


def _check(config: ModelConfig) -> None:
    def need(condition: bool, message: str) -> None:
        if not condition:
            raise ConfigError(message)

    sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
    for name in (*sizes, "intermediate_size"):
        value = getattr(config, name)
        need(isinstance(value, int) and value > 0, f"{name} is {value!r}; it must be a positive integer")
    need(config.head_dim % 2 == 0, f"head_dim is {config.head_dim}; rotary positions need an even one")
    need(
        config.num_heads % config.num_kv_heads == 0,
        f"{config.num_heads} query heads do not divide over {config.num_kv_heads} key heads",
    )
    need(len(config.expert_layers) == config.num_layers, "expert_layers must name every layer")
    if config.rope_section is not None:
        height, width, time = config.rope_section
        total, half = height + width + time, config.head_dim // 2
        need(total == half, f"rope_section {config.rope_section} sums to {total}; head_dim/2 is {half}")
        need(height == width, f"rope_section {config.rope_section}: h and w alternate, so must be equal")
    for bank in (config.text_experts, config.vision_experts):
        if bank is not None:
            need(
                0 < config.num_chosen <= bank.num_experts,
                f"moe_k is {config.num_chosen}; the bank has {bank.num_experts} experts",
            )
    if any(config.expert_layers):
        need(config.text_experts is not None, "layers have experts, but no bank of text experts is given")
    if config.vision is not None:
        heads, width = config.vision.num_heads, config.vision.hidden_size
        need(width % heads == 0, f"the vision width {width} does not divide over {heads} heads")
        need(
            (width // heads) % 4 == 0, f"vision heads of {width // heads}: 2D rotation needs a multiple of 4"
        )


def _pair(value: Any) -> tuple[Any, Any]:
    """(text, vision) from a list of two, or the same value twice."""
    if isinstance(value, (list, tuple)):
        return (value[0], value[1]) if len(value) > 1 else (value[0], value[0])
    return value, value


def _expert_layers(fields: Mapping[str, Any], num_layers: int) -> tuple[bool, ...]:
    start = _pair(fields.get("moe_layer_start_index", 0))[0]
    end = _pair(fields.get("moe_layer_end_index", -1))[0]
    interval = int(fields.get("moe_layer_interval", 1))
    last = num_layers - 1 if end == -1 else min(int(end), num_layers - 1)
    return tuple((index + 1) % interval == 0 and start <= index <= last for index in range(num_layers))


def _from_baidu(fields: Mapping[str, Any]) -> ModelConfig:
    is_vl = fields["model_type"] in VL_TYPES
    num_layers = int(fields["num_hidden_layers"])
    num_heads = int(fields["num_attention_heads"])
    head_dim = fields.get("head_dim") or int(fields["hidden_size"]) // num_heads
    counts, widths = _pair(fields.get("moe_num_experts") or 0), _pair(fields.get("moe_intermediate_size", 0))
    has_experts = bool(counts[0])
    section = None
    if is_vl:
        time = int(fields.get("freq_allocation", 20))
        side = (head_dim // 2 - time) // 2
        section = (side, side, time)
    rope = fields.get("rope_parameters") or {}
    return ModelConfig(
        vocab_size=int(fields["vocab_size"]),
        hidden_size=int(fields["hidden_size"]),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=int(fields.get("num_key_value_heads") or num_heads),
        head_dim=int(head_dim),
        intermediate_size=int(fields["intermediate_size"]),
        expert_layers=_expert_layers(fields, num_layers) if has_experts else (False,) * num_layers,
        text_experts=BankConfig(int(counts[0]), int(widths[0])) if has_experts else None,
        vision_experts=BankConfig(int(counts[1]), int(widths[1])) if has_experts and is_vl else None,
        num_chosen=int(fields.get("moe_k", 0)) if has_experts else 0,
        shared_size=int(fields.get("moe_num_shared_experts") or 0) * int(widths[0]) if has_experts else 0,
        vision=_vision(fields["vision_config"], fields) if is_vl else None,
        norm_eps=float(fields.get("rms_norm_eps", 1e-5)),
        router_norm_min=float(fields.get("moe_norm_min", 1e-12)),
        rope_theta=float(fields.get("rope_theta") or rope.get("rope_theta") or 500000.0),
        rope_section=section,
        max_positions=int(fields.get("max_position_embeddings", 131072)),
        initializer_range=float(fields.get("initializer_range", 0.02)),
        use_bias=bool(fields.get("use_bias", False)),
        tie_embeddings=bool(fields.get("tie_word_embeddings", True)),
        ids=_special_ids(fields, fields.get("im_patch_id", 100295)),
        vision_rule=VisionRule(fields.get("vision_rule", "A")),
    )


def _from_native(fields: Mapping[str, Any]) -> ModelConfig:
    text = fields["text_config"]
    num_layers, num_heads = int(text["num_hidden_layers"]), int(text["num_attention_heads"])
    head_dim = int(text.get("head_dim") or int(text["hidden_size"]) // num_heads)
    rope = text.get("rope_parameters") or {}
    counts, widths = _pair(text.get("moe_num_experts", 64)), _pair(text.get("moe_intermediate_size"))
    kinds = text.get("mlp_layer_types") or ["dense"] + ["sparse"] * (num_layers - 1)
    height, width, time = rope.get("mrope_section") or (22, 22, 20)
    return ModelConfig(
        vocab_size=int(text["vocab_size"]),
        hidden_size=int(text["hidden_size"]),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=int(text.get("num_key_value_heads") or num_heads),
        head_dim=head_dim,
        intermediate_size=int(text["intermediate_size"]),
        expert_layers=tuple(kind == "sparse" for kind in kinds),
        text_experts=BankConfig(int(counts[0]), int(widths[0])),
        vision_experts=BankConfig(int(counts[1]), int(widths[1])),
        num_chosen=int(text.get("moe_k", 6)),
        shared_size=int(text.get("moe_num_shared_experts") or 0) * int(widths[0]),
        vision=_vision(fields["vision_config"], fields),
        norm_eps=float(text.get("rms_norm_eps", 1e-5)),
        router_norm_min=float(text.get("moe_norm_min", 1e-12)),
        rope_theta=float(rope.get("rope_theta", 500000.0)),
        rope_section=(int(height), int(width), int(time)),
        max_positions=int(text.get("max_position_embeddings", 131072)),
        initializer_range=float(text.get("initializer_range", 0.02)),
        use_bias=bool(text.get("use_bias", False)),
        tie_embeddings=bool(fields.get("tie_word_embeddings", text.get("tie_word_embeddings", True))),
        ids=_special_ids({**text, **fields}, fields.get("image_token_id", 100295)),
    )


def _vision(vision: Mapping[str, Any], outer: Mapping[str, Any]) -> VisionConfig:
    # Baidu's `hidden_size` in vision_config may be a wrong default (3584); embed_dim is the one that counts.
    width = int(vision.get("embed_dim") or vision["hidden_size"])
    patch = vision.get("patch_size", 14)
    return VisionConfig(
        num_layers=int(vision["depth"]),
        hidden_size=width,
        intermediate_size=int(vision.get("intermediate_size") or vision.get("mlp_ratio", 4) * width),
        num_heads=int(vision["num_heads"]),
        in_channels=int(vision.get("in_channels", 3)),
        patch_px=int(patch[0] if isinstance(patch, (list, tuple)) else patch),
        spatial_merge=int(vision.get("spatial_merge_size") or outer.get("spatial_conv_size", 2)),
        temporal_merge=int(vision.get("temporal_merge_size") or outer.get("temporal_conv_size", 2)),
        norm_eps=float(vision.get("rms_norm_eps", 1e-6)),  # really a LayerNorm's, whatever it is called
        rope_theta=float((vision.get("rope_parameters") or {}).get("rope_theta", 10000.0)),
    )


def _special_ids(fields: Mapping[str, Any], image_patch: int) -> SpecialIds:
    default = SpecialIds()

    def number(name: str, fallback: int) -> int:
        value = fields.get(name)
        if isinstance(value, (list, tuple)):
            value = value[0] if value else None
        return fallback if value is None else int(value)

    return SpecialIds(
        pad=number("pad_token_id", default.pad),
        bos=number("bos_token_id", default.bos),
        eos=number("eos_token_id", default.eos),
        image_patch=int(image_patch),
        video_patch=number("video_token_id", int(image_patch)),
        image_start=number("image_start_token_id", default.image_start),
        image_end=number("image_end_token_id", default.image_end),
        video_start=number("video_start_token_id", default.video_start),
        video_end=number("video_end_token_id", default.video_end),
    )


def _to_baidu(config: ModelConfig) -> dict[str, Any]:
    start = next((index for index, has in enumerate(config.expert_layers) if has), config.num_layers)
    kind = "ernie4_5_moe_vl" if config.vision else "ernie4_5_moe" if config.text_experts else "ernie4_5"
    architecture = {
        "ernie4_5_moe_vl": "Ernie4_5_VLMoeForConditionalGeneration",
        "ernie4_5_moe": "Ernie4_5_MoeForCausalLM",
        "ernie4_5": "Ernie4_5ForCausalLM",
    }[kind]
    fields: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "initializer_range": config.initializer_range,
        "use_bias": config.use_bias,
        "tie_word_embeddings": config.tie_embeddings,
        "pad_token_id": config.ids.pad,
        "bos_token_id": config.ids.bos,
        "eos_token_id": config.ids.eos,
        "torch_dtype": "bfloat16",
    }
    if config.text_experts:
        text, vision = config.text_experts, config.vision_experts
        both = vision is not None
        fields |= {
            "moe_num_experts": [text.num_experts, vision.num_experts] if vision else text.num_experts,
            "moe_intermediate_size": [text.expert_size, vision.expert_size] if vision else text.expert_size,
            "moe_num_shared_experts": config.shared_size // text.expert_size,
            "moe_k": config.num_chosen,
            "moe_layer_start_index": [start, start] if both else start,
            "moe_layer_end_index": [config.num_layers - 1] * 2 if both else config.num_layers - 1,
            "moe_layer_interval": 1,
            "moe_norm_min": config.router_norm_min,
            "moe_use_aux_free": True,
        }
    if config.vision and config.rope_section:
        fields |= {
            "rope_3d": True,
            "freq_allocation": config.rope_section[2],
            "im_patch_id": config.ids.image_patch,
            "image_start_token_id": config.ids.image_start,
            "image_end_token_id": config.ids.image_end,
            "video_start_token_id": config.ids.video_start,
            "video_end_token_id": config.ids.video_end,
            "pixel_hidden_size": config.vision.hidden_size,
            "spatial_conv_size": config.vision.spatial_merge,
            "temporal_conv_size": config.vision.temporal_merge,
            "use_temporal_conv": True,
            "vision_rule": config.vision_rule.value,
            "vision_config": {
                "model_type": "DFNRope_vision_transformer",
                "depth": config.vision.num_layers,
                "embed_dim": config.vision.hidden_size,
                "hidden_size": config.vision.hidden_size,
                "mlp_ratio": config.vision.intermediate_size / config.vision.hidden_size,
                "intermediate_size": config.vision.intermediate_size,
                "num_heads": config.vision.num_heads,
                "hidden_act": "quick_gelu",
                "in_channels": config.vision.in_channels,
                "patch_size": config.vision.patch_px,
                "spatial_merge_size": config.vision.spatial_merge,
            },
        }
        if config.ids.video_patch != config.ids.image_patch:
            fields["video_token_id"] = config.ids.video_patch
    return fields
