"""The settings of an adapter and of a training run: one setting is one field.

::

    subject    what is trained on     train     TrainConfig, all of the three, and its checks
    learning   how it is learned      adapter   AdapterConfig
    run        the run around it      derived   what follows from settings
    fields     what a field says      file      YAML
    flag_map   flags of Diffusers' scripts    presets   settings that belong together
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
