"""Model offloading for models with adapters, and asynchronous copies between host and device.

Offloaded modules are in host memory and are moved to the device while they compute, as with model
offloading in Diffusers. Moving changes no values. Trained tensors stay on the device.

Modules are moved without pinned memory: their computation has to wait for the whole copy anyway,
and torch would keep the pinned memory allocated.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dora_diffusion.numerics.devices import device_name, has_own_memory
from dora_diffusion.numerics.quantised import exchange

if TYPE_CHECKING:
    from dora_diffusion.models.components import Components

HOST = torch.device("cpu")

# Context that is entered after a module has been moved to the device, and exited before it leaves.
Scope = Callable[[nn.Module], AbstractContextManager[Any]]


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor to a device, asynchronously for a GPU."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        # Copies from pageable memory are synchronous.
        tensor = tensor.pin_memory()
    # Asynchronous copies to the host could be read before they are complete.
    return tensor.to(device, non_blocking=device.type != "cpu")


def fetch(tensor: Tensor) -> Callable[[], Tensor]:
    """Start an asynchronous copy of a tensor to the host.

    Returns:
        Function that waits for the copy and returns it. One step later, the copy is complete. A
        copy that is started later would wait for all operations of the step in between.
    """
    if tensor.device.type != "cuda":
        return lambda: tensor
    copy = tensor.to("cpu", non_blocking=True)
    arrived = torch.cuda.current_stream(tensor.device).record_event()

    def read() -> Tensor:
        arrived.synchronize()
        return copy

    return read


def place_model(components: Components, device: torch.device | str, offload: str) -> Components:
    """Move a model from the host to a device, or prepare it for offloading.

    Args:
        components: The model, on the host.
        device: Compute device.
        offload: ``"none"`` moves all modules to the device. ``"model"`` keeps them on the host
            until they compute, if the device has its own memory; ``"auto"`` does the same without
            a warning.

    Returns:
        The model, with ``offload_to`` set if it is offloaded.

    Warns:
        UserWarning: If ``"model"`` has no effect.
    """
    device = torch.device(device)
    if offload != "none" and has_own_memory(device.type):
        return dataclasses.replace(components, offload_to=device)
    if offload == "model":
        warnings.warn(
            f"offload model has no effect because {device_name(device.type)} shares the memory of "
            "the machine",
            stacklevel=3,
        )
    return components.to(device)


def computing_device(module: nn.Module) -> torch.device:
    """Return the compute device of a module, which may be offloaded at present."""
    hook = getattr(module, "_hf_hook", None)
    execution_device: torch.device | None = getattr(hook, "execution_device", None)
    return execution_device or next(module.parameters()).device


@contextmanager
def on_device(device: torch.device, *modules: nn.Module) -> Iterator[None]:
    """Move the frozen tensors of modules to a device inside the block, and back after it."""
    with _back_home(modules):
        for module in modules:
            move_frozen(module, device)
        yield


@contextmanager
def in_turns(components: Components, device: torch.device, scope: Scope) -> Iterator[None]:
    """Move each module of a model to a device when it is called, inside the block.

    The other modules are moved to the host. The denoiser stays on the device with small text
    encoders, and leaves only for the autoencoder. After the block, all modules are moved back.

    Args:
        components: The model.
        device: Compute device, also of the model's pipelines.
        scope: Context that is open while a module is on the device.
    """
    from accelerate.hooks import add_hook_to_module

    modules = list(components.modules().values())
    with ExitStack() as stack:
        stack.enter_context(_back_home(modules))
        arrival = _arrival(components, device, scope, stack)
        for module in modules:
            stack.callback(_remove_hook, module, vars(module).get("forward"))
            add_hook_to_module(module, arrival)
        yield


def _arrival(components: Components, device: torch.device, scope: Scope, stack: ExitStack) -> Any:
    """Build a hook that moves other modules to the host and a called module to the device."""
    from accelerate.hooks import ModelHook

    present: dict[nn.Module, ExitStack] = {}
    small = components.text_encoders if components.family.has_small_text_encoders else ()

    class OffloadHook(ModelHook):
        """Hook that runs before the forward pass of a module and before decoding."""

        execution_device = device  # Diffusers' pipelines create their tensors there.

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if module not in present:
                for other in components.modules().values():
                    stays = other is components.denoiser and module in small
                    if other is not module and not stays:
                        if other in present:
                            present.pop(other).close()
                        move_frozen(other, HOST)
                for tensor in _tensors(module):
                    _move(tensor, device)
                present[module] = stack.enter_context(ExitStack())
                present[module].enter_context(scope(module))
            return args, kwargs

    return OffloadHook()


def _remove_hook(module: nn.Module, forward: Any) -> None:
    """Remove a hook, and the ``forward`` attribute if the module did not have one before."""
    from accelerate.hooks import remove_hook_from_module

    remove_hook_from_module(module)
    if forward is None:
        del module.forward


def move_frozen(module: nn.Module, device: torch.device) -> None:
    """Move the frozen tensors of a module to a device."""
    for tensor in _tensors(module):
        if not tensor.requires_grad:
            _move(tensor, device)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


@contextmanager
def _back_home(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Move all tensors of modules back to their devices after the block."""
    homes = [(tensor, tensor.device) for module in modules for tensor in _tensors(module)]
    try:
        yield
    finally:
        for tensor, device in homes:
            _move(tensor, device)


def _move(tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        # The parameter object stays the same, since optimizers, adapters and hooks refer to it.
        exchange(tensor, tensor.data.to(device))
