"""Image files of any origin to upright RGB: formats, limits, EXIF, colour profiles, alpha.

And what photos look like, in two numbers: how blurred one is, and which look the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageCms, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from torch import Tensor

from dora_diffusion.data.decoding import (
    FULL_SIZE_MEGAPIXELS,
    MAX_MEGAPIXELS,
    decode,
    megapixel_limit,
)

# Resizing a photo until it covers a crop multiplies its pixels by at most its aspect ratio: without
# a limit, a file of 80 bytes would fill the memory.
MAX_ASPECT = 10
MIN_SIDE = 16
# What turns an image upright, by its EXIF orientation.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
# What Pillow's decoders raise on damaged files: each plugin has its own idea.
DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, RuntimeError, MemoryError,
    OverflowError, struct.error, zlib.error,
)  # fmt: skip


# Contents of files, by path, time of change and size, where they are kept (see `reading_once`).
_KEPT: ContextVar[dict[tuple[Path, int, int], bytes] | None] = ContextVar("kept", default=None)
# In all: more than any photos that a subject should have.
_MOST_KEPT_BYTES = 2**28
# Of one file, which is read whole.
_MOST_BYTES = 2**29


class PhotoError(ValueError):
    """A photo cannot be used; one line with the file, what is wrong and what to do."""


def open_photo(path: str | Path, *, limited: bool = True) -> Image.Image:
    """Open and fully decode a photo as RGB, upright, without metadata.

    EXIF orientation is applied and then dropped with all other metadata (GPS, device). Alpha is
    composited on white. Of an animation, the first frame is taken. Above `FULL_SIZE_MEGAPIXELS`
    its sides are divided by 2 or 4, rounding up.

    Args:
        path: A JPEG, PNG or WebP file; HEIC where pillow-heif is installed.
        limited: Refuse what is larger than `megapixel_limit` or longer than `MAX_ASPECT`, before
            any pixel is decoded; else decode it at its own size.

    Raises:
        PhotoError: If it is not such a file, is too large, too small or too thin, or is damaged.
    """
    return decode_photo(Path(path), limited=limited).image


class DecodedPhoto(NamedTuple):
    """A photo's pixels, perhaps fewer than it has.

    Attributes:
        image: RGB, upright.
        alpha: Its alpha channel ("L"), or None.
        size: Upright ``(height, width)`` of the file, whatever the image was reduced to.
        data: The file's bytes.
    """

    image: Image.Image
    alpha: Image.Image | None
    size: tuple[int, int]
    data: bytes


def decode_photo(path: Path, *, limited: bool = True) -> DecodedPhoto:
    """Open a photo as :func:`open_photo` does, with what else its file tells."""
    name, data = path.name, read_bytes(path)
    kind = sniff_format(data)
    if kind is None:
        raise PhotoError(
            f"{name}: not a JPEG, PNG, WebP or HEIC image, whatever its name says; "
            "convert it or remove it"
        )
    try:
        with _open_checked(name, kind, data, limited) as file:
            size = (file.height, file.width)
            image = decode(file, kind, data, at_full_size=not limited)
            orientation = _orientation(image)
            if orientation in _TURNS:
                image = image.transpose(_TURNS[orientation])
            if 5 <= orientation <= 8:  # its rows become columns
                size = size[::-1]
            return DecodedPhoto(*_split_alpha(_to_srgb(image)), size, data)
    except PhotoError:
        raise
    except DECODE_ERRORS as error:
        # Pillow names its buffer here, which helps nobody; other decoders write several lines.
        unreadable = isinstance(error, UnidentifiedImageError)
        cause = "its header cannot be read" if unreadable else " ".join(str(error).split())
        raise PhotoError(
            f"{name}: damaged or cut short ({cause}); copy the photo again or remove it"
        ) from error


def read_bytes(path: Path) -> bytes:
    """Read a file.

    Raises:
        PhotoError: If that fails, or it is empty, larger than 512 MiB or no file.
    """
    kept = _KEPT.get()
    try:
        now = path.stat()
        if now.st_size > _MOST_BYTES or not (path.is_file() or path.is_dir()):
            what = f"larger than {_MOST_BYTES >> 20} MiB" if path.is_file() else "not a file"
            raise PhotoError(f"{path.name}: {what}; remove or replace it")
        if kept is None:
            data = path.read_bytes()
        else:
            key = path.absolute(), now.st_mtime_ns, now.st_size
            if key in kept:
                return kept[key]
            data = path.read_bytes()
            if data and len(data) + sum(map(len, kept.values())) <= _MOST_KEPT_BYTES:
                kept[key] = data
    except OSError as error:
        reason = error.strerror or error
        raise PhotoError(f"{path.name}: cannot be read ({reason}); remove or replace it") from error
    if not data:
        raise PhotoError(f"{path.name}: the file is empty; copy the photo again")
    return data


@contextlib.contextmanager
def reading_once() -> Iterator[None]:
    """Open each file at most once inside of the block, as long as it does not change.

    Photos are listed, divided, checked and cropped by different rooms. What they read is kept up to
    256 MiB; a file beyond that is opened whenever it is asked for.
    """
    token = _KEPT.set({})
    try:
        yield
    finally:
        _KEPT.reset(token)


def digest_of(data: bytes) -> str:
    """Return the digest of a file's content: 32 hex digits of its SHA-256."""
    return hashlib.sha256(data).hexdigest()[:32]


