"""A GPU, emulated: CPU tensors that say they are on one, and refuse what it refuses.

The numbers are real: every operation runs on the CPU. Which tensors are on the device is known by
their storage, so that views, gradients and what autograd saves are on it too. Two modes do it:

- a function mode, above autograd, where Python names devices: it answers ``x.device``, moves
  tensors between the two sides, and makes those that are asked for on the device;
- a dispatch mode, below autograd, which sees each operation that a backend is asked for. It refuses
  operators that the device's backend lacks in the installed torch, dtypes that it lacks, and
  operands on both sides. It counts what would wait for the device.

A copy to the host that does not wait holds garbage until something has waited for it.

What a backend has is read from ``native_functions.yaml``, which comes with torch: its build takes
the kernels of each from it. Not emulated: kernels that exist and refuse a dtype or shape, how they
round, and time.
"""

from __future__ import annotations

import collections
import functools
import inspect
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

LOW = (torch.bfloat16, torch.float16)
TO_PYTHON = (Tensor.numpy, Tensor.__array__)
# Whose operands may be on two devices: indices are fetched, copies are what they are for.
ON_TWO_DEVICES = ("copy_", "_foreach_copy_", "index", "index_put", "index_put_", "_index_put_impl_")
# Not even a number without dimensions may be elsewhere here.
ON_ONE_DEVICE = ("cat", "stack")
# What reads a value, or a shape, back from the device.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal")


@functools.cache
def unsupported_operators(backend: str) -> frozenset[str]:
    """Operators of ATen with neither a kernel for a backend nor one made of other operators.

    Args:
        backend: As torch's dispatcher calls it: ``"MPS"``, ``"CUDA"``.
    """
    import torchgen
    from torchgen.gen import parse_native_yaml
    from torchgen.model import DispatchKey

    home = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native"
    parsed = parse_native_yaml(str(home / "native_functions.yaml"), str(home / "tags.yaml"))
    keys = (
        DispatchKey[backend],
        DispatchKey.CompositeImplicitAutograd,
        DispatchKey.CompositeExplicitAutograd,
        DispatchKey.CompositeExplicitAutogradNonFunctional,
    )
    kernels = {str(name) for key in keys for name in parsed.backend_indices[key].index}
    if backend == "MPS":  # Until 2.12, torch gave it the group norm in Python.
        source = inspect.getsource(torch.backends.mps)
        kernels |= set(re.findall(r'_lib\.impl\("(\w+)", \w+, "MPS"\)', source))
    # A structured operator has the kernel of the one that writes to ``out``.
    homes = {str(f.func.name): str(f.structured_delegate or f.func.name)
             for f in parsed.native_functions}  # fmt: skip
    return frozenset(name for name, home in homes.items() if home not in kernels)


