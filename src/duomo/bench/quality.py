"""What quantization costs a real language model: SmolLM2, calibrated on one corpus, judged on another.

    python -m duomo.bench.quality down --wheel FOLDER     # only ffn_down, against ggml's quantizers
    python -m duomo.bench.quality mixture                 # ERNIE's structure, all FFN weights at 2 bits
    python -m duomo.bench.quality activations             # int8 activations before exact weights

KL is KL(source || quantized) in nats over the second half of windows of 512 tokens of `foldoc`; calibration
is `handbook`. Every method quantizes the same tensors of the same model; the rest of it stays as it was. With
`--json FILE` rows are written as they are found, and rows already there are not measured again. A row takes
one to three minutes of one core.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from duomo.bench.ggml import BITS, Ggml
from duomo.bench.judged import Judge, Prompts, final_states, kept, second_moments, windows
from duomo.bench.methods import Method, ablations, ggml, scalar, trellis
from duomo.checkpoints import save_model
from duomo.checkpoints.smollm2 import build_smollm2
from duomo.checkpoints.stream import load_dequantized
from duomo.kernels.reference import quantize_activations
from duomo.model import Ernie
from duomo.model.layers import Linear
from duomo.processing.prompt import Prompt
from duomo.quant import quantize
from duomo.quant.calibration import Recorder
from duomo.quant.hessian import rotate
from duomo.quant.plan import BitPlan, Kind
from duomo.trellis import LCC2_10, LCC2_12, LCC2_14, hadamard

DOWN = "mlp.down"
OURS = 2.0104  # bits a weight of 1536 inputs, the row's scale counted
SEED = 5


def measure_down(given: argparse.Namespace) -> None:
    """`ffn_down` of every layer by each method, the rest of the model untouched."""
    model = build_smollm2(mixture=False)
    judge = Judge(model, "dense", windows("foldoc", given.judged_tokens), given.json)
    prompts = windows("handbook", given.calibration_tokens)
    hessians = kept("dense-down", prompts, lambda: second_moments(model, prompts, DOWN))
    weights = torch.stack([model.get_parameter(f"{name}.weight") for name in hessians])
    moments = torch.stack(list(hessians.values()))
    methods = {"LCC2 L=12": (OURS, trellis(LCC2_12, given.damping))}
    if given.wheel:
        library = Ggml(given.wheel)
        methods |= {f"ggml {kind} + imatrix": (BITS[kind], ggml(library, kind)) for kind in BITS}
    methods |= {title: (OURS, method) for title, method in ablations(given.damping).items()}
    methods["L=12, damping 0.01"] = (OURS, trellis(LCC2_12, 0.01))

    def build(method: Method) -> Ernie:
        for name, decoded in zip(hessians, method(weights, moments), strict=True):
            model.get_parameter(f"{name}.weight").data.copy_(decoded)
        return model

    for title, (bits, method) in methods.items():
        judge.show(title, bits, lambda method=method: build(method))  # type: ignore[misc]


class FfnOnly(BitPlan):
    """Routed and shared FFN weights at 2 bits, the rest as it was."""

    def kind(self, name: str) -> Kind:
        is_ffn = ".mlp.shared." in name or name.endswith((".text.gate_up", ".text.down"))
        return Kind.TWO if is_ffn else Kind.PLAIN


def measure_mixture(given: argparse.Namespace) -> None:
    """All routed and shared FFN weights at 2 bits: our pipeline, and scalar GPTQ with the same rotation."""
    calibration = windows("handbook", given.calibration_tokens)
    model = build_smollm2()
    judge = Judge(model, "mixture", windows("foldoc", given.judged_tokens), given.json)

    def by_pipeline() -> Ernie:
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder) / "source", Path(folder) / "target"
            save_model(model, source, torch.float32)
            quantize(source, target, FfnOnly(), [Prompt(ids) for ids in calibration])
            return load_dequantized(target, torch.float32)

    def by_one_pass(method: Method) -> Ernie:
        hessians = kept("mixture-ffn", calibration, lambda: _ffn_moments(model, calibration))
        return _one_pass(hessians, method)

    bits = mean_bits(model, FfnOnly())
    judge.show("LCC2 L=12, the pipeline", bits, by_pipeline)
    for title, method in {
        "scalar GPTQ, rotation": scalar(given.damping),
        "LCC2 L=12": trellis(LCC2_12, given.damping),
        "LCC2 L=10": trellis(LCC2_10, given.damping),
        "LCC2 L=14": trellis(LCC2_14, given.damping),
        "L=12, no feedback": trellis(LCC2_12, given.damping, has_feedback=False),
        "L=12, no rotation": trellis(LCC2_12, given.damping, seed=None),
    }.items():
        judge.show(title, bits, lambda method=method: by_one_pass(method))  # type: ignore[misc]


def mean_bits(model: Ernie, plan: BitPlan) -> float:
    """Of the weights at 2 bits, their scales counted."""
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if plan.kind(n) is Kind.TWO}
    num_bytes = sum(plan.num_bytes(name, shape) for name, shape in shapes.items())
    return 8 * num_bytes / sum(torch.Size(shape).numel() for shape in shapes.values())


def _one_pass(hessians: Mapping[str, Tensor], method: Method) -> Ernie:
    """Every matrix against the source's own inputs: no second stream, no damping chosen."""
    other = build_smollm2()
    for name, matrices in hessians.items():
        parameter = other.get_parameter(name).data
        weights = parameter if parameter.dim() == 3 else parameter[None]
        weights.copy_(method(weights.clone(), matrices))
    return other


