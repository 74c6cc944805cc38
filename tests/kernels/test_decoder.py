"""The fused decoder against the layers called one by one: the same bits, the same cache, the same choices."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from duomo.engine.kv import PagedCache
from duomo.errors import KernelError
from duomo.model import Batch, Ernie
from duomo.model.config import BankConfig, ModelConfig
from duomo.model.decoder import Decoder
from duomo.model.packed import build_packed, unfuse
from duomo.model.packed_decoder import PackedDecoder
from duomo.model.packed_layers import PackedLinear
from duomo.trellis import LCC2_12, LCC4_12, TrellisBank, TrellisTensor, encode_int

native = pytest.importorskip("duomo._native", reason="the native module is not built")
PAGE, NUM_PAGES = 4, 40
CONFIG = ModelConfig(
    vocab_size=101400, hidden_size=64, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=16,
    intermediate_size=128, expert_layers=(False, True, True), text_experts=BankConfig(6, 64),
    vision_experts=BankConfig(5, 32), num_chosen=3, shared_size=64, rope_section=(3, 3, 2),
)  # fmt: skip


def packed_model(config: ModelConfig) -> Ernie:
    rng = np.random.default_rng(0)
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in Ernie(config).named_parameters()}

    def matrix(code, shape):
        codes = rng.integers(0, 256, shape[0] * shape[1] * code.bits // 8, dtype=np.uint8)
        return TrellisTensor(code, codes, np.full(shape[0], shape[1] ** -0.5, np.float16), shape, seed=7)

    def stored(name, shape):
        if len(shape) == 3:
            return TrellisBank.of([matrix(LCC2_12, shape[1:]) for _ in range(shape[0])])
        if "router" in name or len(shape) == 1:
            return torch.from_numpy(rng.normal(1.0 if "norm" in name else 0.0, 0.1, shape)).float()
        is_int8 = name.startswith(("embed", "head"))
        return (
            encode_int(rng.normal(0, 0.05, shape).astype(np.float32)) if is_int8 else matrix(LCC4_12, shape)
        )

    return build_packed(config, [(name, stored(name, shape)) for name, shape in shapes.items()])


@pytest.fixture(scope="module")
def model() -> Ernie:
    return packed_model(CONFIG)


def step(lengths: list[tuple[int, int]], is_vision: torch.Tensor) -> Batch:
    """(cached, new) tokens of each sequence, each on ten pages of its own."""
    pages = 1 + torch.randperm(NUM_PAGES, generator=torch.Generator().manual_seed(0))
    table = pages[: len(lengths) * 10].reshape(len(lengths), 10)
    place = [(s, cached + i) for s, (cached, new) in enumerate(lengths) for i in range(new)]
    slots = torch.tensor([int(table[s, u // PAGE]) * PAGE + u % PAGE for s, u in place], dtype=torch.int64)
    positions = torch.tensor([u for _, u in place], dtype=torch.int64)
    return Batch(
        ids_T=torch.arange(3, 3 + len(place)),
        positions_3T=positions.expand(3, -1),
        text_rows=(~is_vision).nonzero().flatten(),
        vision_rows=is_vision.nonzero().flatten(),
        num_new=tuple(new for _, new in lengths),
        num_cached=tuple(cached for cached, _ in lengths),
        slots_T=slots,
        page_table_SM=table,
        sequence_T=torch.tensor([s for s, _ in place], dtype=torch.int64),
        num_keys_T=positions + 1,
        expert_ids_LTK=torch.full((CONFIG.num_layers, len(place), CONFIG.num_chosen), -1),
    )


def filled_cache(dtype: str) -> PagedCache:
    cache = PagedCache(CONFIG, NUM_PAGES, PAGE, dtype)
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(cache.store.shape, generator=generator)
    cache.store.copy_(noise if dtype != "int8" else (noise * 30).clamp(-127, 127))
    if cache.scale is not None:
        cache.scale.copy_(torch.rand(cache.scale.shape, generator=generator) / 30)
    return cache


def both(model: Ernie, batch: Batch, dtype: str) -> list[tuple[torch.Tensor, ...]]:
    hidden = torch.randn(len(batch.ids_T), CONFIG.hidden_size, generator=torch.Generator().manual_seed(1))
    results = []
    for forward in (PackedDecoder.forward, Decoder.forward):
        cache, own = filled_cache(dtype), replace(batch, expert_ids_LTK=batch.expert_ids_LTK.clone())
        with torch.inference_mode():
            out = forward(model.decoder, hidden.clone(), own, cache)
        scale = torch.zeros(0) if cache.scale is None else cache.scale
        results.append((out, cache.store.float(), scale, own.expert_ids_LTK))
    return results


@pytest.fixture(params=["portable", "avx2", "avx512", "neon"])
def isa(request):
    native.set_isa(request.param)
    if native.current_isa() != request.param:
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    native.set_isa("")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(
    "lengths", [[(0, 1)], [(13, 1)], [(5, 1), (0, 1), (30, 1)], [(7, 11), (33, 3), (2, 1)], [(0, 37)]]
)
@pytest.mark.parametrize("vision", ["none", "some", "all"])
def test_one_call_gives_the_bits_of_the_layers(isa, model, dtype, lengths, vision):
    assert isinstance(model.decoder, PackedDecoder)
    tokens = sum(new for _, new in lengths)
    is_vision = torch.arange(tokens) % 3 == 1 if vision == "some" else torch.full((tokens,), vision == "all")
    fused, plain = both(model, step(lengths, is_vision), dtype)
    assert all(torch.equal(one, other) for one, other in zip(fused, plain, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("vision", ["none", "some", "all"])
@pytest.mark.parametrize("wanted", [[], [11, 14, 15], [0, 1, 3, 4, 9], [13]])
def test_wanted_rows_have_the_bits_that_they_have_among_all(isa, model, dtype, vision, wanted):
    """Keys and values are all tokens'; the last layer's experts are asked for the wanted ones alone."""
    lengths = [(7, 11), (33, 3), (2, 2)]
    is_vision = torch.arange(16) % 3 == 1 if vision == "some" else torch.full((16,), vision == "all")
    whole = step(lengths, is_vision)
    rows = torch.tensor(wanted, dtype=torch.int64)
    (out, store, scale, _), _ = both(model, whole, dtype)
    heard: dict[str, torch.Tensor] = {}
    for name in ("text", "vision"):
        getattr(model.decoder.layers[-1].mlp, name).listener = partial(heard.__setitem__, name)
    hidden, cache = torch.randn(16, 64, generator=torch.Generator().manual_seed(1)), filled_cache(dtype)
    with torch.inference_mode():
        found = model.decoder(hidden, replace(whole, expert_ids_LTK=None, logit_rows=rows), cache)
    for name in ("text", "vision"):
        getattr(model.decoder.layers[-1].mlp, name).listener = None
    assert torch.equal(found, out[rows]) and torch.equal(cache.store.float(), store)
    assert cache.scale is None or torch.equal(cache.scale, scale)
    is_wanted = is_vision[rows]
    told = {name: len(ids) for name, ids in heard.items() if len(ids)}
    counts = {"text": int((~is_wanted).sum()), "vision": int(is_wanted.sum())}
    assert told == {name: count for name, count in counts.items() if count}


def test_nothing_to_do(model):
    fused, _ = both(model, step([(3, 0)], torch.zeros(0, dtype=torch.bool)), "float32")
    assert fused[0].shape == (0, CONFIG.hidden_size) and torch.equal(fused[1], filled_cache("float32").store)


def test_a_token_has_its_own_bits_in_any_company(model):
    lengths = [(5, 1), (0, 1), (30, 1), (12, 1)]
    is_vision = torch.tensor([False, True, False, True])
    together = both(model, step(lengths, is_vision), "bfloat16")[0][0]
    for i, hidden in enumerate(torch.randn(4, 64, generator=torch.Generator().manual_seed(1))):
        whole = step(lengths, is_vision)
        one = slice(i, i + 1)
        alone = replace(
            whole,
            positions_3T=whole.positions_3T[:, one],
            text_rows=(~is_vision[one]).nonzero().flatten(),
            vision_rows=is_vision[one].nonzero().flatten(),
            num_new=(1,),
            num_cached=whole.num_cached[one],
            slots_T=whole.slots_T[one],
            page_table_SM=whole.page_table_SM[one],
            sequence_T=torch.zeros(1, dtype=torch.int64),
            num_keys_T=whole.num_keys_T[one],
            expert_ids_LTK=None,
        )
        with torch.inference_mode():
            out = model.decoder(hidden[None], alone, filled_cache("bfloat16"))
        assert torch.equal(out, together[one])


def test_listeners_hear_the_choices(model):
    heard = []
    bank = model.decoder.layers[1].mlp.text
    bank.listener = heard.append
    batch = step([(4, 3)], torch.tensor([False, True, False]))
    both(model, batch, "float32")
    bank.listener = None
    assert len(heard) == 2 and torch.equal(heard[0], heard[1]) and heard[0].shape == (2, CONFIG.num_chosen)


def test_slots_and_pages_outside_the_cache_are_refused(model):
    batch = step([(0, 2)], torch.zeros(2, dtype=torch.bool))
    hidden, cache = torch.zeros(2, 64), filled_cache("float32")
    for wrong in (
        replace(batch, slots_T=batch.slots_T + cache.store.shape[2]),
        replace(batch, page_table_SM=batch.page_table_SM + NUM_PAGES),
        replace(batch, num_keys_T=batch.num_keys_T + 1000),
    ):
        with pytest.raises(KernelError, match="outside the cache"):
            model.decoder(hidden, wrong, cache)


def test_layers_that_are_not_all_packed_stay_as_they_are():
    narrow = replace(CONFIG, num_heads=8, num_kv_heads=4, head_dim=8, rope_section=(1, 1, 2))
    assert not isinstance(packed_model(narrow).decoder, PackedDecoder)


def test_unfused_every_matrix_is_a_module_again():
    """Nearly the same numbers: torch's own exp() and sums stand where the native ones did."""
    model, ids = packed_model(CONFIG), [5, 9, 100295, 7]
    fused = model.logits(ids)
    unfuse(model)
    assert type(model.decoder) is Decoder
    assert isinstance(model.decoder.layers[0].attention.q, PackedLinear)
    assert isinstance(model.decoder.layers[1].mlp.shared.up, PackedLinear)
    assert (model.logits(ids) - fused).norm() / fused.norm() < 2e-3


def test_a_module_put_in_a_layer_is_asked():
    """An adapter's twin of one module, for a pass."""
    model = packed_model(CONFIG)
    batch = step([(4, 3)], torch.tensor([False, True, False]))
    before = both(model, batch, "float32")[0][0]
    layer = model.decoder.layers[1]
    own, layer.mlp.shared = layer.mlp.shared, torch.nn.Identity()
    layer.mlp.shared.forward = lambda hidden: hidden
    fused, plain = both(model, batch, "float32")
    assert torch.equal(fused[0], plain[0]) and not torch.equal(fused[0], before)
    layer.mlp.shared = own
    assert torch.equal(both(model, batch, "float32")[0][0], before)
