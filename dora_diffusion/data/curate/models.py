"""Models that caption photos and mask their subject: folders, hub ids, rembg.

Weights are read from safetensors or ONNX only: no pickles, no remote code.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageChops, ImageOps

from dora_diffusion.config.wording import did_you_mean, listing, with_article
from dora_diffusion.models.load import plain_errors, quiet_libraries
from dora_diffusion.models.locate import fetch_snapshot, looks_local
from dora_diffusion.models.precision import auto_dtype
from dora_diffusion.numerics.devices import default_device

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

    Captioner = Callable[[PILImage], str]
    Masker = Callable[[PILImage], PILImage]

# The WD taggers' own least probabilities of a tag, by its category: general, and of a character.
_LEAST = {"0": 0.35, "4": 0.85}
_TAGS = "selected_tags.csv"
INSTRUCTION = "Describe this image in one sentence."
# CLIP reads 75 tokens, and the trigger words need some.
_MOST_TOKENS = 60


class PrepareError(ValueError):
    """Photos cannot be prepared so; one line with what to do."""


def open_captioner(name: str, prompt: str = INSTRUCTION) -> Captioner:
    """Open a model that writes a caption for an RGB image.

    Args:
        name: A folder or hub id: of an image-to-text model in the layout of transformers (BLIP,
            GIT, LLaVA ...), or of a tagger, with ``selected_tags.csv`` and ``model.onnx``.
        prompt: Question to a chat model.

    Raises:
        PrepareError: It is of no such kind, or a library is missing.
        ModelNotFoundError: There is no such hub id.
    """
    folder = _find(name)
    if (folder / _TAGS).is_file():
        return _tagger(folder)
    otherwise = f"writes no captions; give one as BLIP, GIT or LLaVA, or a tagger's with {_TAGS}"
    _require_task(folder, "IMAGE_TEXT_TO_TEXT", otherwise)
    return _describer(folder, prompt)


def open_masker(name: str, *, label: str = "") -> Masker:
    """Open a model that gives a subject's mask ("L", of the image's size) for an RGB image.

    Args:
        name: ``rembg``, ``rembg:MODEL``, or a folder or hub id of a segmentation model in the
            layout of transformers.
        label: The subject's among the model's labels; not needed of two, one the background.

    Raises:
        PrepareError: It is of no such kind, or a library is missing.
        ModelNotFoundError: There is no such hub id.
    """
    if name.partition(":")[0] == "rembg":
        return _rembg(name.partition(":")[2] or "u2net")
    folder = _find(name)
    _require_task(folder, "SEGMENTATION", "gives no masks; give a segmentation model, or rembg")
    return _segmenter(folder, label)


def _find(name: str) -> Path:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if looks_local(name):
        raise PrepareError(f"{name} does not exist; give a model's folder, or a hub id")
    folder = fetch_snapshot(name, None, ["*.json", "*.txt", "*.csv", "*.jinja", "*.model"], [])
    weights = "model.onnx" if (folder / _TAGS).is_file() else "*.safetensors"
    return fetch_snapshot(name, None, [weights], [])


def _require_task(folder: Path, task: str, otherwise: str) -> None:
    """Refuse a model that transformers does not list for a task."""
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto

    with quiet_libraries(), plain_errors(str(folder)):
        kind = AutoConfig.from_pretrained(folder).model_type
    # There are four of segmentation: image, semantic, instance and universal.
    names = [name for name in dir(modeling_auto) if name.endswith(f"{task}_MAPPING_NAMES")]
    if not any(kind in getattr(modeling_auto, name) for name in names):
        raise PrepareError(f"{folder} is {with_article(kind)} model, which {otherwise}")


def _describer(folder: Path, prompt: str) -> Captioner:
    """An image-to-text model: its caption of at most 60 tokens, the most probable at each."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    device = default_device()
    dtype = auto_dtype(device)
    with quiet_libraries(), plain_errors(str(folder)):
        processor: Any = AutoProcessor.from_pretrained(folder)
        kind: Any = AutoModelForImageTextToText
        model = kind.from_pretrained(folder, dtype=dtype, use_safetensors=True).to(device).eval()
    is_chat = bool(getattr(processor, "chat_template", None))

    @torch.inference_mode()
    def caption(image: PILImage) -> str:
        if is_chat:
            question = {"type": "text", "text": prompt}
            content = [{"type": "image", "image": image}, question]
            ways = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": content}], return_tensors="pt", **ways
            )
        else:
            inputs = processor(images=image, return_tensors="pt")
        inputs = inputs.to(device, dtype)
        tokens = model.generate(**inputs, max_new_tokens=_MOST_TOKENS, do_sample=False)[0]
        asked = inputs["input_ids"].shape[1] if is_chat else 0
        return " ".join(processor.decode(tokens[asked:], skip_special_tokens=True).split())

    return caption