class EmulatedGPU:
    """The device: which storages are on it, its random generator, and what it has seen.

    Attributes:
        operators: Names of the operators that ran on it.
        dtypes: Of what they made.
        waits: What the program waited for the device with, by name.
        releases: How often its allocator was told to give memory back.
    """

    kind: str  # as torch calls it
    backend: str  # as torch's dispatcher calls it
    can_pin = True
    # What autocast runs in float32, and a CPU's does not.
    in_float32: tuple[Any, ...] = (F.layer_norm, F.group_norm)

    def __init__(self) -> None:
        self.device = torch.device(self.kind, 0)
        self.operators: set[str] = set()
        self.dtypes: set[torch.dtype] = set()
        self.waits: collections.Counter[str] = collections.Counter()
        self.random_state = torch.Generator().manual_seed(0).get_state()
        self.releases = 0
        self.copies_begun = 0
        self._copies: list[tuple[int, Tensor, Tensor]] = []
        self._storages: dict[int, StorageWeakRef] = {}
        self._pinned: dict[int, StorageWeakRef] = {}

    def say_so(self, patch: pytest.MonkeyPatch) -> None:
        """Have torch's own words about its devices tell of this one."""
        raise NotImplementedError

    def refuse_dtype(self, dtype: torch.dtype) -> None:
        """Raise what the device raises for a dtype that it lacks."""

    def kernel(self, name: str) -> Any:
        """The kernel of an operator that a CPU lacks, or does otherwise; None for the CPU's."""
        return _gradients_in_float32 if name == "convolution_backward" else None

    def stream(self, device: Any = None) -> Any:
        """The one stream of work."""
        return SimpleNamespace(is_capturing=lambda: False)

    def holds(self, tensor: Tensor) -> bool:
        with torch._C.DisableTorchFunction():
            return tensor.untyped_storage()._cdata in self._storages

    def is_pinned(self, tensor: Tensor) -> bool:
        with torch._C.DisableTorchFunction():
            return tensor.untyped_storage()._cdata in self._pinned

    def take(self, tensor: Tensor, on: bool = True) -> Tensor:
        """Have a tensor's storage be on the device, or not any more; of a wrapper its parts'."""
        with torch._C.DisableTorchFunction():
            if is_traceable_wrapper_subclass(tensor):
                for name in tensor.__tensor_flatten__()[0]:
                    self.take(getattr(tensor, name), on)
        if not on:
            with torch._C.DisableTorchFunction():
                self._storages.pop(tensor.untyped_storage()._cdata, None)
            return tensor
        return _note(self._storages, tensor)

    def pin(self, tensor: Tensor) -> Tensor:
        """Have a tensor on the host be in memory that copies need not wait for."""
        return _note(self._pinned, tensor)

    def begin_copy(self, source: Tensor) -> Tensor:
        """Garbage on the host, which `finish_copies` replaces by the tensor as it is now."""
        with torch._C.DisableTorchFunction():
            copy = torch.full_like(source, _garbage(source.dtype))
            self.copies_begun += 1
            self._copies.append((self.copies_begun, copy, source.detach().clone()))
        return copy

    def finish_copies(self, until: int | None = None) -> None:
        """Complete copies: all of them, or those begun before an event."""
        with torch._C.DisableTorchFunction():
            for number, copy, value in self._copies:
                if until is None or number <= until:
                    copy.copy_(value)
        self._copies = [c for c in self._copies if until is not None and c[0] > until]

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Random numbers from the device's generator, which is not the CPU's."""
        cpu = torch.get_rng_state()
        torch.set_rng_state(self.random_state)
        try:
            yield
        finally:
            self.random_state = torch.get_rng_state()
            torch.set_rng_state(cpu)

    def seed(self, number: int) -> None:
        self.random_state = torch.Generator().manual_seed(number).get_state()

    def set_random_state(self, state: Tensor, *device: Any) -> None:
        self.random_state = state

    def release(self) -> None:
        self.releases += 1


def _gradients_in_float32(grad: Tensor, x: Tensor, weight: Tensor, *args: Any) -> list[Any]:
    """A convolution's: oneDNN's in bfloat16 leave garbage where taps only met padding."""
    given = [_widened(tensor) for tensor in (grad, x, weight)]
    found = torch.ops.aten.convolution_backward(*given, *args)
    return [None if part is None else part.to(x.dtype) for part in found]


class OneDNN(TorchDispatchMode):
    """Emulate oneDNN in bfloat16 on some CPUs: a weight's gradient is NaN in taps of padding."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        is_gradient = func is torch.ops.aten.convolution_backward.default
        if is_gradient and args[0].dtype == torch.bfloat16 and args[-1][1]:
            taps = found[1].flatten(2)
            taps[..., (taps == 0).all(0).all(0)] = torch.nan
        return found


