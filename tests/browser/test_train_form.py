"""The Train form in the browser: what is shown is what is trained with, and a reload keeps it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dora_diffusion.config import PRESETS
from dora_diffusion.models.memory import Device
from dora_diffusion.studio.app.settings import ADVANCED, GROUPS, PROMPTS, preset_values
from dora_diffusion.studio.jobs.store import Workspace
from dora_diffusion.studio.jobs.subjects import add_photos, new_subject, take_sample
from tests.browser.conftest import SD1, SDXL
from tests.browser.helpers import SAMPLES, App, Visit

BASES = ("embedded:tiny-sd", "embedded:tiny-sdxl", SD1, SDXL)


@pytest.fixture
def fill() -> Callable[[Workspace], None]:
    """Photos of somebody's dog, and a sample, which is the newest subject."""

    def prepared(workspace: Workspace) -> None:
        dog = new_subject(workspace, "My dog")
        add_photos(workspace, dog, sorted((SAMPLES / "bolt_mug").glob("0*.jpg"))[:3])
        take_sample(workspace, SAMPLES, "bolt_mug")

    return prepared


def started(app: App, page: Visit, title: str = "Bolt mug") -> dict[str, Any]:
    """Press Start; the settings of the run that this makes."""
    before = set(app.runs.glob("2*/settings.yaml"))
    page.click("#start")

    def new() -> set[Path]:
        return set(app.runs.glob("2*/settings.yaml")) - before

    (file,) = app.until(new)
    settings: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    queued = f"Queued {title} [0-9:]{{5}}: number {len(before) + 1} in the queue"
    page.wait_text("#train-said", queued)
    return settings


def unfold_all(page: Visit) -> None:
    page.unfold("Advanced settings", *GROUPS)


# Each base and each preset once; the rest of the combinations are for a longer proof.
DIAGONAL = (
    (BASES[0], "fast"), (BASES[1], "balanced"), (SD1, "quality"), (SDXL, "balanced"),
)  # fmt: skip
SLIDER = {
    "target": "a photo of a mug", "positive": "a photo of a large mug",
    "negative": "a photo of a small mug",
}  # fmt: skip
OTHERS = tuple(
    (base, preset) for base in BASES for preset in PRESETS if (base, preset) not in DIAGONAL
)


@pytest.mark.parametrize("pairs", [DIAGONAL, pytest.param(OTHERS, marks=pytest.mark.slow)])
def test_every_preset_of_every_base_is_trained_as_it_is_shown(
    visit: Callable[..., Visit], app: App, pairs: tuple[tuple[str, str], ...]
) -> None:
    page = visit()
    page.tab("Train")
    page.wait("document.querySelector('#class-word input, #class-word textarea')?.value === 'mug'")
    unfold_all(page)
    for base, preset in pairs:
        page.choose("#base-model", f"{base} ·")
        page.fill("#token input, #token textarea", "<sks>" if preset == "fast-word" else "sks")
        page.check(preset.replace("-", " ").capitalize())
        is_slider = preset == "slider"
        if is_slider and page.page.locator("#slider-target:visible").count() == 0:
            page.unfold("Slider: from words")
        for name, text in SLIDER.items() if is_slider else ():
            page.fill(f"#slider-{name} textarea", text)
        # What memory is free decides some of them.
        tenths = (tenth / 10 for tenth in range(400))
        devices = [Device(free_gib=free) for free in (None, *tenths, 1e9)]
        wanted = [preset_values(preset, base, device) for device in devices]
        shown = {str(one["max_train_steps"]) for one in wanted}
        page.wait_text("#plan", f" {base} [^]*max_train_steps ({'|'.join(shown)}) ")
        settings = started(app, page, SLIDER["target"] if is_slider else "Bolt mug")
        assert settings["pretrained_model_name_or_path"] == base
        for name in SLIDER if is_slider else ():
            page.fill(f"#slider-{name} textarea", "")
        # Presets may give a model the same values, which no second run may have.
        for folder in app.runs.glob("2*"):
            shutil.rmtree(folder)
        for name in ADVANCED:
            allowed = [one[name] for one in wanted]
            assert settings[name] in allowed, (base, preset, name, settings[name])


def test_a_section_that_is_closed_and_opened_changes_nothing(
    visit: Callable[..., Visit], app: App
) -> None:
    page = visit()
    page.tab("Train")
    page.wait_text("#plan", "max_train_steps 300")
    for _ in range(2):
        unfold_all(page)
        page.unfold(*GROUPS, "Advanced settings")
    settings, wanted = started(app, page), preset_values("balanced", BASES[0])
    assert {name: settings[name] for name in ADVANCED} == wanted
    assert settings["magnitude_lr"] is settings["lora_alpha"] is settings["resolution"] is None


def test_a_page_that_is_loaded_again_logs_no_error(visit: Callable[..., Visit]) -> None:
    page = visit()
    for _ in range(2):
        page.tab("Train")
        page.wait_text("#plan", "max_train_steps")
        page.reload()
    assert page.wrong == []
    # It would offer to record the screen.
    assert page.page.locator("footer").get_by_text("Settings").count() == 0


def test_a_page_that_is_left_asks_nothing_more(visit: Callable[..., Visit]) -> None:
    """It would open new streams, which lose their session with the old ones."""
    page = visit()
    page.page.evaluate("dispatchEvent(new Event('beforeunload'))")
    asked: list[str] = []
    # What is drawn and run is the browser's own matter, and ends with the page.
    own = ("image", "script", "stylesheet", "font")
    page.page.on(
        "request", lambda request: request.resource_type in own or asked.append(request.url)
    )
    answered = "fetch('config').then(() => { window.answered = true; })"
    page.page.evaluate(f"() => {{ {answered} }}")
    page.page.evaluate("() => new Promise((done) => requestAnimationFrame(done))")
    assert asked == []
    # Whoever has stayed is answered.
    page.page.keyboard.press("Shift")
    page.wait("window.answered")
    assert any(url.endswith("/config") for url in asked)
    page.wrong.clear()  # Gradio thinks that its streams were closed, and has opened others.


