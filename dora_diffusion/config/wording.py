"""Words of messages: counts, articles, shortened quotes, and "did you mean"."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

QUOTE_LIMIT = 80
_PUNCTUATION = ",.;:!?"


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun.

    Example:
        >>> counted(1, "photo"), counted(0, "photo"), counted(2, "class", "classes")
        ('1 photo', '0 photos', '2 classes')
    """
    return f"{count} {noun if count == 1 else plural or noun + 's'}"


def listing(names: Iterable[str], limit: int = 10) -> str:
    """List some names in their order, with the number of those left out.

    Example:
        >>> listing(["b", "a"]), listing("cba", 2)
        ('a, b', 'a, b and 1 more')
    """
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def number_text(value: float) -> str:
    """The shortest text that reads as the same number.

    Example:
        >>> number_text(2.0), number_text(0.1)
        ('2', '0.1')
    """
    return str(int(value)) if value == int(value) else repr(float(value))


def pixels(sides: Iterable[int]) -> str:
    """Sides of images as a text: ``"512, 768 px"``; empty where there are none."""
    return f"{text} px" if (text := ", ".join(map(str, sides))) else ""


def quoted(text: str, limit: int = QUOTE_LIMIT) -> str:
    """A text in quotes on one line, its middle left out where it is long.

    Example:
        >>> quoted("a photo of a sks dog")
        "'a photo of a sks dog'"
        >>> quoted("word " * 30, 20)
        "'word word ... word word'"
    """
    line = " ".join(text.split())
    if len(line) > limit:
        line = f"{line[: limit // 2].rstrip()} ... {line[-limit // 2 :].lstrip()}"
    return repr(line)


def framed(prefix: str, text: str, suffix: str) -> str:
    """A text between two others: spaces between them, none before a suffix's punctuation.

    Example:
        >>> framed("sks dog,", "grass, sun", ", photo"), framed("", "a dog", "at night")
        ('sks dog, grass, sun, photo', 'a dog at night')
        >>> framed("sks dog,", "", ", photo")
        'sks dog, photo'
    """
    if suffix[:1] not in tuple(_PUNCTUATION):
        suffix = f" {suffix}"
    elif not text.strip():
        prefix = prefix.rstrip(_PUNCTUATION + " ")
    return " ".join((f"{prefix} {text}".rstrip() + suffix).split())


def with_article(noun: str) -> str:
    """A noun with its indefinite article.

    Example:
        >>> with_article("red mug"), with_article("orange mug")
        ('a red mug', 'an orange mug')
    """
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def duration(seconds: float | None) -> str:
    """``75 -> "1 min 15 s"``."""
    if seconds is None:
        return "unknown"
    whole = max(0, round(seconds))
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def closest(word: object, words: Iterable[str]) -> str | None:
    """The known word that was probably meant, or None."""
    typed = _form(word)
    by_form = {_form(name): name for name in words}
    matches = difflib.get_close_matches(typed, by_form, n=1, cutoff=0.6)
    if matches:
        return by_form[matches[0]]
    # A name cut short is not close by its letters: max_train for max_train_steps.
    longer = [name for form, name in by_form.items() if len(typed) > 3 and form.startswith(typed)]
    return longer[0] if len(longer) == 1 else None


def _form(word: object) -> str:
    """A word without what people leave out or write otherwise: case, dashes before and inside."""
    return str(word).lstrip("-").replace("-", "_").lower()


def did_you_mean(word: object, words: Iterable[str]) -> str:
    """``" (did you mean X?)"``, or nothing where no known word is close."""
    name = closest(word, words)
    return f" (did you mean {name}?)" if name else ""


def whole_word(token: str) -> re.Pattern[str]:
    """Match a word, ignoring case, except as a part of another word.

    Letters, digits and underscores are the characters of words: ``sks`` is not in ``sks2``, but
    ``<sks>`` is in ``a<sks>2``.
    """
    before = r"(?<!\w)" if re.match(r"\w", token) else ""
    after = r"(?!\w)" if re.search(r"\w\Z", token) else ""
    return re.compile(f"{before}{re.escape(token)}{after}", re.IGNORECASE)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with columns of one width."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])
