"""What a native twin was made of, and whether all of it still stands where it stood.

A native call asks no module, so a module that takes another's place (an adapter's), a parameter put in
another's place or moved would not be heard. Whoever calls natively looks first; it costs microseconds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Seen:
    """The modules of a part, and with `has_tensors` its parameters, by place and identity."""

    def __init__(self, part: nn.Module, has_tensors: bool) -> None:
        self._modules: list[tuple[dict[str, Any], str, nn.Module]] = []
        self._tensors: list[tuple[dict[str, Any], str, Tensor, int]] = []
        for parent in part.modules():
            for name, module in parent._modules.items():
                if module is not None:
                    self._modules.append((parent._modules, name, module))
            for name, tensor in parent._parameters.items():
                if has_tensors and tensor is not None:
                    self._tensors.append((parent._parameters, name, tensor, tensor.data_ptr()))

    def still_stands(self) -> bool:
        return all(held.get(name) is module for held, name, module in self._modules) and all(
            held.get(name) is tensor and tensor.data_ptr() == address
            for held, name, tensor, address in self._tensors
        )


def is_plain(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Exactly of this class, with parameters the kernels can read where they lie."""
    return type(module) is kind and all(
        parameter.dtype == torch.float32 and parameter.device.type == "cpu" and parameter.is_contiguous()
        for parameter in module.parameters()
    )
