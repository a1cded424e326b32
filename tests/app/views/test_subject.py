"""The Subject tab has ``prepare`` look at the photos, and shows what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="gradio is not installed")
import gradio

from dora_diffusion import cli
from dora_diffusion.app.context import Context
from dora_diffusion.app.settings import EMBEDDED
from dora_diffusion.app.views import subject as tab
from dora_diffusion.jobs import records
from dora_diffusion.jobs.subjects import keep_words, new_subject, read_subject
from dora_diffusion.jobs.workspace import ids_in
from tests.app.views.helpers import handler


def test_photos_are_looked_at_by_a_job_whose_table_and_sheet_are_shown(
    context: Context, subject: str, capsys: pytest.CaptureFixture[str]
) -> None:
    keep_words(context.workspace, subject, "mug", "sks")
    stored, look = read_subject(context.workspace, subject), handler(context, "look", "subject")
    before = sorted(stored.folder.iterdir())
    assert "waiting" in look(subject, EMBEDDED, "100").lower()
    with pytest.raises(gradio.Error, match="are being looked at already"):
        look(subject, EMBEDDED, "")
    (job_id,) = ids_in(context.workspace.root)
    folder = context.workspace.root / job_id
    record = records.read_record(folder)
    assert cli.main(list(record.arguments)) == 0
    printed = capsys.readouterr().out
    (folder / records.LOG).write_text(f"\n--- \n{printed}", encoding="utf-8")
    records.write_result(folder, records.JobResult(0))
    shown = tab.refresh(context, context.jobs(fresh=True), subject)["looked"]
    assert "--resolution 64 --token sks --class_word mug" in shown.replace("\\\n", "")
    assert "<td>80 x 64</td>" in shown
    assert "<th>photo</th>" in shown
    assert "|" not in shown
    assert "caution:" not in shown
    assert "dd-warn'>001.jpg: " in shown
    assert Path(record.output).is_file()
    assert f"{job_id}/{Path(record.output).name}" in shown
    assert sorted(stored.folder.iterdir()) == before
    # Another look takes its place; a subject without photos has none.
    look(subject, EMBEDDED, "")
    (newest,) = ids_in(context.workspace.root)
    assert newest != job_id
    assert not Path(record.output).exists()
    other = new_subject(context.workspace, "Nothing")
    assert tab.refresh(context, context.jobs(fresh=True), other) == {"looked": ""}
    with pytest.raises(gradio.Error, match="no photos yet"):
        look(other, EMBEDDED, "")
