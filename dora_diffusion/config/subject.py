"""Settings of base model, subject, images and prior preservation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

from dora_diffusion.config.base import BASE_HELP, OfModel
from dora_diffusion.config.families import PREDICTION_TYPES
from dora_diffusion.config.fields import TOKENS_PER_CHUNK, AnyOf, Need, TextOrPath, flag

INPAINTING_MASKS = ("random", "subject")


Entry = dict[str, Any]
"""Settings of one subject, by name; defaults are the settings of the run."""


_TAGS = AnyOf((Need("shuffle_tags"), Need("tag_dropout")))
_BUCKETS = Need("aspect_ratio_buckets")

# A setting of subjects that has one value for the run, and an effect without photos too.
_run_flag = partial(flag, of_photos=False, of_subject=False)
_bucket_flag = partial(flag, needs=(_BUCKETS,))


def _base(kind: Literal["files", "hub", "file"]) -> tuple[OfModel, ...]:
    return (OfModel("pretrained_model_name_or_path", "base model", kind),)


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Base model."""

    heading: ClassVar = "Model"

    pretrained_model_name_or_path: TextOrPath[str] = flag(
        "embedded:tiny-sd",
        BASE_HELP,
        derived="embedded:tiny-sd, a toy model of drawn scenes",
        is_path=True,
    )
    pretrained_vae_model_name_or_path: TextOrPath[str | None] = flag(
        None,
        "Another VAE: folder or hub id (for SDXL in fp16, a VAE that does not overflow).",
        derived="the base model's",
        is_path=True,
    )
    model_config: TextOrPath[str | None] = flag(
        None,
        "Diffusers folder with configuration and tokenizers of a single-file checkpoint.",
        derived="the released model's",
        needs=_base("file"),
        is_path=True,
    )
    revision: str | None = flag(
        None,
        "Git revision of a base model on the hub: branch, tag or commit.",
        derived="main",
        needs=_base("hub"),
    )
    variant: str | None = flag(
        None, "Variant of the weight files, such as fp16.", needs=_base("files")
    )
    prediction_type: str | None = flag(
        None,
        "Prediction type of the UNet: the noise (epsilon) or v.",
        derived="read from the scheduler's configuration, or from a single file's metadata or its "
        "tensors v_pred and ztsnr; else epsilon",
        choices=PREDICTION_TYPES,
    )
    zero_terminal_snr: bool | None = flag(
        None,
        "Zero terminal SNR (arXiv:2305.08891): the noise schedule ends in pure noise; for models "
        "that predict v.",
        derived="read from the model, else off",
    )
    distilled: bool | None = flag(
        None,
        "The base model was distilled to few denoising steps (turbo), as of which samples take "
        "their steps and guidance.",
        derived="read from the model's files or its name",
    )


