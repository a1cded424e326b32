"""The clock sends what is new to a page, and nothing else."""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

pytest.importorskip("gradio", reason="gradio is not installed")
import gradio
from PIL import Image

from dora_diffusion.cli.commands.generate import GenerateSettings
from dora_diffusion.sampling.images import save_image
from dora_diffusion.studio.app import html
from dora_diffusion.studio.app.context import Context
from dora_diffusion.studio.app.launch import Launch
from dora_diffusion.studio.app.page import CHOOSERS, _changes
from dora_diffusion.studio.app.settings import _NOT_ADVANCED, LABELS, SETTINGS, sentence
from dora_diffusion.studio.app.views import results
from dora_diffusion.studio.app.views.request import BASE, UNSET, make_request
from dora_diffusion.studio.jobs import records
from dora_diffusion.studio.jobs import snapshot as snapshots
from dora_diffusion.studio.jobs.snapshot import snapshot
from dora_diffusion.studio.jobs.store import GONE, UserError, Workspace, write_json
from dora_diffusion.studio.jobs.subjects import add_photos, new_subject
from tests.every import every
from tests.studio.app.views.helpers import built_page
from tests.studio.jobs.helpers import DAMAGES, damage, ended_run, photo

ADAPTER = Path(__file__).parents[2] / "formats/golden/0.1.0/diffusers-dora-ranks.safetensors"
# What the app decides itself, and names that stand for more than one field.
_UNLABELLED = _NOT_ADVANCED - {*LABELS}


def test_only_what_changed_is_made_and_sent() -> None:
    made: list[str] = []

    def part(mark: str) -> Any:
        return mark, lambda: made.append(mark) or f"made {mark}"

    names = ["text", "field"]
    seen, *updates = _changes({}, {"text": "", "field": part("a"), "other": 1}, names)
    assert updates == ["", "made a"]  # an empty text is new to a new page
    again, *updates = _changes(seen, {"text": "", "field": part("a")}, names)
    assert updates == [gradio.skip()] * 2
    assert again == seen == {"text": "", "field": "a"}
    _, *updates = _changes(seen, {"text": "x", "field": part("b")}, names)
    assert updates == ["x", "made b"]
    assert made == ["a", "b"]


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> tuple[Context, dict[str, Any], Any]:
    """An app, the handlers of its page by their full names, and the page."""
    context = Context(Launch(runs_dir=tmp_path_factory.mktemp("page") / "runs"))
    page = built_page(context)
    functions = [one.fn for one in page.fns.values() if one.fn]
    return context, {f"{fn.__module__}.{fn.__qualname__}": fn for fn in functions}, page


@pytest.fixture
def context(app: tuple[Context, dict[str, Any], Any]) -> Context:
    """The app with nothing in its runs folder."""
    shutil.rmtree(app[0].workspace.root)
    app[0].workspace.make()
    return app[0]


@pytest.fixture
def handler(app: tuple[Context, dict[str, Any], Any]) -> Callable[[str], Any]:
    """A handler by the end of its full name."""
    return lambda name: next(fn for full, fn in app[1].items() if full.endswith(f".{name}"))


@pytest.fixture
def shown(context: Context, handler: Callable[[str], Any]) -> Callable[[str | None], str]:
    """All that the clock sends to a page that shows a run."""
    tick, fill = (handler(f"_connect_clock.<locals>.{name}") for name in ("tick", "fill"))

    def show(run: str | None) -> str:
        context.jobs(fresh=True)
        return str([*tick({}, run, None, None, None), *fill({}, run, None, None, None)])

    return show


def filled(handler: Callable[[str], Any], page: Any, chosen: dict[str, Any]) -> dict[str, Any]:
    """The updates of fields that a page with these choices gets from the clock."""
    function = handler("_connect_clock.<locals>.fill")
    [outputs] = [one.outputs for one in page.fns.values() if one.fn is function]
    _, *updates = function({}, *(chosen.get(name) for name in CHOOSERS))
    return {field._id: update for field, update in zip(outputs[1:], updates, strict=True)}


def _inputs(page: Any, handler: Callable[[str], Any]) -> dict[str, Any]:
    """The fields that the clock asks, by the names that it uses."""
    function = handler("_connect_clock.<locals>.fill")
    [asked] = [one.inputs[1:] for one in page.fns.values() if one.fn is function]
    return dict(zip(CHOOSERS, asked, strict=True))


