"""The tensors of a single file and those inside of them, planned both ways."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dora_diffusion.config.families import FAMILIES
from dora_diffusion.export import export_checkpoint
from dora_diffusion.formats.adapter.file import AdapterFile, write_adapter
from dora_diffusion.formats.checkpoint.models import CheckpointFile, PipelineFolder
from dora_diffusion.formats.checkpoint.weights import names_of_configs, plan_checkpoint
from dora_diffusion.numerics.weights import LayerWeights

MakeAdapter = Callable[..., dict[str, LayerWeights]]


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_the_two_plans_are_inverse(
    tmp_path: Path, family: str, request: pytest.FixtureRequest, random_adapter: MakeAdapter
) -> None:
    folder = request.getfixturevalue(f"{family}_folder")
    zero = write_adapter(tmp_path / "z", AdapterFile(random_adapter(folder, every=50)))
    base = export_checkpoint(folder, zero, tmp_path / "base.safetensors", strength=0.0)
    with PipelineFolder.open(folder) as pipeline, CheckpointFile.open(base) as file:
        configs = {c: pipeline.config(c) for c in ("unet", "vae", "scheduler")}
        names = list(pipeline.specs)
        plan = plan_checkpoint(FAMILIES[family], names_of_configs(FAMILIES[family], configs), names)
        assert sorted(file.entries, key=lambda entry: entry.key) == plan
        for name in names:
            assert torch.equal(file[name], pipeline[name]), name
