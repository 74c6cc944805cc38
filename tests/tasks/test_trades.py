"""Trades answer rightly by their own scenes, keep to their split, and are nothing that the base learns."""

from __future__ import annotations

import re
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from duomo.tasks.families import FAMILIES, TRADES
from duomo.tasks.rows import write_rows
from duomo.tasks.scene import Example, Split, Turn, split_of
from duomo.tasks.trades import fluorescence, radiographs
from duomo.train.recipe import Recipe
from duomo.train.rows import check_rows
from tests.conftest import made_up_pools

SPLITS: tuple[Split, ...] = ("train", "dev", "test")
ZH_EN = {zh: en for en, zh in radiographs.NAMES.values()} | {"左": "left", "中": "middle", "右": "right"}


def draw(name: str, num: int, split: Split = "train") -> list[Example]:
    rng, pools = np.random.default_rng(0), made_up_pools(split)
    return [TRADES[name](rng, pools) for _ in range(num)]


def turns_of(name: str, num: int = 150) -> list[tuple[str, Turn]]:
    return [(example.scene, turn) for example in draw(name, num) for turn in example.turns]


def test_the_base_learns_no_trade() -> None:
    assert not set(TRADES) & set(FAMILIES)
    learnt = {name for stage in Recipe().stages for name, _ in (*stage.shares, *stage.cells)}
    assert learnt and not learnt & set(TRADES)


@pytest.mark.parametrize("name", TRADES)
def test_scenes_keep_to_their_split_and_do_not_meet(name: str) -> None:
    found = {split: {example.scene for example in draw(name, 120, split)} for split in SPLITS}
    assert all(split_of(scene) == split for split, scenes in found.items() for scene in scenes)
    for one, other in combinations(SPLITS, 2):
        assert found[one] and not found[one] & found[other]


@pytest.mark.parametrize("name", TRADES)
def test_pictures_languages_and_the_same_seed_twice(name: str) -> None:
    one, two = draw(name, 40), draw(name, 40)
    for a, b in zip(one, two, strict=True):
        assert a.turns == b.turns and a.picture is not None and np.array_equal(a.picture, b.picture)
        height, width, _ = a.picture.shape
        assert a.picture.dtype == np.uint8 and height % 28 == 0 and width % 28 == 0
        assert height <= 140 and width <= 168 and a.picture.std() > 2
        assert all(turn.answer and turn.kind for turn in a.turns)
        assert all((t.reasoning is not None) == t.kind.endswith("thinking") for t in a.turns)
    questions = [turn.question for example in one for turn in example.turns]
    assert any(q.isascii() for q in questions) and not all(q.isascii() for q in questions)


