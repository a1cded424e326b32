"""The dataset: determinism, pairing, damaged files, masks, and caching by content."""

from __future__ import annotations

import hashlib
import warnings
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dora_diffusion.data.batch import Sample, collate
from dora_diffusion.data.cache import TensorCache
from dora_diffusion.data.crops import CropRecord
from dora_diffusion.data.dataset import (
    Augmentation,
    ClassImages,
    DreamBoothDataset,
    iterate_batches,
)
from dora_diffusion.data.images import PhotoError, list_photos
from dora_diffusion.data.photos import read_photos
from dora_diffusion.data.sampler import EpochIndex, EpochSampler

PROMPT = "a photo of sks dog"
RANDOM = Augmentation(center_crop=False, random_flip=True)


def write_photos(folder: Path, count: int, seed: int = 0, size: tuple[int, int] = (40, 60)) -> Path:
    """Write ``count`` pictures of noise, of ``size`` (height, width)."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for index in range(count):
        values = random.integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(values).save(folder / f"{index:02d}.png")
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "photos", 4)


def same(left: Sample, right: Sample) -> bool:
    return (
        (left.sample_id, left.caption, left.crop) == (right.sample_id, right.caption, right.crop)
        and left.pixels is not None
        and right.pixels is not None
        and torch.equal(left.pixels, right.pixels)
    )


def test_samples_hold_the_photo_its_digest_and_caption(photos: Path) -> None:
    (photos / "02.txt").write_text("sks dog asleep")
    dataset = DreamBoothDataset(photos, PROMPT, 32)
    assert len(dataset) == 4
    assert dataset.captions == [PROMPT, PROMPT, "sks dog asleep", PROMPT]
    sample = dataset[2]
    data = (photos / "02.png").read_bytes()
    assert sample.sample_id == hashlib.sha256(data).hexdigest()[:32]
    assert sample.crop == CropRecord((40, 60), (0, 8), (32, 32))
    assert sample.pixels.shape == (3, 32, 32)
    assert sample.prior is None
    assert sample.mask is None


def test_a_sample_depends_on_seed_epoch_and_photo_alone(photos: Path) -> None:
    dataset = DreamBoothDataset(photos, PROMPT, 32, seed=3, augmentation=RANDOM)
    first = {(e, i): dataset[EpochIndex(e, i)] for e in range(3) for i in range(4)}
    # Backwards, from another object, after other accesses, with the files in another order.
    paths = list_photos(photos)[::-1]
    again = DreamBoothDataset(paths, PROMPT, 32, seed=3, augmentation=RANDOM)
    for (epoch, index), sample in reversed(first.items()):
        again.set_epoch(epoch)
        assert same(again[3 - index], sample)
    crops = {sample.crop for sample in first.values()}
    assert len(crops) > 6
    assert {crop.flipped for crop in crops} == {True, False}
    other = DreamBoothDataset(photos, PROMPT, 32, seed=4, augmentation=RANDOM)
    assert any(other[i].crop != first[0, i].crop for i in range(4))


def test_crop_variants_bound_the_crops_but_not_the_flips(photos: Path) -> None:
    drawn = Augmentation(center_crop=False, random_flip=True, crop_variants=3)
    dataset = DreamBoothDataset(photos, PROMPT, 32, augmentation=drawn)
    places = []
    for photo in dataset.photos:
        crops = {dataset.plan(photo, epoch) for epoch in range(80)}
        places.append({crop.crop_top_left for crop in crops})
        assert len(crops) == 2 * len(places[-1])
    # Two variants of a photo may fall on one place by chance, never more than were asked for.
    assert max(len(place) for place in places) == 3
    assert min(len(place) for place in places) >= 2


def test_caption_dropout_and_shuffling_are_drawn_per_epoch(photos: Path) -> None:
    drawn = Augmentation(caption_dropout=0.3, shuffle_tags=True, keep_tags=1)
    dataset = DreamBoothDataset(photos, "sks dog, red, big, old", 32, augmentation=drawn)
    captions = [dataset[EpochIndex(epoch, 0)].caption for epoch in range(60)]
    assert captions == [dataset[EpochIndex(epoch, 0)].caption for epoch in range(60)]
    assert 8 <= captions.count("") <= 30
    assert len(set(captions)) > 4
    assert all(caption.startswith("sks dog, ") for caption in captions if caption)


def test_class_images_pair_with_their_own_prompts(photos: Path, tmp_path: Path) -> None:
    folder = write_photos(tmp_path / "class", 6, seed=9)
    (folder / "01.txt").write_text("a dog asleep")
    class_images = ClassImages(folder, "a photo of dog")
    dataset = DreamBoothDataset(photos, PROMPT, 32, class_images=class_images)
    prompts = {photo.sample_id: photo.caption for photo in class_images.photos}
    seen = set()
    for epoch in range(3):
        batch = collate([dataset[EpochIndex(epoch, index)] for index in range(4)])
        assert batch.is_prior.tolist() == [False] * 4 + [True] * 4
        assert batch.pixels.shape == (8, 3, 32, 32)
        assert batch.captions[:4] == [PROMPT] * 4
        for sample_id, caption in zip(batch.sample_ids[4:], batch.captions[4:], strict=True):
            assert caption == prompts[sample_id]
        seen |= set(batch.sample_ids[4:])
    assert seen == set(prompts)  # 4 photos still reach all 6 class images


def test_class_images_follow_their_partners_size(photos: Path, tmp_path: Path) -> None:
    class_images = ClassImages(write_photos(tmp_path / "class", 1, size=(50, 30)), "a dog")
    dataset = DreamBoothDataset(
        photos, PROMPT, 32, class_images=class_images, target_sizes=lambda size: (24, 40)
    )
    assert dataset.groups == [(24, 40)] * 4
    assert collate([dataset[0]]).pixels.shape == (2, 3, 24, 40)


def test_unreadable_photos_are_named_and_skipped_only_if_asked(photos: Path) -> None:
    (photos / "03.png").write_bytes((photos / "03.png").read_bytes()[:200])
    (photos / "04.jpg").write_text("not a photo")
    with pytest.raises(PhotoError, match=r"2 of 5 photos unusable: 03\.png.*; 04\.jpg"):
        DreamBoothDataset(photos, PROMPT, 32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dataset = DreamBoothDataset(photos, PROMPT, 32, skip_unreadable=True)
    assert len(dataset) == 3
    assert [str(w.message).split(":")[1].strip() for w in caught] == ["03.png", "04.jpg"]
    assert len(dataset.skipped) == 2
    with pytest.raises(PhotoError, match="1 of 1 photo unusable"):
        read_photos([photos / "04.jpg"], PROMPT, skip_unreadable=True)


def test_bad_resolutions_fail_at_once(photos: Path) -> None:
    with pytest.raises(ValueError, match="multiple of 16"):
        DreamBoothDataset(photos, PROMPT, 40, multiple=16)


def test_masks_come_from_files_or_alpha_and_follow_the_crop(tmp_path: Path) -> None:
    folder = write_photos(tmp_path / "photos", 2)
    columns = np.tile(np.where(np.arange(60) < 30, 255, 0).astype(np.uint8), (40, 1))
    Image.fromarray(columns).save(folder / "00.mask.png")
    rgba = Image.open(folder / "01.png").convert("RGBA")
    rgba.putalpha(Image.fromarray(columns[:, ::-1].copy()))
    rgba.save(folder / "01.png")
    write_photos(tmp_path / "plain", 1, seed=5)
    paths = [*list_photos(folder), tmp_path / "plain" / "00.png"]
    dataset = DreamBoothDataset(paths, PROMPT, 40, use_masks=True)
    batch = collate([dataset[index] for index in range(3)])
    assert batch.mask.shape == (3, 1, 40, 40)
    assert torch.equal(batch.mask[0, 0, 0], (torch.arange(10, 50) < 30).float())
    assert torch.equal(batch.mask[1, 0, 0], (torch.arange(10, 50) >= 30).float())
    assert batch.mask[2].min() == 1
    assert DreamBoothDataset(paths, PROMPT, 40)[0].mask is None


def test_masks_are_verified_with_their_photos(photos: Path) -> None:
    Image.new("L", (60, 20)).save(photos / "00.mask.png")
    Image.new("L", (60, 40), 255).save(photos / "01.mask.png")
    (photos / "02.mask.png").write_text("not a picture")
    reasons = r"00\.mask\.png: the mask is 60 x 20, its photo 60 x 40.*; 02\.mask\.png: not a"
    with pytest.raises(PhotoError, match=f"2 of [0-9] photos unusable: {reasons}"):
        DreamBoothDataset(photos, PROMPT, 40, use_masks=True)
    with pytest.warns(UserWarning, match=r"photo left out: 0.\.mask\.png"):
        kept = DreamBoothDataset(photos, PROMPT, 40, use_masks=True, skip_unreadable=True)
    assert not {"00.png", "02.png"} & {photo.path.name for photo in kept.photos}
    unmasked = DreamBoothDataset(photos, PROMPT, 40)
    assert len(unmasked) == len(kept) + 2


def fake_encode(pixels: torch.Tensor) -> torch.Tensor:
    """Moments that identify their pixels: block means, standing in for an autoencoder."""
    return torch.nn.functional.avg_pool2d(pixels, 8)


def test_cached_moments_belong_to_their_photo_after_any_shuffle(
    photos: Path, tmp_path: Path
) -> None:
    plain = DreamBoothDataset(photos, PROMPT, 32, augmentation=RANDOM)
    cached = DreamBoothDataset(photos, PROMPT, 32, augmentation=RANDOM)
    cached.cache_moments(fake_encode, TensorCache("vae", folder=tmp_path / "cache"))
    sampler = EpochSampler(4, batch_size=3, seed=11)
    for indices in islice(iter(sampler), 12):
        batch = collate([cached[index] for index in indices])
        expected = torch.stack([fake_encode(plain[index].pixels) for index in indices])
        assert torch.equal(batch.moments, expected)
        assert batch.pixels is None
    order = [1, 2, 3, 0]
    expected = [[fake_encode(plain[EpochIndex(e, i)].pixels) for i in order] for e in range(4)]
    # Renamed and reordered photos find their own entries; no photo is encoded twice.
    (photos / "00.png").rename(photos / "zz.png")

    def refuse(pixels: torch.Tensor) -> torch.Tensor:
        raise AssertionError("encoded again")

    again = DreamBoothDataset(photos, PROMPT, 32, augmentation=RANDOM)
    again.cache_moments(refuse, TensorCache("vae", folder=tmp_path / "cache"))
    for epoch in range(4):
        for index in range(4):
            sample = again[EpochIndex(epoch, index)]
            assert torch.equal(sample.moments, expected[epoch][index])


def test_batches_resume_exactly_with_workers(photos: Path) -> None:
    def load(count: int, state: dict | None = None, workers: int = 0) -> tuple[list, dict]:
        dataset = DreamBoothDataset(photos, PROMPT, 32, seed=1, augmentation=RANDOM)
        sampler = EpochSampler(len(dataset), batch_size=3, seed=1)
        if state is not None:
            sampler.load_state_dict(state)
        stream = iterate_batches(dataset, sampler, num_workers=workers)
        return list(islice(stream, count)), sampler.state_dict()

    whole, _ = load(7)
    start, state = load(3, workers=1)
    rest, _ = load(4, state)
    assert state["epoch"] == 2
    for expected, batch in zip(whole, start + rest, strict=True):
        assert torch.equal(batch.pixels, expected.pixels)
        assert batch.crops == expected.crops


def test_loading_leaves_the_global_generator_alone(photos: Path) -> None:
    dataset = DreamBoothDataset(photos, PROMPT, 32, augmentation=RANDOM)
    before = torch.get_rng_state()
    next(iterate_batches(dataset, EpochSampler(4, batch_size=2)))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_dataset_that_encodes_refuses_workers(photos: Path) -> None:
    dataset = DreamBoothDataset(photos, PROMPT, 32)
    dataset.cache_moments(fake_encode, TensorCache("vae"))
    with pytest.raises(ValueError, match="main process"):
        next(iterate_batches(dataset, EpochSampler(4), num_workers=1))


def test_mixed_batches_are_refused() -> None:
    def sample(side: int, prior: Sample | None = None) -> Sample:
        crop = CropRecord((64, 64), (0, 0), (side, side))
        return Sample("id", "", crop, pixels=torch.zeros(3, side, side), prior=prior)

    with pytest.raises(ValueError, match="different sizes"):
        collate([sample(32), sample(40)])
    with pytest.raises(ValueError, match="some have none"):
        collate([sample(32), sample(32, prior=sample(32))])


@pytest.mark.parametrize(
    "settings", [{"caption_dropout": 1.5}, {"crop_variants": 0}, {"keep_tags": -1}]
)
def test_impossible_augmentation_is_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        Augmentation(**settings)


def test_jpeg_photos_make_batches(samples_root: Path) -> None:
    dataset = DreamBoothDataset(samples_root / "ring_robot", "a photo of sks toy", 64)
    sampler = EpochSampler(len(dataset), batch_size=5)
    batch = next(iterate_batches(dataset, sampler))
    assert batch.pixels.shape == (5, 3, 64, 64)
    assert batch.pixels.min() >= -1
    assert batch.pixels.max() <= 1
    assert len(set(batch.sample_ids)) == 5
    assert batch.pixels.flatten(1).std(dim=1).min() > 0.1
