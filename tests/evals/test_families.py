"""The wider families' frozen questions, when an answer counts, what thinking is worth, other renderers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from duomo.errors import TrainingError
from duomo.evals import families
from duomo.evals.contrast import Contrast, contrasts
from duomo.evals.embedded import Score, answer_blind, score_by_kind, score_json
from duomo.evals.families import family_questions, rendered_questions
from duomo.evals.latency import compare_modes
from duomo.evals.questions import Question, hash_of, prompt_of
from duomo.evals.verdicts import is_right, overlap
from duomo.llm import LLM
from duomo.model import Ernie
from duomo.processing.tokenizer import Tokenizer
from duomo.tasks.charts import CANVAS_PX, Chart
from duomo.tasks.circuits import SHAPES, Circuit
from duomo.tasks.pools import load_pools
from duomo.train.run import build_model
from tests.conftest import made_up_pools

CACHE = Path(__file__).parents[2] / "runs" / "cache"


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    return family_questions(made_up_pools("test"), 2)


def test_every_kind_is_asked_and_thinking_kinds_think(questions: list[Question]) -> None:
    kinds = {question.kind for question in questions}
    assert len(kinds) == 46
    assert all(question.thinking == question.kind.endswith("thinking") for question in questions)
    assert hash_of(questions) == hash_of(family_questions(made_up_pools("test"), 2))


def test_the_frozen_set_has_its_hash() -> None:
    try:
        pools = load_pools(CACHE, "test")
    except TrainingError as error:
        pytest.skip(f"the real pictures cannot be fetched here: {error}")
    assert hash_of(family_questions(pools, 10)) == "11f5bc1dbed6ca1c5e56ed325cc0cc84"


def test_videos_and_tools_reach_the_prompt(questions: list[Question], tokenizer: Tokenizer) -> None:
    for question in questions:
        prompt = prompt_of(question, tokenizer)
        frames = [media.grid.frames for media in prompt.media]
        assert frames == ([] if question.picture is None else [max(1, len(question.times))])
        assert (tokenizer.special_id("<tool_list>") in prompt.ids) == bool(question.functions)


def test_blind_answers_keep_those_of_text(questions: list[Question], tokenizer: Tokenizer) -> None:
    model: Ernie = build_model(tokenizer, 5).eval()
    chosen = [q for q in questions if q.kind in ("text/json", "surface/verdict")]
    blind = answer_blind(model, tokenizer, chosen, ["kept"] * len(chosen))
    assert [b == "kept" for b in blind] == [q.picture is None for q in chosen]


BOX = "<|LOC_BEGIN|><|LOC_100|><|LOC_100|><|LOC_300|><|LOC_300|><|LOC_END|>"


def test_boxes_by_overlap() -> None:
    half = BOX.replace("LOC_300|><|LOC_300", "LOC_300|><|LOC_200")
    assert overlap(BOX, BOX) == 1.0 and overlap(BOX, half) == pytest.approx(0.5)
    assert is_right("places/box", BOX, half)
    assert not is_right("places/box", BOX, BOX.replace("100", "250"))
    assert overlap(BOX, "top left") == 0.0 and overlap(BOX, BOX.replace("300", "90")) == 0.0


@pytest.mark.parametrize(
    "kind, wanted, answer, right",
    [
        ("nuclei/share", "50%", "60%", True),
        ("nuclei/share", "50%", "61%", False),
        ("nuclei/share", "50%", "50", False),
        ("charts/total", "50", "51", False),
        ("charts/growth", "50%", "60%", False),
        ("text/json", '{"sum": 3, "difference": 1}', '{"difference":1,"sum":3}', True),
        ("text/json", '{"sum": 3, "difference": 1}', '{"sum": 3', False),
        ("surface/verdict", "OK", "OK", True),
        ("surface/verdict", "OK", "ok", False),
    ],
)
def test_what_counts(kind: str, wanted: str, answer: str, right: bool) -> None:
    assert is_right(kind, wanted, answer) == right


def test_scores_use_the_verdicts_and_count_what_parses() -> None:
    asked = [
        Question("text/json", "?", '{"a": 1}', False, ""),
        Question("nuclei/share", "?", "40%", False, ""),
    ]
    scores = score_by_kind(asked, ['{"a":1}', "45%"], ["{", "90%"])
    assert (scores["text/json"].right, scores["nuclei/share"].right, scores["nuclei/share"].blind) == (
        1,
        1,
        0,
    )
    valid = score_json(asked, ['{"b": 2}', "45%"])
    assert valid is not None and (valid.num, valid.right) == (1, 1)
    assert score_json(asked[1:], ["45%"]) is None


def test_the_gain_of_thinking_by_newcombes_own_example() -> None:
    """56/70 against 48/80, from Newcombe (1998), method 10: 0.20, from 0.0524 to 0.3339."""
    contrast = Contrast(direct=(48, 80), thinking=(56, 70))
    low, high = contrast.interval()
    assert contrast.gain == pytest.approx(0.2)
    assert (low, high) == (pytest.approx(0.0524, abs=2e-4), pytest.approx(0.3339, abs=2e-4))


def test_contrasts_pair_kinds_and_pool_those_of_the_aim() -> None:
    scores = {
        "digits/sum": Score(10, 2, 0, 0),
        "digits/sum thinking": Score(10, 8, 0, 0),
        "charts/total": Score(10, 1, 0, 0),
        "charts/total thinking": Score(10, 5, 0, 0),
        "places/count": Score(10, 9, 0, 0),
    }
    found = contrasts(scores)
    assert set(found) == {"digits/sum", "charts/total", "reasoned"}
    assert (found["reasoned"].direct, found["reasoned"].thinking) == ((3, 20), (13, 20))


def test_modes_are_timed_by_one_engine(tokenizer: Tokenizer, questions: list[Question]) -> None:
    script = lambda ids: tokenizer.encode("7")  # noqa: E731
    with LLM.scripted(tokenizer, script) as model:
        pairs = [(q, q.with_thinking()) for q in questions if q.kind == "text/in words"]
        found = compare_modes(model, pairs)
    assert found["num"] == 2 and found["direct_ms"] > 0 and found["thinking_ms"] > 0


@pytest.mark.parametrize("style", ["bar", "line"])
def test_matplotlib_draws_the_values_as_heights(style: str) -> None:
    pytest.importorskip("matplotlib")
    from duomo.evals.renderers import chart_by_matplotlib

    chart = Chart(style, ("Jan", "Feb", "Mar"), (4, 18, 9), False, "total", (0, 1))
    picture = chart_by_matplotlib(chart).astype(int)
    assert picture.shape == (*CANVAS_PX, 3)
    blue = picture[..., 2] - picture[..., 0] > 60
    tops = [np.argwhere(part.any(1)).min() for part in np.array_split(blue[:, 22:], 3, axis=1)]
    assert tops[1] < tops[0] and tops[1] < tops[2]


@pytest.mark.parametrize("shape", SHAPES)
def test_schemdraw_draws_every_shape(shape: str) -> None:
    pytest.importorskip("schemdraw")
    from duomo.evals.renderers import circuit_by_schemdraw

    numbers = sum(len(group) for group in SHAPES[shape]) + (shape == "bridge")
    picture = circuit_by_schemdraw(Circuit(shape, tuple(range(2, 2 + numbers))))
    assert picture.shape == (112, 168, 3) and 0.005 < (picture.mean(-1) < 128).mean() < 0.2


def test_a_missing_renderer_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "find_spec", lambda name: None if name == "schemdraw" else object())
    with pytest.raises(TrainingError, match="schemdraw is not installed: pip install"):
        rendered_questions(made_up_pools("test"), 1)


@pytest.mark.slow
def test_other_renderers_ask_the_same_kinds() -> None:
    pytest.importorskip("schemdraw")
    kinds = {question.kind for question in rendered_questions(made_up_pools("test"), 1)}
    assert len(kinds) == 14 and all(kind.endswith(("(matplotlib)", "(schemdraw)")) for kind in kinds)
