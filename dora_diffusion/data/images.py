"""Reading of image files as upright RGB: formats, limits, EXIF, colour profiles, alpha.

Also measures the appearance of photos: blur, and fingerprints for near-duplicates.
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

# Larger photos are read at half of their width and height.
FULL_SIZE_PIXELS = 40_000_000
# Resizing a photo to cover a crop multiplies its pixels by up to its aspect ratio: without a limit,
# a file of 80 bytes could fill the memory.
MAX_ASPECT = 10
MIN_SIDE = 16
# EXIF orientation -> transpose that turns the image upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
# Exceptions of Pillow's decoders on damaged files; they differ between plugins.
DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, RuntimeError, MemoryError,
    OverflowError, struct.error, zlib.error,
)  # fmt: skip


# Cached contents of files, by path, modification time and size (see `reading_once`).
_CACHE: ContextVar[dict[tuple[Path, int, int], bytes] | None] = ContextVar("kept", default=None)
# Limit of the cache, larger than the photos of any usual subject.
_MOST_CACHED_BYTES = 2**28
# Limit of one file, which is read as a whole.
_MOST_BYTES = 2**29


class PhotoError(ValueError):
    """A photo cannot be used; the message has the file, the problem and the fix in one line."""


def open_photo(path: str | Path, *, limited: bool = True) -> Image.Image:
    """Open and fully decode a photo as RGB, upright, without metadata.

    EXIF orientation is applied and then dropped with all other metadata (GPS, device). Alpha is
    composited on white. Animations are reduced to their first frame. Above `FULL_SIZE_PIXELS`,
    sides are halved, rounding up.

    Args:
        path: A JPEG, PNG or WebP file; HEIC if pillow-heif is installed.
        limited: Refuse images above Pillow's limit of pixels or `MAX_ASPECT` before decoding;
            False: decode any image at full size.

    Raises:
        PhotoError: If the file has another format, is too large, too small or too narrow, or is
            damaged.
    """
    return decode_photo(Path(path), limited=limited).image


class DecodedPhoto(NamedTuple):
    """Decoded pixels of a photo, possibly at reduced size.

    Attributes:
        image: RGB, upright.
        alpha: Alpha channel ("L"), or None.
        size: Upright ``(height, width)`` of the file before reduction.
        data: Bytes of the file.
    """

    image: Image.Image
    alpha: Image.Image | None
    size: tuple[int, int]
    data: bytes


def decode_photo(path: Path, *, limited: bool = True) -> DecodedPhoto:
    """Open a photo as :func:`open_photo` does, with alpha channel, original size and bytes."""
    name, data = path.name, read_bytes(path)
    kind = sniff_format(data)
    if kind is None:
        raise PhotoError(
            f"{name}: not a JPEG, PNG, WebP or HEIC image, despite its name; convert it or remove "
            "it"
        )
    try:
        with _open_checked(name, kind, data, limited) as file:
            size = (file.height, file.width)
            if limited and file.width * file.height > FULL_SIZE_PIXELS:
                # A JPEG's decoder computes fewer pixels; for other formats it does nothing.
                file.draft(None, (file.width // 2, file.height // 2))
            file.load()
            image = _with_8_bits(file)
            orientation = _orientation(image)
            if orientation in _UPRIGHT:
                image = image.transpose(_UPRIGHT[orientation])
            if 5 <= orientation <= 8:  # rows become columns
                size = size[::-1]
            image, alpha = _split_alpha(_to_srgb(image))
            if limited and image.width * image.height > FULL_SIZE_PIXELS:
                image, alpha = image.reduce(2), alpha and alpha.reduce(2)
            return DecodedPhoto(image, alpha, size, data)
    except PhotoError:
        raise
    except DECODE_ERRORS as error:
        # Pillow's message only names its buffer; messages of other decoders have several lines.
        unreadable = isinstance(error, UnidentifiedImageError)
        cause = "its header cannot be read" if unreadable else " ".join(str(error).split())
        raise PhotoError(
            f"{name}: damaged or cut short ({cause}); copy the photo again or remove it"
        ) from error


def read_bytes(path: Path) -> bytes:
    """Read a file.

    Raises:
        PhotoError: If it cannot be read, is empty, larger than 512 MiB or not a file.
    """
    cache = _CACHE.get()
    try:
        status = path.stat()
        if status.st_size > _MOST_BYTES or not (path.is_file() or path.is_dir()):
            problem = f"larger than {_MOST_BYTES >> 20} MiB" if path.is_file() else "not a file"
            raise PhotoError(f"{path.name}: {problem}; remove or replace it")
        key = path.absolute(), status.st_mtime_ns, status.st_size
        if cache is not None and key in cache:
            return cache[key]
        data = path.read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise PhotoError(f"{path.name}: cannot be read ({reason}); remove or replace it") from error
    if not data:
        raise PhotoError(f"{path.name}: the file is empty; copy the photo again")
    if cache is not None and len(data) + sum(map(len, cache.values())) <= _MOST_CACHED_BYTES:
        cache[key] = data
    return data


@contextlib.contextmanager
def reading_once() -> Iterator[None]:
    """Read each unchanged file at most once within the block.

    Different parts of the program list, split, check and crop photos. The contents of their files
    are cached up to 256 MiB; further files are read on each access.
    """
    token = _CACHE.set({})
    try:
        yield
    finally:
        _CACHE.reset(token)


def digest_of(data: bytes) -> str:
    """Return the first 32 hex digits of the SHA-256 of a file's content."""
    return hashlib.sha256(data).hexdigest()[:32]


