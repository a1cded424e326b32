"""Captions: files beside photos, what is drawn of them, wildcards, and class-word captions."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from urllib.parse import quote, unquote

import torch

from dora_diffusion.config.fields import ConfigError, require
from dora_diffusion.config.file import read_text
from dora_diffusion.config.prompts import MOST_CHARACTERS
from dora_diffusion.config.wording import framed, quoted, whole_word
from dora_diffusion.data.sampler import generator_for


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


# Backslashes before other characters are those of tags: saber \(fate\).
_PIECE = re.compile(
    r"\\(?P<escaped>[{}|]|__)|__(?P<file>[^\W_](?:[\w ./-]{0,200}?[^\W_])?)__|(?P<mark>[{}|])"
    r"|[^\\{}|_]+|."
)
WILD = re.compile(r"(?<!\\)\{[^{}]*\|[^{}]*\}|(?<!\\)__[^\W_](?:[\w ./-]{0,200}?[^\W_])?__")
"""Pattern of a wildcard."""
# Of a text with more alternatives, the first ones.
MOST_VARIANTS = 1000


@dataclass(frozen=True, eq=False)
class Choice:
    """Choice among several templates."""

    alternatives: tuple[Template, ...]

    @cached_property
    def longest(self) -> int:
        """Parts and characters of the longest alternative."""
        return max(map(_length, self.alternatives))


Template = tuple["str | Choice", ...]
"""A text taken apart: what is said, and what is chosen, in order."""

Pick = Callable[[Choice], Template]


def _length(template: Template) -> int:
    return sum(1 + (len(p) if isinstance(p, str) else p.longest) for p in template)


def render(template: Sequence[str | Choice], pick: Pick) -> str:
    """The text of a template, its alternatives picked one by one."""
    parts = (part if isinstance(part, str) else render(pick(part), pick) for part in template)
    return "".join(parts)


def at_random(generator: torch.Generator) -> Pick:
    """Pick any alternative, each as likely as the others."""

    def pick(choice: Choice) -> Template:
        each = choice.alternatives
        return each[int(torch.randint(len(each), (), generator=generator))]

    return pick


def preferring(wanted: Callable[[str], bool]) -> Pick:
    """Pick the first alternative whose text is wanted, or else the first.

    Of texts that a word is in or not, no combination of alternatives avoids it where these do not.
    """
    picked: dict[Choice, Template] = {}

    def pick(choice: Choice) -> Template:
        if choice not in picked:
            each = choice.alternatives
            picked[choice] = next((one for one in each if wanted(render(one, pick))), each[0])
        return picked[choice]

    return pick


def variants(template: Template) -> list[str]:
    """Texts in which each alternative occurs, the first with the first of all."""
    parts = [
        [part]
        if isinstance(part, str)
        else list(islice(chain.from_iterable(map(variants, part.alternatives)), MOST_VARIANTS))
        for part in template
    ]
    rows = range(max(map(len, parts), default=1))
    return ["".join(part[row % len(part)] for part in parts) for row in rows]


class Wildcards:
    r"""Parser of captions; ``\{``, ``\}``, ``\|`` and ``\__`` are the characters themselves.

    Args:
        folder: Of the files: ``__colours__`` is a line of ``colours.txt``, ``__sea/fish__`` one of
            ``sea/fish.txt``. Empty lines and those that start with ``#`` are none. Lines may hold
            wildcards themselves.

    Raises:
        ConfigError: If there is no such folder.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else Path(folder).expanduser()
        if self.folder is not None and not self.folder.is_dir():
            raise ConfigError(
                f"wildcard_dir {folder} is not a folder; give one of .txt files", "wildcard_dir"
            )
        self._templates: dict[str, Template] = {}
        self._files: dict[str, Choice] = {}

    def render(self, text: str, pick: Pick) -> str:
        """A text with its alternatives picked, and single spaces."""
        return " ".join(render(self.parse(text), pick).split())

    def variants(self, text: str) -> list[str]:
        """The same with each alternative in one of them, see `variants`; none twice."""
        return list(dict.fromkeys(" ".join(one.split()) for one in variants(self.parse(text))))

    def parse(self, text: str, within: tuple[str, ...] = ()) -> Template:
        """A text's template.

        Args:
            text: The text.
            within: Names of the files that it is from, each a line of the one before.

        Raises:
            ConfigError: If a brace lacks its other half, a file is missing, empty, damaged or
                names itself, or texts of more than `MOST_CHARACTERS` could be drawn.
        """
        if text in self._templates:
            return self._templates[text]
        groups: list[list[list[str | Choice]]] = [[[]]]  # Alternatives of each group that is open.
        for piece in _PIECE.finditer(text):
            part: str | Choice = piece["escaped"] or piece[0]
            if piece["file"]:
                part = self._file(piece["file"], within)
            elif piece["mark"] == "{":
                groups.append([[]])
                continue
            elif piece["mark"] == "|" and len(groups) > 1:
                groups[-1].append([])
                continue
            elif piece["mark"] == "}":
                if len(groups) == 1:
                    raise ConfigError(
                        rf"{quoted(text)} has }} without {{; the character is \}}", "wildcards"
                    )
                part = Choice(tuple(map(tuple, groups.pop())))
            groups[-1][-1].append(part)
        if len(groups) > 1:
            raise ConfigError(
                rf"{quoted(text)} has {{ without }}; the character is \{{", "wildcards"
            )
        template = tuple(groups[0][0])
        require(
            _length(template) <= MOST_CHARACTERS,
            f"the wildcards of {quoted(text)} can give more than {MOST_CHARACTERS} characters",
            "wildcards",
        )
        self._templates[text] = template
        return template

    def _file(self, name: str, within: tuple[str, ...]) -> Choice:
        if name in within:
            raise ConfigError(
                f"the wildcard __{name}__ names itself: {' > '.join((*within, name))}", "wildcards"
            )
        if name not in self._files:
            if self.folder is None:
                raise ConfigError(
                    f"the wildcard __{name}__ is of a file; name its folder: wildcard_dir",
                    "wildcard_dir",
                )
            path = self.folder / f"{name}.txt"
            if ".." in path.parts[len(self.folder.parts) :] or not path.is_file():
                raise ConfigError(
                    f"the wildcard __{name}__ has no file {name}.txt in {self.folder}",
                    "wildcard_dir",
                )
            text = read_text(path, "the wildcard file", "wildcard_dir")
            lines = (" ".join(line.split()) for line in text.splitlines())
            texts = [line for line in lines if line and not line.startswith("#")]
            if not texts:
                raise ConfigError(
                    f"the wildcard __{name}__ has no line in {name}.txt to choose", "wildcard_dir"
                )
            inner = (*within, name)
            self._files[name] = Choice(tuple(self.parse(text, inner) for text in texts))
        return self._files[name]


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

    def draw(self, text: str, *key: object) -> str:
        """The caption of a photo's text that a key draws."""
        lines = self._lines(text)
        number = 0
        if len(lines) > 1:
            chooser = generator_for("caption line", *key)
            number = int(torch.randint(len(lines), (), generator=chooser))
        pick = at_random(generator_for("wildcards", *key))
        prefix, own, suffix = self._parts(lines[number], pick)
        generator = generator_for("caption", *key)
        caption = _around(prefix, self._tags(own, generator, key), suffix)
        if self.dropout > 0.0 and torch.rand((), generator=generator).item() < self.dropout:
            return ""
        return caption

    def draw_prompt(self, prompt: str, seed: int) -> str:
        """A prompt of an image, its wildcards drawn by the image's seed."""
        if self.wildcards is None:
            return prompt
        pick = at_random(generator_for("wildcards", "prompt", seed))
        return self.wildcards.render(prompt, pick)

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
        lines = [_around(self.prefix, line, self.suffix) for line in self._lines(text)]
        if self.wildcards is None:
            return lines
        return [caption for line in lines for caption in self.wildcards.variants(line)]

    def possible(self, text: str, token: str, *, with_dropout: bool = False) -> list[str]:
        """Return each line's caption that avoids a token, and one that holds it if that differs.

        Args:
            text: Of a photo.
            token: A word.
            with_dropout: Leave out every tag that `tag_dropout` may leave out.
        """
        captions = []
        avoiding = preferring(lambda own: not contains_token(own, token))
        holding = preferring(lambda own: contains_token(own, token))
        for line in self._lines(text):
            for pick in (avoiding, holding) if self.wildcards is not None else (avoiding,):
                prefix, own, suffix = self._parts(line, pick)
                if with_dropout and self.tag_dropout:
                    own = self._joint.join(self._split(own)[: self.keep_tags])
                captions.append(_around(prefix, own, suffix))
        return list(dict.fromkeys(captions))

    def can_shuffle(self, captions: Sequence[str], others: int = 2) -> bool:
        """Return whether any of these captions has so many tags behind those that are kept."""
        return any(len(self._split(caption)) >= self.keep_tags + others for caption in captions)

    @property
    def draws_tags(self) -> bool:
        """True if a caption is taken apart into its tags."""
        return self.shuffle_tags or self.tag_dropout > 0.0

    def has_empty_tag(self, caption: str) -> bool:
        """Return whether nothing is between two separators of a caption, or beside one."""
        pieces = self._pieces(caption)
        return len(pieces) > 1 and not all(map(str.strip, pieces))

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

    def _parts(self, line: str, pick: Pick) -> list[str]:
        """Prefix, line and suffix, with alternatives of wildcards picked."""
        parts, own = [self.prefix, line, self.suffix], self.wildcards
        return parts if own is None else [own.render(part, pick) for part in parts]

    def _tags(self, text: str, generator: torch.Generator, key: Sequence[object]) -> str:
        if not self.draws_tags:
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
        return [tag.strip() for tag in self._pieces(text) if tag.strip()]

    def _pieces(self, text: str) -> list[str]:
        return text.split(self.separator.strip() or self.separator)


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


