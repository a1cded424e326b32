"""What an adapter file is, and whether it fits a base model."""

from __future__ import annotations

from pathlib import Path

from dora_diffusion.export.base import open_model
from dora_diffusion.formats.adapter.inspect import AdapterReport, report_on


def inspect_adapter(
    path: str | Path,
    base: str | Path | None = None,
    *,
    variant: str | None = None,
    revision: str | None = None,
) -> AdapterReport:
    """Report what an adapter is.

    Args:
        path: An adapter file or folder.
        base: A model that it may fit: a folder, a hub id, ``embedded:NAME`` or a single file.
        variant: Weight variant of the base, such as ``"fp16"``.
        revision: Branch, tag or commit of a base on the hub.

    Raises:
        AdapterFormatError: If it is not an adapter that can be read, with the reason.
    """
    if base is None:
        return report_on(path)
    with open_model(base, variant, revision) as model:
        return report_on(path, model)
