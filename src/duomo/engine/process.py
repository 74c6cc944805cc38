"""The engine in a process of its own, seen through the same calls: msgspec messages over two pyzmq pipes.

The child is started as `python -m duomo.engine.process`, never forked, and ends with its parent. A thread
waits on the child alone, so its death (kill -9 included) ends every open request within milliseconds.
Asks are validated on this side, so that a bad one is refused before it crosses.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import msgspec
import zmq

from duomo.engine.answer import Answer
from duomo.engine.engine import Sink, check_request
from duomo.engine.request import Output, Request
from duomo.engine.vocabulary import Vocabulary
from duomo.errors import EngineError, Error
from duomo.processing.tokenizer import Tokenizer


class Submit(msgspec.Struct, tag=True):
    request: Request


class Control(msgspec.Struct, tag=True):
    """cancel, answer_now (of a request), reset, stats, stop."""

    verb: str
    request_id: str = ""


class Ready(msgspec.Struct, tag=True):
    max_model_tokens: int
    vocab_size: int


class Outputs(msgspec.Struct, tag=True):
    outputs: list[Output]


class Stats(msgspec.Struct, tag=True):
    values: dict[str, float]


class Failed(msgspec.Struct, tag=True):
    """Why the child could not start."""

    message: str


_commands = msgspec.msgpack.Decoder(Submit | Control)
_reports = msgspec.msgpack.Decoder(Ready | Outputs | Stats | Failed)
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
        self._stats: queue.SimpleQueue[dict[str, float]] = queue.SimpleQueue()
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
        self._control("reset")

    def open_ids(self) -> list[str]:
        return list(self._sinks)

    def stats(self) -> dict[str, float]:
        """Of the child, asked now; the last known ones if it is busy for more than a second or gone."""
        if self.failure is None:
            self._control("stats")
            try:
                self._last_stats = self._stats.get(timeout=1.0)
            except queue.Empty:
                return self._last_stats
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

    def _send(self, message: Submit | Control) -> None:
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
            elif isinstance(report, Stats):
                self._stats.put(report.values)
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
    pending: queue.SimpleQueue[Output | Ready | Stats | None] = queue.SimpleQueue()
    sender = threading.Thread(target=_send, args=(reports, pending), daemon=True)
    sender.start()
    pending.put(Ready(engine.scheduler.max_model_tokens, engine.runner.vocab_size))
    engine.start()
    parent = os.getppid()
    while engine.is_alive and os.getppid() == parent:
        if not commands.poll(500):
            continue
        command = _commands.decode(commands.recv())
        if isinstance(command, Submit):
            try:
                engine.submit(command.request, pending.put)
            except Error as error:
                name = command.request.request_id
                pending.put(Output(name, finish_reason="error", cause=error.message))
        elif command.verb == "stop":
            break
        elif command.verb == "stats":
            pending.put(Stats(engine.stats()))
        elif command.verb == "reset":
            engine.reset_caches()
        else:
            getattr(engine, command.verb)(command.request_id)
    engine.close()
    pending.put(None)
    sender.join(timeout=5)


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
