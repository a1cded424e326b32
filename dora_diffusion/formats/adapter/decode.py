"""Decoding of an adapter file's tensors: scales, magnitude axes, Tucker cores and padding."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dora_diffusion.config.wording import listing
from dora_diffusion.formats.adapter.alpha import (
    AI_TOOLKIT,
    ALPHA_IS_RANK,
    AlphaOf,
    AssumedAlpha,
    alpha_rule,
)
from dora_diffusion.formats.adapter.magnitude import Magnitude, resolve_axes
from dora_diffusion.formats.adapter.metadata import OWN, described
from dora_diffusion.formats.adapter.stored import StoredFile
from dora_diffusion.formats.checkpoint.weights import ModelWeights, kinds_of, module_shapes
from dora_diffusion.formats.layouts.dotted import PEFT_PREFIX
from dora_diffusion.formats.layouts.layout import (
    AdapterFormatError,
    AdapterLayout,
    Groups,
    Key,
    Part,
    Shapes,
    factor_pair,
)
from dora_diffusion.formats.layouts.lokr import is_lokr, kernel_of, lokr_layer, lokr_rank
from dora_diffusion.formats.names.kohya import is_kohya_name, is_sgm_path, joined_parts
from dora_diffusion.formats.names.modules import has_swapped_halves, split_prefix
from dora_diffusion.numerics.weights import LayerKind, LayerWeights

Layers = dict[str, LayerWeights]


@dataclass(frozen=True)
class Decoder:
    """Reader of the layers in an adapter's files.

    Attributes:
        layout: Layout of the files.
        base: The base model. Each layer must be one of its modules, which distinguish 1x1
            convolutions from Linear layers. Its weights determine the axis of magnitudes with an
            ambiguous shape.
        alpha: Alpha of training, for a file that does not store it.
        sums: Read an ai-toolkit DoRA with alpha other than its rank. Otherwise it is refused.
    """

    layout: AdapterLayout
    base: ModelWeights | None = None
    alpha: float | None = None
    sums: bool = False

    @cached_property
    def shapes(self) -> Shapes | None:
        """Shapes of the base model's modules."""
        return None if self.base is None else module_shapes(self.base)

    def layers(
        self, file: StoredFile, tensors: Mapping[str, Tensor], component: str | None = None
    ) -> tuple[Layers, Layers, list[str]]:
        """Read the layers of one file, in float32.

        Args:
            file: The file.
            tensors: Tensors of the file, without tokens.
            component: Component of the names in a PEFT folder.

        Returns:
            The layers; plain LoRA layers to add to the layers of an ai-toolkit DoRA; and a note
            for each repair.

        Raises:
            AdapterFormatError: If a key is unknown, or a layer lacks a factor, is not finite, or
                does not fit.
        """
        if decoded := self.layout.decode(tensors, file.metadata):
            if self.alpha is not None:
                raise AdapterFormatError("alpha has no effect: a VeRA has none; leave it out")
            layers, note = dict(decoded[0]), decoded[1]
            return layers if self.shapes is None else fit_to_model(layers, self.shapes), {}, [note]
        layers, beside, notes = self._read(file, tensors, component)
        layers, beside = split_joined(layers, notes), split_joined(beside, [])
        if self.shapes is None or self.base is None:
            return layers, beside, notes
        if not component and not all(map(has_component, tensors)):
            layers = move_to_second_encoder(layers, self.shapes, notes)
        fitted = fit_to_model(layers, self.shapes, kinds_of(self.base))
        return fitted, fit_to_model(beside, self.shapes), notes

    def _read(
        self, file: StoredFile, tensors: Mapping[str, Tensor], component: str | None
    ) -> tuple[Layers, Layers, list[str]]:
        """Return the layers of the file, LoRA layers to add, and notes."""
        metadata = file.metadata
        alpha_of, without_alpha = alpha_rule(metadata, file.config, self.alpha)
        groups = self.layout.group(tensors, metadata, self.shapes, component)
        notes = key_notes(tensors) if component is None else []
        if without_alpha and any(map(_lacks_alpha, groups.values())):
            is_ai_toolkit = any(k.is_ai_toolkit for g in groups.values() for k in g.values())
            notes.append(AI_TOOLKIT if is_ai_toolkit else without_alpha)
        layers, magnitudes, beside = self._read_parts(tensors, groups, alpha_of)
        axes = resolve_axes(magnitudes, metadata.get(OWN + "norm_axis", ""), self.base, notes)
        for name, magnitude in magnitudes.items():
            values, axis = magnitude.tensor.flatten(), axes[name]
            with _named(name):
                layers[name] = dataclasses.replace(layers[name], magnitude=values, norm_axis=axis)
        layers = {name: _without_padding(name, layer, metadata) for name, layer in layers.items()}
        for name in (n for n in layers if has_swapped_halves(n, _path_of(groups[n]))):
            layers[name] = layers[name].with_swapped_halves()
            if name in beside:
                beside[name] = beside[name].with_swapped_halves()
        return layers, beside, notes

    def _read_parts(
        self, tensors: Mapping[str, Tensor], groups: Groups, alpha_of: AlphaOf
    ) -> tuple[Layers, dict[str, Magnitude], Layers]:
        """Return the layers without magnitudes, the magnitudes, and LoRA layers to add."""
        layers, magnitudes, beside = Layers(), dict[str, Magnitude](), Layers()
        for name, keys in groups.items():
            layer_tensors = {p: _numbers(key.text, p, tensors[key.text]) for p, key in keys.items()}
            is_embedding = "down" in keys and keys["down"].is_embedding
            kind: LayerKind = "embedding" if is_embedding else "plain"
            if is_lokr(keys):
                is_peft = any(key.path.startswith(PEFT_PREFIX) for key in keys.values())
                layer = self._lokr(name, layer_tensors, alpha_of, is_peft)
            else:
                layer = self._factors(name, layer_tensors, alpha_of, kind)
            if any(key.is_ai_toolkit for key in keys.values()) and layer.scale != 1.0:
                if not self.sums:
                    raise AdapterFormatError(f"{name}: {_ai_toolkit_problem(layer)}")
                # ai-toolkit computes a DoRA with alpha = rank, plus a plain LoRA.
                beside[name] = dataclasses.replace(layer, alpha=layer.alpha - layer.rank)
                layer = dataclasses.replace(layer, alpha=float(layer.rank))
            layers[name] = layer
            if "magnitude" in layer_tensors and "dora_scale" in layer_tensors:
                problem = "has both a lora_magnitude_vector and a dora_scale"
                raise AdapterFormatError(f"{name} {problem}")
            for part in ("magnitude", "dora_scale"):
                if part in layer_tensors:
                    is_peft = part == "magnitude"
                    magnitudes[name] = Magnitude(layer_tensors[part], layer.weight_shape, is_peft)
        return layers, magnitudes, beside

    def _factors(
        self, name: str, tensors: Mapping[Part, Tensor], alpha_of: AlphaOf, kind: LayerKind
    ) -> LayerWeights:
        """Return a layer without its magnitude."""
        down, up = factor_pair(name, tensors)
        if "mid" in tensors:
            down = _without_tucker_core(name, down, tensors["mid"])
        # Some programs store the factors of a convolution flat on one side.
        if down.ndim in (3, 4) and up.ndim == 2:
            up = up.view(*up.shape, *[1] * (down.ndim - 2))
        alpha = self._alpha(name, tensors, alpha_of, down.shape[0])
        with _named(name):
            return LayerWeights(down, up, None, alpha, kind=kind)

    def _lokr(
        self, name: str, tensors: Mapping[Part, Tensor], alpha_of: AlphaOf, is_peft: bool
    ) -> LayerWeights:
        """Return a LoKr layer without its magnitude."""
        rank = lokr_rank(tensors)
        # With whole factors, PEFT alone applies an alpha.
        scale = alpha_of(name, 1) if is_peft else 1.0
        if rank is not None:
            scale = self._alpha(name, tensors, alpha_of, rank) / rank
        kernel = kernel_of(name, self.shapes, tensors.get("dora_scale"))
        with _named(name):
            return lokr_layer(name, tensors, kernel, scale)

    def _alpha(
        self, name: str, tensors: Mapping[Part, Tensor], alpha_of: AlphaOf, rank: int
    ) -> float:
        """Return the alpha that is divided by a rank of the file."""
        alpha = float(tensors["alpha"]) if "alpha" in tensors else alpha_of(name, rank)
        # LyCORIS reads alpha 0 as "no scaling".
        alpha = alpha or float(rank)
        if self.alpha is not None:
            if "alpha" in tensors and alpha != rank:
                raise AdapterFormatError(
                    f"{name} states its alpha, {alpha:g}; leave out the given one"
                )
            alpha = self.alpha
        if not math.isfinite(alpha):
            raise AdapterFormatError(f"{name}: its alpha is {alpha}, not a number")
        return alpha


