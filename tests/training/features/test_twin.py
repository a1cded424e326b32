"""Samples on another model than the base, and a frozen adapter under a distilled base."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dora_diffusion.cli import main as cli
from dora_diffusion.cli.commands.rank_checkpoints import _on_model
from dora_diffusion.cli.commands.train import train_config
from dora_diffusion.cli.main import main
from dora_diffusion.config import ConfigError, TrainConfig
from dora_diffusion.config.base import BaseModel
from dora_diffusion.config.derived import as_yaml
from dora_diffusion.evaluation.ranking import EvaluationPrompts
from dora_diffusion.export import export_checkpoint
from dora_diffusion.formats.adapter.file import (
    AdapterFile,
    AdapterMetadata,
    read_adapter,
    write_adapter,
)
from dora_diffusion.models import load as loading
from dora_diffusion.models import locate
from dora_diffusion.models.components import Components
from dora_diffusion.models.locate import family_of
from dora_diffusion.sampling.generate import generate_images
from dora_diffusion.sampling.load import load_adapted, sampling_defaults
from dora_diffusion.sampling.settings import SamplingSettings
from dora_diffusion.studio.app.settings import make_config, preset_values, setting_text
from dora_diffusion.training.events import SampleSaved
from dora_diffusion.training.features import twin
from dora_diffusion.training.recipe import train
from tests.flux2_klein import write_flux2_klein
from tests.training.helpers import assert_same_adapter, losses
from tests.z_image import write_z_image

PROMPT = "a photo of a sks mug"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bases and their twins, which have other weights."""
    root = tmp_path_factory.mktemp("models")
    return {
        "base": write_z_image(root / "base"),
        "twin": write_z_image(root / "twin", shift=3.0, seed=1),
        "klein": write_flux2_klein(root / "klein", seed=2),
        "klein-twin": write_flux2_klein(root / "klein-twin", seed=3, is_distilled=True),
    }


@pytest.fixture
def settings(models: dict[str, Path], photos: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    def make(**changes: Any) -> TrainConfig:
        values = {
            "pretrained_model_name_or_path": str(models["base"]), "resolution": 64, "rank": 2,
            "instance_data_dir": str(photos), "instance_prompt": PROMPT, "max_train_steps": 2,
            "output_dir": str(tmp_path / "out"), "learning_rate": 1e-2, "mixed_precision": "no",
            "num_validation_images": 2, "validation_inference_steps": 3, "checkpointing_steps": 0,
            "validation_guidance_scale": 1.0, "targets": ["attention"],
        }  # fmt: skip
        return TrainConfig(**{**values, **changes})

    return make


def assert_shown(sheet: Path, images: list[Image.Image]) -> None:
    """Compare the images of a sheet with others, to the bit."""
    with Image.open(sheet) as opened:
        pixels = np.asarray(opened.convert("RGB"))
    for image in images:
        wanted = np.asarray(image)
        height, width = wanted.shape[:2]
        found = any(
            np.array_equal(pixels[top : top + height, left : left + width], wanted)
            for top in range(pixels.shape[0] - height + 1)
            for left in range(pixels.shape[1] - width + 1)
            if np.array_equal(pixels[top, left : left + width], wanted[0])
        )
        assert found


def images_of(base: Path, adapter: Path | None, **settings: Any) -> list[Image.Image]:
    components, _ = load_adapted(base, adapter)
    values = {"steps": 3, "guidance_scale": 1.0, "width": 64, "height": 64} | settings
    return generate_images(components, PROMPT, [0, 1], SamplingSettings(**values))


# --- Recognition


@pytest.mark.parametrize(
    ("name", "origin", "shift", "asked", "is_distilled"),
    [
        ("z", "", 6.0, None, False), ("z", "", 3.0, None, True), ("z", "", 1.0, None, False),
        ("Z-Image-Turbo", "", 6.0, None, True), ("zimage-turbo", "", 6.0, None, True),
        ("z_image_turbo_bf16", "", 6.0, None, True), ("Z-Image-De-Turbo", "", 3.0, None, False),
        ("mine", "Tongyi-MAI/Z-Image-Turbo", 6.0, None, True),
        ("Z-Image-De-Turbo", "Tongyi-MAI/Z-Image-Turbo", 3.0, None, False),
        ("z", "", 6.0, True, True), ("Z-Image-Turbo", "", 3.0, False, False),
    ],
)  # fmt: skip
def test_a_distilled_model_is_recognised_by_its_folder(
    tmp_path: Path, models: dict[str, Path], name: str, origin: str, shift: float,
    asked: bool | None, is_distilled: bool,
) -> None:  # fmt: skip
    folder = tmp_path / name
    folder.mkdir()
    for file in models["base"].iterdir():
        if file.name not in ("model_index.json", "scheduler"):
            (folder / file.name).symlink_to(file)
    index = json.loads((models["base"] / "model_index.json").read_text("utf-8"))
    index |= {"_name_or_path": origin} if origin else {}
    (folder / "model_index.json").write_text(json.dumps(index), "utf-8")
    scheduler = json.loads((models["base"] / "scheduler/scheduler_config.json").read_text("utf-8"))
    (folder / "scheduler").mkdir()
    file = folder / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(scheduler | {"shift": shift}), "utf-8")
    base = BaseModel(folder, distilled=asked)
    family = family_of(base)
    components = loading.load_empty(base)
    assert family is not None
    assert family.is_distilled == components.family.is_distilled == is_distilled
    steps, guidance = (8, 1.0) if is_distilled else (50, 6.0)
    assert sampling_defaults(components)["steps"] == steps
    assert sampling_defaults(components)["guidance_scale"] == guidance


