"""Image files that say how they were made, as A1111 writes and other tools read it."""

from __future__ import annotations

import base64
import hashlib
import io
import re
import struct
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import ExifTags, Image, PngImagePlugin

from dora_diffusion import __version__
from dora_diffusion.config.fields import TOKENS_PER_CHUNK
from dora_diffusion.config.schedulers import SCHEDULERS, scheduler_of
from dora_diffusion.config.wording import number_text
from dora_diffusion.data.images import DECODE_ERRORS, PhotoError, open_photo
from dora_diffusion.formats.adapter.metadata import without_path
from dora_diffusion.formats.adapter.stored import find_adapter
from dora_diffusion.formats.files.atomic import atomic_file
from dora_diffusion.formats.files.runs import ADAPTER_FILES, CHECKPOINT
from dora_diffusion.formats.files.stream import file_hash
from dora_diffusion.formats.layouts.dotted import PEFT_FILE
from dora_diffusion.formats.parameters import (
    fields_of,
    lora_tag,
    one_paragraph,
    parameters_of,
    split_strengths,
    tag_name,
    without_other_networks,
)
from dora_diffusion.numerics.weights import MergeStrengths, Strengths

# Files are read and listed without model code, which takes seconds to import.
if TYPE_CHECKING:
    from dora_diffusion.config.images import ImageRequest
    from dora_diffusion.models.components import Components
    from dora_diffusion.sampling.settings import SamplingSettings
    from dora_diffusion.sampling.stack import AdapterUse

BATCH_SIZE, BATCH_POSITION = "Batch size", "Batch pos"
HASHES, MODEL_HASH = "Lora hashes", "Model hash"
TOKEN_LENGTH, LOADED = "Max token length", "Loaded with"
INIT_IMAGE, MASK_IMAGE = "Init image hash", "Mask image hash"
OWN_VERSION = "dora_diffusion "
_CHUNK = "parameters"
_THUMBNAIL_SIDE = 256
_UNICODE = b"UNICODE\0"
_LONGEST = 100_000
# Fields of a text -> the settings that they give.
_SETTINGS: Mapping[str, tuple[str, type]] = {
    "Prompt": ("prompt", str), "Negative prompt": ("negative_prompt", str),
    "Steps": ("steps", int), "CFG scale": ("guidance_scale", float), "Seed": ("seed", int),
    "Sampler": ("scheduler", str), "Guidance rescale": ("guidance_rescale", float),
    "Direction strength": ("direction_strength", float),
    "Magnitude strength": ("magnitude_strength", float), "Clip skip": ("clip_skip", int),
    TOKEN_LENGTH: ("max_token_length", int), "Denoising strength": ("denoise", float),
}  # fmt: skip
# Brackets, backslashes and breaks of prompts, which A1111 reads as weights.
_EMPHASIS = re.compile(r"[()\[\]\\]|\bBREAK\b")
# Fields that say what was there, or are of a setting that another field gives.
_FACTS = (
    "Model", MODEL_HASH, "Version", "Adapter", "Adapter strength", HASHES, BATCH_SIZE,
    BATCH_POSITION, LOADED, INIT_IMAGE, MASK_IMAGE,
)  # fmt: skip


def adapter_name(path: str | Path) -> str:
    """Name an adapter's file by its stem, the file of a folder by the folder; no path stays.

    A run's checkpoint has the run's name too: ``my-mug-checkpoint-100``.
    """
    place = Path(path).expanduser().resolve()
    if place.name in (*ADAPTER_FILES, PEFT_FILE):
        place = place.parent
    name = without_path(str(place)).removesuffix(".safetensors")
    return f"{place.parent.name}-{name}" if CHECKPOINT.fullmatch(place.name) else name


