"""The Generate tab's fields as a request, and an image's own settings as fields."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dora_diffusion.cli.repeat import loaded_text
from dora_diffusion.cli.requested_images import RequestedImages
from dora_diffusion.config.base import BaseModel
from dora_diffusion.config.families import FAMILIES
from dora_diffusion.config.fields import TOKENS_PER_CHUNK
from dora_diffusion.config.prompts import DENOISE, settings_line
from dora_diffusion.config.run import SampleSettings
from dora_diffusion.config.wording import quoted
from dora_diffusion.formats.adapter.metadata import agreed_reading, split_triggers, stated_reading
from dora_diffusion.formats.adapter.stored import read_metadata
from dora_diffusion.formats.files.runs import RESULT_NAME
from dora_diffusion.models.locate import cached_models, looks_local, model_info
from dora_diffusion.models.schedulers import SCHEDULERS
from dora_diffusion.numerics.weights import Strengths
from dora_diffusion.studio.app.context import Context
from dora_diffusion.studio.app.settings import PROMPT_LIMIT, default_guidance
from dora_diffusion.studio.jobs.bases import path_here
from dora_diffusion.studio.jobs.image_generator import MAX_BATCH, GenerationRequest, prompt_messages
from dora_diffusion.studio.jobs.inputs import input_path, keep_input, read_input
from dora_diffusion.studio.jobs.snapshot import Job, adapter_of, chosen_adapter
from dora_diffusion.studio.jobs.store import GONE, UserError, clean_text
from dora_diffusion.studio.jobs.uploads import read_mask

OWN = "the model's own"
SUBJECT = "mug"
BASE, MERGED = "base", "merged"
# Of `GenerateSettings`, the settings that have a field, as it is labelled. Each keeps its name.
LABELS: Mapping[str, str] = {
    "prompt": "Prompt", "negative_prompt": "Negative prompt", "seed": "Seed",
    "num_images": "Images", "strength": "Strength", "direction_strength": "Direction",
    "magnitude_strength": "Magnitude", "layer_strength": "Strength of layers",
    "strength_schedule": "Strength over the steps", "steps": "Steps", "scheduler": "Scheduler",
    "guidance_scale": "Guidance (CFG)", "guidance_rescale": "Guidance rescale", "width": "Width",
    "height": "Height", "max_token_length": "Tokens read (75, 150, ...; 0: all)",
    "clip_skip": "Clip skip, as Diffusers counts",
    "prompt_weights": "Weights in prompts: (word:1.2), [word], BREAK",
    "image": "Image to start from", "mask_image": "Mask", "denoise": "Denoising strength",
    "hires": "Second pass, times as large", "hires_denoise": "Second pass denoising strength",
    "hires_steps": "Second pass steps", "style": "Styles",
    "wildcards": "Draw {a|b} and __file__ of the prompt, by each image's seed",
    "detail": "Model that finds the face or subject", "detail_label": "Label that it finds",
    "detail_prompt": "Prompt of the detail pass",
    "detail_denoise": "Denoising strength of the detail pass",
    "detail_padding": "Pixels around what is found",
}  # fmt: skip
# Adapters beside the first: names of their fields and of their strengths', and labels.
MORE: Mapping[str, tuple[str, str]] = {
    f"adapter_{word}": (f"strength_{word}", word.capitalize())
    for word in ("second", "third", "fourth")
}
_KNOWN = {setting.name: setting for setting in RequestedImages.settings()}
_DEFAULTS = {name: setting.default for name, setting in _KNOWN.items()}
# Settings that a field gives as its value is. Images are kept files, see `_inputs`.
SETTINGS = {name: _KNOWN[name] for name in LABELS if name not in ("image", "mask_image")}
# Values of fields where an image does not state another.
UNSET: Mapping[str, Any] = {
    **{name: "" if _DEFAULTS[name] in (None, []) else _DEFAULTS[name] for name in LABELS},
    "seed": -1, "steps": SampleSettings.validation_inference_steps, "scheduler": OWN,
    "denoise": DENOISE, "hires": 1, "style": [],
    **dict.fromkeys(MORE, ""), **{strength: 1 for strength, _ in MORE.values()},
}  # fmt: skip
# Values of fields that leave a setting at its default, and separators of those that are lists.
_NONE: Mapping[str, Any] = {"seed": -1, "scheduler": OWN, "hires": 1}
_SEPARATORS: Mapping[str, str | None] = {"layer_strength": None, "strength_schedule": "|"}
_NAME = re.compile(rf"(?:--|\b)({'|'.join(name for name in LABELS if '_' in name)})\b")


# Fields that are in sight as the tab opens; all others act out of sight too.
IN_SIGHT = frozenset((
    "prompt", "negative_prompt", "seed", "num_images", "strength", "direction_strength",
    "magnitude_strength",
))  # fmt: skip
# Fields that do nothing without another one.
_DETAILS: Mapping[str, str] = {
    "denoise": "image", "mask_image": "image", "hires_denoise": "hires", "hires_steps": "hires",
    **{name: "detail" for name in LABELS if name.startswith("detail_")},
    **{strength: name for name, (strength, _) in MORE.items()},
}  # fmt: skip


def acting(context: Context, form: Mapping[str, Any]) -> list[str]:
    """Describe each setting out of sight that changes the images, as its field is labelled."""
    changed = {n for n in form.keys() - IN_SIGHT if form[n] not in (None, "", [], UNSET[n])}
    acts = [name for name in UNSET if name in changed and _DETAILS.get(name, name) in changed]
    listed = adapter_choices(context.jobs()) if changed & MORE.keys() else []
    adapters = {value: label for label, value in listed}
    return [_described(name, form[name], adapters) for name in acts]


def prompt_notes(context: Context, choice: str | None, form: Mapping[str, Any]) -> list[str]:
    """Warnings about the prompt before images are made; a form with an error has none yet."""
    try:
        first = choice or choices(context, context.jobs())[0][1]
        request = make_request(context, first, form)
        return prompt_messages(request, [request.styled("prompt")])
    except (ValueError, OSError):
        return []


def _described(name: str, value: Any, adapters: Mapping[str, str]) -> str:
    """A setting as its field is labelled, with its value as it is shown there."""
    if name in MORE:
        return f"{MORE[name][1]} adapter: {adapters.get(value, value)}"
    label = LABELS.get(name) or next(f"{w} strength" for s, w in MORE.values() if s == name)
    if name in ("image", "mask_image") or value is True:
        return label
    if name == "scheduler":
        value = SCHEDULERS[value].title if value in SCHEDULERS else value
    shown = ", ".join(map(str, value)) if isinstance(value, list) else value
    # Without what the label says of the values that can be.
    return f"{re.split(r':| [(]', label)[0]}: {'off' if value is False else shown}"


def make_request(
    context: Context,
    choice: str | None,
    form: Mapping[str, Any],
    batch: tuple[int, int] = (1, 0),
) -> GenerationRequest:
    """Return the request that the fields ask for.

    Args:
        context: The app.
        choice: The run, checkpoint or model.
        form: The fields' values by name.
        batch: As `GenerationRequest.batch`.

    Raises:
        UserError: If the run is gone or a value is out of its limits.
    """
    base, adapter, trigger, guidance = _model(context, str(choice or BASE))
    if path_here(base) is None:
        raise UserError(
            f"{base.path} is not on this machine, and no image waits for a download: get it by "
            f"'hf download {base.path}', or by training on it"
        )
    subject, workspace = next(iter(split_triggers(trigger)), ""), context.workspace
    model = {name: value for name, value in vars(base).items() if name != "path"}
    try:
        values = {"guidance_scale": guidance, **_values(context, form, subject)}
        values |= _adapters(context, adapter, form)
        request = GenerationRequest(
            base=str(base.path), **model, **values, styles=str(workspace.styles),
            wildcard_dir=str(workspace.wildcards), subject=subject, batch=batch,
        )  # fmt: skip
        for name in ("prompt", "negative_prompt"):
            clean_text(request.styled(name), PROMPT_LIMIT, LABELS[name].lower())
        if "<lora:" in f"{request.styled('prompt')} {request.detail_prompt}":
            raise UserError(
                "the prompt holds <lora:...>, as web UIs load an adapter; choose it as a run or "
                "checkpoint, or as one of more adapters"
            )
        _ = request.sampling  # What cannot be opened is said before anything is waited for.
    except ValueError as error:
        raise UserError(in_words(error)) from error
    return request


def _values(context: Context, form: Mapping[str, Any], subject: str) -> dict[str, Any]:
    """The fields as settings of ``generate``, without those that are empty.

    Raises:
        UserError, ConfigError: If one cannot be.
    """
    values = dict[str, Any]()
    if GONE in (form["style"] or []):
        raise UserError("a style that was chosen is no longer here; choose another one")
    for name in SETTINGS:
        value = form[name]
        if name in _SEPARATORS:
            parts = str(value or "").split(_SEPARATORS[name])
            value = [part.strip() for part in parts if part.strip()]
        elif name.endswith("prompt"):
            if line := settings_line(str(value or "")):
                raise UserError(
                    f"the {LABELS[name].lower()} holds the settings of an image ({quoted(line)}); "
                    "load them by “Load settings from an image”, or paste its first line alone"
                )
            value = clean_text(value, PROMPT_LIMIT, LABELS[name].lower())
            value = value if name == "negative_prompt" else value.replace("{subject}", subject)
        elif isinstance(value, str):
            value = value.strip()
        if value not in (None, "", [], _NONE.get(name)):
            values[name] = SETTINGS[name].cast(value)
    if "detail" in values:
        values["detail"] = _detail(context, values["detail"])
    inputs = _inputs(context, form)
    if not inputs:
        values.pop("denoise", None)
    return values | inputs


def _adapters(context: Context, adapter: Path | None, form: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of adapters, the run's first; the strength of an only one is not in its word.

    Raises:
        UserError, ValueError: If one is gone, none is there for its strengths, or one cannot be.
    """
    adapters = [(adapter, form["strength"])] if adapter else []
    for name, (strength, word) in MORE.items():
        if form.get(name):
            run, _, checkpoint = str(form[name]).partition("/")
            try:
                path = chosen_adapter(context.job(run), checkpoint)
            except UserError as error:
                raise UserError(f"{word} adapter: {error}") from error
            adapters.append((path, form[strength]))
    if not adapters and any(str(form[name] or "").strip() for name in _SEPARATORS):
        raise UserError("no adapter is chosen; empty the strengths of layers and over the steps")
    strengths = [Strengths(_KNOWN["strength"].cast(value)).strength for _, value in adapters]
    words = [str(path) for path, _ in adapters]
    if len(words) == 1:
        return {"adapter": words, "strength": strengths[0]}
    words = [f"{path}:{strength}" for path, strength in zip(words, strengths, strict=True)]
    return {"adapter": words or None, "strength": 1.0}


