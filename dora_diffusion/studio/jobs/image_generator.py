"""Image generation: one model in memory, under the device lock that training takes too."""

from __future__ import annotations

import functools
import gc
import os
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import UnidentifiedImageError

from dora_diffusion.config.base import BaseModel
from dora_diffusion.models.locate import is_embedded
from dora_diffusion.numerics.devices import release_memory
from dora_diffusion.numerics.threads import one_thread
from dora_diffusion.numerics.weights import Strengths
from dora_diffusion.studio.jobs.queue import holding, is_running
from dora_diffusion.studio.jobs.store import UserError, Workspace, new_id

if TYPE_CHECKING:
    from PIL.Image import Image

    from dora_diffusion.models.components import Components
    from dora_diffusion.sampling.generate import SamplingSettings

MAX_BATCH, MAX_STEPS, MAX_SIDE, MAX_GRID = 16, 200, 2048, 48
SEED_LIMIT = 2**32
MOST_RECENT = 24
Step = Callable[[int, int], None]
_About = tuple[tuple[str, ...], dict[str, int]]


@dataclass(frozen=True)
class GenerationRequest:
    """Request for images.

    Attributes:
        base: The base model.
        adapter: The adapter file; None is the base model alone.
        prompt: What to show.
        settings: How to sample.
        seed: Of the first image; -1 draws one.
        count: Images, at consecutive seeds.
        strengths: Of the adapter.
        clip_skip: Instead of what the adapter says.
        max_token_length: Instead of what the adapter says.

    Raises:
        UserError: If a value is out of its limits.
    """

    base: BaseModel
    adapter: Path | None
    prompt: str
    settings: SamplingSettings
    seed: int = -1
    count: int = 1
    strengths: Strengths = field(default_factory=Strengths)
    clip_skip: int | None = None
    max_token_length: int | None = None

    def __post_init__(self) -> None:
        if not self.prompt:
            raise UserError("write a prompt: what should the image show?")
        for name, value, low, high in (
            ("images", self.count, 1, MAX_BATCH),
            ("steps", self.settings.steps, 1, MAX_STEPS),
            ("width", self.settings.width or 8, 8, MAX_SIDE),
            ("height", self.settings.height or 8, 8, MAX_SIDE),
            ("seed", self.seed, -1, SEED_LIMIT - 1),
        ):
            if not low <= value <= high:
                raise UserError(f"{name} is {value}; it must be between {low} and {high}")


@dataclass(frozen=True)
class GeneratedImage:
    """An image with the file it was written to.

    ``unread`` says which ends of the prompts the model did not see, a line each.
    """

    path: Path
    seed: int
    parameters: str
    unread: tuple[str, ...] = ()


