"""``data-idle`` on the page's body: everything that was asked for is answered and drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


def is_idle(page: Visit) -> bool:
    return bool(page.page.evaluate(IDLE))


def hold(page: Visit) -> list[Any]:
    """Hold back what the page sends from now on, but for the clock's; the requests that are held."""
    clocks = page.page.evaluate(
        "gradio_config.dependencies.filter(({targets}) =>"
        " targets.some(([, name]) => name === 'tick')).map(({id}) => id)"
    )
    held: list[Any] = []

    def take(route: Any) -> None:
        is_clock = route.request.post_data_json["fn_index"] in clocks
        route.continue_() if is_clock else held.append(route)

    page.page.route("**/queue/join*", take)
    return held


def test_the_page_is_idle_once_it_has_shown_the_answer_and_not_before(
    visit: Callable[..., Visit],
) -> None:
    page = visit()
    page.tab("Train")
    page.settle()
    held = hold(page)
    page.click("#start")
    assert not is_idle(page)
    page.wait("true")  # Playwright tells of requests while it is asked for something.
    page.app.until(lambda: page.page.evaluate("true") and held)
    page.page.evaluate(FRAMES)
    assert not is_idle(page)
    assert page.page.evaluate("messages.length") == 0
    while held:
        held.pop().continue_()
    page.settle()
    assert page.page.evaluate("messages.length") == 1
    assert "there is no subject yet" in page.toast().lower()


def test_what_is_done_on_the_page_takes_the_mark_away_at_once(visit: Callable[..., Visit]) -> None:
    page = visit()
    for kind in ("pointerdown", "keydown", "input", "change", "focusout"):
        page.settle()
        act = f"document.querySelector('#tasks').dispatchEvent(new Event('{kind}'))"
        assert page.page.evaluate(f"{IDLE} && ({act}, !{IDLE})"), kind
    page.settle()


def test_the_clock_of_the_page_wakes_it_not(visit: Callable[..., Visit]) -> None:
    page = visit()
    page.page.evaluate(CHANGES)
    for _ in range(2):
        with page.page.expect_request("**/queue/join*") as request:
            pass
        assert request.value.response().finished() is None
    page.page.evaluate(FRAMES)
    assert page.page.evaluate("changes") == 0
    page.page.keyboard.press("Shift")
    page.settle()
    assert page.page.evaluate("changes") == 2


def test_what_gets_no_answer_is_not_waited_for(visit: Callable[..., Visit], app: App) -> None:
    """A request that fails, one that is refused, and events whose server has ended."""
    page = visit()
    page.tab("Train")
    page.settle()
    for refuse in (
        lambda route: route.abort(), lambda route: route.fulfill(status=503, body="{}"),
    ):  # fmt: skip
        held = hold(page)
        page.click("#start")
        page.app.until(lambda: page.page.evaluate("true") and held)  # noqa: B023
        while held:
            refuse(held.pop())
        page.settle()
        page.page.unroute("**/queue/join*")
    # The server takes the event, and does not live to answer it.
    page.page.evaluate("""() => {
        const {fetch} = window
        window.fetch = (...request) => String(request[0]).includes('/queue/data')
            ? fetch(...request).then((answer) => { window.isOpen = true; return answer })
            : fetch(...request)
    }""")
    page.click("#start")
    page.wait("window.isOpen")
    app.kill()
    page.page.locator("#start").dispatch_event("click")
    page.page.wait_for_function(IDLE)
    page.wrong.clear()
