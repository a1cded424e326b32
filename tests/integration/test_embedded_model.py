"""The model that comes with the package, trained with a sample's settings."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from dora_diffusion.cli.main import main
from dora_diffusion.config import TrainConfig, read_config_file
from dora_diffusion.models.embedded import model_folder

ROOT = Path(__file__).parents[2]
BASE = "embedded:tiny-sd"
PROMPT = "a photo of a sks mug on the snow"


@pytest.fixture(scope="module", autouse=True)
def embedded_model() -> None:
    if not (model_folder("tiny-sd") / "model_index.json").is_file():
        pytest.skip("the embedded model is not in this checkout")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of five steps with a sample's settings file, run from elsewhere."""
    folder = tmp_path_factory.mktemp("embedded")
    shutil.copytree(ROOT / "samples" / "bolt_mug", folder / "samples" / "bolt_mug")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        flags = [
            "--config", "samples/bolt_mug/config.yaml", "--max_train_steps", "5",
            "--learning_rate", "5e-3", "--lr_scheduler", "constant", "--lr_warmup_steps", "0",
            "--train_batch_size", "1", "--num_class_images", "2",
            "--num_validation_images", "1", "--validation_inference_steps", "2",
            "--center_crop", "--output_dir", "output",
        ]  # fmt: skip
        assert main(["train", *flags]) == 0
    return folder / "output"


def test_the_result_says_how_it_was_made(trained: Path) -> None:
    config = TrainConfig.from_dict(read_config_file(trained / "config.yaml"))
    assert (config.max_train_steps, config.rank, config.instance_data_dir) == (
        5, 8, str(trained.parent / "samples" / "bolt_mug"),
    )  # fmt: skip
    sample = TrainConfig.from_dict(
        yaml.safe_load((ROOT / "samples" / "bolt_mug" / "config.yaml").read_text(encoding="utf-8"))
    )
    assert config.validation_prompt == sample.validation_prompt
    card = (trained / "README.md").read_text(encoding="utf-8")
    assert BASE in card
    assert "**`sks mug`**" in card
    with Image.open(trained / "samples" / "base_above_adapted.png") as grid:
        assert grid.height > grid.width, "two prompts, each without and with the adapter"


def test_diffusers_alone_loads_it(trained: Path) -> None:
    """As the model card says, with the folder in place of the model's name."""
    from diffusers import AutoPipelineForText2Image

    from dora_diffusion.sampling.load import load_adapted

    pipeline = AutoPipelineForText2Image.from_pretrained(
        model_folder("tiny-sd"), torch_dtype=torch.float32, local_files_only=True
    )
    pipeline.load_lora_weights(trained, weight_name="pytorch_lora_weights.safetensors")
    latents = []
    for one in (pipeline, load_adapted(BASE, trained)[0].pipeline()):
        one.set_progress_bar_config(disable=True)
        size = one.unet.config.sample_size * one.vae_scale_factor
        with torch.no_grad():
            latents.append(
                one(
                    PROMPT,
                    num_inference_steps=4,
                    width=size,
                    height=size,
                    generator=torch.Generator().manual_seed(3),
                    output_type="latent",
                ).images
            )
    torch.testing.assert_close(latents[0], latents[1], rtol=1e-4, atol=1e-3)
