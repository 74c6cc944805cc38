"""`quantize`: a checkpoint to a smaller one, layer by layer, stoppable at any moment.

Two streams of hidden states walk the layers: the original's, and the one that the layers quantized so far
produce, whose inputs are what the next layer will really read. One layer is in memory at a time. Worth
knowing: a layer's file, its row of the report and the hidden states after it are on disk before the next
layer begins, so a run killed at any point goes on from the last whole layer and ends in the same bytes.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from duomo.checkpoints.load import read_config
from duomo.checkpoints.quantized import FORMAT, VERSION, QuantizedFile, Stored, dequantize, write_quantized
from duomo.checkpoints.stream import CheckpointStream
from duomo.errors import CheckpointError, ConfigError
from duomo.model import Ernie
from duomo.model.decoder import DecoderLayer
from duomo.processing.prompt import Prompt
from duomo.quant.calibration import CalibrationBatch, Recorder, build_batches
from duomo.quant.judge import LayerJudge, judge_logits
from duomo.quant.layer import LayerQuantizer, TensorReport, quantize_outside
from duomo.quant.plan import BitPlan, build_plan, least_bytes, raise_banks
from duomo.quant.report import write_report
from duomo.quant.sensitivity import empty_outside, measure_banks
from duomo.quant.tune import tune
from duomo.quant.walk import embed_batches, walk
from duomo.trellis.code import LCC2_12, TrellisCode

WORK = ".quantize"
_SETTINGS = {
    "files": "source",
    "plan": "plan of bits",
    "prompts": "calibration",
    "budget": "budget",
    "is_tuned": "choice of --tune",
    "format": "version of duomo",
}
"""What runs are told apart by, in words."""
_NOT_COPIED = (".safetensors", ".index.json", "SHA256SUMS", ".pdparams", ".bin", ".pt")


@dataclass(frozen=True)
class Progress:
    """At the start and after each piece: how far, and the seconds left at the pace so far."""

    done: int
    total: int
    seconds_left: float | None  # None before there is a pace
    what: str


def quantize(
    source: str | Path,
    target: str | Path,
    bits: str | BitPlan = "2",
    calibration: Sequence[Prompt] = (),
    budget_bytes: int = 0,
    code: TrellisCode = LCC2_12,
    num_threads: int = 1,
    progress: Callable[[Progress], None] = lambda _: None,
    is_tuned: bool = False,
) -> dict[str, Any]:
    """Writes the quantized checkpoint and its report into `target`; returns the report.

    Without calibration prompts weights are rounded with no error feedback, and the report says so. An
    interrupted run is taken up again by the same call. ConfigError where `target` holds something else.
    `bits` is a preset's name or a plan of one's own. `is_tuned`: each layer's scales and norms are tuned too.
    """
    source, target = Path(source), Path(target)
    stream = CheckpointStream(source)
    plan = bits if isinstance(bits, BitPlan) else build_plan(bits, stream.config, code)
    if plan.name == "auto":
        if not budget_bytes or not calibration:
            raise ConfigError("--bits auto needs a budget of bytes and calibration prompts to measure with")
        least_bytes(plan, _shapes(stream), budget_bytes)
    elif budget_bytes:
        raise ConfigError("a budget of bytes is for --bits auto; the other plans have their own size")
    if is_tuned and not calibration:
        raise ConfigError("tuning needs calibration prompts")
    if num_threads < 1:
        raise ConfigError(f"{num_threads} threads; give 1 or more")
    run = _Run(source, target, stream, plan, calibration, budget_bytes, num_threads, progress, is_tuned)
    return run.go()


class _Run:
    def __init__(
        self,
        source: Path,
        target: Path,
        stream: CheckpointStream,
        plan: BitPlan,
        calibration: Sequence[Prompt],
        budget_bytes: int,
        num_threads: int,
        progress: Callable[[Progress], None],
        is_tuned: bool,
    ) -> None:
        self.source, self.target, self.stream, self.plan = source, target, stream, plan
        self.calibration, self.num_threads, self.progress = calibration, num_threads, progress
        self.budget_bytes, self.is_tuned = budget_bytes, is_tuned
        self.work = target / WORK
        self._lock: TextIO | None = None
        self.started, self.pieces_here = time.monotonic(), 0
        self.total = len(stream.config.expert_layers) + 2

    def go(self) -> dict[str, Any]:
        """Everything; what the disk refuses as CheckpointError: the run goes on once it no longer does."""
        try:
            return self._go()
        except (OSError, SafetensorError) as error:
            if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
                raise CheckpointError(
                    f"no space left in {self.target}; make room and give the same command, "
                    "it goes on from there"
                ) from error
            place = str(getattr(error, "filename", None) or "")
            if not place.startswith(str(self.target)):
                raise
            assert isinstance(error, OSError)
            raise CheckpointError(f"{place} cannot be used: {error.strerror}") from error
        finally:
            if self._lock is not None:
                self._lock.close()

    def _go(self) -> dict[str, Any]:
        self._check_target()
        self._check_room()
        self._claim()
        num_done = sum(self._is_done(number) for number in range(self.total))
        self.progress(Progress(num_done, self.total, None, "quantizing"))
        if self.plan.name == "auto":
            self.plan = raise_banks(self.plan, _shapes(self.stream), self._sensitivities(), self.budget_bytes)
        self._outside()
        for index in range(len(self.stream.config.expert_layers)):
            self._layer(index)
        report = self._finish()
        done = self.work.with_name(WORK + ".done")  # renamed first: half a work folder is nobody's
        os.replace(self.work, done)
        shutil.rmtree(done)
        return report

    def _check_room(self) -> None:
        """CheckpointError where the disk does not hold what is still to be written."""
        written = sum(path.stat().st_size for path in self.target.glob("model-*.safetensors"))
        planned = sum(self.plan.num_bytes(name, shape) for name, shape in _shapes(self.stream).items())
        tokens = sum(len(prompt.ids) for prompt in self.calibration)
        states = 2 * 2 * 4 * tokens * self.stream.config.hidden_size  # both streams, before and after a layer
        needed = max(planned, self.budget_bytes) - written + states
        place = next(folder for folder in (self.target, *self.target.absolute().parents) if folder.exists())
        free = shutil.disk_usage(place).free
        if free < needed:
            raise CheckpointError(
                f"{needed / 1e6:,.0f} MB are needed in {self.target}; {free / 1e6:,.0f} MB are free",
                needed=needed,
                available=free,
            )

    def _settings(self) -> dict[str, Any]:
        """What a run must share with the one it goes on from, as it comes back from JSON."""
        settings = _fingerprint(self.stream, self.plan, self.calibration)
        settings |= {"budget": self.budget_bytes, "is_tuned": self.is_tuned}
        return dict(json.loads(json.dumps(settings)))

    def _check_target(self) -> None:
        """ConfigError for a folder that is somebody else's, or of a run with other settings."""
        mark = self.work / "run.json"
        if self.target.exists() and not self.target.is_dir():
            raise ConfigError(f"{self.target} is a file; give a new folder")
        if not mark.exists():
            if self.target.exists() and any(p.name != WORK for p in self.target.iterdir()):
                raise ConfigError(f"{self.target} is not empty; give a new folder")
            return
        theirs, mine = json.loads(mark.read_text()), self._settings()
        if others := [word for key, word in _SETTINGS.items() if theirs.get(key) != mine[key]]:
            raise ConfigError(
                f"{self.target} holds an unfinished run with another {' and '.join(others)}; "
                "give a new folder, or the command it was begun with"
            )
        for note in self.work.glob("piece-*.json"):
            piece = self._piece(int(note.stem.partition("-")[2]))
            if not piece.exists() or piece.stat().st_size != json.loads(note.read_text())["bytes"]:
                raise CheckpointError(f"{piece} is not as the unfinished run left it; give a new folder")

    def _claim(self) -> None:
        """Marks the folder as this run's. ConfigError while another process writes there."""
        self.work.mkdir(parents=True, exist_ok=True)
        self._lock = (self.work / "lock").open("w")  # falls with the process, however that ends
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"{self.target} is being written by another run; let it end, or give a new folder"
            ) from error
        _write_text(self.work / "run.json", json.dumps(self._settings(), sort_keys=True))

    def _sensitivities(self) -> dict[str, float]:
        """Measured once; a run taken up again reads them."""
        path, layers = self.work / "sensitivities.json", len(self.stream.config.expert_layers)
        if not path.exists():
            started = time.monotonic()

            def note(done: int) -> None:
                left = (time.monotonic() - started) / done * (layers - done)
                self.progress(Progress(done, layers, left, "measuring sensitivities"))

            costs = measure_banks(self.stream, self.calibration, self.plan, self.num_threads, note)
            _write_text(path, json.dumps(costs))
        return dict(json.loads(path.read_text()))

    def _piece(self, number: int) -> Path:
        return self.target / f"model-{number:05d}.safetensors"

    def _is_done(self, number: int) -> bool:
        return (self.work / f"piece-{number}.json").exists()

    def _save(self, number: int, stored: dict[str, Stored], notes: dict[str, Any], states: _States) -> None:
        """States, then weights, then the note that makes the piece count; each whole or not at all."""
        states.save(self.work / f"states-{number}.safetensors")
        notes["bytes"] = write_quantized(self._piece(number), stored)
        notes["seconds"] = round(time.monotonic() - self.piece_started, 2)
        _write_text(self.work / f"piece-{number}.json", json.dumps(notes))
        (self.work / f"states-{number - 1}.safetensors").unlink(missing_ok=True)
        self.pieces_here += 1
        pace = (time.monotonic() - self.started) / self.pieces_here
        self.progress(Progress(number + 1, self.total, pace * (self.total - number - 1), "quantizing"))

    def _outside(self) -> None:
        """Embeddings, head, norm, tower and resampler; and the prompts embedded, by both models."""
        self.piece_started = time.monotonic()
        self.model = empty_outside(self.stream)
        if not self._is_done(0):
            recorder = Recorder(self.model, hears_fitted=False)
            with recorder:
                original = build_batches(self.model, self.calibration, recorder.listen)
            before = embed_batches(self.model, original)
            held = [item.batch.ids_T[item.batch.text_rows] for item in original if item.is_held_out]
            ids = torch.cat(held) if held else torch.empty(0, dtype=torch.int64)
            stored, reports = quantize_outside(self.model, self.plan, recorder, ids)
            for name, tensor in stored.items():
                _parameter(self.model, name).data.copy_(dequantize(tensor))
            quantized = build_batches(self.model, self.calibration)
            self.batches, states = quantized, _States(before, embed_batches(self.model, quantized))
            self._save(0, stored, {"tensors": [asdict(report) for report in reports]}, states)
        else:
            _overwrite(self.model, self._piece(0))
            self.batches = build_batches(self.model, self.calibration)
        for eyes in ("vision_tower", "resampler"):  # all pictures are seen: room for the layers
            setattr(self.model, eyes, None)

    def _layer(self, index: int) -> None:
        number = index + 1
        if self._is_done(number):
            return
        self.piece_started = time.monotonic()
        states = _States.load(self.work / f"states-{number - 1}.safetensors", len(self.batches))
        has_experts = self.stream.config.expert_layers[index]
        layer = DecoderLayer(self.stream.config, has_experts).requires_grad_(False).eval()
        self.stream.fill(layer, f"decoder.layers.{index}.")
        judge = LayerJudge(layer)
        config = self.stream.config
        original = walk(layer, config, states.original, self.batches, judge.hear_original)
        judge.stop()
        quantizer = LayerQuantizer(layer, index, self.plan, self.num_threads)
        if self.batches:
            walk(layer, config, states.quantized, self.batches, quantizer.hear, quantizer.recorder)
        stored, reports = quantizer.quantize()
        parameters = dict(layer.named_parameters())
        for name, tensor in stored.items():
            parameters[name.removeprefix(f"decoder.layers.{index}.")].data.copy_(dequantize(tensor))
        tuned: tuple[float, float] | None = None
        if self.is_tuned and self.batches:
            stored, *errors = tune(layer, config, stored, states.quantized, original, self.batches)
            tuned = errors[0], errors[1]
        quantized = walk(layer, config, states.quantized, self.batches, judge.hear_quantized)
        notes = {
            "layer": index,
            "tensors": [asdict(report) for report in reports],
            "agreement": judge.agreement(),
            "tokens": quantizer.tokens_per_expert(),
            "hidden_error": _relative(original, quantized, self.batches),
            "tuned": tuned,  # held-out error of the layer's output before and after
        }
        self._save(number, stored, notes, _States(original, quantized))

    def _finish(self) -> dict[str, Any]:
        last = len(self.stream.config.expert_layers)
        pieces = [json.loads((self.work / f"piece-{n}.json").read_text()) for n in range(last + 1)]
        states = _States.load(self.work / f"states-{last}.safetensors", len(self.batches))
        source_model = empty_outside(self.stream)
        quality = judge_logits(source_model, self.model, states.original, states.quantized, self.batches)
        for path in sorted(self.source.iterdir()):
            if path.is_file() and path.name != "config.json" and not path.name.endswith(_NOT_COPIED):
                shutil.copyfile(path, self.target / path.name)
        fields = {
            **read_config(self.source),
            **self.stream.config.to_json(),
            "quantization": {"format": FORMAT, "version": VERSION, "plan": self.plan.name},
        }
        costs = self._sensitivities() if self.plan.name == "auto" else {}
        report = write_report(
            self.target,
            self.source,
            self.stream.config,
            self.plan,
            pieces,
            quality,
            costs,
            bool(self.calibration),
        )
        _write_text(self.target / "config.json", json.dumps(fields, indent=2) + "\n")
        self.progress(Progress(self.total, self.total, 0.0, "quantized"))
        return report


