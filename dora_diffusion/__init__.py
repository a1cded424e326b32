"""DreamBooth training of Stable Diffusion and SDXL with DoRA, for use in any program.

The whole Python interface::

    AdapterConfig, inject_adapters, remove_adapters   DoRA on Linear, Conv and Embedding layers
    merge_adapters, unmerge_adapters, disabled        merge into the weights, undo, switch off
    set_strength                                      strength of an adapter
    norm_scope, NormCache                             norms computed once per training step
    row_scope, AdapterPool, ImageRow                  an adapter for each row of a batch
    compile_blocks                                    torch.compile of a UNet's repeated blocks
    save_adapter, load_adapter                        one file that other tools read exactly
    TrainConfig, train                                DreamBooth from photos to a finished folder
    subject_configs, train_pack                       several subjects at once, one adapter each
    run_fleet                                         many subjects on a cluster
    BaseModel, load_components                        a model by name
    SamplingSettings, generate_images                 images of a model
    read_subject, evaluate_photos                     subject similarity and drift, on photos
    export_checkpoint                                 base + adapter -> merged model
    extract_adapter                                   base and tuned model -> the nearest adapter
    combine_adapters, convert_adapter                 several in one; another format or rank
    analyze_weights                                   changes of a model's weights by training
    Study, run_study                                  methods compared over rates, seeds, subjects
    QueuePlan, simulate_queue                         waiting times for a fleet's workers
    describe_environment                              versions and machine, for a bug report

Exceptions (subclasses of `ValueError` unless stated otherwise), with a message of one line::

    ConfigError                                       a setting is not valid
    TargetError                                       no layer to adapt
    PhotoError                                        photos, masks or captions cannot be used
    TrainingError                                     a run cannot continue (a `RuntimeError`)
    ModelNotFoundError, UnsupportedModelError         a base model
    AdapterFormatError, TensorFileError               an adapter file
    CheckpointLayoutError, MergeError, ExportError    a merge
    BrokenImageError                                  a model produced a black or broken image
    DiskFullError                                     no space to write (an `OSError`)

Names are imported on first use, so that ``import dora_diffusion`` is fast.
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

__version__ = "0.1.0"

# Type checkers read the same stub.
_IMPORT = re.compile(r"from dora_diffusion\.([\w.]+) import \(?\s*(\w+) as")
_STUB = Path(__file__).with_name("__init__.pyi").read_text(encoding="utf-8")
_HOMES = dict(sorted((name, home) for home, name in _IMPORT.findall(_STUB)))
__all__ = list(_HOMES)


def __dir__() -> list[str]:
    """List the public names, also before their first use, and the submodules."""
    return sorted({*globals(), *__all__} - {"annotations", "import_module", "Path", "re"})


def __getattr__(name: str) -> object:
    """Import a public name from its module on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'dora_diffusion' has no attribute {name!r}")
    return getattr(import_module(f"dora_diffusion.{_HOMES[name]}"), name)
