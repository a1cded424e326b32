"""Conversion of the page's fields to `TrainConfig`, and to the command line of the same run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dora_diffusion.cli.console.output import shown_command
from dora_diffusion.config import (
    PRESETS,
    Setting,
    TrainConfig,
    settings,
    unusual_rates,
    without_effect,
)
from dora_diffusion.config.answers import ForeignAnswers
from dora_diffusion.config.config_file import read_config_file
from dora_diffusion.config.families import DEFAULT_FAMILY, FAMILIES
from dora_diffusion.config.fields import ConfigError, flag_words
from dora_diffusion.config.flag_map import find_training_setting
from dora_diffusion.config.foreign import ForeignFileError
from dora_diffusion.config.images import SAMPLES
from dora_diffusion.config.presets import EMBEDDED as SMALL
from dora_diffusion.config.presets import preset_advice, preset_settings
from dora_diffusion.config.problems import read_values
from dora_diffusion.config.train import learns_from_photos
from dora_diffusion.models.embedded import MODELS
from dora_diffusion.models.locate import (
    EMBEDDED_PREFIX,
    UNKNOWN,
    ModelInfo,
    is_embedded,
    known_family,
    model_info,
    sampling_values,
)
from dora_diffusion.models.memory import Device, fitting_settings
from dora_diffusion.studio.jobs.store import UserError, clean_text
from dora_diffusion.studio.jobs.uploads import require_file, shown

PROMPT_LIMIT, NAME_LIMIT = 1000, 500
EMBEDDED_MODELS = tuple(f"{EMBEDDED_PREFIX}{name}" for name in MODELS)
EMBEDDED = EMBEDDED_MODELS[0]
DATASET_FILE = "subjects.yaml"

SETTINGS: Mapping[str, Setting] = {setting.name: setting for setting in settings()}
PROMPTS = tuple(name for name, setting in SETTINGS.items() if setting.one_line)
"""Settings of a run without photos with a separate field, one prompt per line."""
# Settings with a separate field, and settings that the app decides: the folder of a run, resuming,
# and publishing (in the Library).
_NOT_ADVANCED = frozenset((
    "pretrained_model_name_or_path", "dataset_config", "instance_data_dir", "instance_prompt",
    "token", "class_word", *PROMPTS, "validation_prompt", "output_dir", "overwrite_output_dir",
    "resume_from_checkpoint", "logging_dir", "push_to_hub", "hub_model_id", "feature",
))  # fmt: skip
ADVANCED: tuple[str, ...] = tuple(name for name in SETTINGS if name not in _NOT_ADVANCED)
# Advanced settings by heading, as in --help, under their command-line names.
GROUPS: Mapping[str, tuple[str, ...]] = {
    group: tuple(name for name in ADVANCED if SETTINGS[name].group == group)
    for group in dict.fromkeys(SETTINGS[name].group for name in ADVANCED)
}

# Labels of the settings with a separate field.
LABELS: Mapping[str, str] = {
    "pretrained_model_name_or_path": "Base model", "init_adapter": "Start from",
    "class_word": "Class", "validation_prompt": "Sample prompts",
    "dataset_config": "Other subjects in the same run",
}  # fmt: skip
_LABELLED = re.compile(rf"(?:--)?\b({'|'.join(LABELS)})\b")
_SWITCHES = {
    "with_prior_preservation": "prior preservation", "random_flip": "mirrored photos",
}  # fmt: skip
# Choices of an optional switch, whose default depends on the model.
_SWITCH = {"on": True, "off": False}


def preset_values(preset: str, model: str, device: Device | None = None) -> dict[str, Any]:
    """Return all advanced settings of a preset for a model on a device.

    Args:
        preset: One of `PRESETS`.
        model: Base model. An unknown model gets the settings for Stable Diffusion 1.
        device: Device for training, for precision, gradient checkpointing and optimizer.

    Raises:
        UserError: If the preset does not exist.
    """
    if preset not in PRESETS:
        raise UserError(f"there is no preset {preset!r}; choose {', '.join(PRESETS)}")
    info = _info_of(model)
    values = TrainConfig().to_dict() | _preset_settings(preset, model)
    if not is_embedded(model):
        batch = 2 if values["with_prior_preservation"] else 1
        known = info.family if info.has_released_shape else ""
        values |= fitting_settings(known, info.resolution, device or Device(), batch=batch)
    return {name: values[name] for name in ADVANCED}


def _info_of(model: str) -> ModelInfo:
    try:
        return model_info(model)
    except ValueError:
        return UNKNOWN


def _preset_settings(preset: str, model: str) -> dict[str, Any]:
    family = known_family(model) or DEFAULT_FAMILY
    return preset_settings(preset, family, is_embedded=is_embedded(model))


def preset_sentence(preset: str, model: str) -> str:
    """Describe the settings of a preset for a model, as far as the page has fields for them.

    Example:
        >>> preset_sentence("pet", "stable-diffusion-v1-5/stable-diffusion-v1-5")
        'For this model: 800 steps, with prior preservation, with mirrored photos.'
    """
    values, usual = _preset_settings(preset, model), TrainConfig().to_dict()
    changed = {n: values[n] for n in ADVANCED if n in values and values[n] != usual[n]}
    phrases = [f"{changed.pop('max_train_steps', usual['max_train_steps'])} steps"]
    if learns_from_photos(values):
        for name, title in _SWITCHES.items():
            phrases.append(f"{'with' if changed.pop(name, usual[name]) else 'without'} {title}")
    phrases += [
        " ".join([name.replace("_", " "), *([] if value is True else flag_words(value))])
        for name, value in changed.items()
    ]
    text = f"For this model: {', '.join(phrases)}."
    advice = preset_advice(preset, FAMILIES.get(_info_of(model).family, DEFAULT_FAMILY))
    return f"{text} {advice[0].upper()}{advice[1:]}." if advice else text


def token_advice(preset: str) -> str:
    """Describe the token to type if a preset needs an unusual one; the app does not set it.

    Example:
        >>> token_advice("style"), token_advice("pet")
        ('Leave Token and Class empty.', '')
    """
    token = PRESETS[preset].settings.get("token")
    if token is None:
        return ""
    word = LABELS["class_word"]
    return (
        f"Type a new word such as {token} as Token." if token else f"Leave Token and {word} empty."
    )


def default_guidance(model: str) -> float:
    """Return the default guidance scale of a base model's samples."""
    name, family = "validation_guidance_scale", known_family(model)
    values = {**vars(TrainConfig()), **(family.defaults if family else {})}
    return float((SMALL if is_embedded(model) else values)[name])


