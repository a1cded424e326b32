"""Picture files that say how they were made, as A1111 writes and other tools read it."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, PngImagePlugin

from dora_diffusion.formats.adapter_metadata import without_path
from dora_diffusion.formats.safetensors_stream import atomic_file
from dora_diffusion.generate import SamplingSettings

_CHUNK = "parameters"


def parameters_text(
    prompt: str,
    seed: int,
    settings: SamplingSettings,
    size: tuple[int, int],
    model: str,
    adapter: str | Path | None = None,
    strength: float = 1.0,
) -> str:
    """The generation settings as A1111's ``parameters`` text; no local path is in it.

    Args:
        prompt: The prompt.
        seed: The picture's seed.
        settings: Steps, guidance, sampler, negative prompt.
        size: Width and height in pixels.
        model: Name of the base model.
        adapter: The adapter file or folder.
        strength: Its strength.
    """
    lines = [prompt]
    if settings.negative_prompt:
        lines.append(f"Negative prompt: {settings.negative_prompt}")
    facts = {
        "Steps": settings.steps,
        "Sampler": settings.scheduler or "model default",
        "CFG scale": f"{settings.guidance_scale:g}",
        "Seed": seed,
        "Size": f"{size[0]}x{size[1]}",
        "Model": without_path(model),
    }
    if adapter is not None:
        name = without_path(str(Path(adapter).resolve()))
        facts |= {"Adapter": name, "Strength": f"{strength:g}"}
    lines.append(", ".join(f"{name}: {value}" for name, value in facts.items()))
    return "\n".join(lines)


def save_png(image: Image.Image, path: Path, parameters: str | None = None) -> Path:
    """Write a PNG atomically, with a ``parameters`` text chunk.

    Raises:
        DiskFullError: If there is no room; a file that was there is unchanged.
    """
    info = PngImagePlugin.PngInfo()
    if parameters is not None:
        info.add_itxt(_CHUNK, parameters) if not parameters.isascii() else info.add_text(
            _CHUNK, parameters
        )
    with atomic_file(Path(path)) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)
    return Path(path)


def read_parameters(path: Path) -> str | None:
    """The ``parameters`` text of a PNG, or None."""
    with Image.open(path) as image:
        text = image.info.get(_CHUNK)
    return None if text is None else str(text)
