"""LoKr of LyCORIS, ComfyUI and PEFT (arXiv:2309.14859), which is read as low-rank layers.

``delta = s kron(w1, w2)``. Each factor is whole (``lokr_w1``), a product (``lokr_w1_a`` times
``lokr_w1_b``), or for convolutions also a Tucker product (with the core ``lokr_t2``). A Kronecker
product of products is a product, ``kron(b1 a1, b2 a2) = kron(b1, b2) kron(a1, a2)``, and a whole
factor is the product of itself and an identity. A and B of a LoKr are therefore exact.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import cast

import torch
from torch import Tensor

from dora_diffusion.config.wording import listing
from dora_diffusion.formats.layouts import FACTS, VERDICTS
from dora_diffusion.formats.layouts.dotted import DIFFUSERS, PEFT_PREFIX
from dora_diffusion.formats.layouts.kohya import KOHYA
from dora_diffusion.formats.layouts.layout import (
    AdapterFormatError,
    AdapterLayout,
    Fields,
    Key,
    Layers,
    Part,
    Shapes,
    Specs,
    denoiser_of,
)
from dora_diffusion.formats.names.kohya import Resolve, is_kohya_name
from dora_diffusion.numerics.weights import LayerWeights

# PEFT may write the name of the adapter last.
_KEY = re.compile(r"(.+?)(\.lokr_(w[12](?:_[ab])?|t2)(?:\.[\w-]+)?)")
# Files do not store the kernel of a convolution whose second factor is a product without a core.
_CONV_3X3 = re.compile(r"unet\.(.+\.)?(conv|conv1|conv2|conv_in|conv_out)")
# Numbers in A or B of one layer, far above any model. A damaged file must not exhaust the memory.
_LARGEST = 2**30
_INCOMPLETE = "the file is incomplete or damaged; save it again in the program that trained it"


class Lokr(AdapterLayout):
    """Layout ``<module>.lokr_w1``, with the module names of all other layouts."""

    name = key_format = "lokr"
    method = "LoKr"
    is_compact = True

    def parse(self, key: str) -> Key | None:
        match = _KEY.fullmatch(key)
        return match and Key(key, match[1], match[2], cast(Part, match[3]))

    def matches(self, keys: Collection[str], metadata: Fields) -> bool:
        """Return whether a file has a LoKr layer. Other layers may be LoRA or DoRA."""
        return any(map(self.parse, keys))

    def module(self, key: Key, resolve: Resolve, component: str | None) -> str | None:
        layout = KOHYA if is_kohya_name(key.text) else DIFFUSERS
        return layout.module(key, resolve, component)

    def is_read_as_meant(self, layers: Layers, specs: Specs, metadata: Fields) -> bool:
        """Check that the file has its alphas. LoRA and DoRA layers may be mixed."""
        return self.finds_alpha(layers, specs, metadata)

    def finds_alpha(self, layers: Layers, specs: Specs, metadata: Fields) -> bool:
        """Return whether each layer that has a rank has an alpha, in the file or PEFT's config."""
        layouts = (self, KOHYA, DIFFUSERS)
        keys = [next(filter(None, (layout.parse(key) for layout in layouts))) for key in specs]
        with_alpha = {key.path for key in keys if key.part == "alpha"}
        with_rank = {key.path for key in keys if key.part in ("w1_a", "w2_a", "down")}
        in_config = any(key.path.startswith(PEFT_PREFIX) for key in keys)
        return in_config or with_rank <= with_alpha or all(w.scale == 1 for w in layers.values())

    def judge(self, layers: Layers, norm_axis: str, keys: Collection[str]) -> dict[str, str]:
        if any(key.startswith(PEFT_PREFIX) for key in keys):
            return dict(VERDICTS["peft LoRA"])
        kind = f"DoRA, {norm_axis} axis" if norm_axis else "LoRA"
        tools = dict(VERDICTS.get(f"{self.name} {kind}", {}))
        if denoiser_of(layers) == "transformer":
            tools |= dict.fromkeys(tools.keys() & {"A1111", "sd-scripts"}, _NO_TRANSFORMERS)
        return tools

    def advice(self, norm_axis: str, keys: Collection[str]) -> list[str]:
        return [
            "a LoKr: its rank here is that of the product B A with the same weights; to train "
            "from it or to use it in other programs, convert it to dense or lora, or export a "
            "merged checkpoint"
        ]


LOKR = Lokr()
_NO_TRANSFORMERS: str = FACTS["words"]["no_transformers"]


def is_lokr(parts: Collection[Part]) -> bool:
    """Return whether the tensors of a layer are factors of a LoKr."""
    return any(part.startswith("w") or part == "t2" for part in parts)


def lokr_rank(tensors: Mapping[Part, Tensor]) -> int | None:
    """Return the rank that divides alpha, as in ComfyUI; None if both factors are whole."""
    product = tensors.get("w2_b", tensors.get("w1_b"))
    return product.shape[0] if product is not None and product.ndim else None


