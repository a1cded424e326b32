"""What a run will cost: measured in earlier runs on this machine, or said to be unknown."""

from __future__ import annotations

import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dora_diffusion.app.snapshot import Job
from dora_diffusion.config import TrainConfig

# What step time and memory depend on most.
_SAME = (
    "pretrained_model_name_or_path", "resolution", "train_batch_size", "train_text_encoder",
    "with_prior_preservation", "mixed_precision", "gradient_checkpointing",
)  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """Sizes in GiB, times in seconds; None is unknown.

    Attributes:
        seconds: Time of the training steps.
        memory: Peak memory of a like run.
        free_memory: What is free now.
        disk: Size on disk of a like run's folder.
        free_disk: What is free now.
        runs: How many earlier runs it was measured in.
    """

    seconds: float | None
    memory: float | None
    free_memory: float | None
    disk: float | None
    free_disk: float
    runs: int

    @property
    def is_tight(self) -> bool:
        """Whether a like run took more memory than is free."""
        return bool(self.memory and self.free_memory and self.memory > self.free_memory)


def estimate(config: TrainConfig, jobs: Sequence[Job], runs_dir: Path) -> Estimate:
    """Compare with earlier runs of the same model, size, batch and precision."""
    settings = config.to_dict()
    like = [
        job
        for job in jobs
        if job.kind == "train"
        and job.step_seconds
        and all(job.settings.get(name) == settings[name] for name in _SAME)
    ]
    pace = [job.step_seconds for job in like if job.step_seconds]
    peaks = [peak for job in like if (peak := _peak(job))]
    steps = config.max_train_steps or 0
    return Estimate(
        seconds=statistics.median(pace) * steps if pace and steps else None,
        memory=max(peaks) if peaks else None,
        free_memory=free_memory(),
        disk=max((_size(job.folder) for job in like[:3]), default=None),
        free_disk=shutil.disk_usage(runs_dir).free / 2**30,
        runs=len(like),
    )


def _peak(job: Job) -> float | None:
    peak = job.result.get("peak_gpu_memory") or job.result.get("peak_memory")
    return float(peak) if peak else None


def _size(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**30


def free_memory() -> float | None:
    """Free memory in GiB: the GPU's once torch runs on one, else the machine's."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[0]) / 2**30
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) / 2**20 if found else None
