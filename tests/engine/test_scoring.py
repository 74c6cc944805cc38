"""Log-probabilities of prompts and answers, against one plain pass over the whole text.

The plain pass agrees with transformers to 1e-5 (`tests/model/test_oracle.py`), so this is the engine's own
share: which row belongs to which token, through chunks, pictures, neighbours, preemption, known prefixes.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from duomo.engine.engine import Engine, run_all
from duomo.engine.request import Output, Request, SamplingParams, TokenLogprob
from duomo.model import build_batch
from duomo.model.attention import PackedCausal
from duomo.processing.patches import normalize
from duomo.processing.prompt import Grid, MediaSpan
from tests.engine.worlds import MODEL, engine, picture_request, text_request

SCORED = SamplingParams(
    temperature=0, max_tokens=6, ignore_eos=True, thinking="off", logprobs=2, prompt_logprobs=3
)
REQUESTS = [
    text_request("text", 1, 41, params=SCORED),
    picture_request("picture", 2, 4, 8, params=SCORED),
    text_request("one", 3, 1, params=SCORED),
    text_request("again", 1, 41, params=SCORED),  # the first one's text: its prefix is known
]


@torch.inference_mode()
def plain_logs(request: Request, ids: list[int]) -> torch.Tensor:
    """log softmax [T, V] of one pass over prompt and answer."""
    spans = [MediaSpan(medium.start, Grid(*medium.grid)) for medium in request.media]
    features = None
    if request.media:
        patches = [np.frombuffer(m.patches, np.uint8).reshape(-1, 588) for m in request.media]
        features = MODEL.encode(torch.from_numpy(normalize(np.concatenate(patches))), [s.grid for s in spans])
    batch = build_batch([ids], MODEL.config, [spans], features)
    return MODEL.unembed(MODEL(batch, PackedCausal())).double().log_softmax(-1)


def agrees(found: TokenLogprob, token: int, logs: torch.Tensor, num_top: int) -> None:
    assert found.token_id == token and found.logprob == pytest.approx(float(logs[token]), abs=1e-4)
    values, ids = logs.topk(num_top)
    assert [token for token, _ in found.top] == ids.tolist()
    assert [value for _, value in found.top] == pytest.approx(values.tolist(), abs=1e-4)


def check(outputs: dict[str, list[Output]]) -> None:
    for request in REQUESTS:
        pieces = outputs[request.request_id]
        answer = [token for output in pieces for token in output.token_ids]
        ids, num_prompt = [*request.ids, *answer], len(request.ids)
        logs = plain_logs(request, ids)
        prompt = [entry for output in pieces for entry in output.prompt_logprobs]
        assert len(prompt) == num_prompt and prompt[0] is None
        for place, entry in enumerate(prompt[1:], start=1):
            assert entry is not None
            agrees(entry, ids[place], logs[place - 1], 3)
        said = [entry for output in pieces for entry in output.logprobs]
        assert len(said) == len(answer) == 6
        for place, entry in enumerate(said, start=num_prompt):
            agrees(entry, ids[place], logs[place - 1], 2)


def asked(own: Engine, requests: list[Request] = REQUESTS) -> dict[str, list[Output]]:
    return run_all(own, requests)


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_every_token_has_the_log_probability_of_the_plain_model(chunk: int) -> None:
    check(asked(engine(max_step_tokens=chunk)))


def test_also_where_requests_give_way_and_where_drafts_are_checked() -> None:
    tight = engine(num_pages=9, max_step_tokens=16)
    check(asked(tight))
    assert tight.scheduler.num_preemptions > 0
    check(asked(engine(num_drafts=3)))


def test_also_where_the_prefix_is_known_already() -> None:
    own = engine()
    asked(own, [replace(request, request_id="before-" + request.request_id) for request in REQUESTS])
    check(asked(own))
