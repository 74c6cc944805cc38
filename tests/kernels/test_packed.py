"""Every packed product against the plain version: same integers, same floats, same bits.

Codes are random: any symbols are a valid matrix, and random ones reach every entry of the codebook.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from duomo.kernels import cpu, reference
from duomo.kernels.weights import IntWeight, TrellisWeight
from duomo.trellis import PRESETS, IntTensor, TrellisBank, TrellisTensor, int_tensor

native = pytest.importorskip("duomo._native", reason="the native module is not built")
ISAS = ["portable", "avx2", "avx512", "neon"]
TOKENS = [0, 1, 7, 31]


def random_matrix(name: str, rows: int, columns: int, chain: int = 1, seed: int = 3) -> TrellisTensor:
    code, rng = PRESETS[name], np.random.default_rng(rows + columns)
    codes = rng.integers(0, 256, rows * columns * code.bits // 8, dtype=np.uint8)
    scale = rng.uniform(0.01, 0.1, rows).astype(np.float16)
    return TrellisTensor(code, codes, scale, (rows, columns), seed, chain)


def random_bank(name: str, count: int, rows: int, columns: int, seed: int = 5) -> TrellisWeight:
    code, rng = PRESETS[name], np.random.default_rng(columns)
    codes = rng.integers(0, 256, (count, rows * columns * code.bits // 8), dtype=np.uint8)
    scale = rng.uniform(0.01, 0.1, (count, rows)).astype(np.float16)
    return TrellisWeight(TrellisBank(code, codes, scale, (count, rows, columns), seed))


def random_integers(rows: int, columns: int, seed: int | None = 4, bits: int = 8) -> IntWeight:
    rng, most = np.random.default_rng(rows), (1 << (bits - 1)) - 1
    levels = rng.integers(-most, most + 1, (rows, columns)).astype(np.int8)
    return IntWeight(int_tensor(levels, rng.uniform(0.001, 0.01, rows).astype(np.float16), bits, seed))


def opened(weight: IntWeight) -> IntWeight:
    """The same levels as int8."""
    stored = weight.stored
    return IntWeight(IntTensor(stored.levels(), stored.row_scale, 8, stored.seed))


def inputs(tokens: int, width: int) -> torch.Tensor:
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(tokens * 1000 + width))
    if tokens > 1:
        x[1] = 0.0  # a token of nothing
    return x


@pytest.fixture(params=ISAS)
def isa(request):
    native.set_isa(request.param)
    if native.current_isa() != request.param:
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    native.set_isa("")


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("width", [192, 128, 336, 80])
def test_rotated_int8_activations_are_the_same_bits(isa, tokens, width):
    weight = random_integers(16, width)
    fast = cpu.quantize_activations(inputs(tokens, width), weight.signs, weight.block)
    plain = reference.quantize_activations(inputs(tokens, width), weight.signs, weight.block)
    assert torch.equal(fast.q, plain.q) and torch.equal(fast.scale, plain.scale)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(
    "rows, columns, chain",
    [(128, 256, 1), (320, 128, 1), (64, 96, 1), (64, 96, 3), (64, 384, 24), (192, 64, 2)],
)
def test_trellis_product_is_the_same_bits(isa, name, rows, columns, chain, tokens):
    weight = TrellisWeight(random_matrix(name, rows, columns, chain))
    x = inputs(tokens, columns)
    assert torch.equal(cpu.packed_linear(x, weight), reference.packed_linear(x, weight))


def test_four_bit_matrix_of_half_a_panel(isa):
    weight = TrellisWeight(random_matrix("lcc4-12", 96, 64))
    for tokens in TOKENS:
        x = inputs(tokens, 64)
        assert torch.equal(cpu.packed_linear(x, weight), reference.packed_linear(x, weight))


def test_panels_longer_than_the_cache_are_cut(isa):
    weight = TrellisWeight(random_matrix("lcc2-12", 64, 4096 + 128))
    x = inputs(3, weight.columns)
    assert torch.equal(cpu.packed_linear(x, weight), reference.packed_linear(x, weight))


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("rows, columns", [(64, 256), (77, 128), (1, 48), (130, 336)])
@pytest.mark.parametrize("seed", [None, 9])
@pytest.mark.parametrize("bits", [8, 6])
def test_product_of_integers_is_the_same_bits(isa, rows, columns, tokens, seed, bits):
    weight, x = random_integers(rows, columns, seed, bits), inputs(tokens, columns)
    assert torch.equal(cpu.packed_linear(x, weight), reference.packed_linear(x, weight))


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("columns", [48, 96, 192, 256, 4096 + 128])  # blocks of 16, 32, 64, 128; a cut panel
def test_six_bits_are_what_the_same_levels_are_at_eight(isa, columns, tokens):
    weight, x = random_integers(85, columns, bits=6), inputs(tokens, columns)
    assert torch.equal(cpu.packed_linear(x, weight), cpu.packed_linear(x, opened(weight)))


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("field", [0x00, 0xFF])  # -32, which no encoder writes, and 31
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_six_bit_sums_do_not_saturate(isa, tokens, field, sign):
    codes = np.full((32, 96), field, np.uint8)
    weight = IntWeight(IntTensor(codes, np.ones(32, np.float16), 6, None))
    x = torch.full((tokens, 128), float(sign))
    expected = torch.full((tokens, 32), float(sign * (31 if field else -32) * 127 * 128)) * (1 / 127)
    assert torch.equal(cpu.packed_linear(x, weight), reference.packed_linear(x, weight))
    torch.testing.assert_close(cpu.packed_linear(x, weight), expected)


@pytest.mark.parametrize("bits", [8, 6])
def test_rows_are_looked_up_alone(bits):
    weight = random_integers(77, 128, bits=bits)
    for ids in ([], [5], [76, 0, 5, 5]):
        assert torch.equal(weight.rows_of(torch.tensor(ids, dtype=torch.int64)), weight.levels()[ids])


@pytest.mark.parametrize("bits", [8, 6])
@pytest.mark.parametrize("columns", [48, 96, 192, 384])  # blocks of 16 to 128
@pytest.mark.parametrize("is_rotated", [False, True])
def test_rows_turned_back_are_the_reference_s(isa, bits, columns, is_rotated):
    weight = random_integers(77, columns, seed=4 if is_rotated else None, bits=bits)
    for ids in (torch.tensor([], dtype=torch.int64), torch.tensor([76, 0, 5, 5]), torch.tensor([[3], [70]])):
        fast = cpu.packed_rows(ids, weight)
        assert fast.shape == (*ids.shape, columns)
        assert torch.equal(fast, reference.packed_rows(ids, weight))


def test_a_row_that_is_not_there_is_refused():
    for missing in (77, -1):
        with pytest.raises(IndexError, match="no such row"):
            cpu.packed_rows(torch.tensor([0, missing]), random_integers(77, 128))


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_agree(isa, tokens, dtype):
    """Only exp() differs, by a few ulp, which may move a rounding of the middle by one step."""
    gate_up, down = random_bank("lcc2-12", 5, 256, 128), random_bank("lcc2-12", 5, 128, 128)
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.rand(tokens, 5, generator=generator).argsort(-1)[:, :3]
    weights = torch.rand(tokens, 3, generator=generator).softmax(-1).to(dtype)
    hidden = inputs(tokens, 128).to(dtype)
    fast = cpu.packed_experts(hidden, ids, weights, gate_up, down)
    plain = reference.packed_experts(hidden, ids, weights, gate_up, down)
    assert fast.shape == plain.shape == (tokens, 128) and fast.dtype == plain.dtype == dtype
    if tokens:
        error = (fast.float() - plain.float()).norm() / plain.float().norm()
        assert error < (2e-3 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("tokens", TOKENS)
def test_mlp_agrees(isa, tokens):
    weights = [
        TrellisWeight(random_matrix("lcc4-12", *shape)) for shape in ((192, 128), (192, 128), (128, 192))
    ]
    fast, plain = (room.packed_mlp(inputs(tokens, 128), *weights) for room in (cpu, reference))
    assert fast.shape == plain.shape == (tokens, 128)
    if tokens:
        assert (fast - plain).norm() / plain.norm() < 2e-3


@pytest.mark.parametrize("tokens", TOKENS)
def test_queries_keys_and_values_are_the_same_bits(isa, tokens):
    weights = [TrellisWeight(random_matrix("lcc4-12", rows, 128, seed=rows % 3)) for rows in (192, 64, 64)]
    angles = torch.randn(tokens, 8)
    fast = cpu.packed_qkv(inputs(tokens, 128), *weights, angles.cos(), angles.sin())
    plain = reference.packed_qkv(inputs(tokens, 128), *weights, angles.cos(), angles.sin())
    assert all(torch.equal(a, b) for a, b in zip(fast, plain, strict=True))


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("width", [80, 128, 337])
def test_routing_agrees(isa, tokens, width):
    generator = torch.Generator().manual_seed(width)
    hidden = torch.randn(tokens, width, generator=generator)
    router, bias = (
        torch.randn(13, width, generator=generator) * 0.3,
        torch.randn(13, generator=generator) * 0.1,
    )
    fast, plain = cpu.route(hidden, router, bias, 4), reference.route(hidden, router, bias, 4)
    assert torch.equal(fast.expert_ids_TK, plain.expert_ids_TK)
    torch.testing.assert_close(fast.weights_TK, plain.weights_TK, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("width", [64, 337])
def test_norm_agrees(isa, tokens, width):
    weight = torch.randn(width)
    fast = cpu.rmsnorm(inputs(tokens, width), weight, 1e-5)
    torch.testing.assert_close(
        fast, reference.rmsnorm(inputs(tokens, width), weight, 1e-5), rtol=1e-5, atol=1e-6
    )


def test_a_token_does_not_depend_on_its_neighbours(isa):
    gate_up, down = random_bank("lcc2-12", 4, 128, 64), random_bank("lcc2-12", 4, 64, 64)
    generator = torch.Generator().manual_seed(1)
    ids = torch.rand(13, 4, generator=generator).argsort(-1)[:, :2]
    weights, hidden = torch.rand(13, 2, generator=generator), inputs(13, 64)
    together = cpu.packed_experts(hidden, ids, weights, gate_up, down)
    alone = [
        cpu.packed_experts(hidden[t : t + 1], ids[t : t + 1], weights[t : t + 1], gate_up, down)
        for t in range(13)
    ]
    assert torch.equal(together, torch.cat(alone))


def experts_at_once_and_eight_by_eight(tokens, experts, middle, width):
    gate_up = random_bank("lcc2-12", experts, 2 * middle, width)
    down = random_bank("lcc2-12", experts, width, middle)
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.rand(tokens, experts, generator=generator).argsort(-1)[:, :2]
    weights, hidden = torch.rand(tokens, 2, generator=generator), inputs(tokens, width)
    few = [
        cpu.packed_experts(hidden[t : t + 8], ids[t : t + 8], weights[t : t + 8], gate_up, down)
        for t in range(0, tokens, 8)
    ]
    return cpu.packed_experts(hidden, ids, weights, gate_up, down), torch.cat(few)


@pytest.mark.parametrize("experts, middle", [(5, 256), (3, 96)])  # cut into pieces; one that cannot be
def test_many_tokens_go_another_way_to_the_same_bits(isa, experts, middle):
    assert torch.equal(*experts_at_once_and_eight_by_eight(40, experts, middle, 128))


def test_terms_of_very_many_tokens_come_in_slices():
    assert torch.equal(*experts_at_once_and_eight_by_eight(1100, 4, 64, 1088))


@pytest.mark.parametrize("middle", [192, 256])
def test_an_mlp_of_many_tokens_has_the_bits_of_few(isa, middle):
    shapes = (middle, 128), (middle, 128), (64, middle)
    weights = [TrellisWeight(random_matrix("lcc4-12", *shape)) for shape in shapes]
    x = inputs(70, 128)
    few = [cpu.packed_mlp(x[t : t + 10], *weights) for t in range(0, 70, 10)]
    assert torch.equal(cpu.packed_mlp(x, *weights), torch.cat(few))


@pytest.mark.parametrize(
    ("rows", "columns", "tokens"),
    [(640, 128, 7), (1024, 640, 1), (2048, 1024, 1), (1024, 640, 3)],
    ids=["rows", "halves of five blocks", "runs of rows in halves", "rows of a few tokens"],
)
def test_threads_do_not_change_a_bit(isa, rows, columns, tokens):
    weight, x = TrellisWeight(random_matrix("lcc2-12", rows, columns)), inputs(tokens, columns)
    expected = reference.packed_linear(x, weight)
    for count in (1, 2, 3, 7):
        native.set_num_threads(count)
        result = cpu.packed_linear(x, weight)
        native.set_num_threads(0)
        assert torch.equal(result, expected), f"{count} threads"


def test_the_product_is_near_the_decoded_matrix():
    """int8 activations cost under one percent of the result: the reference is itself held to something."""
    tensor = random_matrix("lcc2-12", 256, 512)
    x = inputs(5, 512)
    exact = x @ torch.from_numpy(tensor.decode()).T
    error = (cpu.packed_linear(x, TrellisWeight(tensor)) - exact).norm() / exact.norm()
    assert 0 < error < 0.01


@pytest.mark.parametrize("cap", ["portable", "avx2", "avx512"])
def test_environment_caps_the_instruction_set_and_never_raises_it(cap):
    order = ["portable", "avx2", "avx512"]
    best = native.best_isa()
    if best not in order:
        pytest.skip("not an x86-64 machine")
    environment = dict(os.environ, DUOMO_CPU_ISA=cap, PYTHONPATH=os.pathsep.join(sys.path))
    script = "import duomo.kernels; from duomo import _native; print(_native.current_isa())"
    out = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == min(cap, best, key=order.index)


def test_reference_kernels_can_be_forced():
    environment = dict(os.environ, DUOMO_KERNELS="reference", PYTHONPATH=os.pathsep.join(sys.path))
    script = "from duomo import kernels; print(kernels.is_native)"
    out = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "False"
