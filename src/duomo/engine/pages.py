"""Pages of the KV cache: who holds them, which hold a known prefix, which may be taken. Plain Python.

A page is free, held (by one request or by several that share a prefix), or kept: nobody holds it but its
content is known by a key, so the next prompt with that prefix takes it as it is. Kept pages are given up
oldest first. A page with a key is full and never written again, which is what makes sharing safe.
"""

from __future__ import annotations

from collections import OrderedDict

from duomo.errors import OutOfPages


class PagePool:
    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.num_written = 0  # pages that were ever taken; memory that was never touched costs nothing
        self._free = list(reversed(range(num_pages)))  # the one given back last is taken first: it is warm
        self._holders = [0] * num_pages
        self._key_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()

    @property
    def num_available(self) -> int:
        """Pages that may be taken now: free ones, and kept ones at the price of their content."""
        return len(self._free) + len(self._kept)

    @property
    def num_held(self) -> int:
        return self.num_pages - self.num_available

    @property
    def holders(self) -> tuple[int, ...]:
        """How many hold each page."""
        return tuple(self._holders)

    def take(self) -> int:
        """An empty page with one holder. OutOfPages if every page is held."""
        if self._free:
            page = self._free.pop()
        elif self._kept:
            page, _ = self._kept.popitem(last=False)
            del self._page_of[self._key_of.pop(page)]
        else:
            raise OutOfPages(f"all {self.num_pages} pages are held", needed=1, available=0)
        self._holders[page] = 1
        self.num_written = max(self.num_written, page + 1)  # new ones are taken in order
        return page

    def share(self, key: bytes) -> int | None:
        """One more holder of the page with this content, if there is one."""
        page = self._page_of.get(key)
        if page is not None:
            self._kept.pop(page, None)
            self._holders[page] += 1
        return page

    def knows(self, key: bytes) -> bool:
        return key in self._page_of

    def is_kept(self, key: bytes) -> bool:
        """Known and held by nobody: sharing it uses up one available page."""
        page = self._page_of.get(key)
        return page is not None and page in self._kept

    def name(self, page: int, key: bytes) -> None:
        """Says what a full page holds. If another page holds the same, that one stays the known one."""
        assert self._holders[page] > 0, f"page {page} is named but held by nobody"
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def release(self, page: int) -> None:
        assert self._holders[page] > 0, f"page {page} is released more often than held"
        self._holders[page] -= 1
        if self._holders[page] == 0:
            if page in self._key_of:
                self._kept[page] = None
            else:
                self._free.append(page)

    def forget(self) -> None:
        """Drops every kept page (a reset of the prefix cache); held ones lose their names."""
        self._free.extend(self._kept)
        self._kept.clear()
        self._key_of.clear()
        self._page_of.clear()

    def check(self) -> None:
        """Every page is in exactly one state; names are a bijection. For tests, after each operation."""
        free, kept = set(self._free), set(self._kept)
        held = {page for page, count in enumerate(self._holders) if count > 0}
        assert len(free) == len(self._free), "a page is free twice"
        assert not (free & kept or free & held or kept & held), "a page is in two states"
        assert len(free) + len(kept) + len(held) == self.num_pages, "a page is lost"
        assert max(kept | held, default=-1) < self.num_written, "a page in use was never written"
        assert {key: page for page, key in self._key_of.items()} == self._page_of, "names are no bijection"
        assert kept <= self._key_of.keys(), "a page is kept without a name"
        assert not free & self._key_of.keys(), "a free page has a name"
