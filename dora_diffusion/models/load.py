"""Load a model's components from a folder, a hub id, a single file or an embedded model.

Weights are read from safetensors only: no pickles, no remote code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from dora_diffusion.config.arguments import check_arguments
from dora_diffusion.config.base import AnyModel, BaseModel
from dora_diffusion.config.families import (
    DEFAULT_FAMILY,
    Family,
    UnsupportedModelError,
    detect_folder_family,
)
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


@check_arguments()
def load_components(
    model: AnyModel, *, dtype: torch.dtype = torch.float32, adapters: Sequence[AdapterMetadata] = ()
) -> Components:
    """Load a model, frozen and in evaluation mode, on the CPU.

    Args:
        model: A diffusers folder, a hub id, ``embedded:NAME``, or a single-file ``.safetensors``
            checkpoint; or one of these as a `BaseModel`, which says how to read it.
        dtype: Of every module; an autoencoder that overflows in half precision stays float32.
        adapters: What is known of the adapters that it gets, which may say how its noise schedule
            is meant.

    Raises:
        ModelNotFoundError: If there is no such model.
        UnsupportedModelError: If it is not Stable Diffusion 1, 2 or XL.
        ValueError: If its files are incomplete or do not belong together.
    """
    base = BaseModel.of(model)
    with quiet_libraries(), _opened(base) as (file, source):
        components = _load(file, source, base, dtype, adapters)
    if components.vae.dtype != dtype:
        vae = components.vae
        for part in (vae.encoder, vae.decoder, vae.quant_conv, vae.post_quant_conv):
            if part is not None:
                part.register_forward_pre_hook(cast_to_weight)
    set_tiles(components.vae, base.tile_size)
    for module in components.modules().values():
        module.eval().requires_grad_(False)
    add_tokens(components, read_tokens(source))
    return components


def load_empty(model: AnyModel) -> Components:
    """Load a model's modules, tokenizers and schedule without weights, to check settings with.

    Raises:
        ModelNotFoundError, UnsupportedModelError, ValueError: As `load_components`.
    """
    base = BaseModel.of(model)
    with quiet_libraries(), _opened(base) as (file, source):
        return _load(file, source, base, None, ())


def set_tiles(vae: Any, size: int) -> None:
    """Have an autoencoder take larger images in tiles of so many pixels a side; 0: whole."""
    vae.use_tiling = size > 0
    vae.tile_sample_min_size = size
    vae.tile_latent_min_size = size // 2 ** (len(vae.config.block_out_channels) - 1)


@contextlib.contextmanager
def _opened(base: BaseModel) -> Iterator[tuple[CheckpointFile | None, Path]]:
    """The single file that a model is, or None, and where the model is."""
    path = Path(base.path).expanduser()
    if path.suffix in PICKLED:
        raise ModelNotFoundError(
            f"{path} is a pickle, which can run code when opened; convert it to .safetensors first"
        )
    if path.suffix != ".safetensors" or not path.is_file():
        yield None, resolve_folder(base)
        return
    with contextlib.ExitStack() as stack:
        with plain_errors(str(path)):
            reader = stack.enter_context(TensorReader(path))
        yield CheckpointFile(reader), path


def check_components(model: AnyModel) -> dict[str, str]:
    """Check whether a model is whole, without reading a weight.

    Of each module, the tensors' names and shapes are compared with its configuration, and the sizes
    of its files with what their headers say; tokenizers are loaded.

    Returns:
        By component what is wrong with it; empty where nothing is.

    Raises:
        ModelNotFoundError, UnsupportedModelError, ValueError: If it cannot be told what its
            components should be, as `load_components`.
    """
    base, problems = BaseModel.of(model), dict[str, str]()
    with quiet_libraries(), _opened(base) as (file, source):
        plan = _planned(file, source, base, ())
        names, modules = plan.family.text_encoder_names, dict[str, Any]()
        encoders = dict(zip(plan.family.tokenizer_names, names, strict=True))
        for name in ("unet", "vae", *names, *encoders):
            try:
                if name not in encoders:
                    modules[name] = _module_of(file, plan, name, None, base)
                elif encoder := modules.get(encoders[name]):
                    check_vocabulary(_load_tokenizer(plan.folder / name), encoder, name)
                problems[name] = ""
            except (ValueError, OSError) as error:
                problems[name] = str(error)
    return problems


class _Plan(NamedTuple):
    """The form that a model is made in.

    Attributes:
        family: Its family.
        folder: Of its configuration.
        schedule: How its noise schedule is meant.
        stated: As in `Components`.
    """

    family: Family
    folder: Path
    schedule: NoiseSchedule
    stated: tuple[Sequence[ScheduleInfo], Sequence[ScheduleInfo]]


def _planned(
    file: CheckpointFile | None, source: Path, base: BaseModel, adapters: Sequence[AdapterMetadata]
) -> _Plan:
    given: Path | None = source
    if file is not None:
        given = None if base.model_config is None else resolve_folder(base.model_config)
    family = detect_folder_family(source) if file is None else file.family
    configured = [by_scheduler(read_json(given / _SCHEDULER))] if given else usual_of(family)
    own = configured if file is None else file.statements()
    usual = [] if file is None else configured
    schedule = choose_schedule(str(base.path), statements_on(base, own, usual, adapters))
    require_prediction(source.name, family, schedule)
    folder = given or released_folder(family, schedule.prediction_type)
    return _Plan(family, folder, schedule, (own, usual))


def _module_of(
    file: CheckpointFile | None, plan: _Plan, part: str, dtype: torch.dtype | None, base: BaseModel
) -> Any:
    """A module of a model; without a dtype it stays empty, and its weights are not read."""
    folder, kind = plan.folder, module_classes(plan.family)[part]
    if part == "vae" and dtype is not None:
        dtype = _vae_dtype(folder / part, dtype, plan.family)
    if file is not None:
        return _module_of_file(file, folder, part, kind, dtype, base)
    return _module_of_folder(folder / part, part, kind, dtype, base)


def _load(
    file: CheckpointFile | None,
    source: Path,
    base: BaseModel,
    dtype: torch.dtype | None,
    adapters: Sequence[AdapterMetadata],
) -> Components:
    """Load a model from a single file, or from a folder; without a dtype its modules stay empty.

    Raises:
        UnsupportedModelError: If it is not a model of a supported family.
        ValueError: If it is damaged or does not fit its configuration.
    """
    plan = _planned(file, source, base, adapters)
    family, folder, load = plan.family, plan.folder, partial(_module_of, file, plan)
    index, own_vae = read_json(folder / "model_index.json"), partial(load_vae, base.vae or "")
    return Components(
        family=family,
        unet=load("unet", dtype, base),
        vae=load("vae", dtype, base)
        if base.vae is None or dtype is None
        else own_vae(dtype=dtype, family=family),
        text_encoders=tuple(load(part, dtype, base) for part in family.text_encoder_names),
        tokenizers=tuple(_load_tokenizer(folder / part) for part in family.tokenizer_names),
        name=str(base.path),
        asked=base,
        zeros_for_empty_prompt=family.zeros_for_empty_prompt(index),
        source=str(source),
        stated=plan.stated,
        **_schedulers(read_json(folder / _SCHEDULER), plan.schedule),
        **_reading(source),
    )


def _vae_dtype(folder: Path, dtype: torch.dtype, family: Family | None) -> torch.dtype:
    """The dtype of an autoencoder: float32 where it says that it overflows in half precision."""
    overflows = family is not None and family.vae_overflows(read_json(folder / "config.json"))
    return torch.float32 if overflows else dtype


def _module_of_folder(
    folder: Path, part: str, kind: str, dtype: torch.dtype | None, base: BaseModel
) -> Any:
    """A module of a component's folder.

    Raises:
        ValueError: If the files are missing, damaged or incomplete.
    """
    variant = base.variant
    hint = f"it has no {variant!r} variant, or it is damaged" if variant else "it is damaged"
    with plain_errors(str(folder), f"{hint}; download the model again"):
        module, component = empty_module(folder, kind), Component(part, folder, variant)
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
    """A module of a single file, made as a folder configures it.

    Raises:
        ValueError: If a tensor is missing, or has another shape than the configuration says.
    """
    with plain_errors(str(folder)):
        module = empty_module(folder / part, kind)
    with plain_errors(str(file.path)):
        problem = _fill(module, part, file, dtype, base)
    if problem:
        whose = f"a released {file.family.title}" if is_released(folder) else folder.name
        # Of the model that it was made from, which has its shape.
        name = base_name(file.metadata)
        name = f"{EMBEDDED_PREFIX}{name}" if name in embedded.MODELS else name
        hint = f", such as its base model's: {name}" if name else ""
        raise ValueError(
            f"{file.path} is not shaped as {whose}: {problem}; give a Diffusers folder of its "
            f"shape as --model_config{hint}"
        )
    return module


def _fill(
    module: Any,
    part: str,
    weights: CheckpointFile | Component,
    dtype: torch.dtype | None,
    base: BaseModel,
) -> str:
    """Fill a module with its weights; returns what is wrong with them, empty if nothing is.

    Without a dtype they are only compared with it.

    Raises:
        UnsupportedModelError: If they are quantised already.
    """
    require_unquantised(weights.reader.path, weights.reader.specs)
    shapes = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    wanted = {key: canonical(part, key) for key in shapes if not key.endswith(BUFFERS)}
    if lacking := [name for name in wanted.values() if name not in weights.specs]:
        return f"it lacks {listing(lacking, 3)}"
    if other := [n for key, n in wanted.items() if weights.specs[n].shape != shapes[key]]:
        return f"{listing(other, 3)} differ"
    if dtype is None:
        return ""
    quantised = () if part == "vae" else quantised_layers(base)
    state: dict[str, torch.Tensor] = {}
    for key, name in wanted.items():
        owner, _, own = key.rpartition(".")
        if own == "weight" and isinstance(module.get_submodule(owner), quantised):
            rows = partial(weights.rows, name)
            state[key] = quantise_rows(rows, shapes[key], dtype, base.quantize)
        else:
            state[key] = _own(weights[name].to(dtype))
    module.load_state_dict(state, strict=False, assign=True)
    return ""


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that is all of its memory: of one that several are parts of, none keeps the rest."""
    is_part = tensor.untyped_storage().nbytes() > tensor.nbytes
    return tensor.clone(memory_format=torch.contiguous_format) if is_part else tensor.contiguous()


