"""Trials of a study: one training with one seed on one subject, its record, and its key."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import platform
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_diffusion import __version__
from dora_diffusion.config import ConfigError, TrainConfig, settings
from dora_diffusion.config.base import BaseModel
from dora_diffusion.config.features.prior import has_class_images
from dora_diffusion.config.problems import Problems
from dora_diffusion.data.photos import read_photos
from dora_diffusion.export.files import open_model
from dora_diffusion.formats.files.atomic import save_text
from dora_diffusion.models.components import Components
from dora_diffusion.models.load import load_empty
from dora_diffusion.numerics.devices import device_name
from dora_diffusion.numerics.quantised import memory_of
from dora_diffusion.sampling.images import save_image
from dora_diffusion.training.inputs.base import LoadBase, configure_reading
from dora_diffusion.training.inputs.dataset import check_subject
from dora_diffusion.training.inputs.plan import RunPlan, check_with_model, plan_run
from dora_diffusion.training.metrics import TrainingError
from dora_diffusion.training.processes import make_accelerator
from dora_diffusion.training.recipe import assemble
from dora_diffusion.training.results.write import result_metadata
from dora_diffusion.training.run import Run
from lab.analysis.analyze import analyze_weights
from lab.analysis.report import correlation
from lab.study.config import BASE, SamplingOptions, Study
from lab.study.subjects import StudySubject

RECORD = 1
"""Version of the contents of records and of the measurements."""

Record = dict[str, Any]
RECORDS_FILE = "records.json"
_SAMPLED = 2**16


@dataclass(frozen=True)
class Trial:
    """Trial with all inputs of its record.

    Attributes:
        row: Its method, with the rate if the method has several.
        method: Its method; ``"base"`` trains nothing.
        config: Training settings without paths, photos and seed.
        subject: Subject of the training.
        seed: Seed of training and images.
        base: Digest of the base model.
        asked: Sampling options of the measurements.
    """

    row: str
    method: str
    config: TrainConfig
    subject: StudySubject
    seed: int
    base: str
    asked: SamplingOptions

    @property
    def learning_rate(self) -> float | None:
        """Learning rate of the UNet; None for the base."""
        return None if self.method == BASE else self.config.unet_lr

    @property
    def settings(self) -> dict[str, Any]:
        """All training settings; empty for the base."""
        return {} if self.method == BASE else _compared(self.config.to_dict())

    @property
    def digest(self) -> str:
        """Key of the record: SHA-256 of its inputs.

        Settings with their default value are skipped, so that new settings of later versions do not
        change the key; `known_record` compares all settings.
        """
        defaults = _compared(TrainConfig().to_dict())
        changed = {name: v for name, v in self.settings.items() if v != defaults.get(name)}
        inputs = {
            "record": RECORD,
            "is_base": self.method == BASE,
            "base": self.base,
            "settings": changed,
            "subject": self.subject.digest,
            "seed": self.seed,
            "asked": dataclasses.asdict(self.asked),
        }
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()

    @property
    def name(self) -> str:
        """Descriptive name, which ends with the first digits of its digest."""
        return f"{self.row}-{self.subject.name}-{self.seed}-{self.digest[:10]}"

    def file(self, output: Path) -> Path:
        """Return the path of its record, which depends only on the digest."""
        return record_file(output, self.digest)

    def image(self, output: Path) -> Path:
        """Return the path of its image of the subject."""
        return output / "images" / f"{self.digest[:20]}.png"

    def known_record(self, output: Path) -> Record | None:
        """Return the record of an earlier call, labelled with this method; None without one."""
        try:
            record: Record = json.loads(self.file(output).read_text(encoding="utf-8"))
            current = self.settings
            same = record["digest"] == self.digest and all(
                current.get(name, value) == value for name, value in record["settings"].items()
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        if not same:
            return None
        # Shortened records only have settings that differ from their default.
        settings = {**current, **record["settings"]}
        return {**record, "row": self.row, "method": self.method, "settings": settings}


def record_file(output: Path, digest: str) -> Path:
    return output / "records" / f"{digest[:20]}.json"


def save_record(output: Path, record: Record) -> Record:
    """Write a record to the study's folder, atomically."""
    save_text(record_file(output, record["digest"]), json.dumps(record, indent=1) + "\n")
    return record


def restore_records(output: Path) -> None:
    """Restore missing records from the report's file of all records.

    Args:
        output: Folder of the study.

    Raises:
        ConfigError: If the file exists but is not a list of records.
    """
    file = output / RECORDS_FILE
    if not file.is_file():
        return
    try:
        records: list[Record] = json.loads(file.read_text(encoding="utf-8"))
        missing = [r for r in records if not record_file(output, r["digest"]).exists()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{file} is not a list of records ({error}); move it away, or use another folder"
        ) from error
    for record in missing:
        save_record(output, record)


