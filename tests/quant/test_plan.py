"""The bit plan: what gets how many bits, and what the 28B weighs by it."""

import pytest
import torch

from duomo.errors import ConfigError
from duomo.model import Ernie, preset
from duomo.quant.judge import compare_logits, summarize
from duomo.quant.plan import Kind, build_plan, raise_banks
from duomo.quant.report import part_of, size_by_part
from duomo.trellis import encode_int, encode_matrix

VL = preset("vl-28b-a3b")


def shapes(config=VL):
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in Ernie(config).named_parameters()}


@pytest.mark.parametrize(
    "name, kind",
    [
        ("decoder.layers.3.mlp.text.gate_up", Kind.TWO),
        ("decoder.layers.1.mlp.vision.down", Kind.TWO),
        ("decoder.layers.3.mlp.text.router.weight", Kind.PLAIN),
        ("decoder.layers.3.mlp.text.router.bias", Kind.PLAIN),
        ("decoder.layers.3.mlp.shared.up.weight", Kind.FOUR),
        ("decoder.layers.0.mlp.down.weight", Kind.FOUR),
        ("decoder.layers.3.attention.q.weight", Kind.FOUR),
        ("decoder.layers.3.post_norm.weight", Kind.PLAIN),
        ("embed.weight", Kind.INT8),
        ("vision_tower.blocks.7.attention.qkv.weight", Kind.INT8),
        ("vision_tower.blocks.7.attention.qkv.bias", Kind.PLAIN),
        ("vision_tower.blocks.7.norm1.weight", Kind.PLAIN),
        ("resampler.project.weight", Kind.INT8),
    ],
)
def test_kinds(name, kind):
    assert name in shapes()
    assert build_plan("2", VL).kind(name) is kind


def test_presets_raise_banks():
    assert build_plan("2", VL).raised == frozenset()
    assert build_plan("2.3", VL).raised == {"1.text", "1.vision", "27.text"}
    assert build_plan("4", VL).kind("decoder.layers.9.mlp.text.down") is Kind.FOUR


def test_shapes_that_do_not_fit_take_eight_bits():
    plan = build_plan("2", VL)
    assert plan.kind_for("decoder.layers.3.mlp.text.down", (8, 64, 48)) is Kind.TWO
    assert plan.kind_for("decoder.layers.3.mlp.text.down", (8, 64, 40)) is Kind.INT8
    assert plan.kind_for("decoder.layers.3.mlp.text.down", (8, 96, 48)) is Kind.INT8


def test_the_28b_by_its_plan():
    parts = size_by_part(VL, build_plan("2", VL))
    assert parts["everything"]["bytes"] <= 8.6e9
    assert parts["needed for text"]["bytes"] <= 6.0e9
    banks = [(n, s) for n, s in shapes().items() if n.endswith(("gate_up", ".text.down", ".vision.down"))]
    plan = build_plan("2", VL)
    num_bytes = sum(plan.num_bytes(name, shape) for name, shape in banks)
    assert num_bytes * 8 / sum(torch.Size(shape).numel() for _, shape in banks) <= 2.01


def test_counted_bytes_are_real_bytes():
    plan, name = build_plan("2", VL), "decoder.layers.3.mlp.text.down"
    tensor = encode_matrix(torch.randn(64, 48).numpy(), plan.two)
    assert plan.num_bytes(name, (64, 48)) == tensor.num_bytes


def test_embeddings_of_six_bits():
    plan, shape = build_plan("2", VL, embedding_bits=6), (VL.vocab_size, VL.hidden_size)
    assert plan.kind("embed.weight") is plan.kind("head.weight") is Kind.INT6
    assert plan.kind("vision_tower.blocks.7.fc1.weight") is Kind.INT8
    assert plan.num_bytes("embed.weight", shape) == VL.vocab_size * (2560 * 6 // 8 + 2)
    saved = build_plan("2", VL).num_bytes("embed.weight", shape) - plan.num_bytes("embed.weight", shape)
    assert saved == VL.vocab_size * 2560 // 4 == 66_191_360
    assert plan.kind_for("embed.weight", (64, 18)) is Kind.INT8
    tensor = encode_int(torch.randn(64, 48).numpy(), 6)
    assert plan.num_bytes("embed.weight", (64, 48)) == tensor.num_bytes
    with pytest.raises(ConfigError, match="there are 8 and 6"):
        build_plan("2", VL, embedding_bits=4)


def test_attention_of_eight_bits():
    plan = build_plan("2", VL, attention_bits=8)
    assert plan.kind("decoder.layers.3.attention.q.weight") is Kind.INT8
    assert plan.kind("decoder.layers.3.mlp.shared.down.weight") is Kind.FOUR
    assert plan.kind("decoder.layers.3.mlp.text.down") is Kind.TWO
    assert build_plan("2", VL).kind("decoder.layers.3.attention.q.weight") is Kind.FOUR
    with pytest.raises(ConfigError, match="there are 4 and 8"):
        build_plan("2", VL, attention_bits=6)


def test_a_budget_goes_where_it_saves_most():
    small = {f"decoder.layers.{i}.mlp.text.down": (4, 64, 64) for i in range(3)}
    plan = build_plan("auto", VL)
    least = sum(plan.num_bytes(name, shape) for name, shape in small.items())
    one = 4 * 64 * 64 * 2 // 8
    errors = {"0.text": 0.1, "1.text": 0.3, "2.text": 0.2}
    assert raise_banks(plan, small, errors, least + 2 * one).raised == {"1.text", "2.text"}
    assert raise_banks(plan, small, errors, least + one - 1).raised == frozenset()
    with pytest.raises(ConfigError, match="the least this plan can do"):
        raise_banks(plan, small, errors, least - 1)


def test_parts():
    assert part_of("decoder.layers.3.mlp.vision.router.weight") == "vision experts"
    assert part_of("decoder.layers.3.mlp.text.router.weight") == "rest"
    assert part_of("vision_tower.blocks.0.fc1.bias") == "vision tower and resampler"


def test_kl_of_logits():
    logits = torch.randn(5, 7)
    kl, same = compare_logits(logits, logits + 3.0)
    torch.testing.assert_close(kl, torch.zeros(5, dtype=torch.float64))
    row = summarize(*compare_logits(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 50.0]])))
    assert same.all() and row["kl_mean"] == pytest.approx(0.5 * 50 - 0.6931472, rel=1e-6)
