"""FastDeploy flags that mean nothing here, each with the reason, and readers of flag values written as JSON.

Facts about the flags: FastDeploy 2.x's own `--help` and documents. They are accepted so that a command line
that works there works here; the reason is printed once at start, so that nobody believes it took effect.
"""

from __future__ import annotations

import argparse
from typing import Any

import msgspec

_PARALLEL = "the model runs in one process on this machine"
_RL = "weights are not swapped while serving"
_POOL = "there are no pooling models here"
_QUEUE = "there is one queue, in this process, and no Redis"
_PORTS = "the engine is reached over a private socket, not over ports"
_GRAPHS = "there are no compiled graphs to set"

WITHOUT_MEANING: dict[str, str] = {
    "workers": "one process answers HTTP in front of one engine",
    "metrics-port": "/metrics is on the main port",
    "controller-port": "there is no controller application",
    "enable-mm-output": "the model makes text alone",
    "max-waiting-time": "a full queue is refused at once by --max-concurrency; what waits is not dropped",
    "timeout": "no worker is killed for being silent",
    "revision": "models are folders on this machine; nothing is downloaded",
    "model-config-name": "the configuration is config.json",
    "tokenizer": "the tokenizer lies in the checkpoint's folder",
    "tokenizer-base-url": "the tokenizer runs in this process",
    "task": _POOL,
    "runner": _POOL,
    "convert": _POOL,
    "override-pooler-config": _POOL,
    "model-impl": "there is one implementation",
    "use-warmup": "the engine warms up by itself",
    "max-encoder-cache": "picture features are kept within memory; --encoder-cache-dir keeps them on disk",
    "tool-parser-plugin": "no code from outside is loaded; the parsers are built in",
    "chat-template": "the template is written out in duomo; no template code is run",
    "speculative-config": "--num-drafts N turns n-gram lookup on; it never changes the output",
    "quantization": "the checkpoint's own format decides; duomo quantize makes a 2-bit one",
    "graph-optimization-config": _GRAPHS,
    "plas-attention-config": "attention is exact",
    "guided-decoding-backend": "constraints are always on, through llguidance",
    "guided-decoding-disable-any-whitespace": "whitespace follows the grammar",
    "enable-logprob": "log-probabilities need no switch",
    "max-logprobs": "a request may ask for up to 20",
    "logprobs-mode": "log-probabilities are those before sampling settings",
    "enable-keep-sampling-mask": _RL,
    "enable-entropy": _RL,
    "routing-replay-config": _RL,
    "enable-early-stop": "the loop breaker is always on for thinking",
    "early-stop-config": "the loop breaker is always on for thinking",
    "lm_head-fp32": "the last layer's products are summed in float32 already",
    "logits-processors": "no code from outside is loaded; use logit_bias, bad_words or a constraint",
    "load-choices": "the layout on disk is recognised by itself",
    "dynamic-load-weight": _RL,
    "load-strategy": _RL,
    "rsync-config": _RL,
    "tensor-parallel-size": _PARALLEL,
    "data-parallel-size": _PARALLEL,
    "local-data-parallel-id": _PARALLEL,
    "enable-expert-parallel": _PARALLEL,
    "enable-eplb": _PARALLEL,
    "eplb-config": _PARALLEL,
    "enable-chunked-moe": "experts are computed sorted, in bounded memory, always",
    "chunked-moe-size": "experts are computed sorted, in bounded memory, always",
    "disable-custom-all-reduce": _PARALLEL,
    "enable-flashinfer-allreduce-fusion": _PARALLEL,
    "use-internode-ll-two-stage": _PARALLEL,
    "disable-sequence-parallel-moe": _PARALLEL,
    "shutdown-comm-group-if-worker-idle": _PARALLEL,
    "gpu-memory-utilization": "memory is planned from what the machine has; --kv-mb sets it by hand",
    "num-gpu-blocks-override": "pages are counted from --kv-mb",
    "kv-cache-ratio": "pages are one pool for prefill and decode",
    "prealloc-dec-block-slot-num-threshold": "pages are taken when needed",
    "static-decode-blocks": "pages are taken when needed",
    "enable-output-caching": "answers' pages join the prefix cache always",
    "swap-space": "preempted requests are resumed by the engine's own rule",
    "kvcache-storage-backend": "keys and values stay in memory",
    "write-policy": "keys and values stay in memory",
    "enable-chunked-prefill": "prefill is always in chunks of --max-num-batched-tokens",
    "max-num-partial-prefills": "the scheduler decides",
    "max-long-partial-prefills": "the scheduler decides",
    "long-prefill-token-threshold": "the scheduler decides",
    "disable-chunked-mm-input": "a chunk may cut a picture; each token keeps its experts",
    "enable-overlap-schedule": "scheduling takes under a millisecond",
    "engine-worker-queue-port": _PORTS,
    "cache-queue-port": _PORTS,
    "pd-comm-port": _PORTS,
    "rdma-comm-ports": _PORTS,
    "splitwise-role": "prefill and decode run together",
    "cache-transfer-protocol": "prefill and decode run together",
    "router": "there is no router to register with",
    "ips": _PARALLEL,
    **{
        f"scheduler-{name}": _QUEUE
        for name in (
            "name", "ttl", "max-size", "host", "port", "db", "password", "topic", "min-load-score",
            "load-shards-num", "sync-period", "expire-period", "release-load-expire-period",
            "reader-parallel", "writer-parallel", "reader-batch-size", "writer-batch-size",
        )
    },
}  # fmt: skip

DEPRECATED: dict[str, str] = {"enable-mm": "pictures and videos are always on"}


def json_of(text: str) -> dict[str, Any]:
    """A JSON object, for argparse; anything else is a ConfigError's text."""
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object: {error}") from error


def parse_limits(text: str) -> dict[str, int]:
    """`{"image": 16, "video": 1}`, or `image=16,video=1` as other servers write it."""
    pairs = json_of(text) if text.lstrip().startswith("{") else dict(_pair(item) for item in text.split(","))
    for kind, number in pairs.items():
        if kind not in ("image", "video", "audio"):
            raise argparse.ArgumentTypeError(f"{kind!r} is no kind of medium; image and video are")
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            raise argparse.ArgumentTypeError(f"{kind} is {number!r}; it must be a whole number, 0 or more")
    return {kind: number for kind, number in pairs.items() if kind != "audio"}


def _pair(item: str) -> tuple[str, Any]:
    kind, _, number = item.partition("=")
    return kind.strip(), int(number) if number.strip().isdigit() else number
