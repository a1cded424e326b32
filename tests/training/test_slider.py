"""Sliders: runs from words alone, from their settings to their files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from dora_diffusion import generate_images, load_components, set_strength
from dora_diffusion.adapters.layers import adapted_layers
from dora_diffusion.cli.console.training import training_summary
from dora_diffusion.config import TrainConfig, without_effect
from dora_diffusion.config.families import FAMILIES
from dora_diffusion.config.features.slider import STRENGTHS
from dora_diffusion.config.train import settings
from dora_diffusion.export.checkpoint import export_checkpoint
from dora_diffusion.export.convert import convert_adapter
from dora_diffusion.export.fitting import FitSettings
from dora_diffusion.formats.adapter.file import read_adapter
from dora_diffusion.formats.adapter.inspect import report_on
from dora_diffusion.formats.layouts import FOLDERS, TARGETS
from dora_diffusion.formats.names.kohya import kohya_name
from dora_diffusion.formats.names.modules import canonical
from dora_diffusion.numerics.merging import merge_tensor
from dora_diffusion.numerics.weights import Strengths
from dora_diffusion.sampling.load import load_adapted
from dora_diffusion.sampling.settings import SamplingSettings
from dora_diffusion.training.batch import Batch
from dora_diffusion.training.folder import TrainResult
from dora_diffusion.training.inputs.plan import plan_run
from dora_diffusion.training.pack import check_pack
from dora_diffusion.training.processes import make_accelerator
from dora_diffusion.training.recipe import assemble, train
from tests.formats.layouts.test_compatibility import comfyui
from tests.refusal import refused
from tests.training.helpers import find, losses, names

TARGET, HIGH, LOW = "a photo of a dog", "a photo of a red dog", "a photo of a toy"
PROMPTS = {"teach": "slider", "target": [TARGET], "positive": [HIGH], "negative": [LOW]}
ANCHORS = {"anchors": ["the cat in a backpack"]}


def slider(model: Path, output: Path, **changes: Any) -> TrainConfig:
    values = {
        **PROMPTS, "pretrained_model_name_or_path": str(model), "output_dir": str(output),
        "resolution": 32, "rank": 2, "conv_rank": 2, "targets": ["cross-attention"],
        "max_train_steps": 4, "train_batch_size": 2, "learning_rate": 1e-2, "seed": 3,
        "num_class_images": 6, "num_validation_images": 0, "validation_inference_steps": 2,
        "checkpointing_steps": 0,
    }  # fmt: skip
    return TrainConfig(**{**values, **changes})


def drawn_by(config: TrainConfig, steps: int) -> list[tuple[Batch, list[tuple[str, str]]]]:
    """Batches of a run, each with the prompts of both ends for each of its photos."""
    step = assemble(plan_run(config), make_accelerator(config)).step
    drawn = [step.questions(next(step.batches)) for _ in range(steps)]
    # The last two questions are about the ends.
    ends = [zip(*(q.ask.captions for q in each.questions[0][2:]), strict=True) for each in drawn]
    return [(each.batch, list(own)) for each, own in zip(drawn, ends, strict=True)]


def assert_same_file(ours: TrainResult, theirs: TrainResult) -> None:
    found, wanted = (load_file(run.adapter) for run in (ours, theirs))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


# What a run learns


def test_a_fresh_slider_has_the_whole_move_to_learn(sd1_folder: Path, tmp_path: Path) -> None:
    """The first step's loss is that of the move alone, and anchors have none yet."""
    config = slider(sd1_folder, tmp_path, **ANCHORS, max_train_steps=1, slider_guidance=3.0)
    train(config)
    [(batch, ends)] = drawn_by(config, 1)
    base = load_components(sd1_folder)
    a = base.scheduler.alphas_cumprod[batch.inputs.timesteps].view(-1, 1, 1, 1)
    noisy = a.sqrt() * batch.latents + (1 - a).sqrt() * batch.noise
    pipeline, expected = base.pipeline(), []
    with torch.no_grad():
        for row in range(2):
            high, low = (
                base.denoiser(
                    noisy[row : row + 1],
                    batch.inputs.timesteps[row],
                    pipeline.encode_prompt(prompt, "cpu", 1, False)[0],
                ).sample
                for prompt in (HIGH, LOW)
            )
            expected.append(float((3.0 * (high - low)).square().mean()))
    assert ends == [(HIGH, LOW)] * 2
    assert [*batch.captions] == [TARGET] * 2 + ANCHORS["anchors"] * 2
    assert losses(tmp_path)[1] == pytest.approx(np.mean(expected), rel=1e-4)
    assert losses(tmp_path, "prior_loss")[1] == pytest.approx(0, abs=1e-12)


