"""Training of a slider: its images and its term of the loss."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from dora_diffusion.config import ConfigError, TrainConfig
from dora_diffusion.config.features.slider import pairs_of
from dora_diffusion.config.wording import quoted
from dora_diffusion.data.dataset import SampleTransform, SubjectPhotos
from dora_diffusion.data.photos import Photo
from dora_diffusion.models.components import Components
from dora_diffusion.models.offload import on_device
from dora_diffusion.models.text import encode_prompts
from dora_diffusion.training.batch import Batch
from dora_diffusion.training.features.code import FeatureCode
from dora_diffusion.training.inputs.subject import Subject
from dora_diffusion.training.prediction import Ask
from dora_diffusion.training.terms import Losses, RowLoss, Term


class SliderCode(FeatureCode):
    """A slider in a run."""

    def images(
        self, subject: Subject, components: Components, make: Callable[..., list[Photo]]
    ) -> SubjectPhotos:
        """Generate the images of prompts, captioned with their target, and of anchors.

        Images of the positive and negative prompts are similar to the noisy inputs of sampling with
        the slider.
        """
        config = replace(subject.settings, class_data_dir=None, class_prompt=None)
        _check_ends(components, config)
        targets, pairs = {target: target for target in config.target}, pairs_of(config)
        for target, ends in pairs:
            targets = dict.fromkeys(ends, target) | targets
        images = make(replace(subject, settings=config), components, [*targets, *config.anchors])
        return SubjectPhotos(
            [
                replace(image, caption=targets.get(image.caption, config.target[0]))
                for image in images
                if image.caption not in config.anchors
            ],
            SampleTransform(
                config.resolution or components.default_resolution,
                seed=config.seed,
                multiple=components.size_step,
            ),
            [image for image in images if image.caption in config.anchors],
            more_captions=tuple(chain.from_iterable(ends for _, ends in pairs)),
        )

    def terms(self, loss: RowLoss) -> Sequence[Term]:
        pairs = defaultdict[str, list[tuple[str, str]]](list)
        for target, ends in pairs_of(self.config):
            pairs[target].append(ends)
        return [Slider(loss, pairs, self.config.slider_guidance)]


@torch.no_grad()
def _check_ends(components: Components, config: TrainConfig) -> None:
    """Check that the prompts of a slider have different encodings, as beyond the token limit."""
    with on_device(components.device, *components.text_encoders):
        for _, ends in pairs_of(config):
            states = encode_prompts(components, ends).encoder_hidden_states
            if torch.allclose(*states):
                limit = components.code.token_limit(components)
                raise ConfigError(
                    f"{components.name} encodes {quoted(ends[0])} and {quoted(ends[1])} alike, as "
                    f"it reads {limit}; use prompts that differ earlier",
                    "negative",
                )


@dataclass(frozen=True)
class Slider:
    """Loss of a slider (`slider_target`). Class images are trained towards the base's predictions.

    Attributes:
        loss: Loss of each row.
        pairs: Positive and negative prompts by target prompt. A row draws one of the pairs.
        guidance: Factor of the difference between positive and negative prediction.
    """

    loss: RowLoss
    pairs: Mapping[str, Sequence[tuple[str, str]]]
    guidance: float

    def asks(self, batch: Batch) -> list[Ask]:
        pairs = [self.pairs[caption] for caption in batch.captions[: batch.photos]]
        rows = zip(pairs, batch.generators, strict=False)
        ends = [of_row[int(torch.randint(len(of_row), (), generator=g))] for of_row, g in rows]
        positive, negative = (dict(enumerate(side)) for side in zip(*ends, strict=True))
        return [
            Ask(batch.captions),
            Ask(batch.captions, of_base=True),
            Ask.by_row(batch, positive, of_base=True),
            Ask.by_row(batch, negative, of_base=True),
        ]

    def losses(self, batch: Batch, *predictions: Tensor) -> Losses:
        predicted, base, positive, negative = predictions
        target = slider_target(base, positive, negative, self.guidance)
        return Losses(self.loss(batch, predicted, target))


def slider_target(base: Tensor, positive: Tensor, negative: Tensor, guidance: float) -> Tensor:
    """Return the target of a slider: the base's prediction plus the difference of two prompts.

    Gandikota et al., arXiv:2311.12092, equation 8, for any prediction type.

    Args:
        base: Predictions of the base model, ``(B, C, h, w)``.
        positive: Predictions for the first n inputs with the positive prompt, ``(n, C, h, w)``.
        negative: Predictions for the first n inputs with the negative prompt, ``(n, C, h, w)``.
        guidance: Factor of the difference.

    Returns:
        ``(B, C, h, w)``, float32. Rows after the first n equal the base's predictions.
    """
    target, count = base.float(), len(positive)
    moved = target[:count] + guidance * (positive.float() - negative.float())
    return torch.cat([moved, target[count:]])
