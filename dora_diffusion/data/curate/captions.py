"""One change of the captions of many photos, and the trigger words in a new caption."""

from __future__ import annotations

from dataclasses import dataclass

from dora_diffusion.config.wording import framed, whole_word
from dora_diffusion.data.captions import contains_token


@dataclass(frozen=True)
class CaptionEdit:
    """A change that is made to every caption: a text for all, find and replace, a prefix.

    In this order, each line of a caption by itself. A photo without a caption gets ``text``, and
    nothing else, so that the instance prompt stays its caption.

    Attributes:
        text: The caption of every photo; None keeps their own.
        find: What is replaced, letter by letter.
        replace: What takes its place.
        prefix: Put in front of every line that does not begin with it.

    Raises:
        ValueError: If something is to be replaced and nothing is found by.

    Example:
        >>> CaptionEdit(find="brown dog", replace="dog", prefix="sks dog,")("a brown dog on grass")
        'sks dog, a dog on grass'
    """

    text: str | None = None
    find: str = ""
    replace: str = ""
    prefix: str = ""

    def __post_init__(self) -> None:
        """Check that the parts go together."""
        if self.replace and not self.find:
            raise ValueError(f"there is nothing to find that {self.replace!r} would replace")

    def __bool__(self) -> bool:
        """Whether it changes anything."""
        return self.text is not None or bool(self.find or self.prefix)

    def __call__(self, caption: str) -> str:
        """The caption as it is afterwards; its lines are captions of their own."""
        lines = (caption if self.text is None else self.text).split("\n")
        return "\n".join(filter(None, map(self._line, lines)))

    def _line(self, line: str) -> str:
        if self.find:
            line = " ".join(line.replace(self.find, self.replace).split())
        if line and self.prefix and not line.startswith(self.prefix.strip()):
            line = framed(self.prefix, line, "")
        return line


def with_trigger(caption: str, token: str, class_word: str) -> str:
    """Put the token before the class word in a caption, or both in front where that is not in it.

    A tag that is the class word moves to the front. `class_caption` takes the token out again::

        a brown dog on grass -> a brown sks dog on grass
        an animal on grass   -> sks dog, an animal on grass
        grass, dog, outdoors -> sks dog, grass, outdoors
        (nothing)            -> a photo of sks dog
    """
    trigger = f"{token} {class_word}".strip()
    if not caption and trigger:
        return f"a photo of {trigger}"
    if not token or contains_token(caption, token):
        return caption
    tags = [tag.strip() for tag in caption.split(",")]
    others = [tag for tag in tags if tag.lower() != class_word.lower()]
    if class_word and others == tags and contains_token(caption, class_word):
        return whole_word(class_word).sub(lambda found: f"{token} {found[0]}", caption, count=1)
    return ", ".join([trigger, *others])
