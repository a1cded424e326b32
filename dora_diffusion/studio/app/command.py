"""``dora-diffusion app``."""

from __future__ import annotations

from dataclasses import dataclass

from dora_diffusion.studio.app.launch import Launch


@dataclass(frozen=True, kw_only=True)
class AppSettings(Launch):
    """Settings of ``app``, which are those of its server."""

    def perform(self) -> int:
        """Serve the app until it is interrupted."""
        # Gradio is heavy: --help and refusals answer without it.
        from dora_diffusion.studio.app.serve import serve

        serve(self)
        return 0
