"""The settings of an adapter and of a training run: one setting is one field.

::

    subject    model, subjects, images        train     TrainConfig, all of the three, with checks
    learning   adapter, optimizer, loss       adapter   AdapterConfig
    run        device, samples, output        derived   defaults that depend on other settings
    fields     description of a setting       file      YAML
    flag_map   flags of other trainers        presets   settings for one purpose
    elsewhere  names with another meaning     problems  errors that are reported together

Nothing here imports torch.
"""

from dora_diffusion.config.adapter import AdapterConfig
from dora_diffusion.config.derived import differences, unusual_rates, without_effect
from dora_diffusion.config.fields import ConfigError, Setting
from dora_diffusion.config.file import read_config_file, read_config_lines
from dora_diffusion.config.presets import PRESETS
from dora_diffusion.config.train import TrainConfig, settings

__all__ = [
    "PRESETS",
    "AdapterConfig",
    "ConfigError",
    "Setting",
    "TrainConfig",
    "differences",
    "read_config_file",
    "read_config_lines",
    "settings",
    "unusual_rates",
    "without_effect",
]
