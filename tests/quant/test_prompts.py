"""Calibration files and folders, and what a folder without any says."""

import json

import pytest
from PIL import Image

from duomo.errors import ConfigError
from duomo.quant.memory import check_memory, peak_bytes
from duomo.quant.prompts import read_prompts
from tests.tiny import TINY, TINY_TEXT


class Letters:
    def encode(self, text):
        return [10 + ord(letter) % 90 for letter in text]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 1030)
    Image.new("RGB", (60, 90), "red").save(tmp_path / "b.png")
    (tmp_path / "b.txt").write_text("red")
    lines = [{"text": "hello"}, {"text": "seen", "image": "b.png"}]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return tmp_path


def test_a_folder_of_everything(folder):
    prompts = read_prompts(folder, Letters(), TINY)
    assert [len(p.ids) for p in prompts if not p.media] == [512, 512, 6, 5]
    pictures = [p for p in prompts if p.media]
    assert len(pictures) == 2
    for prompt in pictures:
        (span,), (medium,) = prompt.spans, prompt.media
        stop = span.start + span.grid.num_tokens
        assert set(prompt.ids[span.start : stop]) == {TINY.ids.image_patch}
        assert prompt.ids[span.start - 1] == TINY.ids.image_start and prompt.ids[stop] == TINY.ids.image_end
        assert len(medium.patches) == span.grid.num_patches


def test_what_cannot_be_read_says_why(folder, tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        read_prompts(folder / "no", Letters(), TINY)
    with pytest.raises(ConfigError, match="reads text only"):
        read_prompts(folder / "b.png", Letters(), TINY_TEXT)
    (folder / "bad.jsonl").write_text("[1]")
    with pytest.raises(ConfigError, match=r"bad\.jsonl:1"):
        read_prompts(folder / "bad.jsonl", Letters(), TINY)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no calibration prompts"):
        read_prompts(tmp_path / "empty", Letters(), TINY)


def test_memory_is_told_beforehand():
    needed = peak_bytes(TINY, 1000)
    check_memory(TINY, 1000, needed)
    with pytest.raises(ConfigError, match="tokens would fit"):
        check_memory(TINY, 1000, needed - 1)
    assert peak_bytes(TINY, 2000) > needed
    with pytest.raises(ConfigError, match="4,000 tokens would fit"):
        check_memory(TINY, 9000, peak_bytes(TINY, 4500))
