"""Teach Stable Diffusion or SDXL your subject with DoRA, and take the result anywhere.

The whole Python interface::

    AdapterConfig, inject_adapters, remove_adapters   DoRA on Linear, Conv and Embedding layers
    merge_adapters, unmerge_adapters, disabled        write it into the weights, switch it off
    set_strength                                      how much of it acts
    norm_scope, NormCache                             norms computed once for each training step
    row_scope, AdapterPool, ImageRow                  an adapter for each row of a batch
    compile_blocks                                    torch.compile of a UNet's repeated blocks
    save_adapter, load_adapter                        one file, which other tools read exactly
    TrainConfig, train                                DreamBooth from photos to a finished folder
    subject_configs, train_pack                       several subjects at once, an adapter each
    run_fleet                                         the same for many subjects, on a cluster
    BaseModel, load_components                        a model by name
    SamplingSettings, generate_images                 images from it
    export_checkpoint                                 base + adapter -> merged model
    extract_adapter                                   base and tuned model -> the nearest adapter
    combine_adapters, convert_adapter                 several in one; another format or rank
    analyze_weights                                   what training did to a model's weights
    Study, run_study                                  methods compared over rates, seeds, subjects
    QueuePlan, simulate_queue                         how long subjects wait for a fleet's workers
    describe_environment                              versions and machine, for a bug report

What it raises, each a `ValueError` unless said otherwise, with one line for a user::

    ConfigError                                       a setting cannot work
    TargetError                                       no layer to adapt
    PhotoError                                        photos, masks or captions cannot be used
    TrainingError                                     a run cannot continue (a `RuntimeError`)
    ModelNotFoundError, UnsupportedModelError         a base model
    AdapterFormatError, TensorFileError               an adapter file
    CheckpointLayoutError, MergeError, ExportError    a merge
    BrokenImageError                                  a model made a black or broken image
    DiskFullError                                     no space to write (an `OSError`)

Names are imported when they are first used, so that ``import dora_diffusion`` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dora_diffusion.adapters.compiled import compile_blocks
    from dora_diffusion.adapters.inject import (
        disabled,
        inject_adapters,
        merge_adapters,
        remove_adapters,
        set_strength,
        unmerge_adapters,
    )
    from dora_diffusion.adapters.scope import NormCache, norm_scope, row_scope
    from dora_diffusion.adapters.state import load_adapter, save_adapter
    from dora_diffusion.adapters.targets import TargetError
    from dora_diffusion.cli.console.environment import describe_environment
    from dora_diffusion.cluster.fleet.run import run_fleet
    from dora_diffusion.config import AdapterConfig, ConfigError, TrainConfig
    from dora_diffusion.config.base import BaseModel
    from dora_diffusion.config.families import UnsupportedModelError
    from dora_diffusion.config.subject_list import subject_configs
    from dora_diffusion.data.images import PhotoError
    from dora_diffusion.export import (
        ExportError,
        combine_adapters,
        convert_adapter,
        export_checkpoint,
        extract_adapter,
    )
    from dora_diffusion.formats.checkpoint.entries import CheckpointLayoutError
    from dora_diffusion.formats.checkpoint.weights import MergeError
    from dora_diffusion.formats.files.atomic import DiskFullError
    from dora_diffusion.formats.files.header import TensorFileError
    from dora_diffusion.formats.layouts.layout import AdapterFormatError
    from dora_diffusion.lab.analysis import analyze_weights
    from dora_diffusion.lab.simulation.queue import QueuePlan, simulate_queue
    from dora_diffusion.lab.study.config import Study
    from dora_diffusion.lab.study.run import run_study
    from dora_diffusion.models.load import load_components
    from dora_diffusion.models.locate import ModelNotFoundError
    from dora_diffusion.sampling.generate import BrokenImageError, SamplingSettings, generate_images
    from dora_diffusion.sampling.pool import AdapterPool, ImageRow
    from dora_diffusion.training.loop import train
    from dora_diffusion.training.pack import train_pack
    from dora_diffusion.training.results.metrics import TrainingError

_HOMES = {
    "AdapterConfig": "config.adapter",
    "AdapterFormatError": "formats.layouts.layout",
    "AdapterPool": "sampling.pool",
    "BaseModel": "config.base",
    "BrokenImageError": "sampling.generate",
    "CheckpointLayoutError": "formats.checkpoint.entries",
    "ConfigError": "config.fields",
    "DiskFullError": "formats.files.atomic",
    "ExportError": "export",
    "ImageRow": "sampling.pool",
    "MergeError": "formats.checkpoint.weights",
    "ModelNotFoundError": "models.locate",
    "NormCache": "adapters.scope",
    "PhotoError": "data.images",
    "QueuePlan": "lab.simulation.plan",
    "SamplingSettings": "sampling.generate",
    "Study": "lab.study.config",
    "TargetError": "adapters.targets",
    "TensorFileError": "formats.files.header",
    "TrainConfig": "config.train",
    "TrainingError": "training.results.metrics",
    "UnsupportedModelError": "config.families",
    "analyze_weights": "lab.analysis",
    "combine_adapters": "export",
    "compile_blocks": "adapters.compiled",
    "convert_adapter": "export",
    "describe_environment": "cli.console.environment",
    "disabled": "adapters.inject",
    "export_checkpoint": "export",
    "extract_adapter": "export",
    "generate_images": "sampling.generate",
    "inject_adapters": "adapters.inject",
    "load_adapter": "adapters.state",
    "load_components": "models.load",
    "merge_adapters": "adapters.inject",
    "norm_scope": "adapters.scope",
    "remove_adapters": "adapters.inject",
    "row_scope": "adapters.scope",
    "run_fleet": "cluster.fleet.run",
    "run_study": "lab.study.run",
    "save_adapter": "adapters.state",
    "set_strength": "adapters.inject",
    "simulate_queue": "lab.simulation.queue",
    "subject_configs": "config.subject_list",
    "train": "training.loop",
    "train_pack": "training.pack",
    "unmerge_adapters": "adapters.inject",
}

__all__ = [
    "AdapterConfig",
    "AdapterFormatError",
    "AdapterPool",
    "BaseModel",
    "BrokenImageError",
    "CheckpointLayoutError",
    "ConfigError",
    "DiskFullError",
    "ExportError",
    "ImageRow",
    "MergeError",
    "ModelNotFoundError",
    "NormCache",
    "PhotoError",
    "QueuePlan",
    "SamplingSettings",
    "Study",
    "TargetError",
    "TensorFileError",
    "TrainConfig",
    "TrainingError",
    "UnsupportedModelError",
    "analyze_weights",
    "combine_adapters",
    "compile_blocks",
    "convert_adapter",
    "describe_environment",
    "disabled",
    "export_checkpoint",
    "extract_adapter",
    "generate_images",
    "inject_adapters",
    "load_adapter",
    "load_components",
    "merge_adapters",
    "norm_scope",
    "remove_adapters",
    "row_scope",
    "run_fleet",
    "run_study",
    "save_adapter",
    "set_strength",
    "simulate_queue",
    "subject_configs",
    "train",
    "train_pack",
    "unmerge_adapters",
]


def __dir__() -> list[str]:
    """The public names, which are not there before they are used, and the submodules."""
    return sorted({*globals(), *__all__})


if not TYPE_CHECKING:  # A type checker knows the names, and is to report all others.

    def __getattr__(name: str) -> object:
        """Import a public name from where it lives."""
        if name not in _HOMES:
            raise AttributeError(f"module 'dora_diffusion' has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(f"dora_diffusion.{_HOMES[name]}"), name)
