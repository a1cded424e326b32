"""Validation on held-out photos: validation loss, best step and similarity of samples."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dora_diffusion.config import TrainConfig
from dora_diffusion.data.captions import contains_token
from dora_diffusion.data.images import open_photo
from dora_diffusion.data.photos import Photo, read_photos
from dora_diffusion.evaluation.denoising import NUM_SEEDS, HeldOutImages
from dora_diffusion.evaluation.measures import similarities
from dora_diffusion.models.components import Components
from dora_diffusion.models.metric_models import LITE, lite_is_installed, open_metric_model
from dora_diffusion.training.inputs.subject import Subject, caption_rules
from dora_diffusion.training.processes import shards_model

if TYPE_CHECKING:
    from PIL.Image import Image

# Batch size. A forward pass at this size needs less memory than a training step with one image.
_BATCH = 5


class Validation:
    """Validation losses of a run, with the best step.

    The validation loss equals the denoising loss that `dora-diffusion evaluate` measures on the
    same photos at seeds 0 to 3: on whole photos, at the default resolution of the model, with
    unchanged captions, without prior and loss weights. It uses none of training's random
    generators.

    Attributes:
        config: Settings.
        photos: Held-out photos.
        losses: Step -> validation loss, infinite if it was not finite. Step 0 is the base model.
    """

    def __init__(
        self,
        held_out: Sequence[tuple[Subject, Sequence[Path]]],
        config: TrainConfig,
        components: Components,
        accelerator: Any,
    ) -> None:
        """Read the photos and encode this process's share of them.

        Args:
            held_out: Held-out photos of each subject.
            config: Resolved settings.
            components: The model. Adapters may be attached later.
            accelerator: Devices and processes (`make_accelerator`). Each process measures a share.

        Raises:
            PhotoError: If no photo can be used.
            MetricModelError: If efficientnet-lite0 cannot be opened.
        """
        by_token: dict[str, list[Photo]] = {}
        for subject, paths in held_out:
            photos = read_held_out(subject, paths) if paths else []
            by_token.setdefault(subject.token, []).extend(photos)
        self.photos = [photo for photos in by_token.values() for photo in photos]
        self.losses: dict[int, float] = {}
        self.config, self._accelerator = config, accelerator
        # All processes must call a sharded model equally often: each measures the whole loss.
        self._is_shared = accelerator.num_processes > 1 and not shards_model(accelerator)
        first, every = accelerator.process_index, accelerator.num_processes
        self._mine = slice(first, None, every) if self._is_shared else slice(None)
        share = self.photos[self._mine]
        images, captions = [open_photo(p.path) for p in share], [p.caption for p in share]
        self._images = HeldOutImages(components, images, captions)
        self._metric: Any = None
        every, last = config.validation_steps or 0, config.max_train_steps or 0
        is_sampled = config.num_validation_images and 0 < every < last
        if lite_is_installed() and is_sampled and accelerator.is_main_process:
            # Networks are initialized at random before their weights are loaded.
            with torch.random.fork_rng(devices=[]):
                self._metric = open_metric_model(LITE)
            self._references = {
                token: self._metric.image_features([open_photo(photo.path) for photo in photos])
                for token, photos in by_token.items()
                if photos
            }

    @property
    def keeps_best(self) -> bool:
        """True if the best checkpoint is the result."""
        return self.config.keep_best

    def is_due(self, step: int) -> bool:
        """Return whether the loss of a step is due. It always is at the last step."""
        is_last, every = step == self.config.max_train_steps, self.config.validation_loss_steps
        assert every is not None
        return step not in self.losses and (is_last or step % every == 0)

    def measure(self, step: int) -> float:
        """Measure the validation loss after a step. All processes must call this method."""
        values = torch.zeros(NUM_SEEDS, len(self.photos), dtype=torch.float64)
        # Another batch size without gradients would recompile each block.
        with torch.compiler.set_stance("force_eager"):
            if self._images.captions:
                losses = self._images.losses_by_seed(range(NUM_SEEDS), batch_size=_BATCH)
                values[:, self._mine] = torch.tensor(losses, dtype=values.dtype)
        if self._is_shared:
            sent = values.to(self._accelerator.device)
            values = self._accelerator.reduce(sent, reduction="sum").cpu()
        loss = float(values.mean())
        self.losses[step] = loss if math.isfinite(loss) else math.inf
        return self.losses[step]

    def similarity(self, samples: Sequence[tuple[str, Image]]) -> float | None:
        """Return the mean cosine similarity of sample images to held-out photos, None if disabled.

        Args:
            samples: Prompts with their images. Prompts without a subject's token are ignored.
        """
        if self._metric is None:
            return None
        alike: list[float] = []
        for token, references in self._references.items():
            images = [image for p, image in samples if not token or contains_token(p, token)]
            if images:
                alike += similarities(self._metric.image_features(images), references)
        return sum(alike) / len(alike) if alike else None

    def best(self, among: Collection[int] | None = None) -> int | None:
        """Return the earliest step with the lowest loss; None if no loss was measured.

        Args:
            among: Candidate steps. Default: all steps. The base model is never a candidate.
        """
        steps = [s for s in self.losses if s and (among is None or s in among)]
        return min(steps, key=lambda step: (self.losses[step], step), default=None)

    def state_dict(self) -> dict[str, Any]:
        """Return the losses, with digests and captions of their photos."""
        return {"photos": self._contents(), "losses": dict(self.losses)}

    def load_state_dict(self, state: Mapping[str, Any] | None, before: Mapping[str, Any]) -> bool:
        """Restore the losses of a checkpoint.

        Args:
            state: Result of `state_dict`; None if the earlier run had no held-out photos.
            before: Settings of the earlier run.

        Returns:
            Whether the losses belong to these photos. Otherwise they are dropped.
        """
        if state is None:
            return True
        if state["photos"] != self._contents():
            return False
        # Drop the loss of the earlier run's last step, unless this run measures one there.
        every, last = before["validation_loss_steps"], self.config.max_train_steps
        losses = state["losses"].items()
        self.losses = {step: loss for step, loss in losses if step % every == 0 or step == last}
        return True

    def _contents(self) -> list[list[str]]:
        return sorted([photo.digest, photo.caption] for photo in self.photos)


def read_held_out(subject: Subject, paths: Sequence[Path]) -> list[Photo]:
    """Read held-out photos of a subject. Captions follow its rules, without random changes.

    Raises:
        PhotoError: If no photo can be read.
    """
    config, rules = subject.settings, caption_rules(subject.settings)
    photos = read_photos(
        paths,
        config.instance_prompt or "",
        skip_unreadable=True,
        per_line=config.caption_per_line,
    )
    return [replace(photo, caption=rules.plain(photo.caption)) for photo in photos]
