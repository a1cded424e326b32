"""``dora-diffusion app``: its flags, who may reach it, and what it does not import to say so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dora_diffusion.cli import main as cli
from dora_diffusion.studio.app.launch import Launch
from tests.refusal import refused

ROOT = Path(__file__).resolve().parents[3]


def parse_launch(flags: list[str]) -> Launch:
    launch = cli.read_settings(cli.build_parser().parse_args(["app", *flags]))
    assert isinstance(launch, Launch)
    return launch


@pytest.fixture(autouse=True)
def _no_auth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DORA_DIFFUSION_AUTH", raising=False)


def test_the_default_is_this_machine_alone() -> None:
    launch = parse_launch([])
    assert (launch.host, launch.share, launch.logins) == ("127.0.0.1", False, {})
    assert not launch.is_open


@pytest.mark.parametrize(
    "flags",
    [["--share"], ["--host", "0.0.0.0"], ["--host", "::"], ["--host", "example.org"],
     ["--allowed_host", "localhost", "studio.example"]],
)  # fmt: skip
def test_an_open_app_without_a_password_is_refused(flags: list[str]) -> None:
    with refused("auth", "lets others reach"):
        parse_launch(flags)


@pytest.mark.parametrize("port", ["99999", "-1"])
def test_a_port_that_is_none_is_refused(port: str) -> None:
    with refused("port"):
        parse_launch(["--port", port])


@pytest.mark.parametrize("auth", ["ann", "ann:short", ":longenough", "ann:"])
def test_a_bad_password_is_refused(auth: str) -> None:
    with refused("auth", "must be NAME:PASSWORD"):
        parse_launch(["--share", "--auth", auth])


def test_help_and_refusal_need_no_gradio() -> None:
    code = (
        "import sys; from dora_diffusion.cli.main import main; code = main(['app', '--share']);"
        "print(code, 'gradio' in sys.modules, 'torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        encoding="utf-8",
    )
    assert result.stdout.split() == ["1", "False", "False"]
    assert result.stderr.startswith("error: --share lets others reach this app")
