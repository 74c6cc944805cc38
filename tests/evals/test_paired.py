"""Paired differences: what two checkpoints answer differently, and how sure that is."""

import pytest

from duomo.evals.paired import compare, difference
from duomo.evals.questions import Question


def test_only_questions_answered_differently_count():
    first, second = [True] * 90 + [False] * 10, [True] * 87 + [False] * 3 + [True] * 2 + [False] * 8
    row = difference(first, second)
    assert (row["num"], row["lost"], row["gained"], row["points"]) == (100, 3, 2, -1.0)
    # Five differences in a hundred: the standard error is sqrt((5 - 100 * 0.01^2) / 99 / 100) = 2.246 points.
    assert row["low"] == pytest.approx(-1 - 1.96 * 2.246, abs=0.01)
    assert row["high"] == pytest.approx(-1 + 1.96 * 2.246, abs=0.01)


def test_equal_answers_leave_no_doubt():
    row = difference([True, False, True], [True, False, True])
    assert row["points"] == row["low"] == row["high"] == 0


def test_a_family_is_the_sum_of_its_kinds():
    questions = [Question(kind, "?", "a", False, "s") for kind in ("digits/read", "digits/sum", "text/talk")]
    rows = compare(questions, ["a", "b", "a"], ["b", "a", "a"])
    assert {name: row["num"] for name, row in rows.items()} == {
        "digits": 2, "digits/read": 1, "digits/sum": 1, "text": 1, "text/talk": 1,
    }  # fmt: skip
    assert (rows["digits"]["lost"], rows["digits"]["gained"]) == (1, 1)
