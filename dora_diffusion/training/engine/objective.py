"""Inputs of a step and its loss, of the batches of one run or of several.

Drawn by their place in the run: latents, noise and timesteps (`draw_inputs`). Captions become
conditioning (`Conditioner`). Predictions of one pass of the model become the loss (`Objective`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dora_diffusion.config import TrainConfig
from dora_diffusion.data.crops import latent_mask
from dora_diffusion.data.dataset import Batch
from dora_diffusion.data.sampler import generator_for
from dora_diffusion.models.components import Components
from dora_diffusion.models.latents import (
    condition_from_moments,
    encode_inputs,
    latents_from_moments,
    predict,
)
from dora_diffusion.models.offload import on_device, send
from dora_diffusion.models.text import (
    Conditioning,
    encode_prompts,
    encode_unconditional,
    time_ids,
)
from dora_diffusion.models.words import has_words
from dora_diffusion.numerics.loss import (
    add_noise,
    denoising_loss,
    loss_weight,
    sample_noise,
    sample_timestep,
    slider_target,
    split_prior,
    timestep_quantile,
    training_target,
)

# A third of a megabyte each for SDXL in half precision.
KNOWN_CAPTIONS = 256


@dataclass(frozen=True)
class StepInputs:
    """A batch with everything drawn, on the training device.

    Attributes:
        latents: ``(B, C, h, w)``, scaled.
        noise: ``(B, C, h, w)``.
        timesteps: ``(B,)`` int64.
        captions: B prompts.
        time_ids: ``(B, 6)`` where the family has them.
        photos: How many of the rows are photos; these come first, then class images.
        class_captions: Of each photo its caption without the subject, for the image-free prior,
            or None where that does not hold it; empty where it holds none.
        mask: ``(B, 1, h, w)`` in [0, 1], where to learn; None means everywhere.
        condition: ``(B, n, h, w)``, what the UNet reads beside the noisy latents; None if nothing.
        weights: ``(photos,)``, the factor of each photo's loss; None where all are 1.
        unmasked: The rows that are held at the base's prediction where their mask leaves out.
        ends: Of each photo of a slider the prompts of both ends, the positive one first.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    captions: list[str]
    time_ids: Tensor | None
    photos: int
    class_captions: Sequence[str | None] = ()
    mask: Tensor | None = None
    condition: Tensor | None = None
    weights: Tensor | None = None
    unmasked: Sequence[int] = ()
    ends: Sequence[tuple[str, str]] = ()

    def part(self, captions: Mapping[int, str]) -> tuple[StepInputs, slice | Tensor]:
        """Some rows with these captions, for predictions alone, and which rows they are."""
        rows: slice | Tensor = slice(None)
        if len(captions) < len(self.captions):
            rows = send(torch.tensor(list(captions)), self.latents.device)
        ids, condition = (p if p is None else p[rows] for p in (self.time_ids, self.condition))
        drawn = (self.latents[rows], self.noise[rows], self.timesteps[rows])
        count, texts = len(captions), list(captions.values())
        return StepInputs(*drawn, texts, ids, count, condition=condition), rows

    @classmethod
    def cat(cls, parts: Sequence[StepInputs]) -> StepInputs:
        """The rows of several inputs of one size, for one prediction of all; no loss is in them."""
        if len(parts) == 1:
            return parts[0]

        def joined(name: str) -> Any:
            values = [getattr(part, name) for part in parts]
            return None if values[0] is None else torch.cat(values)

        names = ("latents", "noise", "timesteps", "time_ids", "condition")
        captions = [caption for part in parts for caption in part.captions]
        return cls(captions=captions, photos=0, **{name: joined(name) for name in names})


@dataclass(frozen=True)
class InputSource:
    """Source of a run's inputs: the next of ``batches``, with what is drawn for it."""

    config: TrainConfig
    components: Components
    batches: Iterator[Batch]
    process_index: int

    def __call__(self, micro_step: int) -> StepInputs:
        """The inputs of batch number ``micro_step`` since the start of the run."""
        batch = next(self.batches)
        photos = len(batch) - int(batch.is_prior.sum())
        first_row = self.process_index * photos
        return draw_inputs(self.components, batch, self.config, micro_step, first_row)