def test_a_choice_whose_object_is_gone_is_empty_in_every_chooser(
    app: tuple[Context, dict[str, Any], Any], context: Context, handler: Callable[[str], Any],
    tmp_path: Path,
) -> None:  # fmt: skip
    """Nothing takes its place: the next images, run or deletion would be of another object."""
    workspace, page = context.workspace, app[2]
    fields, choosers = _inputs(page, handler), set(CHOOSERS)
    # All lists that are filled later.
    lists = (gradio.Dropdown, gradio.CheckboxGroup)
    later = {
        one._id for one in page.blocks.values()
        if isinstance(one, lists) and not one.choices
    }  # fmt: skip
    assert later < {field._id for field in fields.values()}
    runs = [ended_run(workspace, (2,), 2) for _ in range(2)]
    subject = new_subject(workspace, "Mug")
    add_photos(workspace, subject, [photo(tmp_path / "a.png")])
    context.jobs(fresh=True)
    gone = dict.fromkeys(choosers, "20260101-000000-abcdef")
    gone["subject"] = "20260101-000000-abcdee"
    gone["base"] = str(workspace.root / "a/model")
    several = {"others"}
    for chosen in (gone, dict.fromkeys(choosers, GONE)):
        values = {name: [value] if name in several else value for name, value in chosen.items()}
        updates = filled(handler, page, values)
        for name, field in fields.items():
            update = updates[field._id]
            assert update["choices"][0] == (GONE, GONE), name
            assert len(update["choices"]) > 1, name
            empty = [GONE] if name in several else GONE
            assert update.get("value", values[name]) == empty, name
    # What is there is left alone: a selected checkpoint by its name, and files that were typed.
    run = runs[0].id
    there = {
        "run": run, "adapter": f"{run}/checkpoint-2", "library_run": run, "subject": subject,
        "adapter_second": run,
        "start": "/mug.safetensors", "base": str(workspace.root),
    }  # fmt: skip
    updates = filled(handler, page, there)
    assert not any("value" in updates[fields[name]._id] for name in there)


def test_no_chooser_that_is_empty_acts_on_another_object(context: Context) -> None:
    ended_run(context.workspace, (2,), 2)
    form = {**UNSET, "prompt": "a mug", "seed": 1}
    base = f"{BASE}/{context.models[0]}"
    for choice, more in ((GONE, {}), (base, {"adapter_third": GONE})):
        with pytest.raises(UserError, match="no longer"):
            make_request(context, choice, form | more)
    for act in (context.allowed_model, context.starting_adapter, context.job):
        with pytest.raises(UserError, match="no longer"):
            act(GONE)
    with pytest.raises(UserError, match="no longer"):
        context.learned([GONE])
    named = {"Start from": context.starting_adapter,
             "Run or checkpoint": lambda gone: make_request(context, gone, form)}  # fmt: skip
    for field, act in named.items():
        with pytest.raises(UserError, match=f"^{field}: this run no longer exists"):
            act(GONE)


