"""Teach Stable Diffusion or SDXL your subject with DoRA, and take the result anywhere.

The whole Python interface::

    AdapterConfig, inject_adapters, remove_adapters   DoRA on any module with Linear or Conv2d
    merge_adapters, unmerge_adapters, disabled        write it into the weights, switch it off
    set_strength, norm_scope                          its knobs, and norms computed once
    save_adapter, load_adapter                        one file, which other tools read exactly
    TrainConfig, train                                DreamBooth from photos to a finished folder
    load_components, generate_images                  a model by name, and its pictures
    export_checkpoint                                 base + adapter -> merged model

Names are imported when they are first used, so that ``import dora_diffusion`` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dora_diffusion.adapters.files import load_adapter, save_adapter
    from dora_diffusion.adapters.inject import (
        disabled,
        inject_adapters,
        merge_adapters,
        norm_scope,
        remove_adapters,
        set_strength,
        unmerge_adapters,
    )
    from dora_diffusion.config import AdapterConfig, TrainConfig
    from dora_diffusion.export import export_checkpoint
    from dora_diffusion.generate import generate_images
    from dora_diffusion.models.load import load_components
    from dora_diffusion.training.loop import train

_HOMES = {
    "AdapterConfig": "config.adapter",
    "TrainConfig": "config.train",
    "disabled": "adapters.inject",
    "export_checkpoint": "export",
    "generate_images": "generate",
    "inject_adapters": "adapters.inject",
    "load_adapter": "adapters.files",
    "load_components": "models.load",
    "merge_adapters": "adapters.inject",
    "norm_scope": "adapters.inject",
    "remove_adapters": "adapters.inject",
    "save_adapter": "adapters.files",
    "set_strength": "adapters.inject",
    "train": "training.loop",
    "unmerge_adapters": "adapters.inject",
}

__all__ = [
    "AdapterConfig",
    "TrainConfig",
    "disabled",
    "export_checkpoint",
    "generate_images",
    "inject_adapters",
    "load_adapter",
    "load_components",
    "merge_adapters",
    "norm_scope",
    "remove_adapters",
    "save_adapter",
    "set_strength",
    "train",
    "unmerge_adapters",
]


def __getattr__(name: str) -> Any:
    """Import a public name from where it lives."""
    if name not in _HOMES:
        raise AttributeError(f"module 'dora_diffusion' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"dora_diffusion.{_HOMES[name]}"), name)
