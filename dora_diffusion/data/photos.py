"""Photos of a folder: each is opened, turned upright, checked and digested here, in one pass."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

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
WEIGHT_SUFFIX = ".weight"
# What lies beside a photo, of its name.
COMPANIONS = (".txt", MASK_SUFFIX, WEIGHT_SUFFIX)
# What other programs read captions from.
_OTHER_CAPTIONS = (".caption",)
# Images that are not read; whoever has them beside photos wants to know.
OTHER_SUFFIXES = (".avif", ".bmp", ".dng", ".gif", ".jp2", ".jxl", ".tif", ".tiff")
# Files of a sub-folder that are looked at for photos that are not read.
_LOOKED_THROUGH = 5000


@dataclass(frozen=True)
class Photo:
    """A photo of the subject, or a class image, that can be used: every later room takes these.

    Attributes:
        path: The file.
        digest: Of the file's bytes. Draws and caches know the photo by it, whatever its name is.
        size: Upright ``(height, width)`` of the file, however few of its pixels are decoded.
        caption: The text beside it, else the prompt.
        mask_path: Its mask's file, or its own where its alpha channel is the mask; None without
            one, or where masks are not used.
        mask_digest: Of the mask file's bytes; empty without one.
        appearance: How sharp it is and what it looks like; None where that was not measured.
        has_transparency: Whether its alpha channel hides anything, which became white.
        weight: Factor of its loss.
    """

    path: Path
    digest: str
    size: tuple[int, int]
    caption: str
    mask_path: Path | None = None
    mask_digest: str = ""
    appearance: Appearance | None = None
    has_transparency: bool = False
    weight: float = 1.0

    def record(self) -> dict[str, str]:
        """Return the photo's record for checkpoints, so that no run is resumed on other photos."""
        known = {"name": self.path.name, "image": self.digest, "caption": self.caption}
        weight = {} if self.weight == 1 else {"weight": f"{self.weight:g}"}
        return {**known, "mask": self.mask_digest, **weight}


MaskCrops = Callable[[Photo], Iterable[CropRecord]]
"""Photo -> crops that it will be trained on, or some of them."""


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
        prompt: Its caption where it has no caption file.
        mask_crops: Use its mask, which must be bright somewhere in these crops of the photo.
        measure: Measure its appearance too.
        per_line: Keep the lines of its caption apart.

    Raises:
        PhotoError: If it cannot be used; a `MaskError` if its mask cannot.
    """
    decoded = decode_photo(path)
    alpha = decoded.alpha
    photo = Photo(
        path,
        digest_of(decoded.data),
        decoded.size,
        read_caption(path, prompt, per_line=per_line),
        has_transparency=alpha is not None and alpha.getextrema() != (255, 255),
        weight=_read_weight(path.with_suffix(WEIGHT_SUFFIX)),
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
        skip_unreadable: Leave bad photos out with a warning each, instead of failing. A bad mask
            fails all the same: without it, the whole photo would be learned.
        mask_crops: Use masks, of which there must be one at least.
        measure: Measure the photos' appearance, for `check_photos`.
        per_line: Keep the lines of captions apart.

    Raises:
        PhotoError: If a photo or mask is bad (all reasons in one line), or none is left.
    """
    photos: list[Photo] = []
    errors: list[PhotoError] = []
    for path in paths:
        try:
            photos.append(
                read_photo(path, prompt, mask_crops=mask_crops, measure=measure, per_line=per_line)
            )
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


def _read_weight(path: Path) -> float:
    """The factor of a photo's loss in the file beside it; 1 where there is none."""
    try:
        weight = float(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return 1.0
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise PhotoError(f"{path.name}: the weight must be one number greater than 0, such as 0.5")
    return weight


def mask_path(photo: Path) -> Path:
    """Return the path of an image's mask: ``NAME.mask.png``."""
    return photo.with_name(photo.stem + MASK_SUFFIX)


def _find_mask(photo: Photo, decoded: DecodedPhoto, crops: MaskCrops) -> Photo:
    """A photo with its mask: the file beside it, else its alpha channel where that hides anything.

    An alpha channel beside a mask file is not a mask: what it hides is white, and learned where the
    mask is bright.

    Raises:
        MaskError: If the file cannot be used, is not of the photo's size, or the mask is black
            wherever it is looked at.
    """
    path, mask = mask_path(photo.path), decoded.alpha
    if path.is_file() or path.is_symlink():
        try:
            file = decode_photo(path)
        except PhotoError as error:
            raise MaskError(str(error)) from error
        # Of a photo that is decoded at less than its size, it may have either of both sizes.
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
            f"{where} is black in every crop that is trained on, so nothing of {name} would be "
            "learned; make bright what to learn, or remove it"
        )
    return photo


def open_mask(photo: Photo) -> Image.Image | None:
    """The mask ("L") that a photo was read with; None where it was read without one."""
    if photo.mask_path is None:
        return None
    if photo.mask_path == photo.path:
        return decode_photo(photo.path).alpha
    return open_photo(photo.mask_path).convert("L")


