"""How the codes of `code.PRESETS` were found: random columns, successive halving, hill climbing, Lloyd.

    python -m duomo.trellis.search --bits 2 --window 12 --candidates 3000 --steps 3000 --seed 1
    python -m duomo.trellis.search --polish lcc2-12 --streams 8192 --seed 31

All candidates are judged on one Gaussian sample, so that differences of 0.1 % show; the figure printed at the
end comes from a sample that no candidate saw. A codebook is trained by Lloyd's iteration through the encoder,
then rounded to 7-bit integers. Rounding costs 0.2 % of the distortion, and `--polish` wins it back: it moves
one integer at a time, judging each by encoding anew, which Lloyd's iteration on rounded levels cannot. Needs
the compiled encoder: the numpy one would take weeks.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from duomo.trellis.code import PRESETS, TrellisCode
from duomo.trellis.encoder import encode

F32 = npt.NDArray[np.float32]
Columns = tuple[int, ...]


@dataclass(frozen=True)
class Candidate:
    code: TrellisCode
    distortion: float


def gaussian(num_streams: int, steps: int, seed: int) -> F32:
    """[S, T] whose second moment is exactly one, which removes most of the sampling noise of a distortion."""
    sample = np.random.default_rng(seed).standard_normal((num_streams, steps)).astype(np.float32)
    return sample / np.float32(np.sqrt(np.mean(np.square(sample, dtype=np.float64))))


def windows_of(symbols: npt.NDArray[np.uint8], code: TrellisCode) -> npt.NDArray[np.uint16]:
    windows = np.zeros(symbols.shape, np.uint16)
    for age in range(code.window // code.bits):
        windows |= np.roll(symbols, age, axis=1).astype(np.uint16) << np.uint16(code.bits * age)
    return windows


def distortion(code: TrellisCode, sample: F32, num_threads: int = 1) -> float:
    """Mean squared error of tail-biting streams on a unit-variance sample [S, T]."""
    symbols = encode(sample / np.float32(code.unit), code, num_threads=num_threads)
    decoded = code.value_table()[windows_of(symbols, code)] * np.float32(code.unit)
    return float(np.mean(np.square(decoded - sample, dtype=np.float64)))


def train(code: TrellisCode, sample: F32, iterations: int) -> Candidate:
    """Lloyd through the encoder: each level moves to the mean of the samples it stood for. Keeps the best."""
    best = Candidate(code, np.inf)
    for _ in range(iterations + 1):
        symbols = encode(sample / np.float32(code.unit), code)
        index = code.hash_table()[windows_of(symbols, code)].ravel()
        levels = np.asarray(code.codebook) * code.unit
        error = float(np.mean((levels[index] - sample.ravel()) ** 2))
        if error < best.distortion:
            best = Candidate(code, error)
        counts = np.bincount(index, minlength=levels.size)
        means = np.bincount(index, weights=sample.ravel(), minlength=levels.size) / np.maximum(counts, 1)
        code = with_levels(code, np.where(counts > 0, means, levels))
    return best


def with_levels(code: TrellisCode, levels: npt.NDArray[np.float64]) -> TrellisCode:
    unit = float(np.abs(levels).max() / 63)
    return replace(code, codebook=tuple(int(v) for v in np.rint(levels / unit)), unit=round(unit, 6))


def first_code(name: str, bits: int, window: int, index_bits: int, middle: Columns) -> TrellisCode:
    """Gaussian quantiles as levels, the given columns between the two ends."""
    size = 1 << index_bits
    tops = tuple(size >> (bits - bit) for bit in range(bits))
    quantiles = np.array([NormalDist().inv_cdf((i + 0.5) / size) for i in range(size)])
    return with_levels(TrellisCode(name, bits, window, (*tops, *middle, *tops), (0,) * size, 1.0), quantiles)


def random_columns(rng: np.random.Generator, count: int, index_bits: int) -> Columns:
    return tuple(int(v) for v in rng.integers(1, 1 << index_bits, count))


def mutated(rng: np.random.Generator, code: TrellisCode) -> TrellisCode:
    """One or two middle columns replaced, or two exchanged."""
    columns, inner = list(code.columns), np.arange(code.bits, code.window - code.bits)
    first, second = rng.choice(inner, 2, replace=False)
    if rng.random() < 0.25:
        columns[first], columns[second] = columns[second], columns[first]
    else:
        columns[first] = int(rng.integers(0, len(code.codebook)))
        if rng.random() < 0.3:
            columns[second] = int(rng.integers(0, len(code.codebook)))
    return replace(code, columns=tuple(columns))


def search(
    bits: int,
    window: int,
    index_bits: int,
    candidates: int,
    steps: int,
    seed: int,
    start: TrellisCode | None,
    streams: int,
) -> Candidate:
    """The best code of `candidates` random ones, after `steps` of hill climbing."""
    rng, name = np.random.default_rng(seed), f"lcc{bits}-{window}"
    small, medium = gaussian(64, 512, seed), gaussian(streams, 512, seed + 1)
    codes = [
        first_code(name, bits, window, index_bits, random_columns(rng, window - 2 * bits, index_bits))
        for _ in range(candidates)
    ]
    found = sorted((train(code, small, 1) for code in codes), key=lambda c: c.distortion)
    found = sorted((train(c.code, small, 3) for c in found[: candidates // 8]), key=lambda c: c.distortion)
    codes = [c.code for c in found[: max(1, candidates // 64)]] + ([start] if start else [])
    best = min((train(code, medium, 4) for code in codes), key=lambda c: c.distortion)
    print(f"after {candidates} candidates: {best.distortion:.5f}", flush=True)
    for step in range(steps):
        challenger = train(mutated(rng, best.code), medium, 2)
        if challenger.distortion < best.distortion:
            best = train(challenger.code, medium, 3)
            print(f"step {step}: {best.distortion:.5f} {best.code.columns}", flush=True)
    return train(best.code, gaussian(2048, 512, seed + 2), 8)


def _means(code: TrellisCode, sample: F32) -> npt.NDArray[np.float64]:
    """What each level stood for, on average: the levels before rounding."""
    index = code.hash_table()[windows_of(encode(sample / np.float32(code.unit), code), code)].ravel()
    counts = np.bincount(index, minlength=len(code.codebook))
    means: npt.NDArray[np.float64] = np.bincount(index, weights=sample.ravel()) / np.maximum(counts, 1)
    return means


UNITS = tuple(1 + step / 1000 for step in range(-40, 41, 2))


def polish(code: TrellisCode, sample: F32, rng: np.random.Generator) -> Candidate:
    """Two sweeps of descent on the integers themselves: the unit, then each level a step up or down."""
    best = Candidate(code, distortion(code, sample))

    def challenge(other: TrellisCode) -> None:
        nonlocal best
        found = distortion(other, sample)
        if found < best.distortion - 1e-7:
            best = Candidate(other, found)

    real = _means(code, sample)
    for factor in UNITS:
        unit = round(code.unit * factor, 6)
        levels = np.clip(np.rint(real / unit), -63, 63)
        challenge(replace(code, codebook=tuple(int(v) for v in levels), unit=unit))
    for _ in range(2):
        for index in rng.permutation(len(code.codebook)):
            for step in (-1, 1):
                levels = np.asarray(best.code.codebook)
                levels[index] += step
                if abs(levels[index]) <= 63:
                    challenge(replace(best.code, codebook=tuple(int(v) for v in levels)))
        for factor in (0.998, 0.999, 1.001, 1.002):
            challenge(replace(best.code, unit=round(best.code.unit * factor, 6)))
        print(f"{best.distortion:.6f} {best.code}", flush=True)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--window", type=int, default=12)
    parser.add_argument("--index-bits", type=int, default=6)
    parser.add_argument("--candidates", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--streams", type=int, default=256, help="of 512 weights each (256 for --polish), to climb on"
    )
    parser.add_argument("--from-preset", action="store_true", help="let the shipped code compete too")
    parser.add_argument("--polish", choices=list(PRESETS), help="only move this code's integers")
    given = parser.parse_args()
    if given.polish:
        sample = gaussian(given.streams, 256, given.seed)
        best = polish(PRESETS[given.polish], sample, np.random.default_rng(given.seed))
        _judge(best.code, given.seed)
        return
    start = PRESETS.get(f"lcc{given.bits}-{given.window}") if given.from_preset else None
    best = search(
        given.bits,
        given.window,
        given.index_bits,
        given.candidates,
        given.steps,
        given.seed,
        start,
        given.streams,
    )
    _judge(best.code, given.seed)


def _judge(code: TrellisCode, seed: int) -> None:
    fresh = gaussian(4096, 256, seed + 1000)
    print(code)
    print(f"distortion on {fresh.size} unseen weights, T=256: {distortion(code, fresh):.5f}")


if __name__ == "__main__":
    main()
