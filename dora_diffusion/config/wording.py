"""Words of messages: counts, articles, shortened quotes, and "did you mean"."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

QUOTE_LIMIT = 80
_PUNCTUATION = ",.;:!?"


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """Put a count before its noun.

    Example:
        >>> counted(1, "photo"), counted(0, "photo"), counted(2, "class", "classes")
        ('1 photo', '0 photos', '2 classes')
    """
    return f"{count} {noun if count == 1 else plural or noun + 's'}"


def listing(names: Iterable[str], limit: int = 10) -> str:
    """List names in alphabetical order up to a limit, with the number of further names.

    Example:
        >>> listing(["b", "a"]), listing("cba", 2)
        ('a, b', 'a, b and 1 more')
    """
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def number_text(value: float) -> str:
    """Shortest text of a number that is read back as the same number.

    Example:
        >>> number_text(2.0), number_text(0.1)
        ('2', '0.1')
    """
    return str(int(value)) if value == int(value) else repr(float(value))


def pixels(sides: Iterable[int]) -> str:
    """Format sides of images: ``"512, 768 px"``; empty without sides."""
    return f"{text} px" if (text := ", ".join(map(str, sides))) else ""


def quoted(text: str, limit: int = QUOTE_LIMIT) -> str:
    """Quote a text on one line, with the middle of a long text replaced by dots.

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


def prefixed_caption(prefix: str, text: str) -> str:
    """Join the prefix of captions and a text by a space.

    Example:
        >>> prefixed_caption("sks dog,", "grass,  sun")
        'sks dog, grass, sun'
    """
    return " ".join(f"{prefix} {text}".split())


def with_article(noun: str) -> str:
    """Put the indefinite article before a noun.

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
    """Return the known word closest to a mistyped one, or None."""
    typed = _form(word)
    by_form = {_form(name): name for name in words}
    matches = difflib.get_close_matches(typed, by_form, n=1, cutoff=0.6)
    if matches:
        return by_form[matches[0]]
    # The matcher misses abbreviated names, such as max_train for max_train_steps.
    longer = [name for form, name in by_form.items() if len(typed) > 3 and form.startswith(typed)]
    return longer[0] if len(longer) == 1 else None


def _form(word: object) -> str:
    """Normalize a word: lower case, without leading dashes, with underscores for dashes."""
    return str(word).lstrip("-").replace("-", "_").lower()


def did_you_mean(word: object, words: Iterable[str]) -> str:
    """``" (did you mean X?)"``, or empty if no known word is close."""
    name = closest(word, words)
    return f" (did you mean {name}?)" if name else ""


def whole_word(token: str) -> re.Pattern[str]:
    """Pattern that matches a word, ignoring case, but not as part of another word.

    Words consist of letters, digits and underscores: ``sks`` does not match in ``sks2``, but
    ``<sks>`` matches in ``a<sks>2``.
    """
    before = r"(?<!\w)" if re.match(r"\w", token) else ""
    after = r"(?!\w)" if re.search(r"\w\Z", token) else ""
    return re.compile(f"{before}{re.escape(token)}{after}", re.IGNORECASE)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Markdown table with aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])
