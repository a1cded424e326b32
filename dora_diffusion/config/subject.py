"""Settings of what is trained on: base model, subject, images, prior."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from dora_diffusion.config.base import (
    BASE_HELP,
    OfModel,
    quantize_convolutions_flag,
    quantize_flag,
    vae_tile_size_flag,
)
from dora_diffusion.config.families import PREDICTION_TYPES
from dora_diffusion.config.fields import TOKENS_PER_CHUNK, AnyOf, Need, flag

TAUGHT = ("subject", "slider")
SLIDER_STRENGTHS = (-3.0, -1.5, 0.0, 1.5, 3.0)
"""Strengths of a slider's sample images."""
PRIOR_MODES = ("images", "image-free")
INPAINTING_MASKS = ("random", "subject")

_PRIOR = Need("with_prior_preservation")

Entry = dict[str, Any]
"""Settings of one subject, by name; the run's are its defaults."""


def _class_images(config: Any) -> str | None:
    """Class images (`--prior_preservation_mode images`)."""
    is_image_free = config.prior_mode == "image-free"
    return "prior_preservation_mode is image-free" if is_image_free else None


def _num_class_images(config: Any) -> str | None:
    """`--teach slider`, or class images (`--prior_preservation_mode images`)."""
    if config.teach == "slider":
        return None
    return next((reason for need in _CLASS_IMAGES if (reason := need(config))), None)


def prior_or_slider(config: Any) -> str | None:
    """`--with_prior_preservation` or `--teach slider`."""
    return None if config.teach == "slider" else _PRIOR(config)


def _prior_or_anchors(config: Any) -> str | None:
    """`--with_prior_preservation` or a slider's `--anchors`."""
    return Need("anchors")(config) if config.teach == "slider" else _PRIOR(config)


def _of_images(config: Any) -> str | None:
    return "teach is slider, which has no images" if config.teach == "slider" else None


_SLIDER = Need("teach", ("slider",))
_TAGS = AnyOf((Need("shuffle_tags"), Need("tag_dropout")))
_CLASS_IMAGES = (_PRIOR, _class_images)
_BUCKETS = Need("aspect_ratio_buckets")


def _base(kind: Literal["files", "hub", "file"]) -> tuple[OfModel, ...]:
    return (OfModel("pretrained_model_name_or_path", "base model", kind),)


@dataclass(frozen=True)
class ModelSettings:
    """Base model."""

    heading: ClassVar = "Model"

    pretrained_model_name_or_path: str = flag(
        "embedded:tiny-sd",
        BASE_HELP,
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
        needs=_base("file"),
        is_path=True,
    )
    revision: str | None = flag(
        None,
        "Branch, tag or commit of a base model on the hub.",
        derived="main",
        needs=_base("hub"),
    )
    variant: str | None = flag(
        None, "Variant of the weight files, such as fp16.", needs=_base("files")
    )
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
    quantize: str = quantize_flag()
    quantize_convolutions: bool = quantize_convolutions_flag()
    vae_tile_size: int | None = vae_tile_size_flag()


@dataclass(frozen=True)
class SubjectSettings:
    """Subjects and captions."""

    heading: ClassVar = "Subject"

    dataset_config: list[Entry] = flag(
        [],
        "Several subjects in one run: a YAML file with a list of subjects, each with its folder, "
        "token, class word and any other setting of images, captions and prior. sd-scripts' "
        "dataset file and a folder of "
        "kohya's '10_sks dog' folders are read as such a list.",
        derived="one subject, of these settings",
        resume="ignored",  # its entries are compared
        is_path=True,
    )
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
    repeats: int = flag(
        1, "How many times each image is seen in an epoch, cropped again each time.", above=0
    )
    weight: float = flag(
        1.0,
        "Factor of each image's loss; a file NAME.weight next to an image contains its own, "
        "which multiplies it. The prior's loss keeps its weight.",
        above=0,
    )


_WORDS = Need("train_text_encoder_ti")


def _embedding_rate(config: Any) -> str | None:
    """A rate above 0, and another optimizer than Prodigy."""
    if config.is_prodigy:
        return f"optimizer is {config.optimizer_name}"
    return "it is 0: no new word is trained" if config.embedding_lr == 0 else None


