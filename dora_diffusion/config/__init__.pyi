# The public names and their homes: for type checkers, and read by `__init__.py`.

from dora_diffusion.config.adapter import AdapterConfig as AdapterConfig
from dora_diffusion.config.config_file import read_config_file as read_config_file
from dora_diffusion.config.config_file import read_config_lines as read_config_lines
from dora_diffusion.config.derived import differences as differences
from dora_diffusion.config.derived import unusual_rates as unusual_rates
from dora_diffusion.config.derived import without_effect as without_effect
from dora_diffusion.config.features.outside import with_features as with_features
from dora_diffusion.config.fields import ConfigError as ConfigError
from dora_diffusion.config.fields import Setting as Setting
from dora_diffusion.config.presets import PRESETS as PRESETS
from dora_diffusion.config.train import TrainConfig as TrainConfig
from dora_diffusion.config.train import settings as settings
