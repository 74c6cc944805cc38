"""The vocabulary of `tiny` (4,096 ids) or `mini` (6,144): byte fallback, every digit a piece of its own.

Laid out as ERNIE's: `<unk> <s> </s>`, bytes, merged pieces, then the control tokens in ERNIE's order at the
very end, so that "id >= im_patch_id" holds here too. Adding needs the single digits: a model that sees "47"
as one piece cannot carry.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

VOCAB_SIZES = {"tiny": 4096, "mini": 6144}
VOCAB_SIZE = VOCAB_SIZES["tiny"]
CONTROL_TOKENS = (
    "<|end_of_sentence|>",
    "<|begin_of_sentence|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_list>",
    "</tool_list>",
    "<tool_output>",
    "</tool_output>",
    "<response>",
    "</response>",
    "<|IMAGE_PLACEHOLDER|>",
    "<|AUDIO_PLACEHOLDER|>",
    *(f"<|LOC_{place}|>" for place in range(0, 1001, 10)),
    "<|LOC_BEGIN|>",
    "<|LOC_END|>",
    "<|LOC_SEP|>",
    "<|CROP_COL_SEP|>",
    "<|CROP_ROW_SEP|>",
    "<|IMAGE_SEP|>",
    "<|IMAGE_START|>",
    "<|IMAGE_END|>",
    "<|VIDEO_START|>",
    "<|VIDEO_END|>",
    "<|ASR_START|>",
    "<|ASR_END|>",
)
_FIRST_TOKENS = ("<unk>", "<s>", "</s>")
_BYTES = tuple(f"<0x{value:02X}>" for value in range(256))


def train_vocabulary(texts: Iterable[str], path: Path, vocab_size: int = VOCAB_SIZE) -> None:
    """Learns merges from the texts and writes `tokenizer.json`."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    num_pieces = vocab_size - len(CONTROL_TOKENS)
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=False))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(Regex(r"\n|[、，。？！：,.?!:;()+=/*-]"), "isolated"),
            pre_tokenizers.Split("▁", "merged_with_next"),
        ]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=num_pieces,
        special_tokens=[*_FIRST_TOKENS, *_BYTES],
        limit_alphabet=2200,
        min_frequency=2,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    fields: dict[str, Any] = json.loads(backend.to_str())
    vocabulary: dict[str, int] = fields["model"]["vocab"]
    for filler in range(len(vocabulary), num_pieces):
        vocabulary[f"<|reserved_{filler}|>"] = filler
    for offset, name in enumerate(CONTROL_TOKENS):
        vocabulary[name] = num_pieces + offset
    fields["added_tokens"] = [
        {
            "id": vocabulary[name],
            "content": name,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for name in (*_FIRST_TOKENS, *CONTROL_TOKENS)
    ]
    path.write_text(json.dumps(fields, ensure_ascii=False, indent=1), encoding="utf-8")
