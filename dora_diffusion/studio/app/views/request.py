"""Conversion of the Generate tab's fields to a request."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from dora_diffusion.cli.requested_images import RequestedImages
from dora_diffusion.config.base import BaseModel
from dora_diffusion.config.images import DENOISE
from dora_diffusion.config.schedulers import SCHEDULERS
from dora_diffusion.config.wording import quoted
from dora_diffusion.formats.adapter.metadata import split_triggers
from dora_diffusion.formats.files.runs import RESULT_NAME
from dora_diffusion.formats.parameters import network_tags, settings_line
from dora_diffusion.numerics.weights import Strengths
from dora_diffusion.studio.app.context import Context
from dora_diffusion.studio.app.settings import PROMPT_LIMIT, default_guidance
from dora_diffusion.studio.jobs.bases import path_here
from dora_diffusion.studio.jobs.image_generator import GenerationRequest, prompt_messages
from dora_diffusion.studio.jobs.image_store import input_path, keep_input, read_input
from dora_diffusion.studio.jobs.snapshot import Job, chosen_adapter
from dora_diffusion.studio.jobs.store import UserError, clean_text
from dora_diffusion.studio.jobs.uploads import read_mask

OWN = "the model's own"
SUBJECT = "mug"
BASE, MERGED = "base", "merged"


class Field(NamedTuple):
    """Field of the form.

    Attributes:
        label: Label of the field.
        unset: Value of the unset field.
        needs: Field without which this one has no effect.
        is_visible: True if the field is visible when the tab opens; others are in folded sections.
        is_omitted: True if the unset value is not a value of the setting.
    """

    label: str
    unset: Any
    needs: str = ""
    is_visible: bool = False
    is_omitted: bool = False


MORE: Mapping[str, str] = {
    f"adapter_{word}": f"strength_{word}" for word in ("second", "third", "fourth")
}
"""Fields of further adapters, each with the field of its strength."""
# Settings in the order of the form: always shown, then in folded sections.
_VISIBLE = (
    "prompt", "negative_prompt", "seed", "num_images",
    "strength", "direction_strength", "magnitude_strength",
)  # fmt: skip
_FOLDED = (
    "steps", "scheduler", "guidance_scale", "guidance_rescale", "width", "height",
    "max_token_length", "clip_skip", "image", "mask_image", "denoise",
)  # fmt: skip
_LABELS = {
    "num_images": "Images", "direction_strength": "Direction", "magnitude_strength": "Magnitude",
    "guidance_scale": "Guidance (CFG)", "max_token_length": "Tokens read (75, 150, ...; 0: all)",
    "clip_skip": "Clip skip, as Diffusers counts",
    "image": "Image to start from", "mask_image": "Mask", "denoise": "Denoising strength",
}  # fmt: skip
_OMITTED = {"seed": -1, "scheduler": OWN}
_KNOWN = {setting.name: setting for setting in RequestedImages.settings()}


def _form() -> dict[str, Field]:
    fields = dict[str, Field]()
    for name in (*_VISIBLE, *_FOLDED):
        default, needs = _KNOWN[name].default, "image" if name in ("mask_image", "denoise") else ""
        unset = DENOISE if name == "denoise" else "" if default is None else default
        label = _LABELS.get(name, name.replace("_", " ").capitalize())
        fields[name] = Field(
            label, _OMITTED.get(name, unset), needs, name in _VISIBLE, name in _OMITTED
        )
    for name, strength in MORE.items():
        word = name.partition("_")[2].capitalize()
        fields[name] = Field(f"{word} adapter", "")
        fields[strength] = Field(f"{word} strength", 1, name)
    return fields


FORM: Mapping[str, Field] = _form()
"""The form: names of settings of ``generate``, and of further adapters, each with its field."""
UNSET: Mapping[str, Any] = {name: field.unset for name, field in FORM.items()}
"""Values of the form with all fields unset."""
_NAME = re.compile(rf"(?:--|\b)({'|'.join(name for name in FORM if '_' in name)})\b")


def acting(context: Context, form: Mapping[str, Any]) -> list[str]:
    """Describe each active setting in a folded section by its label and value."""
    changed = {
        name
        for name, field in FORM.items()
        if not field.is_visible and form[name] not in (None, "", UNSET[name])
    }
    acts = [name for name in FORM if name in changed and (FORM[name].needs or name) in changed]
    listed = adapter_choices(context.jobs()) if changed & MORE.keys() else []
    adapters = {value: label for label, value in listed}
    return [_described(name, form[name], adapters) for name in acts]


def prompt_notes(context: Context, choice: str | None, form: Mapping[str, Any]) -> list[str]:
    """Return warnings about the prompt; empty for a form with an error."""
    try:
        first = choice or choices(context, context.jobs())[0][1]
        request = make_request(context, first, form)
        return prompt_messages(request, [request.prompt])
    except (ValueError, OSError):
        return []


def _described(name: str, value: Any, adapters: Mapping[str, str]) -> str:
    """Return the label of a setting with its value."""
    label = FORM[name].label
    if name in ("image", "mask_image") or value is True:
        return label
    if name == "scheduler":
        value = SCHEDULERS[value].title if value in SCHEDULERS else value
    elif name in MORE:
        value = adapters.get(value, value)
    # Without the label's hint about values.
    return f"{re.split(r':| [(]', label)[0]}: {'off' if value is False else value}"


def make_request(
    context: Context,
    choice: str | None,
    form: Mapping[str, Any],
    batch_position: tuple[int, int] = (1, 0),
) -> GenerationRequest:
    """Create a request from the fields.

    Args:
        context: The app.
        choice: The run, checkpoint or model.
        form: The fields' values by name.
        batch_position: Position of a repeated image, see `GenerationRequest`.

    Raises:
        UserError: If the run was deleted, or a value is outside its limits.
    """
    source = Chosen.of(context, str(choice or BASE))
    base = source.base
    if path_here(base) is None:
        raise UserError(
            f"{base.path} is not on this machine, and no image waits for a download: get it by "
            f"'hf download {base.path}', or by training on it"
        )
    model = {name: value for name, value in vars(base).items() if name != "path"}
    try:
        values = {"guidance_scale": source.guidance_scale, **_values(context, form, source.subject)}
        values |= _adapters(context, source.adapter, form)
        request = GenerationRequest.of(
            base=str(base.path), **model, **values, batch_position=batch_position
        )
        if network_tags(request.prompt):
            raise UserError(
                "the prompt holds <lora:...>, as web UIs load an adapter; choose it as a run or "
                "checkpoint, or as one of more adapters"
            )
        _ = request.sampling  # Raise errors about files now, before waiting for the device.
    except ValueError as error:
        raise UserError(in_words(error)) from error
    return request


def _values(context: Context, form: Mapping[str, Any], subject: str) -> dict[str, Any]:
    """Return the non-empty fields as settings of ``generate``.

    Raises:
        UserError, ConfigError: If a value is invalid.
    """
    values = dict[str, Any]()
    for name, field in FORM.items():
        if name not in _KNOWN or name in ("image", "mask_image"):
            continue
        value, label = form[name], field.label.lower()
        if name.endswith("prompt"):
            if line := settings_line(str(value or "")):
                raise UserError(
                    f"the {label} holds the settings of an image ({quoted(line)}); "
                    "load them by “Load settings from an image”, or paste its first line alone"
                )
            value = clean_text(value, PROMPT_LIMIT, label)
            value = value if name == "negative_prompt" else value.replace("{subject}", subject)
        elif isinstance(value, str):
            value = value.strip()
        if value not in (None, "", field.unset if field.is_omitted else None):
            values[name] = _KNOWN[name].cast(value)
    inputs = _inputs(context, form)
    if not inputs:
        values.pop("denoise", None)
    return values | inputs


def _adapters(context: Context, adapter: Path | None, form: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of adapters, the run's first.

    A single adapter has its strength in a separate setting.

    Raises:
        UserError, ValueError: If an adapter was deleted, or a strength is invalid.
    """
    adapters = [(adapter, form["strength"])] if adapter else []
    for name, strength in MORE.items():
        if form.get(name):
            run, _, checkpoint = str(form[name]).partition("/")
            try:
                path = chosen_adapter(context.job(run), checkpoint)
            except UserError as error:
                raise UserError(f"{FORM[name].label}: {error}") from error
            adapters.append((path, form[strength]))
    strengths = [Strengths(_KNOWN["strength"].cast(value)).strength for _, value in adapters]
    words = [str(path) for path, _ in adapters]
    if len(words) == 1:
        return {"adapter": words, "strength": strengths[0]}
    words = [f"{path}:{strength}" for path, strength in zip(words, strengths, strict=True)]
    return {"adapter": words or None, "strength": 1.0}


