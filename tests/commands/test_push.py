"""``dora-diffusion push``: private unless asked otherwise; the rest is tested with the hub."""

from __future__ import annotations

from pathlib import Path

import pytest

from dora_diffusion.cli import main


@pytest.mark.parametrize(("flags", "private"), [((), True), (("--public",), False)])
def test_what_is_asked_for_is_pushed(
    flags: tuple[str, ...],
    private: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls: list[tuple[str | Path, str, bool]] = []

    def push(folder: str | Path, repository: str, *, private: bool) -> str:
        calls.append((folder, repository, private))
        return "https://hub/me/mug"

    monkeypatch.setattr("dora_diffusion.hub.push", push)
    assert main(["push", "run", "me/mug", *flags]) == 0
    assert calls == [("run", "me/mug", private)]
    assert capsys.readouterr().out == "https://hub/me/mug\n"
