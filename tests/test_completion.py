"""Completion in the shell: what argcomplete is answered."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("argcomplete")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("dora-diffusion ex", {"export "}),
        ("dora-diffusion train --prior_preservation_mode i", {"images", "image-free"}),
        ("dora-diffusion demo --subject ring", {"ring_robot "}),
        ("dora-diffusion app --runs", {"--runs_dir "}),
    ],
)
def test_a_line_is_completed(line, expected, tmp_path):
    answer = tmp_path / "answer"
    environment = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    code = "import sys; from dora_diffusion.cli import main; main()"
    subprocess.run([sys.executable, "-c", code], env=os.environ | environment, check=True)
    assert set(answer.read_text().split("\n")) == expected
