"""Photos on disk to cropped pixels: opening with limits, EXIF, alpha, and the crop's record."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dora_diffusion.data.crops import CropRecord, apply_crop, crop_photo, plan_crop
from dora_diffusion.wording import counted

if TYPE_CHECKING:
    from PIL import Image as PILImage

__all__ = [
    "CropRecord",
    "PhotoError",
    "PhotoInfo",
    "apply_crop",
    "crop_photo",
    "has_alpha_mask",
    "list_photos",
    "open_photo",
    "open_photo_with_alpha",
    "photo_size",
    "plan_crop",
    "verify_photo",
]

MAX_MEGAPIXELS = 40.0
# Resizing a photo until it covers a crop multiplies its pixels by at most its aspect ratio: without
# a limit, a file of 80 bytes would fill the memory.
MAX_ASPECT = 10
MIN_SIDE = 16
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".heic", ".heif")
# Images that are not read; whoever has them beside photos wants to know.
OTHER_SUFFIXES = (".avif", ".bmp", ".dng", ".gif", ".jp2", ".jxl", ".tif", ".tiff")
MASK_SUFFIX = ".mask.png"
# Files of a sub-folder that are looked at for photos that are not read.
_LOOKED_THROUGH = 5000
# What Pillow's decoders raise on damaged files: each plugin has its own idea.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    RuntimeError,
    MemoryError,
    OverflowError,
    struct.error,
    zlib.error,
)


class PhotoError(ValueError):
    """A photo cannot be used; one line with the file, what is wrong and what to do."""


def list_photos(folder: str | Path, *, say_nested: bool = True) -> list[Path]:
    """List a folder's photos by file extension, sorted by name.

    Hidden files, sub-folders, captions (``.txt``) and masks (``.mask.png``) are left out.

    Args:
        folder: The folder.
        say_nested: Warn of photos in sub-folders.

    Raises:
        PhotoError: If the folder is missing or holds no photo.

    Warns:
        UserWarning: Of images in formats that are not read, by name; of sub-folders with photos.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise PhotoError(f"{folder}: the photo folder {what}; give a folder of photos")
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    photos = [path for path in entries if is_photo(path)]
    nested = _nested_photos(entries)
    if not photos:
        found = nested or ", ".join(path.name for path in entries[:5]) or "nothing"
        raise PhotoError(
            f"{folder}: no photos in this folder (looked for {', '.join(PHOTO_SUFFIXES)}; "
            f"found {found}); sub-folders are not searched"
        )
    if nested and say_nested:
        warnings.warn(
            f"{folder}: left out {nested}; sub-folders are not read, move the photos up to use "
            "them",
            stacklevel=2,
        )
    others = [path.name for path in entries if path.name.lower().endswith(OTHER_SUFFIXES)]
    if others:
        warnings.warn(
            f"{folder}: left out {', '.join(others)}; convert them to JPEG or PNG to use them",
            stacklevel=2,
        )
    return photos


def _nested_photos(entries: Sequence[Path]) -> str:
    """How many photos lie in which sub-folders: ``"12 photos in 10_sks, 3 photos in old"``."""
    counts = {path.name: _count_photos(path) for path in entries if path.is_dir()}
    found = [f"{counted(count, 'photo')} in {name}" for name, count in counts.items() if count]
    return ", ".join(found[:5]) + (f", and {len(found) - 5} more folders" if found[5:] else "")


def _count_photos(folder: Path) -> int:
    """Photos in a folder and below, of its first thousands of files."""
    files = itertools.islice(folder.rglob("*"), _LOOKED_THROUGH)
    return sum(is_photo(path) for path in files)


def is_photo(path: Path) -> bool:
    """Whether a path is a file that is named like a photo."""
    name = path.name.lower()
    return name.endswith(PHOTO_SUFFIXES) and not name.endswith(MASK_SUFFIX) and path.is_file()


def open_photo(
    path: str | Path,
    *,
    max_megapixels: float = MAX_MEGAPIXELS,
    max_aspect: float = MAX_ASPECT,
) -> PILImage.Image:
    """Open and fully decode a photo as RGB, upright, without metadata.

    EXIF orientation is applied and then dropped with all other metadata (GPS, device). Alpha is
    composited on white. Of an animation, the first frame is taken.

    Args:
        path: A JPEG, PNG or WebP file; HEIC where pillow-heif is installed.
        max_megapixels: Refused above this size, before any pixel is decoded.
        max_aspect: Refused if it is more times as long as it is wide.

    Raises:
        PhotoError: If it is not such a file, is too large, too small or too thin, or is damaged.
    """
    limits = {"max_megapixels": max_megapixels, "max_aspect": max_aspect}
    return open_photo_with_alpha(path, **limits)[0]


def open_photo_with_alpha(
    path: str | Path,
    *,
    max_megapixels: float = MAX_MEGAPIXELS,
    max_aspect: float = MAX_ASPECT,
) -> tuple[PILImage.Image, PILImage.Image | None]:
    """Open a photo as :func:`open_photo` does, with its alpha channel ("L") or None beside it."""
    path = Path(path)
    data = read_bytes(path)
    with _reasons(path), _open_checked(path, data, max_megapixels, max_aspect) as image:
        image.load()
        return _split_alpha(_to_srgb(_upright(image)))


def photo_size(path: str | Path, *, max_megapixels: float = MAX_MEGAPIXELS) -> tuple[int, int]:
    """Upright ``(height, width)`` of a photo, from its header alone.

    Raises:
        PhotoError: If it is not a photo, or is too large, too small or too thin.
    """
    path = Path(path)
    with _reasons(path), _open_checked(path, read_bytes(path), max_megapixels, MAX_ASPECT) as image:
        width, height = image.size
        # Orientations 5 to 8 are turned by 90 degrees.
        turned = _orientation(image) >= 5
    return (width, height) if turned else (height, width)


