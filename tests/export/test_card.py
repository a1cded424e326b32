"""The card of a merged folder."""

from __future__ import annotations

from pathlib import Path

import yaml

from dora_diffusion.config.base import BaseModel
from dora_diffusion.export import export_checkpoint
from dora_diffusion.formats.adapter.file import AdapterFile, AdapterMetadata, write_adapter
from dora_diffusion.numerics.weights import MergeStrengths
from tests.export.helpers import MakeAdapter

OLD_CARD = """---
license: creativeml-openrail-m
datasets: [somebody/images]
model-index: [{name: base}]
---
# The base

It scores 87%.
"""


def test_a_merged_folder_has_a_card_of_its_own(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter
) -> None:
    """With the base linked and its licence kept; without the base's figures."""
    import shutil

    snapshot = tmp_path / "hub" / "models--somebody--base-1" / "snapshots" / ("a" * 40)
    shutil.copytree(sd1_folder, snapshot)
    (snapshot / "README.md").write_text(OLD_CARD, encoding="utf-8")
    facts = AdapterMetadata("sd1", trigger="sks dog")
    layers = random_adapter(sd1_folder, every=9)
    path = write_adapter(tmp_path / "my-dog.safetensors", AdapterFile(layers, facts), "kohya")
    merged = export_checkpoint(
        snapshot, [(path, 0.5)], tmp_path / "merged", strength=MergeStrengths(unet_strength=0.8)
    )
    card = (merged / "README.md").read_text(encoding="utf-8")
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == "somebody/base-1"
    assert head["license"] == "creativeml-openrail-m"
    assert not {"datasets", "model-index"} & head.keys()
    assert "87%" not in card
    assert "[somebody/base-1](https://huggingface.co/somebody/base-1)" in card
    assert "`my-dog.safetensors` | 0.5 |" in card
    assert "unet strength 0.8" in card
    assert "**`sks dog`**" in card
    assert str(tmp_path) not in card
    assert "`dora-diffusion verify FOLDER --base BASE --adapter FILE`" in card
    for file in sd1_folder.rglob("*.safetensors"):
        other = snapshot / file.relative_to(sd1_folder).with_suffix(".fp16.safetensors")
        shutil.copyfile(file, other)
    merged = export_checkpoint(BaseModel(snapshot, variant="fp16"), path, tmp_path / "variant")
    card = (merged / "README.md").read_text(encoding="utf-8")
    assert "verify FOLDER --base BASE --variant fp16 --adapter FILE`" in card
    plain = export_checkpoint(sd1_folder, path, tmp_path / "plain")
    card = (plain / "README.md").read_text(encoding="utf-8")
    assert "base_model" not in yaml.safe_load(card.split("---")[1])
    assert f"`{sd1_folder.name}` with adapters merged" in card
