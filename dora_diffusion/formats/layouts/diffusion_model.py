"""Key format of transformers in ComfyUI, ai-toolkit and others, with Diffusers' or original names.

``diffusion_model.<module>.lora_down.weight`` with ``alpha`` and ``dora_scale``, or
``diffusion_model.<module>.lora_A.weight``.
"""

from __future__ import annotations

from collections.abc import Collection

from dora_diffusion.formats.layouts import VERDICTS
from dora_diffusion.formats.layouts.dotted import DIFFUSERS, PEFT_FORMS
from dora_diffusion.formats.layouts.kohya import Kohya, with_original_names
from dora_diffusion.formats.layouts.layout import Key, Layers
from dora_diffusion.formats.names.kohya import Resolve
from dora_diffusion.formats.names.modules import NAMES, comfyui_name, comfyui_reads

_FORMS = (*NAMES["kohya_forms"], *PEFT_FORMS)


class DiffusionModel(Kohya):
    """Layout ``diffusion_model.layers.0.attention.to_q.lora_down.weight``."""

    name = key_format = "diffusion_model"
    file_name = "adapter_diffusion_model.safetensors"

    def parse(self, key: str) -> Key | None:
        return DIFFUSERS.parse(key)

    def owns(self, key: Key) -> bool:
        prefix, _, path = key.path.partition(".")
        if prefix == "transformer":  # Diffusers' names with kohya's: parts of a joined matrix.
            is_known = any(comfyui_name(path, code) == key.path for code in NAMES["transformers"])
            return is_known and key.form in NAMES["kohya_forms"]
        is_known = any(comfyui_reads(key.path, code) for code in NAMES["transformers"])
        return is_known and key.form in _FORMS

    def module(self, key: Key, resolve: Resolve, component: str | None) -> str | None:
        return DIFFUSERS.module(key, resolve, component)

    def judge(self, layers: Layers, norm_axis: str, keys: Collection[str]) -> dict[str, str]:
        kind = f"DoRA, {norm_axis} axis" if norm_axis else "LoRA"
        tools = dict(VERDICTS.get(f"{self.name} {kind}", {}))
        return with_original_names(tools, keys) if tools else {}


DIFFUSION_MODEL = DiffusionModel()
