"""Names in two layouts, paired once; each direction is derived from the pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from dora_diffusion.wording import listing


class NameTable:
    """Pairs of ``(canonical, original)`` names, each also for everything that lies below it.

    Attributes:
        original: Canonical name -> original name.
        canonical: The inverse.

    Raises:
        ValueError: If the pairs are not one-to-one, with all that lies below them.
    """

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        pairs = list(pairs)
        self.original = dict(pairs)
        self.canonical = {original: name for name, original in pairs}
        for column in zip(*pairs, strict=True):
            if repeated := [name for name, count in Counter(column).items() if count > 1]:
                raise ValueError(f"names that are not one-to-one: {listing(repeated)}")
        for names in (self.original, self.canonical):
            if nested := [n for n in names if renamed(n.rpartition(".")[0], names)]:
                raise ValueError(f"names that lie below another: {listing(nested)}")

    def below(self, canonical: str, original: str) -> list[tuple[str, str]]:
        """The pairs behind a prefix on either side."""
        return [(canonical + name, original + other) for name, other in self.original.items()]

    def to_original(self, name: str) -> str | None:
        """Original name of a module or tensor, None if it has none."""
        return renamed(name, self.original)

    def to_canonical(self, name: str) -> str | None:
        """Canonical name of an original one, None if it has none."""
        return renamed(name, self.canonical)

    def with_underscores(self) -> NameTable:
        """The same names as kohya's scripts write them."""
        return NameTable((a.replace(".", "_"), b.replace(".", "_")) for a, b in self.below("", ""))


def renamed(name: str, names: Mapping[str, str], separator: str = ".") -> str | None:
    """The name with its longest known start replaced, None if no start of it is known."""
    parts = name.split(separator)
    for end in range(len(parts), 0, -1):
        if start := names.get(separator.join(parts[:end])):
            return separator.join([start, *parts[end:]])
    return None
