"""Loading of models from a folder, a hub id, a single file or the embedded models.

Weights are read only from safetensors files. No pickles are opened and no remote code is run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from dora_diffusion.config.base import AnyModel, BaseModel
from dora_diffusion.config.exclusions import refuse
from dora_diffusion.config.families import (
    DEFAULT_FAMILY,
    Family,
    UnsupportedModelError,
    detect_folder_family,
)
from dora_diffusion.config.pipeline_index import index_file
from dora_diffusion.config.wording import listing
from dora_diffusion.formats.adapter.embeddings import read_tokens
from dora_diffusion.formats.adapter.metadata import OWN, AdapterMetadata, stated_reading
from dora_diffusion.formats.checkpoint.models import (
    CheckpointFile,
    Component,
    base_name,
    by_scheduler,
    read_json,
)
from dora_diffusion.formats.checkpoint.schedule import (
    EPSILON,
    NoiseSchedule,
    ScheduleInfo,
    choose_schedule,
    statements_on,
    usual_of,
)
from dora_diffusion.formats.checkpoint.weights import require_unquantised
from dora_diffusion.formats.files.stream import PICKLED, TensorReader, read_header
from dora_diffusion.formats.names.modules import BUFFERS, canonical
from dora_diffusion.models import embedded
from dora_diffusion.models.components import Components, cast_to_weight, check_vocabulary
from dora_diffusion.models.configuration import (
    empty_module,
    is_released,
    module_classes,
    released_folder,
    require_prediction,
)
from dora_diffusion.models.locate import (
    EMBEDDED_PREFIX,
    ModelNotFoundError,
    resolve_folder,
    vae_folder,
)
from dora_diffusion.models.words import add_tokens
from dora_diffusion.numerics.quantised import quantise_rows

_SCHEDULER = Path("scheduler") / "scheduler_config.json"


def load_components(
    model: AnyModel, *, dtype: torch.dtype = torch.float32, adapters: Sequence[AdapterMetadata] = ()
) -> Components:
    """Load a model, frozen and in evaluation mode, on the CPU.

    Args:
        model: Diffusers folder, hub id, ``embedded:NAME`` or single-file ``.safetensors``
            checkpoint; or a `BaseModel` with loading options.
        dtype: Dtype of the modules. An autoencoder that overflows in half precision stays float32.
        adapters: Metadata of the adapters for the model, which may state its noise schedule.

    Raises:
        ModelNotFoundError: If the model does not exist.
        UnsupportedModelError: If the model is of no supported family.
        ValueError: If files are incomplete or do not belong together.
    """
    base = BaseModel.of(model)
    with quiet_libraries(), _opened(base) as (file, source):
        components = _load(file, source, base, dtype, adapters)
    if components.vae.dtype != dtype:
        vae = components.vae
        for module in (vae.encoder, vae.decoder, vae.quant_conv, vae.post_quant_conv):
            if module is not None:
                module.register_forward_pre_hook(cast_to_weight)
    set_tiles(components.vae, base.tile_size)
    for module in components.modules().values():
        module.eval().requires_grad_(False)
    add_tokens(components, read_tokens(source))
    return components


def load_empty(model: AnyModel) -> Components:
    """Load modules, tokenizers and schedule of a model without weights, for checks of settings.

    Raises:
        ModelNotFoundError, UnsupportedModelError, ValueError: As in `load_components`.
    """
    base = BaseModel.of(model)
    with quiet_libraries(), _opened(base) as (file, source):
        return _load(file, source, base, None, ())


def set_tiles(vae: Any, size: int) -> None:
    """Set the tile size of an autoencoder for large images, in pixels; 0: no tiling."""
    vae.use_tiling = size > 0
    vae.tile_sample_min_size = size
    vae.tile_latent_min_size = size // 2 ** (len(vae.config.block_out_channels) - 1)


@contextlib.contextmanager
def _opened(base: BaseModel) -> Iterator[tuple[CheckpointFile | None, Path]]:
    """Open a model. Yields its single file, or None for a folder, and the path."""
    path = Path(base.path).expanduser()
    if path.suffix in PICKLED:
        raise ModelNotFoundError(
            f"{path} is a pickle, which can execute code; convert it to .safetensors first"
        )
    if path.suffix != ".safetensors" or not path.is_file():
        yield None, resolve_folder(base)
        return
    with contextlib.ExitStack() as stack:
        with plain_errors(str(path)):
            reader = stack.enter_context(TensorReader(path))
        yield CheckpointFile(reader), path


def check_components(model: AnyModel) -> dict[str, str]:
    """Check that a model is complete, without reading its weights.

    The names and shapes of tensors are compared with the configuration of each module, and the
    sizes of files with their headers. Tokenizers are loaded.

    Returns:
        Component -> problem; the problem is empty if there is none.

    Raises:
        ModelNotFoundError, UnsupportedModelError, ValueError: As in `load_components`, if the
            components of the model are unknown.
    """
    base, problems = BaseModel.of(model), dict[str, str]()
    with quiet_libraries(), _opened(base) as (file, source):
        plan = _planned(file, source, base, ())
        names, modules = plan.family.text_encoder_names, dict[str, Any]()
        encoders = dict(zip(plan.family.tokenizer_names, names, strict=True))
        for name in (plan.family.denoiser, "vae", *names, *encoders):
            try:
                if name not in encoders:
                    modules[name] = _module_of(file, plan, name, None, base)
                elif encoder := modules.get(encoders[name]):
                    kind = plan.family.tokenizer_classes[name]
                    check_vocabulary(_load_tokenizer(plan.folder / name, kind), encoder, name)
                problems[name] = ""
            except (ValueError, OSError) as error:
                problems[name] = str(error)
    return problems


class _Plan(NamedTuple):
    """Information for building the modules of a model.

    Attributes:
        family: Family of the model.
        folder: Folder with the configuration.
        schedule: Noise schedule.
        stated: Stated noise schedules, as in `Components`.
    """

    family: Family
    folder: Path
    schedule: NoiseSchedule
    stated: tuple[Sequence[ScheduleInfo], Sequence[ScheduleInfo]]


def _planned(
    file: CheckpointFile | None, source: Path, base: BaseModel, adapters: Sequence[AdapterMetadata]
) -> _Plan:
    configured_folder: Path | None = source
    if file is not None:
        configured_folder = None if base.model_config is None else resolve_folder(base.model_config)
    family = detect_folder_family(source) if file is None else file.family
    index, scheduler = dict[str, Any](), dict[str, Any]()
    if configured_folder:
        files = (index_file(configured_folder), configured_folder / _SCHEDULER)
        index, scheduler = map(read_json, files)
    configured = [by_scheduler(scheduler)] if configured_folder else usual_of(family)
    stated = configured if file is None else file.statements()
    usual = [] if file is None else configured
    family = family.of_model(str(base.path), index, scheduler, base.distilled)
    refuse(base, family, str(base.path))
    schedule = choose_schedule(str(base.path), statements_on(base, stated, usual, adapters))
    require_prediction(source.name, family, schedule)
    folder = configured_folder or released_folder(family, schedule.prediction_type)
    return _Plan(family, folder, schedule, (stated, usual))


def _module_of(
    file: CheckpointFile | None, plan: _Plan, part: str, dtype: torch.dtype | None, base: BaseModel
) -> Any:
    """Load a module of a model; without a dtype, build it without reading weights."""
    folder, family, kind = plan.folder, plan.family, module_classes(plan.family)[part]
    if part == "vae" and dtype is not None:
        dtype = _vae_dtype(folder / part, dtype, family)
    if file is not None and part not in file.left_out:
        return _module_of_file(file, folder, part, kind, dtype, base)
    return _module_of_folder(folder / part, part, (kind, family), dtype, base)


def _load(
    file: CheckpointFile | None,
    source: Path,
    base: BaseModel,
    dtype: torch.dtype | None,
    adapters: Sequence[AdapterMetadata],
) -> Components:
    """Load a model from a file or folder; without a dtype, build it without reading weights.

    Raises:
        UnsupportedModelError: If the family is not supported.
        ValueError: If the model is damaged or does not match its configuration.
    """
    plan = _planned(file, source, base, adapters)
    family, folder, load = plan.family, plan.folder, partial(_module_of, file, plan)
    index, own_vae = read_json(index_file(folder)), partial(load_vae, base.vae or "")
    return Components(
        family=family,
        denoiser=load(family.denoiser, dtype, base),
        vae=load("vae", dtype, base)
        if base.vae is None or dtype is None
        else own_vae(dtype=dtype, family=family),
        text_encoders=tuple(load(part, dtype, base) for part in family.text_encoder_names),
        tokenizers=tuple(
            _load_tokenizer(folder / part, kind) for part, kind in family.tokenizer_classes.items()
        ),
        name=str(base.path),
        asked=base,
        zeros_for_empty_prompt=family.zeros_for_empty_prompt(index),
        source=str(source),
        stated=plan.stated,
        **_schedulers(read_json(folder / _SCHEDULER), plan.schedule, family),
        **_reading(source, family),
    )


def _vae_dtype(folder: Path, dtype: torch.dtype, family: Family | None) -> torch.dtype:
    """Return the dtype of an autoencoder: float32 if it overflows in half precision."""
    overflows = family is not None and family.vae_overflows(read_json(folder / "config.json"))
    return torch.float32 if overflows else dtype


def _module_of_folder(
    folder: Path, part: str, kind: tuple[str, Family], dtype: torch.dtype | None, base: BaseModel
) -> Any:
    """Load a module, of a class and family, from the folder of a component.

    Raises:
        ValueError: If files are missing, damaged or incomplete.
    """
    variant = base.variant
    hint = f"it has no {variant!r} variant, or it is damaged" if variant else "it is damaged"
    with plain_errors(str(folder), f"{hint}; download the model again"):
        module, component = empty_module(folder, *kind), Component(part, folder, variant)
        with component.reader:
            problem = _fill(module, part, component, dtype, base)
    if problem:
        raise ValueError(f"{folder} is incomplete or damaged: {problem}; download the model again")
    return module


def _module_of_file(
    file: CheckpointFile,
    folder: Path,
    part: str,
    kind: str,
    dtype: torch.dtype | None,
    base: BaseModel,
) -> Any:
    """Load a module from a single file, with the configuration of a folder.

    Raises:
        ValueError: If a tensor is missing or has another shape than in the configuration.
    """
    with plain_errors(str(folder)):
        module = empty_module(folder / part, kind, file.family)
    with plain_errors(str(file.path)):
        problem = _fill(module, part, file, dtype, base)
    if problem:
        whose = f"a released {file.family.title}" if is_released(folder) else folder.name
        # The base model of a trained file has the right shape.
        name = base_name(file.metadata)
        name = f"{EMBEDDED_PREFIX}{name}" if name in embedded.MODELS else name
        hint = f", such as its base model's: {name}" if name else ""
        raise ValueError(
            f"{file.path} does not have the shapes of {whose}: {problem}; set --model_config to a "
            f"Diffusers folder with its shapes{hint}"
        )
    return module


def _fill(
    module: Any,
    part: str,
    weights: CheckpointFile | Component,
    dtype: torch.dtype | None,
    base: BaseModel,
) -> str:
    """Load weights into a module; without a dtype, only compare their names and shapes.

    Returns:
        Problem with the weights; empty if there is none.

    Raises:
        UnsupportedModelError: If the weights are already quantised.
    """
    require_unquantised(weights.reader.path, weights.reader.specs)
    shapes = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    names = {key: canonical(part, key) for key in shapes if not key.endswith(BUFFERS)}
    if lacking := [name for name in names.values() if name not in weights.specs]:
        return f"it lacks {listing(lacking, 3)}"
    if differing := [n for key, n in names.items() if weights.specs[n].shape != shapes[key]]:
        return f"{listing(differing, 3)} differ"
    if dtype is None:
        return ""
    quantised = () if part == "vae" else quantised_layers(base)
    state: dict[str, torch.Tensor] = {}
    for key, name in names.items():
        owner, _, attribute = key.rpartition(".")
        if attribute == "weight" and isinstance(module.get_submodule(owner), quantised):
            rows = partial(weights.rows, name)
            state[key] = quantise_rows(rows, shapes[key], dtype, base.quantize)
        else:
            tensor = weights[name]
            # Counters of a batch normalization are integers.
            tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
            state[key] = _without_shared_storage(tensor)
    module.load_state_dict(state, strict=False, assign=True)
    return ""


def _without_shared_storage(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor that is a view, so that it does not keep a larger storage in memory."""
    is_part = tensor.untyped_storage().nbytes() > tensor.nbytes
    return tensor.clone(memory_format=torch.contiguous_format) if is_part else tensor.contiguous()


