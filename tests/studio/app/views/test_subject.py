"""The Subject tab has ``prepare`` look at the photos, and shows what it says."""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="gradio is not installed")
import gradio

from dora_diffusion.cli import main as cli
from dora_diffusion.data.images import open_photo
from dora_diffusion.data.photos import mask_path
from dora_diffusion.studio import app
from dora_diffusion.studio.app.context import Context
from dora_diffusion.studio.app.html import pieces
from dora_diffusion.studio.app.launch import Launch
from dora_diffusion.studio.app.settings import EMBEDDED
from dora_diffusion.studio.app.views import captions
from dora_diffusion.studio.app.views import subject as tab
from dora_diffusion.studio.jobs import records
from dora_diffusion.studio.jobs.store import ids_in
from dora_diffusion.studio.jobs.subjects import (
    add_photos,
    captions_of,
    keep_words,
    new_subject,
    read_subject,
    save_caption,
    take_sample,
    training_crop,
)
from tests.studio.app.views.helpers import handler


def test_photos_are_looked_at_by_a_job_whose_table_and_sheet_are_shown(
    context: Context, subject: str, capsys: pytest.CaptureFixture[str]
) -> None:
    keep_words(context.workspace, subject, "mug", "sks")
    stored, look = read_subject(context.workspace, subject), handler(context, "look", "subject")
    before = sorted(stored.folder.iterdir())
    assert "waiting" in look(subject, EMBEDDED, "100").lower()
    with pytest.raises(gradio.Error, match="are already being checked"):
        look(subject, EMBEDDED, "")
    (job_id,) = ids_in(context.workspace.root)
    folder = context.workspace.root / job_id
    record = records.read_record(folder)
    assert cli.main(list(record.arguments)) == 0
    printed = capsys.readouterr().out
    (folder / records.LOG).write_text(f"\n--- \n{printed}", encoding="utf-8")
    records.write_result(folder, records.JobResult(0))
    shown = tab.refresh(context, context.jobs(fresh=True), subject)["looked"]
    assert "--token sks --class_word mug --resolution 64" in shown.replace("\\\n", "")
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
    assert tab.refresh(context, context.jobs(fresh=True), other)["looked"] == ""
    with pytest.raises(gradio.Error, match="no photos yet"):
        look(other, EMBEDDED, "")


def upload(context: Context, subject: str | None, *files: Path, name: str = "") -> list[Any]:
    """The upload's handler, with what the page sends after it has asked."""
    paths = [str(file) for file in files]
    return handler(context, "upload", "subject")(paths, subject, name, EMBEDDED, "")


def make_photo(path: Path) -> Path:
    Image.effect_noise((96, 80), 60).convert("RGB").save(path)
    return path


def test_photos_join_a_sample_only_where_that_was_asked_for(
    context: Context, tmp_path: Path
) -> None:
    samples = Path(__file__).parents[4] / "samples"
    sample = take_sample(context.workspace, samples, "bolt_mug")
    file = make_photo(tmp_path / "dog.jpg")
    place = pieces.place(read_subject(context.workspace, sample))
    assert "data-sample='Bolt mug'" in place
    assert "become a new subject" in place
    upload(context, "", file)  # declined
    assert len(read_subject(context.workspace, sample).photos) == 5
    upload(context, sample, file)
    stored = read_subject(context.workspace, sample)
    assert (len(stored.photos), stored.sample) == (6, "")
    assert "data-sample" not in pieces.place(stored)


