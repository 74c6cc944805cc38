"""What quantization costs a real language model: SmolLM2, calibrated on one corpus, judged on another.

    python -m duomo.bench.quality down --wheel FOLDER     # only ffn_down, against ggml's quantizers
    python -m duomo.bench.quality mixture                 # ERNIE's structure, all FFN weights at 2 bits
    python -m duomo.bench.quality activations             # int8 activations before exact weights

KL is KL(source || quantized) in nats over the second half of windows of 512 tokens of `foldoc`; calibration
is `handbook`. Every method quantizes the same tensors of the same model; the rest of it stays as it was. With
`--json FILE` rows are written as they are found, and rows already there are not measured again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duomo.bench.corpora import read_corpus
from duomo.bench.ggml import BITS, Ggml
from duomo.bench.methods import Method, ablations, ggml, scalar, trellis
from duomo.checkpoints import save_model
from duomo.checkpoints.smollm2 import build_smollm2, build_tokenizer
from duomo.checkpoints.stream import load_dequantized
from duomo.kernels.reference import quantize_activations
from duomo.model import Ernie, PackedCausal, build_batch
from duomo.model.layers import Linear
from duomo.processing.prompt import Prompt
from duomo.quant import quantize
from duomo.quant.calibration import Recorder
from duomo.quant.hessian import rotate
from duomo.quant.judge import compare_logits, summarize
from duomo.quant.plan import BitPlan, Kind
from duomo.trellis import LCC2_12, hadamard

WINDOW = 512
OURS = 2.0104  # bits a weight of 1536 inputs, the row's scale counted
SEED = 5


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


class Judge:
    """Holds the source's logits; prints and keeps a row for every model it is shown."""

    def __init__(self, source: Ernie, prompts: list[list[int]], path: Path | None) -> None:
        self.prompts, self.path = prompts, path
        self.rows: dict[str, Any] = json.loads(path.read_text()) if path and path.exists() else {}
        self.reference = run(source, prompts)

    def show(self, title: str, bits: float, build: Callable[[], Ernie]) -> None:
        """Measures the model that `build` makes, unless a row of that title is there."""
        if title not in self.rows:
            logits = run(build(), self.prompts)
            pairs = [compare_logits(a, b) for a, b in zip(self.reference, logits, strict=True)]
            kl, same = torch.cat([p[0] for p in pairs]), torch.cat([p[1] for p in pairs])
            self.rows[title] = {"bits": bits, **summarize(kl, same)}
            if self.path:
                self.path.write_text(json.dumps(self.rows, indent=1) + "\n", encoding="utf-8")
        row = self.rows[title]
        print(
            f"{title:42s} {bits:6.3f} bits  KL {row['kl_mean']:.4f} ± {row['kl_standard_error']:.4f}"
            f"  top-1 {100 * row['top1_same']:.1f} %",
            flush=True,
        )


def measure_down(given: argparse.Namespace) -> None:
    """`ffn_down` of every layer by each method, the rest of the model untouched."""
    model = build_smollm2(mixture=False)
    judge = Judge(model, windows("foldoc", given.judged_tokens), given.json)
    with Recorder(model) as recorder:
        run(model, windows("handbook", given.calibration_tokens))
    downs = {name: part for name, part in model.named_modules() if name.endswith("mlp.down")}
    kept = {name: part.weight.clone() for name, part in downs.items() if isinstance(part, Linear)}
    methods = {"LCC2 L=12": (OURS, trellis(LCC2_12, given.damping))}
    if given.wheel:
        library = Ggml(given.wheel)
        methods |= {f"ggml {kind} + imatrix": (BITS[kind], ggml(library, kind)) for kind in BITS}
    methods |= {title: (OURS, method) for title, method in ablations(given.damping).items()}
    methods["L=12, damping 0.01"] = (OURS, trellis(LCC2_12, 0.01))

    def build(method: Method) -> Ernie:
        for name, weight in kept.items():
            hessian = recorder.linears[name][0].matrix
            model.get_parameter(f"{name}.weight").data.copy_(method(weight, hessian))
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
    judge = Judge(model, windows("foldoc", given.judged_tokens), given.json)

    def by_pipeline() -> Ernie:
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder) / "source", Path(folder) / "target"
            save_model(model, source, torch.float32)
            quantize(source, target, FfnOnly(), [Prompt(ids) for ids in calibration], num_threads=2)
            return load_dequantized(target, torch.float32)

    bits = mean_bits(model, FfnOnly())
    judge.show("LCC2 L=12, the pipeline", bits, by_pipeline)
    with Recorder(model) as recorder:
        run(model, calibration)
    for title, method in (
        ("LCC2 L=12, one pass", trellis(LCC2_12, given.damping)),
        ("scalar GPTQ, rotation", scalar(given.damping)),
    ):
        judge.show(title, bits, lambda method=method: _one_pass(recorder, method))  # type: ignore[misc]


def mean_bits(model: Ernie, plan: BitPlan) -> float:
    """Of the weights at 2 bits, their scales counted."""
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if plan.kind(n) is Kind.TWO}
    num_bytes = sum(plan.num_bytes(name, shape) for name, shape in shapes.items())
    return 8 * num_bytes / sum(torch.Size(shape).numel() for shape in shapes.values())


def _one_pass(recorder: Recorder, method: Method) -> Ernie:
    """Every matrix against the source's own inputs: no second stream, no damping chosen."""
    other = build_smollm2()
    for name, parameter in other.named_parameters():
        if FfnOnly().kind(name) is Kind.TWO:
            weights = parameter.data if parameter.dim() == 3 else parameter.data[None]
            for weight, hessian in zip(weights, _hessians(recorder, name), strict=True):
                weight.copy_(method(weight.clone(), hessian))
    return other


def _hessians(recorder: Recorder, name: str) -> list[Tensor]:
    """Of the fitted tokens: each expert's own, or the one of a plain matrix."""
    home, _, last = name.rpartition(".")
    if home in recorder.linears:
        return [recorder.linears[home][0].matrix]
    grams = recorder.banks[home][0]
    return [gram.matrix for gram in (grams.gate_up if last == "gate_up" else grams.down)]


def measure_activations(given: argparse.Namespace) -> None:
    """Every linear of every layer reads rounded inputs; its weights are exact."""
    model = build_smollm2(mixture=False)
    judge = Judge(model, windows("foldoc", given.judged_tokens), given.json)
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
        judge.show(title, 8.0, lambda: model)
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
