"""``dora-diffusion app``."""

from __future__ import annotations

from dataclasses import dataclass

from dora_diffusion.studio.app.launch import Launch


@dataclass(frozen=True, kw_only=True)
class AppSettings(Launch):
    """Settings of ``app``."""

    def perform(self) -> int:
        """Serve the app until it is interrupted."""
        # Imported here because Gradio is slow to import: --help and errors do not need it.
        from dora_diffusion.studio.app.serve import serve

        serve(self)
        return 0
