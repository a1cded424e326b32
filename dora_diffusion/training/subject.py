"""What a run is about: the token, the class word, and the prompts that follow from them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from dora_diffusion.config import ConfigError, TrainConfig
from dora_diffusion.config.derived import class_word_in
from dora_diffusion.data.captions import class_caption, contains_token
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
    token = config.token.strip()
    if token and not contains_token(config.instance_prompt, token):
        raise ConfigError(
            f"instance_prompt {quoted(config.instance_prompt)} does not contain the token "
            f"{token!r}; put it in front of the class word, or choose another with --token"
        )
    for prompt in config.prompts:
        if token and not prompt.is_drift and not contains_token(prompt.text, token):
            warnings.warn(
                f"validation_prompt {quoted(prompt.text)} does not contain the token {token!r}: "
                "its samples show language drift, not the subject (--drift at its end says so)",
                stacklevel=3,
            )
    return Subject(token, config.class_word or class_word_in(config.instance_prompt, token))


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
