"""A process that imports packages and looks for devices: either may end it, or never end.

``python -m dora_diffusion.console.probe torch diffusers:UNet2DConditionModel @devices`` prints a
line of JSON for each. Without heavy imports of its own.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from typing import Any

from dora_diffusion import devices


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


def _cpu() -> str:
    """What torch uses of the processor."""
    import torch

    threads = torch.get_num_threads()
    return f"{torch.backends.cpu.get_cpu_capability()}, {threads} thread{'s' * (threads > 1)}"


_QUESTIONS = {
    "@hub_cache": _hub_cache,
    "@build": devices.built_for,
    "@cpu": _cpu,
    "@devices": devices.describe_accelerators,
}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
