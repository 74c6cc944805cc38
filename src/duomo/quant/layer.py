"""One layer's matrices to their stored forms: damping chosen, experts in groups, everything measured.

Damping is chosen for each parameter by the error on held-out tokens; the fitted tokens would always choose
the least. Matrices that read one vector share one rotation, so that a model rotates it once. Without
calibration there is no Hessian: plain rounding.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from duomo.checkpoints.quantized import Stored, dequantize
from duomo.errors import CheckpointError
from duomo.model import Ernie
from duomo.model.decoder import DecoderLayer
from duomo.model.experts import ExpertBank
from duomo.quant.calibration import BankGrams, CalibrationBatch, Recorder
from duomo.quant.feedback import output_error, quantize_bank, quantize_matrices
from duomo.quant.hessian import TRUST, Gram, shrink
from duomo.quant.plan import BitPlan, Kind
from duomo.trellis.code import TrellisCode
from duomo.trellis.integer import encode_int
from duomo.trellis.tensor import TrellisBank, TrellisTensor

DAMPINGS = (0.03, 0.1, 0.3)
TRIAL_EXPERTS = 2
_INPUTS = {
    "attention.q": "attention", "attention.k": "attention", "attention.v": "attention",
    "mlp.gate": "mlp", "mlp.up": "mlp", "mlp.shared.gate": "mlp", "mlp.shared.up": "mlp",
    "mlp.text.gate_up": "mlp", "mlp.vision.gate_up": "mlp",
}  # fmt: skip
"""Matrices that read one vector, by the name of that vector."""


@dataclass(frozen=True)
class TensorReport:
    """How one tensor is stored and what that cost: errors are shares of the output's energy."""

    name: str
    kind: str
    num_weights: int
    num_bytes: int
    damping: float | None
    held_out_error: float | None  # None: no held-out token reached it
    fitted_error: float | None
    weight_error: float | None  # |W - W'|^2 / |W|^2, whatever reads it; None where nothing was rounded


def seed_of(name: str, index: int) -> int:
    """The rotation of a matrix: one for all that read the same vector."""
    base = name.removesuffix(".weight")
    return zlib.crc32(f"{index}.{_INPUTS.get(base, base)}".encode())


def quantize_outside(
    model: Ernie, plan: BitPlan, recorder: Recorder, held_out_ids: Tensor
) -> tuple[dict[str, Stored], list[TensorReport]]:
    """Embeddings, head, tower, resampler: rounded to nearest, no Hessian needed at 8 bits.

    `recorder` heard the tower and the resampler; of the embeddings the rows of `held_out_ids` are judged.
    """
    stored: dict[str, Stored] = {}
    reports: list[TensorReport] = []
    for name, parameter in model.named_parameters():
        kind = plan.kind_for(name, tuple(parameter.shape))
        stored[name] = _round(_finite(name, parameter), plan, kind, seed_of(name, -1))
        errors: list[float | None] = [None, None]
        decoded = None if kind is Kind.PLAIN else dequantize(stored[name])
        home = name.rpartition(".")[0]
        if decoded is not None and home in recorder.linears:
            errors[0] = _heard_error(parameter, decoded, recorder.linears[home][1].matrix)
        elif decoded is not None and name == "embed.weight" and held_out_ids.numel():
            errors[0] = relative_error(parameter[held_out_ids], decoded[held_out_ids])
        reports.append(
            _report(name, kind, stored[name], None, errors[0], errors[1], _weight_error(parameter, decoded))
        )
    return stored, reports


def _finite(name: str, parameter: Tensor) -> Tensor:
    """The weights in float32; a damaged source is refused with the tensor's name."""
    weights = parameter.detach().float()
    if not bool(weights.isfinite().all()):
        raise CheckpointError(f"{name} of the source holds NaN or infinity; is the file damaged?")
    return weights


def _heard_error(weight: Tensor, decoded: Tensor, hessian: Tensor) -> float | None:
    return output_error(weight, decoded, hessian) if hessian.diagonal().sum() > 0 else None


def relative_error(weight: Tensor, decoded: Tensor) -> float:
    """|W - W'|^2 / |W|^2."""
    return float((weight - decoded).square().sum() / weight.square().sum().clamp(min=1e-30))


def _weight_error(weight: Tensor, decoded: Tensor | None) -> float | None:
    return None if decoded is None else relative_error(weight.detach().float(), decoded)


def _round(weight: Tensor, plan: BitPlan, kind: Kind, seed: int) -> Stored:
    if kind is Kind.PLAIN:
        return weight
    assert kind in (Kind.INT8, Kind.INT6), f"{kind} needs the encoder"
    return encode_int(weight.numpy(), 8 if kind is Kind.INT8 else 6, seed)


