"""`python -m duomo.train.experiments.throughput`: a training step of ours beside transformers' own class.

Same sizes, same weights (transformers saves, we load), same ids, pictures and labels, AdamW over all fp32
parameters. Rows of one length, and mixed ones, where transformers pads and we do not; tokens are counted
without padding. Products are fp32 on both sides, then bf16: ours as `dtype: bfloat16` of a recipe makes
them, theirs under `torch.autocast`; the ratio is to the faster of theirs in fp32 and bf16. Both take torch's
number of threads. Steps alternate, so load and clock strike all alike; medians are of the same number of
steps. The first losses must agree, or nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections import namedtuple
from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from duomo.checkpoints import load_model
from duomo.errors import Error
from duomo.kernels import cross_entropy
from duomo.model import Ernie, PackedCausal, build_batch
from duomo.train.precision import fast_products

Grid = namedtuple("Grid", "frames rows columns")
Span = namedtuple("Span", "start grid")
SIDE = 8  # patches: 16 tokens a picture


@dataclass(frozen=True, slots=True)
class Work:
    """B rows of L tokens, a picture near the start of each, the second half of each row supervised."""

    ids_BL: Tensor
    labels_BL: Tensor
    patches_PX: Tensor
    spans: list[list[Span]]
    lengths: list[int]  # of each row; what lies behind is padding, which we do not compute


def sizes(name: str) -> dict[str, Any]:
    """`spec` is the model of spec/training.md 6.3; `tiny` has the embedded model's sizes."""
    if name == "tiny":
        text = {
            "vocab_size": 4096, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6,
            "num_attention_heads": 6, "num_key_value_heads": 2, "moe_intermediate_size": [192, 64],
            "moe_num_experts": 8, "moe_num_shared_experts": 1, "moe_k": 2,
            "mlp_layer_types": ["dense"] + ["sparse"] * 5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [6, 6, 4]},
        }  # fmt: skip
        return {
            "text": text,
            "vision": {"depth": 6, "hidden_size": 128, "intermediate_size": 512, "num_heads": 4},
        }
    text = {
        "vocab_size": 512, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "moe_intermediate_size": [96, 32],
        "moe_num_experts": 16, "moe_num_shared_experts": 1, "moe_k": 4,
        "mlp_layer_types": ["dense"] + ["sparse"] * 3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [6, 6, 4]},
    }  # fmt: skip
    return {"text": text, "vision": {"depth": 2, "hidden_size": 64, "intermediate_size": 256, "num_heads": 2}}


def build_theirs(name: str) -> Any:
    from transformers import Ernie4_5_VLMoeConfig, Ernie4_5_VLMoeForConditionalGeneration

    found = sizes(name)
    last = found["text"]["vocab_size"] - 1
    config = Ernie4_5_VLMoeConfig(
        text_config=found["text"],
        vision_config=found["vision"],
        image_token_id=last - 5,
        image_start_token_id=last - 3,
        image_end_token_id=last - 2,
        video_token_id=last - 4,
        video_start_token_id=last - 1,
        video_end_token_id=last,
    )
    torch.manual_seed(0)
    model: Any = Ernie4_5_VLMoeForConditionalGeneration(config)  # fp32, as built
    return model.train()


