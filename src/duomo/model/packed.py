"""A quantized model built of stored tensors, without ever unpacking them: packed modules where it can.

Weights that a kernel can read in place stay memory-mapped. Shapes no kernel takes (a patch of 588, a bank of
integers) are unpacked instead. Modules all of whose matrices are packed become one call each, and so does the
decoder (`model.packed_decoder`).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from duomo.errors import MissingTensor, ShapeMismatch, UnexpectedTensor
from duomo.kernels.weights import NATIVE_BLOCK, IntWeight, TrellisWeight
from duomo.model.attention import Attention
from duomo.model.config import ModelConfig
from duomo.model.ernie import Embedding, Ernie
from duomo.model.experts import MLP, ExpertBank, Router
from duomo.model.layers import Linear, RMSNorm
from duomo.model.packed_decoder import PackedDecoder, fusible
from duomo.model.packed_layers import (
    PackedAttention,
    PackedEmbedding,
    PackedExperts,
    PackedLinear,
    PackedMLP,
    PackedNorm,
)
from duomo.model.packed_vision import pack as pack_blocks
from duomo.trellis import IntTensor, TrellisBank, TrellisTensor, hadamard

Stored = TrellisTensor | TrellisBank | IntTensor | Tensor


def build_packed(
    config: ModelConfig, stored: Iterable[tuple[str, Stored]], dtype: torch.dtype = torch.float32
) -> Ernie:
    """A model of stored tensors under our state-dict names; `dtype` is of activations and plain weights.

    Routers stay fp32. MissingTensor, UnexpectedTensor or ShapeMismatch name the first tensor that is wrong.
    """
    with torch.device("meta"):
        model = Ernie(config)
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    halves: dict[str, TrellisBank] = {}
    for name, tensor in stored:
        if name not in wanted:
            raise UnexpectedTensor(f"{name} is no tensor of {config.name or 'this model'}", name=name)
        if wanted[name] != tuple(tensor.shape):
            raise ShapeMismatch(f"{name} is {tuple(tensor.shape)}; it must be {wanted[name]}", name=name)
        del wanted[name]
        _place(model, name, tensor, dtype, halves)
    if wanted:
        raise MissingTensor(
            f"{next(iter(wanted))} is missing, and {len(wanted) - 1} more", name=next(iter(wanted))
        )
    _join_banks(model, halves, dtype)
    if model.vision_tower is not None:
        model.vision_tower.blocks = pack_blocks(model.vision_tower.blocks)
    _fuse(model)
    return model.eval().requires_grad_(False)


def _place(
    model: Ernie, name: str, tensor: Stored, dtype: torch.dtype, halves: dict[str, TrellisBank]
) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(tensor, TrellisBank):
        halves[name] = tensor
    elif isinstance(tensor, IntTensor) and isinstance(module, Embedding) and _fits(tensor):
        _replace(model, path, PackedEmbedding(IntWeight(tensor), dtype))
    elif isinstance(module, Linear) and leaf == "weight" and not isinstance(tensor, Tensor) and _fits(tensor):
        weight = TrellisWeight(tensor) if isinstance(tensor, TrellisTensor) else IntWeight(tensor)
        _replace(model, path, PackedLinear(weight, module.bias))
    else:
        _set_plain(module, leaf, tensor, dtype)


def _fits(tensor: TrellisTensor | IntTensor) -> bool:
    return len(tensor.shape) == 2 and hadamard.block_size(tensor.shape[-1]) >= NATIVE_BLOCK


def _join_banks(model: Ernie, halves: dict[str, TrellisBank], dtype: torch.dtype) -> None:
    """Both halves of a bank are packed, or neither: where only one could be, it is unpacked."""
    for name, tensor in halves.items():
        path, _, leaf = name.rpartition(".")
        other = halves.get(f"{path}.{'down' if leaf == 'gate_up' else 'gate_up'}")
        module = model.get_submodule(path)
        if other is None:
            _set_plain(module, leaf, tensor, dtype)
        elif leaf == "gate_up":
            assert isinstance(module, ExpertBank)
            _replace(model, path, PackedExperts(module.router, TrellisWeight(tensor), TrellisWeight(other)))


def _fuse(model: Ernie) -> None:
    """Modules all of whose matrices are trellis codes without bias become one call; the decoder too."""
    for path, module in list(model.decoder.named_modules()):
        full = f"decoder.{path}"
        if isinstance(module, Attention):
            if weights := _weights(module.q, module.k, module.v, module.o):
                _replace(model, full, PackedAttention(module, *weights))
        elif isinstance(module, MLP):
            if weights := _weights(module.gate, module.up, module.down):
                _replace(model, full, PackedMLP(module, *weights))
        elif isinstance(module, RMSNorm):
            _replace(model, full, PackedNorm(module))
    if layers := fusible(model.decoder, model.config):
        model.decoder = PackedDecoder(model.decoder, layers)


def unfuse(model: Ernie) -> None:
    """Undoes what `build_packed` joined: every matrix is a module again, as training and adapters want it."""
    if isinstance(model.decoder, PackedDecoder):
        (model.decoder,) = model.decoder.plain
    for path, module in list(model.decoder.named_modules()):
        if isinstance(module, PackedAttention | PackedMLP | PackedNorm):
            (plain,) = module.plain
            _replace(model, f"decoder.{path}", plain)


def _weights(*modules: nn.Module) -> list[TrellisWeight] | None:
    weights = [
        m.packed
        for m in modules
        if isinstance(m, PackedLinear) and m.bias is None and isinstance(m.packed, TrellisWeight)
    ]
    return weights if len(weights) == len(modules) else None


def _set_plain(module: nn.Module, leaf: str, tensor: Stored, dtype: torch.dtype) -> None:
    value = tensor if isinstance(tensor, Tensor) else torch.from_numpy(tensor.decode())
    kept = torch.float32 if isinstance(module, Router) else dtype
    setattr(module, leaf, nn.Parameter(value.to(kept), requires_grad=False))


def _replace(model: Ernie, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
