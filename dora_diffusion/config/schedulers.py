"""Schedulers for sampling, by the names that users choose."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, NamedTuple


class SamplingScheduler(NamedTuple):
    """Scheduler of Diffusers with its settings.

    Attributes:
        class_name: Name of the class in Diffusers.
        a1111: Name of the sampler in A1111's image parameters.
        settings: Configuration of the class.
        schedule: Name of the noise levels in A1111 ("Schedule type").
    """

    class_name: str
    a1111: str
    settings: Mapping[str, Any] = {}
    schedule: str = "Automatic"

    @property
    def title(self) -> str:
        """Name of sampler and schedule type in A1111: ``DPM++ 2M Karras``."""
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
    """Return the name in `SCHEDULERS` for a sampler of A1111; None if it is not supported.

    Args:
        sampler: Name of the sampler. Up to A1111 1.8 it includes the schedule type, as in
            ``DPM++ 2M Karras``.
        schedule: Schedule type.
    """
    if sampler.endswith(" Karras"):
        sampler, schedule = sampler.removesuffix(" Karras"), "Karras"
    by_schedule = {s.schedule: name for name, s in SCHEDULERS.items() if s.a1111 == sampler}
    alike: Mapping[str | None, tuple[str, ...]] = {
        None: ("Automatic", "Uniform"),
        # Chosen by A1111. For SDE it is "Exponential", which is not supported.
        "Automatic": ("Automatic", "" if sampler.endswith("SDE") else "Karras"),
        "Uniform": ("Uniform", "Automatic"),
        "Normal": ("Uniform", "Automatic"),
    }
    levels_of = alike.get(schedule, (str(schedule),))
    return next((by_schedule[levels] for levels in levels_of if levels in by_schedule), None)


A1111_NAMES: Mapping[str, str] = {
    text.lower(): name
    for name, scheduler in reversed([*SCHEDULERS.items()])
    for text in (scheduler.a1111, f"{scheduler.a1111} {scheduler.schedule}")
}
"""A1111's name in lower case, with or without schedule type -> name in `SCHEDULERS`."""

# Classes of Diffusers that support a noise schedule with pure noise at the last timestep. They
# replace an infinite sigma by a finite one.
_TO_ZERO_SNR = (
    "DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "LCMScheduler", "TCDScheduler",
    "UniPCMultistepScheduler",
)  # fmt: skip


def to_zero_snr(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return scheduler settings for sampling from pure noise (arXiv:2305.08891, section 3.3).

    Sampling starts at the last timestep of the schedule. A class that does not support such a
    schedule is replaced by DDIM.
    """
    is_able = config.get("_class_name") in _TO_ZERO_SNR
    changes = {} if is_able else {"_class_name": "DDIMScheduler"}
    return {**config, "timestep_spacing": "trailing", **changes}


class FewSteps(NamedTuple):
    """Sampling settings for a model or adapter that was distilled to few steps.

    Attributes:
        kind: Kind of distillation.
        steps: Number of denoising steps.
        guidance_scale: Guidance scale. 1: no guidance, as it was distilled into the model.
        scheduler: A name of `SCHEDULERS`; None: the model's scheduler.
    """

    kind: str
    steps: int = 4
    guidance_scale: float = 1.0
    scheduler: str | None = None


# Patterns at the beginning of the names of released files and folders.
_RELEASED: Mapping[str, FewSteps] = {
    r"lcm[-_]lora": FewSteps("LCM", scheduler="lcm"),
    r"sdxl[-_]turbo|sd_xl_turbo": FewSteps("Turbo", scheduler="euler_a_trailing"),
    r"sd[-_]turbo": FewSteps("Turbo", scheduler="euler_trailing"),
    r"sdxl[-_]lightning[-_]([248])step": FewSteps("Lightning", scheduler="euler_trailing"),
}


def few_steps_of_name(name: str) -> FewSteps | None:
    """Return the settings of a distilled model or adapter by its name; None for other names."""
    for pattern, few in _RELEASED.items():
        if match := re.match(pattern, name, re.IGNORECASE):
            return few._replace(steps=int(match[1])) if match.groups() else few
    return None


def few_steps_of(
    name: str, config: Mapping[str, Any], *, guidance_is_input: bool = False
) -> FewSteps | None:
    """Return the settings of a distilled model by its configuration, else by its name.

    Args:
        name: Path or hub id.
        config: As `few_steps_of_model`.
        guidance_is_input: Likewise.
    """
    few = few_steps_of_model(config, guidance_is_input=guidance_is_input)
    return few or few_steps_of_name(PurePath(name).name)


def few_steps_of_model(config: Mapping[str, Any], *, guidance_is_input: bool) -> FewSteps | None:
    """Return the settings of a distilled model by its configuration; None for other models.

    Args:
        config: Configuration of the scheduler, with ``_class_name``.
        guidance_is_input: Whether the guidance scale is an input of the UNet
            (``time_cond_proj_dim``). It is 8 as released (arXiv:2310.04378) and needs no second
            forward pass.
    """
    name = config.get("_class_name")
    if guidance_is_input:
        return FewSteps("LCM", 4, 8.0, None if name == "LCMScheduler" else "lcm")
    if name == "LCMScheduler":
        return FewSteps("LCM")
    is_euler = name in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
    # Schedules that end in pure noise have trailing timesteps without distillation, too.
    is_zero_snr = config.get("rescale_betas_zero_snr")
    if is_euler and config.get("timestep_spacing") == "trailing" and not is_zero_snr:
        return FewSteps("trailing timesteps, as Turbo models have")
    return None
