"""The documents as tests and rules read them: blocks of code, links, images, anchors, commands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tools import site

ROOT = Path(__file__).parents[1]
DOCS, LAB = ROOT / "docs", ROOT / "lab"

_FENCE = re.compile(r"^ *(?P<fence>`{3,}|~{3,}) *(?P<info>[^`\n]*)\n", re.MULTILINE)
_SYNONYMS = re.compile(r"\A---\n(?:.*\n)*?---\n|<!-- search: .*? -->")
_LINK = re.compile(r"(?P<image>!?)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        language: What stands behind its fence, such as ``bash``.
        text: What is in it.
        line: Where it begins.
        follows: Whether only empty lines are between it and the block before it.
    """

    language: str
    text: str
    line: int
    follows: bool


@dataclass(frozen=True)
class Page:
    """One document.

    Attributes:
        path: Where it is.
    """

    path: Path

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @cached_property
    def source(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def shown(self) -> str:
        """The page as a reader of the site sees it: with what is generated and included."""
        include = re.compile(r"^```\{include\} (\S+)\n(?:.*\n)*?```$", re.MULTILINE)
        text = site.expanded(self.source)
        return include.sub(
            lambda block: (self.path.parent / block[1]).read_text(encoding="utf-8"), text
        )

    @cached_property
    def blocks(self) -> list[Block]:
        return [block for _, _, block in _fenced(self.source)]

    @cached_property
    def prose(self) -> str:
        """All but the fenced blocks, and words for the search."""
        return _SYNONYMS.sub("", _without_blocks(self.source))

    @cached_property
    def inline_code(self) -> list[str]:
        return re.findall(r"(?<!`)`([^`]+)`(?!`)", self.prose)

    @cached_property
    def anchors(self) -> set[str]:
        """Of its headings, as GitHub and MyST make them."""
        found: list[str] = []
        for title in re.findall(r"^#+ +(.+?) *$", _without_blocks(self.shown), re.MULTILINE):
            words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).replace("\\", "").lower()
            anchor = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
            repeated = sum(re.fullmatch(rf"{anchor}(-\d+)?", other) is not None for other in found)
            found.append(f"{anchor}-{repeated}" if repeated else anchor)
        return set(found)

    @cached_property
    def links(self) -> list[tuple[Path, str]]:
        """Files that it links, and the anchors in them; of images too."""
        links = [match["target"] for match in _LINK.finditer(self.prose)]
        links += re.findall(r"<img [^>]*src=\"([^\"]+)\"", self.prose)
        inside = [link.partition("#") for link in links if not re.match(r"[a-z]+:", link)]
        return [((self.path.parent / p).resolve() if p else self.path, a) for p, _, a in inside]

    @cached_property
    def image_texts(self) -> list[str]:
        """The alternative text of each of its images."""
        texts = [match["text"] for match in _LINK.finditer(self.prose) if match["image"]]
        tags = re.findall(r"<img [^>]*>", self.prose)
        return texts + [(re.findall(r'alt="([^"]*)"', tag) or [""])[0] for tag in tags]

    @cached_property
    def commands(self) -> list[list[str]]:
        """The words of every command that it shows, run or not."""
        shown = [block.text for block in self.blocks if block.language in ("bash", "console")]
        return [words for text in shown for words in _commands(text)]


def _fenced(text: str) -> Iterator[tuple[int, int, Block]]:
    """Start, end and block of each."""
    at = 0
    while start := _FENCE.search(text, at):
        closing = re.compile(rf"^ *{re.escape(start['fence'])} *$", re.MULTILINE)
        end = closing.search(text, start.end())
        assert end, f"a block has no end: {start[0]}"
        line = text.count("\n", 0, start.start()) + 1
        follows = not text[at : start.start()].strip() and at > 0
        info = start["info"].strip()
        yield start.start(), end.end(), Block(info, text[start.end() : end.start()], line, follows)
        at = end.end()


def _without_blocks(text: str) -> str:
    parts, at = [], 0
    for start, end, _ in _fenced(text):
        parts.append(text[at:start])
        at = end
    return "".join([*parts, text[at:]])


def _commands(text: str) -> Iterator[list[str]]:
    """The simple commands of a shell's text, without here documents and redirections."""
    text = re.sub(r"^\$ ", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    text = re.sub(r"(<<-? *['\"]?(\w+)['\"]?.*)\n(?:.*\n)*?\2\n", r"\1\n", text)
    for line in text.splitlines():
        words: list[str] = []
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>()")
        lexer.whitespace_split = True
        for word in lexer:
            if set(word) <= set("|&;()"):
                yield words
                words = []
            else:
                words.append(word)
        yield words


PAGES = [Page(path) for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md")]
PAGES += [Page(path) for path in sorted(DOCS.rglob("*.md"))]
PAGES += [Page(path) for path in sorted([*LAB.glob("*.md"), *LAB.glob("measurements/*.md")])]
