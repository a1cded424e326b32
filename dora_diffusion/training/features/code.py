"""Code of a feature in a run. All methods do nothing by default."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from dora_diffusion.config import TrainConfig

if TYPE_CHECKING:
    from dora_diffusion.data.dataset import SubjectPhotos
    from dora_diffusion.data.photos import Photo
    from dora_diffusion.models.components import Components
    from dora_diffusion.training.features.validation import Validation
    from dora_diffusion.training.hook import Hook
    from dora_diffusion.training.inputs.subject import Subject
    from dora_diffusion.training.step import Step
    from dora_diffusion.training.terms import RowLoss, Term
    from dora_diffusion.training.trainable.adapters import StartingAdapter
    from dora_diffusion.training.trainable.weights import TrainedWeights

Validate = Callable[[TrainConfig, "Components", Any], "Validation"]
"""Opens the validation of a run: of its resolved settings, model, devices and processes."""

Select = Callable[[], "TrainedWeights"]
"""Selects the weights that a run trains, and sets their components to training mode."""


class FeatureCode:
    """Code of a feature in a run; `dora_diffusion.config.features.feature.Feature` has the rest.

    Args:
        config: Settings of the run.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    def hold_out(
        self, subjects: Sequence[Subject], photos: list[list[Path]]
    ) -> tuple[list[list[Path]], list[list[Path]], Validate] | None:
        """Divide the photos of each subject into those to train on, and others to validate on."""

    def images(
        self, subject: Subject, components: Components, make: Callable[..., list[Photo]]
    ) -> SubjectPhotos | None:
        """Make the images of a run without photos.

        Args:
            subject: Subject of the run.
            components: The model, without adapters.
            make: Generates images of a subject, of the model and prompts.
        """

    def check_model(self, components: Components) -> None:
        """Check that a run can train the model, which may have no weights yet."""

    def weights(
        self, select: Select, components: Components, start: StartingAdapter | None
    ) -> TrainedWeights:
        """Select the weights that train.

        Args:
            select: Selects those of the run without the feature.
            components: The model.
            start: Adapter that the run starts from, or None.
        """
        return select()

    def loss(self, loss: RowLoss) -> RowLoss:
        """Change how errors of rows are measured."""
        return loss

    def terms(self, loss: RowLoss) -> Sequence[Term]:
        """Return terms of the loss."""
        return ()

    def hooks(self, step: Step) -> Sequence[Hook]:
        """Return hooks of the steps."""
        return ()


def code_of(config: TrainConfig) -> list[FeatureCode]:
    """Return the code of the features that are on, in the order in which they act.

    Those that train other weights than adapters are first, so that others can add to their weights.
    """
    features = sorted(config.features, key=lambda one: one.trains_adapters)
    codes = [one.code for one in features if one.code]
    home = "dora_diffusion.training.features"
    return [
        (resolve_name(f"{home}.{code}") if isinstance(code, str) else code)(config)
        for code in codes
    ]
