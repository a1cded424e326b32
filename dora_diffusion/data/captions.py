"""Captions: files beside photos, templates, tag shuffling, dropout, and class-word captions."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from dora_diffusion.wording import quoted

# Neutral prompts for subjects, for runs that ask for varied captions instead of one.
TEMPLATES = (
    "a photo of {token} {class}",
    "a close-up photo of {token} {class}",
    "a bright photo of {token} {class}",
    "a cropped photo of {token} {class}",
    "a good photo of {token} {class}",
    "a photo of one {token} {class}",
)


def caption_path(photo: str | Path) -> Path:
    """Where a photo's caption lies: the same name with ``.txt``."""
    return Path(photo).with_suffix(".txt")


def read_caption(photo: str | Path, default: str) -> str:
    """Read the caption beside a photo; the default where there is none or it is empty.

    Several lines are joined to one.

    Raises:
        ValueError: If the file is not UTF-8 text.
    """
    path = caption_path(photo)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return default
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name}: the caption is not UTF-8 text; save it again") from error
    return " ".join(text.split()) or default


def fill_template(template: str, token: str, class_word: str) -> str:
    """Fill ``{token}`` and ``{class}``; other braces are left alone."""
    filled = template.replace("{token}", token).replace("{class}", class_word)
    return " ".join(filled.split())


def shuffle_tags(
    caption: str, generator: torch.Generator, *, keep: int = 0, separator: str = ","
) -> str:
    """Shuffle a caption's comma-separated tags, the first ``keep`` of them held in place."""
    tags = [tag.strip() for tag in caption.split(separator) if tag.strip()]
    fixed, free = tags[:keep], tags[keep:]
    order = torch.randperm(len(free), generator=generator).tolist()
    return f"{separator} ".join(fixed + [free[i] for i in order])


def tag_frequency(captions: Sequence[str], separator: str = ",") -> dict[str, int]:
    """How many captions hold each tag (a part between separators), most frequent first."""
    tags = [{tag.strip() for tag in caption.split(separator)} for caption in captions]
    counts = Counter(sorted(tag for own in tags for tag in own if tag))
    return dict(counts.most_common())


def drop_caption(caption: str, probability: float, generator: torch.Generator) -> str:
    """Replace the caption by the empty prompt with the given probability."""
    return "" if torch.rand((), generator=generator).item() < probability else caption


def contains_token(caption: str, token: str) -> bool:
    """Whether a caption holds the trigger token as a word of its own, ignoring case."""
    return bool(_whole(token).search(caption))


def class_caption(caption: str, token: str, class_word: str) -> str:
    """Turn an instance caption into its class caption, for prior preservation.

    The token goes where the class word follows it; elsewhere the class word stands in for it::

        a photo of sks dog on grass -> a photo of dog on grass
        sks on grass                -> dog on grass

    A caption without the token comes back as it is (see :func:`require_token`).
    """
    followed = re.compile(
        rf"{_whole(token).pattern}\s+(?={re.escape(class_word)}(?!\w))", re.IGNORECASE
    )
    text = followed.sub("", caption) if class_word else caption
    # A function, because a class word is not a pattern.
    text = _whole(token).sub(lambda _: class_word, text)
    return " ".join(text.split())


def require_token(captions: Sequence[str], token: str) -> None:
    """Check that captions name the trigger token, without which the subject is not learned.

    Warns:
        UserWarning: If some captions lack it, quoting the first few.

    Raises:
        ValueError: If all of them lack it, or the token is empty.
    """
    if not token.strip():
        raise ValueError("the trigger token is empty; choose a rare word such as sks")
    lacking = [caption for caption in captions if not contains_token(caption, token)]
    if lacking and len(lacking) == len(captions):
        one = len(captions) == 1
        where = "not in the caption" if one else f"in none of the {len(captions)} captions, first"
        raise ValueError(
            f"the trigger token {token!r} is {where} {quoted(lacking[0])}; put it into the "
            "instance prompt or the captions"
        )
    if lacking:
        first = ", ".join(quoted(caption) for caption in lacking[:3])
        warnings.warn(
            f"the trigger token {token!r} is missing from {len(lacking)} of {len(captions)} "
            f"captions: {first}",
            stacklevel=2,
        )


def _whole(token: str) -> re.Pattern[str]:
    """Match the token where no letter, digit or underscore touches it."""
    return re.compile(rf"(?<!\w){re.escape(token)}(?!\w)", re.IGNORECASE)
