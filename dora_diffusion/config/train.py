"""Every setting of a training run, checked when it is made.

The fields of `TrainConfig` are the flags of ``train_dreambooth_dora.py`` and the keys of its YAML
config files, in the order of ``--help``. Flags that users know from Diffusers' scripts keep their
names and meaning; those that are not here are answered in `dora_diffusion.config.flag_map`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from dora_diffusion.config import learning, run, subject
from dora_diffusion.config.adapter import AdapterConfig
from dora_diffusion.config.fields import Setting, require, with_present_names
from dora_diffusion.wording import did_you_mean


@dataclass(frozen=True)
class TrainConfig(  # The fields of a dataclass are those of its last base first.
    run.OutputSettings, run.SampleSettings, run.DeviceSettings,
    learning.LossSettings, learning.OptimizerSettings, learning.LengthSettings,
    learning.AdapterSettings,
    subject.PriorSettings, subject.ImageSettings, subject.SubjectSettings, subject.ModelSettings,
):  # fmt: skip
    """All settings of one DreamBooth run.

    Example:
        >>> TrainConfig(instance_data_dir="photos", instance_prompt="a photo of a sks dog").rank
        8

    Raises:
        ConfigError: If a value cannot work, or two values contradict each other.
    """

    def __post_init__(self) -> None:
        for setting in settings():
            setting.check(getattr(self, setting.name))
        require(
            not (self.use_8bit_adam and self.optimizer not in ("adamw", "adamw8bit")),
            f"use_8bit_adam is another optimizer than {self.optimizer}; leave one of them out",
            "use_8bit_adam",
        )
        require(
            not self.push_to_hub or "/" in (self.hub_model_id or ""),
            "push_to_hub needs --hub_model_id NAME/MODEL",
            "push_to_hub",
        )
        require(
            not (self.push_to_hub and self.is_full),
            "push_to_hub publishes adapters; upload the model of full fine-tuning with "
            "'huggingface-cli upload NAME/MODEL OUTPUT_DIR/model'",
            "push_to_hub",
        )
        require(
            not (self.debiased_estimation_loss and self.snr_gamma),
            "debiased_estimation_loss weighs timesteps, as snr_gamma does; leave one of them out",
            "debiased_estimation_loss",
        )
        if self.optimizer_name == "prodigy":
            self._check_prodigy()
        if self.parametrization == "adalora" and not self.is_full:
            self._check_allocation()
        for targets, rank_only in ((self.targets, False), (self.text_encoder_targets, True)):
            self._adapter(tuple(targets), rank_only)

    def _check_prodigy(self) -> None:
        require(
            self.unet_lr >= 0.1,
            f"learning_rate is {self.unet_lr}; Prodigy finds the rate itself, and multiplies "
            "it by learning_rate: use 1",
            "learning_rate",
        )
        require(
            self.magnitude_lr is None and self.loraplus_ratio == 1,
            "Prodigy has one rate for everything: leave out magnitude_lr and loraplus_ratio",
            "optimizer",
        )

    def _check_allocation(self) -> None:
        require(
            (self.target_rank or 0) <= self.rank,
            f"target_rank is {self.target_rank}, more than the rank {self.rank} that layers start "
            "with; raise rank",
            "target_rank",
        )
        if self.max_train_steps is not None:
            warmup, final = self.allocation_phases
            require(
                warmup + final < self.max_train_steps,
                f"allocation_warmup {warmup} and allocation_final {final} leave none of "
                f"{self.max_train_steps} steps to allocate ranks in",
                "allocation_final",
            )

    @property
    def allocation_phases(self) -> tuple[int, int]:
        """Steps of rank allocation's warm-up, and of its end."""
        steps, warmup, final = (
            self.max_train_steps or 0,
            self.allocation_warmup,
            self.allocation_final,
        )
        return (
            steps // 10 if warmup is None else warmup,
            steps // 2 if final is None else final,
        )

    def _adapter(self, targets: tuple[str, ...], linear_only: bool) -> AdapterConfig:
        is_vera = self.parametrization == "vera"
        return AdapterConfig(
            targets=targets,
            rank=self.vera_rank if is_vera else self.rank,
            alpha=self.lora_alpha,
            conv_rank=None if linear_only or is_vera else self.conv_rank,
            conv_alpha=None if linear_only else self.conv_alpha,
            rslora=self.rslora,
            use_dora=self.method_name == "dora",
            norm_axis=self.norm_axis,
            dropout=self.lora_dropout,
            init=self.init,
            parametrization=self.parametrization,
            projection_seed=self.seed,
        )

    @property
    def unet_adapter(self) -> AdapterConfig:
        """The adapter of the UNet."""
        return self._adapter(tuple(self.targets), linear_only=False)

    @property
    def text_encoder_adapter(self) -> AdapterConfig:
        """The adapter of each text encoder."""
        return self._adapter(tuple(self.text_encoder_targets), linear_only=True)

    @property
    def method_name(self) -> str:
        """The method, with ``use_dora`` taken into account."""
        return "lora" if self.method == "dora" and not self.use_dora else self.method

    @property
    def is_full(self) -> bool:
        """Whether weights of the model itself train."""
        return self.method_name == "full"

    @property
    def unet_lr(self) -> float:
        """The UNet's learning rate."""
        return self.usual_lr if self.learning_rate is None else self.learning_rate

    @property
    def usual_lr(self) -> float:
        """The UNet's learning rate where none is given."""
        return 5e-6 if self.is_full else 8e-5

    @property
    def optimizer_name(self) -> str:
        """The optimizer, with ``use_8bit_adam`` taken into account."""
        return "adamw8bit" if self.use_8bit_adam else self.optimizer

    @property
    def lr_schedule(self) -> str:
        """The schedule; Diffusers' plain ``constant`` would leave a warm-up out."""
        with_warmup = self.lr_scheduler == "constant" and self.lr_warmup_steps > 0
        return "constant_with_warmup" if with_warmup else self.lr_scheduler

    @property
    def prior_mode(self) -> str:
        """How the prior is held: Diffusers' settings of class images mean class images."""
        asks_for_images = self.class_data_dir or self.class_prompt
        return self.prior_preservation_mode or ("images" if asks_for_images else "image-free")

    @property
    def is_image_free(self) -> bool:
        """Whether the prior is held without class images."""
        return self.with_prior_preservation and self.prior_mode == "image-free"

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, as a YAML file holds them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Make a config from plain values.

        Raises:
            ConfigError: If a key is not a setting, or a value has the wrong type.
        """
        known = {setting.name: setting for setting in settings()}
        values = with_present_names(values)
        unknown = [f"{name}{did_you_mean(name, known)}" for name in values if name not in known]
        require(not unknown, f"unknown settings: {', '.join(sorted(unknown))}")
        return cls(**{name: known[name].cast(value) for name, value in values.items()})


@lru_cache(maxsize=1)
def settings() -> tuple[Setting, ...]:
    """All settings, in the order of their fields."""
    groups: tuple[Any, ...] = TrainConfig.__bases__[::-1]
    return tuple(
        Setting.from_field(source, group.heading)
        for group in groups
        for source in dataclasses.fields(group)
    )
