"""Uploaded photos: refused by what they are, never by what they are called, and re-encoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL.Image import DecompressionBombError

from dora_diffusion import system
from dora_diffusion.data.images import PhotoError, open_photo_with_alpha, sniff_format
from dora_diffusion.jobs.processes import Lock
from dora_diffusion.jobs.workspace import RequestError

MAX_BYTES = 20 * 2**20
MAX_PHOTOS = 50
JPEG_QUALITY = 95


@dataclass(frozen=True)
class Upload:
    """What became of the files of one upload.

    Attributes:
        accepted: The photos that were made of them, in order.
        refused: One plain line per file that was not taken.
    """

    accepted: tuple[Path, ...]
    refused: tuple[str, ...]


def store_photos(files: Sequence[str | Path], folder: Path) -> Upload:
    """Decode uploaded files and re-encode them as ``001.jpg``, ``002.png``, ...

    Only pixels survive: orientation is applied, then EXIF with its GPS position, colour profiles,
    comments and whatever was appended to the file are gone. The uploaded files are not changed.
    Uploads to one subject take turns, in whatever tab or app they began.

    Args:
        files: Paths of uploaded files.
        folder: Folder of the subject's photos.

    Raises:
        RequestError: If there are more files than one subject may have.
    """
    turn = Lock(folder.with_name(".upload.lock"))
    turn.take(wait=True)
    try:
        return _store_all([Path(file) for file in files], folder)
    finally:
        turn.free()


def _store_all(files: Sequence[Path], folder: Path) -> Upload:
    masks = len(list(folder.glob("*.mask.png")))
    present = len([*folder.glob("*.jpg"), *folder.glob("*.png")]) - masks
    if present + len(files) > MAX_PHOTOS:
        raise RequestError(
            f"{len(files)} files were chosen and {present} photos are there; "
            f"a subject can have at most {MAX_PHOTOS}"
        )
    accepted: list[Path] = []
    refused: list[str] = []
    for file in files:
        try:
            accepted.append(_store(file, folder))
        except (RequestError, PhotoError) as error:
            refused.append(shown(str(error)))
    return Upload(tuple(accepted), tuple(refused))


def shown(text: str, limit: int = 300) -> str:
    """A message that holds a name from outside: printable, and not endless."""
    return "".join(c if c.isprintable() else "?" for c in text)[:limit]


def _store(file: Path, folder: Path) -> Path:
    if file.is_symlink() or not file.is_file():
        raise RequestError(f"{file.name}: not an ordinary file")
    size = file.stat().st_size
    if size > MAX_BYTES:
        raise RequestError(
            f"{file.name}: {size / 2**20:.1f} MB is above the limit of {MAX_BYTES // 2**20} MB; "
            "save a smaller copy"
        )
    image, alpha = open_photo_with_alpha(file)
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
    """A number that no photo of the folder has."""
    taken = [int(path.stem[:3]) for path in folder.iterdir() if path.stem[:3].isdigit()]
    return max(taken, default=0) + 1


def read_generation_settings(file: Path) -> dict[str, str]:
    """The generation settings of a PNG that somebody uploads.

    Raises:
        RequestError: If it is no image of ours or A1111's.
    """
    from dora_diffusion.images import parse_parameters, read_parameters

    if file.stat().st_size > MAX_BYTES:
        raise RequestError(f"the file is larger than {MAX_BYTES // 2**20} MB")
    # Not as a photo is opened: a grid may be a strip. Only the header is read, and no pixel.
    if sniff_format(file.read_bytes()) != "PNG":
        raise RequestError("this file cannot be read as a PNG, whatever its name says")
    try:
        text = read_parameters(file)
    except (OSError, SyntaxError, ValueError, DecompressionBombError) as error:
        raise RequestError(
            "this file cannot be read as a PNG; it is damaged or too large"
        ) from error
    if not text:
        raise RequestError("this image does not say how it was made (it has no parameters text)")
    return parse_parameters(text[:20_000])
