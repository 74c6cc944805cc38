"""ggml's own quantizers on any matrix, through the shared library of a published wheel: the peer to beat.

`pip download --no-deps ik-llama-cpp-python==0.1.5`, unzip it, and give the folder: `libggml.so` and its
OpenMP are inside. Called by ctypes in a process of its own choosing; nothing of it is part of duomo.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import numpy.typing as npt

from duomo.errors import ConfigError

F32 = npt.NDArray[np.float32]
TYPES = {"q2_K": 10, "iq2_xxs": 16, "iq2_s": 22, "iq2_kt": 153}
BITS = {"q2_K": 2.625, "iq2_xxs": 2.0625, "iq2_s": 2.5625, "iq2_kt": 2.125}


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class Ggml:
    """Quantizes and opens again: what a GGUF file of that type would hold."""

    def __init__(self, wheel: Path) -> None:
        libraries = sorted((wheel / "ik_llama_cpp_python.libs").glob("*.so*"))
        if not libraries:
            raise ConfigError(f"{wheel} is not the unzipped ik-llama-cpp-python==0.1.5 wheel")
        for library in libraries:  # OpenMP first: ggml finds it by name once it is loaded
            if "gomp" in library.name:
                ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        (path,) = (library for library in libraries if "libggml" in library.name)
        self._library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        self._library.ggml_quantize_chunk.restype = ctypes.c_size_t
        # Fills ggml's table of float16 values; without it every scale that is read back is zero.
        self._library.ggml_init.restype = ctypes.c_void_p
        self._library.ggml_init.argtypes = [_InitParams]
        self._library.ggml_init(_InitParams(1 << 20, None, False))

    def round_trip(self, weight: F32, kind: str, importance: F32) -> F32:
        """[N, K] as `kind` stores it, quantized with the importance [K] of each input."""
        rows, columns = weight.shape
        if columns % 256:
            raise ConfigError(f"ggml's {kind} needs rows of a multiple of 256, not {columns}")
        source, importance = (
            np.ascontiguousarray(weight, np.float32),
            np.ascontiguousarray(importance, np.float32),
        )
        packed = np.zeros(rows * columns * 2, np.uint8)
        pointer = ctypes.POINTER(ctypes.c_float)
        size = self._library.ggml_quantize_chunk(
            ctypes.c_int(TYPES[kind]),
            source.ctypes.data_as(pointer),
            packed.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_int64(0),
            ctypes.c_int64(rows),
            ctypes.c_int64(columns),
            importance.ctypes.data_as(pointer),
        )
        out = np.empty_like(source)
        opener = getattr(self._library, f"dequantize_row_{kind}")
        opener.restype = None
        row_bytes = size // rows
        for row in range(rows):
            opener(
                ctypes.c_void_p(packed.ctypes.data + row * row_bytes),
                out[row].ctypes.data_as(pointer),
                ctypes.c_int64(columns),
            )
        return out
