"""What the diffusion model trains on: latents of every captioned picture, and its captions."""

from __future__ import annotations

from dataclasses import dataclass
from multiprocessing import Pool
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dora_diffusion.embedded.captions import PATTERN_PHRASES, PATTERN_WORDS, PLACES, caption
from dora_diffusion.embedded.instrument import ATTRIBUTES
from dora_diffusion.embedded.pretrain.data import (
    CAPTIONED,
    open_pictures,
    to_pixels,
    training_scene,
)
from dora_diffusion.embedded.pretrain.instrument import NO_NAME
from dora_diffusion.embedded.pretrain.tokenizer import MAX_LENGTH, rare_words
from dora_diffusion.embedded.world import Scene

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

CAPTIONS_PER_PICTURE = 4
CAPTION_SEED = 15
CHUNK = 400


@dataclass(frozen=True)
class LatentSet:
    """Everything the diffusion loss draws from.

    Attributes:
        mean, std: the encoder's posterior, scaled to unit variance, (n, c, 16, 16) float16.
        token_ids: (n, CAPTIONS_PER_PICTURE, MAX_LENGTH) int16.
        mentioned: indices into `ATTRIBUTES` that each caption mentions, else `NO_NAME`;
            (n, CAPTIONS_PER_PICTURE, 4) int16.
    """

    mean: Tensor
    std: Tensor
    token_ids: Tensor
    mentioned: Tensor

    def __len__(self) -> int:
        """The number of pictures."""
        return len(self.mean)


def mentioned_attributes(text: str, scene: Scene) -> list[int]:
    """What a caption says about class, colour, pattern and background."""
    subject = scene.subject
    words = set(text.replace(",", "").split())
    told = (
        subject.kind in words,
        subject.color in words,
        any(word and word in text for word in PATTERN_WORDS[subject.pattern])
        or PATTERN_PHRASES.get(subject.pattern, "\0") in text,
        any(phrase in text for phrase in PLACES[scene.background]),
    )
    values = (subject.kind, subject.color, subject.pattern, scene.background)
    return [
        choices.index(value) if said and value is not None else NO_NAME
        for said, value, choices in zip(told, values, ATTRIBUTES.values(), strict=True)
    ]


def _captions(index: int) -> tuple[list[str], list[list[int]]]:
    scene = training_scene(index)
    generator = np.random.default_rng((CAPTION_SEED, index))
    texts = [caption(scene, generator, rare_words()) for _ in range(CAPTIONS_PER_PICTURE)]
    return texts, [mentioned_attributes(text, scene) for text in texts]


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token ids padded to the model's length: (n, MAX_LENGTH)."""
    return tokenizer(
        texts, padding="max_length", truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
    ).input_ids


def write_captions(folder: Path, tokenizer: CLIPTokenizer) -> Path:
    """Write ``folder/captions.pt``: token ids and mentioned attributes of every caption."""
    path = folder / "captions.pt"
    if path.exists():
        return path
    with Pool(2) as pool:
        drawn = pool.map(_captions, range(CAPTIONED), chunksize=CHUNK)
    ids = torch.cat([tokenize(tokenizer, texts).to(torch.int16) for texts, _ in drawn])
    mentioned = torch.tensor([told for _, told in drawn], dtype=torch.int16)
    ids = ids.view(CAPTIONED, CAPTIONS_PER_PICTURE, MAX_LENGTH)
    torch.save({"token_ids": ids, "mentioned": mentioned}, path)
    return path


def _encode_range(arguments: tuple[Path, int]) -> tuple[Tensor, Tensor]:
    from diffusers import AutoencoderKL

    folder, start = arguments
    torch.set_num_threads(1)
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
    pictures = open_pictures(folder)[start : min(start + CAPTIONED // 16, CAPTIONED)]
    means, stds = [], []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for block in pictures.split(64):
            posterior = vae.encode(to_pixels(block)).latent_dist
            means.append((posterior.mean.float() * vae.config.scaling_factor).half())
            stds.append((posterior.std.float() * vae.config.scaling_factor).half())
    return torch.cat(means), torch.cat(stds)


def write_latents(folder: Path) -> Path:
    """Write ``folder/latents.pt``: the posterior of every captioned picture, about 800 MB."""
    path = folder / "latents.pt"
    if path.exists():
        return path
    torch.multiprocessing.set_sharing_strategy("file_system")
    starts = range(0, CAPTIONED, CAPTIONED // 16)
    # spawn: a forked torch that has used its threads before can hang.
    with torch.multiprocessing.get_context("spawn").Pool(2) as pool:
        blocks = pool.map(_encode_range, [(folder, start) for start in starts], chunksize=1)
    mean, std = (torch.cat([block[k] for block in blocks]) for k in (0, 1))
    torch.save({"mean": mean, "std": std}, path)
    return path


def open_latents(folder: Path) -> LatentSet:
    """Load what `write_latents` and `write_captions` wrote."""
    latents = torch.load(folder / "latents.pt", weights_only=True)
    captions = torch.load(folder / "captions.pt", weights_only=True)
    return LatentSet(latents["mean"], latents["std"], captions["token_ids"], captions["mentioned"])
