"""The best DoRA for two weights: a base ``W`` and a tuned ``T``, after any kind of training.

On the output axis the weights that a DoRA of rank r makes of ``W`` are exactly ``D W + E``, with a
positive diagonal ``D`` and a matrix ``E`` of rank r: ``delta = E / D`` has the rank of E, and
``m = norm(D W + E)`` gives every row its scale (arXiv:2402.09353, section 4.1). So the best DoRA
minimises

    |T - D W - E|  =  |(T - W) - diag(e) W - E|        over e = D - 1 > -1 and E of rank r,

in the Frobenius norm. A plain LoRA is the case e = 0, where the truncated singular value
decomposition (SVD) of ``T - W`` is the best E. Here two closed forms alternate, none of which lets
the error grow:

    E = SVD_r((T - W) - diag(e) W)          e_i = <(T - W)_i - E_i, W_i> / |W_i|^2

Where T is a DoRA of rank r, the error falls to 0 by a factor per iteration; Anderson's
extrapolation over the last iterations (J. ACM 12, 1965) takes it there in some ten where the plain
alternation takes up to hundreds. On the input axis the same holds for columns.

The magnitude is the best one for the direction that was found, ``m_i = <T_i, v_i>`` with
``v = (W + delta) / norm(W + delta)``. It is ``norm(D W + E)`` where the alternation has ended, and
``norm(T)`` where T is a DoRA of this rank. It is not ``norm(T)`` always: a channel whose direction
is off by an angle a would then be off by ``2 |T_i| sin(a / 2)`` instead of ``|T_i| sin(a)``, and
for large changes (half of the weight) a plain LoRA would be nearer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from dora_diffusion.numerics.dora import adapted_norm, gain, low_rank_delta, weight_norm
from dora_diffusion.numerics.low_rank import (
    balanced,
    leading_svd,
    random_start,
    rank_of_energy,
)
from dora_diffusion.numerics.precision import full_precision, upcast_dtype
from dora_diffusion.numerics.weights import NORM_AXES, LayerWeights, NormAxis

_MOST_TURNS = 60
# The second iteration in a row that lowers the error by less of itself is the last.
_PROGRESS = 1e-4
_PATIENCE = 1
# Where rounding in float32 leaves nothing to gain, relative to the weight.
_EXACT = 1e-7
# Turns that are extrapolated over.
_MEMORY = 6
# A row's least scale: one that turns around is not held by a positive one.
_LEAST_SCALE = 1e-3
# Power iterations of the first decomposition, and of each that starts from the one before.
_FIRST_ITERATIONS, _NEXT_ITERATIONS = 3, 1


_Fit = tuple[Tensor, Tensor, Tensor, Tensor]
"""``D W + E``: scales ``D`` per channel, and the singular triplets of ``E``."""


@torch.no_grad()
def best_dora(
    weight: Tensor,
    tuned: Tensor,
    rank: int,
    norm_axis: NormAxis = "output",
    *,
    energy: float | None = None,
    start: Tensor | None = None,
) -> LayerWeights:
    """The DoRA of a rank whose adapted weight is nearest to a tuned one; see the module.

    Args:
        weight: The base ``(out, in, *k)``, any floating dtype.
        tuned: The tuned weight, of the same shape.
        rank: Largest rank; a small weight gets less.
        norm_axis: What the magnitude runs along.
        energy: Take the smallest rank that holds this share of the squared singular values of what
            is left of the change once every channel has its best scale.
        start: Scales ``D`` to start from, ``(out,)`` or ``(in,)``, where they are known.

    Returns:
        The layer in float32 (float64 for float64 weights), with ``alpha = rank``.
    """
    with full_precision(weight.device):
        dtype = torch.promote_types(upcast_dtype(weight), upcast_dtype(tuned))
        weight, tuned = weight.to(dtype), tuned.to(dtype)
        base = weight.flatten(1)
        change = tuned.flatten(1) - base
        kernel = weight[0, 0].numel()
        if norm_axis == "input":
            base, change = base.t(), change.t()
        rows = _Rows(base, change, kernel if norm_axis == "input" else 1)
        scale, u, s, vh = _alternate(rows, rank, energy, start)
        scale = rows.spread(scale).unsqueeze(1)
        if norm_axis == "output":
            layer = balanced(u, s, vh, weight.shape)
            up = layer.up / scale.view(-1, *[1] * (weight.ndim - 1))
            layer = dataclasses.replace(layer, up=up)
        else:
            layer = balanced(vh.t(), s, u.t() / scale.t(), weight.shape)
        magnitude = _best_magnitude(weight, tuned, layer, norm_axis)
    return dataclasses.replace(layer, magnitude=magnitude, norm_axis=norm_axis)


def _best_magnitude(
    weight: Tensor, tuned: Tensor, layer: LayerWeights, norm_axis: NormAxis
) -> Tensor:
    """``<T_i, v_i>`` for each channel's direction ``v_i``, at least 0."""
    direction = low_rank_delta(layer.down, layer.up, layer.scale).add_(weight)
    norm = weight_norm(direction, norm_axis)
    others = [dim for dim in range(weight.ndim) if dim != NORM_AXES.index(norm_axis)]
    return gain(direction.mul_(tuned).sum(dim=others), norm).clamp_min(0)