@dataclass(frozen=True)
class WordSettings:
    """Words that the base model does not have."""

    heading: ClassVar = "Subject"

    train_text_encoder_ti: bool = flag(
        False,
        "Train the vectors of new words in every text encoder (textual inversion), with all "
        "else that trains (pivotal tuning).",
    )
    new_words: list[str] = flag(
        [], "New words, each in captions or prompts.", derived="the token", needs=(_WORDS,)
    )
    num_new_tokens_per_abstraction: int = flag(
        2, "Vectors of each new word in each text encoder.", needs=(_WORDS,), above=0
    )
    initializer_concept: list[str] = flag(
        [],
        "What new words start from: a word of the model, such as the class, for all of them or "
        "one for each. Its own vectors where there are as many, else their mean.",
        derived="random vectors",
        needs=(_WORDS,),
    )
    embedding_lr: float = flag(
        3e-4,
        "Learning rate of new words' vectors.",
        resume="free",
        needs=(_WORDS, _embedding_rate),
        least=0,
    )
    train_text_encoder_ti_frac: float = flag(
        1.0,
        "Share of the steps after which new words stay as they are.",
        resume="free",
        needs=(_WORDS,),
        above=0,
        most=1,
    )


@dataclass(frozen=True)
class SliderSettings:
    """A slider from words alone."""

    heading: ClassVar = "Slider"

    teach: str = flag(
        "subject",
        "What to teach. subject: what images show, a subject or a style. slider: the difference "
        "of two prompts, for strengths of -3 to 3 (concept sliders, arXiv:2311.12092; LECO). It "
        "has no images of yours; settings of photos, captions and held-out photos have no effect.",
        choices=TAUGHT,
    )
    target: list[str] = flag(
        [],
        'What the slider changes: a prompt for all pairs, or one for each: "a photo of a mug".',
        derived="none, required by --teach slider",
        needs=(_SLIDER,),
    )
    positive: list[str] = flag(
        [],
        'The end at strength 3: a prompt for each pair, as "a photo of a large mug".',
        derived="none, required by --teach slider",
        needs=(_SLIDER,),
    )
    negative: list[str] = flag(
        [],
        "The end at strength -3: a prompt for each pair, in the order of --positive.",
        derived="none, required by --teach slider",
        needs=(_SLIDER,),
    )
    anchors: list[str] = flag(
        [],
        "Prompts that must not move: the adapted model's prediction for them is held at the base "
        "model's, by prior_loss_weight.",
        needs=(_SLIDER,),
    )
    slider_guidance: float = flag(
        0.3,
        "How far strength 1 moves: the factor of the difference of the two predictions.",
        needs=(_SLIDER,),
        above=0,
    )


