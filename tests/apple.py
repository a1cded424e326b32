"""Apple's GPU, emulated: CPU tensors that say they are on ``mps``, and refuse what it refuses.

The numbers are real: every operation runs on the CPU. Which tensors are on the device is known by
their storage, so that views, gradients and what autograd saves are on it too. Two modes do it:

- a function mode, above autograd, where Python names devices: it answers ``x.device``, moves
  tensors between the two sides, and makes those that are asked for on ``mps``;
- a dispatch mode, below autograd, which sees each operation that a backend is asked for. It refuses
  float64, operators that the MPS backend of the installed torch lacks, operands on both sides, and
  bfloat16 where it is told to.

What MPS has is read from ``native_functions.yaml``, which comes with torch: its build takes the
kernels of each backend from it. Not emulated: kernels that exist and refuse a dtype or shape, and
how they round.
"""

from __future__ import annotations

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
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("mps:0")
WIDE = (torch.float64, torch.complex128)
# Kernels that Apple's autocast runs in float32, as CUDA's does and a CPU's does not.
IN_FLOAT32 = (F.layer_norm, F.group_norm)
TO_PYTHON = (Tensor.numpy, Tensor.__array__)


@functools.cache
def unsupported_operators() -> frozenset[str]:
    """Operators of ATen with neither a kernel for MPS nor one made of other operators."""
    import torchgen
    from torchgen.gen import parse_native_yaml
    from torchgen.model import DispatchKey

    home = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native"
    parsed = parse_native_yaml(str(home / "native_functions.yaml"), str(home / "tags.yaml"))
    keys = (
        DispatchKey.MPS,
        DispatchKey.CompositeImplicitAutograd,
        DispatchKey.CompositeExplicitAutograd,
        DispatchKey.CompositeExplicitAutogradNonFunctional,
    )
    kernels = {str(name) for key in keys for name in parsed.backend_indices[key].index}
    # Until 2.12, torch gave MPS the group norm in Python.
    source = inspect.getsource(torch.backends.mps)
    kernels |= set(re.findall(r'_lib\.impl\("(\w+)", \w+, "MPS"\)', source))
    # A structured operator has the kernel of the one that writes to ``out``.
    homes = {str(f.func.name): str(f.structured_delegate or f.func.name)
             for f in parsed.native_functions}  # fmt: skip
    return frozenset(name for name, home in homes.items() if home not in kernels)


class AppleGPU:
    """The device: which storages are on it, its random generator, and what it has seen.

    Attributes:
        has_bf16: Whether bfloat16 is allowed (macOS 14).
        operators: Names of the operators that ran on it.
    """

    def __init__(self, has_bf16: bool = True) -> None:
        self.has_bf16 = has_bf16
        self.operators: set[str] = set()
        self.dtypes: set[torch.dtype] = set()
        self.random_state = torch.Generator().manual_seed(0).get_state()
        self.releases = 0
        self._storages: dict[int, StorageWeakRef] = {}

    def holds(self, tensor: Tensor) -> bool:
        with torch._C.DisableTorchFunction():
            return tensor.untyped_storage()._cdata in self._storages

    def take(self, tensor: Tensor, on: bool = True) -> Tensor:
        """Have a tensor's storage be on the device, or not any more."""
        with torch._C.DisableTorchFunction():
            storage = tensor.untyped_storage()
            if on:
                # The reference keeps the address from being another storage's later.
                self._storages.setdefault(storage._cdata, StorageWeakRef(storage))
            else:
                self._storages.pop(storage._cdata, None)
            if len(self._storages) > 100_000:
                self._storages = {k: v for k, v in self._storages.items() if not v.expired()}
        return tensor

    def refuse_dtype(self, dtype: torch.dtype) -> None:
        if dtype in WIDE:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support "
                "float64. Please use float32 instead."
            )
        if dtype == torch.bfloat16 and not self.has_bf16:
            raise TypeError("BFloat16 is not supported on MPS")

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
    """What the device is asked to compute."""

    def __init__(self, gpu: AppleGPU, names: _Names) -> None:
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
            if func is torch.ops.aten.copy_.default and not self.gpu.holds(args[0]):
                if args[0].dtype in WIDE:
                    self.gpu.refuse_dtype(args[0].dtype)
                return func(*args, **kwargs)
            return self._run(func, args, kwargs, operands)

    def _run(self, func, args, kwargs, operands):
        name = str(func.name()).removeprefix("aten::")
        if name in unsupported_operators():
            raise NotImplementedError(
                f"The operator 'aten::{name}' is not currently implemented for the MPS device."
            )
        may_be_elsewhere = "copy_" in name or "index" in name
        for tensor in operands:
            if tensor.ndim and not self.gpu.holds(tensor) and not may_be_elsewhere:
                raise RuntimeError(
                    f"aten::{name}: expected all tensors to be on the same device, but found at "
                    "least two devices, mps:0 and cpu!"
                )
        if kwargs.get("generator") is not None:
            raise RuntimeError("Expected a 'mps' device type for generator but found 'cpu'")
        draws = torch.Tag.nondeterministic_seeded in func.tags
        with self.gpu.drawing() if draws else ExitStack():
            result = func(*args, **kwargs)
        self.gpu.operators.add(name)
        for tensor in _tensors((result,)):
            self.gpu.refuse_dtype(tensor.dtype)
            self.gpu.dtypes.add(tensor.dtype)
            self.gpu.take(tensor)
        return result


