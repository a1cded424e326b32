"""Settings of a study: methods, subjects, seeds, and the choice of learning rates."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral
from pathlib import Path
from typing import Any

from dora_diffusion.config import ConfigError, TrainConfig, without_effect
from dora_diffusion.config.config_file import read_config_file
from dora_diffusion.config.features.held_out import HeldOutSettings
from dora_diffusion.config.fields import require
from dora_diffusion.config.flag_map import find_training_setting
from dora_diffusion.config.problems import Problems, prefixed
from dora_diffusion.config.train import settings_by_name
from dora_diffusion.config.wording import did_you_mean
from dora_diffusion.evaluation.measures import MEASURES

BASE = "base"
"""Row of the untrained model in every study."""

# Settings that the study sets for each trial.
_RESERVED = (
    "pretrained_model_name_or_path", "dataset_config", "instance_data_dir", "instance_prompt",
    "class_word", "class_data_dir", "seed", "num_train_epochs",
)  # fmt: skip
_HELD_OUT = frozenset(setting.name for setting in fields(HeldOutSettings))


@dataclass(frozen=True)
class Method:
    """Training method of a study.

    Attributes:
        name: Row in the report.
        settings: Training settings that differ from the study's ``common`` settings.
        learning_rates: Learning rates, each with its own row; empty: the rate is tuned.
        rate_of: Another method whose tuned rate is used.
    """

    name: str
    settings: Mapping[str, Any]
    learning_rates: tuple[float, ...] = ()
    rate_of: str = ""

    @property
    def is_tuned(self) -> bool:
        """True if the method's learning rate is tuned."""
        return not self.learning_rates and not self.rate_of


@dataclass(frozen=True)
class Tuning:
    """Tuning of learning rates, on other subjects, with the same number of trials per method.

    Chooses the rate with the best figure among the rates that keep other figures near the base's;
    without any such rate, the smallest one.

    Attributes:
        subjects: Names of toy subjects, or folders of photos, which the study must not report.
        seeds: Seeds of each subject.
        learning_rates: Rates to try, unless a method has its own in ``method_rates``.
        method_rates: Method -> rates to try, the same number for each method.
        best: Figure that decides.
        keep: Figure -> largest difference from the base's, in the direction of worse.
    """

    subjects: tuple[Any, ...]
    seeds: tuple[int, ...] = (0,)
    learning_rates: tuple[float, ...] = ()
    method_rates: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    best: str = "subject_similarity"
    keep: Mapping[str, float] = field(default_factory=lambda: {"others_kind": 0.02})

    def rates(self, method: str) -> tuple[float, ...]:
        """Return the learning rates to try for a method."""
        return self.method_rates.get(method, self.learning_rates)


@dataclass(frozen=True)
class SamplingOptions:
    """Sampling options for images of trained models.

    Attributes:
        inference_steps: Denoising steps.
        guidance_scale: Guidance scale.
        batch_size: Images per batch.
        metric_models: Image-similarity models for photos, as for `evaluate`.
        analysis_points: Number of evenly spaced checkpoints whose weights are analyzed; 0: none.
    """

    inference_steps: int = 25
    guidance_scale: float = 3.5
    batch_size: int = 8
    metric_models: tuple[str, ...] = ()
    analysis_points: int = 4


