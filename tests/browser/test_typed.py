"""Nothing that is typed or chosen is lost: every field of the page, found from the page itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest

from dora_diffusion.studio.jobs.store import Workspace
from dora_diffusion.studio.jobs.subjects import (
    captions_of,
    read_subject,
    subjects_in,
    take_sample,
)
from tests.browser.helpers import SAMPLES, App, Visit, finished_run
from tests.studio.jobs.helpers import photo

# What a person fills; everything else of the page shows or does something.
TYPED = ("textbox", "number")
KINDS = (*TYPED, "slider", "checkbox", "checkboxgroup", "radio", "dropdown")
# Of each field the element that holds its value, whatever kind it is.
SHOWN = """([fields]) => fields.map(({selector, kind}) => {
  const place = document.querySelector(selector);
  const of = (query, read) => [...place.querySelectorAll(query)].map(read).join('|');
  if (!place) return null;
  if (kind === 'checkbox' || kind === 'checkboxgroup' || kind === 'radio')
    return of('input', (input) => `${input.checked}`);
  if (kind === 'slider') return place.querySelector('input[type=number]').value;
  const field = place.querySelector('input, textarea');
  return of('.token', (token) => token.innerText.trim()) + field.value;
})"""


TYPE = """(pairs) => pairs.forEach(([selector, text]) => {
  const field = document.querySelector(selector).querySelector('input, textarea');
  field.value = text;
  field.dispatchEvent(new Event('input', {bubbles: true}));
})"""
CHOOSE = """async (fields) => {
  for (const {selector, kind, other} of fields) {
    const place = document.querySelector(selector), field = place.querySelector('input');
    if (kind === 'slider') {
      const number = place.querySelector('input[type=number]');
      number.value = other;
      number.dispatchEvent(new Event('input', {bubbles: true}));
    } else if (kind === 'dropdown') {
      field.focus();
      const others = '[role=option]:not([aria-selected=true])';
      const option = () => [...place.querySelectorAll(others)].at(-1);
      for (let i = 0; !option() && i < 600; i++) await new Promise(requestAnimationFrame);
      option().dispatchEvent(new MouseEvent('mousedown', {bubbles: true, cancelable: true}));
      await new Promise(requestAnimationFrame);
      field.blur();
    } else {
      (place.querySelector('input:not(:checked)') ?? field).click();
    }
  }
}"""
# Opens one more level of what is folded, until everything is there.
UNFOLD = """(own) => {
  const folded = [...document.querySelectorAll('.tabitem .label-wrap:not(.open)')];
  const closed = folded.filter((title) => title.offsetParent);
  closed.forEach((title) => title.click());
  return !closed.length && own.every((selector) => document.querySelector(selector));
}"""


# Holds back what is sent with one text until another is sent, or would have been by now.
HOLD = """([first, second]) => {
  const {fetch} = window;
  let go;
  const other = new Promise((done) => { go = done; });
  const frames = async (count) => {
    while (count--) await new Promise(requestAnimationFrame);
  };
  window.fetch = async (...request) => {
    const body = String(request[1]?.body ?? '');
    if (body.includes(second)) setTimeout(go);
    else if (body.includes(first)) await Promise.race([other, frames(60)]);
    return fetch(...request);
  };
}"""


@pytest.fixture
def fill() -> Callable[[Workspace], None]:
    """Subjects and finished runs: every field of every tab is to be seen."""

    def prepared(workspace: Workspace) -> None:
        for name in ("heart_teapot", "ring_robot", "bolt_mug"):
            take_sample(workspace, SAMPLES, name)
        for title in ("first", "second"):
            finished_run(workspace, title, checkpoints=(3,))

    return prepared


class Form:
    """The fields of a page, by tab and label."""

    def __init__(self, page: Visit) -> None:
        self.page = page
        config = page.page.evaluate("JSON.stringify(window.gradio_config)")
        self.config = json.loads(config)
        parts = {one["id"]: one for one in self.config["components"]}
        self.fields: dict[str, dict[str, Any]] = {}

        def walk(node: Mapping[str, Any], tab: str) -> None:
            part = parts.get(node["id"], {"type": ""})
            tab = part["props"]["label"] if part["type"] == "tabitem" else tab
            if part["type"] in KINDS and part["props"].get("interactive") is not False:
                key = f"{tab}: {part['props']['label']}"
                assert key not in self.fields
                about = {"id": node["id"], "tab": tab, "kind": part["type"]}
                selector = f"#{part['props']['elem_id']}"
                self.fields[key] = {**part["props"], **about, "selector": selector}
            for child in node.get("children") or ():
                walk(child, tab)

        walk(self.config["layout"], "")
        self.tabs = list(dict.fromkeys(field["tab"] for field in self.fields.values()))

    def unfold(self, tab: str) -> None:
        """Open a tab with all that is folded on it."""
        self.page.tab(tab)
        own = [field["selector"] for field in self.fields.values() if field["tab"] == tab]
        self.page.app.until(lambda: self.page.page.evaluate(UNFOLD, own))

    def sources(self, event: Mapping[str, Any]) -> set[int]:
        """The fields that set an event off, or the first of those that it comes after."""
        events = {one["id"]: one for one in self.config["dependencies"]}
        while event["trigger_after"] is not None:
            event = events[event["trigger_after"]]
        return {field for field, _ in event["targets"]}

    def shown(self) -> dict[str, str | None]:
        names = ("selector", "kind")
        fields = [{name: field[name] for name in names} for field in self.fields.values()]
        return dict(zip(self.fields, self.page.page.evaluate(SHOWN, [fields]), strict=True))

    def settled(self) -> dict[str, str | None]:
        """The page's text once no answer changes it any more."""
        self.page.settle()
        return self.shown()

    def type_all(self) -> dict[str, str]:
        """Type a number of its own into every field that is typed in; the numbers."""
        keys = [key for key, field in self.fields.items() if field["kind"] in TYPED]
        typed = {key: str(number) for number, key in enumerate(keys, start=11)}
        pairs = [[self.fields[key]["selector"], text] for key, text in typed.items()]
        self.page.page.evaluate(TYPE, pairs)
        return typed

    def choose(self, which: Callable[[Mapping[str, Any]], bool]) -> None:
        """Give fields that are chosen from another value than they have, tab by tab."""
        for tab in self.tabs:
            chosen = []
            for field in self.fields.values():
                if field["tab"] != tab or field["kind"] in TYPED or not which(field):
                    continue
                other = ""
                if field["kind"] == "slider":
                    least, step = field["minimum"], field["step"]
                    other = str(least + step * (1 + (field["value"] == least + step)))
                about = {"selector": field["selector"], "kind": field["kind"]}
                chosen.append({**about, "other": other})
            self.page.tab(tab)
            self.page.page.evaluate(CHOOSE, chosen)


