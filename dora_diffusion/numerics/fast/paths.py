"""Which of the two paths of `autograd` is cheaper for a layer, by shape and dtype alone.

With ``P`` positions (rows of a Linear's input, pixels of a convolution's output), the merged-weight
path passes over ``out * fan_in`` numbers to build the weight, the low-rank path over
``P * (out + in)`` to correct activations. So the weight is merged where it is applied at many
positions: attention on large maps, convolutions at high resolution.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dora_diffusion.numerics.precision import keeps_small_updates

# Passes over memory that the two paths differ by, forward and backward together. The merged-weight
# path writes the weight and adds to it, twice. The low-rank path adds to the output, scales its
# gradient, and adds to the input's gradient, where the product with A is a pass for every ten of
# its rows and taps.
MERGED_WEIGHT_PASSES, LOW_RANK_OUTPUT_PASSES, LOW_RANK_INPUT_PASSES, ROWS_PER_PASS = 8, 5, 2, 10


def uses_merged_weight(positions: int, weight: Tensor, rank: int, dtype: torch.dtype) -> bool:
    """Whether building the adapted weight is cheaper than correcting activations.

    Never in low precision, where rounding the sum to the weight's dtype would lose small updates,
    nor where torch rounds the operands of float32 products, as TensorFloat-32 does.
    """
    if not keeps_small_updates(dtype, weight.device.type, "conv" if weight.ndim > 2 else "matmul"):
        return False
    out, inputs = weight.shape[:2]
    input_passes = LOW_RANK_INPUT_PASSES + rank * weight.shape[2:].numel() / ROWS_PER_PASS
    low_rank = positions * (LOW_RANK_OUTPUT_PASSES * out + input_passes * inputs)
    return MERGED_WEIGHT_PASSES * weight.numel() < low_rank
