"""Captions: files beside photos, tag shuffling, dropout, and class-word captions."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from dora_diffusion.wording import quoted


def read_caption(photo: str | Path, default: str) -> str:
    """Read the caption beside a photo; the default where there is none or it is empty.

    Several lines are joined to one.

    Raises:
        ValueError: If the file is not UTF-8 text, or a link to a file that is not there.
    """
    path = Path(photo).with_suffix(".txt")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        if path.is_symlink():
            raise ValueError(
                f"{path.name}: the caption is a link to a file that is not there; remove it"
            ) from error
        return default
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name}: the caption is not UTF-8 text; save it again") from error
    return " ".join(text.split()) or default


def shuffle_tags(caption: str, generator: torch.Generator, *, keep: int = 0) -> str:
    """Shuffle a caption's comma-separated tags, the first ``keep`` of them held in place."""
    tags = _tags(caption)
    fixed, free = tags[:keep], tags[keep:]
    order = torch.randperm(len(free), generator=generator).tolist()
    return ", ".join(fixed + [free[i] for i in order])


def can_shuffle(captions: Sequence[str], keep: int) -> bool:
    """Whether `shuffle_tags` changes any of these captions."""
    return any(len(_tags(caption)) > keep + 1 for caption in captions)


def tag_frequency(captions: Sequence[str]) -> dict[str, int]:
    """How many captions hold each comma-separated tag, most frequent first."""
    counts = Counter(sorted(tag for caption in captions for tag in set(_tags(caption))))
    return dict(counts.most_common())


def _tags(caption: str) -> list[str]:
    return [tag.strip() for tag in caption.split(",") if tag.strip()]


def drop_caption(caption: str, probability: float, generator: torch.Generator) -> str:
    """Replace the caption by the empty prompt with the given probability."""
    return "" if torch.rand((), generator=generator).item() < probability else caption


def contains_token(caption: str, token: str) -> bool:
    """Whether a caption holds the trigger token as a word of its own, ignoring case."""
    return bool(whole_word(token).search(caption))


def class_caption(caption: str, token: str, class_word: str) -> str:
    """Turn an instance caption into its class caption, for prior preservation.

    The token goes where the class word follows it; elsewhere the class word stands in for it::

        a photo of sks dog on grass -> a photo of dog on grass
        sks on grass                -> dog on grass

    A caption without the token comes back as it is (see :func:`require_token`).
    """
    followed = re.compile(
        rf"{whole_word(token).pattern}\s+(?={re.escape(class_word)}(?!\w))", re.IGNORECASE
    )
    text = followed.sub("", caption) if class_word else caption
    # A function, because a class word is not a pattern.
    text = whole_word(token).sub(lambda _: class_word, text)
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
        count = len(captions)
        where = "not in the caption" if count == 1 else f"in none of the {count} captions, first"
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


def whole_word(token: str) -> re.Pattern[str]:
    """Match a word, ignoring case, where no letter, digit or underscore touches it."""
    return re.compile(rf"(?<!\w){re.escape(token)}(?!\w)", re.IGNORECASE)
