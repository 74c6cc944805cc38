"""The trellis room: what the bits of a quantized weight mean, and how to find good ones. numpy only."""

from duomo.trellis.code import LCC2_10, LCC2_12, LCC2_14, LCC4_12, PRESETS, TrellisCode, preset
from duomo.trellis.encoder import encode, encode_matrix
from duomo.trellis.tensor import TrellisTensor

__all__ = [
    "LCC2_10",
    "LCC2_12",
    "LCC2_14",
    "LCC4_12",
    "PRESETS",
    "TrellisCode",
    "TrellisTensor",
    "encode",
    "encode_matrix",
    "preset",
]