@dataclass
class _States:
    """Hidden states of every batch, in the original model and in the quantized one."""

    original: list[Tensor]
    quantized: list[Tensor]

    def save(self, path: Path) -> None:
        tensors = {f"o{i}": t for i, t in enumerate(self.original)}
        tensors |= {f"q{i}": t for i, t in enumerate(self.quantized)}
        partial = path.with_suffix(".part")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path, count: int) -> _States:
        tensors = load_file(path)
        return cls([tensors[f"o{i}"] for i in range(count)], [tensors[f"q{i}"] for i in range(count)])


def _overwrite(model: Ernie, path: Path) -> None:
    file = QuantizedFile(path)
    for name in file.names():
        _parameter(model, name).data.copy_(dequantize(file.read(name)))


def _parameter(model: Ernie, name: str) -> torch.nn.Parameter:
    return model.get_parameter(name)


def _relative(
    original: list[Tensor], quantized: list[Tensor], batches: list[CalibrationBatch]
) -> float | None:
    """Squared distance of the two streams over the original's square, on held-out tokens."""
    pairs = [(a, b) for a, b, c in zip(original, quantized, batches, strict=True) if c.is_held_out]
    if not pairs:
        return None
    error = sum((a - b).square().sum().item() for a, b in pairs)
    return error / sum(a.square().sum().item() for a, _ in pairs)


def _fingerprint(stream: CheckpointStream, plan: BitPlan, calibration: Sequence[Prompt]) -> dict[str, Any]:
    """What a run must share with the one it goes on from. A file with a checksum may be fetched again."""
    prompts = 0
    for prompt in calibration:
        prompts = zlib.crc32(json.dumps(prompt.ids).encode(), prompts)
        for medium in prompt.media:
            prompts = zlib.crc32(medium.content_hash, prompts)
    files = []
    for path in sorted(stream.folder.glob("*.safetensors")):
        stat, digest = path.stat(), stream.checksums.digests.get(path.name)
        files.append([path.name, digest] if digest else [path.name, stat.st_size, stat.st_mtime_ns])
    return {
        "files": files,
        "plan": repr(plan),
        "prompts": prompts,
        "format": VERSION,
    }


def _shapes(stream: CheckpointStream) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in Ernie(stream.config).named_parameters()}


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".part")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


__all__ = ["Progress", "TensorReport", "quantize"]
