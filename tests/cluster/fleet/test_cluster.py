"""Fleets on Ray: workers that are killed, and nodes that go, lose nothing."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from dora_diffusion.cluster.fleet import run as module
from dora_diffusion.cluster.fleet.connection import Share
from dora_diffusion.cluster.fleet.run import run_fleet
from dora_diffusion.config import TrainConfig
from dora_diffusion.toy.benchmark_subjects import SUBJECTS, TRIGGER, write_photos
from tests.cluster.fleet.helpers import (
    DEADLY,
    NAMES,
    assert_same_results,
    train_and_die,
    train_and_die_often,
    train_and_take_the_node_along,
)
from tests.refusal import refused

pytest.importorskip("ray")
pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL"),
]


def test_a_killed_worker_loses_nothing(serial, subjects, monkeypatch, tmp_path):
    """One worker is killed in its second subject; another one resumes it, and the third is kept."""
    monkeypatch.setattr(module, "train_subjects", train_and_die)
    # Ray kills workers of its own accord where what else runs has nearly all memory.
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "0")
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


@pytest.mark.slow
def test_kills_at_random_moments_lose_nothing(eight, serial_eight, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "train_subjects", train_and_die_often)
    fleet = run_fleet(eight, tmp_path / "out", "local", Share(workers=2), retries=3)
    assert not fleet.failed
    assert len(list((tmp_path / "out").glob("killed-*"))) == 24
    # A moment may be the one after a subject has ended.
    assert 16 <= sum(record.attempts - 1 for record in fleet.records.values()) <= 24
    assert_same_results(tmp_path / "out", serial_eight, tuple(eight))


@pytest.mark.slow
def test_a_node_that_goes_loses_nothing(eight, serial_eight, monkeypatch, tmp_path):
    """Two nodes of a worker each; the raylet of one is killed in the middle of a subject."""
    import ray
    from ray.cluster_utils import Cluster

    monkeypatch.setattr(module, "train_subjects", train_and_take_the_node_along)
    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    (tmp_path / "victim").write_text(cluster.add_node(**node).node_id, encoding="utf-8")
    try:
        ray.init(cluster.address, log_to_driver=False)
        fleet = run_fleet(eight, tmp_path / "out", cluster.address)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert not fleet.failed
    again = [name for name, record in fleet.records.items() if record.attempts > 1]
    assert again == [(tmp_path / "killed").read_text(encoding="utf-8")]
    assert_same_results(tmp_path / "out", serial_eight, tuple(eight))


@pytest.mark.slow
def test_a_worker_that_fits_on_no_node_is_said(subjects, tmp_path):
    with refused("workers", "1 CPU, 3 GPU"):
        run_fleet(subjects, tmp_path / "out", "local", Share(num_gpus=3))


@pytest.mark.slow
def test_the_second_subject_of_a_worker_starts_in_a_tenth_of_the_time(eight, tmp_path):
    """Counted in the worker, from a task to its first step; the first counts its process' start."""
    some = dict(list(eight.items())[:4])
    fleet = run_fleet(some, tmp_path / "out", "local", Share(workers=1))
    first, *others = (record.start_seconds for record in fleet.records.values())
    assert max(others) < 0.1 * first