def test_a_reload_keeps_the_form(visit: Callable[..., Visit], app: App) -> None:
    page = visit()
    page.tab("Train")
    page.wait_text("#plan", "max_train_steps 300")
    # One thing after the other has been filled in, as a person does it.
    page.choose("#base-model", f"{SDXL} ·")
    page.wait_text("#plan", "max_train_steps 1000")
    page.check("Quality")
    page.wait_text("#plan", "max_train_steps 1500")
    page.fill("#class-word input, #class-word textarea", "teacup")
    page.wait_text("#plan", "sks teacup")
    page.fill("#token input, #token textarea", "zwx")
    page.wait_text("#plan", "zwx teacup")
    page.fill("#sample-prompts textarea", "a {subject} under water")
    page.wait_text("#plan", "a zwx teacup under water")
    page.unfold("Advanced settings", "Adapter")
    page.set_setting("lora_alpha", "5.5")
    page.reload()
    page.tab("Train")
    said = page.wait_text("#plan", "--lora_alpha 5.5")
    for words in (SDXL, "--max_train_steps 1500", "a zwx teacup under water", "--rank 16"):
        assert words in said
    assert page.page.get_by_label("Quality").is_checked()
    # Another person's browser knows nothing of it.
    other = visit()
    other.tab("Train")
    other.wait_text("#plan", "max_train_steps 300")


def test_many_fields_that_change_together_ask_for_one_plan(visit: Callable[..., Visit]) -> None:
    """Requests of the same moment overtake each other, and the last answer is what is shown."""
    page = visit()
    page.tab("Train")
    page.wait_text("#plan", "max_train_steps 300")
    asked: list[list[Any]] = []

    def note(request: Any) -> None:
        if "queue/join" in request.url:
            values = json.loads(request.post_data)["data"]
            # The subject, the model, token, class and prompts come before the settings, other
            # subjects and a slider's prompts behind them.
            if len(values) == 6 + len(ADVANCED) + len(PROMPTS):
                asked.append(values[5:][: len(ADVANCED)])

    page.page.on("request", note)
    page.choose("#base-model", f"{SDXL} ·")
    page.wait_text("#plan", f"{SDXL} [^]*max_train_steps 1000 ")
    # Of the model, of its settings, and once more for what came meanwhile: each of a dozen settings
    # that change would be a request of its own.
    assert len(asked) < 8
    assert asked[-1][list(ADVANCED).index("max_train_steps")] == "1000"


TRACKED = """async () => {
    const scripts = performance.getEntriesByType('resource').map(({name}) => name)
    const {[0]: script} = scripts.filter((name) => name.includes('/statustracker-'))
    const States = Object.values(await import(script)).find((one) => one?.prototype?.resolve_args)
    const states = new States()
    states.register(1, [10], [11], 'hidden')
    states.register(2, [10], [11], 'minimal')
    return [1, 2].map((event) => {
        states.update({fn_index: event, status: 'pending'})
        return Object.keys(states.current)
    })
}"""


def test_an_event_without_a_sign_of_its_work_is_told_to_no_field(
    visit: Callable[..., Visit],
) -> None:
    """Gradio looks through the whole page for each field that is told."""
    visit().wait(f"async () => JSON.stringify(await ({TRACKED})()) === '[[],[\"10\"]]'")


def test_nothing_scrolls_sideways_on_any_screen(visit: Callable[..., Visit]) -> None:
    page = visit(390)
    page.wait("document.querySelectorAll('#crops img').length >= 4")
    lefts = page.page.evaluate(
        "[...document.querySelectorAll('#crops .thumbnail-item')]"
        ".map(e => Math.round(e.getBoundingClientRect().left))"
    )
    assert len(set(lefts)) == 2

    def scrolling(width: int) -> Any:
        page.page.set_viewport_size({"width": width, "height": 900})
        page.drawn()
        return page.page.evaluate(
            "[...document.querySelectorAll('*')].filter(e => e.clientWidth"
            " && e.scrollWidth > e.clientWidth && (e === document.documentElement"
            " || ['auto', 'scroll'].includes(getComputedStyle(e).overflowX)))"
            ".map(e => [e.tagName, e.id, e.className, e.scrollWidth, e.clientWidth])"
        )

    widths = (390, 800, 1280)
    for name, shown, section in (
        ("Subject", "#upload", "New subject"), ("Train", "#status", "Advanced settings"),
        ("Generate", "#make", "Grid of"), ("Library", "#library-facts", ""),
    ):  # fmt: skip
        page.tab(name)
        page.wait_for(f"{shown}:visible")
        page.settle()
        assert [scrolling(width) for width in widths] == [[]] * len(widths), name
        if section:
            page.unfold(section)
            page.settle()
            assert [scrolling(width) for width in widths] == [[]] * len(widths), section


if os.environ.get("DORA_DIFFUSION_SCREENS"):  # for whoever wants to look

    @pytest.mark.parametrize("width", [1280, 390])
    def test_screens(visit: Callable[..., Visit], width: int) -> None:
        page = visit(width)
        page.tab("Train")
        page.choose("#base-model", f"{SDXL} ·")
        page.wait_text("#cost", "Memory is from runs")
        folder = Path(os.environ["DORA_DIFFUSION_SCREENS"])
        page.page.screenshot(path=str(folder / f"train-{width}.png"), full_page=True)