def _note(storages: dict[int, StorageWeakRef], tensor: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        storage = tensor.untyped_storage()
        # The reference keeps the address from being another storage's later.
        storages.setdefault(storage._cdata, StorageWeakRef(storage))
        if len(storages) > 100_000:
            for address in [a for a, reference in storages.items() if reference.expired()]:
                del storages[address]
    return tensor


def _garbage(dtype: torch.dtype) -> Any:
    if dtype == torch.bool:
        return True
    return float("nan") if dtype.is_floating_point else 77


def _tensors(values: Any) -> list[Tensor]:
    """The tensors among arguments, also in lists and dicts of them."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
        elif isinstance(value, dict):
            found += _tensors(value.values())
    return found


class _Operators(TorchDispatchMode):
    """Operations that the device is asked to compute."""

    def __init__(self, gpu: EmulatedGPU, names: _Names) -> None:
        super().__init__()
        self.gpu, self.names = gpu, names

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            operands = _tensors((args, kwargs) if kwargs else args)
            # What C++ makes to compute with is where the operands of its caller are.
            on = any(map(self.gpu.holds, operands)) if operands else self.names.operands_on
            if self.names.moving or not on:
                return func(*args, **kwargs)
            if func is torch.ops.aten.copy_.default:
                return self._copy(func, *args, **kwargs)
            return self._run(func, args, kwargs, operands)

    def _copy(self, func, target, source, non_blocking=False):
        gpu = self.gpu
        if gpu.holds(target) and gpu.holds(source):
            return self._run(func, (target, source), {}, [target, source])
        host = source if gpu.holds(target) else target
        gpu.refuse_dtype(target.dtype)
        if not (non_blocking and gpu.is_pinned(host)):
            gpu.waits["copy"] += 1
        return func(target, source)

    def _run(self, func, args, kwargs, operands):
        name = str(func.name()).removeprefix("aten::")
        base = name.partition(".")[0]
        self._refuse(name, base, kwargs, operands)
        draws = torch.Tag.nondeterministic_seeded in func.tags
        compute = self.gpu.kernel(name) or func
        with self.gpu.drawing() if draws else ExitStack():
            result = compute(*args, **kwargs)
        self.gpu.operators.add(name)
        if base in WAITS or (base in ON_TWO_DEVICES and _looks_up(base, args, self.gpu)):
            self.gpu.waits[base] += 1
        for tensor in _tensors((result,)):
            self.gpu.refuse_dtype(tensor.dtype)
            self.gpu.dtypes.add(tensor.dtype)
            self.gpu.take(tensor)
        return result

    def _refuse(self, name, base, kwargs, operands):
        gpu = self.gpu
        if name in unsupported_operators(gpu.backend):
            raise NotImplementedError(
                f"The operator 'aten::{name}' is not currently implemented for the "
                f"{gpu.backend} device."
            )
        elsewhere = [t for t in operands if not gpu.holds(t)]
        if base not in ON_ONE_DEVICE:
            elsewhere = [t for t in elsewhere if t.ndim]
        if elsewhere and base not in ON_TWO_DEVICES:
            raise RuntimeError(
                f"aten::{name}: expected all tensors to be on the same device, but found at "
                f"least two devices, {gpu.device} and cpu!"
            )
        if kwargs.get("generator") is not None:
            raise RuntimeError(f"Expected a '{gpu.kind}' device type for generator but found 'cpu'")


def _looks_up(base: str, args: Any, gpu: EmulatedGPU) -> bool:
    """Return whether indices are on the host, or have to be counted first."""
    if not base.lstrip("_").startswith("index"):
        return False
    return any(i is not None and (not gpu.holds(i) or i.dtype == torch.bool) for i in args[1])


class _Names(TorchFunctionMode):
    """Calls in which Python names a device."""

    def __init__(self, gpu: EmulatedGPU) -> None:
        super().__init__()
        self.gpu = gpu
        self.moving = self.operands_on = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if func is Tensor.backward:
            return self._backward(first, *args[1:], **kwargs)
        if first is not None and self.gpu.holds(first):
            known = self._about(func, first)
            if known is not None:
                return known
            if getattr(func, "__name__", "") == "__get__":
                return func(*args)
        if func is Tensor.is_pinned:
            return self.gpu.is_pinned(first)
        if func is Tensor.pin_memory or kwargs.get("pin_memory"):
            return self._pin(func, args, kwargs)
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self._move(func, *args, **kwargs)
        if kwargs.get("device") is not None:
            return self._make(func, args, kwargs)
        return self._call(func, args, kwargs)

    def _about(self, func, tensor):
        """The answer of a tensor on the device about itself; None if that is not asked."""
        gpu = self.gpu
        if func == Tensor.device.__get__:  # a new wrapper at each look
            return gpu.device
        if func == Tensor.is_cpu.__get__:
            return False
        if func == Tensor.is_cuda.__get__:
            return gpu.kind == "cuda"
        if func is Tensor.get_device:
            return 0
        if func in TO_PYTHON:
            raise TypeError(
                f"can't convert {gpu.device} device type tensor to numpy. Use Tensor.cpu() to copy "
                "the tensor to host memory first."
            )
        if func is Tensor.tolist:  # reads memory, past the dispatcher
            gpu.waits["tolist"] += 1
        return None

    def _pin(self, func, args, kwargs):
        on = any(map(self.gpu.holds, _tensors(args)))
        if not self.gpu.can_pin or on:
            raise RuntimeError(f"cannot pin memory for {self.gpu.backend}")
        kwargs.pop("pin_memory", None)
        if func is Tensor.pin_memory:
            return args[0] if self.gpu.is_pinned(args[0]) else self.gpu.pin(args[0].clone())
        return self.gpu.pin(self._call(func, args, kwargs))

    def _call(self, func, args, kwargs):
        before = self.operands_on
        self.operands_on = any(map(self.gpu.holds, _tensors((args, kwargs))))
        try:
            if self.operands_on and func is F.scaled_dot_product_attention:
                with sdpa_kernel(SDPBackend.MATH):
                    return func(*args, **kwargs)
            if (
                self.operands_on
                and func in self.gpu.in_float32
                and torch.is_autocast_enabled("cpu")
            ):
                args = [_widened(a) for a in args]
                kwargs = {k: _widened(a) for k, a in kwargs.items()}
                with torch.autocast("cpu", enabled=False):
                    return func(*args, **kwargs)
            result = func(*args, **kwargs)
            if self.operands_on and func is Tensor.__deepcopy__:
                self.gpu.take(result)
            if self.operands_on and func is Tensor.new_tensor:
                self.gpu.waits["new_tensor"] += 1
            return result
        finally:
            self.operands_on = before

    def _backward(self, loss, gradient=None, **kwargs):
        before, self.operands_on = self.operands_on, self.gpu.holds(loss)
        try:
            torch.autograd.backward(loss, gradient, **kwargs)
        finally:
            self.operands_on = before

    def _make(self, func, args, kwargs):
        """A new tensor on a device that was named."""
        on = torch.device(kwargs["device"]).type == self.gpu.kind
        if on and kwargs.get("generator") is not None:
            raise RuntimeError(
                f"Expected a '{self.gpu.kind}' device type for generator but found 'cpu'"
            )
        with self._without_looking(), self.gpu.drawing() if on else ExitStack():
            result = func(*args, **kwargs | ({"device": "cpu"} if on else {}))
        given = [tensor.untyped_storage()._cdata for tensor in _tensors(args)]
        if on and func in (torch.tensor, torch.as_tensor):
            self.gpu.waits["tensor"] += 1
        for tensor in _tensors((result,)):
            if on:
                self.gpu.refuse_dtype(tensor.dtype)
                assert tensor.untyped_storage()._cdata not in given, f"{func} moved nothing"
            self.gpu.take(tensor, on)
        return result

    def _move(self, func, tensor, *args, **kwargs):
        """``x.to(...)``, ``x.cpu()`` and ``x.cuda()``."""
        if func is not Tensor.to:
            device = "cpu" if func is Tensor.cpu else "cuda"
            args, kwargs = (), {"device": device, "non_blocking": kwargs.get("non_blocking", False)}
        non_blocking = kwargs.get("non_blocking", False)
        if args and isinstance(args[0], Tensor):
            device = self.gpu.device if self.gpu.holds(args[0]) else torch.device("cpu")
            dtype, rest = args[0].dtype, kwargs
        else:
            device, dtype, non_blocking, *_ = torch._C._nn._parse_to(
                *args, **{k: v for k, v in kwargs.items() if k != "copy"}
            )
            rest = kwargs
        rest = {k: v for k, v in rest.items() if k in ("copy", "memory_format")}
        was_on = self.gpu.holds(tensor)
        on = was_on if device is None else device.type == self.gpu.kind
        dtype = dtype or tensor.dtype
        if on == was_on:
            return self._call(Tensor.to, (tensor, dtype), rest)
        # A copy from the device casts on it, one to it on the CPU.
        self.gpu.refuse_dtype(dtype)
        if not (non_blocking and (was_on or self.gpu.is_pinned(tensor))):
            self.gpu.waits["copy"] += 1
        with self._without_looking():
            moved = tensor.to(dtype, **rest)
            if was_on and non_blocking:
                return self.gpu.begin_copy(moved)
            if moved.untyped_storage()._cdata == tensor.untyped_storage()._cdata:
                moved = moved.clone()
        return self.gpu.take(moved, on)

    @contextmanager
    def _without_looking(self) -> Iterator[None]:
        before, self.moving = self.moving, True
        try:
            yield
        finally:
            self.moving = before


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in LOW else value


def _have_backward_follow(patch: pytest.MonkeyPatch, names: _Names) -> None:
    """Autograd's engine leaves function modes behind: enter this one where it calls Python."""
    from torch.autograd.function import BackwardCFunction
    from torch.utils import checkpoint

    def entering(function: Any) -> Any:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with names:
                return function(*args, **kwargs)

        return run

    make = checkpoint._CheckpointFrame.__init__
    patch.setattr(BackwardCFunction, "apply", entering(BackwardCFunction.apply))
    patch.setattr(
        checkpoint._CheckpointFrame,
        "__init__",
        lambda self, recompute, *args: make(self, entering(recompute), *args),
    )
    # What was recomputed is compared after that, by its device too.
    checks = checkpoint._allowed_determinism_checks_to_fns
    patch.setitem(checks, "default", lambda tensor: {"shape": tensor.shape, "dtype": tensor.dtype})


def _have_optimizers_follow(patch: pytest.MonkeyPatch, gpu: EmulatedGPU) -> None:
    """Optimizers and clipping ask C++ where tensors are."""
    from torch.nn.utils import clip_grad
    from torch.optim import optimizer

    plain = optimizer._group_tensors_by_device_and_dtype

    def grouped(lists: Any, with_indices: bool = False) -> Any:
        on = any(map(gpu.holds, _tensors(lists)))
        device = gpu.device if on else torch.device("cpu")
        return {(device, dtype): group for (_, dtype), group in plain(lists, with_indices).items()}

    for module in (optimizer, clip_grad):
        patch.setattr(module, "_group_tensors_by_device_and_dtype", grouped)


def _have_autocast_follow(patch: pytest.MonkeyPatch, kind: str) -> None:
    """Autocast on the device is the CPU's, whose tensors these are."""
    autocast = torch.amp.autocast_mode.autocast
    enter = autocast.__init__

    def as_cpu(name: Any) -> Any:
        return "cpu" if str(name).startswith(kind) else name

    def start(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        enter(self, as_cpu(device_type), *args, **kwargs)

    patch.setattr(autocast, "__init__", start)
    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        asked = getattr(torch, name)
        patch.setattr(torch, name, lambda kind, asked=asked: asked(as_cpu(kind)))


def _have_accelerator_follow(patch: pytest.MonkeyPatch, gpu: EmulatedGPU) -> None:
    kind = torch.device(gpu.kind)
    if hasattr(torch, "accelerator"):
        patch.setattr(torch.accelerator, "is_available", lambda: True)
        patch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: kind)
        # Optimizers ask it.
        patch.setattr(torch.accelerator, "current_stream", gpu.stream)


def _forget_devices() -> None:
    """Drop what was found out about devices and kept."""
    from diffusers.utils import torch_utils

    from dora_diffusion.numerics import fused, norms

    norms._probe_on.cache_clear()
    fused.unit_statistics.cache_clear()
    if hasattr(torch_utils, "TorchDeviceBackend"):  # Diffusers 0.42
        torch_utils.TorchDeviceBackend._detect_device_type.cache_clear()


@contextmanager
def emulated(gpu: EmulatedGPU) -> Iterator[None]:
    """Have a GPU for as long as the block lasts."""
    from accelerate.state import AcceleratorState, PartialState

    names = _Names(gpu)
    with pytest.MonkeyPatch.context() as patch:
        # Accelerate writes it where it finds an Apple GPU.
        patch.setenv("PYTORCH_ENABLE_MPS_FALLBACK", "0")
        patch.delenv("ACCELERATE_USE_CPU", raising=False)
        gpu.say_so(patch)
        _have_accelerator_follow(patch, gpu)
        _have_autocast_follow(patch, gpu.kind)
        _have_optimizers_follow(patch, gpu)
        _have_backward_follow(patch, names)
        AcceleratorState._reset_state(reset_partial_state=True)
        _forget_devices()
        try:
            with names, _Operators(gpu, names):
                yield
        finally:
            _forget_devices()
            AcceleratorState._reset_state(reset_partial_state=True)
            PartialState._reset_state()
