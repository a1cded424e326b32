"""Fit of layers: settings, ranks, and the sum of errors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dora_diffusion.config import ConfigError
from dora_diffusion.export.fit import FitSettings
from dora_diffusion.export.fitting import Fitted, decomposed
from dora_diffusion.formats.checkpoint.models import PipelineFolder
from dora_diffusion.numerics.weights import LayerWeights
from tests.export.helpers import MakeAdapter


def test_ranks_by_kind_of_layer() -> None:
    linear, conv = (8, 6), (8, 6, 1, 1)
    both = FitSettings(4, conv_rank=2)
    assert (both.rank_of(linear, 9), both.rank_of(conv, 9)) == (4, 2)
    assert FitSettings(4).rank_of(conv, 9) == 4
    only_conv = FitSettings(None, conv_rank=2)
    assert (only_conv.rank_of(linear, 9), only_conv.rank_of(conv, 9)) == (9, 2)
    assert FitSettings(None, energy=0.5).rank_of(linear, 9) == 9


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"rank": 0}, "rank is 0; it must be at least 1"),
        ({"conv_rank": -1}, "conv_rank is -1; it must be at least 1"),
        *(({"energy": value}, f"energy is {value:g}; it must be above 0 and at most 1")
          for value in (0.0, 1.5, math.nan)),
        ({"method": "loha"}, "method is 'loha'; it must be one of dora, lora (did you mean lora?)"),
        ({"norm_axis": "both"}, "norm_axis is 'both'; it must be one of output, input"),
    ],
    ids=str,
)  # fmt: skip
def test_settings_check_themselves(values: dict[str, Any], line: str) -> None:
    """Whatever is extracted, converted, resized or combined with them."""
    with pytest.raises(ConfigError) as error:
        FitSettings(**{"rank": 1, **values})
    assert str(error.value) == line
    assert FitSettings(1, 1, energy=1.0).energy == 1


def test_what_metadata_say_of_it() -> None:
    assert str(FitSettings(None)) == "nearest DoRA, output axis, sum of the ranks"
    lora = FitSettings(8, 4, 0.95, "lora")
    assert str(lora) == "nearest LoRA, rank 8, conv_rank 4, energy 0.95"
    fitted = Fitted()
    extra = {"trained_alpha": "4", "training_steps": "800"}
    assert fitted.stated(extra, "tuned model", lora) == {
        "training_steps": "800",
        "approximation": str(lora),
        "approximates": "tuned model",
        "approximation_error": "0",
    }


def test_errors_add_up_as_one_vector() -> None:
    layer, fitted = LayerWeights(torch.ones(1, 2), torch.ones(3, 1)), Fitted()
    fitted.add("a", layer, 3.0, 5.0)
    fitted.add("b", layer, 4.0, 12.0)
    fitted.add("c", layer, 0.0, 0.0)
    assert fitted.errors == {"a": 0.6, "b": pytest.approx(1 / 3), "c": 0.0}
    assert fitted.total_error == pytest.approx(5 / 13)


def test_a_plain_lora_is_its_own_approximation(
    sd1_folder: Path, random_adapter: MakeAdapter
) -> None:
    """At a larger rank too, where singular vectors of nothing would fill the file."""
    layers = random_adapter(sd1_folder, axis=None, every=6)
    with PipelineFolder.open(sd1_folder) as pipeline:
        fitted = decomposed(layers, FitSettings(64), pipeline)
    assert all(fitted.layers[name] is layer for name, layer in layers.items())
    assert not any(fitted.errors.values())
    assert fitted.total_error == 0
