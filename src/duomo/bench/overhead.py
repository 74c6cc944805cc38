"""What the server adds to an engine's tokens: `python -m duomo.bench.overhead`, by the engine's own clock.

`duomo serve --engine clock` makes a token for all streams at each step, and a token is the time it was made.
Here 8 sockets are read by one thread, and the difference to the moment of reading is what server, kernel and
reader added. The first token also pays for the request's way in: from sending it to its arrival at the
engine. Requests begin one after another while the earlier ones stream (`server`), or all at once, so that
they queue behind each other (`burst`); tokens come all at once in both. Rounds alternate with those against
`duomo.bench.bare`, which writes prepared bytes: what that takes is the kernel's, the reader's and the event
loop's, and the difference (`own`) is the server's.
"""

from __future__ import annotations

import argparse
import json
import selectors
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_GAP_S = 0.0173  # between the beginnings of two streams; no multiple of the step
_ASKED_MS = {"first_token": 2.0, "next_token": 0.2}


def measure(port: int, streams: int, tokens: int, rounds: int, gap_s: float = 0.0) -> dict[str, list[float]]:
    """Milliseconds added, of every first and of every later token."""
    added: dict[str, list[float]] = {"first_token": [], "next_token": []}
    for _ in range(rounds):
        for sent_ns, arrivals in _round(port, streams, tokens, gap_s):
            times = _times(arrivals)
            assert len(times) == tokens, f"{len(times)} tokens came of {tokens}"
            for index, (read_ns, stamps) in enumerate(times):
                out_ms = (read_ns - stamps[-1]) / 1e6
                if index == 0:
                    added["first_token"].append((stamps[0] - sent_ns) / 1e6 + out_ms)
                else:
                    added["next_token"].append(out_ms)
    return added


def _round(port: int, streams: int, tokens: int, gap_s: float) -> list[tuple[int, list[tuple[int, bytes]]]]:
    body = json.dumps(
        {
            "model": "default", "stream": True, "max_tokens": tokens, "enable_thinking": False,
            "messages": [{"role": "user", "content": "What time is it? " * 8}],
        }
    ).encode()  # fmt: skip
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode()
    sockets = [socket.create_connection(("127.0.0.1", port)) for _ in range(streams)]
    time.sleep(0.05)  # connecting is not what is measured
    sent: dict[socket.socket, int] = {}
    read: dict[socket.socket, list[tuple[int, bytes]]] = {one: [] for one in sockets}
    with selectors.DefaultSelector() as ready:
        unsent, due = list(sockets), time.monotonic()
        waiting = len(sockets)
        while waiting:
            while unsent and time.monotonic() >= due:
                one = unsent.pop()
                due += gap_s
                ready.register(one, selectors.EVENT_READ)
                sent[one] = time.monotonic_ns()
                one.sendall(head + body)
            for key, _ in ready.select(timeout=max(0.0, due - time.monotonic()) if unsent else 30):
                ended: Any = key.fileobj
                data = ended.recv(65536)
                read[ended].append((time.monotonic_ns(), data))
                if not data:
                    ready.unregister(ended)
                    ended.close()
                    waiting -= 1
    return [(sent[one], read[one]) for one in sockets]


def _times(arrivals: list[tuple[int, bytes]]) -> list[tuple[int, list[int]]]:
    """For each event with a token: when its last byte was read, and the times that stand in it."""
    found: list[tuple[int, list[int]]] = []
    waiting = b""
    for read_ns, data in arrivals:
        waiting += data
        while b"\n\n" in waiting:
            line, _, waiting = waiting.partition(b"\n\n")
            place = line.find(b"data: {")
            if place < 0:
                continue
            for choice in json.loads(line[place + 6 :])["choices"]:
                stamps = [int(word) for word in (choice["delta"].get("content") or "").split()]
                if stamps:
                    found.append((read_ns, stamps))
    return found


def summary(added: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    return {
        name: {
            "n": len(values),
            "median_ms": round(statistics.median(values), 4),
            "mean_ms": round(statistics.fmean(values), 4),
            "p99_ms": round(sorted(values)[int(0.99 * len(values))], 4),
        }
        for name, values in added.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=100, help="of each stream")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--step-ms", type=float, default=20.0, help="between two steps of the engine")
    parser.add_argument("--json", type=Path, help="where the figures go")
    asked = parser.parse_args()
    step_s = str(asked.step_ms / 1000)
    ports = {"server": free_port(), "bare": free_port()}
    flags = ["--scripted-delay-s", step_s, "--log-level", "warning", "--port", str(ports["server"])]
    commands = {
        "server": ["duomo.serve", "--engine", "clock", *flags],
        "bare": ["duomo.bench.bare", str(ports["bare"]), step_s],
    }
    running = [
        subprocess.Popen([sys.executable, "-m", *command], stderr=subprocess.DEVNULL)
        for command in commands.values()
    ]
    added: dict[str, dict[str, list[float]]] = {}
    try:
        for port in ports.values():
            wait_for(port)
            measure(port, asked.streams, 20, 1)  # warm
        for _ in range(asked.rounds):
            for name, gap_s in (("server", _GAP_S), ("bare", _GAP_S), ("burst", 0.0)):
                port = ports["bare" if name == "bare" else "server"]
                for kind, values in measure(port, asked.streams, asked.tokens, 1, gap_s).items():
                    added.setdefault(name, {}).setdefault(kind, []).extend(values)
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait(timeout=10)
    figures = {name: summary(values) for name, values in added.items()}
    for kind, most_ms in _ASKED_MS.items():
        server, bare = figures["server"][kind], figures["bare"][kind]
        figures.setdefault("own", {})[kind] = {
            "median_ms": round(server["median_ms"] - bare["median_ms"], 4),
            "mean_ms": round(server["mean_ms"] - bare["mean_ms"], 4),
            "asked_ms": most_ms,
        }
    for name, rows in figures.items():
        for kind, row in rows.items():
            print(f"{name:7}{kind:12}", " ".join(f"{key} {value:g}" for key, value in row.items()))
    if asked.json:
        asked.json.write_text(json.dumps({"streams": asked.streams, **figures}, indent=1) + "\n")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(port: int) -> None:
    """Returns once the port is open; SystemExit after three minutes."""
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise SystemExit("the server did not start")


if __name__ == "__main__":
    main()
