"""``dora-diffusion verify``: which words are the model and which the adapters, and what it says."""

from __future__ import annotations

import pytest

from dora_diffusion.cli.main import main
from dora_diffusion.export import export_checkpoint


@pytest.fixture(scope="session")
def merged(sd1_folder, trained, tmp_path_factory):
    return export_checkpoint(
        sd1_folder, trained, tmp_path_factory.mktemp("merged") / "model.safetensors"
    )


@pytest.mark.parametrize("behind", [False, True])
def test_the_model_may_stand_behind_the_adapters(behind, merged, sd1_folder, trained, capsys):
    base = ["--base", str(sd1_folder)]
    words = ["--adapter", str(trained), str(merged)] if behind else [str(merged), "--adapter"]
    words += [] if behind else [str(trained)]
    assert main(["verify", *base, *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["adapted", "tensors", "number", "largest", "rounding"]
    assert lines[1].startswith("unet ")
    assert lines[-1].startswith("verified")


def test_another_strength_is_not_proven(merged, sd1_folder, trained, capsys):
    words = [str(merged), "--base", str(sd1_folder), "--adapter", f"{trained}:0.5"]
    assert main(["verify", *words]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("wrong: ") for line in lines)
    assert lines[-1].startswith("NOT what this base and these adapters give")
