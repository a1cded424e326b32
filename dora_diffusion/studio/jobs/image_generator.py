"""Image generation: one model in memory, under the device lock that training takes too."""

from __future__ import annotations

import gc
import hashlib
import random
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL.Image import open as open_image

from dora_diffusion.config.base import BaseModel
from dora_diffusion.config.fields import ConfigError
from dora_diffusion.models.locate import is_embedded
from dora_diffusion.models.schedulers import SCHEDULERS
from dora_diffusion.numerics.devices import release_memory
from dora_diffusion.numerics.threads import one_thread
from dora_diffusion.numerics.weights import Strengths
from dora_diffusion.studio.jobs.inputs import input_path, keep_input
from dora_diffusion.studio.jobs.queue import PERSON, holding, is_running
from dora_diffusion.studio.jobs.store import UserError, Withdrawn, Workspace, new_id

if TYPE_CHECKING:
    from PIL.Image import Image

    from dora_diffusion.cli.requested_images import RequestedImages
    from dora_diffusion.models.components import Components
    from dora_diffusion.sampling.generate import SamplingSettings
    from dora_diffusion.sampling.stack import AdapterUse

MAX_BATCH, MAX_STEPS, MAX_SIDE, MAX_GRID = 16, 200, 2048, 48
# Images that are sampled at once.
_AT_ONCE = 4
SEED_LIMIT = 2**32
Step = Callable[[int, int], None]


@dataclass(frozen=True)
class GenerationRequest:
    """Request for images.

    Attributes:
        base: The base model.
        adapters: The adapters with their strengths; none is the base model alone.
        prompt: What to show.
        settings: How to sample.
        seed: Of the first image; -1 draws one.
        count: Images, at consecutive seeds.
        clip_skip: Instead of what the adapter says.
        max_token_length: Instead of what the adapter says.
        wildcards: Draw the prompt's wildcards by each image's seed.
        batch: For an image that is repeated: images of its batch, which round its products, and its
            place there.

    Raises:
        UserError: If a value is out of its limits.
    """

    base: BaseModel
    adapters: tuple[AdapterUse, ...]
    prompt: str
    settings: SamplingSettings
    seed: int = -1
    count: int = 1
    clip_skip: int | None = None
    max_token_length: int | None = None
    wildcards: bool = False
    batch: tuple[int, int] = (1, 0)

    def __post_init__(self) -> None:
        if not self.prompt:
            raise UserError("write a prompt: what should the image show?")
        for name, value, low, high in (
            ("images", self.count, 1, MAX_BATCH),
            ("steps", self.settings.steps, 1, MAX_STEPS),
            ("steps of the second pass", self.settings.hires_steps or 1, 1, MAX_STEPS),
            ("width", self.settings.width or 8, 8, MAX_SIDE),
            ("height", self.settings.height or 8, 8, MAX_SIDE),
            ("seed", self.seed, -1, SEED_LIMIT - 1),
        ):
            if not low <= value <= high:
                raise UserError(f"{name} is {value}; it must be between {low} and {high}")
        paths = [use.path for use in self.adapters]
        if len({*paths}) < len(paths):
            raise UserError("the same adapter is chosen twice; choose it once, more strongly")


@dataclass(frozen=True)
class GeneratedImage:
    """An image with the file it was written to.

    ``notes`` says what may be wrong with it, a line each.
    """

    path: Path
    seed: int
    parameters: str
    notes: tuple[str, ...] = ()


class _About(NamedTuple):
    """Facts about images that only the loaded model tells.

    Attributes:
        notes: A line for each prompt that is longer than it reads, with the truncated end, and for
            settings that a distilled model is not for.
        size: Width and height of the first pass.
        components: The model.
    """

    notes: tuple[str, ...]
    size: tuple[int, int]
    components: Components


@dataclass(eq=False)
class _Turn:
    """A request's turn at the device: it waits for it, or its images are made."""

    person: str
    is_making: bool = False
    is_withdrawn: bool = False


