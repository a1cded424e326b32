"""Location of models (local paths, embedded models, the hub), and information before loading.

`model_info` reads only configurations and headers of local files, and does not access the hub.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

from dora_diffusion.config.base import EMBEDDED_PREFIX, AnyModel, BaseModel
from dora_diffusion.config.families import (
    DEFAULT_FAMILY,
    FAMILIES,
    WEIGHT_COMPONENTS,
    Family,
    UnsupportedModelError,
    detect_folder_family,
)
from dora_diffusion.config.images import PIXELS, SAMPLES
from dora_diffusion.config.pipeline_index import INDEXES, index_file, is_pipeline
from dora_diffusion.config.schedulers import few_steps_of
from dora_diffusion.formats.checkpoint.schedule import choose_schedule, stated_by_file
from dora_diffusion.formats.files.runs import pipeline_in
from dora_diffusion.models import embedded

_HUB_FILE = re.compile(r"(?P<id>(?P<owner>\w[\w.-]*)/[\w.-]+)/(?P<file>[\w./-]+\.safetensors)")
HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
_CLIENTS = ("httpx", "httpx2", "httpcore", "requests", "urllib3")


class ModelNotFoundError(ValueError):
    """Error for a model that could not be found or downloaded."""


def is_embedded(name: str) -> bool:
    """Return whether a name is that of an embedded model."""
    return name.startswith(EMBEDDED_PREFIX)


def resolve_folder(model: AnyModel, *, local_only: bool = False) -> Path:
    """Find the Diffusers folder of a model.

    Args:
        model: A local folder, ``embedded:NAME`` for a model inside this package, or a hub id. A
            model of the hub is downloaded once to the cache of the hub library, which respects
            ``HF_HOME``, ``HF_HUB_OFFLINE`` and ``HF_TOKEN``. Only safetensors weights and
            configurations are downloaded.
        local_only: Whether to search for a hub id only in the cache.

    Raises:
        ModelNotFoundError: If the model does not exist.
    """
    base = BaseModel.of(model)
    text, variant = os.path.expanduser(base.path), base.variant
    if text.startswith(EMBEDDED_PREFIX):
        name = text.removeprefix(EMBEDDED_PREFIX)
        try:
            return _checked_folder(embedded.model_folder(name))
        except ValueError as error:
            raise ModelNotFoundError(f"no embedded model is called {name!r}: {error}") from error
    if Path(text).is_dir():
        return _checked_folder(Path(text))
    if looks_local(text):
        raise ModelNotFoundError(
            f"{text} does not exist; give a diffusers folder, a .safetensors checkpoint, "
            "a hub id such as stable-diffusion-v1-5/stable-diffusion-v1-5, or embedded:NAME"
        )
    allow = [*INDEXES, "scheduler/*.json", "*tokenizer*/*"]
    weights = f"*.{variant}*.safetensors" if variant else "*.safetensors"
    allow += [f"{folder}/{file}" for folder in WEIGHT_COMPONENTS for file in ("*.json", weights)]
    ignore = [] if variant else ["*.fp16.*", "*.fp16-*", "*non_ema*", "*.bf16.*"]
    return _checked_folder(fetch_snapshot(text, base.revision, allow, ignore, local_only))


def vae_folder(name: str | PathLike[str]) -> Path:
    """Find the folder of an autoencoder.

    Args:
        name: Folder or hub id of an autoencoder or a pipeline, or ``embedded:NAME``.

    Raises:
        ModelNotFoundError: If the autoencoder does not exist.
    """
    path = Path(name).expanduser()
    if is_embedded(str(name)):
        path = resolve_folder(name)
    elif not path.is_dir():
        if looks_local(str(name)):
            raise ModelNotFoundError(f"the VAE {name} does not exist; give a folder or a hub id")
        allow = ["config.json", "*.safetensors", "vae/config.json", "vae/*.safetensors"]
        path = fetch_snapshot(str(name), None, allow, ["*.fp16.*"])
    return path / "vae" if (path / "vae").is_dir() else path


def resolve_adapter(name: str | Path) -> Path:
    """Find an adapter by its file, folder or hub id. An adapter of the hub is downloaded once.

    Args:
        name: The path, the hub id, or ``OWNER/REPOSITORY/FILE.safetensors`` on the hub.

    Raises:
        FileNotFoundError, ModelNotFoundError: If the adapter does not exist.
        AdapterFormatError: If a folder contains no adapter or several.
    """
    from dora_diffusion.formats.adapter.stored import find_adapter  # It imports torch.

    text = os.path.expanduser(name)
    file = _HUB_FILE.fullmatch(text)
    if file and not Path(text).exists() and not Path(file["owner"]).exists():
        return find_adapter(fetch_snapshot(file["id"], None, [file["file"]], []) / file["file"])
    if Path(text).exists() or looks_local(text):
        return find_adapter(text)
    weights = [f"{folder}/{file}" for folder in WEIGHT_COMPONENTS for file in ("model*", "diff*")]
    return find_adapter(fetch_snapshot(text, None, ["*.safetensors", "*.json"], weights))


def fetch_snapshot(
    name: str, revision: str | None, allow: list[str], ignore: list[str], local_only: bool = False
) -> Path:
    """Download the allowed files of a hub id, unless they are in the cache.

    Args:
        name: Hub id.
        revision: Branch, tag or commit; None: the main branch.
        allow: Patterns of the files.
        ignore: Patterns of files to exclude.
        local_only: Whether to search only in the cache.

    Raises:
        ModelNotFoundError: If the files cannot be downloaded.
    """
    import huggingface_hub
    from huggingface_hub import errors

    # Each error of the hub library has one fix, which the user sees instead of a traceback.
    remedies: list[tuple[type[Exception], str]] = [
        (errors.GatedRepoError, "it is gated: accept its terms on its page, then set HF_TOKEN"),
        (errors.RepositoryNotFoundError, "the hub has no such model (private ones need HF_TOKEN)"),
        (errors.RevisionNotFoundError, f"the hub's model has no revision {revision!r}"),
        (errors.HFValidationError, "it is neither a local folder nor a valid hub id"),
    ]
    try:
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=allow, ignore_patterns=ignore,
            local_files_only=local_only,
        )  # fmt: skip
        return Path(folder)
    except Exception as error:
        for kind, remedy in remedies:
            if isinstance(error, kind):
                raise ModelNotFoundError(f"{name} cannot be used: {remedy}") from error
        if not isinstance(error, (OSError, errors.HfHubHTTPError)) and not is_network_error(error):
            raise
        problem = "the hub could not be reached; check the network"
        if is_offline():
            problem = "HF_HUB_OFFLINE is set; unset it to download the model"
        raise ModelNotFoundError(
            f"{name} is not a local folder, not in the hub's cache, and {problem}, give a local "
            "folder, or use an embedded model (embedded:NAME)"
        ) from error


def is_network_error(error: Exception) -> bool:
    """Return whether an HTTP client raised an error. The client depends on the hub library."""
    return type(error).__module__.split(".")[0] in _CLIENTS


def is_offline() -> bool:
    """Return whether the hub library is in offline mode (``HF_HUB_OFFLINE``)."""
    from huggingface_hub import constants

    is_set = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    return bool(constants.HF_HUB_OFFLINE) or is_set


def looks_local(name: str) -> bool:
    """Return whether a name can only be a path, not a hub id."""
    return not HUB_ID.match(name) or name.startswith((".", "~")) or name.endswith(".safetensors")


def _checked_folder(folder: Path) -> Path:
    """Return the pipeline folder in a folder, or raise `ModelNotFoundError`."""
    if pipeline := pipeline_in(folder):
        return pipeline
    raise ModelNotFoundError(
        f"{folder} is not a diffusers pipeline, since it has no model_index.json; give the top "
        "folder of a pipeline, or a .safetensors checkpoint file"
    )


@dataclass(frozen=True)
class ModelInfo:
    """Properties of a model that determine suitable settings.

    Attributes:
        family: Name of the `Family`; empty if the model is not on this machine.
        resolution: Default training resolution in pixels.
        has_released_shape: Whether the model is as large as the released models of its family.
        index: Content of its index; empty for a single file.
        scheduler: Configuration of its scheduler; likewise.
        size_step: Number of pixels of which sides of images are multiples.
    """

    family: str
    resolution: int
    has_released_shape: bool
    index: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    size_step: int = PIXELS


UNKNOWN = ModelInfo("", DEFAULT_FAMILY.default_resolution, False)


def model_info(name: str) -> ModelInfo:
    """Return the properties of a model, from its files if they are on this machine.

    Raises:
        ModelNotFoundError, UnsupportedModelError: If the files are not of a supported model.
    """
    try:
        path = Path(name).expanduser()
        if path.is_file():
            return _file_info(path, path.stat().st_mtime_ns)
        folder = folder_of(name)
        if folder is not None:
            return _folder_info(folder, index_file(folder).stat().st_mtime_ns)
    except (ModelNotFoundError, UnsupportedModelError):
        raise
    except (AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError) as error:
        raise UnsupportedModelError(f"{name} cannot be read as a model: {error}") from error
    released = (_released_info(f) for f in FAMILIES.values() if f.released_id == name)
    return next(released, UNKNOWN)


def family_of(base: AnyModel) -> Family | None:
    """Return the family of a model; None if the model is not on this machine.

    Raises:
        ModelNotFoundError, UnsupportedModelError: As `model_info`.
    """
    return _family(BaseModel.of(base), model_info)


def known_family(base: AnyModel) -> Family | None:
    """Return the family of a model; None if it is not known before the model is loaded."""
    return _family(BaseModel.of(base), known_info)


def _family(base: BaseModel, info_of: Callable[[str], ModelInfo]) -> Family | None:
    name = str(base.path)
    info = info_of(name)
    if (family := FAMILIES.get(info.family)) is None:
        return None
    if not info.index and base.model_config:
        info = known_info(str(base.model_config))
    return family.of_model(name, info.index, info.scheduler, base.distilled)


def sampling_values(base: AnyModel) -> dict[str, Any]:
    """Return the settings of a run's samples on a model: those of a distilled one, or its family's.

    Empty if nothing is known before the model is loaded.
    """
    base = BaseModel.of(base)
    family, name = known_family(base), str(base.path)
    if base.distilled is not False and (few := few_steps_of(name, known_info(name).scheduler)):
        return {of_run: getattr(few, of_image) for of_image, of_run in SAMPLES.items()}
    return {} if family is None else dict(family.defaults)


def known_info(name: str) -> ModelInfo:
    """Return the properties of a model; `UNKNOWN` if they are not known before it is loaded."""
    try:
        return model_info(name)
    except ValueError:
        return UNKNOWN


def _released_info(family: Family) -> ModelInfo:
    step = PIXELS * family.patch
    return ModelInfo(family.name, family.default_resolution, True, size_step=step)


def folder_of(name: str) -> Path | None:
    """Return the folder of a model; None if the model is not on this machine."""
    if is_embedded(name) or Path(name).expanduser().is_dir():
        return resolve_folder(name)
    return cached_snapshot(name)


@functools.lru_cache(maxsize=256)
def _folder_info(folder: Path, modified: int) -> ModelInfo:
    family = detect_folder_family(folder)
    names = (f"{family.denoiser}/config.json", "vae/config.json", "scheduler/scheduler_config.json")
    files = [*(folder / name for name in names), index_file(folder)]
    config, vae, scheduler, index = (
        json.loads(f.read_text("utf-8")) if f.is_file() else {} for f in files
    )
    # As in `Components.default_resolution`: a UNet states its side in latents, a VAE in pixels.
    factor = 2 ** (len(vae.get("block_out_channels", [0] * 4)) - 1)
    stated, pixels = (config, factor) if family.has_unet else (vae, 1)
    size = stated.get("sample_size")
    return ModelInfo(
        family.name,
        size * pixels if isinstance(size, int) else family.default_resolution,
        family.has_released_width(config),
        index,
        scheduler,
        factor * family.patch,
    )


@functools.lru_cache(maxsize=256)
def _file_info(path: Path, modified: int) -> ModelInfo:
    from dora_diffusion.formats.checkpoint.models import detect_checkpoint_family
    from dora_diffusion.formats.files.stream import read_header
    from dora_diffusion.models.configuration import released_config

    header = read_header(path)
    family = detect_checkpoint_family(header.specs, str(path))
    if not family.configuration:
        return _released_info(family)
    schedule = choose_schedule(path.name, stated_by_file(header.metadata, header.specs))
    side = released_config(family, schedule.prediction_type)["unet"]["sample_size"]
    return replace(_released_info(family), resolution=8 * side)


def hub_cache() -> Path:
    """Return the cache folder of the hub library."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def cached_models() -> list[str]:
    """Return the ids of all models in the hub cache, including incomplete ones."""
    folders = sorted(hub_cache().glob("models--*"))
    return [folder.name.removeprefix("models--").replace("--", "/") for folder in folders]


def cached_snapshot(name: str) -> Path | None:
    """Return the newest snapshot of a hub id in the cache that contains a pipeline, or None."""
    folder = hub_cache() / f"models--{name.replace('/', '--')}" / "snapshots"
    whole = [path for path in folder.glob("*") if is_pipeline(path)]
    return max(whole, key=lambda path: path.stat().st_mtime, default=None)
