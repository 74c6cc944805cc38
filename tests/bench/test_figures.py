"""The benchmark's arithmetic, and its runs over a scripted model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from duomo.bench.engine import measure_throughput
from duomo.bench.report import Row, percentiles, summarize, text_table, why_nothing, write_report
from duomo.bench.workload import Workload, read_prompts
from duomo.engine.scripted import always
from duomo.errors import ConfigError
from duomo.llm import LLM
from duomo.processing.tokenizer import Tokenizer
from duomo.train.vocabulary import train_vocabulary


def test_figures_of_rows_known_by_hand() -> None:
    rows = [
        Row(0.0, [0.1, 0.3, 0.4], [1, 2, 1], input_tokens=10, output_tokens=4),
        Row(1.0, [1.3], [1], input_tokens=6, output_tokens=1),
        Row(2.0, error="HTTP 503"),
    ]
    assert rows[0].gaps_s == pytest.approx([0.1, 0.1, 0.1])
    figures = summarize(rows, 2.0, label="x")
    assert (figures["requests"], figures["failed"], figures["output_tokens"]) == (3, 1, 5)
    assert figures["input_tokens_per_s"] == 8 and figures["first_token_ms"]["p50"] == pytest.approx(200)
    assert percentiles([]) == {} and "HTTP" not in text_table([figures])
    assert why_nothing(rows) == "" and why_nothing(rows[2:]) == "HTTP 503"


def test_a_run_counts_every_token_and_is_written_down(tmp_path: Path) -> None:
    train_vocabulary(["hello world, the cat"] * 30, tmp_path / "tokenizer.json", vocab_size=700)
    tokenizer = Tokenizer.load(tmp_path)
    script = always(tokenizer.encode("hello world"), tokenizer.eos_ids[0], tokenizer.special_id("<think>"))
    work = Workload(num_requests=5, input_tokens=9, output_tokens=7)
    with LLM.scripted(tokenizer, script) as llm:
        runs = measure_throughput(llm, work, (1, 4))
    for figures, rows in runs:
        assert (figures["failed"], figures["output_tokens"], figures["input_tokens"]) == (0, 35, 45)
        assert all(sum(row.token_counts) == 7 for row in rows)
    path = write_report(tmp_path / "out", "throughput", runs)
    assert (
        len(json.loads(path.read_text())[1]["rows"]) == 5 and path.with_suffix(".png").stat().st_size > 1000
    )


def test_workloads_are_seeded_and_pictures_are_pictures(tmp_path: Path) -> None:
    work = Workload(pictures=1, picture_px=(56, 84), prompts=("a", "b"))
    assert work.messages(1) == work.messages(1) != work.messages(3)
    assert work.messages(-1) != work.messages(0)  # the warm-up's
    assert [work.messages(i)[0].text for i in range(3)] == ["a", "b", "a"]
    assert Workload(input_tokens=12).ids(0, 4096) != Workload(input_tokens=12).ids(1, 4096)
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ConfigError, match="no prompt"):
        read_prompts(tmp_path / "empty")
