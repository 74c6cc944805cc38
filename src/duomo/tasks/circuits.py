"""Resistors in series and in parallel, up to four, and the balanced bridge: read one, or reduce them all.

Values are chosen so that every step of the reduction is a whole number. `Circuit` is what was drawn, so that
another renderer can draw the same (`evals.renderers`, schemdraw).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from duomo.tasks.drawing import Canvas, Tint, ink_and_paper, noisy
from duomo.tasks.pools import Pools
from duomo.tasks.scene import Example, Language, Mark, Pixels, Turn, any_language, pick, split_of

# Branches side by side; the groups stand one after another. ((1,), (2, 3)) is R1 in series with R2 || R3.
SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "two in series": ((1,), (2,)),
    "three in series": ((1,), (2,), (3,)),
    "two in parallel": ((1, 2),),
    "one and two in parallel": ((1,), (2, 3)),
    "two in parallel and one": ((1, 2), (3,)),
    "two pairs": ((1, 2), (3, 4)),
    "bridge": ((1, 2), (3, 4)),
}
# Pairs that reduce to a whole number: (a, b) with a*b divisible by a+b, up to 30 ohms.
PAIRS = tuple((a, b) for a in range(2, 31) for b in range(2, 31) if a * b % (a + b) == 0)
CANVAS_PX = (112, 168)
READ = {
    "en": ("What is the value of {r}?", "How many ohms is {r}?", "Read {r}."),
    "zh": ("{r}的阻值是多少？", "{r}是多少欧姆？", "读出{r}。"),
}
EQUIVALENT = {
    "en": ("What is the equivalent resistance?", "Reduce the circuit to one resistor. How many ohms?"),
    "zh": ("等效电阻是多少？", "电路的总电阻是多少？"),
}
HOW_MANY = {
    "en": ("How many resistors are there?", "Count the resistors."),
    "zh": ("有几个电阻？", "电路中有多少个电阻？"),
}


@dataclass(frozen=True, slots=True)
class Circuit:
    """`ohms[i]` is R(i+1). In the bridge a fifth resistor joins the two middles and carries no current."""

    shape: str
    ohms: tuple[int, ...]

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        return SHAPES[self.shape]

    @property
    def scene(self) -> str:
        return f"circuit {self.shape} {self.ohms}"


def draw_circuit(rng: np.random.Generator, split: str) -> Circuit:
    """A circuit of the split."""
    while True:
        shape = pick(rng, tuple(SHAPES))
        ohms: list[int] = []
        for group in SHAPES[shape]:
            ohms += PAIRS[int(rng.integers(len(PAIRS)))] if len(group) == 2 else [int(rng.integers(1, 31))]
        if shape == "bridge":  # balanced: R1/R3 = R2/R4, the same pair twice or its multiple
            factor = int(rng.integers(1, 4))
            ohms = [*ohms[:2], factor * ohms[0], factor * ohms[1], int(rng.integers(1, 31))]
        circuit = Circuit(shape, tuple(ohms))
        if max(ohms) <= 99 and split_of(circuit.scene) == split:
            return circuit


def generate(rng: np.random.Generator, pools: Pools, num_lookups: int = 1) -> Example:
    """A circuit with the equivalent in both modes and readings."""
    circuit = draw_circuit(rng, pools.split)
    picture, marks = draw(rng, circuit, pick(rng, pools.fonts))
    return Example(questions(rng, circuit, num_lookups), circuit.scene, picture, marks)


def questions(rng: np.random.Generator, circuit: Circuit, num_lookups: int = 1) -> tuple[Turn, ...]:
    turns = []
    for thinks in (False, True):
        language = any_language(rng)
        said, answer = reduce_aloud(circuit, language)
        kind = "circuits/equivalent thinking" if thinks else "circuits/equivalent"
        turns.append(Turn(pick(rng, EQUIVALENT[language]), answer, said if thinks else None, kind))
    turns.append(_read(rng, circuit))
    count = Turn(pick(rng, HOW_MANY[any_language(rng)]), str(len(circuit.ohms)), kind="circuits/count")
    return (*turns, count, *(_read(rng, circuit) for _ in range(num_lookups - 1)))


def _read(rng: np.random.Generator, circuit: Circuit) -> Turn:
    place = int(rng.integers(len(circuit.ohms)))
    asked = pick(rng, READ[any_language(rng)]).format(r=f"R{place + 1}")
    return Turn(asked, str(circuit.ohms[place]), kind="circuits/read")


def reduce_aloud(circuit: Circuit, language: Language) -> tuple[str, str]:
    """What is read, each parallel pair, then the sum."""
    ohms = circuit.ohms
    comma, stop = (", ", ". ") if language == "en" else ("，", "。")
    listed = comma.join(f"R{i}={value}" for i, value in enumerate(ohms, start=1))
    steps, parts = [], []
    for group in circuit.groups:
        values = [ohms[i - 1] for i in group]
        if len(values) == 2:
            a, b = values
            parts.append(a * b // (a + b))
            steps.append(f"{a}*{b}/{a + b}={parts[-1]}")
        else:
            parts += values
    total = sum(parts)
    if len(parts) > 1:
        steps.append(f"{'+'.join(map(str, parts))}={total}")
    return f"{listed}{stop}{comma.join(steps)}{stop.strip()}", str(total)


def draw(rng: np.random.Generator, circuit: Circuit, name: str) -> tuple[Pixels, tuple[Mark, ...]]:
    """Left to right: groups in series, branches above each other; sizes and strokes differ each time."""
    height, width = CANVAS_PX
    ink, paper = ink_and_paper(rng, (5, 60), (232, 255))
    pen, marks = _Pen(Canvas(height, width, paper), ink, rng.uniform(0.8, 1.8), bool(rng.random() < 0.5)), []
    num_groups = len(circuit.groups)
    left = rng.uniform(5, 12 + 30 / num_groups)
    pitch = (width - 2 * left) / num_groups
    size = int(rng.integers(9, max(10, min(15, int(pitch / 3.3) + 1))))
    middle, gap = height / 2 + rng.uniform(-4, 6), rng.uniform(24, 44 - size)
    longest, lift = rng.uniform(10, 17), 6 + 0.5 * size + rng.uniform(0, 2)
    is_bridge = circuit.shape == "bridge"
    for index, group in enumerate(circuit.groups):
        start, end = left + pitch * index, left + pitch * (index + 1)
        x, reach = (start + end) / 2, min(longest, pitch * 0.3)
        # The middles of a bridge stay apart: its branches run on to the next group's.
        joins_left, joins_right = not (is_bridge and index == 1), not (is_bridge and index == 0)
        for place, number in enumerate(group):
            y = middle + (2 * place - 1) * gap if len(group) == 2 else middle
            wire = [(start + 4, middle)] if joins_left else []
            pen.line([*wire, (start + (4 if joins_left else 0), y), (x - reach, y)])
            wire = [(end - 4, middle)] if joins_right else []
            pen.line([(x + reach, y), (end - (4 if joins_right else 0), y), *wire])
            pen.resistor(x, y, reach)
            value = circuit.ohms[number - 1]
            pen.canvas.text(x, y - lift, f"R{number} {value}", name, size, ink)
            marks.append(Mark(f"ohms {value}", y - lift, x))
        for side, end_x in ((start, start + 4), (end - 4, end)):
            if joins_left if side == start else joins_right:
                pen.line([(side, middle), (end_x, middle)])
    if is_bridge:
        x, beside = width / 2, (1 if rng.random() < 0.5 else -1) * (7 + 1.5 * size)
        pen.line([(x, middle - gap), (x, middle - 9)])
        pen.resistor(x, middle, 9.0, is_upright=True)
        pen.line([(x, middle + 9), (x, middle + gap)])
        pen.canvas.text(x + beside, middle, f"R5 {circuit.ohms[4]}", name, size, ink)
        marks.append(Mark(f"ohms {circuit.ohms[4]}", middle, x + beside))
    for x in (left, width - left):
        pen.canvas.ellipse(x, middle, 2.5, 2.5, ink)
    return noisy(rng, pen.canvas.pixels(), 3.0), tuple(marks)


@dataclass(frozen=True, slots=True)
class _Pen:
    """Draws wires and resistors of one circuit alike."""

    canvas: Canvas
    ink: Tint
    width_px: float
    is_zigzag: bool

    def line(self, points: list[tuple[float, float]]) -> None:
        self.canvas.line(points, self.ink, self.width_px)

    def resistor(self, x: float, y: float, reach: float, is_upright: bool = False) -> None:
        if self.is_zigzag:
            steps = [((step + 0.5) / 3 - 1, -1 if step % 2 == 0 else 1) for step in range(6)]
            outline = [(-1.0, 0), *steps, (1.0, 0)]
        else:
            outline = [(-1.0, -1), (1.0, -1), (1.0, 1), (-1.0, 1), (-1.0, -1)]
        along = [(u * reach, v * 4.0) for u, v in outline]
        self.line([(x + v, y + u) if is_upright else (x + u, y + v) for u, v in along])
