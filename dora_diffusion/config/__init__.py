"""The settings of an adapter and of a training run: one setting is one field.

::

    train      TrainConfig, the fields          adapter   AdapterConfig
    fields     what a field's metadata says     checks    ConfigError
    effect     "X has no effect because Y"      resume    what a resumed run may change
    file       YAML                             flag_map  flags of Diffusers' scripts

Nothing here imports torch.
"""

from dora_diffusion.config.adapter import (
    NORM_AXES,
    PRESETS,
    TEXT_ENCODER_PRESETS,
    AdapterConfig,
)
from dora_diffusion.config.checks import ConfigError
from dora_diffusion.config.effect import without_effect
from dora_diffusion.config.fields import Setting, setting_type
from dora_diffusion.config.file import read_config_file, read_config_lines
from dora_diffusion.config.learning import LR_SCHEDULES, OPTIMIZERS
from dora_diffusion.config.precision import PRECISIONS
from dora_diffusion.config.resume import differences
from dora_diffusion.config.subject import PRIOR_MODES
from dora_diffusion.config.train import TrainConfig, settings

__all__ = [
    "LR_SCHEDULES",
    "NORM_AXES",
    "OPTIMIZERS",
    "PRECISIONS",
    "PRESETS",
    "PRIOR_MODES",
    "TEXT_ENCODER_PRESETS",
    "AdapterConfig",
    "ConfigError",
    "Setting",
    "TrainConfig",
    "differences",
    "read_config_file",
    "read_config_lines",
    "setting_type",
    "settings",
    "without_effect",
]