class ImageGenerator:
    """Makes images and keeps the last model loaded.

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
        """State of this person's requests: ``"making"``, ``"waiting"`` or empty."""
        mine = [turn.is_making for turn in self._turns if turn.person == PERSON.get()]
        return "making" if any(mine) else "waiting" if mine else ""

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
        """Cancel the requests of the person who asks: those that wait, and what is being made."""
        for turn in self._turns:
            turn.is_withdrawn |= turn.person == PERSON.get()

    def _until_withdrawn(self, on_step: Step | None) -> Step:
        """Return what is called at each step, and ends the images when they are withdrawn."""
        (turn,) = (turn for turn in self._turns if turn.is_making)

        def step(done: int, total: int) -> None:
            if turn.is_withdrawn:
                raise Withdrawn("the images were stopped; what was not finished is not kept")
            if on_step is not None:
                on_step(done, total)

        return step

    def make(self, request: GenerationRequest, on_step: Step | None = None) -> list[GeneratedImage]:
        """Images at consecutive seeds, written with what made them; a job's end is waited for.

        Raises:
            Withdrawn: If it was withdrawn meanwhile.
        """
        seeds, (size, place) = _seeds(request), request.batch
        if size > 1:
            seeds = [seeds[0] - place + number for number in range(size)]
        # A batch is repeated with one prompt, so that drawn ones are sampled one by one.
        at_once = 1 if request.wildcards else _AT_ONCE
        asked = self._drawn(request, seeds)
        with self._device(request.base):
            with _untouched() as lines:
                images = self._sample(asked, seeds, on_step, max(size, at_once))
            about = _about(asked, self._model(request), lines)
        made = []
        for number, (seed, image) in enumerate(zip(seeds, images, strict=True)):
            if size == 1 or number == place:
                start = 0 if size > 1 else number - number % at_once
                batch = size if size > 1 else min(at_once, len(seeds) - start)
                one = asked[number]
                made.append(self._write(one, seed, image, about, batch, number - start))
        return made

    def _drawn(self, request: GenerationRequest, seeds: list[int]) -> list[GenerationRequest]:
        """The request of each image, with the prompt that its seed draws.

        Raises:
            ConfigError, UserError: If wildcards cannot be drawn, or nothing is.
        """
        from dora_diffusion.data.captions import CaptionRules, Wildcards

        folder = self.workspace.wildcards
        rules = CaptionRules(wildcards=Wildcards(folder) if request.wildcards else None)
        return [replace(request, prompt=rules.draw_prompt(request.prompt, s)) for s in seeds]

    def compare(
        self, request: GenerationRequest, on_step: Step | None = None
    ) -> tuple[GeneratedImage, GeneratedImage]:
        """The base model's image and the adapted model's, at one seed."""
        from dora_diffusion.adapters.inject import disabled

        seed = _seeds(request)[0]
        (request,) = asked = self._drawn(request, [seed])
        with self._device(request.base):
            with _untouched() as lines:
                with disabled(*self._model(request).adaptable().values()):
                    (base,) = self._sample(asked, [seed], on_step)
                (adapted,) = self._sample(asked, [seed], on_step)
            about = _about(asked, self._model(request), lines)
        return (
            self._write(replace(request, adapters=()), seed, base, about),
            self._write(request, seed, adapted, about),
        )

    def grid(
        self,
        request: GenerationRequest,
        axes: Sequence[str],
        on_step: Step,
        style: Sequence[str] = (),
    ) -> tuple[GeneratedImage, Path]:
        """An image for each combination of values, as ``generate --grid`` makes them.

        What was made before for the same request, of these axes or others, is taken again.

        Args:
            request: What all have in common; its seed is one for all.
            axes: As `cli.axes` reads them.
            on_step: Called with (steps done, steps in all).
            style: Styles that each cell's prompts are given.

        Returns:
            The sheet, and a zip of the web page with all images.

        Raises:
            UserError, ConfigError, ValueError: If a cell cannot be, or there are too many.
            Withdrawn: If it was withdrawn meanwhile; images that are done are continued from.
        """
        from dora_diffusion.cli.commands.grid import GridRun
        from dora_diffusion.sampling.images import parse_parameters, save_image
        from dora_diffusion.sampling.page import SHEET

        def load(settings: RequestedImages, uses: Sequence[AdapterUse]) -> Components:
            reading: dict[str, Any] = settings.reading
            components: Components = self._model(replace(request, adapters=tuple(uses), **reading))
            return components

        request = replace(request, seed=_seeds(request)[0])
        try:
            run = GridRun(self._grid_settings(request, axes, style), load)
        except ConfigError as error:
            if error.setting != "grid_limit":
                raise
            text = f"the grid has too many images; {MAX_GRID} can be made at once"
            raise UserError(text) from None
        for sampling in run.samplings.values():
            replace(request, settings=sampling)  # Within the limits of any image.
        with self._device(request.base):
            with _untouched() as lines:
                run.make(self._until_withdrawn(on_step))
            read = (parse_parameters(text)["Prompt"] for text in run.record.texts.values())
            asked = [replace(request, prompt=text) for text in read if text]
            notes = _about(asked or [request], self._model(request), lines).notes
        first = run.record.texts[run.record.files[0]]
        with open_image(run.folder / SHEET) as sheet:
            path = self.workspace.images / f"{new_id()}-{request.seed}.png"
            save_image(sheet, path, first)
        archive = run.record.pack(run.folder, self.workspace.exports / f"{run.folder.name}.zip")
        return GeneratedImage(path, request.seed, first, notes), archive

    def _grid_settings(
        self, request: GenerationRequest, axes: Sequence[str], style: Sequence[str]
    ) -> RequestedImages:
        """A request as the settings of `generate`, in a folder of its own."""
        from dora_diffusion.cli.requested_images import RequestedImages
        from dora_diffusion.sampling.stack import strength_texts

        sampling, uses = vars(request.settings), request.adapters
        known = {setting.name: setting for setting in RequestedImages.settings()}
        values = {n: v for n, v in sampling.items() if n in known and v is not None}
        if detail := values.pop("detail", None):
            own = {n: getattr(detail, n) or None for n in ("label", "prompt", "denoise", "padding")}
            values |= {"detail": detail.model, **{f"detail_{n}": v for n, v in own.items()}}
        for name in ("image", "mask_image"):
            if image := values.get(name):
                values[name] = str(input_path(self.workspace, keep_input(self.workspace, image)))
        if len(uses) == 1:
            values |= vars(Strengths.of(uses[0].strengths))
            values["adapter"] = [str(uses[0].path)]
        elif uses:
            values["adapter"] = [f"{use.path}:{use.strengths.strength}" for use in uses]
            values |= {**vars(Strengths.of(uses[0].strengths)), "strength": 1.0}
        values |= strength_texts(uses)
        base = {n: v for n, v in vars(request.base).items() if n in known and v is not None}
        common = {
            **base, **values, "base": str(request.base.path), "prompt": request.prompt,
            "seed": request.seed, "clip_skip": request.clip_skip,
            "max_token_length": request.max_token_length,
            "styles": str(self.workspace.styles), "style": [*style],
            "wildcards": request.wildcards, "wildcard_dir": str(self.workspace.wildcards),
        }  # fmt: skip
        name = hashlib.sha256(repr((request.base, common)).encode()).hexdigest()[:12]
        output = str(self.workspace.root / "grids" / f"grid-{name}")
        return RequestedImages(**common, output=output, grid=list(axes), grid_limit=MAX_GRID)

    def _sample(
        self,
        asked: Sequence[GenerationRequest],
        seeds: list[int],
        on_step: Step | None = None,
        batch_size: int = 1,
    ) -> list[Image]:
        """An image for each seed: the requests differ in their prompts alone."""
        from dora_diffusion.sampling.generate import generate_images, sampled_size

        components, settings = self._model(asked[0]), asked[0].settings
        prompts = [one.prompt for one in asked]
        longest = max(sampled_size(components, settings)) * (settings.hires or 1)
        if longest > MAX_SIDE:
            raise UserError(
                f"the second pass would be {longest:.0f} pixels long; at most {MAX_SIDE} are made"
            )
        return generate_images(
            components, prompts if asked[0].wildcards else prompts[0], seeds, settings,
            batch_size=batch_size, on_step=self._until_withdrawn(on_step), require_finite=True,
        )  # fmt: skip

    @contextmanager
    def _device(self, base: BaseModel) -> Iterator[None]:
        turn = _Turn(PERSON.get())
        self._turns.append(turn)
        try:
            with holding(self.workspace.device_lock, or_wait=partial(self._waits_on, turn)) as held:
                if not held:
                    raise Withdrawn("the images were withdrawn; none of them was made")
                # Not before: while it waits, a run that starts has its model's memory.
                with self._mine, one_thread() if is_embedded(str(base.path)) else nullcontext():
                    turn.is_making = True
                    try:
                        yield
                    finally:
                        turn.is_making = False
                        # A job that was started meanwhile waits for the device, and the memory.
                        if any(map(is_running, self.workspace.job_folders)):
                            self._forget()
        finally:
            self._turns.remove(turn)

    def _waits_on(self, turn: _Turn) -> bool:
        return not turn.is_withdrawn

    def _model(self, request: GenerationRequest) -> Any:
        """The model with the adapters at their strengths; reloaded only if others are asked for."""
        from dora_diffusion.sampling.generate import load_model
        from dora_diffusion.sampling.stack import set_strengths

        uses = request.adapters
        key = (request.base, [(use.path, Path(use.path).stat().st_mtime_ns) for use in uses])
        if self._loaded != key:
            # Two large models may not fit beside each other.
            self._loaded = self._components = None
            self._components = load_model(request.base, uses)
            self._loaded = key
        set_strengths(self._components.adaptable(), uses)
        return self._components.reading(request.clip_skip, request.max_token_length)

    def _write(
        self,
        request: GenerationRequest,
        seed: int,
        image: Image,
        about: _About,
        batch_size: int = 1,
        position: int = 0,
    ) -> GeneratedImage:
        """Save an image with what made it; it has a place in a batch."""
        from dora_diffusion.sampling.images import (
            UsedAdapter,
            model_fields,
            parameters_text,
            save_image,
        )

        uses, base = request.adapters, str(request.base.path)
        text = parameters_text(
            request.prompt, seed, request.settings, about.size, base,
            [UsedAdapter.of(use.path, use.strengths) for use in uses],
            extra=model_fields(about.components, uses, batch_size, position),
        )  # fmt: skip
        path = save_image(image, self.workspace.images / f"{new_id()}-{seed}.png", text)
        return GeneratedImage(path, seed, text, about.notes)


