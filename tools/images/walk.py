"""``step-walk.png``: one photo through one training step of ``embedded:tiny-sd``, from its tensors.

Every panel shows a tensor that the package's own functions computed, in their order in a step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dora_diffusion import load_components
from dora_diffusion.data.crops import CropRecord, apply_crop, plan_crop
from dora_diffusion.data.images import open_photo
from dora_diffusion.data.photos import Photo, read_photo
from dora_diffusion.models.embedded import samples_folder
from dora_diffusion.models.latents import encode_moments, latents_from_moments
from dora_diffusion.models.text import encode_prompts
from dora_diffusion.numerics.loss import add_noise, denoising_loss, sample_noise, training_target
from lab.analysis.plots import save_figure

BASE, PHOTO = "embedded:tiny-sd", samples_folder() / "bolt_mug" / "02.jpg"
TIMESTEP, SEED = 400, 0


@torch.no_grad()
def walk() -> dict[str, Any]:
    """Return what a step computes from a photo, by name; latents are ``(1, C, h, w)``."""
    components = load_components(BASE)
    photo = read_photo(PHOTO, "")
    record = plan_crop(photo.size, components.default_resolution)
    pixels = apply_crop(open_photo(PHOTO), record)[None]
    generator = torch.Generator().manual_seed(SEED)
    latents = latents_from_moments(
        components.vae, encode_moments(components.vae, pixels), generator
    )
    noise = sample_noise(tuple(latents.shape[1:]), generator)[None]
    timesteps = torch.tensor([TIMESTEP])
    alpha_bar = components.scheduler.alphas_cumprod[timesteps]
    noisy_latents = add_noise(latents, noise, alpha_bar)
    conditioning = encode_prompts(components, [photo.caption])
    model_pred = components.predict(noisy_latents, timesteps, conditioning)
    target = training_target(components.prediction_type, latents, noise, alpha_bar)
    return {
        "photo": photo, "record": record, "pixels": pixels, "latents": latents, "noise": noise,
        "noisy_latents": noisy_latents, "model_pred": model_pred, "target": target,
        "alpha_bar": alpha_bar.item(), "loss": denoising_loss(model_pred, target).item(),
    }  # fmt: skip


def _shown(latents: Tensor) -> Any:
    """The first three channels as red, green and blue; 3 standard deviations are the range."""
    values = latents[0, :3].permute(1, 2, 0).numpy()
    return np.clip(values / 6 + 0.5, 0, 1)


def draw(name: str, output: Path, work: Path, steps: int | None = None) -> list[Path]:
    """Write ``step-NAME.png``; it takes no training."""
    from matplotlib.figure import Figure

    made = walk()
    error = (made["model_pred"] - made["target"]).square().mean(1)[0]
    size = "x".join(map(str, made["latents"].shape[1:]))
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    panels = figure.subplots(2, 4).flat
    _photo(next(panels), made["photo"], made["record"])
    shown = [
        ("2. pixels, cropped and resized", (made["pixels"][0].permute(1, 2, 0).numpy() + 1) / 2),
        (f"3. latents of the VAE, {size}", _shown(made["latents"])),
        ("4. noise, drawn by seed", _shown(made["noise"])),
        (f"5. noisy latents, timestep {TIMESTEP}", _shown(made["noisy_latents"])),
        ("6. prediction of the UNet", _shown(made["model_pred"])),
        ("7. target (v)", _shown(made["target"])),
    ]
    for panel, (title, image) in zip(panels, shown, strict=False):
        panel.imshow(image, interpolation="nearest")
        panel.set_title(title, fontsize=10)
    last = figure.axes[-1]
    mappable = last.imshow(error, cmap="viridis", interpolation="nearest")
    last.set_title(f"8. squared error, mean (loss) {made['loss']:.3f}", fontsize=10)
    figure.colorbar(mappable, ax=last, shrink=0.8)
    for panel in figure.axes[:8]:
        panel.set_xticks([])
        panel.set_yticks([])
    figure.suptitle(f'One step on "{made["photo"].caption}"', fontsize=11)
    file = output / f"step-{name}.png"
    save_figure(figure, file, dpi=100)
    return [file]


def _photo(panel: Any, photo: Photo, record: CropRecord) -> None:
    """The photo with the edge of its crop, both ``(height, width)``."""
    from matplotlib.patches import Rectangle

    panel.imshow(open_photo(photo.path))
    scale = photo.size[0] / record.resized_size[0]
    (top, left), (height, width) = (
        [value * scale for value in pair] for pair in (record.crop_top_left, record.target_size)
    )
    panel.add_patch(Rectangle((left, top), width, height, fill=False, edgecolor="red", lw=2))
    panel.set_title(f"1. photo, {photo.size[1]}x{photo.size[0]}, and its crop", fontsize=10)
