"""All targets by the name that users know them by."""

from __future__ import annotations

from collections.abc import Mapping

from dora_diffusion.formats.adapter.targets.encode import Layers, Target
from dora_diffusion.formats.adapter.targets.kohya import KOHYA_FILE, check_kohya, encode_kohya
from dora_diffusion.formats.adapter.targets.one_base import encode_comfyui, encode_dense
from dora_diffusion.formats.adapter.targets.peft import (
    DIFFUSERS_FILE,
    check_diffusers,
    check_peft,
    encode_diffusers,
    encode_peft,
)

TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target("diffusers", encode_diffusers, DIFFUSERS_FILE),
        Target("kohya", encode_kohya, KOHYA_FILE),
        Target("peft", encode_peft, None),
        Target("comfyui", encode_comfyui, "adapter_comfyui.safetensors"),
        Target("dense", encode_dense, "adapter_dense.safetensors"),
    )
}


def check_target(layers: Layers, target: str) -> None:
    """Refuse layers that a target cannot hold, before anything is trained or computed.

    Raises:
        AdapterFormatError: With the reason, and what to write instead.
    """
    checks = {"diffusers": check_diffusers, "peft": check_peft}
    checks.get(target, check_kohya)(layers)
