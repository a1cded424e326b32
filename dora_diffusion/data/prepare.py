"""Preparation of photos: captions, masks and copies on plain backgrounds.

Existing files are never changed, except captions. Models for captions and masks are folders, hub
ids, or models of rembg. Weights are read from safetensors or ONNX only: no pickles, no remote code.
"""

from __future__ import annotations

import contextlib
import csv
import math
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageChops, ImageOps

from dora_diffusion.config.wording import did_you_mean, listing, with_article
from dora_diffusion.data.captions import CaptionEdit, with_trigger
from dora_diffusion.data.checks import Report, add_cautions, look_at, measure_mask, small_image
from dora_diffusion.data.crops import Buckets, CropRecord, apply_crop_to_mask, plan_crop
from dora_diffusion.data.images import PhotoError, open_photo
from dora_diffusion.data.photos import Photo, mask_path, open_mask, read_photo
from dora_diffusion.formats.files.atomic import atomic_file
from dora_diffusion.models.load import plain_errors, quiet_libraries
from dora_diffusion.models.locate import fetch_snapshot, looks_local
from dora_diffusion.models.precision import auto_dtype
from dora_diffusion.numerics.devices import default_device

if TYPE_CHECKING:
    from dora_diffusion.models.metric_models import MetricModel

Captioner = Callable[[Image.Image], str]
Masker = Callable[[Image.Image], Image.Image]

# Background colours, without black and white, the usual ones of cut-outs.
COLOURS = ("red", "orange", "yellow", "green", "teal", "blue", "purple", "pink", "brown", "gray")
# Least probability of a tag in the WD taggers, by category: general (0) and character (4).
_LEAST = {"0": 0.35, "4": 0.85}
_TAGS = "selected_tags.csv"
INSTRUCTION = "Describe this image in one sentence."
# CLIP reads 75 tokens; the trigger words need some of them.
_MOST_TOKENS = 60


class PrepareError(PhotoError):
    """Photos cannot be prepared; the message has the problem and the fix in one line."""


