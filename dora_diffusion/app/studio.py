"""Images for the Generate tab: one model in memory, under the lock that training takes too."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_diffusion.jobs.loading import ModelFiles, load_model
from dora_diffusion.jobs.processes import holding
from dora_diffusion.jobs.queue import is_running, is_small
from dora_diffusion.jobs.workspace import AppError, Workspace, clean_text, ids_in, new_id

if TYPE_CHECKING:
    from PIL.Image import Image

    from dora_diffusion.generate import SamplingSettings

MAX_BATCH, MAX_STEPS, MAX_SIDE, MAX_GRID = 16, 200, 2048, 48
SEED_LIMIT = 2**32
LEAVING_SECONDS = 60.0
Step = Callable[[int, int], None]


@dataclass(frozen=True)
class Request:
    """What to make. Strengths are the adapter's; ``adapter`` None is the base model alone.

    ``files`` says how the base is loaded: with which VAE, configuration, variant and revision.

    Raises:
        AppError: If a value is out of its limits.
    """

    base: str
    adapter: Path | None
    prompt: str
    negative_prompt: str = ""
    seed: int = -1
    count: int = 1
    steps: int = 25
    guidance_scale: float = 7.5
    scheduler: str | None = None
    width: int | None = None
    height: int | None = None
    strength: float = 1.0
    direction: float = 1.0
    magnitude: float = 1.0
    files: ModelFiles = field(default_factory=ModelFiles)

    def __post_init__(self) -> None:
        if not self.prompt:
            raise AppError("write a prompt: what should the image show?")
        for name, value, low, high in (
            ("images", self.count, 1, MAX_BATCH),
            ("steps", self.steps, 1, MAX_STEPS),
            ("width", self.width or 8, 8, MAX_SIDE),
            ("height", self.height or 8, 8, MAX_SIDE),
            ("strength", self.strength, -2, 3),
            ("direction", self.direction, -2, 3),
            ("magnitude", self.magnitude, -2, 3),
            ("seed", self.seed, -1, SEED_LIMIT - 1),
        ):
            if not low <= value <= high:
                raise AppError(f"{name} is {value}; it must be between {low} and {high}")

    @property
    def settings(self) -> SamplingSettings:
        """How to sample."""
        from dora_diffusion.generate import SamplingSettings

        return SamplingSettings(
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            scheduler=self.scheduler,
            width=self.width,
            height=self.height,
            negative_prompt=self.negative_prompt,
        )


@dataclass(frozen=True)
class Picture:
    """A picture with the file it was written to.

    ``unread`` says which ends of the prompts the model did not see, a line each.
    """

    path: Path
    seed: int
    parameters: str
    unread: tuple[str, ...] = ()


class Studio:
    """Makes pictures and keeps the last model loaded.

    Args:
        workspace: The runs folder.
    """

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self._loaded: tuple[Any, ...] | None = None
        self._components: Any = None
        self._mine = threading.Lock()

    def release(self) -> None:
        """Forget the model, so that a worker has the memory. An image in the making is let be."""
        if self._mine.acquire(blocking=False):
            try:
                self._loaded = self._components = None
                torch = sys.modules.get("torch")
                if torch is not None and torch.cuda.is_available():
                    torch.cuda.empty_cache()
            finally:
                self._mine.release()

    def make(self, request: Request, on_step: Step | None = None) -> list[Picture]:
        """Pictures at consecutive seeds, written with what made them.

        Raises:
            AppError: If a job has the device.
        """
        from dora_diffusion.generate import generate_images

        seeds = _seeds(request)
        with self._device(request):
            components = self._model(request)
            images = generate_images(
                components, request.prompt, seeds, request.settings,
                on_step=on_step, require_finite=True,
            )  # fmt: skip
            unread = _unread(components, request)
        return [
            self._write(request, seed, image, unread)
            for seed, image in zip(seeds, images, strict=True)
        ]

    def compare(self, request: Request, on_step: Step | None = None) -> tuple[Picture, Picture]:
        """The base model's picture and the adapted model's, at one seed."""
        from dora_diffusion.adapters.inject import disabled
        from dora_diffusion.generate import generate_images

        seed = _seeds(request)[:1]
        images = []
        with self._device(request):
            components = self._model(request)
            for base in (True, False):
                with ExitStack() as stack:
                    if base:
                        stack.enter_context(disabled(*components.adaptable().values()))
                    images += generate_images(
                        components, request.prompt, seed, request.settings,
                        on_step=on_step, require_finite=True,
                    )  # fmt: skip
            unread = _unread(components, request)
        plain = _without_adapter(request)
        return (
            self._write(plain, seed[0], images[0], unread),
            self._write(request, seed[0], images[1], unread),
        )

    def grid(
        self, request: Request, adapters: dict[str, Path], strengths: list[float], on_step: Step
    ) -> Picture:
        """One seed over checkpoints (rows) and strengths (columns).

        Raises:
            AppError: If the grid is empty or too large, or a job has the device.
        """
        import dataclasses

        from dora_diffusion.generate import generate_images
        from dora_diffusion.training.sheets import labelled_sheet

        cells = len(adapters) * len(strengths)
        if not 1 <= cells <= MAX_GRID:
            raise AppError(f"the grid has {cells} images; it can have 1 to {MAX_GRID}")
        seed = _seeds(request)[0]
        images = []
        with self._device(request):
            for adapter in adapters.values():
                for strength in strengths:
                    one = dataclasses.replace(request, adapter=adapter, strength=strength)
                    components = self._model(one)
                    images += generate_images(
                        components, one.prompt, [seed], one.settings, require_finite=True
                    )
                    on_step(len(images), cells)
            unread = _unread(components, request)
        columns = [f"{strength:g}" for strength in strengths]
        title = f"Seed {seed}; above each column, the strength"
        sheet = labelled_sheet(images, title, list(adapters), columns)
        return self._write(request, seed, sheet, unread, images[0].size)

    @contextmanager
    def _device(self, request: Request) -> Iterator[None]:
        with self._mine, holding(self.workspace.device_lock, or_wait=self._may_wait()) as held:
            if not held:
                raise AppError(
                    "a run is using the device; generate images when it has ended, or stop it in "
                    "the Train tab"
                )
            with _threads_for(request.base):
                yield

    def _may_wait(self) -> Callable[[], bool]:
        """Whether the device will be free soon: a worker that has ended lets go a little later."""
        deadline, root = time.monotonic() + LEAVING_SECONDS, self.workspace.root

        def answer() -> bool:
            running = any(is_running(root / name) for name in ids_in(root))
            return not running and time.monotonic() < deadline

        return answer

    def _model(self, request: Request) -> Any:
        """The model with the adapter at its strengths; loaded anew only if another is asked for."""
        from dora_diffusion.adapters.inject import layer_adapters, set_strength

        adapter = request.adapter
        key = (request.base, request.files, adapter, adapter and adapter.stat().st_mtime_ns)
        if self._loaded != key:
            # Two large models may not fit beside each other.
            self._loaded = self._components = None
            self._components = load_model(request.base, adapter, request.files)
            self._loaded = key
        for model in self._components.adaptable().values():
            if any(layer_adapters(model)):
                set_strength(
                    model,
                    request.strength,
                    direction=request.direction,
                    magnitude=request.magnitude,
                )
        return self._components

    def _write(
        self,
        request: Request,
        seed: int,
        image: Image,
        unread: tuple[str, ...],
        size: tuple[int, int] | None = None,
    ) -> Picture:
        """Save a picture; ``size`` is that of each in a sheet."""
        from dora_diffusion.images import parameters_text, save_png
        from dora_diffusion.numerics.weights import Strengths

        text = parameters_text(
            request.prompt,
            seed,
            request.settings,
            size or image.size,
            request.base,
            # The folder: every run's file has the same name.
            request.adapter and request.adapter.parent,
            Strengths(request.strength, request.direction, request.magnitude),
        )
        name = f"{new_id()}-{seed}.png"
        return Picture(save_png(image, self.workspace.pictures / name, text), seed, text, unread)


@contextmanager
def _threads_for(base: str) -> Iterator[None]:
    """One thread inside the block for a model that is so small that more would only wait."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1 if is_small(base) else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _unread(components: Any, request: Request) -> tuple[str, ...]:
    """A line for each prompt that is longer than the model reads, with the end that it misses."""
    from dora_diffusion.models.text import truncated_text

    tokenizer = components.tokenizers[0]
    prompts = {"prompt": request.prompt, "negative prompt": request.negative_prompt}
    ends = {name: truncated_text(tokenizer, prompt) for name, prompt in prompts.items()}
    return tuple(
        f"The {name} is longer than the model's {tokenizer.model_max_length} tokens; it did not "
        f"see the end: {end}"
        for name, end in ends.items()
        if end
    )


