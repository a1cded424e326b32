"""One trial of a study: a training with one seed on one subject, its record and that one's key."""

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
from dora_diffusion.adapters.inject import AdapterSet
from dora_diffusion.config import ConfigError, TrainConfig, settings
from dora_diffusion.config.base import BaseModel
from dora_diffusion.config.problems import Problems
from dora_diffusion.export.files import open_model
from dora_diffusion.formats.files.atomic import save_text
from dora_diffusion.lab.analysis.analyze import analyze_weights
from dora_diffusion.lab.analysis.report import correlation
from dora_diffusion.lab.study.config import BASE, SamplingOptions, Study
from dora_diffusion.lab.study.subjects import StudySubject
from dora_diffusion.models.load import load_empty
from dora_diffusion.numerics.devices import device_name
from dora_diffusion.numerics.quantised import memory_of
from dora_diffusion.sampling.images import save_image
from dora_diffusion.training.engine.accelerator import make_accelerator
from dora_diffusion.training.inputs.subject import subjects_of
from dora_diffusion.training.results.metrics import TrainingError
from dora_diffusion.training.results.write import result_metadata
from dora_diffusion.training.session import LoadBase, Session, check_session, open_session

RECORD = 1
"""Version of what a record holds, and of what it is measured with."""

Record = dict[str, Any]
RECORDS_FILE = "records.json"
_SAMPLED = 2**16


@dataclass(frozen=True)
class Trial:
    """Trial, with everything that its record depends on.

    Attributes:
        row: Its method, with the rate where that has several.
        method: Its method; ``"base"`` trains nothing.
        config: Settings of training, but for places, photos and seed.
        subject: What is learned.
        seed: Of the training and of the images that are asked for.
        base: Digest of the model.
        asked: How it is measured.
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
        """The UNet's; None of the base."""
        return None if self.method == BASE else self.config.unet_lr

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of training, in full."""
        return {} if self.method == BASE else _compared(self.config.to_dict())

    @property
    def digest(self) -> str:
        """Key of the record: SHA-256 of what it depends on.

        Settings that have their default are left out, so that a setting that a later version adds
        leaves it as it is; `known_record` compares these.
        """
        defaults = _compared(TrainConfig().to_dict())
        moved = {name: v for name, v in self.settings.items() if v != defaults.get(name)}
        parts = {
            "record": RECORD,
            "is_base": self.method == BASE,
            "base": self.base,
            "settings": moved,
            "subject": self.subject.digest,
            "seed": self.seed,
            "asked": dataclasses.asdict(self.asked),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def name(self) -> str:
        """Name of its files: what it is in words, and the start of its digest."""
        return f"{self.row}-{self.subject.name}-{self.seed}-{self.digest[:10]}"

    def file(self, output: Path) -> Path:
        """Return the path of its record, by the digest alone, which no method's name is part of."""
        return record_file(output, self.digest)

    def image(self, output: Path) -> Path:
        """Return the path of its image of the subject."""
        return output / "images" / f"{self.digest[:20]}.png"

    def known_record(self, output: Path) -> Record | None:
        """The record of an earlier call, if it is of this very trial, as this method's."""
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
        # One that was made short has only the settings that are not the default's.
        settings = {**current, **record["settings"]}
        return {**record, "row": self.row, "method": self.method, "settings": settings}


def record_file(output: Path, digest: str) -> Path:
    return output / "records" / f"{digest[:20]}.json"


def save_record(output: Path, record: Record) -> Record:
    """Write a record into the study's folder, atomically."""
    save_text(record_file(output, record["digest"]), json.dumps(record, indent=1) + "\n")
    return record


def restore_records(output: Path) -> None:
    """Write the records of a report's one file again, where the folder does not have them.

    Args:
        output: The study's folder, or what is left of it.

    Raises:
        ConfigError: If the file is there and holds no list of records.
    """
    file = output / RECORDS_FILE
    if not file.is_file():
        return
    try:
        records: list[Record] = json.loads(file.read_text(encoding="utf-8"))
        missing = [r for r in records if not record_file(output, r["digest"]).exists()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{file} holds no records of a study ({error}); move it away, or take another folder"
        ) from error
    for record in missing:
        save_record(output, record)


