"""Every family answers rightly by its own scene, keeps to its split, and draws whole token cells."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest

from duomo.errors import TrainingError
from duomo.tasks import charts, circuits, instructions, meters, nuclei, places, surface
from duomo.tasks.families import COLOURS, FAMILIES, LABELS, LOOKUPS
from duomo.tasks.pools import FONTS, Pools, load_pools
from duomo.tasks.scene import Example, Split, Turn, split_of
from tests.conftest import made_up_pools
from tests.tasks.conftest import CACHE

SPLITS: tuple[Split, ...] = ("train", "dev", "test")
# Digits are split by the samples they are written with, greetings and refusals stand in every split.
FREE = ("digits ", "talk", "no picture", "slide ")


def draw(name: str, num: int, split: Split = "train", seed: int = 0) -> list[Example]:
    rng, pools = np.random.default_rng(seed), made_up_pools(split)
    return [FAMILIES[name](rng, pools) for _ in range(num)]


@pytest.mark.parametrize("name", FAMILIES)
def test_scenes_keep_to_their_split_and_do_not_meet(name: str) -> None:
    _no_scene_in_two_splits([name], 120)


@pytest.mark.slow
def test_no_scene_of_50000_a_split_is_in_two() -> None:
    _no_scene_in_two_splits(list(FAMILIES), 50_000 // len(FAMILIES) + 1)


def _no_scene_in_two_splits(names: list[str], num_each: int) -> None:
    found: dict[Split, set[str]] = {split: set() for split in SPLITS}
    for name in names:
        for split in SPLITS:
            scenes = {example.scene for example in draw(name, num_each, split)}
            scenes = {scene for scene in scenes if not scene.startswith(FREE)}
            assert all(split_of(scene) == split for scene in scenes)
            found[split] |= scenes
    for one, other in combinations(SPLITS, 2):
        assert not found[one] & found[other]
        assert found[one] or names == ["digits"]


@pytest.mark.parametrize("name", FAMILIES)
def test_pictures_and_marks(name: str) -> None:
    for example in draw(name, 40):
        assert example.turns and all(turn.kind and turn.answer for turn in example.turns)
        assert all((t.reasoning is not None) == t.kind.endswith("thinking") for t in example.turns)
        if example.picture is None:
            continue
        height, width = example.picture.shape[-3:-1]
        assert example.picture.dtype == np.uint8 and height % 28 == 0 and width % 28 == 0
        assert height * width <= 168 * 168 and example.picture.std() > 2
        assert (len(example.times) == len(example.picture)) == (example.picture.ndim == 4)
        for mark in example.marks:
            assert mark.label in LABELS and mark.colour in ("", *COLOURS)
            assert 0 <= mark.row < height and 0 <= mark.column < width


@pytest.mark.parametrize("name", FAMILIES)
def test_both_languages_and_the_same_seed_twice(name: str) -> None:
    one, two = draw(name, 40), draw(name, 40)
    assert all(a.turns == b.turns and a.scene == b.scene for a, b in zip(one, two, strict=True))
    questions = [turn.question for example in one for turn in example.turns]
    assert any(q.isascii() for q in questions) and not all(q.isascii() for q in questions)


def turns_of(name: str, kind: str, num: int = 150) -> list[tuple[str, Turn]]:
    found = [(e.scene, turn) for e in draw(name, num) for turn in e.turns if turn.kind.startswith(kind)]
    assert found
    return found


def sums_in(thought: str) -> list[tuple[str, str]]:
    """Every `left=right` of a thought whose left side is arithmetic."""
    return re.findall(r"(?<![A-Z0-9.])([\d.]+(?:[-+*/][\d.]+)+)=(\d+(?:\.\d)?%?)", thought)


@pytest.mark.parametrize("name", ["meters", "charts", "circuits", "nuclei"])
def test_every_step_of_a_thought_is_true(name: str) -> None:
    checked = 0
    for example in draw(name, 200):
        for turn in example.turns:
            for left, right in sums_in(turn.reasoning or ""):
                terms = re.split(r"(?<=[\d])([-+*/])", left)
                value = Fraction(terms[0])
                for sign, term in zip(terms[1::2], terms[2::2], strict=True):
                    operand = Fraction(term)
                    value = {"+": value + operand, "-": value - operand, "*": value * operand}.get(
                        sign, value / operand if operand else value
                    )
                wanted = Fraction(right.rstrip("%")) / (100 if right.endswith("%") else 1)
                assert abs(value - wanted) <= (Fraction(1, 200) if right.endswith("%") else 0), turn
                checked += 1
    assert checked > 40


@pytest.mark.parametrize("name", LOOKUPS)
def test_more_lookups_ask_more_of_the_same_scene(name: str) -> None:
    """The first example is the family's own with turns added, and every added one is true."""
    pools = made_up_pools("train")
    one = FAMILIES[name](np.random.default_rng(3), pools)
    more = LOOKUPS[name](np.random.default_rng(3), pools, 4)
    assert more.scene == one.scene and len(more.turns) > len(one.turns)
    if name == "places":  # lookups come before the name of the first
        assert set(one.turns[:4]) <= set(more.turns)
    else:
        assert more.turns[: len(one.turns)] == one.turns
    if name == "charts":
        values = {m: int(v) for m, v in re.findall(r"(\w+)=(\d+)", more.scene)}
        for turn in more.turns[len(one.turns) :]:
            assert turn.answer in {str(v) for m, v in values.items() if m in turn.question}


