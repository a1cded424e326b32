"""Settings of a study: methods, subjects, seeds, and the choice of learning rates."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral
from pathlib import Path
from typing import Any

from dora_diffusion.config import ConfigError, TrainConfig, settings, without_effect
from dora_diffusion.config.arguments import check_arguments
from dora_diffusion.config.fields import require
from dora_diffusion.config.file import read_config_file
from dora_diffusion.config.problems import Problems, prefixed
from dora_diffusion.config.run import ValidationSettings
from dora_diffusion.config.wording import did_you_mean
from dora_diffusion.evaluation.measures import MEASURES

BASE = "base"
"""The row of the untrained model, which every study has."""

# Settings that a study sets itself, for each trial.
_ITS_OWN = (
    "pretrained_model_name_or_path", "dataset_config", "instance_data_dir", "instance_prompt",
    "class_word", "class_data_dir", "seed", "num_train_epochs",
)  # fmt: skip
_HELD_OUT = frozenset(setting.name for setting in fields(ValidationSettings))


@check_arguments()
@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        name: Its row in the report.
        settings: Settings of training in which it differs from the study's ``common`` ones.
        learning_rates: What it is trained with, each a row; none: the rate is tuned.
        rate_of: Another method, whose tuned rate it takes.
    """

    name: str
    settings: Mapping[str, Any]
    learning_rates: tuple[float, ...] = ()
    rate_of: str = ""

    @property
    def is_tuned(self) -> bool:
        """True if the method's learning rate is chosen by trials of its own."""
        return not self.learning_rates and not self.rate_of


@check_arguments()
@dataclass(frozen=True)
class Tuning:
    """Choice of learning rates: on other subjects, equally often for each method.

    The rate with the best figure is taken, among those that leave other figures as the base has
    them; where none does, the smallest.

    Attributes:
        subjects: Names of toy subjects, or folders of photos; none that the study reports.
        seeds: Seeds of each.
        learning_rates: What is tried, unless a method has its own in ``method_rates``.
        method_rates: The same for one method, as many.
        best: The figure that decides.
        keep: Figure -> how much worse than the base's it may be.
    """

    subjects: tuple[Any, ...]
    seeds: tuple[int, ...] = (0,)
    learning_rates: tuple[float, ...] = ()
    method_rates: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    best: str = "subject_similarity"
    keep: Mapping[str, float] = field(default_factory=lambda: {"others_kind": 0.02})

    def rates(self, method: str) -> tuple[float, ...]:
        """Return the learning rates that a method is tried with."""
        return self.method_rates.get(method, self.learning_rates)


@check_arguments()
@dataclass(frozen=True)
class SamplingOptions:
    """Sampling options for images of trained models.

    Attributes:
        inference_steps: Denoising steps.
        guidance_scale: Guidance scale.
        batch_size: Images at once.
        metric_models: For photos: image-similarity models, as `evaluate` takes them.
        analysis_points: Checkpoints, evenly spread, whose weights are analyzed; 0: none.
    """

    inference_steps: int = 25
    guidance_scale: float = 3.5
    batch_size: int = 8
    metric_models: tuple[str, ...] = ()
    analysis_points: int = 4


