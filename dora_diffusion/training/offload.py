"""What a run offloads: the modules whose results are cached before its first step."""

from __future__ import annotations

import warnings
from itertools import chain, islice

from dora_diffusion.devices import release_memory
from dora_diffusion.models.offload import HOST, move_frozen, on_device
from dora_diffusion.training.events import CachingProgress, OnEvent
from dora_diffusion.training.session import Session


def cache_ahead(session: Session, steps: int, on_event: OnEvent) -> None:
    """Encode all crops and captions of the steps that come, by modules that then stay offloaded.

    Crops and captions are drawn by seed, epoch and photo, so that those of the whole run are known.
    One module at a time is on the device meanwhile. Text encoders come to stay where the captions
    are more than are kept, as with shuffled tags.

    Args:
        session: A run, at the step that it starts from.
        steps: Optimizer steps that are left.
        on_event: Called with `CachingProgress`.
    """
    components, dataset, config = session.components, session.dataset, session.config
    device = components.offload_to
    if device is None or steps <= 0:
        return
    batches = islice(session.sampler, steps * config.gradient_accumulation_steps)
    indices = list(chain.from_iterable(batches))
    with on_device(HOST, components.unet):
        if dataset.caches_moments:
            with on_device(device, components.vae):
                dataset.fill_cache(indices, lambda *done: on_event(CachingProgress(*done)))
        if not config.train_text_encoder:
            _cache_captions(session, dataset.all_captions(indices))
    release_memory()


def _cache_captions(session: Session, captions: set[str]) -> None:
    components, device = session.components, session.components.device
    if session.config.is_image_free:
        captions = captions | {session.subject.class_caption(caption) for caption in captions}
    condition = session.accelerator.unwrap_model(session.train_step.objective).condition
    # Steps encode inside of autocast, which computes some operations in float32.
    with session.accelerator.autocast(), on_device(device, *components.text_encoders):
        kept = condition.keep(sorted(captions))
    if kept:
        return
    for encoder in components.text_encoders:
        move_frozen(encoder, device)
    if session.config.offload == "model":
        warnings.warn(
            f"offload: the text encoders stay on the device, since {len(captions)} different "
            "captions are more than are cached",
            stacklevel=4,
        )
