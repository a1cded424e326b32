"""Training of Z-Image: its loss against Diffusers' example, and runs on a tiny random model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline
from PIL import Image
from torch import Tensor

from dora_diffusion.adapters.state import LiveWeights, adapter_state, load_adapter_state
from dora_diffusion.config import TrainConfig
from dora_diffusion.config.subject_list import subject_configs
from dora_diffusion.data.sampler import generator_for
from dora_diffusion.evaluation.denoising import HeldOutImages
from dora_diffusion.formats.adapter.file import read_adapter
from dora_diffusion.models.load import load_components
from dora_diffusion.models.text import encode_prompts
from dora_diffusion.numerics.loss import sample_noise
from dora_diffusion.training.batch import Batch, ModelInputs
from dora_diffusion.training.inputs.plan import plan_run
from dora_diffusion.training.pack import train_pack
from dora_diffusion.training.prediction import answer
from dora_diffusion.training.processes import make_accelerator
from dora_diffusion.training.recipe import assemble, train
from dora_diffusion.training.run import Run
from tests.apple import AppleGPU
from tests.training.helpers import assert_same_adapter, losses, moved, open_run
from tests.z_image import write_z_image

CAPTIONS = ("sks mug", "a photo of a sks mug on a blue table, seen from above", "a sks mug, red")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[float, Path]:
    """Models by the shift of their schedule."""
    root = tmp_path_factory.mktemp("z")
    return {shift: write_z_image(root / f"{shift}", shift=shift) for shift in (1.0, 6.0)}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three photos of different shapes, with captions of different lengths and masks."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(1)
    for number, caption in enumerate(CAPTIONS):
        size = (96 - 8 * number, 80 + 16 * number)
        pixels = generator.integers(0, 255, (12, 12, 3), np.uint8)
        Image.fromarray(pixels).resize(size).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption, encoding="utf-8")
        mask = np.tile(np.linspace(0, 255, size[0]).astype(np.uint8), (size[1], 1))
        Image.fromarray(mask).save(folder / f"{number}.mask.png")
    return folder


@pytest.fixture
def config(folders: dict[float, Path], photos: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Settings of a four-step run, with changes."""

    def make(output: str, **changes: Any) -> TrainConfig:
        values: dict[str, Any] = {
            "pretrained_model_name_or_path": str(folders[6.0]), "instance_data_dir": str(photos),
            "instance_prompt": "a photo of a sks mug", "output_dir": str(tmp_path / output),
            "resolution": 64, "rank": 4, "max_train_steps": 4, "learning_rate": 1e-3, "seed": 3,
            "num_validation_images": 0, "validation_inference_steps": 2, "checkpointing_steps": 0,
            "mixed_precision": "no", "targets": ["attention+ff"],
        }  # fmt: skip
        return TrainConfig(**{**values, **changes})

    return make


class Reference:
    """Diffusers' pipeline, with the dense weights of a run's adapters or without."""

    def __init__(self, folder: Path, run: Run | None = None) -> None:
        self.pipeline = ZImagePipeline.from_pretrained(folder, local_files_only=True)
        for name, adapter in adapter_state(run.weights.modules).items() if run else ():
            layer = self.pipeline.transformer.get_submodule(name.removeprefix("transformer."))
            change = adapter.up.double() @ adapter.down.double()
            weight = layer.weight.double() + adapter.alpha / adapter.rank * change
            assert adapter.magnitude is not None
            weight = adapter.magnitude.double()[:, None] * weight / weight.norm(dim=1)[:, None]
            layer.weight.data = weight.float()

    @torch.no_grad()
    def predicted(self, batch: Batch, captions: tuple[str, ...]) -> Tensor:
        """Velocities as in Diffusers' `train_dreambooth_lora_z_image.py`."""
        pipeline, scheduler = self.pipeline, self.pipeline.scheduler
        indices = 999 - batch.inputs.timesteps  # They count down from pure noise.
        timesteps, sigmas = scheduler.timesteps[indices], scheduler.sigmas[indices]
        sigmas = sigmas.view(-1, 1, 1, 1)
        noisy = (1.0 - sigmas) * batch.latents + sigmas * batch.noise
        prompts, _ = pipeline.encode_prompt(list(captions), do_classifier_free_guidance=False)
        arguments = list(noisy.unsqueeze(2)), (1000 - timesteps) / 1000, prompts
        return -torch.stack(pipeline.transformer(*arguments, return_dict=False)[0]).squeeze(2)

    def losses(self, batch: Batch) -> Tensor:
        error = self.predicted(batch, batch.captions) - (batch.noise - batch.latents)
        return error.square().flatten(1).mean(1)


