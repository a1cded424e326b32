"""The run that is shown in the Train tab."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("gradio", reason="gradio is not installed")

from dora_diffusion.studio.app.context import Context
from dora_diffusion.studio.app.views.run import refresh
from dora_diffusion.studio.jobs import records
from dora_diffusion.studio.jobs.queue import stop_job
from dora_diffusion.studio.jobs.store import write_json
from tests.studio.app.views.helpers import handler
from tests.studio.jobs.helpers import ended_run, make


def shown(context: Context, run: str | None = None) -> dict[str, Any]:
    """What the clock would send; fields that are updated as their options."""
    parts = refresh(context, context.jobs(fresh=True), run)
    return {name: part[0] if isinstance(part, tuple) else part for name, part in parts.items()}


def test_a_run_that_never_began_does_not_displace_a_finished_one(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = (f"20260101-00000{second}-abcdef" for second in range(9))
    monkeypatch.setattr("dora_diffusion.studio.jobs.store.new_id", lambda: next(ids))
    finished = ended_run(context.workspace, (2,), 2)
    waiting = make(context.workspace, "next")
    assert shown(context)["run"]["value"] == waiting.name
    assert shown(context)["stop"] == {"value": "Remove from queue", "visible": True}
    _, chosen, *_ = handler(context, "run", "run", nth=0)(waiting.name)
    assert chosen["value"] == finished.id
    assert shown(context)["run"]["value"] == finished.id
    assert shown(context, waiting.name)["resume"] == {"visible": True}
    stop_job(make(context.workspace, "alone"))
    write_json(finished.folder / records.RESULT, {"code": 1})
    assert shown(context)["run"]["value"] == finished.id