def test_verdicts_reasons_and_places_follow_film_and_rule() -> None:
    verdicts = []
    for scene, turn in turns_of("radiographs"):
        flaw, listed = re.match(r"radiograph ([a-z ]+?) ?(\(.*\))", scene).groups()  # type: ignore[union-attr]
        traces = re.findall(r"\((\d+), -?\d+\)", listed)
        thirds = {("left", "middle", "right")[3 * int(x) // radiographs.WIDTH_PX] for x in traces}
        answer = turn.answer
        for zh, en in ZH_EN.items():
            answer = answer.replace(zh, en)
        if turn.kind == "weld/kind":
            assert answer == ("no flaw" if flaw == "sound" else flaw)
        elif turn.kind == "weld/place":
            assert {answer} == thirds
        else:
            allowed = int(re.search(r"\d", turn.question).group())  # type: ignore[union-attr]
            is_ok = flaw == "sound" or (flaw == "pores" and len(traces) <= allowed)
            verdicts.append(is_ok)
            reason = f"NG: {flaw}, {thirds.pop()}" if not is_ok else "OK"
            assert answer.replace("：", ": ").replace("，", ", ") == reason
            for left, sign, right in re.findall(r"(\d)(<=|>)(\d)", turn.reasoning or ""):
                assert (int(left), int(right)) == (len(traces), allowed) and (sign == "<=") == is_ok
    assert 0.35 < np.mean(verdicts) < 0.65


def test_a_flaw_is_a_dark_trace_where_the_scene_says() -> None:
    """Against a sound film from the same draws: what differs is darker, and lies in the flaw's third."""
    pools = made_up_pools("train")
    for seed in range(60):
        film = radiographs._film(np.random.default_rng(seed), pools, is_ok=False, allowed=1)
        sound = film._replace(flaw="", traces=())
        one, other = (
            radiographs.draw(np.random.default_rng(7), pools, f)[..., 0].astype(int) for f in (film, sound)
        )
        change = other - one
        assert change.min() >= -1 and change.max() > 15
        weight = np.clip(change, 0, None).sum(0)
        centre = float((weight * np.arange(radiographs.WIDTH_PX)).sum() / weight.sum())
        assert abs(centre - (film.third + 0.5) * radiographs.WIDTH_PX / 3) < 19


def test_markers_are_counted_and_shared() -> None:
    for scene, turn in turns_of("fluorescence"):
        green, red, plain = (re.findall(r"\d+", part) for part in re.split("red|plain", scene))
        counts, total = {"green": len(green), "red": len(red)}, len(green + red + plain)
        asked = ["red", "green"][bool(re.search("green|绿", turn.question))]
        wanted = {
            "slides/positive": str(counts[asked]),
            "slides/nuclei": str(total),
            "slides/share": f"{round(100 * counts[asked] / total)}%",
        }
        if turn.kind == "slides/dominant":
            is_red = counts["red"] > counts["green"]
            assert turn.answer in ("red" if is_red else "green", "红色" if is_red else "绿色")
        else:
            assert turn.answer == wanted[turn.kind.removesuffix(" thinking")]
        if turn.reasoning:
            assert re.findall(r"\d+", turn.reasoning)[:2] == [str(counts[asked]), str(total)]


def test_light_shows_the_markers_of_the_scene() -> None:
    """Green and red light is in the cells that the scene names, and in no other."""
    for example in draw("fluorescence", 40):
        parts = [[int(c) for c in re.findall(r"\d+", p)] for p in re.split("red|plain", example.scene)]
        assert example.picture is not None
        pitch = fluorescence.SIDE_PX // fluorescence.CELLS
        for channel, cells in ((1, parts[0]), (0, parts[1])):
            # Above both others, so neither the blue of nuclei nor haze counts; a lobe may reach over an edge.
            light = example.picture.astype(int)
            is_lit = light[..., channel] - np.delete(light, channel, axis=-1).max(-1) > 60
            share = is_lit.reshape(fluorescence.CELLS, pitch, fluorescence.CELLS, pitch).mean((1, 3)).ravel()
            assert all((share[cell] > 0.05) == (cell in cells) for cell in range(16)), (example.scene, share)


def test_tables_answer_by_their_cells() -> None:
    seen = set()
    for scene, turn in turns_of("tables"):
        columns = re.findall(r"'(\w+)'", scene)
        rows = {
            name: [int(v) for v in re.findall(r"\d+", found)]
            for name, found in re.findall(r"(\w+)=\((.*?)\)", scene)
        }
        row = next((values for name, values in rows.items() if name in turn.question), [])
        places = [columns.index(name) for name in re.findall("|".join(columns), turn.question)]
        kind = turn.kind.split("/")[1].split()[0]
        seen.add(kind)
        if kind == "value":
            wanted = str(row[places[0]])
        elif kind == "largest":
            wanted = max(rows, key=lambda name: rows[name][places[0]])
        elif kind == "total":
            wanted = str(sum(row))
        else:
            low, high = (row[place] for place in places)
            wanted = f"{Fraction(100 * (high - low), low)}%"
        assert turn.answer == wanted, (scene, turn)
        for left, sign, right, result in re.findall(r"(\d+)([-+/])(\d+)=(\d+)", turn.reasoning or ""):
            a, b = int(left), int(right)
            assert Fraction(int(result)) == {"+": a + b, "-": a - b, "/": Fraction(100 * a, b)}[sign]
    assert seen == {"value", "largest", "total", "growth"}


@pytest.mark.parametrize("name", TRADES)
def test_the_kit_takes_every_row_and_its_kind(name: str, tmp_path: Path) -> None:
    rows, problems = check_rows(write_rows(name, made_up_pools("test"), tmp_path, "unseen", 30))
    assert len(rows) == 30 and not problems and all(row.media and row.kind for row in rows)
    assert len({row.kind for row in rows}) >= 4
