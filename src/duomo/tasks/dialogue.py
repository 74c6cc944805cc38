"""Text alone: greetings, who are you, small sums with and without thinking, and "there is no picture".

The last matters most: a model that has only ever seen pictures invents one when there is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np

from duomo.tasks import digits, shapes
from duomo.tasks.scene import Example, Language, Split, Turn, pick, split_of

Phrases: TypeAlias = dict[Language, tuple[tuple[str, ...], str]]

GREETINGS: Phrases = {
    "en": (
        ("Hello!", "Hi", "Good morning", "Hey there", "hello"),
        "Hello! Show me a picture or ask me something.",
    ),
    "zh": (("你好！", "您好", "早上好", "你好", "嗨"), "你好！请给我看一张图片，或者问我一个问题。"),
}
WHO: Phrases = {
    "en": (
        ("Who are you?", "What are you?", "What can you do?"),
        "I am duomo's small embedded model. I read handwritten digits, and name and count coloured shapes.",
    ),
    "zh": (
        ("你是谁？", "你会做什么？", "你是什么？"),
        "我是duomo的小型内置模型，能读手写数字，认识并数出彩色形状。",
    ),
}
THANKS: Phrases = {
    "en": (("Thanks!", "Thank you."), "You're welcome."),
    "zh": (("谢谢！", "多谢"), "不客气。"),
}
NO_PICTURE = {"en": "There is no picture.", "zh": "没有图片。"}
SUM = {"en": "What is {a} + {b}?", "zh": "{a}+{b}等于多少？"}


def generate(rng: np.random.Generator, split: Split) -> Example:
    """One turn of talk. Sums belong to a split by their operands; the fixed phrases are in every split."""
    language: Language = "en" if rng.random() < 0.5 else "zh"
    choice = rng.random()
    if choice < 0.45:
        return _sum(rng, split, language)
    if choice < 0.75:
        questions: list[Mapping[str, tuple[str, ...]]] = [
            digits.READ,
            digits.ADD,
            shapes.NAME,
            shapes.COUNT_ALL,
            digits.LARGEST,
            shapes.COLOUR,
        ]
        asked = pick(rng, questions[int(rng.integers(len(questions)))][language])
        return Example((Turn(asked, NO_PICTURE[language], kind="text/no picture"),), "no picture")
    phrases, answer = (GREETINGS, WHO, THANKS)[int(rng.choice(3, p=(0.4, 0.45, 0.15)))][language]
    return Example((Turn(pick(rng, phrases), answer, kind="text/talk"),), "talk")


def _sum(rng: np.random.Generator, split: Split, language: Language) -> Example:
    while True:
        a, b = (int(v) for v in rng.integers(0, 100, size=2))
        scene = f"sum {a} {b}"
        if split_of(scene) == split:
            break
    asked = SUM[language].format(a=a, b=b)
    if rng.random() < 0.5:
        return Example((Turn(asked, str(a + b), kind="text/sum"),), scene)
    return Example((Turn(asked, str(a + b), carry_aloud(a, b), "text/sum thinking"),), scene)


def carry_aloud(a: int, b: int) -> str:
    """Ones, then tens with the carry: the same words in both languages."""
    ones = a % 10 + b % 10
    tens = a // 10 + b // 10 + ones // 10
    carry = f"+{ones // 10}" if ones >= 10 else ""
    return f"{a % 10}+{b % 10}={ones}, {a // 10}+{b // 10}{carry}={tens}: {tens * 10 + ones % 10}"
