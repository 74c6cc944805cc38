"""A checkpoint folder opened whole: in this process and in its own, with real pictures; caches counted."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from duomo.checkpoints import load_model
from duomo.engine.request import SamplingParams
from duomo.errors import CheckpointError, ConfigError, EngineError
from duomo.llm import LLM, Question
from duomo.processing.messages import Message
from duomo.processing.patches import normalize
from duomo.processing.template import build_prompt
from duomo.processing.tokenizer import Tokenizer
from tests.engine.checkpoint import ask, picture, write_checkpoint

GREEDY = SamplingParams(temperature=0, max_tokens=12, thinking="off", ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def test_a_second_question_does_no_vision_work(folder: Path, tmp_path: Path) -> None:
    with LLM.open(folder, feature_folder=tmp_path) as llm:
        first = llm.chat(ask("what is in the picture?", 1), GREEDY)
        assert first.usage.image_tokens == 6
        llm.chat(ask("hello world", 1), GREEDY)
        assert llm.stats()["media_encoded"] == 1
        llm.reset_caches()
        assert llm.chat(ask("what is in the picture?", 1), GREEDY).text == first.text
        assert llm.stats()["media_encoded"] == 1  # from the folder
    with LLM.open(folder, feature_folder=tmp_path) as llm:
        assert llm.chat(ask("what is in the picture?", 1), GREEDY).text == first.text
        assert llm.stats()["media_encoded"] == 0  # a restart later
        other = llm.chat(ask("what is in the picture?", 2), GREEDY)
        assert llm.stats()["media_encoded"] == 1 and other.token_ids != first.token_ids


def test_a_damaged_feature_file_is_encoded_again(folder: Path, tmp_path: Path) -> None:
    with LLM.open(folder, feature_folder=tmp_path) as llm:
        first = llm.chat(ask("hello", 1), GREEDY)
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:40])
    with LLM.open(folder, feature_folder=tmp_path) as llm:
        assert llm.chat(ask("hello", 1), GREEDY).token_ids == first.token_ids
        assert llm.stats()["media_encoded"] == 1


def test_a_follow_up_takes_its_prefix_from_the_cache(folder: Path) -> None:
    with LLM.open(folder) as llm:
        turns = ask("what is in the picture?", 1)
        first = llm.chat(turns, GREEDY)
        turns += [Message.of("assistant", first.text or "cat"), Message.of("user", "hello")]
        assert llm.chat(turns, GREEDY).usage.cached_tokens > 0


def plain_shares(folder: Path, text: str, options: tuple[str, ...], seed: int) -> dict[str, float]:
    """Every option scored by a plain pass of its own over picture, question and option."""
    model, tokenizer = load_model(folder, torch.float32).eval(), Tokenizer.load(folder)
    prompt = build_prompt([Message.of("user", picture(seed), "", text)], tokenizer, thinking=False)
    patches = torch.from_numpy(normalize(np.concatenate([medium.patches for medium in prompt.media])))
    scores = []
    for option in options:
        answer = tokenizer.encode(option)
        logs = model.logits([*prompt.ids, *answer], prompt.spans, patches).double().log_softmax(-1)
        first = len(prompt.ids) - 1
        scores.append(sum(float(logs[first + i, token]) for i, token in enumerate(answer)))
    shares = torch.tensor(scores, dtype=torch.float64).softmax(-1).tolist()
    return dict(zip(options, shares, strict=True))


def test_questions_share_a_prefill_and_agree_with_scoring(folder: Path) -> None:
    with LLM.open(folder, dtype="float32", kv_dtype="float32") as llm:
        questions = [Question("cat?", ("Yes", "No", "hello world")), Question("how many?", ("1", "2", "10"))]
        decisions = llm.decide(ask("", 3), questions)
        stats = llm.stats()
        assert stats["media_encoded"] == 1 and stats["cached_tokens"] > 0
        assert decisions[1].score is not None and 1 <= decisions[1].score <= 10
        for question, decision in zip(questions, decisions, strict=True):
            expected = plain_shares(folder, question.text, question.options, 3)
            assert decision.probabilities == pytest.approx(expected, abs=1e-4)
            assert decision.answer == max(expected, key=lambda option: expected[option])


def test_a_process_of_its_own_gives_the_same_answers_and_its_death_is_seen(folder: Path) -> None:
    with LLM.open(folder) as llm:
        expected = llm.chat(ask("what is in the picture?", 1), GREEDY)
    llm = LLM.open(folder, own_process=True)
    try:
        assert llm.chat(ask("what is in the picture?", 1), GREEDY) == expected
        assert llm.stats()["media_encoded"] == 1
        long = SamplingParams(temperature=0, max_tokens=3000, thinking="off", ignore_eos=True)
        streams = [llm.stream(ask("hello", 1), long) for _ in range(4)]
        for stream in streams:
            next(stream)
        os.kill(llm.engine.child.pid, signal.SIGKILL)  # type: ignore[union-attr]
        begun = time.monotonic()
        for stream in streams:  # every caller
            with pytest.raises(EngineError, match="ended with code -9"):
                list(stream)
        assert time.monotonic() - begun < 2 and not llm.is_alive
        with pytest.raises(EngineError, match="stopped"):
            llm.chat(ask("hello", 1), GREEDY)
    finally:
        llm.close()


def test_what_cannot_be_opened_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no folder"):
        LLM.open(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="page_size"):
        LLM.open(folder, page_size=17)
    with pytest.raises(ConfigError, match="kv_dtype"):
        LLM.open(folder, kv_dtype="fp4")
    with pytest.raises(EngineError, match="page_size"):
        LLM.open(folder, page_size=17, own_process=True)


def test_what_is_asked_goes_before_generation_config_and_that_before_our_own(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    ours = SamplingParams()
    with LLM.open(folder) as llm:
        assert llm.defaults == ours
    stated = {"temperature": 1.5, "top_k": 3, "max_length": 20, "top_p": 0.5}
    (folder / "generation_config.json").write_text(json.dumps(stated))
    with LLM.open(folder) as llm:
        found = llm.defaults
        assert (found.temperature, found.top_k, found.top_p) == (1.5, 3, 0.5)
        assert found.repetition_penalty == ours.repetition_penalty
        assert llm.generate("cat", replace(found, temperature=0.0, max_tokens=3)).usage.completion_tokens
    (folder / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.9}')
    with LLM.open(folder) as llm:
        assert llm.defaults.temperature == 0.0
    for bad in ("[]", "{", '{"temperature": "hot"}', '{"top_p": 7}'):
        (folder / "generation_config.json").write_text(bad)
        with pytest.raises(CheckpointError, match="generation_config"):
            LLM.open(folder)
