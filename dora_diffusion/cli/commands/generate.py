"""``dora-diffusion generate``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_diffusion.cli.console.output import progress, say
from dora_diffusion.cli.image_rows import Row, image_rows, warn_of_triggers
from dora_diffusion.cli.repeat import Repeated, repeated_settings
from dora_diffusion.cli.requested_images import RequestedImages
from dora_diffusion.config.fields import require
from dora_diffusion.config.file import read_config_file

if TYPE_CHECKING:
    from PIL.Image import Image
    from typing_extensions import Self

    from dora_diffusion.formats.adapter.metadata import AdapterMetadata
    from dora_diffusion.models.components import Components
    from dora_diffusion.sampling.pool import AdapterPool
    from dora_diffusion.sampling.settings import SamplingSettings


@dataclass(frozen=True, kw_only=True)
class GenerateSettings(RequestedImages):
    """Settings of ``generate``."""

    @classmethod
    def read(cls, given: Mapping[str, Any], file: str | None = None) -> Self:
        """Make them of what a command line gives, over a YAML file, over an image to repeat.

        Raises:
            ConfigError, PhotoError: If one of these cannot be read, a value is not valid, or the
                image's base or adapters are neither given nor found.
        """
        values = {**(read_config_file(file) if file else {}), **given}
        image = values.get("repeat")
        if not image:
            return super().read(given, file).named_adapters()
        found, adapters = repeated_settings(str(image))
        found = {name: value for name, value in found.items() if name not in values}
        model = str(found.get("detail", ""))
        require(
            not model or model.startswith("rembg") or "/" in model or Path(model).is_dir(),
            f"{Path(str(image)).name} was made with the detail model {model}; give its folder with "
            "--detail",
            "detail",
        )
        from dora_diffusion.cli.lookup import base_and_adapters

        found |= base_and_adapters(str(image), values, adapters)
        return super().read({**given, **found}, file).named_adapters()

    def perform(self) -> int:
        """Generate images, and write them with what made them."""
        if self.grid:
            from dora_diffusion.cli.commands.grid import make_grid

            return make_grid(self)
        rows = image_rows(self)
        from dora_diffusion.numerics.weights import Strengths
        from dora_diffusion.sampling.pool import AdapterPool
        from dora_diffusion.sampling.stack import AdapterUse

        settings, uses = self.sampling, self.uses()
        repeated = Repeated.of(self, settings)
        components, metadata = repeated.load(self, uses)
        settings, line = self.distilled(settings, components, uses)
        if line:
            say(line, sys.stderr)
        pool = AdapterPool(components, **self.reading)
        readings = {row.adapter: components for row in rows}
        told: dict[str | None, AdapterMetadata] = {None: metadata}
        if self.adapters_file:
            readings = {row.adapter: pool.components_for(row.adapter) for row in rows}
            told = {row.adapter: pool.metadata(row.adapter) for row in rows}
        warn_of_triggers((row.prompt, told[row.adapter]) for row in rows)
        size = settings.size(components.default_resolution)
        images = self._sample(rows, components, pool, settings, repeated)
        for number, (row, image) in enumerate(zip(rows, images, strict=True)):
            used = [AdapterUse(row.adapter, Strengths(row.strength))] if row.adapter else uses
            extra = repeated.own_fields(self, number, len(rows), readings[row.adapter])
            row.write(image, settings, size, self.base, used, extra)
            print(f"{row.path} (seed {row.seed})")
        return 0

    def _sample(
        self,
        rows: Sequence[Row],
        components: Components,
        pool: AdapterPool,
        settings: SamplingSettings,
        repeated: Repeated,
    ) -> list[Image]:
        from dora_diffusion.sampling.generate import generate_images
        from dora_diffusion.sampling.settings import ImageRow

        shared: dict[str, Any] = {"batch_size": self.batch_size, "require_finite": True}
        with progress("generating images", "step") as show:
            if self.adapters_file:
                of_pool = [
                    ImageRow(row.prompt, row.seed, row.adapter and (row.adapter, row.strength))
                    for row in rows
                ]
                return pool.generate(of_pool, settings, on_step=show, **shared)
            seeds = [row.seed for row in rows]
            if repeated.batch > 1:
                # The others change nothing but how products are rounded.
                seeds = [seeds[0] - repeated.position + n for n in range(repeated.batch)]
                shared["batch_size"] = repeated.batch
            images = generate_images(
                components,
                [row.prompt for row in rows] if self.wildcards else rows[0].prompt,
                seeds,
                settings,
                on_step=lambda done, steps: show(done * len(rows), steps * len(rows)),
                **shared,
            )
            return images[repeated.position :][: len(rows)]
