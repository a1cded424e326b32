"""Batches: what is stacked in which order, and what is refused."""

from __future__ import annotations

import torch

from dora_diffusion.data.crops import CropRecord
from dora_diffusion.data.dataset import Sample, collate


def sample(side: int, number: int = 0, **more: object) -> Sample:
    crop = CropRecord((64, 64), (0, number), (side, side))
    return Sample(f"id {number}", f"{number}", crop, **more)


def test_rows_stay_together_photos_before_their_class_images() -> None:
    rows = []
    for number in range(3):
        prior = sample(8, 10 + number, moments=torch.full((4, 2, 2), 10.0 + number), is_prior=True)
        mask = torch.zeros(1, 8, 8) if number == 1 else None
        moments = torch.full((4, 2, 2), float(number))
        rows.append(sample(8, number, moments=moments, mask=mask, prior=prior))
    batch = collate(rows)
    numbers = [0, 1, 2, 10, 11, 12]
    assert len(batch) == 6
    assert batch.sample_ids == [f"id {number}" for number in numbers]
    assert batch.captions == [f"{number}" for number in numbers]
    assert [crop.crop_top_left[1] for crop in batch.crops] == numbers
    assert batch.moments[:, 0, 0, 0].tolist() == numbers
    assert batch.is_prior.tolist() == [False] * 3 + [True] * 3
    assert batch.pixels is None
    # Rows without a mask count everywhere.
    assert batch.mask.flatten(1).mean(1).tolist() == [1, 0, 1, 1, 1, 1]
    assert collate(rows[:1]).mask is None


def test_a_row_keeps_its_class_image_and_its_class_caption() -> None:
    """Subjects of one batch may each hold their prior in another way, or none."""
    of_images = sample(8, 0, prior=sample(8, 10, is_prior=True))
    of_captions = sample(8, 1, class_caption="a dog")
    batch = collate([of_captions, sample(8, 2), of_images])
    assert batch.sample_ids == ["id 1", "id 2", "id 0", "id 10"]
    assert list(batch.partners) == [2]
    assert batch.class_captions == ["a dog", None, None]
