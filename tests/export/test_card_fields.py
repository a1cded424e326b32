"""Front matter of every kind of model card, as the hub reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from dora_diffusion.config import TrainConfig
from dora_diffusion.config.families import FAMILIES
from dora_diffusion.export import export_checkpoint
from dora_diffusion.export.metadata import front_matter
from dora_diffusion.formats.adapter.file import AdapterFile, AdapterMetadata, write_adapter
from dora_diffusion.formats.files.runs import KOHYA_FILE
from dora_diffusion.training.inputs.subject import subjects_of
from dora_diffusion.training.results.card import VALIDATION_LOSS, model_card
from tests.every import every
from tests.export.helpers import MakeAdapter

SUBJECT = {"instance_data_dir": "photos", "instance_prompt": "a photo of a sks dog"}
SLIDER = {"teach": "slider", "target": ["a mug"], "positive": ["big"], "negative": ["small"]}
WORDS = {"train_text_encoder_ti": True, "token": "<sks>", "instance_prompt": "a <sks> dog"}
KINDS: dict[str, dict[str, Any]] = {
    "dora": {}, "lora": {"method": "lora"}, "full-finetuning": {"method": "full"},
    "dora, input axis": {"norm_axis": "input"}, "dora, words": WORDS,
    "vera": {"method": "lora", "parametrization": "vera"},
    "dora, style": {"token": "", "instance_prompt": "a mug on grass"},
    "lora, slider": {"instance_data_dir": None, "instance_prompt": None, **SLIDER},
}  # fmt: skip
STEPS = {"training_steps": "7"}


def data_of(card: str) -> Any:
    """The front matter, as the hub's own library reads and checks it."""
    return ModelCard(card, ignore_metadata_errors=False).data


def card_of(folder: Path, base: str, family: str = "sd1", **settings: Any) -> Any:
    """The front matter of a run's card with one sample."""
    config = TrainConfig(output_dir=folder / "dog", **{**SUBJECT, **settings})
    metadata = AdapterMetadata(family, base, extra=STEPS | {VALIDATION_LOSS: "0.125"})
    name = KOHYA_FILE if config.norm_axis == "input" else "pytorch_lora_weights.safetensors"
    written, samples = folder / "dog" / name, {"With it": "samples/a.png", "Without": "b.png"}
    return data_of(model_card(config, subjects_of(config), metadata, written, "2 layers", samples))


def test_every_kind_of_card_has_the_fields_of_its_kind(tmp_path: Path) -> None:
    base, license = FAMILIES["sd1"].released_id, "creativeml-openrail-m"
    with every() as case:
        for kind, settings in KINDS.items():
            with case(kind):
                data = card_of(tmp_path, base, **settings)
                is_full, is_slider = kind.startswith("full"), "slider" in kind
                assert (data.base_model, data.license) == (base, license)
                assert data["base_model_relation"] == ("finetune" if is_full else "adapter")
                assert data.pipeline_tag == "text-to-image"
                assert data.library_name == (None if "axis" in kind else "diffusers")
                tags = ["text-to-image", kind.partition(",")[0]]
                tags += ["slider" if is_slider else "dreambooth"]
                assert data.tags == tags + ([] if is_full else ["template:sd-lora"])
                prompt = settings.get("instance_prompt", SUBJECT["instance_prompt"])
                assert data.get("instance_prompt") == prompt
                [image] = data["widget"]
                assert image["output"] == {"url": "samples/a.png"}
                assert image["text"] == TrainConfig(**{**SUBJECT, **settings}).prompts[0].prompt
                [loss] = data.eval_results
                assert (loss.task_type, loss.metric_type) == ("text-to-image", "validation_loss")
                assert loss.metric_value == 0.125


def test_figures_are_those_of_the_result_s_step(tmp_path: Path) -> None:
    (tmp_path / "dog").mkdir()
    rows = [{"step": step, "validation_similarity": step / 10} for step in (6, 7)]
    lines = "".join(json.dumps(row) + "\n" for row in [*rows, {"step": 7, "loss": 0.5}])
    (tmp_path / "dog" / "metrics.jsonl").write_text(lines, encoding="utf-8")
    data = card_of(tmp_path, "somebody/model")
    figures = {result.metric_type: result.metric_value for result in data.eval_results}
    assert figures == {"validation_loss": 0.125, "similarity_to_the_photos": 0.7}


def test_every_released_model_has_its_license() -> None:
    for family in FAMILIES.values():
        card = front_matter(family.released_id, family, "adapter", {}) + "\n# Title\n"
        assert data_of(card).license == family.released_license != ""


def test_a_merged_model_is_fine_tuned_from_its_base(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter
) -> None:
    import shutil

    name = FAMILIES["sd1"].released_id.replace("/", "--")
    base = tmp_path / f"models--{name}" / "snapshots" / ("a" * 40)
    shutil.copytree(sd1_folder, base)
    facts = AdapterFile(random_adapter(sd1_folder, every=9), AdapterMetadata("sd1"))
    adapter = write_adapter(tmp_path / "dog.safetensors", facts, "kohya")
    relations = {}
    for adapters in (adapter, ()):
        merged = export_checkpoint(base, adapters, tmp_path / "out", overwrite=True)
        data = data_of((merged / "README.md").read_text(encoding="utf-8"))
        assert (data.base_model, data.license) == (
            FAMILIES["sd1"].released_id, "creativeml-openrail-m",
        )  # fmt: skip
        assert (data.library_name, data.pipeline_tag) == ("diffusers", "text-to-image")
        assert data.eval_results is None
        relations[bool(adapters)] = data.get("base_model_relation")
    assert relations == {True: "finetune", False: None}
