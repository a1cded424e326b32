"""Caches of latents and captions, filled before the steps of an offloaded run."""

from __future__ import annotations

import warnings
from itertools import chain, islice
from typing import TYPE_CHECKING

from dora_diffusion.models.offload import HOST, move_frozen, on_device
from dora_diffusion.numerics.devices import release_memory
from dora_diffusion.training.events import CachingProgress, OnEvent

if TYPE_CHECKING:
    from dora_diffusion.training.run import Run


def cache_inputs(run: Run, steps: int, on_event: OnEvent) -> None:
    """Encode the crops and captions of all remaining steps, then offload the encoders.

    Crops and captions are drawn by seed, epoch and photo, so that they are known before training.
    One module at a time is on the device. If there are more captions than the cache keeps, as with
    shuffled tags, the text encoders stay on the device.

    Args:
        run: Run with an offloaded model.
        steps: Number of remaining optimizer steps.
        on_event: Called with `CachingProgress`.
    """
    components, dataset, config = run.components, run.dataset, run.config
    batches = islice(run.sampler, steps * config.gradient_accumulation_steps)
    indices = list(chain.from_iterable(batches))
    with on_device(HOST, components.denoiser):
        if dataset.encode is not None:
            with on_device(components.device, components.vae):
                dataset.fill_cache(indices, lambda *done: on_event(CachingProgress(*done)))
        if not config.describe().encodes_in_steps:
            _cache_captions(run, dataset.all_captions(indices))
    release_memory()


def _cache_captions(run: Run, captions: set[str]) -> None:
    components, device = run.components, run.components.device
    # As in the steps: autocast computes some operations in float32.
    with run.accelerator.autocast(), on_device(device, *components.text_encoders):
        is_cached = run.step.encode.cache(sorted(captions))
    if is_cached:
        return
    for encoder in components.text_encoders:
        move_frozen(encoder, device)
    if run.config.offload == "model":
        warnings.warn(
            f"offload: the text encoders stay on the device, since the cache does not hold "
            f"{len(captions)} different captions",
            stacklevel=4,
        )
