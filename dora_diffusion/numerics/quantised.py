"""Frozen weights in 8 or 4 bits that every operation sees as the dense weights they stand for.

`PackedWeight` is a tensor of the shape, dtype and device of the weight that it was made of, but
holds its codes alone. Products keep the codes for the backward pass and make the dense weight
again there; whatever else reads it gets the dense weight for a moment. The values are rounded to
the dtype that the base model has, whatever dtype is asked for: forward pass, norm, merge and
analysis see one W.

- int8: a row's numbers over 1/127 of its largest (LLM.int8, arXiv:2208.07339, section 2).
- nf4: 64 numbers of a row at a time, over their largest, to the nearest of 16 quantiles of the
  normal distribution (QLoRA, arXiv:2305.14314, section 3), whose codes are bitsandbytes'. The
  largest ones are 8 bits in their turn, 256 of them evenly between their bounds.

The scales of a row are multiplied by one number, within 2% of 1, that gives the row the norm that
it had. So a magnitude starts as, and means, the norm of the original weight, and an adapter that
was trained on the quantised weight is one of the original weight as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv1d_input, conv2d_input
from torch.utils import swap_tensors

from dora_diffusion.numerics.precision import product_dtype

Quantisation = Literal["int8", "nf4"]
QUANTISATIONS: tuple[Quantisation, ...] = get_args(Quantisation)
BLOCK = 64
"""Numbers that share a scale in nf4."""
_GROUP = 256
# Numbers that are quantised at a time: few enough to stay in a processor's cache.
_CHUNK = 2**18
_TINY = torch.finfo(torch.float32).tiny
# Quantiles of the normal distribution (QLoRA, section 3 and appendix E), 0, and half way between.
LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_BOUNDS = tuple((low + high) / 2 for low, high in pairwise(LEVELS))
_PRODUCTS = (F.linear, F.conv1d, F.conv2d)
_aten: Any = torch.ops.aten


class PackedWeight(Tensor):
    """A frozen weight that is kept as codes; made by `quantise`, of one of its two kinds.

    It is written by nobody: what would change it raises a RuntimeError.

    Attributes:
        rounded_to: The dtype that the weight had when it was quantised.
    """

    kind: ClassVar[Quantisation]
    parts: ClassVar[tuple[str, ...]]
    rounded_to: torch.dtype

    @staticmethod
    def __new__(
        cls, tensors: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype, rounded_to: Any
    ) -> PackedWeight:
        device = tensors[cls.parts[0]].device
        made: PackedWeight = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        made.rounded_to = rounded_to
        for name in cls.parts:
            setattr(made, name, tensors[name])
        return made

    def __init__(self, *args: Any) -> None:
        """`__new__` has done it."""

    @classmethod
    def pack(cls, rows: Tensor) -> dict[str, Tensor]:
        """Return codes and scales of some rows of a weight, float32 ``(rows, n)``."""
        raise NotImplementedError

    @classmethod
    def finished(cls, made: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return `tensors` of a weight from what `pack` made of all its rows."""
        return made

    def rows(self, start: int, stop: int) -> Tensor:
        """Return some rows of the weight, float32 ``(stop - start, n)``."""
        raise NotImplementedError

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight that the codes stand for, in its own dtype or another one."""
        with torch.no_grad():
            made = self.rows(0, self.shape[0]).to(self.rounded_to)
            return made.reshape(self.shape).to(dtype or self.dtype).contiguous()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Codes and scales, as they are saved."""
        return {name: getattr(self, name) for name in self.parts}

    def over(self, change: Callable[[Tensor], Tensor], dtype: torch.dtype) -> PackedWeight:
        """Return the same weight over changed tensors."""
        tensors = {name: change(tensor) for name, tensor in self.tensors.items()}
        return type(self)(tensors, self.shape, dtype, self.rounded_to)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({tuple(self.shape)}, {self.dtype}, {self.device})"

    def _stable_hash_for_caching(self) -> str:
        return f"{self!r} {self.rounded_to}"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return list(self.parts), (self.dtype, self.rounded_to)

    @classmethod
    def __tensor_unflatten__(
        cls, tensors: dict[str, Tensor], context: Any, shape: torch.Size, stride: Any
    ) -> PackedWeight:
        return cls(tensors, shape, *context)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _PRODUCTS and not isinstance(args[0], PackedWeight):
            return _product(function, *args, **kwargs)
        if function is Tensor.data_ptr:
            return args[0].tensors[cls.parts[0]].data_ptr()
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        own = args[0] if args and isinstance(args[0], PackedWeight) else None
        if own is not None and function in (_aten.detach.default, _aten.alias.default):
            return own.over(lambda tensor: tensor, own.dtype)
        if own is not None and function is _aten.clone.default:
            return own.over(torch.clone, own.dtype)
        if own is not None and function is _aten._to_copy.default:
            device = kwargs.get("device") or own.device
            return own.over(
                lambda tensor: tensor.to(device, copy=True), kwargs.get("dtype") or own.dtype
            )
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if (info := argument.alias_info) and info.is_write and isinstance(value, PackedWeight):
                raise RuntimeError(
                    f"a weight that is quantised to {value.kind} cannot be changed: a small "
                    "update would be lost in its rounding; load the model unquantised"
                )
        return function(*_dense(args), **_dense(kwargs))


