"""A run that was stopped and resumed ends with the same bits as one that was not."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from duomo import kernels
from duomo.errors import TrainingError
from duomo.tasks.pools import Pools
from duomo.train import joint_stage, run
from duomo.train.recipe import Recipe, config_of
from duomo.train.render import Renderer
from tests.train.batches import batches_here


class Stop(Exception):
    """Stands for a kill: raised in the middle of a stage, after a checkpoint."""


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, pools: Pools) -> Recipe:
    """All stages in two steps, checkpoints after every step, data made in this process."""
    monkeypatch.setattr(run, "load_pools", lambda cache, split: pools)

    monkeypatch.setattr(run.BatchSource, "batches", batches_here)
    recipe = Recipe(checkpoint_seconds=0.0)
    return recipe.shortened(num_steps=2, batch_size=6)


@pytest.mark.parametrize("killed_at", [1, 3, 9, 15])
def test_resumed_equals_uninterrupted(
    short: Recipe, vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    folders = [tmp_path / "whole", tmp_path / "resumed"]
    for folder in folders:
        folder.mkdir()
        shutil.copy(vocabulary / "tokenizer.json", folder)
    whole = run.train(short, folders[0], tmp_path, say=lambda line: None)
    saves = 0
    save = run.RunState.save_if_due

    def save_and_stop(self: run.RunState, *rest: object) -> None:
        nonlocal saves
        save(self, *rest)  # type: ignore[arg-type]
        saves += 1
        if saves == killed_at:
            raise Stop

    monkeypatch.setattr(run.RunState, "save_if_due", save_and_stop)
    with pytest.raises(Stop):
        run.train(short, folders[1], tmp_path, say=lambda line: None)
    monkeypatch.setattr(run.RunState, "save_if_due", save)
    resumed = run.train(short, folders[1], tmp_path, say=lambda line: None)
    other = resumed.state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in whole.state_dict().items())


def test_a_batch_is_a_function_of_its_step(short: Recipe, vocabulary: Path, tmp_path: Path) -> None:
    stage = short.stages[0]
    one, two, three = (run.make_batch(short, stage, str(vocabulary), str(tmp_path), s) for s in (1, 1, 2))
    assert np.array_equal(one.patches_PX, two.patches_PX)
    assert not np.array_equal(one.patches_PX, three.patches_PX)


def test_a_run_may_begin_with_finished_weights_at_a_later_stage(
    short: Recipe, tokenizer, vocabulary: Path, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    shutil.copy(vocabulary / "tokenizer.json", tmp_path)
    weights = run.build_model(tokenizer, 9).state_dict()
    lines: list[str] = []
    still = replace(short, stages=tuple(replace(s, rate=0.0) for s in short.stages), bias_update=0.0)
    model = run.train(still, tmp_path, tmp_path, lines.append, ("eyes", weights))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert not (tmp_path / "joint.pt").exists() and (tmp_path / "families.pt").exists()
    with pytest.raises(TrainingError, match="no stage 'nose'; it has vision"):
        run.train(still, vocabulary, tmp_path, lines.append, ("nose", weights))


def test_bf16_products_stay_near_those_of_fp32(tokenizer, pools: Pools) -> None:  # type: ignore[no-untyped-def]
    """Loss and gradients of one batch of all families; the routers' are exactly of fp32's type."""
    stage, renderer = replace(Recipe().stages[-1], batch_size=12), Renderer(tokenizer)
    batch = joint_stage.example_batch(np.random.default_rng(1), pools, renderer, stage, 12)
    gradients, found = [], []
    for context in (nullcontext(), kernels.rounded_products()):
        model = run.build_model(tokenizer, 2)
        with context:
            loss, _ = joint_stage.answer_loss(model, batch)
            loss.backward()
        found.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert found[1] == pytest.approx(found[0], rel=5e-3)
    assert found[1] != found[0]
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.99


def test_mini_has_the_sizes_of_its_description(tokenizer) -> None:  # type: ignore[no-untyped-def]
    config = config_of("mini", tokenizer)
    assert (config.hidden_size, config.num_layers, config.num_chosen) == (256, 8, 4)
    with pytest.raises(TrainingError, match="sizes are tiny and mini"):
        config_of("huge", tokenizer)


def test_the_loss_falls_on_one_batch(short: Recipe, tokenizer, vocabulary: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model = run.build_model(tokenizer, 1)
    head = run.vision_stage.CellHead(model.config.hidden_size)
    optimizer = run.build_optimizer(model, head, short.stages[0], short)
    batch = run.make_batch(short, short.stages[0], str(vocabulary), str(tmp_path), 0)
    losses = []
    for _ in range(12):
        loss, _ = run.vision_stage.cell_loss(model, head, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
