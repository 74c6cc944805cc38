"""Paired differences: what two checkpoints answer differently, and how sure that is."""

import math

import pytest

from duomo.evals.kept import KeptAnswers
from duomo.evals.paired import compare, difference, verdict
from duomo.evals.questions import Question


def test_only_questions_answered_differently_count():
    first, second = [True] * 90 + [False] * 10, [True] * 87 + [False] * 3 + [True] * 2 + [False] * 8
    row = difference(first, second)
    assert (row["num"], row["lost"], row["gained"], row["points"]) == (100, 3, 2, -1.0)
    # One more of each: (4 + 3) / 102 differ, -1 / 102 in the middle;
    # sqrt((7/102 - (1/102)^2) / 102) = 2.592 points.
    assert row["low"] == pytest.approx(-100 / 102 - 1.96 * 2.592, abs=0.01)
    assert row["high"] == pytest.approx(-100 / 102 + 1.96 * 2.592, abs=0.01)


def test_equal_answers_to_a_few_questions_leave_doubt():
    row = difference([True] * 20, [True] * 20)
    assert row["points"] == 0 and verdict(row) == "open"
    assert row["low"] == pytest.approx(-100 * 1.96 * math.sqrt(2 / 22 / 22), abs=0.01) == -row["high"]


def test_a_family_is_the_sum_of_its_kinds():
    questions = [Question(kind, "?", "a", False, "s") for kind in ("digits/read", "digits/sum", "text/talk")]
    rows = compare(questions, ["a", "b", "a"], ["b", "a", "a"])
    assert {name: row["num"] for name, row in rows.items()} == {
        "digits": 2, "digits/read": 1, "digits/sum": 1, "text": 1, "text/talk": 1,
    }  # fmt: skip
    assert (rows["digits"]["lost"], rows["digits"]["gained"]) == (1, 1)


def test_an_answer_is_judged_as_its_kind_is():
    question = Question("places/box", "?", "<|LOC_0|><|LOC_0|><|LOC_10|><|LOC_10|>", False, "s")
    rows = compare([question], ["<|LOC_0|><|LOC_0|><|LOC_10|><|LOC_9|>"], ["<|LOC_0|><|LOC_0|>"])
    assert (rows["places"]["first"], rows["places"]["second"]) == (100, 0)


@pytest.mark.parametrize(
    ("lost", "gained", "num", "said"),
    [
        (0, 0, 400, "within"),
        (0, 0, 100, "open"),
        (30, 20, 1000, "open"),
        (60, 2, 1000, "lost more"),
        (12, 10, 4000, "within"),
    ],
)
def test_only_an_interval_above_minus_one_point_is_within(lost, gained, num, said):
    first = [True] * lost + [False] * (num - lost)
    second = [False] * lost + [True] * gained + [False] * (num - lost - gained)
    assert verdict(difference(first, second)) == said


def test_answers_outlive_a_kill_in_the_middle_of_a_line(tmp_path):
    kept = KeptAnswers(tmp_path / "a.jsonl")
    kept.add({3: "drei\n", 1: "一"})
    whole = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "a.jsonl").write_bytes(whole[:-2])
    again = KeptAnswers(tmp_path / "a.jsonl")
    assert 3 in again and again[3] == "drei\n" and 1 not in again
    again.add({1: "一"})
    assert KeptAnswers(tmp_path / "a.jsonl")[1] == "一"


def test_other_weights_or_questions_have_other_answers(tmp_path):
    for name, weights in (("one", b"1"), ("two", b"2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(weights)
    KeptAnswers.of(tmp_path, tmp_path / "one", "q").add({0: "yes"})
    assert 0 in KeptAnswers.of(tmp_path, tmp_path / "one", "q")
    assert 0 not in KeptAnswers.of(tmp_path, tmp_path / "two", "q")
    assert 0 not in KeptAnswers.of(tmp_path, tmp_path / "one", "other")


def test_both_are_asked_once_however_often_a_run_is_taken_up(tmp_path, monkeypatch):
    import duomo.evals.paired as paired

    asked = []

    class Sitter(paired.Sitter):
        def __init__(self, folder, kept):
            self.model, self.tokenizer, self.kept = folder.name, None, kept

    def answer_all(model, tokenizer, questions):
        asked.extend((model, question.question) for question in questions)
        if len(asked) > 30:
            raise KeyboardInterrupt
        return ["a" if model == "bf16" else "b"] * len(questions)

    for name in ("bf16", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text(name)
    monkeypatch.setattr(paired, "Sitter", Sitter)
    monkeypatch.setattr(paired, "BLOCK", 10)
    monkeypatch.setattr(paired, "answer_all", answer_all)
    questions = [Question("digits/read", f"{n}?", "a", False, "s") for n in range(25)]
    given = questions, (tmp_path / "bf16", tmp_path / "two"), tmp_path / "kept", tmp_path / "rows.json"
    with pytest.raises(KeyboardInterrupt):
        paired.ask_both(*given)
    assert len(asked) == 40 and '"answered": 10' in (tmp_path / "rows.json").read_text()
    del asked[:]
    rows = paired.ask_both(*given)
    assert len(asked) == 20 and len(set(asked)) == 20  # what the first had answered before was kept
    assert rows["digits"]["lost"] == 25 and '"answered": 25' in (tmp_path / "rows.json").read_text()
    del asked[:]
    assert paired.ask_both(*given) == rows and asked == []
