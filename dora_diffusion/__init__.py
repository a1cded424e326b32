"""DreamBooth training of Stable Diffusion, SDXL and Z-Image with DoRA, for use in any program.

The whole Python interface::

    AdapterConfig, inject_adapters, remove_adapters   DoRA on Linear, Conv and Embedding layers
    merge_adapters, unmerge_adapters, disabled        merge into the weights, undo, switch off
    set_strength                                      strength of an adapter
    norm_scope, NormCache                             norms computed once per training step
    row_scope, AdapterPool, ImageRequest              an adapter for each row of a batch
    compile_blocks                                    torch.compile of a UNet's repeated blocks
    save_adapter, load_adapter                        one file that other tools read exactly
    TrainConfig, train                                DreamBooth from photos to a finished folder
    subject_configs, train_pack                       several subjects at once, one adapter each
    run_fleet                                         many subjects on a cluster
    BaseModel, load_components                        a model by name
    SamplingSettings, generate_images                 images of a model
    read_subject, evaluate_photos                     subject similarity and drift, on photos
    export_checkpoint                                 base + adapter -> merged model
    FitSettings, extract_adapter                      base and tuned model -> the nearest adapter
    combine_adapters, convert_adapter                 several in one; another format or rank

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

from dora_diffusion.lazy import lazy_names

__version__ = "0.1.0"

_HOMES, __getattr__ = lazy_names(__name__, __file__)
__all__ = list(_HOMES)


def __dir__() -> list[str]:
    """The public names, which are not there before they are used, and the submodules."""
    return sorted({*globals(), *__all__} - {"annotations", "lazy_names"})
