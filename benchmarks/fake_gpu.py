"""A device that computes nothing: models on it take no memory, and every operation is seen.

Fake tensors know shapes and dtypes only. Torch without CUDA runs no gradients of fake CUDA tensors,
so they live on a device of our own, which behaves as CUDA does in what decides how many operations
there are: autocast's policy, attention, products that widen, and events.
"""

from __future__ import annotations

import collections
import contextlib
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = "gpu"

# CUDA's autocast policy, of the operations that it names (torch's autocast_mode.h). All others of
# these run in float32.
_LOW = {
    "_convolution", "conv1d", "conv2d", "conv3d", "convolution", "addmm", "addmv", "addr",
    "matmul", "einsum", "mm", "mv", "linear", "addbmm", "baddbmm", "bmm", "prelu",
    "linalg_vecdot", "linalg_multi_dot", "chain_matmul", "scaled_dot_product_attention",
}  # fmt: skip
_WIDEST = {
    "addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "vdot", "grid_sampler",
    "index_put", "tensordot", "scatter_add",
}  # fmt: skip
# With the dtype of the result as an argument, which these widen to as they read.
_WIDEN_AS_THEY_READ = {"sum", "prod", "softmax", "log_softmax", "cumsum", "cumprod"}

# What starts nothing on a GPU.
VIEWS = {
    "view", "_unsafe_view", "_reshape_alias", "reshape", "t", "transpose", "permute", "expand",
    "slice", "select", "unsqueeze", "squeeze", "detach", "alias", "as_strided", "split",
    "split_with_sizes", "unbind", "unflatten", "chunk", "lift_fresh", "diagonal", "narrow", "empty",
    "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_", "resize_",
    "is_pinned", "_fused_sdp_choice", "record_stream", "is_same_size", "sym_size",
}  # fmt: skip
# What waits for the device: its result, or its shape, is read by the program.
_WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal"}


class _Module(types.ModuleType):
    """Stub of a device's module, with what torch asks it for."""

    _initialized = True

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def device(self, index: int) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.empty(16, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        pass


_libraries: list[torch.library.Library] = []

# One operation on CUDA, which torch takes apart on devices that it has no kernel of.
_WHOLE = ("silu_backward",)


def make_device() -> None:
    """Add the device to this process.

    Raises:
        SystemExit: If this torch has no devices written in Python.
    """
    if _libraries:
        return
    from torch.utils import backend_registration

    setup = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)
    if setup is None:
        raise SystemExit("counting needs torch >= 2.10, whose devices can be written in Python")
    setup(DEVICE, backend_module=_Module(DEVICE))
    others = torch.library.Library("_", "IMPL")
    others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    _libraries.append(others)
    _libraries.append(torch.library.Library("aten", "IMPL"))
    names: list[str] = torch._C._dispatch_get_registrations_for_dispatch_key("AutocastCUDA")
    for name in names:
        operation, _, overload = name.removeprefix("aten::").partition(".")
        packet = getattr(torch.ops.aten, operation, None)
        if packet is not None and hasattr(packet, overload or "default"):
            run = _autocast(operation, getattr(packet, overload or "default"))
            _libraries[1].impl(name.removeprefix("aten::"), run, "AutocastPrivateUse1")
    for operation in _WHOLE:
        _libraries[1].impl(operation, _never, "PrivateUse1")


