"""Angles of the rotary positions: three-dimensional in the decoder, two-dimensional in the vision tower.

In the decoder the pairs of a head are dealt h, w, h, w, ..., then all of t, which so has the lowest
frequencies. Text stands at t = h = w, where this is the ordinary one-dimensional rotation.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from duomo.model.config import ModelConfig, VisionConfig


class Rotation(NamedTuple):
    """cos and sin of every angle, fp32, one row a token and one column a pair."""

    cos: Tensor
    sin: Tensor


def decoder_rotation(positions_3T: Tensor, config: ModelConfig) -> Rotation:
    """Angles [T, H/2] from positions (t, h, w); spec section 3.3."""
    angles = positions_3T[_axes(config, positions_3T.device)].T.float() * _frequencies(
        config, positions_3T.device
    )
    return Rotation(angles.cos(), angles.sin())


class RotationTable:
    """`decoder_rotation` on the CPU out of a table of every position so far: a step then costs two gathers.

    A position's angles are the same bits either way. The table doubles when a position lies beyond it.
    """

    def __init__(self, config: ModelConfig) -> None:
        cpu = torch.device("cpu")
        self._frequency = _frequencies(config, cpu)
        self._axis: npt.NDArray[np.int64] = _axes(config, cpu).numpy()
        self._num_pairs = len(self._axis)
        self._pair = np.arange(self._num_pairs)
        self._grow(1024)

    def addresses(self, position: int) -> tuple[int, int, int]:
        """Where cos and sin [P, H/2] lie, and P, more than `position`; they move as it grows."""
        self._reach(position)
        return self._addresses

    def rotation(self, positions_3T: Tensor) -> Rotation:
        positions = positions_3T.numpy()
        self._reach(int(positions.max(initial=0)))
        first_T = positions[0]
        if (positions == first_T).all():  # text alone: whole rows of the table
            cos, sin = self._cos.take(first_T, axis=0), self._sin.take(first_T, axis=0)
        else:
            index_TP = positions[self._axis].T * self._num_pairs + self._pair
            cos, sin = self._cos.take(index_TP), self._sin.take(index_TP)
        return Rotation(torch.from_numpy(cos), torch.from_numpy(sin))

    def _reach(self, position: int) -> None:
        if position >= self._num_positions:
            self._grow(2 * position)

    def _grow(self, num_positions: int) -> None:
        self._num_positions = num_positions
        angles = torch.arange(num_positions)[:, None].float() * self._frequency
        self._cos: npt.NDArray[np.float32] = angles.cos().numpy()
        self._sin: npt.NDArray[np.float32] = angles.sin().numpy()
        self._addresses = (self._cos.ctypes.data, self._sin.ctypes.data, num_positions)


def _frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    pair = torch.arange(config.head_dim // 2, device=device)
    return config.rope_theta ** (-2.0 * pair.float() / config.head_dim)


def _axes(config: ModelConfig, device: torch.device) -> Tensor:
    """int64 [H/2]: with which of t, h, w a pair turns."""
    pair = torch.arange(config.head_dim // 2, device=device)
    if config.rope_section is None:
        return torch.zeros_like(pair)
    return torch.where(pair < 2 * config.rope_section[0], 1 + pair % 2, 0)


def vision_rotation(rows_P: Tensor, columns_P: Tensor, config: VisionConfig) -> Rotation:
    """Angles [P, H/2]: the first half turns with the row, the second with the column; spec section 4.1."""
    frequency = _vision_frequencies(config, rows_P.device)
    angles = torch.cat((rows_P[:, None] * frequency, columns_P[:, None] * frequency), dim=-1)
    return Rotation(angles.cos(), angles.sin())


class VisionRotationTable:
    """`vision_rotation` on the CPU out of a table of every row or column so far: the same bits."""

    def __init__(self, config: VisionConfig) -> None:
        self._frequency = _vision_frequencies(config, torch.device("cpu"))
        self._grow(64)

    def rotation(self, rows_P: Tensor, columns_P: Tensor) -> Rotation:
        rows, columns = rows_P.numpy(), columns_P.numpy()
        most = int(max(rows.max(initial=0), columns.max(initial=0)))
        if most >= len(self._cos):
            self._grow(2 * most)
        cos, sin = (
            np.concatenate((table.take(rows, axis=0), table.take(columns, axis=0)), axis=1)
            for table in (self._cos, self._sin)
        )
        return Rotation(torch.from_numpy(cos), torch.from_numpy(sin))

    def _grow(self, count: int) -> None:
        angles = torch.arange(count)[:, None] * self._frequency
        self._cos: npt.NDArray[np.float32] = angles.cos().numpy()
        self._sin: npt.NDArray[np.float32] = angles.sin().numpy()


def _vision_frequencies(config: VisionConfig, device: torch.device) -> Tensor:
    half = config.hidden_size // config.num_heads // 2
    pair = torch.arange(0, half, 2, device=device).float()
    return 1.0 / config.rope_theta ** (pair / half)