class _Names(TorchFunctionMode):
    """Where Python names a device."""

    def __init__(self, gpu: AppleGPU) -> None:
        super().__init__()
        self.gpu = gpu
        self.moving = self.operands_on = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if func is Tensor.backward:
            return self._backward(first, *args[1:], **kwargs)
        if first is not None and self.gpu.holds(first):
            if func == Tensor.device.__get__:  # a new wrapper at each look
                return DEVICE
            if func == Tensor.is_cpu.__get__:
                return False
            if getattr(func, "__name__", "") == "__get__":
                return func(*args)
            if func in TO_PYTHON:
                raise TypeError(
                    "can't convert mps:0 device type tensor to numpy. Use Tensor.cpu() to copy the "
                    "tensor to host memory first."
                )
        if func is Tensor.pin_memory or kwargs.get("pin_memory"):
            raise RuntimeError("cannot pin memory for MPS")
        if func in (Tensor.to, Tensor.cpu):
            return self._move(func, *args, **kwargs)
        if kwargs.get("device") is not None:
            return self._make(func, args, kwargs)
        return self._call(func, args, kwargs)

    def _call(self, func, args, kwargs):
        before = self.operands_on
        self.operands_on = any(map(self.gpu.holds, _tensors((args, kwargs))))
        try:
            if self.operands_on and func is F.scaled_dot_product_attention:
                with sdpa_kernel(SDPBackend.MATH):  # what MPS takes where there are gradients
                    return func(*args, **kwargs)
            in_float32 = func in IN_FLOAT32 and torch.is_autocast_enabled("cpu")
            if self.operands_on and in_float32:
                args = [a.float() if isinstance(a, Tensor) else a for a in args]
                kwargs = {k: a.float() if isinstance(a, Tensor) else a for k, a in kwargs.items()}
                with torch.autocast("cpu", enabled=False):
                    return func(*args, **kwargs)
            result = func(*args, **kwargs)
            if self.operands_on and func is Tensor.__deepcopy__:
                self.gpu.take(result)
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
        on = torch.device(kwargs["device"]).type == "mps"
        if on and kwargs.get("generator") is not None:
            raise RuntimeError("Expected a 'mps' device type for generator but found 'cpu'")
        with self._without_looking(), self.gpu.drawing() if on else ExitStack():
            result = func(*args, **kwargs | ({"device": "cpu"} if on else {}))
        given = [tensor.untyped_storage()._cdata for tensor in _tensors(args)]
        for tensor in _tensors((result,)):
            if on:
                self.gpu.refuse_dtype(tensor.dtype)
                assert tensor.untyped_storage()._cdata not in given, f"{func} moved nothing"
            self.gpu.take(tensor, on)
        return result

    def _move(self, func, tensor, *args, **kwargs):
        """``x.to(...)`` and ``x.cpu()``."""
        if func is Tensor.cpu:
            args, kwargs = (), {"device": "cpu"}
        if args and isinstance(args[0], Tensor):
            device = DEVICE if self.gpu.holds(args[0]) else torch.device("cpu")
            dtype, rest = args[0].dtype, kwargs
        else:
            device, dtype, *_ = torch._C._nn._parse_to(
                *args, **{k: v for k, v in kwargs.items() if k != "copy"}
            )
            rest = {k: v for k, v in kwargs.items() if k in ("copy", "memory_format")}
        was_on = self.gpu.holds(tensor)
        on = was_on if device is None else device.type == "mps"
        dtype = dtype or tensor.dtype
        if on == was_on:
            return self._call(Tensor.to, (tensor, dtype), rest)
        # A copy from the device casts on it, one to it on the CPU.
        self.gpu.refuse_dtype(dtype)
        with self._without_looking():
            moved = tensor.to(dtype, **rest)
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


