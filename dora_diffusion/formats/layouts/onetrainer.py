"""OneTrainer's OMI, COMFY and ORIGINAL files: the original blocks, with dots.

Its older files are kohya's. No other program is known to compute these as they are meant.
"""

from __future__ import annotations

from dora_diffusion.formats.layouts.diffusers import PEFT_FORMS, Dotted
from dora_diffusion.formats.layouts.layout import AdapterLayout, Key
from dora_diffusion.formats.names.kohya import is_sgm_path
from dora_diffusion.formats.names.modules import split_prefix

_ENCODERS = ("clip_l.", "clip_g.", "text_encoders.clip_l.", "text_encoders.clip_g.")
_FORMS = (*PEFT_FORMS, ".lora_down.weight", ".lora_up.weight", ".alpha", ".dora_scale")


class OneTrainer(Dotted):
    """``clip_l.<module>.lora_down.weight``, ``unet.input_blocks.1.0....lora_down.weight``."""

    name = "onetrainer"
    advice = AdapterLayout.advice

    def owns(self, key: Key) -> bool:
        is_its = key.path.startswith(_ENCODERS) or is_sgm_path(split_prefix(key.path)[1])
        return is_its and key.form in _FORMS


ONETRAINER = OneTrainer()