@dataclass(frozen=True)
class Preparation:
    """Preparation of photos for training: checks, and with a target captions, masks and copies.

    Files are only added, atomically; only captions are changed, by ``edit``. Files of earlier runs
    are kept, so that an interrupted run continues.

    Attributes:
        target: Folder for copies of the photos with their captions and masks, or the photos' own
            folder for captions and masks alone; None writes nothing.
        resolution: Training resolution in pixels, a multiple of 64.
        caption: Function that writes captions (`open_captioner`); None: from the trigger words.
        edit: Edit of captions, both existing and new ones.
        mask: Function that computes masks (`open_masker`).
        token: The trigger word.
        class_word: Class of the subject.
        plain_copies: Copy each photo with a mask and a caption onto a plain colour.
        seed: Seed of the colours.
        originals: Whether the target contains the photos themselves.
        similarity: Image-similarity model that finds further near-duplicates.
    """

    target: Path | None = None
    resolution: int = 512
    caption: Captioner | None = None
    edit: CaptionEdit = field(default_factory=CaptionEdit)
    mask: Masker | None = None
    token: str = ""
    class_word: str = ""
    plain_copies: bool = False
    seed: int = 0
    originals: bool = True
    similarity: MetricModel | None = None

    def run(
        self, paths: Sequence[Path], on_photo: Callable[[int, int], None] = lambda done, total: None
    ) -> Report:
        """Prepare the photos of one subject.

        Args:
            paths: The photos of one folder (`list_photos`).
            on_photo: Called with (done, total).

        Raises:
            PrepareError: If no photo can be used, or the target contains other files.
            DiskFullError: If the disk is full.
        """
        self.check_target(paths)
        report, photos = Report(), []
        for done, path in enumerate(paths, start=1):
            try:
                photo = self._read(path)
            except ValueError as error:
                report.unreadable.append(str(error))
            else:
                photos.append(self._prepare(photo, report))
            on_photo(done, len(paths))
        if not photos:
            raise PrepareError(f"no photo can be used: {'; '.join(report.unreadable)}")
        add_cautions(report, photos, self.resolution, self.similarity)
        for kind, is_enabled, needs in (
            ("mask", self.mask, "no subject was found; paint a mask, or use another model"),
            ("plain", self.plain_copies, "a plain copy needs a mask, and a caption or a token"),
        ):
            both = zip(report.photos, report.images, strict=True)
            names = [photo["name"] for photo, images in both if kind not in images]
            if is_enabled and names:
                report.caution(f"no {kind}", names, f"no {kind} of {listing(names, 5)}: {needs}")
        return report

    def check_target(self, paths: Sequence[Path]) -> None:
        """Check that the target contains only files of these photos.

        Raises:
            PrepareError: If it contains others, or files would get the same name.
        """
        folder, target = paths[0].parent, self.target
        if target is None:
            return
        stem_counts = Counter(path.stem.casefold() for path in paths)
        if repeated := [path.name for path in paths if stem_counts[path.stem.casefold()] > 1]:
            problem = "would share a caption and a mask; rename one"
            raise PrepareError(f"{listing(repeated, 4)} {problem}")
        if target.resolve() == folder.resolve():
            if self.plain_copies or not self.originals:
                raise PrepareError(f"copies need an output folder other than the photos' {folder}")
            return
        names = "|".join(re.escape(path.name) for path in paths)
        stems = "|".join(re.escape(path.stem) for path in paths)
        pattern = rf"\..*|{names}|({stems})(\.txt|\.mask\.png|-plain-\w+(\.mask)?\.(txt|png))"
        existing = [path.name for path in target.iterdir()] if target.is_dir() else []
        if foreign := [name for name in existing if not re.fullmatch(pattern, name)]:
            message = f"{target} contains {listing(foreign, 3)}, not from these photos; "
            raise PrepareError(f"{message}give an empty or a new output folder")

    def _read(self, path: Path) -> Photo:
        """Read a photo with its existing caption, which may be empty, and its mask."""
        return read_photo(path, "", mask_crops=self._crops, measure=True, per_line=True)

    def _crops(self, photo: Photo) -> list[CropRecord]:
        sizes = ((self.resolution, self.resolution), Buckets(self.resolution)(photo.size))
        return [plan_crop(photo.size, size) for size in sizes]

    def _prepare(self, photo: Photo, report: Report) -> Photo:
        """Write the files of one photo, add it to the report, and return the updated photo."""
        target, written = self.target, report.written
        in_place = target is not None and target.resolve() == photo.path.parent.resolve()
        if target is not None and self.originals:
            photo = self._copy(photo, target, written)
        image, mask, mirrored = open_photo(photo.path), open_mask(photo), None
        images = {"photo": small_image(image)}
        if target is not None and mask is None and self.mask is not None:
            mask = self.mask(image)
            # Training would refuse a mask that is black in all crops.
            if all(apply_crop_to_mask(mask, crop).any() for crop in self._crops(photo)):
                mirrored = ImageOps.mirror(self.mask(ImageOps.mirror(image)))
                written["masks"] += self.originals and _add(mask_path(photo.path), mask)
            else:
                mask = None
        caption = photo.caption
        if target is not None:
            caption = self._caption(photo, image, in_place=in_place)
            file, is_edited = photo.path.with_suffix(".txt"), in_place and bool(self.edit)
            is_new = self.originals and caption != photo.caption
            if is_new and _add(file, caption, overwrite=is_edited):
                written["captions"] += 1
                photo = replace(photo, caption=caption)
        if mask is not None:
            red = Image.new("RGB", image.size, "red")
            images["mask"] = small_image(Image.composite(image, red, mask))
        if target is not None and mask is not None and caption and self.plain_copies:
            # Seeded by the photo's content, so that other photos do not change it.
            colour = random.Random(f"{self.seed} {photo.digest}").choice(COLOURS)
            plain = Image.composite(image, Image.new("RGB", image.size, colour), mask)
            path = target / f"{photo.path.stem}-plain-{colour}.png"
            lines = (f"{line}, on a plain {colour} background" for line in caption.split("\n"))
            _add(path.with_suffix(".txt"), "\n".join(lines))
            _add(mask_path(path), mask)
            written["copies"] += _add(path, plain)
            images["plain"] = small_image(plain)
        figures = None if mask is None else measure_mask(mask, mirrored)
        report.photos.append(look_at(photo, image, figures, self.resolution))
        report.images.append(images)
        return photo

    def _caption(self, photo: Photo, image: Image.Image, *, in_place: bool) -> str:
        """Return the photo's edited caption, or a new one."""
        if photo.caption and self.originals and not in_place:
            return photo.caption  # The caption of a copy is already edited.
        if photo.caption or self.edit.text is not None:
            return self.edit(photo.caption)
        caption = self.caption(image) if self.caption is not None else ""
        return self.edit(with_trigger(caption, self.token, self.class_word))

    def _copy(self, photo: Photo, target: Path, written: Counter[str]) -> Photo:
        """Copy a photo with its caption and mask to the target, which may be its own folder."""
        path = photo.path
        for source in (path.with_suffix(".txt"), mask_path(path), path):
            if source.is_file():
                is_edited = self.edit and source.suffix == ".txt"
                content = self.edit(photo.caption) if is_edited else source
                is_new = _add(target / source.name, content)
                written["photos"] += is_new and source == path
        copied = self._read(target / path.name)
        if copied.digest != photo.digest:
            raise PrepareError(f"{copied.path} is not {path}; give a new output folder")
        return copied