def _as_cpu(kind: Any) -> Any:
    return "cpu" if str(kind).startswith("mps") else kind


def _have_torch_say_so(patch: pytest.MonkeyPatch, gpu: AppleGPU) -> None:
    """Torch's own words about its devices."""
    mps = torch.backends.mps
    patch.setattr(mps, "is_built", lambda: True)
    # Wrapped, since torch's compiler looks below the wrapper when it is imported.
    patch.setattr(mps, "is_available", functools.wraps(mps.is_available)(lambda: True))
    patch.setattr(mps, "get_name", lambda: "Apple M3 Max", raising=False)
    patch.setattr(mps, "is_macos_or_newer", lambda major, minor: gpu.has_bf16 or major < 14)
    if hasattr(torch, "accelerator"):
        patch.setattr(torch.accelerator, "is_available", lambda: True)
        patch.setattr(
            torch.accelerator, "current_accelerator", lambda *_, **__: torch.device("mps")
        )
        # Optimizers ask it since torch 2.15.
        stream = SimpleNamespace(is_capturing=lambda: False)
        patch.setattr(torch.accelerator, "current_stream", lambda device=None: stream)

    def seed(number: int) -> None:
        gpu.random_state = torch.Generator().manual_seed(number).get_state()

    def set_state(state: Tensor) -> None:
        gpu.random_state = state

    def release() -> None:
        gpu.releases += 1

    for name, value in {
        "manual_seed": seed, "get_rng_state": lambda: gpu.random_state, "set_rng_state": set_state,
        "empty_cache": release, "recommended_max_memory": lambda: 12 * 2**30,
        "driver_allocated_memory": lambda: 3 * 2**30, "synchronize": lambda: None,
    }.items():  # fmt: skip
        patch.setattr(torch.mps, name, value, raising=False)


def _have_backward_follow(patch: pytest.MonkeyPatch, names: _Names) -> None:
    """Autograd's engine leaves function modes behind: enter this one where it calls Python."""
    from torch.autograd.function import BackwardCFunction
    from torch.utils.checkpoint import _CheckpointFrame

    def entering(function: Any) -> Any:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with names:
                return function(*args, **kwargs)

        return run

    make = _CheckpointFrame.__init__
    patch.setattr(BackwardCFunction, "apply", entering(BackwardCFunction.apply))
    patch.setattr(
        _CheckpointFrame,
        "__init__",
        lambda self, recompute, *args: make(self, entering(recompute), *args),
    )


def _have_autocast_follow(patch: pytest.MonkeyPatch) -> None:
    """Autocast on ``mps`` is the CPU's, whose tensors these are."""
    autocast = torch.amp.autocast_mode.autocast
    enter = autocast.__init__

    def start(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        enter(self, _as_cpu(device_type), *args, **kwargs)

    patch.setattr(autocast, "__init__", start)
    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        asked = getattr(torch, name)
        patch.setattr(torch, name, lambda kind, asked=asked: asked(_as_cpu(kind)))


def _forget_devices() -> None:
    """Drop what was found out about devices and kept."""
    from diffusers.utils import torch_utils

    from dora_diffusion.numerics.fast import norms

    norms._probe_on.cache_clear()
    if hasattr(torch_utils, "TorchDeviceBackend"):  # Diffusers 0.42
        torch_utils.TorchDeviceBackend._detect_device_type.cache_clear()


@contextmanager
def apple_gpu(has_bf16: bool = True) -> Iterator[AppleGPU]:
    """Have an Apple GPU for as long as the block lasts."""
    from accelerate.state import AcceleratorState, PartialState

    gpu = AppleGPU(has_bf16)
    names = _Names(gpu)
    with pytest.MonkeyPatch.context() as patch:
        # Accelerate writes it where it finds an Apple GPU.
        patch.setenv("PYTORCH_ENABLE_MPS_FALLBACK", "0")
        patch.delenv("ACCELERATE_USE_CPU", raising=False)
        _have_torch_say_so(patch, gpu)
        _have_autocast_follow(patch)
        _have_backward_follow(patch, names)
        AcceleratorState._reset_state(reset_partial_state=True)
        _forget_devices()
        try:
            with names, _Operators(gpu, names):
                yield gpu
        finally:
            _forget_devices()
            AcceleratorState._reset_state(reset_partial_state=True)
            PartialState._reset_state()
