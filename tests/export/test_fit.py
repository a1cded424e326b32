"""Fit of layers: settings, ranks, and the sum of errors."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dora_diffusion.config import ConfigError
from dora_diffusion.export.fitting import FitSettings


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
