"""``data-idle`` on the page's body: everything that was asked for is answered and drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dora_diffusion.studio.jobs.queue import Lock
from dora_diffusion.studio.jobs.store import Workspace
from tests.browser.helpers import App, Visit

IDLE = "document.body.hasAttribute('data-idle')"
# Long after a page without an unanswered event would be idle.
FRAMES = """() => new Promise((done) => {
    let frames = 0
    const next = () => ++frames > 40 ? done() : requestAnimationFrame(next)
    next()
})"""
CHANGES = """window.changes = 0
new MutationObserver((all) => { window.changes += all.length })
    .observe(document.body, {attributeFilter: ['data-idle']})"""

KEPT = """new MutationObserver(() => { sessionStorage.idle = 'yes' })
    .observe(document.body, {attributeFilter: ['data-idle']})"""


def is_idle(page: Visit) -> bool:
    return bool(page.page.evaluate(IDLE))


def hold(page: Visit) -> list[Any]:
    """Hold back the page's next event, but for the clock's; a list for it."""
    clocks = page.page.evaluate(
        "gradio_config.dependencies.filter(({targets}) =>"
        " targets.some(([, name]) => name === 'tick')).map(({id}) => id)"
    )
    held: list[Any] = []

    def take(route: Any) -> None:
        is_clock = route.request.post_data_json["fn_index"] in clocks
        route.continue_() if is_clock or held else held.append(route)

    page.page.route("**/queue/join*", take)
    return held


def wait_for(page: Visit, held: list[Any]) -> None:
    # Playwright tells of requests while it is asked for something.
    page.app.until(lambda: page.page.evaluate("true") and held)


def test_the_page_is_idle_once_it_has_shown_the_answer_and_not_before(
    visit: Callable[..., Visit],
) -> None:
    page = visit()
    page.tab("Train")
    page.settle()
    held = hold(page)
    page.click("#start")
    assert not is_idle(page)
    wait_for(page, held)
    page.page.evaluate(FRAMES)
    assert not is_idle(page)
    assert page.page.evaluate("messages.length") == 0
    held[0].continue_()
    page.settle()
    assert page.page.evaluate("messages.length") == 1
    assert "there is no subject yet" in page.toast().lower()


def test_what_its_user_does_takes_the_mark_away_and_the_clock_does_not(
    visit: Callable[..., Visit],
) -> None:
    page = visit()
    page.page.evaluate(CHANGES)
    for _ in range(2):
        with page.page.expect_request("**/queue/join*") as request:
            pass
        assert request.value.response().finished() is None
    page.page.evaluate(FRAMES)
    assert page.page.evaluate("changes") == 0
    for kind in ("pointerdown", "keydown", "input", "change", "focusout"):
        act = f"document.body.dispatchEvent(new Event('{kind}'))"
        assert page.page.evaluate(f"{IDLE} && ({act}, !{IDLE})"), kind
        page.settle()


def test_an_event_that_is_not_taken_is_not_waited_for(visit: Callable[..., Visit]) -> None:
    page = visit()
    page.tab("Train")
    # Gradio may load the page again, whose storage stays.
    page.page.evaluate(KEPT)
    refusals: tuple[Callable[[Any], None], ...] = (
        lambda route: route.fulfill(status=503, body="{}"), lambda route: route.abort(),
    )  # fmt: skip
    for refuse in refusals:
        page.settle()
        held = hold(page)
        page.click("#start")
        wait_for(page, held)
        assert not is_idle(page)
        page.page.evaluate("delete sessionStorage.idle")
        refuse(held[0])
        page.wait("sessionStorage.idle")
    page.wrong.clear()


def test_an_event_whose_server_has_ended_is_not_waited_for(
    visit: Callable[..., Visit], app: App
) -> None:
    page = visit()
    page.tab("Generate")
    lock = Lock(Workspace(app.runs).device_lock)
    assert lock.take()
    try:
        page.click("#make")
        page.wait_text("#turn", "Waiting until the device is free")
        page.page.evaluate(FRAMES)
        assert not is_idle(page)
        app.kill()
    finally:
        lock.free()
    page.page.wait_for_function(IDLE)
    page.wrong.clear()
