"""Photos read, captioned, masked, put on plain backgrounds; nothing but captions is changed."""

from __future__ import annotations

import random
import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageOps

from dora_diffusion.config.wording import listing
from dora_diffusion.data.captions import CaptionEdit, with_trigger
from dora_diffusion.data.crops import Buckets, CropRecord, apply_crop_to_mask, plan_crop
from dora_diffusion.data.curate.models import PrepareError
from dora_diffusion.data.curate.report import (
    Report,
    add_cautions,
    look_at,
    measure_mask,
    small_image,
)
from dora_diffusion.data.images import open_photo
from dora_diffusion.data.photos import Photo, mask_path, open_mask, read_photo
from dora_diffusion.formats.files.atomic import atomic_file

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

    from dora_diffusion.data.curate.models import Captioner, Masker
    from dora_diffusion.models.metric_models import MetricModel

# Neither black nor white, which cut-outs have everywhere.
COLOURS = ("red", "orange", "yellow", "green", "teal", "blue", "purple", "pink", "brown", "gray")


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
                written["masks"] += self.originals and _add_image(mask_path(photo.path), mask)
            else:
                mask = None
        caption = photo.caption
        if target is not None:
            caption = self._caption(photo, image, in_place=in_place)
            if self.originals and self._write_caption(photo, caption, in_place=in_place):
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
            _add(path.with_suffix(".txt"), partial(_write_text, text="\n".join(lines)))
            _add_image(mask_path(path), mask)
            written["copies"] += _add_image(path, plain)
            images["plain"] = small_image(plain)
        figures = None if mask is None else measure_mask(mask, mirrored)
        report.photos.append(look_at(photo, image, figures, self.resolution))
        report.images.append(images)
        return photo

    def _caption(self, photo: Photo, image: PILImage, *, in_place: bool) -> str:
        """A photo's caption, changed where it is its own, else a new one."""
        if photo.caption and self.originals and not in_place:
            return photo.caption  # A copy's was changed when it was made.
        if photo.caption or self.edit.text is not None:
            return self.edit(photo.caption)
        caption = self.caption(image) if self.caption is not None else ""
        return self.edit(with_trigger(caption, self.token, self.class_word))

    def _write_caption(self, photo: Photo, caption: str, *, in_place: bool) -> bool:
        """Write a new caption, or with ``edit`` another; whether it was written."""
        path, write = photo.path.with_suffix(".txt"), partial(_write_text, text=caption)
        if caption == photo.caption:
            return False
        if not (in_place and self.edit):
            return _add(path, write)
        with atomic_file(path) as temporary:
            write(temporary)
        return True

    def _copy(self, photo: Photo, target: Path, written: Counter[str]) -> Photo:
        """A photo in the target, which may be its own folder, with its caption and its mask."""
        path = photo.path
        for source in (path.with_suffix(".txt"), mask_path(path), path):
            if source.is_file():
                write = partial(shutil.copyfile, source)
                if self.edit and source.suffix == ".txt":
                    write = partial(_write_text, text=self.edit(photo.caption))
                is_new = _add(target / source.name, write)
                written["photos"] += is_new and source == path
        copied = self._read(target / path.name)
        if copied.digest != photo.digest:
            raise PrepareError(f"{copied.path} is not {path}; give a new output folder")
        return copied


def _add(path: Path, write: Callable[[Path], object]) -> bool:
    """Write a file that is not there, whole or not at all; whether it was written."""
    if path.exists() or path.is_symlink():
        return False
    with atomic_file(path) as temporary:
        write(temporary)
    return True


def _write_text(path: Path, text: str) -> None:
    path.write_text(f"{text}\n" if text else "", encoding="utf-8")


def _add_image(path: Path, image: PILImage) -> bool:
    return _add(path, partial(image.save, format="PNG"))
