"""The page: masthead, four tabs, and the one clock that keeps them true."""

from __future__ import annotations

from typing import Any

import gradio as gr

from dora_diffusion.app import html
from dora_diffusion.app.context import Context
from dora_diffusion.app.views import generate, library, run, subject, train
from dora_diffusion.app.views.fields import QUIET

TICK_SECONDS = 2.0
_DAY = 24 * 3600


def build_page(context: Context) -> gr.Blocks:
    """Build the app. Nothing in it holds state that the disk does not."""
    with gr.Blocks(
        title="DoRA studio", analytics_enabled=False, delete_cache=(3600, _DAY), fill_width=False
    ) as blocks:
        masthead = gr.HTML(html.masthead(None), padding=False)
        with gr.Tabs() as tabs:
            # Tabs that are not rendered lose what is sent to them.
            with gr.Tab("Subject", id="subject", render_children=True):
                subjects = subject.build(context)
            with gr.Tab("Train", id="train", render_children=True) as train_tab:
                training = train.build(context, subjects)
            with gr.Tab("Generate", id="generate", render_children=True):
                generating = generate.build(context)
            with gr.Tab("Library", id="library", render_children=True):
                shelves = library.build(context)
        subject.connect(context, subjects, blocks)
        train.connect(context, training, subjects, train_tab.select)
        generate.connect(context, generating)
        library.connect(context, shelves)
        for button, tab in (
            (subjects.go_on, "train"),
            (training.shown.to_generate, "generate"),
            (training.shown.to_library, "library"),
        ):
            button.click(lambda tab=tab: gr.Tabs(selected=tab), None, [tabs], **QUIET)
        _connect_clock(context, blocks, masthead, training, generating, shelves)
    return blocks


def _connect_clock(
    context: Context, blocks: gr.Blocks, masthead: Any, training: Any, generating: Any, shelves: Any
) -> None:
    """One timer, outside of the tabs, and the page's load refresh everything that can change."""
    # What this page was last sent: what has not changed is not sent again.
    seen = gr.State({})
    shown = training.shown
    inputs = [seen, shown.run, generating.adapter, shelves.run]
    # In the order in which the parts come.
    outputs = [
        seen, masthead, shown.run, shown.status, shown.loss, shown.log, shown.jobs, shown.samples,
        shown.stop, shown.kill, shown.resume, shown.remove, shown.next, shown.details,
        shown.chooser.box, shown.chooser.start, shown.chooser.cards, generating.adapter,
        shelves.gallery, shelves.run, shelves.side, shelves.merges,
    ]  # fmt: skip

    def tick(known: dict[str, Any], shown_run: Any, adapter: Any, shelf: Any) -> list[Any]:
        jobs = context.jobs()
        parts = {
            "masthead": html.masthead(jobs),
            **run.refresh(context, jobs, shown_run),
            **generate.refresh(context, jobs, adapter),
            **library.refresh(jobs, shelf),
        }
        now, updates = dict(known or {}), []
        for name, part in parts.items():
            # A part is a value, or (what tells whether it changed, how to make it).
            mark, make = part if isinstance(part, tuple) else (part, None)
            fresh = now.get(name, _NEVER) != mark
            now[name] = mark
            updates.append((make() if make else mark) if fresh else gr.skip())
        return [now, *updates]

    gr.Timer(TICK_SECONDS).tick(tick, inputs, outputs, trigger_mode="once", **QUIET)
    blocks.load(tick, inputs, outputs, **QUIET)


_NEVER = object()
