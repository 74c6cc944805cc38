"""A run that was stopped and resumed ends with the same bits as one that was not."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from duomo.tasks import Handwriting
from duomo.train import run
from duomo.train.recipe import Recipe


class Stop(Exception):
    """Stands for a kill: raised in the middle of a stage, after a checkpoint."""


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, pool: Handwriting) -> Recipe:
    """Two stages of four steps, checkpoints after every step, data made in this process."""
    monkeypatch.setattr(run, "load_pool", lambda cache, split: pool)

    def batches(self: run.BatchSource, first_step: int):  # type: ignore[no-untyped-def]
        for step in range(first_step, self.stage.num_steps):
            yield (
                step,
                run.make_batch(self.recipe, self.stage, str(self.folder), str(self.cache_folder), step),
            )

    monkeypatch.setattr(run.BatchSource, "batches", batches)
    recipe = Recipe(checkpoint_seconds=0.0)
    return recipe.shortened(num_steps=4, batch_size=10)


@pytest.mark.parametrize("killed_at", [2, 6])
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
