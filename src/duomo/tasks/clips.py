"""Short videos: which way something moves, which of two is faster, when something appears.

Sprites are real digits and product photos, of pools that no other split shows. Frames come half a second
apart; who renders them writes the time on each, as every video's frames are marked (spec section 5).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from duomo.tasks.pools import Pools
from duomo.tasks.scene import Example, Language, Mark, Pixels, Turn, any_language, pick, split_of

SIDE_PX = 112
CELL_PX = 28  # side of a cell, which is a token
STEP_S = 0.5
STAMP_PX = 6, 71  # row and column of the seconds that are written on a frame
LATEST = 25  # steps after which the last pair of frames may come
FRAMES = {"train": (4, 6), "dev": (4, 6, 8), "test": (4, 6, 8)}  # eight frames are never trained on
WAYS = {"en": ("left", "right", "up", "down"), "zh": ("左", "右", "上", "下")}
STEPS = ((0, -1), (0, 1), (-1, 0), (1, 0))  # row, column
LANES = {"en": ("upper", "lower"), "zh": ("上面", "下面")}
DIRECTION = {
    "en": ("In which direction does it move?", "Which way does the object move?"),
    "zh": ("它往哪个方向移动？", "物体向哪边移动？"),
}
EVENT = {
    "en": ("When does the object appear?", "At what time does it appear?"),
    "zh": ("物体什么时候出现？", "它在第几秒出现？"),
}
FASTER = {
    "en": ("Which object is faster, the upper or the lower?", "Does the upper or the lower move faster?"),
    "zh": ("上面和下面的物体哪个更快？", "哪个物体移动得更快，上面还是下面？"),
}


def generate(rng: np.random.Generator, pools: Pools) -> Example:
    return (_direction, _event, _faster)[int(rng.integers(3))](rng, pools)


def _sprite(rng: np.random.Generator, pools: Pools, size: int) -> Pixels:
    if rng.random() < 0.5:
        sprite = pools.handwriting.draw(rng, int(rng.integers(10)))
    else:
        sprite = pools.products[int(rng.integers(len(pools.products)))]
    return np.asarray(Image.fromarray(sprite).resize((size, size), Image.Resampling.BILINEAR))


def _frames(rng: np.random.Generator, count: int) -> tuple[Pixels, tuple[float, ...]]:
    """Empty frames in one quiet colour."""
    paper = rng.uniform(0, 70, size=3) if rng.random() < 0.5 else rng.uniform(60, 130, size=3)
    frames = np.broadcast_to(paper.astype(np.uint8), (count, SIDE_PX, SIDE_PX, 3)).copy()
    return frames, tuple(STEP_S * i for i in range(count))


def _paste(frame: Pixels, sprite: Pixels, row: float, column: float, ink: Pixels) -> None:
    """The sprite's light parts in `ink`, centred; what lies outside is cut off."""
    size = sprite.shape[0]
    top, left = round(row - size / 2), round(column - size / 2)
    y0, y1, x0, x1 = max(top, 0), min(top + size, SIDE_PX), max(left, 0), min(left + size, SIDE_PX)
    if y0 >= y1 or x0 >= x1:
        return
    share = sprite[y0 - top : y1 - top, x0 - left : x1 - left, None] / np.float32(255)
    place = frame[y0:y1, x0:x1]
    frame[y0:y1, x0:x1] = (place * (1 - share) + ink * share).astype(np.uint8)


def _ink(rng: np.random.Generator) -> Pixels:
    return rng.uniform(170, 255, size=3).astype(np.uint8)


def _count(rng: np.random.Generator, pools: Pools) -> int:
    choices = FRAMES[pools.split]
    return choices[int(rng.integers(len(choices)))]


