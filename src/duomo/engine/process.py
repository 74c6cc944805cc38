"""The engine in a process of its own, seen through the same calls: msgspec messages over two pyzmq pipes.

The child is started as `python -m duomo.engine.process`, never forked, and ends with its parent. A thread
waits on the child alone, so its death (kill -9 included) ends every open request within milliseconds.
Asks are validated on this side, so that a bad one is refused before it crosses.
"""

from __future__ import annotations

import itertools
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence as Seq
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import zmq

from duomo import errors
from duomo.engine.answer import Answer
from duomo.engine.engine import Engine, Sink, check_request
from duomo.engine.heap import Heap, few_arenas
from duomo.engine.request import Output, Request
from duomo.engine.vocabulary import Vocabulary
from duomo.errors import ConfigError, EngineError, Error
from duomo.processing.tokenizer import Tokenizer


class Submit(msgspec.Struct, tag=True):
    request: Request


class Control(msgspec.Struct, tag=True):
    """cancel, answer_now (of a request), reset_caches, expect_picture, stop. Not answered."""

    verb: str
    request_id: str = ""


class Ask(msgspec.Struct, tag=True):
    """A call whose result comes back under its ticket: a method of `Engine` by name, with strings."""

    ticket: int
    verb: str
    arguments: tuple[str, ...] = ()


class Ready(msgspec.Struct, tag=True):
    max_model_tokens: int
    vocab_size: int


class Outputs(msgspec.Struct, tag=True):
    outputs: list[Output]


class Reply(msgspec.Struct, tag=True):
    """`error` is one of `duomo.errors` by name, with its message, where the call was refused."""

    ticket: int
    value: Any = None
    error: tuple[str, str] | None = None


class Failed(msgspec.Struct, tag=True):
    """Why the child could not start."""

    message: str


_commands = msgspec.msgpack.Decoder(Submit | Control | Ask)
_reports = msgspec.msgpack.Decoder(Ready | Outputs | Reply | Failed)
_encode = msgspec.msgpack.Encoder().encode