def _ffn_moments(model: Ernie, prompts: Prompts) -> dict[str, Tensor]:
    """[E, K, K] of each parameter at 2 bits: each expert's own inputs, E = 1 for a plain matrix."""
    found = {}
    with Recorder(model) as recorder:
        final_states(model, prompts)
    for name, _ in model.named_parameters():
        if FfnOnly().kind(name) is Kind.TWO:
            home, _, last = name.rpartition(".")
            if home in recorder.linears:
                found[name] = recorder.linears[home][0].matrix[None]
            else:
                grams = recorder.banks[home][0]
                own = grams.gate_up if last == "gate_up" else grams.down
                found[name] = torch.stack([gram.matrix for gram in own])
    return found


def measure_activations(given: argparse.Namespace) -> None:
    """Every linear of every layer reads rounded inputs; its weights are exact."""
    model = build_smollm2(mixture=False)
    judge = Judge(model, "dense", windows("foldoc", given.judged_tokens), given.json)
    roundings: Mapping[str, Callable[[Tensor], Tensor]] = {
        "int8, a scale a block, rotated (ours)": lambda x: _rounded(x, SEED, None),
        "int8, a scale a block, not rotated": lambda x: _rounded(x, None, None),
        "int8, a scale a token, rotated": lambda x: _rounded(x, SEED, x.shape[-1]),
        "int8, a scale a token, not rotated": lambda x: _rounded(x, None, x.shape[-1]),
        "bf16": lambda x: x.bfloat16().float(),
    }
    for title, rounding in roundings.items():
        handles = [
            part.register_forward_pre_hook(lambda _, inputs, own=rounding: (own(inputs[0]), *inputs[1:]))
            for part in model.decoder.modules()
            if isinstance(part, Linear)
        ]
        judge.show(title, 16.0 if title == "bf16" else 8.0, lambda: model)
        for handle in handles:
            handle.remove()


def _rounded(x: Tensor, seed: int | None, block: int | None) -> Tensor:
    """x after int8 by the kernels' own rule, back in the basis it came from."""
    width = x.shape[-1]
    turned = rotate(x.float(), seed)
    q, scale = quantize_activations(turned, None, block or hadamard.block_size(width))
    back: Tensor = (q.float().unflatten(-1, (scale.shape[-1], -1)) * scale[..., None]).flatten(-2)
    return back if seed is None else back @ rotate(torch.eye(width), seed).T


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["down", "mixture", "activations"])
    parser.add_argument("--wheel", type=Path, help="the unzipped ik-llama-cpp-python wheel")
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--judged-tokens", type=int, default=8192)
    parser.add_argument("--damping", type=float, default=0.15)
    parser.add_argument("--json", type=Path, help="write rows here; rows already in it are kept")
    given = parser.parse_args()
    {"down": measure_down, "mixture": measure_mixture, "activations": measure_activations}[given.what](given)


if __name__ == "__main__":
    main()
