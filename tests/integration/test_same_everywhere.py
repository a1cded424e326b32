"""The result is the same everywhere: one adapter, trained on photos, in every program.

The image of the output folder in our own sampler is the reference. Diffusers' pipeline with the
folder as a LoRA, the merged folder, the merged single file and the converted files must give it.
Latents are compared before the VAE, because images hide differences below 1/255.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dora_diffusion import export_checkpoint, generate_images, load_components, train
from dora_diffusion.config import TrainConfig
from dora_diffusion.export import convert_adapter
from dora_diffusion.formats.adapter.file import read_adapter
from dora_diffusion.formats.checkpoint.models import PipelineFolder
from dora_diffusion.models.components import Components
from dora_diffusion.sampling.load import load_adapted
from dora_diffusion.sampling.settings import SamplingSettings

ADAPTER = "pytorch_lora_weights.safetensors"
SUBJECTS = {
    "sd1": ("bolt_mug", "mug"),
    "sd2": ("ring_robot", "toy"),
    "sdxl": ("heart_teapot", "teapot"),
}
# What gets no gradient: queries and keys of self-attention at 1 x 1, where there is one place to
# look at; and the last layer of SDXL's first text encoder, whose penultimate layer is read.
_ONE_PLACE = r"unet\.mid_block\..*attn1\.to_[qk]"
NO_GRADIENT = {
    "sd1": re.compile(_ONE_PLACE),
    "sd2": re.compile(_ONE_PLACE),
    "sdxl": re.compile(r"text_encoder\.text_model\.encoder\.layers\.2\..*"),
}
TRAIN_STEPS, ALPHA = 4, 6.0
SIZE, STEPS, GUIDANCE, SEED = 64, 4, 5.0, 11
# Relative to the largest latent. The same sums in another order: float32 gives about 1e-6.
ROUNDING = 1e-4


@dataclass(frozen=True)
class Run:
    """A finished training run with its latents, and those of its base."""

    family: str
    base: Path
    output: Path
    prompt: str
    latents: torch.Tensor
    base_latents: torch.Tensor

    @property
    def adapter(self) -> Path:
        """The adapter file."""
        return self.output / ADAPTER


def sample_latents(pipeline: Any, prompt: str) -> torch.Tensor:
    """The latents ``(1, 4, 8, 8)`` that any text-to-image pipeline ends with."""
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        latents: torch.Tensor = pipeline(
            prompt,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            width=SIZE,
            height=SIZE,
            generator=torch.Generator().manual_seed(SEED),
            output_type="latent",
        ).images
    return latents


def our_latents(components: Components, prompt: str) -> torch.Tensor:
    return sample_latents(components.pipeline(), prompt)


def images(components: Components, prompt: str) -> np.ndarray:
    settings = SamplingSettings(steps=STEPS, guidance_scale=GUIDANCE, width=SIZE, height=SIZE)
    return np.asarray(generate_images(components, prompt, [SEED], settings)[0], dtype=np.int16)


def difference(latents: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest difference, relative to the largest value of the reference."""
    return float((latents - reference).abs().max() / reference.abs().max())


@pytest.fixture(scope="session")
def runs(
    shallow: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory, samples_root: Path
) -> Callable[[str], Run]:
    """Trains UNet and text encoders of a family on one subject, once."""
    return functools.cache(
        lambda family: run_of(
            family, shallow(family), samples_root, tmp_path_factory.mktemp(family)
        )
    )


@pytest.fixture(params=["sd1", pytest.param("sd2", marks=pytest.mark.slow), "sdxl"])
def run(request: pytest.FixtureRequest, runs: Callable[[str], Run]) -> Run:
    return runs(request.param)


