"""The data of the embedded model's run, made in the process that trains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from duomo.train.run import BatchSource, make_batch


def batches_here(self: BatchSource, first_step: int) -> Iterator[tuple[int, list[Any]]]:
    """Stands in for `BatchSource.batches`."""
    folders = str(self.folder), str(self.cache_folder)
    for step in range(first_step, self.stage.num_steps):
        yield step, [make_batch(self.recipe, self.stage, *folders, step, part) for part in self.parts]