def in_words(error: Exception) -> str:
    """Return an error's text with the labels of fields instead of settings' names."""
    return _NAME.sub(lambda name: f"“{FORM[name[1]].label}”", str(error))


def _inputs(context: Context, form: Mapping[str, Any]) -> dict[str, str]:
    """Return the files of the image to start from and its mask; a painted mask is stored first.

    Raises:
        UserError: If a file does not exist.
    """
    workspace, names = context.workspace, {n: form[n] for n in ("image", "mask_image")}
    image = read_input(workspace, names["image"])
    if image is None:
        return {}
    if str(names["mask_image"] or "").startswith("data:"):
        mask = read_mask(names["mask_image"])
        names["mask_image"] = ""
        if mask is not None and mask.getbbox():
            mask = mask.resize(image.size).point(lambda value: 255 if value > 32 else 0)
            names["mask_image"] = keep_input(workspace, mask)
    read_input(workspace, names["mask_image"])
    return {field: str(input_path(workspace, name)) for field, name in names.items() if name}


def choices(context: Context, jobs: Sequence[Job]) -> list[tuple[str, str]]:
    """Return the choices of models with labels, the newest result first."""
    return [
        *adapter_choices(jobs),
        *(
            (f"{job.label} (one file)", f"{MERGED}/{job.id}")
            for job in jobs
            if job.kind == "export" and job.state == "done"
        ),
        *((f"{name} alone", f"{BASE}/{name}") for name in context.models),
    ]


