"""The modules of a quantized model: called like `Linear`, `Embedding`, `ExpertBank`, packed inside.

`build_packed` makes a model from stored tensors without ever unpacking them: weights that a kernel can read
in place stay memory-mapped. Shapes no kernel takes (a patch of 588, a bank of integers) are unpacked instead.
A fact easily missed: packed weights are no parameters, so `state_dict` shows only what stayed plain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from duomo import kernels
from duomo.errors import MissingTensor, ShapeMismatch, UnexpectedTensor
from duomo.kernels.reference.packed import unrotate
from duomo.kernels.weights import NATIVE_BLOCK, Int8Weight, PackedWeight, TrellisWeight
from duomo.model.attention import Attention
from duomo.model.config import ModelConfig
from duomo.model.ernie import Embedding, Ernie
from duomo.model.experts import MLP, ExpertBank, Router, note_choice
from duomo.model.inputs import Batch, KVCache
from duomo.model.layers import Linear, RMSNorm
from duomo.model.packed_vision import pack as pack_blocks
from duomo.model.rope import Rotation
from duomo.trellis import IntTensor, TrellisBank, TrellisTensor, hadamard

Stored = TrellisTensor | TrellisBank | IntTensor | Tensor


class PackedLinear(nn.Module):
    """y = x W^T + b, by int8 activations."""

    def __init__(self, weight: PackedWeight, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.packed = weight
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        y = kernels.packed_linear(x, self.packed)
        return y if self.bias is None else y + self.bias


class PackedEmbedding(nn.Module):
    """Rows of int8, rotated: looked up and turned back, or the head. Rows come out in `dtype`."""

    def __init__(self, weight: Int8Weight, dtype: torch.dtype) -> None:
        super().__init__()
        self.packed = weight
        self.dtype = dtype
        self._levels = torch.from_numpy(weight.stored.levels)
        self._scale = torch.from_numpy(weight.stored.row_scale)

    def forward(self, ids_T: Tensor) -> Tensor:
        rotated = self._levels[ids_T].float() * self._scale[ids_T].float()[..., None]
        return unrotate(rotated, self.packed.signs, self.packed.block).to(self.dtype)

    def unembed(self, hidden_TD: Tensor) -> Tensor:
        return kernels.packed_linear(hidden_TD, self.packed)


class PackedExperts(nn.Module):
    """A bank whose experts stay packed; the router is fp32 as ever."""

    def __init__(self, router: Router, gate_up: TrellisWeight, down: TrellisWeight) -> None:
        super().__init__()
        self.router = router
        self.gate_up = gate_up
        self.down = down
        self.listener: Callable[[Tensor], None] | None = None  # hears the chosen ids [T, K]

    def forward(
        self, hidden_TD: Tensor, chosen_TK: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        routing = self.route(hidden_TD)
        if self.listener is not None:
            self.listener(routing.expert_ids_TK)
        note_choice(routing.expert_ids_TK, chosen_TK, rows)
        chosen = (routing.expert_ids_TK, routing.weights_TK)
        return kernels.packed_experts(hidden_TD, *chosen, self.gate_up, self.down)

    def route(self, hidden_TD: Tensor) -> kernels.Routing:
        """What the router says alone; nobody hears of it."""
        router = self.router
        return kernels.packed_route(hidden_TD, router.weight, router.bias, router.num_chosen, router.norm_min)


class PackedMLP(nn.Module):
    """Dense layers and shared experts: one native call."""

    def __init__(self, gate: TrellisWeight, up: TrellisWeight, down: TrellisWeight) -> None:
        super().__init__()
        self.weights = (gate, up, down)

    def forward(
        self, hidden_TD: Tensor, batch: Batch | None = None, chosen_TK: Tensor | None = None
    ) -> Tensor:
        return kernels.packed_mlp(hidden_TD, *self.weights)


class PackedAttention(nn.Module):
    """Queries, keys and values by one native call, rotated positions included."""

    def __init__(self, q: TrellisWeight, k: TrellisWeight, v: TrellisWeight, o: TrellisWeight) -> None:
        super().__init__()
        self.weights = (q, k, v)
        self.out = o

    def forward(
        self, hidden_TD: Tensor, rotation: Rotation, layer_index: int, batch: Batch, cache: KVCache
    ) -> Tensor:
        query, key, value = kernels.packed_qkv(hidden_TD, *self.weights, *rotation)
        out_TNH = cache.attend(layer_index, query, key, value, batch)
        return kernels.packed_linear(out_TNH.flatten(-2), self.out)


class PackedNorm(nn.Module):
    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.weight = norm.weight
        self.eps = norm.eps

    def forward(self, x: Tensor) -> Tensor:
        return kernels.packed_rmsnorm(x, self.weight, self.eps)


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
    return model.eval().requires_grad_(False)


def _place(
    model: Ernie, name: str, tensor: Stored, dtype: torch.dtype, halves: dict[str, TrellisBank]
) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(tensor, TrellisBank):
        halves[name] = tensor
    elif isinstance(tensor, IntTensor) and isinstance(module, Embedding) and _fits(tensor):
        _replace(model, path, PackedEmbedding(Int8Weight(tensor), dtype))
    elif isinstance(module, Linear) and leaf == "weight" and not isinstance(tensor, Tensor) and _fits(tensor):
        weight = TrellisWeight(tensor) if isinstance(tensor, TrellisTensor) else Int8Weight(tensor)
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
    """Modules all of whose matrices are trellis-coded and without bias become one call each."""
    for path, module in list(model.decoder.named_modules()):
        full = f"decoder.{path}"
        if isinstance(module, Attention):
            if weights := _weights(module.q, module.k, module.v, module.o):
                _replace(model, full, PackedAttention(*weights))
        elif isinstance(module, MLP):
            if weights := _weights(module.gate, module.up, module.down):
                _replace(model, full, PackedMLP(*weights))
        elif isinstance(module, RMSNorm):
            _replace(model, full, PackedNorm(module))


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
