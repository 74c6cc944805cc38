"""One expert layer of the 28B really quantized, with feedback: `python -m duomo.bench.layer`.

Weights are seeded normals (no package carries the trained ones); inputs are correlated normals, one draw to
fit and one to judge. What is real: shapes, every step of the encoder, the file, the seconds. A weight's share
of the factorizations counts too: so it costs more than the encoder alone (`duomo.bench.distortion`).
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from duomo.checkpoints.quantized import Stored, write_quantized
from duomo.model import preset
from duomo.quant.feedback import output_error, quantize_matrices
from duomo.trellis import LCC2_12, TrellisBank, TrellisTensor


def grams(size: int, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Fitted and judged second moments of inputs whose spectrum falls a hundredfold."""
    generator = torch.Generator().manual_seed(size)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator))[0] * torch.logspace(0, -1, size)
    draws = (torch.randn(num_tokens, size, generator=generator) @ basis.T for _ in range(2))
    first, second = (x.T @ x / num_tokens for x in draws)
    return first, second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=64, help="of each bank; 64 is the whole layer")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    config = preset("vl-28b-a3b")
    assert config.text_experts is not None and config.vision_experts is not None
    stored: dict[str, Stored] = {}
    started, num_weights = time.perf_counter(), 0
    for bank, size in (("text", config.text_experts), ("vision", config.vision_experts)):
        width, inner = config.hidden_size, size.expert_size
        for part, rows, columns in (("gate_up", 2 * inner, width), ("down", width, inner)):
            fitted, judge = grams(columns, 4 * columns)
            generator, tensors = torch.Generator().manual_seed(rows), list[TrellisTensor]()
            for first in range(0, given.experts, 4):
                count = min(4, given.experts - first)
                weights = torch.randn(count, rows, columns, generator=generator) * config.initializer_range
                own = quantize_matrices(
                    weights, fitted.expand(count, -1, -1), LCC2_12, 1, 0.1, given.threads, sweeps=1
                )
                if not first:
                    error = output_error(weights[0], torch.from_numpy(own[0].decode()), judge)
                tensors += own
                num_weights += weights.numel()
            stored[f"decoder.layers.1.mlp.{bank}.{part}"] = TrellisBank.of(tensors)
            print(
                f"{bank}.{part}: {given.experts} x {rows} x {columns}, unseen error {error:.4f}", flush=True
            )
    seconds = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        num_bytes = write_quantized(Path(folder) / "layer.safetensors", stored)
    peak_bytes = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"{num_weights:,} weights in {seconds:.1f} s on {given.threads} threads, "
        f"{1e6 * seconds * given.threads / num_weights:.3f} us a weight and thread; "
        f"{num_bytes:,} bytes, {8 * num_bytes / num_weights:.4f} bits a weight, everything counted; "
        f"at most {peak_bytes / 1e9:.2f} GB resident"
    )


if __name__ == "__main__":
    main()
