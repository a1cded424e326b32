"""Selection of trained weights: adapters or the model's weights, and new words."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dora_diffusion.config import TrainConfig
from dora_diffusion.models.components import Components
from dora_diffusion.training.processes import shard
from dora_diffusion.training.trainable.adapters import (
    StartingAdapter,
    enter_training,
    inject_trained,
)
from dora_diffusion.training.trainable.words import add_words

if TYPE_CHECKING:
    from dora_diffusion.training.trainable.full import TrainedWeights


def select_trainable(
    components: Components, config: TrainConfig, start: StartingAdapter | None
) -> TrainedWeights:
    """Select the weights that a run trains, and set their components to training mode.

    Args:
        components: The model. Adapters and new words are added to it.
        config: Settings.
        start: Adapter that the run starts from, or None.

    Raises:
        TargetError, ValueError, AdapterFormatError: If the weights cannot be trained.
    """
    weights: TrainedWeights
    if config.is_full:
        from dora_diffusion.training.trainable.full import select_weights

        weights = select_weights(components, config)
    else:
        weights = inject_trained(components, config, start)
    weights = replace(weights, words=add_words(components, config, start.tokens if start else None))
    for name in weights.words.tables if not config.train_text_encoder else ():
        enter_training(components.adaptable()[name], components, config)
    return weights


def shard_trainable(components: Components, weights: TrainedWeights, accelerator: Any) -> None:
    """Shard the trained components over all processes (`shard`)."""
    from dora_diffusion.training.trainable.full import FullWeights

    if isinstance(weights, FullWeights):
        shard(components, weights.modules, weights.trained, weights.base, accelerator)
    else:
        shard(components, weights.modules, {}, {}, accelerator)
