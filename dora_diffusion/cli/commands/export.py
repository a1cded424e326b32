"""``dora-diffusion export``."""

from __future__ import annotations

from dora_diffusion.cli.console.progress import progress
from dora_diffusion.cli.settings import ExportSettings
from dora_diffusion.config.fields import AUTO

SETTINGS = ExportSettings


def run(args: ExportSettings) -> int:
    """Write a base, with adapters merged in, check it, and say which programs read it rightly."""
    from dora_diffusion.export import export_checkpoint, inspect_model
    from dora_diffusion.models.precision import dtype_of

    with progress("merging", "B") as show:
        path = export_checkpoint(
            args.base_model,
            args.adapters,
            args.output,
            dtype=None if args.dtype == AUTO else dtype_of(args.dtype),
            overwrite=args.overwrite,
            on_progress=show,
            **args.merge_options,
        )
    print(f"{path} (reopened and checked)")
    report, programs = inspect_model(path), dict[str, list[str]]()
    for program, verdict in report.tools.items():
        programs.setdefault("not known" if verdict == "-" else verdict, []).append(program)
    for verdict, names in programs.items():
        print(f"{', '.join(names)}: {verdict}")
    for note in report.notes:
        print(f"note: {note}")
    return 0