def quantised_layers(base: BaseModel) -> tuple[type[nn.Module], ...]:
    """Return the kinds of layers whose weights a base model is to have in fewer bits."""
    if base.quantize == "none":
        return ()
    return (nn.Linear, nn.Conv2d) if base.quantize_convolutions else (nn.Linear,)


class BaseCache:
    """Loads models, and keeps the last one for whoever asks for the same again.

    Each gets modules of its own over the same weights, which nobody may write to.
    """

    def __init__(self) -> None:
        self._asked: object = None
        self._base: Components | None = None

    def __call__(self, model: AnyModel, **options: Any) -> Components:
        """`load_components`, with the same arguments."""
        asked = (BaseModel.of(model), options)
        if self._base is None or asked != self._asked:
            self._base = None  # There need not be room for two.
            self._base, self._asked = load_components(model, **options), asked
        return self._base.sharing_weights()


def _reading(source: Path) -> dict[str, Any]:
    """Return the prompt settings in the files of a model that was trained here."""
    files = [source] if source.is_file() else sorted((source / "unet").glob("*.safetensors"))
    return dict(stated_reading(read_header(files[0]).metadata, OWN)) if files else {}


def load_vae(
    name: str | Path, *, dtype: torch.dtype = torch.float32, family: Family | None = None
) -> Any:
    """Load an autoencoder by itself.

    Args:
        name: As of `vae_folder`, or a ``.safetensors`` file in the original layout.
        dtype: Of its weights, unless the family's autoencoders overflow in half precision and
            this one does not say that it is safe (``force_upcast`` false).
        family: The model's family.

    Raises:
        ModelNotFoundError: If there is no such autoencoder.
    """
    from diffusers import AutoencoderKL

    path = Path(name).expanduser()
    if path.suffix == ".safetensors" and path.is_file():
        wide = family is not None and family.vae_overflows({})
        with plain_errors(str(name)):
            return AutoencoderKL.from_single_file(
                str(path),
                config=str(released_folder(family or DEFAULT_FAMILY, EPSILON)),
                subfolder="vae",
                torch_dtype=torch.float32 if wide else dtype,
                local_files_only=True,
            )
    folder = vae_folder(name)
    return _module_of_folder(
        folder, "vae", "AutoencoderKL", _vae_dtype(folder, dtype, family), BaseModel(folder)
    )


