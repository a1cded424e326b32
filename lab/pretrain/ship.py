"""Installation of a finished model into the package, with a card of measured figures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dora_diffusion.models.embedded import model_folder
from dora_diffusion.toy.instrument import FOLDER, Instrument, load_instrument
from lab.pretrain import corpus
from lab.pretrain.card import (
    GUIDANCE,
    STEPS,
    generate,
    measure_prompts,
    measure_vae,
    prompt_of,
    random_wishes,
    write_grid,
)
from lab.pretrain.conditioning import WIDE, measure_conditioning
from lab.pretrain.diffusion import load_average
from lab.pretrain.sd import TextToImage, export_sd
from lab.pretrain.sdxl import TextToImageXL, export_sdxl
from lab.pretrain.start import facts_before, goes_on
from lab.pretrain.views import SIDE

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

PROMPTS = 300
CONDITIONED = 20


def ship_sd(work: Path, machine: str) -> None:
    """Write judges and tiny-sd into the package.

    Works from the last saved states, so an unfinished training can be shipped too.
    """
    folder = model_folder("tiny-sd")
    if (work / "instrument").is_dir():
        shutil.copytree(work / "instrument", FOLDER, dirs_exist_ok=True)
    export_sd(load_average(TextToImage(_tokenizer(work)), work), work, folder)
    _save(folder / "training.json", training_facts(work, machine))


def ship_sdxl(work: Path, machine: str) -> None:
    """Write tiny-sdxl into the package."""
    folder = model_folder("tiny-sdxl")
    export_sdxl(load_average(TextToImageXL(_tokenizer(work)), work), work, folder)
    _save(folder / "training.json", training_facts(work, machine))


def write_sd_card() -> dict[str, Any]:
    """Measure the tiny-sd of the package, and write its card, grid and figures."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(model_folder("tiny-sd"))
    return _write_card("tiny-sd", pipeline, {}, {}, grid=50)


def write_sdxl_card() -> dict[str, Any]:
    """Measure the tiny-sdxl of the package, and write its card, grid and figures."""
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(model_folder("tiny-sdxl"))
    conditioning = measure_conditioning(pipeline, CONDITIONED)
    rows = [f"| {name} | {seen:.2f} | {true:.2f} |" for name, (seen, true) in conditioning.items()]
    facts = {
        "side": SIDE,
        "images": corpus.SDXL.count,
        "wide": WIDE,
        "conditioned": CONDITIONED,
        "conditioning_rows": "\n".join(rows),
        "text_2": _parameters(pipeline.text_encoder_2),
    }
    return _write_card("tiny-sdxl", pipeline, facts, {"conditioning": conditioning}, grid=40)


def _write_card(
    name: str, pipeline: Any, facts: dict[str, Any], more: dict[str, Any], grid: int
) -> dict[str, Any]:
    folder, instrument = model_folder(name), load_instrument()
    measured = {
        **measure_prompts(pipeline, instrument, PROMPTS),
        **measure_vae(pipeline.vae, instrument),
    }
    images = generate(pipeline, [prompt_of(wish) for wish in random_wishes(grid)])
    write_grid(images, folder / "samples.jpg")
    template = (Path(__file__).parent / "cards" / f"{name}.md").read_text(encoding="utf-8")
    training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    shared = _shared_facts(folder, pipeline, instrument, measured)
    (folder / "README.md").write_text(
        template.format(**shared, **facts, **training), encoding="utf-8"
    )
    rounded = {key: round(value, 4) for key, value in measured.items()} | more
    _save(folder / "measured.json", rounded)
    return rounded


def _save(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _shared_facts(
    folder: Path, pipeline: Any, instrument: Instrument, measured: dict[str, float]
) -> dict[str, Any]:
    rows = "\n".join(
        f"| {name} | {measured[name]:.3f} | {instrument.measured[name]:.3f} |"
        for name in ("kind", "color", "pattern", "background", "all")
    )
    bytes_there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return {
        "megabytes": bytes_there / 1e6,
        "unet": _parameters(pipeline.unet),
        "vae": _parameters(pipeline.vae),
        "text": _parameters(pipeline.text_encoder),
        "text_width": pipeline.text_encoder.config.hidden_size,
        "vocabulary": len(pipeline.tokenizer),
        "prompts": PROMPTS,
        "steps": STEPS,
        "guidance": GUIDANCE,
        "accuracy_rows": rows,
        "other_subject": instrument.measured["other_subject"],
        **{key: measured[key] for key in ("psnr", "identity", "identity_ceiling")},
    }


def _tokenizer(work: Path) -> CLIPTokenizer:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(work / "tokenizer")


def _parameters(module: torch.nn.Module) -> float:
    return sum(p.numel() for p in module.parameters()) / 1e6


def training_facts(work: Path, machine: str) -> dict[str, Any]:
    """Machines, minutes and steps of all trainings, also of the model that it continued from."""
    facts = (
        json.loads(facts_before(work).read_text(encoding="utf-8"))
        if goes_on(work)
        else {"machine": machine}
    )
    if machine not in facts["machine"]:
        facts["machine"] += f" and {machine}"
    for name in ("vae", "diffusion"):
        if not (work / f"{name}.pt").is_file():
            continue
        state = torch.load(work / f"{name}.pt", weights_only=True)
        for what, spent in (("minutes", state["seconds"] / 60), ("steps", state["step"])):
            facts[f"{name}_{what}"] = round(facts.get(f"{name}_{what}", 0) + spent, 1)
    return facts