def test_more_verdicts_go_by_their_own_rule() -> None:
    rng, pools = np.random.default_rng(5), made_up_pools("train")
    found: list[tuple[int, str]] = []
    for _ in range(60):
        example = LOOKUPS["surface"](rng, pools, 4)
        kinds = [kind for kind in surface.NAMES if f"{kind}@" in example.scene]
        pores = example.scene.count("pore@")
        for turn in example.turns:
            if turn.kind.startswith("surface/verdict"):
                allowed = int(re.findall(r"\d+", turn.question)[0])
                assert allowed != surface.ALLOWED["test"][0]  # never stated in training
                assert turn.answer == ("OK" if set(kinds) <= {"pore"} and pores <= allowed else "NG")
                found.append((allowed, turn.answer))
    assert {allowed for allowed, _ in found} == set(surface.MORE_ALLOWED)
    assert {answer for _, answer in found} == {"OK", "NG"}


def test_steps_of_meters_are_those_of_their_scene() -> None:
    rng, pools = np.random.default_rng(6), made_up_pools("train")
    found = set()
    for _ in range(80):
        example = LOOKUPS["meters"](rng, pools, 2)
        numbers = re.findall(r"\d+", example.scene)
        for turn in example.turns:
            found.add(turn.kind)
            if turn.kind == "meters/one character":
                place = int(re.findall(r"\d", turn.question)[0])
                assert turn.answer == example.scene.removeprefix("label ")[place - 1]
            elif turn.kind == "meters/tenths":
                assert turn.answer == numbers[0][-1]
            elif turn.kind == "meters/end of scale":
                assert turn.answer == numbers[1]
            elif turn.kind == "meters/read one of two":
                is_lower = "lower" in turn.question or "下面" in turn.question
                assert turn.answer == meters.written(int(numbers[is_lower]))
    assert {"one character", "tenths", "end of scale", "read one of two"} <= {k.split("/")[1] for k in found}


def test_charts_answer_by_their_values() -> None:
    for scene, turn in turns_of("charts", "charts/"):
        values = {m: int(v) for m, v in re.findall(r"(\w+)=(\d+)", scene)}
        asked = [values[m] for m in re.findall("|".join(charts.MONTHS), turn.question)]
        wanted = chart_answer(turn.kind.split("/")[1].split()[0], values, asked)
        assert turn.answer == wanted, (scene, turn)


