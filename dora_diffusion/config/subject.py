"""Settings of what is trained on: base model, subject, images, prior."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from dora_diffusion.config.fields import AnyOf, Need, flag
from dora_diffusion.families import PREDICTION_TYPES

PRIOR_MODES = ("images", "image-free")
INPAINTING_MASKS = ("random", "subject")

_PRIOR = Need("with_prior_preservation")


def _class_images(config: Any) -> str | None:
    """Class images are made or read only where the prior is held by them."""
    is_image_free = config.prior_mode == "image-free"
    return "prior_preservation_mode is image-free" if is_image_free else None


_CLASS_IMAGES = (_PRIOR, _class_images)


def _single_file(config: ModelSettings) -> str | None:
    is_file = config.pretrained_model_name_or_path.endswith(".safetensors")
    return None if is_file else "the base model is not a single .safetensors file"


def _on_the_hub(config: ModelSettings) -> str | None:
    name = config.pretrained_model_name_or_path
    is_local = name.startswith("embedded:") or Path(name).expanduser().exists()
    return "the base model is not from the hub" if is_local else None


@dataclass(frozen=True)
class ModelSettings:
    """Which model is trained."""

    heading: ClassVar = "Base model"

    pretrained_model_name_or_path: str = flag(
        "embedded:tiny-sd",
        "Diffusers folder, hub id, single-file .safetensors checkpoint, or embedded:NAME.",
        derived="embedded:tiny-sd, a toy model that knows only its own drawn world",
        is_path=True,
    )
    pretrained_vae_model_name_or_path: str | None = flag(
        None,
        "Another VAE: folder or hub id (for SDXL in fp16, one that is fp16-safe).",
        derived="the base model's",
        is_path=True,
    )
    model_config: str | None = flag(
        None,
        "For a single-file checkpoint: a Diffusers folder with its configuration and tokenizers.",
        derived="the released model's",
        needs=(_single_file,),
        is_path=True,
    )
    revision: str | None = flag(
        None,
        "Branch, tag or commit of a base model on the hub.",
        derived="main",
        needs=(_on_the_hub,),
    )
    variant: str | None = flag(None, "Variant of the weight files, such as fp16.")
    prediction_type: str | None = flag(
        None,
        "Prediction type: what the UNet predicts, the noise (epsilon) or v.",
        derived="what the model says (its scheduler's configuration; of a single file, the tensors "
        "v_pred and ztsnr, or its metadata), else epsilon",
        choices=PREDICTION_TYPES,
    )
    zero_terminal_snr: bool | None = flag(
        None,
        "Zero terminal SNR (arXiv:2305.08891): the noise schedule ends in pure noise; for models "
        "that predict v.",
        derived="what the model says, else off",
    )


@dataclass(frozen=True)
class SubjectSettings:
    """What it is taught."""

    heading: ClassVar = "Subject"

    instance_data_dir: str | None = flag(
        None,
        "Folder of images of the subject, with optional .txt captions; sub-folders are not read.",
        derived="none, required",
        resume="ignored",  # its images are compared by content
        is_path=True,
    )
    instance_prompt: str | None = flag(
        None,
        'Caption of images that have none, with the token: "a photo of a sks dog".',
        derived="none, required",
    )
    token: str = flag(
        "sks",
        "The trigger word. The instance prompt must contain it; captions that lack it are warned "
        "of, and refused where all lack it. '' turns these checks off.",
    )
    class_word: str | None = flag(
        None,
        "Class of the subject, such as dog.",
        derived="the words that follow the token in the instance prompt",
    )


@dataclass(frozen=True)
class ImageSettings:
    """How images and captions are read."""

    heading: ClassVar = "Images and captions"

    resolution: int | None = flag(
        None, "Training resolution in pixels.", derived="the base model's own", above=0
    )
    center_crop: bool = flag(
        True, "Center crop; off draws a random crop of each image in every epoch."
    )
    random_flip: bool = flag(False, "Random horizontal flip; not for subjects with text or a side.")
    aspect_ratio_buckets: bool = flag(
        False, "Aspect-ratio bucketing: crop to a shape near the image's own, not to a square."
    )
    masked_loss: bool = flag(
        False,
        "Masked loss: only where NAME.mask.png beside an image, or its alpha channel, is bright.",
    )
    inpainting_mask: str | None = flag(
        None,
        "What an inpainting base model learns to fill. random: rectangles, ellipses and whole "
        "images. subject: where NAME.mask.png beside an image, or its alpha channel, is bright; "
        "random where there is neither.",
        derived="random",
        choices=INPAINTING_MASKS,
    )
    shuffle_tags: bool = flag(False, "Shuffle the comma-separated tags of captions.")
    keep_tags: int = flag(
        1,
        "Tags at a caption's start that --shuffle_tags leaves in place.",
        needs=(Need("shuffle_tags"),),
        least=0,
    )
    caption_dropout: float = flag(
        0.0,
        "Caption dropout rate; dropped captions train the unconditional side of guidance.",
        least=0,
        most=1,
    )
    cache_latents: bool = flag(
        True,
        "Cache latents of up to 8 crops of each image; off encodes a new random crop at every "
        "step.",
    )
    dataloader_num_workers: int = flag(
        0,
        "Data-loader workers; 0 loads in the main process.",
        needs=(Need("cache_latents", (False,)),),
        resume="ignored",
        least=0,
    )


@dataclass(frozen=True)
class PriorSettings:
    """How the rest of the class is kept."""

    heading: ClassVar = "Prior preservation"

    with_prior_preservation: bool = flag(
        False, "Prior preservation, against language drift: the rest of the class stays as it is."
    )
    prior_preservation_mode: str | None = flag(
        None,
        "image-free: hold the adapted model's prediction for the class caption at the base "
        "model's. images: train on class images too, generated before the first step where there "
        "are none.",
        derived="image-free; images where class_data_dir or class_prompt is given",
        choices=PRIOR_MODES,
        needs=(_PRIOR,),
    )
    class_data_dir: str | None = flag(
        None,
        "Folder of class images; missing ones are generated.",
        derived="OUTPUT_DIR/class_images",
        resume="ignored",  # its images are compared by content
        needs=_CLASS_IMAGES,
        is_path=True,
    )
    class_prompt: str | None = flag(
        None,
        "Caption of class images.",
        derived="each image's caption with the token taken out",
        needs=_CLASS_IMAGES,
    )
    num_class_images: int = flag(100, "Number of class images.", needs=_CLASS_IMAGES, above=0)
    prior_loss_weight: float = flag(
        1.0, "Weight of the prior-preservation loss.", needs=(_PRIOR,), least=0
    )
    sample_batch_size: int = flag(
        4,
        "Batch size for generating class images and samples.",
        needs=(AnyOf((_PRIOR, Need("num_validation_images"))),),
        resume="ignored",
        above=0,
    )
