"""The Compare tab: a study from a form, and its report."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("gradio", reason="gradio is not installed")
import gradio
from PIL import Image

from dora_diffusion.cli.main import build_parser, read_settings
from dora_diffusion.config import TrainConfig
from dora_diffusion.models.embedded import samples_folder
from dora_diffusion.studio.app.context import Context
from dora_diffusion.studio.app.launch import Launch
from dora_diffusion.studio.app.settings import EMBEDDED
from dora_diffusion.studio.app.views.compare import _study, refresh
from dora_diffusion.studio.jobs import records
from dora_diffusion.studio.jobs.snapshot import Job
from dora_diffusion.studio.jobs.store import ids_in
from dora_diffusion.studio.jobs.subjects import (
    add_photos,
    keep_words,
    new_subject,
    save_caption,
    take_sample,
)
from lab.study.config import Study, read_study
from lab.study.subjects import find_subject
from lab.study.trials import save_record
from lab.tests.study.helpers import record
from tests.studio.app.views.helpers import handler
from tests.studio.jobs.helpers import perform, photo, seen

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


@pytest.fixture
def dog(context: Context, tmp_path: Path) -> str:
    """Six photos of a dog with a token of its own; the second has a caption."""
    subject = new_subject(context.workspace, "Dog", "dog", token="zwx")
    for number in range(6):
        add_photos(
            context.workspace, subject, [photo(tmp_path / f"{number}.jpg", (64, 64 + number))]
        )
    save_caption(context.workspace, subject, "002.jpg", "a photo of a zwx dog on zwxgrass")
    return subject


def only_job(context: Context) -> Job:
    (job_id,) = ids_in(context.workspace.root)
    return seen(context.workspace.root / job_id)


def test_a_form_becomes_a_study_that_runs_as_a_job(context: Context, dog: str) -> None:
    mug = take_sample(context.workspace, samples_folder(), "bolt_mug")
    asked = [[mug, dog], ["full", "dora"], 3, 50, EMBEDDED]
    chosen, status = handler(context, "start", "compare")(*asked)
    job = only_job(context)
    assert chosen["value"] == job.id
    assert "dora, full on Bolt mug, Dog" in status
    args = read_settings(build_parser().parse_args(list(job.record.arguments)))
    assert (job.kind, Path(args.study).parent) == ("compare", job.folder)
    assert Path(args.output).is_relative_to(context.workspace.exports / job.id)
    study = read_study(args.study)
    assert (study.base, study.seeds) == (EMBEDDED, (0, 1, 2))
    assert [method.name for method in study.methods] == ["dora", "full"]
    assert [study.training(method).max_train_steps for method in study.methods] == [50, 50]
    # Weights themselves learn at a sixteenth of the rate, as they do by default.
    rates = [method.learning_rates for method in study.methods]
    share = TrainConfig(method="full").usual_lr / TrainConfig().usual_lr
    assert rates == [(2e-3,), (pytest.approx(2e-3 * share),)]
    assert study.reasons() == []
    toy, photos = (find_subject(given, EMBEDDED, []) for given in study.subjects)
    assert (toy.name, photos.name) == ("bolt_mug", "Dog")
    parts = {path.name: len([*path.glob("*.jpg")]) for path in job.folder.glob("subjects/1/*")}
    assert parts == {"photos": 5, "held_out": 1}
    caption = job.folder / "subjects" / "1" / "photos" / "002.txt"
    assert caption.read_text(encoding="utf-8") == "a photo of a sks dog on zwxgrass\n"
    assert photos.training(Path(), TrainConfig())["instance_prompt"] == "a photo of a sks dog"


@pytest.mark.parametrize("model", [EMBEDDED, "embedded:tiny-sdxl", SDXL, "org/model"])
def test_what_a_preset_gives_makes_a_study(context: Context, model: str) -> None:
    study = _study(context, ["dora", "lora", "full"], 1, 10, model)
    made = Study.from_dict({**study, "subjects": ["bolt_mug"]})
    assert [method.is_tuned for method in made.methods] == [False] * 3
    assert made.reasons() == []


@pytest.mark.parametrize(
    ("change", "match"),
    [({0: []}, "choose at least one subject"), ({1: []}, "choose at least one method"),
     ({1: ["x"]}, "choose at least one method"), ({2: 11}, "seeds is 11; it must be between 1 and"),
     ({3: 0}, "steps is 0"), ({3: None}, "steps is 0"), ({0: ["../x"]}, "no longer exists"),
     ({4: "/no/model"}, "does not exist")],
)  # fmt: skip
def test_what_makes_no_study_starts_nothing(
    context: Context, dog: str, change: dict[int, Any], match: str
) -> None:
    asked = [[dog], ["dora"], 1, 10, EMBEDDED]
    for place, value in change.items():
        asked[place] = value
    with pytest.raises(gradio.Error, match=f"(?i){match}"):
        handler(context, "start", "compare")(*asked)
    assert ids_in(context.workspace.root) == []


def test_a_subject_needs_a_photo_to_hold_out_and_a_class(context: Context, subject: str) -> None:
    start = handler(context, "start", "compare")
    keep_words(context.workspace, subject, "mug", "sks")
    with pytest.raises(gradio.Error, match="Mug needs two photos, and a class"):
        start([subject], ["dora"], 1, 10, EMBEDDED)
    assert ids_in(context.workspace.root) == []


def test_a_shared_app_compares_on_its_own_models(
    context: Context, dog: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context, "launch", Launch(share=True, auth="ann:correct horse"))
    with pytest.raises(gradio.Error, match="offers only"):
        handler(context, "start", "compare")([dog], ["dora"], 1, 10, SDXL)


def test_the_report_is_shown_with_its_table_and_plots(context: Context, dog: str) -> None:
    assert "Nothing compared yet" in refresh(context, (), None)["study_status"]
    handler(context, "start", "compare")([dog], ["dora"], 1, 10, EMBEDDED)
    job = only_job(context)
    parts = refresh(context, context.jobs(fresh=True), None)
    assert parts["study_report"][1]() == ""
    output = Path(job.record.output)
    output.mkdir(parents=True)
    text = "# Methods\n\n| | dora |\n|---|---|\n| loss | 0.1 |\n\n![Figures](figures (1).png)\n"
    text = text.replace(" (1)", "")
    (output / "report.md").write_text(text, encoding="utf-8")
    (output / "report.html").write_text("<p>", encoding="utf-8")
    Image.new("RGB", (8, 8)).save(output / "figures.png")
    records.write_result(job.folder, records.JobResult(0))
    parts = refresh(context, context.jobs(fresh=True), job.id)
    shown = parts["study_report"][1]()
    assert "| loss | 0.1 |" in shown
    assert f"![Figures](gradio_api/file={output.resolve().as_posix()}/figures.png?" in shown
    assert "report.html" in parts["study_status"]
    assert job.record.command.replace("'", "&#39;") in parts["study_status"]
    assert "Continue" not in parts["study_status"]
    assert parts["study_subjects"][0] == {"choices": [("Dog", dog)]}
    handler(context, "delete", "compare")(job.id)
    assert not output.exists()
    assert ids_in(context.workspace.root) == []


def test_a_study_that_was_stopped_continues(context: Context, dog: str) -> None:
    handler(context, "start", "compare")([dog], ["dora"], 1, 10, EMBEDDED)
    job = only_job(context)
    click = handler(context, "click", "compare")
    events: list[Any] = [SimpleNamespace(what=what, value=job.id) for what in ("stop", "resume")]
    _, status = click(job.id, events[0])
    assert "Continue" in status
    assert seen(job.folder).state == "stopped"
    click(job.id, events[1])
    assert seen(job.folder).state == "waiting"
    assert seen(job.folder).record.arguments == job.record.arguments


def test_a_study_shows_what_it_does_and_its_line(
    context: Context, dog: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lab.study import run as module

    phases = []

    def measured(trial: Any, base: Any, output: Path, **_: Any) -> Any:
        phases.append(only_job(context).progress.phase)
        values = record(trial.row, trial.subject.name, trial.seed, subject_similarity=0.5)
        values |= {"digest": trial.digest, "method": trial.method, "settings": trial.settings}
        return save_record(output, values | {"learning_rate": trial.learning_rate})

    monkeypatch.setattr(module, "perform", measured)
    _, status = handler(context, "start", "compare")([dog], ["dora", "lora"], 1, 2, EMBEDDED)
    assert "dora, lora on Dog" in status
    assert re.search("dora_diffusion compare .*study.yaml", status)
    job = perform(context.workspace, only_job(context).id)
    assert job.kind == "compare"
    assert {*phases} == {"training and measuring"}
