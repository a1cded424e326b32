"""Key format of transformers in ComfyUI, ai-toolkit and others, with Diffusers' or original names.

``diffusion_model.<module>.lora_down.weight`` with ``alpha`` and ``dora_scale``, or
``diffusion_model.<module>.lora_A.weight``.
"""

from __future__ import annotations

from collections.abc import Collection

from dora_diffusion.config.families import denoiser_family
from dora_diffusion.config.wording import listing
from dora_diffusion.formats.layouts import VERDICTS
from dora_diffusion.formats.layouts.dotted import DIFFUSERS, PEFT_FORMS
from dora_diffusion.formats.layouts.kohya import Kohya
from dora_diffusion.formats.layouts.layout import AdapterFormatError, Key, Layers
from dora_diffusion.formats.names.kohya import TRANSFORMER_PREFIX, Resolve
from dora_diffusion.formats.names.modules import NAMES, transformer_paths

_FORMS = (*NAMES["kohya_forms"], *PEFT_FORMS)


class DiffusionModel(Kohya):
    """Layout ``diffusion_model.layers.0.attention.to_q.lora_down.weight``."""

    name = key_format = "diffusion_model"
    file_name = "adapter_diffusion_model.safetensors"

    def parse(self, key: str) -> Key | None:
        return DIFFUSERS.parse(key)

    def owns(self, key: Key) -> bool:
        path = key.path.removeprefix(TRANSFORMER_PREFIX)
        return path != key.path and path in transformer_paths() and key.form in _FORMS

    def module(self, key: Key, resolve: Resolve, component: str | None) -> str | None:
        return DIFFUSERS.module(key, resolve, component)

    def check(self, layers: Layers) -> None:
        super().check(layers)
        paths = transformer_paths(denoiser_family(layers))
        if unnamed := [name for name in layers if name.partition(".")[2] not in paths]:
            raise AdapterFormatError(
                f"the {self.name} format has no name for {listing(unnamed, 3)}; write diffusers or "
                "peft, with magnitudes on the output axis"
            )

    def judge(self, layers: Layers, norm_axis: str, keys: Collection[str]) -> dict[str, str]:
        kind = f"DoRA, {norm_axis} axis" if norm_axis else "LoRA"
        return dict(VERDICTS.get(f"{self.name} {kind}", {}))


DIFFUSION_MODEL = DiffusionModel()
