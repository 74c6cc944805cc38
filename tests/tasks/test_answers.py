"""Answers are right by construction, and the same seed draws the same example."""

from __future__ import annotations

import re

import numpy as np
import pytest

from duomo.tasks import Example, Handwriting, dialogue, digits, shapes

SEEDS = range(60)


def the_digits(example: Example) -> list[int]:
    return [int(d) for d in example.scene.split("[")[1].split("]")[0].split(",")]


def test_digit_questions(made_up: Handwriting) -> None:
    kinds = set()
    for seed in SEEDS:
        example = digits.generate(np.random.default_rng(seed), made_up)
        values = the_digits(example)
        wanted = {
            "digits/read": "".join(map(str, values)),
            "digits/sum": str(sum(values)),
            "digits/sum thinking": str(sum(values)),
            "digits/largest": str(max(values)),
            "digits/count": str(len(values)),
        }
        for turn in example.turns:
            assert turn.answer == wanted[turn.kind]
            assert (turn.reasoning is not None) == turn.kind.endswith("thinking")
            kinds.add(turn.kind)
    assert kinds == {"digits/read", "digits/sum", "digits/sum thinking", "digits/largest", "digits/count"}


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("values", [[7], [4, 9], [9, 8, 7], [0, 0, 0]])
def test_every_step_of_adding_aloud_is_true(values: list[int], language: str) -> None:
    thought = digits.add_aloud(values, language)  # type: ignore[arg-type]
    steps = re.findall(r"(\d+)\+(\d+)=(\d+)", thought)
    assert len(steps) == len(values) - 1
    assert all(int(a) + int(b) == int(c) for a, b, c in steps)
    assert int(steps[-1][2] if steps else values[0]) == sum(values)


def test_sums_aloud_carry_rightly() -> None:
    for a in range(0, 100, 7):
        for b in range(100):
            thought = dialogue.carry_aloud(a, b)
            assert thought.endswith(f": {a + b}")
            assert all(eval(left) == int(right) for left, right in re.findall(r"([\d+]+)=(\d+)", thought))


def test_shape_questions_agree_with_the_scene() -> None:
    seen = set()
    for seed in range(200):
        example = shapes.generate(np.random.default_rng(seed), "train")
        drawn = [word.split("@")[0].split("-") for word in example.scene.split()[1:]]
        for turn in example.turns:
            seen.add(turn.kind)
            if turn.kind == "shapes/count all":
                assert turn.answer == str(len(drawn))
            elif turn.kind.startswith("shapes/count some"):
                assert int(turn.answer) == sum(_is_asked(turn.question, *pair) for pair in drawn)
            else:
                colour, kind = drawn[0]
                names = (f"{colour} {kind}", shapes.ZH[colour] + shapes.ZH[kind])
                colours = (colour, shapes.ZH[colour])
                assert turn.answer in (names if turn.kind == "shapes/name" else colours)
    assert len(seen) == 5


def _is_asked(question: str, colour: str, kind: str) -> bool:
    words = (colour, shapes.ZH[colour], kind, shapes.ZH[kind])
    return any(word in question for word in words)


def test_counting_aloud_numbers_exactly_the_shapes_that_count() -> None:
    for seed in range(200):
        example = shapes.generate(np.random.default_rng(seed), "train")
        for turn in example.turns:
            if turn.reasoning is not None:
                numbers = [int(n) for n in re.findall(r"\d+", turn.reasoning)]
                assert numbers == list(range(1, int(turn.answer) + 1))


def test_the_same_seed_draws_the_same_example(made_up: Handwriting) -> None:
    for make in (
        lambda rng: digits.generate(rng, made_up),
        lambda rng: shapes.generate(rng, "test"),
        lambda rng: dialogue.generate(rng, "dev"),
    ):
        one, two = make(np.random.default_rng(9)), make(np.random.default_rng(9))
        assert one.turns == two.turns and one.scene == two.scene
        assert np.array_equal(one.picture, two.picture) or one.picture is None


def test_pictures_are_whole_token_cells_and_show_something(made_up: Handwriting) -> None:
    for seed in SEEDS:
        for example in (
            digits.generate(np.random.default_rng(seed), made_up),
            shapes.generate(np.random.default_rng(seed), "train"),
        ):
            assert example.picture is not None and example.picture.dtype == np.uint8
            assert example.picture.shape[0] % 28 == 0 and example.picture.shape[1] % 28 == 0
            assert example.picture.std() > 2


def test_digits_lie_where_draw_line_says(made_up: Handwriting) -> None:
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        values = digits.draw_number(rng)
        picture, placed = digits.draw_line(rng, made_up, values, (84, 112))
        assert [p.digit for p in placed] == values
        assert [p.column for p in placed] == sorted(p.column for p in placed)
        assert all(0 <= p.row < picture.shape[0] and 0 <= p.column < picture.shape[1] for p in placed)
