"""A quantized model against the same model unpacked: only the activations' int8 may differ."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from duomo.errors import MissingTensor, ShapeMismatch, UnexpectedTensor
from duomo.model import Ernie, build_batch
from duomo.model.attention import PackedCausal
from duomo.model.config import BankConfig, ModelConfig, VisionConfig
from duomo.model.packed import build_packed
from duomo.model.packed_layers import PackedEmbedding, PackedExperts, PackedLinear
from duomo.trellis import LCC2_12, LCC4_12, IntTensor, TrellisBank, TrellisTensor, encode_int
from duomo.trellis.code import TrellisCode

CONFIG = ModelConfig(
    vocab_size=101400, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
    intermediate_size=64, expert_layers=(False, True), text_experts=BankConfig(4, 64),
    vision_experts=BankConfig(4, 32), num_chosen=2, shared_size=64, rope_section=(3, 3, 2),
    vision=VisionConfig(num_layers=1, hidden_size=64, intermediate_size=128, num_heads=4),
)  # fmt: skip


def random_matrix(code: TrellisCode, shape: tuple[int, int], rng: np.random.Generator) -> TrellisTensor:
    codes = rng.integers(0, 256, shape[0] * shape[1] * code.bits // 8, dtype=np.uint8)
    scale = np.full(shape[0], shape[1] ** -0.5, np.float16)
    return TrellisTensor(code, codes, scale, shape, seed=7)


@pytest.fixture(scope="module")
def stored():
    rng = np.random.default_rng(0)
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in Ernie(CONFIG).named_parameters()}
    out = {}
    for name, shape in shapes.items():
        if len(shape) == 3:
            out[name] = TrellisBank.of([random_matrix(LCC2_12, shape[1:], rng) for _ in range(shape[0])])
        elif (".attention." in name and "decoder" in name) or ".shared." in name:
            out[name] = random_matrix(LCC4_12, shape, rng)
        elif name.endswith("norm.weight") or (".norm" in name and name.endswith("weight")):
            out[name] = torch.ones(shape)
        elif len(shape) == 1:
            out[name] = torch.from_numpy(rng.normal(0, 0.01, shape)).float()
        elif "router" in name or ("mlp" in name and "layers.0" in name):
            out[name] = torch.from_numpy(rng.normal(0, 0.05, shape)).float()
        else:
            out[name] = encode_int(rng.normal(0, 0.05, shape).astype(np.float32))
    return out


def unpacked(stored) -> Ernie:
    state = {
        name: tensor if isinstance(tensor, torch.Tensor) else torch.from_numpy(tensor.decode())
        for name, tensor in stored.items()
    }
    model = Ernie(CONFIG)
    model.load_state_dict(state)
    return model.eval()


def test_logits_of_a_packed_model_are_near_those_of_the_same_weights_unpacked(stored):
    model, plain = build_packed(CONFIG, stored.items()), unpacked(stored)
    kinds = {type(module) for module in model.modules()}
    assert {PackedLinear, PackedEmbedding, PackedExperts} <= kinds
    ids = [1, 7, 100295, 42, 9, 9, 100295]  # placeholders go to the vision experts
    difference = model.logits(ids) - plain.logits(ids)
    error = difference.norm() / plain.logits(ids).norm()
    assert 0 < error < 0.05


@pytest.mark.parametrize("is_tied", [True, False])
def test_six_bit_ends_give_the_logits_of_the_same_levels_at_eight(stored, is_tied):
    rng = np.random.default_rng(3)
    ends = {
        name: encode_int(rng.normal(0, 0.05, (CONFIG.vocab_size, 64)).astype(np.float32), 6, seed)
        for seed, name in enumerate(("embed.weight",) if is_tied else ("embed.weight", "head.weight"))
    }
    eight = {name: IntTensor(six.levels(), six.row_scale, 8, six.seed) for name, six in ends.items()}
    config = replace(CONFIG, tie_embeddings=is_tied)
    models = [build_packed(config, {**stored, **own}.items()) for own in (ends, eight)]
    assert all(model.embed.packed.stored.bits == bits for model, bits in zip(models, (6, 8), strict=True))
    for ids in ([1], [1, 7, 100295, 42, 9, 9, 100295], [*range(40)]):
        logits, expected = (model.logits(ids) for model in models)
        assert torch.equal(logits, expected) and float(logits.std()) > 0


def test_pictures_go_through_the_packed_tower(stored):
    class Grid:
        frames, rows, columns = 1, 4, 4

    model, plain = build_packed(CONFIG, stored.items()), unpacked(stored)
    patches = torch.randn(16, 588, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        packed, exact = model.encode(patches, [Grid()]), plain.encode(patches, [Grid()])
    assert packed.shape == (4, 64)
    assert (packed - exact).norm() / exact.norm() < 0.05


def test_bfloat16_activations(stored):
    model = build_packed(CONFIG, stored.items(), torch.bfloat16)
    logits = model.logits([1, 2, 3])
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
    assert model.decoder.layers[1].mlp.text.router.weight.dtype == torch.float32


def test_wrong_tensors_are_named(stored):
    without = {name: tensor for name, tensor in stored.items() if "layers.1.attention.q" not in name}
    with pytest.raises(MissingTensor, match=r"attention\.q"):
        build_packed(CONFIG, without.items())
    with pytest.raises(UnexpectedTensor, match="extra"):
        build_packed(CONFIG, {"extra": torch.ones(1), **stored}.items())
    with pytest.raises(ShapeMismatch, match="norm"):
        build_packed(CONFIG, {**stored, "decoder.norm.weight": torch.ones(3)}.items())


def test_a_pass_says_which_experts_each_token_went_to(stored):
    """Against the routers asked directly with what the bank was given."""
    ids = [1, 7, 100295, 42, 9, 9, 100295]
    given = {}
    for model in (build_packed(CONFIG, stored.items()), unpacked(stored)):
        given.clear()
        for name in ("text", "vision"):
            bank = getattr(model.decoder.layers[1].mlp, name)
            bank.register_forward_pre_hook(lambda bank, inputs: given.update({bank: inputs[0]}))
        chosen = torch.full((CONFIG.num_layers, len(ids), CONFIG.num_chosen), -1)
        batch = replace(build_batch([ids], CONFIG), expert_ids_LTK=chosen)
        with torch.inference_mode():
            model(batch, PackedCausal())
            assert (chosen[0] == -1).all()  # a dense layer chooses nothing
            assert len(given) == 2
            for bank, hidden in given.items():
                rows = batch.text_rows if len(hidden) == 5 else batch.vision_rows
                assert torch.equal(chosen[1][rows], bank.router(hidden).expert_ids_TK)
