"""Bytes of a picture or video from a data:, http(s): or file: address, fetched without trusting it.

Public addresses alone are connected to: a name is resolved once, every address it has is judged, and the one
that was judged is the one connected to, again on each redirect (so a name that changes its mind gains
nothing). `file:` works only under a given folder. Time, bytes and redirects are bounded; the kind is read
from the first bytes, never from what the sender claims. Decoding, and its own limits, is next door.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import ipaddress
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, unquote_to_bytes, urljoin, urlsplit

import httpx

from duomo.errors import FetchRefused, MediaError, MediaTooLarge, UnsupportedMedia

Kind = Literal["image", "video"]
IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

_MAX_REDIRECTS = 3
_FORMATS = "PNG, JPEG, WebP, GIF or BMP for a picture; MP4, WebM, Matroska, AVI or GIF for a video"


@dataclass(frozen=True, slots=True)
class FetchRules:
    """What may be fetched. `file_root` is the folder that file: addresses may name files in."""

    timeout_s: float = 10.0
    max_bytes: int = 32 << 20
    allow_private: bool = False
    file_root: Path | None = None


async def fetch(url: str, kind: Kind, rules: FetchRules) -> bytes:
    """The encoded medium at `url`.

    Raises FetchRefused (an address that may not be visited), MediaTooLarge, UnsupportedMedia (not a picture
    or video that is read here) or MediaError (malformed, unreachable, too slow).
    """
    scheme = url[:10].partition(":")[0].lower()
    if scheme == "data":
        data = _from_data(url, kind, rules)
    elif scheme in ("http", "https"):
        try:
            data = await asyncio.wait_for(_from_network(url, rules), rules.timeout_s)
        except (asyncio.TimeoutError, httpx.TimeoutException) as error:
            raise MediaError(
                f"the {kind} did not arrive within {rules.timeout_s:g} s; send it as a data: address"
            ) from error
    elif scheme == "file":
        data = await asyncio.to_thread(_from_file, url, rules)
    else:
        raise FetchRefused("a picture or video needs a data:, http:, https: or file: address")
    return check_kind(data, kind)


def check_kind(data: bytes, kind: Kind) -> bytes:
    """The same bytes if they open like a picture (or video) of a format on the list."""
    if not data:
        raise UnsupportedMedia(f"the {kind} is empty; {_FORMATS}")
    found = sniff(data)
    if found is None:
        raise UnsupportedMedia(f"the {kind} is in no format that is read here: {_FORMATS}")
    if kind not in found:
        raise UnsupportedMedia(f"a {kind} was announced and another kind of medium came: {_FORMATS}")
    return data


def sniff(data: bytes) -> tuple[Kind, ...] | None:
    """What the first bytes say: kinds this data may be used as, or None. A GIF may be either."""
    if data.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM")):
        return ("image",)
    if data.startswith((b"GIF87a", b"GIF89a")):
        return ("image", "video")
    if data[:4] == b"RIFF":
        return {b"WEBP": ("image",), b"AVI ": ("video",)}.get(data[8:12])  # type: ignore[return-value]
    if data[4:8] == b"ftyp" and data[8:12] not in (b"heic", b"heix", b"mif1", b"avif", b"avis"):
        return ("video",)
    if data.startswith(b"\x1a\x45\xdf\xa3"):
        return ("video",)
    return None


def _from_data(url: str, kind: Kind, rules: FetchRules) -> bytes:
    head, comma, body = url[5:].partition(",")
    mime, *parameters = (piece.strip().lower() for piece in head.split(";"))
    if not comma:
        raise MediaError("a data: address needs a comma before its data: data:image/png;base64,...")
    if not (mime.startswith(f"{kind}/") or mime in ("", "application/octet-stream", "image/gif")):
        raise UnsupportedMedia(f"the data: address says {mime[:40]!r}; a {kind} was expected")
    if len(body) > rules.max_bytes * 4 // 3 + 4:
        raise _too_large(kind, rules)
    if "base64" not in parameters:
        data = unquote_to_bytes(body)
    else:
        try:
            text = unquote(body) if "%" in body else body
            data = base64.b64decode("".join(text.split()), validate=True)
        except (binascii.Error, ValueError) as error:
            raise MediaError(f"the {kind}'s base64 is malformed; encode the file's bytes again") from error
    if len(data) > rules.max_bytes:
        raise _too_large(kind, rules)
    return data


def _from_file(url: str, rules: FetchRules) -> bytes:
    if rules.file_root is None:
        raise FetchRefused("file: addresses are off; the server allows them with --allowed-local-media-path")
    parts = urlsplit(url)
    path = Path(unquote(parts.path))
    if parts.netloc not in ("", "localhost") or "\0" in str(path):
        raise FetchRefused("a file: address must name a file on this machine: file:///folder/picture.png")
    root = rules.file_root.resolve()
    real = (root / path).resolve()
    if not real.is_relative_to(root):
        raise FetchRefused("the file lies outside the folder the server allows")
    try:
        if not real.is_file():
            raise MediaError("there is no such file in the folder the server allows")
        if real.stat().st_size > rules.max_bytes:
            raise _too_large("file", rules)
        return real.read_bytes()
    except OSError as error:
        raise MediaError(f"the file cannot be read: {error.strerror}") from error


async def _from_network(url: str, rules: FetchRules) -> bytes:
    async with httpx.AsyncClient(trust_env=False, follow_redirects=False, timeout=rules.timeout_s) as client:
        for _ in range(_MAX_REDIRECTS + 1):
            request = await _vetted_request(client, url, rules)
            try:
                response = await client.send(request, stream=True)
            except httpx.TimeoutException:
                raise
            except (httpx.InvalidURL, httpx.RemoteProtocolError) as error:  # httpx reads Location by itself
                raise FetchRefused("the address redirects to one that is malformed") from error
            except httpx.HTTPError as error:
                raise MediaError("the address could not be reached") from error
            try:
                if response.is_redirect:
                    url = urljoin(url, response.headers.get("location", ""))
                    continue
                if response.status_code != 200:
                    raise MediaError(f"the address answered {response.status_code} instead of a file")
                return await _body_within(response, rules)
            finally:
                await response.aclose()
    raise FetchRefused(f"the address redirects more than {_MAX_REDIRECTS} times")


async def _vetted_request(client: httpx.AsyncClient, url: str, rules: FetchRules) -> httpx.Request:
    """A request to the very IP that was judged, with the name kept for the Host header and for TLS."""
    try:
        parts = httpx.URL(url)
    except (httpx.InvalidURL, ValueError) as error:
        raise FetchRefused("the address is malformed") from error
    if parts.scheme not in ("http", "https") or not parts.host or parts.userinfo:
        raise FetchRefused("only plain http: and https: addresses are fetched, without a user name")
    vetted = await resolve(parts.host, parts.port or (443 if parts.scheme == "https" else 80), rules)
    host = parts.netloc.decode("ascii", "replace")
    return client.build_request(
        "GET",
        parts.copy_with(host=str(vetted)),
        headers={"Host": host, "Accept-Encoding": "identity", "User-Agent": "duomo"},
        extensions={"sni_hostname": parts.raw_host.decode("ascii")} if parts.scheme == "https" else None,
    )


async def resolve(host: str, port: int, rules: FetchRules) -> IPAddress:
    """The address to connect to; FetchRefused if any address of the name is not public."""
    try:
        loop = asyncio.get_running_loop()
        rows = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise MediaError("the address's name is not known") from error
    found = [ipaddress.ip_address(str(row[4][0]).partition("%")[0]) for row in rows]
    if not found:
        raise MediaError("the address's name is not known")
    if not rules.allow_private and not all(map(is_public, found)):
        raise FetchRefused("the address is private or local, and the server fetches public ones alone")
    return found[0]


def is_public(address: IPAddress) -> bool:
    """Whether an address is on the open internet, judged through every way of wrapping IPv4 in IPv6."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo and address.teredo[1])
        if inner is None and address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is None and int(address) >> 32 == 0:  # ::a.b.c.d, and :: and ::1 with it
            return False
        if inner is not None:
            return is_public(inner)
    return address.is_global and not address.is_multicast and not address.is_reserved


_NAT64 = ipaddress.ip_network("64:ff9b::/96")


async def _body_within(response: httpx.Response, rules: FetchRules) -> bytes:
    if int(response.headers.get("content-length", "0") or 0) > rules.max_bytes:
        raise _too_large("file at the address", rules)
    if response.headers.get("content-encoding", "identity") not in ("", "identity"):
        raise UnsupportedMedia("the address answers compressed; pictures and videos are fetched as they are")
    pieces: list[bytes] = []
    total = 0
    chunks: AsyncIterator[bytes] = response.aiter_raw()
    try:
        async for piece in chunks:
            total += len(piece)
            if total > rules.max_bytes:
                raise _too_large("file at the address", rules)
            pieces.append(piece)
    except httpx.TimeoutException:
        raise
    except httpx.HTTPError as error:
        raise MediaError("the address broke off before the file was whole") from error
    return b"".join(pieces)


def _too_large(what: str, rules: FetchRules) -> MediaTooLarge:
    limit = rules.max_bytes / (1 << 20)
    return MediaTooLarge(f"the {what} is over {limit:g} MB; send a smaller one", max_bytes=rules.max_bytes)
