"""Pool of many adapters over one base model: loaded when first asked for, dropped by use."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, cast

from dora_diffusion.adapters.inject import layer_adapters, remove_adapters
from dora_diffusion.adapters.layers import LayerAdapter
from dora_diffusion.adapters.scope import FixedNorms
from dora_diffusion.adapters.state import attach_file
from dora_diffusion.config.fields import require, require_positive
from dora_diffusion.config.images import ImageRequest
from dora_diffusion.formats.adapter.metadata import (
    ZERO_TERMINAL_SNR,
    AdapterMetadata,
)
from dora_diffusion.formats.adapter.stored import find_adapter, read_metadata
from dora_diffusion.formats.checkpoint.schedule import PREDICTION
from dora_diffusion.models.components import Components
from dora_diffusion.models.load import reschedule
from dora_diffusion.models.words import add_own_tokens, own_words, remove_own_tokens
from dora_diffusion.numerics.weights import MergeStrengths
from dora_diffusion.sampling.generate import generate_images
from dora_diffusion.sampling.images import content_hash
from dora_diffusion.sampling.load import as_stated
from dora_diffusion.sampling.settings import SamplingSettings
from dora_diffusion.sampling.stack import AdapterUse, set_strengths

if TYPE_CHECKING:
    from PIL.Image import Image

    from dora_diffusion.sampling.settings import AdapterRef


@dataclass(frozen=True, kw_only=True)
class PinnedAdapter(AdapterUse):
    """An adapter as its file was when `AdapterPool.pin` read it; see `RecordedAdapter.hash`."""

    key: tuple[object, ...]
    metadata: AdapterMetadata = field(default_factory=AdapterMetadata)
    hash: str = ""


@dataclass(frozen=True)
class _Loaded:
    """An adapter that is on the model."""

    name: str
    size: int
    metadata: AdapterMetadata


class AdapterPool:
    """Adapters of one base model, within a budget of memory.

    Each is read when it is first asked for, and its norms are computed when it is first used. Where
    the budget is exceeded, those that were not asked for the longest are dropped. A file that was
    written since is read again. Between adapters that are loaded nothing is switched: rows of one
    batch name theirs. Tokens that were trained with an adapter are known in its prompts alone.

    Example:
        >>> from dora_diffusion import AdapterPool, load_components
        >>> pool = AdapterPool(load_components("embedded:tiny-sd"), budget=2**30)
        >>> pool.names([None, None])
        [None, None]

    Args:
        components: The loaded model; tokens that adapters were trained with are added to it.
        budget: Bytes that the adapters' parameters, and what is computed from them, may take.
            None: what one call of `names` asks for, and nothing else.
        clip_skip: Last layers of the text encoders to leave out; None: what adapter or base say.
        max_token_length: Tokens of a prompt that are read; None: what adapter or base say.

    Attributes:
        loads: How many adapters were read so far.
    """

    def __init__(
        self,
        components: Components,
        budget: int | None = 2**30,
        *,
        clip_skip: int | None = None,
        max_token_length: int | None = None,
    ) -> None:
        require((budget or 0) >= 0, f"budget is {budget}; it must not be negative", "budget")
        components.reading(clip_skip, max_token_length, is_told=False)  # or it raises
        self.components, self.budget = replace(components, norms=FixedNorms()), budget
        self._asked = clip_skip, max_token_length
        self._width = components.denoiser.dtype.itemsize  # Which looks at every module.
        self._loaded: OrderedDict[tuple[object, ...], _Loaded] = OrderedDict()
        self._variants: dict[tuple[object, ...], Components] = {}
        self.loads = 0

    @property
    def size(self) -> int:
        """Bytes that the loaded adapters take."""
        return sum(loaded.size for loaded in self._loaded.values())

    def generate(
        self,
        requests: Sequence[ImageRequest],
        settings: SamplingSettings | None = None,
        *,
        batch_size: int = 4,
        on_step: Callable[[int, int], None] | None = None,
        require_finite: bool = False,
    ) -> list[Image]:
        """Sample an image for each request, those of different adapters in one batch.

        Requests of other settings, and those whose adapters say that noise schedule or prompts are
        to be read in another way, are in batches of their own.

        Args:
            requests: The images, each with its seed.
            settings: Values of settings that a request leaves out.
            batch_size: Images at once.
            on_step: Called with (steps done, steps in all), a step being one image's.
            require_finite: As in `generate_images`.

        Raises:
            AdapterFormatError, ValueError, BrokenImageError: As `names` and `generate_images` do.
        """
        require_positive("batch_size", batch_size)
        images: dict[int, Image] = {}
        groups: dict[tuple[object, ...], tuple[Components, list[int]]] = {}
        for number, request in enumerate(requests):
            components = self.components_for(request.adapter)
            key = (*reading_of(components), *request.shared)
            groups.setdefault(key, (components, []))[1].append(number)
        usual = vars(settings or SamplingSettings())
        for components, numbers in groups.values():
            shared = SamplingSettings.of(requests[numbers[0]], **usual)
            for start in range(0, len(numbers), batch_size):
                batch = numbers[start : start + batch_size]
                before, count = len(images), len(batch)

                def show(done: int, steps: int, before: int = before, count: int = count) -> None:
                    if on_step is not None:
                        on_step(before * steps + done * count, len(requests) * steps)

                made = generate_images(
                    components,
                    [requests[number].prompt for number in batch],
                    [requests[number].known_seed for number in batch],
                    shared,
                    adapters=self.names([requests[number].adapter for number in batch]),
                    batch_size=count,
                    on_step=show,
                    require_finite=require_finite,
                )
                images |= zip(batch, made, strict=True)
        return [images[number] for number in range(len(requests))]

    def names(self, adapters: Sequence[AdapterRef]) -> list[str | None]:
        """Load these adapters, and return their names for `generate_images` and `row_scope`.

        Raises:
            AdapterFormatError, ValueError: If one cannot be read or does not fit the model, or if
                together they exceed the budget. What was loaded before stays.
        """
        references = [None if adapter is None else _reference(adapter) for adapter in adapters]
        wanted = {reference.key: reference for reference in references if reference}
        for key, reference in wanted.items():
            if key not in self._loaded:
                if _key(reference) != key:
                    raise ValueError(f"{reference.path} was replaced while it was used; ask again")
                self._loaded[key] = self._load(reference)
            self._loaded.move_to_end(key)
            self._make_room(wanted)
        return [None if one is None else self._loaded[one.key].name for one in references]

    def pin(self, adapter: AdapterRef) -> PinnedAdapter | None:
        """Load an adapter; what becomes of its file does not matter while the pool has room for it.

        Raises:
            AdapterFormatError, ValueError: As `names` does.
        """
        if adapter is None:
            return None
        self.names([adapter])
        key, loaded = next(reversed(self._loaded.items()))
        file, written, size = cast("tuple[Path, int, int]", key[:3])
        known = content_hash(file, written, size)
        return replace(_reference(adapter), key=key, metadata=loaded.metadata, hash=known)

    def metadata(self, adapter: AdapterRef) -> AdapterMetadata:
        """Read the metadata of an adapter's file, such as its trigger words; nothing is loaded.

        Raises:
            AdapterFormatError, FileNotFoundError: If it cannot be read.
        """
        if adapter is None:
            return AdapterMetadata()
        if isinstance(adapter, PinnedAdapter):
            return adapter.metadata
        return read_metadata(_reference(adapter).path)

    def own_words(self, adapter: AdapterRef) -> Mapping[str, str]:
        """The tokens that only the prompts of an adapter have, as `models.words.own_words` does.

        Raises:
            AdapterFormatError, ValueError: As `names` does, by which it is loaded.
        """
        (name,) = self.names([adapter])
        return own_words(self.components.text_encoders[0], name)

    def components_for(self, adapter: AdapterRef) -> Components:
        """The model, with noise schedule and prompts read as an adapter's file says.

        The modules are those of all; only how they are used differs. What the pool was asked for
        comes before the file.

        Raises:
            AdapterFormatError, ValueError: If it cannot be read, or is not to be had.
        """
        if adapter is None:
            return self.components
        metadata = self.metadata(adapter)
        components = as_stated(self.components, metadata, *self._asked)
        if components.schedule is None:
            return components
        # Made once for all adapters that say the same.
        facts = (metadata.extra.get(name) for name in (PREDICTION, ZERO_TERMINAL_SNR))
        key = (metadata.base_model, *facts, components.clip_skip, components.max_token_length)
        if key not in self._variants:
            self._variants[key] = reschedule(components, [metadata])
        return self._variants[key]

    def clear(self) -> None:
        """Drop all adapters: the model is its base again."""
        while self._loaded:
            self._drop(self._loaded.popitem()[1].name)

    def _load(self, adapter: PinnedAdapter) -> _Loaded:
        models, name = self.components.adaptable(), f"pool{self.loads}"
        self.loads += 1
        family = self.components.family.name
        read = attach_file(models, adapter.path, name=name, family=family)
        try:
            add_own_tokens(self.components, name, read.tokens)
            set_strengths(models, [adapter], [name])
        except ValueError:
            self._drop(name)
            raise
        parts = [part for model in models.values() for part in layer_adapters(model, name)]
        return _Loaded(name, sum(map(self._bytes, parts)), read.metadata)

    def _bytes(self, part: LayerAdapter) -> int:
        """Return an adapter's bytes on a layer: parameters and, of a DoRA, the norms' factors."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in part.parameters())
        if part.magnitude is not None:
            size += self._width * (part.down.numel() + part.up.numel())
            size += (4 + self._width) * part.magnitude.numel()
        return size

    def _make_room(self, wanted: Container[tuple[object, ...]]) -> None:
        for key in [key for key in self._loaded if key not in wanted]:
            if self.budget is not None and self.size <= self.budget:
                return
            self._drop(self._loaded.pop(key).name)
        if self.budget is not None and self.size > self.budget:
            size, most = (f"{count / 1e6:.1f} MB" for count in (self.size, self.budget))
            _, last = self._loaded.popitem()
            self._drop(last.name)
            raise ValueError(
                f"the adapters that are asked for at once take {size}, and the pool may hold "
                f"{most}; give it a larger budget, or ask for fewer at once"
            )

    def _drop(self, name: str) -> None:
        remove_own_tokens(self.components, name)
        for model in self.components.adaptable().values():
            if any(layer_adapters(model, name)):
                remove_adapters(model, name)


def reading_of(components: Components) -> tuple[object, ...]:
    """Return what all rows of a batch share: noise schedule, clip skip and length of prompts."""
    schedule = components.schedule
    settings = None if schedule is None else (schedule.prediction_type, schedule.zero_terminal_snr)
    return settings, components.clip_skip, components.max_token_length


def _reference(adapter: AdapterRef) -> PinnedAdapter:
    """An adapter with its key."""
    if isinstance(adapter, PinnedAdapter):
        return adapter
    if not isinstance(adapter, AdapterUse):
        path, strength = adapter if isinstance(adapter, tuple) else (adapter, 1.0)
        adapter = AdapterUse(Path(cast("str | PathLike[str]", path)), MergeStrengths.of(strength))
    return PinnedAdapter(**vars(adapter), key=_key(adapter))


def _key(use: AdapterUse) -> tuple[object, ...]:
    """The adapter's file in its current version, and its strengths."""
    file = find_adapter(use.path)
    status = file.stat()
    return file.resolve(), status.st_mtime_ns, status.st_size, MergeStrengths.of(use.strengths)
