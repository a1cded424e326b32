"""Latents and captions of an offloaded run, encoded before its steps."""

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
    """Encode crops and captions of the coming steps by modules that are offloaded afterwards.

    Crops and captions are drawn by seed, epoch and photo, so that those of all steps are known. One
    module at a time is on the device. Text encoders stay there if there are more captions than are
    kept, as with shuffled tags.

    Args:
        run: A run with an offloaded model.
        steps: Optimizer steps that are left.
        on_event: Called with `CachingProgress`.
    """
    components, dataset, config = run.components, run.dataset, run.config
    batches = islice(run.sampler, steps * config.gradient_accumulation_steps)
    indices = list(chain.from_iterable(batches))
    with on_device(HOST, components.unet):
        if dataset.encode is not None:
            with on_device(components.device, components.vae):
                dataset.fill_cache(indices, lambda *done: on_event(CachingProgress(*done)))
        if not config.encodes_in_steps:
            ends = chain.from_iterable(ends for _, ends in config.slider_pairs)
            _cache_captions(run, {*dataset.all_captions(indices), *ends})
    release_memory()


def _cache_captions(run: Run, captions: set[str]) -> None:
    components, device = run.components, run.components.device
    # Steps encode inside of autocast, which computes some operations in float32.
    with run.accelerator.autocast(), on_device(device, *components.text_encoders):
        is_cached = run.step.encode.cache(sorted(captions))
    if is_cached:
        return
    for encoder in components.text_encoders:
        move_frozen(encoder, device)
    if run.config.offload == "model":
        warnings.warn(
            f"offload: the text encoders stay on the device, since {len(captions)} different "
            "captions are more than are cached",
            stacklevel=4,
        )
