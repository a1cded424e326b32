"""Z-Image as a base model: found in the hub's cache and folders, downloaded whole, sized."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from dora_diffusion.cli.main import main
from dora_diffusion.config import TrainConfig
from dora_diffusion.config.families import FAMILIES
from dora_diffusion.models.load import load_components
from dora_diffusion.models.locate import model_info, resolve_folder
from dora_diffusion.models.memory import (
    Device,
    fitting_settings,
    gpu_of,
    gpu_training_memory,
    needed_memory,
)
from dora_diffusion.studio.jobs.bases import (
    Base,
    check_base,
    check_model,
    check_variant,
    in_folder,
    in_hub_cache,
)
from dora_diffusion.studio.jobs.store import UserError
from tests.refusal import refused
from tests.z_image import write_z_image

NAME = "Tongyi-MAI/Z-Image"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_z_image(tmp_path_factory.mktemp("models") / "z-image")


def test_facts_are_those_of_the_loaded_model(folder: Path, cache: Path) -> None:
    info, loaded = model_info(str(folder)), load_components(folder)
    assert (info.family, info.resolution) == (loaded.family.name, loaded.default_resolution)
    assert not info.has_released_shape
    info = model_info(NAME)
    assert (info.family, info.resolution, info.has_released_shape) == ("z-image", 1024, True)


def test_a_transformer_of_the_released_width_has_the_released_shape(tmp_path: Path) -> None:
    folder = write_z_image(tmp_path / "model")
    for part, values in (("transformer", {"dim": 3840}), ("vae", {"sample_size": 1024})):
        file = folder / part / "config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps(config | values), encoding="utf-8")
    info = model_info(str(folder))
    assert (info.resolution, info.has_released_shape) == (1024, True)


def test_it_is_found_in_the_cache_and_in_folders(folder: Path, cache: Path) -> None:
    snapshots = cache / "models--Tongyi-MAI--Z-Image" / "snapshots"
    snapshots.mkdir(parents=True)
    (snapshots / "1").symlink_to(folder)
    assert Base(NAME, "z-image", "in the hub's cache") in in_hub_cache()
    [base] = in_folder(folder.parent)
    assert base == Base(str(folder), "z-image", "named with --model_folders")
    check_base(str(folder))
    check_variant(str(folder), None)
    with pytest.raises(UserError, match="no weights of the variant 'fp16'; it has diffusion"):
        check_variant(str(folder), "fp16")


def test_a_run_with_settings_that_it_refuses_does_not_start(folder: Path) -> None:
    model = {"pretrained_model_name_or_path": str(folder)}
    check_model(TrainConfig(**model))
    with refused("train_text_encoder"):
        check_model(TrainConfig(**model, train_text_encoder=True))


def test_all_of_its_files_are_downloaded(folder: Path, cache: Path, monkeypatch) -> None:
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    downloaded: list[str] = []

    def download(name: str, *, allow_patterns, ignore_patterns, **options) -> str:
        patterns = {"allow_patterns": allow_patterns, "ignore_patterns": ignore_patterns}
        downloaded.extend(filter_repo_objects([*files, "assets/image.png", "x.bin"], **patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_folder(NAME) == folder
    assert sorted(downloaded) == files


def test_memory_of_a_gpu_is_counted_and_that_of_a_cpu_unknown() -> None:
    usual = {"gradient_checkpointing": True, "mixed_precision": "bf16", "optimizer": "adamw"}
    # A context, the transformer in bfloat16, its adapter with AdamW, and a step.
    gib = gpu_training_memory("z-image", 1024, usual | {"offload": "auto"})
    table = FAMILIES["z-image"].gpu_memory
    assert gib == pytest.approx(0.4 + table.denoiser + table.adapter + table.recomputed)
    assert needed_memory("z-image", 1024, usual, Device()) is None
    on = {"mixed_precision": "no", "gradient_checkpointing": True, "optimizer": "adamw"}
    assert fitting_settings("z-image", 1024, Device(free_gib=500)) == on
    for memory, quantize in (("24", None), ("12", "int8"), ("8", "nf4")):
        assert fitting_settings("z-image", 1024, gpu_of(memory)).get("quantize") == quantize


def test_train_says_that_a_cpu_was_not_measured(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("dora_diffusion.models.memory.describe_device", Device)
    words = ["train", "--memory=auto", f"--pretrained_model_name_or_path={NAME}", "--dry_run"]
    main([*words, f"--output_dir={tmp_path / 'run'}", "--instance_data_dir=samples/bolt_mug"])
    assert "memory auto is not compared with training of Tongyi-MAI" in capsys.readouterr().err