def losses_of(run: Run) -> tuple[Batch, Tensor, Tensor, list[Tensor]]:
    """A batch with its loss, its prior and the losses of each term's rows."""
    step = run.step
    drawn, rows = step.questions(next(step.batches)), list[Tensor]()
    with step.stack.scope(), step.stack.of(0), torch.no_grad():
        answers = answer(run.components, drawn.distinct(), partial(step.base, step.stack))
        for term, questions in zip(step.terms, drawn.questions, strict=True):
            found = term.losses(drawn.batch, *(answers[question] for question in questions))
            rows += [tensor for tensor in found if tensor is not None]
        return drawn.batch, *step.losses(drawn, answers), rows


@pytest.mark.parametrize("shift", [1.0, 6.0])
def test_a_rows_loss_is_that_of_diffusers_example(
    shift: float, folders: dict[float, Path], photos: Path, tmp_path: Path
) -> None:
    settings = {"train_batch_size": 3, "targets": ["attention+ff"], "center_crop": True}
    run = open_run(folders[shift], photos, tmp_path / "out", **settings)
    batch, loss, _, (rows,) = losses_of(run)
    assert len({len(caption) for caption in batch.captions}) == 3
    wanted = Reference(folders[shift], run).losses(batch)
    base = Reference(folders[shift]).losses(batch)
    torch.testing.assert_close(rows, wanted, rtol=1e-6, atol=1e-6)
    assert float((wanted - base).abs().max()) > 1e-2, "the adapter counts"
    assert float(loss) == pytest.approx(float(wanted.mean()), abs=1e-6)


def test_priors_and_masks_are_those_of_the_formulas(
    folders: dict[float, Path], photos: Path, tmp_path: Path
) -> None:
    settings = {
        "train_batch_size": 3, "with_prior_preservation": True, "masked_loss": True,
        "unmasked_prior": 0.7, "prior_loss_weight": 0.3, "snr_gamma": 5.0, "class_word": "mug",
    }  # fmt: skip
    run = open_run(folders[6.0], photos, tmp_path / "out", targets=["attention"], **settings)
    batch, loss, prior, _ = losses_of(run)
    trained, base = Reference(folders[6.0], run), Reference(folders[6.0])
    sigmas = trained.pipeline.scheduler.sigmas[999 - batch.inputs.timesteps]
    weight = torch.minimum((1 - sigmas).square(), 5 * sigmas.square())
    predicted, mask = trained.predicted(batch, batch.captions), batch.mask
    assert mask is not None

    def mean(error: Tensor, where: Tensor) -> Tensor:
        where = where.expand_as(error)
        return (error.square() * where).flatten(1).sum(1) / where.flatten(1).sum(1)

    subject = weight * mean(predicted - (batch.noise - batch.latents), mask)
    subject += 0.7 * weight * mean(predicted - base.predicted(batch, batch.captions), 1 - mask)
    names = tuple(batch.class_captions.values())
    error = trained.predicted(batch, names) - base.predicted(batch, names)
    held = (weight * error.square().flatten(1).mean(1)).mean()
    assert float(prior) == pytest.approx(float(held), abs=1e-6)
    assert float(loss) == pytest.approx(float(subject.mean() + 0.3 * held), abs=2e-6)


