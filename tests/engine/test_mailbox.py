"""Outputs reach the loop in order and none is lost, whatever the threads do; one wake-up serves many."""

from __future__ import annotations

import asyncio
import threading

from duomo.engine.mailbox import Box, Mailbox, mailbox_of


def test_letters_of_many_threads_all_arrive_each_threads_in_order() -> None:
    async def run() -> list[tuple[int, int]]:
        got: list[tuple[int, int]] = []
        box = mailbox_of(asyncio.get_running_loop())
        assert box is mailbox_of(asyncio.get_running_loop())

        def write(who: int) -> None:
            for number in range(2000):
                box.post(got.append, (who, number))

        threads = [threading.Thread(target=write, args=(who,)) for who in range(4)]
        for thread in threads:
            thread.start()
        while len(got) < 8000:
            await asyncio.sleep(0.001)
        return got

    got = asyncio.run(asyncio.wait_for(run(), 30))
    for who in range(4):
        assert [number for writer, number in got if writer == who] == list(range(2000))


def test_a_step_wakes_the_loop_once_and_a_closed_loop_takes_nothing() -> None:
    class Loop:
        is_over = False

        def __init__(self) -> None:
            self.calls = []

        def is_closed(self) -> bool:
            return self.is_over

        def call_soon_threadsafe(self, call) -> None:
            self.calls.append(call)

    loop, got = Loop(), []
    box = Mailbox(loop)
    for number in range(8):
        box.post(got.append, number)
    assert len(loop.calls) == 1 and not got
    loop.calls.pop()()
    assert got == list(range(8))
    box.post(got.append, 8)
    assert len(loop.calls) == 1  # the next step wakes it again
    loop.calls.pop()()
    loop.is_over = True
    box.post(got.append, 9)
    assert not loop.calls


def test_each_reader_gets_its_own_in_order_and_one_that_gave_up_stands_in_nobodys_way() -> None:
    async def run() -> None:
        boxes: list[Box[int]] = [Box() for _ in range(3)]
        late = asyncio.ensure_future(boxes[0].get())
        await asyncio.sleep(0)
        late.cancel()
        await asyncio.gather(late, return_exceptions=True)

        def write() -> None:
            for number in range(3000):
                boxes[number % 3].post(number)

        async def read(box: Box[int]) -> list[int]:
            return [await box.get() for _ in range(1000)]

        thread = threading.Thread(target=write)
        thread.start()
        got = await asyncio.gather(*map(read, boxes))
        thread.join()
        assert list(got) == [list(range(first, 3000, 3)) for first in range(3)]

    asyncio.run(asyncio.wait_for(run(), 30))
