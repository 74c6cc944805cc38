"""The picture benchmark on the embedded model: parts add up, a second question does no vision work."""

import pytest
import torch

from duomo.bench.picture import QUESTION, Stages, measure, photograph
from duomo.bench.towers import compare, transformers_tower
from duomo.llm import LLM
from duomo.processing.images import load_image
from duomo.processing.prompt import Grid


@pytest.fixture(scope="module")
def stages():
    with LLM.open() as llm:
        yield Stages(llm)


def test_a_photograph_has_the_tokens_asked_for():
    assert load_image(photograph(64, seed=1)).grid == Grid(1, 16, 16)


def test_parts_add_up_and_second_questions_see_nothing_anew(stages):
    runs = measure(stages, 16)
    for name, run in runs.items():
        is_first = name == "the picture"
        assert run["tower calls"] == run["pictures encoded"] == (1 if is_first else 0)
        assert sum(run["seconds"].values()) == pytest.approx(run["total_s"], abs=1e-6)
        assert min(run["seconds"].values()) >= 0
        assert ("vision tower" in run["seconds"]) == is_first
    assert runs["another question about it"]["cached_tokens"] >= 16
    assert runs["other words before it"]["cached_tokens"] == 0
    whole = runs["text as long as the whole"]["prompt_tokens"]
    assert 0 <= runs["other words before it"]["prompt_tokens"] - whole < 8


def test_an_unseen_picture_is_encoded(stages):
    assert stages.first_token(photograph(16, seed=99), QUESTION)["tower calls"] == 1


def test_the_two_towers_compute_the_same(stages):
    pytest.importorskip("transformers.models.ernie4_5_vl_moe")
    tower = stages.model.vision_tower
    result = compare(tower, Grid(1, 8, 8), rounds=1)
    assert result["relative difference"] < 0.05  # theirs is in bf16
    with torch.inference_mode():
        theirs = transformers_tower(tower).float()(torch.zeros(16, 588), torch.tensor([[1, 4, 4]]))
        ours = tower(torch.zeros(16, 588), [Grid(1, 4, 4)])
    torch.testing.assert_close(ours, theirs.last_hidden_state, rtol=2e-2, atol=2e-2)
