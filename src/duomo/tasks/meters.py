"""Printed codes, seven-segment displays and dials: read one, or subtract the smaller of two displays."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TypeAlias

import numpy as np

from duomo.tasks.drawing import Canvas, Tint, noisy, tint
from duomo.tasks.pools import Pools
from duomo.tasks.scene import Example, Mark, Pixels, Turn, any_language, pick, split_of

LETTERS = "ABCDEFGHJKLMNPRSTUVWXYZ0123456789"  # without I, O and Q, which a font may not tell from 1 and 0
TEXT = {
    "en": ("What does the label say?", "Read the code.", "Which code is printed here?"),
    "zh": ("标签上写的是什么？", "读出编码。", "印的是什么编码？"),
}
DISPLAY = {
    "en": ("What does the display show?", "Read the meter.", "What is the reading?"),
    "zh": ("显示屏显示多少？", "读出仪表的数值。", "读数是多少？"),
}
DIAL = {
    "en": ("What does the needle point to?", "Read the dial.", "Which value does the dial show?"),
    "zh": ("指针指向多少？", "读出刻度盘的数值。", "表盘显示多少？"),
}
IN_THE_RED = {
    "en": ("Is the needle in the red?", "Does the needle stand in the red zone?"),
    "zh": ("指针在红色区域吗？", "指针进入红区了吗？"),
}
CHARACTER = {
    "en": ("What is character {n} of the code?", "Which character stands at place {n}?"),
    "zh": ("编码的第{n}个字符是什么？", "第{n}个字符是什么？"),
}
TENTHS = {
    "en": ("Which digit stands after the point?", "How many tenths does the display show?"),
    "zh": ("小数点后是几？", "显示屏的十分位是几？"),
}
LARGEST_MARK = {
    "en": ("What is the highest number on the dial?", "Where does the scale end?"),
    "zh": ("刻度盘上最大的数是多少？", "刻度到多少为止？"),
}
ONE_OF_TWO = {
    "en": ("What does the {p} display show?", "Read the {p} meter."),
    "zh": ("{p}的显示屏显示多少？", "读出{p}仪表的数值。"),
}
POSITIONS = {"en": ("upper", "lower"), "zh": ("上面", "下面")}
DIFFERENCE = {
    "en": ("What is the difference of the two readings?", "By how much do the readings differ?"),
    "zh": ("两个读数相差多少？", "两个读数的差是多少？"),
}
Asked: TypeAlias = tuple[Example, tuple[Turn, ...]]  # and questions of the steps that lead to its answers
SEGMENTS = ("abcdef", "bc", "abdeg", "abcdg", "bcfg", "acdfg", "acdefg", "abc", "abcdefg", "abcdfg")


def generate(rng: np.random.Generator, pools: Pools, num_lookups: int = 1) -> Example:
    """A label, a display, a dial or two displays of the pools' split.

    With more than one look-up also questions of single steps: a character, tenths, the end of a scale.
    """
    make = (_label, _display, _dial, _two)[int(rng.choice(4, p=(0.3, 0.15, 0.25, 0.3)))]
    example, steps = make(rng, pools)
    if num_lookups == 1:
        return example
    return replace(example, turns=(*example.turns, *steps))


def _label(rng: np.random.Generator, pools: Pools) -> Asked:
    while True:
        code = "".join(pick(rng, tuple(LETTERS)) for _ in range(int(rng.integers(2, 5))))
        if split_of(f"label {code}") == pools.split:
            break
    name, size = pick(rng, pools.fonts), int(rng.integers(20, 30))
    paper, ink = (tint(rng, 190, 250), tint(rng, 5, 80))
    if rng.random() < 0.25:
        paper, ink = ink, paper
    canvas = Canvas(56, 112, paper)
    pitch = min(rng.uniform(0.8, 1.05) * size, 108 / len(code))
    left = rng.uniform(pitch / 2 + 2, 110 - pitch * (len(code) - 0.5))
    y = rng.uniform(18, 38)
    marks = []
    for index, letter in enumerate(code):
        x = left + pitch * index
        canvas.text(x, y, letter, name, size, ink)
        marks.append(Mark(f"letter {letter}", y, x))
    turns = tuple(Turn(pick(rng, TEXT[any_language(rng)]), code, kind="meters/read text") for _ in range(2))
    steps = []
    for place in rng.choice(len(code), size=2, replace=False):
        asked = pick(rng, CHARACTER[any_language(rng)]).format(n=place + 1)
        steps.append(Turn(asked, code[int(place)], kind="meters/one character"))
    return Example(turns, f"label {code}", noisy(rng, canvas.pixels()), tuple(marks)), tuple(steps)


def _reading(rng: np.random.Generator) -> int:
    """In tenths, of one or two digits before the point."""
    return int(rng.integers(0, 100)) if rng.random() < 0.5 else int(rng.integers(100, 1000))


def written(tenths: int) -> str:
    return f"{tenths // 10}.{tenths % 10}"


def _display(rng: np.random.Generator, pools: Pools) -> Asked:
    while True:
        tenths = _reading(rng)
        if split_of(f"display {tenths}") == pools.split:
            break
    picture, marks = draw_displays(rng, [tenths], (56, 112))
    turns = tuple(
        Turn(pick(rng, DISPLAY[any_language(rng)]), written(tenths), kind="meters/read display")
        for _ in range(2)
    )
    step = Turn(pick(rng, TENTHS[any_language(rng)]), str(tenths % 10), kind="meters/tenths")
    return Example(turns, f"display {tenths}", picture, marks), (step,)


def _two(rng: np.random.Generator, pools: Pools) -> Asked:
    while True:
        difference = int(rng.integers(1, 100))  # the answer first
        low = int(rng.integers(0, 300))
        pair = [low, low + difference] if rng.random() < 0.5 else [low + difference, low]
        scene = f"displays {pair[0]} {pair[1]}"
        if split_of(scene) == pools.split:
            break
    picture, marks = draw_displays(rng, pair, (112, 112))
    answer, (small, large) = written(difference), sorted(pair)
    turns = []
    for thinks in (False, True):
        language = any_language(rng)
        listed = ", ".join(map(written, pair)) if language == "en" else "、".join(map(written, pair))
        step = f"{written(large)}-{written(small)}={answer}"
        said = f"The readings are {listed}. {step}." if language == "en" else f"读数是{listed}。{step}。"
        kind = "meters/difference thinking" if thinks else "meters/difference"
        turns.append(Turn(pick(rng, DIFFERENCE[language]), answer, said if thinks else None, kind))
    steps = []
    for place, tenths in enumerate(pair):
        language = any_language(rng)
        question = pick(rng, ONE_OF_TWO[language]).format(p=POSITIONS[language][place])
        steps.append(Turn(question, written(tenths), kind="meters/read one of two"))
    return Example(tuple(turns), scene, picture, marks), tuple(steps)


def draw_displays(
    rng: np.random.Generator, readings: list[int], canvas_px: tuple[int, int]
) -> tuple[Pixels, tuple[Mark, ...]]:
    """Seven-segment displays below each other, lit digits on dark or dark ones on grey."""
    height, width = canvas_px
    is_lit = rng.random() < 0.6
    paper = tint(rng, 10, 45) if is_lit else tint(rng, 150, 200)
    ink: Tint = ((255, 60, 40), (80, 255, 90), (255, 190, 60))[int(rng.integers(3))]
    ink = ink if is_lit else tint(rng, 10, 45)
    canvas, marks = Canvas(height, width, paper), []
    band = height / len(readings)
    for row, tenths in enumerate(readings):
        digits = written(tenths).replace(".", "")
        tall = rng.uniform(26, min(42, band - 10, (width - 16) / (0.85 * len(digits))))
        wide, pitch = tall * 0.5, tall * rng.uniform(0.72, 0.85)
        x = rng.uniform(6, width - 8 - pitch * len(digits))
        y = band * row + rng.uniform(4, band - tall - 4)
        lean = rng.uniform(0, 0.1)
        for index, digit in enumerate(digits):
            _segments(canvas, int(digit), x, y, wide, tall, lean, ink)
            marks.append(Mark(f"digit {digit}", y + tall / 2, x + wide / 2))
            if index == len(digits) - 2:
                canvas.ellipse(x + wide + (pitch - wide) / 2, y + tall - 1.5, 2, 2, ink)
            x += pitch
    return noisy(rng, canvas.pixels()), tuple(marks)


def _segments(
    canvas: Canvas, digit: int, x: float, y: float, wide: float, tall: float, lean: float, ink: Tint
) -> None:
    half, gap = tall / 2, 1.2
    ends = {
        "a": ((0, 0), (1, 0)),
        "b": ((1, 0), (1, 1)),
        "c": ((1, 1), (1, 2)),
        "d": ((0, 2), (1, 2)),
        "e": ((0, 1), (0, 2)),
        "f": ((0, 0), (0, 1)),
        "g": ((0, 1), (1, 1)),
    }
    for name in SEGMENTS[digit]:
        (u0, v0), (u1, v1) = ends[name]
        along = gap if u0 != u1 else 0.0
        down = gap if v0 != v1 else 0.0
        points = [(u0 * wide + along, v0 * half + down), (u1 * wide - along, v1 * half - down)]
        canvas.line([(x + u + (tall - v) * lean, y + v) for u, v in points], ink, tall * 0.11)


def _dial(rng: np.random.Generator, pools: Pools) -> Asked:
    while True:
        is_in_red, halves = bool(rng.random() < 0.5), int(rng.integers(1, 20))
        step = int(rng.integers(1, 6))
        red = int(rng.integers(1, halves + 1) if is_in_red else rng.integers(halves + 1, 21))
        scene = f"dial {halves} of {10 * step} red from {red}"
        if split_of(scene) == pools.split:
            break
    value = halves * step / 2
    paper, ink = tint(rng, 215, 250), tint(rng, 10, 60)
    canvas = Canvas(112, 112, paper)
    x, y, radius = 56 + rng.uniform(-4, 4), 66 + rng.uniform(-4, 4), rng.uniform(38, 44)
    canvas.ellipse(x, y, radius + 4, radius + 4, tint(rng, 235, 255), ink)
    name = pick(rng, pools.fonts)
    for place in range(red, 20):
        canvas.line([_at(x, y, radius * 0.95, place + end) for end in (0, 1)], (230, 60, 50), 4)
    for place in range(11):
        inner = 0.82 if place % 5 == 0 else 0.9
        canvas.line([_at(x, y, radius * r, 2 * place) for r in (inner, 1.0)], ink)
        if place % 5 == 0:
            canvas.text(*_at(x, y, radius * 0.64, 2 * place), str(place * step), name, 10, ink)
    needle: Tint = (200, 30, 30) if rng.random() < 0.6 else ink
    canvas.line([(x, y), _at(x, y, radius * 0.85, halves)], needle, 2)
    canvas.ellipse(x, y, 3, 3, ink)
    language = any_language(rng)
    verdict = {"en": ("no", "yes"), "zh": ("否", "是")}[language][is_in_red]
    turns = (
        Turn(pick(rng, DIAL[any_language(rng)]), f"{value:g}", kind="meters/read dial"),
        Turn(pick(rng, IN_THE_RED[language]), verdict, kind="meters/in the red"),
    )
    end = Turn(pick(rng, LARGEST_MARK[any_language(rng)]), str(10 * step), kind="meters/end of scale")
    return Example(turns, scene, noisy(rng, canvas.pixels()), (Mark(f"needle {halves}", y, x),)), (end,)


def _at(x: float, y: float, radius: float, halves: float) -> tuple[float, float]:
    """The point of a dial's circle at a value, in half marks from 0 to 20."""
    angle = math.pi * (1.2 - 1.4 * halves / 20)
    return x + math.cos(angle) * radius, y - math.sin(angle) * radius
