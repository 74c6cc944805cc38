"""SHA256SUMS beside a source: what is damaged is named, each is read for it once, a mended one goes on."""

import shutil
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import duomo
from duomo.checkpoints import checksums, save_model
from duomo.checkpoints.checksums import Checksums
from duomo.checkpoints.stream import CheckpointStream
from duomo.errors import CheckpointError, CorruptFile
from duomo.model import Ernie, init_weights
from duomo.quant import quantize
from tests.quant.test_pipeline import CONFIG

SHIPPED = Path(duomo.__file__).parent / "assets" / "tiny"


def list_sums(folder, between="  "):
    lines = [f"{sha256(p.read_bytes()).hexdigest()}{between}{p.name}\n" for p in sorted(folder.iterdir())]
    (folder / "SHA256SUMS").write_text("".join(lines))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine") / "source"
    save_model(init_weights(Ernie(CONFIG), seed=1), folder, torch.float32, max_shard_bytes=250_000)
    (folder / "README.md").write_text("a card")
    (folder / "tokenizer.json").write_text("{}")
    list_sums(folder)
    return folder


@pytest.fixture
def source(pristine, tmp_path):
    return Path(shutil.copytree(pristine, tmp_path / "source"))


def home_of(folder, tensor):
    return next(path for path in folder.glob("*.safetensors") if tensor in load_file(path))


def flip_last_byte(path):
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def test_a_damaged_file_is_named_and_a_mended_one_goes_on(pristine, source, tmp_path):
    last = home_of(source, "model.layers.2.self_attn.q_proj.weight")
    flip_last_byte(last)
    with pytest.raises(
        CorruptFile, match=f"{last} is damaged: its SHA-256 begins [0-9a-f]{{12}}, "
    ) as caught:
        quantize(source, tmp_path / "two", "2")
    assert "\n" not in str(caught.value) and caught.value.file == str(last)
    assert (tmp_path / "two/.quantize/piece-1.json").exists()  # what came before it is done
    shutil.copyfile(pristine / last.name, last)
    steps = []
    quantize(source, tmp_path / "two", "2", progress=steps.append)
    assert steps[0].done >= 2
    quantize(pristine, tmp_path / "whole", "2")
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert (tmp_path / "two" / path.name).read_bytes() == path.read_bytes()


def test_every_file_is_read_for_its_sum_once(source, tmp_path, monkeypatch):
    read, digest = [], checksums.sha256_of
    monkeypatch.setattr(checksums, "sha256_of", lambda path: read.append(path.name) or digest(path))
    quantize(source, tmp_path / "two", "2")
    listed = {line.split()[1] for line in (source / "SHA256SUMS").read_text().splitlines()}
    assert len(listed) > 5 and sorted(read) == sorted(listed - {"README.md"})


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_small_files_are_compared_before_anything_is_written(source, tmp_path, name):
    with (source / name).open("a") as file:
        file.write(" ")
    with pytest.raises(CorruptFile, match=name):
        quantize(source, tmp_path / "two", "2")
    assert not (tmp_path / "two").exists()


def test_a_damaged_header_is_damage_and_no_riddle(source):
    path = home_of(source, "model.layers.2.self_attn.q_proj.weight")
    path.write_bytes(path.read_bytes().replace(b"layers.2.self_attn.q_proj", b"layers.2.self_attn.x_proj", 1))
    with pytest.raises(CorruptFile, match=f"{path.name} is damaged"):
        CheckpointStream(source)


def test_a_card_may_be_corrected_and_what_is_not_listed_may_be_anything(source, tmp_path):
    (source / "README.md").write_text("another card")
    tensors = load_file(path := home_of(source, "model.layers.2.self_attn.q_proj.weight"))
    save_file(tensors, path, {"format": "pt", "more": "words"})
    sums = source / "SHA256SUMS"
    sums.write_text("".join(line for line in sums.open() if path.name not in line))
    quantize(source, tmp_path / "two", "2")


def test_a_listed_weight_file_that_is_missing_is_named(source):
    (gone := home_of(source, "model.layers.2.self_attn.q_proj.weight")).unlink()
    with pytest.raises(CheckpointError, match=f"{gone.name}, which is not there"):
        CheckpointStream(source)


@pytest.mark.parametrize("between", ["  ", " *", "  ./", " *./"])
def test_the_forms_that_sha256sum_writes(source, between):
    (source / "SHA256SUMS").unlink()
    list_sums(source, between)
    found = Checksums.of(source)
    assert len(found.digests) > 5
    found.compare_all(source / name for name in found.digests)
    flip_last_byte(source / "README.md")
    with pytest.raises(CorruptFile, match=r"README\.md is damaged"):
        Checksums.of(source).compare(source / "README.md")


@pytest.mark.parametrize("line", ["no sum at all", "ab12  config.json", "\xff\xfe\x00", "0" * 64])
def test_a_list_that_is_none(source, line):
    (source / "SHA256SUMS").write_bytes(b"\n" + line.encode("latin-1"))
    with pytest.raises(CorruptFile, match=r"SHA256SUMS:2 is not a SHA-256"):
        Checksums.of(source)


def test_the_shipped_folder_is_what_its_list_says():
    found = Checksums.of(SHIPPED)
    assert "model.safetensors" in found.digests and "README.md" not in found.digests
    found.compare_all(SHIPPED / name for name in found.digests)