@dataclass(frozen=True, kw_only=True)
class SubjectSettings:
    """Subjects and captions."""

    heading: ClassVar = "Subject"
    common: ClassVar = {"of_photos": True, "of_subject": True}  # attributes of all its settings

    dataset_config: TextOrPath[list[Entry]] = flag(
        [],
        "Several subjects in one run: a YAML file with a list of subjects, each with its folder, "
        "token, class word and any other setting of images, captions and prior. Also reads "
        "sd-scripts' dataset file, or a folder of kohya's '10_sks dog' folders.",
        derived="one subject, with these settings",
        resume="ignored",  # its entries are compared
        is_path=True,
        of_subject=False,
        of_run=True,
    )
    instance_data_dir: TextOrPath[str | None] = flag(
        None,
        "Folder with images of the subject and optional .txt captions; sub-folders are not read.",
        derived="none, required",
        resume="ignored",  # its images are compared by content
        is_path=True,
        has_photos=True,
    )
    instance_prompt: str | None = flag(
        None,
        'Caption of images without one, with the token: "a photo of a sks dog".',
        derived="none, required",
    )
    token: str = flag(
        "sks",
        "Trigger word. The instance prompt must contain it. Captions without it cause a warning, "
        "or an error if all lack it. '' turns these checks off.",
    )
    class_word: str | None = flag(
        None,
        "Class of the subject, such as dog.",
        derived="the words that follow the token in the instance prompt",
    )
    repeats: int = flag(1, "Repeats of each image per epoch, each with a new crop.", above=0)


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """Images and captions."""

    heading: ClassVar = "Data"
    common: ClassVar = {"of_photos": True, "of_subject": True}

    resolution: int | None = flag(
        None,
        "Training resolution in pixels.",
        derived="the base model's own",
        above=0,
        of_photos=False,
    )
    center_crop: bool = flag(True, "Center crop; off: a random crop of each image in every epoch.")
    random_flip: bool = flag(
        False, "Random horizontal flip; not for subjects with text or asymmetric details."
    )
    aspect_ratio_buckets: bool = flag(
        False, "Aspect-ratio bucketing: crop to a shape near the image's own instead of a square."
    )
    min_bucket_reso: int | None = _bucket_flag(
        None, "Minimum side of buckets in pixels.", derived="half of max_bucket_reso", above=0
    )
    max_bucket_reso: int | None = _bucket_flag(
        None,
        "Maximum side of buckets in pixels; their area is at most resolution squared.",
        derived="1.41 times the resolution",
        above=0,
    )
    bucket_reso_steps: int | None = _bucket_flag(
        None,
        "Step of bucket sides: they are multiples of it.",
        derived="64, or 32 for SDXL",
        above=0,
    )
    masked_loss: bool = flag(
        False,
        "Masked loss: only where NAME.mask.png next to an image, or its alpha channel, is bright.",
    )
    inpainting_mask: str | None = flag(
        None,
        "Training masks of an inpainting base model. random: rectangles, ellipses and whole "
        "images. subject: the bright area of NAME.mask.png next to an image, or of its alpha "
        "channel; random for images without either.",
        derived="random",
        choices=INPAINTING_MASKS,
    )
    caption_per_line: bool = flag(
        False,
        "Treat each line of a .txt file as a separate caption, one of which is drawn in each "
        "epoch; off joins the lines to one caption.",
    )
    caption_prefix: str = flag(
        "", 'Text before every caption, such as "sks dog,": neither shuffled nor dropped.'
    )
    shuffle_tags: bool = flag(False, "Shuffle the tags of captions, which commas separate.")
    tag_dropout: float = flag(
        0.0, "Tag dropout rate: probability of dropping each tag.", least=0, most=1
    )
    keep_tags: int = flag(
        1,
        "Number of first tags that --shuffle_tags and --tag_dropout keep in place.",
        needs=(_TAGS,),
        least=0,
    )
    caption_dropout: float = flag(
        0.0,
        "Caption dropout rate; dropped captions train the unconditional side of guidance.",
        least=0,
        most=1,
    )
    max_token_length: int = _run_flag(
        TOKENS_PER_CHUNK,
        "Maximum number of caption tokens: 75, or more in chunks of 75 (150, 225, ...) as in web "
        "UIs; 0: no limit. Applies to samples and generate too.",
    )
    clip_skip: int = _run_flag(
        0,
        "Number of last text-encoder layers to skip, counted as in Diffusers: with Stable "
        "Diffusion 1 and 2, clip_skip 1 is Clip skip 2 of web UIs and sd-scripts; with SDXL, which "
        "already uses the penultimate layer, their Clip skip 2 is 0 here. Applies to samples and "
        "generate too.",
        least=0,
    )
    cache_latents: bool = _run_flag(
        True,
        "Cache latents of up to 8 crops of each image; off: encode a new random crop in every "
        "step.",
    )
    dataloader_num_workers: int = _run_flag(
        0,
        "Data-loader workers; 0 loads in the main process.",
        needs=(Need("cache_latents", (False,)),),
        resume="ignored",
        least=0,
    )