def _never(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("a fake tensor has no kernel")


def _autocast(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
    """An operation under CUDA's policy."""
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(key):
            if name in _WIDEN_AS_THEY_READ:
                low = args[0].dtype in (torch.bfloat16, torch.float16)
                return operation(*args, **({"dtype": torch.float32} if low else {}) | kwargs)
            dtype = torch.float32
            if name in _LOW:
                dtype = torch.get_autocast_dtype(DEVICE)
            elif name in _WIDEST and not any(
                isinstance(a, Tensor) and a.dtype == torch.float32 for a in args
            ):
                return operation(*args, **kwargs)
            return operation(*(_cast(a, dtype) for a in args), **kwargs)

    return run


# By identity, which is kept with it: a parameter, and its cast.
_casts: dict[int, tuple[Tensor, Tensor]] = {}


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """An operand as autocast has it, which casts a parameter once until its context ends."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    if value.dtype in (torch.float64, dtype):
        return value
    if value.dtype != torch.float32 or not (value.is_leaf and value.requires_grad):
        return value.to(dtype)
    if id(value) not in _casts:
        _casts[id(value)] = value, value.to(dtype)
    return _casts[id(value)][1]


_plain_attention = F.scaled_dot_product_attention


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, **kwargs: Any,
) -> Tensor:  # fmt: skip
    """Flash attention in half precision, the memory-efficient one in float32, as CUDA chooses."""
    if query.device.type != DEVICE:
        return _plain_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **kwargs
        )
    if torch.is_autocast_enabled(DEVICE):
        query, key, value = (
            _cast(t, torch.get_autocast_dtype(DEVICE)) for t in (query, key, value)
        )
    with torch.autocast(DEVICE, enabled=False):
        aten = torch.ops.aten
        if query.dtype == torch.float32 or attn_mask is not None:
            needed = torch.is_grad_enabled() and query.requires_grad
            return aten._scaled_dot_product_efficient_attention(
                query, key, value, attn_mask, needed, dropout_p, is_causal, scale=scale
            )[0]
        return aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )[0]


def _apply(
    module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True
) -> nn.Module:
    """`nn.Module._apply` with new parameters: fake tensors cannot be written into one another."""
    for child in module.children():
        child._apply(change)
    for name, parameter in list(module._parameters.items()):
        if parameter is not None:
            new = change(parameter.detach())
            module._parameters[name] = nn.Parameter(new, parameter.requires_grad)
    for name, buffer in list(module._buffers.items()):
        if buffer is not None:
            module._buffers[name] = change(buffer)
    return module


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Make tensors fake inside the block, and those on `DEVICE` behave as on CUDA."""
    make_device()
    from dora_diffusion.adapters import flags
    from dora_diffusion.numerics import fused, norms
    from dora_diffusion.training import optimizer

    probe = lru_cache(norms._probe_on.__wrapped__)
    statistics = lru_cache(fused.unit_statistics.__wrapped__)
    with (
        mock.patch.object(F, "scaled_dot_product_attention", _attention),
        mock.patch.object(torch, "clear_autocast_cache", _casts.clear),
        mock.patch.object(nn.Module, "_apply", _apply),
        # Its vectors outlive a step; these must not outlive the mode.
        mock.patch.object(norms, "_probe", lambda n, like: probe(n, like.device, like.dtype)),
        mock.patch.object(fused, "unit_statistics", statistics),
        mock.patch.object(fused, "mixes_batch_norm", return_value=True),
        mock.patch.object(optimizer, "_addresses_of"),  # These have none.
        mock.patch.object(norms, "widens_products", lambda device: device in ("cuda", DEVICE)),
        mock.patch.object(flags, "_DEFERRED", {DEVICE}),
        mock.patch.object(flags, "record_event"),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):  # fmt: skip
        yield


class Count(TorchDispatchMode):
    """Counts what is dispatched below autograd: on the fake device, or anywhere on real tensors.

    Attributes:
        operations: By name, without views.
        views: How many operations started nothing.
        copies: Copies between host and device that do not wait.
        waits: What makes the program wait for the device, by name: reading a value, searching, and
            copying to or from memory that is not pinned.
        bytes: Of all operands and results of `operations`.
    """

    def __init__(self, device: str | None = DEVICE) -> None:
        super().__init__()
        self.device = device
        self.operations: collections.Counter[str] = collections.Counter()
        self.waits: collections.Counter[str] = collections.Counter()
        self.views = self.copies = self.bytes = 0

    @property
    def total(self) -> int:
        """Operations in all."""
        return sum(self.operations.values())

    @property
    def synchronisations(self) -> int:
        """Number of waits in all."""
        return sum(self.waits.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        before = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        ours = self._is_counted(before, kwargs) and func.namespace == "aten"
        if self.device is not None and name == "_local_scalar_dense":
            if ours:
                self.waits["read"] += 1
            return 1.0 if args[0].is_floating_point() else 1
        result = _answer(name, args) if self.device is not None else None
        if result is None:
            result = func(*args, **kwargs)
        after = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if name in ("_to_copy", "copy_") and self._crosses(name, args, before, after):
            waiting = not kwargs.get("non_blocking", name == "copy_" and args[2:3] == (True,))
            self.copies += not waiting
            if waiting:
                self.waits["copy"] += 1
        if not ours:
            return result
        if name in _WAITS:
            self.waits["read" if name == "_local_scalar_dense" else name] += 1
        elif name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self.waits["boolean index"] += 1
        if name in VIEWS or name == "_local_scalar_dense":
            self.views += 1
        else:
            self.operations[name] += 1
            self.bytes += sum(t.numel() * t.element_size() for t in before + after)
        return result

    def _is_counted(self, tensors: list[Tensor], kwargs: dict[str, Any]) -> bool:
        if self.device is None:
            return True
        if tensors:
            return any(tensor.device.type == self.device for tensor in tensors)
        return str(kwargs.get("device", "")).startswith(self.device)

    def _crosses(
        self, name: str, args: tuple[Any, ...], before: list[Tensor], after: list[Tensor]
    ) -> bool:
        return len({tensor.device.type for tensor in before + after}) > 1


class Answers(TorchDispatchMode):
    """Mode that answers what fake tensors cannot know: a number is 1, a search finds one row."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name.partition("::")[2]
        if name == "_local_scalar_dense":
            return 1.0 if args[0].is_floating_point() else 1
        result = _answer(name, args)
        return func(*args, **(kwargs or {})) if result is None else result


def _answer(name: str, args: tuple[Any, ...]) -> Tensor | None:
    """A result whose shape fake tensors cannot know: as if one row were found."""
    if name == "nonzero":
        return args[0].new_empty((0, args[0].ndim), dtype=torch.int64)
    if name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1]):
        return args[0].new_empty((1, *args[0].shape[args[1][0].ndim :]))
    return None