# Of each tab, the field of what is looked at.
LOOKED_AT = {
    "Subject": "#subject", "Train": "#run", "Generate": "#adapter", "Library": "#library-run",
}  # fmt: skip


def test_a_reload_opens_the_tab_and_what_was_looked_at(
    visit: Callable[..., Visit], app: App
) -> None:
    """In each window its own; what was deleted meanwhile is left out without a word."""
    page = visit()

    def shown(tab: str) -> str:
        page.wait("field => document.querySelector(`${field} input`)?.value", LOOKED_AT[tab])
        page.settle()
        return str(page.page.locator(f"{LOOKED_AT[tab]} input").input_value())

    def choose_other(tab: str) -> str:
        page.tab(tab)
        before = shown(tab)
        page.page.evaluate(CHOOSE, [{"selector": LOOKED_AT[tab], "kind": "dropdown"}])
        page.settle()
        assert shown(tab) != before
        return shown(tab)

    first = {}
    for tab in LOOKED_AT:
        page.tab(tab)
        first[tab] = shown(tab)
    chosen = {}
    for tab in LOOKED_AT:
        chosen[tab] = choose_other(tab)
        page.reload()
        assert (page.opened(), shown(tab)) == (tab, chosen[tab])
    # Another window begins with the first tab, and takes none of the others with it.
    window, page.page = page.page, page.context.new_page()
    page.open()
    assert page.opened() == "Subject"
    assert choose_other("Train") != chosen["Train"]
    page.page.close()
    page.page = window
    page.reload()
    assert page.opened() == "Library"
    for tab in LOOKED_AT:
        page.tab(tab)
        assert shown(tab) == chosen[tab]
    # Today's default is shown in place of what is gone.
    address = dict(parse_qsl(urlsplit(page.page.url).query))
    assert address.keys() == {"tab", "subject", "run", "adapter", "library"}
    gone = {"subjects": "subject", "": "run"}
    for folder, name in gone.items():
        shutil.rmtree(app.runs / folder / address[name])
    app.read_jobs()
    page.reload()
    first["Generate"] = chosen["Generate"]  # A base model, which is still here.
    for tab in LOOKED_AT:
        page.tab(tab)
        page.wait("([field, text]) => document.querySelector(`${field} input`)?.value === text",
                  [LOOKED_AT[tab], first[tab]])  # fmt: skip
    assert page.page.evaluate("messages.length") == 0


