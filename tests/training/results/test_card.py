"""The model card of a run."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

from dora_diffusion.config import TrainConfig
from dora_diffusion.formats.adapter.file import AdapterMetadata
from dora_diffusion.formats.files.runs import KOHYA_FILE
from dora_diffusion.training.inputs.subject import subjects_of
from dora_diffusion.training.recipe import train
from dora_diffusion.training.results.card import model_card
from tests.training.helpers import make_config


def test_the_card_of_an_input_axis_promises_what_docs_formats_says(tmp_path: Path) -> None:
    """As it was trained in the versions that were seen; only the merged model for ever."""
    config = TrainConfig(
        instance_data_dir="photos", instance_prompt="a photo of a sks dog", norm_axis="input",
        output_dir=str(tmp_path),
    )  # fmt: skip
    metadata = AdapterMetadata("sd1", "some/model", extra={"training_steps": "7"})
    card = model_card(config, subjects_of(config), metadata, tmp_path / KOHYA_FILE, "2 layers", {})
    text = " ".join(card.split())
    assert "which ComfyUI 0.3.64, Forge and A1111 compute as it was trained." in text
    assert "Their handling of DoRA may change" in text
    assert "compute exactly" not in text


def card_of(tmp_path: Path, samples: dict[str, str], **settings: str) -> str:
    config = TrainConfig(instance_data_dir="photos", output_dir=str(tmp_path), **settings)
    metadata = AdapterMetadata("sd1", "some/model", extra={"training_steps": "7"})
    file = tmp_path / "pytorch_lora_weights.safetensors"
    return model_card(config, subjects_of(config), metadata, file, "2 layers", samples)


def test_the_card_of_a_run_without_a_token_names_no_empty_trigger_word(tmp_path: Path) -> None:
    card = card_of(tmp_path, {}, instance_prompt="a mug on grass", token="")
    assert "``" not in card.replace("```", "")
    assert "no trigger word: write prompts like its captions, such as `a mug on grass`." in card


def test_the_card_is_valid_whatever_the_prompt_says(sd1_folder, photos, tmp_path):
    import yaml

    prompt = 'a photo of it\'s "big": sks mug # 1'
    train(
        make_config(sd1_folder, photos, tmp_path / "out", instance_prompt=prompt, max_train_steps=1)
    )
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert yaml.safe_load(text.split("---")[1])["instance_prompt"] == prompt


@pytest.mark.parametrize("method", ["dora", "full"])
def test_its_commands_and_its_python_mean_any_path_and_prompt(tmp_path: Path, method: str) -> None:
    """As a shell and Python read them."""
    folder, prompt = "my dog's $(run)", 'a "sks" dog\'s $HOME `x`'
    out = tmp_path / folder
    card = card_of(out, {}, instance_prompt=prompt, method=method)
    shell, python = re.findall(r"```(?:bash|python)\n(.*?)```", card, re.DOTALL)
    first, second = (shlex.split(line) for line in shell.replace("\\\n", " ").splitlines())
    assert first[first.index("--prompt") + 1] == prompt
    written = f"{folder}/pytorch_lora_weights.safetensors" if method == "full" else folder
    for words in (first, second):
        assert written in words
        assert "some/model" in first + second
    texts = [node.value for node in ast.walk(ast.parse(python)) if isinstance(node, ast.Constant)]
    assert prompt in texts
    assert written in texts
    assert ("pip install peft" in card) == (method == "dora")


@pytest.mark.parametrize("method", ["dora", "full"])
def test_its_commands_load_the_base_as_the_run_did(tmp_path: Path, method: str) -> None:
    loaded = {"variant": "fp16", "revision": "v 2"}
    card = card_of(tmp_path, {}, instance_prompt="a sks dog", method=method, **loaded)
    shell, python = re.findall(r"```(?:bash|python)\n(.*?)```", card, re.DOTALL)
    lines = [shlex.split(line) for line in shell.replace("\\\n", " ").splitlines()]
    ours = [words for words in lines if "some/model" in words]
    assert len(ours) == (2 if method == "dora" else 1)
    for words in ours:
        at = words.index("some/model")
        assert words[at + 1 : at + 5] == ["--variant", "fp16", "--revision", "v 2"]
    if method == "dora":
        assert 'from_pretrained("some/model", variant="fp16", revision="v 2")' in python
