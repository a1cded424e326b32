"""What the process answers that is asked for devices."""

from __future__ import annotations

import torch

from dora_diffusion.console import probe


def test_what_torch_uses_of_the_processor() -> None:
    threads = torch.get_num_threads()
    assert probe._cpu() == (
        f"{torch.backends.cpu.get_cpu_capability()}, {threads} thread{'s' if threads > 1 else ''}"
    )


def test_the_hub_s_cache_is_where_the_hub_library_has_it() -> None:
    from huggingface_hub import constants

    assert probe._hub_cache() == constants.HF_HUB_CACHE
