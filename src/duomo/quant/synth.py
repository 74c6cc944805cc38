"""A quantized checkpoint of any size in minutes: codes drawn at random, nothing encoded, nothing trained.

For trying a machine before the real weights are there: sizes, layout and speed are those of a real one,
its answers mean nothing, and its config says `synthetic`. Random codes decode to weights of the right spread,
since a trellis code's symbols are uniform. At most one decoder layer is held in memory.

A deep random network maps every input to nearly the same output, and then all tokens choose the same
experts. So what enters the residual stream (embeddings, patches, features) is made large, beside which the
blocks add little: tokens stay as different as they came. The final norm flips the sign of random
directions, or a token would answer itself.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from duomo.checkpoints.quantized import FORMAT, VERSION, Stored, write_quantized
from duomo.errors import CheckpointError
from duomo.model import Ernie, ModelConfig
from duomo.quant.layer import seed_of
from duomo.quant.placeholder_tokenizer import write_placeholder_tokenizer
from duomo.quant.plan import BitPlan, Kind, build_plan
from duomo.quant.popularity import correction_bias, popularity
from duomo.trellis.code import TrellisCode
from duomo.trellis.integer import int_tensor
from duomo.trellis.packing import default_chain
from duomo.trellis.tensor import TrellisBank, TrellisTensor

Shape = tuple[int, ...]
ENTRY = 4.0  # spread of what enters the residual stream; a block adds about 0.1, and 56 of them add up
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")


def synthesize(
    config: ModelConfig,
    folder: str | Path,
    bits: str | BitPlan = "2",
    seed: int = 0,
    skew: float = 0.0,
    tokenizer: Path | None = None,
    progress: Callable[[int, int], None] = lambda written, total: None,
) -> int:
    """Writes the checkpoint and returns its bytes. `progress(bytes so far, of all)` after each file.

    `skew` is the exponent by which the popularity of experts falls with their rank (`quant.popularity`); at 0
    random routers spread tokens evenly. `bits` is a preset's name or a plan of one's own. CheckpointError if
    the folder holds weights, or the disk has no room.
    """
    folder, plan = Path(folder), bits if isinstance(bits, BitPlan) else build_plan(bits, config)
    shapes = parameter_shapes(config)
    total = sum(plan.num_bytes(name, shape) for name, shape in shapes.items())
    _check_target(folder, total)
    generator = np.random.Generator(np.random.SFC64(seed))
    written = 0
    files = list(_files(shapes))
    for number, names in enumerate(files, start=1):
        tensors = {name: _draw(name, shapes[name], config, plan, skew, generator) for name in names}
        written += write_quantized(folder / f"model-{number:05d}.safetensors", tensors)
        progress(min(written, total), total)
    _write_config(folder, config, plan, seed, skew)
    if tokenizer is None:
        write_placeholder_tokenizer(folder, config)
    for name in TOKENIZER_FILES:
        if tokenizer and (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)
    return written


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Shape of every parameter by name; nothing is allocated."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in Ernie(config).named_parameters()}


def _check_target(folder: Path, num_bytes: int) -> None:
    if folder.is_dir() and any(folder.glob("*.safetensors")):
        raise CheckpointError(f"{folder} already holds weights; give a folder that does not")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be made: {error.strerror}") from error
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise CheckpointError(
            f"{num_bytes / 1e9:.1f} GB are needed in {folder}; {free / 1e9:.1f} GB are free",
            needed=num_bytes,
            available=free,
        )


def _files(shapes: Mapping[str, Shape]) -> Iterator[list[str]]:
    """One file a decoder layer and one for each of the other parts, as the quantizer writes them."""
    groups: dict[str, list[str]] = {}
    for name in shapes:
        words = name.split(".")
        key = ".".join(words[:3]) if words[:2] == ["decoder", "layers"] else words[0]
        groups.setdefault(key, []).append(name)
    yield from groups.values()


def _draw(
    name: str, shape: Shape, config: ModelConfig, plan: BitPlan, skew: float, generator: np.random.Generator
) -> Stored:
    kind, deviation = plan.kind_for(name, shape), _deviation(name, shape, config)
    if kind is Kind.PLAIN:
        return _plain(name, shape, config, skew, generator)
    words = name.split(".")
    in_layer = words[:2] == ["decoder", "layers"]
    seed = seed_of(".".join(words[3:]), int(words[2])) if in_layer else seed_of(name, -1)
    code = plan.code(kind)
    if code is not None:
        return _trellis(shape, code, seed, deviation, generator)
    bits = 8 if kind is Kind.INT8 else 6
    top = (1 << (bits - 1)) - 1
    levels = generator.integers(-top, top + 1, shape, np.int8)
    spread = top / 3**0.5  # of a uniform level
    return int_tensor(levels, np.full(shape[:-1], deviation / spread, np.float16), bits, seed)


def _deviation(name: str, shape: Shape, config: ModelConfig) -> float:
    if name == "embed.weight":
        return ENTRY
    return (
        ENTRY * shape[-1] ** -0.5 if name == "vision_tower.patch_embed.weight" else config.initializer_range
    )


def _plain(
    name: str, shape: Shape, config: ModelConfig, skew: float, generator: np.random.Generator
) -> Stored:
    if name.endswith("router.bias"):
        return _router_bias(shape[0], config, skew, generator)
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if name == "decoder.norm.weight":
        signs = torch.from_numpy(generator.integers(0, 2, shape, np.int8) * np.float32(2) - 1)
        return signs * (config.initializer_range if config.tie_embeddings else 1.0)
    if name == "resampler.norm.weight":
        return torch.full(shape, ENTRY)
    if "norm" in name.rsplit(".", 2)[-2]:
        return torch.ones(shape)
    drawn = torch.from_numpy(generator.standard_normal(shape, np.float32))
    return drawn * _deviation(name, shape, config)


def _router_bias(
    num_experts: int, config: ModelConfig, skew: float, generator: np.random.Generator
) -> Stored:
    """Zero, or favours in an order that is each bank's own."""
    order = generator.permutation(num_experts)
    if not skew:
        return torch.zeros(num_experts)
    return torch.from_numpy(_favours(num_experts, config, skew)[order])


