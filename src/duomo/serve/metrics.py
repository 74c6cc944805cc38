"""What is counted: vLLM's names, so that dashboards work, and duomo's own for pictures and thinking.

No label ever holds anything a client chose: only the served model's name, an endpoint from our own list, a
finish reason or an error code. Every server has its own registry, so tests and two servers in one process
never mix.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from duomo.engine.request import Usage

_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_MOST_GAPS = 4096
_TOKENS = (1, 8, 32, 128, 512, 2048, 8192, 32768, 131072)
_GAUGES = {
    "running": ("vllm:num_requests_running", "Requests being computed."),
    "waiting": ("vllm:num_requests_waiting", "Requests waiting for their turn."),
    "kv_usage": ("vllm:kv_cache_usage_perc", "Share of pages of keys and values in use, 0 to 1."),
}
_ENGINE_COUNTERS = {
    "prefix_queries": ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache."),
    "prefix_hits": ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache."),
    "feature_queries": ("vllm:mm_cache_queries", "Pictures looked up in the feature cache."),
    "feature_hits": ("vllm:mm_cache_hits", "Pictures found in the feature cache."),
    "preemptions": ("vllm:num_preemptions", "Requests set back for want of pages."),
    "pools_let_go": ("duomo:weight_pools_let_go", "Pools of weights given up when idle or short of memory."),
    "expert_hits": ("duomo:expert_hits", "Chosen experts that were in memory (under a cap)."),
    "expert_misses": ("duomo:expert_misses", "Chosen experts that were on disk (under a cap)."),
    "expert_read_bytes": ("duomo:expert_read_bytes", "Bytes of experts read from disk (under a cap)."),
    "expert_stops": ("duomo:expert_stops", "Times a request stayed behind for an expert, others going on."),
}


class Metrics:
    """All series of one server."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model_name
        self._engine_seen: dict[str, float] = {}
        self._gaps: list[float] = []
        self._gauges = {key: self._gauge(*row) for key, row in _GAUGES.items()}
        self._engine = {key: self._counter(*row) for key, row in _ENGINE_COUNTERS.items()}
        self._resident = Gauge(
            "duomo:resident_weight_bytes",
            "Packed weights in memory, by part.",
            ["model_name", "part"],
            registry=self.registry,
        )
        self.prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens.")
        self.generation_tokens = self._counter("vllm:generation_tokens", "Tokens made.")
        self.cached_tokens = self._counter("vllm:prompt_tokens_cached", "Prompt tokens not computed again.")
        self.image_tokens = self._counter("duomo:image_tokens", "Prompt tokens that stand for pictures.")
        self.video_tokens = self._counter("duomo:video_tokens", "Prompt tokens that stand for videos.")
        self.thinking_tokens = self._counter("duomo:thinking_tokens", "Tokens spent thinking.")
        self.success = self._counter("vllm:request_success", "Finished requests.", "finished_reason")
        self.errors = self._counter("duomo:errors", "Error answers by code.", "code")
        self.requests = self._counter("duomo:http_requests", "Answered requests.", "endpoint", "status")
        self.cancelled = self._counter("duomo:requests_cancelled", "Requests whose client left.")
        self.first_token = self._histogram(
            "vllm:time_to_first_token_seconds", "To the first token.", _SECONDS
        )
        self.between = self._histogram("vllm:inter_token_latency_seconds", "Between tokens.", _SECONDS)
        self.whole = self._histogram("vllm:e2e_request_latency_seconds", "Whole requests.", _SECONDS)
        self.prompt_size = self._histogram("vllm:request_prompt_tokens", "Prompt tokens a request.", _TOKENS)
        self.answer_size = self._histogram("vllm:request_generation_tokens", "Tokens a request.", _TOKENS)

    def token_after(self, seconds: float) -> None:
        """One more time between tokens; it is sorted into its bucket when somebody asks, not now."""
        self._gaps.append(seconds)
        if len(self._gaps) >= _MOST_GAPS:
            self._sort_gaps()

    def _sort_gaps(self) -> None:
        gaps, self._gaps = self._gaps, []
        for gap in gaps:
            self.between.observe(gap)

    def exposition(self, now: Mapping[str, float]) -> bytes:
        """The text of /metrics, with the backend's numbers of this moment."""
        self._sort_gaps()
        for key, gauge in self._gauges.items():
            gauge.set(now.get(key, 0.0))
        for key, value in now.items():
            if key.startswith("resident_") and key.endswith("_bytes"):
                part = key.removeprefix("resident_").removesuffix("_bytes")
                self._resident.labels(self._model, part).set(value)
        for key, counter in self._engine.items():
            grown = now.get(key, 0.0) - self._engine_seen.get(key, 0.0)
            counter.inc(max(0.0, grown))
            self._engine_seen[key] = now.get(key, 0.0)
        return generate_latest(self.registry)

    def count(self, counter: Counter, *labels: str) -> None:
        """One more in a counter that has labels of its own."""
        counter.labels(self._model, *labels).inc()

    def watch(self) -> Watch:
        return Watch(self)

    # A series without labels of its own is bound to the model's name once: looking that up costs more
    # than counting.

    def _gauge(self, name: str, meaning: str) -> Gauge:
        return Gauge(name, meaning, ["model_name"], registry=self.registry).labels(self._model)

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        counter = Counter(name, meaning, ["model_name", *labels], registry=self.registry)
        return counter if labels else counter.labels(self._model)

    def _histogram(self, name: str, meaning: str, buckets: tuple[float, ...]) -> Histogram:
        found = Histogram(name, meaning, ["model_name"], registry=self.registry, buckets=buckets)
        return found.labels(self._model)


class Watch:
    """The clock of one request: `token` for each piece, `usage` at each choice's end, then `close`."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics, self._start, self._last = metrics, time.perf_counter(), 0.0
        self.reasons: list[str] = []

    def token(self) -> None:
        now = time.perf_counter()
        if self._last:
            self._metrics.token_after(now - self._last)
        else:
            self._metrics.first_token.observe(now - self._start)
        self._last = now

    def usage(self, usage: Usage) -> None:
        m = self._metrics
        for counter, amount in (
            (m.prompt_tokens, usage.prompt_tokens),
            (m.generation_tokens, usage.completion_tokens),
            (m.cached_tokens, usage.cached_tokens),
            (m.image_tokens, usage.image_tokens),
            (m.video_tokens, usage.video_tokens),
            (m.thinking_tokens, usage.reasoning_tokens),
        ):
            counter.inc(amount)
        m.prompt_size.observe(usage.prompt_tokens)
        m.answer_size.observe(usage.completion_tokens)

    def close(self) -> None:
        """Counts the request once: finished for the first choice's reason, or cancelled without one."""
        m = self._metrics
        m.whole.observe(time.perf_counter() - self._start)
        if self.reasons:
            m.count(m.success, self.reasons[0])
        else:
            m.cancelled.inc()
