"""Weights as the kernels take them: a trellis-coded matrix or bank, rows of integers, or plain fp32.

Packed ones borrow the arrays of the stored tensor, which may be a memory-mapped file: nothing is copied or
unpacked, and an expert that no token chooses is never read. Each makes its native twin once, on first use.
A fact easily missed: activations share a scale over `block` inputs, which is also the block of the rotation.
"""

from __future__ import annotations

from enum import IntEnum
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from duomo.trellis import IntTensor, TrellisBank, TrellisTensor, hadamard
from duomo.trellis.integer import unpack_six


@lru_cache(maxsize=256)
def _signs(seed: int | None, width: int) -> Tensor | None:
    return None if seed is None else torch.from_numpy(hadamard.signs(seed, width))


class TrellisWeight:
    """E matrices [N, K] of one code and rotation; a single matrix is a bank of one."""

    def __init__(self, stored: TrellisTensor | TrellisBank) -> None:
        self.stored = stored
        self.is_bank = isinstance(stored, TrellisBank)
        self.num_matrices = stored.shape[0] if isinstance(stored, TrellisBank) else 1
        self.rows, self.columns = stored.shape[-2:]
        self.seed = stored.seed
        self.block = hadamard.block_size(self.columns)

    @property
    def signs(self) -> Tensor | None:
        """fp32 [K], or None where the inputs are not rotated."""
        return _signs(self.seed, self.columns)

    def levels(self, index: int = 0) -> Tensor:
        """int8 [N, K] of one matrix, by the reference decoder."""
        tensor = self.stored[index] if isinstance(self.stored, TrellisBank) else self.stored
        return torch.from_numpy(np.ascontiguousarray(tensor.levels()))

    def multiplier(self, index: int = 0) -> Tensor:
        """fp32 [N]: what an integer sum is multiplied by."""
        tensor = self.stored[index] if isinstance(self.stored, TrellisBank) else self.stored
        return torch.from_numpy(tensor.row_multiplier())

    @cached_property
    def native(self) -> Any:
        from duomo import _native

        code = self.stored.code
        return _native.Trellis(
            bits=code.bits,
            code_columns=np.asarray(code.columns, np.uint8),
            codebook=np.asarray(code.codebook, np.int8),
            unit=code.unit,
            codes=np.ascontiguousarray(self.stored.codes),
            row_scale=np.ascontiguousarray(self.stored.row_scale).view(np.uint16),
            count=self.num_matrices,
            rows=self.rows,
            columns=self.columns,
            chain=self.stored.chain,
            block=self.block,
            signs=_sign_array(self.seed, self.columns),
        )


class IntWeight:
    """Levels [N, K] of 8 or 6 bits with one scale a row: embeddings, heads, the vision tower."""

    def __init__(self, stored: IntTensor) -> None:
        assert len(stored.shape) == 2, "an IntWeight is one matrix"
        self.stored = stored
        self.rows, self.columns = stored.shape
        self.seed = stored.seed
        self.block = hadamard.block_size(self.columns)

    @property
    def signs(self) -> Tensor | None:
        return _signs(self.seed, self.columns)

    def levels(self, index: int = 0) -> Tensor:
        """int8 [N, K]; six bits are opened."""
        return torch.from_numpy(np.ascontiguousarray(self.stored.levels()))

    def rows_of(self, ids_T: Tensor) -> Tensor:
        """int8 [..., K]: the levels of some rows. Nothing of the others is read."""
        codes = self._codes[ids_T]
        return codes if self.stored.bits == 8 else torch.from_numpy(unpack_six(codes.numpy()))

    @cached_property
    def _codes(self) -> Tensor:
        return torch.from_numpy(self.stored.codes)

    def multiplier(self, index: int = 0) -> Tensor:
        return torch.from_numpy(self.stored.row_multiplier())

    @cached_property
    def native(self) -> Any:
        from duomo import _native

        return _native.Integers(
            codes=np.ascontiguousarray(self.stored.codes).view(np.uint8),
            row_scale=np.ascontiguousarray(self.stored.row_scale).view(np.uint16),
            bits=self.stored.bits,
            block=self.block,
            signs=_sign_array(self.seed, self.columns),
        )


PackedWeight = TrellisWeight | IntWeight

NATIVE_BLOCK = 16
"""Narrowest block of activations the native kernels take; narrower widths go through the reference."""


def _sign_array(seed: int | None, width: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.zeros(0, np.float32) if seed is None else hadamard.signs(seed, width)


class DenseForm(IntEnum):
    """How a plain matrix is kept; csrc/dense.hpp has the sums of each."""

    BORROWED = 0  # fp32 where it lies: what is written into it is seen
    PANELS = 1  # copied as bf16, half the bytes; multiplied as fp32
    ROUNDED = 2  # the same, and activations are rounded to bf16 before each product


class DenseWeight:
    """A plain fp32 matrix [N, K] with its bias [N] or None, or a bank [E, N, K].

    Panels round the weights to bf16 when the native twin is made: nothing is lost of a bf16 checkpoint.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, form: DenseForm = DenseForm.BORROWED
    ) -> None:
        assert weight.dtype == torch.float32 and weight.is_contiguous(), "a matrix the kernels do not read"
        self.weight, self.bias, self.form = weight, bias, form
        self.rows, self.columns = weight.shape[-2:]

    def __getstate__(self) -> dict[str, Any]:
        """For copies: the native twin is made again."""
        return {name: value for name, value in self.__dict__.items() if name != "native"}

    @cached_property
    def native(self) -> Any:
        from duomo import _native

        bias = None if self.bias is None else self.bias.detach().numpy()
        return _native.Dense(self.weight.detach().numpy(), bias, int(self.form))
