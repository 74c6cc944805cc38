"""Everything that determines a training run: sizes, stages, rates, seeds. Frozen, kept in its files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

from duomo.errors import TrainingError
from duomo.model import BankConfig, ModelConfig, SpecialIds, VisionConfig
from duomo.processing.tokenizer import Tokenizer

Shares: TypeAlias = tuple[tuple[str, float], ...]

FIRST: Shares = (("digits", 0.5), ("shapes", 0.35), ("text", 0.15))
FIRST_CELLS: Shares = (("boards", 0.4), ("digits", 0.4), ("shapes", 0.2))
ALL: Shares = (
    ("digits", 0.3),
    ("meters", 0.06),
    ("charts", 0.1),
    ("shapes", 0.1),
    ("places", 0.08),
    ("surface", 0.08),
    ("nuclei", 0.05),
    ("circuits", 0.06),
    ("clips", 0.03),
    ("text", 0.1),
    ("instructions", 0.04),
)
LATER: Shares = (
    ("digits", 0.28),
    ("meters", 0.09),
    ("charts", 0.12),
    ("shapes", 0.07),
    ("places", 0.08),
    ("surface", 0.07),
    ("nuclei", 0.03),
    ("circuits", 0.08),
    ("clips", 0.06),
    ("text", 0.09),
    ("instructions", 0.03),
)
RULES: Shares = (
    ("digits", 0.26),
    ("meters", 0.08),
    ("charts", 0.12),
    ("shapes", 0.08),
    ("places", 0.08),
    ("surface", 0.13),
    ("nuclei", 0.03),
    ("circuits", 0.08),
    ("clips", 0.03),
    ("text", 0.08),
    ("instructions", 0.03),
)
ALL_CELLS: Shares = (
    ("boards", 0.1),
    ("digits", 0.15),
    ("meters", 0.2),
    ("charts", 0.2),
    ("shapes", 0.03),
    ("places", 0.07),
    ("surface", 0.05),
    ("nuclei", 0.05),
    ("circuits", 0.15),
)
LOOKING_CELLS: Shares = (
    ("boards", 0.18),
    ("digits", 0.15),
    ("meters", 0.16),
    ("charts", 0.1),
    ("shapes", 0.02),
    ("places", 0.08),
    ("surface", 0.03),
    ("nuclei", 0.03),
    ("circuits", 0.13),
    ("clips", 0.12),
)
FINDING: Shares = (
    ("digits", 0.24),
    ("meters", 0.1),
    ("charts", 0.11),
    ("shapes", 0.06),
    ("places", 0.1),
    ("surface", 0.08),
    ("nuclei", 0.03),
    ("circuits", 0.08),
    ("clips", 0.08),
    ("text", 0.07),
    ("instructions", 0.05),
)
VARIETY: Shares = (
    ("digits", 0.24),
    ("meters", 0.1),
    ("charts", 0.12),
    ("shapes", 0.04),
    ("places", 0.1),
    ("surface", 0.1),
    ("nuclei", 0.05),
    ("circuits", 0.08),
    ("clips", 0.07),
    ("text", 0.06),
    ("instructions", 0.04),
)


@dataclass(frozen=True, slots=True)
class Stage:
    """A number of steps at one peak rate; `tower_rate` scales it for the vision tower.

    A dense stage trains tower and resampler on labelled cells, any other the whole model on questions.
    """

    name: str
    num_steps: int
    batch_size: int  # of a part
    rate: float
    num_parts: int = 1  # of a step, shared among processes
    optimizer: str = "adamw"  # or "muon"
    is_dense: bool = False
    tower_rate: float = 1.0
    warmup_steps: int = 100
    decay_from: float = 0.5  # share of the steps after which the rate falls linearly to a twentieth
    cell_weight: float = 0.0  # of the dense loss on a second batch of pictures, in a joint stage
    is_eased: bool = True  # boards of a dense stage are easy at first
    place_weight: float = 0.0  # in the dense loss, of where cells and what lies in them are
    num_lookups: int = 1  # of `tasks.families.LOOKUPS`: questions of one place or step each
    alone: float = 0.2  # share of conversations, and of questions before their picture
    min_spacing: float = 0.72  # of a digit's size, between neighbours: at 0.72 some touch
    shares: Shares = FIRST
    cells: Shares = FIRST_CELLS
    start: Shares = ()  # weights at the ends of these stages, averaged, are what this one starts from


_FAMILIES = Stage(
    "families",
    num_steps=3200,
    batch_size=32,
    rate=1e-3,
    decay_from=0.5,
    cell_weight=0.5,
    min_spacing=0.8,
    shares=ALL,
    cells=ALL_CELLS,
)

_MUON = replace(
    _FAMILIES,
    name="muon",
    num_steps=1800,
    num_parts=2,
    optimizer="muon",
    rate=1.5e-3,
    decay_from=0.35,
    shares=LATER,
)

_FINDING = replace(
    _MUON,
    name="finding",
    num_steps=1800,
    place_weight=0.5,
    num_lookups=3,
    alone=0.08,
    shares=FINDING,
    cells=LOOKING_CELLS,
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """The embedded model: three families first, then all of them, dense vision before questions, Muon last.

    `python -m duomo.train --from CHECKPOINT --stage eyes` enters at the second half with finished weights.
    """

    name: str = "tiny"
    seed: int = 20261124
    stages: tuple[Stage, ...] = (
        Stage("vision", num_steps=5000, batch_size=32, rate=2e-3, is_dense=True, decay_from=0.7),
        Stage("joint", num_steps=3200, batch_size=32, rate=1.5e-3, tower_rate=0.3),
        Stage(
            "reading",
            num_steps=800,
            batch_size=32,
            rate=1e-3,
            decay_from=0.25,
            cell_weight=0.5,
            min_spacing=0.85,
            shares=(("digits", 0.65), ("shapes", 0.25), ("text", 0.1)),
        ),
        Stage(
            "finish",
            num_steps=240,
            batch_size=32,
            rate=6e-4,
            warmup_steps=20,
            decay_from=0.0,
            cell_weight=0.5,
            min_spacing=0.85,
            shares=(("digits", 0.8), ("shapes", 0.15), ("text", 0.05)),
        ),
        Stage(
            "eyes",
            num_steps=2000,
            batch_size=32,
            rate=1.5e-3,
            is_dense=True,
            decay_from=0.6,
            cells=ALL_CELLS,
            start=(("joint", 0.15), ("reading", 0.25), ("finish", 0.6)),
        ),
        _FAMILIES,
        replace(_FAMILIES, name="more", num_steps=3000, decay_from=0.4),
        _MUON,
        replace(_MUON, name="rules", num_steps=300, rate=6e-4, warmup_steps=20, decay_from=0.0, shares=RULES),
        Stage(
            "looking",
            num_steps=900,
            batch_size=64,
            num_parts=2,
            optimizer="muon",
            rate=1.5e-3,
            is_dense=True,
            is_eased=False,
            place_weight=0.5,
            min_spacing=0.8,
            cells=LOOKING_CELLS,
        ),
        _FINDING,
        replace(_FINDING, name="variety", num_steps=1600, decay_from=0.3, shares=VARIETY),
    )
    export: Shares = (("variety", 1.0),)  # weights at the ends of stages, averaged
    bf16: bool = True  # products, where the processor multiplies bfloat16 (`train.precision`)
    weight_decay: float = 0.05
    clip: float = 1.0
    balance: float = 0.01
    router_z: float = 1e-4
    bias_update: float = 1e-3
    checkpoint_seconds: float = 60.0  # of the run's own process time

    def with_steps(self, *steps: int | None) -> Recipe:
        """Other lengths of the stages, in order; None keeps one."""
        padded = [*steps, *[None] * len(self.stages)]
        stages = tuple(
            stage if count is None else replace(stage, num_steps=count)
            for stage, count in zip(self.stages, padded, strict=False)
        )
        return replace(self, stages=stages)

    def shortened(self, num_steps: int, batch_size: int) -> Recipe:
        """The same run in a few steps, for tests."""
        stages = tuple(
            replace(stage, num_steps=num_steps, batch_size=batch_size, warmup_steps=1)
            for stage in self.stages
        )
        return replace(self, stages=stages)


def config_of(size: str, tokenizer: Tokenizer) -> ModelConfig:
    """`tiny`, which a CPU can train, or `mini` for a GPU. TrainingError for any other name."""
    tiny = tiny_config(tokenizer)
    if size == "tiny":
        return tiny
    if size != "mini":
        raise TrainingError(f"there is no size {size!r}; sizes are tiny and mini")
    return replace(
        tiny,
        name="mini",
        hidden_size=256,
        num_layers=8,
        num_heads=8,
        intermediate_size=768,
        expert_layers=(False, *[True] * 7),
        text_experts=BankConfig(16, 128),
        vision_experts=BankConfig(16, 64),
        num_chosen=4,
        shared_size=256,
        vision=VisionConfig(num_layers=6, hidden_size=192, intermediate_size=768, num_heads=6),
    )


def tiny_config(tokenizer: Tokenizer) -> ModelConfig:
    """10.8M parameters; widths that suit the 2-bit code (rows in 64s, columns in 16s)."""
    return ModelConfig(
        name="tiny",
        vocab_size=tokenizer.vocab_size,
        hidden_size=192,
        num_layers=6,
        num_heads=6,
        num_kv_heads=2,
        head_dim=32,
        intermediate_size=512,
        expert_layers=(False, True, True, True, True, True),
        text_experts=BankConfig(8, 192),
        vision_experts=BankConfig(8, 64),
        num_chosen=2,
        shared_size=192,
        vision=VisionConfig(num_layers=6, hidden_size=128, intermediate_size=512, num_heads=4),
        rope_section=(6, 6, 4),
        max_positions=8192,
        initializer_range=0.05,
        ids=special_ids(tokenizer),
    )


def special_ids(tokenizer: Tokenizer) -> SpecialIds:
    """The ids of a vocabulary of ours (`train.vocabulary`) that the model itself looks at."""
    special = tokenizer.special_id
    return SpecialIds(
        pad=special("<unk>"),
        bos=special("<s>"),
        eos=special("</s>"),
        image_patch=special("<|IMAGE_PLACEHOLDER|>"),
        video_patch=special("<|IMAGE_PLACEHOLDER|>"),
        image_start=special("<|IMAGE_START|>"),
        image_end=special("<|IMAGE_END|>"),
        video_start=special("<|VIDEO_START|>"),
        video_end=special("<|VIDEO_END|>"),
    )
