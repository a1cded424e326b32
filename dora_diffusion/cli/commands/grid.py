"""``dora-diffusion generate --grid``: makes the missing cells of a grid, a page and a sheet.

The folder of a grid::

    index.html       the page
    sheet.png        the same as one image
    grid.json        axes, cells and the parameters of each
    images/ID.png    a cell, named by a digest of its settings and files
"""

from __future__ import annotations

import hashlib
import json
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dora_diffusion.cli.axes import NO_AXES, plan_grid
from dora_diffusion.cli.console.output import progress, say
from dora_diffusion.cli.image_rows import SUFFIXES, LoadedRequest, image_rows, warn_of_triggers
from dora_diffusion.cli.repeat import Repeated
from dora_diffusion.cli.requested_images import RequestedImages
from dora_diffusion.cli.settings import Model
from dora_diffusion.config.fields import require
from dora_diffusion.config.images import ImageRequest
from dora_diffusion.config.wording import counted
from dora_diffusion.data.images import DECODE_ERRORS, PhotoError, open_photo
from dora_diffusion.formats.adapter.metadata import AdapterMetadata, join_triggers
from dora_diffusion.formats.adapter.stored import read_metadata
from dora_diffusion.formats.files.atomic import leftovers, require_writable
from dora_diffusion.numerics.devices import release_memory
from dora_diffusion.sampling.generate import generate_images
from dora_diffusion.sampling.images import (
    parameters_text,
    parse_parameters,
    read_fields,
    read_parameters,
    recorded,
)
from dora_diffusion.sampling.page import PAGE, RECORD, GridRecord
from dora_diffusion.sampling.pool import AdapterPool, reading_of
from dora_diffusion.sampling.settings import SamplingSettings
from dora_diffusion.sampling.stack import AdapterUse, set_strengths
from dora_diffusion.training.results.folders import LOCK_NAME, locked

if TYPE_CHECKING:
    from PIL.Image import Image

    from dora_diffusion.models.components import Components

Show = Callable[[int, int], None]
Load = Callable[[RequestedImages, Sequence[AdapterUse]], "Components"]
_MODEL = (*(setting.name for setting in Model.settings()), "alpha")
# Settings that may differ between the rows of a batch.
_OWN = {"prompt", "seed", "adapter", "strength", "direction_strength", "magnitude_strength"}
_ALIKE = {setting.name for setting in RequestedImages.settings()} - _OWN - {*NO_AXES}
# Settings that the model determines if they are not given, and their fields in an image's text.
_CHOSEN = {"steps": "Steps", "guidance_scale": "CFG scale", "scheduler": "Sampler"}


@dataclass(frozen=True)
class _Cell:
    """Cell of a grid.

    Attributes:
        settings: Settings of the cell; ones without effect have their default. The output is its
            file.
        row: Prompt, seed, and the adapter if there is exactly one.
        uses: Adapters of the cell.
    """

    settings: RequestedImages
    row: ImageRequest
    uses: tuple[AdapterUse, ...]

    @classmethod
    def of(cls, settings: RequestedImages, folder: Path, clip_skip: str) -> _Cell:
        """Create a cell from its settings.

        Raises:
            ConfigError, ValueError, OSError: If the settings are not valid.
        """
        defaults = {setting.name: setting.default for setting in settings.settings()}
        idle = {name: defaults[name] for name in settings.without_effect()}
        output = folder / "images" / "cell.png"
        settings = settings.changed(**idle, output=str(output), overwrite=True)
        (row,) = image_rows(settings).values()
        uses = tuple(settings.uses())
        path = output.with_stem(_digest(settings, row, uses, clip_skip))
        row = replace(row, adapter=uses[0] if len(uses) == 1 else None)
        return cls(replace(settings, output=str(path)), row, uses)

    @property
    def path(self) -> Path:
        return Path(self.settings.output)

    @property
    def is_pooled(self) -> bool:
        """True if the cell may share a batch with cells of other adapters."""
        model = self.settings.model
        return len(self.uses) < 2 and not (model.compile or model.alpha is not None)

    @property
    def model_key(self) -> tuple[object, ...]:
        """Key that is equal for cells of one loaded model, whatever their strengths."""
        paths = None if self.is_pooled else [str(use.path) for use in self.uses]
        values = self.settings.values()
        return (*(repr(values[name]) for name in _MODEL), repr(paths))

    @property
    def batch_key(self) -> tuple[object, ...]:
        """Key that is equal for cells that may share a batch."""
        uses = () if self.is_pooled else self.uses
        values = self.settings.values()
        return (*(repr(values[name]) for name in sorted(_ALIKE)), repr(uses))

    @property
    def order(self) -> tuple[object, ...]:
        """Sort key by which models change least often, then samplings, then adapters."""
        return self.model_key, self.batch_key, repr(self.uses), self.row.prompt, self.row.known_seed