def in_words(error: Exception) -> str:
    """An error with settings as their fields are labelled."""
    return _NAME.sub(lambda name: f"“{LABELS[name[1]]}”", str(error))


def _detail(context: Context, name: str) -> str:
    """The model of a detail pass.

    Raises:
        UserError: If it may not be loaded, or is not on this machine.
    """
    name = context.allowed_model(name)
    is_here = name.partition(":")[0] == "rembg" or Path(name).expanduser().is_dir()
    if not (is_here or looks_local(name) or name in cached_models()):
        raise UserError(f"{name} is not on this machine; get it by 'hf download {name}'")
    return name


def _inputs(context: Context, form: Mapping[str, Any]) -> dict[str, str]:
    """The files of the image to start from and its mask, which was painted or is kept already.

    Raises:
        UserError: If one is gone.
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
    return {name: str(input_path(workspace, kept)) for name, kept in names.items() if kept}


def choices(context: Context, jobs: Sequence[Job]) -> list[tuple[str, str]]:
    """Return the choices of what to make images with, and labels: the newest result first."""
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
        # The selected adapter, then the others, newest first. One made elsewhere has no steps.
        listed.append((_called(job, job.stands), job.id))
        listed += [
            (_called(job, name), f"{job.id}/{name}")
            for name in reversed(_names(job))
            if name != job.stands
        ]
    return listed


def _called(job: Job, name: str) -> str:
    """An adapter of a run in a list: at its last step there may be a checkpoint and the result."""
    steps = job.step_of(name)
    marks = [f"step {steps}"] if steps else []
    if steps and name == RESULT_NAME:
        marks.append("the result")
    if name == job.chosen:
        marks.append("chosen")
    return " · ".join([job.label, ", ".join(marks)] if marks else [job.label])


def _names(job: Job) -> list[str]:
    """The names of a run's adapters."""
    return [*job.checkpoints, *([RESULT_NAME] if job.has_result else [])]


