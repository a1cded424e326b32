# Public names and their modules, for type checkers and for `__init__.py`.

from dora_diffusion.adapters.compiled import compile_blocks as compile_blocks
from dora_diffusion.adapters.inject import disabled as disabled
from dora_diffusion.adapters.inject import inject_adapters as inject_adapters
from dora_diffusion.adapters.inject import merge_adapters as merge_adapters
from dora_diffusion.adapters.inject import remove_adapters as remove_adapters
from dora_diffusion.adapters.inject import set_strength as set_strength
from dora_diffusion.adapters.inject import unmerge_adapters as unmerge_adapters
from dora_diffusion.adapters.scope import NormCache as NormCache
from dora_diffusion.adapters.scope import norm_scope as norm_scope
from dora_diffusion.adapters.scope import row_scope as row_scope
from dora_diffusion.adapters.state import load_adapter as load_adapter
from dora_diffusion.adapters.state import save_adapter as save_adapter
from dora_diffusion.adapters.targets import TargetError as TargetError
from dora_diffusion.cluster.fleet.run import run_fleet as run_fleet
from dora_diffusion.config.adapter import AdapterConfig as AdapterConfig
from dora_diffusion.config.base import BaseModel as BaseModel
from dora_diffusion.config.families import UnsupportedModelError as UnsupportedModelError
from dora_diffusion.config.fields import ConfigError as ConfigError
from dora_diffusion.config.images import ImageRequest as ImageRequest
from dora_diffusion.config.subject_list import subject_configs as subject_configs
from dora_diffusion.config.train import TrainConfig as TrainConfig
from dora_diffusion.data.images import PhotoError as PhotoError
from dora_diffusion.evaluation.photos import evaluate_photos as evaluate_photos
from dora_diffusion.evaluation.photos import read_subject as read_subject
from dora_diffusion.export.checkpoint import export_checkpoint as export_checkpoint
from dora_diffusion.export.convert import convert_adapter as convert_adapter
from dora_diffusion.export.derive import combine_adapters as combine_adapters
from dora_diffusion.export.derive import extract_adapter as extract_adapter
from dora_diffusion.export.files import ExportError as ExportError
from dora_diffusion.export.fitting import FitSettings as FitSettings
from dora_diffusion.formats.checkpoint.weights import CheckpointLayoutError as CheckpointLayoutError
from dora_diffusion.formats.files.atomic import DiskFullError as DiskFullError
from dora_diffusion.formats.files.stream import TensorFileError as TensorFileError
from dora_diffusion.formats.layouts.layout import AdapterFormatError as AdapterFormatError
from dora_diffusion.models.load import load_components as load_components
from dora_diffusion.models.locate import ModelNotFoundError as ModelNotFoundError
from dora_diffusion.numerics.weights import MergeError as MergeError
from dora_diffusion.sampling.generate import BrokenImageError as BrokenImageError
from dora_diffusion.sampling.generate import generate_images as generate_images
from dora_diffusion.sampling.pool import AdapterPool as AdapterPool
from dora_diffusion.sampling.settings import SamplingSettings as SamplingSettings
from dora_diffusion.training.metrics import TrainingError as TrainingError
from dora_diffusion.training.pack import train_pack as train_pack
from dora_diffusion.training.recipe import train as train

__version__: str