def _require_masks(photos: Sequence[Photo]) -> None:
    """Refuse photos of which none has a mask.

    Raises:
        PhotoError: If none has.

    Warns:
        UserWarning: Of photos without a mask beside others that have one, and of alpha channels
            that are masks beside mask files.
    """
    bare = [photo.path.name for photo in photos if photo.mask_path is None]
    if photos and len(bare) == len(photos):
        first = photos[0].path
        raise PhotoError(
            f"masks are to be used, but none of the {counted(len(photos), 'image')} has a mask: "
            f"the mask of {first.name} is {mask_path(first).name} beside it, of the same size and "
            "bright where to learn; or give images with an alpha channel"
        )
    if bare:
        warnings.warn(
            f"{counted(len(bare), 'image')} of {len(photos)} without a mask, whose whole area is "
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


def list_photos(
    folder: str | Path, *, warn_of_nested: bool = True, setting: str = ""
) -> list[Path]:
    """List a folder's photos by file extension, sorted by name.

    Hidden files, sub-folders, captions (``.txt``) and masks (``.mask.png``) are left out.

    Args:
        folder: The folder.
        warn_of_nested: Warn of photos in sub-folders.
        setting: The flag that gives the folder, for the error.

    Raises:
        PhotoError: If the folder is missing or holds no photo.

    Warns:
        UserWarning: Of images in formats that are not read, of links to photos that are not
            there, of captions, masks and weights without a photo, and of captions that other
            programs read, by name; of sub-folders with photos.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        folder = folder.absolute()
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        near = closest(folder.name, (p.name for p in folder.parent.glob("*") if p.is_dir()))
        hint = f" (did you mean {near!r}?)" if near else ""
        flag = f" with --{setting}" if setting else ""
        raise PhotoError(f"{folder}: the photo folder {what}{hint}; give a folder of photos{flag}")
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    photos, nested = [*filter(is_photo, entries)], nested_photos(entries)
    named = [path for path in entries if path.name.lower().endswith(PHOTO_SUFFIXES)]
    broken = [path.name for path in named if path.is_symlink() and not path.exists()]
    lost = f"links to files that are not there ({listing(broken, 5)})" if broken else ""
    if not photos:
        instead = nested or lost or ", ".join(path.name for path in entries[:5]) or "nothing"
        raise PhotoError(
            f"{folder}: no photos in this folder (looked for {', '.join(PHOTO_SUFFIXES)}; "
            f"found {instead}); sub-folders are not searched"
        )
    stems = {photo.stem for photo in photos}
    lonely = [
        path.name
        for path in entries
        for suffix in COMPANIONS
        if path.name.endswith(suffix) and path.name.removesuffix(suffix) not in stems
    ]
    unread = [path.name for path in entries if path.name.lower().endswith(_OTHER_CAPTIONS)]
    others = [path.name for path in entries if path.name.lower().endswith(OTHER_SUFFIXES)]
    for is_so, said in (
        (nested and warn_of_nested,
         f"left out {nested}; sub-folders are not read, move the photos up to use them"),
        (lost, f"left out {lost}; copy the photos themselves"),
        (lonely, f"without effect, no photo has their name: {listing(lonely, 5)}"),
        (unread, f"without effect: {listing(unread, 5)}; rename them to .txt to use them as "
         "captions"),
        (others, f"left out {', '.join(others)}; convert them to JPEG or PNG to use them"),
    ):  # fmt: skip
        if is_so:
            warnings.warn(f"{folder}: {said}", stacklevel=2)
    return photos


def nested_photos(entries: Sequence[Path]) -> str:
    """Count the photos in sub-folders: ``"12 photos in 10_sks, 3 photos in old"``."""
    folders = {path.name: path.rglob("*") for path in entries if path.is_dir()}
    counts = {n: sum(map(is_photo, islice(f, _LOOKED_THROUGH))) for n, f in folders.items()}
    nested = [f"{counted(count, 'photo')} in {name}" for name, count in counts.items() if count]
    return ", ".join(nested[:5]) + (f", and {len(nested) - 5} more folders" if nested[5:] else "")


def photos_in(folder: Path) -> list[Path]:
    """A folder's photos by name; none where there is no folder."""
    return sorted(filter(is_photo, folder.iterdir())) if folder.is_dir() else []


def is_photo(path: Path) -> bool:
    """Return whether a path is a file that is named like a photo, and not hidden."""
    name = path.name.lower()
    is_named = name.endswith(PHOTO_SUFFIXES) and not name.startswith(".")
    return is_named and not name.endswith(MASK_SUFFIX) and path.is_file()


def write_photo_record(folder: Path, photos: Iterable[Photo]) -> Path:
    """Write the digests of the photos that a run trains on."""
    digests = sorted(photo.digest for photo in photos)
    return save_text(folder / PHOTO_RECORD, json.dumps({"digests": digests}) + "\n")


def read_photo_record(adapter: str | Path) -> frozenset[str] | None:
    """The digests of the photos that an adapter was trained on, None if they are not known.

    Args:
        adapter: A run's folder, one of its checkpoints, or an adapter file in either.
    """
    path = Path(adapter).expanduser().resolve()
    for folder in (path, path.parent, path.parent.parent):
        try:
            record = json.loads((folder / PHOTO_RECORD).read_text(encoding="utf-8"))
            return frozenset(map(str, record["digests"]))
        except (OSError, ValueError, TypeError, KeyError):
            continue
    return None