def reschedule(components: Components, adapters: Sequence[AdapterMetadata]) -> Components:
    """The same modules, with the noise schedule that they are loaded with for these adapters.

    Raises:
        ValueError: If it cannot be.
    """
    base = components.asked or BaseModel(components.name)
    said = statements_on(base, *components.stated, adapters)
    schedule = choose_schedule(components.name, said)
    return dataclasses.replace(components, **_schedulers(components.scheduler_config, schedule))


def _schedulers(config: Mapping[str, Any], schedule: NoiseSchedule) -> dict[str, Any]:
    """Return the part of `Components` that a scheduler configuration and noise schedule give."""
    config = {**config, **schedule.settings}
    return {
        "scheduler": training_scheduler(config),
        "scheduler_config": config,
        "schedule": schedule,
    }


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


def _load_tokenizer(folder: Path) -> Any:
    """Load a CLIP tokenizer from its folder.

    Raises:
        ValueError: If it is missing.
    """
    from transformers import CLIPTokenizer

    with plain_errors(str(folder)):
        return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)


DETAIL_LIMIT = 300
"""Characters of a library's error in a message."""


@contextlib.contextmanager
def plain_errors(name: str, hint: str = "it is missing or damaged") -> Iterator[None]:
    """Convert a library's many loading errors to one plain line."""
    from safetensors import SafetensorError

    try:
        yield
    except UnsupportedModelError:
        raise
    except ImportError as error:
        text = " ".join(str(error).split())
        raise ValueError(f"{name} needs a package that is missing: {text}") from error
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        # Transformers lists all models that it knows in one line.
        detail = "".join(str(error).strip().splitlines()[:1])
        detail = detail if len(detail) <= DETAIL_LIMIT else f"{detail[:DETAIL_LIMIT]}..."
        raise ValueError(f"{name} could not be loaded ({hint}): {detail}") from error


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Switch the libraries' loading bars, warnings and errors off for a while.

    What a user can act on among them, such as a prompt that is cut, this package says itself;
    what fails is raised besides being logged.
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
    # Diffusers imports it wherever it is installed, and it then warns of kernels for CPUs.
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
