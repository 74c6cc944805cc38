"""What fits: arithmetic on inventories, against figures worked out by hand for the 28B."""

from __future__ import annotations

from pathlib import Path

import pytest

from duomo.checkpoints import save_model
from duomo.checkpoints.fit import PROCESS_BYTES, fit, parse_bytes
from duomo.checkpoints.inventory import Inventory, Size, part_of, take_inventory
from duomo.cli import main
from duomo.errors import ConfigError
from duomo.model import ModelConfig, preset
from duomo.quant.plan import build_plan
from duomo.quant.synth import parameter_shapes
from tests.tiny import TINY, tiny_model


def planned(config: ModelConfig) -> Inventory:
    """The inventory a quantized checkpoint of this config will have."""
    plan, parts = build_plan("2", config), {}
    for name, shape in parameter_shapes(config).items():
        size = parts.setdefault(part_of(name), Size())
        size.num_bytes += plan.num_bytes(name, shape)
    return Inventory(config, "quantized", 0, parts=parts)


@pytest.mark.parametrize(
    ("text", "expected"), [("16G", 16 * 10**9), ("512M", 512 * 10**6), ("2.5GiB", 5 << 29), ("100", 100)]
)
def test_sizes_are_read(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "G", "16X", "-3G", "1e9"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size"):
        parse_bytes(text)


def test_the_28b_in_16_gigabytes() -> None:
    result = fit(planned(preset("vl-28b-a3b")), parse_bytes("16G"))
    assert result.kv_bytes_per_token == 57_344
    assert result.holds_text and result.holds_everything
    # 6 of 64 experts of 27 layers, three matrices of 1536 x 2560, 2 bits and a 2-byte scale a row
    routed = 27 * 6 * (3 * 1536 * 2560 // 4 + 2 * (2 * 1536 + 2560))
    assert result.read_per_token["text experts"] == routed
    assert 1.3e9 < result.read_bytes < 1.4e9
    assert result.longest_context_tokens == 131_072
    assert result.largest_picture_tokens > 6_177  # the processor's own largest
    assert result.decode_bound(2 * result.read_bytes) == 2


def test_less_memory_reads_experts_from_disk() -> None:
    inventory = planned(preset("vl-28b-a3b"))
    result = fit(inventory, parse_bytes("5G"))
    assert not result.holds_text and not result.holds_everything
    expected = result.text_bytes + PROCESS_BYTES + 4096 * 57_344 - 5 * 10**9
    assert result.missing_bytes == expected
    assert 0 < result.disk_per_token < result.read_per_token["text experts"]


def test_plan_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tiny_model(TINY), tmp_path)
    inventory = take_inventory(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["plan", str(tmp_path), "--ram", "2G"])
    out = capsys.readouterr().out
    assert not stopped.value.code and "one stream decodes at most" in out
    assert f"{fit(inventory, 2 * 10**9).longest_context_tokens:,}" in out


@pytest.mark.parametrize(("ram", "said"), [("400M", "too little"), ("much", "not a size")])
def test_what_cannot_fit_is_one_line(
    ram: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tiny_model(TINY), tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["plan", str(tmp_path), "--ram", ram])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and said in error and error.count("\n") == 1