@check_arguments()
@dataclass(frozen=True)
class Study:
    """All that a comparison is made of.

    Attributes:
        base: The model that every trial starts from.
        methods: What is compared.
        subjects: Names of toy subjects; or of photos, mappings with ``photos``, ``held_out``,
            ``instance_prompt`` and ``class_word``.
        seeds: Seeds of each method on each subject.
        seeds_per_subject: How many of them each subject gets, in turn; None: all. With 1, and as
            many seeds as subjects, every subject has a seed of its own.
        common: Settings of training that all methods have.
        reference: The row that differences are to: a method, with its rate where it has several.
        tune: How rates are chosen; None where every method has its own.
        asked: How trained models are asked for images.

    Raises:
        ConfigError: If something is missing, unknown, or cannot work.
    """

    base: str
    methods: tuple[Method, ...]
    subjects: tuple[Any, ...]
    seeds: tuple[int, ...]
    common: Mapping[str, Any] = field(default_factory=dict)
    reference: str = ""
    seeds_per_subject: int | None = None
    tune: Tuning | None = None
    asked: SamplingOptions = field(default_factory=SamplingOptions)

    def __post_init__(self) -> None:
        names = [method.name for method in self.methods]
        require(bool(names), "methods is empty; name at least one", "methods")
        require(bool(self.subjects), "subjects is empty; name at least one", "subjects")
        require(bool(self.seeds), "seeds is empty; give a number of seeds, or a list", "seeds")
        require(
            len({*self.seeds}) == len(self.seeds),
            f"seeds is {[*self.seeds]}; the same seed twice is one trial, name each once",
            "seeds",
        )
        each = self.seeds_per_subject
        is_number = isinstance(each, int) and not isinstance(each, bool)
        require(
            each is None or is_number,
            f"seeds_per_subject is {each!r}; it must be a number",
            "seeds_per_subject",
        )
        require(
            each is None or 1 <= each <= len(self.seeds),
            f"seeds_per_subject is {each}; there are {len(self.seeds)} seeds",
            "seeds_per_subject",
        )
        require(
            BASE not in names, f"a method is called {BASE}, which is the untrained model", "methods"
        )
        problems = Problems()
        for method in self.methods:
            with problems.collect():
                self._check_method(method, names)
        problems.raise_all()
        self._check_tuning()
        rows = [row for method in self.methods for row in self.rows(method)]
        if not self.reference:
            object.__setattr__(self, "reference", "lora" if "lora" in rows else rows[0])
        _check_name("reference", self.reference, [BASE, *rows], "row")

    def _check_method(self, method: Method, names: Sequence[str]) -> None:
        if method.rate_of:
            _check_name(f"methods.{method.name}.rate_of", method.rate_of, names, "method")
        other = next((m for m in self.methods if m.name == method.rate_of), None)
        require(
            other is None or (other.is_tuned or len(other.learning_rates) == 1),
            f"methods.{method.name}: rate_of {method.rate_of} must name a method of one rate",
            "rate_of",
        )
        with prefixed(f"methods.{method.name}: "):
            self.training(method)

    def _check_tuning(self) -> None:
        tuned = [method.name for method in self.methods if method.is_tuned]
        if self.tune is None:
            require(
                not tuned,
                f"{', '.join(tuned)}: no learning rate; give learning_rate, rate_of another "
                "method, or a tune section",
                "learning_rate",
            )
            return
        for name in self.tune.method_rates:
            _check_name("tune.method_rates", name, [one.name for one in self.methods], "method")
        require(bool(tuned), "tune has no effect: every method has its learning rate", "tune")
        counts = {name: len(self.tune.rates(name)) for name in tuned}
        require(
            len(set(counts.values())) <= 1 and 0 not in counts.values(),
            f"every method must be tuned with as many rates as the others, got {counts}",
            "tune",
        )
        shared = [s for s in self.tune.subjects if s in self.subjects]
        require(not shared, f"tune on other subjects than are reported, not on {shared}", "tune")
        for name in (self.tune.best, *self.tune.keep):
            place = "tune.best" if name == self.tune.best else "tune.keep"
            _check_name(place, name.partition("@")[0], MEASURES, "measure")

    def rows(self, method: Method, rates: Sequence[float] | None = None) -> list[str]:
        """A method's rows of the report: one for each learning rate.

        Args:
            method: One of the study's.
            rates: Its learning rates, where they are known; a tuned method has one.
        """
        if rates is None:
            rates = method.learning_rates
        return [f"{method.name} {r:g}" for r in rates] if len(rates) > 1 else [method.name]

    def rates_to_try(self, method: Method) -> Sequence[float]:
        """The learning rates that a method may be trained with."""
        if method.rate_of:
            return self.rates_to_try(next(m for m in self.methods if m.name == method.rate_of))
        return method.learning_rates or (self.tune.rates(method.name) if self.tune else ())

    def training(self, method: Method) -> TrainConfig:
        """A method's settings of training, without those of a trial."""
        return TrainConfig.from_dict({**self.common, **method.settings})

    def pairs(self) -> list[tuple[int, int]]:
        """Places in ``subjects`` with their seeds, one seed of every subject after another."""
        count, subjects = self.seeds_per_subject, range(len(self.subjects))
        if count is None:
            return [(subject, seed) for seed in self.seeds for subject in subjects]
        turned = [*self.seeds, *self.seeds]
        start = {subject: subject % len(self.seeds) for subject in subjects}
        return [(s, turned[start[s] + turn]) for turn in range(count) for s in subjects]

    def reasons(self) -> list[str]:
        """Settings that a method was given and that have no effect in it."""
        said = []
        for method in self.methods:
            found = without_effect(self.training(method), set(method.settings))
            said += [f"{method.name}: {reason}" for reason in found.values()]
        return said

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Study:
        """Read plain values, as YAML holds them.

        Raises:
            ConfigError: If a key is unknown, or a value cannot work.
        """
        values = _mapping("the study", values)
        _check_keys("the study", values, cls)
        for name in ("methods", "subjects"):
            require(name in values, f"{name} is missing", name)
        methods = _mapping("methods", values["methods"])
        common = _mapping("common", values.get("common") or {})
        usual = _rates("common", common.pop("learning_rate", ()))
        tune, problems, made = values.get("tune"), Problems(), list[Method]()
        with problems.collect():
            _check_settings("common", common)
        for name, given in methods.items():
            with problems.collect():
                made.append(_method(name, given or {}, usual))
        problems.raise_all()
        return cls(
            base=str(values.get("base", TrainConfig().pretrained_model_name_or_path)),
            methods=tuple(made),
            subjects=_tuple(values["subjects"]),
            seeds=_seeds(values.get("seeds", 1)),
            seeds_per_subject=values.get("seeds_per_subject"),
            common=common,
            reference=str(values.get("reference") or ""),
            tune=None if tune is None else _tuning(_mapping("tune", tune)),
            asked=_asked(_mapping("asked", values.get("asked") or {})),
        )


