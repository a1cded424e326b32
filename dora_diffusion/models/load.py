"""Load a model's components from a folder, a hub id, a single file or an embedded model.

Weights are read from safetensors only: no pickles, no remote code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dora_diffusion.config.base import AnyModel, BaseModel
from dora_diffusion.config.families import (
    USUAL,
    Family,
    UnsupportedModelError,
    detect_folder_family,
)
from dora_diffusion.config.wording import listing
from dora_diffusion.formats.adapter.embeddings import read_tokens
from dora_diffusion.formats.adapter.metadata import OWN, AdapterMetadata, stated_reading
from dora_diffusion.formats.checkpoint.models import (
    CheckpointFile,
    base_name,
    by_scheduler,
    detect_checkpoint_family,
    read_json,
)
from dora_diffusion.formats.checkpoint.schedule import (
    EPSILON,
    NoiseSchedule,
    choose_schedule,
    stated_by_file,
    statements_on,
    usual_of,
)
from dora_diffusion.formats.files.stream import PICKLED, read_header
from dora_diffusion.formats.names.modules import BUFFERS, canonical
from dora_diffusion.models import embedded
from dora_diffusion.models.components import Components, cast_to_weight, fingerprint
from dora_diffusion.models.configuration import (
    empty_module,
    is_released,
    released_folder,
    require_prediction,
)
from dora_diffusion.models.locate import (
    EMBEDDED_PREFIX,
    ModelNotFoundError,
    fetch_snapshot,
    looks_local,
    resolve_folder,
)
from dora_diffusion.models.weights import load_module, plain_errors, quiet_libraries
from dora_diffusion.models.words import add_tokens

__all__ = [
    "BaseCache",
    "Components",
    "ModelNotFoundError",
    "fingerprint",
    "load_components",
    "load_vae",
    "resolve_folder",
]


def load_components(
    model: AnyModel,
    *,
    dtype: torch.dtype = torch.float32,
    adapters: Sequence[AdapterMetadata] = (),
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
    path = Path(base.path).expanduser()
    if path.suffix in PICKLED:
        raise ModelNotFoundError(
            f"{path} is a pickle, which can run code when opened; convert it to .safetensors first"
        )
    with quiet_libraries():
        if path.suffix == ".safetensors" and path.is_file():
            components = _load_single_file(path, base, dtype, adapters)
        else:
            components = _load_folder(resolve_folder(base), base, dtype, adapters)
        vae = components.vae
        if base.vae is not None:
            vae = load_vae(base.vae, dtype=dtype, family=components.family)
    components = dataclasses.replace(
        components, name=str(base.path), asked=base, vae=vae, **_reading(Path(components.source))
    )
    _bridge_dtypes(components.vae, dtype)
    for module in components.modules().values():
        module.eval().requires_grad_(False)
    add_tokens(components, read_tokens(Path(components.source)))
    return components


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
        name: A folder of the autoencoder or of a whole pipeline, a hub id of either, or a
            ``.safetensors`` file in the original layout.
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
                config=str(released_folder(family or USUAL, EPSILON)),
                subfolder="vae",
                torch_dtype=torch.float32 if wide else dtype,
                local_files_only=True,
            )
    if not path.is_dir():
        if looks_local(str(name)):
            raise ModelNotFoundError(f"the VAE {name} does not exist; give a folder or a hub id")
        allow = ["config.json", "*.safetensors", "vae/config.json", "vae/*.safetensors"]
        path = fetch_snapshot(str(name), None, allow, ["*.fp16.*"])
    folder = path / "vae" if (path / "vae").is_dir() else path
    return _load_vae_folder(folder, dtype, None, family)


def _load_folder(
    folder: Path, base: BaseModel, dtype: torch.dtype, adapters: Sequence[AdapterMetadata]
) -> Components:
    """Load every component of a diffusers folder."""
    from diffusers import UNet2DConditionModel

    family = detect_folder_family(folder)
    index = read_json(folder / "model_index.json")
    scheduler_config = read_json(folder / "scheduler" / "scheduler_config.json")
    stated = ([by_scheduler(scheduler_config)], ())
    schedule = choose_schedule(str(base.path), statements_on(base, *stated, adapters))
    variant = base.variant
    return Components(
        family=family,
        unet=load_module(UNet2DConditionModel, folder / "unet", dtype, variant),
        vae=_load_vae_folder(folder / "vae", dtype, variant, family),
        text_encoders=_load_text_encoders(family, folder, dtype, variant),
        tokenizers=tuple(_load_tokenizer(folder / part) for part in family.tokenizer_names),
        name=str(folder),
        zeros_for_empty_prompt=family.zeros_for_empty_prompt(index),
        source=str(folder),
        stated=stated,
        **_schedulers(scheduler_config, schedule),
    )


def _load_single_file(
    path: Path, base: BaseModel, dtype: torch.dtype, adapters: Sequence[AdapterMetadata]
) -> Components:
    """Load the components of a single-file checkpoint.

    Args:
        path: The ``.safetensors`` file.
        base: What it was asked for as.
        dtype: Of every module; an autoencoder that may overflow in it stays float32.
        adapters: What is known of the adapters that it gets.

    Raises:
        UnsupportedModelError: If it is not a checkpoint of a supported family.
        ValueError: If it is damaged or does not fit its configuration.
    """
    with plain_errors(str(path)):
        header = read_header(path)
    family = detect_checkpoint_family(header.specs, str(path))
    given = None if base.model_config is None else resolve_folder(base.model_config)
    usual = usual_of(family)
    if given is not None:
        usual = [by_scheduler(read_json(given / "scheduler" / "scheduler_config.json"))]
    stated = (stated_by_file(header.metadata, header.specs), usual)
    schedule = choose_schedule(path.name, statements_on(base, *stated, adapters))
    require_prediction(path.name, family, schedule)
    folder = given or released_folder(family, schedule.prediction_type)
    with CheckpointFile.open(path) as file:
        modules = {
            part: _module_of_file(file, folder, part, dtype)
            for part in ("unet", "vae", *family.text_encoder_names)
        }
    scheduler_config = read_json(folder / "scheduler" / "scheduler_config.json")
    return Components(
        family=family,
        unet=modules["unet"],
        vae=modules["vae"],
        text_encoders=tuple(modules[part] for part in family.text_encoder_names),
        tokenizers=tuple(_load_tokenizer(folder / part) for part in family.tokenizer_names),
        name=str(path),
        zeros_for_empty_prompt=family.zeros_for_empty_prompt(
            read_json(folder / "model_index.json")
        ),
        source=str(path),
        stated=stated,
        **_schedulers(scheduler_config, schedule),
    )


def _module_of_file(file: CheckpointFile, folder: Path, part: str, dtype: torch.dtype) -> Any:
    """A module of a single file, made as a folder configures it.

    Raises:
        ValueError: If a tensor is missing, or has another shape than the configuration says.
    """
    config = read_json(folder / part / "config.json")
    if part == "vae" and file.family.vae_overflows(config):
        dtype = torch.float32
    with plain_errors(str(folder)):
        module = empty_module(folder, part)
    wanted = {key: canonical(part, key) for key in module.state_dict() if not key.endswith(BUFFERS)}
    shapes = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    lacking = [name for name in wanted.values() if name not in file.specs]
    has = {name: shapes[key] for key, name in wanted.items() if name in file.specs}
    other = [name for name, shape in has.items() if file.specs[name].shape != shape]
    if lacking or other:
        lacks = f"it lacks {listing(lacking, 3)}" if lacking else f"{listing(other, 3)} differ"
        whose = f"a released {file.family.title}" if is_released(folder) else folder.name
        raise ValueError(
            f"{file.path} is not shaped as {whose}: {lacks}; give a Diffusers folder of its shape "
            f"as --model_config{_base_of(file)}"
        )
    with plain_errors(str(file.path)):
        # A tensor that is its own memory: the file is closed, and parts of one are not kept whole.
        state = {
            key: file[name].to(dtype, copy=True, memory_format=torch.contiguous_format)
            for key, name in wanted.items()
        }
    module.load_state_dict(state, strict=False, assign=True)
    return module


def _base_of(file: CheckpointFile) -> str:
    """A hint at the model that a file was made from, which has its shape."""
    name = base_name(file.metadata)
    if name in embedded.MODELS:
        name = f"{EMBEDDED_PREFIX}{name}"
    return f", such as its base model's: {name}" if name else ""


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


def _load_text_encoders(
    family: Family, folder: Path, dtype: torch.dtype, variant: str | None
) -> tuple[Any, ...]:
    """Load the family's text encoders."""
    import transformers

    return tuple(
        load_module(getattr(transformers, kind), folder / part, dtype, variant)
        for kind, part in zip(family.text_encoder_classes, family.text_encoder_names, strict=True)
    )


def _load_vae_folder(
    folder: Path, dtype: torch.dtype, variant: str | None, family: Family | None
) -> Any:
    """Load an autoencoder, in float32 where it says that it overflows in half precision."""
    from diffusers import AutoencoderKL

    if family is not None and family.vae_overflows(read_json(folder / "config.json")):
        dtype = torch.float32
    return load_module(AutoencoderKL, folder, dtype, variant)


def _bridge_dtypes(vae: Any, dtype: torch.dtype) -> None:
    """Make an autoencoder of another dtype than the model's accept inputs in either."""
    if vae.dtype != dtype:
        for part in (vae.encoder, vae.decoder, vae.quant_conv, vae.post_quant_conv):
            if part is not None:
                part.register_forward_pre_hook(cast_to_weight)
