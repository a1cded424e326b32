# The public names and their homes: for type checkers, and read by `__init__.py`.

from dora_diffusion.export.checkpoint import export_checkpoint as export_checkpoint
from dora_diffusion.export.convert import ConversionReport as ConversionReport
from dora_diffusion.export.convert import convert_adapter as convert_adapter
from dora_diffusion.export.derive import combine_adapters as combine_adapters
from dora_diffusion.export.derive import extract_adapter as extract_adapter
from dora_diffusion.export.files import ExportError as ExportError
from dora_diffusion.export.files import inspect_adapter as inspect_adapter
from dora_diffusion.export.programs import ModelReport as ModelReport
from dora_diffusion.export.programs import inspect_model as inspect_model
from dora_diffusion.export.verify import VerifyReport as VerifyReport
from dora_diffusion.export.verify import verify_checkpoint as verify_checkpoint
from dora_diffusion.formats.adapter.inspect import AdapterReport as AdapterReport