def test_a_sliders_loss_is_that_of_the_formula(folders: dict[float, Path], tmp_path: Path) -> None:
    prompts = {"target": ["a mug"], "positive": ["a red mug"], "negative": ["a dog on a table"]}
    config = TrainConfig(
        teach="slider", pretrained_model_name_or_path=str(folders[6.0]), resolution=64, rank=2,
        output_dir=str(tmp_path / "out"), num_class_images=3, validation_inference_steps=1,
        slider_guidance=1.7, mixed_precision="no", targets=["attention"], method="dora", **prompts,
    )  # fmt: skip
    run = moved(assemble(plan_run(config), make_accelerator(config)))
    batch, loss, _, _ = losses_of(run)
    trained, base = Reference(folders[6.0], run), Reference(folders[6.0])
    target, high, low = (base.predicted(batch, tuple(texts)) for texts in prompts.values())
    error = trained.predicted(batch, ("a mug",)) - (target + 1.7 * (high - low))
    assert float(loss) == pytest.approx(float(error.square().mean()), abs=1e-6)


def test_a_resumed_run_is_that_without_a_break(config: Callable[..., TrainConfig]) -> None:
    """With dropout, an average, dropped captions, and photos of two sizes."""
    settings = {
        "lora_dropout": 0.2, "ema_decay": 0.5, "caption_dropout": 0.3, "train_batch_size": 2,
        "aspect_ratio_buckets": True, "min_bucket_reso": 48, "bucket_reso_steps": 16,
        "targets": ["full"], "checkpointing_steps": 2,
    }  # fmt: skip
    whole, half = config("whole", **settings), config("half", **settings)
    train(whole)
    shutil.copytree(whole.output_dir, half.output_dir, ignore=shutil.ignore_patterns("*-4"))
    train(replace(half, resume_from_checkpoint="latest"))
    folders = [Path(each.output_dir) for each in (whole, half)]
    assert_same_adapter(*folders)
    assert losses(folders[0]) == losses(folders[1])


def test_gradient_checkpointing_changes_no_bit(config: Callable[..., TrainConfig]) -> None:
    outputs = []
    for is_on in (False, True):
        made = config(
            f"{is_on}", gradient_checkpointing=is_on, train_batch_size=3, lora_dropout=0.2
        )
        train(made)
        outputs.append(Path(made.output_dir))
    assert losses(outputs[0]) == losses(outputs[1])
    assert_same_adapter(*outputs)


def test_a_pack_of_two_is_each_alone(
    config: Callable[..., TrainConfig], photos: Path, tmp_path: Path
) -> None:
    """Of other ranks, with captions of other lengths, whose padding is masked."""
    entries: list[dict[str, Any]] = [
        {"name": "one", "instance_data_dir": str(photos), "seed": 1},
        {"name": "other", "instance_data_dir": str(tmp_path / "other"), "rank": 2,
         "instance_prompt": "a very long caption of the same sks teapot with a red heart on it"},
    ]  # fmt: skip
    other = Path(entries[1]["instance_data_dir"])
    shutil.copytree(photos, other, ignore=shutil.ignore_patterns("*.txt"))
    configs = subject_configs(entries, config("pack", instance_data_dir=None))
    assert train_pack(configs).failures == {}
    for name, packed in configs.items():
        train(replace(packed, output_dir=str(tmp_path / "alone" / name)))
        alone = Path(tmp_path / "alone" / name)
        assert_same_adapter(Path(packed.output_dir), alone, atol=2e-5)
        assert losses(Path(packed.output_dir)) == pytest.approx(losses(alone), abs=1e-5)
        assert max(map(max_change, read_adapter(alone).layers.values())) > 1e-3


def max_change(layer: Any) -> float:
    return float(layer.up.abs().max())


def effect_of(folder: Path, adapter: Path | None, captions: list[str]) -> Tensor:
    """Predictions at fixed inputs, which are even in noise."""
    components = load_components(folder)
    if adapter is not None:
        layers = read_adapter(adapter, LiveWeights(components.adaptable())).layers
        load_adapter_state(components.adaptable(), layers)
    noise = torch.randn(3, 4, 8, 8, generator=generator_for("effect", (3, 4, 8, 8)))
    timesteps = torch.tensor([62, 250, 624])  # With the shift of 3, 1/6, 1/2 and 5/6 of noise.
    with torch.no_grad():
        return components.predict(noise, timesteps, encode_prompts(components, captions))


