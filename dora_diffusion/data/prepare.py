"""Photos read, captioned, masked, put on plain backgrounds; nothing but captions is changed.

The models that caption and mask are folders, hub ids, or rembg's. Weights are read from safetensors
or ONNX only: no pickles, no remote code.
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

# Neither black nor white, which cut-outs have everywhere.
COLOURS = ("red", "orange", "yellow", "green", "teal", "blue", "purple", "pink", "brown", "gray")
# The WD taggers' own least probabilities of a tag, by its category: general, and of a character.
_LEAST = {"0": 0.35, "4": 0.85}
_TAGS = "selected_tags.csv"
INSTRUCTION = "Describe this image in one sentence."
# CLIP reads 75 tokens, and the trigger words need some.
_MOST_TOKENS = 60


class PrepareError(PhotoError):
    """Photos cannot be prepared so; one line with what to do."""


@dataclass(frozen=True)
class Preparation:
    """Looks at photos and, given a target, makes them ready to be trained on.

    Files are only added, each whole or not at all; captions alone are changed, where ``edit`` asks
    for it. What an earlier run has written is kept, so that one that was interrupted continues.

    Attributes:
        target: Folder for copies of the photos with their captions and masks, or the photos' own
            for captions and masks alone; None writes nothing.
        resolution: Side that they will be trained at, a multiple of 64.
        caption: Writes captions (`open_captioner`); without it the trigger words make them.
        edit: Changes captions: the photos' own, and those that are written.
        mask: Makes masks (`open_masker`).
        token: The trigger word.
        class_word: Class of the subject.
        plain_copies: Copy each photo that has a mask and a caption onto a plain colour.
        seed: Of the colours.
        originals: Whether the photos themselves are in the target.
        similarity: Finds near-duplicates whose pixels differ.
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
            paths: The photos, of one folder (`list_photos`).
            on_photo: Told (done, total).

        Raises:
            PrepareError: None of them can be used, or the target holds something else.
            DiskFullError: There is no room.
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
        for made, is_asked, needs in (
            ("mask", self.mask, "no subject was found; paint a mask, or use another model"),
            ("plain", self.plain_copies, "a plain copy needs a mask, and a caption or a token"),
        ):
            both = zip(report.photos, report.images, strict=True)
            names = [photo["name"] for photo, images in both if made not in images]
            if is_asked and names:
                report.caution(f"no {made}", names, f"no {made} of {listing(names, 5)}: {needs}")
        return report

    def check_target(self, paths: Sequence[Path]) -> None:
        """Refuse a target in which these photos' files would not be by themselves.

        Raises:
            PrepareError: If so.
        """
        folder, target = paths[0].parent, self.target
        if target is None:
            return
        stems = Counter(path.stem.casefold() for path in paths)
        if twice := [path.name for path in paths if stems[path.stem.casefold()] > 1]:
            raise PrepareError(f"{listing(twice, 4)} would share a caption and a mask; rename one")
        if target.resolve() == folder.resolve():
            if self.plain_copies or not self.originals:
                raise PrepareError(f"copies need an output folder other than the photos' {folder}")
            return
        names = "|".join(re.escape(path.name) for path in paths)
        bare = "|".join(re.escape(path.stem) for path in paths)
        own = rf"\..*|{names}|({bare})(\.txt|\.mask\.png|-plain-\w+(\.mask)?\.(txt|png))"
        there = [path.name for path in target.iterdir()] if target.is_dir() else []
        if others := [name for name in there if not re.fullmatch(own, name)]:
            message = f"{target} holds {listing(others, 3)}, which is not of these photos; "
            raise PrepareError(f"{message}give an empty or a new output folder")

    def _read(self, path: Path) -> Photo:
        """A photo with its own caption, which may be empty, and its mask."""
        return read_photo(path, "", mask_crops=self._crops, measure=True, per_line=True)

    def _crops(self, photo: Photo) -> list[CropRecord]:
        sizes = ((self.resolution, self.resolution), Buckets(self.resolution)(photo.size))
        return [plan_crop(photo.size, size) for size in sizes]

    def _prepare(self, photo: Photo, report: Report) -> Photo:
        """Write what is asked for of one photo, and report it; the photo as it is then."""
        target, written = self.target, report.written
        in_place = target is not None and target.resolve() == photo.path.parent.resolve()
        if target is not None and self.originals:
            photo = self._copy(photo, target, written)
        image, mask, mirrored = open_photo(photo.path), open_mask(photo), None
        images = {"photo": small_image(image)}
        if target is not None and mask is None and self.mask is not None:
            mask = self.mask(image)
            # What the trainer would refuse is not written.
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
            # By the photo's content, whatever other photos there are.
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
        """A photo's caption, changed where it is its own, else a new one."""
        if photo.caption and self.originals and not in_place:
            return photo.caption  # A copy's was changed when it was made.
        if photo.caption or self.edit.text is not None:
            return self.edit(photo.caption)
        caption = self.caption(image) if self.caption is not None else ""
        return self.edit(with_trigger(caption, self.token, self.class_word))

    def _copy(self, photo: Photo, target: Path, written: Counter[str]) -> Photo:
        """A photo in the target, which may be its own folder, with its caption and its mask."""
        path = photo.path
        for source in (path.with_suffix(".txt"), mask_path(path), path):
            if source.is_file():
                is_edited = self.edit and source.suffix == ".txt"
                is_new = _add(
                    target / source.name, self.edit(photo.caption) if is_edited else source
                )
                written["photos"] += is_new and source == path
        copied = self._read(target / path.name)
        if copied.digest != photo.digest:
            raise PrepareError(f"{copied.path} is not {path}; give a new output folder")
        return copied


def _add(path: Path, content: str | Path | Image.Image, *, overwrite: bool = False) -> bool:
    """Write a text, a copy or an image, whole or not at all, if no file is there.

    Returns:
        Whether it was written.
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
    def caption(image: Image.Image) -> str:
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
    needs = "it needs its model.onnx, and onnxruntime ('pip install onnxruntime')"
    with _opening(f"the tagger {folder}", needs):
        import onnxruntime

        devices = onnxruntime.get_available_providers()
        session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=devices)
    [given] = session.get_inputs()

    def caption(image: Image.Image) -> str:
        # The taggers were trained on BGR from 0 to 255, on a white square.
        square = ImageOps.pad(image, (given.shape[1],) * 2, Image.Resampling.BICUBIC, "white")
        pixels = np.ascontiguousarray(np.asarray(square, np.float32)[None, :, :, ::-1])
        [scores] = session.run(None, {given.name: pixels})[0]
        ranked = sorted(zip(scores.tolist(), tags, strict=True), reverse=True)
        names = [name for p, (name, kind) in ranked if p >= _LEAST.get(kind, math.inf)]
        # Shorter ones are faces made of letters and signs.
        return ", ".join(name.replace("_", " ") if len(name) > 3 else name for name in names)

    return caption


@contextlib.contextmanager
def _opening(what: str, needs: str) -> Iterator[None]:
    """Say in one line that a model cannot be opened.

    Its own errors, its runtime's and its downloads' are of no common kind; rembg exits where it has
    no runtime.
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
        found: Image.Image = rembg.remove(image, session=session, only_mask=True)
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
    processor = segment.image_processor
    if getattr(processor, "do_center_crop", False):
        # The mask of a crop would be stretched over the whole image.
        processor.size, processor.do_center_crop = processor.crop_size, False
    wanted = _subject_labels(folder.name, set(segment.model.config.id2label.values()), label)

    def mask(image: Image.Image) -> Image.Image:
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