def _around(prefix: str, text: str, suffix: str) -> str:
    return framed(prefix, text, suffix) if prefix or suffix else text


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
    if message := token_message(captions, token):
        warnings.warn(message, stacklevel=2)


def token_message(captions: Sequence[str], token: str) -> str:
    """Return a message on captions without the trigger token; empty where all name it.

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
    if not lacking:
        return ""
    first = ", ".join(quoted(caption) for caption in lacking[:3])
    return (
        f"the trigger token {token!r} is missing from {len(lacking)} of {len(captions)} captions: "
        f"{first}"
    )


@dataclass(frozen=True)
class CaptionEdit:
    """A change that is made to every caption: a text for all, find and replace, tags, a prefix.

    In this order, each line of a caption by itself. A photo without a caption gets ``text``, and
    nothing else, so that the instance prompt stays its caption. Tags are what commas separate.

    Attributes:
        text: The caption of every photo; None keeps their own.
        find: What is replaced, letter by letter.
        replace: What takes its place.
        remove_tag: A tag that is taken out.
        first_tag: A tag that becomes the first one.
        add_tag: A tag that becomes the last one where it is missing.
        prefix: Put in front of every line that does not begin with it.

    Raises:
        ValueError: If something is to be replaced and nothing is found by.

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
        """Check that the parts go together."""
        if self.replace and not self.find:
            raise ValueError(f"there is nothing to find that {self.replace!r} would replace")

    def __bool__(self) -> bool:
        """Return whether the edit changes anything."""
        return self != CaptionEdit()

    def __call__(self, caption: str) -> str:
        """The caption as it is afterwards; its lines are captions of their own."""
        lines = (caption if self.text is None else self.text).split("\n")
        return "\n".join(filter(None, map(self._line, lines)))

    def _line(self, line: str) -> str:
        if self.find:
            line = " ".join(line.replace(self.find, self.replace).split())
        line = self._tags(line) if line else line
        if line and self.prefix and not line.startswith(self.prefix.strip()):
            line = framed(self.prefix, line, "")
        return line

    def _tags(self, line: str) -> str:
        """A line with its tags changed; without a change, letter by letter what it was."""
        first, last = self.first_tag.strip(), self.add_tag.strip()
        tags = before = [tag for text in line.split(",") if (tag := text.strip())]
        tags = [tag for tag in tags if tag != self.remove_tag.strip()]
        if first:
            tags = [first, *(tag for tag in tags if tag != first)]
        if last and last not in tags:
            tags = [*tags, last]
        return line if tags == before else ", ".join(tags)


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