@lru_cache(maxsize=4)
def _favours(num_experts: int, config: ModelConfig, skew: float) -> npt.NDArray[np.float32]:
    shares = popularity(num_experts, config.num_chosen, skew)
    deviation = config.initializer_range * config.hidden_size**0.5  # a norm gives the router unit inputs
    return correction_bias(shares, config.num_chosen, deviation, seed=0)


def _trellis(
    shape: Shape, code: TrellisCode, seed: int, deviation: float, generator: np.random.Generator
) -> Stored:
    rows, columns = shape[-2:]
    num_bytes = rows * columns * code.bits // 8
    chain = default_chain(rows, columns, code)
    if len(shape) == 2:
        scale = np.full(rows, deviation, np.float16)
        return TrellisTensor(code, _random_bytes(generator, num_bytes), scale, (rows, columns), seed, chain)
    codes = _random_bytes(generator, shape[0] * num_bytes).reshape(shape[0], num_bytes)
    scales = np.full((shape[0], rows), deviation, np.float16)
    return TrellisBank(code, codes, scales, (shape[0], rows, columns), seed, chain)


def _random_bytes(generator: np.random.Generator, count: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    words = generator.integers(0, 1 << 64, -(-count // 8), np.uint64, endpoint=False)
    return words.view(np.uint8)[:count]


def _write_config(folder: Path, config: ModelConfig, plan: BitPlan, seed: int, skew: float) -> None:
    fields = {
        **config.to_json(),
        "quantization": {"format": FORMAT, "version": VERSION, "plan": plan.name},
        "synthetic": {"seed": seed, "skew": skew, "note": "random weights; its answers mean nothing"},
    }
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