def _dense(value: Any) -> Any:
    """Arguments of an operation with the dense weight in place of each packed one."""
    if isinstance(value, PackedWeight):
        return value.dense()
    if isinstance(value, dict):
        return {key: _dense(each) for key, each in value.items()}
    return type(value)(map(_dense, value)) if isinstance(value, tuple | list) else value


class Int8Weight(PackedWeight):
    """``codes`` int8 ``(rows, n)``, ``scale`` float32 ``(rows,)``."""

    kind = "int8"
    parts = ("codes", "scale")
    codes: Tensor
    scale: Tensor

    @classmethod
    def pack(cls, rows: Tensor) -> dict[str, Tensor]:
        scale = rows.abs().amax(dim=1) / 127
        codes = (rows / scale.clamp_min(_TINY)[:, None]).round_()
        scale *= _restored(rows, codes * scale[:, None])
        return {"codes": codes.to(torch.int8), "scale": scale}

    def rows(self, start: int, stop: int) -> Tensor:
        return self.codes[start:stop] * self.scale[start:stop, None]


class NF4Weight(PackedWeight):
    """Pairs of ``codes`` uint8, the first in the high half, and the scales of their blocks.

    ``codes`` is ``(rows, blocks * 32)``, a row filled up with zeros. ``scale`` uint8 ``(rows,
    blocks)`` is a number of steps, ``step`` float32 ``(groups,)``, above ``lowest``.
    """

    kind = "nf4"
    parts = ("codes", "scale", "step", "lowest")
    codes: Tensor
    scale: Tensor
    step: Tensor
    lowest: Tensor

    @classmethod
    def pack(cls, rows: Tensor) -> dict[str, Tensor]:
        blocks = F.pad(rows, (0, -rows.shape[1] % BLOCK)).view(len(rows), -1, BLOCK)
        top = blocks.abs().amax(dim=2)
        shares = blocks / top.clamp_min(_TINY)[..., None]
        index = torch.zeros(shares.shape, dtype=torch.uint8, device=rows.device)
        for bound in _BOUNDS:
            index += shares > bound
        codes = ((index[..., ::2] << 4) | index[..., 1::2]).flatten(1)
        top *= _restored(rows, _values(codes, top))[:, None]
        return {"codes": codes, "top": top}

    @classmethod
    def finished(cls, made: dict[str, Tensor]) -> dict[str, Tensor]:
        top = made.pop("top")
        flat = top.flatten()[None]
        groups = F.pad(flat, (0, -flat.shape[1] % _GROUP), mode="replicate").view(-1, _GROUP)
        lowest, step = groups.amin(dim=1), (groups.amax(dim=1) - groups.amin(dim=1)) / 255
        steps = (groups - lowest[:, None]).div_(step.clamp_min(_TINY)[:, None]).round_()
        scale = steps.to(torch.uint8).flatten()[: top.numel()].view(top.shape)
        return made | {"scale": scale.clone(), "step": step, "lowest": lowest}

    def tops(self) -> Tensor:
        """The largest number of each block, ``(rows, blocks)``."""
        each = (t.repeat_interleave(_GROUP)[: self.scale.numel()] for t in (self.step, self.lowest))
        step, lowest = (t.view(self.scale.shape) for t in each)
        return torch.addcmul(lowest, self.scale, step)

    def rows(self, start: int, stop: int) -> Tensor:
        values = _values(self.codes[start:stop], self.tops()[start:stop])
        return values[:, : self.shape[1:].numel()]


def _restored(rows: Tensor, quantised: Tensor) -> Tensor:
    """The factors that give the rows of a quantised weight their norm back, ``(rows,)``."""
    norms = (torch.linalg.vector_norm(each, dim=1) for each in (rows, quantised))
    return torch.div(*(norm.clamp_min(_TINY) for norm in norms))


def _values(codes: Tensor, top: Tensor) -> Tensor:
    """The numbers of nf4 codes ``(rows, n / 2)`` whose blocks have such largest ones."""
    # A table of an earlier call is none of the tensors that a graph is traced with.
    made = _pairs if type(codes) is Tensor else _pairs.__wrapped__
    pairs = made(codes.device)[codes.int()]
    return pairs.view(*top.shape, BLOCK).mul_(top[..., None]).flatten(1)


