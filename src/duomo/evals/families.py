"""The frozen questions of the wider families, and the same charts and circuits drawn by other hands.

Drawn from seeds and the test split alone (`tasks.pools`), so many of every kind, and known by their hash. The
held-out renderers get scenes of their own; kinds are named after them: "charts/total (matplotlib)".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec

import numpy as np

from duomo.errors import TrainingError
from duomo.evals import renderers
from duomo.evals.questions import SEED, Question, question_of
from duomo.tasks import charts, circuits
from duomo.tasks.families import FAMILIES
from duomo.tasks.pools import Pools
from duomo.tasks.scene import Example

WIDER = ("meters", "charts", "places", "surface", "nuclei", "circuits", "clips", "instructions")
PATIENCE = 15  # examples in a row, for each question wanted, that bring nothing new before that is the end


def family_questions(pools: Pools, num: int) -> list[Question]:
    """`num` questions of every kind of every wider family, fewer of kinds that come rarely."""
    found: list[Question] = []
    for index, name in enumerate(WIDER):
        rng = np.random.default_rng([SEED, 10 + index])
        found += _first(num, (FAMILIES[name](rng, pools) for _ in range(9 * PATIENCE * num)))
    return found


def rendered_questions(pools: Pools, num: int) -> list[Question]:
    """Charts by matplotlib and circuits by schemdraw: `num` of every kind. TrainingError without them."""
    missing = [name for name in ("matplotlib", "schemdraw") if find_spec(name) is None]
    if missing:
        raise TrainingError(f"{missing[0]} is not installed: pip install duomo[train], or ask --family 0")
    by_matplotlib = _first(num, _drawn(pools, num, 30, _chart), " (matplotlib)")
    return by_matplotlib + _first(num, _drawn(pools, num, 31, _circuit), " (schemdraw)")


def _drawn(
    pools: Pools, num: int, seed: int, draw: Callable[[np.random.Generator, Pools], Example]
) -> Iterator[Example]:
    rng = np.random.default_rng([SEED, seed])
    for _ in range(9 * PATIENCE * num):
        yield draw(rng, pools)


def _chart(rng: np.random.Generator, pools: Pools) -> Example:
    chart = charts.draw_chart(rng, pools.split)
    return Example(charts.questions(rng, chart), chart.scene, renderers.chart_by_matplotlib(chart))


def _circuit(rng: np.random.Generator, pools: Pools) -> Example:
    circuit = circuits.draw_circuit(rng, pools.split)
    return Example(circuits.questions(rng, circuit), circuit.scene, renderers.circuit_by_schemdraw(circuit))


def _first(num: int, examples: Iterator[Example], suffix: str = "") -> list[Question]:
    """The first `num` questions of every kind; gives a rare kind up only after long patience."""
    counts: Counter[str] = Counter()
    found, idle = [], 0
    for example in examples:
        new = [turn for turn in example.turns if counts[turn.kind] < num]
        idle = 0 if new else idle + 1
        if idle > PATIENCE * num:
            break
        for turn in new:
            if counts[turn.kind] < num:
                counts[turn.kind] += 1
                found.append(replace(question_of(example, turn), kind=turn.kind + suffix))
    return found