class EngineProcess:
    """The calls of `Engine` that `LLM` makes. EngineError if it cannot start, with the cause."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, options: dict[str, Any]) -> None:
        self.vocabulary = Vocabulary.of(tokenizer)
        self.failure: str | None = None
        self._sinks: dict[str, Sink] = {}
        self._lock = threading.Lock()
        self._place = tempfile.mkdtemp(prefix="duomo-")
        context: zmq.Context[Any] = zmq.Context.instance()
        self._out, self._in = context.socket(zmq.PUSH), context.socket(zmq.PULL)
        self._out.setsockopt(zmq.LINGER, 0)
        self._out.setsockopt(zmq.SNDTIMEO, 2000)  # a child that is gone takes nothing: never wait for it
        self._out.bind(f"ipc://{self._place}/commands")
        self._in.bind(f"ipc://{self._place}/reports")
        self._tickets = itertools.count()
        self._waiting: dict[int, queue.SimpleQueue[Reply]] = {}
        self._adapters: list[str] = []
        self._last_stats: dict[str, float] = {}
        self._ready: queue.SimpleQueue[Ready | Failed] = queue.SimpleQueue()
        command = [
            sys.executable,
            "-m",
            "duomo.engine.process",
            self._place,
            str(folder),
            json.dumps(options),
        ]
        roots = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, roots))}
        self.child = subprocess.Popen(command, env=environment)
        threading.Thread(target=self._watch, name="duomo-engine-watch", daemon=True).start()
        threading.Thread(target=self._listen, name="duomo-engine-reports", daemon=True).start()
        first = self._ready.get()
        if isinstance(first, Failed):
            self.close()
            raise EngineError(first.message)
        self.max_model_tokens, self._vocab_size = first.max_model_tokens, first.vocab_size

    @property
    def is_alive(self) -> bool:
        return self.failure is None

    def start(self) -> None:
        """It runs already."""

    def validate(self, request: Request) -> None:
        self._raise_if_dead()
        check_request(request, self._vocab_size, self.max_model_tokens)
        if request.adapter and request.adapter not in self._adapters:
            known = ", ".join(self._adapters) or "none is loaded"
            raise ConfigError(f"there is no adapter {request.adapter!r}; {known}", adapter=request.adapter)

    def submit(self, request: Request, sink: Sink) -> None:
        self.validate(request)
        if request.params.constraint is not None:
            Answer(request, self.vocabulary)
        with self._lock:
            self._raise_if_dead()
            if request.request_id in self._sinks:
                raise EngineError(f"request id {request.request_id} is in use")
            self._sinks[request.request_id] = sink
            self._send(Submit(request))

    def cancel(self, request_id: str) -> None:
        self._control("cancel", request_id)

    def answer_now(self, request_id: str) -> None:
        self._control("answer_now", request_id)

    def reset_caches(self) -> None:
        self._control("reset_caches")

    def expect_picture(self) -> None:
        self._control("expect_picture")

    def load_adapter(self, name: str, folder: Path) -> None:
        self._ask("load_adapter", name, str(folder.absolute()))
        self._adapters.append(name)

    def unload_adapter(self, name: str) -> None:
        self._ask("unload_adapter", name)
        self._adapters.remove(name)

    def adapters(self) -> list[str]:
        return list(self._adapters)

    def residency_report(self) -> dict[str, dict[str, float | None]]:
        report: dict[str, dict[str, float | None]] = self._ask("residency_report", timeout_s=5.0)
        return report

    def open_ids(self) -> list[str]:
        return list(self._sinks)

    def stats(self) -> dict[str, float]:
        """Of the child, asked now; the last known ones if it is busy for more than a second or gone."""
        if self.failure is None:
            with suppress(EngineError):
                self._last_stats = self._ask("stats", timeout_s=1.0)
        return self._last_stats

    def close(self) -> None:
        if self.child.poll() is None:
            try:
                self._control("stop")
                self.child.wait(timeout=10)
            except (subprocess.TimeoutExpired, EngineError):
                self.child.kill()
        self.failure = self.failure or "it was closed"
        shutil.rmtree(self._place, ignore_errors=True)

    def _control(self, verb: str, request_id: str = "") -> None:
        with self._lock:
            self._raise_if_dead()
            self._send(Control(verb, request_id))

    def _ask(self, verb: str, *arguments: str, timeout_s: float = 120.0) -> Any:
        """The result of a call in the child; its error is raised here. EngineError if none comes."""
        answer: queue.SimpleQueue[Reply] = queue.SimpleQueue()
        ticket = next(self._tickets)
        try:
            with self._lock:
                self._raise_if_dead()
                self._waiting[ticket] = answer
                self._send(Ask(ticket, verb, arguments))
            reply = answer.get(timeout=timeout_s)
        except queue.Empty as error:
            raise EngineError(f"the engine's process did not answer within {timeout_s:g} s") from error
        finally:
            self._waiting.pop(ticket, None)
        if reply.error is not None:
            kind, message = reply.error
            raise getattr(errors, kind)(message)
        return reply.value

    def _send(self, message: Submit | Control | Ask) -> None:
        try:
            self._out.send(_encode(message))
        except zmq.Again as error:
            raise EngineError("the engine has stopped: its process takes no messages") from error

    def _raise_if_dead(self) -> None:
        if self.failure is not None:
            raise EngineError(f"the engine has stopped: {self.failure}", cause=self.failure)

    def _watch(self) -> None:
        code = self.child.wait()
        with self._lock:
            self.failure = self.failure or f"its process ended with code {code}"
            orphans, self._sinks = self._sinks, {}
            waiting = list(self._waiting.values())
        for answer in waiting:
            answer.put(Reply(-1, error=("EngineError", f"the engine has stopped: {self.failure}")))
        self._ready.put(Failed(f"the engine could not start: {self.failure}"))
        for name, sink in orphans.items():
            sink(Output(name, finish_reason="error", cause=self.failure))

    def _listen(self) -> None:
        while self.failure is None:
            if not self._in.poll(200):
                continue
            report = _reports.decode(self._in.recv())
            if isinstance(report, Outputs):
                for output in report.outputs:
                    self._deliver(output)
            elif isinstance(report, Reply):
                answer = self._waiting.get(report.ticket)
                if answer is not None:
                    answer.put(report)
            else:
                self._ready.put(report)

    def _deliver(self, output: Output) -> None:
        with self._lock:
            sink = self._sinks.get(output.request_id)
            if output.finish_reason is not None:
                self._sinks.pop(output.request_id, None)
        if sink is not None:
            sink(output)


def _child(place: str, folder: str, options: dict[str, Any]) -> None:
    few_arenas()
    context: zmq.Context[Any] = zmq.Context.instance()
    reports, commands = context.socket(zmq.PUSH), context.socket(zmq.PULL)
    reports.connect(f"ipc://{place}/reports")
    commands.connect(f"ipc://{place}/commands")
    from duomo.engine.opening import open_engine

    try:
        engine, _ = open_engine(Path(folder), Tokenizer.load(folder), **options)
    except Error as error:
        reports.send(_encode(Failed(error.message)))
        return
    pending: queue.SimpleQueue[Output | Ready | Reply | None] = queue.SimpleQueue()
    sender = threading.Thread(target=_send, args=(reports, pending), daemon=True)
    sender.start()
    pending.put(Ready(engine.scheduler.max_model_tokens, engine.runner.vocab_size))
    engine.start()
    heap, parent = Heap(), os.getppid()
    heap.settle()
    while engine.is_alive and os.getppid() == parent:
        if not commands.poll(500):
            if not engine.open_ids():
                heap.tidy()
            continue
        command = _commands.decode(commands.recv())
        if not isinstance(command, Ask):  # those of gauges come every few seconds
            heap.used()
        if isinstance(command, Submit):
            try:
                engine.submit(command.request, pending.put)
            except Error as error:
                name = command.request.request_id
                pending.put(Output(name, finish_reason="error", cause=error.message))
        elif isinstance(command, Ask):
            pending.put(_answer(engine, command))
        elif command.verb == "stop":
            break
        elif command.request_id:
            getattr(engine, command.verb)(command.request_id)
        else:
            getattr(engine, command.verb)()
    failure = engine.failure
    engine.close()
    pending.put(None)
    sender.join(timeout=5)
    if os.getppid() != parent:  # it was killed, and cannot tidy up itself
        shutil.rmtree(place, ignore_errors=True)
    if failure is not None:
        sys.exit(1)


def _answer(engine: Engine, ask: Ask) -> Reply:
    call: Any = getattr(engine, ask.verb)
    arguments: Seq[Any] = ask.arguments
    if ask.verb == "load_adapter":
        arguments = (ask.arguments[0], Path(ask.arguments[1]))
    try:
        return Reply(ask.ticket, call(*arguments))
    except Error as error:
        return Reply(ask.ticket, error=(type(error).__name__, error.message))


def _send(reports: Any, pending: queue.SimpleQueue[Any]) -> None:
    """Sends what there is, the outputs of one step together."""
    while True:
        items = [pending.get()]
        while not pending.empty():
            items.append(pending.get())
        outputs = [item for item in items if isinstance(item, Output)]
        if outputs:
            reports.send(_encode(Outputs(outputs)))
        for item in items:
            if item is None:
                return
            if not isinstance(item, Output):
                reports.send(_encode(item))


if __name__ == "__main__":
    # Run as a module this file is `__main__`; the messages must be the imported module's.
    from duomo.engine import process

    process._child(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
