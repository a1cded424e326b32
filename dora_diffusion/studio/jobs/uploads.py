"""Photos: checking and re-encoding of uploads; crops and masks, and undoing them."""

from __future__ import annotations

import base64
import binascii
import io
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.Image import DecompressionBombError

from dora_diffusion import system
from dora_diffusion.data import images
from dora_diffusion.data.photos import mask_path
from dora_diffusion.studio.jobs.queue import holding
from dora_diffusion.studio.jobs.store import UserError

MAX_BYTES = 100 * 2**20
MAX_PHOTOS = 50
JPEG_QUALITY = 95
# Formats in which images contain generation parameters.
_STATING = ("PNG", "JPEG", "WEBP")


@dataclass(frozen=True)
class Upload:
    """Result of uploading files.

    Attributes:
        accepted: The stored photos, in order.
        refused: A plain line for each refused file.
        names: Name of each photo -> name of the uploaded file without its suffix.
        captions: Names of the photos that were uploaded with captions.
    """

    accepted: tuple[Path, ...]
    refused: tuple[str, ...]
    names: Mapping[str, str] = field(default_factory=dict)
    captions: tuple[str, ...] = ()


def store_photos(files: Sequence[str | Path], folder: Path) -> Upload:
    """Decode uploaded files and re-encode them as ``001.jpg``, ``002.png``, ...

    Only pixels are kept. The orientation is applied; EXIF with its GPS position, colour profiles,
    comments and appended data are dropped. The uploaded files are not changed. Uploads to one
    subject take turns, even from different tabs or apps.

    Args:
        files: Paths of uploaded files.
        folder: Folder of the subject's photos.

    Raises:
        UserError: If the subject would have too many photos.
    """
    with holding(folder.with_name(".upload.lock"), or_wait=lambda: True):
        return _store_all([Path(file) for file in files], folder)


def _store_all(files: Sequence[Path], folder: Path) -> Upload:
    masks = len(list(folder.glob("*.mask.png")))
    present = len([*folder.glob("*.jpg"), *folder.glob("*.png")]) - masks
    if present + len(files) > MAX_PHOTOS:
        raise UserError(
            f"{len(files)} files were chosen and {present} photos are there; "
            f"a subject can have at most {MAX_PHOTOS}"
        )
    accepted: dict[Path, str] = {}
    refused: list[str] = []
    for file in files:
        try:
            accepted[_store(file, folder)] = file.stem
        except (UserError, images.PhotoError) as error:
            refused.append(shown(str(error)))
    names = {path.name: stem for path, stem in accepted.items()}
    return Upload(tuple(accepted), tuple(refused), names)


def shown(text: str, limit: int = 300) -> str:
    """Return untrusted text, such as a file name, in printable characters and truncated."""
    return "".join(c if c.isprintable() else "?" for c in text)[:limit]


def require_file(file: Path) -> None:
    """Check that a path is a regular file of at most `MAX_BYTES`.

    Raises:
        UserError: If it is not.
    """
    if file.is_symlink() or not file.is_file():
        raise UserError(f"{shown(file.name)}: not an ordinary file")
    if (size := file.stat().st_size) > MAX_BYTES:
        raise UserError(
            f"{shown(file.name)}: {size / 2**20:.1f} MB is above the limit of {MAX_BYTES // 2**20} "
            "MB; save a smaller copy"
        )


def _store(file: Path, folder: Path) -> Path:
    require_file(file)
    image, alpha, *_ = images.decode_photo(file)
    name, suffix = f"{next_number(folder):03d}", ".jpg"
    temporary = folder / f".{name}.part"
    if alpha is None:
        image.save(temporary, format="JPEG", quality=JPEG_QUALITY)
    else:
        suffix = ".png"
        image.putalpha(alpha)
        image.save(temporary, format="PNG")
    system.replace(temporary, folder / f"{name}{suffix}")
    return folder / f"{name}{suffix}"


def next_number(folder: Path) -> int:
    """Return a number that no photo of the folder has."""
    numbers = [int(path.stem[:3]) for path in folder.iterdir() if path.stem[:3].isdigit()]
    return max(numbers, default=0) + 1


def read_generation_settings(file: Path) -> str:
    """Read the generation parameters of an uploaded image.

    Raises:
        UserError: If the file is not an image of this app, A1111 or ComfyUI.
    """
    from dora_diffusion.sampling.images import read_parameters

    require_file(file)
    # The checks of photos do not apply: a grid may be a strip. Only the header is read.
    if images.sniff_format(file.read_bytes()) not in _STATING:
        raise UserError(
            "this file cannot be read as a PNG, JPEG or WebP image, whatever its name says"
        )
    try:
        text = read_parameters(file)
    except (*images.DECODE_ERRORS, DecompressionBombError) as error:
        raise UserError("this image cannot be read; it is damaged or too large") from error
    if not text:
        raise UserError("this image does not say how it was made (it has no parameters text)")
    return text[:20_000]


