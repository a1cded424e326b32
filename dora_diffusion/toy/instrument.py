"""Instrument that judges images of the toy world: networks for content, colour for position.

The studio and the shadow are grey, so coloured pixels belong to the object.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora_diffusion.toy.shapes import CLASSES
from dora_diffusion.toy.world import BACKGROUNDS, COLORS, PATTERNS

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "kind": tuple(CLASSES),
    "color": tuple(COLORS),
    "pattern": PATTERNS,
    "background": tuple(BACKGROUNDS),
}
"""Attributes of the classifier, in the order of its heads."""

STUDIO = "studio"
_COLORFUL = 0.12
_LEAST = 0.01
SIDES, SIZES = ("left", "right"), ("small", "large")
_WIDTHS = ((24, 1), (32, 2), (48, 1), (64, 2), (64, 1), (96, 2), (96, 1))


class Trunk(nn.Module):
    """Seven convolutions; (n, 3, 64, 64) in [-1, 1] -> (n, 192) pooled features."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width, stride in _WIDTHS:
            layers += [
                nn.Conv2d(channels, width, 3, stride, 1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            ]
            channels = width
        self.layers = nn.Sequential(*layers)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pool mean and maximum over the last grid."""
        features = self.layers(pixels)
        return torch.cat([features.mean((2, 3)), features.amax((2, 3))], 1)


class Classifier(nn.Module):
    """Classifier of class, body colour, pattern and background of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = Trunk()
        self.hidden = nn.Linear(192, 96)
        self.heads = nn.ModuleDict({k: nn.Linear(96, len(v)) for k, v in ATTRIBUTES.items()})

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """(n, 3, 64, 64) in [-1, 1] -> logits (n, choices) per attribute."""
        hidden = F.gelu(self.hidden(self.trunk(pixels)))
        return {name: head(hidden) for name, head in self.heads.items()}


class SubjectEmbedder(nn.Module):
    """Embedder to unit vectors that identify a subject on any background."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = Trunk()
        self.head = nn.Linear(192, 64)

    def forward(self, pixels: Tensor) -> Tensor:
        """(n, 3, 64, 64) in [-1, 1] -> (n, 64) unit vectors."""
        return F.normalize(self.head(self.trunk(pixels)), dim=1)


@dataclass(frozen=True)
class Instrument:
    """Both networks, in evaluation mode, and their measured accuracy on held-out renders."""

    classifier: Classifier
    embedder: SubjectEmbedder
    measured: dict[str, float]


FOLDER = Path(__file__).parent / "weights"


def load_instrument(folder: Path | None = None) -> Instrument:
    """Load the networks of the package, or of another folder.

    Raises:
        FileNotFoundError: If one of the three files is missing.
    """
    from safetensors.torch import load_file

    folder = folder or FOLDER
    classifier, embedder = Classifier(), SubjectEmbedder()
    classifier.load_state_dict(load_file(folder / "classifier.safetensors"))
    embedder.load_state_dict(load_file(folder / "embedder.safetensors"))
    measured = json.loads((folder / "measured.json").read_text(encoding="utf-8"))
    return Instrument(classifier.eval(), embedder.eval(), measured)


@dataclass(frozen=True)
class Silhouette:
    """Centre of an object's box from -1 (left) to 1 (right), and root of its area's share."""

    center: float
    size: float


def silhouette(pixels: Tensor) -> Silhouette | None:
    """Find the object in a studio image ``(3, h, w)`` in [0, 1]; None without coloured pixels."""
    mask = (pixels.amax(0) - pixels.amin(0)) > _COLORFUL
    share = float(mask.float().mean())
    if share < _LEAST:
        return None
    columns = torch.linspace(-1, 1, mask.shape[1]).expand_as(mask)[mask]
    # Quantiles, since a stray pixel would move the extremes.
    edges = torch.quantile(columns, torch.tensor([0.03, 0.97]))
    return Silhouette(float(edges.mean()), share**0.5)


def follows(pose: str, shape: Silhouette | None, middle: float) -> bool:
    """Return whether the position or size of an object matches a word.

    Args:
        pose: A word of `SIDES` or `SIZES`.
        shape: Silhouette of the object; None if it was not found.
        middle: Size between small and large.
    """
    if shape is None:
        return False
    return {
        "left": shape.center < 0,
        "right": shape.center > 0,
        "small": shape.size < middle,
        "large": shape.size > middle,
    }[pose]


def middle_size(shapes: Mapping[str, Sequence[Silhouette | None]]) -> float | None:
    """Mean size of small and large objects in true images; None if any is not found."""
    measured = [[shape.size for shape in shapes[word] if shape is not None] for word in SIZES]
    return sum(sum(sizes) / len(sizes) for sizes in measured) / 2 if all(measured) else None
