"""Noise schedule of a model: the UNet's prediction type, and whether it ends in pure noise.

A Diffusers folder states it in the scheduler's configuration. A single file may state it by empty
tensors, which ComfyUI reads, or in its metadata. Most files state nothing and predict the noise.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from dora_diffusion.config.base import BaseModel
from dora_diffusion.config.families import FLOW, PREDICTION_TYPES, Family
from dora_diffusion.formats.adapter.metadata import ZERO_TERMINAL_SNR, AdapterMetadata, without_path

PREDICTION, ZERO_SNR = "prediction_type", "rescale_betas_zero_snr"
EPSILON, V = PREDICTION_TYPES
CONFIGURED = "its scheduler's configuration"
_FLAGS = "the flags given"
# Empty tensors by which a file states its noise schedule.
MARKERS: Mapping[str, Mapping[str, Any]] = {"v_pred": {PREDICTION: V}, "ztsnr": {ZERO_SNR: True}}
# InvokeAI assumes that a Stable Diffusion 2 file predicts v, unless its training ended at this
# step, the last one of the released model that predicts the noise.
STEP, EPSILON_STEP = "global_step", 220000
# Values of `modelspec.prediction_type`, and ends of Stable Diffusion 2's architectures.
_PREDICTIONS = {"v": V, "epsilon": EPSILON}
_ARCHITECTURES = {"-768-v": V, "-512": EPSILON}


class ScheduleInfo(NamedTuple):
    """Statement of one source on a model's noise schedule.

    Attributes:
        source: Name of the source.
        settings: Stated settings of a scheduler: ``prediction_type``, ``rescale_betas_zero_snr``.
        is_own: Whether the source is the model or the default of its family.
    """

    source: str
    settings: Mapping[str, Any]
    is_own: bool = True


class NoiseSchedule(NamedTuple):
    """Noise schedule of a model.

    Attributes:
        prediction_type: ``"epsilon"``, ``"v_prediction"``; ``""`` if unknown.
        zero_terminal_snr: Whether the last timestep is pure noise (arXiv:2305.08891).
        sources: Source of the prediction type, and of zero terminal SNR if it is True.
        is_own: Whether the sources are the model or the default of its family.
    """

    prediction_type: str
    zero_terminal_snr: bool
    sources: tuple[str, ...]
    is_own: bool

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of a scheduler; none of a flow's."""
        if self.prediction_type == FLOW:
            return {}
        return {PREDICTION: self.prediction_type, ZERO_SNR: self.zero_terminal_snr}

    @property
    def is_configured(self) -> bool:
        """True if the only source is a scheduler's configuration, so that nothing was chosen."""
        return set(self.sources) == {CONFIGURED}

    def __str__(self) -> str:
        says = {EPSILON: "epsilon prediction", V: "v-prediction", FLOW: "flow prediction"}
        words = [says.get(self.prediction_type, self.prediction_type)]
        words += ["zero terminal SNR"] * self.zero_terminal_snr
        if len(set(self.sources)) == 1:
            return f"{' with '.join(words)}, by {self.sources[0]}"
        phrases = zip(words, self.sources, strict=False)
        return " with ".join(f"{word}, by {source}" for word, source in phrases)


def choose_schedule(name: str, statements: Iterable[ScheduleInfo]) -> NoiseSchedule:
    """Choose the first statement on each setting; the default is ``""`` without zero terminal SNR.

    Args:
        name: Name of the model, for the message.
        statements: Statements, the strongest first.

    Raises:
        ValueError: If zero terminal SNR is requested for a model that predicts the noise.
    """
    statements = list(statements)
    statement = next((s for s in statements if s.settings.get(PREDICTION)), ScheduleInfo("", {}))
    prediction = statement.settings.get(PREDICTION, "")
    zero = next((s for s in statements if s.settings.get(ZERO_SNR) is not None), None)
    is_zero = zero is not None and bool(zero.settings[ZERO_SNR])
    if zero is not None and is_zero and prediction == EPSILON:
        if zero.source == _FLAGS:
            raise ValueError(
                f"{name} predicts the noise ({statement.source}), which at zero terminal SNR has "
                "no information on the image: give --prediction_type v_prediction too, or leave "
                "--zero_terminal_snr out"
            )
        # A source that states v-prediction as well is about another model.
        is_zero = zero.settings.get(PREDICTION) == EPSILON
    # Prefer the model's own statement as the source if it agrees.
    statement = _own_statement(statements, PREDICTION, prediction) or statement
    zero = (_own_statement(statements, ZERO_SNR, True) if is_zero else None) or zero
    sources = (statement.source, *([zero.source] if zero is not None and is_zero else []))
    is_own = statement.is_own and (zero is None or zero.is_own)
    return NoiseSchedule(prediction, is_zero, sources, is_own)


