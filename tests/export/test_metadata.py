"""Metadata of a merged model."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from dora_diffusion.config.base import BaseModel
from dora_diffusion.export import combine_adapters, export_checkpoint
from dora_diffusion.formats.adapter.file import (
    AdapterFile,
    AdapterMetadata,
    read_adapter,
    write_adapter,
)
from dora_diffusion.formats.adapter.metadata import stated_reading
from dora_diffusion.formats.files.stream import read_header
from dora_diffusion.models.load import load_components
from dora_diffusion.numerics.weights import MergeStrengths
from tests.export.helpers import MakeAdapter


def test_a_single_file_says_what_is_inside(
    tmp_path: Path, sdxl_folder: Path, random_adapter: MakeAdapter
) -> None:
    facts = AdapterMetadata("sdxl", trigger="sks dog")
    path = write_adapter(
        tmp_path / "my-dog.safetensors", AdapterFile(random_adapter(sdxl_folder, every=9), facts)
    )
    output = export_checkpoint(
        sdxl_folder,
        [(path, 0.5)],
        tmp_path / "dog-xl.safetensors",
        strength=MergeStrengths(unet_strength=0.8),
    )
    notes = read_header(output).metadata
    assert notes["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert notes["modelspec.sai_model_spec"] == "1.0.0"
    assert notes["modelspec.title"] == "dog-xl"
    assert notes["modelspec.trigger_phrase"] == "sks dog"
    assert notes["modelspec.prediction_type"] == "epsilon"
    assert json.loads(notes["dora_diffusion.merged"]) == [
        {
            "adapter": "my-dog.safetensors",
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "strength": 0.5,
            "unet_strength": 0.8,
        }
    ]
    base = json.loads(notes["dora_diffusion.base"])
    assert base["name"] == sdxl_folder.name
    unet = sdxl_folder / "unet" / "diffusion_pytorch_model.safetensors"
    assert base["sha256"]["unet"] == hashlib.sha256(unet.read_bytes()).hexdigest()
    assert set(base["sha256"]) == {"unet", "vae", "text_encoder", "text_encoder_2"}
    assert not any(str(tmp_path.parent) in value for value in notes.values())
    again = read_header(export_checkpoint(output, path, tmp_path / "two.safetensors")).metadata
    sha256 = hashlib.sha256(output.read_bytes()).hexdigest()
    assert json.loads(again["dora_diffusion.base"]) == {
        "name": "dog-xl.safetensors", "sha256": {"checkpoint": sha256}
    }  # fmt: skip


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({"modelspec.prediction_type": "v"}, "v_prediction"),
        ({"modelspec.prediction_type": "epsilon"}, "epsilon"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v_prediction"),
        ({"modelspec.architecture": "stable-diffusion-v2-512"}, "epsilon"),
        ({}, "the configuration's"),
    ],
)
def test_the_prediction_type_of_a_single_file_is_kept(
    tmp_path: Path, sd2_folder: Path, random_adapter: MakeAdapter, stated: dict[str, str],
    expected: str,
) -> None:  # fmt: skip
    """In the folder made from it, whatever the configuration says, and in another single file."""
    path = write_adapter(
        tmp_path / "a.safetensors", AdapterFile(random_adapter(sd2_folder, every=20))
    )
    single = export_checkpoint(sd2_folder, path, tmp_path / "base.safetensors")
    hashes = {"modelspec.hash_sha256": "0xbeef", "sshs_model_hash": "beef"}
    save_file(load_file(single), single, {**stated, **hashes})
    for configured in ("epsilon", "v_prediction"):
        config = tmp_path / configured
        shutil.copytree(sd2_folder, config)
        scheduler = config / "scheduler" / "scheduler_config.json"
        values = json.loads(scheduler.read_text(encoding="utf-8"))
        scheduler.write_text(
            json.dumps({**values, "prediction_type": configured}), encoding="utf-8"
        )
        output = export_checkpoint(
            BaseModel(single, model_config=config), path, tmp_path / f"m-{configured}"
        )
        written = json.loads(
            (output / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8")
        )
        assert written["prediction_type"] == (expected if stated else configured)
    notes = read_header(export_checkpoint(single, path, tmp_path / "s.safetensors")).metadata
    assert not hashes.keys() & notes.keys()
    if stated:
        is_v = expected == "v_prediction"
        assert notes["modelspec.prediction_type"] == ("v" if is_v else "epsilon")
        assert notes["modelspec.architecture"].endswith("-768-v" if is_v else "-512")
    else:
        assert not {"modelspec.prediction_type", "modelspec.architecture"} & notes.keys()
        with pytest.raises(ValueError, match="does not state whether it predicts the noise or v"):
            export_checkpoint(single, path, tmp_path / "m")


def test_a_merged_model_reads_prompts_as_its_adapters_do(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter
) -> None:
    """Kept where they agree; one that is merged into it later changes nothing of that."""
    layers, paths = random_adapter(sd1_folder, every=20), {}
    for name, extra in {"skips": {"clip_skip": "1", "max_token_length": "0"}, "plain": {}}.items():
        facts = AdapterMetadata("sd1", extra=extra)
        paths[name] = write_adapter(tmp_path / f"{name}.safetensors", AdapterFile(layers, facts))
    merged = export_checkpoint(sd1_folder, paths["skips"], tmp_path / "merged")
    again = export_checkpoint(merged, paths["plain"], tmp_path / "again")
    both = export_checkpoint(
        sd1_folder, [(path, 1.0) for path in paths.values()], tmp_path / "both"
    )
    found = [load_components(each).clip_skip for each in (sd1_folder, merged, again, both)]
    assert found == [0, 1, 1, 0]
    assert load_components(again).max_token_length == 0
    sums = (["skips"], {"clip_skip": 1, "max_token_length": 0}), (["skips", "plain"], {})
    for names, expected in sums:
        files = [(paths[name], 0.5) for name in names]
        summed = combine_adapters(sd1_folder, files, tmp_path / f"{len(names)}.safetensors").path
        assert stated_reading(read_adapter(summed).metadata.extra) == expected
    cards = [(each / "README.md").read_text(encoding="utf-8") for each in (merged, again, both)]
    said = ["It reads prompts with clip_skip 1 as Diffusers counts" in card for card in cards]
    assert said == [True, True, False]
