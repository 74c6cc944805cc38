"""Text alone, to the letter: number words, JSON that parses, tool calls, and refusals about any family.

Operands belong to a split by their hash. A tool's answer is the JSON of its call; the tools on offer stand in
the prompt, and the one that fits must be chosen.
"""

from __future__ import annotations

import json

import numpy as np

from duomo.tasks import charts, circuits, clips, meters, nuclei, places, surface
from duomo.tasks.dialogue import NO_PICTURE
from duomo.tasks.scene import Example, Function, Split, Turn, any_language, pick, split_of

ONES = [
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"),
    *("twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
DIGITS_ZH = "零一二三四五六七八九"
IN_WORDS = {
    "en": ("Write {n} in words.", "Spell the number {n}."),
    "zh": ("用汉字写出{n}。", "{n}用汉字怎么写？"),
}
IN_DIGITS = {
    "en": ("Write {w} in digits.", "Which number is {w}?"),
    "zh": ("用数字写出{w}。", "{w}是哪个数字？"),
}
AS_JSON = {
    "en": (
        "Give the sum and the difference of {a} and {b} as JSON.",
        "JSON with sum and difference of {a} and {b}.",
    ),
    "zh": ("用JSON给出{a}和{b}的和与差。", "以JSON输出{a}与{b}的和与差。"),
}
FIELDS = {
    "en": ("As JSON with name and age: {name} is {n} years old.", "Write as JSON: {name}, {n} years old."),
    "zh": ("用JSON写出姓名和年龄：{name}今年{n}岁。", "写成JSON：{name}，{n}岁。"),
}
PEOPLE = {
    "en": ("Anna", "Ben", "Carla", "David", "Emma", "Frank", "Grace", "Henry"),
    "zh": ("小明", "小红", "王芳", "李强", "张伟", "刘洋"),
}
CITIES = {
    "en": ("Berlin", "Paris", "London", "Rome", "Tokyo", "Boston"),
    "zh": ("北京", "上海", "广州", "成都", "杭州"),
}
WEATHER = {
    "en": ("What will the weather in {c} be in {n} days?", "The weather in {c} {n} days from now?"),
    "zh": ("{n}天后{c}的天气怎么样？", "{c}{n}天后天气如何？"),
}
TIMER = {
    "en": ("Set a timer for {n} minutes.", "Wake me in {n} minutes."),
    "zh": ("设一个{n}分钟的计时器。", "{n}分钟后叫我。"),
}
FUNCTIONS = (Function("get_weather", ("city", "days")), Function("set_timer", ("minutes",)))
REFUSED = (
    meters.DISPLAY,
    meters.TEXT,
    charts.LARGEST,
    charts.ASK["total"],
    places.COUNT,
    surface.KIND,
    nuclei.DOMINANT,
    nuclei.SHARE,
    circuits.EQUIVALENT,
    circuits.HOW_MANY,
    clips.DIRECTION,
    clips.EVENT,
)


def generate(rng: np.random.Generator, split: Split) -> Example:
    """One turn; every kind is asked in every split, about other operands."""
    make = (_words, _json, _call, _refusal)[int(rng.choice(4, p=(0.25, 0.25, 0.25, 0.25)))]
    while True:
        turn, scene = make(rng)
        # The questions of a refusal are the families' own and stand in every split, like greetings.
        if make is _refusal or split_of(scene) == split:
            return Example((turn,), scene)


def _words(rng: np.random.Generator) -> tuple[Turn, str]:
    language, number = any_language(rng), int(rng.integers(0, 1000))
    word = english(number) if language == "en" else chinese(number)
    if rng.random() < 0.5:
        turn = Turn(pick(rng, IN_WORDS[language]).format(n=number), word, kind="text/in words")
    else:
        turn = Turn(pick(rng, IN_DIGITS[language]).format(w=word), str(number), kind="text/in digits")
    return turn, f"words {number}"


def english(number: int) -> str:
    """0 to 999, as "four hundred seventy-two"."""
    if number >= 100:
        rest = f" {english(number % 100)}" if number % 100 else ""
        return f"{ONES[number // 100]} hundred{rest}"
    if number < 20:
        return ONES[number]
    return TENS[number // 10 - 2] + (f"-{ONES[number % 10]}" if number % 10 else "")


def chinese(number: int) -> str:
    """0 to 999, as 四百七十二; 10 to 19 without the leading one."""
    if number < 10:
        return DIGITS_ZH[number]
    if number < 20:
        return "十" + (DIGITS_ZH[number % 10] if number % 10 else "")
    if number < 100:
        return DIGITS_ZH[number // 10] + "十" + (DIGITS_ZH[number % 10] if number % 10 else "")
    rest = number % 100
    head = DIGITS_ZH[number // 100] + "百"
    if not rest:
        return head
    if rest < 10:
        return head + "零" + DIGITS_ZH[rest]
    return head + ("一" if rest < 20 else "") + chinese(rest)


def _json(rng: np.random.Generator) -> tuple[Turn, str]:
    language = any_language(rng)
    if rng.random() < 0.5:
        a, b = (int(v) for v in rng.integers(0, 20, size=2))
        asked = pick(rng, AS_JSON[language]).format(a=a, b=b)
        return Turn(asked, json.dumps({"sum": a + b, "difference": a - b}), kind="text/json"), f"json {a} {b}"
    name, age = pick(rng, PEOPLE[language]), int(rng.integers(1, 100))
    asked = pick(rng, FIELDS[language]).format(name=name, n=age)
    fields = {"name": name, "age": age}
    return Turn(asked, json.dumps(fields, ensure_ascii=False), kind="text/json"), f"json {name} {age}"


def _call(rng: np.random.Generator) -> tuple[Turn, str]:
    language = any_language(rng)
    offered = FUNCTIONS if rng.random() < 0.5 else FUNCTIONS[::-1]
    arguments: dict[str, str | int]
    if rng.random() < 0.5:
        city, days = pick(rng, CITIES[language]), int(rng.integers(1, 15))
        name, arguments = "get_weather", {"city": city, "days": days}
        asked, scene = pick(rng, WEATHER[language]).format(c=city, n=days), f"weather {city} {days}"
    else:
        minutes = int(rng.integers(1, 121))
        name, arguments = "set_timer", {"minutes": minutes}
        asked, scene = pick(rng, TIMER[language]).format(n=minutes), f"timer {minutes}"
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return Turn(asked, call, kind="text/tool call", functions=offered), scene


def _refusal(rng: np.random.Generator) -> tuple[Turn, str]:
    language = any_language(rng)
    asked = pick(rng, REFUSED[int(rng.integers(len(REFUSED)))][language])
    asked = asked.replace("{n}", "1")
    return Turn(asked, NO_PICTURE[language], kind="text/refusal"), "no picture"