def _add(path: Path, content: str | Path | Image.Image, *, overwrite: bool = False) -> bool:
    """Write a text, a copy or an image atomically, unless the file exists.

    Returns:
        Whether the file was written.
    """
    if not overwrite and (path.exists() or path.is_symlink()):
        return False
    with atomic_file(path) as temporary:
        if isinstance(content, str):
            temporary.write_text(f"{content}\n" if content else "", encoding="utf-8")
        elif isinstance(content, Path):
            shutil.copyfile(content, temporary)
        else:
            content.save(temporary, format="PNG")
    return True


def open_captioner(name: str, prompt: str = INSTRUCTION) -> Captioner:
    """Open a model that writes a caption for an RGB image.

    Args:
        name: Folder or hub id of an image-to-text model in the layout of transformers (BLIP, GIT,
            LLaVA ...), or of a tagger with ``selected_tags.csv`` and ``model.onnx``.
        prompt: Instruction for a chat model.

    Raises:
        PrepareError: If the model is of another kind, or a library is missing.
        ModelNotFoundError: If the hub id does not exist.
    """
    folder = _find(name)
    if (folder / _TAGS).is_file():
        return _tagger(folder)
    otherwise = f"writes no captions; give one like BLIP, GIT or LLaVA, or a tagger with {_TAGS}"
    _require_task(folder, "IMAGE_TEXT_TO_TEXT", otherwise)
    return _describer(folder, prompt)


def open_masker(name: str, *, label: str = "") -> Masker:
    """Open a model that computes the subject's mask ("L", of the image's size) for an RGB image.

    Args:
        name: ``rembg``, ``rembg:MODEL``, or a folder or hub id of a segmentation model in the
            layout of transformers.
        label: Label of the subject; not needed for a model with one label besides background.

    Raises:
        PrepareError: If the model is of another kind, or a library is missing.
        ModelNotFoundError: If the hub id does not exist.
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
    """Check that transformers lists the kind of a model for a task."""
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto

    with quiet_libraries(), plain_errors(str(folder)):
        kind = AutoConfig.from_pretrained(folder).model_type
    # Segmentation has four mappings: image, semantic, instance and universal.
    names = [name for name in dir(modeling_auto) if name.endswith(f"{task}_MAPPING_NAMES")]
    if not any(kind in getattr(modeling_auto, name) for name in names):
        raise PrepareError(f"{folder} is {with_article(kind)} model, which {otherwise}")


def _describer(folder: Path, prompt: str) -> Captioner:
    """Open an image-to-text model; captions are decoded greedily, with at most 60 tokens."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    device = default_device()
    dtype = auto_dtype(device)
    with quiet_libraries(), plain_errors(str(folder)):
        processor: Any = AutoProcessor.from_pretrained(folder)
        kind: Any = AutoModelForImageTextToText
        model = kind.from_pretrained(folder, dtype=dtype, use_safetensors=True).to(device).eval()
    is_chat = bool(getattr(processor, "chat_template", None))

    @torch.inference_mode()
    def caption(image: Image.Image) -> str:
        if is_chat:
            question = {"type": "text", "text": prompt}
            content = [{"type": "image", "image": image}, question]
            options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": content}], return_tensors="pt", **options
            )
        else:
            inputs = processor(images=image, return_tensors="pt")
        inputs = inputs.to(device, dtype)
        tokens = model.generate(**inputs, max_new_tokens=_MOST_TOKENS, do_sample=False)[0]
        prompt_length = inputs["input_ids"].shape[1] if is_chat else 0
        return " ".join(processor.decode(tokens[prompt_length:], skip_special_tokens=True).split())

    return caption


