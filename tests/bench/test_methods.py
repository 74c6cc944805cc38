"""The methods of the study are what they say: a scalar GPTQ that is one, an order that theory predicts."""

import torch

from duomo.bench.methods import LLOYD_MAX, ablations, scalar, trellis
from duomo.quant.feedback import output_error
from duomo.quant.hessian import rotate
from duomo.trellis import LCC2_10


def problem(rows=64, columns=64):
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    inputs = torch.randn(500, columns, generator=generator) @ mix
    return torch.randn(2, rows, columns, generator=generator), (inputs.T @ inputs / 500).expand(2, -1, -1)


def error(weights, decoded, hessians):
    pairs = zip(weights, decoded, hessians, strict=True)
    return sum(output_error(weight, own, hessian) for weight, own, hessian in pairs)


def test_scalar_weights_take_four_levels_a_row_in_the_rotated_basis():
    weight, hessian = problem()
    turned = rotate(scalar(0.1)(weight, hessian), 5)
    for row in turned.flatten(0, 1):
        scale = row.abs().max() / LLOYD_MAX[-1]
        distance = ((row / scale)[:, None] - torch.tensor(LLOYD_MAX)).abs().min(1).values
        assert distance.max() < 1e-3


def test_feedback_and_the_trellis_each_help():
    weight, hessian = problem()
    errors = {
        "scalar": error(weight, scalar(0.1, has_feedback=False)(weight, hessian), hessian),
        "scalar, feedback": error(weight, scalar(0.1)(weight, hessian), hessian),
        "trellis": error(weight, trellis(LCC2_10, 0.1, has_feedback=False)(weight, hessian), hessian),
        "trellis, feedback": error(weight, trellis(LCC2_10, 0.1)(weight, hessian), hessian),
    }
    assert errors["trellis, feedback"] < errors["trellis"] < errors["scalar"]
    assert errors["trellis, feedback"] < errors["scalar, feedback"] < errors["scalar"]


def test_an_ablation_leaves_out_one_thing_each():
    assert {"LCC2 L=12", "L=12, no feedback", "L=12, no rotation"} < set(ablations(0.1))
