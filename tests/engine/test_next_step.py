"""A step that is one native call gives the logits, bit for bit, of the same step by batch and model."""

from __future__ import annotations

import numpy as np
import pytest

from duomo.engine.engine import Engine
from duomo.engine.next_step import NextStep
from duomo.engine.request import Request, SamplingParams
from duomo.engine.runner import Floats, ModelRunner
from duomo.engine.scheduler import Step
from duomo.errors import KernelError
from duomo.kernels import DenseForm
from tests.engine.worlds import GREEDY, answers, engine, picture_request, text_request
from tests.tiny import IDS

PANELS = [DenseForm.PANELS, DenseForm.ROUNDED]


def watched(own: Engine, requests: list[Request]) -> tuple[list[Floats], int]:
    """Logits of every step with one token each, and how many of them were one call."""
    runner, seen, num_single = own.runner, list[Floats](), 0
    assert isinstance(runner, ModelRunner)
    execute = runner.execute

    def spied(step: Step, starts: list[int]) -> list[Floats | None]:
        nonlocal num_single
        rows = list(execute(step, starts))
        num_single += bool(step.likeliest)
        if all(work.count == 1 for work in step.works):
            seen.extend(np.array(row) for row in rows if row is not None)
            for row, best in zip(rows, step.likeliest, strict=False):
                assert row is not None and int(row[0].argmax()) == best
        return rows

    runner.execute = spied  # type: ignore[method-assign, assignment]
    answers(own, requests)
    return seen, num_single


@pytest.mark.parametrize("form", PANELS, ids=lambda form: form.name.lower())
@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int8"])
def test_bits_are_those_of_the_general_way(form: DenseForm, kv_dtype: str) -> None:
    """More sequences and pages than there is room at first; pictures; a preemption, as pages are few."""
    requests = [
        *(text_request(f"t{i}", i, 5 + 9 * i) for i in range(10)),
        *(picture_request(f"p{i}", i) for i in range(2)),
        text_request("long", 77, 540),
    ]
    options = {"form": form, "kv_dtype": kv_dtype, "num_pages": 155, "max_step_tokens": 700}
    fast, slow = engine(**options), engine(**options)  # type: ignore[arg-type]
    slow.runner._next = None  # type: ignore[attr-defined]
    got, num_single = watched(fast, requests)
    expected, none = watched(slow, requests)
    assert num_single > 24 and none == 0 and len(got) == len(expected) > 200
    assert fast.scheduler.num_preemptions == slow.scheduler.num_preemptions > 0
    for own, other in zip(got, expected, strict=True):
        assert np.array_equal(own, other)


def test_what_needs_more_than_a_token_of_text_goes_the_general_way() -> None:
    def singles(request: Request, **options: int) -> int:
        return watched(engine(form=DenseForm.ROUNDED, **options), [request])[1]

    plain = text_request("r", 3, 9)
    assert singles(plain) == GREEDY.max_tokens - 1  # type: ignore[operator]  # the first is the prompt's
    assert singles(plain, num_drafts=4) < GREEDY.max_tokens - 1  # type: ignore[operator]
    traced = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, thinking="off", return_experts=True)
    assert singles(text_request("r", 3, 9, params=traced)) == 0
    seeing = SamplingParams(
        temperature=0, max_tokens=6, ignore_eos=True, thinking="off", logit_bias={IDS.image_patch: 1e4}
    )
    assert singles(text_request("r", 3, 9, params=seeing)) == 0, "a vision token has another bank"
    borrowed = engine()
    assert borrowed.runner._next is None  # type: ignore[attr-defined]


def test_numbers_outside_are_refused_before_anything_is_read() -> None:
    own = engine(form=DenseForm.PANELS)
    answers(own, [text_request("r", 3, 9)])
    step = own.runner._next  # type: ignore[attr-defined]
    assert isinstance(step, NextStep)
    tokens, angles = step._tokens, step._decoder._angles.addresses(40)
    fused = step._decoder._fused
    good = (5, 3, 4)
    tokens.numbers[:, 0] = good
    fused.next(1, tokens, angles)
    for place, wrong in ((0, -1), (0, 10**6), (1, -1), (1, angles[2]), (2, 0), (2, 64 * 8 + 1)):
        tokens.numbers[:, 0] = good
        tokens.numbers[place, 0] = wrong
        with pytest.raises(KernelError, match="outside"):
            fused.next(1, tokens, angles)
    tokens.numbers[:, 0] = good
    tokens.pages[0, 0] = 65
    with pytest.raises(KernelError, match="outside"):
        fused.next(1, tokens, angles)