def _model(context: Context, choice: str) -> tuple[BaseModel, Path | None, str, float]:
    """A base model alone, a merged model, or a run with the name of its checkpoint.

    Returns:
        The base, the adapter, the trigger words, and the usual guidance scale.
    """
    kind, _, name = choice.partition("/")
    if kind == BASE:
        base = BaseModel(context.allowed_model(name))
        return base, None, SUBJECT, default_guidance(name)
    if kind == MERGED:
        job = context.job(name)
        if job.kind != "export" or job.state != "done":
            raise UserError("this merged model no longer exists; choose another one")
        # A file's configuration is its base's, or what its base was loaded with.
        own = context.job(job.record.run).settings.get("model_config")
        config = own or (None if job.base.endswith(".safetensors") else job.base)
        base = BaseModel(job.record.output, model_config=config)
        return base, None, job.trigger, default_guidance(job.base)
    job = context.job(kind, "Run or checkpoint")
    base = replace(job.base_model, path=context.allowed_model(job.base))
    guidance = float(job.settings.get("validation_guidance_scale") or default_guidance(job.base))
    return base, chosen_adapter(job, name), job.trigger, guidance


@dataclass(frozen=True)
class Restored:
    """Fields and their values that an image's text gives.

    Attributes:
        choice: The run, checkpoint or model; None where no model here is the image's, `GONE` where
            its first adapter is not here.
        form: The fields' values by name; all of them, those that are not stated unset.
        batch: Images of its batch, and its place there.
        unread: A line for each thing that another image would be made without.
    """

    choice: str | None
    form: Mapping[str, Any]
    batch: tuple[int, int]
    unread: tuple[str, ...]