def test_every_field_keeps_what_is_typed_and_chosen(visit: Callable[..., Visit], app: App) -> None:
    page = visit()
    form = Form(page)
    for tab in form.tabs:
        form.unfold(tab)
    before = form.settled()
    assert [key for key, value in before.items() if value is None] == []
    ids = {field["id"] for field in form.fields.values()}
    fills = [one for one in form.config["dependencies"] if {*one["outputs"]} & ids]
    fill = {field for one in fills for field in form.sources(one)} & ids
    filled = {field for one in fills if fill & form.sources(one) for field in one["outputs"]}
    # What fills other fields comes first.
    form.choose(lambda field: field["id"] in fill)
    form.settled()
    form.choose(lambda field: field["id"] not in fill)
    typed = form.type_all()
    kept = form.settled()
    assert {key: kept[key] for key in typed} == typed
    same = [key for key, value in kept.items() if value == before[key]]
    assert [key for key in same if form.fields[key]["id"] not in filled] == []
    # Other tabs, and an error, which leaves no mark on a field.
    for tab in form.tabs:
        page.tab(tab)
    page.tab("Train")
    page.click("#start")
    page.toast()
    assert form.settled() == kept
    assert page.page.locator(".error:visible").count() == 0
    page.reload()
    for tab in form.tabs:
        form.unfold(tab)
    after = form.settled()
    assert {key: value for key, value in after.items() if value != kept[key]} == {}


def test_a_name_half_typed_in_a_dropdown_is_kept(visit: Callable[..., Visit], app: App) -> None:
    page = visit()
    form = Form(page)
    own = [
        key for key, field in form.fields.items()
        if field["kind"] == "dropdown" and field.get("allow_custom_value")
        and not field.get("multiselect")
    ]  # fmt: skip
    assert len(own) >= 2

    def go_to(key: str) -> tuple[str, str]:
        page.tab(form.fields[key]["tab"])
        return f"{form.fields[key]['selector']} input", f"some-org/half-{len(key)}"

    def holds(key: str) -> None:
        page.wait("([s, text]) => document.querySelector(s)?.value === text", [*go_to(key)])

    for key in own:
        page.fill(*go_to(key))
        page.reload()
        holds(key)
    # It stays when the field is left.
    for key in own:
        page.page.focus(go_to(key)[0])
    page.settle()  # What is left is in the draft some frames later.
    page.reload()
    for key in own:
        holds(key)


def test_a_caption_is_kept_by_every_way_out_of_it(visit: Callable[..., Visit], app: App) -> None:
    page = visit()
    workspace = Workspace(app.runs)
    page.wait_for("#caption-rows textarea")
    stored = subjects_in(workspace)[0]
    count = len(stored.photos)

    def row(place: int) -> Any:
        return page.page.locator("#caption-rows textarea").nth(place)

    def written(place: int, text: str) -> None:
        app.until(lambda: list(captions_of(stored).values())[place] == text)

    def by_photo() -> None:
        page.click("#crops button.thumbnail-item", 1)

    def by_crop() -> None:
        page.click("#edit")
        page.wait_for("#editor .dd-on")
        row(0).fill("a sks thing, cropped")
        page.click("#editor [data-do=apply]")
        page.wait_text("#report", "Crop and mask of 002.jpg saved")

    ways: dict[str, Callable[[], Any]] = {
        "the next photo": by_photo, "crop and mask": by_crop,
        "Enter": lambda: row(0).press("Enter"), "another tab": lambda: page.tab("Train"),
        "reload": page.reload,
    }  # fmt: skip
    for way, leave in ways.items():
        page.tab("Subject")
        text = "a sks thing, cropped" if leave is by_crop else f"a sks thing by {way}"
        if leave is not by_crop:
            row(0).fill(text)
        leave()
        written(0, text)
    assert row(0).input_value() == "a sks thing by reload"
    # While the server is away, and after that.
    app.kill()
    row(1).fill("typed while it was away")
    row(1).press("Enter")
    page.page.goto("about:blank")  # Gradio loads its page again when the server is back.
    app.start()
    page.wrong.clear()
    page.open()
    written(1, "typed while it was away")
    assert count == len(captions_of(stored))
    page.wrong.clear()


