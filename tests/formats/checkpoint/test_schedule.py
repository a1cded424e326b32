"""Sources of a model's prediction type, and of a schedule that ends in pure noise."""

from __future__ import annotations

from typing import Any

import pytest

from dora_diffusion.config.base import BaseModel
from dora_diffusion.config.families import FAMILIES
from dora_diffusion.formats.adapter.metadata import AdapterMetadata
from dora_diffusion.formats.checkpoint.models import by_scheduler
from dora_diffusion.formats.checkpoint.schedule import (
    NoiseSchedule,
    choose_schedule,
    markers_for,
    stated_by_file,
    statements_on,
    usual_of,
)

SDXL, SD2 = FAMILIES["sdxl"], FAMILIES["sd2"]
E, V = "epsilon", "v_prediction"
SPEC, KIND = "modelspec.prediction_type", "modelspec.architecture"
NOISE = {"prediction_type": E}
ADAPTER = {"prediction_type": V, "zero_terminal_snr": "True"}


def chosen(
    keys: tuple[str, ...] = (), metadata: dict[str, str] | None = None, *, family: Any = SDXL,
    adapter: AdapterMetadata | None = None, config: dict[str, Any] | None = None, **flags: Any,
) -> NoiseSchedule:  # fmt: skip
    own = stated_by_file(metadata or {}, keys) if config is None else [by_scheduler(config)]
    base, adapters = BaseModel("models/x.safetensors", **flags), [adapter] if adapter else []
    return choose_schedule("x", statements_on(base, own, usual_of(family), adapters))


@pytest.mark.parametrize(
    ("given", "prediction", "zero", "words"),
    [
        ({}, E, False, "epsilon prediction, by the default"),
        ({"keys": ("v_pred",)}, V, False, "v-prediction, by the file's v_pred"),
        ({"keys": ("ztsnr", "v_pred")}, V, True, "SNR, by the file's v_pred and ztsnr"),
        ({"keys": ("ztsnr",)}, E, False, "epsilon"),  # as ComfyUI reads it
        ({"metadata": {SPEC: "v"}}, V, False, "the file's metadata"),
        ({"metadata": {SPEC: "epsilon"}, "keys": ("v_pred",)}, V, False, "v_pred"),
        ({"metadata": {SPEC: "v", "ss_zero_terminal_snr": "True"}}, V, True, ""),
        ({"family": SD2}, "", False, ""),
        ({"family": SD2, "metadata": {KIND: "stable-diffusion-v2-512"}}, E, False, "metadata"),
        ({"prediction_type": V}, V, False, "the flags given"),
        (
            {"keys": ("v_pred",), "zero_terminal_snr": True}, V, True,
            "v-prediction, by the file's v_pred with zero terminal SNR, by the flags given",
        ),
        ({"keys": ("v_pred", "ztsnr"), "prediction_type": E}, E, False, "the flags given"),
        ({"keys": ("v_pred", "ztsnr"), "zero_terminal_snr": False}, V, False, ""),
        # An adapter's metadata tells it of a silent file, and of the base that it was trained from.
        ({"adapter": AdapterMetadata(extra=ADAPTER)}, V, True, "the adapter's metadata"),
        ({"adapter": AdapterMetadata(extra=ADAPTER), "prediction_type": E}, E, False, "default"),
        ({"adapter": AdapterMetadata(extra=ADAPTER), "config": {}}, E, False, "scheduler's"),
        (
            {"adapter": AdapterMetadata(base_model="x.safetensors", extra=ADAPTER), "config": {}},
            V, True, "the adapter's metadata",
        ),
        ({"adapter": AdapterMetadata(extra=NOISE), "keys": ("v_pred",)}, V, False, "v_pred"),
        ({"config": {"prediction_type": E, "rescale_betas_zero_snr": True}}, E, True, ""),
    ],
)  # fmt: skip
def test_who_decides(given: dict[str, Any], prediction: str, zero: bool, words: str) -> None:
    schedule = chosen(**given)
    assert (schedule.prediction_type, schedule.zero_terminal_snr) == (prediction, zero)
    assert words in str(schedule)


def test_a_model_needs_nobody_elses_word_for_what_it_says_itself() -> None:
    adapter = AdapterMetadata(base_model="x.safetensors", extra=ADAPTER)
    same = chosen(("v_pred", "ztsnr"), adapter=adapter, prediction_type=V)
    assert same.is_own
    assert "adapter" not in str(same)
    assert not chosen(adapter=adapter).is_own


def test_zero_terminal_snr_of_a_noise_prediction_is_refused() -> None:
    with pytest.raises(ValueError, match=r"x predicts the noise .*--prediction_type v_prediction"):
        chosen(zero_terminal_snr=True)
    assert chosen(zero_terminal_snr=True, prediction_type=V).zero_terminal_snr


def test_markers_are_those_that_readers_know() -> None:
    assert markers_for(SDXL, {"prediction_type": E, "rescale_betas_zero_snr": True}) == set()
    assert markers_for(SDXL, {"prediction_type": V}) == {"v_pred"}
    assert markers_for(SD2, {"prediction_type": V}) == set()
    zero = {"prediction_type": V, "rescale_betas_zero_snr": True}
    assert markers_for(SD2, zero) == markers_for(SDXL, zero) == {"v_pred", "ztsnr"}
