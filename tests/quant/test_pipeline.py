"""`quantize` end to end on a small model: sizes, report, a kill -9 in the middle, and refusals."""

import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from duomo.checkpoints import load_model, save_model
from duomo.checkpoints.quantized import open_quantized
from duomo.errors import CheckpointError, ConfigError
from duomo.model import BankConfig, Ernie, ModelConfig, SpecialIds, VisionConfig, init_weights
from duomo.processing.patches import patchify
from duomo.processing.prompt import Media, MediaSpan, Prompt
from duomo.quant import build_plan, quantize
from duomo.quant.judge import compare_logits
from duomo.train.lora import LoraPlan, attach, merge
from duomo.trellis import LCC4_12, IntTensor, TrellisBank, TrellisTensor
from tests.checkpoints.test_layouts import to_paddle

CONFIG = ModelConfig(
    vocab_size=96,
    hidden_size=64,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    intermediate_size=128,
    expert_layers=(False, True, True),
    text_experts=BankConfig(4, 64),
    vision_experts=BankConfig(4, 32),
    num_chosen=2,
    shared_size=64,
    vision=VisionConfig(num_layers=1, hidden_size=32, intermediate_size=64, num_heads=2),
    rope_section=(5, 5, 6),
    initializer_range=0.06,
    ids=SpecialIds(
        image_patch=90, video_patch=90, image_start=91, image_end=92, video_start=93, video_end=94
    ),
)


def prompts(num=6, length=60, seed=0):
    rng = np.random.default_rng(seed)
    made = [Prompt(rng.integers(3, 90, length).tolist()) for _ in range(num)]
    for _ in range(num):
        patches, grid = patchify(rng.integers(0, 255, (56, 84, 3), dtype=np.uint8))
        ids = [5, 91, *[90] * grid.num_tokens, 92, *rng.integers(3, 90, 20).tolist()]
        made.append(Prompt(ids, (Media("image", patches, grid, bytes([len(made)])),), (MediaSpan(2, grid),)))
    return made


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    save_model(init_weights(Ernie(CONFIG), seed=1), folder, torch.float32)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def done(source, tmp_path_factory):
    target = tmp_path_factory.mktemp("out") / "two"
    steps = []
    report = quantize(source, target, "2", prompts(), progress=steps.append)
    return target, report, steps


def test_everything_is_stored_as_planned(done):
    files = open_quantized(done[0])
    kinds = {name: type(file.read(name)) for name, file in files.items()}
    assert kinds["decoder.layers.1.mlp.text.gate_up"] is TrellisBank
    assert kinds["decoder.layers.0.mlp.down.weight"] is TrellisTensor
    assert kinds["embed.weight"] is kinds["vision_tower.blocks.0.fc1.weight"] is IntTensor
    assert kinds["decoder.layers.1.mlp.vision.router.weight"] is torch.Tensor
    bank = files["decoder.layers.1.mlp.text.gate_up"].read("decoder.layers.1.mlp.text.gate_up")
    assert bank.code.bits == 2
    assert (
        bank.seed
        == files["decoder.layers.1.mlp.shared.up.weight"].read("decoder.layers.1.mlp.shared.up.weight").seed
    )
    assert not (done[0] / ".quantize").exists()
    assert (done[0] / "tokenizer.json").exists()


def test_embeddings_of_six_bits(source, tmp_path):
    plan = build_plan("2", CONFIG, embedding_bits=6)
    report = quantize(source, tmp_path / "six", plan)
    outside = {tensor["name"]: tensor for tensor in report["outside"]}
    assert outside["embed.weight"]["kind"] == "int6" and outside["embed.weight"]["weight_error"] > 1e-4
    assert outside["embed.weight"]["num_bytes"] == plan.num_bytes(
        "embed.weight", (CONFIG.vocab_size, CONFIG.hidden_size)
    )
    ours, theirs = load_model(tmp_path / "six", torch.float32), load_model(source, torch.float32)
    assert ours.embed.packed.stored.bits == 6
    kl, _ = compare_logits(theirs.logits([5, 9, 33]), ours.logits([5, 9, 33]))
    assert 0 < kl.mean() < 0.5


def test_it_loads_like_any_checkpoint(done, source):
    ours, theirs = load_model(done[0], torch.float32), load_model(source, torch.float32)
    assert ours.config.hidden_size == CONFIG.hidden_size
    ids = list(range(3, 60))
    kl, _ = compare_logits(theirs.logits(ids), ours.logits(ids))
    uniform, _ = compare_logits(theirs.logits(ids), torch.zeros(len(ids), CONFIG.vocab_size))
    assert 0 < kl.mean() < 0.2 * uniform.mean()


