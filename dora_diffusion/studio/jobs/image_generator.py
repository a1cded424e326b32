"""Image generation with one model in memory, under the device lock shared with training."""

from __future__ import annotations

import gc
import hashlib
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL.Image import open as open_image

from dora_diffusion.cli.image_rows import LoadedRequest, image_rows, trigger_messages
from dora_diffusion.cli.requested_images import RequestedImages
from dora_diffusion.cli.settings import AdaptedModel, adapter_and_strengths
from dora_diffusion.config.command import group
from dora_diffusion.config.fields import TOKENS_PER_CHUNK, ConfigError, flag
from dora_diffusion.config.schedulers import SCHEDULERS
from dora_diffusion.models.locate import is_embedded
from dora_diffusion.numerics.devices import release_memory
from dora_diffusion.numerics.threads import one_thread
from dora_diffusion.studio.jobs.queue import PERSON, holding, is_running
from dora_diffusion.studio.jobs.store import UserError, Withdrawn, Workspace, new_id

if TYPE_CHECKING:
    from PIL.Image import Image

    from dora_diffusion.config.images import ImageRequest
    from dora_diffusion.models.components import Components
    from dora_diffusion.sampling.settings import SamplingSettings
    from dora_diffusion.sampling.stack import AdapterUse

MAX_IMAGES, MAX_SIDE, MAX_GRID = 16, 2048, 48
SEED_LIMIT = 2**32
LIMITS: Mapping[str, float] = {
    "num_images": MAX_IMAGES, "steps": 200, "guidance_scale": 30, "width": MAX_SIDE,
    "height": MAX_SIDE, "seed": SEED_LIMIT - 1,
}  # fmt: skip
"""Most of some settings of ``generate``."""
Step = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class _Model(AdaptedModel):
    """Model with an optional autoencoder, see `BaseModel`."""

    vae: str | Path | None = None


