"""Read one module's weights strictly: from safetensors, complete, with plain errors."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dora_diffusion.formats.names.modules import with_text_model


def load_module(kind: Any, folder: Path, dtype: torch.dtype, variant: str | None) -> Any:
    """Load one module from safetensors and refuse it if any weight is missing.

    The libraries only warn of missing weights and leave them random.

    Raises:
        ValueError: If the files are missing, damaged or incomplete.
    """
    hint = f"it has no {variant!r} variant, or it is damaged" if variant else "it is damaged"
    with plain_errors(str(folder), f"{hint}; download the model again"):
        module, report = kind.from_pretrained(
            str(folder),
            torch_dtype=dtype,
            variant=variant,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    missing = sorted(report["missing_keys"])
    if missing and not _load_renamed(module, folder, variant):
        raise ValueError(
            f"{folder} is incomplete: {len(missing)} weights are missing, first {missing[0]}"
        )
    return module


def _load_renamed(module: nn.Module, folder: Path, variant: str | None) -> bool:
    """Fill a text encoder whose file has its names with or without ``text_model.``.

    transformers flattened ``CLIPTextModel``; releases differ in which of the two they read.
    """
    from safetensors.torch import load_file

    pattern = f"model.{variant}*.safetensors" if variant else "model*.safetensors"
    stored: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob(pattern)):
        stored |= load_file(file)
    return fill_renamed(module, stored)


def fill_renamed(module: nn.Module, stored: Mapping[str, torch.Tensor]) -> bool:
    """Fill a text encoder with tensors named with or without ``text_model.``; whether they fit."""
    canonical = {with_text_model(key): tensor for key, tensor in stored.items()}
    wanted = {key: canonical.get(with_text_model(key)) for key in module.state_dict()}
    if any(tensor is None for tensor in wanted.values()):
        return False
    module.load_state_dict(wanted)
    return True


@contextlib.contextmanager
def plain_errors(name: str, hint: str = "it is missing or damaged") -> Iterator[None]:
    """Convert a library's many loading errors to one plain line."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        detail = str(error).strip().splitlines()
        raise ValueError(f"{name} could not be loaded ({hint}): {''.join(detail[:1])}") from error


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