def read_study(path: str | Path) -> Study:
    """Read a study from a YAML file.

    Raises:
        ConfigError: If it cannot be read, or does not make a study.
    """
    with prefixed(f"{path}: "):
        return Study.from_dict(read_config_file(path))


def _method(name: str, given: Any, usual: tuple[float, ...]) -> Method:
    place = f"methods.{name}"
    values = _mapping(place, given)
    rates = _rates(place, values.pop("learning_rate", ()))
    rate_of = str(values.pop("rate_of", "") or "")
    require(
        not (rates and rate_of),
        f"{place}: give learning_rate or rate_of, not both",
        "learning_rate",
    )
    _check_settings(place, values)
    return Method(str(name), values, rates or (() if rate_of else usual), rate_of)


def _tuning(values: Mapping[str, Any]) -> Tuning:
    _check_keys("tune", values, Tuning)
    require("subjects" in values, "tune.subjects is missing", "tune")
    own = _mapping("tune.method_rates", values.get("method_rates") or {})
    optional = {name: values[name] for name in ("best", "keep") if name in values}
    return Tuning(
        _tuple(values["subjects"]),
        _seeds(values.get("seeds", 1)),
        _rates("tune", values.get("learning_rates", ())),
        {name: _rates(f"tune.method_rates.{name}", rates) for name, rates in own.items()},
        **optional,
    )


def _asked(values: Mapping[str, Any]) -> SamplingOptions:
    _check_keys("asked", values, SamplingOptions)
    return SamplingOptions(**{**values, "metric_models": _tuple(values.get("metric_models") or ())})


def _check_settings(place: str, values: Mapping[str, Any]) -> None:
    known = {setting.name: setting for setting in settings()}
    problems = Problems()
    for name in values:
        with problems.collect(f"{place}: "):
            require(name in known, f"there is no setting {name}{did_you_mean(name, known)}", name)
            own = name in _ITS_OWN or known[name].resume == "ignored"
            own = own or name in _HELD_OUT  # It has photos of its own.
            require(not own, f"{name} is set by the study; leave it out", name)
    problems.raise_all()


def _check_name(place: str, name: str, known: Collection[str], kind: str) -> None:
    said = f"{place}: there is no {kind} {name!r}{did_you_mean(name, known)}"
    require(name in known, f"{said}; there are {', '.join(known)}", place)


def _check_keys(place: str, values: Mapping[str, Any], kind: Any) -> None:
    known = [field.name for field in fields(kind)]
    unknown = [f"{name}{did_you_mean(str(name), known)}" for name in values if name not in known]
    require(not unknown, f"{place} has no {', '.join(unknown)}; it has {', '.join(known)}", place)


def _mapping(place: str, value: Any) -> dict[str, Any]:
    require(isinstance(value, Mapping), f"{place} must hold 'name: value' lines", place)
    return dict(value)


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _rates(place: str, value: Any) -> tuple[float, ...]:
    try:
        rates = tuple(float(rate) for rate in _tuple(value))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{place}: {value!r} is not a learning rate", "learning_rate") from error
    require(
        all(rate > 0 for rate in rates),
        f"{place}: learning rates must be greater than 0",
        "learning_rate",
    )
    return rates


def _seeds(value: Any) -> tuple[int, ...]:
    """A number of seeds, from 0, or a list of them."""
    try:
        return tuple(map(int, range(value) if isinstance(value, Integral) else value))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"seeds is {value!r}; it must be a number, or a list of them", "seeds"
        ) from error