def chart_answer(asks: str, values: dict[str, int], asked: list[int]) -> str:
    if asks == "largest":
        return max(values, key=lambda month: values[month])
    if asks in ("total", "mean"):
        return str(sum(values.values()) // (1 if asks == "total" else len(values)))
    if asks == "value":
        return str(asked[0])
    first, second = asked
    return str(abs(first - second)) if asks == "difference" else f"{(second - first) * 100 // first}%"


def test_totals_are_spread_evenly_over_their_range() -> None:
    """The answer is drawn first: no tenth of the range has more than three times its share."""
    totals = [sum(charts._values(np.random.default_rng(s), "total", 4)[0]) for s in range(1500)]
    counts, _ = np.histogram(totals, bins=10, range=(4, 61))
    assert counts.min() > 75 and counts.max() < 300


def test_circuits_reduce_to_kirchhoffs_answer() -> None:
    """The node equations of the whole circuit, bridge and all, solved in general."""
    for scene, turn in turns_of("circuits", "circuits/equivalent", 120):
        shape, listed = re.fullmatch(r"circuit (.+) \((.+)\)", scene).groups()  # type: ignore[union-attr]
        ohms = [int(v) for v in re.findall(r"\d+", listed)]
        assert abs(_resistance(shape, ohms) - int(turn.answer)) < 1e-9


def _resistance(shape: str, ohms: list[int]) -> float:
    groups, edges, node = circuits.SHAPES[shape], [], 0
    if shape == "bridge":  # nodes: in 0, upper 1, lower 2, out 3
        edges = [(0, 1, ohms[0]), (0, 2, ohms[1]), (1, 3, ohms[2]), (2, 3, ohms[3]), (1, 2, ohms[4])]
        node = 3
    else:
        for group in groups:
            edges += [(node, node + 1, ohms[i - 1]) for i in group]
            node += 1
    laplacian = np.zeros((node + 1, node + 1))
    for a, b, value in edges:
        laplacian[[a, b], [a, b]] += 1 / value
        laplacian[[a, b], [b, a]] -= 1 / value
    current = np.zeros(node + 1)
    current[0] = 1
    return float(np.linalg.solve(laplacian[:-1, :-1], current[:-1])[0])


def test_verdicts_follow_the_stated_rule() -> None:
    verdicts = []
    for scene, turn in turns_of("surface", "surface/verdict"):
        kinds = re.findall(r"(pore|crack|undercut|spatter|wrong part)@", scene)
        allowed = int(re.search(r"\d+", turn.question).group())  # type: ignore[union-attr]
        is_ok = set(kinds) <= {"pore"} and len(kinds) <= allowed
        assert turn.answer == ("OK" if is_ok else "NG")
        verdicts.append(is_ok)
    assert 0.35 < np.mean(verdicts) < 0.65


def test_no_threshold_of_testing_is_trained_on() -> None:
    assert not set(surface.ALLOWED["train"]) & (set(surface.ALLOWED["test"]) | set(surface.ALLOWED["dev"]))


def test_nuclei_shares() -> None:
    for scene, turn in turns_of("nuclei", "nuclei/share"):
        brown, blue = (len(re.findall(r"\d+", part)) for part in scene.split("blue"))
        assert turn.answer == f"{round(100 * brown / (brown + blue))}%"


def test_pairs_that_are_held_out_are_never_drawn_in_training() -> None:
    seen = {split: " ".join(e.scene for e in draw("places", 150, split)) for split in SPLITS}
    for colour, kind in places.HELD_OUT:
        assert f"{colour}-{kind}@" not in seen["train"]
    assert any(f"{colour}-{kind}@" in seen["test"] for colour, kind in places.HELD_OUT)


def test_boxes_hold_the_shape() -> None:
    for example in draw("places", 60):
        assert example.picture is not None
        for turn in example.turns:
            if turn.kind == "places/box":
                left, top, right, bottom = (
                    int(v) * 112 // 1000 for v in re.findall(r"LOC_(\d+)", turn.answer)
                )
                inside = example.picture[top : bottom + 1, left : right + 1].astype(int)
                assert right > left and bottom > top
                assert np.abs(inside - example.picture[0, 0].astype(int)).max() > 40


def test_clips_move_as_they_say() -> None:
    for example in draw("clips", 60):
        if example.turns[0].kind != "clips/direction":
            continue
        assert example.picture is not None
        bright = example.picture.astype(float).mean(-1)
        bright -= bright[:, :1, :1]
        places_seen = [np.argwhere(np.abs(frame) > 40).mean(0) for frame in (bright[0], bright[-1])]
        down, right = places_seen[1] - places_seen[0]
        way = ("right" if right > 0 else "left") if abs(right) > abs(down) else ("down" if down > 0 else "up")
        assert example.scene.split()[2] == str(["left", "right", "up", "down"].index(way))


def test_numbers_in_words() -> None:
    assert instructions.english(472) == "four hundred seventy-two" and instructions.english(40) == "forty"
    assert [instructions.chinese(n) for n in (0, 10, 14, 40, 205, 312, 472, 600)] == [
        "零", "十", "十四", "四十", "二百零五", "三百一十二", "四百七十二", "六百",
    ]  # fmt: skip
    assert len({instructions.english(n) for n in range(1000)}) == 1000
    assert len({instructions.chinese(n) for n in range(1000)}) == 1000


def test_json_and_calls_parse_and_name_an_offered_function() -> None:
    for _, turn in turns_of("instructions", "text/json"):
        fields = json.loads(turn.answer)
        assert set(fields) in ({"sum", "difference"}, {"name", "age"})
    for _, turn in turns_of("instructions", "text/tool call"):
        call = json.loads(turn.answer)
        offered = {f.name: f.parameters for f in turn.functions}
        assert tuple(call["arguments"]) == offered[call["name"]]


def test_readings_are_written_with_their_tenth() -> None:
    assert [meters.written(t) for t in (0, 7, 38, 472)] == ["0.0", "0.7", "3.8", "47.2"]


def test_fonts_are_disjoint() -> None:
    for one, other in combinations(SPLITS, 2):
        assert not set(FONTS[one]) & set(FONTS[other])


@pytest.fixture(scope="module")
def real() -> dict[Split, Pools]:
    try:
        return {split: load_pools(CACHE, split) for split in SPLITS}
    except TrainingError as error:
        pytest.skip(f"the real pictures cannot be fetched here: {error}")


def test_real_pools_share_no_pixels(real: dict[Split, Pools]) -> None:
    """Product photos by content; textures and slides by the columns they were cut from."""
    pieces = {
        split: {photo.tobytes() for photo in pools.products[:6000]}
        | {column.tobytes() for texture in pools.textures for column in texture.T}
        | {
            patch.tobytes()
            for rows in np.split(pools.slide[:128], 16)
            for patch in np.split(rows, 32, axis=1)
        }
        for split, pools in real.items()
    }
    for one, other in combinations(SPLITS, 2):
        assert not pieces[one] & pieces[other]


def test_real_slides_have_both_stains(real: dict[Split, Pools]) -> None:
    for split in SPLITS:
        rng, answers = np.random.default_rng(2), []
        while len(answers) < 60:
            answers += [
                turn.answer in ("brown", "棕色")
                for turn in nuclei.generate(rng, real[split]).turns
                if turn.kind == "nuclei/dominant real"
            ]
        assert 0.25 < np.mean(answers) < 0.75
