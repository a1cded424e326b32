"""What a model's scheduler and pipeline settings state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dora_diffusion.families import Family, UnsupportedModelError


def training_scheduler(config: Mapping[str, Any]) -> Any:
    """DDPM over the model's noise schedule, whatever scheduler its folder names.

    Raises:
        UnsupportedModelError: If the folder's scheduler has no schedule of betas.
    """
    import diffusers

    name = str(config.get("_class_name", ""))
    if name.startswith(("EDM", "FlowMatch")):
        raise UnsupportedModelError(
            f"the model's scheduler, {name}, has another kind of noise schedule than Stable "
            "Diffusion 1, 2 and XL; such models are not supported"
        )
    scheduler_class: Any = diffusers.DDPMScheduler
    return scheduler_class.from_config({**config, "clip_sample": False})


def zeros_for_empty_prompt(family: Family, index: Mapping[str, Any]) -> bool:
    """Whether guidance without a negative prompt uses zeros, by the pipeline's settings."""
    return family.has_pooled and bool(index.get("force_zeros_for_empty_prompt", True))
