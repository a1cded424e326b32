"""Image files that say how they were made, as A1111 writes and other tools read it."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path

from PIL import Image, PngImagePlugin

from dora_diffusion.data.images import open_photo
from dora_diffusion.formats.adapter.metadata import without_path
from dora_diffusion.formats.files.atomic import atomic_file
from dora_diffusion.models.schedulers import SCHEDULERS
from dora_diffusion.numerics.weights import Strengths
from dora_diffusion.sampling.generate import SamplingSettings

_CHUNK = "parameters"
_THUMBNAIL_SIDE = 256
_NEGATIVE = "Negative prompt: "
# A name's length has a limit, since without one a line of spaces takes the cube of its length.
_FIELD = re.compile(r'([\w-][\w -]{0,63}):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')

# A1111's name of a scheduler -> ours.
_SCHEDULERS = {scheduler.a1111: name for name, scheduler in SCHEDULERS.items()}


def parameters_text(
    prompt: str,
    seed: int,
    settings: SamplingSettings,
    size: tuple[int, int],
    model: str,
    adapter: str | Path | None = None,
    strengths: Strengths = Strengths(),  # noqa: B008 - frozen
    *,
    extra: Mapping[str, object] | None = None,
) -> str:
    """The generation settings as A1111's ``parameters`` text; no local path is in it.

    Args:
        prompt: The prompt.
        seed: The image's seed.
        settings: Steps, guidance, scheduler, negative prompt.
        size: Width and height in pixels.
        model: Name of the base model.
        adapter: The adapter file or folder.
        strengths: How strongly it acts; of the parts' strengths, 1 is not written.
        extra: Further fields by name.
    """
    lines = [prompt]
    if settings.negative_prompt:
        lines.append(f"{_NEGATIVE}{settings.negative_prompt}")
    fields: dict[str, object] = {"Steps": settings.steps}
    if settings.scheduler is not None:
        fields["Sampler"] = SCHEDULERS[settings.scheduler].a1111
    fields |= {
        "CFG scale": f"{settings.guidance_scale:g}",
        "Seed": seed,
        "Size": f"{size[0]}x{size[1]}",
        "Model": _name_of(model),
    }
    if adapter is not None:
        name = without_path(str(Path(adapter).resolve()))
        fields |= {"Adapter": name, "Adapter strength": f"{strengths.strength:g}"}
        parts = {
            "Direction strength": strengths.direction_strength,
            "Magnitude strength": strengths.magnitude_strength,
        }
        fields |= {part: f"{value:g}" for part, value in parts.items() if value != 1}
    if settings.guidance_rescale:
        fields["Guidance rescale"] = f"{settings.guidance_rescale:g}"
    fields |= extra or {}
    lines.append(", ".join(f"{name}: {_quoted(str(value))}" for name, value in fields.items()))
    return "\n".join(lines)


def _name_of(model: str) -> str:
    """A model's name: of a folder or file its own, of anything else (a hub id) all of it."""
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else without_path(model)


def _quoted(value: str) -> str:
    """A value that holds a separator is a JSON string, as A1111 writes it."""
    return json.dumps(value, ensure_ascii=False) if re.search(r"[,:\n]", value) else value


def parse_parameters(text: str) -> dict[str, str]:
    """Read a ``parameters`` text, ours or A1111's.

    Returns:
        ``"Prompt"``, ``"Negative prompt"``, and the fields of the last line under their names. A
        scheduler that we have goes by our name.
    """
    body, _, last = text.strip().rpartition("\n")
    if not re.match(r"Steps: \d", last):
        body, last = text.strip(), ""
    prompt, _, negative = f"\n{body}".partition(f"\n{_NEGATIVE}")
    fields = {"Prompt": prompt.strip(), "Negative prompt": negative.strip()}
    for name, value in _FIELD.findall(last):
        try:
            fields[name] = str(json.loads(value)) if value.startswith('"') else value.strip()
        except ValueError:  # quoted in another way
            fields[name] = value.strip('"')
    if "Sampler" in fields:
        fields["Sampler"] = _SCHEDULERS.get(fields["Sampler"], fields["Sampler"])
    return fields


def save_png(image: Image.Image, path: Path, parameters: str | None = None) -> Path:
    """Write a PNG atomically, with a ``parameters`` text chunk.

    Raises:
        DiskFullError: If there is no room; a file that was there is unchanged.
    """
    data = png_bytes(image, parameters)
    with atomic_file(Path(path)) as temporary:
        temporary.write_bytes(data)
    return Path(path)


def png_bytes(image: Image.Image, parameters: str | None = None) -> bytes:
    """An image as a PNG, with a ``parameters`` text chunk."""
    info, data = PngImagePlugin.PngInfo(), io.BytesIO()
    if parameters is not None:
        # Pillow makes it an iTXt chunk where Latin-1 does not have its characters.
        info.add_text(_CHUNK, parameters)
    image.save(data, format="PNG", pnginfo=info)
    return data.getvalue()


def read_parameters(path: str | Path) -> str | None:
    with Image.open(path) as image:
        text = image.info.get(_CHUNK)
    return None if text is None else str(text)


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
