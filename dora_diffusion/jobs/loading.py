"""Loading a run's base model for images as the run itself loaded it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dora_diffusion.models.components import Components


@dataclass(frozen=True)
class ModelFiles:
    """What besides its name says how a base model is loaded; see the settings of these names.

    Attributes:
        vae: ``pretrained_vae_model_name_or_path``.
        config: ``model_config``.
        variant: Of the weights.
        revision: Of a hub id.
    """

    vae: str | None = None
    config: str | None = None
    variant: str | None = None
    revision: str | None = None

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> ModelFiles:
        """Those of a run's settings."""
        return cls(
            settings.get("pretrained_vae_model_name_or_path") or None,
            settings.get("model_config") or None,
            settings.get("variant") or None,
            settings.get("revision") or None,
        )

    @property
    def flags(self) -> list[str]:
        """The same for a command."""
        named = dataclasses.asdict(self).items()
        return [word for name, value in named if value for word in (f"--{name}", value)]

    def here(self, name: str) -> str | None:
        """A base model's name, or its folder in the hub's cache; None where it is not on the disk.

        The hub is not asked.
        """
        from dora_diffusion.formats.checkpoint.folder import PipelineFolder
        from dora_diffusion.formats.files.header import TensorFileError
        from dora_diffusion.models.locate import ModelNotFoundError, is_embedded, resolve_folder

        if is_embedded(name) or Path(name).expanduser().exists():
            return name
        try:
            folder = resolve_folder(
                name, revision=self.revision, variant=self.variant, local_only=True
            )
            PipelineFolder(folder, self.variant)  # The cache may hold its configuration alone.
        except (ModelNotFoundError, TensorFileError):
            return None
        return str(folder)


def load_model(name: str, adapter: Path | None, files: ModelFiles) -> Components:
    """A model to sample from, in half precision on a GPU.

    Raises:
        ValueError: If a part of it cannot be had.
    """
    from dora_diffusion.generate import load_adapted
    from dora_diffusion.memory import auto_precision, describe_device
    from dora_diffusion.models.precision import PRECISION_DTYPES

    dtype = PRECISION_DTYPES[auto_precision(describe_device())]
    components, _ = load_adapted(
        name, adapter, dtype=dtype, variant=files.variant, revision=files.revision,
        config=files.config, vae=files.vae,
    )  # fmt: skip
    return components
