"""Captions: caption files, random draws, wildcards, and class captions."""

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
from dora_diffusion.config.images import MOST_CHARACTERS
from dora_diffusion.config.wording import framed, quoted, whole_word
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


# Backslashes before other characters belong to tags, such as saber \(fate\).
_PIECE = re.compile(
    r"\\(?P<escaped>[{}|]|__)|__(?P<file>[^\W_](?:[\w ./-]{0,200}?[^\W_])?)__|(?P<mark>[{}|])"
    r"|[^\\{}|_]+|."
)
WILD = re.compile(r"(?<!\\)\{[^{}]*\|[^{}]*\}|(?<!\\)__[^\W_](?:[\w ./-]{0,200}?[^\W_])?__")
"""Pattern of a wildcard."""
# Limit of the variants of a choice; further alternatives are ignored.
MOST_VARIANTS = 1000


@dataclass(frozen=True, eq=False)
class Choice:
    """Choice among several templates."""

    alternatives: tuple[Template, ...]

    @cached_property
    def longest(self) -> int:
        """Number of parts and characters of the longest alternative."""
        return max(map(_length, self.alternatives))


Template = tuple["str | Choice", ...]
"""A parsed text: fixed texts and choices, in order."""

Pick = Callable[[Choice], Template]


def _length(template: Template) -> int:
    return sum(1 + (len(p) if isinstance(p, str) else p.longest) for p in template)


def render(template: Sequence[str | Choice], pick: Pick) -> str:
    """Render a template; ``pick`` selects the alternative of each choice."""
    texts = (node if isinstance(node, str) else render(pick(node), pick) for node in template)
    return "".join(texts)


def at_random(generator: torch.Generator) -> Pick:
    """Pick alternatives at random, with equal probabilities."""

    def pick(choice: Choice) -> Template:
        alternatives = choice.alternatives
        return alternatives[int(torch.randint(len(alternatives), (), generator=generator))]

    return pick


def preferring(predicate: Callable[[str], bool]) -> Pick:
    """Pick the first alternative whose text satisfies the predicate, else the first one.

    For predicates on a word that a text contains or not, this finds a combination of alternatives
    that avoids the word, if there is one.
    """
    picked: dict[Choice, Template] = {}

    def pick(choice: Choice) -> Template:
        if choice not in picked:
            fitting = (a for a in choice.alternatives if predicate(render(a, pick)))
            picked[choice] = next(fitting, choice.alternatives[0])
        return picked[choice]

    return pick


def variants(template: Template) -> list[str]:
    """Texts that together contain each alternative; the first has the first of each choice."""
    columns = [
        [node]
        if isinstance(node, str)
        else list(islice(chain.from_iterable(map(variants, node.alternatives)), MOST_VARIANTS))
        for node in template
    ]
    rows = range(max(map(len, columns), default=1))
    return ["".join(column[row % len(column)] for column in columns) for row in rows]