def restore(context: Context, text: str) -> Restored:
    """The fields' values of an image's generation parameters."""
    from dora_diffusion.sampling import images

    fields = images.parse_parameters(text)
    values, others = images.settings_of(fields)
    others += [f"{name} {value}" for name, value in values.items() if name not in UNSET]
    unread = [f"no field here: {other}" for other in others]
    given = {name: shown_value(name, values[name]) for name in values if name in UNSET}
    form = {**UNSET, **given}
    adapters, layers = _adapters_of(context, fields, unread)
    form["layer_strength"] = f"{form['layer_strength']} {layers}".strip()
    form["strength"] = adapters[0][1] if adapters else 1
    further = zip(MORE.items(), adapters[1:], strict=False)
    for (name, (strength_name, _)), (adapter, strength) in further:
        form |= {name: adapter, strength_name: strength}
    first = adapters[0][0] if adapters else ""
    choice = first if first not in ("", GONE) else _base_of(context, fields, unread)
    if choice == first and "Model" in fields:
        base = str(_model(context, first)[0].path)
        if images.model_name(base) != fields["Model"]:
            unread.append(f"the model {fields['Model']}: the adapter's is {base}")
    loaded = loaded_text(_model(context, choice)[0]) if choice else ""
    if images.LOADED in fields and fields[images.LOADED] != loaded:
        unread.append(f"loaded with {fields[images.LOADED]}")
    here = [name for name, _ in adapters if name != GONE]
    form |= _reading_of(context, here, choice, fields, unread)
    for name, key in (("image", images.INIT_IMAGE), ("mask_image", images.MASK_IMAGE)):
        form[name] = fields.get(key, "")
        if form[name] and input_path(context.workspace, form[name]) is None:
            unread.append(f"{LABELS[name]}: it is not here, choose or paint it")
            form[name] = ""
    model = str(form["detail"])
    if model and not model.startswith("rembg") and "/" not in model:
        unread.append(f"{LABELS['detail']}: {model} is a folder's name; give its path")
        form["detail"] = ""
    place = [fields.get(key, "") for key in (images.BATCH_SIZE, images.BATCH_POSITION)]
    size, position = (int(part) if part.isdecimal() else 0 for part in place)
    is_batch = position < size <= MAX_BATCH and position <= form["seed"]
    batch = (size, position) if is_batch else (1, 0)
    return Restored(first if first == GONE else choice, form, batch, tuple(unread))


def shown_value(name: str, value: Any) -> Any:
    """A setting's value as its field has it."""
    if name == "style":
        return value
    if isinstance(value, list):
        return (" | " if name == "strength_schedule" else " ").join(value)
    if isinstance(value, float):
        value = (
            UNSET[name] if not math.isfinite(value) else int(value) if value.is_integer() else value
        )
    return value if isinstance(UNSET[name], (bool, int, float)) else str(value)