def original_of(photo: Path) -> Path:
    """Return the path of the copy of a photo from before its first crop."""
    return photo.parent.parent / "originals" / photo.name


EDITOR_SIDE = 768
SMALLEST_CROP = 32
_PNG = "data:image/png;base64,"


def edit_photo(photo: Path, crop: Sequence[float] | None, mask: Image.Image | None) -> None:
    """Save a crop and a painted mask; the photo before its first crop is kept.

    Args:
        photo: The photo.
        crop: Left, top, right and bottom as fractions of the photo; None for no crop.
        mask: Mask of the whole photo ("L", any size), bright on the subject; None keeps the mask.

    Raises:
        UserError: If the crop is invalid, or too small or too thin for training.
    """
    whole, alpha, *_ = images.decode_photo(photo)
    box = _pixels(crop, whole.size) if crop is not None else (0, 0, *whole.size)
    if box != (0, 0, *whole.size):
        if not original_of(photo).exists():
            original_of(photo).parent.mkdir(exist_ok=True)
            shutil.copyfile(photo, original_of(photo))
        if alpha is not None and photo.suffix != ".jpg":  # JPEG has none
            whole.putalpha(alpha)
        kind: dict[str, Any] = {"quality": JPEG_QUALITY} if photo.suffix == ".jpg" else {}
        whole.crop(box).save(photo, **kind)
        mask_path(photo).unlink(missing_ok=True)
    if mask is not None and mask.getbbox():
        painted = mask.resize(whole.size).crop(box)
        painted.point(lambda value: 255 if value > 32 else 0).save(mask_path(photo))


def _pixels(crop: Sequence[float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Convert fractions of a photo to pixels."""
    numbers = [value for value in crop if isinstance(value, (int, float)) and 0 <= value <= 1]
    if len(numbers) != 4 or len(crop) != 4:
        raise UserError("this is not a crop; draw a rectangle inside of the photo")
    left, top, right, bottom = (
        round(value * side) for value, side in zip(numbers, (*size, *size), strict=True)
    )
    if right - left < SMALLEST_CROP or bottom - top < SMALLEST_CROP:
        raise UserError(f"the crop is smaller than {SMALLEST_CROP} pixels; draw a larger rectangle")
    if max(right - left, bottom - top) > images.MAX_ASPECT * min(right - left, bottom - top):
        raise UserError("the crop is a strip; draw a rectangle that is nearer to a square")
    return left, top, right, bottom


def read_mask(address: object) -> Image.Image | None:
    """Decode the painted area ("L") of a PNG data URI; None if the URI is empty.

    Raises:
        UserError: If it is not a PNG, or too large.
    """
    if not address:
        return None
    try:
        if not isinstance(address, str) or len(address) > 4 * 2**20:
            raise ValueError
        content = base64.b64decode(address.removeprefix(_PNG), validate=True)
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            if max(image.size) > 2 * EDITOR_SIDE:
                raise ValueError
            return image.convert("RGBA").getchannel("A")
    except (ValueError, OSError, SyntaxError, binascii.Error) as error:
        raise UserError("the mask could not be read; paint it again") from error


def data_uri(image: Image.Image) -> str:
    """Encode an image of at most `EDITOR_SIDE` as a data URI: JPEG, or PNG with transparency."""
    buffer, kind = io.BytesIO(), "png" if image.mode == "RGBA" else "jpeg"
    image.thumbnail((EDITOR_SIDE, EDITOR_SIDE))
    image.save(buffer, format=kind, quality=88)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def mask_uri(mask: Image.Image) -> str:
    """Encode a mask ("L") as a PNG data URI for `read_mask`, painted in its bright areas."""
    buffer = io.BytesIO()
    mask.thumbnail((EDITOR_SIDE, EDITOR_SIDE))
    paint = Image.new("RGBA", mask.size, "#e35d2b")
    paint.putalpha(mask)
    paint.save(buffer, format="PNG")
    return _PNG + base64.b64encode(buffer.getvalue()).decode("ascii")


def restore_original(photo: Path) -> None:
    """Undo the crop and the mask of a photo."""
    mask_path(photo).unlink(missing_ok=True)
    if original_of(photo).exists():
        system.replace(original_of(photo), photo)
