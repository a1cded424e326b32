"""Single-file checkpoints in the original layout, through diffusers' own conversion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dora_diffusion.formats.checkpoint.file import (
    CheckpointFile,
    detect_checkpoint_family,
    stated_schedule,
)
from dora_diffusion.formats.checkpoint.folder import read_json
from dora_diffusion.formats.names.checkpoint import standard_key
from dora_diffusion.models.components import Components
from dora_diffusion.models.locate import is_offline, resolve_folder
from dora_diffusion.models.scheduling import training_scheduler, zeros_for_empty_prompt
from dora_diffusion.models.weights import fill_renamed, plain_errors

_NEEDED = (
    "its configuration is needed: give a Diffusers folder with it as --config (of train: "
    "--model_config)"
)


def load_single_file(path: Path, dtype: torch.dtype, config: str | Path | None) -> Components:
    """Load the components of a single-file checkpoint.

    Args:
        path: The ``.safetensors`` file.
        dtype: Of every module; an autoencoder that may overflow in it stays float32.
        config: A diffusers folder that gives the configuration and the tokenizers; None asks the
            hub for the released model's.

    Raises:
        UnsupportedModelError: If it is not a checkpoint of a supported family.
        ValueError: If it is damaged or its configuration cannot be had.
    """
    import diffusers
    from safetensors import safe_open

    with plain_errors(str(path)), safe_open(path, framework="pt") as checkpoint:
        keys, stated = set(checkpoint.keys()), checkpoint.metadata() or {}
    family = detect_checkpoint_family(keys, str(path))
    pipeline_class: Any = getattr(diffusers, family.pipeline_class)
    options: dict[str, Any] = {"torch_dtype": dtype, "local_files_only": is_offline()}
    if config is not None:
        options |= {"config": str(resolve_folder(str(config))), "local_files_only": True}
    if config is not None and any(standard_key(key) != key for key in keys):
        options["text_encoder"] = _text_encoder(path, Path(options["config"])).to(dtype)
    with plain_errors(str(path), _NEEDED):
        if family.vae_wants_float32 and dtype != torch.float32:
            vae_options = options | {"torch_dtype": torch.float32, "subfolder": "vae"}
            options["vae"] = diffusers.AutoencoderKL.from_single_file(str(path), **vae_options)
        pipeline = pipeline_class.from_single_file(str(path), **options)
    scheduler_config = {**pipeline.scheduler.config, **stated_schedule(stated, keys)}
    scheduler_config["_class_name"] = type(pipeline.scheduler).__name__
    return Components(
        family=family,
        unet=pipeline.unet,
        vae=pipeline.vae,
        text_encoders=tuple(getattr(pipeline, part) for part in family.text_encoder_names),
        tokenizers=tuple(getattr(pipeline, part) for part in family.tokenizer_names),
        scheduler=training_scheduler(scheduler_config),
        name=str(path),
        scheduler_config=scheduler_config,
        zeros_for_empty_prompt=zeros_for_empty_prompt(family, dict(pipeline.config)),
        source=str(path),
    )


def _text_encoder(path: Path, config: Path) -> torch.nn.Module:
    """CLIP from a file with other names, which diffusers does not find there."""
    from transformers import CLIPTextConfig, CLIPTextModel

    prefix = "text_encoder."
    with CheckpointFile.open(path) as file:
        names = [name for name in file.specs if name.startswith(prefix)]
        tensors = {name.removeprefix(prefix): file[name] for name in names}
    settings = read_json(config / "text_encoder" / "config.json")
    model: torch.nn.Module = CLIPTextModel(CLIPTextConfig(**settings))
    if not fill_renamed(model, tensors):
        raise ValueError(f"{path}: its text encoder does not fit the configuration {config}")
    return model.eval()
