"""What keeps a server standing: a cap on requests, a cap on bodies, keys, and who may call from a browser.

Keys are compared as SHA-256 digests, all of them, in constant time. A server on loopback answers only to
names of loopback, so that a page from elsewhere cannot reach it by pointing its own name here; a browser's
request from a foreign origin is refused unless that origin was given with --cors-origin.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import math
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request

from duomo import env
from duomo.errors import ConfigError
from duomo.serve.options import Options
from duomo.serve.problems import Problem


class Gate:
    """Counts requests in flight; one over the cap gets 429 with a guess of when to come back."""

    def __init__(self, most: int) -> None:
        self.most, self.inside = most, 0
        self._mean_s = 1.0

    def enter(self) -> None:
        if self.inside >= self.most:
            seconds = min(60, max(1, math.ceil(self._mean_s)))
            raise Problem(
                429,
                "queue_full",
                f"{self.inside} requests are running or waiting, the most allowed; try again in {seconds} s",
                Retry_After=str(seconds),
            )
        self.inside += 1

    def leave(self, seconds: float) -> None:
        self.inside -= 1
        self._mean_s += 0.2 * (seconds - self._mean_s)


class Keys:
    """The keys a client may send, kept as digests. No key at all: everybody may call."""

    def __init__(self, options: Options) -> None:
        keys = [*options.api_key, *(key for key in env.API_KEYS.get().split(",") if key.strip())]
        if options.api_key_file:
            keys += _keys_in(options.api_key_file)
        self._digests = [hashlib.sha256(key.strip().encode()).digest() for key in keys]

    def __len__(self) -> int:
        return len(self._digests)

    def check(self, headers: Headers) -> None:
        if not self._digests:
            return
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        digest = hashlib.sha256(given.encode()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if not any(matches):
            said = "this key is not known" if given else "a key is needed: Authorization: Bearer KEY"
            raise Problem(401, "invalid_api_key", said, WWW_Authenticate="Bearer")


def _keys_in(path: str) -> list[str]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"--api-key-file {path} is no text in UTF-8") from error
    except OSError as error:
        raise ConfigError(f"--api-key-file {path} cannot be read: {error.strerror}") from error
    keys = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    if not keys:
        raise ConfigError(f"--api-key-file {path} holds no key; write one a line")
    return keys


def check_caller(headers: Headers, options: Options) -> None:
    """Refuses foreign names on a loopback server, and foreign origins everywhere."""
    host = headers.get("host", "")
    if _is_loopback(options.host) and not _is_loopback(_name_of(host)):
        raise Problem(
            403, "foreign_host", "this server answers to its own name alone: 127.0.0.1 or localhost"
        )
    origin = headers.get("origin")
    if origin and origin not in options.cors_origin and "*" not in options.cors_origin:
        try:
            same = urlsplit(origin).netloc == host
        except ValueError:
            same = False
        if not same:
            raise Problem(403, "foreign_origin", "browsers may call from this server's own page alone")


def _name_of(host: str) -> str:
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


def _is_loopback(name: str) -> bool:
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


async def read_body(request: Request, most_mb: float) -> bytes:
    """The body, refused as soon as it is known to be too long."""
    most = int(most_mb * (1 << 20))
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise Problem(415, "unsupported_content_type", "send JSON, with Content-Type: application/json")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > most:
        raise _too_long(most_mb)
    pieces: list[bytes] = []
    total = 0
    async for piece in request.stream():
        total += len(piece)
        if total > most:
            raise _too_long(most_mb)
        pieces.append(piece)
    return b"".join(pieces)


def _too_long(most_mb: float) -> Problem:
    return Problem(413, "body_too_large", f"the body is over {most_mb:g} MB, the most allowed")