class LayerQuantizer:
    """Hears a layer's inputs (`hear`, before each batch), then `quantize`s it."""

    def __init__(self, layer: DecoderLayer, index: int, plan: BitPlan, num_threads: int) -> None:
        self.layer, self.index, self.plan, self.num_threads = layer, index, plan, num_threads
        self.recorder = Recorder(layer)

    def hear(self, item: CalibrationBatch) -> None:
        self.recorder.is_held_out = item.is_held_out

    def tokens_per_expert(self) -> dict[str, list[int]]:
        return {name.rpartition(".")[2]: grams[0].num_tokens for name, grams in self.recorder.banks.items()}

    def quantize(self, prefix: str = "") -> tuple[dict[str, Stored], list[TensorReport]]:
        """The parameters whose names begin with `prefix`, by their full names, and what each cost."""
        stored: dict[str, Stored] = {}
        reports: list[TensorReport] = []
        for name, parameter in self.layer.named_parameters():
            if not name.startswith(prefix):
                continue
            full = f"decoder.layers.{self.index}.{name}"
            kind = self.plan.kind_for(full, tuple(parameter.shape))
            code = self.plan.code(kind)
            seed = seed_of(name, self.index)
            weights = _finite(full, parameter)
            if code is None:
                stored[full] = _round(weights, self.plan, kind, seed)
                reports.append(self._plain_report(name, full, kind, weights, stored[full]))
                continue
            fitted, held = self._hessians(name, weights)
            single = weights.dim() == 2
            stacked = weights[None] if single else weights
            tensors, damping = self._encode(stacked, fitted, held, code, seed)
            opened = [torch.from_numpy(tensor.decode()) for tensor in tensors]
            errors = [_mean_error(stacked, opened, hessians) for hessians in (held, fitted)]
            stored[full] = tensors[0] if single else TrellisBank.of(tensors)
            rounded = _weight_error(weights, dequantize(stored[full]))
            reports.append(_report(full, kind, stored[full], damping, errors[0], errors[1], rounded))
        return stored, reports

    def _plain_report(
        self, name: str, full: str, kind: Kind, weights: Tensor, stored: Stored
    ) -> TensorReport:
        """Of a tensor that was rounded to nearest or not at all: a shape the trellis cannot hold, a norm."""
        if kind is Kind.PLAIN:
            return _report(full, kind, stored, None, None, None, None)
        decoded = dequantize(stored)
        fitted, held = self._hessians(name, weights)
        stacked, opened = (w[None] if w.dim() == 2 else w for w in (weights, decoded))
        errors = [_mean_error(stacked, list(opened), hessians) for hessians in (held, fitted)]
        return _report(full, kind, stored, None, errors[0], errors[1], _weight_error(weights, decoded))

    def _hessians(self, name: str, weights: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """(fitted, held out) of each matrix of a parameter; empty lists without calibration."""
        home, _, last = name.rpartition(".")
        part = self.layer.get_submodule(home)
        if isinstance(part, ExpertBank):
            if home not in self.recorder.banks:
                return [], []
            fitted, held = self.recorder.banks[home]
            return bank_hessians(fitted, last), held_hessians(held, last)
        if home not in self.recorder.linears:
            return [], []
        fitted_gram, held_gram = self.recorder.linears[home]
        return [fitted_gram.matrix], [held_gram.matrix]

    def _encode(
        self, weights: Tensor, fitted: Sequence[Tensor], held: Sequence[Tensor], code: TrellisCode, seed: int
    ) -> tuple[list[TrellisTensor], float | None]:
        damping = choose_damping(weights, fitted, held, code, seed, self.num_threads) if fitted else 0.0
        hessians = fitted or [torch.eye(weights.shape[-1])] * len(weights)
        tensors = quantize_bank(weights, hessians, code, seed, damping, self.num_threads, bool(fitted))
        return tensors, damping if fitted else None


def choose_damping(
    weights: Tensor,
    fitted: Sequence[Tensor],
    held: Sequence[Tensor],
    code: TrellisCode,
    seed: int,
    num_threads: int = 1,
) -> float:
    """The damping of least held-out error on the matrices [E, N, K] that held-out tokens read most."""
    heard = sorted(range(len(held)), key=lambda e: -held[e].diagonal().sum().item())[:TRIAL_EXPERTS]
    if not heard or held[heard[0]].diagonal().sum() == 0:
        return DAMPINGS[1]
    hessians, judges = torch.stack([fitted[e] for e in heard]), [held[e] for e in heard]
    errors = {}
    for damping in DAMPINGS:
        tensors = quantize_matrices(weights[heard], hessians, code, seed, damping, num_threads, sweeps=1)
        opened = [torch.from_numpy(tensor.decode()) for tensor in tensors]
        error = _mean_error(weights[heard], opened, judges)
        errors[damping] = np.inf if error is None else error
    return min(errors, key=lambda damping: errors[damping])


def bank_hessians(grams: BankGrams, part: str, trust: float = TRUST) -> list[Tensor]:
    """Gate and up borrow from the layer, which reads the same vectors; down borrows from its own bank."""
    if part == "gate_up":
        return [shrink(gram, grams.layer, trust) for gram in grams.gate_up]
    pool = Gram(grams.down[0].size)
    for gram in grams.down:
        pool.matrix += gram.matrix
        pool.num_tokens += gram.num_tokens
    return [shrink(gram, pool, trust) for gram in grams.down]


def held_hessians(held: BankGrams, part: str) -> list[Tensor]:
    """What an expert's rounding is judged by: the layer's for gate and up, its own for down."""
    return [held.layer.matrix if part == "gate_up" else gram.matrix for gram in held.down]


def _mean_error(weights: Tensor, decoded: Sequence[Tensor], hessians: Sequence[Tensor]) -> float | None:
    """Mean error of the matrices that the Hessians heard anything of."""
    heard = [e for e, hessian in enumerate(hessians) if hessian.diagonal().sum() > 0]
    errors = [output_error(weights[e], decoded[e], hessians[e]) for e in heard]
    return float(np.mean(errors)) if errors else None


def _report(
    name: str,
    kind: Kind,
    stored: Stored,
    damping: float | None,
    held: float | None,
    fitted: float | None,
    rounded: float | None,
) -> TensorReport:
    num = int(np.prod(stored.shape))
    size = stored.nbytes if isinstance(stored, Tensor) else stored.num_bytes
    return TensorReport(name, kind.value, num, size, damping, held, fitted, rounded)
