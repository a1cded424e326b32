"""Captions: caption files, random draws, and class captions."""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import torch

from dora_diffusion.config.fields import require
from dora_diffusion.config.wording import counted, prefixed_caption, quoted, whole_word
from dora_diffusion.data.sampler import generator_for


def read_caption(photo: str | Path, default: str, *, per_line: bool = False) -> str:
    """Read the caption file of a photo; return the default if it is missing or empty.

    Lines are joined to one; ``per_line`` keeps them separate and drops empty ones.

    Raises:
        ValueError: If the file is not UTF-8 text, or is a broken link.
    """
    path = Path(photo).with_suffix(".txt")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        if path.is_symlink():
            raise ValueError(
                f"{path.name}: the caption is a link to a missing file; remove it"
            ) from error
        return default
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name}: the caption is not UTF-8 text; save it as UTF-8") from error
    lines = (" ".join(line.split()) for line in text.splitlines())
    return ("\n" if per_line else " ").join(line for line in lines if line) or default


_TAG_JOINER = ", "
# Rules that an adapter's file stores, for captions that are read later.
_STATED = ("per_line", "prefix")


@dataclass(frozen=True)
class CaptionRules:
    """Rules that turn the text of a photo's caption file into its caption in an epoch.

    Applied in this order: draw a line, shuffle tags, drop tags, add the prefix, drop the caption.
    Each draw has its own generator, seeded by a key such as seed, epoch and photo; shuffling and
    caption dropout share one. Commas separate tags.

    Attributes:
        per_line: Each line of the text is a separate caption.
        prefix: Text before every caption; excluded from tag shuffling and dropout.
        shuffle_tags: Shuffle tags.
        keep_tags: Number of first tags that are neither shuffled nor dropped.
        tag_dropout: Probability of dropping each other tag.
        dropout: Probability of the empty prompt.
    """

    per_line: bool = False
    prefix: str = ""
    shuffle_tags: bool = False
    keep_tags: int = 1
    tag_dropout: float = 0.0
    dropout: float = 0.0

    @classmethod
    def of_settings(cls, config: Any) -> CaptionRules:
        """Return the rules of a run's settings."""
        return cls(
            config.caption_per_line,
            config.caption_prefix,
            config.shuffle_tags,
            config.keep_tags,
            config.tag_dropout,
            config.caption_dropout,
        )

    def draw(self, text: str, *key: object) -> str:
        """Draw a caption from a photo's text, seeded by the key."""
        lines = self._lines(text)
        number = 0
        if len(lines) > 1:
            chooser = generator_for("caption line", *key)
            number = int(torch.randint(len(lines), (), generator=chooser))
        generator = generator_for("caption", *key)
        caption = self._prefixed(self._tags(lines[number], generator, key))
        if self.dropout > 0.0 and torch.rand((), generator=generator).item() < self.dropout:
            return ""
        return caption

    def plain(self, text: str) -> str:
        """Caption for measurements: the first line, with all tags in order."""
        return self.captions(text)[0]

    @classmethod
    def from_stated(cls, text: str, trigger: str = "") -> CaptionRules:
        """Parse the rules of a subject written by `stated_rules`; default rules for other texts."""
        try:
            values = json.loads(unquote(text))
            values = values.get(trigger, values)
            per_line, prefix = (values.get(name) for name in _STATED)
        except (AttributeError, RecursionError, ValueError):
            return cls()
        return cls(bool(per_line), str(prefix or ""))

    def captions(self, text: str) -> list[str]:
        """Unshuffled, complete captions of a photo's text, one for each line."""
        return [self._prefixed(line) for line in self._lines(text)]

    def without_tags(self, text: str) -> list[str]:
        """Captions of a photo's text without any tag that `tag_dropout` may drop."""
        kept = (_TAG_JOINER.join(_tags_of(line)[: self.keep_tags]) for line in self._lines(text))
        return [self._prefixed(line) for line in kept]

    def check_token_kept(self, token: str, texts: Sequence[str], *, strictly: bool) -> None:
        """Check that tag dropout keeps the token of all texts.

        Args:
            token: The token; empty: there is none.
            texts: Texts of photos.
            strictly: Raise an error, not a warning.

        Raises:
            ConfigError: If tag dropout may drop the token.
        """
        for text in texts if token and self.tag_dropout else ():
            whole = all(contains_token(caption, token) for caption in self.captions(text))
            left = self.without_tags(text)
            if whole and not all(contains_token(caption, token) for caption in left):
                message = (
                    f"tag_dropout may drop the token {token!r} of {quoted(text)}: raise keep_tags "
                    "to keep it, or put the token into caption_prefix"
                )
                require(not strictly, message, "tag_dropout")
                warnings.warn(message, stacklevel=4)
                return

    def without_effect(self, texts: Sequence[str]) -> Iterator[str]:
        """Yield messages on rules without effect on texts, and on texts that need a rule."""
        after = f"after the first {self.keep_tags}, which keep their places (keep_tags)"
        captions = [caption for text in texts for caption in self._lines(text)]
        free = max((len(_tags_of(caption)) - self.keep_tags for caption in captions), default=0)
        if self.shuffle_tags and free < 2:
            yield (
                "shuffle_tags has no effect because no caption has two or more tags, separated by "
                f"commas, {after}"
            )
        if self.tag_dropout and free < 1:
            yield f"tag_dropout has no effect because no caption has a tag {after}"
        empty = [c for c in captions if "," in c and not all(map(str.strip, c.split(",")))]
        if empty and self._draws_tags:
            yield (
                f"{counted(len(empty), 'caption')} with empty tags, first {quoted(empty[0])}: they "
                "are removed when tags are shuffled or dropped, and keep_tags does not count them"
            )
        lines = sum("\n" in text for text in texts)
        if self.per_line and not lines:
            yield "caption_per_line has no effect because no caption file has two lines"
        elif lines and not self.per_line:
            yield (
                f"{counted(lines, 'caption')} of several lines, which are joined; set "
                "caption_per_line to draw one of them in every epoch"
            )

    @property
    def _draws_tags(self) -> bool:
        return self.shuffle_tags or self.tag_dropout > 0.0

    def identity(self, text: str) -> str:
        """The lines of a photo's text that are separate captions."""
        return "\n".join(self._lines(text))

    def tag_frequency(self, captions: Sequence[str]) -> dict[str, int]:
        """Count the captions that contain each tag, most frequent first."""
        counts = Counter(sorted(tag for caption in captions for tag in set(_tags_of(caption))))
        return dict(counts.most_common())

    def _lines(self, text: str) -> list[str]:
        lines = text.split("\n")
        return lines if self.per_line else [" ".join(lines)]

    def _prefixed(self, text: str) -> str:
        return prefixed_caption(self.prefix, text) if self.prefix else text

    def _tags(self, text: str, generator: torch.Generator, key: Sequence[object]) -> str:
        if not self._draws_tags:
            return text
        tags = _tags_of(text)
        fixed, free = tags[: self.keep_tags], tags[self.keep_tags :]
        order = list(range(len(free)))
        if self.shuffle_tags:
            order = torch.randperm(len(free), generator=generator).tolist()
        coins = torch.rand(len(free), generator=generator_for("tag dropout", *key)).tolist()
        remaining = [free[i] for i in order if coins[i] >= self.tag_dropout]
        return _TAG_JOINER.join(fixed + remaining)