def test_the_page_asks_before_photos_join_a_sample() -> None:
    """The script, with a page around it: which id goes to the server."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("there is no node")
    script_of_page = Path(app.__file__).with_name("page.js").read_text(encoding="utf-8")

    def sent(sample: str | None, answer: bool, files: list[str]) -> list[Any]:
        place = json.dumps(sample and {"dataset": {"sample": sample}})
        script = (
            f"const asked = []; document = {{querySelector: () => ({place})}};"
            "addEventListener = document.addEventListener = () => {};"
            f"confirm = (text) => {{ asked.push(text); return {json.dumps(answer)}; }};"
            f"const window = globalThis; {script_of_page}"
            f"const sent = studio.join({json.dumps(files)}, 'id', 'name', 1);"
            "console.log(JSON.stringify([sent, asked]));"
        )
        done = subprocess.run([node, "-e", script], capture_output=True, check=True)
        return list(json.loads(done.stdout))

    assert sent(None, False, ["a"]) == [[["a"], "id", "name", 1], []]
    assert sent("Bolt mug", True, ["a"])[0] == [["a"], "id", "name", 1]
    declined, [question] = sent("Bolt mug", False, ["a"])
    assert declined == [["a"], "", "name", 1]
    assert "to the sample Bolt mug?" in question
    assert sent("Bolt mug", False, []) == [[[], "id", "name", 1], []]


def saved(context: Context, typed: Any, shown: Any = None) -> list[Any]:
    event = gradio.EventData(None, {"typed": typed})
    return handler(context, "save", "captions")(shown, event)


def test_a_caption_goes_to_its_own_photo_whatever_is_shown(
    context: Context, subject: str, tmp_path: Path
) -> None:
    other = new_subject(context.workspace, "Other")
    add_photos(context.workspace, other, [make_photo(tmp_path / "b.jpg")])
    typed = {
        f"{subject}/001.jpg": "of the first", f"{other}/001.jpg": "of the other",
        f"{subject}/009.jpg": "of none", "../x/001.jpg": "evil", f"{other}/../001.jpg": "evil",
    }  # fmt: skip
    message, written, tags = saved(context, typed, subject)
    assert "Saved" in message
    assert "of the first 1" in tags
    assert written == typed  # the page forgets those of photos that are gone, too
    assert captions_of(read_subject(context.workspace, subject))["001.jpg"] == "of the first"
    assert captions_of(read_subject(context.workspace, other)) == {"001.jpg": "of the other"}
    # What cannot be saved stays in the page, and is said.
    message, written, tags = saved(context, {f"{subject}/001.jpg": "x" * 1001}, "of none")
    assert (written, tags) == ({}, "")
    assert "001.jpg: the caption has 1001 characters" in message
    assert captions_of(read_subject(context.workspace, subject))["001.jpg"] == "of the first"
    for nothing in (None, [], "x", 3):
        assert saved(context, nothing)[1] == {}


def test_captions_of_all_photos_are_changed_by_buttons(
    context: Context, subject: str, tmp_path: Path
) -> None:
    add_photos(context.workspace, subject, [make_photo(tmp_path / f"{n}.jpg") for n in "bc"])
    save_caption(context.workspace, subject, "002.jpg", "a <mug> on grass")
    substitute, first, append, remove, write, add_prefix = (
        handler(context, "run", "captions", nth) for nth in range(6)
    )

    def now() -> list[str]:
        return list(captions_of(read_subject(context.workspace, subject)).values())

    tags, rows, message = add_prefix(subject, "night,")
    assert now() == ["", "night, a <mug> on grass", ""]
    assert "night, a &lt;mug&gt; on grass</textarea>" in rows
    assert "1 caption changed" in message
    assert "data-value='a &lt;mug&gt; on grass'>a &lt;mug&gt; on grass 1</button>" in tags
    assert "No caption changed" in substitute(subject, "dog", "cat")[2]
    substitute(subject, "grass", "sand")
    assert now() == ["", "night, a <mug> on sand", ""]
    write(subject, "a sks mug")
    assert now() == ["a sks mug"] * 3
    handler(context, "undo", "captions")(subject)
    assert now() == ["", "night, a <mug> on sand", ""]
    save_caption(context.workspace, subject, "001.jpg", "sun, grass")
    assert "night</button>" not in remove(subject, "night")[0]
    assert now() == ["sun, grass", "a <mug> on sand", ""]
    assert "photo 2</button>" in append(subject, "photo")[0]
    first(subject, "photo")
    assert now() == ["photo, sun, grass", "photo, a <mug> on sand", ""]
    for photo in ("001.jpg", "002.jpg"):
        save_caption(context.workspace, subject, photo, "")
    assert "No caption changed" in append(subject, "photo")[2]
    save_caption(context.workspace, subject, "002.jpg", "night, a <mug> on sand")
    nothing = [(button, ("",)) for button in (first, append, remove, add_prefix)]
    for change, values in (*nothing, (substitute, ("", "")), (substitute, ("", "x"))):
        with pytest.raises(gradio.Error, match=r"Write what to change first|find is empty"):
            change(subject, *values)
    with pytest.raises(gradio.Error, match="at most 1000"):
        write(subject, "x" * 1001)
    assert now() == ["", "night, a <mug> on sand", ""]


def test_a_shared_app_captions_with_no_model_but_its_own(
    context: Context, subject: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = Launch(share=True, auth="ann:correct horse", models=("org/captions",))
    monkeypatch.setattr(context, "launch", shared)
    start = handler(context, "automatic", "subject")
    for name in ("/home/ann/model", "other/model"):
        with pytest.raises(gradio.Error, match="offers only"):
            start(subject, name, EMBEDDED, "")
    assert "waiting" in start(subject, "org/captions", EMBEDDED, "").lower()


def test_a_mask_lies_over_the_photo_where_it_leaves_it_out(context: Context, subject: str) -> None:
    stored = read_subject(context.workspace, subject)
    assert "dd-mask" not in captions.shown(stored)[1]
    (photo,) = stored.photos
    mask = Image.new("L", open_photo(photo).size, 0)
    mask.paste(255, (mask.width // 2, 0, mask.width, mask.height))
    mask.save(mask_path(photo))
    rows = captions.shown(stored)[1]
    _, crop, overlay = rows.split("src='")
    assert overlay.startswith("data:image/png;base64,")
    colour = _image_of(overlay)
    # The middle square of 80 x 64: the left half is left out, the right half is the subject.
    assert (colour.getpixel((20, 96)), colour.getpixel((170, 96))) == ((0, 0, 0, 153), (0,) * 4)
    whole = training_crop(photo, 192, masked=False).convert("L").getpixel((20, 96))
    assert abs(_image_of(crop).convert("L").getpixel((20, 96)) - whole) < 40  # as bright as it is
    mask_path(photo).write_bytes(b"x")
    assert "dd-mask" not in captions.shown(stored)[1]


def _image_of(markup: str) -> Image.Image:
    content = markup.partition("base64,")[2].partition("'")[0]
    return Image.open(io.BytesIO(base64.b64decode(content)))
