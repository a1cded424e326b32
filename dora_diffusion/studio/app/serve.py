"""Starting and stopping the server."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
import webbrowser
from collections.abc import Collection, Sequence
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

from dora_diffusion.models.embedded import samples_folder
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
        if launch.logins:
            print(f"This app requires a name and a password. {SHARED}", flush=True)
        if launch.browser:
            webbrowser.open(address)
        while not ended.wait(1):  # On Windows a wait without a timeout blocks signals.
            pass
    finally:
        context.queue.close()
        blocks.close(verbose=False)
        print("\n".join(["The app has ended.", *_left(context.jobs(fresh=True))]), flush=True)


def _left(jobs: Sequence[Job]) -> list[str]:
    """Return lines on active jobs, which continue without the app, and on waiting jobs."""
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
    """ASGI middleware that refuses requests from other sites' pages, see `Launch.refusal`.

    Args:
        app: ASGI app for accepted requests.
        launch: Settings of the server.
        shared: Host names of the share link, added once it is created.
    """

    def __init__(self, app: Any, launch: Launch, shared: Collection[str]) -> None:
        self._app = app
        self._launch = launch
        self._shared = shared

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Forward a request, or refuse it with status 403 or by closing its websocket."""
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
    """Start the server in threads. Returns the context, the Gradio app and its address."""
    context = Context(launch)
    # Keep uploads inside the runs folder. Gradio reads this on import.
    os.environ["GRADIO_TEMP_DIR"] = str(context.workspace.cache.resolve())
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    # Otherwise Gradio builds a pandas table of the last 10,000 events after each event.
    os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = str(2**62)
    # Instead of `launch(run_history=False)`, because earlier releases lack the argument.
    os.environ["GRADIO_RUN_HISTORY"] = "False"
    from starlette.middleware import Middleware

    from dora_diffusion.studio.app.page import build_page

    # Read the runs in advance: with many of them the first page would wait a second.
    threading.Thread(target=context.jobs, name="first-look", daemon=True).start()
    _wait_for_servers()
    blocks, share_names = build_page(context), set[str]()
    blocks.queue(default_concurrency_limit=8, max_size=200)
    _, local, shared = blocks.launch(
        server_name=launch.host,
        server_port=free_port() if launch.port == 0 else launch.port,
        share=launch.share,
        auth=list(launch.logins.items()) or None,
        prevent_thread_lock=True,
        quiet=True,
        show_error=True,
        inbrowser=False,
        allowed_paths=[
            str(path.resolve())
            for path in (context.workspace.images, context.workspace.exports, samples_folder())
        ],
        max_file_size=MAX_BYTES,
        # Gradio's "Settings" link would offer to record the screen.
        footer_links=[],
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        # Otherwise Gradio stops the app if its page takes more than three seconds.
        _frontend=False,
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


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_for_servers() -> None:
    """Make Gradio wait until a server has started or ended, instead of at most five seconds.

    On a busy machine, Gradio would report that the port is taken, or start two servers.
    """
    from gradio import http_server

    def run_in_thread(server: Any) -> None:
        server.thread = threading.Thread(target=server.run, daemon=True)
        server.thread.start()
        while not server.started:
            if not server.thread.is_alive():
                raise http_server.ServerFailedToStartError("the port is taken")
            time.sleep(0.001)

    http_server.Server.run_in_thread = run_in_thread


THEME = json.loads(Path(__file__).with_name("theme.json").read_text(encoding="utf-8"))
HEAD = f"""<meta name="color-scheme" content="light dark">
<script>{Path(__file__).with_name("page.js").read_text(encoding="utf-8")}</script>
<style>{Path(__file__).with_name("phone.css").read_text(encoding="utf-8")}</style>"""


def spoken_words() -> Any:
    """Return the screen readers' text for the end of an event, which Gradio 6 lacks."""
    import gradio as gr

    return gr.I18n(en={"common.complete": "Complete"})


def make_theme() -> Any:
    """Return the Gradio theme; other styles are in `style.css`."""
    import gradio as gr

    persimmon = gr.themes.Color(*THEME["persimmon"], name="persimmon")
    colors = THEME["day_and_night"].items()
    light = {name: day for name, (day, _) in colors}
    dark = {f"{name}_dark": night for name, (_, night) in colors}
    return gr.themes.Base(
        primary_hue=persimmon,
        secondary_hue=persimmon,
        neutral_hue="stone",
        radius_size="lg",
        font=THEME["font"],
        font_mono=THEME["font_mono"],
    ).set(**light, **dark, **THEME["fields_without_boxes"])
