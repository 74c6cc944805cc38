"""One expert layer of the 28B really quantized, with feedback: `python -m duomo.bench.layer`.

Weights are seeded normals (no package carries the trained ones); inputs are correlated normals, one draw to
fit and one to judge. What is real: shapes, every step of the encoder, the file, the seconds. Those count the
feedback's products and factorizations too, so a weight costs more than the encoder alone
(`duomo.bench.distortion`); walking the calibration through the layer is not in them. Bytes and errors do not
depend on what else the machine does; seconds do, and processor seconds much less.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from duomo.checkpoints.quantized import Stored, write_quantized
from duomo.model import preset
from duomo.quant.feedback import output_error, quantize_bank
from duomo.trellis import LCC2_12, TrellisBank, TrellisTensor

EXPERTS_AT_ONCE = 8


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
    parser.add_argument("--sweeps", type=int, default=2, help="over the columns; `duomo quantize` makes 2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    config = preset("vl-28b-a3b")
    assert config.text_experts is not None and config.vision_experts is not None
    stored: dict[str, Stored] = {}
    errors: dict[str, list[float]] = {}
    seconds, cpu_seconds, num_weights = 0.0, 0.0, 0
    for bank, size in (("text", config.text_experts), ("vision", config.vision_experts)):
        width, inner = config.hidden_size, size.expert_size
        for part, rows, columns in (("gate_up", 2 * inner, width), ("down", width, inner)):
            fitted, judge = grams(columns, 4 * columns)
            generator, tensors = torch.Generator().manual_seed(rows), list[TrellisTensor]()
            for first in range(0, given.experts, EXPERTS_AT_ONCE):
                count = min(EXPERTS_AT_ONCE, given.experts - first)
                weights = torch.randn(count, rows, columns, generator=generator) * config.initializer_range
                started, cpu_started = time.perf_counter(), time.process_time()
                own = quantize_bank(
                    weights, [fitted] * count, LCC2_12, 1, 0.1, given.threads, sweeps=given.sweeps
                )
                seconds += time.perf_counter() - started
                cpu_seconds += time.process_time() - cpu_started
                errors.setdefault(f"{bank}.{part}", []).extend(
                    output_error(weight, torch.from_numpy(tensor.decode()), judge)
                    for weight, tensor in zip(weights, own, strict=True)
                )
                tensors += own
                num_weights += weights.numel()
            stored[f"decoder.layers.1.mlp.{bank}.{part}"] = TrellisBank.of(tensors)
            print(
                f"{bank}.{part}: {given.experts} x {rows} x {columns}, "
                f"unseen error {mean(errors[f'{bank}.{part}']):.4f}, {seconds:.0f} s so far",
                flush=True,
            )
    with tempfile.TemporaryDirectory() as folder:
        num_bytes = write_quantized(Path(folder) / "layer.safetensors", stored)
    peak_bytes = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = {
        "experts": given.experts,
        "sweeps": given.sweeps,
        "threads": given.threads,
        "weights": num_weights,
        "seconds": round(seconds, 1),
        "us_a_weight_and_thread": round(1e6 * seconds * given.threads / num_weights, 4),
        "cpu_us_a_weight": round(1e6 * cpu_seconds / num_weights, 4),
        "bytes": num_bytes,
        "bits_a_weight": round(8 * num_bytes / num_weights, 4),
        "peak_bytes": peak_bytes,
        "unseen_error": {part: {"mean": mean(own), "worst": max(own)} for part, own in errors.items()},
    }
    print(json.dumps(result, indent=1))
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
