"""Decoding of large images at a half or a quarter of their size, with little memory.

A JPEG's decoder computes fewer pixels per block, and a PNG is decoded in strips of rows. Formats
that must be decoded as a whole have a lower size limit.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterable, Iterator

from PIL import Image
from PIL.ImageFile import ImageFile

FULL_SIZE_MEGAPIXELS = 40.0
"""Largest image that is decoded at full size, in megapixels."""
MAX_MEGAPIXELS = 200.0
REDUCTIONS = (1, 2, 4)
"""Divisors of an image's sides in decoding, rounding up."""
# The decoder stores all coefficients of a progressive JPEG: up to 6 bytes per pixel.
_PROGRESSIVE_MEGAPIXELS = 70.0
# WebP's decoder needs 16 bytes per pixel, the others up to 7.
_WHOLE_MEGAPIXELS = {
    "WEBP": (50.0, " for WebP"),
    "HEIF": (65.0, " for HEIC"),
    "PNG": (65.0, " for a PNG that is interlaced or not of 8 bits per channel"),
}
_STRIP_BYTES = 2**22
_PIECE_BYTES = 2**16
_PNG_START = b"\x89PNG\r\n\x1a\n"
# Bytes per pixel, by colour type, with 8 bits per sample.
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
# JPEG frames with sequential rows: baseline, extended, arithmetic.
_SEQUENTIAL = (0xC0, 0xC1, 0xC9)


def reduction(width: int, height: int) -> int:
    """Smallest divisor that gives at most `FULL_SIZE_MEGAPIXELS`, else the largest."""
    for factor in REDUCTIONS[:-1]:
        if -(-width // factor) * -(-height // factor) <= FULL_SIZE_MEGAPIXELS * 1e6:
            return factor
    return REDUCTIONS[-1]


def megapixel_limit(kind: str, data: bytes) -> tuple[float, str]:
    """Return the limit of an image in megapixels, and " for ..." if it is below the maximum."""
    if kind == "JPEG" and not _is_sequential(data):
        return _PROGRESSIVE_MEGAPIXELS, " for a progressive JPEG"
    if kind == "JPEG" or _has_rows(kind, data):
        return MAX_MEGAPIXELS, ""
    return _WHOLE_MEGAPIXELS[kind]


def decode(image: ImageFile, kind: str, data: bytes, *, at_full_size: bool = False) -> Image.Image:
    """Decode an opened image with its sides divided by `reduction`, or at full size."""
    factor = 1 if at_full_size else reduction(*image.size)
    if factor == 1:
        image.load()
        return _with_8_bits(image)
    if kind == "PNG" and _has_rows(kind, data):
        return _decode_strips(image, data, factor)
    if kind == "JPEG":
        size = (image.width // factor, image.height // factor)
        if image.draft(None, size):  # None keeps the mode
            image.load()
            return image
    image.load()
    return _with_8_bits(_reducible(image).reduce(factor))


def _has_rows(kind: str, data: bytes) -> bool:
    """Return whether an image is a PNG with 8 bits per sample that is not interlaced."""
    depth, _, _, _, is_interlaced = data[24:29] if len(data) > 28 else bytes(5)
    return kind == "PNG" and depth == 8 and not is_interlaced


def _with_8_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits; Pillow would clip it."""
    if not image.mode.startswith("I"):
        return image
    return image.convert("I").point(lambda value: value / 257).convert("L")


def _reducible(image: Image.Image) -> Image.Image:
    """Convert an image to a mode whose values can be averaged, without palette."""
    if image.mode.startswith("I"):
        return image.convert("I")
    if image.has_transparency_data:
        return image.convert("RGBA")
    return image if image.mode in ("L", "RGB", "CMYK") else image.convert("RGB")


def _is_sequential(data: bytes) -> bool:
    """Return whether a JPEG is sequential and its first scan has all components.

    libjpeg decodes only such files row by row; for all others it stores all coefficients.
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
    """Decode and reduce a PNG in strips of rows, each as a separate PNG.

    Filters refer to the row above, so each strip begins with the last row of the strip before.
    """
    width, height = image.size
    colour = data[25]
    stride = 1 + width * _PNG_CHANNELS[colour]
    rows = max(1, _STRIP_BYTES // stride // factor) * factor
    chunks = list(_png_chunks(data))
    palette = (_png_chunk(*chunk) for chunk in chunks if chunk[0] in (b"PLTE", b"tRNS"))
    extra_chunks = b"".join(palette)
    pixels = (body for name, body in chunks if name == b"IDAT")
    result, top, last_row = None, 0, bytes(stride - 1)
    for strip in _inflated(pixels, rows * stride, height * stride):
        count = len(strip) // stride
        header = struct.pack(">IIBBBBB", width, count + 1, 8, colour, 0, 0, 0)
        body = zlib.compress(b"\0" + last_row + strip, 0)
        file = _PNG_START + _png_chunk(b"IHDR", header) + extra_chunks + _png_chunk(b"IDAT", body)
        file += _png_chunk(b"IEND", b"")
        with Image.open(io.BytesIO(file), formats=("PNG",)) as image_part:
            last_row = image_part.crop((0, count, width, count + 1)).tobytes()
            reduced = _reducible(image_part.crop((0, 1, width, count + 1))).reduce(factor)
        if result is None:
            size = (reduced.width, -(-height // factor))
            result = Image.new(reduced.mode, size)
        result.paste(reduced, (0, top // factor))
        top += count
    assert result is not None
    # EXIF may follow the pixels; Pillow would decode all of them to find it.
    exif = [("exif", bytes(body)) for name, body in chunks if name == b"eXIf"]
    result.info = {**image.info, **dict(exif)}
    result.info.pop("transparency", None)
    return result


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """Yield names and contents of a PNG's chunks."""
    at, view = len(_PNG_START), memoryview(data)
    while at + 8 <= len(data):
        length = int.from_bytes(view[at : at + 4], "big")
        yield bytes(view[at + 4 : at + 8]), view[at + 8 : at + 8 + length]
        at += 12 + length


def _png_chunk(name: bytes, body: bytes | memoryview) -> bytes:
    checksum = zlib.crc32(body, zlib.crc32(name))
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", checksum)


def _inflated(chunks: Iterable[memoryview], size: int, total: int) -> Iterator[bytes]:
    """Decompress a stream in pieces of ``size`` bytes.

    Raises:
        EOFError: If it ends before ``total`` bytes.
    """
    inflate, strip, remaining = zlib.decompressobj(), bytearray(), total
    for chunk in chunks:
        for start in range(0, len(chunk), _PIECE_BYTES):
            piece: bytes | memoryview = chunk[start : start + _PIECE_BYTES]
            while remaining and len(piece):
                strip += inflate.decompress(piece, min(size, remaining) - len(strip))
                piece = inflate.unconsumed_tail
                if len(strip) == min(size, remaining):
                    remaining -= len(strip)
                    yield bytes(strip)
                    strip.clear()
    if remaining:
        strip += inflate.flush()
        if len(strip) < remaining:
            raise EOFError(f"{remaining - len(strip)} bytes of pixels are missing")
        yield bytes(strip[:remaining])