def _path_of(keys: Mapping[Part, Key]) -> str:
    return next(iter(keys.values())).path


@contextlib.contextmanager
def _named(layer: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise AdapterFormatError(f"{layer}: {error}") from error


def _lacks_alpha(group: Mapping[Part, Key]) -> bool:
    has_rank = not is_lokr(group) or any(part.endswith(("_a", "_b")) for part in group)
    return "alpha" not in group and has_rank


def _ai_toolkit_problem(layer: LayerWeights) -> str:
    return (
        f"ai-toolkit applies alpha / rank ({layer.alpha:g} / {layer.rank}) outside of the norm, "
        "m (W + BA) / norm(W + BA) + (alpha / rank - 1) BA, which is not a DoRA, and which no "
        "other program computes; with that alpha, 'dora-diffusion export --base MODEL --adapter "
        f"ADAPTER --alpha {layer.alpha:g} --output MERGED' merges it exactly, and 'dora-diffusion "
        f"convert ADAPTER OUTPUT --to dense --base MODEL --alpha {layer.alpha:g}' writes its "
        "differences for one base model"
    )


def _numbers(key: str, part: Part, tensor: Tensor) -> Tensor:
    """Return the tensor in float32, after a check of its dtype, shape and values."""
    is_alpha = part == "alpha"
    if not tensor.is_floating_point() and not is_alpha:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise AdapterFormatError(f"{key} is {kind}, not floating-point")
    if not tensor.numel() or (is_alpha and tensor.numel() != 1):
        raise AdapterFormatError(f"{key} has shape {tuple(tensor.shape)}; the file is damaged")
    tensor = tensor.to(torch.float32)
    if not torch.isfinite(tensor).all():
        raise AdapterFormatError(f"{key} contains numbers that are not finite; the file is damaged")
    return tensor


def _without_tucker_core(name: str, down: Tensor, mid: Tensor) -> Tensor:
    """Multiply a core ``(r, r, kh, kw)`` by ``down (r, in, 1, 1)``, giving ``(r, in, kh, kw)``."""
    if mid.ndim != 4 or mid.shape[1] != down.shape[0] or down.shape[2:].numel() != 1:
        raise AdapterFormatError(
            f"{name}: its core {tuple(mid.shape)} does not fit its factor {tuple(down.shape)}"
        )
    return torch.einsum("mnhw,ni->mihw", mid, down.flatten(1))


def _without_padding(name: str, layer: LayerWeights, metadata: Mapping[str, str]) -> LayerWeights:
    """Undo the zero padding to a common rank that this program's files record."""
    rank = described(metadata.get(OWN + "rank", ""), name)
    if not re.fullmatch("[0-9]{1,6}", rank) or not 0 < int(rank) < layer.rank:
        return layer
    down, up = layer.down[: int(rank)], layer.up[:, : int(rank)]
    if layer.down[int(rank) :].any() or layer.up[:, int(rank) :].any():
        return layer
    alpha = layer.scale * int(rank)
    return dataclasses.replace(layer, down=down, up=up, alpha=alpha)


def fit_to_model(
    layers: Layers, shapes: Shapes, kinds: Mapping[str, LayerKind] | None = None
) -> Layers:
    """Check that every layer fits a module of the model; give 1x1 convolutions their shape.

    Args:
        layers: The layers.
        shapes: Shapes of the model's modules.
        kinds: Kinds of modules that are not plain: a Conv1D has the keys of a Linear.

    Raises:
        AdapterFormatError: If layers have no module, or one of another shape; lists them.
    """
    if missing := [name for name in layers if name not in shapes]:
        raise AdapterFormatError(f"the model has no module for {listing(missing)}")
    kinds = kinds or {}
    fitted = {n: _as_module(layer, shapes[n], kinds.get(n)) for n, layer in layers.items()}
    if wrong := [
        f"{name} {layer.stored_shape} on {tuple(shapes[name])}"
        for name, layer in fitted.items()
        if layer.stored_shape != tuple(shapes[name])
    ]:
        raise AdapterFormatError(f"the adapter was made for another model: {listing(wrong)}")
    return fitted


def _as_module(layer: LayerWeights, shape: tuple[int, ...], kind: LayerKind | None) -> LayerWeights:
    """Convert factors between Linear and 1x1 convolution to fit a module; others are unchanged."""
    down, up = layer.down, layer.up
    if layer.kind == "plain" and down.ndim == 2 and kind == "conv1d":
        return dataclasses.replace(layer, kind=kind)
    if layer.kind == "plain" and down.ndim == 2 and len(shape) == 4 and shape[2:] == (1, 1):
        return dataclasses.replace(layer, down=down[:, :, None, None], up=up[:, :, None, None])
    if layer.kind == "plain" and down.ndim == 4 and len(shape) == 2 and down.shape[2:].numel() == 1:
        return dataclasses.replace(layer, down=down.flatten(1), up=up.flatten(1))
    return layer


def split_joined(layers: Layers, notes: list[str]) -> Layers:
    """Split joined projections exactly, by the rows of ``up`` and output-axis magnitudes.

    Raises:
        AdapterFormatError: If a magnitude is on the input axis, where norms include all parts.
    """
    split = Layers()
    joined = 0
    for name, layer in layers.items():
        projections = joined_parts(name)
        if not projections:
            split[name] = layer
            continue
        joined += 1
        if layer.magnitude is not None and layer.norm_axis == "input":
            raise AdapterFormatError(
                f"{name}: its magnitudes were trained for {len(projections)} projections together "
                "and cannot be split on the input axis"
            )
        if layer.up.shape[0] % len(projections):
            raise AdapterFormatError(f"{name} does not divide into {len(projections)} projections")
        size = layer.up.shape[0] // len(projections)
        for number, part in enumerate(projections):
            if part in layers:
                raise AdapterFormatError(f"both {name} and {part} are in the file")
            split[part] = layer.narrow(0, number * size, size)
    if joined:
        notes.append(f"{joined} joined attention projections were split into their parts")
    return split


def has_component(key: str) -> bool:
    """Return whether a key names its component."""
    component, path = split_prefix(key.removeprefix(PEFT_PREFIX))
    return is_kohya_name(key) or component is not None or is_sgm_path(path)


def key_notes(keys: Iterable[str]) -> list[str]:
    """Return notes on damage by other programs, recognized by the keys."""
    keys = list(keys)
    notes: list[str] = []
    kohya = any(is_kohya_name(key) for key in keys)
    magnitudes = [key for key in keys if "lora_magnitude_vector" in key]
    if kohya and magnitudes:
        note = (
            f"{len(magnitudes)} magnitude keys were left half renamed by diffusers' own "
            f"converter, which also writes the rank for alpha; {ALPHA_IS_RANK}"
        )
        notes.append(AssumedAlpha(note))
    text = [key for key in keys if key.startswith("text_encoder")]
    if any(key.endswith(".lora_magnitude_vector") for key in text):
        notes.append(
            "diffusers with transformers 5 silently drops its text-encoder magnitudes; "
            "converted to diffusers they are named so that every version reads them"
        )
    alone = [k for k in keys if not has_component(k)]
    if lost := sum("text_model." in key or "encoder.layers" in key for key in alone):
        notes.append(f"{lost} text-encoder keys lack their component, which was added")
    if short := sum(".text_model." not in key and ".encoder.layers." in key for key in text):
        notes.append(f"{short} text-encoder keys lack `text_model.`, which was added")
    return notes


def move_to_second_encoder(layers: Layers, shapes: Shapes, notes: list[str]) -> Layers:
    """Rename layers of the first text encoder to the second if only that one fits their shapes."""
    first, second = "text_encoder.", "text_encoder_2."
    moved = {n: second + n.removeprefix(first) for n in layers if n.startswith(first)}
    misfit = any(shapes.get(old) != layers[old].stored_shape for old in moved)
    fits = all(shapes.get(new) == layers[old].stored_shape for old, new in moved.items())
    if not misfit or not fits or not layers.keys().isdisjoint(moved.values()):
        return layers
    notes.append("by their widths, these are the second text encoder's")
    return {moved.get(name, name): layer for name, layer in layers.items()}
