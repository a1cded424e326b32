"""Subjects of a run: tokens, class words, and the prompts that follow from them."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dora_diffusion.config import ConfigError, TrainConfig
from dora_diffusion.config.dataset_file import naming_entry
from dora_diffusion.config.derived import usual_class_word
from dora_diffusion.config.wording import quoted
from dora_diffusion.data.captions import (
    CaptionRules,
    Wildcards,
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
    """A subject of a run.

    Attributes:
        token: The word that means it; empty where captions are used as they are.
        class_word: What it is, such as ``"dog"``.
        settings: The run's settings, as they are for this subject.
        words: New words of the run that are not subject's token.
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
        """The caption of another member of the class, without words that are new."""
        for word in self.words:
            caption = class_caption(caption, word, "")
        return class_caption(caption, self.token, self.class_word) if self.token else caption


def caption_rules(config: TrainConfig) -> CaptionRules:
    """Return the caption rules of a config.

    Raises:
        ConfigError: If there is no folder of wildcards of that name.
    """
    wildcards = Wildcards(config.wildcard_dir) if config.wildcards else None
    if config.is_slider:
        return CaptionRules(wildcards=wildcards)
    return CaptionRules(
        per_line=config.caption_per_line,
        wildcards=wildcards,
        prefix=config.caption_prefix,
        suffix=config.caption_suffix,
        separator=config.caption_separator,
        shuffle_tags=config.shuffle_tags,
        keep_tags=config.keep_tags,
        tag_dropout=config.tag_dropout,
        dropout=config.caption_dropout,
    )


def token_messages(subjects: Sequence[Subject]) -> list[str]:
    """Return a message on each subject some of whose captions lack its token; no photo is read.

    Raises:
        ConfigError: If all captions of one lack it.
    """
    messages = []
    for subject in subjects:
        folder = subject.settings.instance_data_dir
        if not subject.token or not folder:
            continue
        texts, prompt = [], subject.settings.instance_prompt or ""
        for path in photos_in(Path(folder)):
            with contextlib.suppress(OSError, ValueError):  # refused with the photos
                texts.append(read_caption(path, prompt, per_line=True))
        possible = possible_captions(subject, texts)
        try:
            messages.append(token_message(possible, subject.token) if possible else "")
        except ValueError as error:
            raise ConfigError(str(error), "token") from error
    return list(filter(None, messages))


def possible_captions(subject: Subject, texts: Iterable[str]) -> list[str]:
    """All captions that may be drawn of a subject's texts; wildcards with and without its token."""
    rules = caption_rules(subject.settings)
    return [caption for text in texts for caption in rules.possible(text, subject.token)]


def prompt_rules(config: TrainConfig) -> CaptionRules:
    """Return the rules of sample prompts: the first subject's that has wildcards, if any has."""
    subjects = config.subjects
    return caption_rules(next((own for own in subjects if own.wildcards), subjects[0]))


def example_prompt(config: TrainConfig) -> str:
    """A prompt for the subject: that of the first sample, its wildcards drawn as there."""
    prompt = next((prompt.text for prompt in config.prompts), "")
    return prompt_rules(config).draw_prompt(prompt, config.seed)


def subjects_of(config: TrainConfig) -> list[Subject]:
    """The subjects that a config describes.

    Raises:
        ConfigError: If an instance prompt does not name its subject, or a token means two.

    Warns:
        UserWarning: Of validation prompts that name none: their samples show the class.
    """
    subjects = []
    for place, settings in enumerate(config.subjects):
        with naming_entry(place) if config.dataset_config else contextlib.nullcontext():
            subjects.append(_subject_of(settings))
    by_token: dict[str, Subject] = {}
    for subject in subjects:
        first = by_token.setdefault(subject.token.lower(), subject)
        if subject.token and first.class_word.lower() != subject.class_word.lower():
            raise ConfigError(
                f"dataset_config: the token {subject.token!r} means a {first.class_word!r} and a "
                f"{subject.class_word!r}; give each subject a token of its own",
                "token",
            )
    tokens = [token for token in by_token if token]
    asks = config.validation_prompt and len(tokens) == len(by_token)
    for prompt in config.prompts if asks else ():
        if not prompt.is_drift and not any(contains_token(prompt.text, own) for own in tokens):
            said = "the token" if len(tokens) == 1 else "any of the tokens"
            warnings.warn(
                f"validation_prompt {quoted(prompt.text)} does not contain {said} "
                f"{', '.join(repr(subject.token) for subject in by_token.values())}: its samples "
                "show language drift, not the subject (--drift at its end says so)",
                stacklevel=3,
            )
    words = tuple(word for word in config.words if word.lower() not in by_token)
    return [replace(subject, words=words) for subject in subjects]


def _subject_of(config: TrainConfig) -> Subject:
    rules = caption_rules(config)
    for shown in config.prompts:
        rules.draw_prompt(shown.text, config.seed)
    if config.is_slider:
        return Subject("", "", config)
    if not config.instance_data_dir:
        is_slider = config.target or config.positive or config.negative
        raise ConfigError(
            "instance_data_dir is not set; name the folder of subject photos"
            + (", or give --teach slider to learn from prompts alone" if is_slider else ""),
            "instance_data_dir",
        )
    token, prompt = config.token.strip(), config.instance_prompt or ""
    if not prompt and token:
        raise ConfigError(
            "instance_prompt is not set; describe the subject with its token, "
            'such as "a photo of a sks dog"',
            "instance_prompt",
        )
    captions = rules.possible(prompt, token)
    if token and not any(contains_token(caption, token) for caption in captions):
        raise ConfigError(
            f"instance_prompt {quoted(prompt)} does not contain the token "
            f"{token!r}; put it in front of the class word, or choose another with --token",
            "instance_prompt",
        )
    return Subject(token, config.class_word or usual_class_word(config), config)


def triggers_of(subjects: Iterable[Subject]) -> str:
    """The trigger words of all subjects: ``"sks dog, zwx cat"``."""
    return join_triggers(subject.trigger for subject in subjects)


def class_caption_of(subjects: Sequence[Subject], own: Subject, caption: str) -> str:
    """A caption with a class word for each subject that it names; that of ``own`` first."""
    for subject in (own, *(other for other in subjects if other is not own)):
        caption = subject.class_caption(caption)
    return caption


def is_toy_word(class_word: str) -> bool:
    """Return whether the embedded models know a class: by its last word, which names the thing.

    Example:
        >>> is_toy_word("red mugs"), is_toy_word("mug"), is_toy_word("dog")
        (True, True, False)
    """
    head = class_word.lower().split()[-1:] or [""]
    return not {head[0], head[0].removesuffix("s")}.isdisjoint((*CLASSES, *FILLERS))


def outside_toy_world(base: str, class_word: str) -> str:
    """Return a message on a subject unlike any that the base model knows; empty where that is fine.

    Args:
        base: The base model.
        class_word: What the subject is.
    """
    if not is_embedded(base) or not class_word.strip() or is_toy_word(class_word):
        return ""
    return (
        f"{base} is a toy model of a drawn world: it knows {', '.join(CLASSES)}, and no "
        f"{class_word.strip()}. Trained on real photos it gives a coloured blob."
    )
