"""Captions: files beside photos, what is drawn of them, and class-word captions."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

import torch

from dora_diffusion.config.wording import framed, quoted, whole_word
from dora_diffusion.data.sampler import generator_for
from dora_diffusion.data.wildcards import Wildcards, at_random, preferring, render, variants


def read_caption(photo: str | Path, default: str, *, per_line: bool = False) -> str:
    """Read the caption beside a photo; the default where there is none or it is empty.

    Several lines are joined to one; ``per_line`` keeps them apart, without empty ones.

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
        raise ValueError(f"{path.name}: the caption is not UTF-8 text; save it as UTF-8") from error
    lines = (" ".join(line.split()) for line in text.splitlines())
    return ("\n" if per_line else " ").join(line for line in lines if line) or default


# What of the rules an adapter's file keeps, for captions that are read later.
_STATED = ("per_line", "wildcards", "prefix", "suffix")


@dataclass(frozen=True)
class CaptionRules:
    """Rules that turn the text beside a photo into its caption in an epoch.

    In this order: a line of it, the alternatives of wildcards, the order of tags, tags that are
    left out, what stands around it, and whether it is dropped as a whole. Each is drawn from a
    generator of its own, by a key such as seed, epoch and photo; shuffling and dropping share one.

    Attributes:
        per_line: Each line of the text is a caption of its own.
        wildcards: Takes ``{a|b}`` and ``__file__`` apart; None leaves them as they are.
        prefix: In front of every caption: neither shuffled nor left out, but dropped with it.
        suffix: Behind it.
        separator: What tags are separated by.
        shuffle_tags: Shuffle tags.
        keep_tags: Tags at the start that stay in place.
        tag_dropout: Probability of leaving out each of the others.
        dropout: Probability of the empty prompt.

    Raises:
        ValueError: If a setting is impossible.
    """

    per_line: bool = False
    wildcards: Wildcards | None = None
    prefix: str = ""
    suffix: str = ""
    separator: str = ","
    shuffle_tags: bool = False
    keep_tags: int = 1
    tag_dropout: float = 0.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Check the settings."""
        for name in ("tag_dropout", "dropout"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"caption {name} must be within 0 and 1, got {value}")
        if self.keep_tags < 0:
            raise ValueError(f"keep_tags must not be negative, got {self.keep_tags}")
        if not self.separator:
            raise ValueError("caption_separator is empty; give what separates tags, such as ','")

    def draw(self, text: str, *key: object) -> str:
        """The caption of a photo's text that a key draws."""
        lines = self._lines(text)
        number = 0
        if len(lines) > 1:
            chooser = generator_for("caption line", *key)
            number = int(torch.randint(len(lines), (), generator=chooser))
        parts = (self.prefix, lines[number], self.suffix)
        if self.wildcards is not None:
            pick = at_random(generator_for("wildcards", *key))
            before, own, after = (render(self.wildcards.parse(part), pick) for part in parts)
            parts = (before, " ".join(own.split()), after)
        generator = generator_for("caption", *key)
        caption = self._around(parts[0], self._tags(parts[1], generator, key), parts[2])
        if self.dropout > 0.0:
            caption = drop_caption(caption, self.dropout, generator)
        return caption

    def draw_prompt(self, prompt: str, seed: int) -> str:
        """A prompt of an image, its wildcards drawn by the image's seed."""
        if self.wildcards is None:
            return prompt
        pick = at_random(generator_for("wildcards", "prompt", seed))
        return " ".join(render(self.wildcards.parse(prompt), pick).split())

    def plain(self, text: str) -> str:
        """The caption that photos are measured with: the first line and alternatives, all of it."""
        return self.variants(text)[0]

    @classmethod
    def from_stated(
        cls, text: str, wildcard_dir: str | None = None, trigger: str = ""
    ) -> CaptionRules:
        """The rules of a subject that `stated_rules` wrote; those by default of anything else."""
        try:
            values = json.loads(unquote(text))
            values = values.get(trigger, values)
            known = {name: values.get(name) for name in _STATED}
        except (AttributeError, RecursionError, ValueError):
            return cls()
        return cls(
            per_line=bool(known["per_line"]),
            wildcards=Wildcards(wildcard_dir) if known["wildcards"] else None,
            prefix=str(known["prefix"] or ""),
            suffix=str(known["suffix"] or ""),
        )

    def variants(self, text: str) -> list[str]:
        """Captions, unshuffled and whole, in which each line and each alternative occurs."""
        return [caption for line in self._lines(text) for caption in self._variants(line)]

    def _variants(self, line: str) -> list[str]:
        whole = self._around(self.prefix, line, self.suffix)
        if self.wildcards is None:
            return [whole]
        found = variants(self.wildcards.parse(whole))
        return list(dict.fromkeys(" ".join(caption.split()) for caption in found))

    def possible(self, text: str, token: str, *, with_dropout: bool = False) -> list[str]:
        """Return each line's caption that avoids a token, and one that holds it if that differs.

        Args:
            text: Of a photo.
            token: A word.
            with_dropout: Leave out every tag that `tag_dropout` may leave out.
        """
        captions = []
        picks = [
            preferring(lambda own: not contains_token(own, token)),
            preferring(lambda own: contains_token(own, token)),
        ]
        for line in self._lines(text):
            for pick in picks if self.wildcards is not None else picks[:1]:
                parts = [self.prefix, line, self.suffix]
                if self.wildcards is not None:
                    parts = [render(self.wildcards.parse(part), pick) for part in parts]
                if with_dropout and self.tag_dropout:
                    parts[1] = self._joint.join(self._split(parts[1])[: self.keep_tags])
                captions.append(self._around(*parts))
        return list(dict.fromkeys(captions))

    def can_shuffle(self, captions: Sequence[str], others: int = 2) -> bool:
        """Return whether any of these captions has so many tags behind those that are kept."""
        return any(len(self._split(caption)) >= self.keep_tags + others for caption in captions)

    def identity(self, text: str) -> str:
        """The text, and with wildcards a digest of what it may become: another file is another."""
        text = "\n".join(self._lines(text))
        if self.wildcards is None:
            return text
        digest = hashlib.sha256("\n".join(self.variants(text)).encode()).hexdigest()
        return f"{text} [{digest[:12]}]"

    def tag_frequency(self, captions: Sequence[str]) -> dict[str, int]:
        """Count the captions that hold each tag, most frequent first."""
        counts = Counter(sorted(tag for caption in captions for tag in set(self._split(caption))))
        return dict(counts.most_common())

    def _lines(self, text: str) -> list[str]:
        lines = text.split("\n")
        return lines if self.per_line else [" ".join(lines)]

    def _around(self, prefix: str, text: str, suffix: str) -> str:
        return framed(prefix, text, suffix) if prefix or suffix else text

    def _tags(self, text: str, generator: torch.Generator, key: Sequence[object]) -> str:
        if not self.shuffle_tags and not self.tag_dropout:
            return text
        tags = self._split(text)
        fixed, free = tags[: self.keep_tags], tags[self.keep_tags :]
        order = list(range(len(free)))
        if self.shuffle_tags:
            order = torch.randperm(len(free), generator=generator).tolist()
        coins = torch.rand(len(free), generator=generator_for("tag dropout", *key)).tolist()
        kept = [free[i] for i in order if coins[i] >= self.tag_dropout]
        return self._joint.join(fixed + kept)

    @property
    def _joint(self) -> str:
        """Text that joins tags: the separator, with a space behind it where it has none."""
        is_bare = self.separator == self.separator.strip()
        return f"{self.separator} " if is_bare else self.separator

    def _split(self, text: str) -> list[str]:
        tags = text.split(self.separator.strip() or self.separator)
        return [tag.strip() for tag in tags if tag.strip()]