def build_work(ours: Ernie, rows: int, length: int, is_mixed: bool) -> Work:
    """Mixed rows have lengths evenly spread from a quarter of `length` to all of it."""
    rng = np.random.default_rng(0)
    ids = ours.config.ids
    tokens = (SIDE // 2) ** 2
    ids_BL = rng.integers(3, ours.config.vocab_size - 8, (rows, length))
    ids_BL[:, 4], ids_BL[:, 5 : 5 + tokens], ids_BL[:, 5 + tokens] = (
        ids.image_start,
        ids.image_patch,
        ids.image_end,
    )
    labels = np.full_like(ids_BL, -100)
    lengths = [length] * rows
    if is_mixed:
        lengths = [int(n) for n in np.linspace(length // 4, length, rows)]
    for row, count in enumerate(lengths):
        labels[row, count // 2 : count] = ids_BL[row, count // 2 : count]
        ids_BL[row, count:] = 0
    patches = torch.from_numpy(rng.standard_normal((rows * SIDE * SIDE, 588), dtype=np.float32))
    spans = [[Span(5, Grid(1, SIDE, SIDE))] for _ in range(rows)]
    return Work(torch.from_numpy(ids_BL), torch.from_numpy(labels), patches, spans, lengths)


def our_loss(model: Ernie, work: Work) -> Tensor:
    """As the training kit does it: whole sequences side by side, logits only where a label is."""
    features = model.encode(work.patches_PX, [span.grid for row in work.spans for span in row])
    whole = [row[:count].tolist() for row, count in zip(work.ids_BL, work.lengths, strict=True)]
    batch = build_batch(whole, model.config, work.spans, features)
    shifted = F.pad(work.labels_BL[:, 1:], (0, 1), value=-100)
    wanted = torch.cat([row[:count] for row, count in zip(shifted, work.lengths, strict=True)])
    rows = (wanted != -100).nonzero().flatten()
    hidden = model(replace(batch, logit_rows=rows), PackedCausal())
    return cross_entropy(model.unembed(hidden), wanted[rows]).mean()


def their_loss(model: Any, work: Work, patch_id: int) -> Tensor:
    length = work.ids_BL.shape[1]
    is_patch = (work.ids_BL == patch_id).long()
    is_vision = is_patch.clone()
    for row, spans in enumerate(work.spans):
        for span in spans:  # the marks around a picture go to the vision experts too
            is_vision[row, span.start - 1 : span.start + SIDE * SIDE // 4 + 1] = 1
    output = model(
        input_ids=work.ids_BL,
        attention_mask=(torch.arange(length) < torch.tensor(work.lengths)[:, None]).long(),
        mm_token_type_ids=is_patch,
        moe_mm_token_type_ids=is_vision,
        pixel_values=work.patches_PX,
        image_grid_thw=torch.tensor([list(span.grid) for spans in work.spans for span in spans]),
        labels=work.labels_BL,
    )
    return output.loss  # type: ignore[no-any-return]


def stepper(
    model: torch.nn.Module, loss: Callable[[], Tensor], products: Callable[[], AbstractContextManager[Any]]
) -> Callable[[], tuple[float, float]]:
    """A whole step whose forward and backward run inside `products`; returns (seconds, loss)."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> tuple[float, float]:
        started = time.perf_counter()
        optimizer.zero_grad()
        with products():
            value = loss()
            value.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        return time.perf_counter() - started, float(value.detach())

    return step


def compare(name: str, rows: int, length: int, steps: int, is_mixed: bool) -> dict[str, Any]:
    theirs = build_theirs(name)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = load_model(folder).train()
    work = build_work(ours, rows, length, is_mixed)
    patch_id = ours.config.ids.image_patch

    def our_step(bf16: bool) -> Callable[[], tuple[float, float]]:
        model, cpu = deepcopy(ours), torch.device("cpu")
        return stepper(model, lambda: our_loss(model, work), lambda: fast_products(bf16, cpu))

    def their_step(bf16: bool) -> Callable[[], tuple[float, float]]:
        model = deepcopy(theirs)
        return stepper(
            model,
            lambda: their_loss(model, work, patch_id),
            lambda: torch.autocast("cpu", torch.bfloat16, enabled=bf16),
        )

    steps_of = {
        "duomo fp32": our_step(False),
        "duomo bf16": our_step(True),
        "transformers fp32": their_step(False),
        "transformers bf16": their_step(True),
    }
    first = {who: step()[1] for who, step in steps_of.items()}
    exact, ours_fp32 = first["transformers fp32"], first["duomo fp32"]
    if abs(ours_fp32 - exact) > 1e-4 or abs(first["duomo bf16"] - exact) > 1e-2:
        raise Error(f"the losses differ, so the two do not compute the same: {first}")
    seconds: dict[str, list[float]] = {who: [] for who in steps_of}
    for _ in range(steps):
        for who, step in steps_of.items():
            seconds[who].append(step()[0])
    best = [
        min(pair) for pair in zip(seconds["transformers fp32"], seconds["transformers bf16"], strict=True)
    ]
    medians = {who: statistics.median(values) for who, values in seconds.items()}
    return {
        "sizes": name, "rows": rows, "lengths": work.lengths, "pictures": rows, "steps": steps,
        "parameters": sum(p.numel() for p in ours.parameters()),
        "tokens_per_s": {who: round(sum(work.lengths) / value) for who, value in medians.items()},
        "median_step_s": {who: round(value, 4) for who, value in medians.items()},
        "ratio_fp32": _ratio(seconds["duomo fp32"], seconds["transformers fp32"]),
        "ratio_bf16_to_their_faster": _ratio(seconds["duomo bf16"], best),
        "first_loss": {who: round(value, 6) for who, value in first.items()},
        "threads": torch.get_num_threads(), "torch": torch.__version__, "machine": platform.machine(),
    }  # fmt: skip


def _ratio(ours: list[float], theirs: list[float]) -> float:
    """The median of theirs over ours, step by step."""
    return round(statistics.median(t / o for o, t in zip(ours, theirs, strict=True)), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="*", default=["spec", "tiny"], choices=["spec", "tiny"])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = [
        compare(name, options.rows, options.length, options.steps, is_mixed)
        for name in options.sizes
        for is_mixed in (False, True)
    ]
    text = json.dumps(results, indent=1)
    print(text)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
