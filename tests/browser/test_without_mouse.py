"""From a sample subject to an image without a mouse: the one training that the browser starts."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.browser.helpers import App, Visit, images_of

MOST_STOPS = 400


def reach(page: Visit, is_it: str) -> None:
    """Press Tab until a function in JavaScript holds for the element that has the focus."""
    keyboard = page.page.keyboard
    for _ in range(MOST_STOPS):
        keyboard.press("Tab")
        if page.page.evaluate(f"({is_it})(document.activeElement)"):
            page.settle()
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


@pytest.mark.usefixtures("leading")
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
    write(page, "e => e.closest('#steps')", "2")
    write(page, "e => e.ariaLabel === 'number input for Images'", "1")
    enter(page, "e => e.id === 'make'")
    (made,) = app.until(lambda: images_of(app))
    page.wait_for(f"img[src*='{made.name}']")
    page.wait_text("#parameters", "Steps: 2, [^]*Seed: 7")
    (run,) = app.jobs()
    assert (run.state, run.step, run.trigger) == ("done", 4, "sks mug")
