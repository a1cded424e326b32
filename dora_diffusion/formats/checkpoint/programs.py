"""Readings of a whole model by other programs, and the YAML by which A1111 reads it rightly.

Which program asks what was seen when it was run, or read in its source: docs/measurements.
"""

from __future__ import annotations

from pathlib import Path

from dora_diffusion.formats.checkpoint.models import StoredModel
from dora_diffusion.formats.checkpoint.schedule import EPSILON, PREDICTION, ZERO_SNR, V

WIDTH = 320
"""Channels of the first level of the released models' UNets: web UIs load no other."""
A1111_HEAD = "# Written by dora_diffusion: A1111 builds the model of the same name by it.\n"


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
    is_v, paints = prediction == V, family.condition_images > 0
    text = (Path(__file__).parent / "a1111" / f"{family.configuration}.yaml").read_text("utf-8")
    return A1111_HEAD + text.format(
        prediction="v" if is_v else "eps",
        denoiser="V" if is_v else "Eps",
        in_channels=family.in_channels(),
        model="LatentInpaintDiffusion" if paints else "LatentDiffusion",
        conditioning="hybrid" if paints else "crossattn",
        last="\n    finetune_keys: null" if paints else "",
    )
