"""Pieces of the page: escaped, and true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dora_diffusion.config import TrainConfig
from dora_diffusion.studio.app import html
from dora_diffusion.studio.app.serve import THEME
from dora_diffusion.studio.jobs import records
from dora_diffusion.studio.jobs.records import log_tail
from dora_diffusion.studio.jobs.snapshot import read_job, snapshot
from dora_diffusion.studio.jobs.store import Workspace, write_json
from dora_diffusion.training.inputs.plan import plan_run
from tests.studio.jobs.helpers import about, make, photo, started_run


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "runs").make()


def test_titles_are_escaped(workspace: Workspace) -> None:
    folder = started_run(workspace, 2, title="<img src=x onerror=alert(1)>")
    (folder / records.LOG).write_text("error: <script>alert(2)</script>\n", encoding="utf-8")
    write_json(folder / records.RESULT, {"code": 1})
    shown = snapshot(workspace.root)
    page = html.status_card(shown[0]) + html.queue_list(shown) + html.header(shown)
    page += html.log_view(log_tail(folder))
    assert "<img" not in page
    assert "<script" not in page
    assert "&lt;script&gt;alert(2)" in page


def test_a_run_names_its_model_and_device_and_says_once_what_the_model_does_not_know(
    workspace: Workspace, tmp_path: Path
) -> None:
    photo(tmp_path / "a.jpg")
    settings = TrainConfig(
        max_train_steps=10,
        token="sks",
        class_word="dog",
        instance_data_dir=str(tmp_path),
        instance_prompt="a photo of a sks dog",
    )
    with pytest.warns(UserWarning, match="toy model") as warned:
        plan_run(settings)
    folder = make(workspace, "sks dog", **settings.to_dict())
    write_json(folder / records.PROGRESS, {"phase": "training", "device_name": "NVIDIA X"})
    write_json(folder / records.RESULT, {"code": 143})

    def card() -> str:
        job = read_job(folder)
        assert job is not None
        return html.status_card(job)

    log = "".join(f"warning: {each.message}\n" for each in warned)
    (folder / records.LOG).write_text(log, encoding="utf-8")
    assert "embedded:tiny-sd on NVIDIA X" in card()
    assert card().count("toy model of a drawn world") == 1
    assert "Name another “Base model”." in card()


def test_a_job_that_failed_shows_the_last_lines_of_its_last_attempt(workspace: Workspace) -> None:
    for folder in (started_run(workspace, 2), about(started_run(workspace, 2), "export")):
        lines = "".join(f"line <{number}>\n" for number in range(9))
        log = f"--- first ---\nearlier\n\n--- again ---\n{lines}error: the disk is full\n"
        (folder / records.LOG).write_text(log, encoding="utf-8")
        write_json(folder / records.RESULT, {"code": 1})
        job = read_job(folder)
        assert job is not None
        card = html.status_card(job)
        assert "dd-bad'>the disk is full</div>" in card
        assert "<pre>line &lt;4&gt;\nline &lt;5&gt;" in card
        assert card.count("error: the disk is full") == 1
        write_json(folder / records.RESULT, {"code": 143})  # stopped: nothing is wrong
        job = read_job(folder)
        assert job is not None
        assert "<pre>" not in html.status_card(job)


@pytest.mark.parametrize(
    ("kind", "unit", "done", "total", "shown"),
    [("train", "", 0, 0, "step 4 of 10"), ("export", "B", 3 * 2**19, 3 * 2**20, "1.5 of 3.0 MB"),
     ("rank-checkpoints", "image", 3, 6, "image 3 of 6"), ("convert", "", 0, 0, "waiting"),
     ("prepare", "photo", 0, 0, "photo 0 of ?")],
)  # fmt: skip
def test_every_kind_of_job_has_its_unit(
    workspace: Workspace, kind: str, unit: str, done: int, total: int, shown: str
) -> None:
    folder = run = started_run(workspace, 4)
    if kind != "train":
        folder = about(run, kind)
        write_json(folder / records.PROGRESS, {"unit": unit, "done": done, "total": total})
    job = read_job(folder)
    assert job is not None
    card = html.status_card(job)
    assert shown in card
    assert ("step" in card) == (kind == "train")


def test_durations_read_well() -> None:
    assert [html.duration(x) for x in (None, 0.4, 75, 3720)] == [
        "unknown", "0 s", "1 min 15 s", "1 h 2 min",
    ]  # fmt: skip


APP = Path(html.__file__).parent
STYLES = {name: (APP / name).read_text(encoding="utf-8") for name in ("style.css", "phone.css")}


def luminance(color: str) -> float:
    """Relative luminance (WCAG 2.2) of ``#rrggbb``."""
    parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize(("scheme", "body"), [(":root", 0), (".dark", 1)])
def test_every_text_is_read_on_everything_that_is_behind_it(scheme: str, body: int) -> None:
    """Contrast of at least 4.5 (WCAG 2.2, 1.4.3), also of states that no test in a browser has."""
    block = STYLES["style.css"].partition(f"{scheme} {{")[2].partition("}")[0]
    colors = dict(re.findall(r"--dd-([\w-]+): (#\w{6})", block))
    page = THEME["day_and_night"]["body_background_fill"][body]
    pairs = [(name, f"{name}-soft") for name in ("good", "warn", "bad", "blue")]
    pairs += [(name, under) for name in ("ink", "quiet", "accent") for under in ("paper", "soft")]
    grounds = [(text, colors[ground]) for text, ground in pairs]
    grounds += [(name, page) for name in ("ink", "quiet", "accent", "good", "warn", "bad")]
    for name, ground in grounds:
        dark, light = sorted([luminance(colors[name]), luminance(ground)])
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (name, ground)
