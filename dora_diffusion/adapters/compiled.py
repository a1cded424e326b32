"""Regional compilation: the repeated blocks of a UNet by `torch.compile`, adapters included.

Most of a UNet is a few kinds of blocks, repeated. Compiled one kind at a time, they take seconds to
a minute where the whole UNet takes many, and what runs between them stays as it is: names of
parameters, gradient checkpointing around a block, hooks on the model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import nn

from dora_diffusion import system
from dora_diffusion.adapters.layers import AdaptedLayer
from dora_diffusion.config import ConfigError
from dora_diffusion.config.arguments import check_arguments

# By name, as Diffusers' own `_repeated_blocks` has it: importing their classes imports Diffusers.
BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D")

_REMEDIES = {
    "cpu": "install a C++ compiler and Python's headers (Debian, Ubuntu: apt install g++ "
    "python3-dev; macOS: xcode-select --install; Windows: the build tools of Visual Studio)",
    "cuda": "install Triton (pip install triton; on Windows triton-windows) and a C compiler with "
    "Python's headers; GPUs before NVIDIA's Volta cannot",
    "xpu": "install Intel's Triton (pip install pytorch-triton-xpu) and a C compiler with Python's "
    "headers",
}


def require_compiler(device: torch.device | str) -> None:
    """Compile one small function, which needs all that a large one does.

    Raises:
        ConfigError: If this machine cannot compile for the device, with what to install.
    """
    device = torch.device(device)
    # Where torch keeps it by itself, another user may have made the folder first.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(system.private_folder("compiled")))
    try:
        torch.compile(lambda x: x * 2 + 1, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        remedy = _REMEDIES.get(device.type, "this torch may not compile for it")
        raise ConfigError(
            f"compile does not work on {device.type} here: {remedy}; or leave it out (torch says: "
            f"{lines[0]})",
            "compile",
        ) from error


@check_arguments()
def compile_blocks(model: nn.Module, **options: Any) -> int:
    """Compile a UNet's transformer and residual blocks, in place, when they are first called.

    Blocks of one kind share what is compiled; sizes of images, prompts and batches that turn out to
    vary become dynamic. The state dict keeps its keys. Adapters may be attached before or after;
    open a `norm_scope`, as without compiling: otherwise each call computes dense norms.

    Args:
        model: A ``UNet2DConditionModel`` of Diffusers, or any model with such blocks.
        options: What else ``torch.compile`` takes.

    Returns:
        How many kinds of blocks there are, each of which is compiled for itself.

    Raises:
        ValueError: If the model has no such block.

    Example:
        >>> import torch
        >>> compile_blocks(torch.nn.Linear(8, 8))
        Traceback (most recent call last):
        ValueError: Linear has no block to compile: BasicTransformerBlock or ResnetBlock2D
    """
    blocks = [module for module in model.modules() if type(module).__name__ in BLOCKS]
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no block to compile: {' or '.join(BLOCKS)}")
    # It splits graphs by the buckets of gradients that are reduced together; blocks are small.
    torch._dynamo.config.optimize_ddp = False
    kinds: dict[Any, Callable[..., Any]] = {}
    for block in blocks:
        kind = _kind(block)
        if kind not in kinds:
            kinds[kind] = torch.compile(_caller(block, len(kinds)), **options)
        layers = [m for m in block.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        # What `nn.Module.compile` sets too, but for each block apart. Copies go without.
        block._compiled_call_impl = partial(_run, kinds[kind], block, layers)
    return len(kinds)


def _kind(block: nn.Module) -> tuple[Any, ...]:
    """Return the key of blocks that share compiled code: the shapes of the base weights."""
    shapes = ((name, tuple(p.shape)) for name, p in block.named_parameters())
    return type(block), *(shape for shape in shapes if ".adapters." not in shape[0])


def _caller(block: nn.Module, number: int) -> Callable[..., Any]:
    """A function that calls a block, with a code of its own.

    Torch keeps compiled graphs by code, at most 8 for one, and learns by code which sizes vary.
    SDXL has 12 kinds of residual blocks: with one code for all, the channels would vary too, and
    blocks beyond the limit would run uncompiled.
    """
    code = _call.__code__.replace(co_name=f"{type(block).__name__}_{number}")
    return FunctionType(code, _call.__globals__)


def _call(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return block._call_impl(*args, **kwargs)


def _run(
    compiled: Callable[..., Any], block: nn.Module, layers: Sequence[nn.Module], /,
    *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    """Call a block, after the factors of the scope's plan were made, which it cannot do itself.

    Not before the whole model runs: the scope of an offloaded model opens as that is called.
    """
    adapted = [layer for layer in layers if isinstance(layer, AdaptedLayer)]
    routes = [layer.route for layer in adapted if layer.route is not None]
    if any(route.is_mixed for route in routes):
        # Each mixture of adapters would be compiled for itself, and the base for each step.
        return block._call_impl(*args, **kwargs)
    for route in routes:
        route.prepare()
    return compiled(block, *args, **kwargs)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled blocks as they are: where few calls would not pay for compiling them again."""
    with torch.compiler.set_stance("force_eager"):
        yield