class _Ready(NamedTuple):
    """A cell with its model."""

    cell: _Cell
    loaded: LoadedRequest

    def key(self) -> tuple[object, ...]:
        """Return a key that is equal for cells of one batch."""
        sampling = self.loaded.sampling
        sampling_key = repr((sampling.steps, sampling.guidance_scale, sampling.scheduler))
        return (*self.cell.batch_key, sampling_key, repr(reading_of(self.loaded.components)))


class GridRun:
    """Generation of a grid's cells.

    Args:
        args: Settings with the axes, and the folder as ``output``.
        load: Loads the model of settings with adapters; None: as in `generate`.

    Attributes:
        record: Data of the page.
        missing: Cells without an image.
        samplings: Sampling settings of cells, by their `_Cell.batch_key`.

    Raises:
        ConfigError, ValueError, OSError: If a cell is not valid. Nothing is loaded or written then.
    """

    def __init__(self, args: RequestedImages, load: Load | None = None) -> None:
        self.folder = Path(args.output)
        _require_folder(args, self.folder)
        if args.seed is None:
            known = GridRecord.seed_of(self.folder)
            args = replace(args, seed=secrets.randbelow(2**32) if known is None else known)
        grid = plan_grid(args)
        first = next(iter(grid.cells.values()))
        self.repeated = Repeated.of(first, first.sampling)
        self._load: Load = load or (lambda *request: self.repeated.load(*request)[0])
        clip_skip = self.repeated.fields.get("Clip skip", "")
        cells = [_Cell.of(cell, self.folder, clip_skip) for cell in grid.cells.values()]
        self.record = GridRecord(
            {axis.name: axis.labels for axis in grid.axes},
            [f"images/{cell.path.name}" for cell in cells],
            int(args.seed or 0),
        )
        unique = {cell.path: cell for cell in cells}
        settings_by_key = {cell.batch_key: cell.settings for cell in cells}
        self.samplings = {key: settings.sampling for key, settings in settings_by_key.items()}
        warn_of_triggers(_triggers(unique.values()))
        finished = {
            path for path, cell in unique.items() if not args.overwrite and self._is_made(cell)
        }
        for path in finished:
            self.record.texts[f"images/{path.name}"] = read_parameters(path) or ""
        missing = [cell for path, cell in unique.items() if path not in finished]
        self.missing = sorted(missing, key=lambda cell: cell.order)
        self._batch_size, self._steps = args.batch_size, 0
        self._holding, self._is_held = ExitStack(), False

    def _is_made(self, cell: _Cell) -> bool:
        """Return whether the cell's image is intact and records the expected parameters."""
        sampling, used = self.samplings[cell.batch_key], recorded(cell.uses)
        try:
            fields = read_fields(cell.path)
            open_photo(cell.path, limited=False)
            width, height = map(int, fields.get("Size", "").split("x"))
        except (*DECODE_ERRORS, PhotoError, ValueError):
            return False
        size = (sampling.width or width, sampling.height or height)
        text = parameters_text(cell.row, sampling, size, cell.settings.model.base, used)
        expected = parse_parameters(text)
        values = cell.settings.values()
        for name, field in _CHOSEN.items():
            if values[name] is None:
                expected.pop(field, None)
        return expected.items() <= fields.items()

    def make(self, show: Show) -> None:
        """Generate the missing cells, and write page and sheet. Images are kept if it is stopped.

        Args:
            show: Called with (steps done, total steps).

        Raises:
            ConfigError: If another process generates images in this folder.
        """
        with self._holding:
            # A new folder is created with its first image, once model and adapters have worked.
            if self.folder.is_dir():
                self._hold()
            if self.record.texts:
                self.record.write(self.folder)
            for _, cells in groupby(self.missing, key=lambda cell: cell.model_key):
                self._make_alike(list(cells), show)
                release_memory()
            self.record.write_sheet(self.folder)

    def _hold(self) -> None:
        """Lock the folder, and remove unfinished files of killed processes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._holding.enter_context(locked(self.folder, f"output {self.folder}"))
        self._is_held = True
        for folder in (self.folder, self.folder / "images"):
            for path in leftovers(folder):
                path.unlink(missing_ok=True)

    def _make_alike(self, cells: Sequence[_Cell], show: Show) -> None:
        """Generate cells of one model, and write each when its batch is done."""
        first, total = cells[0], sum(self.samplings[c.batch_key].steps for c in self.missing)
        uses = () if first.is_pooled else first.uses
        components = self._load(first.settings, uses)
        pool = AdapterPool(components, budget=None, **first.settings.model.reading)
        try:
            for batch in self._batches(cells, pool):
                steps = sum(self.samplings[ready.cell.batch_key].steps for ready in batch)
                done = self._steps

                def on_step(now: int, of: int, steps: int = steps, done: int = done) -> None:
                    show(done + steps * now // of, total)

                cells_of_batch = [ready.cell for ready in batch]
                images = self._sample(cells_of_batch, batch[0].loaded.sampling, pool, on_step)
                for ready, image in zip(batch, images, strict=True):
                    self._write(ready, image)
                # Write the page after each batch, in case the process is killed.
                self.record.write(self.folder)
                self._steps += steps
        finally:
            pool.clear()

    def _batches(self, cells: Sequence[_Cell], pool: AdapterPool) -> Iterator[list[_Ready]]:
        """Yield batches of cells with equal sampling, reading of prompts and noise schedule."""
        ready, lines = [], dict[str, None]()
        for cell in cells:
            adapter = cell.row.adapter if cell.is_pooled else None
            components = pool.components_for(adapter)
            sampling = self.samplings[cell.batch_key]
            sampling, line = cell.settings.for_few_steps(sampling, components, cell.uses)
            ready.append(_Ready(cell, LoadedRequest(cell.settings, components, sampling)))
            lines[line] = None
        for line in filter(None, lines):
            say(line, sys.stderr)
        for _, alike in groupby(sorted(ready, key=_Ready.key), key=_Ready.key):
            group, size = list(alike), self._batch_size
            yield from (group[at : at + size] for at in range(0, len(group), size))

    def _sample(
        self, batch: Sequence[_Cell], sampling: SamplingSettings, pool: AdapterPool, on_step: Show
    ) -> list[Image]:
        rows = [cell.row for cell in batch]
        options: dict[str, Any] = {"batch_size": len(rows), "require_finite": True}
        if batch[0].is_pooled:
            return pool.generate(rows, sampling, on_step=on_step, **options)
        set_strengths(pool.components.adaptable(), batch[0].uses)
        prompts, seeds = [row.prompt for row in rows], [row.known_seed for row in rows]
        return generate_images(
            replace(pool.components, norms=None),
            prompts if len(prompts) > 1 else prompts[0],
            seeds,
            sampling,
            on_step=on_step,
            **options,
        )

    def _write(self, ready: _Ready, image: Image) -> None:
        if not self._is_held:
            self._hold()
        if not self.record.texts:
            self.record.write(self.folder)
        cell = ready.cell
        text = ready.loaded.write(image, cell.path, cell.row)
        self.record.texts[f"images/{cell.path.name}"] = text


def make_grid(args: RequestedImages) -> int:
    """Generate the missing cells of a grid. Returns the exit code."""
    run = GridRun(args)
    with progress("generating images", "step") as show:
        run.make(show)
    files, new = len(set(run.record.files)), len(run.missing)
    more = "" if new == files else f", {new} of them new"
    print(f"{run.folder / PAGE} ({counted(files, 'image')}{more}; seed {run.record.seed})")
    return 0


def _require_folder(args: RequestedImages, folder: Path) -> None:
    """Check the settings of a grid, and that its folder contains no other files.

    Raises:
        ConfigError, OSError: If a setting or the folder is not valid.
    """
    require(
        args.adapters_file is None,
        "grid and adapters_file are both given; leave one out",
        "adapters_file",
    )
    require(
        args.num_images == 1,
        f"num_images is {args.num_images}; for a grid give seeds: --grid seed=1,2",
        "num_images",
    )
    require(
        folder.suffix.lower() not in SUFFIXES or folder.is_dir(),
        f"output {folder} must be a folder with grid, for its page, sheet and images",
        "output",
    )
    ignored = {*leftovers(folder), folder / LOCK_NAME}
    there = {*folder.iterdir()} - ignored if folder.is_dir() else set()
    require(
        not there or (folder / RECORD).is_file(),
        f"{folder} contains other files; choose another --output",
        "output",
    )
    require_writable(folder, is_folder=True)


def _triggers(cells: Iterable[_Cell]) -> Iterator[tuple[str, AdapterMetadata]]:
    """Yield each prompt with the trigger words of its adapters."""
    known: dict[str, str] = {}
    for cell in cells:
        for path in {str(use.path) for use in cell.uses} - known.keys():
            known[path] = read_metadata(path).trigger
        trigger = join_triggers(known[str(use.path)] for use in cell.uses)
        yield cell.row.prompt, AdapterMetadata(trigger=trigger)


def _digest(
    settings: RequestedImages, row: ImageRequest, uses: Sequence[AdapterUse], clip_skip: str
) -> str:
    """Return a digest of the settings of an image and the files that they name."""
    defaults = {setting.name: setting.default for setting in settings.settings()}
    values = settings.values()
    names = [name for name in defaults if name not in NO_AXES]
    facts = {name: values[name] for name in names if values[name] != defaults[name]}
    facts |= {"prompt": row.prompt, "seed": row.seed}
    facts |= {"base": _files_of(settings.model.base), "clip": clip_skip}
    facts["adapter"] = [
        (used.name, used.hash or _files_of(str(use.path)), vars(use.strengths))
        for use, used in zip(uses, recorded(uses), strict=True)
    ]
    for name in ("image", "mask_image"):
        if path := facts.get(name):
            facts[name] = hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest()
    text = json.dumps(facts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _files_of(name: str) -> list[Any]:
    """Return a model's name on the hub, or its path with size and time of each file."""
    path = Path(name).expanduser()
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    states = [(str(file.relative_to(path)), file.stat()) for file in files if file.is_file()]
    stats = [(name, status.st_size, status.st_mtime_ns) for name, status in states]
    return [str(path.resolve()) if stats else name, stats]
