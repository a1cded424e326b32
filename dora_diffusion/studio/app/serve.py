"""Starting and stopping the server."""

from __future__ import annotations

import os
import signal
import threading
import webbrowser
from collections.abc import Collection, Sequence
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

from dora_diffusion.studio.app.context import Context
from dora_diffusion.studio.app.launch import SHARED, Launch
from dora_diffusion.studio.jobs.records import LOG
from dora_diffusion.studio.jobs.snapshot import Job
from dora_diffusion.studio.jobs.uploads import MAX_BYTES
from dora_diffusion.system import INTERRUPTS

STYLE = Path(__file__).with_name("style.css")


def serve(launch: Launch) -> None:
    """Serve until Ctrl-C, Ctrl-Break or SIGTERM. Running jobs continue without the app."""
    ended = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        ended.set()

    for number in (*INTERRUPTS, signal.SIGTERM):
        signal.signal(number, end)
    context, blocks, address = start(launch)
    try:
        print(f"open {address}", flush=True)
        if launch.auth:
            print(f"This app asks for a name and a password. {SHARED}", flush=True)
        if launch.browser:
            webbrowser.open(address)
        while not ended.wait(1):  # Windows lets no signal through a wait without an end.
            pass
    finally:
        context.queue.close()
        blocks.close(verbose=False)
        print("\n".join(["The app has ended.", *_left(context.jobs(fresh=True))]), flush=True)


def _left(jobs: Sequence[Job]) -> list[str]:
    """Return lines on the jobs that continue without the app, and on those that wait for it."""
    lines = [
        f"{job.title} continues without it: start the app again to follow or stop it, or read "
        f"{job.folder / LOG}"
        for job in jobs
        if job.is_active
    ]
    waiting = [job.title for job in reversed(jobs) if job.state == "waiting"]
    when = "Until the app is started again, these wait"
    return lines + ([f"{when}: {', '.join(waiting)}"] if waiting else [])


