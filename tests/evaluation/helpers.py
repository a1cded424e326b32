"""Stand-ins for networks that know photographs."""

from __future__ import annotations

from typing import Any

import torch

from dora_diffusion.models.metric_models import MetricModel


class Brightness(MetricModel):
    """Stands for a network: an image's mean colour as a unit vector."""

    name, tokenizer = "brightness", None

    def __init__(self) -> None:
        pass

    def image_features(self, images: Any) -> torch.Tensor:
        rows = [
            torch.tensor(list(image.convert("RGB").resize((1, 1), 4).getpixel((0, 0)))).float()
            for image in images
        ]
        return torch.nn.functional.normalize(torch.stack(rows) + 1, dim=1)
