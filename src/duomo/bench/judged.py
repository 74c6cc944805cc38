"""A source model and how far others stand from it: KL over the second half of windows of 512 tokens.

What depends on the source alone, its final states and what its linears read, is kept in the cache folder
under a hash of the tokens, so that a study's rows can be made one by one. Logits, 200 kB a token, are never
kept: both models' are made again from final states, a few rows at a time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from duomo.bench.corpora import CACHE, read_corpus
from duomo.checkpoints.smollm2 import build_tokenizer
from duomo.model import Ernie, PackedCausal, build_batch
from duomo.quant.hessian import Gram
from duomo.quant.judge import compare_logits, summarize

T = TypeVar("T")
WINDOW = 512
CHUNK_TOKENS = 16  # rows of logits at a time: in double precision they still fit the cache
Prompts = list[list[int]]


def windows(name: str, num_tokens: int) -> Prompts:
    """The first tokens of a corpus, cut into windows."""
    ids = build_tokenizer().encode(read_corpus(name)[: 8 * num_tokens]).ids
    return [ids[i : i + WINDOW] for i in range(0, num_tokens, WINDOW)]


@torch.inference_mode()
def final_states(model: Ernie, prompts: Prompts) -> list[Tensor]:
    """[T, D] of each window's second half; its last position predicts nothing that is known."""
    return [
        model(build_batch([prompt], model.config), PackedCausal())[WINDOW // 2 : -1] for prompt in prompts
    ]


@torch.inference_mode()
def second_moments(model: Ernie, prompts: Prompts, ending: str) -> dict[str, Tensor]:
    """X^T X of the inputs of every linear whose name ends so."""
    grams: dict[str, Gram] = {}

    def hook(gram: Gram) -> Callable[[nn.Module, Any], None]:
        return lambda _, inputs: gram.add(inputs[0])

    handles = []
    for name, part in model.named_modules():
        if name.endswith(ending):
            grams[name] = Gram(part.get_parameter("weight").shape[1])
            handles.append(part.register_forward_pre_hook(hook(grams[name])))
    for prompt in prompts:
        model(build_batch([prompt], model.config), PackedCausal())
    for handle in handles:
        handle.remove()
    return {name: gram.matrix for name, gram in grams.items()}


def kept(title: str, prompts: Prompts, make: Callable[[], T]) -> T:
    """What `make` returns, or what it returned for these prompts in an earlier run."""
    digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16]
    path = CACHE.parent / "judged" / f"{title}-{digest}.pt"
    if path.exists():
        found: T = torch.load(path, weights_only=True, mmap=True)
        return found
    made = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    torch.save(made, unfinished)
    unfinished.replace(path)
    return made


class Judge:
    """Compares models with a source; prints and keeps a row for every model it is shown."""

    def __init__(self, source: Ernie, title: str, prompts: Prompts, path: Path | None) -> None:
        self._prompts, self._path, self._unembed = prompts, path, source.unembed
        self.rows: dict[str, Any] = json.loads(path.read_text()) if path and path.exists() else {}
        self._reference = kept(f"{title}-states", prompts, lambda: final_states(source, prompts))

    @torch.inference_mode()
    def _compare(self, other: Ernie) -> dict[str, float]:
        kl, same = [], []
        for states, own in zip(self._reference, final_states(other, self._prompts), strict=True):
            for first, second in zip(states.split(CHUNK_TOKENS), own.split(CHUNK_TOKENS), strict=True):
                pair = compare_logits(self._unembed(first), other.unembed(second))
                kl.append(pair[0])
                same.append(pair[1])
        return summarize(torch.cat(kl), torch.cat(same))

    def show(self, title: str, bits: float, build: Callable[[], Ernie]) -> dict[str, Any]:
        """Measures the model that `build` makes, unless a row of that title is there; returns the row."""
        if title not in self.rows:
            self.keep(title, {"bits": bits, **self._compare(build())})
        row: dict[str, Any] = self.rows[title]
        print(
            f"{title:42s} {bits:6.3f} bits  KL {row['kl_mean']:.4f} ± {row['kl_standard_error']:.4f}"
            f"  top-1 {100 * row['top1_same']:.1f} %",
            flush=True,
        )
        return row

    def keep(self, title: str, row: dict[str, Any]) -> None:
        """Adds a row and writes the file."""
        self.rows[title] = row
        if self._path:
            self._path.write_text(json.dumps(self.rows, indent=1) + "\n", encoding="utf-8")