@pytest.mark.parametrize("asked", [None, True, False])
def test_a_single_file_is_as_its_configuration_says(
    tmp_path: Path, models: dict[str, Path], asked: bool | None
) -> None:
    for kind, is_distilled in (("klein", False), ("klein-twin", True)):
        file = export_checkpoint(models[kind], (), tmp_path / f"{kind}.safetensors")
        base = BaseModel(file, model_config=models[kind], distilled=asked)
        family, components = family_of(base), loading.load_empty(base)
        wanted = is_distilled if asked is None else asked
        assert family is not None
        assert family.is_distilled == components.family.is_distilled == wanted


@pytest.mark.parametrize("asked", [None, True, False])
def test_a_flag_decides_on_a_stable_diffusion_model(
    tmp_path: Path, sd1_folder: Path, asked: bool | None
) -> None:
    for name, is_named in (("plain", False), ("sd-turbo", True)):
        folder = tmp_path / name
        folder.symlink_to(sd1_folder)
        components = loading.load_empty(BaseModel(folder, distilled=asked))
        steps = sampling_defaults(components).get("steps")
        known = {True: 4 if is_named else 8, False: None, None: 4 if is_named else None}
        assert steps == known[asked]


# --- Samples on another model


@pytest.mark.parametrize("family", ["base", "klein"])
def test_samples_are_the_images_of_generate_on_the_twin(
    settings: Callable[..., TrainConfig], models: dict[str, Path], family: str, tmp_path: Path
) -> None:
    base = str(models[family])
    other = models["twin" if family == "base" else "klein-twin"]
    saved = list[str]()
    config = settings(
        pretrained_model_name_or_path=base, sample_model=str(other), validation_steps=1,
        checkpointing_steps=1, sample_at_start=True,
    )  # fmt: skip
    done = train(config, lambda e: saved.append(e.name) if isinstance(e, SampleSaved) else None)
    samples = tmp_path / "out" / "samples"
    assert saved == ["step-000000", "step-000001", "adapted", "base", "base_above_adapted"]
    first = tmp_path / "out" / "checkpoint-1"
    # Both images at once, as samples are.
    assert_shown(samples / "step-000001.png", images_of(other, first))
    assert_shown(samples / "adapted.png", images_of(other, done.adapter))
    assert_shown(samples / "base.png", images_of(other, None))
    files = [
        str(tmp_path / f"image{end}") for end in ("-0.png", "-1.png")
    ]  # as the command writes them
    code = main([
        "generate", f"--base={other}", f"--adapter={done.adapter}", f"--prompt={PROMPT}",
        "--seed=0", "--num_images=2", "--steps=3", "--guidance_scale=1", "--width=64",
        "--height=64", f"--output={tmp_path / 'image.png'}",
    ])  # fmt: skip
    assert code == 0
    assert_shown(samples / "adapted.png", [Image.open(file).convert("RGB") for file in files])
    with Image.open(samples / "adapted.png") as sheet:
        assert f"Model: {other.name}" in sheet.info["parameters"]