class Wildcards:
    r"""Parser of captions with wildcards; a backslash escapes ``{``, ``}``, ``|`` and ``__``.

    Args:
        folder: Folder of wildcard files: ``__colours__`` is a line of ``colours.txt``,
            ``__sea/fish__`` a line of ``sea/fish.txt``. Empty lines and lines that start with
            ``#`` are skipped. Lines may contain wildcards.

    Raises:
        ConfigError: If the folder does not exist.
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
        """Render a text with picked alternatives and single spaces."""
        return " ".join(render(self.parse(text), pick).split())

    def variants(self, text: str) -> list[str]:
        """Unique texts that together contain each alternative, see `variants`."""
        return list(dict.fromkeys(" ".join(one.split()) for one in variants(self.parse(text))))

    def parse(self, text: str, within: tuple[str, ...] = ()) -> Template:
        """Parse a text to a template.

        Args:
            text: The text.
            within: Names of the wildcard files that contain the text, outermost first.

        Raises:
            ConfigError: If braces are unbalanced, a file is missing, empty, damaged or refers to
                itself, or rendered texts could have more than `MOST_CHARACTERS`.
        """
        if text in self._templates:
            return self._templates[text]
        groups: list[list[list[str | Choice]]] = [[[]]]  # Alternatives of each open group.
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
                unopened = rf"{quoted(text)} has }} without {{; the character is \}}"
                require(len(groups) > 1, unopened, "wildcards")
                part = Choice(tuple(map(tuple, groups.pop())))
            groups[-1][-1].append(part)
        unclosed = rf"{quoted(text)} has {{ without }}; the character is \{{"
        require(len(groups) == 1, unclosed, "wildcards")
        template = tuple(groups[0][0])
        too_long = (
            f"the wildcards of {quoted(text)} can give more than {MOST_CHARACTERS} characters"
        )
        require(_length(template) <= MOST_CHARACTERS, too_long, "wildcards")
        self._templates[text] = template
        return template

    def _file(self, name: str, within: tuple[str, ...]) -> Choice:
        wildcard, outermost_first = f"the wildcard __{name}__", " > ".join((*within, name))
        require(name not in within, f"{wildcard} refers to itself: {outermost_first}", "wildcards")
        if name in self._files:
            return self._files[name]
        if self.folder is None:
            problem = "needs a file; give its folder as wildcard_dir"
            raise ConfigError(f"{wildcard} {problem}", "wildcard_dir")
        path = self.folder / f"{name}.txt"
        is_file = ".." not in path.parts[len(self.folder.parts) :] and path.is_file()
        missing = f"{wildcard} has no file {name}.txt in {self.folder}"
        require(is_file, missing, "wildcard_dir")
        text = read_text(path, "the wildcard file", "wildcard_dir")
        lines = (" ".join(line.split()) for line in text.splitlines())
        texts = [line for line in lines if line and not line.startswith("#")]
        require(bool(texts), f"{wildcard} has no lines in {name}.txt", "wildcard_dir")
        inner = (*within, name)
        self._files[name] = Choice(tuple(self.parse(text, inner) for text in texts))
        return self._files[name]


# Rules that an adapter's file stores, for captions that are read later.
_STATED = ("per_line", "wildcards", "prefix", "suffix")


@dataclass(frozen=True)
class CaptionRules:
    """Rules that turn the text of a photo's caption file into its caption in an epoch.

    Applied in this order: draw a line, draw alternatives of wildcards, shuffle tags, drop tags, add
    prefix and suffix, drop the caption. Each draw has its own generator, seeded by a key such as
    seed, epoch and photo; shuffling and caption dropout share one.

    Attributes:
        per_line: Each line of the text is a separate caption.
        wildcards: Parser of ``{a|b}`` and ``__file__``; None keeps them as text.
        prefix: Text before every caption; excluded from tag shuffling and dropout.
        suffix: Text after every caption, excluded likewise.
        separator: Separator of tags.
        shuffle_tags: Shuffle tags.
        keep_tags: Number of first tags that are neither shuffled nor dropped.
        tag_dropout: Probability of dropping each other tag.
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
        """Draw a caption from a photo's text, seeded by the key."""
        lines = self._lines(text)
        number = 0
        if len(lines) > 1:
            chooser = generator_for("caption line", *key)
            number = int(torch.randint(len(lines), (), generator=chooser))
        pick = at_random(generator_for("wildcards", *key))
        prefix, body, suffix = self._parts(lines[number], pick)
        generator = generator_for("caption", *key)
        caption = _framed(prefix, self._tags(body, generator, key), suffix)
        if self.dropout > 0.0 and torch.rand((), generator=generator).item() < self.dropout:
            return ""
        return caption

    def draw_prompt(self, prompt: str, seed: int) -> str:
        """Draw the wildcards of a prompt, seeded by the image's seed."""
        if self.wildcards is None:
            return prompt
        pick = at_random(generator_for("wildcards", "prompt", seed))
        return self.wildcards.render(prompt, pick)

    def plain(self, text: str) -> str:
        """Caption for measurements: first line, first alternatives, all tags in order."""
        return self.variants(text)[0]

    @classmethod
    def from_stated(
        cls, text: str, wildcard_dir: str | None = None, trigger: str = ""
    ) -> CaptionRules:
        """Parse the rules of a subject written by `stated_rules`; default rules for other texts."""
        try:
            values = json.loads(unquote(text))
            values = values.get(trigger, values)
            per_line, has_wildcards, prefix, suffix = (values.get(name) for name in _STATED)
        except (AttributeError, RecursionError, ValueError):
            return cls()
        wildcards = Wildcards(wildcard_dir) if has_wildcards else None
        return cls(bool(per_line), wildcards, str(prefix or ""), str(suffix or ""))

    def variants(self, text: str) -> list[str]:
        """Unshuffled, complete captions that together contain each line and each alternative."""
        lines = [_framed(self.prefix, line, self.suffix) for line in self._lines(text)]
        if self.wildcards is None:
            return lines
        return [caption for line in lines for caption in self.wildcards.variants(line)]

    def possible(self, text: str, token: str, *, with_dropout: bool = False) -> list[str]:
        """Return for each line a caption without a token if possible, and one with it.

        Args:
            text: Text of a photo.
            token: A word.
            with_dropout: Drop all tags that `tag_dropout` may drop.
        """
        captions = []
        avoiding = preferring(lambda body: not contains_token(body, token))
        holding = preferring(lambda body: contains_token(body, token))
        for line in self._lines(text):
            for pick in (avoiding, holding) if self.wildcards is not None else (avoiding,):
                prefix, body, suffix = self._parts(line, pick)
                if with_dropout and self.tag_dropout:
                    body = self._tag_joiner.join(self._split(body)[: self.keep_tags])
                captions.append(_framed(prefix, body, suffix))
        return list(dict.fromkeys(captions))

    def can_shuffle(self, captions: Sequence[str], count: int = 2) -> bool:
        """Return whether any caption has at least this many tags after the kept ones."""
        return any(len(self._split(caption)) >= self.keep_tags + count for caption in captions)

    @property
    def draws_tags(self) -> bool:
        """True if captions are split into tags."""
        return self.shuffle_tags or self.tag_dropout > 0.0

    def has_empty_tag(self, caption: str) -> bool:
        """Return whether a caption has an empty tag."""
        pieces = self._pieces(caption)
        return len(pieces) > 1 and not all(map(str.strip, pieces))

    def identity(self, text: str) -> str:
        """The text, and with wildcards a digest of its variants, which depend on their files."""
        text = "\n".join(self._lines(text))
        if self.wildcards is None:
            return text
        digest = hashlib.sha256("\n".join(self.variants(text)).encode()).hexdigest()
        return f"{text} [{digest[:12]}]"

    def tag_frequency(self, captions: Sequence[str]) -> dict[str, int]:
        """Count the captions that contain each tag, most frequent first."""
        counts = Counter(sorted(tag for caption in captions for tag in set(self._split(caption))))
        return dict(counts.most_common())

    def _lines(self, text: str) -> list[str]:
        lines = text.split("\n")
        return lines if self.per_line else [" ".join(lines)]

    def _parts(self, line: str, pick: Pick) -> list[str]:
        """Prefix, line and suffix, with rendered wildcards."""
        texts, wildcards = [self.prefix, line, self.suffix], self.wildcards
        return texts if wildcards is None else [wildcards.render(text, pick) for text in texts]

    def _tags(self, text: str, generator: torch.Generator, key: Sequence[object]) -> str:
        if not self.draws_tags:
            return text
        tags = self._split(text)
        fixed, free = tags[: self.keep_tags], tags[self.keep_tags :]
        order = list(range(len(free)))
        if self.shuffle_tags:
            order = torch.randperm(len(free), generator=generator).tolist()
        coins = torch.rand(len(free), generator=generator_for("tag dropout", *key)).tolist()
        remaining = [free[i] for i in order if coins[i] >= self.tag_dropout]
        return self._tag_joiner.join(fixed + remaining)

    @property
    def _tag_joiner(self) -> str:
        """Text that joins tags: the separator, and a space if it contains none."""
        is_bare = self.separator == self.separator.strip()
        return f"{self.separator} " if is_bare else self.separator

    def _split(self, text: str) -> list[str]:
        return [tag.strip() for tag in self._pieces(text) if tag.strip()]

    def _pieces(self, text: str) -> list[str]:
        return text.split(self.separator.strip() or self.separator)


def stated_rules(rules: Mapping[str, CaptionRules]) -> str:
    """Encode the subjects' rules for an adapter's file, without shuffling and dropout.

    Empty for default rules. URL-quoted, since slashes in metadata are read as paths.

    Args:
        rules: Trigger words -> rules; equal rules are stored once.
    """
    defaults = CaptionRules()
    values = {
        trigger: {
            name: True if name == "wildcards" else value
            for name in _STATED
            if (value := getattr(subject_rules, name)) != getattr(defaults, name)
        }
        for trigger, subject_rules in rules.items()
    }
    first, *rest = values.values()
    differ = any(other != first for other in rest)
    text = json.dumps(values if differ else first, ensure_ascii=False)
    return quote(text, safe=' ,:;{}"') if differ or first else ""


def _framed(prefix: str, text: str, suffix: str) -> str:
    return framed(prefix, text, suffix) if prefix or suffix else text


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
            line = framed(self.prefix, line, "")
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
