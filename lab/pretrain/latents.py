"""Training data of the diffusion model: latents of every captioned image, and its captions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dora_diffusion.models.families.stable_diffusion import tokenize
from dora_diffusion.toy.instrument import ATTRIBUTES
from dora_diffusion.toy.world import PLACES, Scene
from lab.pretrain.captions import PATTERN_PHRASES, PATTERN_WORDS
from lab.pretrain.corpus import CAPTIONS_PER_IMAGE, Corpus
from lab.pretrain.data import to_pixels
from lab.pretrain.instrument import NO_NAME
from lab.pretrain.tokenizer import MAX_LENGTH

CHUNK = 400


@dataclass(frozen=True)
class LatentSet:
    """Data that the diffusion loss draws from.

    Attributes:
        latents: the encoder's posterior, mean and deviation, scaled to unit variance,
            (n, 2, c, h, w) float16.
        token_ids: (n, CAPTIONS_PER_IMAGE, MAX_LENGTH) int16.
        mentioned: indices into `ATTRIBUTES` that each caption mentions, else `NO_NAME`;
            (n, CAPTIONS_PER_IMAGE, 4) int16.
        time_ids: SDXL's sizes and crop, (n, 6) int16; (n, 0) for a model that is told none.
    """

    latents: Tensor
    token_ids: Tensor
    mentioned: Tensor
    time_ids: Tensor

    def __len__(self) -> int:
        """The number of images."""
        return len(self.latents)


def mentioned_attributes(text: str, scene: Scene) -> list[int]:
    """Return the class, colour, pattern and background that a caption mentions."""
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


def _captions(arguments: tuple[Corpus, int]) -> tuple[list[str], list[list[int]], tuple[int, ...]]:
    corpus, index = arguments
    scene, texts = corpus.scene(index), corpus.captions(index)
    time_ids = corpus.time_ids(index) if corpus.time_ids else ()
    return texts, [mentioned_attributes(text, scene) for text in texts], time_ids


def write_captions(
    folder: Path,
    tokenizer: Any,
    corpus: Corpus,
    read: Callable[[Any, list[str]], Any] = tokenize,
) -> Path:
    """Write ``folder/captions.pt``: token ids, mentioned attributes and SDXL's sizes.

    ``read`` is called with the tokenizer and texts, and pads these to `MAX_LENGTH` tokens.
    """
    path = folder / "captions.pt"
    if path.exists():
        return path
    with Pool(2) as pool:
        numbers = [(corpus, index) for index in range(corpus.count)]
        drawn = pool.map(_captions, numbers, chunksize=CHUNK)
    ids = torch.cat([read(tokenizer, texts).input_ids.to(torch.int16) for texts, _, _ in drawn])
    told = {
        "token_ids": ids.view(corpus.count, CAPTIONS_PER_IMAGE, MAX_LENGTH),
        "mentioned": torch.tensor([mentioned for _, mentioned, _ in drawn], dtype=torch.int16),
        "time_ids": torch.tensor([time_ids for _, _, time_ids in drawn], dtype=torch.int16),
    }
    torch.save(told, path)
    return path


def _encode_range(arguments: tuple[Path, Path, Corpus, int]) -> tuple[int, NDArray[np.float16]]:
    from diffusers import AutoencoderKL

    folder, vae_folder, corpus, start = arguments
    torch.set_num_threads(1)
    vae = AutoencoderKL.from_pretrained(vae_folder).eval()
    images = corpus.images(folder, start, min(start + CHUNK, corpus.count))
    blocks = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for block in torch.from_numpy(images).split(50):
            posterior = vae.encode(to_pixels(block)).latent_dist
            both = torch.stack([posterior.mean.float(), posterior.std.float()], 1)
            blocks.append((both * vae.config.scaling_factor).half())
    return start, torch.cat(blocks).numpy()


def write_latents(folder: Path, corpus: Corpus, vae_folder: Path) -> Path:
    """Write ``folder/latents.npy``: the posterior of every captioned image, one or two GB."""
    path = folder / "latents.npy"
    if path.exists():
        return path
    unfinished, latents = path.with_suffix(".unfinished"), None
    starts = [(folder, vae_folder, corpus, k) for k in range(0, corpus.count, CHUNK)]
    # spawn: a forked torch that has used its threads before can hang.
    with torch.multiprocessing.get_context("spawn").Pool(2) as pool:
        for start, block in pool.imap_unordered(_encode_range, starts):
            if latents is None:
                shape = (corpus.count, *block.shape[1:])
                latents = np.lib.format.open_memmap(unfinished, "w+", np.float16, shape)
            latents[start : start + len(block)] = block
    del latents  # closes it: Windows renames no file that is mapped
    return unfinished.rename(path)


def open_latents(folder: Path) -> LatentSet:
    """Load what `write_latents` and `write_captions` wrote."""
    latents = torch.from_numpy(np.load(folder / "latents.npy", mmap_mode="c"))
    told = torch.load(folder / "captions.pt", weights_only=True)
    return LatentSet(latents, told["token_ids"], told["mentioned"], told["time_ids"])