def test_the_trained_adapter_is_the_same(
    settings: Callable[..., TrainConfig], models: dict[str, Path], tmp_path: Path
) -> None:
    """Sampling on another model changes nothing of the run, nor of its resumed half."""
    config = settings(checkpointing_steps=1, validation_steps=1, max_train_steps=3)
    plain = train(replace(config, output_dir=str(tmp_path / "plain"), num_validation_images=0))
    sampled = train(replace(config, sample_model=str(models["twin"])))
    assert_same_adapter(plain.adapter, sampled.adapter)
    resumed = train(replace(
        config, sample_model=str(models["twin"]), output_dir=str(tmp_path / "resumed"),
        resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"),
    ))  # fmt: skip
    assert_same_adapter(plain.adapter, resumed.adapter)


@pytest.mark.parametrize(
    "changes",
    [
        {"ema_decay": 0.5}, {"method": "lora"}, {"norm_axis": "input"}, {"mixed_precision": "bf16"},
        {"train_text_encoder": True, "text_encoder_lr": 1e-2}, {"clip_skip": 1},
        {"token": "zwq", "train_text_encoder_ti": True, "instance_prompt": PROMPT + " zwq"},
        {"quantize": "int8"},
    ],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_samples_with_other_settings_are_those_of_the_file(
    changes: dict[str, Any], tiny_run: Callable[..., TrainConfig], sd1_folder: Path,
    random_adapter: Callable[..., Any], tmp_path: Path,
) -> None:  # fmt: skip
    metadata = AdapterMetadata("sd1")
    file = write_adapter(tmp_path / "a", AdapterFile(random_adapter(sd1_folder), metadata))
    other = export_checkpoint(sd1_folder, file, tmp_path / "twin")
    values = {
        "num_validation_images": 2, "validation_prompt": [PROMPT], "sample_model": str(other),
        "learning_rate": 1e-2, "mixed_precision": "no", "validation_guidance_scale": 3.0,
        "resolution": 64,
    }  # fmt: skip
    config = tiny_run(**values | changes)
    for caption in Path(config.instance_data_dir).glob("*.txt"):
        caption.unlink()
    done = train(config)
    stored = BaseModel(other, quantize=config.quantize)
    dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
    components, _ = load_adapted(stored, done.adapter, dtype=dtype)
    options = SamplingSettings(steps=2, guidance_scale=3.0, width=64, height=64)
    images = generate_images(components, PROMPT, [0, 1], options)
    assert_shown(tmp_path / "out" / "samples" / "adapted.png", images)


def test_class_images_are_the_base_models_own(
    settings: Callable[..., TrainConfig], models: dict[str, Path], tmp_path: Path
) -> None:
    """With its 50 steps and its guidance, of which samples on the twin have none."""
    prior = {
        "with_prior_preservation": True, "class_prompt": "a photo of a mug", "num_class_images": 2,
        "prior_preservation_mode": "images",
    }  # fmt: skip
    usual = {"validation_inference_steps": 50, "validation_guidance_scale": 6.0}
    found = {}
    for name, changes in {"plain": usual, "twin": {"sample_model": str(models["twin"])}}.items():
        train(settings(**prior | changes, output_dir=str(tmp_path / name), max_train_steps=1))
        folder = tmp_path / name / "class_images"
        found[name] = [np.asarray(Image.open(f)).tolist() for f in sorted(folder.rglob("*.png"))]
    assert len(found["plain"]) == 2
    assert found["plain"] == found["twin"]


def test_the_base_leaves_the_device_before_the_twin_comes(
    settings: Callable[..., TrainConfig], models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In turns: the base goes, the twin is loaded and goes, and the base comes back."""
    order = list[str]()
    load, move = twin.load_adapted, Components.to

    @contextmanager
    def leaving(device: torch.device, *modules: torch.nn.Module) -> Iterator[None]:
        order.append(f"{len(modules)} parts to the {device}")
        yield
        order.append("back")

    def moved(components: Components, device: Any) -> Components:
        order.append(f"twin to the {device}" if components.name == name else "")
        return move(components, device)

    def loaded(base: Any, adapter: Any, **options: Any) -> Any:
        order.append("twin" if adapter else "twin without adapter")
        return load(base, adapter, **options)

    name = str(models["twin"])
    monkeypatch.setattr(Components, "to", moved)
    monkeypatch.setattr(twin, "on_device", leaving)
    monkeypatch.setattr(twin, "load_adapted", loaded)
    train(settings(sample_model=name, max_train_steps=1, num_validation_images=1))
    away, to_device = "3 parts to the cpu", "twin to the cpu"
    loads = [[away, one, to_device, to_device, "back"] for one in ("twin", "twin without adapter")]
    assert list(filter(None, order)) == [*loads[0], *loads[1]]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"sample_model": "klein"}, "FLUX.2-klein, and the base model is Z-Image; choose one of"),
        ({"sample_model": "missing"}, "missing"),
        ({"sample_model": "small"}, "sample_model .*the adapter does not fit it: context_ref"),
    ],
)  # fmt: skip
def test_another_model_is_refused_before_training(
    settings: Callable[..., TrainConfig], models: dict[str, Path], tmp_path: Path,
    changes: dict[str, Any], problem: str,
) -> None:  # fmt: skip
    folder = {**models, "missing": tmp_path / "missing", "small": tmp_path / "small"}
    if changes["sample_model"] == "small":
        write_z_image(folder["small"], n_heads=1)
    with pytest.raises(ValueError, match=problem):
        train(settings(sample_model=str(folder[changes["sample_model"]])))
    assert not (tmp_path / "out" / "config.yaml").exists()


@pytest.mark.parametrize("name", ["sample_model", "assistant_adapter"])
def test_full_fine_tuning_excludes_both(settings: Callable[..., TrainConfig], name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} .*method full trains none; leave it out"):
        settings(method="full", **{name: "somewhere"})


# --- Steps and guidance


def sampling(*words: str) -> tuple[int, float]:
    """Steps and guidance of a command line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = train_config(cli.build_parser().parse_args(["train", *words]))
    return config.validation_inference_steps, config.validation_guidance_scale


@pytest.mark.parametrize("preset", [(), ("--preset", "balanced")])
def test_a_command_takes_the_steps_of_the_twin(
    models: dict[str, Path], sd1_folder: Path, photos: Path, tmp_path: Path,
    preset: tuple[str, ...],
) -> None:  # fmt: skip
    common = (f"--instance_data_dir={photos}", "--instance_prompt=a sks mug", *preset)
    base = f"--pretrained_model_name_or_path={models['base']}"
    other = f"--sample_model={models['twin']}"
    assert sampling(base, *common) == (50, 6.0)
    assert sampling(base, other, *common) == (8, 1.0)
    assert sampling(base, other, "--validation_inference_steps=4", *common) == (4, 1.0)
    assert sampling(other.replace("sample_model", "pretrained_model_name_or_path"),
                    base.replace("pretrained_model_name_or_path", "sample_model"),
                    *common) == (50, 6.0)  # fmt: skip
    turbo = tmp_path / "sd-turbo"
    turbo.symlink_to(sd1_folder)
    sd1 = f"--pretrained_model_name_or_path={sd1_folder}"
    assert sampling(sd1, f"--sample_model={turbo}", *common) == (4, 1.0)
    assert sampling(sd1, "--distilled", *common) == (8, 1.0)


def test_a_flag_over_the_settings_of_a_run_takes_the_steps_of_the_twin(
    settings: Callable[..., TrainConfig], models: dict[str, Path], tmp_path: Path
) -> None:
    """A run's file holds all settings; what was derived for the former samples is dropped."""
    other, file = f"--sample_model={models['twin']}", tmp_path / "config.yaml"
    for steps, guidance, wanted in ((50, 6.0, (8, 1.0)), (30, 6.0, (30, 1.0))):
        config = settings(validation_inference_steps=steps, validation_guidance_scale=guidance)
        file.write_text(as_yaml(config), "utf-8")
        assert sampling("--config", str(file)) == (steps, guidance)
        assert sampling("--config", str(file), other) == wanted
    config = settings(sample_model=str(models["twin"]), validation_inference_steps=8)
    file.write_text(as_yaml(config), "utf-8")
    assert sampling("--config", str(file), f"--sample_model={models['base']}") == (50, 6.0)


def test_a_form_takes_the_steps_of_the_twin(models: dict[str, Path], tmp_path: Path) -> None:
    fields = {n: setting_text(v) for n, v in preset_values("balanced", str(models["base"])).items()}
    assert (fields["validation_inference_steps"], fields["sample_model"]) == ("50", "")

    def made(**changes: str) -> tuple[int, float]:
        config = make_config(
            str(models["base"]), tmp_path, tmp_path / "run", "sks", "mug", [PROMPT],
            {**fields, **changes},
        )  # fmt: skip
        return config.validation_inference_steps, config.validation_guidance_scale

    other = str(models["twin"])
    assert made() == (50, 6.0)
    assert made(sample_model=other) == (8, 1.0)
    assert made(sample_model=other, validation_inference_steps="20") == (20, 1.0)


def test_checkpoints_are_ranked_on_the_twin(
    settings: Callable[..., TrainConfig], models: dict[str, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    asked, notes = [], list[bool]()

    def rank(components: Any, adapters: Any, questions: Any, *rest: Any) -> Any:
        sampling = questions.settings
        steps = sampling.steps, sampling.guidance_scale, sampling.scheduler
        asked.append((components.name, steps, bool(questions.held_out), sampling.width))
        notes.append(any("loss was not measured" in note for note in questions.notes))
        return [], list(questions.notes)

    monkeypatch.setattr("dora_diffusion.evaluation.ranking.rank", rank)
    monkeypatch.setattr("dora_diffusion.evaluation.ranking.write_ranking", lambda *a: None)
    config = settings(sample_model=str(models["twin"]), checkpointing_steps=1, validation_split=1)
    train(config)
    train(replace(config, output_dir=str(tmp_path / "other"), sample_model=None))
    base, twin = str(models["base"]), str(models["twin"])
    another = str(write_z_image(tmp_path / "another", seed=4))
    own, few, usual = (3, 1.0, None), (8, 1.0, None), (50, 6.0, None)
    cases = [
        # The run's folder, the model; the settings, and whether a loss is measured on it.
        (config.output_dir, None, twin, own, False), (config.output_dir, twin, twin, own, False),
        (config.output_dir, base, base, usual, True),
        (config.output_dir, another, another, usual, True),
        (str(tmp_path / "other"), None, base, own, True),
        (str(tmp_path / "other"), another, another, own, True),
        (str(tmp_path / "other"), twin, twin, few, False),
    ]  # fmt: skip
    for folder, given, *_ in cases:
        words = ["rank-checkpoints", folder, "--output", str(tmp_path / "ranking")]
        assert main(words if given is None else [*words, f"--base={given}"]) == 0
    assert asked == [(*case, 64) for _, _, *case in cases]
    assert notes == [not case[-1] for case in cases]


def test_a_base_without_sampling_values_is_ranked_with_the_usual_ones(sd1_folder: Path) -> None:
    """Stable Diffusion has the defaults of images; the run has the twin's."""
    config = TrainConfig(pretrained_model_name_or_path=str(sd1_folder), sample_model="few-steps")
    few = SamplingSettings(4, 1.0, "lcm", 32, 32)
    questions = EvaluationPrompts([], few, lambda *images: {}, (), "")
    ranked = _on_model(questions, loading.load_components(sd1_folder), config)
    assert (ranked.settings.steps, ranked.settings.guidance_scale) == (25, 7.5)


def test_a_line_says_where_base_and_twin_differ(
    settings: Callable[..., TrainConfig], models: dict[str, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    done = train(settings(num_validation_images=0))
    for base, is_said in (("twin", True), ("base", False)):
        capsys.readouterr()
        words = ["generate", f"--base={models[base]}", f"--adapter={done.adapter}",
                 "--prompt=a mug", f"--output={tmp_path / 'image.png'}", "--overwrite"]  # fmt: skip
        assert main(words) == 0
        line = "; trained on base, used on twin, as people do"
        assert (line in capsys.readouterr().err) == is_said


# --- An adapter under a distilled base


@pytest.fixture(scope="module")
def assistant(
    models: dict[str, Path], random_adapter: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path]:  # fmt: skip
    """A LoRA, in the names of ai-toolkit, and the base model with it."""
    layers = random_adapter(models["base"], axis=None, components=["transformer"])
    folder = tmp_path_factory.mktemp("assistant")
    adapter = AdapterFile(layers, AdapterMetadata("z-image"))
    file = write_adapter(folder / "assistant.safetensors", adapter, "diffusion_model")
    return file, export_checkpoint(models["base"], file, folder / "merged")


@pytest.mark.parametrize(
    "changes",
    [{}, {"gradient_checkpointing": True}, {"gradient_accumulation_steps": 2},
     {"targets": ["attention+ff"]}, {"mixed_precision": "bf16"}],
    ids=lambda changes: next(iter(changes), "plain"),
)  # fmt: skip
def test_a_lora_trains_as_on_the_model_with_the_assistant(
    settings: Callable[..., TrainConfig], assistant: tuple[Path, Path], tmp_path: Path,
    changes: dict[str, Any],
) -> None:  # fmt: skip
    file, merged = assistant
    config = settings(method="lora", max_train_steps=3, num_validation_images=0, **changes)
    under = train(replace(config, assistant_adapter=str(file)))
    output = str(tmp_path / "merged")
    on_merged = train(replace(config, pretrained_model_name_or_path=str(merged), output_dir=output))
    plain = train(replace(config, output_dir=str(tmp_path / "plain")))
    tolerance = 2e-2 if config.mixed_precision == "bf16" else 1e-5
    found, wanted, other = (losses(run.output_dir) for run in (under, on_merged, plain))
    for step, loss in wanted.items():
        assert found[step] == pytest.approx(loss, rel=tolerance)
        times = 3 if config.mixed_precision == "bf16" else 100
        assert abs(other[step] - loss) > times * abs(found[step] - loss)
    if config.mixed_precision == "no":
        for name, layer in read_adapter(on_merged.adapter).layers.items():
            same = read_adapter(under.adapter).layers[name]
            change, expected = same.up @ same.down, layer.up @ layer.down
            assert (change - expected).norm() <= 1e-3 * expected.norm()


def test_a_dora_starts_as_on_the_model_with_the_assistant(
    settings: Callable[..., TrainConfig], assistant: tuple[Path, Path], tmp_path: Path
) -> None:
    """At the first step it changes nothing; its magnitudes are the norms of the base itself."""
    file, merged = assistant
    config = settings(max_train_steps=1, num_validation_images=0)
    under = train(replace(config, assistant_adapter=str(file), learning_rate=1e-12))
    output = str(tmp_path / "merged")
    on_merged = train(replace(config, pretrained_model_name_or_path=str(merged), output_dir=output))
    assert losses(under.output_dir)[1] == pytest.approx(losses(on_merged.output_dir)[1], rel=1e-5)
    weights = load_file(models_transformer(config))
    for name, layer in read_adapter(under.adapter).layers.items():
        norm = weights[f"{name.removeprefix('transformer.')}.weight"].norm(dim=1)
        torch.testing.assert_close(layer.magnitude, norm)


def models_transformer(config: TrainConfig) -> Path:
    folder = Path(config.pretrained_model_name_or_path)
    return folder / "transformer" / "diffusion_pytorch_model.safetensors"


def test_the_assistant_is_in_no_sample_and_no_file(
    settings: Callable[..., TrainConfig], assistant: tuple[Path, Path], models: dict[str, Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    file, _ = assistant
    config = settings(
        assistant_adapter=str(file), validation_steps=1, checkpointing_steps=1, validation_split=1,
        validation_loss_steps=1, sample_model=None,
    )  # fmt: skip
    done = train(config)
    samples = tmp_path / "out" / "samples"
    assert_shown(samples / "adapted.png", images_of(models["base"], done.adapter))
    assert_shown(samples / "base.png", images_of(models["base"], None))
    checkpoint = tmp_path / "out" / "checkpoint-1"
    assert_shown(samples / "step-000001.png", images_of(models["base"], checkpoint))
    layers = read_adapter(done.adapter).layers
    assert {layer.rank for layer in layers.values()} == {2}
    extra = read_adapter(done.adapter).metadata.extra
    assert extra["assistant_adapter"] == "assistant.safetensors"
    # The validation loss of the base is that of a run without it.
    plain = train(replace(config, assistant_adapter=None, output_dir=str(tmp_path / "plain")))
    both = (losses(run.output_dir, "validation_loss")[0] for run in (done, plain))
    assert next(both) == next(both)
    resumed = train(replace(
        config, output_dir=str(tmp_path / "resumed"), resume_from_checkpoint=str(checkpoint)
    ))  # fmt: skip
    assert_same_adapter(done.adapter, resumed.adapter)


def test_a_shared_model_keeps_no_assistant(
    settings: Callable[..., TrainConfig], assistant: tuple[Path, Path], tmp_path: Path
) -> None:
    """A model that is kept for the next run has no hook of the former one."""
    cache = loading.BaseCache()
    config = settings(num_validation_images=0, max_train_steps=1)
    first = train(config, load=cache)
    train(
        replace(config, assistant_adapter=str(assistant[0]), output_dir=str(tmp_path / "b")),
        load=cache,
    )
    again = train(replace(config, output_dir=str(tmp_path / "c")), load=cache)
    assert_same_adapter(first.adapter, again.adapter)


@pytest.mark.parametrize(
    ("axis", "components", "problem"),
    [("output", ["transformer"], "is a DoRA; give a LoRA of the denoiser alone"),
     (None, ["transformer", "text_encoder"], "has layers of text_encoder, whose outputs")],
)  # fmt: skip
def test_other_adapters_are_refused(
    settings: Callable[..., TrainConfig], models: dict[str, Path], tmp_path: Path,
    random_adapter: Callable[..., Any], axis: str | None, components: list[str], problem: str,
) -> None:  # fmt: skip
    layers = random_adapter(models["base"], axis=axis, components=components, every=5)
    file = write_adapter(
        tmp_path / "a.safetensors", AdapterFile(layers, AdapterMetadata("z-image"))
    )
    with pytest.raises(ConfigError, match=f"assistant_adapter .* {problem}"):
        train(settings(assistant_adapter=str(file)))
    with pytest.raises(ConfigError, match="assistant_adapter: there is no adapter at"):
        train(settings(assistant_adapter=str(tmp_path / "missing")))
    with pytest.raises(ConfigError, match="assistant_adapter and compile exclude each other"):
        settings(assistant_adapter=str(file), compile=True)


def test_convolutions_have_an_assistant_too(
    tiny_run: Callable[..., TrainConfig], sd1_folder: Path, random_adapter: Callable[..., Any],
    tmp_path: Path,
) -> None:  # fmt: skip
    layers = random_adapter(sd1_folder, axis=None, components=["unet"])
    assert {layer.down.ndim for layer in layers.values()} == {2, 4}
    file = write_adapter(tmp_path / "a.safetensors", AdapterFile(layers, AdapterMetadata("sd1")))
    merged = export_checkpoint(sd1_folder, file, tmp_path / "merged")
    config = tiny_run(max_train_steps=1, targets=["attention+conv"], mixed_precision="no")
    under = train(replace(config, assistant_adapter=str(file)))
    output = str(tmp_path / "m")
    on_merged = train(replace(config, pretrained_model_name_or_path=str(merged), output_dir=output))
    assert losses(under.output_dir)[1] == pytest.approx(losses(on_merged.output_dir)[1], rel=1e-5)


def test_a_distilled_base_with_an_assistant_is_no_reason_to_warn(
    settings: Callable[..., TrainConfig], models: dict[str, Path], assistant: tuple[Path, Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    config = settings(pretrained_model_name_or_path=str(models["twin"]), num_validation_images=0)
    with pytest.warns(UserWarning, match=r"with sample_model .*twin; or set assistant_adapter$"):
        train(config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output = str(tmp_path / "b")
        train(replace(config, assistant_adapter=str(assistant[0]), output_dir=output))
    assert not any("distilled" in str(warning.message) for warning in caught)


def test_an_assistant_may_be_a_file_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, assistant: tuple[Path, Path]
) -> None:
    asked = []

    def fetch(name: str, revision: None, allow: list[str], ignore: list[str]) -> Path:
        asked.append((name, allow))
        return assistant[0].parent

    monkeypatch.setattr(locate, "fetch_snapshot", fetch)
    monkeypatch.chdir(tmp_path)
    assert locate.resolve_adapter("ostris/adapter/assistant.safetensors") == assistant[0]
    assert asked == [("ostris/adapter", ["assistant.safetensors"])]
    (tmp_path / "ostris").mkdir()  # A folder here has no file of that name.
    with pytest.raises(FileNotFoundError, match="there is no adapter at ostris/adapter"):
        locate.resolve_adapter("ostris/adapter/assistant.safetensors")
