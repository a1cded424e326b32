"""The Generate tab's fields as a request, and an image's own settings as fields."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_diffusion.cli.requested_images import RequestedImages
from dora_diffusion.cli.settings import adapter_and_strength
from dora_diffusion.config.base import BaseModel
from dora_diffusion.config.families import FAMILIES
from dora_diffusion.config.fields import TOKENS_PER_CHUNK, ConfigError
from dora_diffusion.config.prompts import DENOISE, read_styles, with_styles
from dora_diffusion.config.run import SampleSettings
from dora_diffusion.formats.adapter.metadata import agreed_reading, split_triggers, stated_reading
from dora_diffusion.formats.adapter.stored import read_metadata
from dora_diffusion.formats.files.runs import RESULT_NAME
from dora_diffusion.models.locate import cached_models, looks_local, model_info
from dora_diffusion.models.schedulers import SCHEDULERS
from dora_diffusion.numerics.weights import Strengths
from dora_diffusion.studio.app.context import Context
from dora_diffusion.studio.app.settings import PROMPT_LIMIT, default_guidance
from dora_diffusion.studio.jobs.bases import path_here
from dora_diffusion.studio.jobs.image_generator import MAX_BATCH, GenerationRequest
from dora_diffusion.studio.jobs.inputs import input_path, keep_input, read_input
from dora_diffusion.studio.jobs.snapshot import Job, chosen_adapter
from dora_diffusion.studio.jobs.store import UserError, clean_text
from dora_diffusion.studio.jobs.uploads import read_mask

if TYPE_CHECKING:
    from dora_diffusion.sampling.detail import Detail
    from dora_diffusion.sampling.generate import SamplingSettings
    from dora_diffusion.sampling.stack import AdapterUse

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
_DEFAULTS = {setting.name: setting.default for setting in RequestedImages.settings()}
# Values of fields where an image does not state another.
UNSET: Mapping[str, Any] = {
    **{name: "" if _DEFAULTS[name] in (None, []) else _DEFAULTS[name] for name in LABELS},
    "seed": -1, "steps": SampleSettings.validation_inference_steps, "scheduler": OWN,
    "denoise": DENOISE, "hires": 1, "style": [],
    **dict.fromkeys(MORE, ""), **{strength: 1 for strength, _ in MORE.values()},
}  # fmt: skip
_NAME = re.compile(rf"\b({'|'.join(name for name in LABELS if '_' in name)})\b")


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
    context: Context, choice: str | None, form: Mapping[str, Any]
) -> GenerationRequest:
    """Return the request that the fields ask for.

    Raises:
        UserError: If the run is gone or a value is out of its limits.
    """
    base, adapter, trigger, usual_guidance = _model(context, str(choice or BASE))
    if path_here(base) is None:
        raise UserError(
            f"{base.path} is not on this machine, and no image waits for a download: get it by "
            f"'hf download {base.path}', or by training on it"
        )
    closer = clean_text(form["detail_prompt"], PROMPT_LIMIT, "prompt of the detail pass")
    first = next(iter(split_triggers(trigger)), "")
    texts = (_styled(context, form, "prompt"), closer)
    prompt, closer = (text.replace("{subject}", first) for text in texts)
    form = {**form, "detail_prompt": closer}
    if "<lora:" in f"{prompt} {closer}":
        raise UserError(
            "the prompt holds <lora:...>, as web UIs load an adapter; choose it as a run or "
            "checkpoint, or as one of more adapters"
        )
    adapters = [(adapter, form["strength"])] if adapter else []
    for name, (strength, _) in MORE.items():
        if form.get(name):
            run, _, checkpoint = str(form[name]).partition("/")
            try:
                path = chosen_adapter(context.job(run), checkpoint)
            except UserError as error:
                raise UserError(f"{MORE[name][1]} adapter: {error}") from error
            adapters.append((path, form[strength]))
    guidance = _number(form, "guidance_scale", "a number from 0 to 30", float, most=30)
    try:
        uses = _uses(adapters, form)
        settings = _settings(context, form, uses, usual_guidance if guidance is None else guidance)
    except (ConfigError, ValueError) as error:
        raise UserError(in_words(error)) from error
    return GenerationRequest(
        base=base,
        adapters=tuple(uses),
        prompt=prompt,
        settings=settings,
        seed=int(-1 if form["seed"] is None else form["seed"]),
        count=int(form["num_images"] or 1),
        clip_skip=_number(form, "clip_skip", "a whole number"),
        wildcards=bool(form["wildcards"]),
        max_token_length=_number(form, "max_token_length", "a whole number"),
    )


def _styled(context: Context, form: Mapping[str, Any], name: str) -> str:
    """A prompt, or the negative one, with the styles that are chosen.

    Raises:
        UserError, ConfigError: If it is too long, or a style is not there.
    """
    chosen = [str(style) for style in form["style"] or ()]
    styles = read_styles(context.workspace.styles, chosen) if chosen else []
    text = with_styles(str(form[name] or ""), [getattr(style, name) for style in styles])
    return clean_text(text, PROMPT_LIMIT, LABELS[name].lower())


def in_words(error: Exception) -> str:
    """An error with settings as their fields are labelled."""
    return _NAME.sub(lambda name: f"“{LABELS[name[1]]}”", str(error))


def _uses(adapters: Sequence[tuple[Path, Any]], form: Mapping[str, Any]) -> list[AdapterUse]:
    """The adapters with their strengths."""
    from dora_diffusion.sampling.stack import uses_of

    layers = dict(adapter_and_strength(word) for word in str(form["layer_strength"] or "").split())
    texts = [text for text in str(form["strength_schedule"] or "").split("|") if text.strip()]
    if (layers or texts) and not adapters:
        raise UserError("no adapter is chosen; empty the strengths of layers and over the steps")
    if len(texts) not in (0, 1, len(adapters)):
        raise UserError(
            f"the strength over the steps has {len(texts)} parts, for {len(adapters)} adapters; "
            "write one, or one for each, with | between them"
        )
    parts = [float(form[name]) for name in ("direction_strength", "magnitude_strength")]
    strengths = [(path, Strengths(float(strength), *parts)) for path, strength in adapters]
    return uses_of(strengths, layers, texts)


def _settings(
    context: Context, form: Mapping[str, Any], uses: Sequence[AdapterUse], guidance: float
) -> SamplingSettings:
    """The fields as `SamplingSettings`; the model of a detail pass is opened."""
    from dora_diffusion.sampling.generate import SamplingSettings
    from dora_diffusion.sampling.stack import name_of

    image, mask = read_input(context.workspace, form["image"]), None
    if image is not None:
        mask = _mask(context, form["mask_image"], image.size)
    hires = float(form["hires"] or 1)
    if image is not None and hires != 1:
        raise UserError(
            "a second pass is of images from text alone; set it to 1, or remove the image to start "
            "from"
        )
    return SamplingSettings(
        steps=int(form["steps"] or SamplingSettings.steps),
        guidance_scale=guidance,
        scheduler=None if form["scheduler"] == OWN else form["scheduler"],
        width=_number(form, "width", "pixels, such as 512", least=1),
        height=_number(form, "height", "pixels, such as 512", least=1),
        negative_prompt=_styled(context, form, "negative_prompt"),
        image=image,
        mask_image=mask,
        guidance_rescale=float(form["guidance_rescale"] or 0),
        denoise=float(form["denoise"]) if image is not None else None,
        hires=hires if hires != 1 else None,
        hires_denoise=float(form["hires_denoise"]),
        hires_steps=_number(form, "hires_steps", "a whole number", least=1),
        strength_schedules={name_of(n): use.schedule for n, use in enumerate(uses) if use.schedule},
        prompt_weights=bool(form["prompt_weights"]),
        detail=_detail(context, form),
    )


def _detail(context: Context, form: Mapping[str, Any]) -> Detail | None:
    """The detail pass; None where no model is named.

    Raises:
        UserError: If the model may not be loaded, or is not on this machine.
        ValueError: If it gives no masks, or a value cannot work.
    """
    name = str(form["detail"] or "").strip()
    if not name:
        return None
    from dora_diffusion.sampling.detail import Detail

    name = context.allowed_model(name)
    is_here = name.partition(":")[0] == "rembg" or Path(name).expanduser().is_dir()
    if not (is_here or looks_local(name) or name in cached_models()):
        raise UserError(f"{name} is not on this machine; get it by 'hf download {name}'")
    return Detail.open(
        name, str(form["detail_label"] or "").strip(), denoise=float(form["detail_denoise"]),
        padding=int(form["detail_padding"]), prompt=form["detail_prompt"],
    )  # fmt: skip


def _mask(context: Context, value: object, size: tuple[int, int]) -> Any:
    """The mask that was painted, or is kept under a name; None where nothing is painted."""
    if not str(value or "").startswith("data:"):
        kept = read_input(context.workspace, value)
        return kept and kept.convert("L")
    mask = read_mask(value)
    if mask is None or not mask.getbbox():
        return None
    mask = mask.resize(size).point(lambda value: 255 if value > 32 else 0)
    keep_input(context.workspace, mask)
    return mask


def _number(
    form: Mapping[str, Any],
    name: str,
    wanted: str,
    kind: type = int,
    least: float = 0,
    most: float = math.inf,
) -> Any:
    """The number of a field; None where it is empty."""
    text = str(form.get(name) or "").strip()
    if not text:
        return None
    with contextlib.suppress(ValueError):
        if least <= (number := kind(text)) <= most:
            return number
    called = name.removesuffix("_scale").replace("_", " ")
    raise UserError(f"the {called} is {text!r}; write {wanted}, or leave it empty")


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
    job = context.job(kind)
    base = replace(job.base_model, path=context.allowed_model(job.base))
    guidance = float(job.settings.get("validation_guidance_scale") or default_guidance(job.base))
    return base, chosen_adapter(job, name), job.trigger, guidance


@dataclass(frozen=True)
class Restored:
    """Fields and their values that an image's text gives.

    Attributes:
        choice: The run, checkpoint or model; None where none here is the image's.
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
    form["strength"], *_ = [*adapters.values(), 1]
    further = [*adapters.items()][1:]
    for (name, (strength_name, _)), (adapter, strength) in zip(MORE.items(), further, strict=False):
        form |= {name: adapter, strength_name: strength}
    choice = next(iter(adapters), None) or _base_of(context, fields, unread)
    if adapters and "Model" in fields:
        base = str(_model(context, next(iter(adapters)))[0].path)
        if images.model_name(base) != fields["Model"]:
            unread.append(f"the model {fields['Model']}: the adapter's is {base}")
    if images.LOADED in fields:
        unread.append(f"loaded with {fields[images.LOADED]}")
    form |= _reading_of(context, adapters, choice, fields)
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
    return Restored(choice, form, batch, tuple(unread))


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
) -> tuple[dict[str, float], str]:
    """The strengths of an image's adapters by the choice that each is here.

    Returns:
        These, and the share that text encoders have of them as a strength of layers; empty: all.
    """
    from dora_diffusion.sampling.images import UsedAdapter

    if "Adapter" not in fields:
        return {}, ""
    known = {
        job.id if own == RESULT_NAME else f"{job.id}-{own}": (job, own)
        for job in context.jobs()
        for own in _names(job)
    }
    found, shares, hashes = dict[str, float](), set[float](), fields.get("Lora hashes", "")
    names, strengths = (fields[key].split(", ") for key in ("Adapter", "Adapter strength"))
    for name, text in zip(names, strengths, strict=True):
        if name not in known or len(found) > len(MORE):
            unread.append(f"the adapter {name}, which is no run here: choose it")
            continue
        job, own = known[name]
        used = UsedAdapter.of(chosen_adapter(job, own))
        if hashes and used.hash and used.hash not in hashes:
            unread.append(f"the adapter {name} as it was then: it was trained further")
        with contextlib.suppress(ValueError):
            encoders, *_, unet = map(float, text.split(":") * 2)
            found[job.id if own == job.stands else f"{job.id}/{own}"] = unet
            share = encoders / unet if unet else math.inf
            shares.add(1.0 if encoders == unet else round(share, 9) + 0)
    if len(shares) > 1 or math.inf in shares:
        unread.append(
            f"strengths {fields['Adapter strength']} of text encoders and UNet: the UNet's are of "
            "both"
        )
        shares.clear()
    return found, "".join(f"text_encoder*:{share:.9g}" for share in shares - {1.0})


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
    context: Context, adapters: Iterable[str], choice: str | None, fields: Mapping[str, str]
) -> dict[str, str]:
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
    files = [_model(context, name)[1] for name in adapters]
    agreed = agreed_reading([read_metadata(file).extra for file in files if file])
    stated = {"clip_skip": 0, "max_token_length": TOKENS_PER_CHUNK, **stated_reading(agreed)}
    return {
        name: "" if read.get(name, stated[name]) == stated[name] else str(read[name])
        for name in stated
    }