def read_bytes(path: Path) -> bytes:
    """Read a file.

    Raises:
        PhotoError: If that fails or it is empty.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise PhotoError(f"{path.name}: cannot be read ({reason}); remove or replace it") from error
    if not data:
        raise PhotoError(f"{path.name}: the file is empty; copy the photo again")
    return data


def sniff_format(data: bytes) -> str | None:
    """Tell "JPEG", "PNG", "WEBP" or "HEIF" by a file's first bytes; None for anything else."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    heif_brands = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
    return "HEIF" if data[4:8] == b"ftyp" and data[8:12] in heif_brands else None


def _open_checked(
    path: Path, data: bytes, max_megapixels: float, max_aspect: float
) -> PILImage.Image:
    """Read the header only, and refuse what is no photo, too large, too small or too thin."""
    from PIL import Image

    kind = sniff_format(data)
    if kind is None:
        raise PhotoError(
            f"{path.name}: not a JPEG, PNG, WebP or HEIC image, whatever its name says; "
            "convert it or remove it"
        )
    if kind == "HEIF":
        _register_heif(path)
    with warnings.catch_warnings():
        # Pillow warns of sizes above a higher limit than ours, and of damaged EXIF blocks, which
        # do not matter.
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(data), formats=(kind,))
        except Image.DecompressionBombError as error:
            raise PhotoError(
                f"{path.name}: far above the limit of {max_megapixels:g} megapixels; "
                "save a smaller copy"
            ) from error
    width, height = image.size
    if width * height > max_megapixels * 1e6:
        raise PhotoError(
            f"{path.name}: {width} x {height} is {width * height / 1e6:.1f} megapixels, above the "
            f"limit of {max_megapixels:g}; save a smaller copy"
        )
    if min(width, height) < MIN_SIDE:
        raise PhotoError(
            f"{path.name}: {width} x {height} is smaller than {MIN_SIDE} pixels; use a larger photo"
        )
    if max(width, height) > max_aspect * min(width, height):
        raise PhotoError(
            f"{path.name}: {width} x {height} is a strip, more than {max_aspect:g} times as long "
            "as wide; crop it"
        )
    return image


def _register_heif(path: Path) -> None:
    try:
        import pillow_heif
    except ImportError as error:
        raise PhotoError(
            f"{path.name}: HEIC photos need the pillow-heif package; install it "
            "(pip install pillow-heif) or convert the photo to JPEG"
        ) from error
    pillow_heif.register_heif_opener()


@contextlib.contextmanager
def _reasons(path: Path) -> Iterator[None]:
    """Turn the decoders' many errors into one plain line."""
    try:
        yield
    except PhotoError:
        raise
    except DECODE_ERRORS as error:
        from PIL import UnidentifiedImageError

        # Pillow names its buffer here, which helps nobody; other decoders write several lines.
        unreadable = isinstance(error, UnidentifiedImageError)
        cause = "its header cannot be read" if unreadable else " ".join(str(error).split())
        raise PhotoError(
            f"{path.name}: damaged or cut short ({cause}); copy the photo again or remove it"
        ) from error


def _orientation(image: PILImage.Image) -> int:
    """EXIF orientation, 1 (upright) where there is none or the EXIF block is damaged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return int(image.getexif().get(0x0112, 1))
        except (*DECODE_ERRORS, TypeError):
            return 1


def _upright(image: PILImage.Image) -> PILImage.Image:
    """Apply the EXIF orientation."""
    from PIL import Image

    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    turn = turns.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _to_srgb(image: PILImage.Image) -> PILImage.Image:
    """Convert from an embedded wide-gamut profile (phones write Display P3) to sRGB.

    A damaged profile is ignored, as viewers do.
    """
    from PIL import ImageCms

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


def _split_alpha(image: PILImage.Image) -> tuple[PILImage.Image, PILImage.Image | None]:
    """RGB over white, and the alpha channel where the image has one; no metadata on either."""
    from PIL import Image

    if image.mode.startswith("I"):
        # Pillow clips 16-bit grey to 8 bits instead of scaling it.
        image = image.convert("I").point(lambda value: value / 257).convert("L")
    if not image.has_transparency_data:
        return _bare(image.convert("RGB")), None
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return _bare(Image.alpha_composite(white, rgba).convert("RGB")), _bare(rgba.getchannel("A"))


def _bare(image: PILImage.Image) -> PILImage.Image:
    """A copy that carries pixels and nothing else (no EXIF, no GPS, no profile)."""
    from PIL import Image

    return Image.frombytes(image.mode, image.size, image.tobytes())


def has_alpha_mask(alpha: PILImage.Image | None) -> bool:
    """Whether an alpha channel masks anything out."""
    return alpha is not None and alpha.getextrema() != (255, 255)


@dataclass(frozen=True)
class PhotoInfo:
    """A photo's content digest and upright ``(height, width)``."""

    digest: str
    size: tuple[int, int]


def verify_photo(path: Path, *, max_megapixels: float = MAX_MEGAPIXELS) -> PhotoInfo:
    """Decode a photo once to prove it usable; its digest is of the file's bytes.

    Raises:
        PhotoError: If it cannot be used.
    """
    width, height = open_photo(path, max_megapixels=max_megapixels).size
    digest = hashlib.sha256(read_bytes(path)).hexdigest()[:32]
    return PhotoInfo(digest, (height, width))