class Guard:
    """ASGI middleware: refuse what other sites' pages ask for, see `Launch.refusal`.

    Args:
        app: What answers all other requests.
        launch: How the app is served.
        shared: Names of the share link, which are known only when it is there.
    """

    def __init__(self, app: Any, launch: Launch, shared: Collection[str]) -> None:
        self._app = app
        self._launch = launch
        self._shared = shared

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer with status 403, or close a websocket before it opens, or let it pass."""
        reason = ""
        if scope["type"] in ("http", "websocket"):
            headers: dict[str, list[str]] = {}
            for name, value in scope["headers"]:
                headers.setdefault(name.decode("latin-1"), []).append(value.decode("latin-1"))
            reason = self._launch.refusal(headers, self._shared)
        if not reason:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            kind = [(b"content-type", b"text/plain; charset=utf-8")]
            await send({"type": "http.response.start", "status": 403, "headers": kind})
            await send({"type": "http.response.body", "body": f"{reason}\n".encode()})


def start(launch: Launch) -> tuple[Context, Any, str]:
    """Start serving in threads. Returns the context, the Gradio app and its address."""
    context = Context(launch)
    # Uploads stay inside the runs folder. Gradio reads this when it is imported.
    os.environ["GRADIO_TEMP_DIR"] = str(context.workspace.cache.resolve())
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    # Not `launch(run_history=False)`: earlier releases have neither the history nor the argument.
    os.environ["GRADIO_RUN_HISTORY"] = "False"
    from starlette.middleware import Middleware

    from dora_diffusion.studio.app.page import build_page
    from dora_diffusion.studio.app.serve import HEAD, make_theme, spoken_words

    blocks, share_names = build_page(context), set[str]()
    blocks.queue(default_concurrency_limit=8, max_size=200)
    _, local, shared = blocks.launch(
        server_name=launch.host,
        server_port=launch.port,
        share=launch.share,
        auth=launch.auth,
        prevent_thread_lock=True,
        quiet=True,
        show_error=True,
        inbrowser=False,
        allowed_paths=[
            str(path.resolve())
            for path in (context.workspace.images, context.workspace.exports, launch.samples)
        ],
        max_file_size=MAX_BYTES,
        # Gradio's "Settings" would offer to record the screen.
        footer_links=[],
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        app_kwargs={"middleware": [Middleware(Guard, launch=launch, shared=share_names)]},
        theme=make_theme(),
        css_paths=[STYLE],
        head=HEAD,
        i18n=spoken_words(),
    )
    if shared:
        share_names.add(str(urlsplit(shared).hostname))
    context.queue.start()
    return context, blocks, str(shared or local)


# A page that is left has its streams ended by the browser. Gradio does so first, and logs errors.
_LEAVE = """const abort = AbortController.prototype.abort;
AbortController.prototype.abort = function (...reason) {
  if (window.event?.type !== 'beforeunload') abort.apply(this, reason);
};"""
HEAD = f"""<meta name="color-scheme" content="light dark">
<script>{_LEAVE}</script>
<style>{Path(__file__).with_name("phone.css").read_text(encoding="utf-8")}</style>"""
SANS = ("Inter", "ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "DejaVu Sans Mono", "monospace")


_PERSIMMON = (
    "#fff5ef", "#ffe6d8", "#ffc9ae", "#ffa57d", "#f97c4b", "#e35d2b", "#c4471a", "#a03816",
    "#7f2e15", "#672714", "#3a1107",
)  # fmt: skip
# Name -> colour by day and by night.
_COLORS = {
    "body_background_fill": ("#f6f4f0", "#171412"),
    "background_fill_primary": ("#ffffff", "#211d1a"),
    "background_fill_secondary": ("#faf9f6", "#1c1816"),
    "block_background_fill": ("transparent", "transparent"),
    "block_border_color": ("#e7e2da", "#38322d"),
    "border_color_primary": ("#e7e2da", "#38322d"),
    "block_label_background_fill": ("transparent", "transparent"),
    "block_label_text_color": ("#6b6259", "#b3a89c"),
    "input_background_fill": ("#ffffff", "#211d1a"),
    "input_border_color": ("#ddd6cb", "#453e37"),
    "input_border_color_focus": ("#c4471a", "#ff8d5c"),
    "checkbox_label_background_fill": ("#ffffff", "#211d1a"),
    "checkbox_label_background_fill_selected": ("#fff5ef", "#3a2417"),
    "checkbox_label_border_color": ("#ddd6cb", "#453e37"),
    "checkbox_label_border_color_selected": ("#c4471a", "#ff8d5c"),
    "block_title_text_color": ("#2a2420", "#f2ece5"),
    "block_info_text_color": ("#6b6259", "#b3a89c"),
    "button_primary_background_fill": ("*primary_600", "*primary_600"),
    "button_primary_background_fill_hover": ("*primary_700", "*primary_500"),
    "button_primary_text_color": ("white", "white"),
    "button_secondary_background_fill": ("#efebe4", "#332d28"),
    "button_secondary_background_fill_hover": ("#e5dfd5", "#3f3832"),
}
# Fields stand on the page itself: no box around each of them.
_PLAIN = {
    "block_border_width": "0px",
    "block_padding": "0px",
    "block_label_border_width": "0px",
    "block_title_text_weight": "600",
    "block_shadow": "none",
    "input_border_width": "1px",
    "checkbox_label_border_width": "1px",
    "slider_color": "*primary_600",
}


def spoken_words() -> Any:
    """Return the text for screen readers when work ends, which Gradio 6 has no words for."""
    import gradio as gr

    return gr.I18n(en={"common.complete": "Complete"})


def make_theme() -> Any:
    """The Gradio theme; `style.css` does the rest."""
    import gradio as gr

    persimmon = gr.themes.Color(*_PERSIMMON, name="persimmon")
    dark = {f"{name}_dark": night for name, (_, night) in _COLORS.items()}
    light = {name: day for name, (day, _) in _COLORS.items()}
    return gr.themes.Base(
        primary_hue=persimmon,
        secondary_hue=persimmon,
        neutral_hue="stone",
        radius_size="lg",
        font=SANS,
        font_mono=MONO,
    ).set(**light, **dark, **_PLAIN)