def _compared(values: Mapping[str, Any]) -> dict[str, Any]:
    """Select the settings that figures depend on, without paths and settings of each trial."""
    excluded = {s.name for s in settings() if s.is_path or s.resume == "ignored"} | {
        "seed", "instance_prompt", "class_word", "validation_prompt", "num_validation_images",
    }  # fmt: skip
    excluded -= {"init_adapter"} if values.get("init_adapter") else set()
    return {name: value for name, value in values.items() if name not in excluded}


def base_digest(base: BaseModel) -> str:
    """Digest of the base's weights: sizes, starts and ends of their files.

    Reading the whole files would take too long before every call, and training would change all of
    a file.
    """
    digest = hashlib.sha256()
    with open_model(base) as model:
        for file in (file for files in model.files.values() for file in files):
            size = file.stat().st_size
            with file.open("rb") as content:
                digest.update(f"{file.name} {size}".encode() + content.read(_SAMPLED))
                content.seek(max(0, size - _SAMPLED))
                digest.update(content.read())
    return digest.hexdigest()


def trials_of(
    study: Study,
    base: str,
    rates: Mapping[str, Sequence[float]],
    pairs: Sequence[tuple[StudySubject, int]],
) -> list[Trial]:
    """List the trials of all methods and rates, pair by pair of subject and seed.

    The order gives all methods the same number of seeds if a study is stopped.

    Args:
        study: The study.
        base: Digest of its base.
        rates: Learning rates by method.
        pairs: Pairs of subject and seed.
    """
    trials = []
    for subject, seed in pairs:
        trials.append(Trial(BASE, BASE, TrainConfig(), subject, seed, base, study.asked))
        for method in study.methods:
            method_rates = rates.get(method.name, ())
            for row, rate in zip(study.rows(method, method_rates), method_rates, strict=False):
                config = dataclasses.replace(study.training(method), learning_rate=rate)
                trials.append(Trial(row, method.name, config, subject, seed, base, study.asked))
    return trials


def perform(
    trial: Trial, base: str, output: Path, *, with_image: bool, load: LoadBase | None = None
) -> Record:
    """Train, measure, and save the record.

    Args:
        trial: The trial.
        base: The base model.
        output: Folder of the study.
        with_image: Save an image of the subject for the report.
        load: Function that loads the model, as for `train`.

    Returns:
        The record; if the loss was not finite, without figures and with ``"diverged"``.
    """
    work = output / "work"
    folder = work / "trials" / trial.digest[:20]
    shutil.rmtree(folder, ignore_errors=True)  # leftovers of a killed call
    try:
        config = _settings(trial, base, work, folder)
        run = assemble(plan_run(config), make_accelerator(config), load=load)
        record: Record = {
            "digest": trial.digest,
            "row": trial.row,
            "method": trial.method,
            "subject": trial.subject.name,
            "seed": trial.seed,
            "learning_rate": trial.learning_rate,
            "settings": trial.settings,
            "version": __version__,
            "machine": _machine(run),
        }
        try:
            if trial.method != BASE:
                record |= _train(run, folder, trial)
            record["measures"] = _measure(run, trial, output, with_image)
        except TrainingError as error:
            # A diverged trial is a result: the study continues and does not repeat it.
            record |= {"diverged": str(error), "measures": {}}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return save_record(output, record)


def check_methods(
    study: Study, subjects: Sequence[StudySubject], base: BaseModel, output: Path
) -> None:
    """Check the settings of all methods on all subjects before training.

    Args:
        study: The study.
        subjects: Its subjects.
        base: The base model.
        output: Folder of the study.

    Raises:
        ConfigError: If methods cannot be trained; the message has their names and the reasons.
    """
    empty, problems, work = load_empty(base), Problems(ValueError, OSError), output / "work"
    rates = {method.name: study.rates_to_try(method)[:1] for method in study.methods}
    trials = trials_of(study, "", rates, [(subject, study.seeds[0]) for subject in subjects])
    for trial in (trial for trial in trials if trial.method != BASE):
        with problems.collect(f"methods.{trial.method}: "), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Training repeats these warnings.
            config = _settings(trial, str(base.path), work, work / "trials")
            _check(plan_run(config), empty)
    problems.raise_all()


def _check(plan: RunPlan, empty: Components) -> None:
    """Check the photos of a trial, and its settings with the model without weights."""
    for subject, paths in zip(plan.subjects, plan.photos, strict=True):
        prompt = subject.settings.instance_prompt or ""
        photos = read_photos(paths, prompt, skip_unreadable=True, per_line=True)
        if plan.config.has_photos:
            check_subject(subject, photos)
    check_with_model(configure_reading(empty, plan.config), plan.config, plan.start)


