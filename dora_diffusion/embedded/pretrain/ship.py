"""Putting the finished model and its judges into the package, with a card of measured figures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from dora_diffusion.embedded import instrument_folder, model_folder
from dora_diffusion.embedded.instrument import load_instrument
from dora_diffusion.embedded.pretrain.card import (
    GUIDANCE,
    STEPS,
    generate,
    measure_prompts,
    measure_vae,
    prompt_of,
    random_wishes,
    write_grid,
)
from dora_diffusion.embedded.pretrain.diffusion import export_pipeline, trained_model

CARD = """# tiny-sd

A Stable Diffusion model small enough to train on two CPU cores and to ship inside a package:
`UNet2DConditionModel` with cross-attention, `AutoencoderKL`, `CLIPTextModel` and `CLIPTokenizer`
of diffusers and transformers, saved as an ordinary pipeline folder in float16 ({megabytes:.1f} MB).
It makes 64x64 pictures of a toy world: twelve kinds of object, ten colours, four patterns, ten
places.

    from diffusers import StableDiffusionPipeline
    from dora_diffusion.embedded import model_folder

    pipeline = StableDiffusionPipeline.from_pretrained(model_folder("tiny-sd"))
    prompt = "a photo of a red striped mug on the grass"
    image = pipeline(prompt, guidance_scale={guidance}).images[0]

![Fifty prompts, first seed, not chosen](samples.jpg)

## What it is for

Trying and testing personalization, export and sampling end to end without a download or a GPU. It
knows nothing of the real world, and a result on it says little about a result on Stable Diffusion.

## Parts

| part | parameters | facts |
|---|---|---|
| UNet | {unet:.2f} M | widths 64, 96, 128; cross-attention at 8x8 and 4x4; predicts v |
| autoencoder | {vae:.2f} M | 64x64 to 16x16 with 8 latent channels |
| text encoder | {text:.2f} M | 2 layers of width {text_width}; 32 tokens of {vocabulary} |

## Measured

Pictures for {prompts} random prompts naming class, colour, pattern and place, DDIM with {steps}
steps, guidance {guidance}; judged by a classifier trained on renders, whose own accuracy on
held-out renders is in the last column:

| | generated | real renders |
|---|---|---|
{accuracy_rows}

Autoencoder round trip of 200 new subjects with random colours and emblems, a third of them of
classes that no training showed: **{psnr:.1f} dB**. Cosine of the round trip to another picture of
the same subject in a contrastive subject embedder: **{identity:.3f}**; without the round trip
{identity_ceiling:.3f}; between different subjects {other_subject:.3f}.

## Training

96,000 rendered pictures with four captions each; the autoencoder saw 24,000 nonsense shapes too.
Two single-thread processes on 2 cores of an AMD EPYC: autoencoder {vae_minutes:.0f} minutes
({vae_steps:,} steps of 64 crops or 32 pictures), diffusion {diffusion_minutes:.0f} minutes
({diffusion_steps:,} steps of 64 pictures; velocity loss, weighted to signal-to-noise ratios of
0.5 to 11; min-SNR weights of gamma 5 in its first fifth).

    W=pretraining
    python -m dora_diffusion.embedded.pretrain data --work $W
    python -m dora_diffusion.embedded.pretrain instrument --work $W --minutes 8
    python -m dora_diffusion.embedded.pretrain vae --work $W --minutes {vae_minutes:.0f}
    python -m dora_diffusion.embedded.pretrain latents --work $W
    python -m dora_diffusion.embedded.pretrain diffusion --work $W --minutes {diffusion_minutes:.0f}
    python -m dora_diffusion.embedded.pretrain ship --work $W

Data and licence: everything was drawn by this package; Apache-2.0 like the rest of it.

## Limits

Small pictures, one object, a dozen words for things. Fine emblems and patterns at times come out
ragged; words outside the captions' vocabulary mean little. Weights depend on the machine's speed,
since training runs for minutes and not for steps.
"""


def _parameters(module: torch.nn.Module) -> float:
    return sum(p.numel() for p in module.parameters()) / 1e6


def _training_facts(work: Path, name: str) -> dict[str, float]:
    state = torch.load(work / f"{name}.pt", weights_only=True)
    return {f"{name}_minutes": state["seconds"] / 60, f"{name}_steps": state["step"]}


def ship(work: Path, prompts: int = 300) -> dict[str, float]:
    """Write judges and pipeline into the package, measure them there and write the card.

    Works from the last saved states, so an unfinished training can be shipped too.
    """
    from diffusers import StableDiffusionPipeline

    folder = model_folder("tiny-sd")
    shutil.copytree(work / "instrument", instrument_folder(), dirs_exist_ok=True)
    export_pipeline(trained_model(work), work, folder)
    instrument = load_instrument()
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    measured = {
        **measure_prompts(pipeline, instrument, prompts),
        **measure_vae(pipeline.vae, instrument),
    }
    write_grid(
        generate(pipeline, [prompt_of(w) for w in random_wishes(50)]), folder / "samples.jpg"
    )
    rows = "\n".join(
        f"| {name} | {measured[name]:.3f} | {instrument.measured[name]:.3f} |"
        for name in ("kind", "color", "pattern", "background", "all")
    )
    facts = _training_facts(work, "vae") | _training_facts(work, "diffusion")
    weights = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    card = CARD.format(
        megabytes=weights / 1e6,
        unet=_parameters(pipeline.unet),
        vae=_parameters(pipeline.vae),
        text=_parameters(pipeline.text_encoder),
        text_width=pipeline.text_encoder.config.hidden_size,
        vocabulary=len(pipeline.tokenizer),
        prompts=prompts,
        steps=STEPS,
        guidance=GUIDANCE,
        accuracy_rows=rows,
        other_subject=instrument.measured["other_subject"],
        **facts,
        **{key: measured[key] for key in ("psnr", "identity", "identity_ceiling")},
    )
    (folder / "README.md").write_text(card)
    (folder / "measured.json").write_text(
        json.dumps({k: round(v, 4) for k, v in measured.items()}, indent=2) + "\n"
    )
    return measured
