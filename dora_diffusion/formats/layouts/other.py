"""Files without a known layout."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from dora_diffusion.formats.layouts.dotted import is_old_form, mixes_forms
from dora_diffusion.formats.layouts.layout import AdapterLayout, Layers, some_layers


class Other(AdapterLayout):
    """Files with keys of no known program, or of several programs."""

    def judge(self, layers: Layers, norm_axis: str, keys: Collection[str]) -> dict[str, str]:
        tools = super().judge(layers, norm_axis, keys)
        if left_out := _left_out_by_diffusers(keys):
            tools["diffusers"] = f"wrong: it leaves {some_layers(left_out)} unchanged"
        return tools

    def advice(self, norm_axis: str, keys: Collection[str]) -> list[str]:
        notes = super().advice(norm_axis, keys)
        if left_out := _left_out_by_diffusers(keys):
            notes.insert(
                0,
                f"it mixes two ways to name the factors: diffusers leaves {some_layers(left_out)} "
                "unchanged without a message",
            )
        return notes


OTHER = Other()


def _left_out_by_diffusers(keys: Iterable[str]) -> list[str]:
    """Return the UNet layers that Diffusers silently ignores in a file with mixed names.

    Diffusers renames UNet keys only if the first key in alphabetical order is not PEFT's.
    """
    unet = sorted(key.removeprefix("unet.") for key in keys if key.startswith("unet."))
    if not unet or "lora_A" not in unet[0] or not mixes_forms(unet):
        return []
    old = [key.replace(".processor.", ".") for key in unet if is_old_form(key)]
    return sorted({re.sub(r"[._]lora(_linear_layer)?\.(down|up)\.weight$", "", k) for k in old})
