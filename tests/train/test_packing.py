"""Packs: nothing cut or lost, nothing seen across samples, gradients those of the samples alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from duomo.checkpoints import load_model
from duomo.errors import TrainingError
from duomo.model import Ernie
from duomo.train.forward import run_pack
from duomo.train.losses import summed_token_loss
from duomo.train.packing import Budget, PackOrder, pack, statistics
from duomo.train.samples import Renderer, Sample, Samples

sizes = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 9)), min_size=1, max_size=60)


@given(sizes, st.sampled_from(["best_fit", "naive", "none"]), st.integers(0, 9))
@settings(deadline=None, max_examples=60)
def test_every_sample_once_and_no_pack_too_full(found: list[tuple[int, int]], kind: str, seed: int) -> None:
    tokens, patches = [t for t, _ in found], [p for _, p in found]
    packs = pack(tokens, patches, Budget(40, 20), kind, seed)
    assert sorted(index for one in packs for index in one) == list(range(len(found)))
    for one in packs:
        assert sum(tokens[i] for i in one) <= 40 and sum(patches[i] for i in one) <= 20
    assert packs == pack(tokens, patches, Budget(40, 20), kind, seed)


def test_best_fit_leaves_less_empty_than_the_naive_order() -> None:
    rng = np.random.default_rng(0)
    tokens = np.minimum(2048, rng.lognormal(6, 0.8, 2000).astype(int) + 1).tolist()
    budget, zeros = Budget(2048, 1), [0] * 2000
    shares = {}
    for kind in ("best_fit", "naive"):
        packs = pack(tokens, zeros, budget, kind)
        shares[kind] = statistics(packs, tokens, zeros, tokens, budget).empty_share
    assert shares["best_fit"] < 0.02 and shares["naive"] > 0.1


def test_a_sample_larger_than_a_pack_is_an_error() -> None:
    with pytest.raises(TrainingError, match="fits no pack"):
        pack([5, 50], [0, 0], Budget(40, 1))


def test_the_order_is_a_function_of_the_number() -> None:
    tokens = list(range(1, 30))
    orders = [PackOrder(tokens, [0] * 29, Budget(40, 1), "best_fit", seed=3) for _ in range(2)]
    forward = [orders[0][number] for number in range(40)]
    assert [orders[1][number] for number in reversed(range(40))] == forward[::-1]
    first = orders[0].epoch(0)
    assert forward[: len(first)] == first and forward[len(first) :][: len(first)] != first


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Ernie:
    return load_model(checkpoint)


@pytest.fixture(scope="module")
def samples(checkpoint: Path, model: Ernie, text_rows: Path, picture_rows: Path) -> list[Sample]:
    found = Samples([picture_rows, text_rows], Renderer.of(checkpoint, model.config), 512)
    return [found[index] for index in range(10)]  # six with pictures of two sizes, four without


def gradients(model: Ernie, packs: list[list[Sample]]) -> dict[str, Tensor]:
    model.zero_grad()
    for one in packs:
        output = run_pack(model, [s.prompt for s in one], [s.labels for s in one])
        summed_token_loss(output.logits_LV, output.labels_L).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_packed_gradients_equal_unpacked(model: Ernie, samples: list[Sample]) -> None:
    packed, alone = gradients(model, [samples]), gradients(model, [[sample] for sample in samples])
    assert packed.keys() == alone.keys()
    for name, gradient in packed.items():
        assert (gradient - alone[name]).abs().max() <= 1e-4 * alone[name].abs().max(), name


def test_pixels_of_one_sample_never_touch_anothers_logits(model: Ernie, samples: list[Sample]) -> None:
    """Bit for bit: the picture of sample 0 is replaced, everything after it is looked at."""

    def logits(pixels: int) -> list[Tensor]:
        for medium in samples[0].prompt.media:
            medium.patches[:] = pixels
        with torch.no_grad():
            output = run_pack(model, [s.prompt for s in samples], [s.labels for s in samples])
        return [output.logits_LV[output.sequence_L == index] for index in range(len(samples))]

    before, after = logits(0), logits(255)
    assert not torch.equal(before[0], after[0])
    for one, other in zip(before[1:], after[1:], strict=True):
        assert torch.equal(one, other)


def test_only_answers_have_labels(checkpoint: Path, model: Ernie, tmp_path: Path) -> None:
    file = tmp_path / "turns.jsonl"
    file.write_text(
        '{"src": ["one?", "two?", "three?"], "tgt": ["uno", "dos", "<think>hm</think>tres"], '
        '"label": [0, 1, 1], "system": "Be short."}\n'
    )
    renderer = Renderer.of(checkpoint, model.config)
    sample = Samples([file], renderer, 512)[0]
    tokenizer = renderer.tokenizer
    wanted = [label for label in sample.labels if label >= 0]
    # History is one text with what precedes it, so the blank before an answer may be part of its first piece.
    assert tokenizer.decode(wanted, skip_special=False) == " dos</s>\nhm\n</think>\ntres</s>"
