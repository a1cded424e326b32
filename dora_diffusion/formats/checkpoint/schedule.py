"""Noise schedule of a model: what its UNet predicts, and whether it ends in pure noise.

A Diffusers folder has it in its scheduler's configuration. A single file may say it by empty
tensors, as ComfyUI reads them, or in its metadata; most say nothing, and predict the noise.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from dora_diffusion.config.base import BaseModel
from dora_diffusion.config.families import PREDICTION_TYPES, Family
from dora_diffusion.formats.adapter.metadata import ZERO_TERMINAL_SNR, AdapterMetadata, without_path

PREDICTION, ZERO_SNR = "prediction_type", "rescale_betas_zero_snr"
EPSILON, V = PREDICTION_TYPES
CONFIGURED = "its scheduler's configuration"
_FLAGS = "the flags given"
# Empty tensors by which a file says how its noise schedule is meant.
MARKERS: Mapping[str, Mapping[str, Any]] = {"v_pred": {PREDICTION: V}, "ztsnr": {ZERO_SNR: True}}
# InvokeAI takes a file of Stable Diffusion 2 for one that predicts v, unless its training ended at
# this step: that of the released model which predicts the noise.
STEP, EPSILON_STEP = "global_step", 220000
# What `modelspec.prediction_type` says, and the ends of Stable Diffusion 2's architectures.
_PREDICTIONS = {"v": V, "epsilon": EPSILON}
_ARCHITECTURES = {"-768-v": V, "-512": EPSILON}


class ScheduleInfo(NamedTuple):
    """Statement of one source on a model's noise schedule.

    Attributes:
        source: Who says so, in words.
        settings: Of a scheduler: ``prediction_type`` and ``rescale_betas_zero_snr``, as far as
            they are said.
        is_own: The model, or what is usual of its kind, says so.
    """

    source: str
    settings: Mapping[str, Any]
    is_own: bool = True


class NoiseSchedule(NamedTuple):
    """Noise schedule of a model.

    Attributes:
        prediction_type: ``"epsilon"``, ``"v_prediction"``; ``""`` where nobody says it.
        zero_terminal_snr: The last timestep is pure noise (arXiv:2305.08891).
        sources: Who says the one, and the other where it is true.
        is_own: The model itself, or its kind.
    """

    prediction_type: str
    zero_terminal_snr: bool
    sources: tuple[str, ...]
    is_own: bool

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of a scheduler."""
        return {PREDICTION: self.prediction_type, ZERO_SNR: self.zero_terminal_snr}

    @property
    def is_configured(self) -> bool:
        """True if it is a scheduler's configuration alone, so that nothing was chosen."""
        return set(self.sources) == {CONFIGURED}

    def __str__(self) -> str:
        says = {EPSILON: "epsilon prediction", V: "v-prediction"}
        words = [says.get(self.prediction_type, self.prediction_type)]
        words += ["zero terminal SNR"] * self.zero_terminal_snr
        if len(set(self.sources)) == 1:
            return f"{' with '.join(words)}, by {self.sources[0]}"
        each = zip(words, self.sources, strict=False)
        return " with ".join(f"{word}, by {source}" for word, source in each)


def choose_schedule(name: str, statements: Iterable[ScheduleInfo]) -> NoiseSchedule:
    """Choose the first statement on either setting; ``""`` and no zero terminal SNR without one.

    Args:
        name: Of the model, for the message.
        statements: The strongest first.

    Raises:
        ValueError: If zero terminal SNR is asked for of a model that predicts the noise.
    """
    statements = list(statements)
    said = next((s for s in statements if s.settings.get(PREDICTION)), ScheduleInfo("", {}))
    prediction = said.settings.get(PREDICTION, "")
    zero = next((s for s in statements if s.settings.get(ZERO_SNR) is not None), None)
    is_zero = zero is not None and bool(zero.settings[ZERO_SNR])
    if zero is not None and is_zero and prediction == EPSILON:
        if zero.source == _FLAGS:
            raise ValueError(
                f"{name} predicts the noise ({said.source}), which at zero terminal SNR tells "
                "nothing of the image: give --prediction_type v_prediction too, or leave "
                "--zero_terminal_snr out"
            )
        # Somebody who says v beside it speaks of another model.
        is_zero = zero.settings.get(PREDICTION) == EPSILON
    # A model that says the same itself needs nobody else's word.
    said = _own_word(statements, PREDICTION, prediction) or said
    zero = (_own_word(statements, ZERO_SNR, True) if is_zero else None) or zero
    sources = (said.source, zero.source) if zero is not None and is_zero else (said.source,)
    is_own = said.is_own and (zero is None or zero.is_own)
    return NoiseSchedule(prediction, is_zero, sources, is_own)


def _own_word(statements: Iterable[ScheduleInfo], name: str, value: object) -> ScheduleInfo | None:
    own = (s for s in statements if s.is_own and s.settings.get(name) is not None)
    first = next(own, None)
    return first if first is not None and first.settings[name] == value else None


def statements_on(
    base: BaseModel,
    own: Sequence[ScheduleInfo],
    usual: Sequence[ScheduleInfo] = (),
    adapters: Sequence[AdapterMetadata] = (),
) -> list[ScheduleInfo]:
    """Return the statements on a model's noise schedule, the strongest first.

    Args:
        base: The model, with what is asked of it.
        own: What it says itself.
        usual: What is usual of its kind.
        adapters: What is known of the adapters that it gets. One that was trained from a model of
            its name comes before the model: its run may have been told better.
    """
    name = _file_or_name(str(base.path))
    settings = {PREDICTION: base.prediction_type, ZERO_SNR: base.zero_terminal_snr}
    of_this = [a for a in adapters if _file_or_name(a.base_model) == name]
    others = [a for a in adapters if a not in of_this]
    asked = ScheduleInfo(_FLAGS, settings, False)
    return [asked, *map(_by_adapter, of_this), *own, *map(_by_adapter, others), *usual]


def _file_or_name(model: str) -> str:
    """Return the part of a model's name that stays where it is called from another folder."""
    is_file = model.endswith(".safetensors")
    return re.split(r"[/\\]", model)[-1] if is_file else without_path(model)


def _by_adapter(metadata: AdapterMetadata) -> ScheduleInfo:
    zero = metadata.extra.get(ZERO_TERMINAL_SNR)
    settings = {
        PREDICTION: metadata.extra.get("prediction_type"),
        ZERO_SNR: zero == "True" if zero else None,
    }
    return ScheduleInfo("the adapter's metadata", settings, False)


def schedule_facts(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return an adapter's metadata on the noise schedule that it is trained on.

    Args:
        settings: Of a scheduler, as far as they are known.
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
    said = {f"the file's {' and '.join(markers)}": by_key, "the file's metadata": by_metadata}
    return [ScheduleInfo(source, settings) for source, settings in said.items() if settings]


def usual_of(family: Family) -> list[ScheduleInfo]:
    """Return the usual statement for a model that says nothing; none where two releases differ."""
    if family.has_two_predictions:
        return []
    return [ScheduleInfo("what is usual: the file says nothing", {PREDICTION: EPSILON})]


def markers_for(family: Family, settings: Mapping[str, Any]) -> set[str]:
    """The marker tensors that a single file of these settings gets."""
    if settings.get(PREDICTION) != V:
        return set()
    if settings.get(ZERO_SNR):
        return {"v_pred", "ztsnr"}
    return {"v_pred"} if family.marks_v_prediction else set()
