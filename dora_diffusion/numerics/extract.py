"""The best DoRA for two weights: a base ``W`` and a tuned ``T``, after any kind of training.

On the output axis, a DoRA of rank r on ``W`` represents exactly the weights ``D W + E``, with a
positive diagonal ``D`` and a matrix ``E`` of rank r: ``delta = E / D`` has the rank of E, and
``m = norm(D W + E)`` gives every row its scale (arXiv:2402.09353, section 4.1). So the best DoRA
minimises

    |T - D W - E|  =  |(T - W) - diag(e) W - E|        over e = D - 1 > -1 and E of rank r,

in the Frobenius norm. A plain LoRA is the case e = 0, where the truncated singular value
decomposition (SVD) of ``T - W`` is the best E. Here two closed forms alternate, neither of which
increases the error:

    E = SVD_r((T - W) - diag(e) W)          e_i = <(T - W)_i - E_i, W_i> / |W_i|^2

If T is a DoRA of rank r, the error converges linearly to 0. Anderson's extrapolation over the last
iterations (J. ACM 12, 1965) needs about ten iterations, instead of up to hundreds. On the input
axis the same holds for columns.

The magnitude is optimal for the direction found, ``m_i = <T_i, v_i>`` with
``v = (W + delta) / norm(W + delta)``. It equals ``norm(D W + E)`` after convergence, and
``norm(T)`` if T is a DoRA of this rank. In general ``norm(T)`` would be worse: a channel whose
direction has an error of angle a would have an error of ``2 |T_i| sin(a / 2)`` instead of
``|T_i| sin(a)``, and for large changes (half of the weight) a plain LoRA would be closer.
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
# Stop after two consecutive iterations that reduce the error by less than this share.
_PROGRESS = 1e-4
_PATIENCE = 1
# Relative error of float32 rounding, below which iterations stop.
_EXACT = 1e-7
# Number of iterations for extrapolation.
_MEMORY = 6
# Smallest scale of a row, since scales must be positive.
_LEAST_SCALE = 1e-3
# Power iterations of the first decomposition, and of each later one, which starts from the last.
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
    """Find the DoRA of a rank whose adapted weight is closest to a tuned one (see the module).

    Args:
        weight: Base weight ``(out, in, *k)``, any floating dtype.
        tuned: Tuned weight, of the same shape.
        rank: Largest rank; smaller for small weights.
        norm_axis: Axis of the magnitude.
        energy: Use the smallest rank with this share of the squared singular values of the change
            after optimal scaling of every channel.
        start: Initial scales ``D``, ``(out,)`` or ``(in,)``, if they are known.

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
    """Return ``<T_i, v_i>`` for the direction ``v_i`` of each channel, at least 0."""
    direction = low_rank_delta(layer.down, layer.up, layer.scale).add_(weight)
    norm = weight_norm(direction, norm_axis)
    dims = [dim for dim in range(weight.ndim) if dim != NORM_AXES.index(norm_axis)]
    return gain(direction.mul_(tuned).sum(dim=dims), norm).clamp_min(0)


def known_scale(
    weight: Tensor, layers: Sequence[tuple[LayerWeights, float]], norm_axis: NormAxis
) -> Tensor:
    """Return the scales ``D`` of a sum of adapters: ``W + sum_k s_k (W'_k - W) = D W + E``.

    ``D = 1 + sum_k s_k (g_k - 1)`` over the adapters with a magnitude on this axis. The rank of E
    is the sum of their ranks, unless an adapter has its magnitude on the other axis. The scales are
    initial values for `best_dora`.

    Args:
        weight: Base weight ``(out, in, *k)``.
        layers: Adapter layers, each with its strength.
        norm_axis: Axis of ``D``.
    """
    scale = torch.ones(weight.shape[NORM_AXES.index(norm_axis)])
    for layer, strength in layers:
        if layer.magnitude is not None and layer.norm_axis == norm_axis:
            scale += strength * (gain(layer.magnitude, adapted_norm(weight, layer)) - 1)
    return scale