def test_pairs_are_drawn_by_the_position_of_a_row(sd1_folder: Path, tmp_path: Path) -> None:
    """As its noise is: the state of the global generator has no effect."""
    config = slider(
        sd1_folder, tmp_path, target=[TARGET] * 2, positive=[HIGH, "a toy"],
        negative=[LOW, "the dog"],
    )  # fmt: skip
    drawn = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        drawn.append([ends for _, ends in drawn_by(config, 8)])
    assert drawn[0] == drawn[1]
    assert len({pair for ends in drawn[0] for pair in ends}) == 2


def test_each_pair_is_drawn_for_its_own_target(sd1_folder: Path, tmp_path: Path) -> None:
    config = slider(
        sd1_folder, tmp_path, target=[TARGET, TARGET, "a cat"], positive=[HIGH, "a toy", "red cat"],
        negative=[LOW, "the dog", "a  photo\nof a cat "], num_class_images=8,
    )  # fmt: skip
    drawn = {
        (caption, *pair)
        for batch, ends in drawn_by(config, 30)
        for caption, pair in zip(batch.captions, ends, strict=True)
    }
    assert drawn == {
        (TARGET, HIGH, LOW), (TARGET, "a toy", "the dog"), ("a cat", "red cat", "a photo of a cat")
    }  # fmt: skip
    made = {path.read_text(encoding="utf-8").strip() for path in tmp_path.rglob("class-*.txt")}
    assert made == {
        TARGET, HIGH, LOW, "a toy", "the dog", "a cat", "red cat", "a photo of a cat"
    }  # fmt: skip


def test_its_images_are_those_of_the_base(sd1_folder: Path, tmp_path: Path) -> None:
    train(slider(sd1_folder, tmp_path, max_train_steps=1))
    components, before = load_components(sd1_folder), set[bytes]()
    for path in sorted(tmp_path.rglob("class-*.png")):
        before.add(Image.open(path).tobytes())
        assert Image.open(path).size == (32, 32)
    again = slider(sd1_folder, tmp_path / "again", max_train_steps=1)
    train(again)
    assert {Image.open(p).tobytes() for p in (tmp_path / "again").rglob("class-*.png")} == before
    assert len(before) == 6
    assert components.family.name == "sd1"


