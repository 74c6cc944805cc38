"""LoRA in service: what merged weights would say, whoever is beside it, by name, through both seams."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from duomo.checkpoints.adapters import read_adapter
from duomo.checkpoints.names import pt_entries, pt_shapes
from duomo.engine.engine import build_engine, run_all
from duomo.engine.request import SamplingParams
from duomo.engine.runner import ModelRunner
from duomo.errors import ConfigError, CorruptFile, MissingTensor, ShapeMismatch, UnexpectedTensor
from duomo.llm import LLM
from duomo.model import Ernie, ModelConfig, build_batch
from duomo.model.attention import PackedCausal
from duomo.model.experts import Router
from duomo.model.lowrank import adapted
from duomo.processing.prompt import Grid
from duomo.train.lora import BANK_GROUPS, LINEAR_GROUPS, LoraPlan, adapters_of, attach, merge
from duomo.train.peft import save_adapter
from tests.engine.checkpoint import ask, write_checkpoint
from tests.engine.worlds import MODEL, VOCABULARY, answers, engine, picture_request, text_request
from tests.tiny import TINY, tiny_model

SCALE = 1.5


def write_adapter(
    folder: Path, config: ModelConfig = TINY, seed: int = 0, rank: int = 3, only: str = ""
) -> Path:
    """Random factors on every matrix of the decoder (or those whose name has `only`), in PEFT's files."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in pt_shapes(config).items():
        is_matrix = name.endswith("_proj.weight") and "layers" in name
        if (only and only not in name) or not (is_matrix or only):
            continue
        module = f"base_model.model.{name.removesuffix('.weight')}"
        own = 2 if ".experts." in name else rank
        tensors[f"{module}.lora_A.weight"] = torch.randn(own, shape[1], generator=generator) * 0.2
        tensors[f"{module}.lora_B.weight"] = torch.randn(shape[0], own, generator=generator) * 0.2
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    fields = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": SCALE * rank,
        "alpha_pattern": {n.split("model.", 1)[1][6:].removesuffix(".lora_A.weight"): 2 * SCALE
                          for n in tensors if ".experts." in n and n.endswith("lora_A.weight")},
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def merged(model: Ernie, folder: Path) -> Ernie:
    """The oracle: every B A added to the weight it belongs to."""
    tensors = load_file(folder / "adapter_model.safetensors")
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for entry in pt_entries(model.config):
            module = f"base_model.model.{entry.name.removesuffix('.weight')}"
            if f"{module}.lora_A.weight" in tensors:
                product = tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
                entry.view(parameters[entry.ours]).add_(SCALE * product)
    return model


@torch.inference_mode()
def hidden(model: Ernie, ids: list[int]) -> torch.Tensor:
    return model(build_batch([ids], model.config), PackedCausal())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("adapters")
    return [write_adapter(root / f"a{seed}", seed=seed) for seed in range(3)]


def test_an_adapter_computes_what_merged_weights_would(folders: list[Path]) -> None:
    draw = random.Random(5)
    ids = [draw.randrange(3, 190) for _ in range(21)] + [250] * 4
    model = tiny_model()
    plain = hidden(model, ids)
    own = engine()
    own.load_adapter("a", folders[0])
    identity = own.runner.adapters.acquire("a")
    with own.runner.adapters.use(identity):
        found = hidden(MODEL, ids)
    assert torch.equal(hidden(MODEL, ids), plain)  # nothing stays behind
    expected = hidden(merged(model, folders[0]), ids)
    assert (found - expected).abs().max() < 1e-4 < (found - plain).abs().max()


def test_each_request_of_a_mixed_batch_gets_what_it_gets_alone(folders: list[Path]) -> None:
    names = ["", "a0", "a1", "a2"]
    requests = [
        replace(
            picture_request(f"r{i}", i % 3) if i % 2 else text_request(f"r{i}", i % 3, 20),
            adapter=names[i % 4],
        )
        for i in range(12)
    ]

    def loaded(**options: object):
        own = engine(**options)
        for index, folder in enumerate(folders):
            own.load_adapter(f"a{index}", folder)
        return own

    expected = {r.request_id: answers(loaded(), [r])[r.request_id] for r in requests}
    own = loaded(num_pages=40, max_step_tokens=37)
    assert answers(own, requests) == expected
    assert own.scheduler.num_preemptions > 0
    assert len({tuple(ids) for ids in expected.values()}) == 12


