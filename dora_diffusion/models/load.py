"""Load a model's components from a folder, a hub id, a single file or an embedded model.

Weights are read from safetensors only: no pickles, no remote code.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from dora_diffusion.families import Family, detect_folder_family
from dora_diffusion.formats.checkpoint.folder import read_json
from dora_diffusion.formats.files.header import PICKLED
from dora_diffusion.models.components import Components, cast_to_weight, fingerprint
from dora_diffusion.models.locate import (
    ModelNotFoundError,
    fetch_snapshot,
    is_offline,
    looks_local,
    resolve_folder,
)
from dora_diffusion.models.scheduling import training_scheduler, zeros_for_empty_prompt
from dora_diffusion.models.single_file import load_single_file
from dora_diffusion.models.weights import load_module, plain_errors, quiet_libraries

__all__ = [
    "Components",
    "ModelNotFoundError",
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
    if path.suffix in PICKLED:
        raise ModelNotFoundError(
            f"{path} is a pickle, which can run code when opened; convert it to .safetensors first"
        )
    with quiet_libraries():
        if path.suffix == ".safetensors" and path.is_file():
            components = load_single_file(path, dtype, config)
        else:
            folder = resolve_folder(str(name), revision=revision, variant=variant)
            components = _load_folder(folder, dtype, variant)
        own_vae, family = components.vae, components.family
        other_vae = own_vae if vae is None else load_vae(vae, dtype=dtype, family=family)
    components = dataclasses.replace(components, name=str(name), vae=other_vae)
    _bridge_dtypes(components.vae, dtype)
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
        with plain_errors(str(name)):
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
    index = read_json(folder / "model_index.json")
    scheduler_config = read_json(folder / "scheduler" / "scheduler_config.json")
    return Components(
        family=family,
        unet=load_module(UNet2DConditionModel, folder / "unet", dtype, variant),
        vae=_load_vae_folder(folder / "vae", dtype, variant, family),
        text_encoders=_load_text_encoders(family, folder, dtype, variant),
        tokenizers=tuple(_load_tokenizer(folder / part) for part in family.tokenizer_names),
        scheduler=training_scheduler(scheduler_config),
        name=str(folder),
        scheduler_config=scheduler_config,
        zeros_for_empty_prompt=zeros_for_empty_prompt(family, index),
        source=str(folder),
    )


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

    if family is not None and family.vae_wants_float32:
        # Fixed autoencoders say so; silence means the released one.
        overflows = read_json(folder / "config.json").get("force_upcast", True)
        dtype = torch.float32 if overflows else dtype
    return load_module(AutoencoderKL, folder, dtype, variant)


def _bridge_dtypes(vae: Any, dtype: torch.dtype) -> None:
    """Let an autoencoder of another dtype than the model's take latents and pixels in either."""
    if vae.dtype != dtype:
        for part in (vae.encoder, vae.decoder, vae.quant_conv, vae.post_quant_conv):
            if part is not None:
                part.register_forward_pre_hook(cast_to_weight)
