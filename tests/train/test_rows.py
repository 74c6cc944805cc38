"""Every public spelling of a row, and every bad row named with its file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from duomo.errors import TrainingError
from duomo.train.rows import Piece, check_rows, parse_row

GOOD = {
    "ernie": {"src": ["a", "c"], "tgt": ["b", "d"], "label": [0, 1], "system": "s"},
    "ernie preference": {"src": ["q"], "tgt": [], "response": [["bad"], ["good"]], "sort": [0, 1]},
    "ernie vision": {
        "text_info": [{"text": "what?", "tag": "mask"}, {"text": "a cat", "tag": "no_mask"}],
        "image_info": [{"image_url": "cat.png", "matched_text_index": 0}],
    },
    "messages": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "alpaca": {"instruction": "add", "input": "1 2", "output": "3", "history": [["h", "i"]]},
    "preference": {"question": "q", "chosen": "good", "rejected": "bad"},
    "query": {"query": "<image>what?", "response": "a cat", "images": ["cat.png"]},
}


@pytest.mark.parametrize("name", GOOD)
def test_every_spelling_is_read(name: str) -> None:
    row = parse_row(json.dumps(GOOD[name]), "f:1")
    assert row.turns[-1].role == "assistant" and row.turns[-1].is_supervised


def test_what_is_in_them() -> None:
    def row(name: str):  # type: ignore[no-untyped-def]
        return parse_row(json.dumps(GOOD[name]), "f:1")

    assert [t.is_supervised for t in row("ernie").turns] == [False, False, False, False, True]
    assert (row("ernie preference").turns[-1].text, row("ernie preference").rejected) == ("good", "bad")
    for name in ("ernie vision", "query"):
        assert row(name).turns[0].pieces == (Piece("image", "cat.png"), Piece("text", "what?"))
    assert [t.text for t in row("alpaca").turns] == ["h", "i", "add\n1 2", "3"]
    assert row("preference").rejected == "bad"


def test_thinking_in_an_answer_becomes_its_reasoning() -> None:
    row = parse_row(json.dumps({"src": ["q"], "tgt": ["<think>\nhm\n</think>\nyes"]}), "f:1")
    assert (row.turns[-1].reasoning, row.turns[-1].text) == ("hm", "yes")


BAD = [
    ("{", "not JSON"),
    ("[1]", "JSON object"),
    ({"foo": 1}, "no known format"),
    ({"src": ["a"], "tgt": []}, "as many"),
    ({"src": "a", "tgt": ["b"]}, "src must be a list"),
    ({"src": [1], "tgt": ["b"]}, "must be a text"),
    ({"src": ["a"], "tgt": ["b"], "label": [2]}, "0 or 1"),
    ({"src": ["a"], "tgt": ["b"], "label": [0]}, "supervised"),
    ({"src": ["a"], "tgt": [" "]}, "empty"),
    ({"src": ["a"], "response": [["x"]], "sort": [1, 0]}, "two entries"),
    ({"src": ["a"], "response": [["x"], ["y"]], "sort": [1, 1]}, "different ranks"),
    ({"question": "q", "chosen": "a", "rejected": "a"}, "the same"),
    ({"question": "q", "chosen": "a", "rejected": ""}, "rejected answer is empty"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "robot"),
    ({"messages": [{"role": "user", "content": "x"}]}, "last turn"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "first turn"),
    ({"messages": [{"role": "user"}]}, "content"),
    ({"messages": [{"role": "user", "content": [{"type": "smell"}]}]}, "smell"),
    ({"messages": []}, "no turn"),
    ({"conversations": [{"from": "cat", "value": "x"}]}, "cat"),
    (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]},
        "last turn",
    ),
    ({"query": "<image>?", "response": "a"}, "more <image>"),
    ({"query": "?", "response": "a", "images": ["x.png"]}, "no <image>"),
    ({"text_info": [{"text": "a", "tag": "maybe"}]}, "mask or no_mask"),
    (
        {
            "text_info": [{"text": "a", "tag": "mask"}],
            "image_info": [{"image_url": "x", "matched_text_index": 9}],
        },
        "matched_text_index",
    ),
]


@pytest.mark.parametrize(("fields", "reason"), BAD)
def test_a_bad_row_is_named(fields: object, reason: str) -> None:
    line = fields if isinstance(fields, str) else json.dumps(fields)
    with pytest.raises(TrainingError, match=reason) as caught:
        parse_row(line, "rows.jsonl:7")
    assert caught.value.message.startswith("rows.jsonl:7: ")
    assert "\n" not in caught.value.message


def test_a_file_is_checked_to_its_end(tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in GOOD.values()] + [
        b if isinstance(b, str) else json.dumps(b) for b, _ in BAD
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    rows, problems = check_rows(file)
    missing = [p for p in problems if "no file cat.png" in p.message]
    assert len(missing) == 2 and len(problems) == len(BAD) + 2 and len(rows) == len(GOOD) - 2
    (tmp_path / "cat.png").write_bytes(b"")
    rows, problems = check_rows(file)
    assert (len(rows), len(problems)) == (len(GOOD), len(BAD))
    assert [p.source for p in problems] == [f"rows.jsonl:{len(GOOD) + 1 + i}" for i in range(len(BAD))]
