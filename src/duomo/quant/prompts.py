"""Calibration prompts from a file or a folder: text, and pictures with what was said about them.

    FILE.txt      cut into prompts of 512 tokens
    FILE.jsonl    {"text": ..., "image": "path, relative to the file"}, one prompt a line; image is optional
    FOLDER        all of these in it; a picture goes with the .txt of the same name, where there is one

Better than any text is what the model itself would read and write in use: whole dialogues in its template.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from duomo.errors import ConfigError, MediaError
from duomo.model import ModelConfig
from duomo.processing.images import load_image
from duomo.processing.messages import ImagePart
from duomo.processing.prompt import MediaSpan, Prompt
from duomo.processing.tokenizer import Tokenizer

TEXT_TOKENS = 512
MAX_PIXELS = 448 * 448  # of a calibration picture: 256 tokens; more of them says more than larger ones
PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def read_prompts(path: str | Path, tokenizer: Tokenizer, config: ModelConfig) -> list[Prompt]:
    """All prompts of a file or folder, in the order of names. ConfigError where there are none."""
    path = Path(path)
    if not path.exists():
        raise ConfigError(f"{path} does not exist; give a .txt or .jsonl file or a folder of them")
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    names = {file.name for file in files}
    prompts: list[Prompt] = []
    for file in files:
        if file.suffix == ".jsonl":
            prompts += _lines(file, tokenizer, config)
        elif file.suffix == ".txt" and not any(file.stem + ending in names for ending in PICTURES):
            prompts += _pieces(tokenizer.encode(_text(file)), tokenizer)
        elif file.suffix.lower() in PICTURES:
            caption = file.with_suffix(".txt")
            prompts.append(_picture(file, _text(caption) if caption.exists() else "", tokenizer, config))
    if not prompts:
        raise ConfigError(
            f"{path} holds no calibration prompts; it needs text in .txt or .jsonl, or pictures"
        )
    return prompts


def _pieces(ids: list[int], tokenizer: Tokenizer) -> Iterator[Prompt]:
    for start in range(0, len(ids), TEXT_TOKENS):
        if len(ids) - start >= 2:
            yield Prompt(ids[start : start + TEXT_TOKENS])


def _lines(file: Path, tokenizer: Tokenizer, config: ModelConfig) -> Iterator[Prompt]:
    for number, line in enumerate(_text(file).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{file}:{number} is not JSON: {error}") from error
        fields = row if isinstance(row, dict) else {}
        text, image = fields.get("text", ""), fields.get("image")
        if (
            not {"text", "image"} & set(fields)
            or not isinstance(text, str)
            or isinstance(image, (list, dict))
        ):
            raise ConfigError(f'{file}:{number} is not {{"text": "...", "image": "a path, or left out"}}')
        if image is not None:
            yield _picture(file.parent / str(image), text, tokenizer, config)
        else:
            yield from _pieces(tokenizer.encode(text), tokenizer)


def _picture(file: Path, text: str, tokenizer: Tokenizer, config: ModelConfig) -> Prompt:
    if config.vision is None:
        raise ConfigError(f"{file.name} is a picture, and this model reads text only")
    try:
        medium = load_image(ImagePart(file.read_bytes(), max_pixels=MAX_PIXELS))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
    except MediaError as error:
        raise ConfigError(f"{file} is no picture for calibration: {error.message}") from error
    ids = [config.ids.bos, config.ids.image_start]
    span = MediaSpan(len(ids), medium.grid)
    ids += [config.ids.image_patch] * medium.grid.num_tokens
    return Prompt([*ids, config.ids.image_end, *tokenizer.encode(text)], (medium,), (span,))


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} is not readable UTF-8 text: {error}") from error
