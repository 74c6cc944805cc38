"""A row as the model sees it: ids back to text, media as a short note, supervised stretches in [[ ]]."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from duomo.processing.template import IGNORE
from duomo.train.packing import Budget, pack, statistics
from duomo.train.rows import Row
from duomo.train.samples import Renderer, Sample, Samples


def preview_row(row: Row, renderer: Renderer, folder: Path) -> str:
    """The rendered conversation, and how many tokens of it are supervised."""
    sample = renderer.render(row, folder)
    lines = [f"{row.source}: {sample.num_tokens} tokens, {sample.num_supervised} supervised"]
    lines.append(_painted(sample, renderer))
    if sample.rejected is not None:
        rejected = Sample(sample.rejected.prompt, sample.rejected.labels, row.source)
        lines.append(f"rejected: {_painted(rejected, renderer)}")
    return "\n".join(lines)


def _painted(sample: Sample, renderer: Renderer) -> str:
    """A token is supervised if the token before it has a label; the label is what is shown then."""
    placeholder = renderer.tokenizer.find_special("<|IMAGE_PLACEHOLDER|>")
    wanted = [IGNORE, *sample.labels[:-1]]
    tokens = [
        (label != IGNORE, token if label == IGNORE else label)
        for token, label in zip(sample.prompt.ids, wanted, strict=True)
    ]
    parts = []
    for is_supervised, run in groupby(tokens, key=lambda pair: pair[0]):
        text = _text([token for _, token in run], placeholder, renderer)
        parts.append(f"[[{text}]]" if is_supervised else text)
    return "".join(parts)


def _text(ids: list[int], placeholder: int | None, renderer: Renderer) -> str:
    found = []
    for is_media, run in groupby(ids, key=lambda token: token == placeholder):
        group = list(run)
        note = f"<{len(group)} tokens of picture>"
        found.append(note if is_media else renderer.tokenizer.decode(group, skip_special=False))
    return "".join(found)


def packing_line(file: Path, renderer: Renderer, max_tokens: int) -> str:
    """How the file packs: best fit beside the naive order."""
    samples = Samples([file], renderer, max_tokens, leave_out_long=True)
    budget = Budget(max_tokens, max(16384, *samples.patches))
    lines = []
    for kind in ("best_fit", "naive"):
        packs = pack(samples.tokens, samples.patches, budget, kind)
        found = statistics(packs, samples.tokens, samples.patches, samples.supervised, budget)
        lines.append(f"{kind}: {found.line()}")
    lines += [f"too long: {problem.source}: {problem.message}" for problem in samples.left_out]
    return "\n".join(lines)
