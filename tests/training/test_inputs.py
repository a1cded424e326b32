"""What a step is computed from, row by row."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from dora_diffusion.data.batch import Batch
from dora_diffusion.data.crops import CropRecord
from dora_diffusion.models.load import load_components
from dora_diffusion.training.accelerator import make_accelerator
from dora_diffusion.training.inputs import draw_inputs
from dora_diffusion.training.session import open_session
from dora_diffusion.training.subject import subject_of
from tests.training.helpers import SAMPLES, open_run


class OneOf:
    """One of several processes' accelerator, with nobody to talk to."""

    def __init__(self, accelerator: Any, process_index: int, num_processes: int) -> None:
        self.accelerator = accelerator
        self.process_index, self.num_processes = process_index, num_processes

    def __getattr__(self, name: str) -> Any:
        return getattr(self.accelerator, name)

    def prepare_model(self, model: Any) -> Any:
        return model


def test_two_processes_draw_the_rows_of_one(tiny_run) -> None:
    """Photos, class images and all that is drawn for them: no process repeats another's."""

    def inputs(batch_size: int, process_index: int, num_processes: int) -> Any:
        config = tiny_run(
            train_batch_size=batch_size, with_prior_preservation=True, num_class_images=3,
            prior_preservation_mode="images", class_data_dir=str(SAMPLES / "heart_teapot"),
        )  # fmt: skip
        accelerator = OneOf(make_accelerator(config), process_index, num_processes)
        session = open_session(config, subject_of(config), accelerator)
        session.train_step.inputs(0)
        return session.train_step.inputs(1)

    whole = inputs(4, 0, 1)
    parts = [inputs(2, index, 2) for index in range(2)]
    assert [part.photos for part in (whole, *parts)] == [4, 2, 2]
    for name in ("noise", "timesteps", "latents"):
        drawn = [getattr(part, name) for part in parts]
        together = torch.cat([rows[:2] for rows in drawn] + [rows[2:] for rows in drawn])
        torch.testing.assert_close(together, getattr(whole, name), rtol=0, atol=1e-5)
    assert len({tuple(row.flatten().tolist()) for row in whole.noise}) == 8


def test_every_row_is_one_photo_with_its_own_caption_crop_and_mask(
    sdxl_folder, shaped_photos, tmp_path
) -> None:
    session = open_run(
        sdxl_folder, shaped_photos, tmp_path / "out",
        train_batch_size=3, masked_loss=True, random_flip=True, dataloader_num_workers=0,
    )  # fmt: skip
    # No two photos share a caption or a shape.
    files = {
        path.read_text(encoding="utf-8"): path.with_suffix(".png")
        for path in shaped_photos.glob("*.txt")
    }
    shapes, vae = set(), session.components.vae
    for _ in range(4):
        batch = next(session.train_step.inputs.batches)
        inputs = draw_inputs(
            session.components, batch, seed=0, micro_step=0, first_row=0, noise_offset=0.0
        )
        for row, caption in enumerate(batch.captions):
            path = files[caption]
            image = Image.open(path).convert("RGB")
            crop = batch.crops[row]
            assert crop.original_size == (image.height, image.width)
            (top, left), (height, width) = crop.crop_top_left, crop.target_size
            # The short side becomes 64 pixels; the crop is drawn along the long one.
            scale = 64 / min(image.size)
            size = max(64, round(image.width * scale)), max(64, round(image.height * scale))
            box = (left, top, left + width, top + height)
            source = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if crop.flipped else image
            resized = source.resize(size, Image.Resampling.LANCZOS, reducing_gap=None).crop(box)
            pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None] / 127.5 - 1
            with torch.no_grad():
                moments = vae.encode(pixels).latent_dist.parameters[0]
            torch.testing.assert_close(batch.moments[row], moments, atol=2e-2, rtol=2e-2)
            wanted = [*crop.original_size, top, left, height, width]
            assert inputs.time_ids[row].tolist() == wanted
            bright = batch.mask[row, 0].mean(dim=1)
            if path.with_suffix(".mask.png").is_file():
                # Down the photo from black to white.
                full = torch.linspace(0, 1, size[1])[top : top + height]
                rows = full.view(len(bright), -1).mean(dim=1)
                torch.testing.assert_close(bright, rows, atol=0.03, rtol=0)
            else:
                assert bool((bright == 1).all())
            shapes.add((top > 0, left > 0))
    assert len(shapes) > 1, "crops along both sides must have been compared"


def test_sizes_of_large_photos_stay_exact(sdxl_folder) -> None:
    """Half precision holds no odd number above 2048: sizes and corners are never cast to it."""
    batch = Batch(
        ["photo"],
        ["a photo"],
        [CropRecord((4001, 3003), (2049, 257), (128, 96))],
        torch.tensor([False]),
        moments=torch.zeros(1, 8, 16, 12),
    )
    components = load_components(sdxl_folder, dtype=torch.bfloat16)
    inputs = draw_inputs(components, batch, seed=0, micro_step=0, first_row=0, noise_offset=0.0)
    assert inputs.time_ids.tolist() == [[4001, 3003, 2049, 257, 128, 96]]