def _marks(*paths: Sequence[tuple[float, float] | None], start: int = 0) -> tuple[Mark, ...]:
    """Of every pair of frames: when its first one is, and where each sprite is before, after or in both.

    A path has the row and column of a sprite in every frame, None where there is none.
    """
    marks = []
    for pair in range(len(paths[0]) // 2):
        marks.append(Mark(f"time {start + 2 * pair}", *STAMP_PX, pair=pair))
        for before, after in (path[2 * pair : 2 * pair + 2] for path in paths):
            if before and after and _cell(before) == _cell(after):
                marks.append(Mark("sprite both", *_middle(before, after), pair=pair))
                continue
            marks += [
                Mark(f"sprite {when}", *place, pair=pair)
                for when, place in (("before", before), ("after", after))
                if place
            ]
    return tuple(marks)


def _cell(place: tuple[float, float]) -> tuple[int, int]:
    return int(place[0]) // CELL_PX, int(place[1]) // CELL_PX


def _middle(one: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    return (one[0] + other[0]) / 2, (one[1] + other[1]) / 2


def _direction(rng: np.random.Generator, pools: Pools) -> Example:
    while True:
        way, count = int(rng.integers(4)), _count(rng, pools)
        reach, lane = int(rng.integers(36, 66)), int(rng.integers(40, 82))
        scene = f"clip direction {way} {count} {reach} {lane}"
        if split_of(scene) == pools.split:
            break
    frames, times = _frames(rng, count)
    sprite, ink = _sprite(rng, pools, int(rng.integers(28, 38))), _ink(rng)
    path = []
    for index, frame in enumerate(frames):
        along = (index / (count - 1) - 0.5) * reach
        row, column = (58 + along * step if step else lane for step in STEPS[way])
        _paste(frame, sprite, row, column, ink)
        path.append((row, column))
    turns = []
    for thinks in (False, True):
        language = any_language(rng)
        said = _path_aloud(path, language) if thinks else None
        kind = "clips/direction thinking" if thinks else "clips/direction"
        turns.append(Turn(pick(rng, DIRECTION[language]), WAYS[language][way], said, kind))
    return Example(tuple(turns), scene, frames, _marks(path), times)


def _path_aloud(path: list[tuple[float, float]], language: Language) -> str:
    """The place in each frame, in tenths of the picture from the left and from the top."""
    places = (f"{round(c / SIDE_PX * 10)},{round(r / SIDE_PX * 10)}" for r, c in path)
    return "; ".join(places) + "." if language == "en" else "；".join(places) + "。"


def _event(rng: np.random.Generator, pools: Pools) -> Example:
    while True:
        count, start = _count(rng, pools), STEP_S * int(rng.integers(0, 20))
        first = int(rng.integers(1, count))  # uniform: the answer
        row, column = (int(v) for v in rng.integers(36, 92, size=2))
        scene = f"clip event {first} of {count} from {start} at {row} {column}"
        if split_of(scene) == pools.split:
            break
    frames, times = _frames(rng, count)
    times = tuple(start + t for t in times)
    sprite, ink = _sprite(rng, pools, int(rng.integers(30, 46))), _ink(rng)
    for frame in frames[first:]:
        _paste(frame, sprite, row, column, ink)
    turns = []
    for thinks in (False, True):
        language = any_language(rng)
        words = ("no", "yes") if language == "en" else ("无", "有")
        comma, stop = (", ", ".") if language == "en" else ("，", "。")
        said = comma.join(f"{t:g} {words[i >= first]}" for i, t in enumerate(times)) + stop
        answer = f"{times[first]:.1f} s" if language == "en" else f"{times[first]:.1f}秒"
        kind = "clips/event thinking" if thinks else "clips/event"
        turns.append(Turn(pick(rng, EVENT[language]), answer, said if thinks else None, kind))
    path = [None] * first + [(float(row), float(column))] * (count - first)
    return Example(tuple(turns), scene, frames, _marks(path, start=round(start / STEP_S)), times)


def _faster(rng: np.random.Generator, pools: Pools) -> Example:
    while True:
        lower_is_faster, count = bool(rng.random() < 0.5), _count(rng, pools)
        slow = int(rng.integers(10, 26))
        fast = slow + int(rng.integers(26, 40))
        reaches = (slow, fast) if lower_is_faster else (fast, slow)
        signs = [1 if rng.random() < 0.5 else -1 for _ in range(2)]
        scene = f"clip faster {reaches} {signs} {count}"
        if split_of(scene) == pools.split:
            break
    frames, times = _frames(rng, count)
    lanes = (40, 86)
    sprites = [_sprite(rng, pools, int(rng.integers(26, 34))) for _ in range(2)]
    inks = [_ink(rng) for _ in range(2)]
    paths: tuple[list[tuple[float, float]], ...] = ([], [])
    for index, frame in enumerate(frames):
        for path, lane, sprite, ink, reach, sign in zip(
            paths, lanes, sprites, inks, reaches, signs, strict=True
        ):
            along = (index / (count - 1) - 0.5) * reach * sign
            _paste(frame, sprite, lane, 56 + along, ink)
            path.append((lane, 56 + along))
    language = any_language(rng)
    answer = LANES[language][lower_is_faster]
    turn = Turn(pick(rng, FASTER[language]), answer, kind="clips/faster")
    return Example((turn,), scene, frames, _marks(*paths), times)
