"""Whole models in other programs: a report on one, and the YAML beside a single file for A1111."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dora_diffusion.config.families import Family
from dora_diffusion.export.files import ExportError, open_model
from dora_diffusion.export.merge_spec import recorded
from dora_diffusion.export.metadata import MERGED, trained_trigger
from dora_diffusion.formats.checkpoint.models import StoredModel, base_name
from dora_diffusion.formats.checkpoint.programs import (
    A1111_HEAD,
    a1111_config,
    kind_of,
    schedule_notes,
)
from dora_diffusion.formats.checkpoint.schedule import choose_schedule, usual_of
from dora_diffusion.formats.checkpoint.weights import UNET_PREFIX
from dora_diffusion.formats.files.atomic import save_text
from dora_diffusion.formats.files.runs import pipeline_in
from dora_diffusion.formats.files.stream import TensorFileError, read_header
from dora_diffusion.formats.layouts import MODEL_VERDICTS


@dataclass(frozen=True)
class ModelReport:
    """Report on a whole model.

    Attributes:
        path: The file or folder.
        family: What kind of model it is.
        is_single_file: Whether it is one file in the original layout.
        schedule: Its noise schedule, and who says so.
        trigger: The trigger words, as far as its metadata tell them.
        base: Name of the model that it was made from; empty where it does not say it.
        adapters: What was merged into that: adapter and strength of each.
        dtypes: Precisions of the UNet's tensors, the most frequent first.
        nbytes: Size of its weights on disk.
        tools: Programs, and whether they take it as it is meant; see docs/howto/v-prediction.md.
        notes: What to know before using it.
    """

    path: Path
    family: Family
    is_single_file: bool
    schedule: str
    trigger: str
    base: str
    adapters: Sequence[tuple[str, float]]
    dtypes: Sequence[str]
    nbytes: int
    tools: Mapping[str, str]
    notes: Sequence[str]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        return dataclasses.asdict(self) | {"path": str(self.path), "family": self.family.name}


def is_model(path: str | Path) -> bool:
    """Return whether a path is that of a whole model: a Diffusers folder or a single file."""
    path = Path(path).expanduser()
    if path.is_dir():
        return pipeline_in(path) is not None
    try:
        return any(key.startswith(UNET_PREFIX) for key in read_header(path).specs)
    except (TensorFileError, OSError):
        return False


def inspect_model(path: str | Path) -> ModelReport:
    """Report what a whole model is, and which programs take it so.

    Raises:
        UnsupportedModelError, TensorFileError: If it cannot be read, with the reason.
    """
    with open_model(path) as model:
        fields, specs = model.metadata, model.specs
        said = [*model.statements(), *usual_of(model.family)]
        counts = Counter(s.dtype for name, s in specs.items() if name.startswith("unet."))
        yaml_file = model.path.with_suffix(".yaml")
        notes = [*model.naming_problems(), *schedule_notes(model)]
        if model.is_single_file and a1111_config(model) and not yaml_file.is_file():
            notes.append(f"{yaml_file.name} is not beside it: export it again for A1111")
        schedule = choose_schedule(model.path.name, said)
        return ModelReport(
            path=model.path,
            family=model.family,
            is_single_file=model.is_single_file,
            schedule=str(schedule) if schedule.prediction_type else "",
            trigger=fields.get("modelspec.trigger_phrase", "") or trained_trigger(fields),
            base=base_name(fields),
            adapters=[(name, own[0]) for name, _, own in recorded(fields.get(MERGED, ""))],
            dtypes=[str(dtype).removeprefix("torch.") for dtype, _ in counts.most_common()],
            nbytes=sum(file.stat().st_size for files in model.files.values() for file in files),
            tools=MODEL_VERDICTS.get(kind_of(model), {}),
            notes=notes,
        )


def check_a1111_config(output: Path, model: StoredModel) -> None:
    """Refuse to write a model where somebody else's YAML has the place of its own.

    Raises:
        ExportError: If so.
    """
    place = output.with_suffix(".yaml")
    if a1111_config(model) and place.exists() and not _is_ours(place):
        raise ExportError(
            f"{place} exists and is not of a model: {output.name} needs a YAML of this name beside "
            "it, by which A1111 reads what it predicts; choose another name"
        )


def write_a1111_config(output: Path, model: StoredModel) -> None:
    """Write the YAML beside a single file, or remove that of a model which the file replaced."""
    place = output.with_suffix(".yaml")
    if text := a1111_config(model):
        save_text(place, text)
    elif _is_ours(place):
        place.unlink()


def _is_ours(place: Path) -> bool:
    return place.is_file() and place.read_bytes().startswith(A1111_HEAD.encode())
