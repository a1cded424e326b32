"""Few-step models: what shows them, and what does not; trailing timesteps."""

from __future__ import annotations

from typing import Any

import pytest

from dora_diffusion.config.schedulers import (
    SCHEDULERS,
    few_steps_of_model,
    few_steps_of_name,
)

RELEASED: dict[str, tuple[int, str]] = {
    "lcm-lora-sdv1-5": (4, "lcm"),
    "lcm-lora-sdxl": (4, "lcm"),
    "LCM_LoRA_SDXL_fp16": (4, "lcm"),
    "sdxl-turbo": (4, "euler_a_trailing"),
    "sd_xl_turbo_1.0_fp16": (4, "euler_a_trailing"),
    "sd-turbo": (4, "euler_trailing"),
    "sd_turbo": (4, "euler_trailing"),
    "sdxl_lightning_2step_lora": (2, "euler_trailing"),
    "sdxl_lightning_4step": (4, "euler_trailing"),
    "sdxl_lightning_8step_unet": (8, "euler_trailing"),
}
OTHERS = (
    "", "lcm", "lightning", "lightning_mcqueen", "my-lcm-lora", "turbo", "dog-turbo", "sks",
    "sdxl_lightning", "sdxl_lightning_16step", "sd_xl_base_1.0", "stable-diffusion-xl-base-1.0",
    "Z-Image-Turbo",  # By its family.
    "sdxl_lightning_1step_x0",  # It predicts the image, which is not supported.
)  # fmt: skip


@pytest.mark.parametrize("name", [*RELEASED, *OTHERS])
def test_released_names_are_known_and_others_are_not(name: str) -> None:
    few = few_steps_of_name(name)
    assert (few and (few.steps, few.scheduler)) == RELEASED.get(name)
    # The released ones are for no guidance, of which 0 has another meaning in web UIs.
    assert few is None or few.guidance_scale == 1


def trailing(name: str, **more: Any) -> dict[str, Any]:
    return {"_class_name": name, "timestep_spacing": "trailing", **more}


@pytest.mark.parametrize(
    ("config", "is_input", "expected"),
    [
        (trailing("EulerDiscreteScheduler"), False, (4, 1, None)),
        (trailing("EulerAncestralDiscreteScheduler"), False, (4, 1, None)),
        ({"_class_name": "LCMScheduler"}, False, (4, 1, None)),
        ({"_class_name": "LCMScheduler"}, True, (4, 8, None)),
        ({"_class_name": "PNDMScheduler"}, True, (4, 8, "lcm")),
        # Nothing of it follows from these.
        (trailing("EulerDiscreteScheduler", rescale_betas_zero_snr=True), False, None),
        (trailing("DDIMScheduler"), False, None),
        (trailing("EulerDiscreteScheduler", timestep_spacing="leading"), False, None),
        ({"_class_name": "EulerDiscreteScheduler"}, False, None),
        ({}, False, None),
    ],
    ids=str,
)
def test_configurations_of_few_steps_are_known(
    config: dict[str, Any], is_input: bool, expected: tuple[Any, ...] | None
) -> None:
    few = few_steps_of_model(config, guidance_is_input=is_input)
    assert (few and (few.steps, few.guidance_scale, few.scheduler)) == expected
    assert few is None or few.scheduler in (None, *SCHEDULERS)
