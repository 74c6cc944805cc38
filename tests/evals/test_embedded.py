"""The frozen questions are frozen, scores are counted rightly, and generation equals the plain model's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from duomo.errors import TrainingError
from duomo.evals.decoding import generate_greedy
from duomo.evals.embedded import answer_all, majority_answers, score_by_kind, score_digits, wilson
from duomo.evals.questions import Question, frozen_questions, hash_of, prompt_of
from duomo.model import Ernie
from duomo.processing.patches import normalize
from duomo.processing.tokenizer import Tokenizer
from duomo.tasks import Handwriting, load_handwriting
from duomo.train.run import build_model

CACHE = Path(__file__).parents[2] / "runs" / "cache"


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Ernie:
    return build_model(tokenizer, 5).eval()


def a_few(pool: Handwriting) -> list[Question]:
    return frozen_questions(pool, num_read=3, num_other=2)


def test_questions_are_the_same_at_every_call(pool: Handwriting) -> None:
    one, two = a_few(pool), a_few(pool)
    assert hash_of(one) == hash_of(two) and len(one) > 15
    assert all(
        np.array_equal(a.picture, b.picture) for a, b in zip(one, two, strict=True) if a.picture is not None
    )
    assert hash_of(one) != hash_of(one[1:])


def test_the_frozen_set_has_its_hash() -> None:
    try:
        pool = load_handwriting(CACHE, "test")
    except TrainingError as error:
        pytest.skip(f"the digits cannot be fetched here: {error}")
    questions = frozen_questions(pool)
    assert hash_of(questions) == "9ec8dee45c37737a865f90ceaf6bd560"
    assert len({question.kind for question in questions}) == 15


def test_generation_equals_the_plain_model(model: Ernie, tokenizer: Tokenizer, pool: Handwriting) -> None:
    questions = a_few(pool)[:3] + a_few(pool)[-2:]
    prompts = [prompt_of(question, tokenizer) for question in questions]
    found = generate_greedy(model, prompts, eos_ids=(), max_tokens=4)
    for prompt, output in zip(prompts, found, strict=True):
        ids = list(prompt.ids)
        patches = torch.from_numpy(normalize(prompt.media[0].patches)) if prompt.media else None
        for token in output:
            assert int(model.logits(ids, prompt.spans, patches)[-1].argmax()) == token
            ids.append(token)


def test_answers_come_back_in_order(model: Ernie, tokenizer: Tokenizer, pool: Handwriting) -> None:
    questions = a_few(pool)
    together = answer_all(model, tokenizer, questions)
    assert together[4] == answer_all(model, tokenizer, questions[4:5])[0]
    assert len(together) == len(questions)


def test_scores_by_hand() -> None:
    def ask(kind: str, answer: str) -> Question:
        return Question(kind, "?", answer, False, "")

    questions = [ask("digits/read", "123"), ask("digits/read", "45"), ask("digits/read", "45"), ask("b", "x")]
    answers, blind = ["123", "46", "4", "x"], ["1", "45", "", "y"]
    assert majority_answers(questions) == ["45", "45", "45", "x"]
    scores = score_by_kind(questions, answers, blind)
    assert (scores["digits/read"].num, scores["digits/read"].right) == (3, 1)
    assert (scores["digits/read"].blind, scores["digits/read"].majority) == (1, 2)
    each = score_digits(questions, answers, blind)
    assert (each.num, each.right, each.blind) == (7, 5, 3)


def test_wilson_by_a_textbook_value() -> None:
    low, high = wilson(8, 10)
    assert abs(low - 0.490) < 1e-3 and abs(high - 0.943) < 1e-3
    assert wilson(0, 0) == (0.0, 1.0) and wilson(5, 5)[1] == pytest.approx(1.0)


def test_a_blinded_question_shows_nothing(pool: Handwriting) -> None:
    for question in a_few(pool):
        blinded = question.blinded()
        assert blinded.answer == question.answer
        assert blinded.picture is None or (blinded.picture == 128).all()
