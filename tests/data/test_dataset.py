"""The dataset: determinism, pairing, damaged files, masks, and caching by content."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dora_diffusion.data.crops import CropRecord
from dora_diffusion.data.dataset import (
    DreamBoothDataset,
    Sample,
    SampleTransform,
    SubjectPhotos,
    collate,
    iterate_batches,
)
from dora_diffusion.data.photos import list_photos, read_photo, read_photos
from dora_diffusion.data.sampler import EpochIndex, EpochSampler

PROMPT = "a photo of sks dog"
RANDOM = SampleTransform(32, center_crop=False, random_flip=True)


@pytest.fixture
def photos(tmp_path: Path, write_images) -> Path:
    write_images(tmp_path / "photos", 4)
    return tmp_path / "photos"


def dataset_of(*args: object, **kwargs: object) -> DreamBoothDataset:
    return DreamBoothDataset([SubjectPhotos(*args, **kwargs)])


def open_folder(folder: Path, draws: SampleTransform, prompt: str = PROMPT) -> DreamBoothDataset:
    return dataset_of(read_photos(list_photos(folder), prompt), draws)


def same(left: Sample, right: Sample) -> bool:
    return (
        (left.sample_id, left.caption, left.crop) == (right.sample_id, right.caption, right.crop)
        and left.pixels is not None
        and right.pixels is not None
        and torch.equal(left.pixels, right.pixels)
    )


def test_samples_hold_the_photo_its_digest_and_caption(photos: Path) -> None:
    (photos / "02.txt").write_text("sks dog asleep", encoding="utf-8")
    dataset = open_folder(photos, SampleTransform(32))
    assert len(dataset) == 4
    assert dataset.captions == [PROMPT, PROMPT, "sks dog asleep", PROMPT]
    sample = dataset[2]
    assert sample.sample_id == read_photo(photos / "02.png", "").digest
    assert sample.crop == CropRecord((40, 60), (0, 8), (32, 32))
    assert sample.pixels.shape == (3, 32, 32)
    assert sample.prior is None
    assert sample.mask is None


def test_class_images_pair_with_their_own_prompts(
    photos: Path, tmp_path: Path, write_images
) -> None:
    paths = write_images(tmp_path / "class", 6, seed=9)
    paths[1].with_suffix(".txt").write_text("a dog asleep", encoding="utf-8")
    class_images = read_photos(paths, "a photo of dog")
    dataset = dataset_of(
        read_photos(list_photos(photos), PROMPT), SampleTransform(32), class_images
    )
    prompts = {image.digest: image.caption for image in class_images}
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


def test_class_images_follow_their_partners_size(
    photos: Path, tmp_path: Path, write_images
) -> None:
    class_images = read_photos(write_images(tmp_path / "class", 1, size=(50, 30)), "a dog")
    # Two buckets: the photos' and, unless it follows, the class image's own.
    draws = SampleTransform(32, buckets=lambda size: (24, 40) if 60 in size else (40, 24))
    assert draws.target_size(class_images[0]) == (40, 24)
    dataset = dataset_of(read_photos(list_photos(photos), PROMPT), draws, class_images)
    assert dataset.groups == [(24, 40)] * 4
    assert collate([dataset[0]]).pixels.shape == (2, 3, 24, 40)
    encoded: list[torch.Size] = []
    dataset.encode = lambda pixels: encoded.append(pixels.shape) or fake_encode(pixels)
    dataset.fill_cache([EpochIndex(0, 0)], lambda *done: None)
    assert collate([dataset[0]]).moments.shape == (2, 3, 3, 5)
    assert encoded == [(1, 3, 24, 40)] * 2  # none again when it is loaded


def test_masks_come_from_files_or_alpha_and_follow_the_crop(tmp_path: Path, write_images) -> None:
    folder = tmp_path / "photos"
    write_images(folder, 2)
    columns = np.tile(np.where(np.arange(60) < 30, 255, 0).astype(np.uint8), (40, 1))
    Image.fromarray(columns).save(folder / "00.mask.png")
    rgba = Image.open(folder / "01.png").convert("RGBA")
    rgba.putalpha(Image.fromarray(columns[:, ::-1].copy()))
    rgba.save(folder / "01.png")
    paths = [*list_photos(folder), *write_images(tmp_path / "plain", 1, seed=5)]
    draws = SampleTransform(40)
    with pytest.warns(UserWarning, match="1 image of 3 without a mask"):
        masked = read_photos(paths, PROMPT, mask_crops=draws.first_crops)
    dataset = dataset_of(masked, draws)
    batch = collate([dataset[index] for index in range(3)])
    assert batch.mask.shape == (3, 1, 40, 40)
    assert torch.equal(batch.mask[0, 0, 0], (torch.arange(10, 50) < 30).float())
    assert torch.equal(batch.mask[1, 0, 0], (torch.arange(10, 50) >= 30).float())
    assert batch.mask[2].min() == 1
    assert dataset_of(read_photos(paths, PROMPT), draws)[0].mask is None


def fake_encode(pixels: torch.Tensor) -> torch.Tensor:
    """Moments that identify their pixels: block means, standing in for an autoencoder."""
    return torch.nn.functional.avg_pool2d(pixels, 8)


def test_cached_moments_belong_to_their_photo_after_any_shuffle(photos: Path) -> None:
    plain, cached = open_folder(photos, RANDOM), open_folder(photos, RANDOM)
    encoded: list[torch.Tensor] = []

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        encoded.append(pixels)
        return fake_encode(pixels).requires_grad_()

    cached.encode = encode
    sampler = EpochSampler(4, batch_size=3, seed=11)
    for indices in islice(iter(sampler), 12):
        batch = collate([cached[index] for index in indices])
        expected = torch.stack([fake_encode(plain[index].pixels) for index in indices])
        assert torch.equal(batch.moments, expected)
        assert not batch.moments.requires_grad
        assert batch.pixels is None
    count = len(encoded)
    # In another order, each crop finds its own entry, and none is encoded twice.
    cached._rows.reverse()
    for index in [EpochIndex(epoch, row) for epoch in (2, 0, 1) for row in range(4)]:
        expected = fake_encode(plain[EpochIndex(index.epoch, 3 - index.index)].pixels)
        assert torch.equal(cached[index].moments, expected)
    assert len(encoded) == count <= 36


def test_cached_masks_are_decoded_once_a_crop_and_kept_at_latent_size(
    tmp_path: Path, write_images, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the moments, bit for bit what a batch of whole masks is averaged to."""
    folder, random = tmp_path / "photos", np.random.default_rng(1)
    paths = write_images(folder, 4, size=(44, 76))
    # The same photo twice, each with its own mask; one without any; one with an alpha channel.
    paths[1].write_bytes(paths[0].read_bytes())
    for path in paths[:2]:
        grey = random.integers(0, 256, (44, 76), np.uint8)
        Image.fromarray(grey).save(path.with_suffix(".mask.png"))
    rgba = Image.open(paths[3]).convert("RGBA")
    rgba.putalpha(Image.linear_gradient("L").resize((76, 44)))
    rgba.save(paths[3])
    draws = replace(RANDOM, buckets=lambda size: (24, 40), crop_variants=2)
    with pytest.warns(UserWarning, match="1 image of 4 without a mask"):
        read = read_photos(paths, PROMPT, mask_crops=draws.first_crops)
    plain, cached = dataset_of(read, draws), dataset_of(read, draws)
    cached.encode = fake_encode
    indices = [[EpochIndex(epoch, row) for row in range(4)] for epoch in range(8)]
    cached.fill_cache([index for batch in indices for index in batch], lambda *_: None)
    wanted = [collate([plain[index] for index in batch]) for batch in indices]

    def opened(*args: object, **kwargs: object) -> Image.Image:
        raise AssertionError("a file was decoded again")

    monkeypatch.setattr(Image, "open", opened)
    for batch, whole in zip(indices, wanted, strict=True):
        masks = collate([cached[index] for index in batch]).mask
        expected = torch.nn.functional.interpolate(whole.mask, (3, 5), mode="area")
        assert torch.equal(masks, expected)
        assert bool((masks[2] == 1).all())
    assert not torch.equal(masks[0], masks[1])
    mask = cached[EpochIndex(0, 0)].mask
    assert mask.untyped_storage().nbytes() == 4 * 3 * 5


