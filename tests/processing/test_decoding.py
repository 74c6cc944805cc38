"""Decoding in worker processes gives what decoding here gives, and survives what would kill it here."""

import io
import os
import struct
import threading
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from duomo.errors import MediaError, MediaTooLarge, UnsupportedMedia
from duomo.processing.decoding import DecodeLimits, Decoders
from duomo.processing.images import load_image
from duomo.processing.messages import ImagePart


def png(width=64, height=48, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def bomb(width, height):
    """A PNG whose header promises `width` by `height` pixels, all of them there, in a few kilobytes."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packer = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    packed = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def decoders():
    pool = Decoders(2)
    yield pool
    pool.close()


def test_a_worker_decodes_what_this_process_would(decoders):
    for part in (ImagePart(png()), ImagePart(png(300, 200), max_pixels=28 * 28 * 16)):
        here, there = load_image(part), decoders.load(part)
        assert there.grid == here.grid and there.content_hash == here.content_hash
        assert np.array_equal(there.patches, here.patches) and not there.patches.flags.writeable


def test_many_threads_share_the_workers(decoders):
    parts = [ImagePart(png(seed=seed)) for seed in range(12)]
    found = {}
    threads = [
        threading.Thread(target=lambda i=i, p=p: found.update({i: decoders.load(p)}))
        for i, p in enumerate(parts)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[i].content_hash == load_image(p).content_hash for i, p in enumerate(parts))


def test_a_bad_file_costs_its_worker_and_nobody_else():
    pool = Decoders(1)
    try:
        pool.load(ImagePart(png()))
        for bad in (png()[:60], b"no picture"):
            before = pool.num_started
            with pytest.raises(UnsupportedMedia) as here:
                load_image(ImagePart(bad))
            with pytest.raises(UnsupportedMedia) as there:
                pool.load(ImagePart(bad))
            assert there.value.message == here.value.message
            assert pool.load(ImagePart(png(seed=before))).grid and pool.num_started == before + 1
    finally:
        pool.close()


def test_too_many_pixels_are_told_with_their_facts_and_the_worker_stays():
    pool = Decoders(1)
    try:
        with pytest.raises(MediaTooLarge) as wrong:
            pool.load(ImagePart(bomb(9440, 9440)))
        assert wrong.value.facts["needed"] == 9440 * 9440
        with pytest.raises(MediaTooLarge):
            pool.load(ImagePart(bomb(30_000, 30_000)))
        assert pool.load(ImagePart(png())).grid and pool.num_started == 1
    finally:
        pool.close()


def test_memory_and_time_are_bounded_by_the_kernel():
    small = Decoders(1, DecodeLimits(memory_bytes=64 << 20))
    try:
        with pytest.raises(MediaError):
            small.load(ImagePart(bomb(9000, 9000)))  # 81 million pixels: 243 MB as RGB
        assert small.load(ImagePart(png())).grid
    finally:
        small.close()
    slow = Decoders(1, DecodeLimits(wall_s=0.001))
    try:
        began = time.monotonic()
        with pytest.raises(MediaError, match="time"):
            slow.load(ImagePart(png()))
        assert time.monotonic() - began < 10
    finally:
        slow.close()


def test_a_killed_worker_is_replaced_and_close_leaves_none():
    pool = Decoders(1)
    pool.load(ImagePart(png()))
    worker = pool._idle.queue[0]
    child = worker._process.pid
    os.kill(child, 9)
    with pytest.raises(UnsupportedMedia):
        pool.load(ImagePart(png(seed=1)))
    assert pool.load(ImagePart(png(seed=1))).grid
    last = pool._idle.queue[0]._process
    pool.close()
    assert last.poll() is not None
    with pytest.raises(MediaError):
        pool.load(ImagePart(png(seed=2)))


def test_the_last_media_are_kept_within_their_bytes_and_only_for_the_same_question():
    one = load_image(ImagePart(png())).patches.nbytes
    pool = Decoders(1, cache_bytes=2 * one)
    try:
        first = pool.load(ImagePart(png()))
        assert pool.load(ImagePart(png())) is first
        assert pool.load(ImagePart(png(), max_pixels=28 * 28 * 2)) is not first
        for seed in (1, 2):
            pool.load(ImagePart(png(seed=seed)))
        again = pool.load(ImagePart(png()))
        assert again is not first and again.content_hash == first.content_hash
    finally:
        pool.close()
    none = Decoders(1, cache_bytes=0)
    try:
        assert none.load(ImagePart(png())) is not none.load(ImagePart(png()))
    finally:
        none.close()
