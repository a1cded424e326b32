"""Pipeline folders by canonical names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dora_diffusion.config.base import BaseModel
from dora_diffusion.export import export_checkpoint
from dora_diffusion.formats.adapter.file import AdapterFile, write_adapter
from dora_diffusion.formats.files.stream import TensorFileError
from dora_diffusion.numerics.weights import LayerWeights

MakeAdapter = Callable[..., dict[str, LayerWeights]]


FAMILIES = ["sd1", "sd2", "sdxl"]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def base(family: str, request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(f"{family}_folder")
    return folder


def test_components_outside_of_the_folder_are_refused(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter
) -> None:
    """A model from elsewhere could copy files from anywhere to anywhere."""
    base = tmp_path / "models" / "base"
    shutil.copytree(sd1_folder, base)
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "key").write_text("private", encoding="utf-8")
    file = write_adapter(tmp_path / "a", AdapterFile(random_adapter(sd1_folder, every=20)))
    index = json.loads((base / "model_index.json").read_text(encoding="utf-8"))
    output = tmp_path / "one" / "two" / "merged"
    single = export_checkpoint(sd1_folder, file, tmp_path / "base.safetensors")
    for name in ("../../secrets", str(tmp_path / "secrets"), "unet/../../../secrets", ".."):
        text = json.dumps({**index, name: ["diffusers", "Anything"]})
        (base / "model_index.json").write_text(text, encoding="utf-8")
        with pytest.raises(TensorFileError, match="is not the name of a folder in it"):
            export_checkpoint(base, file, output)
        with pytest.raises(TensorFileError, match="is not the name of a folder in it"):
            export_checkpoint(BaseModel(single, model_config=base), file, output)
    assert [path.parent.name for path in tmp_path.rglob("key")] == ["secrets"]