def test_the_report_tells_what_was_measured(done):
    target, report, steps = done
    assert json.loads((target / "report.json").read_text())["file_bytes"] == report["file_bytes"]
    assert report["file_bytes"] == sum(p.stat().st_size for p in target.glob("*.safetensors"))
    assert set(report["quality"]) == {"text", "picture"}
    outside = {t["name"]: t for t in report["outside"] if t["kind"] != "plain"}
    assert {"embed.weight", "resampler.project.weight"} < set(outside)
    for tensor in outside.values():
        assert 0 < tensor["held_out_error"] < 1e-3 and 0 < tensor["weight_error"] < 1e-3
    layer = report["layers"][1]
    assert set(layer["agreement"]) == {"text", "vision"} and 0 < layer["agreement"]["text"] <= 1
    assert sum(layer["tokens"]["vision"]) > 0
    errors = {t["name"]: t["held_out_error"] for t in layer["tensors"] if t["kind"] == "two"}
    assert len(errors) == 4 and all(0 < error < 0.12 for error in errors.values())
    assert "| 1 | text " in (target / "report.md").read_text()
    assert [step.done for step in steps] == [0, 1, 2, 3, 4, 5] and steps[-1].seconds_left == 0
    assert steps[0].seconds_left is None and all(step.seconds_left > 0 for step in steps[1:-1])


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from test_pipeline import prompts
from duomo.quant import quantize
quantize({source!r}, {target!r}, "2", prompts(), progress=lambda step: print(step.done, flush=True))
"""


def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(done, source, tmp_path):
    from pathlib import Path

    target = tmp_path / "killed"
    script = SCRIPT.format(tests=str(Path(__file__).parent), source=str(source), target=str(target))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert [process.stdout.readline() for _ in range(3)] == ["0\n", "1\n", "2\n"]
    time.sleep(0.01)  # into the next layer
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(ConfigError, match="is being written by another run"):
        quantize(source, target, "2", prompts())
    process.kill()
    process.wait()
    assert (target / ".quantize").exists()
    steps = []
    quantize(source, target, "2", prompts(), progress=steps.append)
    assert steps[0].done >= 2
    for path in done[0].glob("*.safetensors"):
        assert (target / path.name).read_bytes() == path.read_bytes()


def test_a_fine_tuned_copy_in_either_layout(source, tmp_path):
    """Merged adapters are a checkpoint like any other; PT's names and Paddle's give the same bytes."""
    tuned = load_model(source, torch.float32)
    for adapter in attach(tuned, LoraPlan(LoraPlan.usual(4))).values():
        for key, parameter in adapter.named_parameters():
            if not key.startswith("base."):
                torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(3))
    merge(tuned)
    save_model(tuned, tmp_path / "pt", torch.float32)
    shutil.copytree(tmp_path / "pt", tmp_path / "paddle")
    save_file(to_paddle(load_file(tmp_path / "pt/model.safetensors")), tmp_path / "paddle/model.safetensors")
    for layout in ("pt", "paddle"):
        quantize(tmp_path / layout, tmp_path / f"{layout}-two", "2", prompts(num=2))
    for path in (tmp_path / "pt-two").glob("*.safetensors"):
        assert (tmp_path / "paddle-two" / path.name).read_bytes() == path.read_bytes()
    ids = list(range(3, 60))
    kl = [
        compare_logits(
            load_model(folder, torch.float32).logits(ids), load_model(tmp_path / "pt-two").logits(ids)
        )
        for folder in (tmp_path / "pt", source)
    ]
    assert kl[0][0].mean() < kl[1][0].mean()  # nearer to the copy than to what it was copied from


def test_tuning_brings_every_layer_nearer(done, source, tmp_path):
    report = quantize(source, tmp_path / "tuned", "2", prompts(), is_tuned=True)
    for layer in report["layers"]:
        before, after = layer["tuned"]
        assert 0 < after < before
    # Later layers' errors hang on which experts a few tokens choose: another seed moves them by 15 %.
    first = [r["layers"][0]["hidden_error"] for r in (report, done[1])]
    assert first[0] < first[1]
    plain, tuned = (
        next(f.read(n) for n, f in open_quantized(folder).items() if n == "decoder.layers.1.mlp.text.down")
        for folder in (done[0], tmp_path / "tuned")
    )
    assert (plain.row_scale != tuned.row_scale).any()


def test_without_calibration_it_rounds_and_says_so(source, tmp_path):
    report = quantize(source, tmp_path / "plain", "4")
    assert not report["calibrated"] and report["quality"] == {}
    assert "without error feedback" in (tmp_path / "plain/report.md").read_text()


def test_a_single_prompt_is_fitted_to_and_the_report_says_that_nothing_was_judged(source, tmp_path):
    report = quantize(source, tmp_path / "one", "2", prompts(num=1)[:1])
    assert report["calibrated"] and report["quality"] == {}
    said = (tmp_path / "one/report.md").read_text()
    assert "none was held out" in said and "without error feedback" not in said


def test_auto_spends_its_budget(source, tmp_path):
    two = quantize(source, tmp_path / "two", "2")["parts"]["everything"]["bytes"]
    report = quantize(source, tmp_path / "auto", "auto", prompts(), budget_bytes=two + 20_000)
    costs, raised = report["sensitivities"], report["plan"]["raised"]
    assert set(costs) == {"1.text", "1.vision", "2.text", "2.vision"} and len(raised) >= 1
    # What the last layer's vision experts say reaches no text token: nothing reads it.
    assert costs.pop("2.vision") == 0 and all(cost > 0 for cost in costs.values())
    assert raised[0] in costs
    assert two < report["parts"]["everything"]["bytes"] <= two + 20_000
    with pytest.raises(ConfigError, match="the least this plan can do"):
        quantize(source, tmp_path / "no", "auto", prompts(), budget_bytes=1000)


def test_refusals(done, source, tmp_path):
    with pytest.raises(ConfigError, match="is not empty"):
        quantize(source, done[0], "2")
    with pytest.raises(ConfigError, match=r"there are 2, 2\.3, 4, auto"):
        quantize(source, tmp_path / "x", "3")
    with pytest.raises(ConfigError, match="lcc4-12 is a code of 4 bits"):
        quantize(source, tmp_path / "x", "2", code=LCC4_12)
    with pytest.raises(ConfigError, match="needs a budget"):
        quantize(source, tmp_path / "x", "auto")


@pytest.mark.parametrize("name", ["model.layers.1.mlp.experts.2.up_proj.weight", "lm_head.weight"])
def test_weights_that_are_not_finite_are_refused_by_name(source, tmp_path, name):
    shutil.copytree(source, tmp_path / "damaged")
    tensors = load_file(tmp_path / "damaged/model.safetensors")
    name = name if name in tensors else "model.embed_tokens.weight"
    tensors[name][3, 1] = torch.inf
    save_file(tensors, tmp_path / "damaged/model.safetensors")
    ours = "decoder.layers.1.mlp.text.gate_up" if "experts" in name else "(embed|head).weight"
    with pytest.raises(CheckpointError, match=f"{ours} of the source holds NaN"):
        quantize(tmp_path / "damaged", tmp_path / "x", "2")


def test_a_disk_too_small_is_refused_before_anything_is_written(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 20, 0, 100_000))
    with pytest.raises(CheckpointError, match=r"\d+ MB are needed .* 0 MB are free"):
        quantize(source, tmp_path / "x", "2", prompts())
    assert not (tmp_path / "x").exists()


def test_a_disk_that_fills_up_leaves_a_run_that_goes_on(done, source, tmp_path, monkeypatch):
    import duomo.quant.pipeline as pipeline

    write, calls = pipeline.write_quantized, []

    def full(path, stored):
        calls.append(path)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return write(path, stored)

    monkeypatch.setattr(pipeline, "write_quantized", full)
    with pytest.raises(CheckpointError, match=r"no space left .* goes on from there"):
        quantize(source, tmp_path / "x", "2", prompts())
    quantize(source, tmp_path / "x", "2", prompts())
    assert len(calls) == 5  # two before, the one that failed, and the two that were left
    for path in done[0].glob("*.safetensors"):
        assert (tmp_path / "x" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("bits", ["2", "auto"])
def test_there_is_never_more_than_one_layer(source, tmp_path, monkeypatch, bits):
    import weakref

    import duomo.quant.pipeline as pipeline
    import duomo.quant.sensitivity as sensitivity

    alive, most = weakref.WeakSet(), []

    class Counted(pipeline.DecoderLayer):
        def __init__(self, *given):
            super().__init__(*given)
            alive.add(self)
            most.append(len(alive))

    monkeypatch.setattr(pipeline, "DecoderLayer", Counted)
    monkeypatch.setattr(sensitivity, "DecoderLayer", Counted)
    quantize(source, tmp_path / "x", bits, prompts(num=2), budget_bytes=10**6 if bits == "auto" else 0)
    assert len(most) == (6 if bits == "auto" else 3)
    assert max(most) == 1, most  # without waiting for a collection of cycles
