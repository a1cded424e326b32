"""Pixels of large images at a half or a quarter of their size, in the memory of small ones.

A JPEG's decoder computes fewer pixels of each block, and a PNG is decoded in strips of rows. What
must be decoded as a whole has a lower limit.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterable, Iterator

from PIL import Image
from PIL.ImageFile import ImageFile

FULL_SIZE_MEGAPIXELS = 40.0
"""Largest image that is decoded at its own size, in megapixels."""
MAX_MEGAPIXELS = 200.0
REDUCTIONS = (1, 2, 4)
"""Divisors of an image's sides, rounding up, when it is decoded."""
# A progressive JPEG's coefficients are held as a whole: up to 6 bytes a pixel.
_PROGRESSIVE_MEGAPIXELS = 70.0
# WebP's decoder holds 16 bytes a pixel, the others up to 7.
_WHOLE_MEGAPIXELS = {
    "WEBP": (50.0, " for WebP"),
    "HEIF": (65.0, " for HEIC"),
    "PNG": (65.0, " for a PNG that is interlaced or not of 8 bits per channel"),
}
_STRIP_BYTES = 2**22
_PIECE_BYTES = 2**16
_PNG_START = b"\x89PNG\r\n\x1a\n"
# Bytes of a pixel, by colour type, with 8 bits a sample.
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
# Frames of JPEG whose rows come one after another: baseline, extended, arithmetic.
_SEQUENTIAL = (0xC0, 0xC1, 0xC9)


def reduction(width: int, height: int) -> int:
    """The first of `REDUCTIONS` that leaves at most `FULL_SIZE_MEGAPIXELS`, else the last."""
    for factor in REDUCTIONS[:-1]:
        if -(-width // factor) * -(-height // factor) <= FULL_SIZE_MEGAPIXELS * 1e6:
            return factor
    return REDUCTIONS[-1]


def megapixel_limit(kind: str, data: bytes) -> tuple[float, str]:
    """Return the most megapixels of an image, and " for" what, where others have a higher limit."""
    if kind == "JPEG" and not _is_sequential(data):
        return _PROGRESSIVE_MEGAPIXELS, " for a progressive JPEG"
    if kind == "JPEG" or _has_rows(kind, data):
        return MAX_MEGAPIXELS, ""
    return _WHOLE_MEGAPIXELS[kind]


def decode(image: ImageFile, kind: str, data: bytes, *, at_full_size: bool = False) -> Image.Image:
    """Decode an image that was opened, with its sides divided by `reduction` or at full size."""
    factor = 1 if at_full_size else reduction(*image.size)
    if factor == 1:
        image.load()
        return _with_8_bits(image)
    if kind == "PNG" and _has_rows(kind, data):
        return _decode_strips(image, data, factor)
    if kind == "JPEG":
        size = (image.width // factor, image.height // factor)
        if image.draft(None, size):  # None leaves the mode
            image.load()
            return image
    image.load()
    return _with_8_bits(_reducible(image).reduce(factor))


def _has_rows(kind: str, data: bytes) -> bool:
    """Return whether an image is a PNG of whole bytes a sample, one row after another."""
    depth, _, _, _, is_interlaced = data[24:29] if len(data) > 28 else bytes(5)
    return kind == "PNG" and depth == 8 and not is_interlaced


def _with_8_bits(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit, which Pillow would clip instead of scaling it."""
    if not image.mode.startswith("I"):
        return image
    return image.convert("I").point(lambda value: value / 257).convert("L")


def _reducible(image: Image.Image) -> Image.Image:
    """An image of a mode whose values can be averaged; palettes are resolved."""
    if image.mode.startswith("I"):
        return image.convert("I")
    if image.has_transparency_data:
        return image.convert("RGBA")
    return image if image.mode in ("L", "RGB", "CMYK") else image.convert("RGB")


def _is_sequential(data: bytes) -> bool:
    """Return whether a JPEG's first scan holds all components, and no later one refines it.

    libjpeg decodes only these row by row; of all others it holds every coefficient.
    """
    frame = components = 0
    at = 2
    while 0 <= (at := data.find(b"\xff", at)) < len(data) - 9:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xDA:  # start of scan
            return frame in _SEQUENTIAL and data[at + 4] == components
        if marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD8:  # without a length
            at += 1 if marker == 0xFF else 2
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            frame, components = marker, data[at + 9]
        at += 2 + length
    return False


def _decode_strips(image: ImageFile, data: bytes, factor: int) -> Image.Image:
    """Decode a PNG some rows at a time, each strip as a PNG of its own, and reduce these.

    The filter of a row refers to the row above it: each strip begins with the last one's last row.
    """
    width, height = image.size
    colour = data[25]
    stride = 1 + width * _PNG_CHANNELS[colour]
    rows = max(1, _STRIP_BYTES // stride // factor) * factor
    chunks = list(_png_chunks(data))
    kept = b"".join(_png_chunk(name, body) for name, body in chunks if name in (b"PLTE", b"tRNS"))
    pixels = (body for name, body in chunks if name == b"IDAT")
    whole, top, above = None, 0, bytes(stride - 1)
    for strip in _inflated(pixels, rows * stride, height * stride):
        count = len(strip) // stride
        header = struct.pack(">IIBBBBB", width, count + 1, 8, colour, 0, 0, 0)
        body = zlib.compress(b"\0" + above + strip, 0)
        file = _PNG_START + _png_chunk(b"IHDR", header) + kept + _png_chunk(b"IDAT", body)
        with Image.open(io.BytesIO(file + _png_chunk(b"IEND", b"")), formats=("PNG",)) as part:
            above = part.crop((0, count, width, count + 1)).tobytes()
            reduced = _reducible(part.crop((0, 1, width, count + 1))).reduce(factor)
        if whole is None:
            size = (reduced.width, -(-height // factor))
            whole = Image.new(reduced.mode, size)
        whole.paste(reduced, (0, top // factor))
        top += count
    assert whole is not None
    # EXIF may stand behind the pixels, where Pillow would look for it by decoding all of them.
    exif = [("exif", bytes(body)) for name, body in chunks if name == b"eXIf"]
    whole.info = {**image.info, **dict(exif)}
    whole.info.pop("transparency", None)
    return whole


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """Names and contents of a PNG's chunks."""
    at, view = len(_PNG_START), memoryview(data)
    while at + 8 <= len(data):
        length = int.from_bytes(view[at : at + 4], "big")
        yield bytes(view[at + 4 : at + 8]), view[at + 8 : at + 8 + length]
        at += 12 + length


def _png_chunk(name: bytes, body: bytes | memoryview) -> bytes:
    checksum = zlib.crc32(body, zlib.crc32(name))
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", checksum)


def _inflated(parts: Iterable[memoryview], size: int, total: int) -> Iterator[bytes]:
    """Decompress a stream, so many bytes at a time.

    Raises:
        EOFError: If it ends before the total.
    """
    inflate, strip, left = zlib.decompressobj(), bytearray(), total
    for part in parts:
        for start in range(0, len(part), _PIECE_BYTES):
            piece: bytes | memoryview = part[start : start + _PIECE_BYTES]
            while left and len(piece):
                strip += inflate.decompress(piece, min(size, left) - len(strip))
                piece = inflate.unconsumed_tail
                if len(strip) == min(size, left):
                    left -= len(strip)
                    yield bytes(strip)
                    strip.clear()
    if left:
        strip += inflate.flush()
        if len(strip) < left:
            raise EOFError(f"{left - len(strip)} bytes of pixels are missing")
        yield bytes(strip[:left])