def _names(function: Any, seen: set[int]) -> set[str]:
    """The names of functions that a handler calls, by itself or by what is bound to it."""
    if id(function) in seen or not callable(function):
        return set()
    seen.add(id(function))
    parts = [function.func, *function.args] if isinstance(function, functools.partial) else []
    parts += [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    code = getattr(function, "__code__", None)
    return set(code.co_names if code else ()).union(*(_names(part, seen) for part in parts))


def test_no_deletion_without_a_question_that_names_it(
    app: tuple[Context, dict[str, Any], Any],
) -> None:
    """By every handler that calls a function of the jobs that deletes."""
    page = app[2]
    deleting = {"delete_job", "delete_subject", "remove_photo", "delete"}
    found = [one for one in page.fns.values() if _names(one.fn, set()) & deleting]
    # `/upload` deletes a subject of its own that gets no photo.
    found = [one for one in found if one.api_name != "upload"]
    assert {one.fn.__module__.rpartition(".")[2] for one in found} == {
        "subject", "photo", "run", "results", "library"
    }  # fmt: skip
    for one in found:
        assert one.js == "studio.confirmed", one.fn
        asked = page.fns[one.trigger_after]
        assert asked.outputs == [one.inputs[-1]]
        assert asked.inputs == one.inputs[:-1]
        # Nothing is asked, and nothing done, where nothing is chosen.
        nothing = [""] * len(asked.inputs)
        assert asked.fn(*nothing) == {"id": "", "question": ""}
        assert one.fn(*nothing, None) == [gradio.skip()] * len(one.outputs)
        with pytest.raises(gradio.Error, match="no longer exists"):
            asked.fn(GONE, *nothing[1:])


@pytest.mark.parametrize("name", ["tick", "fill"])
def test_a_refresh_reads_again_where_a_run_is_deleted_while_it_reads(
    context: Context, handler: Callable[[str], Any], name: str
) -> None:
    """The list of runs that a refresh begins with may be from before."""
    run, other = (ended_run(context.workspace, (50,), 120) for _ in range(2))
    (run.folder / "samples").mkdir()
    photo(run.folder / "samples" / "adapted.png")
    assert run.id in [job.id for job in context.jobs(fresh=True)]
    shutil.rmtree(run.folder)
    page = str(handler(f"_connect_clock.<locals>.{name}")({}, run.id, None, None, None))
    assert run.id not in page
    assert other.id in page


def test_a_file_that_is_never_there_is_said(
    context: Context, handler: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = FileNotFoundError(2, "No such file", "runs")
    monkeypatch.setattr("dora_diffusion.studio.app.page.run.refresh", Mock(side_effect=error))
    with pytest.raises(gradio.Error, match="Runs does not exist"):
        handler("_connect_clock.<locals>.tick")({}, None, None, None, None)


@pytest.mark.parametrize("kind", ["empty", "truncated", "binary", "list", "folder"])
def test_no_damaged_file_takes_the_page_away(
    context: Context, shown: Callable[[str | None], str], kind: str
) -> None:
    workspace = context.workspace
    good = ended_run(workspace, (50, 100), 120)
    photo(good.folder / "samples.png")
    for name in (
        records.JOB, records.SETTINGS, records.PROGRESS, records.RESULT, records.WORKER,
        records.CHOSEN, records.LOG, "metrics.jsonl", "README.md", "photos",
    ):  # fmt: skip
        run = ended_run(workspace, (50,), 120)
        damage(run.folder / name, DAMAGES[kind])
    _damage_what_lies_beside(workspace, DAMAGES[kind])
    for job in snapshot(workspace.root):
        page = shown(job.id)
        assert "cannot be shown" not in page
        assert all(other.id in page for other in snapshot(workspace.root) if other.kind == "train")
        assert job.damage == () or "is damaged" in page


def _damage_what_lies_beside(workspace: Workspace, content: bytes | None) -> None:
    """Samples and a comparison of checkpoints."""
    run = ended_run(workspace, (50,), 120)
    (run.folder / "samples").mkdir()
    for name in ("adapted.png", "step-000010.png", "step-x.png"):
        damage(run.folder / "samples" / name, content)
    folder = workspace.exports / run.id / "comparison"
    folder.mkdir(parents=True)
    damage(folder / "comparison.json", content)


def test_of_a_subject_with_a_broken_photo_the_others_are_shown(
    context: Context, handler: Callable[[str], Any], tmp_path: Path
) -> None:
    workspace = context.workspace
    other, subject = new_subject(workspace, "Other"), new_subject(workspace, "Dog")
    for number in range(5):
        add_photos(workspace, subject, [photo(tmp_path / f"{number}.jpg", (64 + number, 64))])
    photos = workspace.subjects / subject / "photos"
    (photos / "002.jpg").write_bytes((photos / "002.jpg").read_bytes()[:300])
    (photos / "003.jpg").write_bytes(b"")
    (photos / "004.txt").write_bytes(b"\xff\xfe\x80")
    (photos / "005.mask.png").write_bytes(b"x")
    damage(workspace.subjects / other / "subject.json", b"[")
    shutil.rmtree(workspace.subjects / other / "photos")
    load = handler("subject.connect.<locals>.load")
    choices, _, gallery, *_, captions = load(subject, "embedded:tiny-sd", "")
    labels = [label for _, label in gallery["value"]]
    assert labels[0].endswith("001.jpg")
    assert "002.jpg" in labels[1]
    assert "damaged" in labels[1]
    assert "003.jpg: the file is empty" in labels[2]
    assert "004.txt: the caption is not UTF-8 text" in captions
    assert "005.mask.png" in labels[4]
    assert sorted(name for name, _ in choices["choices"]) == [
        "Damaged subject: subject.json is damaged (it is not JSON); fix or delete it (0 photos)",
        "Dog (5 photos)",
    ]
    # A photo that cannot be shown can be chosen, and removed.
    choose = handler("photo.connect.<locals>.choose")
    event = gradio.SelectData(None, {"index": 3, "value": ""})
    assert choose(subject, [f"00{n}.jpg" for n in range(1, 6)], event)[0] == "004.jpg"


def test_a_tab_that_fails_leaves_the_others_and_is_said(
    context: Context,
    shown: Callable[[str | None], str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from dora_diffusion.studio.app.page import whole_tabs

    def fail() -> dict[str, Any]:
        raise TypeError("a defect")

    for _ in range(2):
        made, (problem,) = whole_tabs(Train=lambda: {"a": 1}, Generate=fail)
        assert made == {"a": 1}
        assert problem.startswith("Generate cannot be shown: unexpected TypeError; this is a bug")
    assert capsys.readouterr().err.count("TypeError: a defect") == 1
    assert _changes({}, made, ["a", "b"]) == [{"a": 1}, 1, gradio.skip()]
    monkeypatch.setattr(context.queue, "problem", "run <b> could not be started")
    assert "run &lt;b&gt; could not be started" in shown(None)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("library.connect.<locals>.delete", 0), ("run._act.<locals>.run", 0),
     ("subject.connect.<locals>.remove", 2)],
)  # fmt: skip
def test_what_could_not_be_deleted_is_not_said_to_be(
    context: Context, app: Any, name: str, arguments: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ended_run(context.workspace, (50,), 120)
    subject = new_subject(context.workspace, "Dog")
    chosen = [subject, "embedded:tiny-sd", ""] if arguments else [run.id]
    handler = next(
        fn for full, fn in reversed(app[1].items()) if full.endswith(f".{name}")
    )  # of the four of a run, the last one is removal
    monkeypatch.setattr(shutil, "rmtree", lambda path, ignore_errors: None)
    assert "are deleted at the next start of the app" in str(handler(*chosen))


def _texts(value: object) -> list[str]:
    """All text in a component's properties that a person reads."""
    if isinstance(value, (list, tuple)):
        return [text for item in value for text in _texts(item)]
    return [re.sub("<[^>]*>", " ", value)] if isinstance(value, str) else []


def test_no_setting_is_called_by_its_raw_name_but_among_the_advanced_ones(
    app: tuple[Context, dict[str, Any], Any],
) -> None:
    blocks = app[2]
    names = {*SETTINGS, *(setting.name for setting in GenerateSettings.settings())}
    raw = re.compile(rf"\b({'|'.join(name for name in names if '_' in name)})\b|--rank")
    seen = 0
    for part in blocks.blocks.values():
        inside, parent = False, part
        while parent is not None:
            inside |= str(getattr(parent, "label", "")).startswith("Advanced settings")
            parent = parent.parent
        # Of a choice its label is shown, and not its value.
        choices = [label for label, _ in getattr(part, "choices", None) or ()]
        shown = [getattr(part, name, None) for name in ("label", "info", "placeholder", "value")]
        texts = [*_texts(shown), *_texts(choices)]
        seen += len(texts)
        # There, a name is the label of the field beside it.
        unknown = raw if not inside else re.compile(rf"\b({'|'.join(LABELS)})\b")
        assert [text for text in texts if unknown.search(text)] == [], part
    assert seen > 500


def test_a_message_calls_a_setting_as_its_field_is_called(
    app: tuple[Context, dict[str, Any], Any],
) -> None:
    labels = {getattr(part, "label", None) for part in app[2].blocks.values()}
    with every() as case:
        for name in SETTINGS.keys() - _UNLABELLED:
            message, label = f"{name} is wrong; see --{name}", LABELS.get(name, name)
            told = message if label == name else f"“{label}” is wrong; see “{label}”"
            with case(name):
                assert label in labels
                assert html.note(message) == f"<div class='dd-note dd-info'>{told}</div>"
                assert sentence(message) == told


def test_a_restart_of_the_app_forgets_nothing(
    context: Context, shown: Callable[[str | None], str]
) -> None:
    """All that is shown is on the disk: another app over the same folder shows the same."""
    run = ended_run(context.workspace, (4,), 8, code=0)
    shutil.copyfile(ADAPTER, run.folder / "pytorch_lora_weights.safetensors")
    ranking = context.workspace.ranking(run.id)
    ranking.mkdir(parents=True)
    rows = [{"name": "result", "similarity": 0.7, "drift": 0.2, "images": []}]
    write_json(ranking / "comparison.json", {"rows": rows, "missing": [], "notes": []})
    text = "a mug\nSteps: 2, Seed: 7, Size: 8x8"
    save_image(Image.new("RGB", (8, 8)), context.workspace.images / "made.png", text)
    before = shown(run.id)
    snapshots._ENDED.clear()
    other = Context(Launch(runs_dir=context.workspace.root))
    functions = {fn.fn.__name__: fn.fn for fn in built_page(other).fns.values() if fn.fn}
    after = str(
        [functions[name]({}, run.id, None, None, None)[n] for name, n in (("tick", 0), ("fill", 0))]
    )
    assert run.id in after
    again = str([*functions["tick"]({}, run.id, None, None, None),
                 *functions["fill"]({}, run.id, None, None, None)])  # fmt: skip
    strip = functools.partial(re.sub, r"<function.*?>|dora_diffusion[^ ]* object at 0x\w+", "")
    assert strip(again) == strip(before)
    for words in ("dd-choice", ">done<", "1 image"):
        assert words in again
    (cards,) = {results.page_of(one.images, {})["cards"] for one in (context, other)}
    assert "made.png" in cards
