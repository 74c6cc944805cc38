"""Keys of prefixes: one per full page, each made of the one before, the page's ids and its pictures.

Two prompts with the same text and different pictures differ in every page from the first picture on; so do
prompts under different adapters or salts from the first page. Partial pages have no key and are not shared.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

from duomo.engine.request import MediaBlob


def root_key(adapter: str, salt: str) -> bytes:
    """What the first page's key is made from."""
    state = blake2b(digest_size=16)
    for part in (adapter.encode(), salt.encode()):
        state.update(len(part).to_bytes(8, "little") + part)
    return state.digest()


def page_key(parent: bytes, ids: Sequence[int], start: int, media: Sequence[MediaBlob]) -> bytes:
    """Key of the page that holds ids at start, start + 1, ... after the prefix `parent`."""
    state = blake2b(parent, digest_size=16)
    state.update(array("q", ids).tobytes())
    stop = start + len(ids)
    for medium in media:
        if medium.start < stop and start < medium.start + medium.num_tokens:
            place = array("q", (medium.start - start, *medium.grid)).tobytes()
            state.update(len(medium.content_hash).to_bytes(2, "little") + medium.content_hash + place)
    return state.digest()


class PrefixKeys:
    """The keys of one sequence, computed once as its pages fill."""

    def __init__(self, page_size: int, adapter: str, salt: str, media: Sequence[MediaBlob]) -> None:
        self._page_size = page_size
        self._media = media
        self._keys = [root_key(adapter, salt)]

    def upto(self, ids: Sequence[int], num_pages: int) -> list[bytes]:
        """Keys of the first `num_pages` pages of ids."""
        for page in range(len(self._keys) - 1, num_pages):
            start = page * self._page_size
            chunk = ids[start : start + self._page_size]
            assert len(chunk) == self._page_size, "only a full page has a key"
            self._keys.append(page_key(self._keys[-1], chunk, start, self._media))
        return self._keys[1 : num_pages + 1]
