"""Photos of a folder: opened, turned upright, checked and digested in one pass."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from dora_diffusion.config.wording import closest, counted, listing
from dora_diffusion.data.captions import read_caption
from dora_diffusion.data.crops import CropRecord, apply_crop_to_mask
from dora_diffusion.data.images import (
    Appearance,
    DecodedPhoto,
    PhotoError,
    appearance_of,
    decode_photo,
    digest_of,
    open_photo,
)
from dora_diffusion.formats.files.atomic import save_text

PHOTO_RECORD = "photos.json"
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".heic", ".heif")
MASK_SUFFIX = ".mask.png"
# Suffixes of companion files with a photo's name.
COMPANIONS = (".txt", MASK_SUFFIX)
# Suffixes of caption files in other programs.
_OTHER_CAPTIONS = (".caption",)
# Suffixes of images that are skipped with a warning.
OTHER_SUFFIXES = (".avif", ".bmp", ".dng", ".gif", ".jp2", ".jxl", ".tif", ".tiff")
VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
# Limit of files of a sub-folder in the search for photos that are not read.
_MOST_SEARCHED = 5000


@dataclass(frozen=True)
class Photo:
    """A checked photo of the subject, or a class image.

    Attributes:
        path: Path of the file.
        digest: Digest of the file's bytes, which identifies the photo in draws and caches.
        size: Upright ``(height, width)`` of the file before reduction.
        caption: Text of the caption file, else the prompt.
        mask_path: Path of the mask file, or of the photo if its alpha channel is the mask; None
            without a mask, or if masks are not used.
        mask_digest: Digest of the mask file's bytes; empty without one.
        appearance: Blur and fingerprint; None if they were not measured.
        has_transparency: Whether the photo has transparent parts, which became white.
    """

    path: Path
    digest: str
    size: tuple[int, int]
    caption: str
    mask_path: Path | None = None
    mask_digest: str = ""
    appearance: Appearance | None = None
    has_transparency: bool = False

    def record(self) -> dict[str, str]:
        """Return the photo's record for checkpoints, which detects changed photos on resume."""
        values = {"name": self.path.name, "image": self.digest, "caption": self.caption}
        return {**values, "mask": self.mask_digest}


MaskCrops = Callable[[Photo], Iterable[CropRecord]]
"""Photo -> its training crops, or some of them."""


class MaskError(PhotoError):
    """A photo's mask cannot be used."""


def read_photo(
    path: Path,
    prompt: str,
    *,
    mask_crops: MaskCrops | None = None,
    measure: bool = False,
    per_line: bool = False,
) -> Photo:
    """Open a photo, turn it upright, check and digest it, and read its caption.

    Args:
        path: The file, which is read and decoded once.
        prompt: Default caption, without a caption file.
        mask_crops: Crops for the mask, which must be bright in at least one of them; None: ignore
            masks.
        measure: Measure its appearance too.
        per_line: Keep the lines of its caption separate.

    Raises:
        PhotoError: If the photo cannot be used; a `MaskError` if its mask cannot be used.
    """
    decoded = decode_photo(path)
    alpha = decoded.alpha
    photo = Photo(
        path,
        digest_of(decoded.data),
        decoded.size,
        read_caption(path, prompt, per_line=per_line),
        has_transparency=alpha is not None and alpha.getextrema() != (255, 255),
    )
    if mask_crops is not None:
        photo = _find_mask(photo, decoded, mask_crops)
    return replace(photo, appearance=appearance_of(decoded.image)) if measure else photo


def read_photos(
    paths: Sequence[Path],
    prompt: str,
    *,
    skip_unreadable: bool = False,
    mask_crops: MaskCrops | None = None,
    measure: bool = False,
    per_line: bool = False,
) -> list[Photo]:
    """Read photos as `read_photo` does.

    Args:
        paths: The files.
        prompt: Caption of photos without a caption file.
        skip_unreadable: Skip unusable photos with a warning each, instead of failing. An unusable
            mask is always an error: without it, the whole photo would be learned.
        mask_crops: As in `read_photo`; at least one photo must have a mask.
        measure: Measure the photos' appearance, for `check_photos`.
        per_line: Keep the lines of captions separate.

    Raises:
        PhotoError: If photos or masks are unusable (all reasons in one line), or none remain.
    """
    photos, errors = list[Photo](), list[PhotoError]()
    options: dict[str, Any] = {"mask_crops": mask_crops, "measure": measure, "per_line": per_line}
    for path in paths:
        try:
            photos.append(read_photo(path, prompt, **options))
        except PhotoError as error:
            errors.append(error)
    can_skip = skip_unreadable and photos and not any(isinstance(e, MaskError) for e in errors)
    if errors and not can_skip:
        total, reasons = counted(len(paths), "photo"), "; ".join(map(str, errors))
        raise PhotoError(f"{len(errors)} of {total} unusable: {reasons}")
    for reason in errors:
        warnings.warn(f"photo skipped: {reason}", stacklevel=3)
    if mask_crops is not None:
        _require_masks(photos)
    return photos


