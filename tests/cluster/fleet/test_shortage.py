"""Workers on a cluster that is full: what is said, without a cluster."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest

from dora_diffusion.cluster.fleet import cluster


def ray_with(free: dict[str, float]) -> SimpleNamespace:
    """Of Ray what asks for room, and actors that never start."""
    actor = SimpleNamespace(ready=SimpleNamespace(remote=object))
    made = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda work: actor))
    resources = {"CPU": 2.0, "GPU": 1.0}
    return SimpleNamespace(
        remote=lambda kind: made,
        nodes=lambda: [{"Alive": True, "Resources": resources}],
        cluster_resources=lambda: resources,
        available_resources=lambda: free,
        kill=lambda actor: None,
    )


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        ({"CPU": 2.0, "GPU": 1.0}, []),
        ({"GPU": 1.0}, ["takes 1 CPU, and 0 of 2 are free"]),
        ({"CPU": 0.5, "GPU": 0.25}, ["1 CPU, and 0.5 of 2", "1 GPU, and 0.25 of 1"]),
    ],
)
def test_a_cluster_without_room_is_said_once(
    monkeypatch: pytest.MonkeyPatch, free: dict[str, float], expected: list[str]
) -> None:
    """Name the resource that is short, and what of it is free; nothing where there is room."""
    monkeypatch.setattr(cluster, "ray_library", lambda: ray_with(free))
    monkeypatch.setattr(cluster, "connect", lambda address: lambda: None)
    with (
        warnings.catch_warnings(record=True) as caught,
        cluster.RayWorkers(lambda payload, worker: None, "auto", cluster.Share()) as workers,
    ):
        warnings.simplefilter("always", UserWarning)
        for _ in range(3):
            assert workers.idle(5) == 0
    said = [str(warning.message) for warning in caught]
    assert len(said) == len(expected)
    assert all(part in text for part, text in zip(expected, said, strict=True))
    assert all(text.startswith("waiting for room on the cluster") for text in said)