def idle_settings(config: TrainConfig) -> list[str]:
    """Return lines on manually changed settings without effect, and on unusual learning rates."""
    presets = [preset_values(preset, config.pretrained_model_name_or_path) for preset in PRESETS]
    changed = [
        name
        for name in ADVANCED
        if all(getattr(config, name) != values[name] for values in presets)
    ]
    family = known_family(config.base_model)
    return [*without_effect(config, changed, family).values(), *unusual_rates(config)]


def make_config(
    model: str,
    photos: Path,
    output_dir: Path,
    token: str,
    class_word: str,
    prompts: Sequence[str],
    advanced: Mapping[str, Any],
    other_entries: Sequence[Mapping[str, Any]] = (),
) -> TrainConfig:
    """Return the settings of a run.

    Args:
        model: Base model: ``embedded:NAME``, hub id, folder or file.
        photos: Folder of photos.
        output_dir: The job's folder.
        token: Token of the subject. Without token and class word, captions are used unchanged.
        class_word: Class word of the subject.
        prompts: Prompts of the sample images. ``{subject}`` is replaced by token and class word; a
            prompt with it is repeated for each subject.
        advanced: Values of the page's fields by setting name; without photos also the `PROMPTS`.
        other_entries: Entries of `TrainConfig.dataset_config` for further subjects, with token and
            class word.

    Raises:
        UserError, ConfigError: If a value is invalid, in one line.
    """
    taught: dict[str, Any]
    if not learns_from_photos(advanced):
        taught = {name: _lines(advanced.get(name, ""), name) for name in PROMPTS}
        samples = [line for line in _lines("\n".join(prompts)) if "{subject}" not in line]
        return _config(model, output_dir, samples, advanced, taught)
    token = clean_text(token, 50, "token")
    class_word = clean_text(class_word, 100, "class")
    is_style = not token and not class_word
    if not is_style and (not token or " " in token):
        raise UserError("the token must be one rare word, such as sks")
    if not is_style and not class_word:
        raise UserError("say what the subject is: one or two words such as mug, dog or toy robot")
    first = {"instance_data_dir": str(photos), "token": token, "class_word": class_word or None}
    entries = [first, *map(dict, other_entries)]
    for entry in entries:  # The caption of photos without one; a style has no default caption.
        subject = f"{entry['token']} {entry['class_word'] or ''}".strip()
        entry["instance_prompt"] = f"a photo of a {subject}" if subject else None
    subjects = [f"{entry['token']} {entry['class_word']}" for entry in entries if entry["token"]]
    samples = [
        line.replace("{subject}", subject)
        for line in _lines("\n".join(prompts))
        for subject in (subjects if "{subject}" in line else [""])
    ]
    taught = {"dataset_config": entries} if other_entries else entries[0]
    return _config(model, output_dir, samples, advanced, taught)


def _lines(text: str, what: str = "sample prompt") -> list[str]:
    """Split a field into prompts, one per line; drop empty lines."""
    lines = (clean_text(line, PROMPT_LIMIT, what) for line in text.splitlines())
    return list(filter(None, lines))


