"""A process that imports packages and looks for devices: either may end it, or never end.

``python -m dora_diffusion.console.probe torch diffusers:UNet2DConditionModel @devices`` prints a
line of JSON for each. Without heavy imports of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from importlib import import_module
from typing import Any


def main(names: list[str]) -> int:
    """Answer each name by ``[problem, answer]``; the problem is empty where there is none."""
    # What libraries print while they are imported goes elsewhere.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        for name in names:
            print(json.dumps(_answer(name)), file=answers, flush=True)
    return 0


def _answer(name: str) -> tuple[str, Any]:
    try:
        if name.startswith("@"):
            return "", _QUESTIONS[name]()
        module, _, attribute = name.partition(":")
        imported = import_module(module)
        if attribute:
            getattr(imported, attribute)
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}", None
    return "", None


def _hub_cache() -> str:
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)


def _build() -> str:
    """What torch was built for."""
    import torch

    for name, attribute in (("ROCm", "hip"), ("CUDA", "cuda"), ("XPU", "xpu")):
        if number := getattr(torch.version, attribute, None):
            return f"{name} {number}"
    return "Apple's GPUs" if torch.backends.mps.is_built() else "the CPU"


def _cpu() -> str:
    """What torch uses of the processor."""
    import torch

    threads = torch.get_num_threads()
    return f"{torch.backends.cpu.get_cpu_capability()}, {threads} thread{'s' * (threads > 1)}"


def _devices() -> list[str]:
    """The accelerators that torch can use, each in a line."""
    import torch

    lines = []
    for kind in ("cuda", "xpu"):  # "cuda" are AMD's too
        module = getattr(torch, kind, None)
        if module is not None and module.is_available():
            count = module.device_count()
            lines += [f"{kind}:{index} {_device(module, index)}" for index in range(count)]
    if torch.backends.mps.is_available():
        gib = torch.mps.recommended_max_memory() / 2**30
        lines.append(f"mps Apple GPU, at most {gib:.1f} GiB of the machine's memory")
    return lines


def _device(module: Any, index: int) -> str:
    """Name and memory of a device; what a version of torch, or a driver, does not say is left."""
    properties = module.get_device_properties(index)
    parts = [str(properties.name), f"{properties.total_memory / 2**30:.1f} GiB"]
    with contextlib.suppress(Exception):
        parts.append(f"{module.mem_get_info(index)[0] / 2**30:.1f} GiB free")
    with contextlib.suppress(Exception):
        parts.append("compute capability {}.{}".format(*module.get_device_capability(index)))
    return ", ".join(parts)


_QUESTIONS = {"@hub_cache": _hub_cache, "@build": _build, "@cpu": _cpu, "@devices": _devices}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
