"""The trellis room: what the bits of a quantized weight mean, and how to find good ones. numpy only."""

from duomo.trellis.code import LCC2_10, LCC2_12, LCC2_14, LCC4_12, PRESETS, TrellisCode, preset
from duomo.trellis.encoder import encode, encode_matrix
from duomo.trellis.integer import IntTensor, encode_int, int_tensor
from duomo.trellis.tensor import TrellisBank, TrellisTensor

__all__ = [
    "LCC2_10",
    "LCC2_12",
    "LCC2_14",
    "LCC4_12",
    "PRESETS",
    "IntTensor",
    "TrellisBank",
    "TrellisCode",
    "TrellisTensor",
    "encode",
    "encode_int",
    "encode_matrix",
    "int_tensor",
    "preset",
]
