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

if TYPE_CHECKING:  # `as`: what type checkers see of a package
    from dora_diffusion.adapters.compiled import compile_blocks as compile_blocks
    from dora_diffusion.adapters.inject import disabled as disabled
    from dora_diffusion.adapters.inject import inject_adapters as inject_adapters
    from dora_diffusion.adapters.inject import merge_adapters as merge_adapters
    from dora_diffusion.adapters.inject import remove_adapters as remove_adapters
    from dora_diffusion.adapters.inject import set_strength as set_strength
    from dora_diffusion.adapters.inject import unmerge_adapters as unmerge_adapters
    from dora_diffusion.adapters.scope import NormCache as NormCache
    from dora_diffusion.adapters.scope import norm_scope as norm_scope
    from dora_diffusion.adapters.scope import row_scope as row_scope
    from dora_diffusion.adapters.state import load_adapter as load_adapter
    from dora_diffusion.adapters.state import save_adapter as save_adapter
    from dora_diffusion.adapters.targets import TargetError as TargetError
    from dora_diffusion.cli.console.environment import describe_environment as describe_environment
    from dora_diffusion.cluster.fleet.run import run_fleet as run_fleet
    from dora_diffusion.config import AdapterConfig as AdapterConfig
    from dora_diffusion.config import ConfigError as ConfigError
    from dora_diffusion.config import TrainConfig as TrainConfig
    from dora_diffusion.config.base import BaseModel as BaseModel
    from dora_diffusion.config.families import UnsupportedModelError as UnsupportedModelError
    from dora_diffusion.config.subject_list import subject_configs as subject_configs
    from dora_diffusion.data.images import PhotoError as PhotoError
    from dora_diffusion.export import ExportError as ExportError
    from dora_diffusion.export import combine_adapters as combine_adapters
    from dora_diffusion.export import convert_adapter as convert_adapter
    from dora_diffusion.export import export_checkpoint as export_checkpoint
    from dora_diffusion.export import extract_adapter as extract_adapter
    from dora_diffusion.formats.checkpoint.entries import (
        CheckpointLayoutError as CheckpointLayoutError,
    )
    from dora_diffusion.formats.files.atomic import DiskFullError as DiskFullError
    from dora_diffusion.formats.files.stream import TensorFileError as TensorFileError
    from dora_diffusion.formats.layouts.layout import AdapterFormatError as AdapterFormatError
    from dora_diffusion.lab.analysis import analyze_weights as analyze_weights
    from dora_diffusion.lab.simulation.queue import QueuePlan as QueuePlan
    from dora_diffusion.lab.simulation.queue import simulate_queue as simulate_queue
    from dora_diffusion.lab.study.config import Study as Study
    from dora_diffusion.lab.study.run import run_study as run_study
    from dora_diffusion.models.load import load_components as load_components
    from dora_diffusion.models.locate import ModelNotFoundError as ModelNotFoundError
    from dora_diffusion.numerics.merging import MergeError as MergeError
    from dora_diffusion.sampling.generate import BrokenImageError as BrokenImageError
    from dora_diffusion.sampling.generate import SamplingSettings as SamplingSettings
    from dora_diffusion.sampling.generate import generate_images as generate_images
    from dora_diffusion.sampling.pool import AdapterPool as AdapterPool
    from dora_diffusion.sampling.pool import ImageRow as ImageRow
    from dora_diffusion.training.loop import train as train
    from dora_diffusion.training.loop import train_pack as train_pack
    from dora_diffusion.training.results.metrics import TrainingError as TrainingError

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
    "MergeError": "numerics.merging",
    "ModelNotFoundError": "models.locate",
    "NormCache": "adapters.scope",
    "PhotoError": "data.images",
    "QueuePlan": "lab.simulation.queue",
    "SamplingSettings": "sampling.generate",
    "Study": "lab.study.config",
    "TargetError": "adapters.targets",
    "TensorFileError": "formats.files.stream",
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
    "train_pack": "training.loop",
    "unmerge_adapters": "adapters.inject",
}

__all__ = sorted(_HOMES)


def __dir__() -> list[str]:
    """The public names, which are not there before they are used, and the submodules."""
    unlisted = {"TYPE_CHECKING", "annotations"}
    return sorted({*globals(), *__all__} - unlisted)


if not TYPE_CHECKING:  # A type checker knows the names, and is to report all others.

    def __getattr__(name: str) -> object:
        """Import a public name from where it lives."""
        if name not in _HOMES:
            raise AttributeError(f"module 'dora_diffusion' has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(f"dora_diffusion.{_HOMES[name]}"), name)
