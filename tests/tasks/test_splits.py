"""No digit and no scene is in two splits, whatever the seed."""

from __future__ import annotations

import numpy as np

from duomo.tasks import Handwriting, dialogue, shapes, split_of

SPLITS = ("train", "dev", "test")


def test_the_pools_of_digits_share_no_picture(real_pools: dict[str, Handwriting]) -> None:
    pixels = {
        split: {sample.tobytes() for samples in pool.samples for sample in samples}
        for split, pool in real_pools.items()
    }
    assert sum(len(found) for found in pixels.values()) > 9900
    for one in SPLITS:
        for other in SPLITS:
            assert one == other or not pixels[one] & pixels[other]


def test_the_pools_have_every_digit_and_the_stated_sizes(real_pools: dict[str, Handwriting]) -> None:
    sizes = {s: sum(len(samples) for samples in pool.samples) for s, pool in real_pools.items()}
    assert sum(sizes.values()) == 10_000
    assert 7_900 < sizes["train"] < 8_100 and 900 < sizes["dev"] < 1_100 and 900 < sizes["test"] < 1_100
    assert all(len(samples) > 50 for pool in real_pools.values() for samples in pool.samples)


def test_scenes_of_three_splits_do_not_meet_in_20000_draws_each() -> None:
    """The hash decides, so seeds may be equal: 20,000 scenes a split, drawn without their pictures."""
    seen: dict[str, set[str]] = {split: set() for split in SPLITS}
    rng = np.random.default_rng(5)
    while min(len(scenes) for scenes in seen.values()) < 1_000 or sum(map(len, seen.values())) < 60_000:
        scene = shapes_scene(rng)
        seen[split_of(scene)].add(scene)
    assert not seen["train"] & seen["dev"] and not seen["train"] & seen["test"]
    assert not seen["dev"] & seen["test"]


def shapes_scene(rng: np.random.Generator) -> str:
    drawn = shapes.draw_scene(rng)
    return "shapes " + " ".join(sorted(f"{s.colour}-{s.kind}@{s.cell}" for s in drawn))


def test_generators_keep_to_the_split_that_was_asked_for() -> None:
    for split in SPLITS:
        rng = np.random.default_rng(1)
        scenes = {shapes.generate(rng, split, num_turns=1).scene for _ in range(40)}
        sums = {e.scene for e in (dialogue.generate(rng, split) for _ in range(200)) if e.scene[:3] == "sum"}
        assert sums and {split_of(scene) for scene in scenes | sums} == {split}


def test_the_hash_gives_the_stated_shares() -> None:
    found = [split_of(f"scene {i}") for i in range(20_000)]
    assert abs(found.count("train") / 20_000 - 0.90) < 0.01
    assert abs(found.count("dev") / 20_000 - 0.05) < 0.01
