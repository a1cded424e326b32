"""The Generate tab's fields as a request to the studio, and a PNG's settings as fields."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dora_diffusion.app.context import Context
from dora_diffusion.app.studio import Request, clean_prompt
from dora_diffusion.jobs.exports import chosen_adapter
from dora_diffusion.jobs.loading import ModelFiles
from dora_diffusion.jobs.snapshot import Job
from dora_diffusion.jobs.workspace import AppError
from dora_diffusion.models.schedulers import SCHEDULERS

OWN = "the model's own"
BASE, MERGED = "base", "merged"


def make_request(context: Context, choice: str | None, form: dict[str, Any]) -> Request:
    """What the fields ask for.

    Raises:
        AppError: If the run is gone or a value is out of its limits.
    """
    model = _model(context, str(choice or BASE))
    scheduler = form["scheduler"]
    prompt = clean_prompt(form["prompt"]).replace("{subject}", model.trigger)

    def size(name: str) -> int | None:
        text = str(form[name] or "").strip()
        if not text:
            return None
        if not text.isdecimal() or int(text) == 0:
            raise AppError(f"the {name} is {text!r}; write pixels, such as 512, or leave it empty")
        # Latents have 8 pixels a side.
        return max(8, round(int(text) / 8) * 8)

    return Request(
        base=model.base,
        adapter=model.adapter,
        files=model.files,
        prompt=prompt,
        negative_prompt=clean_prompt(form["negative_prompt"], "negative prompt"),
        seed=int(-1 if form["seed"] is None else form["seed"]),
        count=int(form["count"] or 1),
        steps=int(form["steps"] or 25),
        guidance_scale=float(form["guidance_scale"] or 1),
        scheduler=None if scheduler == OWN else scheduler,
        width=size("width"),
        height=size("height"),
        strength=float(form["strength"]),
        direction=float(form["direction"]),
        magnitude=float(form["magnitude"]),
    )


@dataclass(frozen=True)
class _Model:
    """What a choice stands for."""

    base: str
    adapter: Path | None
    trigger: str
    files: ModelFiles = field(default_factory=ModelFiles)


def _model(context: Context, choice: str) -> _Model:
    """A base model alone, a merged model, or a run with the name of its checkpoint."""
    kind, _, name = choice.partition("/")
    if kind == BASE:
        return _Model(context.allowed_model(name), None, "mug")
    if kind == MERGED:
        job = context.job(name)
        if job.kind != "merge" or job.state != "done":
            raise AppError("this merged model no longer exists; choose another one")
        files = ModelFiles(config=_configuration(job))
        return _Model(str(job.facts["output"]), None, job.trigger, files)
    job = context.job(kind)
    base, adapter = context.allowed_model(job.base), chosen_adapter(job, name)
    return _Model(base, adapter, job.trigger, ModelFiles.of(job.settings))


def _configuration(job: Job) -> str | None:
    """Where a merged file's configuration is: its base's, or what its base was loaded with."""
    return job.facts.get("config") or (None if job.base.endswith(".safetensors") else job.base)


def field_value(name: str, found: dict[str, str]) -> Any:
    """A field's value from a PNG's parameters; None leaves it as it is."""
    width, _, height = found.get("Size", "").partition("x")
    # Of an adapter's picture, what is not written was 1.
    whole = "1" if "Adapter" in found else None
    text = {
        "prompt": found.get("Prompt"),
        "negative_prompt": found.get("Negative prompt", ""),
        "seed": found.get("Seed"),
        "steps": found.get("Steps"),
        "guidance_scale": found.get("CFG scale"),
        "strength": found.get("Adapter strength"),
        "direction": found.get("Direction strength", whole),
        "magnitude": found.get("Magnitude strength", whole),
        "width": width or None,
        "height": height or None,
        "count": "1",
    }.get(name)
    if name == "scheduler":
        sampler = found.get("Sampler", OWN)
        return sampler if sampler in SCHEDULERS else OWN
    if name in ("prompt", "negative_prompt") or text is None:
        return text
    try:
        number = float(text)
    except ValueError:
        return None
    return int(number) if number.is_integer() else number


def numbers(text: str) -> list[float]:
    """Numbers that commas or spaces part.

    Raises:
        AppError: If something else is among them.
    """
    try:
        return [float(part) for part in str(text).replace(",", " ").split()]
    except ValueError:
        raise AppError(f"the strengths are {text!r}; write numbers such as 0, 0.5, 1") from None