def quantised_layers(base: BaseModel) -> tuple[type[nn.Module], ...]:
    """Return the classes of layers whose weights are quantised."""
    if base.quantize == "none":
        return ()
    return (nn.Linear, nn.Conv2d) if base.quantize_convolutions else (nn.Linear,)


class BaseCache:
    """Loader of models that caches the last one.

    Each call returns new modules that share the cached weights. The weights must not be modified.
    """

    def __init__(self) -> None:
        self._request: object = None
        self._base: Components | None = None

    def __call__(self, model: AnyModel, **options: Any) -> Components:
        """Load a model with the arguments of `load_components`."""
        request = (BaseModel.of(model), options)
        if self._base is None or request != self._request:
            self._base = None  # Free the memory before loading another model.
            self._base, self._request = load_components(model, **options), request
        return self._base.sharing_weights()


def _reading(source: Path, family: Family) -> dict[str, Any]:
    """Return the prompt settings that a model trained with this package states in its files."""
    files = (
        [source] if source.is_file() else sorted((source / family.denoiser).glob("*.safetensors"))
    )
    return dict(stated_reading(read_header(files[0]).metadata, OWN)) if files else {}


def load_vae(
    name: str | PathLike[str], *, dtype: torch.dtype = torch.float32, family: Family | None = None
) -> Any:
    """Load an autoencoder without the rest of a model.

    Args:
        name: A name for `vae_folder`, or a ``.safetensors`` file in the original layout.
        dtype: Dtype of the weights. Autoencoders of a family that overflows in half precision stay
            float32, unless their configuration has ``force_upcast`` false.
        family: Family of the model.

    Raises:
        ModelNotFoundError: If the autoencoder does not exist.
        ValueError: If it is of another class than the family's, or a single file for a family
            whose single files have no known configuration.
    """
    from diffusers import AutoencoderKL

    own = family or DEFAULT_FAMILY
    path = Path(name).expanduser()
    if path.suffix == ".safetensors" and path.is_file():
        if family is not None and not family.has_unet:
            raise ValueError(f"{path}: an autoencoder of {family.title} is given as a folder")
        overflows = family is not None and family.vae_overflows({})
        with plain_errors(str(name)):
            return AutoencoderKL.from_single_file(
                str(path),
                config=str(released_folder(own, EPSILON)),
                subfolder="vae",
                torch_dtype=torch.float32 if overflows else dtype,
                local_files_only=True,
            )
    folder = vae_folder(name)
    kind, needed = read_json(folder / "config.json").get("_class_name"), own.vae_class
    if kind not in (None, needed):
        raise ValueError(
            f"{name} is an {kind}, which does not fit this model; it needs an {needed}"
        )
    dtype = _vae_dtype(folder, dtype, family)
    return _module_of_folder(folder, "vae", (needed, own), dtype, BaseModel(folder))


