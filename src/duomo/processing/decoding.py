"""Decoding in other processes: a picture that breaks a decoder breaks a process that holds nothing else.

`Decoders.load` is `template.load_media` with walls around it. A few workers wait; each is started when first
needed, takes one file at a time, and is killed when it is too slow, dies or met a file it could not decode
(whatever that file did to its memory goes with it). Patches come back as an open file, mapped and not copied.
The last ones are kept: a conversation sends its pictures again with every turn, and questions share theirs.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import queue
import socket
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from duomo import errors
from duomo.errors import MediaError, UnsupportedMedia
from duomo.processing.decode_worker import Decoded, Refused, Report
from duomo.processing.media import Kind
from duomo.processing.messages import ImagePart, VideoPart
from duomo.processing.prompt import Grid, Media

_KINDS: dict[str, type[MediaError]] = {
    kind.__name__: kind for kind in (errors.MediaError, errors.UnsupportedMedia, errors.MediaTooLarge)
}
_report = msgspec.msgpack.Decoder(Report)


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    """Of one file. `memory_bytes` beyond what the libraries take; `wall_s` counts waiting for the CPU too."""

    memory_bytes: int = 2 << 30
    cpu_s: int = 60
    wall_s: float = 120.0


class Decoders:
    """At most `num_workers` files are decoded at a time; others wait. Calls may come from any thread."""

    def __init__(
        self, num_workers: int = 2, limits: DecodeLimits | None = None, cache_bytes: int = 64 << 20
    ) -> None:
        self.limits = limits or DecodeLimits()
        self._kept = _Kept(cache_bytes)
        self.num_started = 0
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()  # None: a worker yet to be started
        for _ in range(num_workers):
            self._idle.put(None)
        self._is_closed = False

    @property
    def kept_bytes(self) -> int:
        """Of decoded media that wait for the next turn."""
        return self._kept.num_bytes

    def load(self, part: ImagePart | VideoPart) -> Media:
        """The medium. Raises what `load_media` raises, and MediaError when the limits are reached."""
        asked = _asked(part)
        key = hashlib.blake2b(asked, digest_size=16).digest()
        return self._kept.get(key) or self._kept.put(key, self._decode(asked, _kind(part)))

    def _decode(self, asked: bytes, kind: Kind) -> Media:
        worker = self._idle.get()
        is_sound = False
        try:
            if self._is_closed:
                raise MediaError("decoding has been shut down")
            if worker is None:
                worker = _Worker(self.limits)
                self.num_started += 1
            media = worker.decode(asked, kind)
            is_sound = True
            return media
        except MediaError as error:
            is_sound = not isinstance(error, UnsupportedMedia) and worker is not None and worker.is_sound
            raise
        finally:
            if worker is not None and (not is_sound or self._is_closed):
                worker.close()
                worker = None
            self._idle.put(worker)

    def close(self) -> None:
        """Ends every worker, those at work as soon as they are done."""
        self._is_closed = True
        waiting = []
        with contextlib.suppress(queue.Empty):
            while True:
                waiting.append(self._idle.get_nowait())
        for worker in waiting:
            if worker is not None:
                worker.close()
            self._idle.put(None)


class _Kept:
    """The media used last, up to a size; each keeps a file open, so there is a bound on their number, too."""

    def __init__(self, most_bytes: int, most: int = 128) -> None:
        self._most_bytes, self._most, self.num_bytes = most_bytes, most, 0
        self._media: OrderedDict[bytes, Media] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: bytes) -> Media | None:
        with self._lock:
            if key in self._media:
                self._media.move_to_end(key)
            return self._media.get(key)

    def put(self, key: bytes, media: Media) -> Media:
        with self._lock:
            if key not in self._media and media.patches.nbytes <= self._most_bytes:
                self._media[key] = media
                self.num_bytes += media.patches.nbytes
            while self.num_bytes > self._most_bytes or len(self._media) > self._most:
                self.num_bytes -= self._media.popitem(last=False)[1].patches.nbytes
        return media


class _Worker:
    def __init__(self, limits: DecodeLimits) -> None:
        self._limits, self.is_sound = limits, True
        self._channel, theirs = socket.socketpair()
        command = [sys.executable, "-m", "duomo.processing.decode_worker"]
        command += [str(limits.memory_bytes), str(limits.cpu_s)]
        roots = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        # One thread each: pools of threads would take address space that decoding is to have.
        own = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        environment = os.environ | own | {"PYTHONPATH": os.pathsep.join(filter(None, roots))}
        with theirs:
            self._process = subprocess.Popen(
                command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                env=environment,
            )  # fmt: skip

    def decode(self, asked: bytes, kind: Kind) -> Media:
        try:
            self._channel.settimeout(self._limits.wall_s)
            self._channel.sendall(len(asked).to_bytes(4, "big") + asked)
            head, files, _, _ = socket.recv_fds(self._channel, 4, 1)
            with _closing(files):
                if len(head) < 4:
                    raise EOFError
                body = self._channel.recv(int.from_bytes(head, "big"), socket.MSG_WAITALL)
                report = _report.decode(body)
                if isinstance(report, Refused):
                    raise _KINDS.get(report.kind, MediaError)(report.message, **report.facts)
                return _media(kind, report, files[0])
        except TimeoutError as error:
            self.is_sound = False
            raise MediaError(
                f"the {kind} could not be decoded in the time there is; send a smaller one"
            ) from error
        except (OSError, EOFError, msgspec.MsgspecError) as error:
            self.is_sound = False
            raise UnsupportedMedia(
                f"the {kind} broke its decoder or took more than it may; send another or a smaller one"
            ) from error

    def close(self) -> None:
        self._channel.close()
        self._process.kill()
        self._process.wait()


def _kind(part: ImagePart | VideoPart) -> Kind:
    return "image" if isinstance(part, ImagePart) else "video"


def _asked(part: ImagePart | VideoPart) -> bytes:
    return msgspec.msgpack.encode((_kind(part), part))


def _media(kind: Kind, report: Decoded, file: int) -> Media:
    if report.size_bytes != os.fstat(file).st_size:
        raise EOFError
    mapped = mmap.mmap(file, report.size_bytes, access=mmap.ACCESS_READ)
    grid = Grid(*report.grid)
    patches = np.frombuffer(mapped, dtype=np.uint8).reshape(grid.num_patches, -1)
    return Media(kind, patches, grid, report.content_hash)


@contextlib.contextmanager
def _closing(files: list[int]) -> Iterator[None]:
    try:
        yield
    finally:
        for file in files:
            os.close(file)
