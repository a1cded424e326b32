"""Frozen weights in 8 or 4 bits, which all operations see as dense weights.

`PackedWeight` is a tensor with the shape, dtype and device of the original weight that stores only
codes. Products save the codes for the backward pass and restore the dense weight there. All other
operations get a temporary dense weight. Its values are always rounded to the dtype of the base
model, so that forward pass, norm, merge and analysis use the same W.

- int8: each row is divided by 1/127 of its largest absolute value (LLM.int8, arXiv:2208.07339,
  section 2).
- nf4: each block of 64 values of a row is divided by its largest absolute value and rounded to 16
  quantiles of the normal distribution (QLoRA, arXiv:2305.14314, section 3), with the codes of
  bitsandbytes. The largest values are themselves quantised to 8 bits, in groups of 256.

The scales of a row are multiplied by a factor, within 2% of 1, that restores the norm of the row.
Magnitudes therefore start as the norms of the original weight, and an adapter that was trained on
the quantised weight can be used on the original weight.
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
"""Number of values that share a scale in nf4."""
_GROUP = 256
# Number of values that are quantised at a time, chosen for the processor's cache.
_CHUNK = 2**18
_TINY = torch.finfo(torch.float32).tiny
# Quantiles of the normal distribution, including 0 (QLoRA, section 3 and appendix E).
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
    """Frozen weight that is stored as codes (`quantise`). Changing it raises a RuntimeError.

    Attributes:
        kind: Kind of quantisation.
        tensor_names: Names of the tensors with codes and scales.
        rounded_to: Dtype of the original weight.
    """

    kind: ClassVar[Quantisation]
    tensor_names: ClassVar[tuple[str, ...]]
    rounded_to: torch.dtype

    @staticmethod
    def __new__(
        cls, tensors: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype, rounded_to: Any
    ) -> PackedWeight:
        device = tensors[cls.tensor_names[0]].device
        packed: PackedWeight = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        packed.rounded_to = rounded_to
        for name in cls.tensor_names:
            setattr(packed, name, tensors[name])
        return packed

    def __init__(self, *args: Any) -> None:
        """Do nothing, since `__new__` has set the attributes."""

    @classmethod
    def pack(cls, rows: Tensor) -> dict[str, Tensor]:
        """Quantise some rows of a weight, float32 ``(rows, n)``. Returns codes and scales."""
        raise NotImplementedError

    @classmethod
    def finished(cls, packed: dict[str, Tensor]) -> dict[str, Tensor]:
        """Convert the results of `pack` for all rows to `tensors`."""
        return packed

    def rows(self, start: int, stop: int) -> Tensor:
        """Restore some rows of the weight, float32 ``(stop - start, n)``."""
        raise NotImplementedError

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """Restore the dense weight, in the dtype of the tensor or another one."""
        with torch.no_grad():
            rows = self.rows(0, self.shape[0]).to(self.rounded_to)
            return rows.reshape(self.shape).to(dtype or self.dtype).contiguous()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Codes and scales by name."""
        return {name: getattr(self, name) for name in self.tensor_names}

    def over(self, change: Callable[[Tensor], Tensor], dtype: torch.dtype) -> PackedWeight:
        """Return the weight with a function applied to its tensors."""
        tensors = {name: change(tensor) for name, tensor in self.tensors.items()}
        return type(self)(tensors, self.shape, dtype, self.rounded_to)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({tuple(self.shape)}, {self.dtype}, {self.device})"

    def _stable_hash_for_caching(self) -> str:
        return f"{self!r} {self.rounded_to}"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return list(self.tensor_names), (self.dtype, self.rounded_to)

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
            return args[0].tensors[cls.tensor_names[0]].data_ptr()
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        weight = args[0] if args and isinstance(args[0], PackedWeight) else None
        if weight is not None and function in (_aten.detach.default, _aten.alias.default):
            return weight.over(lambda tensor: tensor, weight.dtype)
        if weight is not None and function is _aten.clone.default:
            return weight.over(torch.clone, weight.dtype)
        if weight is not None and function is _aten._to_copy.default:
            device, dtype = kwargs.get("device") or weight.device, kwargs.get("dtype")
            return weight.over(lambda tensor: tensor.to(device, copy=True), dtype or weight.dtype)
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if (info := argument.alias_info) and info.is_write and isinstance(value, PackedWeight):
                raise RuntimeError(
                    f"a weight that is quantised to {value.kind} cannot be changed, since rounding "
                    "would lose small updates; load the model unquantised"
                )
        return function(*_dense(args), **_dense(kwargs))


def _dense(value: Any) -> Any:
    """Replace packed weights by dense ones in the arguments of an operation."""
    if isinstance(value, PackedWeight):
        return value.dense()
    if isinstance(value, dict):
        return {key: _dense(item) for key, item in value.items()}
    return type(value)(map(_dense, value)) if isinstance(value, tuple | list) else value