def test_batches_resume_exactly_with_workers(photos: Path) -> None:
    def load(count: int, state: dict | None = None, workers: int = 0) -> tuple[list, dict]:
        dataset = open_folder(photos, replace(RANDOM, seed=1))
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


def test_a_dataset_that_encodes_does_so_in_the_main_process(photos: Path) -> None:
    dataset, processes = open_folder(photos, SampleTransform(32)), set()
    dataset.encode = lambda pixels: processes.add(os.getpid()) or fake_encode(pixels)
    next(iterate_batches(dataset, EpochSampler(4), num_workers=1))
    assert processes == {os.getpid()}


def test_contents_are_names_digests_captions_and_masks_in_order(photos: Path) -> None:
    """Facts of a data set that a checkpoint compares when it is resumed."""
    Image.new("L", (60, 40), 255).save(photos / "01.mask.png")
    (photos / "01.txt").write_text("a sks cat", encoding="utf-8")
    draws = SampleTransform(32)
    first, second = (
        read_photo(photos / name, PROMPT, mask_crops=draws.first_crops)
        for name in ("00.png", "01.png")
    )
    contents = dataset_of([second], draws, [first]).contents()
    assert contents == {
        "images": [
            {
                "name": "01.png",
                "image": hashlib.sha256((photos / "01.png").read_bytes()).hexdigest()[:32],
                "caption": "a sks cat",
                "mask": hashlib.sha256((photos / "01.mask.png").read_bytes()).hexdigest()[:32],
            }
        ],
        "class_images": [{"name": "00.png", "image": first.digest, "caption": PROMPT, "mask": ""}],
    }
