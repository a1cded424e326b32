"""From a sample subject to an image without a mouse; the Library; and axe-core on every tab."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.browser.test_app import images_of
from tests.browser.test_images import serious

Visit = App = Any
MOST_STOPS = 400
TABS = ("Subject", "Train", "Generate", "Library", "Compare")


def reach(page: Visit, is_it: str) -> None:
    """Press Tab until a function in JavaScript holds for the element that has the focus."""
    keyboard = page.page.keyboard
    for _ in range(MOST_STOPS):
        keyboard.press("Tab")
        if page.page.evaluate(f"({is_it})(document.activeElement)"):
            page.drawn()
            return
    raise AssertionError(f"Tab does not reach {is_it}")


def enter(page: Visit, is_it: str) -> None:
    reach(page, is_it)
    page.page.keyboard.press("Enter")


def with_text(role: str, text: str) -> str:
    return f"e => e.matches('{role}') && e.innerText.trim().startsWith('{text}')"


def write(page: Visit, is_it: str, text: str) -> None:
    reach(page, is_it)
    page.page.keyboard.press("Control+a")
    page.page.keyboard.type(text)
    page.page.keyboard.press("Tab")


def test_from_a_sample_to_an_image_by_keys_alone(visit: Callable[..., Visit], app: App) -> None:
    page = visit()
    keyboard = page.page.keyboard
    enter(page, "e => e.dataset.value === 'bolt_mug'")
    page.wait_text("#report", "ready to train")
    enter(page, with_text("[role=tab]", "Train"))
    page.wait("document.querySelector('#class-word input, #class-word textarea')?.value === 'mug'")
    reach(page, "e => e.type === 'radio' && e.value === 'fast'")
    keyboard.press("Space")
    page.wait_text("#plan", "max_train_steps 50")
    for title in ("Advanced settings", "Optimization", "Validation", "Output"):
        enter(page, with_text("button", title))
    for name, value in (
        ("max_train_steps", "4"), ("checkpointing_steps", "2"), ("validation_steps", "0"),
        ("num_validation_images", "0"),
    ):  # fmt: skip
        write(page, f"e => e.labels?.[0]?.innerText.startsWith('{name}')", value)
        page.wait_text("#plan", f"{name} {value}")
    enter(page, "e => e.id === 'start'")
    page.wait_text("#status", "Write .sks mug. in a prompt")
    page.wait_for("#to-generate")
    enter(page, "e => e.id === 'to-generate'")
    page.wait_for("#seed")
    page.wait("document.querySelector('#adapter input')?.value.includes('step 4')")
    write(page, "e => e.closest('#seed')", "7")
    enter(page, with_text("button", "Steps, guidance"))
    for name, value in (("Steps", "2"), ("Images", "1")):
        write(page, f"e => e.ariaLabel === 'number input for {name}'", value)
    enter(page, "e => e.id === 'make'")
    (made,) = app.until(lambda: images_of(app))
    page.wait_for(f"img[src*='{made.name}']")
    page.wait_text("#parameters", "Steps: 2, [^]*Seed: 7")
    (run,) = app.jobs()
    assert (run.state, run.step, run.trigger) == ("done", 4, "sks mug")


def test_the_library_takes_in_names_resizes_combines_and_compares(
    visit: Callable[..., Visit], app: App
) -> None:
    """With a file of the run above, which is taken as one that was made elsewhere."""

    def add(count: int, title: str) -> None:
        page.wait(f"document.querySelectorAll('#tasks [data-do=add]').length === {count}")
        page.click("#tasks [data-do=add]")
        page.wait_text("#import-said", f"{title}.* is in the library")
        page.wait_text("#library-facts", title)

    page = visit()
    page.tab("Library")
    page.wait_text("#library-facts", "sks mug")
    page.press("button", "Import an adapter")
    (run,) = (job.folder for job in app.jobs() if job.kind == "train")
    (file,) = run.glob("*.safetensors")
    page.page.set_input_files("#import-file input[type=file]", file)
    page.wait_text("#import-said", "is in the library")
    page.settle()  # With its stars and its note, which would be written over.
    page.press("button", "Name, stars and note")
    page.fill("#library-name input, #library-name textarea", "Ann's <mug>")
    page.click("#library-rename")
    page.wait_text("#library-facts", "Ann's <mug>")
    page.check("★★★")
    page.fill("#library-note textarea", "good at 0.8")
    (imported,) = (job for job in app.jobs() if job.kind == "import")
    app.until(
        lambda: next(
            (job.record.stars, job.record.note) == (3, "good at 0.8")
            for job in app.jobs() if job.id == imported.id
        )
    )  # fmt: skip
    page.unfold("Resize: a smaller file")
    page.click("#resize")
    assert "a smaller rank, or an energy, first" in page.toast()
    page.fill("#library-Rank input, #library-Rank textarea", "2")
    page.click("#resize")
    add(1, "Ann's <mug>, resized")
    named = "Ann's <mug> ·"  # and neither of those that were made of it
    page.press("button", "Combine with")
    page.choose("#other-adapter", named)
    page.click("#combine")
    add(2, "combined")
    page.press("button", "Compare two")
    page.choose("#rival", named)
    page.fill("#library-Seed input", "7")
    page.click("#rival-compare")
    page.wait_text("#rival-images", "Left: .*combined.*, seed 7[^]*Right: Ann's <mug>, seed 7")
    page.wait("document.querySelectorAll('#rival-slider img').length > 1")


def test_axe_finds_nothing_serious_on_any_tab(visit: Callable[..., Visit]) -> None:
    """With a run, an image, a selected subject and what the Library has made of the run."""
    page = visit()
    for name in TABS:
        page.tab(name)
        page.settle()
        assert serious(page) == [], name
