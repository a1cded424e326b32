"""The Generate tab's fields as a request for images, and a PNG's settings as fields."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dora_diffusion.config.base import BaseModel
from dora_diffusion.formats.adapter.metadata import split_triggers
from dora_diffusion.models.schedulers import SCHEDULERS
from dora_diffusion.numerics.weights import Strengths
from dora_diffusion.studio.app.context import Context
from dora_diffusion.studio.app.settings import PROMPT_LIMIT, default_guidance
from dora_diffusion.studio.jobs.base_model import path_here
from dora_diffusion.studio.jobs.checkpoints import chosen_adapter
from dora_diffusion.studio.jobs.image_generator import GenerationRequest
from dora_diffusion.studio.jobs.workspace import UserError, clean_text

OWN = "the model's own"
MOST_GUIDANCE = 30
BASE, MERGED = "base", "merged"


def make_request(context: Context, choice: str | None, form: dict[str, Any]) -> GenerationRequest:
    """Return the request that the fields ask for.

    Raises:
        UserError: If the run is gone or a value is out of its limits.
    """
    from dora_diffusion.sampling.generate import SamplingSettings

    model = _model(context, str(choice or BASE))
    if path_here(model.base) is None:
        raise UserError(
            f"{model.base.path} is not on this machine, and no image waits for a download: get it "
            f"by 'hf download {model.base.path}', or by training on it"
        )
    first = next(iter(split_triggers(model.trigger)), "")
    prompt = clean_text(form["prompt"], PROMPT_LIMIT, "prompt").replace("{subject}", first)

    def size(name: str) -> int | None:
        text = str(form[name] or "").strip()
        if not text:
            return None
        if not text.isdecimal() or int(text) == 0:
            raise UserError(f"the {name} is {text!r}; write pixels, such as 512, or leave it empty")
        return int(text)

    settings = SamplingSettings(
        steps=int(form["steps"] or SamplingSettings.steps),
        guidance_scale=_guidance(str(form["guidance_scale"] or "").strip(), model),
        scheduler=None if form["scheduler"] == OWN else form["scheduler"],
        width=size("width"),
        height=size("height"),
        negative_prompt=clean_text(form["negative_prompt"], PROMPT_LIMIT, "negative prompt"),
    )
    return GenerationRequest(
        base=model.base,
        adapter=model.adapter,
        prompt=prompt,
        settings=settings,
        seed=int(-1 if form["seed"] is None else form["seed"]),
        count=int(form["count"] or 1),
        strengths=Strengths(
            *(float(form[name]) for name in ("strength", "direction", "magnitude"))
        ),
        clip_skip=_whole(form, "clip_skip"),
        max_token_length=_whole(form, "max_token_length"),
    )


def _whole(form: dict[str, Any], name: str) -> int | None:
    """A whole number of a field; None where it is empty."""
    text = str(form.get(name) or "").strip()
    if text and not text.isdecimal():
        words = name.replace("_", " ")
        raise UserError(f"the {words} is {text!r}; write a whole number, or leave it empty")
    return int(text) if text else None


@dataclass(frozen=True)
class _Model:
    """Model of a choice."""

    base: BaseModel
    adapter: Path | None
    trigger: str
    guidance: float


def _guidance(text: str, model: _Model) -> float:
    """The guidance scale of the field, or of the run's own samples where it is empty."""
    if not text:
        return model.guidance
    with contextlib.suppress(ValueError):
        if 0 <= (scale := float(text)) <= MOST_GUIDANCE:
            return scale
    raise UserError(
        f"the guidance is {text!r}; write a number from 0 to {MOST_GUIDANCE}, or leave it empty"
    )


def _model(context: Context, choice: str) -> _Model:
    """A base model alone, a merged model, or a run with the name of its checkpoint."""
    kind, _, name = choice.partition("/")
    if kind == BASE:
        base = BaseModel(context.allowed_model(name))
        return _Model(base, None, "mug", default_guidance(name))
    if kind == MERGED:
        job = context.job(name)
        if job.kind != "export" or job.state != "done":
            raise UserError("this merged model no longer exists; choose another one")
        # A file's configuration is its base's, or what its base was loaded with.
        own = context.job(job.record.run).settings.get("model_config")
        config = own or (None if job.base.endswith(".safetensors") else job.base)
        guidance = default_guidance(job.base)
        base = BaseModel(job.record.output, model_config=config)
        return _Model(base, None, job.trigger, guidance)
    job = context.job(kind)
    base = replace(job.base_model, path=context.allowed_model(job.base))
    adapter = chosen_adapter(job, name)
    guidance = float(job.settings.get("validation_guidance_scale") or default_guidance(job.base))
    return _Model(base, adapter, job.trigger, guidance)


def field_value(name: str, parameters: dict[str, str]) -> Any:
    """A field's value from a PNG's parameters; None leaves it as it is."""
    width, _, height = parameters.get("Size", "").partition("x")
    # Of an adapter's image, what is not written was 1.
    whole = "1" if "Adapter" in parameters else None
    text = {
        "prompt": parameters.get("Prompt"),
        "negative_prompt": parameters.get("Negative prompt", ""),
        "seed": parameters.get("Seed"),
        "steps": parameters.get("Steps"),
        "guidance_scale": parameters.get("CFG scale"),
        "strength": parameters.get("Adapter strength"),
        "direction": parameters.get("Direction strength", whole),
        "magnitude": parameters.get("Magnitude strength", whole),
        "width": width or None,
        "height": height or None,
        # What the file says is the web UIs' counting, and the run's own for an image of its.
        "max_token_length": "",
        "clip_skip": "",
        "count": "1",
    }.get(name)
    if name == "scheduler":
        scheduler = parameters.get("Sampler", OWN)
        return scheduler if scheduler in SCHEDULERS else OWN
    if not text or name in ("prompt", "negative_prompt"):
        return text
    try:
        number = float(text)
    except ValueError:
        return None
    return int(number) if number.is_integer() else number


def numbers(text: str) -> list[float]:
    """Numbers that commas or spaces part.

    Raises:
        UserError: If something else is among them.
    """
    try:
        return [float(part) for part in str(text).replace(",", " ").split()]
    except ValueError:
        raise UserError(f"the strengths are {text!r}; write numbers such as 0, 0.5, 1") from None
