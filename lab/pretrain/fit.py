"""One training loop for every network here: data-parallel processes, a time budget, an average.

A budget in minutes replaces a number of steps, since the machine is whatever it is: the schedule
follows the share of the budget that is spent. The clock is the processor's, not the wall's: a run
that is paused, or shares its cores, takes longer and learns the same. Progress is saved, so a
stopped run resumes.
"""

from __future__ import annotations

import copy
import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

LossFunction = Callable[[Any, float, torch.Generator], Tensor]
"""(model, share of the budget spent, randomness) -> scalar loss of one worker's batch."""


@dataclass(frozen=True)
class FitSettings:
    """Settings of a fit: how long and how fast to train.

    Attributes:
        minutes: processor time of one worker, counted over interruptions.
        learning_rate: the peak, reached after ``warmup`` steps.
        hold: the share of the budget after which a cosine takes the rate to 1% of its peak.
        weight_decay: of AdamW.
        warmup: steps of linear warm-up.
        ema_decay: the average of the weights that is kept in the end.
        workers: single-thread processes whose gradients are averaged.
        seed: of the weights and of every draw.
        optimizer: makes the optimizer of a model; AdamW by default.
    """

    minutes: float
    learning_rate: float
    hold: float = 0.3
    weight_decay: float = 0.01
    warmup: int = 100
    ema_decay: float = 0.999
    workers: int = 2
    seed: int = 0
    optimizer: Callable[[Any, FitSettings], torch.optim.Optimizer] | None = None

    def __post_init__(self) -> None:
        if self.minutes <= 0 or self.learning_rate <= 0 or self.workers < 1:
            raise ValueError(f"minutes, learning_rate and workers must be positive, got {self}")

    def rate(self, step: int, progress: float) -> float:
        """The learning rate at a step when ``progress`` of the budget is spent."""
        decayed = max(0.0, (progress - self.hold) / (1 - self.hold))
        cosine = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, decayed)))
        return self.learning_rate * min(1.0, (step + 1) / self.warmup) * cosine


@dataclass
class Progress:
    """Progress in a report: steps taken, share of the budget spent, mean loss since the last."""

    step: int
    share: float
    loss: float


Trained = TypeVar("Trained", bound=nn.Module)
Report = Callable[[Any, Progress], None]


def fit(
    name: str,
    folder: Path,
    model: Trained,
    loss: LossFunction,
    settings: FitSettings,
    report: Report | None = None,
    save_seconds: float = 120,
) -> Trained:
    """Train a model and return the average of its weights.

    Args:
        name: of the run; its state is kept in ``folder/name.pt`` and found again there.
        folder: where to keep the state.
        model: freshly initialised.
        loss: one worker's loss on a batch that it draws itself.
        settings: budget and rates.
        report: called with the averaged model whenever the state is saved.
        save_seconds: how often that is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as rendezvous:
        arguments = (
            rendezvous,
            folder / f"{name}.pt",
            model,
            loss,
            settings,
            report,
            save_seconds,
        )
        # fork: the workers inherit the data sets that the loss closes over, without copies.
        mp.start_processes(_work, arguments, nprocs=settings.workers, start_method="fork")
    model.load_state_dict(torch.load(folder / f"{name}.pt", weights_only=True)["average"])
    return model.eval()


def _adamw(model: nn.Module, settings: FitSettings) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        settings.learning_rate,
        (0.9, 0.99),
        weight_decay=settings.weight_decay,
        fused=True,
    )


def _work(
    rank: int,
    rendezvous: str,
    state_file: Path,
    model: nn.Module,
    loss_function: LossFunction,
    settings: FitSettings,
    report: Report | None,
    save_seconds: float,
) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", f"file://{rendezvous}/store", rank=rank, world_size=settings.workers
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = (settings.optimizer or _adamw)(model, settings)
    average = copy.deepcopy(model)
    step, spent = _resume(state_file, model, average, optimizer)
    generator = torch.Generator().manual_seed(settings.seed * 1000 + 7919 * step + rank)
    torch.manual_seed(settings.seed * 1000 + 7919 * step + rank)
    losses: list[float] = []
    start, last_save = time.process_time(), time.monotonic()
    share = spent / (60 * settings.minutes)
    while share < 1:
        for group in optimizer.param_groups:
            group["lr"] = settings.rate(step, share)
        model.train()
        loss = loss_function(model, share, generator)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"loss is {loss.item()} at step {step}")
        optimizer.zero_grad()
        loss.backward()
        now = spent + time.process_time() - start
        share = _average_gradients(parameters, now, settings) / (60 * settings.minutes)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        losses.append(loss.item())
        if rank == 0:
            _update_average(average, model, min(settings.ema_decay, (1 + step) / (20 + step)))
            if share >= 1 or time.monotonic() - last_save > save_seconds:
                _save(state_file, model, average, optimizer, step, now)
                progress = Progress(step, share, sum(losses) / len(losses))
                print(f"{state_file.stem}: {progress} after {now:.0f} s", flush=True)
                if report is not None:
                    with torch.no_grad():
                        report(average.eval(), progress)
                losses, last_save = [], time.monotonic()
    dist.barrier()
    dist.destroy_process_group()


def _average_gradients(parameters: list[nn.Parameter], seconds: float, s: FitSettings) -> float:
    """Average gradients over the workers, in one message; returns their average clock.

    The clock travels along so that all workers see one learning rate and stop at one step.
    """
    flat = torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters]
        + [torch.tensor([seconds])]
    )
    dist.all_reduce(flat)
    flat /= s.workers
    offset = 0
    for p in parameters:
        p.grad = flat[offset : offset + p.numel()].view_as(p)
        offset += p.numel()
    return float(flat[-1])


@torch.no_grad()
def _update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    kept: list[Tensor] = list(average.parameters())
    now: list[Tensor] = list(model.parameters())
    torch._foreach_lerp_(kept, now, 1 - decay)
    for old, new in zip(average.buffers(), model.buffers(), strict=True):
        old.copy_(new)


def _save(
    path: Path,
    model: nn.Module,
    average: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    seconds: float,
) -> None:
    state = {
        "model": model.state_dict(),
        "average": average.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "seconds": seconds,
    }
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def _resume(
    path: Path, model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, float]:
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    average.load_state_dict(state["average"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["seconds"]
