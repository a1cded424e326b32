"""Norm axis of a file's magnitudes, from their shape, the rest of the file, or the base.

LyCORIS and OneTrainer write ``dora_scale`` as ``(out, 1, ...)`` or ``(1, in, ...)``. Other programs
squeeze it, or keep PEFT's shape ``(1, out, 1, 1)`` of a convolution, which for a square convolution
is also the shape of the input axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from dora_diffusion.config.wording import listing
from dora_diffusion.formats.adapter.metadata import described
from dora_diffusion.formats.layouts.layout import AdapterFormatError
from dora_diffusion.numerics.weights import NORM_AXES, NormAxis

if TYPE_CHECKING:
    from dora_diffusion.formats.checkpoint.weights import ModelWeights

# Largest relative distance of magnitudes from the base's norms on their axis; the distance on the
# other axis must be twice as large. Training moves magnitudes by a few percent.
_NEAR = 0.5


@dataclass(frozen=True)
class Magnitude:
    """A magnitude as stored in a file.

    Attributes:
        tensor: The values in the file's shape.
        weight_shape: Shape of the weight, ``(out, in, *k)``.
        is_peft: Whether the key is PEFT's or ai-toolkit's, which use the output axis.
    """

    tensor: Tensor
    weight_shape: tuple[int, ...]
    is_peft: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the file."""
        return tuple(self.tensor.shape)

    def form(self) -> str:
        """Classify the shape: an axis, ``"flat"``, ``"peft"``, ``"square"``, or ``""``: none."""
        out, into = self.weight_shape[:2]
        ones = (1,) * (len(self.weight_shape) - 2)
        if self.is_peft:
            # Early ai-toolkit wrote (1, in), on Linear layers only.
            early = len(self.shape) == 2 and self.shape == (1, into)
            return "input" if early else "output"
        if self.shape == (out, 1, *ones):
            return "output"
        if ones and self.shape == (1, out, *ones):
            return "square" if out == into else "peft"
        if self.shape == (1, into, *ones):
            return "input"
        return "flat" if self.shape in ((out,), (into,)) else ""

    def fits(self, axis: NormAxis) -> bool:
        """Return whether there is one value per channel of the axis."""
        return self.tensor.numel() == self.weight_shape[NORM_AXES.index(axis)]


def resolve_axes(
    magnitudes: Mapping[str, Magnitude], stated: str, base: ModelWeights | None, notes: list[str]
) -> dict[str, NormAxis]:
    """Return the axis of each layer's magnitude.

    Args:
        magnitudes: The magnitudes by canonical module name.
        stated: The axis in the file's metadata, as a `describe` text.
        base: The base model. Its weights determine the axis of ambiguous shapes.
        notes: List to which a line for each kind of repair is appended.

    Raises:
        AdapterFormatError: If an axis cannot be determined.
    """
    forms = {name: magnitude.form() for name, magnitude in magnitudes.items()}
    if wrong := sorted(name for name, form in forms.items() if not form):
        first = magnitudes[wrong[0]]
        more = f"; so have {listing(wrong[1:])}" if wrong[1:] else ""
        raise AdapterFormatError(
            f"{wrong[0]}: its dora_scale has shape {first.shape}, which fits neither axis of the "
            f"weight {first.weight_shape}{more}"
        )
    # A network has one axis, so a square convolution has the axis of the rest of the file.
    peft_shaped = "peft" in forms.values()
    output_only = "output" in forms.values() and "input" not in forms.values()
    axes: dict[str, NormAxis] = {}
    still_open, peft = {}, 0
    for name, form in forms.items():
        axis_stated = described(stated, name)
        if form == "peft" or (form == "square" and peft_shaped and not axis_stated):
            axes[name] = "output"
            peft += 1
        elif form in ("output", "input"):
            axes[name] = "output" if form == "output" else "input"
        elif form == "square" and (axis_stated or not output_only):
            axes[name] = "output" if axis_stated == "output" else "input"
        else:
            still_open[name] = magnitudes[name]
    if peft:
        notes.append(f"{peft} magnitudes had PEFT's shape (1, out, 1, 1): read on the output axis")
    return axes | _axes_from_base(still_open, base, notes)


def _axes_from_base(
    magnitudes: Mapping[str, Magnitude], base: ModelWeights | None, notes: list[str]
) -> dict[str, NormAxis]:
    """Return the axis of magnitudes with an ambiguous shape; all that fit both axes share one."""
    if not magnitudes:
        return {}
    name, first = min(magnitudes.items(), key=lambda item: item[0])
    flat = len(first.shape) == 1
    what = "flat" if flat else "of the same shape on both axes"
    reason = (
        f"{name}: its dora_scale is {what}, {first.shape}, so it is not clear whether it "
        f"belongs to the outputs or the inputs of the {first.weight_shape} weight"
    )
    if base is None:
        out, into = first.weight_shape[:2]
        other_names = magnitudes.keys() - {name}
        more = f"; the same holds for {listing(other_names)}" if other_names else ""
        raise AdapterFormatError(
            f"{reason}{more}. Give the base model, whose weights determine it, or ask the author "
            f"for a file with ({out}, 1) or (1, {into})"
        )
    both = {name: m for name, m in magnitudes.items() if m.fits("output") and m.fits("input")}
    axes: dict[str, NormAxis] = {
        name: "output" if m.fits("output") else "input"
        for name, m in magnitudes.items()
        if name not in both
    }
    known_axes: set[NormAxis] = set(axes.values())
    axis = known_axes.pop() if len(known_axes) == 1 else _nearest(both, base) if both else "output"
    if axis is None:
        raise AdapterFormatError(
            f"{reason}, and the norms of this base's weights do not determine it"
        )
    axes |= dict.fromkeys(both, axis)
    where = " and ".join(sorted(set(axes.values())))
    how = "flat" if flat else "of a shape that fits both axes"
    notes.append(f"{len(axes)} magnitudes were {how}: read on the {where} axis, by the base")
    return axes


def _nearest(magnitudes: Mapping[str, Magnitude], base: ModelWeights) -> NormAxis | None:
    """Return the axis whose norms in the base are clearly nearer to the magnitudes, or None."""
    from dora_diffusion.formats.checkpoint.weights import module_weight
    from dora_diffusion.numerics.dora import squared_norm, weight_norm

    off = {"output": 0.0, "input": 0.0}
    size = 0.0
    for name, magnitude in magnitudes.items():
        spec = base.specs.get(f"{name}.weight")
        if spec is None or spec.shape != magnitude.weight_shape:
            continue  # An adapter for another model, or a joined projection.
        weight, values = module_weight(base, name), magnitude.tensor.flatten()
        for axis in NORM_AXES:
            off[axis] += (values - weight_norm(weight, axis)).square().sum().item()
        size += squared_norm(weight, "output").sum().item()
    near, far = sorted(NORM_AXES, key=lambda axis: off[axis])
    # Squares of relative distances.
    clear = off[near] < _NEAR**2 * size and off[far] > 4 * off[near]
    return near if clear else None