def _tagger(folder: Path) -> Captioner:
    """Open a tagger; captions list its tags by probability, with spaces for underscores."""
    with (folder / _TAGS).open(encoding="utf-8", newline="") as file:
        tags = [(row["name"], row["category"]) for row in csv.DictReader(file)]
    needs = "it needs its model.onnx, and onnxruntime ('pip install onnxruntime')"
    with _opening(f"the tagger {folder}", needs):
        import onnxruntime

        devices = onnxruntime.get_available_providers()
        session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=devices)
    [model_input] = session.get_inputs()

    def caption(image: Image.Image) -> str:
        # The taggers were trained on BGR from 0 to 255, on a white square.
        square = ImageOps.pad(image, (model_input.shape[1],) * 2, Image.Resampling.BICUBIC, "white")
        pixels = np.ascontiguousarray(np.asarray(square, np.float32)[None, :, :, ::-1])
        [scores] = session.run(None, {model_input.name: pixels})[0]
        ranked = sorted(zip(scores.tolist(), tags, strict=True), reverse=True)
        names = [name for p, (name, kind) in ranked if p >= _LEAST.get(kind, math.inf)]
        # Shorter tags are emoticons, which keep their underscores.
        return ", ".join(name.replace("_", " ") if len(name) > 3 else name for name in names)

    return caption


@contextlib.contextmanager
def _opening(what: str, needs: str) -> Iterator[None]:
    """Report in one line that a model cannot be opened.

    Errors of models, runtimes and downloads have no common base class; rembg exits without a
    runtime.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        message = f"{what} cannot be opened ({type(error).__name__}: {error}); {needs}"
        raise PrepareError(" ".join(message.split())) from error


def _rembg(model: str) -> Masker:
    with _opening(f"rembg:{model}", "'pip install rembg onnxruntime' installs what it needs"):
        import rembg

        session = rembg.new_session(model)

    def mask(image: Image.Image) -> Image.Image:
        result: Image.Image = rembg.remove(image, session=session, only_mask=True)
        return result.convert("L")

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
    processor = segment.image_processor
    if getattr(processor, "do_center_crop", False):
        # Otherwise the mask of the crop would be stretched over the whole image.
        processor.size, processor.do_center_crop = processor.crop_size, False
    labels = set(segment.model.config.id2label.values())
    subject_labels = _subject_labels(folder.name, labels, label)

    def mask(image: Image.Image) -> Image.Image:
        union = Image.new("L", image.size)
        for piece in segment(image):
            if piece["label"] in subject_labels:
                union = ImageChops.lighter(union, piece["mask"])
        return union

    return mask


def _subject_labels(model: str, labels: set[str], label: str) -> set[str]:
    """Return the labels of the subject; a label may list several words, as in ADE20K."""
    words = {word.strip().lower(): name for name in labels for word in re.split("[;,]", name)}
    if label.lower() in words:
        return {words[label.lower()]}
    foreground = labels - {name for word, name in words.items() if word == "background"}
    if len(foreground) == 1:
        return foreground
    problem = f"has no label {label!r}{did_you_mean(label, words)}" if label else "has many labels"
    problem += f"; choose the subject's: {listing(words, 8)}"
    raise PrepareError(f"{model} {problem}")