def _own_statement(
    statements: Iterable[ScheduleInfo], name: str, value: object
) -> ScheduleInfo | None:
    own_statements = (s for s in statements if s.is_own and s.settings.get(name) is not None)
    first = next(own_statements, None)
    return first if first is not None and first.settings[name] == value else None


def statements_on(
    base: BaseModel,
    own_statements: Sequence[ScheduleInfo],
    usual: Sequence[ScheduleInfo] = (),
    adapters: Sequence[AdapterMetadata] = (),
) -> list[ScheduleInfo]:
    """Return the statements on a model's noise schedule, the strongest first.

    Args:
        base: The model, with the user's settings.
        own_statements: Statements of the model.
        usual: Defaults of its family.
        adapters: Metadata of its adapters. An adapter that was trained on a model of this name
            precedes the model's statements, since its run may have corrected them.
    """
    name = _file_or_name(str(base.path))
    settings = {PREDICTION: base.prediction_type, ZERO_SNR: base.zero_terminal_snr}
    of_this = [a for a in adapters if _file_or_name(a.base_model) == name]
    other_adapters = [a for a in adapters if a not in of_this]
    by_adapter = [[*map(_by_adapter, group)] for group in (of_this, other_adapters)]
    requested = ScheduleInfo(_FLAGS, settings, False)
    return [requested, *by_adapter[0], *own_statements, *by_adapter[1], *usual]


def _file_or_name(model: str) -> str:
    """Return the part of a model's name that does not depend on its folder."""
    is_file = model.endswith(".safetensors")
    return re.split(r"[/\\]", model)[-1] if is_file else without_path(model)


def _by_adapter(metadata: AdapterMetadata) -> ScheduleInfo:
    zero = metadata.extra.get(ZERO_TERMINAL_SNR)
    prediction = metadata.extra.get("prediction_type")
    settings = {PREDICTION: prediction, ZERO_SNR: zero == "True" if zero else None}
    return ScheduleInfo("the adapter's metadata", settings, False)


def schedule_facts(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return an adapter's metadata on the noise schedule of its training.

    Args:
        settings: Known settings of a scheduler.
    """
    prediction, zero = settings.get(PREDICTION, ""), settings.get(ZERO_SNR)
    is_said = prediction == V and zero is not None
    return {"prediction_type": prediction, ZERO_TERMINAL_SNR: str(bool(zero)) if is_said else ""}


def stated_by_file(metadata: Mapping[str, str], names: Iterable[str]) -> list[ScheduleInfo]:
    """Return the statements of a single file, by marker tensors and in its metadata."""
    markers = [marker for marker in MARKERS if marker in set(names)]
    by_key = {key: value for marker in markers for key, value in MARKERS[marker].items()}
    architecture = metadata.get("modelspec.architecture", "").partition("/")[0]
    stated = _PREDICTIONS.get(metadata.get("modelspec.prediction_type", ""), "")
    for end, prediction in _ARCHITECTURES.items():
        if not stated and architecture.endswith(end):
            stated = prediction
    by_metadata: dict[str, Any] = {PREDICTION: stated} if stated else {}
    if metadata.get("ss_zero_terminal_snr") == "True":
        by_metadata[ZERO_SNR] = True
    by_source = {f"the file's {' and '.join(markers)}": by_key, "the file's metadata": by_metadata}
    return [ScheduleInfo(source, settings) for source, settings in by_source.items() if settings]


def usual_of(family: Family) -> list[ScheduleInfo]:
    """Return the default for a model without a statement; none if releases of the family differ."""
    if family.has_two_predictions:
        return []
    return [
        ScheduleInfo("the default: the file states nothing", {PREDICTION: family.prediction_type})
    ]


def markers_for(family: Family, settings: Mapping[str, Any]) -> set[str]:
    """Return the marker tensors of a single file with these settings."""
    if settings.get(PREDICTION) != V:
        return set()
    if settings.get(ZERO_SNR):
        return {"v_pred", "ztsnr"}
    return {"v_pred"} if family.marks_v_prediction else set()
