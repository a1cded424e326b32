"""Whole models in other programs: a report on one, and the YAML beside a single file for A1111.

Which program asks what was seen when it was run, or read in its source: docs/measurements.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dora_diffusion.config.arguments import check_arguments
from dora_diffusion.config.families import Family
from dora_diffusion.export.files import ExportError, open_model
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
from dora_diffusion.formats.files.atomic import save_text
from dora_diffusion.formats.layouts import MODEL_VERDICTS

WIDTH = 320
"""Channels of the first level of the released models' UNets: web UIs load no other."""
A1111_HEAD = "# Written by dora_diffusion: A1111 builds the model of the same name by it.\n"


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


@check_arguments()
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


def kind_of(model: StoredModel) -> str:
    """Return a model's key of `MODEL_VERDICTS`; empty where nobody says what it predicts."""
    prediction = model.schedule().get(PREDICTION, "")
    what = "file" if model.is_single_file else "folder"
    if not has_released_shape(model):
        return f"{what} of another shape"
    if not model.is_single_file:
        return what
    if model.family.has_two_predictions:
        return f"SD2 file, {'v-prediction' if prediction == V else EPSILON}" if prediction else ""
    if prediction != V:
        return "SD1 or SDXL file, epsilon"
    return f"{'SDXL' if model.family.marks_v_prediction else 'SD1'} file, v-prediction"


def has_released_shape(model: StoredModel) -> bool:
    """Return whether its UNet is as wide as the released ones."""
    return model.specs["unet.conv_in.weight"].shape[0] == WIDTH


def schedule_notes(model: StoredModel) -> list[str]:
    """Return notes for programs on a noise schedule that ends in pure noise."""
    is_one = model.is_single_file and has_released_shape(model)
    if not is_one or not model.schedule().get(ZERO_SNR):
        return []
    in_node = "; in ComfyUI switch on zsnr in that node"
    comfyui = "" if model.family.marks_v_prediction else in_node
    return [
        "zero terminal SNR: in A1111 choose it under Settings, Sampler parameters, Noise schedule "
        f"for sampling{comfyui}"
    ]


def a1111_config(model: StoredModel) -> str:
    """The YAML beside a model's single file that A1111 builds it by; empty where it needs none.

    Without one, A1111 takes Stable Diffusion 1 and XL for noise models, and guesses which of its
    releases a Stable Diffusion 2 is from what its UNet answers.
    """
    family, prediction = model.family, model.schedule().get(PREDICTION, "")
    is_told = prediction == V or (bool(prediction) and family.has_two_predictions)
    if not is_told or not has_released_shape(model):
        return ""
    is_v, paints = prediction == V, family.conditioning_latents > 0
    text = (Path(__file__).parent / "a1111" / f"{family.configuration}.yaml").read_text("utf-8")
    return A1111_HEAD + text.format(
        prediction="v" if is_v else "eps",
        denoiser="V" if is_v else "Eps",
        in_channels=family.in_channels(),
        model="LatentInpaintDiffusion" if paints else "LatentDiffusion",
        conditioning="hybrid" if paints else "crossattn",
        last="\n    finetune_keys: null" if paints else "",
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
