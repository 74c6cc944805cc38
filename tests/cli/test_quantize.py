"""`duomo quantize` as typed: every bad input is one line and exit code 2, and an interrupted run goes on."""

import json
import os

import pytest
import torch

import duomo.quant.pipeline as pipeline
from duomo.checkpoints import save_model
from duomo.cli import main
from duomo.model import Ernie, init_weights
from duomo.processing.tokenizer import Tokenizer
from tests.quant.test_pipeline import CONFIG


@pytest.fixture(scope="module")
def source(tmp_path_factory, vocabulary):
    from dataclasses import replace

    folder = tmp_path_factory.mktemp("source")
    (folder / "tokenizer.json").write_bytes((vocabulary / "tokenizer.json").read_bytes())
    config = replace(CONFIG, vocab_size=Tokenizer.load(folder).vocab_size)
    save_model(init_weights(Ernie(config), seed=1), folder, torch.float32)
    return folder


def refused(capsys, *arguments):
    """What was said of a command that was refused: one line and nothing else."""
    with pytest.raises(SystemExit) as stop:
        main(["quantize", *map(str, arguments)])
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.out == "" and printed.err.count("\n") == 1
    return printed.err


@pytest.mark.parametrize(
    "options, said",
    [
        (["--bits", "3"], "there are 2, 2.3, 4, auto"),
        (["--bits", "auto"], "needs a budget of bytes and calibration prompts"),
        (["--budget", "9G"], "a budget of bytes is for --bits auto"),
        (["--budget", "1..2G"], "'1..2G' is no number of bytes; write it as 900M or 8.6G"),
        (["--memory", "-3G"], "'-3G' is no number of bytes"),
        (["--memory", "10M"], r"quantizing needs about 1.5 GB"),
        (["--code", "lcc2-9"], "there are lcc2-10, lcc2-12, lcc2-14"),
        (["--tune"], "tuning needs calibration prompts"),
        (["--embeddings", "5"], "embeddings of 5 bits; there are 8 and 6"),
        (["--attention", "6"], "attention of 6 bits; there are 4 and 8"),
        (["--threads", "-2"], "-2 threads; give 1 or more"),
        (["--calibration", "/no/such"], "/no/such does not exist"),
    ],
)
def test_options_that_cannot_be(source, tmp_path, capsys, options, said):
    assert said in refused(capsys, source, tmp_path / "x", *options)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.txt", b"", "holds no calibration prompts; it needs text in .txt or .jsonl, or pictures"),
        ("a.txt", b"\xff\xfe\x00", "a.txt is not readable UTF-8 text"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "a.jsonl:2 is not JSON"),
        ("a.jsonl", b"[1, 2]", 'a.jsonl:1 is not {"text": "...", "image": "a path, or left out"}'),
        ("a.jsonl", b'{"words": "x"}', "a.jsonl:1 is not"),
        ("a.jsonl", b'{"text": null}', "a.jsonl:1 is not"),
        ("a.jsonl", b'{"text": "x", "image": "none.png"}', "none.png cannot be read: No such file"),
        ("a.png", b"no picture", "a.png is no picture for calibration: the picture is in no format"),
        ("a.pdf", b"%PDF", "holds no calibration prompts"),
    ],
)
@pytest.mark.parametrize("in_folder", [False, True])
def test_calibration_that_cannot_be_read(source, tmp_path, capsys, name, content, said, in_folder):
    (folder := tmp_path / "calibration").mkdir()
    (folder / name).write_bytes(content)
    given = folder if in_folder else folder / name
    assert said in refused(capsys, source, tmp_path / "x", "--calibration", given)
    assert not (tmp_path / "x").exists()


def test_folders_that_cannot_be(source, tmp_path, capsys):
    assert "no config.json; give the folder of a checkpoint" in refused(capsys, "/no/such", tmp_path / "x")
    file = source / "model.safetensors"
    assert "no config.json; give the folder of a checkpoint" in refused(capsys, file, tmp_path / "x")
    assert "is a file; give a new folder" in refused(capsys, source, file)
    assert "model.safetensors/x/.quantize cannot be used: Not a directory" in refused(
        capsys, source, file / "x"
    )
    assert "is not empty; give a new folder" in refused(capsys, source, source)


def test_an_interrupt_says_how_to_go_on_and_others_settings_are_refused(
    source, tmp_path, capsys, monkeypatch
):
    write, calls = pipeline.write_quantized, []

    def interrupted(path, stored):
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return write(path, stored)

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(pipeline, "write_quantized", interrupted)
    monkeypatch.setattr(os, "_exit", leave)
    target, text = tmp_path / "two", tmp_path / "a.txt"
    text.write_text("one two three four " * 300)
    command = ["quantize", str(source), str(target), "--threads", "1"]
    with pytest.raises(SystemExit) as stop:
        main(command)
    said = capsys.readouterr()
    assert stop.value.code == 130 and said.out == ""
    assert said.err.endswith("duomo: stopped; the same command goes on after the last whole layer\n")

    assert "holds an unfinished run with another plan of bits and calibration; give a new folder" in refused(
        capsys, source, target, "--bits", "4", "--calibration", text
    )
    kept = (target / "model-00001.safetensors").read_bytes()
    (target / "model-00001.safetensors").write_bytes(kept[:-1])
    assert "model-00001.safetensors is not as the unfinished run left it" in refused(capsys, source, target)
    (target / "model-00001.safetensors").write_bytes(kept)

    with pytest.raises(SystemExit) as stop:
        main(command)
    said = capsys.readouterr()
    assert stop.value.code == 0 and said.out.endswith("bits a weight; see report.md\n")
    assert len(calls) == 5  # two before, the one that failed, and the two that were left
    assert "is not empty; give a new folder" in refused(capsys, source, target)
    assert "is quantized already; give the checkpoint it was made from" in refused(
        capsys, target, tmp_path / "y"
    )
    report = json.loads((target / "report.json").read_text())
    assert not report["calibrated"]