def reschedule(components: Components, adapters: Sequence[AdapterMetadata]) -> Components:
    """Return the model with the noise schedule that adapters state. Modules are shared.

    Raises:
        ValueError: If the statements contradict each other.
    """
    base = components.asked or BaseModel(components.name)
    statements = statements_on(base, *components.stated, adapters)
    schedule = choose_schedule(components.name, statements)
    return dataclasses.replace(
        components, **_schedulers(components.scheduler_config, schedule, components.family)
    )


def _schedulers(
    config: Mapping[str, Any], schedule: NoiseSchedule, family: Family
) -> dict[str, Any]:
    """Return the fields of `Components` that depend on scheduler configuration and schedule."""
    config = {**config, **schedule.settings}
    return {
        "scheduler": training_scheduler(config, family),
        "scheduler_config": config,
        "schedule": schedule,
    }


def training_scheduler(config: Mapping[str, Any], family: Family) -> Any:
    """Build a scheduler with a model's noise schedule, regardless of its configured scheduler.

    Returns:
        A DDPMScheduler, or a FlowMatchEulerDiscreteScheduler for models of a flow.

    Raises:
        UnsupportedModelError: If the configured scheduler has another kind of noise schedule.
    """
    import diffusers

    name = str(config.get("_class_name", ""))
    if family.is_flow and name.startswith("FlowMatch"):
        return diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
    if family.is_flow or name.startswith(("EDM", "FlowMatch")):
        raise UnsupportedModelError(
            f"the model's scheduler, {name}, has another kind of noise schedule than "
            f"{family.title}; such models are not supported"
        )
    scheduler_class: Any = diffusers.DDPMScheduler
    return scheduler_class.from_config({**config, "clip_sample": False})