class RecordedAdapter(NamedTuple):
    """An adapter as an image's text records it: without its path.

    Attributes:
        name: Name of the file or its run.
        strengths: Its strengths; a strength of 1 of text encoders or UNet is not written.
        hash: 12 digits by which web UIs and Civitai identify a file: of the SHA-256 of its tensors.
    """

    name: str
    strengths: Strengths = MergeStrengths()
    hash: str = ""

    @classmethod
    def of(cls, path: str | Path, strengths: Strengths = MergeStrengths()) -> RecordedAdapter:  # noqa: B008 - frozen
        """Name an adapter's file by `adapter_name`."""
        file = find_adapter(path)
        return cls(adapter_name(path), strengths, content_hash(file.resolve(), *_version(file)))

    def matches(self, path: str | Path) -> bool | None:
        """Compare the recorded hash with that of a file; some programs record fewer digits.

        Returns:
            None where nothing is recorded, or the file is a folder, which has no hash.
        """
        known = self.hash and RecordedAdapter.of(path).hash
        return known.startswith(self.hash) if known else None

    @property
    def tag(self) -> str:
        """The ``<lora:NAME:STRENGTH>`` of prompts; of two, that of the text encoders is first."""
        own = MergeStrengths.of(self.strengths)
        shares = [own.text_encoder_strength, own.unet_strength]
        numbers = [number_text(own.strength * share) for share in shares]
        return lora_tag(self.tag_name, *dict.fromkeys(numbers))

    @property
    def tag_name(self) -> str:
        """The name without what separates names."""
        return tag_name(self.name)


def recorded(uses: Sequence[AdapterUse]) -> list[RecordedAdapter]:
    """Return the adapters as a text records them."""
    return [RecordedAdapter.of(use.path, use.strengths) for use in uses]