class ImageGenerator:
    """Makes images and keeps the last model loaded.

    Args:
        workspace: The runs folder.

    Attributes:
        is_waiting: Whether a request waits for the device.
    """

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self._loaded: tuple[Any, ...] | None = None
        self._components: Any = None
        self._mine = threading.Lock()
        self._withdrawn = threading.Event()
        self.is_waiting = False

    def release(self) -> None:
        """Forget the model, so that a worker has the memory. An image in the making is let be."""
        if self._mine.acquire(blocking=False):
            try:
                self._forget()
            finally:
                self._mine.release()

    def _forget(self) -> None:
        self._loaded = self._components = None
        gc.collect()  # Weights on a CPU are a map of their file, which then is let go.
        release_memory()

    def withdraw(self) -> None:
        """Cancel a request that waits for the device."""
        self._withdrawn.set()

    def make(self, request: GenerationRequest, on_step: Step | None = None) -> list[GeneratedImage]:
        """Images at consecutive seeds, written with what made them; a job's end is waited for.

        Raises:
            UserError: If it was withdrawn meanwhile.
        """
        seeds = _seeds(request)
        with self._device(request.base):
            images = self._sample(request, seeds, on_step)
            about = _about(request, self._model(request))
        made = zip(seeds, images, strict=True)
        return [self._write(request, seed, image, about) for seed, image in made]

    def compare(
        self, request: GenerationRequest, on_step: Step | None = None
    ) -> tuple[GeneratedImage, GeneratedImage]:
        """The base model's image and the adapted model's, at one seed."""
        from dora_diffusion.adapters.inject import disabled

        seed = _seeds(request)[0]
        with self._device(request.base):
            with disabled(*self._model(request).adaptable().values()):
                (base,) = self._sample(request, [seed], on_step)
            (adapted,) = self._sample(request, [seed], on_step)
            about = _about(request, self._model(request))
        return (
            self._write(replace(request, adapter=None), seed, base, about),
            self._write(request, seed, adapted, about),
        )

    def grid(
        self,
        request: GenerationRequest,
        adapters: dict[str, Path],
        strengths: list[float],
        on_step: Step,
    ) -> GeneratedImage:
        """One seed over checkpoints (rows) and strengths (columns), in batches of several adapters.

        Raises:
            UserError: If the grid is empty or too large, or it was withdrawn meanwhile.
        """
        from dora_diffusion.data.sheets import labelled_sheet
        from dora_diffusion.sampling.pool import AdapterPool, ImageRow

        cells = len(adapters) * len(strengths)
        if not 1 <= cells <= MAX_GRID:
            raise UserError(f"the grid has {cells} images; it can have 1 to {MAX_GRID}")
        seed = _seeds(request)[0]
        rows = [
            ImageRow(request.prompt, seed, (adapter, replace(request.strengths, strength=strength)))
            for adapter in adapters.values()
            for strength in strengths
        ]
        reading = {"clip_skip": request.clip_skip, "max_token_length": request.max_token_length}
        with self._device(request.base):
            base = self._model(replace(request, adapter=None))
            pool = AdapterPool(base, budget=None, **reading)
            try:
                images = pool.generate(rows, request.settings, on_step=on_step, require_finite=True)
                own = pool.own_words(rows[0].adapter)
                about = _about(request, pool.components_for(request.adapter), own)
            finally:
                pool.clear()
        columns = [f"{strength:g}" for strength in strengths]
        title = f"Seed {seed}; above each column, the strength"
        sheet = labelled_sheet(images, title, list(adapters), columns)
        return self._write(request, seed, sheet, about, images[0].size)

    def _sample(
        self, request: GenerationRequest, seeds: list[int], on_step: Step | None = None
    ) -> list[Image]:
        from dora_diffusion.sampling.generate import generate_images

        return generate_images(
            self._model(request), request.prompt, seeds, request.settings,
            on_step=on_step, require_finite=True,
        )  # fmt: skip

    @contextmanager
    def _device(self, base: BaseModel) -> Iterator[None]:
        self._withdrawn.clear()
        try:
            with holding(self.workspace.device_lock, or_wait=self._waits_on) as held:
                self.is_waiting = False
                if not held:
                    raise UserError("the images were cancelled while they waited")
                # Not before: while it waits, a run that starts has its model's memory.
                with self._mine, one_thread() if is_embedded(str(base.path)) else nullcontext():
                    try:
                        yield
                    finally:
                        # A job that was started meanwhile waits for the device, and the memory.
                        if any(map(is_running, self.workspace.job_folders)):
                            self._forget()
        finally:
            self.is_waiting = False

    def _waits_on(self) -> bool:
        self.is_waiting = not self._withdrawn.is_set()
        return self.is_waiting

    def _model(self, request: GenerationRequest) -> Any:
        """The model with the adapter at its strengths; reloaded only if another is asked for."""
        from dora_diffusion.adapters.inject import layer_adapters, set_strength
        from dora_diffusion.sampling.generate import load_model

        adapter, strengths = request.adapter, request.strengths
        key = (request.base, adapter, adapter and adapter.stat().st_mtime_ns)
        if self._loaded != key:
            # Two large models may not fit beside each other.
            self._loaded = self._components = None
            self._components = load_model(request.base, adapter)
            self._loaded = key
        for model in self._components.adaptable().values():
            if any(layer_adapters(model)):
                set_strength(model, strengths)
        return self._components.reading(request.clip_skip, request.max_token_length)

    def _write(
        self, request: GenerationRequest, seed: int, image: Image, about: _About, size: Any = None
    ) -> GeneratedImage:
        """Save an image; ``size`` is that of each in a sheet."""
        from dora_diffusion.sampling.images import UsedAdapter, parameters_text, save_image

        unread, more = about
        adapters = request.adapter and [UsedAdapter.of(request.adapter, request.strengths)]
        text = parameters_text(
            request.prompt, seed, request.settings, size or image.size, str(request.base.path),
            adapters or (), extra=more,
        )  # fmt: skip
        path = save_image(image, self.workspace.images / f"{new_id()}-{seed}.png", text)
        return GeneratedImage(path, seed, text, unread)


def _about(
    request: GenerationRequest, components: Components, own: Mapping[str, str] | None = None
) -> _About:
    """Return the facts about images that only the loaded model tells.

    Returns:
        A line for each prompt that is longer than it reads, with the truncated end; and further
        fields of what made them.
    """
    from dora_diffusion.models.text import token_limit, truncated_text

    limit = token_limit(components)
    prompts = {"prompt": request.prompt, "negative prompt": request.settings.negative_prompt}
    unread = []
    for name, prompt in prompts.items():
        end = truncated_text(components.tokenizers[0], prompt, components.most_chunks, own)
        if end:
            unread.append(f"The {name} is longer than {limit}; it did not see the end: {end}")
    return tuple(unread), components.clip_skip_parameter


def _seeds(request: GenerationRequest) -> list[int]:
    first = random.randrange(SEED_LIMIT - MAX_BATCH) if request.seed < 0 else request.seed
    return [first + number for number in range(request.count)]


def recent_images(workspace: Workspace) -> list[GeneratedImage]:
    """The newest images of a runs folder with what made them, newest first."""
    files = sorted(
        (entry.stat().st_mtime_ns, entry.path)
        for entry in os.scandir(workspace.images)
        if entry.name.endswith(".png") and entry.is_file(follow_symlinks=False)
    )
    return [read_image(Path(path), modified) for modified, path in files[: -MOST_RECENT - 1 : -1]]


@functools.lru_cache(maxsize=256)
def read_image(path: Path, modified: int) -> GeneratedImage:
    """An image as its file tells of it, read once for each time that it was written."""
    from dora_diffusion.sampling.images import parse_parameters, read_parameters

    try:
        text = read_parameters(path) or ""
    except (SyntaxError, ValueError, UnidentifiedImageError):
        text = ""
    seed = parse_parameters(text).get("Seed", "")
    return GeneratedImage(path, int(seed) if seed.isdecimal() else 0, text)
