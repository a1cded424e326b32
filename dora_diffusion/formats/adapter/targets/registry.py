"""All targets by the name that users know them by."""

from __future__ import annotations

from collections.abc import Mapping

from dora_diffusion.formats.adapter.targets.encode import Target
from dora_diffusion.formats.adapter.targets.kohya import KOHYA_FILE, encode_kohya
from dora_diffusion.formats.adapter.targets.one_base import encode_comfyui, encode_dense
from dora_diffusion.formats.adapter.targets.peft import (
    DIFFUSERS_FILE,
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