def adapter_choices(jobs: Sequence[Job]) -> list[tuple[str, str]]:
    """Return the runs and checkpoints with an adapter, the newest first."""
    listed = []
    for job in (job for job in jobs if job.stands):
        # The selected adapter, then the other ones, newest first.
        listed.append((_called(job, job.stands), job.id))
        listed += [
            (_called(job, name), f"{job.id}/{name}")
            for name in reversed(adapter_names(job))
            if name != job.stands
        ]
    return listed


def _called(job: Job, name: str) -> str:
    """Return the label of a run's adapter. The last step may have a checkpoint and a result."""
    steps = job.step_of(name)
    marks = [f"step {steps}"] if steps else []
    if steps and name == RESULT_NAME:
        marks.append("the result")
    if name == job.chosen:
        marks.append("chosen")
    return " · ".join([job.label, ", ".join(marks)] if marks else [job.label])


def adapter_names(job: Job) -> list[str]:
    """Return the names of a run's adapters."""
    return [*job.checkpoints, *([RESULT_NAME] if job.has_result else [])]


class Chosen(NamedTuple):
    """Models and defaults of a choice.

    Attributes:
        base: The base model, or a merged model.
        adapter: The adapter's file; None for a base or merged model alone.
        trigger: The trigger words.
        guidance_scale: Default guidance scale.
    """

    base: BaseModel
    adapter: Path | None
    trigger: str
    guidance_scale: float

    @property
    def subject(self) -> str:
        """Replacement of ``{subject}``: the trigger words, of the first of several subjects."""
        return next(iter(split_triggers(self.trigger)), "")

    @classmethod
    def of(cls, context: Context, choice: str) -> Chosen:
        """Look up a base model, a merged model, or a run with the name of its checkpoint.

        Raises:
            UserError: If the choice was deleted, or may not be used.
        """
        kind, _, name = choice.partition("/")
        if kind == BASE:
            base = BaseModel(context.allowed_model(name))
            return cls(base, None, SUBJECT, default_guidance(name))
        if kind == MERGED:
            job = context.job(name)
            if job.kind != "export" or job.state != "done":
                raise UserError("this merged model no longer exists; choose another one")
            # A single file takes the configuration of its base model.
            config = context.job(job.record.run).settings.get("model_config")
            config = config or (None if job.base.endswith(".safetensors") else job.base)
            base = BaseModel(job.record.output, model_config=config)
            return cls(base, None, job.trigger, default_guidance(job.base))
        job = context.job(kind, "Run or checkpoint")
        base = replace(job.base_model, path=context.allowed_model(job.base))
        if twin := job.settings.get("sample_model"):
            base = base.twin(context.allowed_model(twin))
        guidance = job.settings.get("validation_guidance_scale") or default_guidance(job.base)
        return cls(base, chosen_adapter(job, name), job.trigger, float(guidance))
