"""Photos held out of a run: the validation loss on them, which step is best, and when to stop."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dora_diffusion.adapters.compiled import uncompiled
from dora_diffusion.config import TrainConfig
from dora_diffusion.data.captions import contains_token
from dora_diffusion.data.images import open_photo
from dora_diffusion.data.photos import Photo
from dora_diffusion.evaluation.denoising import NUM_SEEDS, HeldOutImages
from dora_diffusion.evaluation.measures import similarities
from dora_diffusion.models.components import Components
from dora_diffusion.models.metric_models import LITE, lite_is_installed, open_metric_model
from dora_diffusion.training.inputs.held_out import read_held_out
from dora_diffusion.training.inputs.subject import Subject
from dora_diffusion.training.processes import shards_model

if TYPE_CHECKING:
    from PIL.Image import Image

# Predictions at once: a forward pass of so many takes less memory than a training step of one.
_BATCH = 5


class Validation:
    """Validation loss of a run, measured and remembered, and the step that is best.

    It is what `dora-diffusion evaluate` measures as the denoising loss of these photos, at seeds 0
    to 3: of whole photos, at the model's own resolution, by their captions as they are, without the
    prior and without a weight. No random number is drawn from where training draws.

    Attributes:
        config: The settings.
        photos: What is held out.
        losses: Step -> validation loss, 0 being the base; infinite where it was not finite.
    """

    def __init__(
        self,
        config: TrainConfig,
        held_out: Sequence[tuple[Subject, Sequence[Path]]],
        components: Components,
        accelerator: Any,
    ) -> None:
        """Read the photos, and encode this process's share of them.

        Args:
            config: The settings as they are used.
            held_out: The held-out photos of each subject.
            components: The model; adapters may come onto it later.
            accelerator: What `make_accelerator` made. Each process measures a share.

        Raises:
            PhotoError: If no photo can be used.
            MetricModelError: If ``validation_metric_model`` cannot be opened.
        """
        by_token: dict[str, list[Photo]] = {}
        for subject, paths in held_out:
            photos = read_held_out(subject, paths) if paths else []
            by_token.setdefault(subject.token, []).extend(photos)
        self.photos = [photo for photos in by_token.values() for photo in photos]
        self.losses: dict[int, float] = {}
        self.config, self._accelerator = config, accelerator
        # Of a sharded model every process takes the whole loss, since all call it equally often.
        self._is_shared = accelerator.num_processes > 1 and not shards_model(accelerator)
        first, every = accelerator.process_index, accelerator.num_processes
        self._mine = slice(first, None, every) if self._is_shared else slice(None)
        share = self.photos[self._mine]
        images, captions = [open_photo(p.path) for p in share], [p.caption for p in share]
        self._images = HeldOutImages(components, images, captions)
        self._metric: Any = None
        name = config.validation_metric_model or (LITE if lite_is_installed() else "")
        every, last = config.validation_steps or 0, config.max_train_steps or 0
        is_sampled = config.num_validation_images and 0 < every < last
        if name and is_sampled and accelerator.is_main_process:
            # Networks are initialized at random before their weights are read.
            with torch.random.fork_rng(devices=[]):
                self._metric = open_metric_model(name)
            self._references = {
                token: self._metric.image_features([open_photo(photo.path) for photo in photos])
                for token, photos in by_token.items()
                if photos
            }

    def is_due(self, step: int) -> bool:
        """Return whether a step's loss is still to be taken; at the last step it always is."""
        is_last, every = step == self.config.max_train_steps, self.config.validation_loss_steps
        assert every is not None
        return step not in self.losses and (is_last or step % every == 0)

    def measure(self, step: int) -> float:
        """Measure the loss of the model as it is after a step. All processes call it."""
        values = torch.zeros(NUM_SEEDS, len(self.photos), dtype=torch.float64)
        # At another batch size and without gradients, each block would be compiled again.
        with uncompiled() if self.config.compile else nullcontext():
            if self._images.captions:
                taken = self._images.losses_by_seed(range(NUM_SEEDS), batch_size=_BATCH)
                values[:, self._mine] = torch.tensor(taken, dtype=values.dtype)
        if self._is_shared:
            sent = values.to(self._accelerator.device)
            values = self._accelerator.reduce(sent, reduction="sum").cpu()
        loss = float(values.mean())
        self.losses[step] = loss if math.isfinite(loss) else math.inf
        return self.losses[step]

    def similarity(self, samples: Sequence[tuple[str, Image]]) -> float | None:
        """Mean cosine of sample images to the held-out photos of their subject, None if unmeasured.

        Args:
            samples: Prompts and their images; those of prompts without the token do not count.
        """
        if self._metric is None:
            return None
        alike: list[float] = []
        for token, references in self._references.items():
            own = [image for p, image in samples if not token or contains_token(p, token)]
            if own:
                alike += similarities(self._metric.image_features(own), references)
        return sum(alike) / len(alike) if alike else None

    def best(self, among: Collection[int] | None = None) -> int | None:
        """The step of the lowest loss, the earliest of equal ones; None if none was taken.

        Args:
            among: Steps that can be returned to; None means all. The base never counts.
        """
        steps = [s for s in self.losses if s and (among is None or s in among)]
        return min(steps, key=lambda step: (self.losses[step], step), default=None)

    @property
    def is_exhausted(self) -> bool:
        """True if ``early_stopping_patience`` is at its end."""
        patience, best = self.config.early_stopping_patience, self.best()
        if patience is None or best is None:
            return False
        return sum(step > best for step in self.losses) >= patience

    def state_dict(self) -> dict[str, Any]:
        """The losses, and what they were taken on."""
        return {"photos": self._contents(), "losses": dict(self.losses)}

    def load_state_dict(self, state: Mapping[str, Any] | None, before: Mapping[str, Any]) -> bool:
        """Continue from the losses of a checkpoint.

        Args:
            state: What `state_dict` returned; None if that run held out nothing.
            before: That run's settings.

        Returns:
            Whether they are of these photos; else they are dropped.
        """
        if state is None:
            return True
        if state["photos"] != self._contents():
            return False
        # Without that run's last loss, where this one takes none: it stops where one of its own
        # length would.
        every, last = before["validation_loss_steps"], self.config.max_train_steps
        losses = state["losses"].items()
        self.losses = {step: loss for step, loss in losses if step % every == 0 or step == last}
        return True

    def _contents(self) -> list[list[str]]:
        return sorted([photo.digest, photo.caption] for photo in self.photos)
