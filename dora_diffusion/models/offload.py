"""Modules and tensors between the host's memory and the device: what waits for which.

Modules may lie in the host's memory, and be on the device while they compute.

This is what Diffusers calls model offloading, for models with adapters. Only where a tensor lies
changes, never a bit of it. Tensors that train stay where the optimizer has them.

Modules are moved without pinning their memory: what they compute waits for all of it anyway, and
torch would keep as much of the host's memory locked for good.
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

# Enters as a module arrives on the device, and exits before it leaves.
Scope = Callable[[nn.Module], AbstractContextManager[Any]]


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. A GPU fetches it while the program continues."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        # From memory that may be swapped out, a copy is waited for.
        tensor = tensor.pin_memory()
    # Towards the host, a copy that is not waited for is read before it is there.
    return tensor.to(device, non_blocking=device.type != "cpu")


def fetch(tensor: Tensor) -> Callable[[], Tensor]:
    """Start to copy a tensor to the host. What is returned waits for that copy, and gives it.

    Read a step later, it waits for nothing; a copy that is only started then comes after all work
    of the step in between.
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
    """Move a model that was loaded on the host to where it will be.

    Args:
        components: The model.
        device: What computes.
        offload: ``"none"`` moves every module there. ``"model"`` leaves them on the host until they
            compute, where the device has memory of its own; ``"auto"`` is the same, silently.

    Returns:
        The model; its ``offload_to`` says whether it is offloaded.

    Warns:
        UserWarning: If ``"model"`` has no effect.
    """
    device = torch.device(device)
    if offload != "none" and has_own_memory(device.type):
        return dataclasses.replace(components, offload_to=device)
    if offload == "model":
        warnings.warn(
            f"offload model has no effect because {device_name(device.type)} has no memory of its "
            "own, apart from the machine's",
            stacklevel=3,
        )
    return components.to(device)


def computing_device(module: nn.Module) -> torch.device:
    """Return the device of a module's inputs: its own, or that it is brought to when called."""
    hook = getattr(module, "_hf_hook", None)
    brought_to: torch.device | None = getattr(hook, "execution_device", None)
    return brought_to or next(module.parameters()).device


@contextmanager
def on_device(device: torch.device, *modules: nn.Module) -> Iterator[None]:
    """Move the frozen part of modules to a device inside the block, and back after it."""
    with _back_home(modules):
        for module in modules:
            move_frozen(module, device)
        yield


@contextmanager
def in_turns(components: Components, device: torch.device, scope: Scope) -> Iterator[None]:
    """Move each module of a model to a device when it is called, inside the block.

    It sends the others to the host, but for the UNet, which only leaves for the autoencoder: text
    encoders are small beside it. After the block, all are where they were.

    Args:
        components: The model; its pipelines compute on ``device``.
        device: Where to compute.
        scope: Is open around a module for as long as it stays.
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
    """A hook that makes room for a module that is called, and brings it."""
    from accelerate.hooks import ModelHook

    present: dict[nn.Module, ExitStack] = {}

    class OffloadHook(ModelHook):
        """Hook before a module's forward, and before an autoencoder decodes."""

        execution_device = device  # Diffusers' pipelines make their tensors there.

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if module not in present:
                for other in components.modules().values():
                    stays = other is components.unet and module in components.text_encoders
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
    """Remove a hook, and leave no forward behind but that which the module itself had."""
    from accelerate.hooks import remove_hook_from_module

    remove_hook_from_module(module)
    if forward is None:
        del module.forward


def move_frozen(module: nn.Module, device: torch.device) -> None:
    """Move a module's tensors to a device, but for those that train."""
    for tensor in _tensors(module):
        if not tensor.requires_grad:
            _move(tensor, device)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


@contextmanager
def _back_home(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Put all tensors of modules where they were, at the end."""
    homes = [(tensor, tensor.device) for module in modules for tensor in _tensors(module)]
    try:
        yield
    finally:
        for tensor, device in homes:
            _move(tensor, device)


def _move(tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        # The same parameter: optimizers, adapters and hooks keep hold of it.
        exchange(tensor, tensor.data.to(device))
