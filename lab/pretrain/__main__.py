"""Command line of the pretraining: one command makes a model, and resumes where it was stopped."""

from __future__ import annotations

import argparse
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lab.pretrain.start import fill_from_package, goes_on, prepare_to_go_on

if TYPE_CHECKING:
    from transformers import CLIPTokenizer


def _tokenizer(work: Path) -> CLIPTokenizer:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(work / "tokenizer")


def _images(work: Path, minutes: float) -> None:
    from lab.pretrain.data import write_images

    write_images(work)


def _instrument(work: Path, minutes: float) -> None:
    from lab.pretrain.instrument import train_instrument

    train_instrument(work, minutes, work / "instrument")


def _vae(work: Path, minutes: float) -> None:
    from lab.pretrain.vae import train_vae

    train_vae(work, minutes)


def _sd_latents(work: Path, minutes: float) -> None:
    from lab.pretrain import corpus, latents
    from lab.pretrain.tokenizer import build_tokenizer

    if not goes_on(work):
        build_tokenizer(work / "tokenizer")
    latents.write_captions(work, _tokenizer(work), corpus.SD)
    latents.write_latents(work, corpus.SD, work / "vae")


def _sd_diffusion(work: Path, minutes: float) -> None:
    from lab.pretrain.diffusion import train_diffusion
    from lab.pretrain.sd import TextToImage, export_sd

    torch.manual_seed(3)
    model = TextToImage(_tokenizer(work))
    if goes_on(work):
        fill_from_package(model, "tiny-sd")
        train_diffusion(model, work, minutes, export_sd, 5e-4, knows_words=True)
    else:
        train_diffusion(model, work, minutes, export_sd, 1.2e-3)


def _sd_ship(work: Path, minutes: float) -> None:
    from lab.pretrain.ship import ship_sd

    ship_sd(work, machine())


def _sd_card(work: Path, minutes: float) -> None:
    from lab.pretrain.ship import write_sd_card

    print(write_sd_card())


def _epsilon_latents(work: Path, minutes: float) -> None:
    from lab.pretrain import corpus, latents

    latents.write_captions(work, _tokenizer(work), corpus.SD_EPSILON)
    latents.write_latents(work, corpus.SD_EPSILON, work / "vae")


def _epsilon_diffusion(work: Path, minutes: float) -> None:
    """Teach tiny-sd's UNet to predict the noise; all else stays, and nothing of it ships."""
    from lab.pretrain.diffusion import SCHEDULE, train_diffusion
    from lab.pretrain.sd import TextToImage, export_sd

    torch.manual_seed(3)
    model = TextToImage(_tokenizer(work))
    fill_from_package(model, "tiny-sd")
    model.text_encoder.requires_grad_(False)
    model.schedule = SCHEDULE | {"prediction_type": "epsilon"}
    train_diffusion(model, work, minutes, export_sd, 5e-4, knows_words=True)


def _epsilon_card(work: Path, minutes: float) -> None:
    from diffusers import StableDiffusionPipeline

    from dora_diffusion.toy.instrument import load_instrument
    from lab.pretrain.card import measure_prompts

    pipeline = StableDiffusionPipeline.from_pretrained(work / "pipeline")
    print(measure_prompts(pipeline, load_instrument(), 100))


def _sdxl_latents(work: Path, minutes: float) -> None:
    """Autoencoder and tokenizer are those of the tiny-sd that ships."""
    from dora_diffusion.models.embedded import model_folder
    from lab.pretrain import corpus, latents

    for part in ("vae", "tokenizer"):
        shutil.copytree(model_folder("tiny-sd") / part, work / part, dirs_exist_ok=True)
    latents.write_captions(work, _tokenizer(work), corpus.SDXL)
    latents.write_latents(work, corpus.SDXL, work / "vae")


def _sdxl_diffusion(work: Path, minutes: float) -> None:
    from lab.pretrain.diffusion import train_diffusion
    from lab.pretrain.grow import grow_from_sd
    from lab.pretrain.sdxl import TextToImageXL, export_sdxl
    from lab.pretrain.views import training_captions

    torch.manual_seed(3)
    model = TextToImageXL(_tokenizer(work))
    if goes_on(work):
        fill_from_package(model, "tiny-sdxl")
        train_diffusion(model, work, minutes, export_sdxl, 3e-4, knows_words=True)
    else:
        grow_from_sd(model, [text for index in range(500) for text in training_captions(index, 1)])
        train_diffusion(model, work, minutes, export_sdxl, 8e-4)


def _sdxl_ship(work: Path, minutes: float) -> None:
    from lab.pretrain.ship import ship_sdxl

    ship_sdxl(work, machine())


def _sdxl_card(work: Path, minutes: float) -> None:
    from lab.pretrain.ship import write_sdxl_card

    print(write_sdxl_card())


def _flow_data(work: Path, minutes: float) -> None:
    """Autoencoder is that of the tiny-sd that ships; the tokenizer is of Qwen's class."""
    from dora_diffusion.models.embedded import model_folder
    from lab.pretrain import corpus, flow, language, latents

    shutil.copytree(model_folder("tiny-sd") / "vae", work / "vae", dirs_exist_ok=True)
    tokenizer = language.build_language_tokenizer(work / "tokenizer")
    latents.write_captions(work, tokenizer, corpus.FLOW, language.read)
    latents.write_latents(work, corpus.FLOW, work / "vae")
    flow.write_maps(work, corpus.FLOW)