def draw_inputs(
    components: Components,
    batch: Batch,
    config: TrainConfig,
    micro_step: int,
    first_row: int,
) -> StepInputs:
    """Draw the latents, noise and timesteps of a batch.

    Each row draws from a generator of its own, named by its place in the run. So the draws depend
    neither on how many processes share a batch nor on whether the run was interrupted.

    Args:
        components: The model.
        batch: Photos first, then the class images of those that have one.
        config: The run's seed, and how noise and timesteps are drawn.
        micro_step: Number of the batch since the start of the run.
        first_row: Place of this process's first photo in the global batch.
    """
    device, photos = components.device, int((~batch.is_prior).sum())
    vae, family = components.vae, components.family
    # A class image has its photo's number.
    rows_drawn = [*((row, False) for row in range(photos)), *((r, True) for r in batch.partners)]
    places = [(first_row + row, prior) for row, prior in rows_drawn]
    generators = [generator_for("draw", config.seed, micro_step, *place) for place in places]
    # Cached moments are on the CPU: there everything is drawn, and sent without waiting.
    moments = batch.moments
    if moments is None:
        assert batch.pixels is not None
        with torch.no_grad():
            moments = encode_inputs(vae, family, batch.pixels)
    rows = moments.to(torch.float32).split(1)
    latents = torch.cat(
        [latents_from_moments(vae, *pair) for pair in zip(rows, generators, strict=True)]
    )
    steps = components.scheduler.config.num_train_timesteps
    timesteps = _draw_timesteps(config, steps, generators)
    noise = _draw_noise(config, latents, generators)
    mask, unmasked = None, list[int]()
    if batch.mask is not None:
        mask = latent_mask(batch.mask, latents.shape[2:])
        if config.unmasked_prior:
            unmasked = (mask < 1).flatten(1).any(dim=1).nonzero().flatten().tolist()
    ids = time_ids(family, batch.crops)
    drawn = (condition_from_moments(vae, family, *p) for p in zip(rows, generators, strict=True))
    conditions = [condition for condition in drawn if condition is not None]

    def sent(tensor: Tensor | None) -> Any:
        return None if tensor is None else send(tensor, device)

    return StepInputs(
        sent(latents), sent(noise), sent(timesteps), batch.captions, sent(ids), photos,
        batch.class_captions, sent(mask), sent(torch.cat(conditions) if conditions else None),
        sent(batch.weights), unmasked, _draw_ends(config, batch.captions[:photos], generators),
    )  # fmt: skip


def _draw_timesteps(
    config: TrainConfig, steps: int, generators: Sequence[torch.Generator]
) -> Tensor:
    quantile = None
    if config.timestep_distribution != "uniform":
        quantile = partial(
            timestep_quantile,
            distribution=config.timestep_distribution,
            mean=config.logit_mean,
            std=config.logit_std,
            power=config.timestep_power,
        )
    return torch.stack([sample_timestep(steps, generator, quantile) for generator in generators])


def _draw_noise(
    config: TrainConfig, latents: Tensor, generators: Sequence[torch.Generator]
) -> Tensor:
    shape = (latents.shape[1], latents.shape[2], latents.shape[3])
    return torch.stack([sample_noise(shape, drawn, config.noise_offset) for drawn in generators])


def _draw_ends(
    config: TrainConfig, targets: Sequence[str], generators: Sequence[torch.Generator]
) -> list[tuple[str, str]]:
    """Draw one of the pairs of each target; none where no slider is taught."""
    drawn = []
    for target, generator in zip(targets if config.is_slider else (), generators, strict=False):
        pairs = [ends for prompt, ends in config.slider_pairs if prompt == target]
        drawn.append(pairs[int(torch.randint(len(pairs), (), generator=generator))])
    return drawn


class Conditioner:
    """Captions to conditioning: encoded once each, unless the text encoders or new words train.

    The empty caption is the dropped one. It becomes what the pipeline's guidance uses where no
    negative prompt is given, so that caption dropout trains what is sampled: zeros where the
    pipeline says ``force_zeros_for_empty_prompt`` (SDXL), else the encoded empty prompt.
    """

    def __init__(self, components: Components, trains: bool) -> None:
        self.components = components
        self.trains = trains
        self.has_words = lru_cache(KNOWN_CAPTIONS)(partial(has_words, components))
        self._known: dict[str, Conditioning] = {}

    def __call__(self, captions: Sequence[str]) -> Conditioning:
        """Conditioning of B captions."""
        fresh = [caption for caption in captions if self.trains or self.has_words(caption)]
        if len(fresh) == len(captions):
            return self._encode(captions)
        encoded = {caption: self._encoded(caption) for caption in captions if caption not in fresh}
        while len(self._known) > KNOWN_CAPTIONS:  # Shuffled tags hardly ever recur.
            del self._known[next(iter(self._known))]
        if fresh:
            rows = self._encode(fresh)
            encoded |= {caption: rows[row] for row, caption in enumerate(fresh)}
        return Conditioning.cat([encoded[caption] for caption in captions])

    def keep(self, captions: Collection[str]) -> bool:
        """Encode captions now, so that no later call with them does.

        Returns:
            Whether that holds: not if the text encoders train, or a new word in a caption, or
            captions are too many to keep.
        """
        if self.trains or len(captions) > KNOWN_CAPTIONS or any(map(self.has_words, captions)):
            return False
        for caption in captions:
            self._encoded(caption)
        return True

    def _encoded(self, caption: str) -> Conditioning:
        if caption not in self._known:
            components = self.components
            with torch.no_grad(), on_device(components.device, *components.text_encoders):
                self._known[caption] = self._encode([caption])
        return self._known[caption]

    def _encode(self, captions: Sequence[str]) -> Conditioning:
        components = self.components
        encoded = encode_prompts(components, captions)
        if all(captions):
            return encoded
        if not components.zeros_for_empty_prompt:
            if not components.clip_skip:
                return encoded
            empty = encode_unconditional(components)
            return Conditioning.cat([encoded[k] if c else empty for k, c in enumerate(captions)])
        device = encoded.encoder_hidden_states.device
        dropped = send(torch.tensor([not caption for caption in captions]), device)
        hidden = encoded.encoder_hidden_states.masked_fill(dropped.view(-1, 1, 1), 0)
        pooled = encoded.pooled
        return Conditioning(
            hidden, None if pooled is None else pooled.masked_fill(dropped.view(-1, 1), 0)
        )