@dataclass(frozen=True)
class ImageSettings:
    """Reading of images and captions."""

    heading: ClassVar = "Data"

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
    min_bucket_reso: int | None = flag(
        None,
        "Shortest side of buckets in pixels.",
        derived="half of the longest",
        needs=(_BUCKETS,),
        above=0,
    )
    max_bucket_reso: int | None = flag(
        None,
        "Longest side of buckets in pixels; their area is at most that of the resolution.",
        derived="1.41 times the resolution",
        needs=(_BUCKETS,),
        above=0,
    )
    bucket_reso_steps: int | None = flag(
        None,
        "Sides of buckets are multiples of it.",
        derived="what the base model needs: 64, or 32 for SDXL",
        needs=(_BUCKETS,),
        above=0,
    )
    masked_loss: bool = flag(
        False,
        "Masked loss: only where NAME.mask.png next to an image, or its alpha channel, is bright.",
    )
    unmasked_prior: float = flag(
        0.0,
        "Prior preservation outside of masks: weight of the mean error there, whose target is the "
        "base model's prediction for the same caption. 0 leaves it free.",
        needs=(Need("masked_loss"),),
        least=0,
    )
    inpainting_mask: str | None = flag(
        None,
        "What an inpainting base model learns to fill. random: rectangles, ellipses and whole "
        "images. subject: where NAME.mask.png next to an image, or its alpha channel, is bright; "
        "random where there is neither.",
        derived="random",
        choices=INPAINTING_MASKS,
    )
    caption_per_line: bool = flag(
        False,
        "Each line of a .txt is a caption of its own, of which every epoch draws one; off joins "
        "them to one caption.",
    )
    caption_prefix: str = flag(
        "", 'In front of every caption, such as "sks dog,": neither shuffled nor dropped.'
    )
    caption_suffix: str = flag("", "After every caption: neither shuffled nor dropped.")
    wildcards: bool = flag(
        False,
        "Draw {a|b} and __file__ of captions again in every epoch, of sample prompts for every "
        "seed; \\{ is a brace.",
    )
    wildcard_dir: str | None = flag(
        None,
        "Folder of wildcard files: __colours__ is a line of its colours.txt.",
        resume="ignored",  # its lines are compared by content
        needs=(Need("wildcards"),),
        is_path=True,
    )
    shuffle_tags: bool = flag(False, "Shuffle the tags of captions.")
    tag_dropout: float = flag(
        0.0, "Tag dropout rate: leave out each tag with this probability.", least=0, most=1
    )
    keep_tags: int = flag(
        1,
        "Tags at a caption's start that --shuffle_tags and --tag_dropout leave in place.",
        needs=(_TAGS,),
        least=0,
    )
    caption_separator: str = flag(
        ",", "What separates tags, and joins them again with a space behind it.", needs=(_TAGS,)
    )
    caption_dropout: float = flag(
        0.0,
        "Caption dropout rate; dropped captions train the unconditional side of guidance.",
        least=0,
        most=1,
    )
    max_token_length: int = flag(
        TOKENS_PER_CHUNK,
        "Tokens to read of a caption: 75, or 150, 225 and so on in chunks of 75, as web UIs "
        "read prompts; 0 reads all. Samples and generate do the same.",
    )
    clip_skip: int = flag(
        0,
        "Last layers of the text encoders to leave out, as Diffusers counts: with Stable Diffusion "
        "1 and 2, clip_skip 1 is Clip skip 2 of web UIs and sd-scripts; with SDXL, which reads the "
        "penultimate layer already, their Clip skip 2 is 0 here. Samples and generate do the same.",
        least=0,
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
    """Prior preservation."""

    heading: ClassVar = "Data"

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
        "Folder of class images, or of kohya's '1_dog' folders of them; missing ones are "
        "generated.",
        derived="OUTPUT_DIR/class_images",
        resume="ignored",  # its images are compared by content
        needs=_CLASS_IMAGES,
        is_path=True,
    )
    class_prompt: str | None = flag(
        None,
        "Caption of class images without a .txt; wildcards give them several.",
        derived="the name of kohya's folder, or each image's caption with the token taken out",
        needs=_CLASS_IMAGES,
    )
    num_class_images: int = flag(
        100,
        "Number of class images; of a slider, of the images that the base model makes of its "
        "prompts.",
        needs=(_num_class_images,),
        above=0,
    )
    prior_loss_weight: float = flag(
        1.0,
        "Weight of the prior-preservation loss, and of what holds a slider's anchors.",
        needs=(_prior_or_anchors,),
        least=0,
    )
    sample_batch_size: int = flag(
        4,
        "Batch size for generating class images and samples.",
        needs=(AnyOf((prior_or_slider, Need("num_validation_images"))),),
        resume="ignored",
        above=0,
    )


# Of groups whose other settings a subject may have for itself, those that are the whole run's.
_WHOLE_RUN = frozenset((
    "dataset_config", "cache_latents", "dataloader_num_workers", "prior_loss_weight",
    "unmasked_prior",
    "sample_batch_size", "max_token_length", "clip_skip",
))  # fmt: skip

# Of groups of settings of images, those that a slider has too.
_OF_SLIDERS = frozenset((
    "resolution", "max_token_length", "clip_skip", "cache_latents", "dataloader_num_workers",
    "wildcards", "wildcard_dir", "num_class_images", "prior_loss_weight", "sample_batch_size",
))  # fmt: skip
OF_IMAGES = {
    name: _of_images
    for name in (
        *(
            source.name
            for group in (SubjectSettings, WordSettings, ImageSettings, PriorSettings)
            for source in fields(group)
        ),
        "validation_data_dir",
        "validation_split",
    )
    if name not in _OF_SLIDERS
}
"""The condition of settings that have no effect on a slider, by their names."""

ENTRY_SETTINGS = (
    *(
        source.name
        for group in (SubjectSettings, ImageSettings, PriorSettings)
        for source in fields(group)
        if source.name not in _WHOLE_RUN
    ),
    "validation_data_dir",
    "validation_split",
)
"""The settings that an entry of a dataset file may have."""
