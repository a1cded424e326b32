"""GPU memory of training and sampling at full size: the peak of live bytes.

    python benchmarks/memory.py
    python benchmarks/memory.py --cards
    python benchmarks/memory.py --family sdxl --resolution 1024 --checkpointing on --parts
    python benchmarks/memory.py --resident /tmp/full --family sd1 --resolution 512

No GPU is needed: models of full size are made of fake tensors (`fake_gpu`), the product's own
training step runs on them, and weights, adapters, optimizer states, gradients and activations are
counted by storage (`live_bytes`). Nothing is computed, and every figure is exact. bitsandbytes'
8-bit AdamW is not run: its states are derived from its rules (`Adam8bit`).

With ``--cards`` it prints README's table: for each card the quickest flags that fit, with the peak
of a whole run with them: of steps, of sample images, and of encoding photos and captions.

With ``--resident`` it trains two steps on the CPU instead, text encoders too, and prints the peak
memory of the process: that is the table of `dora_diffusion.config.families` for CPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import flow_models
import torch
from common import markdown
from fake_gpu import DEVICE, Answers, fake_gpu
from full_size import CLIP_BIG_G, CLIP_L, SCALING, UNETS, VAE, model_in
from live_bytes import GIB, LiveBytes
from torch import Tensor, nn

from dora_diffusion.cli.commands.train import train_config
from dora_diffusion.cli.main import build_parser
from dora_diffusion.config import TrainConfig
from dora_diffusion.config.base import BaseModel
from dora_diffusion.config.families import FAMILIES
from dora_diffusion.config.features.prior import is_image_free
from dora_diffusion.data.crops import apply_crop, plan_crop
from dora_diffusion.data.images import decode_photo
from dora_diffusion.models.components import Components
from dora_diffusion.models.conditioning import Conditioning
from dora_diffusion.models.families.stable_diffusion import encode_tokens
from dora_diffusion.models.load import load_vae, quantised_layers, set_tiles
from dora_diffusion.models.locate import resolve_folder
from dora_diffusion.models.memory import PROCESS_GIB
from dora_diffusion.numerics.quantised import quantise
from dora_diffusion.training import optimizer as optimizers
from dora_diffusion.training.batch import Batch, ModelInputs
from dora_diffusion.training.recipe import build_step
from dora_diffusion.training.step import Step
from dora_diffusion.training.trainable.adapters import inject_trained

# A card has to hold a tenth more than what is counted with the GPU's context, and half a gigabyte
# for the screen.
CARDS = (4, 6, 8, 12, 16, 24)
SCREEN_GIB = 0.5
_SAVING = "--gradient_checkpointing --optimizer adamw8bit"
# Quickest first. Whoever needs a smaller card does without the prior.
CARD_FLAGS = (
    "--with_prior_preservation",
    "--with_prior_preservation --gradient_checkpointing",
    f"--with_prior_preservation {_SAVING}",
    f"{_SAVING} --sample_batch_size 1",
    f"--with_prior_preservation {_SAVING} --quantize int8",
    f"--with_prior_preservation {_SAVING} --quantize int8 --quantize_convolutions",
    f"--with_prior_preservation {_SAVING} --quantize nf4 --quantize_convolutions",
    f"{_SAVING} --quantize nf4 --sample_batch_size 1",
)
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16}
SIZES = {"sd1": (512, 768), "sdxl": (768, 1024), "z-image": (1024,), "flux2-klein": (1024,),
         "flux2-klein-9b": (1024,), "anima": (1024,)}  # fmt: skip
TITLES = {"sd1": "SD1.5", "sdxl": "SDXL", "z-image": "Z-Image", "flux2-klein": "FLUX.2-klein",
          "flux2-klein-9b": "FLUX.2-klein 9B", "anima": "Anima"}  # fmt: skip
SWITCH = ("off", "on")


class Adam8bit(torch.optim.Optimizer):
    """The states of bitsandbytes' AdamW8bit, by its documented rules; it updates nothing.

    Two moments of one byte for each number, each with a float32 maximum for every block of 256;
    tensors of fewer than 4,096 numbers keep two float32 moments. Two tables of 256 float32.
    """

    def __init__(self, params: Any, betas: Any, eps: float) -> None:
        super().__init__(params, {"betas": betas, "eps": eps})
        self.tables: list[Tensor] = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Make the states of every parameter that has a gradient."""
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None and p not in self.state):
                is_small = p.numel() < 4096
                self.tables = self.tables or [torch.zeros(256, device=p.device) for _ in "12"]
                dtype = torch.float32 if is_small else torch.uint8
                state = {f"state{i}": torch.zeros_like(p, dtype=dtype) for i in "12"}
                if not is_small:
                    blocks = -(-p.numel() // 256)
                    state |= {f"absmax{i}": torch.zeros(blocks, device=p.device) for i in "12"}
                self.state[p] = state


def make_components(family: str, dtype: torch.dtype, base: BaseModel | None = None) -> Components:
    """A frozen model of a family on the device, quantised and tiled as a base asks for it."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    entry = FAMILIES[family]
    if entry.has_unet:
        wide = torch.float32 if entry.vae_overflows({}) else dtype
        vae = AutoencoderKL(**VAE, scaling_factor=SCALING[family]).to(DEVICE, wide)
        denoiser: Any = UNet2DConditionModel(**UNETS[family]).to(DEVICE, dtype)
        config = CLIPTextConfig(vocab_size=49408, **CLIP_L)
        encoders: list[Any] = [CLIPTextModel(config).to(DEVICE, dtype)]
        scheduler: Any = DDPMScheduler()
    else:
        denoiser, vae, encoders = flow_models.make_parts(family, dtype)
        scheduler = flow_models.SCHEDULER
    if entry.has_pooled:
        config = CLIPTextConfig(vocab_size=49408, **CLIP_BIG_G)
        encoders.append(CLIPTextModelWithProjection(config).to(DEVICE, dtype))
    for module in (denoiser, vae, *encoders):
        module.eval().requires_grad_(False)
    base = base or BaseModel("")
    set_tiles(vae, base.tile_size)
    # At once: there are no numbers that would stay in a cache.
    with mock.patch("dora_diffusion.numerics.quantised._CHUNK", sys.maxsize):
        for layer in (m for module in (denoiser, *encoders) for m in module.modules()):
            if isinstance(layer, quantised_layers(base)):
                layer.weight = nn.Parameter(quantise(layer.weight, base.quantize), False)
    with mock.patch("dora_diffusion.models.components.check_vocabulary"):
        tokenizers = (None,) * len(encoders)
        return Components(entry, denoiser, vae, tuple(encoders), tokenizers, scheduler)


def accelerator() -> Any:
    """Return the part of Accelerate that the training step uses, on one device."""
    return SimpleNamespace(
        device=torch.device(DEVICE),
        process_index=0,
        num_processes=1,
        scaler=None,
        autocast=nullcontext,
        backward=lambda loss: loss.backward(),
        clip_grad_norm_=torch.nn.utils.clip_grad_norm_,
        reduce=lambda tensor, reduction: tensor,
        prepare_optimizer=lambda optimizer: SimpleNamespace(
            optimizer=optimizer,
            step=optimizer.step,
            zero_grad=optimizer.zero_grad,
            param_groups=optimizer.param_groups,
        ),
    )


def time_ids(components: Components, batch: int) -> Tensor | None:
    """SDXL's size and crop conditioning."""
    return torch.empty(batch, 6, device=DEVICE) if components.family.has_time_ids else None


class OneBatch:
    """Batches of a run that are all alike."""

    def __init__(self, components: Components, batch: Batch) -> None:
        self.process, self.batch = components.process, batch

    def __next__(self) -> Batch:
        """The batch, to which noise is added as a run does."""
        batch, timesteps = self.batch, self.batch.inputs.timesteps
        noisy = self.process.add_noise(batch.latents, batch.noise, timesteps)
        return replace(batch, inputs=batch.inputs._replace(noisy_latents=noisy))


def latent_shape(components: Components, side: int) -> tuple[int, int, int]:
    """Channels, height and width of the denoiser's latents, by the autoencoder's side."""
    family = components.family
    side //= family.patch if family.packs_patches else 1
    return family.in_channels(components.latent_channels), side, side


def batch_of(components: Components, side: int, config: TrainConfig) -> Batch:
    """A batch of photos, with class images or class captions where the prior asks for them."""
    photos = config.train_batch_size
    rows = photos * (2 if config.with_prior_preservation and not is_image_free(config) else 1)
    shape = (rows, *latent_shape(components, side))
    latents, noise = torch.empty(shape, device=DEVICE), torch.empty(shape, device=DEVICE)
    timesteps = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
    return Batch(
        ModelInputs(latents, timesteps, time_ids(components, rows)),
        latents,
        noise,
        ("",) * rows,
        photos,
        # Another caption: predictions for equal ones are computed once.
        class_captions=dict.fromkeys(range(photos), "class") if is_image_free(config) else {},
    )


def encoded(components: Components, prompts: int) -> Conditioning:
    """Conditioning by the text encoders."""
    if not components.family.has_unet:
        return flow_models.encoded(components, prompts)
    ids = torch.zeros(prompts, 77, dtype=torch.int64, device=DEVICE)
    encoders = components.text_encoders
    return encode_tokens(components.family, encoders, [ids] * len(encoders))


def cached(components: Components, prompts: int) -> Conditioning:
    """Conditioning that was encoded before."""
    family, dtype = components.family, components.denoiser.dtype
    if not family.has_unet:
        return flow_models.states_of(family.name, family.prompt_width, prompts, dtype)
    hidden = torch.empty(prompts, 77, family.prompt_width, device=DEVICE, dtype=dtype)
    pooled = torch.empty(prompts, 1280, device=DEVICE, dtype=dtype)
    return Conditioning(hidden, pooled if family.has_pooled else None)


def label_weights(count: LiveBytes, components: Components, text_encoders: bool) -> None:
    """Count the weights: those that a step computes with, and those that it does not."""
    for name, module in components.modules().items():
        needed = name == components.family.denoiser or (text_encoders and name != "vae")
        count.label = "weights" if needed else "idle"
        count.add(module.state_dict(keep_vars=True).values())


def count_step(
    family: str, resolution: int, config: TrainConfig, *, precision: str = "bf16"
) -> LiveBytes:
    """Count a training step's peak.

    The parts of the peak are labelled ``weights``, ``idle`` (weights of modules that no step
    computes with, which offloading takes away), ``adapter`` (with its gradients and states) and
    ``step`` (activations).
    """
    config = replace(config, max_train_steps=2)
    text_encoders = config.train_text_encoder
    library = SimpleNamespace(optim=SimpleNamespace(AdamW8bit=Adam8bit))
    with ExitStack() as stack:
        stack.enter_context(fake_gpu())
        stack.enter_context(
            mock.patch.object(optimizers, "optimizer_library", return_value=library)
        )
        count, dtype = LiveBytes(DEVICE), DTYPES[precision]
        components = make_components(family, dtype, config.base_model)
        label_weights(count, components, text_encoders)
        count.label = "adapter"
        stack.enter_context(Answers())
        stack.enter_context(count)
        weights = inject_trained(components, config)
        batch = batch_of(components, resolution // components.vae_factor, config)
        batches: Any = OneBatch(components, batch)
        step = build_step(config, accelerator(), components, weights, batches)
        encode: Any = Encoded(components, encoded if text_encoders else cached, text_encoders)
        step.encode = encode
        make_states(step)
        count.label = "step"
        count.reset_peak()
        step(1)
    return count


class Encoded:
    """A run's conditioner, to which all captions are alike."""

    def __init__(self, components: Components, encode: Any, trains: bool = False) -> None:
        self.components, self.encode, self.trains = components, encode, trains

    def __call__(self, captions: Any) -> Any:
        """Conditioning of as many."""
        return self.encode(self.components, len(captions))


def make_states(step: Step) -> None:
    """Make the optimizer create its states, which exist from the second step on."""
    for parameter in (p for model in step.weights.modules.values() for p in model.parameters()):
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    step.parameters.take_gradients()
    step.optimizer.step()
    step.optimizer.zero_grad()
    step.parameters.finish()


@lru_cache
def count_sampling(
    family: str,
    resolution: int,
    *,
    precision: str = "bf16",
    images: int = 1,
    base: BaseModel | None = None,
) -> dict[str, int]:
    """Peaks in bytes of what makes images and encodes photos, each with its own weights alone.

    Guidance doubles what the UNet computes. Decoding and encoding take one image at a time.
    """
    peaks = {}
    with fake_gpu(), torch.no_grad():
        dtype = DTYPES[precision]
        components = make_components(family, dtype, base)
        side, rows = resolution // components.vae_factor, 2 * images
        inject_trained(components, TrainConfig())
        vae = components.vae

        def denoise() -> Any:
            latents = torch.empty(rows, *latent_shape(components, side), device=DEVICE, dtype=dtype)
            timesteps = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
            conditioning, ids = cached(components, rows), time_ids(components, rows)
            return components.predict(latents, timesteps, conditioning, ids)

        def decode() -> Any:
            shape = (1, components.latent_channels, side, side)
            return vae.decode(torch.empty(shape, device=DEVICE, dtype=vae.dtype))

        def encode() -> Any:
            shape = (1, 3, resolution, resolution)
            return vae.encode(torch.empty(shape, device=DEVICE, dtype=vae.dtype))

        for name, module, run in (
            ("denoising", components.denoiser, denoise), ("decoding", vae, decode),
            ("encoding a photo", vae, encode),
        ):  # fmt: skip
            count = LiveBytes(DEVICE)
            count.add(module.state_dict(keep_vars=True).values())
            with Answers(), count:
                run()
            peaks[name] = count.peak
        count = LiveBytes(DEVICE)
        for encoder in components.text_encoders:
            count.add(encoder.state_dict(keep_vars=True).values())
        with Answers(), count:
            encoded(components, 2)
        peaks["encoding a prompt"] = count.peak
    return peaks


def print_steps(args: argparse.Namespace) -> None:
    """The table of training."""
    rows: list[list[object]] = []
    for family in args.family:
        sizes = args.resolution or SIZES[family]
        trained = args.text_encoders if FAMILIES[family].has_unet else ["off"]
        for size, text, on in product(sizes, trained, args.checkpointing):
            row: list[object] = [TITLES[family], size, text, on]
            for optimizer in args.optimizer:
                config = TrainConfig(
                    train_text_encoder=text == "on", gradient_checkpointing=on == "on",
                    optimizer=optimizer, train_batch_size=args.batch,
                    with_prior_preservation=args.prior != "none",
                    prior_preservation_mode=None if args.prior == "none" else args.prior,
                )  # fmt: skip
                count = count_step(family, size, config, precision=args.precision)
                idle = count.at_peak.get("idle", 0)
                row += [f"{count.peak / GIB:.2f}", f"{(count.peak - idle) / GIB:.2f}"]
                if args.parts:
                    parts = {label: round(n / GIB, 3) for label, n in count.at_peak.items()}
                    print(*row[:4], optimizer, parts, flush=True)
            rows.append(row)
    header = ["GiB", "px", "text encoders trained", "checkpointing"]
    for optimizer in args.optimizer:
        header += [f"{optimizer}, offload none", f"{optimizer}, offload model"]
    print(markdown(header, rows))


def print_tiles(args: argparse.Namespace) -> None:
    """Difference between VAE tiles and whole images: of the embedded VAE, or of SDXL's shape."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    if args.tiles == "sdxl":
        rows = [["SDXL's shape, random", *tiled(AutoencoderKL(**VAE), 1024, args.photos, 1)]]
    else:
        trained = load_vae(str(resolve_folder("embedded:tiny-sd")))
        random = AutoencoderKL.from_config(trained.config)
        pairs = {"embedded": trained, "embedded's shape, random": random}
        rows = [[name, *tiled(vae, 128, args.photos, 2)] for name, vae in pairs.items()]
    header = ["VAE", "px", "tile", "latents", "image", "mean of 255", "largest", "VAE's own"]
    print(markdown(header, rows))


def tiled(vae: Any, size: int, folder: str, count: int) -> list[object]:
    """A row of `print_tiles`: some photos of twice a tile, whole and in tiles."""
    photos = [decode_photo(path).image for path in sorted(Path(folder).glob("*.jpg"))[:count]]
    crops = [plan_crop((photo.height, photo.width), size, multiple=8) for photo in photos]
    pixels = torch.stack([apply_crop(*pair) for pair in zip(photos, crops, strict=True)])
    found: list[Tensor] = []
    for tile in (0, size // 2):
        set_tiles(vae.eval(), tile)
        with torch.no_grad():
            latents = vae.encode(pixels).latent_dist.mode()
            found += [latents, vae.decode(found[0] if found else latents).sample]
    moved, off = found[2] - found[0], 127.5 * (found[3] - found[1]).abs()
    own = 127.5 * (found[1] - pixels).abs().mean()
    image = (found[3] - found[1]).norm() / (found[1] - found[1].mean()).norm()
    shares = (f"{share:.3f}" for share in (moved.norm() / found[0].norm(), image))
    return [size, size // 2, *shares, f"{off.mean():.1f}", f"{off.max():.0f}", f"{own:.1f}"]


def print_sampling(args: argparse.Namespace) -> None:
    """The table of sampling and caching."""
    rows: list[list[object]] = []
    header: list[str] = []
    for family in args.family:
        for size in args.resolution or SIZES[family]:
            peaks = count_sampling(family, size, precision=args.precision, images=args.batch)
            header = ["GiB", "px", *peaks]
            rows.append([TITLES[family], size, *(f"{n / GIB:.2f}" for n in peaks.values())])
    print(markdown(header, rows))


def count_run(family: str, resolution: int, config: TrainConfig) -> float:
    """Peak of a whole run on a GPU, offloaded as by default, in GiB.

    Samples share the device with the adapter and the optimizer's states.
    """
    step = count_step(family, resolution, config)
    images = min(config.sample_batch_size, config.num_validation_images)
    sampling = count_sampling(family, resolution, images=images, base=config.base_model)
    beside = step.at_peak["adapter"]
    own = step.peak - step.at_peak.get("idle", 0)
    return max(own, max(sampling.values()) + beside) / GIB


def print_cards(args: argparse.Namespace) -> None:
    """The table of README: for each card the quickest flags that fit."""
    chosen: dict[str, dict[int, tuple[str, float]]] = {}
    for family in args.family:
        size = FAMILIES[family].default_resolution
        fitting = chosen.setdefault(family, {})
        for flags in CARD_FLAGS:
            peak = count_run(family, size, train_config(parse(["train", *flags.split()])))
            needed = card_for(peak)
            print(f"{TITLES[family]}, {size} px, {flags}: {peak:.2f} GiB", flush=True)
            for card in CARDS:
                if card >= needed:
                    fitting.setdefault(card, (flags, peak))
    header = ["card"]
    for family in chosen:
        header += [f"{TITLES[family]}, {FAMILIES[family].default_resolution} px", "GiB"]
    rows = [
        [
            f"{card} GB",
            *(cell for fitting in chosen.values() for cell in card_cells(fitting.get(card))),
        ]
        for card in CARDS
    ]
    print(markdown(header, rows))


def parse(words: list[str]) -> argparse.Namespace:
    """Parse these words of a command line."""
    return build_parser().parse_args(words)


def card_for(peak: float) -> float:
    """The size of a card in GiB that holds a peak."""
    return 1.1 * (peak + PROCESS_GIB) + SCREEN_GIB


def card_cells(fit: tuple[str, float] | None) -> tuple[str, str]:
    """Flags and peak, as the table shows them."""
    return ("does not fit", "") if fit is None else (f"`{fit[0]}`", f"{fit[1]:.2f}")


def peak_memory(command: list[str], limit: float) -> float | None:
    """Peak resident memory of a command in GiB; None if it was ended since it took more."""
    process = subprocess.Popen(command)
    status = Path(f"/proc/{process.pid}/status")
    while True:
        ended, code, usage = os.wait4(process.pid, os.WNOHANG)
        if ended:
            break
        peak = [x for x in status.read_text(encoding="utf-8").splitlines() if x.startswith("VmHWM")]
        if peak and int(peak[0].split()[1]) / 2**20 > limit:
            os.kill(process.pid, signal.SIGKILL)
            os.wait4(process.pid, 0)
            return None
        time.sleep(0.2)
    if code:
        raise SystemExit(f"failed: {' '.join(command)}")
    return round(usage.ru_maxrss / 2**20, 2)


def print_resident(args: argparse.Namespace) -> None:
    """Train on the CPU in processes of their own, and print their peaks."""
    for family in args.family:
        base = model_in(args.resident, family)
        for size, on in product(args.resolution or SIZES[family], args.checkpointing):
            command = [
                sys.executable, "-m", "dora_diffusion", "train",
                "--pretrained_model_name_or_path", str(base),
                "--instance_data_dir", args.photos, "--instance_prompt", "a photo of a sks mug",
                "--output_dir", str(args.resident / "memory-output"), "--overwrite_output_dir",
                "--train_text_encoder", "--resolution", str(size), "--max_train_steps", "2",
                "--train_batch_size", str(args.batch), "--mixed_precision", "bf16",
                "--gradient_checkpointing" if on == "on" else "--no-gradient_checkpointing",
                "--num_validation_images", "0", "--checkpointing_steps", "0",
            ]  # fmt: skip
            peak = peak_memory(command, args.limit)
            row = {
                "family": family,
                "resolution": size,
                "gradient_checkpointing": on == "on",
                "batch": args.batch,
                "peak_gib": peak if peak is not None else f"more than {args.limit}",
            }
            print(json.dumps(row), flush=True)


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", nargs="+", choices=tuple(TITLES), default=list(TITLES))
    parser.add_argument("--resolution", nargs="+", type=int)
    parser.add_argument("--checkpointing", nargs="+", choices=SWITCH, default=SWITCH)
    parser.add_argument("--text-encoders", nargs="+", choices=SWITCH, default=SWITCH)
    parser.add_argument(
        "--optimizer", nargs="+", choices=("adamw", "adamw8bit"), default=["adamw", "adamw8bit"]
    )
    parser.add_argument("--precision", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--parts", action="store_true", help="what each peak consists of")
    parser.add_argument("--prior", choices=("none", "images", "image-free"), default="none")
    parser.add_argument("--cards", action="store_true", help="the table of cards in README instead")
    parser.add_argument("--sampling", action="store_true", help="of sampling and encoding instead")
    parser.add_argument(
        "--tiles", choices=("embedded", "sdxl"), nargs="?", const="embedded",
        help="what tiles change instead: of the embedded VAE, or of SDXL's shape",
    )  # fmt: skip
    parser.add_argument("--resident", type=Path, help="train on the CPU; folder of the models")
    parser.add_argument("--limit", type=float, default=16.5, help="GiB, with --resident")
    parser.add_argument("--photos", default="samples/bolt_mug", help="with --resident, --tiles")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    if args.resident is not None:
        print_resident(args)
    elif args.cards:
        print_cards(args)
    elif args.tiles:
        print_tiles(args)
    elif args.sampling:
        print_sampling(args)
    else:
        print_steps(args)


if __name__ == "__main__":
    main()
