"""Free memory goes back once after each time of work, and for real."""

import ctypes
import os
import subprocess
import sys

import pytest

from duomo.engine.heap import QUIET_S, Heap


def test_it_is_given_back_once_after_work_and_a_pause():
    now, given = [0.0], []
    heap = Heap(lambda: now[0], lambda: given.append(now[0]))
    assert not heap.tidy()  # nothing was done yet
    heap.used()
    assert not heap.tidy()
    now[0] = QUIET_S - 0.1
    heap.used()
    now[0] = QUIET_S + 0.1
    assert not heap.tidy()  # the pause counts from the last work
    now[0] = 2 * QUIET_S
    assert heap.tidy() and not heap.tidy() and given == [2 * QUIET_S]


_THREADS = """
import re, sys, threading
from duomo.engine.heap import few_arenas, give_back_free_pages
sys.argv[1] == "ours" and few_arenas()

def dirty():
    text = open("/proc/self/smaps_rollup").read()
    return int(re.search(r"Private_Dirty: +(\\d+)", text)[1])

before = dirty()
gate = threading.Barrier(12)
def work():
    kept = []
    for _ in range(6):
        gate.wait()
        pieces = [bytes(5000) for _ in range(1000)]  # too long for Python's own arenas
        kept += pieces[::100]
        del pieces
    gate.wait()
threads = [threading.Thread(target=work) for _ in range(12)]
for thread in threads: thread.start()
for thread in threads: thread.join()
sys.argv[1] == "ours" and give_back_free_pages()
print(dirty() - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not glibc")
def test_threads_leave_little_behind():
    def grown_kib(whose: str) -> int:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", _THREADS, whose]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    assert grown_kib("ours") < 0.5 * grown_kib("plain")


_LOADED = """
import re, torch
from duomo.checkpoints.pages import library_code
from duomo.engine.heap import give_back_unused, return_large_pieces

def kib(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

before, x = kib("RssFile"), torch.arange(6.0)
assert sum(item.num_bytes for item in library_code()) > 1 << 20
give_back_unused()
after = kib("RssFile")
assert torch.equal(x.sort(descending=True).values, x.flip(0))  # code comes back
return_large_pieces()
held, large = kib("RssAnon"), [torch.ones(3 << 20) for _ in range(4)]
assert kib("RssAnon") > held + 40_000
large.clear()
print(after / before, kib("RssAnon") - held)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not glibc")
def test_what_loading_needed_goes_back_and_large_pieces_at_once():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", _LOADED]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    share, kept_kib = done.stdout.split()
    assert float(share) < 0.7 and float(kept_kib) < 8_000