def kernel_of(name: str, shapes: Shapes | None, dora_scale: Tensor | None) -> tuple[int, ...]:
    """Return the kernel of a layer's module by the model, else by its name; ``()`` for Linear.

    Args:
        name: Canonical module name.
        shapes: Weight shapes of the base model's modules, None if it is unknown.
        dora_scale: Magnitude of the file, whose shape has a one for each axis of the kernel.
    """
    by_name = (3, 3) if _CONV_3X3.fullmatch(name) else ()
    kernel = tuple(shapes[name][2:]) if shapes and name in shapes else by_name
    ones = 0 if dora_scale is None else max(dora_scale.ndim - 2, 0)
    return kernel if math.prod(kernel) > 1 else (1,) * ones


def lokr_layer(
    name: str, tensors: Mapping[Part, Tensor], kernel: tuple[int, ...], scale: float
) -> LayerWeights:
    """Return a LoKr layer as a layer with exact A and B, without its magnitude.

    Args:
        name: Canonical module name.
        tensors: ``w1 (a, b)`` or ``w1_a (a, r)`` and ``w1_b (r, b)``; ``w2 (c, d, *k)``, or
            ``w2_a (c, r)`` and ``w2_b (r, d)``, ``(r, d, *k)`` or flat ``(r, d * k)``, or with
            ``t2 (r, s, *k)`` also ``w2_a (r, c)`` and ``w2_b (s, d)``. The weight is
            ``(a c, b d, *k)``.
        kernel: Kernel ``k`` of a convolution whose factors are flat.
        scale: Factor of the Kronecker product.

    Raises:
        AdapterFormatError: If a factor is missing, or factors do not multiply.
    """
    if other := tensors.keys() & {"down", "up", "mid", "magnitude"}:
        raise AdapterFormatError(
            f"{name} has factors of a LoKr, and {listing(sorted(other))} of a LoRA; {_INCOMPLETE}"
        )
    (up_1, down_1), (up_2, down_2) = _product(name, "w1", tensors), _product(name, "w2", tensors)
    if down_1.ndim != 2:
        raise AdapterFormatError(f"{name}: its lokr_w1 is not a matrix; {_INCOMPLETE}")
    rank, size = len(down_1) * len(down_2), down_1[0].numel() * down_2[0].numel()
    if rank * max(size, len(up_1) * len(up_2)) > _LARGEST:
        raise AdapterFormatError(f"{name}: its factors are too large for any model; {_INCOMPLETE}")
    down = torch.einsum("pi,qj...->pqij...", down_1, down_2)
    down = down.reshape(rank, -1, *down_2.shape[2:])
    if down.ndim == 2 and size % math.prod(kernel) == 0:
        down = down.reshape(rank, -1, *kernel)
    up = torch.kron(up_1, up_2).reshape(-1, rank, *[1] * (down.ndim - 2))
    return LayerWeights(down, up, None, scale * rank)


def _product(name: str, side: str, tensors: Mapping[Part, Tensor]) -> tuple[Tensor, Tensor]:
    """Return ``B (o, r)`` and ``A (r, i, *k)`` of a factor, with r at most the smaller side."""
    ends = {"": side, "a": f"{side}_a", "b": f"{side}_b", "core": "t2" if side == "w2" else ""}
    parts = {end: tensors[cast(Part, part)] for end, part in ends.items() if part in tensors}
    shapes = ", ".join(f"lokr_{ends[end]} {tuple(part.shape)}" for end, part in parts.items())
    if parts.keys() - {"core"} not in ({""}, {"a", "b"}) or parts.keys() == {"", "core"}:
        raise AdapterFormatError(
            f"{name} needs lokr_{side}, or lokr_{side}_a and lokr_{side}_b, and has "
            f"{shapes or 'none of them'}; {_INCOMPLETE}"
        )
    try:
        if "" in parts:
            return _with_identity(parts[""])
        up, down = parts["a"], parts["b"]
        if "core" in parts:
            core = parts["core"]
            if math.prod((*core.shape[:1], *core.shape[2:], *down.shape[1:])) > _LARGEST:
                raise ValueError
            up, down = up.t().contiguous(), torch.einsum("rsxy,sd->rdxy", core, down)
        if up.ndim != 2 or down.ndim < 2 or up.shape[1] != len(down):
            raise ValueError
        is_low = len(down) < min(len(up), down[0].numel())
        return (up, down) if is_low else _with_identity(torch.einsum("or,ri...->oi...", up, down))
    except (RuntimeError, ValueError) as error:
        raise AdapterFormatError(f"{name}: {shapes} do not multiply; {_INCOMPLETE}") from error


def _with_identity(whole: Tensor) -> tuple[Tensor, Tensor]:
    if whole.ndim < 2:
        raise ValueError(f"a factor of shape {tuple(whole.shape)}")
    size = whole[0].numel()
    if len(whole) <= size:
        return torch.eye(len(whole)), whole
    return whole.flatten(1), torch.eye(size).view(size, *whole.shape[1:])
