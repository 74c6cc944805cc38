"""Who runs next, and with how many tokens. Plain Python: ints and lists, tested in milliseconds.

Each step has room for `max_step_tokens`: running answers take theirs first, then prompts are filled in
chunks, then waiting requests are admitted in order of (priority, arrival) while pages last, or in the place
of one of a lower class. When a page is missing, the least important running request gives up all of its own:
swapped out where its prefix holds pictures (their features or the vision weights may be gone), forgotten and
computed again otherwise. It keeps its place in the order, so it comes back first and nobody starves.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field
from typing import NoReturn

from duomo.engine.pages import PagePool
from duomo.engine.prefix import PrefixKeys
from duomo.engine.request import ExpertTrace, Request
from duomo.errors import PromptTooLong


@dataclass(slots=True, eq=False)
class Sequence:
    """A request under way. `ids` are prompt and answer; the first `num_computed` have their KV in pages."""

    request: Request
    arrival: int
    ids: list[int]
    keys: PrefixKeys
    num_prompt: int
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_cached: int = 0  # of the prompt, found in the prefix cache at first admission
    num_named: int = 0  # pages whose content is known by a key
    drafts: list[int] = field(default_factory=list)
    num_swapped: int = 0  # pages out on the host; 0: none
    unfinished: Work | None = None  # stopped on its way through the layers; comes again as it is
    num_preempted: int = 0
    max_tokens: int = 1
    order: tuple[int, int] = field(init=False)  # who comes first

    def __post_init__(self) -> None:
        self.order = (self.request.priority, self.arrival)

    @property
    def num_output(self) -> int:
        return len(self.ids) - self.num_prompt

    @property
    def is_prefilling(self) -> bool:
        return _is_prefilling(self)


def _is_prefilling(sequence: Sequence) -> bool:
    return sequence.num_computed < len(sequence.ids) - 1


@dataclass(slots=True, eq=False)
class Work:
    """Compute ids[start : start + count] of a sequence, drafts included where it is answering.

    Nobody writes into one; it is not frozen because that takes four times as long to make, once a token.
    """

    sequence: Sequence
    start: int
    count: int
    drafts: tuple[int, ...] = ()

    @property
    def reaches_end(self) -> bool:
        """The last token is computed, so the next one can be drawn."""
        return self.start + self.count == len(self.sequence.ids) + len(self.drafts)


@dataclass(slots=True)
class Step:
    works: list[Work] = field(default_factory=list)
    swap_out: list[tuple[Sequence, list[int]]] = field(default_factory=list)  # before anything is written
    swap_in: list[tuple[Sequence, list[int]]] = field(default_factory=list)
    traces: dict[str, ExpertTrace] = field(default_factory=dict)  # by request; the runner's, where asked for
    likeliest: list[int] = field(default_factory=list)  # the runner's: each work's next token, if it knows


class Scheduler:
    def __init__(
        self,
        pool: PagePool,
        max_sequences: int = 64,
        max_step_tokens: int = 512,
        max_model_tokens: int = 1 << 17,
        has_prefix_cache: bool = True,
    ) -> None:
        self.pool = pool
        self.max_sequences = max_sequences
        self.max_step_tokens = max_step_tokens
        self.max_model_tokens = min(max_model_tokens, pool.num_pages * pool.page_size)
        self.has_prefix_cache = has_prefix_cache
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []  # in order
        self.num_preemptions = 0
        self._arrivals = 0

    def add(self, request: Request) -> Sequence:
        """Queues a request. PromptTooLong if it could never run."""
        limit = self.max_model_tokens
        if len(request.ids) >= limit:
            refuse(request, limit)
        keys = PrefixKeys(self.pool.page_size, request.adapter, request.salt, request.media)
        sequence = Sequence(request, self._arrivals, list(request.ids), keys, len(request.ids))
        room = limit - len(request.ids)
        sequence.drafts = list(request.params.forced[:-1])
        sequence.max_tokens = min(request.params.max_tokens or room, room)
        self._arrivals += 1
        insort(self.waiting, sequence, key=lambda s: s.order)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Finished or cancelled: its pages are given back at once."""
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self._give_back(sequence)

    def schedule(self) -> Step:
        step = Step()
        room = self.max_step_tokens
        before = self.num_preemptions
        for sequence in sorted(self.running, key=_is_prefilling):
            if self.num_preemptions != before and sequence not in self.running:
                continue  # preempted by a more important one in this very step
            room -= self._plan(step, sequence, room)
        while self.waiting and room > 0:
            candidate = self._next_admissible() if len(self.running) < self.max_sequences else None
            if candidate is None:
                if not self._yield_to_important(step):
                    break
                continue
            self._admit(step, candidate)
            room -= self._plan(step, candidate, room)
        return step

    def advance(self, work: Work, num_kept: int) -> None:
        """The first `num_kept` tokens of a work are right and stay; full pages get their names."""
        sequence = work.sequence
        sequence.num_computed = work.start + num_kept
        if not self.has_prefix_cache:
            return
        full = sequence.num_computed // self.pool.page_size
        if full > sequence.num_named:
            keys = sequence.keys.upto(sequence.ids, full)
            for index in range(sequence.num_named, full):
                self.pool.name(sequence.pages[index], keys[index])
            sequence.num_named = full

    def _plan(self, step: Step, sequence: Sequence, room: int) -> int:
        """Adds a sequence's next tokens to the step, making room for their pages. Returns how many."""
        if sequence.unfinished is not None:
            step.works.append(sequence.unfinished)
            return sequence.unfinished.count
        pending = len(sequence.ids) - sequence.num_computed
        if pending == 1 <= room and not sequence.drafts:  # the usual case, and most of all calls
            if not self._grow(step, sequence, sequence.num_computed + 1):
                return 0
            step.works.append(Work(sequence, sequence.num_computed, 1))
            return 1
        drafts = tuple(sequence.drafts)[: max(0, min(room, self._room_in_context(sequence)) - pending)]
        count = min(pending + len(drafts), room)
        if count <= 0 or not self._grow(step, sequence, sequence.num_computed + count):
            return 0
        step.works.append(Work(sequence, sequence.num_computed, count, drafts))
        return count

    def _room_in_context(self, sequence: Sequence) -> int:
        """Tokens that may still be computed; drafts must not run past the last page."""
        return self.pool.num_pages * self.pool.page_size - sequence.num_computed

    def _grow(self, step: Step, sequence: Sequence, num_tokens: int) -> bool:
        """Pages for `num_tokens`. False if the sequence itself had to give way."""
        needed = -(-num_tokens // self.pool.page_size) - len(sequence.pages)
        if needed <= 0:
            return True
        while needed > self.pool.num_available:
            victim = self.running[-1]
            self._preempt(step, victim)
            if victim is sequence:
                return False
        sequence.pages.extend(self.pool.take() for _ in range(needed))
        return True

    def _preempt(self, step: Step, victim: Sequence) -> None:
        victim.unfinished = None
        planned = [work for work in step.works if work.sequence is victim]
        for work in planned:
            step.works.remove(work)
        arrived = [entry for entry in step.swap_in if entry[0] is victim]
        full_pages = -(-victim.num_computed // self.pool.page_size)
        if arrived:  # came back in this very step: its content is still on the host
            step.swap_in.remove(arrived[0])
            victim.num_swapped = full_pages
        elif victim.request.media and victim.num_computed:
            step.swap_out.append((victim, victim.pages[:full_pages]))
            victim.num_swapped = full_pages
        else:
            victim.num_computed = 0
        victim.num_preempted += 1
        self.num_preemptions += 1
        self.running.remove(victim)
        self._give_back(victim)
        insort(self.waiting, victim, key=lambda s: s.order)

    def _give_back(self, sequence: Sequence) -> None:
        for page in reversed(sequence.pages):  # the end of a prefix is given up before its beginning
            self.pool.release(page)
        sequence.pages = []
        sequence.num_named = 0

    def _yield_to_important(self, step: Step) -> bool:
        """A waiting request of a higher class takes the place of the least important running one."""
        first = next((s for s in self.waiting if not self._is_twin_of_running(s)), None)
        last = self.running[-1] if self.running else None
        if first is None or last is None or first.request.priority >= last.request.priority:
            return False
        self._preempt(step, last)
        return True

    def _next_admissible(self) -> Sequence | None:
        """The first in order, if its pages are there. A twin of a prompt being filled waits for it."""
        for sequence in self.waiting:
            if self._is_twin_of_running(sequence):
                continue
            known = self._known_pages(sequence)
            kept = sum(self.pool.is_kept(key) for key in known)
            needed = len(sequence.ids) // self.pool.page_size + 1 - len(known)
            return sequence if needed + kept <= self.pool.num_available else None
        return None

    def _is_twin_of_running(self, sequence: Sequence) -> bool:
        if not self.has_prefix_cache or len(sequence.ids) < self.pool.page_size or sequence.num_swapped:
            return False
        return any(
            other.is_prefilling and other.num_output == 0 and other.ids == sequence.ids
            and other.request.media == sequence.request.media
            and (other.request.adapter, other.request.salt)
            == (sequence.request.adapter, sequence.request.salt)
            for other in self.running
        )  # fmt: skip

    def _known_pages(self, sequence: Sequence) -> list[bytes]:
        """Keys of the leading pages the pool knows; never the last token, which gives the logits."""
        is_scored = sequence.request.params.prompt_logprobs is not None
        if not self.has_prefix_cache or sequence.num_swapped or is_scored:
            return []
        keys = sequence.keys.upto(sequence.ids, (len(sequence.ids) - 1) // self.pool.page_size)
        known = 0
        while known < len(keys) and self.pool.knows(keys[known]):
            known += 1
        return keys[:known]

    def _admit(self, step: Step, sequence: Sequence) -> None:
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=lambda s: s.order)
        if sequence.num_swapped:
            sequence.pages = [self.pool.take() for _ in range(sequence.num_swapped)]
            step.swap_in.append((sequence, list(sequence.pages)))
            sequence.num_swapped = 0
            return
        for key in self._known_pages(sequence):
            page = self.pool.share(key)
            assert page is not None, "a known page vanished"
            sequence.pages.append(page)
        sequence.num_named = len(sequence.pages)
        sequence.num_computed = len(sequence.pages) * self.pool.page_size
        if sequence.num_preempted == 0:
            sequence.num_cached = min(sequence.num_computed, sequence.num_prompt)

    def check(self) -> None:
        """Pages held are exactly the pages of running sequences, each as often as it is shared."""
        self.pool.check()
        held: dict[int, int] = {}
        for sequence in self.running:
            assert len(set(sequence.pages)) == len(sequence.pages), "a sequence holds a page twice"
            assert len(sequence.pages) * self.pool.page_size >= sequence.num_computed, "computed but unpaged"
            for index, page in enumerate(sequence.pages):
                held[page] = held.get(page, 0) + 1
                is_full = (index + 1) * self.pool.page_size <= sequence.num_computed
                assert held[page] == 1 or is_full, "a page that is still written is shared"
        counted = {page: count for page, count in enumerate(self.pool.holders) if count}
        assert held == counted, "holders do not match"
        assert all(not s.pages for s in self.waiting), "a waiting sequence holds pages"


def refuse(request: Request, max_model_tokens: int) -> NoReturn:
    """PromptTooLong, with both numbers."""
    most, given = max_model_tokens - 1, len(request.ids)
    raise PromptTooLong(
        f"the prompt has {given} tokens; with room for an answer at most {most} fit",
        needed=given,
        available=most,
    )