def _tags_of(text: str) -> list[str]:
    return [tag.strip() for tag in text.split(",") if tag.strip()]


def stated_rules(rules: Mapping[str, CaptionRules]) -> str:
    """Encode the subjects' rules for an adapter's file, without shuffling and dropout.

    Empty for default rules. URL-quoted, since slashes in metadata are read as paths.

    Args:
        rules: Trigger words -> rules; equal rules are stored once.
    """
    defaults = CaptionRules()
    values = {
        trigger: {
            name: value
            for name in _STATED
            if (value := getattr(subject_rules, name)) != getattr(defaults, name)
        }
        for trigger, subject_rules in rules.items()
    }
    first, *rest = values.values()
    differ = any(other != first for other in rest)
    text = json.dumps(values if differ else first, ensure_ascii=False)
    return quote(text, safe=' ,:;{}"') if differ or first else ""


def contains_token(caption: str, token: str) -> bool:
    """Return whether a caption contains the trigger token as a separate word, ignoring case."""
    return bool(whole_word(token).search(caption))


def class_caption(caption: str, token: str, class_word: str) -> str:
    """Convert an instance caption to its class caption, for prior preservation.

    The token is removed before the class word, and replaced by the class word elsewhere::

        a photo of sks dog on grass -> a photo of dog on grass
        sks on grass                -> dog on grass

    A caption without the token is returned unchanged (see :func:`require_token`).
    """
    followed = re.compile(
        rf"{whole_word(token).pattern}\s+(?={re.escape(class_word)}(?!\w))", re.IGNORECASE
    )
    text = followed.sub("", caption) if class_word else caption
    # A function, because a class word is not a pattern.
    text = whole_word(token).sub(lambda _: class_word, text)
    return " ".join(text.split())