class _Rows:
    """Base and change as matrices with scaled rows. Channels of ``group`` rows share a scale."""

    def __init__(self, base: Tensor, change: Tensor, group: int) -> None:
        self.base, self.change, self.group = base, change, group
        squared = self._per_channel(base)
        self._inverse = torch.where(squared > 0, 1 / squared, 0.0)

    def spread(self, scale: Tensor) -> Tensor:
        """Expand values of channels to rows."""
        return scale.repeat_interleave(self.group)

    def projection(self, matrix: Tensor) -> Tensor:
        """Project the channels of a matrix on those of the base: ``<M_i, W_i> / |W_i|^2``."""
        return self._per_channel(matrix) * self._inverse

    def rest(self, excess: Tensor) -> Tensor:
        """``(T - W) - diag(e) W``."""
        return torch.addcmul(self.change, self.spread(excess).unsqueeze(1), self.base, value=-1)

    def _per_channel(self, matrix: Tensor) -> Tensor:
        products: Tensor = torch.linalg.vecdot(matrix, self.base)
        return products.view(-1, self.group).sum(1)


def _alternate(rows: _Rows, rank: int, energy: float | None, start: Tensor | None) -> _Fit:
    """Alternate the two closed forms until the error stops decreasing.

    The initial scales are either optimal without an update, or all 1 (a plain LoRA), depending on
    the error after the first iteration. The former can obscure a change of low rank.
    """
    rank = min(rank, *rows.base.shape)
    start_excess = rows.projection(rows.change) if start is None else start.to(rows.base) - 1
    search = _Search(rows, rank, energy)
    exact = _EXACT * torch.linalg.vector_norm(rows.base).item()
    error, step = search.iterate(start_excess)
    excess, least = start_excess, error
    if start is None:
        error, other_step = search.iterate(torch.zeros_like(start_excess))
        if error < least:
            excess, least, step = torch.zeros_like(start_excess), error, other_step
    extrapolation, idle = _Extrapolation(), 0
    for _ in range(_MOST_TURNS):
        if least <= exact or idle > _PATIENCE:
            break
        tried = extrapolation.next(excess, step)
        error, new_step = search.iterate(tried)
        if error >= least:
            # The extrapolation was too long. A plain step never increases the error.
            extrapolation = _Extrapolation()
            tried = excess + step
            error, new_step = search.iterate(tried)
        idle = 0 if error < (1 - _PROGRESS) * least else idle + 1
        if error < least:
            excess, step, least = tried, new_step, error
    return search.best


class _Search:
    """Search for the best update for given scales.

    Attributes:
        best: Best fit of all iterations.
    """

    def __init__(self, rows: _Rows, rank: int, energy: float | None) -> None:
        self._rows, self._rank, self._energy = rows, rank, energy
        self._basis, self._iterations = random_start(rows.base, rank), _FIRST_ITERATIONS
        self._least = float("inf")
        self.best: _Fit

    def iterate(self, excess: Tensor) -> tuple[float, Tensor]:
        """Find the best update for ``e``. Returns its error and the step to the best scales."""
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
    """Anderson extrapolation: the point where a combination of the last steps would vanish."""

    def __init__(self) -> None:
        self._points: list[Tensor] = []
        self._steps: list[Tensor] = []

    def next(self, point: Tensor, step: Tensor) -> Tensor:
        """Return the next point from a point and the step of plain alternation there."""
        self._points = [*self._points[1 - _MEMORY :], point.double()]
        self._steps = [*self._steps[1 - _MEMORY :], step.double()]
        points, steps = torch.stack(self._points, 1), torch.stack(self._steps, 1)
        if points.shape[1] == 1:
            return point + step
        moved, turned = points.diff(dim=1), steps.diff(dim=1)
        share = torch.linalg.lstsq(turned, steps[:, -1:], driver="gelsd").solution
        target: Tensor = points[:, -1:] + steps[:, -1:] - (moved + turned) @ share
        return target.squeeze(1).to(point.dtype)
