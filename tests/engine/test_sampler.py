"""What may be drawn and how likely: against transformers' warpers, and penalties against their formulas."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from duomo.engine.request import SamplingParams
from duomo.engine.sampler import Sampler, candidates

PLAIN = {"temperature": 1.0, "top_p": 1.0}


def row(seed: int, size: int = 1000, spread: float = 3.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, spread, size).astype(np.float32)


def adjusted(logits: np.ndarray, said: list[int], prompt: list[int] = [], **fields: Any) -> np.ndarray:  # noqa: B006
    sampler = Sampler(SamplingParams(**(PLAIN | fields)), prompt, 0, ())
    for token in said:
        sampler.accept(token)
    return sampler._adjust(logits.astype(np.float64), [])


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    size=st.sampled_from([7, 300, 5000]),
    spread=st.sampled_from([0.1, 1.0, 4.0]),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 5, 400]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.5]),
)
def test_the_candidates_are_those_of_transformers(
    seed, size, spread, temperature, top_k, top_p, min_p
) -> None:
    logits = row(seed, size, spread)
    warpers = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(min(top_k, size))] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    scores = LogitsProcessorList(warpers)(None, torch.from_numpy(logits).double()[None])[0]
    expected = scores.softmax(-1).numpy()
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    order, weights = candidates(logits.astype(np.float64) / temperature, params)
    assert set(order) == set(np.flatnonzero(expected))
    assert np.allclose(weights / weights.sum(), expected[order], rtol=1e-9)


def test_equal_scores_are_cut_by_the_lower_id() -> None:
    order, _ = candidates(np.zeros(2000), SamplingParams(temperature=1.0, top_k=3, top_p=1.0))
    assert list(order) == [0, 1, 2]


def test_draws_are_as_likely_as_they_should_be() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    params = SamplingParams(temperature=1.0, top_p=0.9, seed=1)
    drawn: Counter[int] = Counter()
    for seed in range(4000):
        drawn[Sampler(params, (), seed, ()).draw(logits, (), None)] += 1
    expected = np.array([0.5, 0.3, 0.15]) / 0.95 * 4000
    assert set(drawn) == {0, 1, 2}  # the last lies outside top-p
    assert sum((drawn[i] - expected[i]) ** 2 / expected[i] for i in range(3)) < 13.8  # chi-square, p = 0.001


def test_repetition_counts_the_prompt_too_as_transformers_does() -> None:
    logits, prompt, said = row(3), [5, 6, 7], [9, 5]
    ids = torch.tensor([prompt + said])
    expected = RepetitionPenaltyLogitsProcessor(1.3)(ids, torch.from_numpy(logits)[None])[0].numpy()
    assert np.allclose(adjusted(logits, said, prompt, repetition_penalty=1.3), expected, rtol=1e-6)


def test_presence_and_frequency_are_openais_formula_over_the_answer_alone() -> None:
    logits = row(4)
    found = adjusted(logits, [8, 8, 8, 2], [1, 2, 3], presence_penalty=0.5, frequency_penalty=0.25)
    change = logits - found
    assert change[8] == pytest.approx(0.5 + 3 * 0.25) and change[2] == pytest.approx(0.5 + 0.25)
    assert np.count_nonzero(np.abs(change) > 1e-9) == 2


def test_a_bias_adds_to_the_score_and_can_forbid_and_force() -> None:
    logits = row(5)
    assert adjusted(logits, [], logit_bias={11: -2.5})[11] == pytest.approx(float(logits[11]) - 2.5)
    best = int(logits.argmax())
    for bias, chosen in (({best: -100.0}, int(np.argsort(-logits)[1])), ({17: 100.0}, 17)):
        sampler = Sampler(SamplingParams(temperature=0.0, logit_bias=bias), (), 0, ())
        assert sampler.draw(logits, (), None) == chosen
