"""Loading: every source, both spellings of text encoders, families, and plain errors."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_diffusion.config.base import BaseModel
from dora_diffusion.config.families import FAMILIES, UnsupportedModelError
from dora_diffusion.config.schedulers import SCHEDULERS
from dora_diffusion.export.checkpoint import export_checkpoint
from dora_diffusion.formats.checkpoint.models import detect_checkpoint_family
from dora_diffusion.formats.files.stream import TensorSpec
from dora_diffusion.models.load import (
    ModelNotFoundError,
    check_components,
    load_components,
    load_vae,
    resolve_folder,
)

NOTHING = TensorSpec(torch.float32, ())
CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"

FOLDERS = ["sd1_folder", "sd2_folder", "sdxl_folder"]
HALF = [torch.float16, torch.bfloat16]


@pytest.fixture
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(
        json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8"
    )


@pytest.mark.parametrize(
    ("folder", "name", "prediction", "encoders"),
    [
        ("sd1_folder", "sd1", "epsilon", 1),
        ("sd2_folder", "sd2", "v_prediction", 1),
        ("sdxl_folder", "sdxl", "epsilon", 2),
    ],
    indirect=["folder"],
)
def test_folders_load_frozen_with_their_facts(
    folder: Path, name: str, prediction: str, encoders: int
) -> None:
    components = load_components(folder)
    assert components.family is FAMILIES[name]
    assert components.prediction_type == prediction
    assert len(components.text_encoders) == len(components.tokenizers) == encoders
    assert components.vae_factor == 8
    assert components.latent_channels == 4
    assert components.default_resolution == 64
    assert components.scheduler.config.beta_schedule == "scaled_linear"
    assert components.scheduler.config.clip_sample is False
    names = ["unet", "text_encoder", "text_encoder_2"][: 1 + encoders]
    assert list(components.adaptable()) == names
    for module in components.modules().values():
        assert not module.training
        assert not any(weight.requires_grad for weight in module.parameters())
    stored = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    loaded = components.denoiser.state_dict()
    assert stored.keys() == loaded.keys()
    assert all(torch.equal(stored[key], loaded[key]) for key in stored)


# In the quick suite: every family with its own, and every other one with some family. Each of all
# schedulers is compared on Stable Diffusion 1 in tests/sampling/test_every_option.py.
TOGETHER = {
    *((None, folder) for folder in FOLDERS),
    ("euler", "sd1_folder"), ("ddim", "sd2_folder"), ("unipc", "sd2_folder"),
    ("dpm++", "sdxl_folder"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("scheduler", "folder"),
    [
        pytest.param(*pair, marks=[pytest.mark.slow] * (pair not in TOGETHER))
        for pair in itertools.product((None, "ddim", "euler", "dpm++", "unipc"), FOLDERS)
    ],
    indirect=["folder"],
)
def test_pipelines_sample_as_the_stock_pipeline_does(folder: Path, scheduler: str | None) -> None:
    from diffusers import DiffusionPipeline

    components = load_components(folder)
    pipeline = components.pipeline(scheduler)
    stock = DiffusionPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    if scheduler is not None:
        # The stock folder's scheduler leaves clipping at its class's default.
        config = dict(stock.scheduler.config, clip_sample=False, set_alpha_to_one=False)
        stock.scheduler = type(pipeline.scheduler).from_config(config)
    assert pipeline.unet is components.denoiser
    assert type(pipeline) is type(stock)
    assert type(pipeline.scheduler) is type(stock.scheduler)
    images = [
        pipe(
            "a photo of sks dog",
            num_inference_steps=2,
            height=64,
            width=64,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images
        for pipe in (pipeline, stock)
    ]
    assert torch.equal(images[0], images[1])


def test_unknown_samplers_are_named(sd1_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown scheduler 'plms'; choose from ddim.*dpm\+\+"):
        load_components(sd1_folder).pipeline("plms")


def test_zero_terminal_snr_schedules_sample_from_the_last_step(
    sd2_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(sd2_folder, tmp_path / "zero")
    edit_json(folder / "scheduler" / "scheduler_config.json", rescale_betas_zero_snr=True)
    components = load_components(folder)
    assert components.scheduler.alphas_cumprod[-1] == 0
    scheduler = components.sampling_scheduler("ddim")
    scheduler.set_timesteps(10)
    assert scheduler.timesteps[0] == 999


@pytest.mark.parametrize("folder", FOLDERS, indirect=True)
def test_text_encoders_load_in_either_spelling(folder: Path, tmp_path: Path) -> None:
    expected = load_components(folder)
    for prefixed in (True, False):
        copy = shutil.copytree(folder, tmp_path / f"prefixed-{prefixed}")
        weights = copy / "text_encoder" / "model.safetensors"
        bare = {key.removeprefix("text_model."): value for key, value in load_file(weights).items()}
        spelled = {f"text_model.{key}" if prefixed else key: value for key, value in bare.items()}
        save_file(spelled, weights, metadata={"format": "pt"})
        loaded = load_components(copy).text_encoders[0].state_dict()
        for key, value in expected.text_encoders[0].state_dict().items():
            assert torch.equal(loaded[key], value)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_missing_weights_are_refused_not_left_random(
    sd1_folder: Path, tmp_path: Path, part: str
) -> None:
    folder = shutil.copytree(sd1_folder, tmp_path / "model")
    [weights] = (folder / part).glob("*.safetensors")
    stored = load_file(weights)
    lost = sorted(stored)[3]
    del stored[lost]
    save_file(stored, weights, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=rf"{part} is incomplete or damaged: it lacks {part}\.\S+;"
    ):
        load_components(folder)


def test_damaged_and_absent_files_are_named(sd1_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sd1_folder, tmp_path / "model")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"unet could not be loaded .*download the model again"):
        load_components(folder)
    weights.unlink()
    with pytest.raises(ValueError, match="unet could not be loaded"):
        load_components(folder)
    shutil.rmtree(folder / "scheduler")
    with pytest.raises(ValueError, match=r"scheduler_config\.json is missing or damaged"):
        load_components(folder)


def test_pickles_are_refused(sd1_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sd1_folder, tmp_path / "model")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), folder / "unet" / "diffusion_pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ValueError, match="unet could not be loaded"):
        load_components(folder)
    (tmp_path / "model.ckpt").touch()
    with pytest.raises(ModelNotFoundError, match=r"pickle.*convert it to \.safetensors"):
        load_components(tmp_path / "model.ckpt")


def test_a_tokenizer_without_its_vocabulary_is_refused(sd1_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sd1_folder, tmp_path / "model")
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        (folder / "tokenizer" / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match="tokenizer"):
        load_components(folder)


def test_variants(sd1_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sd1_folder, tmp_path / "model")
    for path in list(folder.rglob("*.safetensors")):
        path.rename(path.with_name(f"{path.stem}.fp16.safetensors"))
    expected = load_components(sd1_folder).denoiser.state_dict()
    loaded = load_components(BaseModel(folder, variant="fp16")).denoiser.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in expected.items())
    with pytest.raises(ValueError, match=r"unet could not be loaded \(it has no 'bf16' variant"):
        load_components(BaseModel(folder, variant="bf16"))


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_keeps_a_fragile_vae_in_float32(
    sdxl_folder: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    components = load_components(sdxl_folder, dtype=dtype)
    assert components.denoiser.dtype == dtype
    assert {encoder.dtype for encoder in components.text_encoders} == {dtype}
    assert components.vae.dtype == torch.float32
    stored = load_file(sdxl_folder / "vae" / "diffusion_pytorch_model.safetensors")
    key = "decoder.conv_in.weight"
    assert torch.equal(components.vae.state_dict()[key], stored[key])
    image = components.pipeline()(
        "a dog", num_inference_steps=1, height=64, width=64, output_type="pt"
    ).images
    assert torch.isfinite(image).all()
    fixed = shutil.copytree(sdxl_folder, tmp_path / "fixed")
    edit_json(fixed / "vae" / "config.json", force_upcast=False)
    assert load_components(fixed, dtype=dtype).vae.dtype == dtype
    assert load_components(BaseModel(sdxl_folder, vae=fixed), dtype=dtype).vae.dtype == dtype
    assert (
        load_components(BaseModel(fixed, vae=sdxl_folder), dtype=dtype).vae.dtype == torch.float32
    )


def test_another_vae(sd1_folder: Path, sdxl_folder: Path) -> None:
    from_pipeline = load_components(BaseModel(sd1_folder, vae=sdxl_folder)).vae
    assert from_pipeline.config.scaling_factor == 0.13025
    assert load_vae(sdxl_folder / "vae").config.scaling_factor == 0.13025
    embedded = load_components("embedded:tiny-sd").vae.state_dict()
    for key, weight in load_vae("embedded:tiny-sd").state_dict().items():
        assert torch.equal(weight, embedded[key])
    with pytest.raises(ModelNotFoundError, match=r"the VAE \./absent does not exist"):
        load_components(BaseModel(sd1_folder, vae="./absent"))


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("model_index.json", {"unet": ["diffusers", "FluxTransformer2DModel"]}),
        ("model_index.json", {"text_encoder": ["transformers", "T5EncoderModel"]}),
        ("unet/config.json", {"addition_embed_type": "text_time"}),
    ],
)
def test_other_kinds_of_models_are_refused(
    sd1_folder: Path, tmp_path: Path, file: str, changes: dict[str, Any]
) -> None:
    folder = shutil.copytree(sd1_folder, tmp_path / "model")
    edit_json(folder / file, **changes)
    with pytest.raises(UnsupportedModelError, match="use a base model of Stable Diffusion 1"):
        load_components(folder)


def test_checkpoint_families_are_told_by_their_keys() -> None:
    for family in FAMILIES.values():
        conv_in = TensorSpec(torch.float32, (320, family.in_channels(), 3, 3))
        # Sizes of one transformer differ by the share of their text states.
        shape = (family.width_tensor[1], family.prompt_width)
        states = {"txt_in.weight": TensorSpec(torch.float32, shape)}
        specs = {family.checkpoint_key: NOTHING, "x": NOTHING, CONV_IN: conv_in, **states}
        assert detect_checkpoint_family(specs) is family
    # Of other latents, or without a UNet.
    key, large = FAMILIES["sd1"].checkpoint_key, TensorSpec(torch.float32, (320, 16, 3, 3))
    for specs in ({key: NOTHING}, {key: NOTHING, CONV_IN: large}):
        assert detect_checkpoint_family(specs) is FAMILIES["sd1"]
    with pytest.raises(UnsupportedModelError, match="an adapter or a bare UNet"):
        detect_checkpoint_family({"lora_unet_x.lora_down.weight": NOTHING}, "adapter.safetensors")


def test_identity_follows_the_weights_not_the_name(sd1_folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(sd1_folder, tmp_path / "elsewhere")
    first, second = load_components(sd1_folder), load_components(copy)
    assert first.identity() == second.identity()
    assert first.identity("vae") != first.identity("unet")
    second.vae.decoder.conv_in.weight.add_(1e-3)
    assert first.identity("vae") != second.identity("vae")
    assert first.identity("unet") == second.identity("unet")
    assert first.identity("vae") != load_components(sd1_folder, dtype=HALF[0]).identity("vae")


class TestNames:
    def test_folders(self, sd1_folder: Path) -> None:
        assert resolve_folder(sd1_folder) == sd1_folder

    @pytest.mark.parametrize("name", ["/absent/model", "./model", "a/b/c", "model.safetensors"])
    def test_absent_paths(self, name: str) -> None:
        with pytest.raises(ModelNotFoundError, match="does not exist; give a diffusers folder"):
            load_components(name)

    def test_a_folder_that_is_no_pipeline(self, sd1_folder: Path) -> None:
        with pytest.raises(ModelNotFoundError, match=r"no model_index\.json"):
            resolve_folder(sd1_folder / "unet")

    def test_a_hub_id_offline(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(ModelNotFoundError) as raised:
            load_components("somebody/some-model")
        message = str(raised.value)
        assert message.startswith("somebody/some-model is not a local folder, not in the hub's")
        assert "HF_HUB_OFFLINE is set" in message
        assert "\n" not in message

    def test_a_hub_id_is_fetched_without_pickles(
        self, monkeypatch: pytest.MonkeyPatch, sd1_folder: Path
    ) -> None:
        from huggingface_hub.utils import filter_repo_objects

        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def snapshot_download(*args: Any, **kwargs: Any) -> str:
            calls.append((args, kwargs))
            return str(sd1_folder)

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        assert load_components(BaseModel("someone/model", revision="v2")).family.name == "sd1"
        load_folder = resolve_folder(BaseModel("someone/model", variant="fp16"))
        assert load_folder == sd1_folder
        assert calls[0][0] == ("someone/model",)
        assert calls[0][1]["revision"] == "v2"
        wanted = [
            "model_index.json",
            "scheduler/scheduler_config.json",
            "tokenizer/vocab.json",
            "tokenizer_2/merges.txt",
            "unet/config.json",
        ]
        full = ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"]
        half = ["unet/diffusion_pytorch_model.fp16.safetensors"]
        half += ["text_encoder_2/model.fp16-00001-of-00002.safetensors"]
        unwanted = ["unet/diffusion_pytorch_model.bin", "v1-5.ckpt", "model.safetensors", "x.py"]
        unwanted += ["safety_checker/model.safetensors", "unet/a.non_ema.safetensors", "README.md"]
        for (_, options), weights in zip(calls, (full, half), strict=True):
            found = filter_repo_objects(
                wanted + full + half + unwanted,
                allow_patterns=options["allow_patterns"],
                ignore_patterns=options["ignore_patterns"],
            )
            assert sorted(found) == sorted(wanted + weights)

    @pytest.mark.parametrize(
        ("error", "reason"),
        [
            ("GatedRepoError", "set HF_TOKEN"),
            ("RepositoryNotFoundError", "the hub has no such model"),
            ("RevisionNotFoundError", "no revision 'v9'"),
            ("LocalEntryNotFoundError", "not in the hub's cache"),
        ],
    )
    def test_hub_errors_are_plain(
        self, monkeypatch: pytest.MonkeyPatch, error: str, reason: str
    ) -> None:
        from huggingface_hub import errors

        kind = getattr(errors, error)
        raised = kind.__new__(kind)

        def fail(*_: Any, **__: Any) -> None:
            raise raised

        monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
        with pytest.raises(ModelNotFoundError, match=reason):
            resolve_folder(BaseModel("someone/model", revision="v9"))

    def test_embedded_models(self, monkeypatch: pytest.MonkeyPatch, sd1_folder: Path) -> None:
        from dora_diffusion.models import embedded

        def model_folder(name: str) -> Path:
            if name != "tiny":
                raise ValueError(f"choose from tiny, got {name}")
            return sd1_folder

        monkeypatch.setattr(embedded, "model_folder", model_folder, raising=False)
        assert resolve_folder("embedded:tiny") == sd1_folder
        with pytest.raises(ModelNotFoundError, match="no embedded model is called 'big': choose"):
            resolve_folder("embedded:big")
        monkeypatch.setattr(embedded, "model_folder", lambda name: sd1_folder / name)
        with pytest.raises(ModelNotFoundError, match="not a diffusers pipeline"):
            resolve_folder("embedded:lost")


def test_a_schedule_of_another_kind_is_refused():
    from dora_diffusion.models.load import training_scheduler

    with pytest.raises(UnsupportedModelError, match="EDMDPMSolverMultistepScheduler"):
        training_scheduler(
            {"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_max": 80.0}, FAMILIES["sd1"]
        )


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_sampler_ends_in_pure_noise_where_the_model_does_or_says_no(name):
    components = load_components("embedded:tiny-sdxl")
    if name in ("pndm", "heun"):
        with pytest.raises(
            ValueError, match=f"{name} does not support this model's noise schedule"
        ):
            components.sampling_scheduler(name)
    else:
        assert components.sampling_scheduler(name).alphas_cumprod[-1] < 1e-6


PARTS = ["unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"]


def spoilt(folder: Path, part: str, how: str) -> None:
    """Spoil a component's files."""
    weights = next((folder / part).glob("*.safetensors"), None)
    if weights is None:
        for path in (folder / part).glob("*"):
            path.unlink()
        return
    tensors = load_file(weights)
    name = max(tensors, key=lambda name: tensors[name].numel())
    if how == "lacks":
        del tensors[name]
    elif how == "differs":
        tensors[name] = tensors[name][:1].clone()
    if how == "short":
        weights.write_bytes(weights.read_bytes()[:-8])
    elif how == "gone":
        weights.unlink()
    else:
        save_file(tensors, weights, {"format": "pt"})


@pytest.mark.parametrize("how", ["lacks", "differs", "short", "gone"])
@pytest.mark.parametrize("part", PARTS)
def test_each_component_is_checked_by_itself(part, how, sdxl_folder, tmp_path):
    """Without reading weights: a file of one component says nothing of the others."""
    model = Path(shutil.copytree(sdxl_folder, tmp_path / "model"))
    spoilt(model, part, how)
    found = check_components(str(model))
    assert list(found) == PARTS
    assert [name for name, problem in found.items() if problem] == [part]


def test_a_whole_model_is_checked_without_reading_a_weight(sd1_folder, tmp_path, monkeypatch):
    file = tmp_path / "model.safetensors"
    export_checkpoint(str(sd1_folder), [], file)
    monkeypatch.setattr(
        "dora_diffusion.formats.files.stream.TensorReader.__getitem__",
        lambda *_: pytest.fail("a weight is read"),
    )
    for model in (sd1_folder, BaseModel(file, model_config=str(sd1_folder))):
        assert set(check_components(model).values()) == {""}