def mask_path(photo: Path) -> Path:
    """Return the path of an image's mask: ``NAME.mask.png``."""
    return photo.with_name(photo.stem + MASK_SUFFIX)


def _find_mask(photo: Photo, decoded: DecodedPhoto, crops: MaskCrops) -> Photo:
    """Add the mask to a photo: the mask file, else the alpha channel if it is not opaque.

    With a mask file, the alpha channel is not used as mask: transparent parts are white, and
    learned where the mask is bright.

    Raises:
        MaskError: If the file cannot be used, differs from the photo in size, or the mask is black
            in all crops.
    """
    path, mask = mask_path(photo.path), decoded.alpha
    if path.is_file() or path.is_symlink():
        try:
            file = decode_photo(path)
        except PhotoError as error:
            raise MaskError(str(error)) from error
        # The mask of a photo that is decoded at reduced size may have either size.
        if file.image.size != decoded.image.size:
            raise MaskError(
                f"{path.name}: the mask is {file.size[1]} x {file.size[0]}, its photo "
                f"{photo.size[1]} x {photo.size[0]}; save it at the photo's size"
            )
        mask = file.image.convert("L")
        photo = replace(photo, mask_path=path, mask_digest=digest_of(file.data))
    elif photo.has_transparency:
        photo = replace(photo, mask_path=photo.path)
    if mask is None or photo.mask_path is None:
        return photo
    if not any(apply_crop_to_mask(mask, crop).any() for crop in crops(photo)):
        name = photo.path.name
        where = path.name if photo.mask_path == path else f"the alpha channel of {name}"
        raise MaskError(
            f"{where} is black in every training crop, so nothing of {name} would be learned; "
            "paint the area to learn bright, or remove the mask"
        )
    return photo


def open_mask(photo: Photo) -> Image.Image | None:
    """Open the mask ("L") of a photo; None if it was read without one."""
    if photo.mask_path is None:
        return None
    if photo.mask_path == photo.path:
        return decode_photo(photo.path).alpha
    return open_photo(photo.mask_path).convert("L")


def _require_masks(photos: Sequence[Photo]) -> None:
    """Check that at least one photo has a mask.

    Raises:
        PhotoError: If no photo has a mask.

    Warns:
        UserWarning: If some photos have no mask, or some masks are alpha channels and others are
            files.
    """
    bare = [photo.path.name for photo in photos if photo.mask_path is None]
    if photos and len(bare) == len(photos):
        first = photos[0].path
        raise PhotoError(
            f"masks are to be used, but none of the {counted(len(photos), 'image')} has a mask: "
            f"save the mask of {first.name} as {mask_path(first).name} next to it, of the same "
            "size and bright in the area to learn; or give images with an alpha channel"
        )
    if bare:
        warnings.warn(
            f"{counted(len(bare), 'image')} of {len(photos)} without a mask; their whole area is "
            f"learned: {', '.join(bare[:5])}{', ...' if len(bare) > 5 else ''}",
            stacklevel=4,
        )
    cut_out = [photo.path.name for photo in photos if photo.mask_path == photo.path]
    if cut_out and len(bare) + len(cut_out) < len(photos):
        warnings.warn(
            f"{counted(len(cut_out), 'image')} of {len(photos)} without a mask file: the alpha "
            f"channel is the mask, so transparent parts are not learned: {listing(cut_out, 5)}; "
            "give a mask file, or save without transparency, to learn more",
            stacklevel=4,
        )


def _photo_folder(folder: str | Path, setting: str) -> Path:
    """Resolve the home directory of a folder, and check that the folder exists."""
    folder = Path(folder).expanduser()
    if folder.is_dir():
        return folder
    folder = folder.absolute()
    problem = "is a file, not a folder" if folder.exists() else "does not exist"
    similar = closest(folder.name, (p.name for p in folder.parent.glob("*") if p.is_dir()))
    hint = f" (did you mean {similar!r}?)" if similar else ""
    flag = f" with --{setting}" if setting else ""
    raise PhotoError(f"{folder}: the photo folder {problem}{hint}; give a folder of photos{flag}")