def sniff_format(data: bytes) -> str | None:
    """Detect "JPEG", "PNG", "WEBP" or "HEIF" by a file's first bytes; None for anything else."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    heif_brands = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
    return "HEIF" if data[4:8] == b"ftyp" and data[8:12] in heif_brands else None


def _open_checked(name: str, kind: str, data: bytes, limited: bool) -> ImageFile:
    """Read the header only, and refuse what is too large, too small or too thin."""
    if kind == "HEIF":
        try:
            import pillow_heif
        except ImportError as error:
            raise PhotoError(
                f"{name}: HEIC photos need the pillow-heif package; install it "
                "(pip install pillow-heif) or convert the photo to JPEG"
            ) from error
        pillow_heif.register_heif_opener()
    Image.init()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of damaged EXIF blocks, which do not matter
        try:
            # Not by `Image.open`, which has a limit of its own for what is decoded as a whole.
            image = Image.OPEN[kind][0](io.BytesIO(data), "")
        except SyntaxError as error:
            raise UnidentifiedImageError from error
    width, height = image.size
    shown = f"{name}: {width} x {height} is"
    if min(width, height) < MIN_SIDE:
        raise PhotoError(f"{shown} smaller than {MIN_SIDE} pixels; use a larger photo")
    megapixels = width * height / 1e6
    if limited and megapixels > FULL_SIZE_MEGAPIXELS:
        most, which = MAX_MEGAPIXELS, ""
        if megapixels <= MAX_MEGAPIXELS:
            most, which = megapixel_limit(kind, data)
        if megapixels > most:
            other = ", or an ordinary JPEG" if which else ""
            raise PhotoError(
                f"{shown} {megapixels:.1f} megapixels, above the limit of {most:g}{which}; save a "
                f"smaller copy{other}"
            )
    if limited and max(width, height) > MAX_ASPECT * min(width, height):
        raise PhotoError(
            f"{shown} a strip, more than {MAX_ASPECT:g} times as long as wide; crop it"
        )
    return image


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) where there is none or the EXIF block is damaged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return int(image.getexif().get(0x0112, 1))
        except (*DECODE_ERRORS, TypeError):
            return 1


def _to_srgb(image: Image.Image) -> Image.Image:
    """Convert from an embedded wide-gamut profile (phones write Display P3) to sRGB.

    A damaged profile is ignored, as viewers do.
    """
    profile_bytes = image.info.get("icc_profile")
    if not profile_bytes or image.mode not in ("RGB", "CMYK"):
        return image
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(profile_bytes))
        if "srgb" in ImageCms.getProfileDescription(profile).lower():
            return image
        srgb = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, profile, srgb, outputMode="RGB") or image
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """RGB over white, and the alpha channel where the image has one; no metadata on either."""
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    image = image.convert("RGB")
    for part in (image, alpha):
        if part is not None:
            part.info = {}  # pixels and nothing else: no EXIF, no GPS, no profile
    return image, alpha


@dataclass(frozen=True)
class Appearance:
    """Blur of a photo (see `blur`), and a 64-bit fingerprint of its content (see `fingerprint`)."""

    blur: float
    fingerprint: int


def appearance_of(image: Image.Image) -> Appearance:
    grey = image.convert("L")
    return Appearance(blur(grey), fingerprint(grey))


def blur(image: Image.Image, side: int = 512) -> float:
    """Measure the blur of a grey image, from 0 (sharp) to 1: Crete et al. 2007, "The Blur Effect".

    Blurring a sharp image changes it much, a blurred one little. The worse direction counts.

    Args:
        image: A grey image ("L").
        side: The image is brought to this shorter side first, so that sizes compare.
    """
    scale = side / min(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    pixels = bytearray(image.resize(size, Image.Resampling.LANCZOS).tobytes())
    grey = torch.frombuffer(pixels, dtype=torch.uint8).view(size[1], size[0]).float()
    return max(_blur_along_rows(grey), _blur_along_rows(grey.T.contiguous()))


def _blur_along_rows(grey: Tensor) -> float:
    smooth = torch.nn.functional.avg_pool1d(
        grey.unsqueeze(1), 9, stride=1, padding=4, count_include_pad=False
    ).squeeze(1)
    change = grey.diff(dim=1).abs()
    total = change.sum()
    if total == 0:  # a flat image has no edge that could be sharp
        return 0.0
    lost = (change - smooth.diff(dim=1).abs()).clamp(min=0)
    return float((total - lost.sum()) / total)


def fingerprint(image: Image.Image) -> int:
    """64 bits of a grey image: whether brightness rises from pixel to pixel, at 9 x 8 pixels.

    They hardly change under resizing, re-encoding and brightness.
    """
    small = image.resize((9, 8), Image.Resampling.LANCZOS).tobytes()
    rises = [small[9 * y + x + 1] > small[9 * y + x] for y in range(8) for x in range(8)]
    return sum(rise << place for place, rise in enumerate(rises))
