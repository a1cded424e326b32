"""``dora-diffusion generate``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dora_diffusion.cli.console.output import progress, say
from dora_diffusion.cli.image_rows import LoadedRequest, image_rows, warn_of_triggers
from dora_diffusion.cli.repeat import Repeated, base_and_adapters, repeated_settings
from dora_diffusion.cli.requested_images import RequestedImages
from dora_diffusion.config.config_file import read_config_file

if TYPE_CHECKING:
    from PIL.Image import Image
    from typing_extensions import Self

    from dora_diffusion.config.images import ImageRequest
    from dora_diffusion.sampling.pool import AdapterPool


@dataclass(frozen=True, kw_only=True)
class GenerateSettings(RequestedImages):
    """Settings of ``generate``."""

    @classmethod
    def read(cls, given: Mapping[str, Any], file: str | None = None) -> Self:
        """Read settings from a command line, else a YAML file, else an image to repeat.

        Raises:
            ConfigError, PhotoError: If one of these cannot be read, a value is not valid, or the
                image's base or adapters are neither given nor there.
        """
        values = {**(read_config_file(file) if file else {}), **given}
        image = values.get("repeat")
        if not image:
            return super().read(given, file)
        repeated, adapters = repeated_settings(str(image))
        repeated = {name: value for name, value in repeated.items() if name not in values}
        repeated |= base_and_adapters(str(image), values, adapters)
        return super().read({**given, **repeated}, file)

    def perform(self) -> int:
        """Generate images, and write them with their parameters."""
        if self.grid:
            from dora_diffusion.cli.commands.grid import make_grid

            return make_grid(self)
        rows = image_rows(self)
        from dora_diffusion.sampling.pool import AdapterPool

        settings, uses = self.sampling, self.uses()
        repeated = Repeated.of(self, settings)
        components, metadata = repeated.load(self, uses)
        settings, line = self.for_few_steps(settings, components, uses)
        if line:
            say(line, sys.stderr)
        loaded = LoadedRequest(self, components, settings, repeated.batch)
        requests, row_metadata = [loaded] * len(rows), [metadata] * len(rows)
        pool = AdapterPool(components, **self.model.reading)
        if self.adapters_file:
            adapters = [row.adapter for row in rows.values()]
            row_metadata = [pool.metadata(adapter) for adapter in adapters]
            requests = [loaded._replace(components=pool.components_for(a)) for a in adapters]
        warn_of_triggers(
            (row.prompt, m) for row, m in zip(rows.values(), row_metadata, strict=True)
        )
        images = self._sample(list(rows.values()), loaded, pool)
        for number, ((path, row), image) in enumerate(zip(rows.items(), images, strict=True)):
            requests[number].write(image, path, row, number, len(rows))
            print(f"{path} (seed {row.seed})")
        return 0

    def _sample(
        self, rows: Sequence[ImageRequest], loaded: LoadedRequest, pool: AdapterPool
    ) -> list[Image]:
        with progress("generating images", "step") as show:
            if not self.adapters_file:
                count = len(rows)
                return loaded.sample(rows, lambda done, steps: show(done * count, steps * count))
            return pool.generate(
                rows, loaded.sampling, batch_size=self.batch_size, on_step=show, require_finite=True
            )
