"""Starts the server and ends it: listen first, load beside, drain on SIGTERM, stop on a second one.

`/health` answers from the first moment. On SIGTERM new requests get 503, running ones may finish within
--shutdown-timeout-s, the rest end with an error event, and the backend is closed before the process exits.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import uvicorn

from duomo.engine.heap import few_arenas
from duomo.errors import Error
from duomo.serve import logs
from duomo.serve.app import create_app
from duomo.serve.backend import Backend
from duomo.serve.clock import Clock
from duomo.serve.http import bind, http_config
from duomo.serve.options import Options, parse
from duomo.serve.scripted import Scripted
from duomo.serve.server import Server

log = logging.getLogger("duomo.serve")
_NUM_THREADS = 64  # they wait, for decoders and for the engine; none computes
Load = Callable[[Options], Awaitable[Backend]]


def serve(argv: Sequence[str]) -> int:
    """The command line's verb. Returns the exit code: 0 after a drain, 1 when the engine failed."""
    options = parse(argv)
    for note in options.notes:
        print(f"duomo: {note}", file=sys.stderr)
    if options.engine == "model" and options.model:
        _foresee(Path(options.model), options.ram)
    return asyncio.run(run(options, load_backend))


def _foresee(folder: Path, ram: str | None) -> None:
    """Says what `duomo plan` says; a wrong folder or one too large is told here, before the port is open."""
    from duomo.checkpoints.fit import parse_bytes  # torch comes with it
    from duomo.checkpoints.forecast import forecast, lines
    from duomo.checkpoints.inventory import take_inventory
    from duomo.checkpoints.settings import settle

    settings = settle(take_inventory(folder), parse_bytes(ram) if ram else None)
    facts = forecast(folder, settings.ram_bytes, measures_disk=settings.weights_cap_bytes is not None)
    print("\n".join(f"duomo: {line}" for line in lines(facts)), file=sys.stderr)


async def load_backend(options: Options) -> Backend:
    if options.engine == "scripted":
        return Scripted(delay_s=options.scripted_delay_s, max_model_len=options.max_model_len or 4096)
    if options.engine == "clock":
        return Clock(options.scripted_delay_s or 0.02, options.max_model_len or 4096)
    from duomo.serve.engine import open_backend  # torch comes with it

    return await open_backend(options)


async def run(options: Options, load: Load) -> int:
    """Serves until told to stop."""
    few_arenas()
    logs.set_up(options.log_level)
    sockets = bind(options.host, options.port)
    options = replace(options, port=sockets[0].getsockname()[1])  # of --port 0
    app = create_app(None, options)
    server: Server = app.state.server
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_NUM_THREADS, "duomo-wait"))
    http = _Http(http_config(app, options), server)
    beside = [asyncio.create_task(_load(server, load, http)), asyncio.create_task(_tidy(server))]
    try:
        await http.serve(sockets)
    finally:
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
        if server.backend is not None:
            await server.backend.close()
    return 1 if server.state == "failed" else 0


class _Http(uvicorn.Server):
    """uvicorn with our own way of ending: it would close the port at once and die of the signal itself."""

    def __init__(self, config: uvicorn.Config, server: Server) -> None:
        super().__init__(config)
        self._server = server
        self._draining: asyncio.Task[None] | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    def _on_signal(self) -> None:
        if self._draining is not None:
            self.should_exit = self.force_exit = True
            return
        self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        """Refuses what is new, waits for what runs, then ends the rest with an error each."""
        server = self._server
        if server.state != "failed":
            server.state = "draining"
        log.info("draining", extra={"running": server.gate.inside})
        await _until(lambda: server.gate.inside == 0, server.options.shutdown_timeout_s)
        server.abort_all()
        await _until(lambda: server.gate.inside == 0, 2.0)
        self.should_exit = True


async def _until(holds: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        await asyncio.sleep(0.02)


async def _load(server: Server, load: Load, http: _Http) -> None:
    """Loads, then watches: a dead engine is reloaded or ends the process, as --on-engine-death says."""
    while True:
        try:
            server.backend = await load(server.options)
        except Error as error:
            print(f"duomo: {' '.join(error.message.split())}", file=sys.stderr)
            server.state, server.failure = "failed", "the model could not be loaded"
            http.should_exit = True
            return
        if not await _load_adapters(server, server.backend):
            server.state, server.failure = "failed", "an adapter could not be loaded"
            http.should_exit = True
            return
        if server.state in ("loading", "failed"):
            server.state = "ready"
        _announce(server)
        server.heap.settle()
        while server.backend.is_alive:
            await asyncio.sleep(0.2)
        if server.state == "draining":
            return
        server.state, server.failure = "failed", "the engine has stopped"
        log.error("the engine has stopped", extra={"on_engine_death": server.options.on_engine_death})
        if server.options.on_engine_death == "exit":
            http.should_exit = True
            return
        await server.backend.close()
        server.state = "loading"


async def _tidy(server: Server) -> None:
    while True:
        await asyncio.sleep(1.0)
        if server.gate.inside == 0:
            await asyncio.to_thread(server.heap.tidy)


async def _load_adapters(server: Server, backend: Backend) -> bool:
    """Those of the command line, and after a restart those that were loaded before it."""
    asked = {name: Path(folder) for name, folder in server.options.adapters().items()}
    for name, folder in (asked | server.adapters).items():
        try:
            await asyncio.to_thread(backend.load_adapter, name, folder)
        except Error as error:
            print(f"duomo: adapter {name}: {' '.join(error.message.split())}", file=sys.stderr)
            return False
        server.adapters[name] = folder
    return True


def _announce(server: Server) -> None:
    """The plan that was made and where to call, for people, on stderr."""
    assert server.backend is not None, "announced before it was loaded"
    facts, options = server.backend.facts, server.options
    rows = {"model": facts.name, "context": f"{facts.max_model_len} tokens", **facts.plan}
    rows["keys"] = f"{len(server.keys)}" if len(server.keys) else "none: anybody who reaches the port may ask"
    host = f"[{options.host}]" if ":" in options.host else options.host
    rows["address"] = f"http://{host}:{options.port}/"
    print("\n".join(f"duomo: {name}: {value}" for name, value in rows.items()), file=sys.stderr, flush=True)
