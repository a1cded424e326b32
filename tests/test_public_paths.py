"""Paths in the public interface: every one is given as text or as any `os.PathLike`."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import dora_diffusion as dd
from dora_diffusion.config import read_config_file, read_config_lines
from dora_diffusion.config.train import settings
from dora_diffusion.export import inspect_adapter, inspect_model, verify_checkpoint
from dora_diffusion.formats.adapter.file import AdapterFile, AdapterMetadata, write_adapter
from dora_diffusion.sampling.pool import _reference
from tests.every import every
from tests.export.helpers import MakeAdapter

ROOT = Path(__file__).parents[1]
NAMED = re.compile(r"(.*_)?(path|folder|output|sources?|merged|tuned|thumbnail|vae|dir)")
"""Names of arguments that are paths, whatever their annotation."""


@dataclasses.dataclass(frozen=True)
class Place:
    """A path of another library: neither text nor a `pathlib.Path`."""

    path: Path

    def __fspath__(self) -> str:
        return str(self.path)


def test_settings_of_a_run_that_are_paths_are_texts_afterwards(tmp_path: Path) -> None:
    with every() as case:
        for setting in settings():
            is_one = setting.kind is str and not setting.is_list
            if is_one and (setting.is_path or NAMED.fullmatch(setting.name)):
                for value in ("place", Path("place"), Place(Path("place"))):
                    with case(f"{setting.name}={value!r}"):
                        config = dd.TrainConfig(**{setting.name: value})  # type: ignore[arg-type]
                        assert getattr(config, setting.name) == "place"
    photos = {"instance_data_dir": str(ROOT / "samples" / "bolt_mug"), "instance_prompt": "a sks"}
    (tmp_path / "subjects.yaml").write_text(f"- {photos}", encoding="utf-8")
    for path in (tmp_path / "subjects.yaml", Place(tmp_path / "subjects.yaml")):
        assert len(dd.TrainConfig(dataset_config=path).dataset_config) == 1


def test_a_path_of_any_kind_has_the_result_of_its_text(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter
) -> None:
    facts, layers = AdapterMetadata("sd1", trigger="sks dog"), random_adapter(sd1_folder, every=9)
    adapter = write_adapter(tmp_path / "dora.safetensors", AdapterFile(layers, facts), "diffusers")
    shutil.copytree(ROOT / "samples" / "bolt_mug", tmp_path / "subjects" / "bolt_mug")
    (tmp_path / "run.yaml").write_text("rank: 4\n", encoding="utf-8")
    photo, model = ROOT / "samples" / "bolt_mug" / "01.jpg", torch.nn.Sequential()
    model.append(torch.nn.Linear(8, 6))
    dd.inject_adapters(model, dd.AdapterConfig(targets=("*",), rank=2))
    merged = dd.export_checkpoint(sd1_folder, adapter, tmp_path / "merged")
    run, subjects, new = tmp_path / "run.yaml", tmp_path / "subjects", tmp_path / "new"
    options, rank = {"overwrite": True}, dd.FitSettings(rank=1)
    # `p` makes each path one of a kind.
    calls: dict[str, Callable[[Any], Any]] = {
        "read_config_file": lambda p: read_config_file(p(run)),
        "read_config_lines": lambda p: read_config_lines(p(run)),
        "save_adapter": lambda p: dd.save_adapter(model, p(new / "saved.safetensors")),
        "load_adapter": lambda p: dd.load_adapter(
            torch.nn.Sequential(torch.nn.Linear(8, 6)), p(new / "saved.safetensors")
        ),
        "inspect_adapter": lambda p: inspect_adapter(p(adapter), p(sd1_folder)).path,
        "inspect_model": lambda p: inspect_model(p(sd1_folder)).path,
        "convert_adapter": lambda p: (
            dd.convert_adapter(
                p(adapter), p(new / "kohya.safetensors"), "kohya", thumbnail=p(photo), **options
            ).path
        ),
        "combine_adapters": lambda p: (
            dd.combine_adapters(
                p(sd1_folder), [(p(adapter), 0.5)], p(new / "sum.safetensors"), **options
            ).path
        ),
        "extract_adapter": lambda p: (
            dd.extract_adapter(
                p(sd1_folder), p(merged), p(new / "near.safetensors"), rank, **options
            ).path
        ),
        "export_checkpoint": lambda p: dd.export_checkpoint(
            dd.BaseModel(p(sd1_folder), vae=p(sd1_folder)), p(adapter), p(new / "model"), **options
        ),
        "verify_checkpoint": lambda p: verify_checkpoint(p(merged), p(sd1_folder), p(adapter)).ok,
        "read_subject": lambda p: dd.read_subject(p(photo.parent), "sks", "mug").name,
        "subject_configs": lambda p: dd.subject_configs(
            p(subjects), dd.TrainConfig(class_word="mug")
        ),
        "run_fleet": lambda p: dd.run_fleet({}, p(new / "fleet")).records,
        "load_components": lambda p: dd.load_components(p(sd1_folder)).family.name,
        "ImageRequest": lambda p: _reference(dd.ImageRequest("a", 1, p(adapter)).adapter),
        "ImageRequest, strength": lambda p: _reference(
            dd.ImageRequest("a", 1, (p(adapter), 0.5)).adapter
        ),
    }
    with every() as case:
        for name, call in calls.items():
            with case(name):
                text = call(str)
                assert call(Place) == text
                assert "Place(" not in repr(text)