@dataclass(frozen=True, kw_only=True)
class GenerationRequest(RequestedImages):
    """Request for images: settings of ``generate`` within the app's limits.

    Attributes:
        batch_position: Size of the batch of a repeated image, and the image's index in it: its
            rounding depends on them.

    Raises:
        UserError, ConfigError: If a value is outside its limits.
    """

    model: _Model = group(_Model)
    output: str = flag("", "Image file; each image of the app has its own.")
    batch_position: tuple[int, int] = (1, 0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.prompt.strip():
            raise UserError("write a prompt: what should the image show?")
        for setting in self.settings():
            if setting.name in LIMITS:
                replace(setting, most=LIMITS[setting.name]).check(getattr(self, setting.name))
        paths = [adapter_and_strengths(word)[0] for word in self.adapter or []]
        if len({*paths}) < len(paths):
            raise UserError("the same adapter is chosen twice; choose it once, more strongly")


@dataclass(frozen=True)
class GeneratedImage:
    """A generated image: its file, seed and parameters, and ``notes`` on possible problems."""

    path: Path
    seed: int
    parameters: str
    notes: tuple[str, ...] = ()


@dataclass(eq=False)
class _Turn:
    """State of a request, which waits for the device or generates images on it."""

    person: str
    is_making: bool = False
    is_withdrawn: bool = False


class ImageGenerator:
    """Generates images and keeps the last model in memory.

    Args:
        workspace: The runs folder.
    """

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self._loaded: tuple[Any, ...] | None = None
        self._components: Any = None
        self._mine = threading.Lock()
        self._turns: list[_Turn] = []

    @property
    def turn(self) -> str:
        """State of the current user's requests: ``"making"``, ``"waiting"`` or empty."""
        mine = [turn.is_making for turn in [*self._turns] if turn.person == PERSON.get()]
        return "making" if any(mine) else "waiting" if mine else ""

    def release(self) -> None:
        """Free the model's memory for a worker, unless an image is being generated."""
        if self._mine.acquire(blocking=False):
            try:
                self._forget()
            finally:
                self._mine.release()

    def _forget(self) -> None:
        self._loaded = self._components = None
        gc.collect()  # Weights on a CPU are memory-mapped; this closes their file.
        release_memory()

    def withdraw(self) -> None:
        """Cancel all requests of the current user, waiting or active."""
        for turn in [*self._turns]:  # A copy: other threads change the list meanwhile.
            turn.is_withdrawn |= turn.person == PERSON.get()

    def _until_withdrawn(self, on_step: Step | None) -> Step:
        """Return a step callback that also stops the generation of withdrawn images."""
        (turn,) = (turn for turn in [*self._turns] if turn.is_making)

        def step(done: int, total: int) -> None:
            if turn.is_withdrawn:
                raise Withdrawn("the images were stopped; unfinished ones are not kept")
            if on_step is not None:
                on_step(done, total)

        return step

    def make(self, request: GenerationRequest, on_step: Step | None = None) -> list[GeneratedImage]:
        """Generate and save images at consecutive seeds, once no job uses the device.

        Raises:
            Withdrawn: If the request was withdrawn meanwhile.
        """
        return self._made(request, on_step)[1]

    def compare(
        self, request: GenerationRequest, on_step: Step | None = None
    ) -> tuple[GeneratedImage, GeneratedImage]:
        """Generate the base model's image and the adapted model's at the same seed."""
        (base,), (adapted,) = self._made(request, on_step, with_base=True)
        return base, adapted

    def _made(
        self, request: GenerationRequest, on_step: Step | None, *, with_base: bool = False
    ) -> tuple[list[GeneratedImage], list[GeneratedImage]]:
        """Generate and save the images of a request; with ``with_base`` one, after the base's."""
        from dora_diffusion.adapters.inject import disabled

        prepared = self._started(replace(request, num_images=1) if with_base else request)
        rows = list(image_rows(prepared).values())
        base_images: list[Image] = []
        with self._device(request):
            loaded = self._load(prepared, request.sampling)
            step = self._until_withdrawn(on_step)
            if with_base:
                with disabled(*loaded.components.adaptable().values()):
                    base_images = loaded.sample(rows, step)
            images = loaded.sample(rows, step)
            notes = _notes(loaded, [row.prompt for row in rows])
        alone = prepared.changed(adapter=None)
        base = self._write(loaded._replace(request=alone), rows, base_images, notes)
        return base, self._write(loaded, rows, images, notes)

    def grid(
        self, request: GenerationRequest, axes: Sequence[str], on_step: Step
    ) -> tuple[GeneratedImage, Path]:
        """Generate an image for each combination of values, as ``generate --grid`` does.

        Images of earlier grids for the same request are reused, even with other axes.

        Args:
            request: Common settings of all images, including the seed.
            axes: Axes as in `cli.axes`.
            on_step: Called with (steps done, total steps).

        Returns:
            The sheet, and a zip of the web page with all images.

        Raises:
            UserError, ConfigError, ValueError: If a cell is invalid, or there are too many cells.
            Withdrawn: If the request was withdrawn; the next call continues from finished images.
        """
        from dora_diffusion.cli.commands.grid import GridRun
        from dora_diffusion.sampling.images import parse_parameters, save_image
        from dora_diffusion.sampling.page import SHEET

        common = replace(request, seed=_first_seed(request), num_images=1)
        name = hashlib.sha256(repr(common).encode()).hexdigest()[:12]
        output = str(self.workspace.root / "grids" / f"grid-{name}")
        prepared = common.changed(output=output, grid=[*axes], grid_limit=MAX_GRID)
        try:
            run = GridRun(prepared, self._model)
        except ConfigError as error:
            if error.setting != "grid_limit":
                raise
            text = f"the grid has too many images; {MAX_GRID} can be made at once"
            raise UserError(text) from None
        with self._device(request):
            run.make(self._until_withdrawn(on_step))
            read = (parse_parameters(text)["Prompt"] for text in run.record.texts.values())
            notes = _notes(self._load(prepared, request.sampling), [*filter(None, read)])
        first = run.record.texts[run.record.files[0]]
        with open_image(run.folder / SHEET) as sheet:
            path = self.workspace.images / f"{new_id()}-{run.record.seed}.png"
            save_image(sheet, path, first)
        archive = run.record.pack(run.folder, self.workspace.exports / f"{run.folder.name}.zip")
        return GeneratedImage(path, run.record.seed, first, notes), archive

    def _started(self, request: GenerationRequest) -> GenerationRequest:
        """Return the request with a seed and a file name."""
        output = str(self.workspace.images / f"{new_id()}.png")
        return replace(request, seed=_first_seed(request), output=output)

    def _load(self, request: GenerationRequest, sampling: SamplingSettings) -> LoadedRequest:
        uses = request.uses()
        components = self._model(request, uses)
        sampling, _ = request.for_few_steps(sampling, components, uses)
        return LoadedRequest(request, components, sampling, request.batch_position)

    @contextmanager
    def _device(self, request: GenerationRequest) -> Iterator[None]:
        turn = _Turn(PERSON.get())
        self._turns.append(turn)
        try:
            with holding(self.workspace.device_lock, or_wait=partial(self._waits_on, turn)) as held:
                if not held:
                    raise Withdrawn("the images were withdrawn; none of them was made")
                # Taken last: while this request waits, a new run may free the model's memory.
                with self._mine, one_thread() if is_embedded(request.model.base) else nullcontext():
                    turn.is_making = True
                    try:
                        yield
                    finally:
                        turn.is_making = False
                        # A job that has started meanwhile waits for the device and the memory.
                        if any(map(is_running, self.workspace.job_folders)):
                            self._forget()
        finally:
            self._turns.remove(turn)

    def _waits_on(self, turn: _Turn) -> bool:
        return not turn.is_withdrawn

    def _model(self, request: RequestedImages, uses: Sequence[AdapterUse]) -> Components:
        """Return the model with the adapters at their strengths; reload it only if they changed."""
        from dora_diffusion.sampling.load import load_model
        from dora_diffusion.sampling.stack import set_strengths

        base = request.model.base_model
        key = (base, [(use.path, Path(use.path).stat().st_mtime_ns) for use in uses])
        if self._loaded != key:
            # Two large models may not fit in memory together.
            self._loaded = self._components = None
            self._components = load_model(base, uses)
            self._loaded = key
        set_strengths(self._components.adaptable(), uses)
        components: Components = self._components.reading(**request.model.reading)
        return components

    def _write(
        self,
        loaded: LoadedRequest,
        rows: Sequence[ImageRequest],
        images: Sequence[Image],
        notes: tuple[str, ...],
    ) -> list[GeneratedImage]:
        """Save the images of rows with their parameters."""
        saved = []
        for index, (row, image) in enumerate(zip(rows, images, strict=False)):
            path = self.workspace.images / f"{new_id()}-{row.seed}.png"
            text = loaded.write(image, path, row, index, len(rows))
            saved.append(GeneratedImage(path, row.known_seed, text, notes))
        return saved


def _notes(loaded: LoadedRequest, prompts: Sequence[str]) -> tuple[str, ...]:
    """Return notes on truncated prompts and on settings unsuitable for a distilled model."""
    from dora_diffusion.models.text import truncated_text
    from dora_diffusion.sampling.conditioning import inactive_messages
    from dora_diffusion.sampling.images import adapter_name
    from dora_diffusion.sampling.load import few_steps

    request, components, sampling, _ = loaded
    limit, notes = components.code.token_limit(components), prompt_messages(request, prompts)
    if request.model.max_token_length not in (None, TOKENS_PER_CHUNK):
        notes += components.family.inactive({"max_token_length"}).values()
    notes += inactive_messages(components, sampling)
    texts = [("prompt", prompt) for prompt in dict.fromkeys(prompts)]
    for name, prompt in [*texts, ("negative prompt", sampling.negative_prompt)]:
        if end := truncated_text(components, prompt):
            notes.append(f"The {name} is longer than {limit}; it did not see the end: {end}")
    distilled = few_steps(components, [adapter_name(use.path) for use in request.uses()])
    if distilled is not None:
        name, few = distilled
        if sampling.steps > 2 * few.steps or sampling.guidance_scale != few.guidance_scale:
            scheduler = f", scheduler {SCHEDULERS[few.scheduler].title}" if few.scheduler else ""
            notes.append(
                f"{name} is for few steps ({few.kind}): set steps {few.steps}, guidance "
                f"{few.guidance_scale:g}{scheduler}"
            )
    return tuple(notes)


def prompt_messages(request: RequestedImages, prompts: Iterable[str]) -> list[str]:
    """Return messages on prompts without the adapters' trigger words, as in ``generate``."""
    from dora_diffusion.formats.adapter.metadata import AdapterMetadata, join_triggers
    from dora_diffusion.formats.adapter.stored import read_metadata

    trigger = join_triggers(read_metadata(use.path).trigger for use in request.uses())
    messages = trigger_messages((prompt, AdapterMetadata(trigger=trigger)) for prompt in prompts)
    return [message[:1].upper() + message[1:] for message in messages]


def _first_seed(request: GenerationRequest) -> int:
    return random.randrange(SEED_LIMIT - MAX_IMAGES) if request.seed is None else request.seed
