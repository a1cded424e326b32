"""An input that is recomputed for several layers is computed once, and let go by the last."""

from __future__ import annotations

import gc
import weakref

import torch
from torch import Tensor

from dora_diffusion.numerics.fast.source import Recomputation


def test_it_computes_once_for_all_users_and_then_lets_go():
    calls: list[Tensor] = []

    def double(kept: Tensor) -> Tensor:
        calls.append(kept)
        return 2 * kept

    recomputation, kept = Recomputation(double), torch.arange(4.0)
    for _ in range(3):
        recomputation.add_user()
    results = [recomputation.run(kept) for _ in range(3)]
    assert len(calls) == 1
    assert all(torch.equal(result, 2 * kept) for result in results)
    alive = weakref.ref(results[0])
    del results
    gc.collect()
    assert alive() is None
    # A second backward pass computes once more.
    assert torch.equal(recomputation.run(kept), 2 * kept)
    assert len(calls) == 2
