"""`python -m duomo.bench.peers CHECKPOINT --llama BIN --gguf FILE`: the 28B beside llama.cpp, in one run.

llama.cpp does not know ERNIE-VL; its `ernie4_5-moe` is the text path of VL-28B-A3B, so the GGUF is that, with
random weights, in its own 2-bit type. The two take turns, round by round, each in a process of its own after
its file has been read once, so that neither waits for the disk; medians and the ratio of medians are what
counts. Rounds are kept in the JSON as they end, and a run cut short goes on. Nothing else may run meanwhile:
llama.cpp's threads spin at barriers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

Figures: TypeAlias = dict[str, Any]
CHUNK_BYTES = 1 << 24
ROWS = {
    "decode, one stream": "decode_tokens_per_s",
    "prefill": "prefill_tokens_per_s",
    "decode, all streams": "streams_tokens_per_s",
}


def read_through(path: Path) -> None:
    """Brings a file, or a folder's safetensors, into the page cache."""
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        with file.open("rb") as stream:
            while stream.read(CHUNK_BYTES):
                pass


def run(command: Sequence[str | Path]) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout


def llama(options: argparse.Namespace) -> Figures:
    read_through(options.gguf)
    threads = ["-t", str(options.threads)]
    sizes = ["-p", str(options.prompt), "-n", str(options.tokens)]
    bench = run(
        [options.llama / "llama-bench", "-m", options.gguf, *threads, *sizes, "-r", "1", "-o", "json"]
    )
    found = {}
    for row in json.loads(bench):
        name = "decode_tokens_per_s" if row["n_gen"] else "prefill_tokens_per_s"
        found[name] = float(row["avg_ts"])
    shape = ["-npp", "64", "-ntg", str(options.tokens), "-npl", str(options.streams)]
    room = ["-c", str(options.streams * (64 + options.tokens) + 256)]
    many = run(
        [
            *(options.llama / "llama-batched-bench", "-m", options.gguf, *threads, *shape, *room),
            *("--output-format", "jsonl"),
        ]
    )
    rows = [json.loads(line) for line in many.splitlines() if line.startswith("{")]
    found["streams_tokens_per_s"] = float(rows[-1]["speed_tg"])
    return found


def duomo(options: argparse.Namespace) -> Figures:
    """Decoding from a short context, as theirs does; the prefill is a run of its own."""
    read_through(options.checkpoint)
    sizes = ["--prompt", "64", "--tokens", str(options.tokens), "--streams", str(options.streams)]
    facts = decode_facts(options.checkpoint, *sizes)
    facts["streams_tokens_per_s"] = facts[f"decode_{options.streams}_streams_tokens_per_s"]
    prefill = decode_facts(
        options.checkpoint, "--prompt", str(options.prompt), "--tokens", "1", "--streams", "1"
    )
    return facts | {"prefill_tokens_per_s": prefill["prefill_tokens_per_s"]}


def decode_facts(checkpoint: Path, *sizes: str) -> Figures:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "facts.json"
        run([sys.executable, "-m", "duomo.bench.decode", checkpoint, *sizes, "--json", target])
        facts: Figures = json.loads(target.read_text(encoding="utf-8"))
    return facts


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--llama", type=Path, required=True, help="the folder with llama-bench in it")
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    settings = {name: getattr(options, name) for name in ("threads", "prompt", "tokens", "streams")}
    settings["gguf"], settings["checkpoint"] = options.gguf.name, options.checkpoint.name
    theirs, ours = rounds_kept(options.json, settings)
    for number in range(len(ours), options.rounds):
        theirs.append(llama(options))
        ours.append(duomo(options))
        print(f"round {number + 1} of {options.rounds} done", file=sys.stderr)
        if options.json:
            result = {"summary": _summary(theirs, ours), "llama.cpp": theirs, "duomo": ours, **settings}
            options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{'':22}{'llama.cpp':>12}{'duomo':>10}{'ratio':>8}   tokens/s, medians of {len(ours)}")
    for title, row in _summary(theirs, ours).items():
        print(f"{title:22}{row['llama.cpp']:12.2f}{row['duomo']:10.2f}{row['ratio']:8.2f}")


def rounds_kept(file: Path | None, settings: Figures) -> tuple[list[Figures], list[Figures]]:
    """Those of a run with the same settings that wrote into `file`: a run cut short goes on."""
    if file is None or not file.is_file():
        return [], []
    kept = json.loads(file.read_text(encoding="utf-8"))
    if any(kept.get(name) != value for name, value in settings.items()):
        return [], []
    return kept["llama.cpp"], kept["duomo"]


def _summary(theirs: list[Figures], ours: list[Figures]) -> dict[str, dict[str, float]]:
    found = {}
    for title, name in ROWS.items():
        pair = median(row[name] for row in theirs), median(row[name] for row in ours)
        found[title] = {"llama.cpp": pair[0], "duomo": pair[1], "ratio": pair[1] / pair[0]}
    return found


if __name__ == "__main__":
    main()