@contextmanager
def _untouched() -> Iterator[list[str]]:
    """Gather, behind the block, what sampling warns of images without a detail pass."""
    from dora_diffusion.sampling.detail import NO_PASS

    lines = list[str]()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        yield lines
    found = (str(warning.message) for warning in told)
    lines += dict.fromkeys(f"{s[:1].upper()}{s[1:]}" for s in found if s.endswith(NO_PASS))


def _about(
    asked: Sequence[GenerationRequest], components: Components, lines: Sequence[str]
) -> _About:
    from dora_diffusion.models.emphasis import plain_parts
    from dora_diffusion.models.text import token_limit, truncated_text
    from dora_diffusion.sampling.generate import few_steps, sampled_size
    from dora_diffusion.sampling.images import UsedAdapter

    limit, request, settings = token_limit(components), asked[0], asked[0].settings
    prompts = [*dict.fromkeys(("prompt", one.prompt) for one in asked)]
    notes = []
    for name, prompt in [*prompts, ("negative prompt", settings.negative_prompt)]:
        for part in plain_parts(prompt) if settings.prompt_weights else [prompt]:
            end = truncated_text(components.tokenizers[0], part, components.most_chunks)
            if end:
                notes.append(f"The {name} is longer than {limit}; it did not see the end: {end}")
    found = few_steps(components, [UsedAdapter.of(use.path).name for use in request.adapters])
    if found is not None:
        name, few = found
        if settings.steps > 2 * few.steps or settings.guidance_scale != few.guidance_scale:
            scheduler = f", scheduler {SCHEDULERS[few.scheduler].title}" if few.scheduler else ""
            notes.append(
                f"{name} is for few steps ({few.kind}): set steps {few.steps}, guidance "
                f"{few.guidance_scale:g}{scheduler}"
            )
    return _About((*notes, *lines), sampled_size(components, settings), components)


def _seeds(request: GenerationRequest) -> list[int]:
    first = random.randrange(SEED_LIMIT - MAX_BATCH) if request.seed < 0 else request.seed
    return [first + number for number in range(request.count)]
