"""Merged checkpoints, and adapters converted, extracted and combined, as user-level functions."""

from __future__ import annotations

from dora_diffusion.export.checkpoint import export_checkpoint
from dora_diffusion.export.convert import ConversionReport, convert_adapter
from dora_diffusion.export.derive import combine_adapters, extract_adapter
from dora_diffusion.export.files import ExportError, inspect_adapter
from dora_diffusion.export.programs import ModelReport, inspect_model
from dora_diffusion.export.verify import VerifyReport, verify_checkpoint
from dora_diffusion.formats.adapter.inspect import AdapterReport

__all__ = [
    "AdapterReport", "ConversionReport", "ExportError", "ModelReport", "VerifyReport",
    "combine_adapters", "convert_adapter", "export_checkpoint", "extract_adapter",
    "inspect_adapter", "inspect_model", "verify_checkpoint",
]  # fmt: skip