def stated_rules(rules: Mapping[str, CaptionRules]) -> str:
    """Describe the subjects' rules for an adapter's file, but for shuffling and dropout.

    Empty for the usual ones. Quoted, since slashes in metadata are taken for a path's.

    Args:
        rules: By trigger words; the file has one for all where they are the same.
    """
    usual = CaptionRules()
    values = {
        trigger: {
            name: True if name == "wildcards" else value
            for name in _STATED
            if (value := getattr(own, name)) != getattr(usual, name)
        }
        for trigger, own in rules.items()
    }
    first, *others = values.values()
    differ = any(other != first for other in others)
    text = json.dumps(values if differ else first, ensure_ascii=False)
    return quote(text, safe=' ,:;{}"') if differ or first else ""


def drop_caption(caption: str, probability: float, generator: torch.Generator) -> str:
    """Replace the caption by the empty prompt with the given probability."""
    return "" if torch.rand((), generator=generator).item() < probability else caption


def contains_token(caption: str, token: str) -> bool:
    """Return whether a caption holds the trigger token as a word of its own, ignoring case."""
    return bool(whole_word(token).search(caption))


def class_caption(caption: str, token: str, class_word: str) -> str:
    """Convert an instance caption to its class caption, for prior preservation.

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
        """Return whether the edit changes anything."""
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
    """Add the token before the class word in a caption, or both in front where that is not in it.

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
