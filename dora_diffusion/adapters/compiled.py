"""Regional compilation of a denoiser: its repeated blocks by `torch.compile`, adapters included.

Most of a denoiser consists of a few kinds of blocks, repeated. Compiling one kind at a time takes
seconds to a minute; compiling the whole model takes many minutes. The code between the blocks is
unchanged: names of parameters, gradient checkpointing around a block, hooks on the model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import nn

from dora_diffusion import system
from dora_diffusion.adapters.layers import AdaptedLayer
from dora_diffusion.config import ConfigError

_REMEDIES = {
    "cpu": "install a C++ compiler and Python's headers (Debian, Ubuntu: apt install g++ "
    "python3-dev; macOS: xcode-select --install; Windows: the build tools of Visual Studio)",
    "cuda": "install Triton (pip install triton; on Windows triton-windows) and a C compiler with "
    "Python's headers; GPUs before NVIDIA's Volta cannot",
    "xpu": "install Intel's Triton (pip install pytorch-triton-xpu) and a C compiler with Python's "
    "headers",
}


def require_compiler(device: torch.device | str) -> None:
    """Check that ``torch.compile`` works for a device, by compiling one small function.

    Raises:
        ConfigError: If this machine cannot compile for the device; names the packages to install.
    """
    device = torch.device(device)
    # Another user of this machine may own torch's default cache folder.
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


def compile_blocks(model: nn.Module, **options: Any) -> int:
    """Compile a denoiser's blocks, in place, when they are first called.

    These are the innermost blocks that Diffusers' class of the model names (``_repeated_blocks``,
    ``_no_split_modules``): transformer blocks, and residual blocks of a UNet.

    Blocks of one kind share compiled code. Sizes of images, prompts and batches become dynamic when
    they vary between calls. The keys of the state dict do not change. Adapters may be attached
    before or after. Open a `norm_scope`, as without compiling: otherwise each call computes dense
    norms. For calls too few to be worth recompiling, ``torch.compiler.set_stance("force_eager")``
    runs the blocks uncompiled.

    Args:
        model: A denoiser of Diffusers, or any model with one of these attributes.
        options: Further arguments of ``torch.compile``.

    Returns:
        The number of kinds of blocks. Each kind is compiled separately.

    Raises:
        ValueError: If the model names no block that it has.

    Example:
        >>> import torch
        >>> compile_blocks(torch.nn.Linear(8, 8))
        Traceback (most recent call last):
        ValueError: Linear names no blocks to compile in _repeated_blocks or _no_split_modules
    """
    attributes = ("_repeated_blocks", "_no_split_modules")
    names = {name for attribute in attributes for name in getattr(model, attribute, None) or ()}
    named = {module: None for module in model.modules() if type(module).__name__ in names}
    blocks = [block for block in named if named.keys().isdisjoint([*block.modules()][1:])]
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} names no blocks to compile in {' or '.join(attributes)}"
        )
    # DDPOptimizer would split graphs by gradient buckets, but blocks are small already.
    torch._dynamo.config.optimize_ddp = False
    kinds: dict[Any, Callable[..., Any]] = {}
    for block in blocks:
        kind = _kind(block)
        if kind not in kinds:
            # Torch caches compiled graphs per code object, at most 8 each, and also marks dynamic
            # sizes per code object. SDXL has 12 kinds of residual blocks: with one code object for
            # all, channels would become dynamic, and blocks beyond the limit would run uncompiled.
            code = _call.__code__.replace(co_name=f"{type(block).__name__}_{len(kinds)}")
            kinds[kind] = torch.compile(FunctionType(code, _call.__globals__), **options)
        layers = [m for m in block.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        # `nn.Module.compile` sets this too, but compiles each block. Copies of a block lose it.
        block._compiled_call_impl = partial(_run, kinds[kind], block, layers)
    return len(kinds)


def _kind(block: nn.Module) -> tuple[Any, ...]:
    """Return the key of blocks that share compiled code: the shapes of the base weights."""
    shapes = ((name, tuple(p.shape)) for name, p in block.named_parameters())
    return type(block), *(shape for shape in shapes if ".adapters." not in shape[0])


def _call(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return block._call_impl(*args, **kwargs)


def _run(
    compiled: Callable[..., Any], block: nn.Module, layers: Sequence[nn.Module], /,
    *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    """Compute the factors of the open scope, which a compiled block cannot do, and call the block.

    The scope of an offloaded model opens only when the model is called, so this cannot be done
    before.
    """
    adapted = [layer for layer in layers if isinstance(layer, AdaptedLayer)]
    routes = [layer.route for layer in adapted if layer.route is not None]
    if any(route.is_mixed for route in routes):
        # Each mixture of adapters would be compiled separately, and the base at each step.
        return block._call_impl(*args, **kwargs)
    for route in routes:
        route.prepare()
    return compiled(block, *args, **kwargs)
