"""Subjects of a run: tokens, class words and prompts."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dora_diffusion.config import ConfigError, TrainConfig
from dora_diffusion.config.derived import usual_class_word
from dora_diffusion.config.problems import naming_entry
from dora_diffusion.config.train import features_of
from dora_diffusion.config.wording import quoted
from dora_diffusion.data.captions import (
    CaptionRules,
    class_caption,
    contains_token,
    read_caption,
    token_message,
)
from dora_diffusion.data.photos import photos_in
from dora_diffusion.formats.adapter.metadata import join_triggers
from dora_diffusion.models.embedded import CLASSES, FILLERS
from dora_diffusion.models.locate import is_embedded


@dataclass(frozen=True)
class Subject:
    """Subject of a run.

    Attributes:
        token: Word that denotes the subject; empty if captions are used without a token.
        class_word: Class of the subject, such as ``"dog"``.
        settings: Settings of the run for this subject.
        words: New words of the run that are not the token of a subject.
    """

    token: str
    class_word: str
    settings: TrainConfig
    words: tuple[str, ...] = ()

    @property
    def trigger(self) -> str:
        """Trigger words for a prompt: ``"sks dog"``."""
        return f"{self.token} {self.class_word}".strip()

    def class_caption(self, caption: str) -> str:
        """Convert a caption to one of another member of the class, without new words."""
        for word in self.words:
            caption = class_caption(caption, word, "")
        return class_caption(caption, self.token, self.class_word) if self.token else caption


def caption_rules(config: TrainConfig) -> CaptionRules:
    """Return the caption rules of a config."""
    return CaptionRules.of_settings(config) if config.has_photos else CaptionRules()


def token_messages(subjects: Sequence[Subject]) -> list[str]:
    """Return a message for each subject with captions that lack its token. No photo is read.

    Raises:
        ConfigError: If all captions of a subject lack its token.
    """
    messages = []
    for subject in subjects:
        folder = subject.settings.instance_data_dir
        if not subject.token or not folder:
            continue
        texts, prompt = [], subject.settings.instance_prompt or ""
        for path in photos_in(Path(folder)):
            with contextlib.suppress(OSError, ValueError):  # Reading the photos reports errors.
                texts.append(read_caption(path, prompt, per_line=True))
        possible = possible_captions(subject, texts)
        try:
            messages.append(token_message(possible, subject.token) if possible else "")
        except ValueError as error:
            raise ConfigError(str(error), "token") from error
    return list(filter(None, messages))


def possible_captions(subject: Subject, texts: Iterable[str]) -> list[str]:
    """Return the different captions of each text."""
    rules = caption_rules(subject.settings)
    return [caption for text in texts for caption in dict.fromkeys(rules.captions(text))]


def example_prompt(config: TrainConfig) -> str:
    """Return the prompt of the first sample image."""
    return next((prompt.prompt for prompt in config.prompts), "")


def subjects_of(config: TrainConfig) -> list[Subject]:
    """Return the subjects of a config.

    Raises:
        ConfigError: If an instance prompt lacks the token, or a token denotes two classes.

    Warns:
        UserWarning: If a validation prompt contains no token, so that its samples show the class.
    """
    subjects = []
    for index, settings in enumerate(config.subjects):
        with naming_entry(index) if config.dataset_config else contextlib.nullcontext():
            subjects.append(_subject_of(settings))
    by_token: dict[str, Subject] = {}
    for subject in subjects:
        first = by_token.setdefault(subject.token.lower(), subject)
        if subject.token and first.class_word.lower() != subject.class_word.lower():
            raise ConfigError(
                f"dataset_config: the token {subject.token!r} denotes a {first.class_word!r} and a "
                f"{subject.class_word!r}; give each subject its own token",
                "token",
            )
    tokens = [token for token in by_token if token]
    asks = config.validation_prompt and len(tokens) == len(by_token)
    for prompt in config.prompts if asks else ():
        if not prompt.is_drift and not any(
            contains_token(prompt.prompt, token) for token in tokens
        ):
            noun = "the token" if len(tokens) == 1 else "any of the tokens"
            warnings.warn(
                f"validation_prompt {quoted(prompt.prompt)} does not contain {noun} "
                f"{', '.join(repr(subject.token) for subject in by_token.values())}: its samples "
                "show language drift, not the subject (append --drift if this is intended)",
                stacklevel=3,
            )
    words = tuple(w for w in config.describe().words if w.lower() not in by_token)
    return [replace(subject, words=words) for subject in subjects]


def _subject_of(config: TrainConfig) -> Subject:
    if not config.has_photos:
        return Subject("", "", config)
    if not config.instance_data_dir:
        switches = [one.on for one in features_of(type(config)) if not one.has_photos]
        ways = [f", or train without any: --{one.setting} {one.values[0]}" for one in switches]
        raise ConfigError(
            f"instance_data_dir is not set; name the folder of subject photos{''.join(ways)}",
            "instance_data_dir",
        )
    token, prompt = config.token.strip(), config.instance_prompt or ""
    if not prompt and token:
        raise ConfigError(
            "instance_prompt is not set; describe the subject with its token, "
            'such as "a photo of a sks dog"',
            "instance_prompt",
        )
    captions = caption_rules(config).captions(prompt)
    if token and not any(contains_token(caption, token) for caption in captions):
        raise ConfigError(
            f"instance_prompt {quoted(prompt)} does not contain the token "
            f"{token!r}; add it before the class word, or set another one with --token",
            "instance_prompt",
        )
    return Subject(token, config.class_word or usual_class_word(config), config)


def triggers_of(subjects: Iterable[Subject]) -> str:
    """Return the trigger words of all subjects: ``"sks dog, zwx cat"``."""
    return join_triggers(subject.trigger for subject in subjects)


def class_caption_of(subjects: Sequence[Subject], first: Subject, caption: str) -> str:
    """Replace the token of each subject in a caption by its class word, of ``first`` first."""
    for subject in (first, *(other for other in subjects if other is not first)):
        caption = subject.class_caption(caption)
    return caption


def is_toy_word(class_word: str) -> bool:
    """Return whether the embedded models know a class, by its last word.

    Example:
        >>> is_toy_word("red mugs"), is_toy_word("mug"), is_toy_word("dog")
        (True, True, False)
    """
    head = class_word.lower().split()[-1:] or [""]
    return not {head[0], head[0].removesuffix("s")}.isdisjoint((*CLASSES, *FILLERS))


def outside_toy_world(base: str, class_word: str) -> str:
    """Return a message if the base model is embedded and does not know a class, else an empty one.

    Args:
        base: The base model.
        class_word: Class of the subject.
    """
    if not is_embedded(base) or not class_word.strip() or is_toy_word(class_word):
        return ""
    return (
        f"{base} is a toy model of a drawn world: it knows {', '.join(CLASSES)}, but no "
        f"{class_word.strip()}. Trained on real photos it generates a coloured blob."
    )