def require_token(captions: Sequence[str], token: str) -> None:
    """Check that captions contain the trigger token, without which the subject is not learned.

    Warns:
        UserWarning: If some captions lack it; the message quotes the first few.

    Raises:
        ValueError: If all captions lack it, or the token is empty.
    """
    if message := token_message(captions, token):
        warnings.warn(message, stacklevel=2)


def token_message(captions: Sequence[str], token: str) -> str:
    """Return a message about captions without the trigger token; empty if all contain it.

    Raises:
        ValueError: If all captions lack it, or the token is empty.
    """
    if not token.strip():
        raise ValueError("the trigger token is empty; choose a rare word such as sks")
    lacking = [caption for caption in captions if not contains_token(caption, token)]
    if lacking and len(lacking) == len(captions):
        where = f"in none of the {len(captions)} captions, first"
        where = "not in the caption" if len(captions) == 1 else where
        raise ValueError(
            f"the trigger token {token!r} is {where} {quoted(lacking[0])}; put it into the "
            "instance prompt or the captions"
        )
    if not lacking:
        return ""
    first = ", ".join(quoted(caption) for caption in lacking[:3])
    return (
        f"the trigger token {token!r} is missing from {len(lacking)} of {len(captions)} captions: "
        f"{first}"
    )


@dataclass(frozen=True)
class CaptionEdit:
    """An edit of all captions: one text for all, find and replace, tags, a prefix.

    Applied in this order to each line of a caption. A photo without a caption only gets ``text``,
    so that the instance prompt remains its caption. Commas separate tags.

    Attributes:
        text: Caption of all photos; None keeps their captions.
        find: Text to replace, matched exactly.
        replace: Replacement of ``find``.
        remove_tag: Tag to remove.
        first_tag: Tag to move or add to the start.
        add_tag: Tag to add at the end if it is missing.
        prefix: Text before every line that does not begin with it.

    Raises:
        ValueError: If ``replace`` is set without ``find``.

    Example:
        >>> CaptionEdit(find="brown dog", replace="dog", prefix="sks dog,")("a brown dog on grass")
        'sks dog, a dog on grass'
        >>> CaptionEdit(remove_tag="sun", first_tag="sks dog", add_tag="photo")("grass, sun, dog")
        'sks dog, grass, dog, photo'
    """

    text: str | None = None
    find: str = ""
    replace: str = ""
    remove_tag: str = ""
    first_tag: str = ""
    add_tag: str = ""
    prefix: str = ""

    def __post_init__(self) -> None:
        """Check that `replace` has a text to find."""
        if self.replace and not self.find:
            raise ValueError(
                f"replace is {self.replace!r}, but find is empty; give the text to replace"
            )

    def __bool__(self) -> bool:
        """Return whether the edit changes anything."""
        return self != CaptionEdit()

    def __call__(self, caption: str) -> str:
        """Apply the edit to each line of a caption."""
        lines = (caption if self.text is None else self.text).split("\n")
        return "\n".join(filter(None, map(self._line, lines)))

    def _line(self, line: str) -> str:
        if self.find:
            line = " ".join(line.replace(self.find, self.replace).split())
        line = self._tags(line) if line else line
        if line and self.prefix and not line.startswith(self.prefix.strip()):
            line = prefixed_caption(self.prefix, line)
        return line

    def _tags(self, line: str) -> str:
        """Edit the tags of a line; a line without changes keeps its exact text."""
        first, last = self.first_tag.strip(), self.add_tag.strip()
        tags = original = [tag for text in line.split(",") if (tag := text.strip())]
        tags = [tag for tag in tags if tag != self.remove_tag.strip()]
        if first:
            tags = [first, *(tag for tag in tags if tag != first)]
        if last and last not in tags:
            tags = [*tags, last]
        return line if tags == original else ", ".join(tags)


def with_trigger(caption: str, token: str, class_word: str) -> str:
    """Add the token before the class word, or both at the start of a caption without it.

    A tag that equals the class word moves to the start. `class_caption` removes the token again::

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
    remaining = [tag for tag in tags if tag.lower() != class_word.lower()]
    if class_word and remaining == tags and contains_token(caption, class_word):
        return whole_word(class_word).sub(lambda match: f"{token} {match[0]}", caption, count=1)
    return ", ".join([trigger, *remaining])
