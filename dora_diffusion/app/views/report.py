"""Below the tabs: what a bug report must say of this installation, to copy."""

from __future__ import annotations

import gradio as gr

from dora_diffusion.app import html
from dora_diffusion.app.context import Context, plain
from dora_diffusion.app.views.fields import BUSY, html_block
from dora_diffusion.console.environment import describe_environment
from dora_diffusion.jobs.workspace import RequestError


def add_report(context: Context) -> None:
    """Add the fields: the text is made when they are opened, which takes some seconds."""

    @plain
    def describe() -> str:
        if context.launch.is_open:
            raise RequestError(
                "a shared app does not describe the machine that it runs on; whoever runs it can "
                "call dora-diffusion env there"
            )
        return str(describe_environment(context.workspace.root))

    with gr.Accordion("For a bug report", open=False, elem_id="bug-report") as box:
        text = (
            "What this installation is, as dora-diffusion env prints it: no token, no password, "
            "no name of yours. Add the traceback, or the end of the run's log."
        )
        html_block(html.quiet(text))
        # Without its label it has no button.
        report = gr.Textbox(
            label="This installation", lines=12, max_lines=40, interactive=False,
            placeholder="Looking ...", buttons=["copy"], elem_id="bug-report-text",
        )  # fmt: skip
    box.expand(describe, None, [report], **BUSY)