@pytest.mark.parametrize(
    ("family", "rest"),
    [
        ("sd1", {"train_text_encoder": True, "text_encoder_lr": 1e-2, "lora_dropout": 0.3,
                 **ANCHORS}),
        pytest.param(
            "sd2", {"method": "lora", "quantize": "int8", "cache_latents": False},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "sdxl", {"method": "dora", "gradient_accumulation_steps": 2, **ANCHORS},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["sd1", "sd2", "sdxl"],
)  # fmt: skip
def test_a_resumed_run_is_the_whole_one(
    family: str, rest: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(f"{family}_folder")
    whole = train(slider(folder, tmp_path / "whole", **rest, checkpointing_steps=2))
    begun = slider(folder, tmp_path / "parts", **rest, checkpointing_steps=2)
    train(replace(begun, max_train_steps=2))
    again = train(replace(begun, resume_from_checkpoint="latest"))
    assert names(tmp_path / "parts") == ["checkpoint-2", "checkpoint-4"]
    assert_same_file(again, whole)


def test_how_it_is_computed_changes_no_loss(sdxl_folder: Path, tmp_path: Path) -> None:
    plain = slider(sdxl_folder, tmp_path / "plain", **ANCHORS, max_train_steps=3)
    train(plain)
    how = {"gradient_checkpointing": True, "offload": "model"}
    train(replace(plain, output_dir=str(tmp_path / "other"), **how))
    wanted, found = losses(tmp_path / "plain"), losses(tmp_path / "other")
    assert len(wanted) == 3
    assert found == pytest.approx(wanted, rel=1e-4)


# Settings


def test_settings_of_images_have_no_effect_which_is_said(sd1_folder: Path, tmp_path: Path) -> None:
    by_name, moved = {setting.name: setting for setting in settings()}, dict[str, Any]()
    refused = "instance_data_dir", "dataset_config", "train_text_encoder_ti"
    for name, setting in by_name.items():
        if not setting.of_photos or name in refused:
            continue
        if setting.kind is bool:
            moved[name] = not setting.default
        elif setting.choices:
            moved[name] = next(c for c in setting.choices if c != setting.default)
        elif setting.is_list:
            moved[name] = ["zwq"]
        elif setting.kind is str:
            moved[name] = str(tmp_path) if setting.is_path else "zwq"
        else:
            moved[name] = 0.5 if setting.kind is float else 64
    moved |= {"validation_data_dir": None, "validation_loss_steps": None}
    assert len(moved) == 30
    plain = slider(sd1_folder, tmp_path / "plain", **ANCHORS)
    other = slider(sd1_folder, tmp_path / "other", **ANCHORS, **moved)
    said = without_effect(other)
    assert {name for name, value in moved.items() if value is not None} <= said.keys()
    assert all("teach is slider" in said[name] for name in moved if name in said)
    assert_same_file(train(plain), train(other))


@pytest.mark.parametrize(
    ("setting", "changes", "words"),
    [
        ("negative", {"negative": []}, "has no negative"),
        ("positive", {"positive": []}, "has no positive"),
        ("target", {"target": []}, "has no target"),
        ("negative", {"negative": [" "]}, "an empty prompt"),
        ("anchors", {"anchors": ["a cat", ""]}, "an empty prompt"),
        ("negative", {"positive": ["a", "b"]}, "2 prompts and negative 1"),
        ("target", {"target": ["a", "b"]}, "2 prompts for 1 pair"),
        ("negative", {"negative": [" A photo of a  RED dog"]}, "are both 'a photo"),
        ("anchors", {"anchors": [HIGH]}, "'a photo of a red dog'"),
        ("anchors", {"anchors": [TARGET.title()]}, "'A Photo Of A Dog'"),
        ("num_class_images", {"num_class_images": 2}, "3 different prompts"),
        ("instance_data_dir", {"instance_data_dir": "photos"}, "teach slider learns"),
        ("dataset_config", {"dataset_config": [{"instance_data_dir": "photos"}]}, "entry 1: "),
        ("dataset_config", {"dataset_config": [{"instance_prompt": "a"}]}, "but teach slider"),
        ("train_text_encoder_ti", {"train_text_encoder_ti": True}, "but teach slider"),
        ("method", {"method": "full"}, "weights have no adjustable strength"),
        ("teach", {"teach": "concept"}, "'concept'"),
    ],
)
def test_what_makes_no_slider_is_refused_in_a_line(
    setting: str, changes: dict[str, Any], words: str
) -> None:
    with refused(setting, words):
        TrainConfig(**{**PROMPTS, **changes})


def test_prompts_that_are_read_alike_are_refused(sd1_folder: Path, tmp_path: Path) -> None:
    long = "a photo of the dog on the red toy " * 20
    config = slider(sd1_folder, tmp_path, positive=[f"{long} red"], negative=[f"{long} dog"])
    with refused("negative", "alike, as it reads"):
        train(config)
    assert not list(tmp_path.rglob("class-*.png"))


def test_a_pack_has_no_sliders(sd1_folder: Path, tmp_path: Path) -> None:
    with refused("teach", "not possible in a pack"):
        check_pack({"one": slider(sd1_folder, tmp_path)})


def test_a_dry_run_lists_the_prompts(sd1_folder: Path, tmp_path: Path) -> None:
    said = training_summary(slider(sd1_folder, tmp_path, **ANCHORS))
    assert said.splitlines() == [
        f"{TARGET}: from {LOW} to {HIGH}",
        "the cat in a backpack: does not move",
        f"the base model first generates 6 images of them in {tmp_path}/class_images, unless a run "
        "has done so",
    ]


# What it leaves


def test_samples_are_a_strip_of_the_written_file(sd1_folder: Path, tmp_path: Path) -> None:
    config = slider(
        sd1_folder, tmp_path, num_validation_images=2, validation_steps=2, max_train_steps=3
    )
    result = train(config)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        "adapted.png", "step-000002.png"
    ]  # fmt: skip
    sheet = Image.open(result.samples["adapted"])
    components, metadata = load_adapted(sd1_folder, result.adapter)
    sampling = SamplingSettings(steps=2, width=32, height=32)
    places = []
    for strength in STRENGTHS:
        set_strength(components.denoiser, strength)
        for image in generate_images(components, TARGET, [3, 4], sampling):
            places.append(find(sheet, image, within=1)[0])
    columns, rows = (sorted({place[axis] for place in places}) for axis in (0, 1))
    assert (len(columns), len(rows)) == (5, 2)
    # A column per strength, and a row per seed.
    assert places == [(left, top) for left in columns for top in rows]
    assert json.loads(metadata.extra["slider"]) == [[TARGET, HIGH, LOW]]
    assert metadata.trigger == ""


@pytest.fixture(scope="module", params=["lora", "dora"])
def trained(
    request: pytest.FixtureRequest, sd1_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """A method, and a run's folder that nothing is written into."""
    folder = tmp_path_factory.mktemp("slider") / request.param
    both: dict[str, Any] = {"train_text_encoder": True, "text_encoder_lr": 5e-3}
    train(slider(sd1_folder, folder, method=request.param, num_validation_images=1, **both))
    return request.param, folder


def test_the_card_says_how_it_is_used(trained: tuple[str, Path]) -> None:
    method, folder = trained
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert {"text-to-image", method, "slider"} <= {*ModelCard(card).data.tags}
    assert f"from `{LOW}` (-3) to `{HIGH}` (3)" in card
    assert "--strength 3" in card
    assert "**At several strengths**" in card
    assert "style" not in card
    # Diffusers' scale is the strength of a LoRA alone.
    assert ('pipeline.set_adapters("slider", 3.0)' in card) == (method == "lora")


def test_a_merged_model_is_the_live_one_and_three_times_the_opposite_change(
    trained: tuple[str, Path], sd1_folder: Path, tmp_path: Path
) -> None:
    method, adapter = trained
    assert report_on(adapter).method.lower() == method
    export_checkpoint(sd1_folder, adapter, tmp_path / "merged", strength=-3.0)
    merged = load_components(tmp_path / "merged").denoiser.state_dict()
    live = load_adapted(sd1_folder, adapter, strength=-3.0)[0].denoiser
    base = load_components(sd1_folder).denoiser.state_dict()
    layers = dict(adapted_layers(live))
    merged_there = {name: layer.merged() for name, layer in layers.items()}
    set_strength(live, 1.0)
    for name, layer in layers.items():
        weight, start = merged[f"{name}.weight"], base[f"{name}.weight"]
        torch.testing.assert_close(weight, merged_there[name], rtol=1e-5, atol=1e-6)
        change = layer.merged() - start
        assert change.norm() > 1e-4 * start.norm()
        torch.testing.assert_close(weight - start, -3 * change, rtol=1e-3, atol=1e-5)


def test_a_file_of_every_program_merges_to_the_attached_slider(
    trained: tuple[str, Path], sd1_folder: Path, tmp_path: Path
) -> None:
    _, adapter = trained
    networks = load_adapted(sd1_folder, adapter)[0].adaptable()
    layers = {
        canonical(component, name): layer
        for component, network in networks.items()
        for name, layer in adapted_layers(network)
    }
    attached = {}
    for strength in (-3.0, -0.5):
        for network in networks.values():
            set_strength(network, strength)
        attached[strength] = {name: layer.merged() for name, layer in layers.items()}
    assert {name.partition(".")[0] for name in layers} == {"unet", "text_encoder"}
    written = set[str]()
    # The first is of transformers, and no strength but 1 is right for the second's two files.
    for target in (name for name in TARGETS if name not in ("diffusion_model", "comfyui_pair")):
        output = tmp_path / (target if target in FOLDERS else f"{target}.safetensors")
        fit = FitSettings(rank=64) if target == "smaller-rank" else None
        report = convert_adapter(adapter, output, target, fit, base=sd1_folder)
        if report.target in written:  # several programs read one format
            continue
        written.add(report.target)
        # What is made for one base is read by programs alone, which scale the whole change.
        is_read = report.target not in ("comfyui", "dense")
        file = read_adapter(report.path) if is_read else None
        tensors = {} if file else load_file(report.path)
        for name, live in layers.items():
            base = live.dense()
            changed = None if file else comfyui(base.double(), tensors_of(name, tensors))
            for strength, weights in attached.items():
                if file:
                    found = merge_tensor(base, [(file.layers[name], Strengths(strength))])
                else:
                    found = base + strength * (changed - base)
                error = (found - weights[name]).norm() / (weights[name] - base).norm()
                assert error < 1e-3, (target, strength, name)
        if file and target != "peft":  # whose files have no metadata of ours
            assert file.layers.keys() == layers.keys(), target
            assert json.loads(file.metadata.extra["slider"]) == [[TARGET, HIGH, LOW]]
    assert written >= {"kohya", "diffusers", "peft", "dense", "smaller-rank"}


def tensors_of(name: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A layer's tensors of a file that web UIs read, without its name in their keys."""
    prefix = f"{kohya_name(name, FAMILIES['sd1'])}."
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