def sniff_format(data: bytes) -> str | None:
    """Detect "JPEG", "PNG", "WEBP" or "HEIF" by the first bytes; None for other formats."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    heif_brands = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
    return "HEIF" if data[4:8] == b"ftyp" and data[8:12] in heif_brands else None


def _open_checked(name: str, kind: str, data: bytes, limited: bool) -> ImageFile:
    """Read only the header, and refuse images that are too large, too small or too narrow."""
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
        warnings.simplefilter("ignore")  # Damaged EXIF blocks do not matter.
        try:
            # `Image.open` would refuse a large image without advice.
            image = Image.OPEN[kind][0](io.BytesIO(data), "")
        except SyntaxError as error:
            raise UnidentifiedImageError from error
    width, height = image.size
    subject = f"{name}: {width} x {height} is"
    if min(width, height) < MIN_SIDE:
        raise PhotoError(f"{subject} smaller than {MIN_SIDE} pixels; use a larger photo")
    pixels, most = width * height, Image.MAX_IMAGE_PIXELS
    if limited and most and pixels > most:
        side = int((most / pixels) ** 0.5 * max(width, height)) // 100 * 100
        raise PhotoError(
            f"{subject} {pixels / 1e6:.1f} megapixels, above the limit of {most / 1e6:.1f}; scale "
            f"its longer side to {side} pixels or fewer"
        )
    if limited and max(width, height) > MAX_ASPECT * min(width, height):
        raise PhotoError(
            f"{subject} a strip, more than {MAX_ASPECT:g} times as long as wide; crop it"
        )
    return image


def _with_8_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits; Pillow would clip it."""
    if not image.mode.startswith("I"):
        return image
    return image.convert("I").point(lambda value: value / 257).convert("L")


def _orientation(image: Image.Image) -> int:
    """EXIF orientation; 1 (upright) if it is missing or the EXIF block is damaged."""
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
    """Composite an image on white, and return its alpha channel or None; without metadata."""
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    image = image.convert("RGB")
    for part in (image, alpha):
        if part is not None:
            part.info = {}  # Drop EXIF, GPS and profile.
    return image, alpha


@dataclass(frozen=True)
class Appearance:
    """Blur (see `blur`) and 64-bit fingerprint (see `fingerprint`) of a photo."""

    blur: float
    fingerprint: int


def appearance_of(image: Image.Image) -> Appearance:
    grey = image.convert("L")
    return Appearance(blur(grey), fingerprint(grey))


def blur(image: Image.Image, side: int = 512) -> float:
    """Measure the blur of a grey image, from 0 (sharp) to 1: Crete et al. 2007, "The Blur Effect".

    Compares the image with a blurred copy: a sharp image changes more than a blurred one. Returns
    the larger value of both directions.

    Args:
        image: A grey image ("L").
        side: The image is resized to this shorter side, so that values are comparable.
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
    if total == 0:  # A flat image has no edges.
        return 0.0
    lost = (change - smooth.diff(dim=1).abs()).clamp(min=0)
    return float((total - lost.sum()) / total)


def fingerprint(image: Image.Image) -> int:
    """Difference hash of a grey image: 64 signs of horizontal differences, at 9 x 8 pixels.

    Resizing, re-encoding and changes of brightness hardly change it.
    """
    small = image.resize((9, 8), Image.Resampling.LANCZOS).tobytes()
    rises = [small[9 * y + x + 1] > small[9 * y + x] for y in range(8) for x in range(8)]
    return sum(rise << position for position, rise in enumerate(rises))
