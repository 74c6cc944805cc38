"""All families by name: what the recipe's shares and the evaluation's kinds refer to; and the trades.

The base never learns a trade: an adapter does (examples/).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

from duomo.tasks import (
    charts,
    circuits,
    clips,
    dialogue,
    digits,
    instructions,
    meters,
    nuclei,
    places,
    shapes,
    surface,
)
from duomo.tasks.pools import Pools
from duomo.tasks.scene import Example
from duomo.tasks.trades import fluorescence, radiographs, tables

Generate = Callable[[np.random.Generator, Pools], Example]

FAMILIES: Mapping[str, Generate] = MappingProxyType(
    {
        "digits": lambda rng, pools: digits.generate(rng, pools.handwriting),
        "shapes": lambda rng, pools: shapes.generate(rng, pools.split),
        "text": lambda rng, pools: dialogue.generate(rng, pools.split),
        "meters": meters.generate,
        "charts": charts.generate,
        "places": places.generate,
        "surface": surface.generate,
        "nuclei": nuclei.generate,
        "circuits": circuits.generate,
        "clips": clips.generate,
        "instructions": lambda rng, pools: instructions.generate(rng, pools.split),
    }
)

TRADES: Mapping[str, Generate] = MappingProxyType(
    {
        "radiographs": radiographs.generate,
        "fluorescence": fluorescence.generate,
        "tables": tables.generate,
    }
)

# The same scenes with more questions: of one place each, of one step each, or by another rule.
LOOKUPS: Mapping[str, Callable[[np.random.Generator, Pools, int], Example]] = MappingProxyType(
    {
        "charts": charts.generate,
        "places": places.generate,
        "circuits": circuits.generate,
        "meters": meters.generate,
        "surface": surface.generate,
    }
)

# What may be centred in a cell, for the dense stage: every label that a generator marks.
LABELS: tuple[str, ...] = (
    *(f"digit {d}" for d in range(10)),
    *(f"shape {kind}" for kind in places.KINDS),
    *(f"letter {letter}" for letter in meters.LETTERS),
    *(f"needle {halves}" for halves in range(21)),
    *(f"value {value}" for value in range(charts.HIGHEST + 1)),
    *(f"month {month}" for month in charts.MONTHS),
    *(f"defect {kind}" for kind in surface.NAMES),
    "nucleus",
    *(f"ohms {value}" for value in range(100)),
    *(f"sprite {when}" for when in ("before", "after", "both")),
    *(f"time {steps}" for steps in range(clips.LATEST + 1)),
)
COLOURS: tuple[str, ...] = (*places.COLOURS, "brown")