def _without_adapter(request: Request) -> Request:
    import dataclasses

    return dataclasses.replace(request, adapter=None)


def _seeds(request: Request) -> list[int]:
    first = random.randrange(SEED_LIMIT - MAX_BATCH) if request.seed < 0 else request.seed
    return [first + number for number in range(request.count)]


def clean_prompt(text: object, what: str = "prompt") -> str:
    """A prompt as one line without control characters."""
    return clean_text(text, 1000, what)


def read_settings(file: Path) -> dict[str, str]:
    """The generation settings of a PNG that somebody uploads.

    Raises:
        AppError: If it is no picture of ours or A1111's.
    """
    from PIL.Image import DecompressionBombError

    from dora_diffusion.data.images import sniff_format
    from dora_diffusion.images import parse_parameters, read_parameters
    from dora_diffusion.jobs.uploads import MAX_BYTES

    if file.stat().st_size > MAX_BYTES:
        raise AppError(f"the file is larger than {MAX_BYTES // 2**20} MB")
    # Not as a photo is opened: a grid may be a strip. Only the header is read, and no pixel.
    if sniff_format(file.read_bytes()) != "PNG":
        raise AppError("this file cannot be read as a PNG, whatever its name says")
    try:
        text = read_parameters(file)
    except (OSError, SyntaxError, ValueError, DecompressionBombError) as error:
        raise AppError("this file cannot be read as a PNG; it is damaged or too large") from error
    if not text:
        raise AppError("this image does not say how it was made (it has no parameters text)")
    return parse_parameters(text[:20_000])
