"""The native tower against its plain version, and its promises: frames apart, threads without effect."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from duomo.errors import KernelError
from duomo.kernels import cpu, reference
from duomo.kernels.reference import Affine, BlockWeights, Norm
from duomo.kernels.weights import DenseForm, DenseWeight, IntWeight
from duomo.trellis import int_tensor

native = pytest.importorskip("duomo._native", reason="the native module is not built")

WIDTHS = [(2, 16), (1, 80), (3, 48), (2, 64), (1, 128)]  # heads, and the width of each
FRAMES = [[1], [7], [64], [61, 65], [4, 4, 4], [300, 12]]  # patches of each frame


@pytest.fixture(params=["portable", "avx2", "avx512", "neon"])
def isa(request):
    native.set_isa(request.param)
    if native.current_isa() != request.param:
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    native.set_isa("")


@pytest.fixture(params=[None, *DenseForm], ids=lambda form: "integers" if form is None else form.name.lower())
def form(request):
    return request.param


def error(fast: torch.Tensor, plain: torch.Tensor) -> float:
    assert fast.shape == plain.shape and fast.isfinite().all()
    return float((fast - plain).norm() / plain.norm())


def heads(frames: list[int], num_heads: int, head_dim: int, sharpness: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(frames) * head_dim)
    query, key, value = torch.randn(3, sum(frames), num_heads, head_dim, generator=generator)
    return [query * sharpness, key, value]


def affine(rows: int, columns: int, form: DenseForm | None = None, most: int = 127, bits: int = 8) -> Affine:
    """Integers, or a plain matrix of bf16 values in the given form."""
    rng = np.random.default_rng(rows * 7 + columns)
    if form is not None:
        weight = torch.from_numpy(rng.normal(0, columns**-0.5, (rows, columns))).bfloat16().float()
        return Affine(DenseWeight(weight, form=form), torch.from_numpy(rng.normal(0, 0.1, rows)).float())
    levels = rng.integers(-most, most + 1, (rows, columns)).astype(np.int8)
    scale = np.full(rows, columns**-0.5 / 73, np.float16)
    integers = IntWeight(int_tensor(levels, scale, bits, 4))
    return Affine(integers, torch.from_numpy(rng.normal(0, 0.1, rows)).float())


def norm(width: int) -> Norm:
    generator = torch.Generator().manual_seed(width)
    return Norm(
        1 + 0.1 * torch.randn(width, generator=generator), torch.randn(width, generator=generator), 1e-6
    )


def block(width: int, size: int, form: DenseForm | None = None) -> BlockWeights:
    attention = norm(width), affine(3 * width, width, form), affine(width, width, form)
    return BlockWeights(*attention, norm(width), affine(size, width, form), affine(width, size, form))


def patches(count: int, width: int) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count))


def angles(count: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    turned = torch.randn(count, head_dim // 2, generator=torch.Generator().manual_seed(1)) * 3
    return turned.cos(), turned.sin()


@pytest.mark.parametrize("frames", FRAMES)
@pytest.mark.parametrize("num_heads, head_dim", WIDTHS)
@pytest.mark.parametrize("sharpness", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("is_rounded, bound", [(True, 2e-3), (False, 5e-5)])
def test_attention_within_frames_agrees(isa, frames, num_heads, head_dim, sharpness, is_rounded, bound):
    """Up to the rounding of softmax weights to bf16, whose mantissa depends on the maximum so far."""
    x = (*heads(frames, num_heads, head_dim, sharpness), frames, is_rounded)
    assert error(cpu.frame_attention(*x), reference.frame_attention(*x)) < bound


def test_the_plain_version_is_softmax_attention():
    x = heads([61, 65], 2, 80)
    for frame in (slice(0, 61), slice(61, 126)):
        query, key, value = (part[frame].transpose(0, 1) for part in x)
        exact = F.scaled_dot_product_attention(query, key, value).transpose(0, 1)
        assert error(reference.frame_attention(*x, [61, 65])[frame], exact) < 6e-3


def test_rising_scores_are_rescaled(isa):
    """The maximum rises with every block of keys: what was summed before must shrink each time."""
    length = 700
    query, key, value = heads([length], 1, 16)
    query, key = torch.ones_like(query), torch.ones_like(key) * torch.arange(length)[:, None, None] * 0.05
    fast = cpu.frame_attention(query, key, value, [length])
    assert error(fast, reference.frame_attention(query, key, value, [length])) < 2e-3


def test_frames_do_not_see_each_other(isa):
    frames = [12, 300, 64]
    x = heads(frames, 2, 32)
    together = cpu.frame_attention(*x, frames)
    alone = [
        cpu.frame_attention(*part, [len(part[0])]) for part in zip(*(y.split(frames) for y in x), strict=True)
    ]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("frames", [[1], [61], [512, 4, 97]])
@pytest.mark.parametrize("num_heads, head_dim", [(2, 80), (3, 16), (4, 32)])
def test_attention_block_agrees(isa, form, frames, num_heads, head_dim):
    width, count = num_heads * head_dim, sum(frames)
    x = (patches(count, width), block(width, 16, form), *angles(count, head_dim), frames, num_heads)
    assert error(cpu.vision_attention(*x), reference.vision_attention(*x)) < 3e-3


@pytest.mark.parametrize("count", [1, 61, 613])
@pytest.mark.parametrize("width, size", [(160, 640), (48, 96), (64, 16)])
def test_mlp_agrees(isa, form, count, width, size):
    """LayerNorm and exp() differ by a few ulp, which may move a rounding to int8 by one step."""
    weights, x = block(width, size, form), patches(count, width)
    assert error(cpu.vision_mlp(x, weights), reference.vision_mlp(x, weights)) < 2e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_agree(isa, form, dtype):
    frames, blocks = [61, 4], [block(64, 128, form), block(64, 128, form)]
    x = (patches(65, 64).to(dtype), blocks, *angles(65, 16), frames, 4)
    fast, plain = cpu.vision_blocks(*x), reference.vision_blocks(*x)
    assert fast.dtype == plain.dtype == dtype
    assert error(fast.float(), plain.float()) < 6e-3


def test_six_bits_are_what_the_same_levels_are_at_eight(isa):
    x = torch.randn(61, 64, generator=torch.Generator().manual_seed(4))
    six, eight = (
        block(64, 96)._replace(fc1=affine(96, 64, None, 31, bits), fc2=affine(64, 96, None, 31, bits))
        for bits in (6, 8)
    )
    assert torch.equal(cpu.vision_mlp(x, six), cpu.vision_mlp(x, eight))


def test_nothing_in_nothing_out(isa):
    nothing = torch.empty(0, 64)
    assert cpu.vision_blocks(nothing, [block(64, 128)], *angles(0, 16), [], 4).shape == (0, 64)
    assert cpu.frame_attention(*(torch.empty(0, 2, 16) for _ in range(3)), []).shape == (0, 2, 16)


def test_threads_do_not_change_a_bit(form):
    blocks, frames = [block(64, 128, form)], [300, 613]
    results = []
    for count in (1, 2, 3):
        native.set_num_threads(count)
        results.append(cpu.vision_blocks(patches(913, 64), blocks, *angles(913, 16), frames, 4))
    native.set_num_threads(0)
    assert all(torch.equal(result, results[0]) for result in results)


def test_every_instruction_set_gives_the_same_bits(form):
    results = []
    for name in ("portable", "avx2", "avx512"):
        native.set_isa(name)
        x = (patches(361, 96), [block(96, 128, form)] * 2, *angles(361, 48), [61, 300], 2)
        results.append(cpu.vision_blocks(*x))
    native.set_isa("")
    assert all(torch.equal(results[0], other) for other in results)


def test_a_picture_does_not_depend_on_its_neighbours(isa, form):
    """Not its attention, and not its place in a chunk of patches either."""
    frames, blocks = [97, 613], [block(64, 128, form)]
    x, (cos, sin) = patches(710, 64), angles(710, 16)
    together = cpu.vision_blocks(x, blocks, cos, sin, frames, 4)
    alone = cpu.vision_blocks(x[97:], blocks, cos[97:], sin[97:], frames[1:], 4)
    assert torch.equal(together[97:], alone)


def test_what_does_not_fit_is_refused():
    x = patches(8, 64)
    with pytest.raises(KernelError, match="frames"):
        cpu.vision_blocks(x, [block(64, 128)], *angles(8, 16), [4], 4)
    with pytest.raises(KernelError, match="angles"):
        cpu.vision_blocks(x, [block(64, 128)], *angles(7, 16), [8], 4)
    with pytest.raises(ValueError, match="fit"):
        cpu.vision_blocks(x, [block(64, 128)._replace(out=affine(64, 128))], *angles(8, 16), [8], 4)
