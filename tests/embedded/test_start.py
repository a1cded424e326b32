"""Going on with a shipped model: its weights, and the sum of what it cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dora_diffusion.embedded import MODELS, model_folder
from dora_diffusion.embedded.pretrain.__main__ import STAGES
from dora_diffusion.embedded.pretrain.diffusion import Denoiser
from dora_diffusion.embedded.pretrain.sd import TextToImage
from dora_diffusion.embedded.pretrain.sdxl import TextToImageXL
from dora_diffusion.embedded.pretrain.ship import training_facts
from dora_diffusion.embedded.pretrain.start import fill_from_package, goes_on, prepare_to_go_on


@pytest.fixture
def tokenizer() -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(model_folder("tiny-sd") / "tokenizer")


@pytest.mark.parametrize(("name", "kind"), [("tiny-sd", TextToImage), ("tiny-sdxl", TextToImageXL)])
def test_a_model_starts_from_the_shipped_weights(
    name: str, kind: type[Denoiser], tokenizer: Any
) -> None:
    model: Any = kind(tokenizer)
    fill_from_package(model, name)
    folder = model_folder(name)
    shipped = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    loaded = model.unet.state_dict()
    assert set(loaded) == set(shipped)
    for key, tensor in shipped.items():
        assert torch.equal(loaded[key], tensor.float())
    for part in ("text_encoder", "text_encoder_2") if name == "tiny-sdxl" else ("text_encoder",):
        sums = [
            t.double().abs().sum() for t in load_file(folder / part / "model.safetensors").values()
        ]
        inside = [t.double().abs().sum() for t in getattr(model, part).state_dict().values()]
        assert float(sum(inside)) == pytest.approx(float(sum(sums)), rel=1e-6)


def test_what_was_spent_before_is_counted_once(tmp_path: Path) -> None:
    before = json.loads((model_folder("tiny-sd") / "training.json").read_text())
    prepare_to_go_on("tiny-sd", tmp_path)
    prepare_to_go_on("tiny-sd", tmp_path)
    torch.save({"seconds": 90.0, "step": 7}, tmp_path / "diffusion.pt")
    facts = training_facts(tmp_path, "an abacus")
    assert facts["machine"] == before["machine"] + " and an abacus"
    assert facts["diffusion_minutes"] == pytest.approx(before["diffusion_minutes"] + 1.5)
    assert facts["diffusion_steps"] == before["diffusion_steps"] + 7
    assert facts["vae_steps"] == before["vae_steps"]
    assert (tmp_path / "vae" / "config.json").is_file()


def test_a_new_training_counts_itself_alone(tmp_path: Path) -> None:
    torch.save({"seconds": 90.0, "step": 7}, tmp_path / "diffusion.pt")
    assert not goes_on(tmp_path)
    facts = training_facts(tmp_path, "an abacus")
    assert facts == {"machine": "an abacus", "diffusion_minutes": 1.5, "diffusion_steps": 7}


def test_the_shares_of_a_budget_are_all_of_it() -> None:
    for name in MODELS:
        assert sum(stage.share for stage in STAGES[name]) == pytest.approx(1)
        assert sum(stage.share for stage in STAGES[name] if not stage.kept) > 0
