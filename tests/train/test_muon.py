"""Muon: what it makes of matrices, what it leaves to AdamW, and that processes share its steps."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from duomo.checkpoints import load_model
from duomo.errors import TrainingError
from duomo.train import run
from duomo.train.loop import Run, finetune
from duomo.train.muon import Muon, is_wide, orthogonal, orthogonal_together
from duomo.train.processes import run_in
from duomo.train.recipe import Recipe
from tests.conftest import made_up_pools
from tests.train.batches import batches_here


@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 32, 128), (2, 128, 48)])
def test_singular_values_come_near_one_and_directions_stay(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(shape) * 3.0
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    found = orthogonal(matrices)
    values = torch.linalg.svdvals(found)
    assert float(values.max()) < 1.3
    assert float((values > 0.5).float().mean()) > 0.95  # a square one has values near zero, which stay behind
    exact = left @ right
    assert float(torch.nn.functional.cosine_similarity(found.flatten(), exact.flatten(), dim=0)) > 0.96


def test_a_bank_moves_as_its_matrices_would_alone() -> None:
    torch.manual_seed(1)
    bank = nn.Parameter(torch.randn(4, 32, 64))
    alone = [nn.Parameter(matrix.detach().clone()) for matrix in bank]
    together = Muon([{"params": [bank], "is_matrix": True, "weight_decay": 0.1}], lr=0.01)
    apart = Muon([{"params": alone, "is_matrix": True, "weight_decay": 0.1}], lr=0.01)
    for _ in range(3):
        bank.grad = torch.randn(4, 32, 64)
        for parameter, gradient in zip(alone, bank.grad, strict=True):
            parameter.grad = gradient
        together.step()
        apart.step()
    assert torch.allclose(bank, torch.stack(list(alone)), atol=1e-6)


def test_a_step_is_as_large_as_adamw_takes_it() -> None:
    """0.2 of the rate in the mean square, whatever the shape and the gradient's size."""
    torch.manual_seed(2)
    for shape, size in (((64, 64), 1e-4), ((32, 256), 1e3)):
        matrix = nn.Parameter(torch.zeros(shape))
        matrix.grad = torch.randn(shape) * size
        Muon([{"params": [matrix], "is_matrix": True}], lr=1.0).step()
        assert 0.14 < float(matrix.detach().square().mean().sqrt()) < 0.24


def test_what_is_no_matrix_moves_by_adamw() -> None:
    torch.manual_seed(3)
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 8)) for _ in range(2))
    settings = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8}
    one = Muon([{"params": [ours], "weight_decay": 0.1}], **settings)  # type: ignore[arg-type]
    other = torch.optim.AdamW([theirs], weight_decay=0.1, **settings)  # type: ignore[arg-type]
    for _ in range(5):
        gradient = torch.randn(8)
        ours.grad, theirs.grad = gradient, gradient.clone()
        one.step()
        other.step()
    assert torch.allclose(ours, theirs, atol=1e-6)


def make_orthogonal_here(folder: Path) -> None:
    torch.save(orthogonal_together(stacks()), folder / f"{torch.distributed.get_rank()}.pt")


def stacks() -> list[torch.Tensor]:
    torch.manual_seed(4)
    return [torch.randn(3, 32, 64), torch.randn(1, 48, 32)]


def test_processes_share_the_matrices_of_a_step(tmp_path: Path) -> None:
    """Each has what one alone makes of all of them."""
    assert run_in(2, partial(make_orthogonal_here, tmp_path)) == 0
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for one, stack in zip(found, stacks(), strict=True):
            torch.testing.assert_close(one, orthogonal(stack), rtol=0.0, atol=1e-2)


def test_routers_and_vectors_are_no_matrices() -> None:
    assert is_wide(torch.zeros(8, 64, 192))
    assert not is_wide(torch.zeros(8, 192)) and not is_wide(torch.zeros(192))


def test_a_recipe_takes_it_and_goes_on_to_the_bit(
    checkpoint: Path, text_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def go(name: str) -> dict[str, torch.Tensor]:
        fields = {
            "stage": "sft", "model": str(checkpoint), "data": [str(text_rows)], "steps": 4, "rate": 1e-2,
            "optimizer": "muon", "save_every": 2, "tensorboard": False, "save_dtype": "float32",
            "output": str(tmp_path / name), "max_tokens": 256,
        }  # fmt: skip
        return load_model(finetune(fields, say=lambda line: None).folder).state_dict()

    def save_and_die(self: Run, done: int) -> None:
        save(self, done)
        raise KeyboardInterrupt

    whole, save = go("whole"), Run.save
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Run, "save", save_and_die)
        go("parts")
    parts, begun = go("parts"), load_model(checkpoint).state_dict()
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    assert sum(is_wide(tensor) and not torch.equal(tensor, begun[name]) for name, tensor in whole.items()) > 8


def short_recipe() -> Recipe:
    """The last stage in three steps of two parts."""
    recipe = replace(Recipe(checkpoint_seconds=0.0, bf16=False), clip=1e9)
    stage = replace(recipe.stages[-1], num_steps=3, batch_size=12, warmup_steps=1, num_parts=2)
    return replace(recipe, stages=(stage,))


def train_here(folder: Path) -> None:
    """What every process of a run does; data are made in the process itself."""
    run.load_pools = lambda cache, split: made_up_pools(split)
    run.BatchSource.batches = batches_here  # type: ignore[method-assign]
    run.train(short_recipe(), folder, folder, say=lambda line: None)


def test_two_processes_train_the_embedded_model_as_one_does(
    vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        shutil.copy(vocabulary / "tokenizer.json", tmp_path / name)
    monkeypatch.setattr(run, "load_pools", run.load_pools)  # puts back what `train_here` changes
    monkeypatch.setattr(run.BatchSource, "batches", run.BatchSource.batches)
    train_here(tmp_path / "one")
    assert run_in(2, partial(train_here, tmp_path / "two")) == 0
    file = f"{short_recipe().stages[-1].name}.pt"
    one, two = (torch.load(tmp_path / n / file, weights_only=True) for n in ("one", "two"))
    first = run.build_model(run.Tokenizer.load(vocabulary), Recipe().seed).state_dict()
    for name, tensor in one.items():
        moved = float((tensor - first[name]).norm())
        assert float((tensor - two[name]).norm()) <= 0.02 * moved + 1e-6, name
    with pytest.raises(TrainingError, match="3 processes cannot share the 2 parts"):
        run.BatchSource(short_recipe(), short_recipe().stages[0], tmp_path, tmp_path, run.Team(0, 3))