def list_photos(
    folder: str | Path, *, warn_of_nested: bool = True, setting: str = ""
) -> list[Path]:
    """List a folder's photos by file extension, sorted by name.

    Hidden files, sub-folders, captions (``.txt``) and masks (``.mask.png``) are skipped.

    Args:
        folder: The folder.
        warn_of_nested: Warn about photos in sub-folders.
        setting: Setting that names the folder, for the error.

    Raises:
        PhotoError: If the folder is missing or contains no photos.

    Warns:
        UserWarning: If the folder has images in other formats, videos, broken links, captions,
            or masks without a photo, caption files of other programs, weights of photos, or
            sub-folders with photos.
    """
    folder = _photo_folder(folder, setting)
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    photos, nested = [*filter(is_photo, entries)], nested_photos(entries)
    named = [path for path in entries if path.name.lower().endswith(PHOTO_SUFFIXES)]
    broken = [path.name for path in named if path.is_symlink() and not path.exists()]
    links = f"links to missing files ({listing(broken, 5)})" if broken else ""
    if not photos:
        found = nested or links or ", ".join(path.name for path in entries[:5]) or "nothing"
        raise PhotoError(
            f"{folder}: no photos in this folder (looked for {', '.join(PHOTO_SUFFIXES)}; "
            f"found {found}); sub-folders are not searched"
        )
    stems = {photo.stem for photo in photos}
    orphans = [
        path.name
        for path in entries
        for suffix in COMPANIONS
        if path.name.endswith(suffix) and path.name.removesuffix(suffix) not in stems
    ]
    captions = [path.name for path in entries if path.name.lower().endswith(_OTHER_CAPTIONS)]
    weights = [path.name for path in entries if path.suffix == ".weight"]
    for applies, message in (
        (nested and warn_of_nested,
         f"left out {nested}; sub-folders are not read, move the photos up to use them"),
        (links, f"left out {links}; copy the photos themselves"),
        (orphans, f"without effect, since no photo has their name: {listing(orphans, 5)}"),
        (captions, f"without effect: {listing(captions, 5)}; rename them to .txt to use them as "
         "captions"),
        (weights, f"without effect: {listing(weights, 5)}; give these photos a folder of their own "
         "with repeats"),
        *((True, message) for message in left_out([path.name for path in entries])),
    ):  # fmt: skip
        if applies:
            warnings.warn(f"{folder}: {message}", stacklevel=2)
    return photos


def left_out(names: Sequence[str]) -> list[str]:
    """Return a message on the images of other formats among files, and one on the videos."""
    advice = {
        OTHER_SUFFIXES: "convert them to JPEG or PNG to use them",
        VIDEO_SUFFIXES: "save frames of these videos as JPEG or PNG to use them",
    }
    found = {kind: [n for n in names if n.lower().endswith(kind)] for kind in advice}
    return [f"left out {', '.join(found[kind])}; {advice[kind]}" for kind in advice if found[kind]]


def nested_photos(entries: Sequence[Path]) -> str:
    """Count the photos in sub-folders: ``"12 photos in 10_sks, 3 photos in old"``."""
    folders = {path.name: path.rglob("*") for path in entries if path.is_dir()}
    counts = {n: sum(map(is_photo, islice(f, _MOST_SEARCHED))) for n, f in folders.items()}
    nested = [f"{counted(count, 'photo')} in {name}" for name, count in counts.items() if count]
    return ", ".join(nested[:5]) + (f", and {len(nested) - 5} more folders" if nested[5:] else "")


def photos_in(folder: Path) -> list[Path]:
    """A folder's photos, sorted by name; empty without a folder."""
    return sorted(filter(is_photo, folder.iterdir())) if folder.is_dir() else []


def is_photo(path: Path) -> bool:
    """Return whether a path is a file with the suffix of a photo, and not hidden."""
    name = path.name.lower()
    is_named = name.endswith(PHOTO_SUFFIXES) and not name.startswith(".")
    return is_named and not name.endswith(MASK_SUFFIX) and path.is_file()


def write_photo_record(folder: Path, photos: Iterable[Photo]) -> Path:
    """Write the digests of a run's training photos."""
    digests = sorted(photo.digest for photo in photos)
    return save_text(folder / PHOTO_RECORD, json.dumps({"digests": digests}) + "\n")


def read_photo_record(adapter: str | Path) -> frozenset[str] | None:
    """Read the digests of an adapter's training photos; None if they are unknown.

    Args:
        adapter: Folder of a run, one of its checkpoints, or an adapter file in either.
    """
    path = Path(adapter).expanduser().resolve()
    for folder in (path, path.parent, path.parent.parent):
        try:
            record = json.loads((folder / PHOTO_RECORD).read_text(encoding="utf-8"))
            return frozenset(map(str, record["digests"]))
        except (OSError, ValueError, TypeError, KeyError):
            continue
    return None