@dataclass(frozen=True)
class Study:
    """Settings of a study.

    Attributes:
        base: Base model of all trials.
        methods: Methods to compare.
        subjects: Names of toy subjects; or, for photos, mappings with ``photos``, ``held_out``,
            ``instance_prompt`` and ``class_word``.
        seeds: Seeds of each method on each subject.
        seeds_per_subject: Number of seeds per subject, assigned in rotation; None: all. With 1, and
            as many seeds as subjects, each subject has another seed.
        common: Training settings of all methods.
        reference: Reference row of differences: a method, with its rate if it has several.
        tune: Tuning of rates; None if all methods have rates.
        asked: Sampling options of trained models.

    Raises:
        ConfigError: If a value is missing, unknown or not valid.
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
            f"seeds is {[*self.seeds]}; list each seed once: a repeated one is the same trial",
            "seeds",
        )
        per_subject = self.seeds_per_subject
        is_number = isinstance(per_subject, int) and not isinstance(per_subject, bool)
        require(
            per_subject is None or is_number,
            f"seeds_per_subject is {per_subject!r}; it must be a number",
            "seeds_per_subject",
        )
        require(
            per_subject is None or 1 <= per_subject <= len(self.seeds),
            f"seeds_per_subject is {per_subject}; there are {len(self.seeds)} seeds",
            "seeds_per_subject",
        )
        require(
            BASE not in names,
            f"a method is called {BASE}, the name of the untrained model; rename it",
            "methods",
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
            f"methods.{method.name}: rate_of {method.rate_of} must name a method with one rate",
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
            _check_name(
                "tune.method_rates", name, [method.name for method in self.methods], "method"
            )
        require(bool(tuned), "tune has no effect: every method has a learning rate", "tune")
        counts = {name: len(self.tune.rates(name)) for name in tuned}
        require(
            len(set(counts.values())) <= 1 and 0 not in counts.values(),
            f"all methods must be tuned with the same number of rates, got {counts}",
            "tune",
        )
        shared = [s for s in self.tune.subjects if s in self.subjects]
        require(not shared, f"tune has reported subjects {shared}; tune on other subjects", "tune")
        for name in (self.tune.best, *self.tune.keep):
            key = "tune.best" if name == self.tune.best else "tune.keep"
            _check_name(key, name.partition("@")[0], MEASURES, "measure")

    def rows(self, method: Method, rates: Sequence[float] | None = None) -> list[str]:
        """Names of a method's rows in the report, one for each learning rate.

        Args:
            method: A method of the study.
            rates: Its learning rates, if known; a tuned method has one.
        """
        if rates is None:
            rates = method.learning_rates
        return [f"{method.name} {r:g}" for r in rates] if len(rates) > 1 else [method.name]

    def rates_to_try(self, method: Method) -> Sequence[float]:
        """Return all learning rates that a method may be trained with."""
        if method.rate_of:
            return self.rates_to_try(next(m for m in self.methods if m.name == method.rate_of))
        return method.learning_rates or (self.tune.rates(method.name) if self.tune else ())

    def training(self, method: Method) -> TrainConfig:
        """Training settings of a method, without the settings of a trial."""
        return TrainConfig.from_dict({**self.common, **method.settings})

    def pairs(self) -> list[tuple[int, int]]:
        """Pairs of index in ``subjects`` and seed, ordered by round of seeds."""
        count, subjects = self.seeds_per_subject, range(len(self.subjects))
        if count is None:
            return [(subject, seed) for seed in self.seeds for subject in subjects]
        turned = [*self.seeds, *self.seeds]
        start = {subject: subject % len(self.seeds) for subject in subjects}
        return [(s, turned[start[s] + turn]) for turn in range(count) for s in subjects]

    def reasons(self) -> list[str]:
        """Explain the settings of methods that have no effect."""
        messages = []
        for method in self.methods:
            inactive = without_effect(self.training(method), set(method.settings))
            messages += [f"{method.name}: {reason}" for reason in inactive.values()]
        return messages

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Study:
        """Build a study from plain values, as in YAML.

        Raises:
            ConfigError: If a key is unknown, or a value is not valid.
        """
        values = _mapping("the study", values)
        _check_keys("the study", values, cls)
        for name in ("methods", "subjects"):
            require(name in values, f"{name} is missing", name)
        methods = _mapping("methods", values["methods"])
        common = _mapping("common", values.get("common") or {})
        default_rates = _rates("common", common.pop("learning_rate", ()))
        tune, problems, parsed = values.get("tune"), Problems(), list[Method]()
        with problems.collect():
            _check_settings("common", common)
        for name, spec in methods.items():
            with problems.collect():
                parsed.append(_method(name, spec or {}, default_rates))
        problems.raise_all()
        return cls(
            base=str(values.get("base", TrainConfig().pretrained_model_name_or_path)),
            methods=tuple(parsed),
            subjects=_tuple(values["subjects"]),
            seeds=_seeds(values.get("seeds", 1)),
            seeds_per_subject=values.get("seeds_per_subject"),
            common=common,
            reference=str(values.get("reference") or ""),
            tune=None if tune is None else _tuning(_mapping("tune", tune)),
            asked=_sampling_options(_mapping("asked", values.get("asked") or {})),
        )


def read_study(path: str | Path) -> Study:
    """Read a study from a YAML file.

    Raises:
        ConfigError: If the file cannot be read, or is not a valid study.
    """
    with prefixed(f"{path}: "):
        return Study.from_dict(read_config_file(path))


def _method(name: str, spec: Any, default_rates: tuple[float, ...]) -> Method:
    section = f"methods.{name}"
    values = _mapping(section, spec)
    rates = _rates(section, values.pop("learning_rate", ()))
    rate_of = str(values.pop("rate_of", "") or "")
    require(
        not (rates and rate_of),
        f"{section}: give learning_rate or rate_of, not both",
        "learning_rate",
    )
    _check_settings(section, values)
    return Method(str(name), values, rates or (() if rate_of else default_rates), rate_of)


def _tuning(values: Mapping[str, Any]) -> Tuning:
    _check_keys("tune", values, Tuning)
    require("subjects" in values, "tune.subjects is missing", "tune")
    method_rates = _mapping("tune.method_rates", values.get("method_rates") or {})
    optional = {name: values[name] for name in ("best", "keep") if name in values}
    return Tuning(
        _tuple(values["subjects"]),
        _seeds(values.get("seeds", 1)),
        _rates("tune", values.get("learning_rates", ())),
        {name: _rates(f"tune.method_rates.{name}", rates) for name, rates in method_rates.items()},
        **optional,
    )


def _sampling_options(values: Mapping[str, Any]) -> SamplingOptions:
    _check_keys("asked", values, SamplingOptions)
    return SamplingOptions(**{**values, "metric_models": _tuple(values.get("metric_models") or ())})


def _check_settings(section: str, values: Mapping[str, Any]) -> None:
    known, problems = settings_by_name(), Problems()
    for name in values:
        with problems.collect(f"{section}: "):
            # A study has its own held-out photos.
            is_reserved = name in (*_RESERVED, *_HELD_OUT)
            is_reserved = is_reserved or find_training_setting(name, known).resume == "ignored"
            require(not is_reserved, f"{name} is set by the study; leave it out", name)
    problems.raise_all()


def _check_name(key: str, name: str, known: Collection[str], kind: str) -> None:
    problem = f"{key}: there is no {kind} {name!r}{did_you_mean(name, known)}"
    require(name in known, f"{problem}; there are {', '.join(known)}", key)


def _check_keys(section: str, values: Mapping[str, Any], kind: Any) -> None:
    known = [field.name for field in fields(kind)]
    unknown = [f"{name}{did_you_mean(str(name), known)}" for name in values if name not in known]
    require(
        not unknown, f"{section} has no {', '.join(unknown)}; it has {', '.join(known)}", section
    )


def _mapping(section: str, value: Any) -> dict[str, Any]:
    require(isinstance(value, Mapping), f"{section} must contain 'name: value' lines", section)
    return dict(value)


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _rates(section: str, value: Any) -> tuple[float, ...]:
    try:
        rates = tuple(float(rate) for rate in _tuple(value))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{section}: {value!r} is not a learning rate", "learning_rate"
        ) from error
    require(
        all(rate > 0 for rate in rates),
        f"{section}: learning rates must be greater than 0",
        "learning_rate",
    )
    return rates


def _seeds(value: Any) -> tuple[int, ...]:
    """Parse a number of seeds, which start at 0, or a list of seeds."""
    try:
        return tuple(map(int, range(value) if isinstance(value, Integral) else value))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"seeds is {value!r}; it must be a number of seeds, or a list of them", "seeds"
        ) from error