Base = Callable[[], AbstractContextManager[object]]


class PriorPrediction(NamedTuple):
    """Predictions that are held at those of the untrained model.

    Attributes:
        rows: The rows that they belong to.
        model_pred: ``(rows, C, h, w)``.
        target: Those of the untrained model.
    """

    rows: slice | Tensor
    model_pred: Tensor
    target: Tensor


@dataclass(frozen=True)
class Objective:
    """Parts of a run's loss.

    Attributes:
        components: The model.
        condition: Encodes captions.
        alphas_cumprod: Of the noise schedule, on the model's device.
        base_weights: The model is its base inside of this.
        weightings: Of the loss by timestep, as in `loss_weight`.
        unmasked_prior: Weight of the loss outside of masks.
        huber_delta: Timesteps and ``alpha_bar`` to delta of the Huber loss; None: squared errors.
        words: Vectors of new words that train, in the text encoders.
        slider_guidance: See `slider_target`.
    """

    components: Components
    condition: Conditioner
    alphas_cumprod: Tensor
    base_weights: Base
    weightings: Mapping[str, float]
    unmasked_prior: float = 0.0
    huber_delta: Callable[[Tensor, Tensor], Tensor] | None = None
    words: Sequence[Tensor] = ()
    slider_guidance: float = 1.0

    def losses(
        self,
        inputs: StepInputs,
        alpha_bar: Tensor,
        model_pred: Tensor,
        held: PriorPrediction | None,
        unmasked: PriorPrediction | None = None,
        ends: Sequence[Tensor] = (),
    ) -> tuple[Tensor, Tensor]:
        """Loss of the subject and of the prior, both scalar, from predictions.

        Args:
            inputs: What they are of.
            alpha_bar: ``(B,)``, at the inputs' timesteps.
            model_pred: ``(B, C, h, w)``.
            held: Predictions for class captions, where an image-free prior is held.
            unmasked: Those of the rows whose mask leaves something out, to be held there.
            ends: Of a slider the base model's predictions: of all, and of the photos with the
                prompts of both ends.
        """
        kind = self.components.prediction_type
        weight = loss_weight(alpha_bar, kind, self.weightings)
        delta = None if self.huber_delta is None else self.huber_delta(inputs.timesteps, alpha_bar)

        def prior_of(part: PriorPrediction, mask: Tensor | None = None) -> Tensor:
            of_rows, its_delta = (v if v is None else v[part.rows] for v in (weight, delta))
            return denoising_loss(part.model_pred, part.target, of_rows, mask, its_delta)

        if ends:
            base, positive, negative = ends
            target = slider_target(base, positive, negative, self.slider_guidance)
        else:
            target = training_target(kind, inputs.latents, inputs.noise, alpha_bar)
        per_sample = denoising_loss(model_pred, target, weight, inputs.mask, delta)
        if unmasked is not None:
            assert inputs.mask is not None
            outside = torch.zeros_like(per_sample)
            outside[unmasked.rows] = prior_of(unmasked, 1 - inputs.mask[unmasked.rows])
            per_sample = per_sample + self.unmasked_prior * outside
        if held is not None:
            per_sample = torch.cat([per_sample, prior_of(held)])
        subject, prior = split_prior(per_sample, inputs.photos, inputs.weights)
        for vectors in self.words:  # Used by every batch, whatever its captions: a gradient of 0.
            subject = subject + 0 * vectors.sum()
        return subject, prior


