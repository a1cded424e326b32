"""What a run is about: the token, the class word, and the prompts that follow from them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dora_diffusion.config import ConfigError, TrainConfig
from dora_diffusion.data.captions import class_caption, contains_token

# A class word ends where the prompt goes on to say where the subject is or how it is drawn.
_NEXT_PHRASE = re.compile(
    r"[,.;:()]|\b(?:on|in|at|with|by|under|over|near|against|wearing|from|and|of|beside)\b.*", re.I
)


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
        ConfigError: If the prompts do not name it.
    """
    if not config.instance_data_dir:
        raise ConfigError("instance_data_dir is not set; name the folder of subject photos")
    if not config.instance_prompt:
        raise ConfigError(
            "instance_prompt is not set; describe the subject with its token, "
            'such as "a photo of a sks dog"'
        )
    token = config.token.strip()
    for name, prompts in (
        ("instance_prompt", [config.instance_prompt]),
        ("validation_prompt", config.validation_prompt),
    ):
        for prompt in prompts:
            if token and not contains_token(prompt, token):
                raise ConfigError(
                    f"{name} {prompt!r} does not contain the token {token!r}; "
                    "put it in front of the class word, or choose another with --token"
                )
    return Subject(token, config.class_word or class_word_in(config.instance_prompt, token))


def class_word_in(prompt: str, token: str) -> str:
    """The words after the token: ``"a photo of a sks robot toy on grass"`` -> ``"robot toy"``."""
    if not token:
        return ""
    _, _, rest = prompt.lower().partition(token.lower())
    return _NEXT_PHRASE.split(rest, maxsplit=1)[0].strip()