def test_a_mixed_batch_in_bfloat16_scores_as_merged_weights_do(folders: list[Path]) -> None:
    """Prompts of different adapters in the same steps, against fp32 models with each adapter merged in."""
    params = SamplingParams(temperature=0, max_tokens=1, thinking="off", prompt_logprobs=0)
    model = tiny_model().bfloat16()
    for module in model.modules():
        if isinstance(module, Router):
            module.float()  # as a loaded checkpoint has it
    runner = ModelRunner(model, 64, 8, "bfloat16")
    own = build_engine(runner, VOCABULARY, num_pages=64, page_size=8, max_step_tokens=50)
    names = ["", "a0", "a1", "a2"]
    for name, folder in zip(names[1:], folders, strict=True):
        own.load_adapter(name, folder)
    asked = [text_request(f"r{i}", i, 20, params=params, adapter=names[i % 4]) for i in range(8)]
    outputs = run_all(own, asked)
    oracles = [tiny_model(), *(merged(tiny_model(), folder) for folder in folders)]
    for i, request in enumerate(asked):
        pieces = [entry for output in outputs[request.request_id] for entry in output.prompt_logprobs]
        found = torch.tensor([entry.logprob for entry in pieces[1:] if entry is not None])
        ids, off = list(request.ids), []
        for model in oracles:
            with torch.inference_mode():
                logs = model.unembed(hidden(model, ids)).log_softmax(-1)
            off.append(float((found - logs[range(19), ids[1:]]).abs().mean()))
        assert len(found) == 19 and off[i % 4] == min(off) < 0.05 < sorted(off)[1]


def test_prefixes_are_shared_within_an_adapter_alone(folders: list[Path]) -> None:
    own = engine()
    own.load_adapter("a", folders[0])
    plain = text_request("p", 5, 30)
    answers(own, [plain])
    answers(own, [replace(plain, request_id="q", adapter="a")])
    assert own.counters.cached_tokens == 0
    answers(own, [replace(plain, request_id="r", adapter="a")])
    assert own.counters.cached_tokens > 0


def test_a_name_loaded_anew_is_another_adapter_and_a_request_keeps_its_own(folders: list[Path]) -> None:
    own = engine()
    own.load_adapter("a", folders[0])
    with pytest.raises(ConfigError, match="already"):
        own.load_adapter("a", folders[1])
    request = text_request("x", 5, 30, adapter="a")
    expected = answers(own, [request])["x"]
    outputs: list[int] = []
    own.submit(replace(request, request_id="y"), lambda out: outputs.extend(out.token_ids))
    own.step()
    own.unload_adapter("a")
    own.load_adapter("a", folders[1])
    cached = own.counters.cached_tokens
    assert answers(own, [replace(request, request_id="z")])["z"] != expected == outputs
    assert own.counters.cached_tokens <= cached + len(request.ids)  # y's own hit, none of z
    assert len(own.runner.adapters._loaded) == 1
    own.unload_adapter("a")
    assert not own.runner.adapters._loaded and own.adapters() == []
    with pytest.raises(ConfigError, match="no adapter"):
        own.submit(replace(request, request_id="w"), lambda out: None)


@pytest.mark.parametrize("only", ["resampler_model.mlp.weight", "patch_embed.proj.weight"])
def test_an_adapter_of_the_eyes_has_features_of_its_own(tmp_path: Path, only: str) -> None:
    folder = write_adapter(tmp_path / "eyes", only=only)
    own = engine()
    own.load_adapter("eyes", folder)
    request = picture_request("a", 0)
    answers(own, [request, replace(request, request_id="b", adapter="eyes")])
    answers(own, [replace(request, request_id="c", salt="x")])
    plain, seen = own.runner.features._kept.values()
    assert own.runner.counters()["media_encoded"] == 2 and (plain - seen).abs().max() > 1e-3