class NoisyBatch(NamedTuple):
    """A batch of one run whose latents are noisy already.

    Attributes:
        objective: The run's.
        inputs: What it is of.
        alpha_bar: ``(B,)``, at its timesteps.
        latents: ``(B, C, h, w)``, noisy.
        rows: Those of a batch whose image-free prior is held; of the batch itself all.
    """

    objective: Objective
    inputs: StepInputs
    alpha_bar: Tensor
    latents: Tensor
    rows: slice | Tensor = slice(None)

    def class_batch(self) -> NoisyBatch | None:
        """The rows whose image-free prior is held, with class captions."""
        captions = enumerate(self.inputs.class_captions)
        return self._part({row: caption for row, caption in captions if caption is not None})

    def unmasked(self) -> NoisyBatch | None:
        """The rows whose mask leaves something out, with their own captions."""
        return self._part({row: self.inputs.captions[row] for row in self.inputs.unmasked})

    def _part(self, captions: Mapping[int, str]) -> NoisyBatch | None:
        if not captions:
            return None
        inputs, rows = self.inputs.part(captions)
        return self._replace(inputs=inputs, latents=self.latents[rows], rows=rows)

    def of_slider(self) -> list[NoisyBatch]:
        """Sources of a slider's target: all rows, and the photos with the prompts of both ends."""
        sides = [self._part(dict(enumerate(side))) for side in zip(*self.inputs.ends, strict=True)]
        return [self, *filter(None, sides)] if sides else []


def noisy_batches(
    objectives: Sequence[Objective], given: Sequence[StepInputs]
) -> tuple[list[NoisyBatch], list[NoisyBatch | None]]:
    """Batches of one size, one of each run, and of each the part whose image-free prior is held."""
    merged = StepInputs.cat(given)
    counts = [len(inputs.captions) for inputs in given]
    alpha_bar = objectives[0].alphas_cumprod[merged.timesteps]
    noisy = add_noise(merged.latents, merged.noise, alpha_bar).split(counts)
    each = zip(objectives, given, alpha_bar.split(counts), noisy, strict=True)
    own = [NoisyBatch(*parts) for parts in each]
    return own, [batch.class_batch() for batch in own]


def losses_of(
    own: Sequence[NoisyBatch], held: Sequence[NoisyBatch | None], base: Base
) -> list[tuple[Tensor, Tensor]]:
    """Losses of each run's subject and prior: one pass of the model, and one of its base.

    The model's rows are those of the batches, then those of the held ones; its base predicts what
    is held, with class captions or outside of masks.

    Args:
        own: A batch of each run.
        held: Of each the part whose image-free prior is held.
        base: The model has no adapter of any row inside of this.
    """
    class_batches = [part for part in held if part is not None]
    unmasked = [batch.unmasked() for batch in own]
    of_slider = [batch.of_slider() for batch in own]
    untrained = [*class_batches, *(part for part in unmasked if part is not None)]
    untrained += chain.from_iterable(of_slider)
    targets: Iterator[Tensor] = iter(())
    if untrained:
        with torch.no_grad(), base(), ExitStack() as stack:
            for batch, *parts in zip(own, held, unmasked, of_slider, strict=True):
                if any(parts):
                    stack.enter_context(batch.objective.base_weights())
            targets = iter(predictions_of(untrained))
    predictions = predictions_of([*own, *class_batches])
    class_predictions = iter(predictions[len(own) :])
    priors = [
        None if part is None else PriorPrediction(part.rows, next(class_predictions), next(targets))
        for part in held
    ]
    outsides = [
        None if part is None else PriorPrediction(part.rows, made[part.rows], next(targets))
        for part, made in zip(unmasked, predictions, strict=False)
    ]
    losses = []
    for number, batch in enumerate(own):
        ends = [next(targets) for _ in of_slider[number]]
        made = predictions[number], priors[number], outsides[number], ends
        losses.append(batch.objective.losses(batch.inputs, batch.alpha_bar, *made))
    return losses


def predictions_of(batches: Sequence[NoisyBatch]) -> Sequence[Tensor]:
    """The UNet's predictions ``(B, C, h, w)`` of each batch, from one pass of all."""
    first, every = batches[0].objective, [batch.inputs for batch in batches]
    if first.condition.trains:
        conditioning = first.condition([c for inputs in every for c in inputs.captions])
    else:
        # What each has cached.
        each = [batch.objective.condition(batch.inputs.captions) for batch in batches]
        conditioning = Conditioning.cat(each)
    merged = StepInputs.cat(every)
    made = predict(
        first.components.unet,
        torch.cat([batch.latents for batch in batches]),
        merged.timesteps,
        conditioning,
        merged.time_ids,
        merged.condition,
    )
    return made.split([len(inputs.captions) for inputs in every])
