"""What a feature of training states about itself, without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from dora_diffusion.config.fields import Condition, Need

if TYPE_CHECKING:
    from dora_diffusion.config.train import TrainConfig

Problem = tuple[str, str]
"""A setting and the error message."""


class Added(NamedTuple):
    """What a feature adds to a setting of others: texts at the end of its own, and a choice."""

    help: str = ""
    derived: str = ""
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Description:
    """What a run makes, for dry run, model card, metadata, samples and console.

    Attributes:
        tag: Tag of the model card.
        method: Tag and name of the method; None: those of the adapter.
        usage: Sentence of the model card on prompts; empty: on trigger words.
        hint: The same for the console, before an example of a prompt.
        plan: Lines of the dry run of a run without photos.
        prompts: Prompts that the run teaches; None: the instance prompts of the subjects.
        strengths: Strengths of sample images; empty: 1, and without the adapter for comparison.
        strength: Strength of the result in examples; 1: the default.
        metadata: Metadata of the result.
        trained: What learning rates are for.
        rates: Least and most of usual learning rates, generously.
    """

    tag: str = "dreambooth"
    method: tuple[str, str] | None = None
    usage: str = ""
    hint: str = ""
    plan: tuple[str, ...] = ()
    prompts: list[str] | None = None
    strengths: tuple[float, ...] = ()
    strength: float = 1
    metadata: Mapping[str, str] = field(default_factory=dict)
    trained: str = "adapters"
    rates: tuple[float, float] = (1e-6, 5e-3)


class Feature:
    """Optional feature of training. What it does not answer is as in a run without it.

    `dora_diffusion.training.features.part.Part` has the questions to its code.

    Attributes:
        on: Setting that turns it on, with the values that do, where the setting has an effect.
        code: Its class in `training.features`, as ``"module:Class"``, or the class itself. It is
            imported only if the feature is on.
        has_photos: Whether a run with it learns from photos.
        trains_adapters: Whether a run with it trains adapters, not weights of the model itself.
        adds: Setting of others -> what the feature adds to its description.
        uses: Setting of others -> condition under which the feature uses it.
        excludes: Way of running (``"pack"``, ``"sharding"``) -> why the feature excludes it.
    """

    on: Need
    code: Any = ""
    has_photos = True
    trains_adapters = True
    adds: ClassVar[Mapping[str, Added]] = {}
    uses: ClassVar[Mapping[str, Condition]] = {}
    excludes: ClassVar[Mapping[str, str]] = {}

    def is_on(self, config: TrainConfig) -> bool:
        """Return whether a run has the feature."""
        return self.on(config) is None and config.uses(self.on.setting)

    def defaults(self, config: TrainConfig) -> Mapping[str, Any]:
        """Return the defaults of settings that differ while the feature is on."""
        return {}

    def problems(self, config: TrainConfig) -> Iterator[Problem]:
        """Yield contradictions while the feature is on; later ones rely on the earlier ones."""
        yield from ()

    def describe(self, config: TrainConfig, run: Description) -> Description:
        """Describe a run with the feature, which is a run without it as described so far."""
        return run