def _settings(trial: Trial, base: str, work: Path, folder: Path) -> TrainConfig:
    """All settings of a trial; trials share class images, whose names depend on all inputs."""
    subject_settings = trial.subject.training(work, trial.config)
    if has_class_images(trial.config):
        subject_settings["class_data_dir"] = str(work / "class")
    return dataclasses.replace(
        trial.config,
        pretrained_model_name_or_path=base,
        seed=trial.seed,
        num_validation_images=0,
        output_dir=str(folder),
        **subject_settings,
    )


def _measure(run: Run, trial: Trial, output: Path, with_image: bool) -> dict[str, float]:
    with run.weights.base_weights() if trial.method == BASE else nullcontext():
        measures, image = trial.subject.measure(
            run.components, run.trigger, trial.seed, trial.asked
        )
    if with_image:
        save_image(image, trial.image(output))
    return {name: _rounded(value) for name, value in measures.items()}


def _train(run: Run, folder: Path, trial: Trial) -> Record:
    """Train all steps; returns their costs and the analysis of the weights."""
    steps = run.total_steps
    points = trial.asked.analysis_points
    saved_steps = {round(steps * (k + 1) / points) for k in range(points)} - {0}
    losses, seconds, processor, live = [], 0.0, 0.0, 0
    # Counted before training, since an ordinary adapter is loaded after it for the measurements.
    parameters = sum(p.numel() for p in run.weights.parameters().values())
    for step in range(1, steps + 1):
        wall_start, processor_start = time.perf_counter(), time.process_time()
        if step == 1:
            with kept_bytes() as saved_bytes:
                record = run.step(step)
            live = _live_bytes(run, sum(saved_bytes.values()))
        else:
            record = run.step(step)
        losses.append(float(record["loss"]))
        # The first step is not timed: its memory is measured.
        seconds += (time.perf_counter() - wall_start) * (step > 1)
        processor += (time.process_time() - processor_start) * (step > 1)
        if not math.isfinite(losses[-1]):
            raise TrainingError(f"{trial.name}: the loss is not a number at step {step}")
        if step in saved_steps and step < steps:
            _write(run, folder / f"checkpoint-{step}", step)
    run.weights.reload(_write(run, folder / f"checkpoint-{steps}", steps))
    timed = max(1, steps - 1)
    return {
        "parameters": parameters,
        "steps": steps,
        "seconds_per_step": _rounded(seconds / timed),
        "processor_seconds_per_step": _rounded(processor / timed),
        "live_bytes": live,
        "last_losses": _rounded(sum(losses[-10:]) / len(losses[-10:])),
        **({"analysis": _analysis(folder, run.config)} if points else {}),
    }


def _write(run: Run, folder: Path, step: int) -> Path:
    with run.in_use():
        return run.weights.writer()(folder, result_metadata(run, step))


def _analysis(folder: Path, config: TrainConfig) -> Record:
    """Delta M and delta D of every layer at every checkpoint, and their correlation."""
    (run,) = analyze_weights(folder, config.base_model, norm_axis="output").runs
    coefficient = correlation(run.checkpoints)
    last = run.checkpoints[-1].layers
    return {
        "correlation": None if coefficient is None else _rounded(coefficient.mean),
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


@contextmanager
def kept_bytes() -> Iterator[dict[int, int]]:
    """Count the bytes that autograd saves for the backward pass of the first batch.

    Yields:
        Storage -> bytes, filled during the block; without parameters.
    """
    saved: dict[int, int] = {}
    is_backward = False

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter) and not is_backward:
            storage = tensor.untyped_storage()
            saved.setdefault(storage.data_ptr(), storage.nbytes())
        return tensor

    def unpack(tensor: Tensor) -> Tensor:
        nonlocal is_backward
        is_backward = True
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield saved


def _live_bytes(run: Run, saved_bytes: int) -> int:
    """Bytes of weights of all components, gradients, optimizer state, and saved tensors."""
    tensors = [
        tensor
        for module in run.components.modules().values()
        for tensor in (*module.parameters(), *module.buffers())
    ]
    gradients = sum(p.nbytes for p in run.weights.parameters().values())
    tensors += [
        value
        for state in run.step.optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value)
    ]
    storages = [tensor_part.untyped_storage() for t in tensors for tensor_part in memory_of(t)]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sum(sizes.values()) + gradients + saved_bytes


def _machine(run: Run) -> str:
    device = run.components.device
    if device.type != "cpu":
        return device_name(device.type)
    threads = torch.get_num_threads()
    return f"{platform.processor() or platform.machine()}, {threads} threads"


def _rounded(value: float) -> float:
    """Round to six significant digits; further ones differ between machines."""
    return float(f"{value:.6g}")