def _config(
    model: str, output_dir: Path, prompts: Sequence[str], advanced: Mapping[str, Any],
    taught: Mapping[str, Any],
) -> TrainConfig:  # fmt: skip
    """Return the settings of a run with the ``taught`` subjects or prompts."""
    usual = vars(TrainConfig())
    values = {n: _value(n, advanced[n], usual[n]) for n in ADVANCED if n in advanced}
    if twin := values.get("sample_model"):
        unset = {**usual, **sampling_values(model)}
        own = {**usual, **sampling_values(twin)}
        values |= {
            name: own[name]
            for name in SAMPLES.values()
            if setting_text(values.get(name, unset[name])) == setting_text(unset[name])
        }
    return TrainConfig.from_dict(
        {
            **values,
            "pretrained_model_name_or_path": _name(model, "model name") or EMBEDDED,
            "validation_prompt": list(dict.fromkeys(prompts)),
            "output_dir": str(output_dir),
            **taught,
        }
    )


def _value(name: str, value: Any, default: Any) -> Any:
    """Convert a field's value to a value of a config file; an empty field gives the default."""
    setting = SETTINGS[name]
    if isinstance(value, bool):
        return value
    if setting.is_list:
        return (value.split() if isinstance(value, str) else list(value or [])) or default
    if value is None or setting.kind is bool:
        return _SWITCH.get(str(value), default)
    text = _name(value, name) if setting.is_path else clean_text(str(value), PROMPT_LIMIT, name)
    return text or default


def _name(text: object, what: str) -> str:
    """Return a model's name or a path, stripped but otherwise unchanged."""
    name = str(text or "").strip()
    if len(name) > NAME_LIMIT or not name.isprintable():
        raise UserError(
            f"the {what} has more than {NAME_LIMIT} characters, or one that cannot be printed"
        )
    return name


def sentence(text: str) -> str:
    """Capitalize a message unless it begins with the name of a model, a path or a setting.

    Example:
        >>> sentence("the model is gone"), sentence("org/model is gone"), sentence("rank is 0")
        ('The model is gone', 'org/model is gone', 'rank is 0')
    """
    text = with_labels(text)
    word = text.partition(" ")[0]
    is_name = not word.isalpha() or word in SETTINGS or Path(word).exists()
    return text if is_name else text[:1].upper() + text[1:]


def with_labels(text: str) -> str:
    """Replace names of settings in a message by the labels of the page's fields.

    Example:
        >>> with_labels("name another pretrained_model_name_or_path")
        'name another “Base model”'
    """
    return _LABELLED.sub(lambda name: f"“{LABELS[name[1]]}”", text)


def read_settings_file(file: Path) -> tuple[dict[str, Any], str, str]:
    """Read an uploaded file of settings, of this program or another trainer.

    Returns:
        The settings; for a file of another trainer the name of its kind and its settings as YAML,
        else two empty texts.

    Raises:
        UserError: If the file cannot be read, or a setting is not valid.
    """
    require_file(file)
    try:
        values = {n: v for n, v in read_config_file(file).items() if n not in ("preset", "memory")}
        return read_values(values, partial(find_training_setting, known=SETTINGS)), "", ""
    except ForeignFileError as error:
        answers = ForeignAnswers(error.file)
        return answers.values, error.title, answers.text
    except ConfigError as error:
        raise UserError(str(error).replace(str(file), shown(file.name))) from error


def setting_text(value: Any) -> Any:
    """Convert a setting's value to the value of its field: text, or a bool for a checkbox.

    Numbers become text too, because Gradio turns an empty number field into 0 when it is unfolded.
    """
    if isinstance(value, bool):
        return value
    return "" if value is None else " ".join(flag_words(value))


def shown_choices(setting: Setting) -> list[tuple[str, str]]:
    """Return a setting's choices as (label, `setting_text`); empty if any value is allowed."""
    names = _SWITCH if setting.kind is bool and setting.default is None else setting.choices
    choices = [(choice, choice) for choice in names or ()]
    is_optional = bool(choices) and setting.default is None
    return [(setting.default_text, ""), *choices] if is_optional else choices


def command_line(config: TrainConfig) -> str:
    """Return the command of the same run: the base model, and settings that are not defaults.

    Example:
        >>> command_line(TrainConfig(rank=4)).splitlines()[-1].strip()
        '--rank 4'
    """
    import yaml

    default, lines, file = TrainConfig(), [["python", "-m", "dora_diffusion", "train"]], ""
    for name in SETTINGS:
        value = getattr(config, name)
        if value == getattr(default, name) and name != "pretrained_model_name_or_path":
            continue
        words = [f"--{name}", *flag_words(value)]
        if name == "dataset_config":
            entries = yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
            file = f"cat > {DATASET_FILE} <<'END'\n{entries}END\n"
            words = [f"--{name}", DATASET_FILE]
        elif isinstance(value, bool):
            words = [f"--{name}" if value else f"--no-{name}"]
        lines.append(words)
    # The number of threads is a job's: another number may change the rounding of the last bits.
    is_small = is_embedded(config.pretrained_model_name_or_path)
    return file + shown_command(lines, "OMP_NUM_THREADS=1" if is_small else "")
