"""What quantization costs a real language model: SmolLM2, calibrated on one corpus, judged on another.

    python -m duomo.bench.quality down --wheel FOLDER     # only ffn_down, against ggml's quantizers
    python -m duomo.bench.quality mixture                 # ERNIE's structure, all FFN weights at 2 bits

KL is KL(source || quantized) in nats over the second half of windows of 512 tokens of `foldoc`; calibration
is `handbook`. Every method quantizes the same tensors of the same model; the rest of it stays as it was.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from duomo.bench.corpora import read_corpus
from duomo.bench.ggml import BITS, Ggml
from duomo.checkpoints import save_model
from duomo.checkpoints.smollm2 import build_smollm2, build_tokenizer
from duomo.checkpoints.stream import load_dequantized
from duomo.model import Ernie, PackedCausal, build_batch
from duomo.model.layers import Linear
from duomo.processing.prompt import Prompt
from duomo.quant import quantize
from duomo.quant.calibration import Recorder
from duomo.quant.feedback import feed_back, inverse_factor, quantize_matrices
from duomo.quant.hessian import rotate, rotate_hessian
from duomo.quant.judge import compare_logits, summarize
from duomo.quant.plan import BitPlan, Kind
from duomo.trellis import LCC2_10, LCC2_12, LCC2_14
from duomo.trellis.code import TrellisCode

WINDOW = 512
Method = Callable[[Tensor, Tensor], Tensor]  # weight [N, K], Hessian [K, K] -> decoded weight


def windows(name: str, num_tokens: int) -> list[list[int]]:
    ids = build_tokenizer().encode(read_corpus(name)[: 8 * num_tokens]).ids
    return [ids[i : i + WINDOW] for i in range(0, num_tokens, WINDOW)]


@torch.inference_mode()
def run(model: Ernie, prompts: list[list[int]]) -> list[Tensor]:
    """Logits of the second half of each window."""
    found = []
    for prompt in prompts:
        hidden = model(build_batch([prompt], model.config), PackedCausal())
        found.append(model.unembed(hidden[WINDOW // 2 : -1]))
    return found


def judge(name: str, reference: list[Tensor], model: Ernie, prompts: list[list[int]], bits: float) -> Tensor:
    pairs = [compare_logits(a, b) for a, b in zip(reference, run(model, prompts), strict=True)]
    kl, same = torch.cat([p[0] for p in pairs]), torch.cat([p[1] for p in pairs])
    row = summarize(kl, same)
    print(
        f"{name:28s} {bits:6.3f} bits  KL {row['kl_mean']:.4f} ± {row['kl_standard_error']:.4f}"
        f"  top-1 {100 * row['top1_same']:.1f} %",
        flush=True,
    )
    return kl


def trellis(code: TrellisCode, damping: float, has_feedback: bool = True, seed: int | None = 5) -> Method:
    def method(weight: Tensor, hessian: Tensor) -> Tensor:
        own = quantize_matrices(weight[None], hessian[None], code, seed, damping, 2, has_feedback)
        return torch.from_numpy(own[0].decode())

    return method


def scalar(damping: float, has_feedback: bool = True, seed: int = 5) -> Method:
    """Rotation and the four Lloyd-Max levels of a Gaussian, with the same feedback, column by column."""
    levels = torch.tensor([-1.5104, -0.4528, 0.4528, 1.5104])

    def method(weight: Tensor, hessian: Tensor) -> Tensor:
        turned = rotate(weight, seed)[None].contiguous()
        scale = turned.square().mean(-1, keepdim=True).sqrt()
        upper = inverse_factor(rotate_hessian(hessian, seed)[None], damping)
        if not has_feedback:
            upper = torch.eye(weight.shape[1])[None]

        def nearest(first: int, last: int, targets: Tensor) -> Tensor:
            return levels[((targets / scale)[..., None] - levels).abs().argmin(-1)] * scale

        feed_back(turned, upper, 1, nearest)
        signs_back = rotate(torch.eye(weight.shape[1]), seed)
        return turned[0] @ signs_back.T

    return method


def ggml(library: Ggml, kind: str) -> Method:
    def method(weight: Tensor, hessian: Tensor) -> Tensor:
        return torch.from_numpy(library.round_trip(weight.numpy(), kind, hessian.diagonal().numpy()))

    return method


def measure_down(library: Ggml | None, calibration_tokens: int, judged_tokens: int, damping: float) -> None:
    model = build_smollm2(mixture=False)
    prompts = windows("foldoc", judged_tokens)
    reference = run(model, prompts)
    with Recorder(model) as recorder:
        run(model, windows("handbook", calibration_tokens))
    downs = {name: part for name, part in model.named_modules() if name.endswith("mlp.down")}
    kept = {name: part.weight.clone() for name, part in downs.items() if isinstance(part, Linear)}
    methods: dict[str, tuple[float, Method]] = {
        "LCC2 L=10": (2.0104, trellis(LCC2_10, damping)),
        "LCC2 L=12": (2.0104, trellis(LCC2_12, damping)),
        "LCC2 L=14": (2.0104, trellis(LCC2_14, damping)),
        "L=12, no feedback": (2.0104, trellis(LCC2_12, damping, has_feedback=False)),
        "L=12, no rotation": (2.0104, trellis(LCC2_12, damping, seed=None)),
        "L=12, damping 0.01": (2.0104, trellis(LCC2_12, 0.01)),
        "scalar Lloyd-Max + feedback": (2.0104, scalar(damping)),
    }
    if library:
        methods |= {f"ggml {kind} + imatrix": (BITS[kind], ggml(library, kind)) for kind in BITS}
    for title, (bits, method) in methods.items():
        for name, weight in kept.items():
            hessian = recorder.linears[name][0].matrix
            model.get_parameter(f"{name}.weight").data.copy_(method(weight, hessian))
        judge(title, reference, model, prompts, bits)


class FfnOnly(BitPlan):
    """Routed and shared FFN weights at 2 bits, the rest as it was."""

    def kind(self, name: str) -> Kind:
        is_ffn = ".mlp.shared." in name or name.endswith((".text.gate_up", ".text.down"))
        return Kind.TWO if is_ffn else Kind.PLAIN


def measure_mixture(calibration_tokens: int, judged_tokens: int, damping: float) -> None:
    """All routed and shared FFN weights at 2 bits: our pipeline, and scalar GPTQ with the same rotation."""
    prompts, calibration = windows("foldoc", judged_tokens), windows("handbook", calibration_tokens)
    model = build_smollm2()
    reference = run(model, prompts)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "source", Path(folder) / "target"
        save_model(model, source, torch.float32)
        quantize(source, target, FfnOnly(), [Prompt(ids) for ids in calibration], num_threads=2)
        judge("LCC2 L=12, pipeline", reference, load_dequantized(target, torch.float32), prompts, 2.03)
    with Recorder(model) as recorder:
        run(model, calibration)
    for title, method in (
        ("LCC2 L=12, one pass", trellis(LCC2_12, damping)),
        ("scalar GPTQ + rotation", scalar(damping)),
    ):
        other = build_smollm2()
        for name, parameter in other.named_parameters():
            if FfnOnly().kind(name) is Kind.TWO:
                weights = parameter.data if parameter.dim() == 3 else parameter.data[None]
                for weight, hessian in zip(weights, _hessians(recorder, name), strict=True):
                    weight.copy_(method(weight.clone(), hessian))
        judge(title, reference, other, prompts, 2.03)


def _hessians(recorder: Recorder, name: str) -> list[Tensor]:
    """Of the fitted tokens: each expert's own, or the one of a plain matrix."""
    home, _, last = name.rpartition(".")
    if home in recorder.linears:
        return [recorder.linears[home][0].matrix]
    grams = recorder.banks[home][0]
    return [gram.matrix for gram in (grams.gate_up if last == "gate_up" else grams.down)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["down", "mixture"])
    parser.add_argument("--wheel", type=Path, help="the unzipped ik-llama-cpp-python wheel")
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--judged-tokens", type=int, default=8192)
    parser.add_argument("--damping", type=float, default=0.15)
    given = parser.parse_args()
    if given.what == "down":
        library = Ggml(given.wheel) if given.wheel else None
        measure_down(library, given.calibration_tokens, given.judged_tokens, given.damping)
    else:
        measure_mixture(given.calibration_tokens, given.judged_tokens, given.damping)


if __name__ == "__main__":
    main()
