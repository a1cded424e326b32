"""Prior preservation, against language drift: with class images, without, and outside of masks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from dora_diffusion.config.features.feature import Excluded, Feature
from dora_diffusion.config.fields import AnyOf, Need, TextOrPath, flag

PRIOR = Need("with_prior_preservation")


def prior_mode(config: Any) -> str:
    """Return the mode of prior preservation; Diffusers' settings of class images select images."""
    has_class_images = config.class_data_dir or config.class_prompt
    return config.prior_preservation_mode or ("images" if has_class_images else "image-free")


def _class_images(config: Any) -> str | None:
    """Class images (`--prior_preservation_mode images`)."""
    is_image_free = prior_mode(config) == "image-free"
    return "prior_preservation_mode is image-free" if is_image_free else None


def has_class_images(subject: Any) -> bool:
    """Return whether a subject trains on images of its class, too."""
    return _has(subject, "images")


def is_image_free(subject: Any) -> bool:
    """Return whether predictions for the class of a subject are kept at the base model's."""
    return _has(subject, "image-free")


def _has(subject: Any, mode: str) -> bool:
    return PRIOR(subject) is None and subject.has_photos and prior_mode(subject) == mode


class ClassImagesFeature(Feature):
    """Prior preservation with images of the class."""

    on = PRIOR

    def is_on(self, config: Any) -> bool:
        return any(map(has_class_images, config.subjects))

    def defaults(self, config: Any) -> Mapping[str, Any]:
        folder = str(Path(config.output_dir) / "class_images")
        return {} if config.dataset_config else {"class_data_dir": folder}


class ImageFreeFeature(Feature):
    """Prior preservation without images."""

    on, code = PRIOR, "prior:ImageFreeCode"
    excludes: ClassVar = (
        Excluded("sharding", "needs with_prior_preservation without images for all subjects or for "
                 "none", when=lambda config: not all(map(is_image_free, config.subjects))),
    )  # fmt: skip

    def is_on(self, config: Any) -> bool:
        return any(map(is_image_free, config.subjects))


class UnmaskedFeature(Feature):
    """The prediction outside of masks is kept at the base model's."""

    on, code = Need("unmasked_prior"), "prior:UnmaskedCode"
    excludes: ClassVar = (
        Excluded("sharding", "excludes unmasked_prior: processes would call the base model a "
                 "different number of times"),
    )  # fmt: skip


_CLASS_IMAGES = (PRIOR, _class_images)


# A setting that has one value for the run, and an effect without photos too.
_run_flag = partial(flag, of_photos=False, of_subject=False)


@dataclass(frozen=True, kw_only=True)
class PriorSettings:
    """Prior preservation."""

    heading: ClassVar = "Data"
    common: ClassVar = {"of_photos": True, "of_subject": True}
    belongs_to: ClassVar[Feature] = ClassImagesFeature()

    with_prior_preservation: bool = flag(
        False,
        "Prior preservation, against language drift: the rest of the class is unchanged.",
        costs=True,
    )
    prior_preservation_mode: str | None = flag(
        None,
        "Mode of prior preservation. image-free: keep the adapted model's prediction for the class "
        "caption at the base model's. images: also train on class images; missing ones are "
        "generated before the first step.",
        derived="image-free; images if class_data_dir or class_prompt is given",
        choices=("images", "image-free"),
        costs=True,
        needs=(PRIOR,),
    )
    class_data_dir: TextOrPath[str | None] = flag(
        None,
        "Folder of class images, or of kohya's '1_dog' folders. Missing images are generated: in a "
        "new folder, or if it has images of yours, in OUTPUT_DIR/class_images.",
        derived="OUTPUT_DIR/class_images",
        resume="ignored",  # its images are compared by content
        needs=_CLASS_IMAGES,
        is_path=True,
    )
    class_prompt: str | None = flag(
        None,
        "Caption of class images without a .txt file.",
        derived="the name of kohya's folder, or each image's caption without the token",
        needs=_CLASS_IMAGES,
    )
    num_class_images: int = flag(
        100, "Number of class images.", needs=_CLASS_IMAGES, above=0, of_photos=False
    )
    prior_loss_weight: float = _run_flag(
        1.0, "Weight of the prior-preservation loss.", needs=(PRIOR,), least=0
    )
    sample_batch_size: int = _run_flag(
        4,
        "Batch size for generating class images and samples.",
        needs=(AnyOf((PRIOR, Need("num_validation_images"))),),
        resume="ignored",
        above=0,
    )


@dataclass(frozen=True, kw_only=True)
class ImageFreeSettings:
    """Prior preservation without images, which has no settings of its own."""

    heading: ClassVar = "Data"
    belongs_to: ClassVar[Feature] = ImageFreeFeature()


@dataclass(frozen=True, kw_only=True)
class UnmaskedSettings:
    """Prior preservation outside of masks."""

    heading: ClassVar = "Data"
    belongs_to: ClassVar[Feature] = UnmaskedFeature()

    unmasked_prior: float = flag(
        0.0,
        "Prior preservation outside of masks: weight of a loss there, whose target is the base "
        "model's prediction for the same caption. 0 trains nothing outside of masks.",
        needs=(Need("masked_loss"),),
        least=0,
        of_photos=True,
        costs=True,
        after="masked_loss",
    )
