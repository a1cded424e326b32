"""Which layers' inputs can be recomputed from a tensor kept anyway, noted as they pass."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dora_diffusion.numerics import fast
from dora_diffusion.numerics.fast import Recomputation, Source

_NOTED = "_dora_source"

# Exactly these classes: a subclass may compute something else.
_WATCHED = (nn.SiLU, nn.LayerNorm, nn.GroupNorm)


def watch_sources(model: nn.Module) -> None:
    """Have norms and activations note on their output what it can be recomputed from."""
    if not fast.ENABLED:
        return
    for module in model.modules():
        if type(module) in _WATCHED and _note not in module._forward_hooks.values():
            # Before hooks that change what the module has made.
            module.register_forward_hook(_note, prepend=True)


def unwatch_sources(model: nn.Module) -> None:
    """Undo `watch_sources`."""
    for module in model.modules():
        for key in [key for key, hook in module._forward_hooks.items() if hook is _note]:
            del module._forward_hooks[key]


def noted_source(x: Tensor) -> Source | None:
    """What `watch_sources` had noted on a tensor, unless it was written to since."""
    source, version = getattr(x, _NOTED, (None, 0))
    return source if source is not None and x._version == version else None


def _note(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    # What needs no gradient was not kept.
    if len(args) != 1 or not args[0].requires_grad or not _can_repeat(module):
        return
    device = output.device.type
    dtype, on = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    recomputation = Recomputation(partial(_recompute, module, device, dtype, on))
    setattr(output, _NOTED, (Source(args[0].detach(), recomputation), output._version))


def _can_repeat(module: nn.Module) -> bool:
    """Whether the module's own forward gives the same in the backward pass."""
    # A parameter that trains may have another value then.
    trains = any(p is not None and p.requires_grad for p in module._parameters.values())
    # Tools that hook a model wrap the forward of an instance.
    return not (trains or getattr(module, "inplace", False) or "forward" in module.__dict__)


def _recompute(
    module: nn.Module, device: str, dtype: torch.dtype, autocast: bool, kept: Tensor
) -> Tensor:
    """What a module made, under the autocast of then: CUDA's runs norms in float32."""
    with torch.autocast(device, dtype, enabled=autocast):
        made: Tensor = type(module).forward(module, kept)
    return made
