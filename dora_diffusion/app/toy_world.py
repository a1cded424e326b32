"""What the embedded models know, and what to say when a subject is not of it."""

from __future__ import annotations

from dora_diffusion.models.locate import is_embedded
from dora_diffusion.toy.captions import FILLERS
from dora_diffusion.toy.shapes import CLASSES

_WORDS = frozenset((*CLASSES, *FILLERS))


def is_toy_word(class_word: str) -> bool:
    """Whether the embedded models know a class: by the last of its words, which names the thing.

    Example:
        >>> is_toy_word("red mugs"), is_toy_word("mug"), is_toy_word("dog")
        (True, True, False)
    """
    head = class_word.lower().split()[-1:] or [""]
    return head[0] in _WORDS or head[0].removesuffix("s") in _WORDS


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


CHOOSE_ANOTHER = "Choose Stable Diffusion 1.5, SDXL or a model of yours under Base model."
