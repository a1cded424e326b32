"""``dora-diffusion convert``."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from dora_diffusion.cli.console.programs import print_written
from dora_diffusion.cli.console.progress import tell
from dora_diffusion.cli.settings import ConvertSettings
from dora_diffusion.config import ConfigError
from dora_diffusion.formats.files.atomic import atomic_file
from dora_diffusion.formats.layouts import FOLDERS

SETTINGS = ConvertSettings


def run(args: ConvertSettings) -> int:
    """Write an adapter for another tool, and say how exact it is."""
    from dora_diffusion.export import convert_adapter

    output = Path(args.output)
    is_packed = args.to in FOLDERS and output.suffix == ".zip"
    if is_packed and output.exists() and not args.overwrite:
        raise ConfigError(f"{output} exists; choose another output, or --overwrite")
    tell(phase="converting")
    with tempfile.TemporaryDirectory() as scratch:
        report = convert_adapter(
            args.input,
            Path(scratch, output.stem) if is_packed else args.output,
            args.to,
            base=args.base_model,
            family=args.family,
            alpha=args.alpha,
            tags=args.tags,
            thumbnail=args.thumbnail,
            dtype=args.written_dtype,
            rank=args.rank,
            conv_rank=args.conv_rank,
            energy=args.energy,
            overwrite=args.overwrite,
        )
        if is_packed:
            with atomic_file(output) as temporary:
                packed = shutil.make_archive(f"{scratch}/packed", "zip", report.path)
                shutil.move(packed, temporary)
        print_written(report, output if is_packed else report.path, as_json=args.json)
    return 0