def test_what_training_writes_serves(tmp_path: Path) -> None:
    model = tiny_model()
    plan = LoraPlan(dict.fromkeys(LINEAR_GROUPS + BANK_GROUPS, 2), 2.0)  # all that can be trained
    attach(model, plan, seed=3)
    for adapter in adapters_of(model).values():
        for key, parameter in adapter.named_parameters():
            if key.rsplit("_")[-1] == "b":
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    save_adapter(model, plan, tmp_path)
    merge(model)
    own = engine()
    own.load_adapter("trained", tmp_path)
    patches, grids = torch.randn(16, 588, generator=torch.Generator().manual_seed(2)), [Grid(1, 4, 4)]
    with own.runner.adapters.use(own.runner.adapters.acquire("trained")), torch.inference_mode():
        found, seen = hidden(MODEL, [5, 6, 7, 250, 251, 8]), MODEL.encode(patches, grids)
    assert torch.allclose(found, hidden(model, [5, 6, 7, 250, 251, 8]), atol=1e-4)
    assert torch.allclose(seen, model.encode(patches, grids), atol=1e-4)


def test_by_name_through_the_facade_and_the_process_seam(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "model")
    greedy = SamplingParams(temperature=0, max_tokens=12, thinking="off", ignore_eos=True)
    found = []
    for own_process in (False, True):
        with LLM.open(checkpoint, own_process=own_process) as llm:
            assert llm.config is not None
            folder = write_adapter(tmp_path / "adapter", llm.config)
            llm.load_adapter("loud", folder)
            assert llm.adapters() == ["loud"]
            with pytest.raises(ConfigError, match="already"):
                llm.load_adapter("loud", folder)
            with pytest.raises(CorruptFile, match="no adapter"):
                llm.load_adapter("other", tmp_path / "nowhere")
            found.append(
                [llm.chat(ask("cat", 1), greedy, adapter=name).token_ids for name in ("", "loud", "")]
            )
            llm.unload_adapter("loud")
            with pytest.raises(ConfigError, match="no adapter 'loud'; none is loaded"):
                llm.chat(ask("cat", 1), greedy, adapter="loud")
            assert llm.residency_report() == {}
    assert found[0] == found[1] and found[0][0] == found[0][2] != found[0][1]


def test_files_that_are_no_adapter_of_this_model_are_refused_by_name(tmp_path: Path) -> None:
    def broken(change) -> Path:
        folder = write_adapter(tmp_path / "broken")
        tensors = load_file(folder / "adapter_model.safetensors")
        fields = json.loads((folder / "adapter_config.json").read_text())
        change(tensors, fields)
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(fields))
        return folder

    q = "base_model.model.model.layers.0.self_attn.q_proj"
    cases = [
        (lambda t, f: f.update(peft_type="IA3"), CorruptFile, "no LoRA"),
        (lambda t, f: f.update(use_dora=True), CorruptFile, "use_dora"),
        (lambda t, f: f.pop("lora_alpha") and f.update(alpha_pattern={}), CorruptFile, "lora_alpha"),
        (lambda t, f: t.pop(f"{q}.lora_B.weight"), MissingTensor, "q_proj.lora_B"),
        (lambda t, f: t.update({f"{q}.lora_B.weight": torch.zeros(5, 3)}), ShapeMismatch, "q_proj"),
        (lambda t, f: t.update({"lm_head.weight": torch.zeros(2)}), UnexpectedTensor, "lm_head"),
        (
            lambda t, f: t.update(
                {f"base_model.model.model.embed_tokens.lora_{x}.weight": torch.zeros(1, 1) for x in "AB"}
            ),
            UnexpectedTensor,
            "embed_tokens",
        ),
    ]
    for change, kind, message in cases:
        with pytest.raises(kind, match=message):
            read_adapter(broken(change), TINY, torch.float32)
    folder = write_adapter(tmp_path / "cut")
    data = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(data[:200])
    with pytest.raises(CorruptFile):
        read_adapter(folder, TINY, torch.float32)


def test_every_adapted_module_stands_where_its_base_stood(folders: list[Path]) -> None:
    modules = dict(MODEL.named_modules())
    found = adapted(MODEL, read_adapter(folders[0], TINY, torch.float32))
    assert len(found) == 3 * 4 + 3 + 2 * (3 + 2) and found.keys() <= modules.keys()
