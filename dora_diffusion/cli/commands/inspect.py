"""``dora-diffusion inspect``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mode
from typing import TYPE_CHECKING

from dora_diffusion.cli.console.output import print_json, print_rows
from dora_diffusion.cli.settings import AnyBase
from dora_diffusion.config.families import DEFAULT_FAMILY, FAMILIES
from dora_diffusion.config.fields import REQUIRED, flag
from dora_diffusion.config.wording import counted, pixels
from dora_diffusion.formats.adapter.metadata import READING, reading_in_words, stated_reading

if TYPE_CHECKING:
    from dora_diffusion.export.programs import ModelReport
    from dora_diffusion.formats.adapter.inspect import AdapterReport

# Metadata that has separate rows, or describes the file's layers.
_SHOWN = (
    "trained_alpha", "prediction_type", "approximates", "approximation_error",
    "unet_layers_per_block", "embeddings", *READING,
)  # fmt: skip
_UNKNOWN = (
    "unknown; 'dora-diffusion convert ADAPTER OUTPUT --to diffusers --family FAMILY' stores it"
)


@dataclass(frozen=True, kw_only=True)
class InspectSettings(AnyBase):
    """Settings of ``inspect``."""

    file: str = flag(REQUIRED, "An adapter, or a whole model: a file or folder.", positional=True)
    json: bool = flag(False, "Print JSON.")

    def without_effect(self) -> dict[str, str]:
        """Return the settings of the base, which have no effect on a model."""
        from dora_diffusion.formats.checkpoint.models import is_model

        if not is_model(self.file):
            return super().without_effect()
        names = [name for name in ("base", "variant", "revision") if getattr(self, name)]
        return dict.fromkeys(names, f"{self.file} is a model; verify compares it with its base")

    def perform(self) -> int:
        """Print a report on an adapter file or a model."""
        from dora_diffusion.formats.checkpoint.models import is_model

        report: AdapterReport | ModelReport
        if is_model(self.file):
            from dora_diffusion.export.programs import inspect_model

            report = inspect_model(self.file)
            facts = _facts_of_model(report)
        else:
            from dora_diffusion.export.files import inspect_adapter

            report = inspect_adapter(self.file, self.base_model)
            facts = _facts(report)
        if self.json:
            print_json(report.to_dict())
        else:
            print_rows([*facts, *_verdicts(report)])
        return 0


def _facts_of_model(report: ModelReport) -> list[tuple[str, str]]:
    kind = "one file" if report.is_single_file else "Diffusers folder"
    merged = ", ".join(f"{name} at {strength:g}" for name, strength in report.adapters)
    rows = [
        ("model", f"{report.path.name}, {kind}, {report.nbytes / 1e6:.2f} MB"),
        ("family", f"{report.family.title} ({report.family.name})"),
        ("predicts", report.schedule or "not said"),
        ("precision", ", ".join(report.dtypes)),
        ("trigger", report.trigger),
        ("base model", report.base),
        ("merged in", merged),
    ]
    return [(name, value) for name, value in rows if value]


def _facts(report: AdapterReport) -> list[tuple[str, str]]:
    metadata, size = report.metadata, report.nbytes / 1e6
    family = FAMILIES.get(metadata.family)
    kind = f"{report.key_format} key format".replace("other", "an unknown")
    axis = f", magnitudes on the {report.norm_axis} axis" if report.norm_axis else ""
    reading = reading_in_words(stated_reading(metadata.extra), family or DEFAULT_FAMILY)
    rows = [
        ("file", f"{report.path.name}, {kind}, {size:.2f} MB"),
        ("method", report.method + axis),
        ("family", f"{family.title} ({family.name})" if family else _UNKNOWN),
        ("rank", _one_or_range(report.rank)),
        ("alpha", _one_or_range(report.alpha)),
        ("layers", f"{_listed(report.layers)}; {_listed(report.kinds)}"),
        ("parameters", f"{report.parameters:,}"),
        ("trigger", metadata.trigger),
        ("tokens", _listed_tokens(report.tokens)),
        ("base model", metadata.base_model),
        ("prediction type", metadata.extra.get("prediction_type", "")),
        ("resolution", pixels(metadata.resolutions)),
        ("reads prompts", reading),
        ("tags", ", ".join(metadata.tags)),
        ("thumbnail", "yes" if metadata.thumbnail else ""),
    ]
    rows += [
        (name.replace("_", " "), value)
        for name, value in metadata.extra.items()
        if name not in _SHOWN
    ]
    return [(name, value) for name, value in rows if value]


def _verdicts(report: AdapterReport | ModelReport) -> list[tuple[str, str]]:
    """Return rows with the verdict of each program, the fit to the base, and notes."""
    heading = ("PROGRAM", "EXACT IN THIS PROGRAM?")
    programs = [
        (name, "not known" if verdict == "-" else verdict) for name, verdict in report.tools.items()
    ]
    rows = [("", ""), heading, *programs, ("", "")]
    if fits := getattr(report, "fits", ""):
        rows.append(("fits", fits))
    return rows + [("note", note) for note in report.notes]


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _listed_tokens(tokens: Mapping[str, int]) -> str:
    return ", ".join(f"{token} ({counted(count, 'vector')})" for token, count in tokens.items())


def _one_or_range(text: str) -> str:
    """Return the value of all layers, or their range. ``--json`` has the value of each layer."""
    if not text.startswith("{"):
        return text
    values = list(json.loads(text).values())
    return f"{min(values, key=float)} to {max(values, key=float)}, mostly {mode(values)}"
