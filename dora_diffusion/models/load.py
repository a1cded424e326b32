"""Load a model's components from a folder, a hub id, a single file or an embedded model.

Weights are read from safetensors only: no pickles, no remote code.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dora_diffusion.models.components import SAMPLERS, Components, cast_to_weight, fingerprint
from dora_diffusion.models.family import (
    Family,
    UnsupportedModelError,
    detect_checkpoint_family,
    detect_folder_family,
)
from dora_diffusion.models.locate import (
    ModelNotFoundError,
    fetch_snapshot,
    is_offline,
    looks_local,
    resolve_folder,
)

__all__ = [
    "SAMPLERS",
    "Components",
    "ModelNotFoundError",
    "UnsupportedModelError",
    "fingerprint",
    "load_components",
    "load_vae",
    "resolve_folder",
]


def load_components(
    name: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    vae: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    config: str | Path | None = None,
) -> Components:
    """Load a model, frozen and in evaluation mode, on the CPU.

    Args:
        name: A diffusers folder, a hub id, ``embedded:NAME``, or a single-file ``.safetensors``
            checkpoint.
        revision: Branch, tag or commit of a hub id.
        variant: Weight variant of a folder or hub id, such as "fp16".
        vae: Another autoencoder: a folder, a hub id, or a ``.safetensors`` file.
        dtype: Of every module; an autoencoder that overflows in half precision stays float32.
        config: For a single file: a diffusers folder of the same architecture that gives the
            configuration and the tokenizers. Without it diffusers asks the hub for the
            released model's.

    Raises:
        ModelNotFoundError: If there is no such model.
        UnsupportedModelError: If it is not Stable Diffusion 1, 2 or XL.
        ValueError: If its files are incomplete or do not belong together.
    """
    path = Path(name).expanduser()
    if path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise ModelNotFoundError(
            f"{path} is a pickle, which can run code when opened; convert it to .safetensors first"
        )
    with _quiet_progress():
        if path.suffix == ".safetensors" and path.is_file():
            components = _load_file(path, dtype, config)
        else:
            folder = resolve_folder(str(name), revision=revision, variant=variant)
            components = _load_folder(folder, dtype, variant)
        if vae is not None:
            components.vae = load_vae(vae, dtype=dtype, family=components.family)
    _bridge_dtypes(components.vae, dtype)
    components.name = str(name)
    components.__post_init__()
    for module in components.modules().values():
        module.eval().requires_grad_(False)
    return components


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
        wide = family is not None and family.vae_wants_float32
        with _plain_errors(str(name)):
            return AutoencoderKL.from_single_file(
                str(path),
                torch_dtype=torch.float32 if wide else dtype,
                local_files_only=is_offline(),
            )
    if not path.is_dir():
        if looks_local(str(name)):
            raise ModelNotFoundError(f"the VAE {name} does not exist; give a folder or a hub id")
        allow = ["config.json", "*.safetensors", "vae/config.json", "vae/*.safetensors"]
        path = fetch_snapshot(str(name), None, allow, ["*.fp16.*"])
    folder = path / "vae" if (path / "vae").is_dir() else path
    return _load_vae_folder(folder, dtype, None, family)


def _load_folder(folder: Path, dtype: torch.dtype, variant: str | None) -> Components:
    """Load every component of a diffusers folder."""
    from diffusers import UNet2DConditionModel

    family = detect_folder_family(folder)
    index = _read_json(folder / "model_index.json")
    scheduler_config = _read_json(folder / "scheduler" / "scheduler_config.json")
    return Components(
        family=family,
        unet=_load_module(UNet2DConditionModel, folder / "unet", dtype, variant),
        vae=_load_vae_folder(folder / "vae", dtype, variant, family),
        text_encoders=_load_text_encoders(family, folder, dtype, variant),
        tokenizers=tuple(_load_tokenizer(folder / part) for part in family.tokenizer_names),
        scheduler=_training_scheduler(scheduler_config),
        name=str(folder),
        scheduler_config=scheduler_config,
        zeros_for_empty_prompt=_zeros_for_empty(family, index),
        source=str(folder),
    )


def _load_file(path: Path, dtype: torch.dtype, config: str | Path | None) -> Components:
    """Load a single-file checkpoint through diffusers' own conversion."""
    import diffusers
    from safetensors import safe_open

    with safe_open(path, framework="pt") as checkpoint:
        keys = set(checkpoint.keys())
    family = detect_checkpoint_family(keys, str(path))
    pipeline_class: Any = getattr(diffusers, family.pipeline_class)
    options: dict[str, Any] = {"torch_dtype": dtype, "local_files_only": is_offline()}
    if config is not None:
        options |= {"config": str(resolve_folder(str(config))), "local_files_only": True}
    with _plain_errors(str(path), "its configuration is needed: pass a diffusers folder as config"):
        if family.vae_wants_float32 and dtype != torch.float32:
            vae_options = options | {"torch_dtype": torch.float32, "subfolder": "vae"}
            options["vae"] = diffusers.AutoencoderKL.from_single_file(str(path), **vae_options)
        pipeline = pipeline_class.from_single_file(str(path), **options)
    scheduler_config = {**pipeline.scheduler.config, **_prediction_markers(keys)}
    scheduler_config["_class_name"] = type(pipeline.scheduler).__name__
    return Components(
        family=family,
        unet=pipeline.unet,
        vae=pipeline.vae,
        text_encoders=tuple(getattr(pipeline, part) for part in family.text_encoder_names),
        tokenizers=tuple(getattr(pipeline, part) for part in family.tokenizer_names),
        scheduler=_training_scheduler(scheduler_config),
        name=str(path),
        scheduler_config=scheduler_config,
        zeros_for_empty_prompt=_zeros_for_empty(family, dict(pipeline.config)),
        source=str(path),
    )


