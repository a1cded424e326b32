"""Draws: functions of seed, epoch and content, each setting's from its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from dora_diffusion.data.captions import CaptionRules
from dora_diffusion.data.dataset import SampleTransform, random_mask
from dora_diffusion.data.photos import Photo


def photo(number: int, caption: str = "", size: tuple[int, int] = (40, 60)) -> Photo:
    return Photo(Path(f"{number}.png"), f"digest {number}", size, caption)


def test_places_and_flips_follow_seed_epoch_and_digest_alone() -> None:
    draws = SampleTransform(32, seed=3, center_crop=False, random_flip=True)
    crops = [draws.crop(photo(7), epoch) for epoch in range(60)]
    renamed = replace(photo(7), path=Path("other.png"), caption="other")
    assert [draws.crop(renamed, epoch) for epoch in range(60)] == crops
    for other in (replace(draws, seed=4), draws):
        assert [other.crop(photo(8), epoch) for epoch in range(60)] != crops
    assert replace(draws, seed=4).crop(photo(7), 0) != crops[0]
    assert len({crop.crop_top_left for crop in crops}) > 6
    assert 18 < sum(crop.flipped for crop in crops) < 42


def test_a_setting_does_not_move_the_draws_of_another() -> None:
    draws = SampleTransform(32, center_crop=False, captions=CaptionRules(dropout=0.5))
    flipping = replace(draws, random_flip=True, captions=CaptionRules(shuffle_tags=True))
    for epoch in range(20):
        plain, flipped = draws.crop(photo(1), epoch), flipping.crop(photo(1), epoch)
        assert plain.crop_top_left == flipped.crop_top_left
        assert not plain.flipped


def test_caption_dropout_and_shuffling_are_drawn_per_epoch() -> None:
    draws = SampleTransform(32, captions=CaptionRules(dropout=0.3, shuffle_tags=True))
    tagged = photo(0, "sks dog, red, big, old")
    captions = [draws.caption(tagged, epoch) for epoch in range(60)]
    assert captions == [draws.caption(tagged, epoch) for epoch in range(60)]
    assert 8 <= captions.count("") <= 30
    assert len(set(captions)) > 4
    assert all(caption.startswith("sks dog, ") for caption in captions if caption)
    assert SampleTransform(32).caption(tagged, 5) == tagged.caption


def test_sizes_are_the_resolution_the_bucket_or_the_partners() -> None:
    tall = photo(0, size=(90, 50))
    assert SampleTransform(40).crop(tall, 0).target_size == (40, 40)
    bucketed = SampleTransform(40, buckets=lambda size: (48, 24))
    assert bucketed.target_size(tall) == bucketed.crop(tall, 0).target_size == (48, 24)
    assert bucketed.crop(tall, 0, (24, 48)).target_size == (24, 48)


def test_random_masks_are_rectangles_ellipses_and_whole_images() -> None:
    generator = torch.Generator().manual_seed(0)
    masks = [random_mask((48, 80), generator)[0] for _ in range(400)]
    kinds = {"whole": 0, "rectangle": 0, "ellipse": 0}
    for mask in masks:
        assert mask.shape == (48, 80)
        assert set(mask.unique().tolist()) <= {0.0, 1.0}
        assert mask.any(), "there is always something to paint"
        rows, columns = mask.any(dim=1), mask.any(dim=0)
        is_rectangle = torch.equal(mask, (rows[:, None] & columns).float())
        kinds["whole" if mask.all() else "rectangle" if is_rectangle else "ellipse"] += 1
    assert 70 < kinds["whole"] < 140
    # A small ellipse in a corner may look like a rectangle, and a large rectangle be the whole.
    assert 100 < kinds["rectangle"] < 200
    assert 100 < kinds["ellipse"] < 200
    assert torch.stack(masks).mean(dim=0).min() > 0.3, "everywhere"


def test_masks_follow_seed_epoch_and_digest_alone_and_are_bounded_by_a_cache() -> None:
    draws, cached = (SampleTransform(32, crop_variants=variants) for variants in (None, 3))
    crop = draws.crop(photo(1), 0)

    def masks(draws: SampleTransform, number: int = 1) -> list[tuple[float, ...]]:
        drawn = (draws.inpainting_mask(photo(number), crop, epoch) for epoch in range(30))
        return [tuple(mask.flatten().tolist()) for mask in drawn]

    assert masks(draws) == masks(draws) != masks(draws, 2)
    assert masks(draws) != masks(replace(draws, seed=1))
    assert len(set(masks(draws))) > 15
    assert len(set(masks(cached))) == 3
