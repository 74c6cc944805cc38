"""The experts a request may ask for: those of a plain pass over the whole text, however it is run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from duomo.engine.engine import run_all
from duomo.engine.request import ExpertTrace, Request, join_traces
from duomo.model import build_batch
from duomo.model.attention import PackedCausal
from duomo.processing.patches import normalize
from duomo.processing.prompt import Grid, MediaSpan
from tests.engine.worlds import GREEDY, MODEL, engine, picture_request, text_request, tokens

ASKING = replace(GREEDY, return_experts=True)


def requests() -> list[Request]:
    return [
        picture_request("picture", 1, 4, 6, params=ASKING),
        text_request("text", 2, 41, params=ASKING),
        text_request("not asking", 3, 30),
    ]


def plain_trace(request: Request, answer: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """[T, layers, K] and [T]: one pass over prompt and answer, the last token left out as it is never fed."""
    ids = [*request.ids, *answer[:-1]]
    spans = [MediaSpan(m.start, Grid(*m.grid)) for m in request.media]
    chosen = torch.full((MODEL.config.num_layers, len(ids), MODEL.config.num_chosen), 255)
    with torch.inference_mode():
        features = None
        if request.media:
            patches = np.frombuffer(request.media[0].patches, np.uint8).reshape(-1, 588)
            features = MODEL.encode(torch.from_numpy(normalize(patches)), [spans[0].grid])
        batch = build_batch([ids], MODEL.config, [spans], features)
        MODEL(replace(batch, expert_ids_LTK=chosen), PackedCausal())
    is_vision = np.zeros(len(ids), np.uint8)
    is_vision[batch.vision_rows.numpy()] = 1
    return chosen.transpose(0, 1).numpy().astype(np.uint8), is_vision


@pytest.mark.parametrize(
    "options",
    [{}, {"max_step_tokens": 7}, {"num_drafts": 4}, {"num_pages": 14}],
    ids=["whole", "chunked", "speculating", "preempted"],
)
def test_the_trace_is_that_of_a_plain_pass(options: dict[str, int]) -> None:
    own = engine(**options)
    for name, outputs in run_all(own, requests()).items():
        trace = join_traces([output.experts for output in outputs if output.experts is not None])
        if name == "not asking":
            assert trace is None
            continue
        request = next(r for r in requests() if r.request_id == name)
        expected, is_vision = plain_trace(request, tokens(outputs))
        assert trace is not None and trace.start == 0
        shape = (-1, trace.num_layers, trace.num_chosen)
        assert np.array_equal(np.frombuffer(trace.expert_ids, np.uint8).reshape(shape), expected)
        assert np.array_equal(np.frombuffer(trace.is_vision, np.uint8), is_vision)
        assert (expected[:, 0] == 255).all() and (expected[:, 1:] < 8).all()  # layer 0 is dense
        assert is_vision.sum() == (8 if request.media else 0)  # six of the picture, and its two marks
    if "num_pages" in options:
        assert own.scheduler.num_preemptions > 0


def test_a_cached_prefix_is_not_traced() -> None:
    own = engine()
    first = text_request("a", 5, 40, params=ASKING)
    run_all(own, [first])
    (outputs,) = run_all(own, [replace(first, request_id="b")]).values()
    trace = next(output.experts for output in outputs if output.experts is not None)
    assert trace.start == outputs[-1].num_cached > 0


def test_rows_computed_twice_count_once() -> None:
    def piece(start: int, *ids: int) -> ExpertTrace:
        return ExpertTrace(start, 1, 1, bytes(ids), bytes(len(ids)))

    joined = join_traces([piece(3, 1, 2), piece(5, 3), piece(4, 2, 3, 4)])
    assert joined == piece(3, 1, 2, 3, 4)