def run_of(family: str, base: Path, samples_root: Path, folder: Path) -> Run:
    """Train with prior preservation, and sample."""
    subject, class_word = SUBJECTS[family]
    prompt = f"a photo of a sks {class_word}"
    result = train(
        TrainConfig(
            pretrained_model_name_or_path=str(base),
            instance_data_dir=str(samples_root / subject),
            instance_prompt=prompt,
            resolution=SIZE,
            center_crop=True,
            train_text_encoder=True,
            with_prior_preservation=True,
            prior_preservation_mode="images",
            num_class_images=2,
            max_train_steps=TRAIN_STEPS,
            rank=4,
            lora_alpha=ALPHA,
            conv_rank=3,
            # High, so that the adapter moves clearly in a few steps.
            learning_rate=2e-2,
            text_encoder_lr=2e-2,
            num_validation_images=0,
            validation_inference_steps=2,
            checkpointing_steps=TRAIN_STEPS,
            output_dir=str(folder / "output"),
        )
    )
    assert result.adapter == folder / "output" / ADAPTER
    adapted, _ = load_adapted(base, result.output_dir)
    return Run(
        family,
        base,
        result.output_dir,
        prompt,
        our_latents(adapted, prompt),
        our_latents(load_components(base), prompt),
    )


def diffusers_pipeline(folder: Path) -> Any:
    from diffusers import AutoPipelineForText2Image

    return AutoPipelineForText2Image.from_pretrained(folder, local_files_only=True)


def single_file_pipeline(file: Path, config: Path, family: str) -> Any:
    import diffusers

    name = "StableDiffusionXLPipeline" if family == "sdxl" else "StableDiffusionPipeline"
    return getattr(diffusers, name).from_single_file(
        str(file), config=str(config), local_files_only=True
    )


def test_the_adapter_has_moved_everywhere(run: Run) -> None:
    """The other tests prove nothing with an adapter that does nothing."""
    layers = read_adapter(run.adapter).layers
    parts = {name.split(".")[0] for name in layers}
    encoders = {"text_encoder"} | ({"text_encoder_2"} if run.family == "sdxl" else set())
    assert parts == {"unet"} | encoders
    assert {layer.down.ndim for layer in layers.values()} == {2, 4}
    still = {name for name, layer in layers.items() if layer.up.abs().max() < 1e-3}
    assert {name for name in still if not NO_GRADIENT[run.family].fullmatch(name)} == set()
    assert len(still) < len(layers) / 10
    assert difference(run.latents, run.base_latents) > 0.05


def test_the_file_holds_what_was_trained(run: Run) -> None:
    """The live parameters, as the last checkpoint kept them, against the file, in float64."""
    state = run.output / f"checkpoint-{TRAIN_STEPS}" / "training_state.pt"
    live = torch.load(state, weights_only=True)["parameters"]
    layers = read_adapter(run.adapter).layers
    assert len(live) == 3 * len(layers)
    for name, layer in layers.items():
        key = name if f"{name}.default.down" in live else name.replace(".text_model.", ".")
        down, up = (live[f"{key}.default.{part}"].double().flatten(1) for part in ("down", "up"))
        # Convolutions have alpha = rank.
        trained = up @ down * (ALPHA / len(down) if layer.down.ndim == 2 else 1.0)
        filed = layer.scale * (layer.up.double().flatten(1) @ layer.down.double().flatten(1))
        torch.testing.assert_close(filed, trained, rtol=1e-6, atol=1e-8)
        assert layer.magnitude is not None
        assert torch.equal(layer.magnitude, live[f"{key}.default.magnitude"].flatten())


def test_diffusers_loads_the_output_folder_as_it_is(run: Run) -> None:
    pipeline = diffusers_pipeline(run.base)
    assert difference(sample_latents(pipeline, run.prompt), run.base_latents) < ROUNDING
    pipeline.load_lora_weights(run.output, weight_name=ADAPTER)
    assert difference(sample_latents(pipeline, run.prompt), run.latents) < ROUNDING
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    assert difference(sample_latents(pipeline, run.prompt), run.latents) < ROUNDING


