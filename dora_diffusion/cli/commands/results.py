"""Commands that use a result: ``export``, ``verify``, ``push``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dora_diffusion.cli.console.output import progress
from dora_diffusion.cli.settings import (
    Alpha,
    Overwrite,
    RequiredBase,
    ScheduleFlags,
    StrengthFlags,
    adapter_and_strength,
)
from dora_diffusion.config import ConfigError
from dora_diffusion.config.base import OfModel
from dora_diffusion.config.command import CommandSettings
from dora_diffusion.config.fields import AUTO, DTYPES, REQUIRED, flag, when

_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class Merge(StrengthFlags, ScheduleFlags, Alpha, RequiredBase):
    """Settings of a merge into a base."""

    adapter: list[str] = flag(
        [],
        "Adapter files or output folders; FILE:0.5 sets the strength of one. May be repeated. "
        "Default: none, the unchanged base.",
        repeated=True,
    )
    vae: str | None = flag(None, "Another VAE: folder, hub id or .safetensors file.")
    unet_strength: float = flag(1.0, "Multiplies --strength for the UNet.")
    text_encoder_strength: float = flag(1.0, "Multiplies --strength for the text encoders.")

    @property
    def adapters(self) -> list[tuple[str, float]]:
        """The adapters with their strengths."""
        return [adapter_and_strength(text) for text in self.adapter]

    @property
    def merge_options(self) -> dict[str, Any]:
        """Keyword arguments of the merge, for `export_checkpoint` and `verify_checkpoint`."""
        from dora_diffusion.numerics.weights import MergeStrengths

        strengths: dict[str, float] = {name: getattr(self, name) for name in vars(MergeStrengths())}
        return {"strength": MergeStrengths(**strengths), "alpha": self.alpha}


@dataclass(frozen=True, kw_only=True)
class ExportSettings(Overwrite, Merge):
    """Settings of ``export``."""

    output: str = flag(
        REQUIRED, "X.safetensors for one file that web UIs read; else a Diffusers folder."
    )
    dtype: str = flag(
        AUTO,
        "Precision of the result. auto: that of the base, on any machine.",
        choices=(AUTO, *DTYPES),
    )
    complete: bool = flag(
        False,
        "One file with text encoders and VAE too, for models whose diffusion model is a file of "
        "its own in most programs (Z-Image). Files of other models are always complete.",
        needs=(
            when(
                lambda config: config.output.endswith(".safetensors"),
                "the output is a folder, which is always complete",
            ),
        ),
    )
    model_config: str | None = flag(
        None,
        "Diffusers folder with the configuration, for a folder made from a single file. Default: "
        "the released model's.",
        needs=(
            OfModel("base", "base", "file"),
            when(
                lambda config: not config.output.endswith(".safetensors"),
                "the output is a single file, which contains no configuration",
            ),
        ),
    )

    def perform(self) -> int:
        """Merge adapters into a base, check the result, and list the programs that read it."""
        from dora_diffusion.export import export_checkpoint, inspect_model
        from dora_diffusion.models.precision import dtype_of

        with progress("merging", "B") as show:
            path = export_checkpoint(
                self.base_model,
                self.adapters,
                self.output,
                dtype=None if self.dtype == AUTO else dtype_of(self.dtype),
                complete=self.complete,
                overwrite=self.overwrite,
                on_progress=show,
                **self.merge_options,
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


@dataclass(frozen=True, kw_only=True)
class VerifySettings(Merge):
    """Settings of ``verify``."""

    # After --adapter it would be parsed as another adapter; see `_merged_and_adapters`.
    merged: str | None = flag(
        None, "The merged model: a folder or a .safetensors file.", positional=True
    )
    adapter: list[str] = flag(
        REQUIRED,
        "Adapter files or output folders; FILE:0.5 sets the strength of one. May be repeated.",
        repeated=True,
    )

    def perform(self) -> int:
        """Recompute a merged model from base and adapters. Returns 1 if it differs."""
        from dora_diffusion.export import verify_checkpoint

        merged, adapters = _merged_and_adapters(self.merged, self.adapter)
        with progress("comparing", "B") as show:
            report = verify_checkpoint(
                merged,
                self.base_model,
                [adapter_and_strength(text) for text in adapters],
                on_progress=show,
                **self.merge_options,
            )
        print(f"{'adapted tensors':<28} {'number':>6}  {'largest':>8}  {'rounding':>8}")
        for name, kind in sorted(report.kinds.items()):
            largest, allowed = f"{kind.largest:>8.1e}", f"{kind.allowed:>8.1e}"
            print(f"{name:<28} {kind.tensors:>6}  {largest}  {allowed}  {kind.worst}")
        print(f"{report.unchanged} other tensors equal the base's, bit for bit")
        for problem in _shortened(report.problems):
            print(f"wrong: {problem}")
        verdict = "verified" if report.ok else "NOT what this base and these adapters give"
        assumed = "; ".join(report.assumptions)
        print(f"{verdict}, assuming that this is right: {assumed}" if assumed else verdict)
        return 0 if report.ok else 1


def _merged_and_adapters(merged: str | None, adapters: list[str]) -> tuple[str, list[str]]:
    """Return the model to verify and the adapters; ``--adapter A B MERGED`` ends in the model.

    Raises:
        ConfigError: If only one of them is given.
    """
    if merged is not None:
        return merged, adapters
    if len(adapters) < 2:
        raise ConfigError(
            "the merged model is missing: 'dora-diffusion verify MERGED --base MODEL --adapter "
            "ADAPTER'"
        )
    return adapters[-1], adapters[:-1]


def _shortened(problems: list[str]) -> list[str]:
    """Return the first problems, the number of omitted ones, and the last, which may explain."""
    if len(problems) <= _SHOWN:
        return problems
    left_out = f"{len(problems) - _SHOWN} more like these"
    return [*problems[: _SHOWN - 1], left_out, problems[-1]]


@dataclass(frozen=True, kw_only=True)
class PushSettings(CommandSettings):
    """Settings of ``push``."""

    folder: Path = flag(REQUIRED, "The output folder of a run.", positional=True)
    repository: str = flag(
        REQUIRED, "NAME/MODEL on the hub; created if it does not exist.", positional=True
    )
    adapter: Path | None = flag(
        None, "Adapter file of another checkpoint, which gets a new card. Default: the run's."
    )
    public: bool = flag(False, "Make the repository public.")

    def perform(self) -> int:
        """Publish a run's output folder on the hub."""
        from dora_diffusion.export.hub import push
        from dora_diffusion.training.results.card import card_of

        adapter = self.adapter
        card = card_of(self.folder, adapter) if adapter else None
        private = not self.public
        address = push(self.folder, self.repository, private=private, adapter=adapter, card=card)
        print(address)
        return 0
