"""Positions by Baidu's rule, written out by hand from the specification, section 3.4."""

from collections import namedtuple
from dataclasses import replace

import numpy as np
import pytest
import torch

from duomo.model import VisionRule, build_positions, token_routes
from duomo.model.rope import RotationTable, decoder_rotation
from tests.tiny import TINY, TINY_TEXT

Grid = namedtuple("Grid", "frames rows columns")
Span = namedtuple("Span", "start grid")


def test_text_stands_on_the_diagonal() -> None:
    assert build_positions(3).tolist() == [[0, 1, 2]] * 3


def test_a_picture_of_two_by_three_tokens() -> None:
    # two text tokens, 2x3 picture tokens, one text token at max + 1 = 2 + max(2, 3) = 5
    time, height, width = build_positions(9, [Span(2, Grid(1, 4, 6))]).tolist()
    assert time == [0, 1, 2, 2, 2, 2, 2, 2, 5]
    assert height == [0, 1, 2, 2, 2, 3, 3, 3, 5]
    assert width == [0, 1, 2, 3, 4, 2, 3, 4, 5]


def test_after_a_long_video_the_text_stands_after_its_frames() -> None:
    # 6 frames = 3 pairs of 1x1 token: transformers 5.23 would put the next token at 1 + 1, Baidu at 1 + 3
    time, height, width = build_positions(5, [Span(1, Grid(6, 2, 2))]).tolist()
    assert time == [0, 1, 2, 3, 4]
    assert height == [0, 1, 1, 1, 4]
    assert width == [0, 1, 1, 1, 4]


def test_media_that_touch_and_an_empty_prompt() -> None:
    spans = [Span(0, Grid(1, 2, 2)), Span(1, Grid(1, 2, 2))]
    assert build_positions(3, spans).tolist() == [[0, 1, 2]] * 3
    assert build_positions(0).shape == (3, 0)


@pytest.mark.parametrize(
    ("rule", "vision_ids"),
    [("A", {250, 251, 252, 253, 254, 255}), ("B", set(range(250, 320)))],
)
def test_routes_follow_the_rule(rule: str, vision_ids: set[int]) -> None:
    from dataclasses import replace

    config = replace(TINY, vision_rule=VisionRule(rule))
    ids = np.arange(320)
    assert set(ids[token_routes(ids, config)].tolist()) == vision_ids


def test_a_text_model_routes_nothing_to_vision() -> None:
    assert not token_routes(np.arange(320), TINY_TEXT).any()


@pytest.mark.parametrize("config", [TINY, TINY_TEXT, replace(TINY, head_dim=128, rope_section=(22, 22, 20))])
def test_a_table_of_angles_has_the_bits_of_the_formula(config) -> None:
    table = RotationTable(config)
    draw = np.random.default_rng(0)
    for most, count in ((1023, 7), (1024, 1), (100_000, 513)):
        positions = torch.from_numpy(draw.integers(0, most + 1, (3, count)))
        positions[:, -1] = most
        for own in (positions, positions[:1].expand(3, -1)):  # a picture's, and text on the diagonal
            for found, wanted in zip(table.rotation(own), decoder_rotation(own, config), strict=True):
                assert torch.equal(found, wanted)
