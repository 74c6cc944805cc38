"""What a checkpoint holds, part by part, from headers alone: no weight is read.

Owns the division of a model into parts (a person's words: text experts, attention, vision tower ...).
It answers for every layout, quantized ones too, and refuses a checkpoint that would not load for its names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch

from duomo.checkpoints.files import TensorStore
from duomo.checkpoints.load import check_names, load_config, place_entries, read_config
from duomo.checkpoints.quantized import open_quantized
from duomo.model import Ernie, ModelConfig

PARTS = (
    "text experts",
    "vision experts",
    "shared experts",
    "dense MLP",
    "attention",
    "embeddings",
    "head",
    "vision tower",
    "resampler",
    "routers",
    "norms",
)
VISION_PARTS = ("vision experts", "vision tower", "resampler")


@dataclass(slots=True)
class Size:
    """Counts of one part."""

    parameters: int = 0
    num_bytes: int = 0

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.num_bytes / self.parameters if self.parameters else 0.0


@dataclass
class Inventory:
    """Sizes of a checkpoint. `parts` has only the parts the model has, in the order of PARTS."""

    config: ModelConfig
    layout: str
    num_tensors: int
    is_synthetic: bool = False
    parts: dict[str, Size] = field(default_factory=dict)

    @property
    def total(self) -> Size:
        return Size(
            sum(size.parameters for size in self.parts.values()),
            sum(size.num_bytes for size in self.parts.values()),
        )

    def num_bytes(self, *parts: str) -> int:
        return sum(self.parts[part].num_bytes for part in parts if part in self.parts)


def part_of(name: str) -> str:
    """The part that one of our parameters belongs to."""
    if name.startswith("vision_tower."):
        return "vision tower"
    if name.startswith("resampler."):
        return "resampler"
    if name.startswith(("embed.", "head.")):
        return "embeddings" if name.startswith("embed.") else "head"
    if ".router." in name:
        return "routers"
    for word, part in (
        (".mlp.text.", "text experts"),
        (".mlp.vision.", "vision experts"),
        (".mlp.shared.", "shared experts"),
        (".mlp.", "dense MLP"),
        (".attention.", "attention"),
    ):
        if word in name:
            return part
    return "norms"


def take_inventory(folder: str | Path) -> Inventory:
    """Reads config.json and headers. CheckpointError and ConfigError as `load_model` raises them."""
    folder = Path(folder)
    fields, config = read_config(folder), load_config(folder)
    is_synthetic = bool(fields.get("synthetic", False))
    if "quantization" in fields:
        files = open_quantized(folder)
        rows = ((name, prod(home.shape(name)), home.num_bytes(name)) for name, home in files.items())
        return _count(Inventory(config, "quantized", len(files), is_synthetic), rows)
    store = TensorStore(folder)
    config, dialect, places = place_entries(config, store)
    check_names(store, places)
    with torch.device("meta"):
        parameters = dict(Ernie(config).named_parameters())
    rows = (
        (entry.ours, count, count * store.entry(place.name).dtype.itemsize)
        for entry, place in places.items()
        for count in (entry.view(parameters[entry.ours]).numel(),)
    )
    return _count(Inventory(config, dialect.title, sum(1 for _ in store), is_synthetic), rows)


def _count(inventory: Inventory, rows: Iterator[tuple[str, int, int]]) -> Inventory:
    sizes = {part: Size() for part in PARTS}
    for name, parameters, num_bytes in rows:
        sizes[part_of(name)].parameters += parameters
        sizes[part_of(name)].num_bytes += num_bytes
    inventory.parts = {part: size for part, size in sizes.items() if size.parameters}
    return inventory
