"""Many adapters over one base model: loaded when first asked for, dropped by use."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dora_diffusion.adapters.inject import layer_adapters, remove_adapters, set_strength
from dora_diffusion.adapters.state import attach_file
from dora_diffusion.formats.adapter.embeddings import Vectors, are_equal
from dora_diffusion.formats.adapter.file import AdapterMetadata, find_adapter
from dora_diffusion.models.components import Components
from dora_diffusion.models.words import add_tokens

Wanted = str | Path | tuple[str | Path, float] | None
"""An adapter file or a run's folder, or that with a strength; None is the base."""


@dataclass(frozen=True)
class _Loaded:
    """An adapter that is on the model."""

    name: str
    metadata: AdapterMetadata
    size: int


class AdapterPool:
    """Adapters of one base model, within a budget of memory.

    Each is read when it is first asked for. Where the budget is exceeded, those that were not asked
    for the longest are dropped. A file that was written since is read again. Between adapters that
    are loaded nothing is switched: rows of one batch name theirs.

    Example:
        >>> from dora_diffusion import AdapterPool, load_components
        >>> pool = AdapterPool(load_components("embedded:tiny-sd"), budget=2**30)
        >>> pool.names([None, None])
        [None, None]

    Args:
        components: The loaded model; tokens that adapters were trained with are added to it.
        budget: Bytes that the adapters' parameters may take.
    """

    def __init__(self, components: Components, budget: int = 2**30) -> None:
        self.components, self.budget = components, budget
        self._loaded: OrderedDict[tuple[object, ...], _Loaded] = OrderedDict()
        self._tokens: dict[str, Vectors] = {}
        self._count = 0

    @property
    def size(self) -> int:
        """Bytes that the parameters of the loaded adapters take."""
        return sum(loaded.size for loaded in self._loaded.values())

    def names(self, adapters: Sequence[Wanted]) -> list[str | None]:
        """What `generate_images` and `row_scope` call these adapters, which are loaded now.

        Raises:
            AdapterFormatError, ValueError: If one cannot be read, does not fit the model, or has
                trained another vector for a token that one before has trained; or if together they
                exceed the budget. What was loaded before stays.
        """
        keys = [None if adapter is None else _key(adapter) for adapter in adapters]
        wanted = {key: adapter for key, adapter in zip(keys, adapters, strict=True) if key}
        for key, adapter in wanted.items():
            if key not in self._loaded:
                self._loaded[key] = self._load(adapter)
            self._loaded.move_to_end(key)
            self._make_room(wanted)
        return [None if key is None else self._loaded[key].name for key in keys]

    def metadata(self, name: str) -> AdapterMetadata:
        """What the file of a loaded adapter says of it, such as its trigger words."""
        return next(each.metadata for each in self._loaded.values() if each.name == name)

    def _load(self, adapter: Wanted) -> _Loaded:
        path, strength = adapter if isinstance(adapter, tuple) else (adapter, 1.0)
        assert path is not None
        models, name = self.components.adaptable(), f"pool{self._count}"
        self._count += 1
        read = attach_file(models, path, name=name, family=self.components.family.name)
        try:
            self._add_tokens(read.tokens, path)
        except ValueError:
            self._drop(name)
            raise
        parts = [part for model in models.values() for part in layer_adapters(model, name)]
        for model in models.values():
            if any(layer_adapters(model, name)):
                set_strength(model, strength, name=name)
        tensors = [tensor for part in parts for tensor in part.parameters()]
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return _Loaded(name, read.metadata, size)

    def _add_tokens(self, tokens: dict[str, Vectors], path: str | Path) -> None:
        """Add an adapter's trained tokens, which stay: those of one that comes back are known."""
        for token, vectors in tokens.items():
            known = self._tokens.get(token)
            if known is not None and not are_equal(known, vectors):
                raise ValueError(
                    f"{path} has trained the token {token!r}, and so has another adapter that was "
                    "loaded, with another vector: one text encoder can hold only one of them; load "
                    "them in pools of their own"
                )
        new = {token: vectors for token, vectors in tokens.items() if token not in self._tokens}
        add_tokens(self.components, new)
        self._tokens |= new

    def _make_room(self, wanted: dict[tuple[object, ...], Wanted]) -> None:
        for key in [key for key in self._loaded if key not in wanted]:
            if self.size <= self.budget:
                return
            self._drop(self._loaded.pop(key).name)
        if self.size > self.budget:
            size, most = (f"{count / 1e6:.1f} MB" for count in (self.size, self.budget))
            _, last = self._loaded.popitem()
            self._drop(last.name)
            raise ValueError(
                f"the adapters that are asked for at once take {size}, and the pool may hold "
                f"{most}; give it a larger budget, or ask for fewer at once"
            )

    def _drop(self, name: str) -> None:
        for model in self.components.adaptable().values():
            if any(layer_adapters(model, name)):
                remove_adapters(model, name)


def _key(adapter: Wanted) -> tuple[object, ...]:
    """What an adapter is known by: its file as it is now, and its strength."""
    path, strength = adapter if isinstance(adapter, tuple) else (adapter, 1.0)
    assert path is not None
    file = find_adapter(path)
    status = file.stat()
    return file.resolve(), status.st_mtime_ns, status.st_size, strength
