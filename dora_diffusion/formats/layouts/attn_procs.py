"""Attention processors of the diffusers of early 2023, without their component."""

from __future__ import annotations

import re

from dora_diffusion.formats.layouts.compatibility import NOT_CHECKED, NOT_FOR_IT, table
from dora_diffusion.formats.layouts.diffusers import PROCESSOR_FORMS, Dotted
from dora_diffusion.formats.layouts.layout import AdapterLayout, Key

_PATH = re.compile(r"(?:mid_block|(?:down|up)_blocks)\b.*\.attn[12]\.processor\.to_(?:q|k|v|out)")


class AttnProcs(Dotted):
    """``down_blocks...attn1.processor.to_q_lora.down.weight``."""

    name = key_format = "attn_procs"
    verdicts = table(
        {
            "attn_procs LoRA": (
                "exact if told so: with pipeline.unet.load_lora_adapter(FILE, prefix=None); "
                "load_lora_weights leaves all of it out",
                NOT_FOR_IT,
                NOT_CHECKED,
            )
        }
    )
    advice = AdapterLayout.advice

    def owns(self, key: Key) -> bool:
        return key.form in PROCESSOR_FORMS and _PATH.fullmatch(key.path) is not None


ATTN_PROCS = AttnProcs()