def _compared(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that figures depend on: not places, nor what each trial has of its own."""
    left_out = {s.name for s in settings() if s.is_path or s.resume == "ignored"} | {
        "seed", "instance_prompt", "class_word", "validation_prompt", "num_validation_images",
    }  # fmt: skip
    left_out -= {"init_adapter"} if values.get("init_adapter") else set()
    return {name: value for name, value in values.items() if name not in left_out}


def base_digest(base: BaseModel) -> str:
    """Digest of the weights that are trained on: sizes, starts and ends of their files.

    Training changes all of a file, and reading gigabytes before every call would not be worth it.
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
    """Every method with every rate on every pair of subject and seed, pair by pair.

    So a study that is stopped has as many seeds of one method as of another.

    Args:
        study: The study.
        base: Digest of its base.
        rates: Learning rates by method.
        pairs: What is learned, and the seed.
    """
    trials = []
    for subject, seed in pairs:
        trials.append(Trial(BASE, BASE, TrainConfig(), subject, seed, base, study.asked))
        for method in study.methods:
            taken = rates.get(method.name, ())
            for row, rate in zip(study.rows(method, taken), taken, strict=False):
                config = dataclasses.replace(study.training(method), learning_rate=rate)
                trials.append(Trial(row, method.name, config, subject, seed, base, study.asked))
    return trials


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
    return save_record(output, record)


def check_methods(
    study: Study, subjects: Sequence[StudySubject], base: BaseModel, output: Path
) -> None:
    """Check the settings of every method on every subject, before any is trained.

    Args:
        study: The study.
        subjects: Its subjects.
        base: The model.
        output: The study's folder.

    Raises:
        ConfigError: Naming each method that cannot be trained, and why.
    """
    empty, problems, work = load_empty(base), Problems(ValueError, OSError), output / "work"
    rates = {method.name: study.rates_to_try(method)[:1] for method in study.methods}
    trials = trials_of(study, "", rates, [(subject, study.seeds[0]) for subject in subjects])
    for trial in (trial for trial in trials if trial.method != BASE):
        with problems.collect(f"methods.{trial.method}: "), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # It is warned of as it is trained.
            config = _settings(trial, str(base.path), work, work / "trials")
            check_session(config, subjects_of(config), empty)
    problems.raise_all()


def _settings(trial: Trial, base: str, work: Path, folder: Path) -> TrainConfig:
    """All settings of a trial; class images are shared: they are named by all they depend on."""
    own = trial.subject.training(work, trial.config)
    if trial.config.uses_class_images:
        own["class_data_dir"] = str(work / "class")
    return dataclasses.replace(
        trial.config,
        pretrained_model_name_or_path=base,
        seed=trial.seed,
        num_validation_images=0,
        output_dir=str(folder),
        **own,
    )


def _open(trial: Trial, base: str, work: Path, folder: Path, load: LoadBase | None) -> Session:
    config = _settings(trial, base, work, folder)
    return open_session(config, subjects_of(config), make_accelerator(config), load=load)


def _measure(session: Session, trial: Trial, output: Path, with_image: bool) -> dict[str, float]:
    with session.weights.base_weights() if trial.method == BASE else nullcontext():
        measures, image = trial.subject.measure(
            session.components, session.trigger, trial.seed, trial.asked
        )
    if with_image:
        save_image(image, trial.image(output))
    return {name: _rounded(value) for name, value in measures.items()}


def _train(session: Session, folder: Path, trial: Trial) -> Record:
    """All steps; returns what they took, and what they did to the weights."""
    steps = session.total_steps
    points = trial.asked.analysis_points
    saved = {round(steps * (k + 1) / points) for k in range(points)} - {0}
    losses, seconds, processor, live = [], 0.0, 0.0, 0
    # Now: what is loaded in the end to be measured is the ordinary adapter of the result.
    parameters = sum(p.numel() for p in session.weights.parameters().values())
    session.start_from_gradient(AdapterSet.of(*session.weights.modules.values()))
    for step in range(1, steps + 1):
        begun, used = time.perf_counter(), time.process_time()
        if step == 1:
            with kept_bytes() as kept:
                record = session.step(step)
            live = _live_bytes(session, sum(kept.values()))
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
    with session.in_use():
        return session.weights.writer()(folder, result_metadata(session, step))


def _analysis(folder: Path, config: TrainConfig) -> Record:
    """Delta M and delta D of every layer at every point, and their correlation."""
    (run,) = analyze_weights(folder, config.base_model, norm_axis="output").runs
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


@contextmanager
def kept_bytes() -> Iterator[dict[int, int]]:
    """Count what autograd keeps of the first batch for its backward pass, each storage once.

    Returns:
        Bytes by storage, so far; parameters are not counted.
    """
    kept: dict[int, int] = {}
    is_backward = False

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter) and not is_backward:
            storage = tensor.untyped_storage()
            kept.setdefault(storage.data_ptr(), storage.nbytes())
        return tensor

    def unpack(tensor: Tensor) -> Tensor:
        nonlocal is_backward
        is_backward = True
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield kept


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
    storages = [part.untyped_storage() for t in tensors for part in memory_of(t)]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sum(sizes.values()) + gradients + kept


def _machine(session: Session) -> str:
    device = session.components.device
    if device.type != "cpu":
        return device_name(device.type)
    threads = torch.get_num_threads()
    return f"{platform.processor() or platform.machine()}, {threads} threads"


def _rounded(value: float) -> float:
    """Six significant digits: what is beyond them differs between machines."""
    return float(f"{value:.6g}")
