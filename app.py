"""The app: ``python app.py``, then open the address it prints."""

from __future__ import annotations

import sys

from dora_diffusion.app.launch import parse_launch
from dora_diffusion.cli import tune_process
from dora_diffusion.commands.report import reporting_errors


def main(argv: list[str] | None = None) -> int:
    """Serve the app until it is interrupted. Returns the exit code."""
    with reporting_errors("app", debug=False) as outcome:
        launch = parse_launch(argv)
        # For this process and the workers that it starts.
        tune_process()
        # Gradio is heavy: --help and refusals answer without it.
        from dora_diffusion.app.serve import serve

        serve(launch)
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
