"""From a checkpoint folder to an engine that is ready: dtypes, the size of the KV cache, the fingerprint."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path

import torch

from duomo.checkpoints import load_config, load_model
from duomo.checkpoints.inventory import take_inventory
from duomo.checkpoints.residency import residency_of
from duomo.checkpoints.settings import settle
from duomo.engine.engine import Engine, build_engine
from duomo.engine.heap import give_back_unused, return_large_pieces
from duomo.engine.runner import ModelRunner
from duomo.engine.vocabulary import Vocabulary
from duomo.errors import ConfigError
from duomo.kernels import DenseForm
from duomo.model.config import SMALL, ModelConfig
from duomo.model.ernie import Ernie
from duomo.model.plain_decoder import is_bfloat16
from duomo.processing.tokenizer import Tokenizer

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_ELEMENT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0}


def open_engine(
    folder: Path,
    tokenizer: Tokenizer,
    *,
    dtype: str,
    kv_dtype: str,
    kv_bytes: int | None,
    page_size: int,
    max_model_tokens: int | None,
    max_sequences: int | None,
    max_step_tokens: int,
    has_prefix_cache: bool,
    num_drafts: int,
    feature_folder: str | None,
    weights_idle_s: float = 300.0,
    weights_cap_bytes: int | None = None,
    ram_bytes: int | None = None,
) -> tuple[Engine, ModelConfig]:
    """Packed weights for pictures leave memory `weights_idle_s` after the last one; above `weights_cap_bytes`
    the experts chosen least do. What is None is settled from `ram_bytes`, or from the memory there is
    (`checkpoints.settings`). ConfigError for options that cannot be right, CheckpointError for a folder that
    is no model, or one that cannot run in the memory.
    """
    if dtype not in (*_DTYPES, "auto"):
        raise ConfigError(f"dtype is {dtype}; it must be auto, float32 or bfloat16")
    if kv_dtype not in (*_ELEMENT_BYTES, "auto"):
        raise ConfigError(f"kv_dtype is {kv_dtype}; it must be auto, float32, bfloat16 or int8")
    if page_size not in (8, 16, 32, 64, 128, 256):
        raise ConfigError(f"page_size is {page_size}; it must be 8, 16, 32, 64, 128 or 256")
    return_large_pieces()
    config = load_config(folder)
    inventory = take_inventory(folder)
    settings = settle(inventory, ram_bytes, kv_bytes, max_sequences)
    kv_bytes, max_sequences = settings.kv_bytes, settings.max_sequences
    if weights_cap_bytes is None:
        weights_cap_bytes = settings.weights_cap_bytes
    model = load_model(folder, _DTYPES.get(dtype), is_read_only=True)
    if dtype == "auto" and sum(parameter.numel() for parameter in model.parameters()) < SMALL:
        model = model.float()
    if kv_dtype == "auto":
        is_wide = model.decoder.norm.weight.dtype == torch.float32
        kv_dtype = "float32" if is_wide and inventory.total.parameters < SMALL else "bfloat16"
    most = min(max_model_tokens or config.max_positions, config.max_positions)
    num_pages = num_pages_in(kv_bytes, config, kv_dtype, page_size)
    num_pages = min(num_pages, -(-most // page_size) * max_sequences)
    if num_pages * page_size < 16:
        raise ConfigError(f"kv_bytes of {kv_bytes:,} hold fewer than 16 tokens of this model; give more")
    runner = ModelRunner(
        model,
        num_pages,
        page_size,
        kv_dtype,
        feature_folder=Path(feature_folder) if feature_folder else None,
        fingerprint=fingerprint(folder),
        form=_form(model, dtype),
    )
    runner.residency = residency_of(model)
    if runner.residency is not None:
        runner.residency.after_letting_go = give_back_unused
        runner.residency.keep(weights_idle_s)
        if weights_cap_bytes is not None:
            runner.set_cap(weights_cap_bytes)
    engine = build_engine(
        runner,
        Vocabulary.of(tokenizer),
        num_pages=num_pages,
        page_size=page_size,
        max_sequences=max_sequences,
        max_step_tokens=max_step_tokens,
        max_model_tokens=most,
        has_prefix_cache=has_prefix_cache,
        num_drafts=num_drafts,
    )
    give_back_unused()
    return engine, config


def _form(model: Ernie, dtype: str) -> DenseForm:
    """`auto` multiplies a bf16 checkpoint in bf16, as its makers do, added in fp32; float32 rounds none."""
    if not is_bfloat16(model):
        return DenseForm.BORROWED
    return DenseForm.ROUNDED if dtype == "auto" else DenseForm.PANELS


def num_pages_in(kv_bytes: int, config: ModelConfig, kv_dtype: str, page_size: int) -> int:
    """Pages that fit; int8 has a 4-byte scale a head."""
    element = _ELEMENT_BYTES[kv_dtype] + (4.0 / config.head_dim if kv_dtype == "int8" else 0.0)
    token_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * element
    return int(kv_bytes / token_bytes) // page_size


def fingerprint(folder: Path) -> str:
    """Of the files' names, sizes and times, and of the config: other weights, another name."""
    state = blake2b(digest_size=8)
    for path in sorted(folder.glob("*.safetensors")):
        status = path.stat()
        state.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    state.update((folder / "config.json").read_bytes())
    return state.hexdigest()
