"""What a run is about: the token, the class word, and the prompts that follow from them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from dora_diffusion.config import ConfigError, TrainConfig
from dora_diffusion.config.derived import framed_prompt, usual_class_word
from dora_diffusion.data.captions import CaptionRules, class_caption, contains_token
from dora_diffusion.data.wildcards import Wildcards
from dora_diffusion.models.locate import is_embedded
from dora_diffusion.toy.shapes import CLASSES, FILLERS
from dora_diffusion.wording import quoted

_TOY_WORDS = frozenset((*CLASSES, *FILLERS))


@dataclass(frozen=True)
class Subject:
    """The subject of a run.

    Attributes:
        token: The word that means it; empty where captions are used as they are.
        class_word: What it is, such as ``"dog"``.
    """

    token: str
    class_word: str

    @property
    def trigger(self) -> str:
        """What to write in a prompt: ``"sks dog"``."""
        return f"{self.token} {self.class_word}".strip()

    def class_caption(self, caption: str) -> str:
        """The caption of another member of the class."""
        return class_caption(caption, self.token, self.class_word) if self.token else caption


def caption_rules(config: TrainConfig) -> CaptionRules:
    """How a config draws captions.

    Raises:
        ConfigError: If there is no folder of wildcards of that name.
    """
    wildcards = None
    if config.wildcards:
        try:
            wildcards = Wildcards(config.wildcard_dir)
        except ValueError as error:
            raise ConfigError(str(error), "wildcard_dir") from error
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


def example_prompt(config: TrainConfig) -> str:
    """A prompt for the subject: that of the first sample, its wildcards drawn as there."""
    prompt = config.validation_prompt[0] if config.validation_prompt else framed_prompt(config)
    return caption_rules(config).draw_prompt(prompt, config.seed)


def subject_of(config: TrainConfig) -> Subject:
    """The subject that a config describes.

    Raises:
        ConfigError: If the instance prompt does not name it.

    Warns:
        UserWarning: Of validation prompts that do not: their samples show the class.
    """
    if not config.instance_data_dir:
        raise ConfigError("instance_data_dir is not set; name the folder of subject photos")
    if not config.instance_prompt:
        raise ConfigError(
            "instance_prompt is not set; describe the subject with its token, "
            'such as "a photo of a sks dog"'
        )
    token, rules = config.token.strip(), caption_rules(config)
    try:
        captions = rules.possible(config.instance_prompt, token)
        for prompt in config.validation_prompt:
            rules.draw_prompt(prompt, config.seed)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if token and not any(contains_token(caption, token) for caption in captions):
        raise ConfigError(
            f"instance_prompt {quoted(config.instance_prompt)} does not contain the token "
            f"{token!r}; put it in front of the class word, or choose another with --token"
        )
    for prompt in config.validation_prompt:
        if token and not contains_token(prompt, token):
            warnings.warn(
                f"validation_prompt {quoted(prompt)} does not contain the token {token!r}: its "
                "samples show language drift, not the subject",
                stacklevel=3,
            )
    return Subject(token, config.class_word or usual_class_word(config))


def is_toy_word(class_word: str) -> bool:
    """Whether the embedded models know a class: by the last of its words, which names the thing.

    Example:
        >>> is_toy_word("red mugs"), is_toy_word("mug"), is_toy_word("dog")
        (True, True, False)
    """
    head = class_word.lower().split()[-1:] or [""]
    return head[0] in _TOY_WORDS or head[0].removesuffix("s") in _TOY_WORDS


def outside_toy_world(base: str, class_word: str) -> str:
    """What to say of a subject that the base model knows nothing like; empty where that is fine.

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
