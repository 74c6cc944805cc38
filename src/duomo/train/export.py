"""A finished run into a checkpoint that everything else opens: `python -m duomo.train.export`.

The PT layout with bf16 weights and fp32 routers, the tokenizer, the generation and preprocessing defaults,
and SHA256SUMS over all of it. The model card beside them is written by hand, kept, and in no sum.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from duomo.checkpoints import save_model
from duomo.checkpoints.checksums import SUMS_NAME, sha256_of
from duomo.model import Ernie
from duomo.processing.tokenizer import Tokenizer
from duomo.train.recipe import Recipe
from duomo.train.run import averaged, build_model

EMBEDDED = Path(__file__).parents[1] / "assets" / "tiny"
MAX_PIXELS = 140 * 168  # the largest picture of the training; bigger ones are reduced to it
MIN_PIXELS = 56 * 112
_NOT_SUMMED = (SUMS_NAME, "README.md")


def export(run: Path, folder: Path) -> None:
    """Writes the averaged model of a finished run into `folder`. TrainingError if a stage is missing."""
    tokenizer = Tokenizer.load(run)
    model = build_model(tokenizer, seed=0)
    model.load_state_dict(averaged(run, Recipe().export))
    folder.mkdir(parents=True, exist_ok=True)
    save_model(model, folder, torch.bfloat16)
    shutil.copyfile(run / "tokenizer.json", folder / "tokenizer.json")
    for name, fields in _settings(model, tokenizer).items():
        (folder / name).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    write_sums(folder)


def _settings(model: Ernie, tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    ids = model.config.ids
    return {
        "generation_config.json": {
            "do_sample": False,
            "temperature": 0.0,
            "bos_token_id": ids.bos,
            "eos_token_id": list(tokenizer.eos_ids),
            "pad_token_id": ids.pad,
        },
        "preprocessor_config.json": {
            "min_pixels": MIN_PIXELS,
            "max_pixels": MAX_PIXELS,
            "video": {
                "fps": 2.0,
                "min_frames": 4,
                "max_frames": 8,
                "min_pixels": 112**2,
                "max_pixels": 112**2,
            },
            "patch_size": 14,
            "merge_size": 2,
            "temporal_conv_size": 2,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        },
    }


def write_sums(folder: Path) -> None:
    """SHA256SUMS of the folder's files but the card, as `sha256sum --check` reads it."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.name not in _NOT_SUMMED)
    lines = [f"{sha256_of(file)}  {file.name}\n" for file in files]
    (folder / SUMS_NAME).write_text("".join(lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/tiny"), help="the folder of a finished run")
    parser.add_argument("--to", type=Path, default=EMBEDDED, help="where the checkpoint goes")
    options = parser.parse_args()
    export(options.run, options.to)


if __name__ == "__main__":
    main()
