"""The schedulers that images can be sampled with, by the names that users choose."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple


class SamplingScheduler(NamedTuple):
    """A scheduler of Diffusers.

    Attributes:
        class_name: Its class.
        a1111: What A1111 calls it in the text of its images.
        settings: What makes the class this scheduler.
        schedule: What A1111 calls its noise levels ("Schedule type").
    """

    class_name: str
    a1111: str
    settings: Mapping[str, Any] = {}
    schedule: str = "Automatic"

    @property
    def title(self) -> str:
        """The name that users of A1111 know: ``DPM++ 2M Karras``."""
        usual = self.schedule in ("Automatic", "Uniform")
        return self.a1111 if usual else f"{self.a1111} {self.schedule}"


_DPM = {"algorithm_type": "dpmsolver++"}
_SDE = {"algorithm_type": "sde-dpmsolver++"}
_KARRAS = {"use_karras_sigmas": True}
_TRAILING = {"timestep_spacing": "trailing"}

SCHEDULERS: Mapping[str, SamplingScheduler] = {
    "ddim": SamplingScheduler("DDIMScheduler", "DDIM"),
    "ddpm": SamplingScheduler("DDPMScheduler", "DDPM"),
    "pndm": SamplingScheduler("PNDMScheduler", "PLMS", {"skip_prk_steps": True}),
    "heun": SamplingScheduler("HeunDiscreteScheduler", "Heun"),
    "euler": SamplingScheduler("EulerDiscreteScheduler", "Euler"),
    "euler_karras": SamplingScheduler("EulerDiscreteScheduler", "Euler", _KARRAS, "Karras"),
    "euler_trailing": SamplingScheduler(
        "EulerDiscreteScheduler", "Euler", _TRAILING, "SGM Uniform"
    ),
    "euler_a": SamplingScheduler("EulerAncestralDiscreteScheduler", "Euler a"),
    "euler_a_trailing": SamplingScheduler(
        "EulerAncestralDiscreteScheduler", "Euler a", _TRAILING, "SGM Uniform"
    ),
    "dpm++": SamplingScheduler("DPMSolverMultistepScheduler", "DPM++ 2M", _DPM, "Uniform"),
    "dpm++_karras": SamplingScheduler(
        "DPMSolverMultistepScheduler", "DPM++ 2M", _DPM | _KARRAS, "Karras"
    ),
    "dpm++_sde": SamplingScheduler("DPMSolverMultistepScheduler", "DPM++ 2M SDE", _SDE, "Uniform"),
    "dpm++_sde_karras": SamplingScheduler(
        "DPMSolverMultistepScheduler", "DPM++ 2M SDE", _SDE | _KARRAS, "Karras"
    ),
    "lcm": SamplingScheduler("LCMScheduler", "LCM"),
    "unipc": SamplingScheduler("UniPCMultistepScheduler", "UniPC"),
}


def scheduler_of(sampler: str, schedule: str | None = None) -> str | None:
    """Return our name of a sampler of A1111; None if it is none of ours.

    Args:
        sampler: Its name; until A1111 1.8 with the noise levels behind it, ``DPM++ 2M Karras``.
        schedule: The "Schedule type" of its noise levels.
    """
    if sampler.endswith(" Karras"):
        sampler, schedule = sampler.removesuffix(" Karras"), "Karras"
    own = {each.schedule: name for name, each in SCHEDULERS.items() if each.a1111 == sampler}
    alike: Mapping[str | None, tuple[str, ...]] = {
        None: ("Automatic", "Uniform"),
        # What it chooses itself; with SDE exponential levels, which are not here.
        "Automatic": ("Automatic", "" if sampler.endswith("SDE") else "Karras"),
        "Uniform": ("Uniform", "Automatic"),
        "Normal": ("Uniform", "Automatic"),
    }
    levels_of = alike.get(schedule, (str(schedule),))
    return next((own[levels] for levels in levels_of if levels in own), None)


A1111_NAMES: Mapping[str, str] = {
    text.lower(): name
    for name, each in reversed([*SCHEDULERS.items()])
    for text in (each.a1111, f"{each.a1111} {each.schedule}")
}
"""A1111's names of samplers, with their noise levels or without, in lower case -> ours."""

# Those of Diffusers that know a noise schedule whose last timestep is pure noise. Where sigma would
# be infinite there, they take a finite one.
_TO_ZERO_SNR = (
    "DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "LCMScheduler", "TCDScheduler",
    "UniPCMultistepScheduler",
)  # fmt: skip


def to_zero_snr(config: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's settings that sample from pure noise on (arXiv:2305.08891, section 3.3).

    The first timestep is the schedule's last, and a class that would ignore such a schedule becomes
    DDIM.
    """
    is_able = config.get("_class_name") in _TO_ZERO_SNR
    others = {} if is_able else {"_class_name": "DDIMScheduler"}
    return {**config, "timestep_spacing": "trailing", **others}


class FewSteps(NamedTuple):
    """Settings of sampling for a model, or with an adapter, that was distilled to few steps.

    Attributes:
        kind: What shows it.
        steps: Denoising steps.
        guidance_scale: 1 is none, where guidance was distilled away.
        scheduler: A name of `SCHEDULERS`; None is the model's own.
    """

    kind: str
    steps: int = 4
    guidance_scale: float = 1.0
    scheduler: str | None = None


# What the names of released files and folders begin with.
_RELEASED: Mapping[str, FewSteps] = {
    r"lcm[-_]lora": FewSteps("LCM", scheduler="lcm"),
    r"sdxl[-_]turbo|sd_xl_turbo": FewSteps("Turbo", scheduler="euler_a_trailing"),
    r"sd[-_]turbo": FewSteps("Turbo", scheduler="euler_trailing"),
    r"sdxl[-_]lightning[-_]([248])step": FewSteps("Lightning", scheduler="euler_trailing"),
}


def few_steps_of_name(name: str) -> FewSteps | None:
    """The settings that a model or adapter was released for, by its name; None of any other."""
    for pattern, few in _RELEASED.items():
        if match := re.match(pattern, name, re.IGNORECASE):
            return few._replace(steps=int(match[1])) if match.groups() else few
    return None


def few_steps_of_model(config: Mapping[str, Any], *, guidance_is_input: bool) -> FewSteps | None:
    """The settings that a model's configuration shows it to be distilled for; None of any other.

    Args:
        config: Its scheduler's, with ``_class_name``.
        guidance_is_input: Whether the UNet has a ``time_cond_proj_dim``: the guidance scale is one
            of its inputs, 8 as released (arXiv:2310.04378), and costs no second pass.
    """
    name = config.get("_class_name")
    if guidance_is_input:
        return FewSteps("LCM", 4, 8.0, None if name == "LCMScheduler" else "lcm")
    if name == "LCMScheduler":
        return FewSteps("LCM")
    is_euler = name in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
    # Of a schedule that ends in pure noise, trailing timesteps say nothing else.
    is_zero_snr = config.get("rescale_betas_zero_snr")
    if is_euler and config.get("timestep_spacing") == "trailing" and not is_zero_snr:
        return FewSteps("trailing timesteps, as Turbo models have")
    return None