VARIANTS: dict[str, dict[str, Any]] = {
    "full": {"targets": ["full"], "train_batch_size": 2},
    "lora": {"method": "lora"},
    "pissa": {"init": "pissa"},
    "vera": {"parametrization": "vera", "vera_rank": 8, "learning_rate": 0.1, "rank": 8},
    "adalora": {"parametrization": "adalora", "rank": 6, "allocation_warmup": 0},
    "bf16": {"mixed_precision": "bf16"},
    "int8": {"quantize": "int8"},
    "nf4": {"quantize": "nf4"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_file_of_each_variant_changes_the_predictions_of_its_base(
    name: str, config: Callable[..., TrainConfig]
) -> None:
    made = config(name, **{"learning_rate": 1e-2, **VARIANTS[name]})
    result = train(made)
    base = Path(made.pretrained_model_name_or_path)
    captions = sorted(CAPTIONS)
    before, after = (effect_of(base, file, captions) for file in (None, result.adapter))
    assert float((after - before).norm() / before.norm()) > 1e-3
    layers = read_adapter(result.adapter).layers
    assert not any("embedder" in key for key in layers if "t_embedder" not in key)


def test_an_offloaded_run_is_that_on_the_device(
    gpu: AppleGPU, config: Callable[..., TrainConfig]
) -> None:
    """With class images and samples, for which modules come and go."""
    settings = {
        "with_prior_preservation": True, "prior_preservation_mode": "images",
        "num_class_images": 1, "num_validation_images": 1, "validation_prompt": ["a sks mug"],
        "validation_steps": 1, "validation_inference_steps": 1, "max_train_steps": 2,
        "targets": ["attention"],
    }  # fmt: skip
    runs = [config(choice, offload=choice, **settings) for choice in ("none", "model")]
    for run in runs:
        train(run)
    outputs = [Path(run.output_dir) for run in runs]
    assert losses(outputs[0]) == losses(outputs[1])
    assert_same_adapter(*outputs)


def test_full_fine_tuning_writes_the_model(config: Callable[..., TrainConfig]) -> None:
    made = config("full", method="full", learning_rate=1e-3, max_train_steps=2)
    result = train(made)
    assert result.adapter is None
    trained = ZImagePipeline.from_pretrained(Path(made.output_dir) / "model", local_files_only=True)
    base = ZImagePipeline.from_pretrained(made.pretrained_model_name_or_path, local_files_only=True)
    before, after = (dict(p.transformer.named_parameters()) for p in (base, trained))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(before), "all weights train"
    for name, weight in base.text_encoder.state_dict().items():
        assert torch.equal(weight, trained.text_encoder.state_dict()[name])


def test_layers_without_rows_are_refused_in_a_pack(
    config: Callable[..., TrainConfig], photos: Path
) -> None:
    entries = [{"name": "one", "instance_data_dir": str(photos)}]
    shared = config("pack", targets=["*_embedder.*"], instance_data_dir=None)
    [error] = train_pack(subject_configs(entries, shared)).failures.values()
    assert "all_x_embedder.2-1, cap_embedder.1 cannot be trained in a pack" in str(error)


def test_a_validation_loss_is_even_in_noise(folders: dict[float, Path]) -> None:
    components, reference = load_components(folders[6.0]), Reference(folders[6.0])
    image = Image.fromarray(np.random.default_rng(2).integers(0, 255, (64, 64, 3), np.uint8))
    ((found,),) = HeldOutImages(components, [image], [CAPTIONS[1]]).losses_by_seed([5])
    pixels = torch.from_numpy(np.asarray(image)).permute(2, 0, 1)[None] / 127.5 - 1
    vae = reference.pipeline.vae
    with torch.no_grad():
        mode = vae.encode(pixels).latent_dist.mode()
    latents = (mode - vae.config.shift_factor) * vae.config.scaling_factor
    sigmas, expected = reference.pipeline.scheduler.sigmas, []
    for share in np.arange(0.05, 1, 0.1):
        timestep = int((sigmas <= share + 1e-6).sum())  # The first with more noise.
        noise = sample_noise((4, 8, 8), generator_for("held out", 5, timestep))[None]
        inputs = ModelInputs(latents, torch.tensor([timestep]))
        batch = Batch(inputs, latents, noise, (CAPTIONS[1],), photos=1)
        expected += reference.losses(batch).tolist()
    assert found == pytest.approx(sum(expected) / 10, abs=1e-5)
