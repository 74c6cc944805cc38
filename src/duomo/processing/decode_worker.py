"""The process that decodes other people's pictures and videos, so that the server never does.

`python -m duomo.processing.decode_worker MEMORY_BYTES CPU_S`, on a socket that is its standard input: a
length and a part come, a length and a report go, and with it an open file that holds the patches. The limits
are the kernel's (rlimit): address space beyond what the libraries take, CPU seconds a file, no core dump.
It ends when its parent does. `processing.decoding` is the other side.
"""

from __future__ import annotations

import math
import os
import resource
import socket
import sys
import tempfile
from typing import Any

import msgspec

from duomo.errors import Error, MediaError, MediaTooLarge
from duomo.processing.messages import ImagePart, VideoPart
from duomo.processing.prompt import Media
from duomo.processing.template import load_media


class Decoded(msgspec.Struct, tag=True):
    """`size_bytes` of uint8 patches lie in the file that comes along."""

    grid: tuple[int, int, int]
    content_hash: bytes
    size_bytes: int


class Refused(msgspec.Struct, tag=True):
    """The name of an error of `duomo.errors`, and what it says."""

    kind: str
    message: str
    facts: dict[str, int]


Report = Decoded | Refused
_LENGTH_BYTES = 4


def main(memory_bytes: int, cpu_s: int) -> None:
    import duomo.processing.video  # noqa: F401  the libraries are in memory before its bound is set

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (_mapped_bytes() + memory_bytes,) * 2)
    channel = socket.socket(fileno=os.dup(0))
    while True:
        asked = read_message(channel)
        if asked is None:
            return
        used = resource.getrusage(resource.RUSAGE_SELF)
        spent = math.ceil(used.ru_utime + used.ru_stime)
        resource.setrlimit(resource.RLIMIT_CPU, (spent + cpu_s, resource.RLIM_INFINITY))
        report, patches = _decode(asked)
        answer = msgspec.msgpack.encode(report)
        head = len(answer).to_bytes(_LENGTH_BYTES, "big")
        if patches is None:
            channel.sendall(head + answer)
        else:
            with tempfile.TemporaryFile() if not hasattr(os, "memfd_create") else _memory_file() as file:
                file.write(patches)
                file.flush()
                socket.send_fds(channel, [head], [file.fileno()])
            channel.sendall(answer)


def _decode(asked: bytes) -> tuple[Report, Any]:
    try:
        kind, body = msgspec.msgpack.decode(asked, type=tuple[str, msgspec.Raw])
        part: Any = msgspec.msgpack.decode(body, type=ImagePart if kind == "image" else VideoPart)
        media: Media = load_media(part)
    except Error as error:
        if isinstance(error.__cause__, MemoryError):
            error = MediaTooLarge("the medium needs more memory than decoding may take; send a smaller one")
        facts = {name: value for name, value in error.facts.items() if isinstance(value, int)}
        return Refused(type(error).__name__, error.message, facts), None
    except MemoryError:
        return Refused("MediaTooLarge", "the medium needs more memory than decoding may take", {}), None
    except Exception:
        return Refused(MediaError.__name__, "the medium is damaged and cannot be decoded", {}), None
    frames, rows, columns = media.grid
    return Decoded((frames, rows, columns), media.content_hash, media.patches.nbytes), media.patches.data


def _memory_file() -> Any:
    return os.fdopen(os.memfd_create("duomo-patches"), "wb")


def _mapped_bytes() -> int:
    """Address space in use now; 0 where the system doesn't say, and then it isn't bounded either."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 0


def read_message(channel: socket.socket) -> bytes | None:
    """The next message without its length, or None when the other side is gone."""
    head = _exactly(channel, _LENGTH_BYTES)
    return None if head is None else _exactly(channel, int.from_bytes(head, "big"))


def _exactly(channel: socket.socket, count: int) -> bytes | None:
    pieces = bytearray()
    while len(pieces) < count:
        piece = channel.recv(min(1 << 20, count - len(pieces)))
        if not piece:
            return None
        pieces += piece
    return bytes(pieces)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