def test_the_merged_folder_gives_the_image(run: Run, tmp_path: Path) -> None:
    merged = export_checkpoint(run.base, run.output, tmp_path / "merged")
    latents = sample_latents(diffusers_pipeline(merged), run.prompt)
    assert difference(latents, run.latents) < ROUNDING
    adapted, _ = load_adapted(run.base, run.output)
    ours, reloaded = images(adapted, run.prompt), images(load_components(merged), run.prompt)
    # Latents that differ in their last bits may fall on either side of a step of 1 in 255.
    assert np.abs(ours - reloaded).max() <= 1
    assert np.abs(ours - images(load_components(run.base), run.prompt)).max() > 3


def test_the_merged_single_file_gives_the_image(run: Run, tmp_path: Path) -> None:
    file = export_checkpoint(run.base, run.output, tmp_path / "merged.safetensors")
    pipeline = single_file_pipeline(file, run.base, run.family)
    # Which sampler a single file asks for, it cannot say.
    own = diffusers_pipeline(run.base).scheduler
    pipeline.scheduler = type(own).from_config(own.config)
    assert difference(sample_latents(pipeline, run.prompt), run.latents) < ROUNDING


def each_with(values: tuple[Any, Any]) -> Any:
    """Families with one of two values by turns, and with the other one in the slow suite."""
    quick = [("sd1", values[0]), ("sdxl", values[1])]
    return pytest.mark.parametrize(
        ("run", "value"),
        [
            pytest.param(*pair, marks=[pytest.mark.slow] * (pair not in quick))
            for pair in product(SUBJECTS, values)
        ],
        indirect=["run"],
    )


@each_with(("kohya", "peft"))
def test_converted_files_give_the_image(run: Run, value: str, tmp_path: Path) -> None:
    output = tmp_path / ("adapter.safetensors" if value == "kohya" else "adapter")
    report = convert_adapter(run.output, output, value, base=run.base)
    adapted, _ = load_adapted(run.base, report.path)
    assert difference(our_latents(adapted, run.prompt), run.latents) < ROUNDING


@each_with((0.0, 0.5))
def test_strengths_mean_the_same_live_and_merged(run: Run, value: float, tmp_path: Path) -> None:
    live, _ = load_adapted(run.base, run.output, strength=value)
    latents = our_latents(live, run.prompt)
    merged = export_checkpoint(run.base, run.output, tmp_path / "merged", strength=value)
    assert difference(sample_latents(diffusers_pipeline(merged), run.prompt), latents) < ROUNDING
    if value == 0:
        assert torch.equal(latents, run.base_latents)
        with PipelineFolder.open(run.base) as one, PipelineFolder.open(merged) as other:
            assert all(torch.equal(one[name], other[name]) for name in one.specs)
    else:
        assert difference(latents, run.base_latents) > 0.01
        assert difference(latents, run.latents) > 0.01


def test_an_sdxl_that_encodes_the_empty_prompt_is_sampled_as_diffusers_does(
    sdxl_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(sdxl_folder, tmp_path / "sdxl"))
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    assert index["force_zeros_for_empty_prompt"] is True
    index["force_zeros_for_empty_prompt"] = False
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    prompt = "a photo of a dog"
    expected = sample_latents(diffusers_pipeline(folder), prompt)
    assert difference(our_latents(load_components(folder), prompt), expected) < ROUNDING
    zeros = our_latents(load_components(sdxl_folder), prompt)
    assert difference(zeros, expected) > 100 * ROUNDING


def test_the_run_leaves_no_local_path_behind(run: Run, samples_root: Path) -> None:
    """Shared files (the adapter and its card) do not name this computer's folders."""
    for private in (str(run.output.parent), str(run.base), str(samples_root)):
        assert private.encode() not in run.adapter.read_bytes()
        assert private not in (run.output / "README.md").read_text(encoding="utf-8")
