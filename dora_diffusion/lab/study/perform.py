"""Train and measure one trial."""

from __future__ import annotations

import dataclasses
import math
import platform
import shutil
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_diffusion import __version__
from dora_diffusion.config import TrainConfig
from dora_diffusion.lab.analysis import Analysis, analyze_weights
from dora_diffusion.lab.analysis.report import correlation
from dora_diffusion.lab.study.config import BASE
from dora_diffusion.lab.study.trials import Record, Trial
from dora_diffusion.numerics.devices import device_name
from dora_diffusion.sampling.images import save_png
from dora_diffusion.training.engine.accelerator import make_accelerator
from dora_diffusion.training.inputs.subject import subjects_of
from dora_diffusion.training.results.metrics import TrainingError
from dora_diffusion.training.results.write import result_metadata
from dora_diffusion.training.session import LoadBase, Session, open_session


def perform(
    trial: Trial, base: str, output: Path, *, with_image: bool, load: LoadBase | None = None
) -> Record:
    """Train, measure, and save the record.

    Args:
        trial: What to do.
        base: The model.
        output: The study's folder.
        with_image: Keep the image of the subject for the report.
        load: Loads the model, as `train` takes it.

    Returns:
        The record; without figures, and with ``"diverged"``, if the loss stopped being finite.
    """
    work = output / "work"
    folder = work / "trials" / trial.digest[:20]
    shutil.rmtree(folder, ignore_errors=True)  # of a call that was killed
    try:
        session = _open(trial, base, work, folder, load)
        record: Record = {
            "digest": trial.digest,
            "row": trial.row,
            "method": trial.method,
            "subject": trial.subject.name,
            "seed": trial.seed,
            "learning_rate": trial.learning_rate,
            "settings": trial.settings,
            "version": __version__,
            "machine": _machine(session),
        }
        try:
            if trial.method != BASE:
                record |= _train(session, folder, trial)
            record["measures"] = _measure(session, trial, output, with_image)
        except TrainingError as error:
            # A rate that is too high is a result: the study continues, and does not try it again.
            record |= {"diverged": str(error), "measures": {}}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return trial.save(output, record)


def _open(trial: Trial, base: str, work: Path, folder: Path, load: LoadBase | None) -> Session:
    """A session of a trial. Class images are shared: they are named by all that they depend on."""
    own = trial.subject.training(work, trial.config.token)
    if trial.config.uses_class_images:
        own["class_data_dir"] = str(work / "class")
    config = dataclasses.replace(
        trial.config,
        pretrained_model_name_or_path=base,
        seed=trial.seed,
        num_validation_images=0,
        output_dir=str(folder),
        **own,
    )
    return open_session(config, subjects_of(config), make_accelerator(config), load=load)


def _measure(session: Session, trial: Trial, output: Path, with_image: bool) -> dict[str, float]:
    with session.weights.base_weights() if trial.method == BASE else nullcontext():
        measures, image = trial.subject.measure(
            session.components, session.trigger, trial.seed, trial.asked
        )
    if with_image:
        save_png(image, trial.image(output))
    return {name: _rounded(value) for name, value in measures.items()}


def _train(session: Session, folder: Path, trial: Trial) -> Record:
    """All steps; returns what they took, and what they did to the weights."""
    steps = session.total_steps
    points = trial.asked.analysis_points
    saved = {round(steps * (k + 1) / points) for k in range(points)} - {0}
    losses, seconds, processor, live = [], 0.0, 0.0, 0
    # Now: what is loaded in the end to be measured is the ordinary adapter of the result.
    parameters = sum(p.numel() for p in session.weights.parameters().values())
    for step in range(1, steps + 1):
        begun, used = time.perf_counter(), time.process_time()
        if step == 1:
            with _KeptBytes() as kept:
                record = session.step(step)
            live = _live_bytes(session, kept.bytes)
        else:
            record = session.step(step)
        losses.append(float(record["loss"]))
        # The first step is the one that is looked at.
        seconds += (time.perf_counter() - begun) * (step > 1)
        processor += (time.process_time() - used) * (step > 1)
        if not math.isfinite(losses[-1]):
            raise TrainingError(f"{trial.name}: the loss is not a number at step {step}")
        if step in saved and step < steps:
            _write(session, folder / f"checkpoint-{step}", step)
    session.weights.reload(_write(session, folder / f"checkpoint-{steps}", steps))
    timed = max(1, steps - 1)
    return {
        "parameters": parameters,
        "steps": steps,
        "seconds_per_step": _rounded(seconds / timed),
        "processor_seconds_per_step": _rounded(processor / timed),
        "live_bytes": live,
        "last_losses": _rounded(sum(losses[-10:]) / len(losses[-10:])),
        **({"analysis": _analysis(folder, session.config)} if points else {}),
    }


def _write(session: Session, folder: Path, step: int) -> Path:
    return session.weights.writer()(folder, result_metadata(session, step))


def _analysis(folder: Path, config: TrainConfig) -> Record:
    """Delta M and delta D of every layer at every point, and their correlation."""
    analysis: Analysis = analyze_weights(folder, config.base_model, norm_axis="output")
    (run,) = analysis.runs
    found = correlation(run.checkpoints)
    last = run.checkpoints[-1].layers
    return {
        "correlation": None if found is None else _rounded(found.mean),
        "delta_m": _rounded(sum(layer.relative_delta_m for layer in last) / len(last)),
        "delta_d": _rounded(sum(layer.delta_d for layer in last) / len(last)),
        "points": [
            {
                "step": checkpoint.step,
                "delta_m": [_rounded(layer.delta_m) for layer in checkpoint.layers],
                "delta_d": [_rounded(layer.delta_d) for layer in checkpoint.layers],
            }
            for checkpoint in run.checkpoints
        ],
    }


class _KeptBytes:
    """Counts what autograd keeps of the first batch for its backward pass, each storage once.

    Attributes:
        bytes: So far; parameters are not counted.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._seen: set[int] = set()
        self._is_backward = False
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _unpack(self, tensor: Tensor) -> Tensor:
        self._is_backward = True
        return tensor

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        is_new = storage.data_ptr() not in self._seen and not isinstance(tensor, torch.nn.Parameter)
        if is_new and not self._is_backward:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor

    def __enter__(self) -> _KeptBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)


def _live_bytes(session: Session, kept: int) -> int:
    """Weights of all parts, gradients, the optimizer's state, and what autograd keeps."""
    tensors = [
        tensor
        for module in session.components.modules().values()
        for tensor in (*module.parameters(), *module.buffers())
    ]
    gradients = sum(p.nbytes for p in session.weights.parameters().values())
    tensors += [
        value
        for state in session.learner.optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value)
    ]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values()) + gradients + kept


def _machine(session: Session) -> str:
    device = session.components.device
    if device.type != "cpu":
        return device_name(device.type)
    threads = torch.get_num_threads()
    return f"{platform.processor() or platform.machine()}, {threads} threads"


def _rounded(value: float) -> float:
    """Six significant digits: what is beyond them differs between machines."""
    return float(f"{value:.6g}")
