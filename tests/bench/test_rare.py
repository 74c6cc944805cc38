"""What a ratio of two ways says, and that experts hear who chose them and nobody else."""

import math

import pytest
import torch

from duomo.bench.rare import TOKENS, WAYS, compare, hear, parameters, pooled, table
from duomo.model import Ernie, init_weights
from duomo.quant.calibration import build_batches
from duomo.quant.layer import DAMPINGS
from tests.quant.test_pipeline import CONFIG, prompts

KEPT = {
    "16": {
        TOKENS: {"a": [0.2, 3.0], "b": [0.4, 5.0]},
        "first": {"a": [0.2, 0.1], "b": [0.2, 0.1]},
        "second": {"a": [0.1, 0.1], "b": [0.4, 0.0]},  # 0: nothing judged
    }
}


def test_ratios_are_of_tensors_and_their_error_of_parameters():
    ratio, error, num = compare(KEPT, "first", "second", 0.0, 1.0)
    assert num == 2 and ratio == pytest.approx(1.0)  # 2 and 1/2
    assert error == pytest.approx(math.log(2) * 2**0.5 / 2**0.5)
    ratio, _, num = compare(KEPT, "first", "second")
    assert num == 3 and ratio == pytest.approx(math.exp((math.log(2) / 2 - math.log(2)) / 2))
    assert math.isnan(compare(KEPT, "first", "second", 4.0)[0])
    assert "| first over second | 1.000 ± 0.693 |" in table(KEPT, [("first", "second")])


def test_without_near_choices_an_expert_hears_those_that_chose_it():
    model = init_weights(Ernie(CONFIG), seed=1).eval()
    batches = build_batches(model, prompts())
    near, chosen = (hear(model, batches, hears_near, splits=False) for hears_near in (True, False))
    for name, (grams, held) in chosen.items():
        heard = [gram.num_tokens for gram in grams.down]
        assert heard == grams.num_tokens == near[name][0].num_tokens and sum(heard) > 0
        assert sum(gram.num_tokens for gram in near[name][0].down) > sum(heard)
        assert held.layer.num_tokens == 0
    for _, home, part, weights in parameters(model):
        grams = chosen[home][0]
        shared, shrunk, own = (WAYS[way][0](grams, part) for way in ("layer", "shrunk", "own"))
        assert len(shared) == len(shrunk) == len(own) == len(weights)
        total = grams.layer.matrix if part == "gate_up" else sum(gram.matrix for gram in grams.down)
        torch.testing.assert_close(shared[0], total)
        assert pooled(grams, part)[1] is not own[1]
    assert len(DAMPINGS) == 3
