"""Greedy and seeded answers are the same bits whatever the engine does: batch, chunk, cache, preemption.

Over fp32 weights where they lie, and over bf16 panels with rounded activations, the embedded model's way.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from duomo.engine.request import Request, SamplingParams
from duomo.kernels import DenseForm
from duomo.model import build_batch
from duomo.model.attention import PackedCausal
from tests.engine.worlds import GREEDY, MODEL, answers, engine, picture_request, text_request


def mixed(count: int = 16, params: SamplingParams = GREEDY) -> list[Request]:
    return [
        picture_request(f"r{i}", i, 4, 4 + 2 * (i % 4), params=params)
        if i % 3 == 0
        else text_request(f"r{i}", i, 5 + 7 * i, params=params)
        for i in range(count)
    ]


def alone(requests: list[Request], **options: object) -> dict[str, list[int]]:
    return {r.request_id: answers(engine(**options), [r])[r.request_id] for r in requests}


@pytest.fixture(
    scope="module", params=[DenseForm.BORROWED, DenseForm.ROUNDED], ids=lambda form: form.name.lower()
)
def form(request: pytest.FixtureRequest) -> DenseForm:
    return DenseForm(request.param)


@pytest.fixture(scope="module")
def expected(form: DenseForm) -> dict[str, list[int]]:
    return alone(mixed(), form=form, has_prefix_cache=False)


def test_the_engine_agrees_with_the_plain_model() -> None:
    request = text_request("r1", 1, 12)
    ids = list(request.ids)
    with torch.inference_mode():
        for _ in range(8):
            hidden = MODEL(build_batch([ids], MODEL.config), PackedCausal())
            ids.append(int(MODEL.unembed(hidden)[-1].argmax()))
    assert answers(engine(), [request])["r1"][:8] == ids[12:]


def test_rounded_products_are_in_use() -> None:
    own = engine(form=DenseForm.ROUNDED)
    decoder = own.runner.model.decoder  # type: ignore[attr-defined]
    assert decoder.form is DenseForm.ROUNDED and own.runner.model.embed.panels is not None  # type: ignore[attr-defined]
    answers(own, [text_request("r1", 1, 12)])
    assert decoder._fused is not None


def test_batch_of_sixteen_equals_one_by_one(expected: dict[str, list[int]], form: DenseForm) -> None:
    assert answers(engine(form=form, num_pages=512), mixed()) == expected


@pytest.mark.parametrize("chunk", [1, 5, 16, 37])
def test_chunked_prefill_changes_nothing(expected: dict[str, list[int]], form: DenseForm, chunk: int) -> None:
    assert answers(engine(form=form, num_pages=512, max_step_tokens=chunk), mixed()) == expected


def test_cached_equals_uncached(expected: dict[str, list[int]], form: DenseForm) -> None:
    own = engine(form=form, num_pages=512)
    answers(own, mixed())
    again = [replace(r, request_id=r.request_id + "x") for r in mixed()]
    assert answers(own, again) == {name + "x": ids for name, ids in expected.items()}
    assert own.counters.cached_tokens > 0


def test_preempted_equals_undisturbed(expected: dict[str, list[int]], form: DenseForm) -> None:
    own = engine(form=form, num_pages=22)
    assert answers(own, mixed()) == expected
    assert own.scheduler.num_preemptions > 0


def test_speculation_changes_nothing(expected: dict[str, list[int]], form: DenseForm) -> None:
    own = engine(form=form, num_pages=512, num_drafts=4)
    assert answers(own, mixed()) == expected
    assert own.counters.accepted_drafts > 0


@pytest.mark.parametrize("kv_dtype", ["int8", "bfloat16"])
def test_a_small_kv_is_as_exact_with_itself(kv_dtype: str) -> None:
    requests = mixed(6)
    expected = alone(requests, kv_dtype=kv_dtype)
    assert answers(engine(kv_dtype=kv_dtype, num_pages=24, max_step_tokens=9), requests) == expected


def test_a_seed_gives_the_same_sample_whatever_runs_beside_it(form: DenseForm) -> None:
    params = replace(GREEDY, temperature=1.0, top_p=0.95, seed=7)
    expected = alone(mixed(8, params), form=form)
    own = engine(form=form, num_pages=22, max_step_tokens=21, num_drafts=3)
    assert answers(own, mixed(8, params)) == expected
    assert len({tuple(ids) for ids in expected.values()}) == 8


def test_same_text_and_another_picture_share_nothing() -> None:
    own = engine()
    first = picture_request("a", 0, picture=1)
    second = picture_request("b", 0, picture=2)
    answers(own, [first])
    answers(own, [second])
    assert own.counters.cached_tokens == 0
    assert answers(own, [replace(first, request_id="c", salt="other")]) == {
        "c": answers(engine(), [first])["a"]
    }
    assert own.counters.cached_tokens == 0


def test_a_preempted_picture_is_swapped_and_not_seen_again() -> None:
    requests = [picture_request(f"p{i}", i, 4, 8, params=GREEDY) for i in range(6)]
    expected = alone(requests)
    own = engine(num_pages=12, has_prefix_cache=False)
    copied: list[int] = []
    copy_out = own.runner.cache.copy_out  # type: ignore[attr-defined]
    own.runner.cache.copy_out = lambda pages: copied.append(len(pages)) or copy_out(pages)  # type: ignore[attr-defined]
    assert answers(own, requests) == expected
    assert own.scheduler.num_preemptions > 0 and copied
    assert own.runner.counters()["media_encoded"] == len(requests)
