"""The loop that joins scheduler, runner and answers: one thread, one step at a time.

Whoever asks hands in a `Request` and a sink; every step the sink gets an `Output`. Sinks are called on the
engine's thread and must not block. If the loop dies, every open request hears of it at once, and later ones
are refused with the cause.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from pathlib import Path

from duomo.checkpoints.residency import Residency
from duomo.engine.answer import Answer
from duomo.engine.pages import PagePool
from duomo.engine.request import (
    ExpertTrace,
    FinishReason,
    Output,
    Request,
    TokenLogprob,
    cut_trace,
    join_traces,
)
from duomo.engine.runner import Floats, Runner
from duomo.engine.sampler import token_logprob
from duomo.engine.scheduler import Scheduler, Sequence, Work, refuse
from duomo.engine.speculation import propose
from duomo.engine.vocabulary import Vocabulary
from duomo.errors import ConfigError, EngineError, PromptError

Sink = Callable[[Output], None]
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Open:
    sequence: Sequence
    answer: Answer
    sink: Sink
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=lambda: [None])
    num_scored: int = 1
    traces: list[ExpertTrace] = field(default_factory=list)  # not yet reported


@dataclass(slots=True)
class Counters:
    """Since the start. Times in seconds."""

    num_steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    cached_tokens: int = 0
    queried_tokens: int = 0
    drafted_tokens: int = 0
    accepted_drafts: int = 0
    finished: int = 0
    model_s: float = 0.0
    scheduling_s: float = 0.0  # all of a step but the model: who runs, what is drawn, who is told
    last_schedule_s: float = 0.0  # of it, who runs, in the latest step


class Engine:
    """`step` may be driven by hand (tests); `start` drives it from a thread of its own."""

    def __init__(
        self, runner: Runner, vocabulary: Vocabulary, scheduler: Scheduler, num_drafts: int = 0
    ) -> None:
        self.runner, self.vocabulary, self.scheduler = runner, vocabulary, scheduler
        self.num_drafts = num_drafts
        self.counters = Counters()
        self.failure: str | None = None
        self._open: dict[str, _Open] = {}
        self._asked: dict[str, Sink] = {}  # open requests and those not yet taken in
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._inbox: list[Callable[[], None]] = []
        self._thread: threading.Thread | None = None
        self._is_closing = False

    # ---- asked from any thread ----

    def submit(self, request: Request, sink: Sink) -> None:
        """Queues a request. PromptTooLong, GrammarError or ConfigError if it can never be answered."""
        self.validate(request)
        answer = Answer(request, self.vocabulary)
        with self._wake:
            self._raise_if_dead()
            if request.request_id in self._asked:
                name = request.request_id
                raise ConfigError(f"request id {name} is in use; give each its own", name="request_id")
            request = replace(request, adapter=self.runner.adapters.acquire(request.adapter))
            self._asked[request.request_id] = sink
            self._inbox.append(lambda: self._add(request, answer, sink))
            self._wake.notify_all()

    def cancel(self, request_id: str) -> None:
        """Before the next step begins the request is gone and its pages are free."""
        self._post(lambda: self._cancel(request_id))

    def answer_now(self, request_id: str) -> None:
        """Closes the thinking of a running request: its next token is `</think>`."""
        self._post(lambda: self._answer_now(request_id))

    def reset_caches(self) -> None:
        def reset() -> None:
            self.scheduler.pool.forget()
            for entry in self._open.values():
                entry.sequence.num_named = len(entry.sequence.pages)
            self.runner.reset()

        self._post(reset)

    def validate(self, request: Request) -> None:
        self._raise_if_dead()
        check_request(request, self.runner.vocab_size, self.max_model_tokens)
        self.runner.adapters.check(request.adapter)

    def load_adapter(self, name: str, folder: Path) -> None:
        """A LoRA that requests may choose from now on. ConfigError or CheckpointError where it cannot be."""
        self._raise_if_dead()
        self.runner.adapters.load(name, folder)

    def unload_adapter(self, name: str) -> None:
        """Requests under way keep it. ConfigError if there is none of that name."""
        self._raise_if_dead()
        self.runner.adapters.unload(name)

    def adapters(self) -> list[str]:
        return self.runner.adapters.names()

    @property
    def residency(self) -> Residency | None:
        """The packed weights of the model; None where weights are plain."""
        return self.runner.residency

    def residency_report(self) -> dict[str, dict[str, float | None]]:
        """By part of the model: bytes and how many are in memory. Empty where weights are plain."""
        return dict(self.residency.report()) if self.residency is not None else {}

    def expect_picture(self) -> None:
        """The disk begins to read what a picture needs."""
        if self.residency is not None:
            self.residency.expect_picture()

    @property
    def max_model_tokens(self) -> int:
        return self.scheduler.max_model_tokens

    def open_ids(self) -> list[str]:
        """Requests that have not ended, those not yet taken in among them."""
        with self._lock:
            return list(self._asked)

    def stats(self) -> dict[str, float]:
        pool, counters = self.scheduler.pool, self.counters
        values: dict[str, float] = {name: getattr(counters, name) for name in Counters.__dataclass_fields__}
        values |= {
            "running": len(self.scheduler.running),
            "waiting": len(self.scheduler.waiting),
            "preemptions": self.scheduler.num_preemptions,
            "pages": pool.num_pages,
            "pages_held": pool.num_held,
            "pages_written": pool.num_written,
            "kv_usage": pool.num_held / max(1, pool.num_pages),
        }
        return values | {name: float(value) for name, value in self.runner.counters().items()}

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="duomo-engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops the loop; open requests end as cancelled."""
        with self._wake:
            self._is_closing = True
            self._wake.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=30)
        self._end_all("abort", "it was closed")
        if self.residency is not None:
            self.residency.close()

    @property
    def is_alive(self) -> bool:
        return self.failure is None

    # ---- on the engine's thread ----

    def step(self) -> bool:
        """Takes in what was posted and runs one step. False if there is nothing to do."""
        with self._lock:
            posted, self._inbox = self._inbox, []
        for act in posted:
            act()
        begun = time.perf_counter()
        step = self.scheduler.schedule()
        starts = [self._logit_start(work) for work in step.works]
        scheduled = time.perf_counter()
        if not step.works and not step.swap_out and not step.swap_in:
            return False
        logits = self.runner.execute(step, starts)
        computed = time.perf_counter()
        likeliest: Seq[int | None] = step.likeliest or [None] * len(step.works)
        for work, first, rows, best in zip(step.works, starts, logits, likeliest, strict=True):
            work.sequence.unfinished = work if rows is None else None
            if rows is None:
                continue
            try:
                if best is None:
                    self._take(work, first, rows, step.traces.get(work.sequence.request.request_id))
                else:
                    self._take_next(work, rows[0], best)
            except Exception as error:  # a grammar that breaks half-way, say: its request ends, no other
                self._fail(work, error)
        self.counters.num_steps += 1
        self.counters.model_s += computed - scheduled
        self.counters.last_schedule_s = scheduled - begun
        self.counters.scheduling_s += scheduled - begun + time.perf_counter() - computed
        return True

    def _run(self) -> None:
        try:
            while True:
                with self._wake:
                    while not self._inbox and not self._has_work() and not self._is_closing:
                        self._wake.wait()
                    if self._is_closing:
                        return
                self.step()
        except BaseException as error:
            cause = f"{type(error).__name__}: {error}".splitlines()[0]
            _log.error("the engine stopped: %s", cause)
            _log.debug("where it stopped", exc_info=True)
            self._end_all("error", cause)

    def _has_work(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    def _post(self, act: Callable[[], None]) -> None:
        with self._wake:
            self._raise_if_dead()
            self._inbox.append(act)
            self._wake.notify_all()

    def _raise_if_dead(self) -> None:
        if self.failure is not None:
            raise EngineError(f"the engine has stopped: {self.failure}", cause=self.failure)

    def _add(self, request: Request, answer: Answer, sink: Sink) -> None:
        sequence = self.scheduler.add(request)
        answer.max_tokens = sequence.max_tokens
        self._open[request.request_id] = _Open(sequence, answer, sink)
        self.counters.prompt_tokens += len(request.ids)

    def _cancel(self, request_id: str) -> None:
        entry = self._open.get(request_id)
        if entry is not None:
            self._close(entry, "abort", "cancelled")

    def _answer_now(self, request_id: str) -> None:
        entry = self._open.get(request_id)
        if entry is not None:
            entry.answer.governor.answer_now()

    def _logit_start(self, work: Work) -> int:
        """From which of a work's tokens on logits are needed: none, the last and its drafts, or all."""
        if work.sequence.request.params.prompt_logprobs is not None and work.start < work.sequence.num_prompt:
            return 0
        return work.count - 1 - len(work.drafts) if work.reaches_end else work.count

    def _take(self, work: Work, first: int, rows: Floats, trace: ExpertTrace | None) -> None:
        entry = self._open[work.sequence.request.request_id]
        self._score_prompt(entry, work, rows)
        if not work.reaches_end:
            if trace is not None:
                entry.traces.append(trace)
            self.scheduler.advance(work, work.count)
            return
        sequence, answer = work.sequence, entry.answer
        drawn = work.count - 1 - len(work.drafts) - first
        kept = work.count - len(work.drafts)
        for index in range(len(work.drafts) + 1):
            token = answer.step(rows[drawn + index])
            sequence.ids.append(token)
            if answer.finish_reason or index == len(work.drafts) or token != work.drafts[index]:
                break
            kept += 1
        if trace is not None:
            entry.traces.append(cut_trace(trace, kept))
        self.counters.drafted_tokens += len(work.drafts)
        self.counters.accepted_drafts += kept - work.count + len(work.drafts)
        self._go_on(entry, work, kept)

    def _take_next(self, work: Work, row: Floats, likeliest: int) -> None:
        """`_take` for one token of an answer, which is what most works are."""
        sequence = work.sequence
        entry = self._open[sequence.request.request_id]
        sequence.ids.append(entry.answer.step(row, likeliest))
        self._go_on(entry, work, 1)

    def _go_on(self, entry: _Open, work: Work, kept: int) -> None:
        """After `kept` of a work's tokens have stayed."""
        self.scheduler.advance(work, kept)
        if self.num_drafts:
            work.sequence.drafts = propose(work.sequence.ids, self.num_drafts)
        self._report(entry)

    def _score_prompt(self, entry: _Open, work: Work, rows: Floats) -> None:
        params = entry.sequence.request.params
        if params.prompt_logprobs is None or work.start >= entry.sequence.num_prompt:
            return
        ids = entry.sequence.request.ids
        for index in range(work.start + 1, min(work.start + work.count + 1, len(ids))):
            if index >= entry.num_scored:
                entry.num_scored += 1
                row = rows[index - 1 - work.start]
                entry.prompt_logprobs.append(token_logprob(row, ids[index], params.prompt_logprobs))

    def _report(self, entry: _Open) -> None:
        answer = entry.answer
        if answer.finish_reason is not None:
            self._close(entry, answer.finish_reason, answer.cause)
        else:
            entry.sink(self._output(entry))

    def _output(self, entry: _Open, reason: FinishReason | None = None, cause: str = "") -> Output:
        token_ids, logprobs = entry.answer.take_new()
        self.counters.generated_tokens += len(token_ids)
        request = entry.sequence.request
        prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
        if request.params.prompt_logprobs is not None:
            prompt_logprobs, entry.prompt_logprobs = tuple(entry.prompt_logprobs), []
        trace = None
        if entry.traces:
            trace, entry.traces = join_traces(entry.traces), []
        return Output(
            request_id=request.request_id,
            token_ids=token_ids,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            num_reasoning=entry.answer.num_reasoning,
            num_cached=entry.sequence.num_cached,
            experts=trace,
            finish_reason=reason,
            cause=cause,
        )

    def _fail(self, work: Work, error: Exception) -> None:
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        _log.warning("a request failed: %s", cause)
        _log.debug("where it failed", exc_info=True)
        entry = self._open.get(work.sequence.request.request_id)
        if entry is not None:
            self._close(entry, "error", cause)

    def _close(self, entry: _Open, reason: FinishReason, cause: str) -> None:
        sequence = entry.sequence
        del self._open[sequence.request.request_id]
        self._asked.pop(sequence.request.request_id, None)
        self.scheduler.remove(sequence)
        self.runner.forget(sequence)
        self.runner.adapters.release(sequence.request.adapter)
        self.counters.finished += 1
        self.counters.cached_tokens += sequence.num_cached
        self.counters.queried_tokens += sequence.num_prompt
        entry.sink(self._output(entry, reason=reason, cause=cause))

    def _end_all(self, reason: FinishReason, cause: str) -> None:
        """Nobody is left waiting: open requests and those still in the inbox hear how it ended."""
        with self._lock:
            self.failure = self.failure or cause
            asked, self._asked = self._asked, {}
            self._inbox = []
        for name, sink in asked.items():
            entry = self._open.pop(name, None)
            if entry is None:
                sink(Output(name, finish_reason=reason, cause=cause))
            else:
                sink(self._output(entry, reason=reason, cause=cause))


def check_request(request: Request, vocab_size: int, max_model_tokens: int) -> None:
    """PromptError, PromptTooLong or ConfigError for what could never be answered."""
    if not request.ids:
        raise PromptError("the prompt is empty; give at least one token")
    if min(request.ids) < 0 or max(request.ids) >= vocab_size:
        raise PromptError(f"a prompt id is outside the vocabulary of {vocab_size}")
    params = request.params
    for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
        bad = [token for token in ids if not 0 <= token < vocab_size]
        if bad:
            raise ConfigError(f"{name} has token {bad[0]}; ids are 0 to {vocab_size - 1}", name=name)
    if len(request.ids) >= max_model_tokens:
        refuse(request, max_model_tokens)


def build_engine(
    runner: Runner,
    vocabulary: Vocabulary,
    *,
    num_pages: int,
    page_size: int,
    max_sequences: int = 64,
    max_step_tokens: int = 512,
    max_model_tokens: int = 1 << 17,
    has_prefix_cache: bool = True,
    num_drafts: int = 0,
) -> Engine:
    pool = PagePool(num_pages, page_size)
    scheduler = Scheduler(pool, max_sequences, max_step_tokens, max_model_tokens, has_prefix_cache)
    return Engine(runner, vocabulary, scheduler, num_drafts)


def run_all(engine: Engine, requests: Seq[Request]) -> dict[str, list[Output]]:
    """Drives the engine by hand until every request is finished."""
    outputs: dict[str, list[Output]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.submit(request, outputs[request.request_id].append)
    while engine.step():
        pass
    return outputs