def known_scale(
    weight: Tensor, layers: Sequence[tuple[LayerWeights, float]], norm_axis: NormAxis
) -> Tensor:
    """The scales ``D`` of a sum of adapters: ``W + sum_k s_k (W'_k - W) = D W + E``.

    ``D = 1 + sum_k s_k (g_k - 1)``, over those that have a magnitude on this axis; E then has the
    sum of their ranks, unless one has its magnitude on the other axis. A start for `best_dora`.

    Args:
        weight: The base ``(out, in, *k)``.
        layers: The layers that adapt it, each with its strength.
        norm_axis: The axis of ``D``.
    """
    scale = torch.ones(weight.shape[NORM_AXES.index(norm_axis)])
    for layer, strength in layers:
        if layer.magnitude is not None and layer.norm_axis == norm_axis:
            scale += strength * (gain(layer.magnitude, adapted_norm(weight, layer)) - 1)
    return scale


class _Rows:
    """Base and change as matrices whose rows are scaled; channels of ``group`` rows share one."""

    def __init__(self, base: Tensor, change: Tensor, group: int) -> None:
        self.base, self.change, self.group = base, change, group
        squared = self._per_channel(base)
        self._inverse = torch.where(squared > 0, 1 / squared, 0.0)

    def spread(self, scale: Tensor) -> Tensor:
        """Expand values of channels to rows."""
        return scale.repeat_interleave(self.group)

    def projection(self, matrix: Tensor) -> Tensor:
        """The multiple of the base's channel that each channel holds: ``<M_i, W_i> / |W_i|^2``."""
        return self._per_channel(matrix) * self._inverse

    def rest(self, excess: Tensor) -> Tensor:
        """``(T - W) - diag(e) W``."""
        return torch.addcmul(self.change, self.spread(excess).unsqueeze(1), self.base, value=-1)

    def _per_channel(self, matrix: Tensor) -> Tensor:
        products: Tensor = torch.linalg.vecdot(matrix, self.base)
        return products.view(-1, self.group).sum(1)


def _alternate(rows: _Rows, rank: int, energy: float | None, start: Tensor | None) -> _Fit:
    """Alternate the two closed forms until the error no longer falls.

    From the scales that are best without an update, or those of a plain LoRA, whichever is nearer
    once it has its own: of a change of low rank the first hide what is low in it.
    """
    rank = min(rank, *rows.base.shape)
    given = rows.projection(rows.change) if start is None else start.to(rows.base) - 1
    search = _Search(rows, rank, energy)
    exact = _EXACT * torch.linalg.vector_norm(rows.base).item()
    error, step = search.iterate(given)
    excess, least = given, error
    if start is None:
        error, other_step = search.iterate(torch.zeros_like(given))
        if error < least:
            excess, least, step = torch.zeros_like(given), error, other_step
    extrapolation, idle = _Extrapolation(), 0
    for _ in range(_MOST_TURNS):
        if least <= exact or idle > _PATIENCE:
            break
        tried = extrapolation.next(excess, step)
        error, new_step = search.iterate(tried)
        if error >= least:  # too far: the plain step never is
            extrapolation = _Extrapolation()
            tried = excess + step
            error, new_step = search.iterate(tried)
        idle = 0 if error < (1 - _PROGRESS) * least else idle + 1
        if error < least:
            excess, step, least = tried, new_step, error
    return search.best


class _Search:
    """Best updates for given scales; keeps the nearest of all.

    Attributes:
        best: Of all iterations.
    """

    def __init__(self, rows: _Rows, rank: int, energy: float | None) -> None:
        self._rows, self._rank, self._energy = rows, rank, energy
        self._basis, self._iterations = random_start(rows.base, rank), _FIRST_ITERATIONS
        self._least = float("inf")
        self.best: _Fit

    def iterate(self, excess: Tensor) -> tuple[float, Tensor]:
        """The error with the best update for ``e``, and the step to the best scales for that."""
        excess = excess.clamp_min(_LEAST_SCALE - 1)
        rest = self._rows.rest(excess)
        width = self._rank if self._basis is None else self._basis.shape[1]
        u, s, vh = leading_svd(rest, width, self._basis, self._iterations)
        self._iterations = _NEXT_ITERATIONS
        self._basis = None if self._basis is None else vh.t()
        if self._energy is not None:
            self._rank = rank_of_energy(s[: self._rank], rest, self._energy)
            self._energy = None
        u, s, vh = u[:, : self._rank], s[: self._rank], vh[: self._rank]
        rest.addmm_(u * s, vh, alpha=-1)
        error = torch.linalg.vector_norm(rest).item()
        if error < self._least:
            self.best, self._least = (1 + excess, u, s, vh), error
        return error, self._rows.projection(rest)


class _Extrapolation:
    """Anderson's: where a linear combination of the last steps would vanish."""

    def __init__(self) -> None:
        self._points: list[Tensor] = []
        self._steps: list[Tensor] = []

    def next(self, point: Tensor, step: Tensor) -> Tensor:
        """The next point, from one and the step that the plain alternation takes there."""
        self._points = [*self._points[1 - _MEMORY :], point.double()]
        self._steps = [*self._steps[1 - _MEMORY :], step.double()]
        points, steps = torch.stack(self._points, 1), torch.stack(self._steps, 1)
        if points.shape[1] == 1:
            return point + step
        moved, turned = points.diff(dim=1), steps.diff(dim=1)
        share = torch.linalg.lstsq(turned, steps[:, -1:], driver="gelsd").solution
        target: Tensor = points[:, -1:] + steps[:, -1:] - (moved + turned) @ share
        return target.squeeze(1).to(point.dtype)
