"""Whole models in other programs: a report on a model.

The behaviour of each program was observed or read from its source: lab/measurements.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from dora_diffusion.config.families import Family
from dora_diffusion.export.files import open_model
from dora_diffusion.export.merge_spec import recorded
from dora_diffusion.export.metadata import MERGED, trained_trigger
from dora_diffusion.formats.checkpoint.models import StoredModel, base_name
from dora_diffusion.formats.checkpoint.schedule import (
    EPSILON,
    PREDICTION,
    ZERO_SNR,
    V,
    choose_schedule,
    usual_of,
)
from dora_diffusion.formats.layouts import MODEL_VERDICTS


@dataclass(frozen=True)
class ModelReport:
    """Report on a whole model.

    Attributes:
        path: The file or folder.
        family: Family of the model.
        is_single_file: Whether it is one file in the original layout.
        schedule: Noise schedule and its source.
        trigger: Trigger words from the metadata.
        base: Name of the base model from the metadata; empty if unknown.
        adapters: Merged adapters: name and strength of each.
        dtypes: Precisions of the UNet's tensors, the most frequent first.
        nbytes: Size of the weights on disk.
        tools: Verdict of each program on reading the model; see docs/howto/v-prediction.md.
        notes: Advice on using the model.
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
        """Return the report as plain values, for JSON."""
        return dataclasses.asdict(self) | {"path": str(self.path), "family": self.family.name}


def inspect_model(path: str | PathLike[str]) -> ModelReport:
    """Report the family, schedule, metadata and compatible programs of a whole model.

    Raises:
        UnsupportedModelError, TensorFileError: If it cannot be read, with the reason.
    """
    with open_model(path) as model:
        fields, specs = model.metadata, model.specs
        statements = [*model.statements(), *usual_of(model.family)]
        start = f"{model.family.denoiser}."
        counts = Counter(s.dtype for name, s in specs.items() if name.startswith(start))
        schedule = choose_schedule(model.path.name, statements)
        return ModelReport(
            path=model.path,
            family=model.family,
            is_single_file=model.is_single_file,
            schedule=str(schedule) if schedule.prediction_type else "",
            trigger=fields.get("modelspec.trigger_phrase", "") or trained_trigger(fields),
            base=base_name(fields),
            adapters=[
                (name, strengths[0]) for name, _, strengths in recorded(fields.get(MERGED, ""))
            ],
            dtypes=[str(dtype).removeprefix("torch.") for dtype, _ in counts.most_common()],
            nbytes=sum(file.stat().st_size for files in model.files.values() for file in files),
            tools=MODEL_VERDICTS.get(kind_of(model), {}),
            notes=[*model.naming_problems(), *schedule_notes(model)],
        )


def kind_of(model: StoredModel) -> str:
    """Return a model's key of `MODEL_VERDICTS`; empty if its prediction type is unknown."""
    prediction = model.schedule().get(PREDICTION, "")
    what = "file" if model.is_single_file else "folder"
    if not model.family.has_unet:
        is_complete = model.is_single_file and not model.left_out
        what = f"{'complete ' * is_complete}transformer {what}"
    if not has_released_shape(model):
        return f"{what} of another shape"
    if not model.is_single_file or not model.family.has_unet:
        return what
    if model.family.has_two_predictions:
        return f"SD2 file, {'v-prediction' if prediction == V else EPSILON}" if prediction else ""
    if prediction != V:
        return "SD1 or SDXL file, epsilon"
    return f"{'SDXL' if model.family.marks_v_prediction else 'SD1'} file, v-prediction"


def has_released_shape(model: StoredModel) -> bool:
    """Return whether the denoiser has the width of released models."""
    name, rows = model.family.width_tensor
    tensor = model.specs.get(f"{model.family.denoiser}.{name}")
    return tensor is not None and tensor.shape[0] == rows


def schedule_notes(model: StoredModel) -> list[str]:
    """Return notes for programs on a noise schedule that ends in pure noise."""
    is_one = model.is_single_file and has_released_shape(model)
    if not is_one or not model.schedule().get(ZERO_SNR):
        return []
    comfyui = "; in ComfyUI switch on zsnr in that node" * (not model.family.marks_v_prediction)
    return [
        "zero terminal SNR: in A1111 choose it under Settings, Sampler parameters, Noise schedule "
        f"for sampling{comfyui}"
    ]