def _prediction_markers(keys: set[str]) -> dict[str, Any]:
    """Scheduler settings that a checkpoint states by marker tensors (v-prediction SDXL)."""
    settings: dict[str, Any] = {}
    if "v_pred" in keys:
        settings["prediction_type"] = "v_prediction"
    if "ztsnr" in keys:
        settings["rescale_betas_zero_snr"] = True
    return settings


def _zeros_for_empty(family: Family, index: dict[str, Any]) -> bool:
    return family.has_pooled and bool(index.get("force_zeros_for_empty_prompt", True))


def _training_scheduler(config: dict[str, Any]) -> Any:
    """DDPM over the model's noise schedule, whatever sampler its folder names."""
    import diffusers

    scheduler_class: Any = diffusers.DDPMScheduler
    return scheduler_class.from_config({**config, "clip_sample": False})


def _load_tokenizer(folder: Path) -> Any:
    """Load a CLIP tokenizer from its folder.

    Raises:
        ValueError: If it is missing.
    """
    from transformers import CLIPTokenizer

    with _plain_errors(str(folder)):
        return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)


def _load_text_encoders(
    family: Family, folder: Path, dtype: torch.dtype, variant: str | None
) -> tuple[Any, ...]:
    """Load the family's text encoders; the pooled one has a projection."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    classes: list[Any] = [CLIPTextModel] * family.num_text_encoders
    if family.has_pooled:
        classes[-1] = CLIPTextModelWithProjection
    return tuple(
        _load_module(kind, folder / part, dtype, variant)
        for kind, part in zip(classes, family.text_encoder_names, strict=True)
    )


def _load_module(kind: Any, folder: Path, dtype: torch.dtype, variant: str | None) -> Any:
    """Load one module from safetensors and refuse it if any weight is missing.

    The libraries only warn of missing weights and leave them random.

    Raises:
        ValueError: If the files are missing, damaged or incomplete.
    """
    hint = f"it has no {variant!r} variant, or it is damaged" if variant else "it is damaged"
    with _plain_errors(str(folder), f"{hint}; download the model again"):
        module, report = kind.from_pretrained(
            str(folder),
            torch_dtype=dtype,
            variant=variant,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    missing = sorted(report["missing_keys"])
    if missing and not _load_respelled(module, folder, variant):
        raise ValueError(
            f"{folder} is incomplete: {len(missing)} weights are missing, first {missing[0]}"
        )
    return module


def _load_respelled(module: nn.Module, folder: Path, variant: str | None) -> bool:
    """Fill a text encoder whose file spells its names with or without ``text_model.``.

    transformers flattened ``CLIPTextModel``; releases differ in which of the spellings they read.
    """
    from safetensors.torch import load_file

    pattern = f"model.{variant}*.safetensors" if variant else "model*.safetensors"
    stored: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob(pattern)):
        stored |= load_file(file)
    wanted = module.state_dict()
    prefix = "text_model."
    spellings: list[Callable[[str], str]] = [
        lambda key: key,
        lambda key: prefix + key,
        lambda key: key.removeprefix(prefix),
    ]
    for spell in spellings:
        found = {key: stored[spell(key)] for key in wanted if spell(key) in stored}
        if len(found) == len(wanted):
            module.load_state_dict(found)
            return True
    return False


def _load_vae_folder(
    folder: Path, dtype: torch.dtype, variant: str | None, family: Family | None
) -> Any:
    """Load an autoencoder, in float32 where it says that it overflows in half precision."""
    from diffusers import AutoencoderKL

    if family is not None and family.vae_wants_float32:
        # Fixed autoencoders say so; silence means the released one.
        overflows = _read_json(folder / "config.json").get("force_upcast", True)
        dtype = torch.float32 if overflows else dtype
    return _load_module(AutoencoderKL, folder, dtype, variant)


def _bridge_dtypes(vae: Any, dtype: torch.dtype) -> None:
    """Let an autoencoder of another dtype than the model's take latents and pixels in either."""
    if vae.dtype != dtype:
        for part in (vae.encoder, vae.decoder, vae.quant_conv, vae.post_quant_conv):
            if part is not None:
                part.register_forward_pre_hook(cast_to_weight)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is missing or damaged; download the model again") from error


@contextlib.contextmanager
def _plain_errors(name: str, hint: str = "it is missing or damaged") -> Iterator[None]:
    """Turn a library's many loading errors into one plain line."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError, RuntimeError) as error:
        detail = str(error).strip().splitlines()
        raise ValueError(f"{name} could not be loaded ({hint}): {''.join(detail[:1])}") from error


@contextlib.contextmanager
def _quiet_progress() -> Iterator[None]:
    """Switch the libraries' loading bars off for a while."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    states = [
        (logging, logging.is_progress_bar_enabled())
        for logging in (diffusers_logging, transformers_logging)
    ]
    for logging, _ in states:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        for logging, enabled in states:
            if enabled:
                logging.enable_progress_bar()