@lru_cache
def _pairs(device: torch.device) -> Tensor:
    """The two values of each byte, float32 ``(256, 2)``."""
    found, byte = torch.tensor(LEVELS), torch.arange(256)
    return torch.stack([found[byte >> 4], found[byte & 15]], dim=1).to(device)


def quantise(weight: Tensor, kind: str) -> PackedWeight:
    """Return a weight ``(out, in, *k)`` as codes.

    Raises:
        ValueError: If the weight is quantised already, or holds no floating-point numbers, or
            the kind is none of `QUANTISATIONS`.
    """
    if kind not in QUANTISATIONS:
        raise ValueError(f"quantize is {kind!r}; it must be one of {', '.join(QUANTISATIONS)}")
    if isinstance(weight, PackedWeight) or not weight.is_floating_point():
        raise ValueError("a weight that is quantised already cannot be quantised again")
    flat = weight.detach().flatten(1)
    return quantise_rows(lambda start, stop: flat[start:stop], weight.shape, weight.dtype, kind)


def quantise_rows(
    load: Callable[[int, int], Tensor], shape: Sequence[int], dtype: torch.dtype, kind: str
) -> PackedWeight:
    """Return a weight as codes that is never there as a whole.

    Args:
        load: Returns rows ``start`` to before ``stop``, ``(stop - start, n)``, in any dtype.
        shape: The weight's, ``(out, in, *k)``.
        dtype: To which its numbers are rounded first.
        kind: One of `QUANTISATIONS`.
    """
    chosen = Int8Weight if kind == "int8" else NF4Weight
    step, made = max(1, _CHUNK // math.prod(shape[1:])), dict[str, Tensor]()
    with torch.no_grad():
        for start in range(0, shape[0], step):
            rows = load(start, min(start + step, shape[0])).to(dtype).float()
            for name, part in chosen.pack(rows).items():
                if name not in made:
                    made[name] = part.new_empty(shape[0], *part.shape[1:])
                made[name][start : start + step] = part
        return chosen(chosen.finished(made), torch.Size(shape), dtype, dtype)


def memory_of(tensor: Tensor) -> list[Tensor]:
    """The tensors whose storages hold a tensor's numbers: itself, or codes and scales."""
    return [*tensor.tensors.values()] if isinstance(tensor, PackedWeight) else [tensor]


def exchange(ours: Tensor, theirs: Tensor) -> None:
    """Exchange the values of two tensors, which stay the same objects."""
    if isinstance(ours, PackedWeight):
        for each in (ours, theirs):
            each.requires_grad_(False)
        swap_tensors(ours, theirs)  # type: ignore[no-untyped-call]
    else:
        ours.data, theirs.data = theirs.data, ours.data


def _product(
    run: Any, x: Tensor, weight: PackedWeight, bias: Any = None, *args: Any, **kwargs: Any
) -> Tensor:
    """``F.linear`` or a convolution with a packed weight, in autocast's dtype where that is on."""
    if run is not F.linear and x.ndim < weight.ndim:
        return _product(run, x[None], weight, bias, *args, **kwargs)[0]
    dtype = product_dtype(x)
    x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        made: Tensor = _Product.apply(x, bias, weight, run, args, kwargs)  # type: ignore[no-untyped-call]
    return made


class _Product(torch.autograd.Function):
    """A product that keeps the codes, and recomputes the dense weight in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        weight: PackedWeight,
        run: Any,
        args: Any,
        kwargs: Any,
    ) -> Tensor:
        ctx.weight, ctx.run, ctx.args, ctx.kwargs, ctx.shape = weight, run, args, kwargs, x.shape
        made: Tensor = run(x, weight.dense(x.dtype), bias, *args, **kwargs)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, of_x, of_bias = ctx.weight, None, None
        dense = weight.dense(grad.dtype)
        if ctx.run is F.linear:
            of_x = grad @ dense if ctx.needs_input_grad[0] else None
            dims = tuple(range(grad.ndim - 1))
        else:
            back = conv2d_input if ctx.run is F.conv2d else conv1d_input
            if ctx.needs_input_grad[0]:
                of_x = back(ctx.shape, dense, grad, *ctx.args, **ctx.kwargs)  # type: ignore[no-untyped-call]
            size = weight.ndim - 2
            dims = tuple(d for d in range(grad.ndim) if d != grad.ndim - size - 1)
        if ctx.needs_input_grad[1]:
            of_bias = grad.sum(dims) if dims else grad
        return of_x, of_bias, None, None, None, None
