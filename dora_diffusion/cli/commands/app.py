"""``dora-diffusion app``."""

from __future__ import annotations

from dora_diffusion.studio.app.launch import Launch

SETTINGS = Launch


def run(args: Launch) -> int:
    """Serve the app until it is interrupted."""
    # Gradio is heavy: --help and refusals answer without it.
    from dora_diffusion.studio.app.serve import serve

    serve(args)
    return 0