def _tagger(folder: Path) -> Captioner:
    """A tagger: its tags by their probability, with spaces instead of underscores."""
    with (folder / _TAGS).open(encoding="utf-8", newline="") as file:
        tags = [(row["name"], row["category"]) for row in csv.DictReader(file)]
    try:
        import onnxruntime

        devices = onnxruntime.get_available_providers()
        session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=devices)
    except Exception as error:  # the runtime's own are of no common kind
        message = f"the tagger {folder} cannot be opened ({type(error).__name__}: {error}); it "
        message += "needs its model.onnx, and onnxruntime ('pip install onnxruntime')"
        raise PrepareError(" ".join(message.split())) from error
    [given] = session.get_inputs()

    def caption(image: PILImage) -> str:
        # The taggers were trained on BGR from 0 to 255, on a white square.
        square = ImageOps.pad(image, (given.shape[1],) * 2, Image.Resampling.BICUBIC, "white")
        pixels = np.ascontiguousarray(np.asarray(square, np.float32)[None, :, :, ::-1])
        [scores] = session.run(None, {given.name: pixels})[0]
        ranked = sorted(zip(scores.tolist(), tags, strict=True), reverse=True)
        names = [name for p, (name, kind) in ranked if p >= _LEAST.get(kind, math.inf)]
        # Shorter ones are faces made of letters and signs.
        return ", ".join(name.replace("_", " ") if len(name) > 3 else name for name in names)

    return caption


def _rembg(model: str) -> Masker:
    try:
        import rembg

        session = rembg.new_session(model)
    # Its own, its runtime's and its downloads'; it exits where it has no runtime.
    except (Exception, SystemExit) as error:
        message = f"rembg:{model} cannot be opened ({type(error).__name__}: {error}); "
        message += "'pip install rembg onnxruntime' installs what it needs"
        raise PrepareError(" ".join(message.split())) from error

    def mask(image: PILImage) -> PILImage:
        found: PILImage = rembg.remove(image, session=session, only_mask=True)
        return found.convert("L")

    return mask


def _segmenter(folder: Path, label: str) -> Masker:
    from transformers import pipeline

    with quiet_libraries(), plain_errors(str(folder)):
        segment: Any = pipeline(
            "image-segmentation",
            model=str(folder),
            device=default_device(),
            model_kwargs={"use_safetensors": True},
        )
    wanted = _subject_labels(folder.name, set(segment.model.config.id2label.values()), label)

    def mask(image: PILImage) -> PILImage:
        whole = Image.new("L", image.size)
        for piece in segment(image):
            if piece["label"] in wanted:
                whole = ImageChops.lighter(whole, piece["mask"])
        return whole

    return mask


def _subject_labels(model: str, labels: set[str], label: str) -> set[str]:
    """The labels that are the subject's; one may list several words, as ADE20K's do."""
    words = {word.strip().lower(): name for name in labels for word in re.split("[;,]", name)}
    if label.lower() in words:
        return {words[label.lower()]}
    others = labels - {name for word, name in words.items() if word == "background"}
    if len(others) == 1:
        return others
    what = f"knows no {label!r}{did_you_mean(label, words)}" if label else "knows many things"
    what += f"; say which of its labels the subject is: {listing(words, 8)}"
    raise PrepareError(f"{model} {what}")
