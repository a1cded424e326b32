"""Cost estimate of a run, from earlier runs on this machine or from the table of sizes."""

from __future__ import annotations

import dataclasses
import shutil
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dora_diffusion.config import TrainConfig
from dora_diffusion.config.train import settings
from dora_diffusion.config.wording import duration
from dora_diffusion.models.locate import model_info
from dora_diffusion.models.memory import Device, needed_memory, what_would_fit
from dora_diffusion.studio.jobs.snapshot import Job

# The settings that step time and memory depend on most.
_SAME = (
    "pretrained_model_name_or_path", "resolution", "train_batch_size", "train_text_encoder",
    "quantize", "quantize_convolutions", "gradient_accumulation_steps", "mixed_precision",
    "gradient_checkpointing", "offload", "cache_latents", "optimizer", "method",
    "use_dora", "parametrization", "targets", "text_encoder_targets", "rank", "conv_rank",
    "rank_pattern", "lora_dropout",
    *(setting.name for setting in settings(TrainConfig) if setting.costs),
)  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """Cost estimate; sizes in GiB, times in seconds, None if unknown.

    Attributes:
        seconds: Time of the training steps.
        memory: Peak memory.
        device: Device for training, with its free memory.
        disk: Size on disk of a similar run's folder.
        free_disk: Free disk space.
        runs: Number of earlier runs with measured memory; 0 if memory is from the table.
        change: Suggested change so that the run fits; empty if it fits, or nothing helps.
    """

    seconds: float | None
    memory: float | None
    device: Device
    disk: float | None
    free_disk: float
    runs: int
    change: str = ""

    @property
    def will_not_fit(self) -> bool:
        """True if the run needs more memory than is free."""
        free = self.device.free_gib
        return self.memory is not None and free is not None and self.memory > free


def estimate(config: TrainConfig, jobs: Sequence[Job], runs_dir: Path, device: Device) -> Estimate:
    """Estimate a run from earlier runs with the same model and cost per step, or from the table.

    Raises:
        UserError: If the base model cannot be trained.
    """
    given, defaults = config.to_dict(), TrainConfig().to_dict()
    has_prior = config.uses("prior_loss_weight")
    similar = [
        job
        for job in jobs
        if job.kind == "train"
        and job.step_seconds
        # A settings file may omit defaults.
        and all(job.settings.get(name, defaults[name]) == given[name] for name in _SAME)
    ]
    pace = [job.step_seconds for job in similar if job.step_seconds]
    results = [job.result for job in similar if job.result]
    peaks = [peak for result in results if (peak := result.peak_gpu_memory or result.peak_memory)]
    info = model_info(config.pretrained_model_name_or_path)
    size = max(subject.resolution or info.resolution for subject in config.subjects)
    # The table is for adapters; full fine-tuning was not measured.
    in_table = info.has_released_shape and config.trains_adapters
    family = info.family if in_table else ""
    batch = config.train_batch_size * (2 if has_prior else 1)
    given["train_text_encoder"] = config.describe().encodes_in_steps
    memory = max(peaks) if peaks else needed_memory(family, size, given, device, batch=batch)
    steps = config.max_train_steps or 0
    cost = Estimate(
        seconds=statistics.median(pace) * steps if pace and steps else None,
        memory=memory,
        device=device,
        disk=max((_size(job.folder) for job in similar[:3]), default=None),
        free_disk=shutil.disk_usage(runs_dir).free / 2**30,
        runs=len(peaks),
    )
    if not cost.will_not_fit or not family:
        return cost
    off = "with_prior_preservation off" if config.has_photos else "no anchors"
    change = what_would_fit(
        family, size, given, device,
        batch=config.train_batch_size, without_prior=off if has_prior else "",
    )  # fmt: skip
    return dataclasses.replace(cost, change=change)


def announced_class_images(config: TrainConfig, cost: Estimate) -> str:
    """Describe the class images that a run generates before its first step, and their time.

    An image takes two UNet passes (guidance) per denoising step. A training step takes about three
    (one forward, two for backward) per image.
    """
    from dora_diffusion.training.inputs.prior import missing_class_images

    needed = [s for s in config.subjects if s.uses("num_class_images")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The run repeats them.
        missing = [one for s in needed if (one := missing_class_images(s)).count]
    if not missing:
        return ""
    count = sum(one.count for one in missing)
    passes = count * config.validation_inference_steps * 2
    steps = passes / (3 * 2 * config.train_batch_size)
    about = f"as long as {steps:.0f} training steps"
    if cost.seconds and config.max_train_steps:
        about = duration(cost.seconds / config.max_train_steps * steps)
    if not config.has_photos:
        return f"{count} images of the prompts come first, which takes about {about}."
    own = Path(config.output_dir)
    places = ["the run's folder" if own in one.folder.parents else one.folder for one in missing]
    folders = " and ".join(dict.fromkeys(map(str, places)))
    advice = "; ".join(dict.fromkeys(one.advice.removeprefix("--") for one in missing))
    return (
        f"{count} class images come first, in {folders}, which takes about {about}, unless a run "
        f"has generated them; {advice}."
    )


def _size(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**30
