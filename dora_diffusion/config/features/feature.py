"""Statements of a feature of training about itself, without torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from dora_diffusion.config.fields import Condition, Need

Problem = tuple[str, str]
"""A setting and the error message."""


class Added(NamedTuple):
    """Changes of a feature to a setting of others.

    Attributes:
        help: Text at the end of its help.
        derived: Text at the end of its description of a default.
        choices: Further choices.
        needs: Condition under which the feature uses it; None: as without the feature.
    """

    help: str = ""
    derived: str = ""
    choices: tuple[str, ...] = ()
    needs: Condition | None = None


class Excluded(NamedTuple):
    """Something that a setting, or the feature, excludes.

    Attributes:
        way: What it excludes: ``"pack"``, ``"sharding"``, the name of a family, or ``"run"`` if
            there is no way to run with it.
        reason: Message or the rest of one, with settings such as ``{config.rank}``; empty: none.
        setting: The setting; empty: the one that turns the feature on.
        values: Its values that exclude it; empty: any true one.
        when: Whether they exclude it, if that depends on more than the setting.
    """

    way: str
    reason: str = ""
    setting: str = ""
    values: tuple[Any, ...] = ()
    when: Callable[[Any], Any] | None = None

    def applies(self, config: Any) -> bool:
        """Return whether settings exclude it."""
        if self.when or not self.setting:
            return bool(self.when is None or self.when(config))
        return hasattr(config, self.setting) and Need(self.setting, self.values)(config) is None


@dataclass(frozen=True)
class Description:
    """Description of what a run makes, for dry run, card, metadata, samples and console.

    Attributes:
        tag: Tag of the model card.
        method: Tag and name of the method; None: those of the adapter.
        ranks: Ranks of the adapter; empty: as the settings say.
        usage: Sentence of the model card on prompts; empty: on trigger words.
        hint: The same for the console, before an example of a prompt.
        plan: Lines of the dry run of a run without photos.
        prompts: Prompts that the run teaches; None: the instance prompts of the subjects.
        words: New words that the run trains, each of which a caption needs.
        encodes_in_steps: Whether text encoders run in every step, since they or their words train.
        strengths: Strengths of sample images; empty: 1, and without the adapter for comparison.
        strength: Strength of the result in examples; 1: the default.
        metadata: Metadata of the result.
        trained: What learning rates are for.
        rates: Least and most of usual learning rates, generously.
    """

    tag: str = "dreambooth"
    method: tuple[str, str] | None = None
    ranks: str = ""
    usage: str = ""
    hint: str = ""
    plan: Sequence[str] = ()
    prompts: list[str] | None = None
    words: Sequence[str] = ()
    encodes_in_steps: bool = False
    strengths: Sequence[float] = ()
    strength: float = 1
    metadata: Mapping[str, str] = field(default_factory=dict)
    trained: str = "adapters"
    rates: Sequence[float] = (1e-6, 5e-3)


class Feature:
    """Optional feature of training. What it does not answer is as in a run without it.

    Its code answers `dora_diffusion.training.features.code.FeatureCode`.

    Attributes:
        on: Setting that turns it on, with the values that do, where the setting has an effect.
        code: Its class in `training.features`, as ``"module:Class"``, or the class itself. It is
            imported only if the feature is on.
        has_photos: Whether a run with it learns from photos.
        trains_adapters: Whether a run with it trains adapters, not weights of the model itself.
        adds: Setting of others -> what the feature changes of it.
        excludes: Other settings and ways of running that it excludes.
    """

    on: Need
    code: Any = ""
    has_photos = True
    trains_adapters = True
    adds: ClassVar[Mapping[str, Added]] = {}
    excludes: ClassVar[tuple[Excluded, ...]] = ()

    def is_on(self, config: Any) -> bool:
        """Return whether a subject of the run has the feature, or the run itself."""
        return any(
            self.on(subject) is None and subject.uses(self.on.setting)
            for subject in config.subjects
        )

    def defaults(self, config: Any) -> Mapping[str, Any]:
        """Return the defaults of settings that differ while the feature is on."""
        return {}

    def problems(self, config: Any) -> Iterator[Problem]:
        """Yield problems of the settings, besides `excludes`; later ones rely on earlier ones."""
        yield from ()

    def describe(self, config: Any, run: Description) -> Description:
        """Describe a run with the feature, which is a run without it as described so far."""
        return run