class Int8Weight(PackedWeight):
    """Weight as ``codes`` int8 ``(rows, n)`` and ``scale`` float32 ``(rows,)``."""

    kind = "int8"
    tensor_names = ("codes", "scale")
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
    """Weight as pairs of 4-bit codes and quantised scales of blocks.

    ``codes`` uint8 ``(rows, blocks * 32)`` has the first code of a pair in the high bits; rows are
    padded with zeros. The scale of a block is ``lowest + scale * step``, with ``scale`` uint8
    ``(rows, blocks)``, and ``step`` and ``lowest`` float32 ``(groups,)``.
    """

    kind = "nf4"
    tensor_names = ("codes", "scale", "step", "lowest")
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
    def finished(cls, packed: dict[str, Tensor]) -> dict[str, Tensor]:
        top = packed.pop("top")
        flat = top.flatten()[None]
        groups = F.pad(flat, (0, -flat.shape[1] % _GROUP), mode="replicate").view(-1, _GROUP)
        lowest, step = groups.amin(dim=1), (groups.amax(dim=1) - groups.amin(dim=1)) / 255
        steps = (groups - lowest[:, None]).div_(step.clamp_min(_TINY)[:, None]).round_()
        scale = steps.to(torch.uint8).flatten()[: top.numel()].view(top.shape)
        return packed | {"scale": scale.clone(), "step": step, "lowest": lowest}

    def tops(self) -> Tensor:
        """Return the largest absolute value of each block, ``(rows, blocks)``."""
        spread = (
            t.repeat_interleave(_GROUP)[: self.scale.numel()] for t in (self.step, self.lowest)
        )
        step, lowest = (t.view(self.scale.shape) for t in spread)
        return torch.addcmul(lowest, self.scale, step)

    def rows(self, start: int, stop: int) -> Tensor:
        values = _values(self.codes[start:stop], self.tops()[start:stop])
        return values[:, : self.shape[1:].numel()]


def _restored(rows: Tensor, quantised: Tensor) -> Tensor:
    """Return the factors that restore the norms of rows after quantisation, ``(rows,)``."""
    norms = (torch.linalg.vector_norm(matrix, dim=1) for matrix in (rows, quantised))
    return torch.div(*(norm.clamp_min(_TINY) for norm in norms))


def _values(codes: Tensor, top: Tensor) -> Tensor:
    """Return the values of nf4 codes ``(rows, n / 2)``, from the largest values of blocks."""
    # While a graph is traced, the cached table of an earlier call cannot be used.
    pairs_of = _pairs if type(codes) is Tensor else _pairs.__wrapped__
    pairs = pairs_of(codes.device)[codes.int()]
    return pairs.view(*top.shape, BLOCK).mul_(top[..., None]).flatten(1)


@lru_cache
def _pairs(device: torch.device) -> Tensor:
    """Return the two values of each byte, float32 ``(256, 2)``."""
    levels, byte = torch.tensor(LEVELS), torch.arange(256)
    return torch.stack([levels[byte >> 4], levels[byte & 15]], dim=1).to(device)


def quantise(weight: Tensor, kind: str) -> PackedWeight:
    """Quantise a weight ``(out, in, *k)``.

    Raises:
        ValueError: If the weight is already quantised or not floating-point, or the kind is
            unknown.
    """
    if kind not in QUANTISATIONS:
        raise ValueError(f"quantize is {kind!r}; it must be one of {', '.join(QUANTISATIONS)}")
    if isinstance(weight, PackedWeight) or not weight.is_floating_point():
        raise ValueError("a weight that is already quantised cannot be quantised again")
    flat = weight.detach().flatten(1)
    return quantise_rows(lambda start, stop: flat[start:stop], weight.shape, weight.dtype, kind)


def quantise_rows(
    load: Callable[[int, int], Tensor], shape: Sequence[int], dtype: torch.dtype, kind: str
) -> PackedWeight:
    """Quantise a weight row by row, without loading it as a whole.

    Args:
        load: Returns the rows from ``start`` to ``stop``, ``(stop - start, n)``, in any dtype.
        shape: Shape of the weight, ``(out, in, *k)``.
        dtype: Dtype of the base model, to which values are rounded first.
        kind: One of `QUANTISATIONS`.
    """
    packed_class = Int8Weight if kind == "int8" else NF4Weight
    step, tensors = max(1, _CHUNK // math.prod(shape[1:])), dict[str, Tensor]()
    with torch.no_grad():
        for start in range(0, shape[0], step):
            rows = load(start, min(start + step, shape[0])).to(dtype).float()
            for name, packed in packed_class.pack(rows).items():
                if name not in tensors:
                    tensors[name] = packed.new_empty(shape[0], *packed.shape[1:])
                tensors[name][start : start + step] = packed
        return packed_class(packed_class.finished(tensors), torch.Size(shape), dtype, dtype)


def memory_of(tensor: Tensor) -> list[Tensor]:
    """Return the tensors that store a tensor's values: itself, or codes and scales."""
    return [*tensor.tensors.values()] if isinstance(tensor, PackedWeight) else [tensor]


def exchange(ours: Tensor, theirs: Tensor) -> None:
    """Exchange the values of two tensors without changing their identities."""
    if isinstance(ours, PackedWeight):
        for tensor in (ours, theirs):
            tensor.requires_grad_(False)
        swap_tensors(ours, theirs)  # type: ignore[no-untyped-call]
    else:
        ours.data, theirs.data = theirs.data, ours.data


def _product(
    run: Any, x: Tensor, weight: PackedWeight, bias: Any = None, *args: Any, **kwargs: Any
) -> Tensor:
    """Apply ``F.linear`` or a convolution with a packed weight, respecting autocast."""
    if run is not F.linear and x.ndim < weight.ndim:
        return _product(run, x[None], weight, bias, *args, **kwargs)[0]
    dtype = product_dtype(x)
    x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        output: Tensor = _Product.apply(x, bias, weight, run, args, kwargs)  # type: ignore[no-untyped-call]
    return output


class _Product(torch.autograd.Function):
    """Product that saves codes and restores the dense weight in the backward pass."""

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
        output: Tensor = run(x, weight.dense(x.dtype), bias, *args, **kwargs)
        return output

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