def _flow_reader(work: Path) -> tuple[Any, Any]:
    from transformers import Qwen2Tokenizer

    from lab.pretrain.language import Reader

    tokenizer = Qwen2Tokenizer.from_pretrained(work / "tokenizer")
    token_ids = torch.load(work / "captions.pt", weights_only=True)["token_ids"]
    return tokenizer, Reader(tokenizer, token_ids)


def _flow_language(work: Path, minutes: float) -> None:
    from lab.pretrain.language import train_language

    torch.manual_seed(3)
    _, reader = _flow_reader(work)
    torch.save(train_language(work, reader, minutes).state_dict(), work / "reader.pt")


def _flow_transformer(work: Path, minutes: float) -> None:
    from lab.pretrain.flow import TextToImageFlow, train_flow

    torch.manual_seed(3)
    tokenizer, reader = _flow_reader(work)
    reader.load_state_dict(torch.load(work / "reader.pt", weights_only=True))
    train_flow(TextToImageFlow(reader.eval(), tokenizer), work, minutes)


def _flow_card(work: Path, minutes: float) -> None:
    from diffusers import ZImagePipeline

    from dora_diffusion.toy.instrument import load_instrument
    from lab.pretrain.card import measure_prompts
    from lab.pretrain.data import SIZE

    # Diffusers counts guidance from 0 here.
    options = {"height": SIZE, "width": SIZE, "max_sequence_length": 32, "guidance_scale": 3.0}
    pipeline = ZImagePipeline.from_pretrained(work / "pipeline")
    print(measure_prompts(pipeline, load_instrument(), 200, **options))


@dataclass(frozen=True)
class Stage:
    """One step of a model's making.

    Attributes:
        name: on the command line.
        run: (work folder, minutes).
        share: of the time budget.
        kept: whether continuing from a shipped model keeps what this made.
    """

    name: str
    run: Callable[[Path, float], None]
    share: float = 0.0
    kept: bool = False


EPSILON = "tiny-sd-epsilon"
"""Twin of tiny-sd that predicts the noise, made of it for measurements; it does not ship."""

STAGES: dict[str, tuple[Stage, ...]] = {
    "tiny-sd": (
        Stage("images", _images),
        Stage("instrument", _instrument, 0.07, kept=True),
        Stage("vae", _vae, 0.23, kept=True),
        Stage("latents", _sd_latents),
        Stage("diffusion", _sd_diffusion, 0.7),
        Stage("ship", _sd_ship),
        Stage("card", _sd_card),
    ),
    EPSILON: (
        Stage("latents", _epsilon_latents),
        Stage("diffusion", _epsilon_diffusion, 1.0),
        Stage("card", _epsilon_card),
    ),
    "tiny-flow": (
        Stage("latents", _flow_data),
        Stage("language", _flow_language, 0.04),
        Stage("transformer", _flow_transformer, 0.96),
        Stage("card", _flow_card),
    ),
    "tiny-sdxl": (
        Stage("latents", _sdxl_latents),
        Stage("diffusion", _sdxl_diffusion, 1.0),
        Stage("ship", _sdxl_ship),
        Stage("card", _sdxl_card),
    ),
}


def machine() -> str:
    """The processor's name, for a card."""
    lines = (
        Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if Path("/proc/cpuinfo").exists()
        else []
    )
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"2 cores of {named[0] if named else platform.processor() or platform.machine()}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lab.pretrain",
        description="Make an embedded model, from its images to its card in the package.",
    )
    parser.add_argument("model", choices=STAGES)
    parser.add_argument("--work", type=Path, required=True, help="folder for data and states")
    parser.add_argument(
        "--minutes",
        type=float,
        default=120.0,
        help="budget of the trainings together, processor time of each of the two processes "
        "(default: %(default)s)",
    )
    names = dict.fromkeys(stage.name for stages in STAGES.values() for stage in stages)
    parser.add_argument("--stage", choices=names, help="only this one (default: all in turn)")
    parser.add_argument(
        "--from-shipped",
        action="store_true",
        help="continue from the diffusion model in the package, as tiny-sd-epsilon always does; "
        "the budget is all for that",
    )
    return parser


def main() -> None:
    """Run all stages of a model, or one."""
    parser = _parser()
    arguments = parser.parse_args()
    # Parallelism comes from processes; a forked torch that has used its own threads can hang.
    torch.set_num_threads(1)
    stages = STAGES[arguments.model]
    if arguments.stage not in (None, *(stage.name for stage in stages)):
        parser.error(f"{arguments.model} has no stage {arguments.stage}")
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.from_shipped or arguments.model == EPSILON:
        prepare_to_go_on(arguments.model.removesuffix("-epsilon"), arguments.work)
    if goes_on(arguments.work):
        stages = tuple(stage for stage in stages if not stage.kept)
    shares = sum(stage.share for stage in stages)
    for stage in stages:
        if arguments.stage in (None, stage.name):
            print(f"{arguments.model}: {stage.name}", flush=True)
            stage.run(arguments.work, stage.share / shares * arguments.minutes)


if __name__ == "__main__":
    main()