def test_what_is_drawn_waits_until_it_is_used(visit: Callable[..., Visit], app: App) -> None:
    page = visit()

    def open_editor() -> list[str]:
        page.click("#crops button.thumbnail-item", 2)
        page.wait_text(".dd-photo", "003.jpg")
        page.click("#edit")
        page.wait_for("#editor .dd-on")
        return [field.input_value() for field in page.page.locator("#editor [data-side]").all()]

    assert open_editor() == ["0", "0", "100", "100"]
    for side, value in (("left", "10"), ("top", "20"), ("width", "50"), ("height", "60")):
        page.fill(f"#editor [data-side={side}]", value)
    drawn = ["10", "20", "50", "60"]
    page.click("#crops button.thumbnail-item", 1)
    page.wait_text(".dd-photo", "002.jpg")
    page.wait("!document.querySelector('#editor canvas')")
    assert open_editor() == drawn
    page.reload()
    assert open_editor() == drawn
    page.click("#editor [data-do=clear]")
    page.reload()
    assert open_editor() == ["0", "0", "100", "100"]


def are(page: Visit, *texts: str) -> None:
    """Wait until the first captions are these."""
    page.wait("(texts) => texts.every((text, place) => text === "
              "document.querySelectorAll('#caption-rows textarea')[place]?.value)",
              list(texts))  # fmt: skip


def test_captions_are_edited_by_keys_and_by_tags(visit: Callable[..., Visit], app: App) -> None:
    page = visit()
    stored = subjects_in(Workspace(app.runs))[0]
    page.wait_for("#caption-rows textarea")
    rows = page.page.locator("#caption-rows textarea")

    def is_in(place: int) -> None:
        row = f"document.querySelectorAll('#caption-rows textarea')[{place}]"
        page.wait(f"document.activeElement === {row}")

    rows.first.fill("night, a sks mug")
    for key, place in (("ArrowDown", 1), ("Tab", 2), ("Enter", 3), ("Home", 3), ("ArrowUp", 2)):
        page.page.keyboard.press(key)
        is_in(place)
    page.wait_text("#caption-tags", "night 1")
    page.click("#caption-tags [data-value=night]")
    page.wait("document.querySelector('#caption-tag').querySelector('input, textarea').value"
              " === 'night'")  # fmt: skip
    # What is typed and what a button does to it come one after the other, on any connection.
    page.page.evaluate(HOLD, ["a sks mug at sea", '"night"'])
    rows.nth(1).fill("a sks mug at sea")
    page.click("#tag-append")
    are(page, "night, a sks mug", "a sks mug at sea, night")
    page.click("#tag-first")
    are(page, "night, a sks mug", "night, a sks mug at sea")
    page.click("#tag-remove")
    are(page, "a sks mug", "a sks mug at sea")
    # The subject changes while somebody types.
    rows.first.fill("typed before the subject was changed")
    page.choose("#subject", "Ring robot")
    page.wait("([id]) => ![...document.querySelectorAll('#caption-rows textarea')]"
              ".some((row) => row.dataset.photo.startsWith(id))", [stored.id])  # fmt: skip
    app.until(lambda: captions_of(stored)["001.jpg"] == "typed before the subject was changed")


def test_photos_that_are_added_beside_a_sample_are_a_subject_of_their_own(
    visit: Callable[..., Visit], app: App, tmp_path: Path
) -> None:
    workspace = Workspace(app.runs)
    page = visit()
    page.click("[data-value=heart_teapot]")
    page.wait_text("#upload-to", "Heart teapot is a sample")
    sample = subjects_in(workspace)[0]
    files = [photo(tmp_path / "a.jpg"), tmp_path / "a.txt"]
    files[1].write_text("a sks dog at night", encoding="utf-8")
    page.page.evaluate("window.confirm = (text) => { window.asked = text; return false; }")
    page.page.set_input_files("#upload input[type=file]", files)
    page.wait_text("#report", "1 photo and 1 caption added to the new subject My subject")
    assert "to the sample Heart teapot?" in page.page.evaluate("window.asked")
    assert len(read_subject(workspace, sample.id).photos) == 5
    page.wait("document.querySelector('#caption-rows textarea').value === 'a sks dog at night'")
    # The class of the sample is not that of the new subject.
    page.tab("Train")
    page.wait("document.querySelector('#class-word input, #class-word textarea')?.value === ''")
    # Nor are they where the page is slow, and has them still when the next subject is chosen.
    page.page.evaluate("studio.letters = {'class-word': 'mug'}")
    words = "([id, word]) => studio.words({}, id, word, 'sks')"
    assert page.page.evaluate(words, ["new", "teapot"]) == {}
    typed = {"subject": "new", "class_word": "mug", "token": "sks"}
    assert page.page.evaluate(words, ["new", "mug"]) == typed
    assert page.page.evaluate(words, ["another", "mug"]) == {}
