"""One optimizer step of a run: what the batches hold, how losses add up, and what AdamW makes."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dora_diffusion.adapters.inject import norm_scope
from dora_diffusion.config import TrainConfig
from dora_diffusion.data.captions import class_caption
from dora_diffusion.training.checkpoint import parameters_by_name
from dora_diffusion.training.session import Session, make_accelerator, open_session
from dora_diffusion.training.step import Objective, draw_inputs
from dora_diffusion.training.subject import subject_of

SAMPLES = Path(__file__).parents[2] / "samples"
PRIOR_WEIGHT = 0.7


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Five photos of different shapes, each with its own caption and, but for one, its mask."""
    folder = Path(shutil.copytree(SAMPLES / "bolt_mug", tmp_path / "photos"))
    for number, old in enumerate(sorted(folder.glob("*.jpg"))):
        with Image.open(old) as image:
            shaped = image.convert("RGB").resize((70 + 9 * number, 110 - 7 * number))
        old.unlink()
        path = old.with_suffix(".png")
        shaped.save(path)
        path.with_suffix(".txt").write_text(f"sks mug, photo number {number}", encoding="utf-8")
        if number:
            rows = np.linspace(0, 255, shaped.height).astype(np.uint8)
            mask = np.repeat(rows[:, None], shaped.width, axis=1)
            Image.fromarray(mask).save(path.with_suffix(".mask.png"))
    return folder


def open_run(model: Path, photos: Path, output: Path, **settings: object) -> Session:
    config = TrainConfig(
        pretrained_model_name_or_path=str(model),
        instance_data_dir=str(photos),
        instance_prompt="a photo of a sks mug",
        output_dir=str(output),
        resolution=64,
        rank=2,
        conv_rank=2,
        max_train_steps=4,
        seed=3,
        **settings,
    )
    session = open_session(config, subject_of(config), make_accelerator(config))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # A fresh adapter is the base: everything must have moved.
        for parameter in parameters_by_name(session.trained).values():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter * (1 + 0.1 * noise) + 0.05 * noise)
    return session


def test_every_row_is_one_photo_with_its_own_caption_crop_and_mask(
    sdxl_folder, photos, tmp_path
) -> None:
    session = open_run(
        sdxl_folder, photos, tmp_path / "out",
        train_batch_size=3, masked_loss=True, random_flip=True, dataloader_num_workers=0,
    )  # fmt: skip
    # No two photos share a caption or a shape.
    files = {path.read_text(): path.with_suffix(".png") for path in photos.glob("*.txt")}
    shapes, vae = set(), session.components.vae
    for _ in range(4):
        batch = session.next_batch()
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
                torch.testing.assert_close(bright, full, atol=0.03, rtol=0)
            else:
                assert bool((bright == 1).all())
            shapes.add((top > 0, left > 0))
    assert len(shapes) > 1, "crops along both sides must have been compared"


@pytest.mark.parametrize(
    ("prior", "limit"), [(None, 0.0), (None, 1e-3), ("images", 1e-3), ("image-free", 0.0)]
)
def test_one_step_is_the_mean_of_its_losses_clipped_and_taken_by_adamw(
    sd1_folder, photos, tmp_path, prior, limit
) -> None:
    settings = {
        "train_text_encoder": True,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "masked_loss": True,
        "noise_offset": 0.1,
        "learning_rate": 1e-3,
        "text_encoder_lr": 3e-4,
        "magnitude_lr": 7e-4,
        "loraplus_ratio": 4.0,
        "adam_weight_decay": 0.1,
        "max_grad_norm": limit,
        "with_prior_preservation": prior is not None,
        "prior_loss_weight": PRIOR_WEIGHT,
        "num_class_images": 3,
        "validation_inference_steps": 1,
        "class_data_dir": str(tmp_path / "class"),
    }
    if prior is not None:
        settings["prior_preservation_mode"] = prior
    session = open_run(sd1_folder, photos, tmp_path / "a", **settings)
    expected = open_run(sd1_folder, photos, tmp_path / "b", **settings)
    start = {name: p.detach().clone() for name, p in parameters_by_name(expected.trained).items()}
    record = session.train_step(1)

    losses = by_hand(expected, image_free=prior == "image-free")
    loss, prior_loss = torch.stack(losses).mean(dim=0)
    assert float(record["loss"]) == pytest.approx(float(loss), rel=1e-5)
    assert (float(prior_loss) > 0) == (prior is not None)
    if prior is not None:
        assert float(record["prior_loss"]) == pytest.approx(float(prior_loss), rel=1e-5)
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in parameters_by_name(expected.trained).items()
    }
    total = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
    assert float(record["grad_norm"]) == pytest.approx(float(total), rel=1e-4)
    share = min(1.0, limit / float(total)) if limit else 1.0
    checked = set()
    for name, parameter in parameters_by_name(session.trained).items():
        kind = name.rsplit(".", 1)[1]
        rate = 1e-3 if name.startswith("unet.") else 3e-4
        rate = {"magnitude": 7e-4, "up": 4 * rate, "down": rate}[kind]
        decay = 0.0 if kind == "magnitude" else 0.1
        g = gradients[name] * share
        # AdamW's first step: both moments, corrected, are the gradient's.
        wanted = start[name] * (1 - rate * decay) - rate * g / (g.abs() + 1e-8)
        # A gradient near Adam's epsilon is lost in its own rounding.
        clear = (g.abs() > 1e-5 * g.abs().max()) & (g.abs() > 1e-7)
        if clear.any():
            torch.testing.assert_close(parameter[clear], wanted[clear], rtol=1e-5, atol=2e-6)
            checked.add(kind)
    assert checked == {"down", "up", "magnitude"}


def by_hand(session: Session, image_free: bool) -> list[torch.Tensor]:
    """Losses ``(total, prior)`` of the step's two batches; the mean of their gradients is left."""
    objective = Objective(session.components, train_text_encoder=True, snr_gamma=5.0)
    losses = []
    for micro_step in range(2):
        batch = session.next_batch()
        inputs = draw_inputs(
            session.components, batch, seed=3, micro_step=micro_step, first_row=0,
            noise_offset=0.1,
            class_captions=[class_caption(c, "sks", "mug") for c in batch.captions]
            if image_free
            else None,
        )  # fmt: skip
        with norm_scope(*session.trained.values()):
            subject, prior = objective(inputs)
            total = subject + PRIOR_WEIGHT * prior
            (total / 2).backward()
        losses.append(torch.stack([total.detach(), prior.detach()]))
    return losses


def test_steps_differ_and_a_seed_repeats_them(sd1_folder, photos, tmp_path) -> None:
    def two_losses(name: str, seed: int) -> list[float]:
        session = open_run(sd1_folder, photos, tmp_path / name)
        session.config = replace(session.config, seed=seed)
        return [float(session.train_step(step)["loss"]) for step in (1, 2)]

    first = two_losses("a", 3)
    assert first == two_losses("b", 3)
    assert first[0] != first[1]
    assert first[0] != two_losses("c", 4)[0]
