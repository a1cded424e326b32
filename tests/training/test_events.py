"""Events of a run: kinds, order and numbers."""

from __future__ import annotations

import dataclasses
import json

from dora_diffusion.training import events
from dora_diffusion.training.recipe import train


def test_every_kind_is_frozen_and_an_event():
    kinds = [kind for kind in vars(events).values() if dataclasses.is_dataclass(kind)]
    assert set(events.Event.__subclasses__()) == set(kinds)
    assert all(kind.__dataclass_params__.frozen for kind in kinds)


def test_a_run_tells_what_it_does_in_order(tiny_run, tmp_path):
    told = []
    result = train(
        tiny_run(max_train_steps=2, checkpointing_steps=2, num_validation_images=1), told.append
    )
    steps = [event for event in told if isinstance(event, events.StepDone)]
    lines = (tmp_path / "out" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [dict(event.record) for event in steps] == [json.loads(line) for line in lines]
    assert [(e.step, e.total_steps, e.loss) for e in steps] == [
        (e.record["step"], 2, e.record["loss"]) for e in steps
    ]
    others = [e for e in told if not isinstance(e, (events.StepDone, events.SamplingProgress))]
    loading, started, checkpoint, *samples, ended = others
    assert (loading.device, loading.precision) == ("cpu", "no")
    assert (started.step, started.total_steps, started.resumed_from) == (0, 2, None)
    assert (started.trigger, started.changed, started.unused) == ("sks mug", {}, {})
    assert (checkpoint.step, checkpoint.path) == (2, result.checkpoint)
    assert {sample.name: sample.path for sample in samples} == result.samples
    assert (ended.step, ended.interrupted) == (2, False)