def _adapters_of(
    context: Context, fields: Mapping[str, str], unread: list[str]
) -> tuple[list[tuple[str, float]], str]:
    """The adapters of an image, in its order: each one's choice, or `GONE`, and its strength.

    Returns:
        These, and the share that text encoders have of them as a strength of layers; empty: all.
    """
    from dora_diffusion.numerics.weights import MergeStrengths
    from dora_diffusion.sampling import images

    known: dict[str, list[tuple[str, Path]]] = {}
    for job in context.jobs() if "Adapter" in fields else ():
        for checkpoint in _names(job):
            if path := adapter_of(job, checkpoint):
                choice = job.id if checkpoint == job.stands else f"{job.id}/{checkpoint}"
                known.setdefault(images.adapter_name(path), []).append((choice, path))
    try:
        used, meaningless = images.adapters_of(fields)
    except ValueError as error:
        used, meaningless = [], [str(error)]
    unread += meaningless
    chosen, shares = list[tuple[str, float]](), set[float]()
    for adapter in used:
        files = known.get(adapter.name, [])
        if len(chosen) > len(MORE):
            unread.append(f"the adapter {adapter.name}: at most {len(chosen)} have a field here")
            continue
        same = [file for file in files if _has_hash(file[1], adapter.hash)]
        if not files:
            unread.append(
                f"the adapter {adapter.name} is not here any more; import its file, or choose "
                "another"
            )
        elif not same:
            unread.append(f"the adapter {adapter.name} as it was then: it was trained further")
        strengths = MergeStrengths.of(adapter.strengths)
        encoders, unet = strengths.text_encoder_strength, strengths.unet_strength
        choice = next((choice for choice, _ in same or files), GONE)
        chosen.append((choice, unet))
        share = encoders / unet if unet else math.inf
        shares.add(1.0 if encoders == unet else round(share, 9) + 0)
    if len(shares) > 1 or math.inf in shares:
        unread.append(
            f"strengths {fields['Adapter strength']} of text encoders and UNet: the UNet's are of "
            "both"
        )
        shares.clear()
    return chosen, "".join(f"text_encoder*:{share:.9g}" for share in shares - {1.0})


def _has_hash(path: Path, stated: str) -> bool:
    """Return whether an adapter's file has the hash that an image states, if both have one."""
    from dora_diffusion.sampling.images import UsedAdapter

    known = UsedAdapter.of(path).hash if stated else ""
    return not known or known == stated


def _base_of(context: Context, fields: Mapping[str, str], unread: list[str]) -> str | None:
    """The choice of the model that an image without adapters was made with."""
    from dora_diffusion.sampling.images import model_name

    model = fields.get("Model", "")
    for choice in (choice for _, choice in choices(context, context.jobs())):
        kind, _, name = choice.partition("/")
        path = context.job(name).record.output if kind == MERGED else name
        if kind in (BASE, MERGED) and model_name(path) == model:
            return choice
    unread.append(f"the model {model or 'is not stated'}: choose it")
    return None


def _reading_of(
    context: Context, adapters: Iterable[str], choice: str | None, fields: Mapping[str, str],
    unread: list[str],
) -> dict[str, str]:  # fmt: skip
    """Return how an image's prompts were read, where its adapters do not say the same."""
    from dora_diffusion.sampling.images import OWN_VERSION, TOKEN_LENGTH

    is_own = fields.get("Version", "").startswith(OWN_VERSION)
    text = fields.get("Clip skip", "")
    read = {"max_token_length": TOKENS_PER_CHUNK if is_own else 0}
    with contextlib.suppress(KeyError, ValueError):
        read["max_token_length"] = int(fields.get(TOKEN_LENGTH, read["max_token_length"]))
        if choice and (is_own or text):
            family = FAMILIES[model_info(str(_model(context, choice)[0].path)).family]
            first = family.web_ui_clip_skip(0)
            read["clip_skip"] = max(0, int(text or first) - first)
    if text and "clip_skip" not in read:
        unread.append(f"Clip skip {text}: choose a model first, then load the settings again")
    files = [_model(context, name)[1] for name in adapters]
    agreed = agreed_reading([read_metadata(file).extra for file in files if file])
    stated = {"clip_skip": 0, "max_token_length": TOKENS_PER_CHUNK, **stated_reading(agreed)}
    return {
        name: "" if read.get(name, stated[name]) == stated[name] else str(read[name])
        for name in stated
    }
