"""Bar and line charts: a value, the largest month, and with steps totals, differences, growth and means.

The answer of the question that matters is drawn first: a total uniformly, then numbers that add up to it.
`Chart` is what was drawn, so that another renderer can draw the same (`evals.renderers`, matplotlib).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from duomo.tasks.drawing import Canvas, ink_and_paper, noisy, vivid
from duomo.tasks.pools import Pools
from duomo.tasks.scene import Example, Language, Mark, Pixels, Turn, any_language, pick, split_of

MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
HIGHEST = 20
CANVAS_PX = (140, 168)
FOCUSES = ("total", "difference", "growth", "mean")
GROWTHS = (10, 20, 25, 50, 75, 100, 150, 200, 300)  # per cent
VALUE = {
    "en": ("What is the value for {a}?", "How much is {a}?", "Read the value of {a}."),
    "zh": ("{a}的数值是多少？", "{a}是多少？", "读出{a}的数值。"),
}
LARGEST = {
    "en": ("Which month has the largest value?", "Which month is the highest?"),
    "zh": ("哪个月的数值最大？", "最高的是哪个月？"),
}
ASK = {
    "total": {
        "en": ("What is the total of all months?", "Add up all values."),
        "zh": ("所有月份的总和是多少？", "把所有数值加起来是多少？"),
    },
    "difference": {
        "en": ("What is the difference between {a} and {b}?", "By how much do {a} and {b} differ?"),
        "zh": ("{a}和{b}相差多少？", "{a}与{b}的差是多少？"),
    },
    "growth": {
        "en": ("By how many percent did it grow from {a} to {b}?", "What is the growth from {a} to {b}?"),
        "zh": ("从{a}到{b}增长了百分之多少？", "{a}到{b}的增长率是多少？"),
    },
    "mean": {
        "en": ("What is the mean of all months?", "What is the average value?"),
        "zh": ("所有月份的平均值是多少？", "平均数是多少？"),
    },
}


@dataclass(frozen=True, slots=True)
class Chart:
    """Values by month, drawn as bars or as a line, with the numbers written at them or with an axis alone."""

    style: str
    months: tuple[str, ...]
    values: tuple[int, ...]
    is_labelled: bool
    focus: str
    pair: tuple[int, int]  # the places that a difference or growth is about

    @property
    def scene(self) -> str:
        listed = " ".join(f"{m}={v}" for m, v in zip(self.months, self.values, strict=True))
        return f"chart {self.style} {listed}"


def draw_chart(rng: np.random.Generator, split: str) -> Chart:
    """A chart of the split."""
    while True:
        count = int(rng.integers(3, 6))
        first = int(rng.integers(0, 13 - count))
        focus = pick(rng, FOCUSES)
        values, pair = _values(rng, focus, count)
        chart = Chart(
            "bar" if rng.random() < 0.65 else "line",
            MONTHS[first : first + count],
            tuple(values),
            bool(rng.random() < 0.7),
            focus,
            pair,
        )
        if split_of(chart.scene) == split:
            return chart


def _values(rng: np.random.Generator, focus: str, count: int) -> tuple[list[int], tuple[int, int]]:
    values = [int(v) for v in rng.integers(1, HIGHEST + 1, size=count)]
    a, b = sorted(int(v) for v in rng.choice(count, size=2, replace=False))
    if focus == "difference":
        difference = int(rng.integers(1, 16))
        low = int(rng.integers(1, HIGHEST + 1 - difference))
        values[a], values[b] = (low, low + difference) if rng.random() < 0.5 else (low + difference, low)
    elif focus == "growth":
        growth = GROWTHS[int(rng.integers(len(GROWTHS)))]
        bases = [
            v for v in range(1, HIGHEST + 1) if v * growth % 100 == 0 and v * (100 + growth) <= 100 * HIGHEST
        ]
        values[a] = bases[int(rng.integers(len(bases)))]
        values[b] = values[a] * (100 + growth) // 100
    else:
        total = int(rng.integers(count, 15 * count + 1))
        if focus == "mean":
            total = count * int(rng.integers(2, 16))
        values = _parts(rng, total, count)
    return values, (a, b)


def _parts(rng: np.random.Generator, total: int, count: int) -> list[int]:
    """Whole numbers from 1 to HIGHEST that add up, in any order."""
    parts: list[int] = []
    for left in range(count - 1, -1, -1):
        low, high = max(1, total - HIGHEST * left), min(HIGHEST, total - left)
        parts.append(int(rng.integers(low, high + 1)))
        total -= parts[-1]
    return [int(part) for part in rng.permutation(parts)]


def generate(rng: np.random.Generator, pools: Pools, num_lookups: int = 1) -> Example:
    """A chart with the question it was made for, without and with thinking, and readings."""
    chart = draw_chart(rng, pools.split)
    picture, marks = draw(rng, chart, pick(rng, pools.fonts))
    return Example(questions(rng, chart, num_lookups), chart.scene, picture, marks)


def questions(rng: np.random.Generator, chart: Chart, num_lookups: int = 1) -> tuple[Turn, ...]:
    value = _value(rng, chart)
    turns = [_focus(rng, chart, thinks) for thinks in (False, True)] + [value]
    top = max(chart.values)
    if chart.values.count(top) == 1:
        month = chart.months[chart.values.index(top)]
        turns.append(Turn(pick(rng, LARGEST[any_language(rng)]), month, kind="charts/largest"))
    return (*turns, *(_value(rng, chart) for _ in range(num_lookups - 1)))


def _value(rng: np.random.Generator, chart: Chart) -> Turn:
    place = int(rng.integers(len(chart.months)))
    asked = pick(rng, VALUE[any_language(rng)]).format(a=chart.months[place])
    return Turn(asked, str(chart.values[place]), kind="charts/value")


def _focus(rng: np.random.Generator, chart: Chart, thinks: bool) -> Turn:
    language = any_language(rng)
    a, b = chart.pair
    asked = pick(rng, ASK[chart.focus][language]).format(a=chart.months[a], b=chart.months[b])
    thought, answer = reckon(chart, language)
    kind = f"charts/{chart.focus}" + (" thinking" if thinks else "")
    return Turn(asked, answer, thought if thinks else None, kind)


def reckon(chart: Chart, language: Language) -> tuple[str, str]:
    """The steps and the answer of the question that the chart was made for."""
    values, (a, b) = chart.values, chart.pair
    comma, stop = (", ", ". ") if language == "en" else ("，", "。")
    if chart.focus in ("total", "mean"):
        listed = comma.join(f"{m} {v}" for m, v in zip(chart.months, values, strict=True))
        steps, total = [], values[0]
        for value in values[1:]:
            steps.append(f"{total}+{value}={total + value}")
            total += value
        if chart.focus == "mean":
            steps.append(f"{total}/{len(values)}={total // len(values)}")
            total //= len(values)
        return f"{listed}{stop}{comma.join(steps)}{stop.strip()}", str(total)
    listed = comma.join(f"{chart.months[i]} {values[i]}" for i in (a, b))
    low, high = sorted((values[a], values[b]))
    step = f"{high}-{low}={high - low}"
    if chart.focus == "difference":
        return f"{listed}{stop}{step}{stop.strip()}", str(high - low)
    growth = (high - low) * 100 // low
    return f"{listed}{stop}{step}{comma}{high - low}/{low}={growth}%{stop.strip()}", f"{growth}%"


def draw(rng: np.random.Generator, chart: Chart, name: str) -> tuple[Pixels, tuple[Mark, ...]]:
    """A style of its own each time; the scale ends above the highest value, so heights do not tell."""
    height, width = CANVAS_PX
    ink, paper = ink_and_paper(rng, (10, 70), (235, 255))
    canvas = Canvas(height, width, paper)
    left, right, bottom = rng.uniform(17, 24), width - rng.uniform(4, 9), height - rng.uniform(16, 22)
    unit = (bottom - rng.uniform(15, 22)) / HIGHEST
    top = max(3.0, bottom - unit * rng.uniform(HIGHEST, 1.15 * HIGHEST))
    has_grid = rng.random() < (0.15 if chart.is_labelled else 0.7)
    has_ticks, number_px, month_px = rng.random() < 0.5, int(rng.integers(8, 13)), int(rng.integers(8, 12))
    for tick in range(0, HIGHEST + 1, 5):
        y = bottom - tick * unit
        if has_grid:
            canvas.line([(left, y), (right, y)], (205, 205, 205), 0.5)
        if has_ticks:
            canvas.line([(left - 2.5, y), (left, y)], ink)
        canvas.text(left - (10 if has_ticks else 8), y, str(tick), name, int(rng.integers(8, 10)), ink)
    canvas.line([(left, top), (left, bottom), (right, bottom)], ink)
    if rng.random() < 0.35:
        canvas.line([(left, top), (right, top), (right, bottom)], ink)
    pitch, colour, marks = (right - left) / len(chart.months), vivid(rng), []
    reaches_edges = chart.style == "line" and rng.random() < 0.4
    half, points = pitch * rng.uniform(0.28, 0.42), []
    for index, (month, value) in enumerate(zip(chart.months, chart.values, strict=True)):
        x, y = left + pitch * (index + 0.5), bottom - value * unit
        if reaches_edges:
            x = left + (right - left - 6) * index / (len(chart.months) - 1)
        points.append((x, y))
        if chart.style == "bar":
            canvas.box(x - half, y, x + half, bottom, colour if rng.random() < 0.85 else vivid(rng))
        canvas.text(x, bottom + 8, month, name, month_px, ink)
        number = y - 8 if chart.is_labelled else y
        marks.append(Mark(f"value {value}", max(number, 6), x))
        marks.append(Mark(f"month {month}", bottom + 8, x))
    if chart.style == "line":
        canvas.line(points, colour, rng.uniform(0.8, 2.0))
    radius, lift = rng.uniform(1.5, 3.0), rng.uniform(6, 9)
    for (x, y), value in zip(points, chart.values, strict=True):
        if chart.style == "line":
            canvas.ellipse(x, y, radius, radius, colour)
        if chart.is_labelled:
            canvas.text(x, y - lift, str(value), name, number_px, ink)
    return noisy(rng, canvas.pixels(), 3.0), tuple(marks)