def _version(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_mtime_ns, status.st_size


@lru_cache(maxsize=1024)
def content_hash(file: Path, written: int, size: int) -> str:
    """`RecordedAdapter.hash` of a file as it was at a time; empty for a folder of several files.

    Args:
        file: The file.
        written: When it was written, in nanoseconds.
        size: Its size in bytes.
    """
    return "" if file.is_dir() else file_hash([file], is_data=True)[:12]


@lru_cache(maxsize=64)
def _model_hash(file: Path, written: int, size: int) -> str:
    return file_hash([file])[:10]


def parameters_text(
    row: ImageRequest,
    settings: SamplingSettings,
    size: tuple[int, int],
    model: str,
    adapters: Sequence[RecordedAdapter] = (),
    *,
    extra: Mapping[str, object] | None = None,
    hash_model: bool = True,
) -> str:
    """The generation settings as A1111's ``parameters`` text; no local path is in it.

    Args:
        row: Its prompt and seed.
        settings: Steps, guidance, scheduler, negative prompt.
        size: Width and height in pixels.
        model: Name of the base model.
        adapters: The adapters, all with one scale of the direction and one share of the magnitude.
        extra: Further fields by name.
        hash_model: Add the hash of a base of one file, which is read whole once.
    """
    shown = " ".join([one_paragraph(row.prompt), *(adapter.tag for adapter in adapters)]).strip()
    fields: dict[str, object] = {"Steps": settings.steps}
    if settings.scheduler is not None:
        scheduler = SCHEDULERS[settings.scheduler]
        fields |= {"Sampler": scheduler.a1111, "Schedule type": scheduler.schedule}
    fields |= {
        "CFG scale": number_text(settings.guidance_scale),
        "Seed": row.seed,
        "Size": f"{size[0]}x{size[1]}",
        **_model_fields(model, hash_model),
        **(extra or {}),
    }
    fields |= painted_fields(settings)
    prompts = (row.prompt, settings.negative_prompt)
    if any(map(_EMPHASIS.search, prompts)):
        fields["Emphasis"] = "None"
    strengths = adapters[0].strengths if adapters else Strengths()
    numbers = {
        "Direction strength": (strengths.direction_strength, 1),
        "Magnitude strength": (strengths.magnitude_strength, 1),
        "Guidance rescale": (settings.guidance_rescale, 0),
    }
    fields |= {
        name: number_text(value) for name, (value, usual) in numbers.items() if value != usual
    }
    # Of several with one name, the place tells whose hash it is: one without has an empty hash.
    hashed = {adapter.tag_name for adapter in adapters if adapter.hash}
    known = [f"{each.tag_name}: {each.hash}" for each in adapters if each.tag_name in hashed]
    if known:
        fields[HASHES] = ", ".join(known)
    fields["Version"] = OWN_VERSION + __version__
    return parameters_of(shown, one_paragraph(settings.negative_prompt), fields)


def painted_fields(settings: SamplingSettings) -> dict[str, str]:
    """Return the fields of what was painted over, or into."""
    fields = {}
    if settings.image is not None:
        fields[INIT_IMAGE] = pixel_hash(settings.image, "RGB")
    if settings.mask_image is not None:
        fields[MASK_IMAGE] = pixel_hash(settings.mask_image, "L")
    if settings.stated_denoise is not None:
        fields = {"Denoising strength": number_text(settings.stated_denoise), **fields}
    return fields


def pixel_hash(image: Image.Image, mode: str) -> str:
    """The MD5 of an image's pixels in a mode of Pillow, in hexadecimal."""
    return hashlib.md5(image.convert(mode).tobytes(), usedforsecurity=False).hexdigest()


def model_fields(
    components: Components, batch_size: int = 1, position: int = 0
) -> dict[str, object]:
    """Return the fields of an image's text that depend on the loaded model.

    Args:
        components: The model, as it reads prompts.
        batch_size: Images of the batch that it was sampled in.
        position: Its place there.
    """
    fields: dict[str, object] = dict(components.clip_skip_parameter)
    if components.max_token_length != TOKENS_PER_CHUNK:
        fields[TOKEN_LENGTH] = components.max_token_length
    if batch_size > 1:
        fields |= {BATCH_SIZE: batch_size, BATCH_POSITION: position}
    return fields


def model_name(model: str) -> str:
    """The name of a model in texts: of a folder or file its own, of a hub id all of it."""
    path = Path(model).expanduser()
    name = path.resolve().name if path.exists() else without_path(model)
    return name.removesuffix(".safetensors")


def model_hash(model: str | Path) -> str:
    """The 10 digits by which web UIs know a model's file; empty for another model."""
    path = Path(model).expanduser()
    return _model_hash(path.resolve(), *_version(path)) if path.is_file() else ""


def is_model(model: str, fields: Mapping[str, str]) -> bool:
    """Return whether a text may name a model: by the file's hash, or by the name where it has none.

    Args:
        model: A base as settings name it.
        fields: The text's, as `parse_parameters` returns them.
    """
    stated, own = fields.get(MODEL_HASH), model_hash(model)
    return own == stated if stated and own else fields.get("Model") in (None, model_name(model))


def _model_fields(model: str, is_hashed: bool) -> dict[str, str]:
    digest = model_hash(model) if is_hashed else ""
    return {**({MODEL_HASH: digest} if digest else {}), "Model": model_name(model)}


def parse_parameters(text: str) -> dict[str, str]:
    """Parse a parameters text as `fields_of`, and name known schedulers as in `SCHEDULERS`."""
    fields = fields_of(text)
    if own := scheduler_of(fields.get("Sampler", ""), fields.get("Schedule type")):
        fields["Sampler"] = own
        fields.pop("Schedule type", None)
    return fields


def adapters_of(fields: Mapping[str, str]) -> tuple[list[RecordedAdapter], list[str]]:
    """The adapters of a text, in its order, and what of their strengths has no meaning here.

    Several of one name have their hashes in the same order; web UIs write one hash for all.

    Args:
        fields: As `parse_parameters` returns them.

    Raises:
        ValueError: If a strength is out of its limits.
    """
    hashes: dict[str, list[str]] = {}
    for pair in filter(None, fields.get(HASHES, "").split(",")):
        name, _, digest = pair.rpartition(":")
        hashes.setdefault(name.strip(), []).append(digest.strip())
    adapters, unread = list[RecordedAdapter](), list[str]()
    names, texts = (fields.get(key, "") for key in ("Adapter", "Adapter strength"))
    for name, text in zip(names.split(", "), texts.split(", "), strict=True) if names else ():
        first, second, other = split_strengths(text)
        if other:
            unread.append(f"{lora_tag(name, text)}: {other}")
        text_encoder = 1.0 if first is None else float(first)
        shares = {
            "text_encoder_strength": text_encoder,
            "unet_strength": float(second or text_encoder),
        }
        own = hashes.get(name, [""])
        adapters.append(
            RecordedAdapter(name, MergeStrengths(**shares), own.pop(0) if len(own) > 1 else own[0])
        )
    return adapters, unread


def settings_of(fields: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """The settings of `generate` that a text's fields give, and what of them has no meaning here.

    Args:
        fields: As `parse_parameters` returns them. Clip skip stays in the counting of web UIs.
    """
    prompt, unread = without_other_networks(fields.get("Prompt", ""))
    values = dict[str, Any]()
    for name, text in fields.items():
        setting, kind = _SETTINGS.get(name, ("", str))
        try:
            if name == "Size":
                values["width"], values["height"] = map(int, text.split("x"))
            elif setting and (setting != "scheduler" or text in SCHEDULERS):
                values[setting] = kind(text)
            elif name not in _FACTS:
                unread.append(f"{name}: {text}")
        except ValueError:
            unread.append(f"{name}: {text}")
    if "Hires upscale" in fields:  # The strength is that of a second pass.
        values.pop("denoise", None)
    if fields.get("Emphasis") == "None":
        unread.remove("Emphasis: None")
    elif any(map(_EMPHASIS.search, (prompt, fields.get("Negative prompt", "")))):
        unread.append("weights of words in its prompts")
    return values | {"prompt": prompt}, unread


def save_image(image: Image.Image, path: Path, parameters: str | None = None) -> Path:
    """Write a PNG, JPEG or WebP file atomically, by its suffix, with its parameters.

    Raises:
        DiskFullError: If there is no room; a file that was there is unchanged.
    """
    path = Path(path)
    data = image_bytes(image, parameters, path.suffix)
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)
    return path


def image_bytes(image: Image.Image, parameters: str | None = None, suffix: str = ".png") -> bytes:
    """An image as a PNG with a text chunk, or as a JPEG or WebP with an EXIF comment."""
    data, kind = io.BytesIO(), suffix.lower()
    if kind == ".png":
        info = PngImagePlugin.PngInfo()
        if parameters is not None:
            # Pillow makes it an iTXt chunk where Latin-1 does not have its characters.
            info.add_text(_CHUNK, parameters)
        image.save(data, format="PNG", pnginfo=info)
        return data.getvalue()
    options: dict[str, Any] = {} if parameters is None else {"exif": _exif(parameters)}
    if kind == ".webp":
        image.save(data, format="WEBP", quality=95, **options)
    else:
        image.save(data, format="JPEG", quality=95, subsampling=0, **options)
    return data.getvalue()


def _exif(comment: str) -> bytes:
    """An EXIF block with a comment alone, of type 7; Pillow writes 1, which A1111 cannot read."""
    data = _UNICODE + comment.encode("utf-16-be", "surrogatepass")
    # Two directories of one entry: tag, type, count, and the value or where it is.
    main = (1, ExifTags.IFD.Exif, 4, 1, 26, 0)
    own = (1, ExifTags.Base.UserComment, 7, len(data), 44, 0)
    return struct.pack(">10sI" + "HHHIII" * 2, b"Exif\0\0MM\0*", 8, *main, *own) + data


def read_parameters(path: str | Path) -> str | None:
    """The parameters text of an image file; None if it has none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of many pixels, which are not decoded.
        image = Image.open(path, formats=("PNG", "JPEG", "WEBP"))
    with image:
        text = image.info.get(_CHUNK)
        return _comment(image) if text is None else str(text)


def _comment(image: Image.Image) -> str | None:
    """The text of an image's EXIF comment; None where there is none."""
    try:
        data = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
        if not isinstance(data, bytes):
            return data
        code, text = data[:8], data[8:]
        if code == _UNICODE:
            # Written in the file's own order of bytes by some programs.
            is_little = text[1::2].count(0) > text[::2].count(0)
            return text.decode("utf-16-le" if is_little else "utf-16-be")
        return text.rstrip(b"\0").decode() if code.rstrip(b"\0") in (b"", b"ASCII") else None
    except DECODE_ERRORS:
        return None


@lru_cache(maxsize=1)
def _read_text(file: Path, written: int, size: int) -> str | None:
    """The `read_parameters` of a file as it was at a time: of an image to repeat, asked twice."""
    return read_parameters(file)


def read_fields(path: str | Path) -> dict[str, str]:
    """Read what a file says of how it was made, as `parse_parameters` returns it.

    Raises:
        PhotoError: If it is no image, or says nothing.
    """
    file = Path(path)
    name = file.name
    try:
        text = _read_text(file, *_version(file))
    except (*DECODE_ERRORS, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or "it is no image, damaged or too large"
        raise PhotoError(f"{name} cannot be read ({reason}); choose a PNG, JPEG or WebP") from error
    if not text:
        raise PhotoError(f"{name} does not say how it was made; it has no generation parameters")
    return parse_parameters(text[:_LONGEST])


def thumbnail(path: str | Path) -> str:
    """The small image that adapter managers show, as a JPEG's data URI, without any metadata.

    Raises:
        PhotoError: If it is not an image.
    """
    # A sheet of many samples may be larger than a photo, and a strip.
    image = open_photo(Path(path).expanduser(), limited=False)
    image.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
    data = io.BytesIO()
    image.save(data, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode("ascii")