def _load_tokenizer(folder: Path, kind: str) -> Any:
    """Load a tokenizer from a folder.

    Raises:
        ValueError: If files are missing.
    """
    import transformers

    with plain_errors(str(folder)):
        tokenizer_class: Any = getattr(transformers, kind)
        return tokenizer_class.from_pretrained(str(folder), local_files_only=True)


DETAIL_LIMIT = 300
"""Largest number of characters of a library's error in a message."""


@contextlib.contextmanager
def plain_errors(name: str, hint: str = "it is missing or damaged") -> Iterator[None]:
    """Convert the loading errors of libraries to a `ValueError` with one line."""
    from safetensors import SafetensorError

    try:
        yield
    except UnsupportedModelError:
        raise
    except ImportError as error:
        text = " ".join(str(error).split())
        raise ValueError(f"{name} needs a package that is missing: {text}") from error
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        # Limited in length, since Transformers lists all supported models in one line.
        detail = "".join(str(error).strip().splitlines()[:1])
        detail = detail if len(detail) <= DETAIL_LIMIT else f"{detail[:DETAIL_LIMIT]}..."
        raise ValueError(f"{name} could not be loaded ({hint}): {detail}") from error


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Disable progress bars and log messages of Diffusers and Transformers inside the block.

    This package itself reports problems that users can fix, such as truncated prompts. Failures are
    still raised.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    states = [
        (library, library.is_progress_bar_enabled(), library.get_verbosity())
        for library in (diffusers_logging, transformers_logging)
    ]
    for library, _, _ in states:
        library.disable_progress_bar()
        library.set_verbosity(library.CRITICAL)
    # If it is installed, Diffusers imports it, and it warns of missing CPU kernels.
    bitsandbytes = logging.getLogger("bitsandbytes")
    level = bitsandbytes.level
    bitsandbytes.setLevel(logging.ERROR)
    try:
        yield
    finally:
        bitsandbytes.setLevel(level)
        for library, enabled, verbosity in states:
            library.set_verbosity(verbosity)
            if enabled:
                library.enable_progress_bar()
