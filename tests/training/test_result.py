"""The model card of a run."""

from __future__ import annotations

from pathlib import Path

from dora_diffusion.config import TrainConfig
from dora_diffusion.formats.adapter_file import AdapterMetadata
from dora_diffusion.training.result import KOHYA_FILE, model_card
from dora_diffusion.training.subject import subject_of


def test_the_card_of_an_input_axis_promises_what_docs_formats_says(tmp_path: Path) -> None:
    """As it was trained in the versions that were seen; only the merged model for ever."""
    config = TrainConfig(
        instance_data_dir="photos", instance_prompt="a photo of a sks dog", norm_axis="input",
        output_dir=str(tmp_path),
    )  # fmt: skip
    metadata = AdapterMetadata("sd1", "some/model", extra={"training_steps": "7"})
    card = model_card(config, subject_of(config), metadata, tmp_path / KOHYA_FILE, "2 layers", {})
    text = " ".join(card.split())
    assert "which ComfyUI 0.3.64, Forge and A1111 compute as it was trained." in text
    assert "What they compute from a DoRA may change" in text
    assert "compute exactly" not in text
