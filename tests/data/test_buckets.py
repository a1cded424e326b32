"""Aspect-ratio buckets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dora_diffusion.data.crops import Buckets, covering_size
from dora_diffusion.data.dataset import (
    DreamBoothDataset,
    SampleTransform,
    SubjectPhotos,
    iterate_batches,
)
from dora_diffusion.data.photos import list_photos, read_photos
from dora_diffusion.data.sampler import EpochSampler


def test_sizes_keep_step_area_and_ratio() -> None:
    buckets = Buckets(512, step=64)
    assert (512, 512) in buckets.sizes
    assert (640, 384) in buckets.sizes
    for height, width in buckets.sizes:
        assert height % 64 == width % 64 == 0
        assert height * width <= 512 * 512
        assert max(height, width) / min(height, width) <= 2
        assert (width, height) in buckets.sizes


@pytest.mark.parametrize(
    ("photo", "expected"),
    [((600, 600), (512, 512)), ((1500, 1000), (640, 384)), ((1000, 1500), (384, 640))],
)
def test_photos_get_the_nearest_shape(photo: tuple[int, int], expected: tuple[int, int]) -> None:
    assert Buckets(512)(photo) == expected


@given(st.integers(300, 4000), st.integers(300, 4000))
def test_buckets_lose_no_more_than_the_square(height: int, width: int) -> None:
    def lost(target: tuple[int, int]) -> float:
        resized = covering_size((height, width), target)
        return 1 - target[0] * target[1] / (resized[0] * resized[1])

    assert lost(Buckets(512)((height, width))) <= lost((512, 512)) + 1e-2


def theirs(width: int, height: int, side: int, least: int, most: int, step: int) -> np.ndarray:
    """The bucket (width, height) that sd-scripts takes: of its list the nearest width/height.

    Each side from the least to the most, the other as long as the area allows.
    """
    firsts = np.arange(least, most + 1, step)
    others = np.minimum(most, side * side // firsts // step * step)
    pairs = np.stack([firsts, others], axis=1)[others >= least]
    pairs = np.unique(np.concatenate([pairs, pairs[:, ::-1]]), axis=0)
    if [width, height] in pairs.tolist():
        return np.array([width, height])
    return pairs[np.abs(pairs[:, 0] / pairs[:, 1] - width / height).argmin()]


@pytest.mark.parametrize(
    ("photo", "buckets", "expected"),
    [
        ((1500, 1000), (1024, 64, 256, 1024), (1024, 704)),
        ((2000, 500), (512, 64, 256, 1024), (1024, 256)),
        ((500, 2000), (512, 64, 256, 1024), (256, 1024)),
        ((1500, 1000), (1024, 64, 256, 2048), (1216, 832)),
        ((1500, 1000), (512, 32, 300, 700), (608, 416)),
        # By the difference of the ratios, not of their logarithms.
        ((1140, 1000), (512, 64, 256, 1024), (512, 512)),
        ((2800, 1000), (512, 64, 256, 1024), (768, 320)),
    ],
)
def test_buckets_of_sd_scripts(
    photo: tuple[int, int], buckets: tuple[int, ...], expected: tuple[int, int]
) -> None:
    """By its width and height; its own reader gave the first two."""
    side, step, least, most = buckets
    assert Buckets(*buckets)(photo[::-1]) == expected[::-1]
    least, most = least // step * step, -(-most // step) * step
    assert tuple(theirs(*photo, side, least, most, step)) == expected


@pytest.mark.parametrize(
    "arguments", [(500,), (32,), (512, 0), (512, 64, 576), (512, 64, 32), (512, 64, 256, 448)]
)
def test_impossible_buckets_are_refused(arguments: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Buckets(*arguments)


def test_batches_hold_one_bucket_each(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for index, (height, width) in enumerate([(60, 90), (90, 60), (64, 64), (50, 80), (40, 40)]):
        values = random.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(values).save(tmp_path / f"{index}.png")
    photos = read_photos(list_photos(tmp_path), "a dog")
    dataset = DreamBoothDataset(
        [SubjectPhotos(photos, SampleTransform(64, buckets=Buckets(64, step=8)))]
    )
    sampler = EpochSampler(len(dataset), batch_size=2, groups=dataset.groups)
    stream = iterate_batches(dataset, sampler)
    batches = [next(stream) for _ in range(sampler.batches_per_epoch)]
    sizes = {tuple(batch.pixels.shape[2:]) for batch in batches}
    assert sizes == set(dataset.groups)
    assert len(sizes) == 3
    assert {name for batch in batches for name in batch.sample_ids} == {
        photo.digest for photo in dataset.photos
    }
