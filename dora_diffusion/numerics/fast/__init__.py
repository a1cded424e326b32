"""The formula of `numerics.dora`, faster: the one entry to all performance work.

Results are the page's to rounding, which tests hold in every dtype. What is saved, and where:

* `norms`: the norm through the rank, without a dense temporary, for layers of one shape together;
* `layout`: where the parameters of many layers lie, so that an operation serves all of them;
* `plan`: all that follows from parameters alone, for all layers together, once per optimizer step;
* `gain`: one adapter's part in that;
* `watch`: what that reads back from the device, without a wait;
* `autograd`: a layer's output and gradients, from fewer kept activations and fewer passes;
* `traced`: the same where `torch.compile` takes the layer apart;
* `operation`, `product`: gradients, and products on a CPU;
* `source`: inputs that are recomputed instead of kept.

The environment variable ``DORA_DIFFUSION_FAST=0`` turns it off: layers then compute the page.
"""

from __future__ import annotations

import os

from torch import Tensor

from dora_diffusion.numerics import dora as page
from dora_diffusion.numerics.fast.autograd import dora
from dora_diffusion.numerics.fast.gain import Gain, PlanInputs, WeightStatistics
from dora_diffusion.numerics.fast.layout import Layout, layouts_of
from dora_diffusion.numerics.fast.norms import factored_norm
from dora_diffusion.numerics.fast.operation import serves
from dora_diffusion.numerics.fast.plan import gains_of, make_gains
from dora_diffusion.numerics.fast.source import Recomputation, Source
from dora_diffusion.numerics.fast.traced import traced_dora
from dora_diffusion.numerics.fast.watch import Watch
from dora_diffusion.numerics.weights import LayerWeights

__all__ = [
    "ENABLED",
    "Gain",
    "Layout",
    "PlanInputs",
    "Recomputation",
    "Source",
    "Watch",
    "WeightStatistics",
    "adapted_norm",
    "dora",
    "gains_of",
    "layouts_of",
    "make_gains",
    "serves",
    "traced_dora",
]

_VARIABLE = "DORA_DIFFUSION_FAST"


def _enabled(value: str) -> bool:
    if value not in ("", "0", "1"):
        raise ValueError(f"{_VARIABLE} is {value!r}; it must be 0 (plain autograd) or 1 (default)")
    return value != "0"


# Read once: layers ask at every call, and torch.compile cannot trace the environment.
ENABLED = _enabled(os.environ.get(_VARIABLE, ""))


def adapted_norm(weight: Tensor, layer: LayerWeights) -> Tensor:
    """``norm(W + s B A)``, by the factored norm or by the page: ``(out,)`` or ``(in,)``."""
    if not ENABLED:
        return page.adapted_norm(weight, layer)
    return factored_norm(weight, layer.down, layer.up, layer.scale, layer.norm_axis)
