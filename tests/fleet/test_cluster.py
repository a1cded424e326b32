"""Fleets on Ray: workers that are killed, and nodes that go, lose nothing."""

from __future__ import annotations

import os
import random
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from dora_diffusion.config import ConfigError, TrainConfig
from dora_diffusion.fleet import run as module
from dora_diffusion.fleet.cluster import Share
from dora_diffusion.fleet.run import run_fleet
from dora_diffusion.toy.benchmark_subjects import SUBJECTS, TRIGGER, write_photos
from tests.fleet.helpers import DEADLY, NAMES, assert_same_results, train_and_die

pytest.importorskip("ray")
pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL"),
]


def test_a_killed_worker_loses_nothing(serial, subjects, monkeypatch, tmp_path):
    """One worker is killed in its second subject; another one resumes it, and the third is kept."""
    monkeypatch.setattr(module, "train_subjects", train_and_die)
    fleet = run_fleet(subjects, tmp_path / "out", "local", Share(workers=1))
    assert {name: (r.status, r.attempts) for name, r in fleet.records.items()} == {
        name: ("done", 1 + (name == DEADLY)) for name in NAMES
    }
    assert (tmp_path / "out" / "killed").exists()
    assert_same_results(tmp_path / "out", Path(serial.output))
    first, second, third = (fleet.records[name].worker for name in NAMES)
    assert first != second == third


@pytest.fixture(scope="session")
def eight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainConfig]:
    """Eight subjects of the toy world, of thirty steps each."""
    top = tmp_path_factory.mktemp("toys")
    configs = {}
    for subject in list(SUBJECTS.values())[:8]:
        write_photos(subject, top / subject.name)
        configs[subject.name] = TrainConfig(
            pretrained_model_name_or_path="embedded:tiny-sd",
            instance_data_dir=str(top / subject.name),
            instance_prompt=f"a photo of a {TRIGGER} {subject.word}",
            class_word=subject.word,
            max_train_steps=30,
            checkpointing_steps=4,
            learning_rate=1e-3,
            num_validation_images=0,
        )
    return configs


@pytest.fixture(scope="session")
def serial_eight(eight: dict[str, TrainConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    fleet = run_fleet(eight, tmp_path_factory.mktemp("fleet") / "serial")
    assert not fleet.failed
    return Path(fleet.output)


def process_of(worker: str) -> int:
    return int(worker.rpartition(":")[2])


class Killer:
    """Kills workers that train, at moments that are drawn."""

    def __init__(self, most: int, seed: int = 0) -> None:
        self.left, self.killed = most, set()
        self._random = random.Random(seed)

    def __call__(self, fleet, ended):
        training = {
            name: process_of(running.place.worker)
            for name, running in fleet.queue.running.items()
            if fleet.workers.progress().get(name)
            and process_of(running.place.worker) not in self.killed
        }
        if training and self.left and self._random.random() < 0.5:
            process = training[self._random.choice(sorted(training))]
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
                self.left -= 1
                self.killed.add(process)


@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, 20])
def test_kills_at_random_moments_lose_nothing(eight, serial_eight, tmp_path, kills):
    killer = Killer(kills)
    fleet = run_fleet(
        eight, tmp_path / "out", "local", Share(workers=2), retries=20, on_change=killer
    )
    assert not fleet.failed
    assert killer.left == 0
    attempts = {name: record.attempts for name, record in fleet.records.items()}
    assert sum(attempts.values()) > len(eight)
    assert_same_results(tmp_path / "out", serial_eight, tuple(eight))


@pytest.mark.slow
def test_a_node_that_goes_loses_nothing(eight, serial_eight, tmp_path):
    """Two nodes of a worker each; the raylet of one is killed in the middle of its subject."""
    import ray
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    second = cluster.add_node(**node)
    killed: list[str] = []

    def kill(fleet, ended):
        told = fleet.workers.progress()
        if len(fleet.records) >= 2 and len(told) == 2 and all(told.values()) and not killed:
            (raylet,) = second.all_processes["raylet"]
            os.kill(raylet.process.pid, signal.SIGKILL)
            killed.extend(fleet.queue.running)

    try:
        ray.init(cluster.address, log_to_driver=False)
        fleet = run_fleet(eight, tmp_path / "out", cluster.address, on_change=kill)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert not fleet.failed
    again = [name for name, record in fleet.records.items() if record.attempts > 1]
    assert len(again) == 1
    assert again[0] in killed
    assert_same_results(tmp_path / "out", serial_eight, tuple(eight))


@pytest.mark.slow
def test_a_worker_that_fits_on_no_node_is_said(subjects, tmp_path):
    with pytest.raises(ConfigError, match="no node of the cluster has 1 CPU, 3 GPU for a worker"):
        run_fleet(subjects, tmp_path / "out", "local", Share(num_gpus=3))


@pytest.mark.slow
def test_the_second_subject_of_a_worker_starts_in_a_tenth_of_the_time(eight, tmp_path):
    """Counted in the worker, from a task to its first step; the first counts its process' start."""
    some = dict(list(eight.items())[:4])
    fleet = run_fleet(some, tmp_path / "out", "local", Share(workers=1))
    first, *others = (record.start_seconds for record in fleet.records.values())
    assert max(others) < 0.1 * first
