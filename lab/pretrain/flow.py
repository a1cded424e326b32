"""tiny-flow: a Z-Image transformer, small enough for one core, that reads a small Qwen3.

Its language model has learned its words before (`language`) and stays as it is. The transformer
learns faster with Muon, and with maps of what is where, which its middle layer has to know.
"""

from __future__ import annotations

import copy
from multiprocessing import Pool
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from dora_diffusion.toy.instrument import ATTRIBUTES
from dora_diffusion.toy.world import render_mask
from lab.pretrain.corpus import Corpus
from lab.pretrain.data import SIZE
from lab.pretrain.fit import FitSettings, Progress, fit
from lab.pretrain.instrument import NO_NAME, labels_of
from lab.pretrain.language import STOP, WIDTH, Reader
from lab.pretrain.latents import CHUNK, open_latents
from lab.pretrain.muon import Muon
from lab.pretrain.tokenizer import MAX_LENGTH
from lab.pretrain.vae import LATENT_CHANNELS

if TYPE_CHECKING:
    from transformers import Qwen2Tokenizer

BATCH = 64
CAPTION_DROPOUT = 0.1
MEAN_LOGIT, LOGIT_DEVIATION = 0.4, 1.1
"""Of the noise's share: more noise than half, where class and colour are decided."""
SHIFT = 1.0
PATCH, GRID = 2, 8
MAPS_WEIGHT, MAPS_UNTIL = 0.1, 0.8
LEARNING_RATE = 3e-3


def _masks(arguments: tuple[Corpus, int]) -> NDArray[np.uint8]:
    corpus, start = arguments
    cell = SIZE // GRID // 2
    masks = np.stack(
        [
            render_mask(corpus.scene(index), SIZE // 2)
            for index in range(start, min(start + CHUNK, corpus.count))
        ]
    )
    return masks.reshape(len(masks), GRID, cell, GRID, cell).mean((2, 4)).round().astype(np.uint8)


def write_maps(folder: Path, corpus: Corpus) -> Path:
    """Write ``folder/maps.pt``: how much of each patch is the object, and every image's labels."""
    path = folder / "maps.pt"
    if path.exists():
        return path
    with Pool(2) as pool:
        starts = [(corpus, start) for start in range(0, corpus.count, CHUNK)]
        masks = np.concatenate(pool.map(_masks, starts))
    labels = torch.tensor([labels_of(corpus.scene(index)) for index in range(corpus.count)])
    torch.save({"covered": torch.from_numpy(masks).flatten(1), "labels": labels}, path)
    return path


def new_transformer(width: int = 144, layers: int = 5, heads: int = 3) -> Any:
    """A fresh transformer whose blocks change nothing at first (adaLN-Zero)."""
    from diffusers import ZImageTransformer2DModel

    angles = width // heads // 3 // 2 * 2
    transformer = ZImageTransformer2DModel(
        in_channels=LATENT_CHANNELS,
        dim=width,
        n_layers=layers,
        n_refiner_layers=1,
        n_heads=heads,
        n_kv_heads=heads,
        cap_feat_dim=WIDTH,
        axes_dims=[width // heads - 2 * angles, angles, angles],
        axes_lens=[1024, 64, 64],
    )
    with torch.no_grad():
        for block in [*transformer.layers, *transformer.noise_refiner]:
            block.adaLN_modulation[0].weight.zero_()
            block.adaLN_modulation[0].bias.zero_()
        for final in transformer.all_final_layer.values():
            final.linear.weight.zero_()
            final.linear.bias.zero_()
        transformer.x_pad_token.normal_(std=0.02)
        transformer.cap_pad_token.normal_(std=0.02)
    return transformer


class Angles(NamedTuple):
    """Cosines and sines of rotary positions, each ``(tokens, 1, half of a head)``."""

    cos: Tensor
    sin: Tensor

    def turn(self, x: Tensor) -> Tensor:
        """Rotate queries or keys ``(b, tokens, heads, width of a head)``, real parts first."""
        real, imaginary = x.chunk(2, -1)
        turned = (real * self.cos - imaginary * self.sin, real * self.sin + imaginary * self.cos)
        return torch.cat(turned, -1)


def _angles(transformer: Any, positions: Tensor) -> Angles:
    turns = transformer.rope_embedder(positions)
    return Angles(turns.real[:, None].contiguous(), turns.imag[:, None].contiguous())


def _parts_first(rows: Tensor, heads: int) -> Tensor:
    """Order rows that are pairs of real and imaginary parts: all real ones of a head first.

    Queries and keys alike may be in any order, and in this one a processor need not pick every
    other number.
    """
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _block(block: Any, x: Tensor, angles: Angles, time: Tensor | None) -> Tensor:
    """One block, as `ZImageTransformerBlock` without a mask, with fewer and larger products."""
    attention, feed = block.attention, block.feed_forward
    heads = attention.heads
    scales = gates = (1.0, 1.0)
    if time is not None:
        parts = block.adaLN_modulation(time).unsqueeze(1).chunk(4, dim=2)
        scales, gates = (1 + parts[0], 1 + parts[2]), (parts[1].tanh(), parts[3].tanh())
    hidden = block.attention_norm1(x) * scales[0]
    ordered = [_parts_first(layer.weight, heads) for layer in (attention.to_q, attention.to_k)]
    three = F.linear(hidden, torch.cat([*ordered, attention.to_v.weight]))
    query, key, value = three.unflatten(-1, (3, heads, -1)).unbind(2)
    query, key = (
        angles.turn(F.rms_norm(y, y.shape[-1:], _parts_first(norm.weight, 1), norm.eps))
        for y, norm in ((query, attention.norm_q), (key, attention.norm_k))
    )
    scores = query.transpose(1, 2) @ key.permute(0, 2, 3, 1) * query.shape[-1] ** -0.5
    mixed = (scores.softmax(-1).to(value.dtype) @ value.transpose(1, 2)).transpose(1, 2).flatten(2)
    x = x + gates[0] * block.attention_norm2(attention.to_out[0](mixed))
    hidden = block.ffn_norm1(x) * scales[1]
    gate, up = F.linear(hidden, torch.cat([feed.w1.weight, feed.w3.weight])).chunk(2, -1)
    return x + gates[1] * block.ffn_norm2(feed.w2(F.silu(gate) * up))


def _patches(latents: Tensor) -> Tensor:
    """Cut ``(b, c, h, w)`` into ``(b, tokens, PATCH * PATCH * c)``, as the transformer does."""
    cells = latents.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))
    return cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


class TextToImageFlow(nn.Module):
    """A transformer and its finished language model.

    The map heads ask the middle layer's tokens what they show, and are dropped in the end.
    """

    positions: Tensor
    empty: Tensor

    def __init__(self, reader: Reader, tokenizer: Qwen2Tokenizer, **sizes: int) -> None:
        super().__init__()
        self.transformer = new_transformer(**sizes)
        self.reader = reader.requires_grad_(False)
        self.map_heads = nn.ModuleList(
            nn.Linear(self.transformer.dim, 1 + len(values)) for values in ATTRIBUTES.values()
        )
        empty = torch.full((MAX_LENGTH,), tokenizer.pad_token_id)
        empty[0] = tokenizer.convert_tokens_to_ids(STOP)
        self.register_buffer("empty", empty, persistent=False)
        grid = self.transformer.create_coordinate_grid
        words = grid((MAX_LENGTH, 1, 1), (1, 0, 0)).flatten(0, 2)
        image = grid((1, GRID, GRID), (MAX_LENGTH + 1, 0, 0)).flatten(0, 2)
        self.angles = [_angles(self.transformer, p) for p in (image, words)]

    def forward(
        self, patches: Tensor, times: Tensor, states: Tensor, there: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Predict the velocity towards the image, as `ZImageTransformer2DModel` does.

        It takes a whole batch of one size, which a compiler can fuse, where the class takes lists.

        Args:
            patches: (b, GRID * GRID, PATCH * PATCH * channels) of noisy latents.
            times: (b,) the image's share.
            states: (b, MAX_LENGTH, WIDTH) of captions.
            there: (b, MAX_LENGTH) bool, False for padding.

        Returns:
            velocities of the patches, and the image's tokens in the middle layer.
        """
        model = self.transformer
        name = f"{PATCH}-1"
        time = model.t_embedder(times * model.t_scale).to(patches.dtype)
        of_image, of_words = self.angles
        image = model.all_x_embedder[name](patches)
        for layer in model.noise_refiner:
            image = _block(layer, image, of_image, time)
        words = model.cap_embedder(states)
        words = torch.where(there[:, :, None], words, model.cap_pad_token.to(words.dtype))
        for layer in model.context_refiner:
            words = _block(layer, words, of_words, None)
        of_both = Angles(*(torch.cat(parts) for parts in zip(of_image, of_words, strict=True)))
        x = middle = torch.cat([image, words], 1)
        for number, layer in enumerate(model.layers):
            x = _block(layer, x, of_both, time)
            if number == len(model.layers) // 2 - 1:
                middle = x
        tokens = patches.shape[1]
        return model.all_final_layer[name](x[:, :tokens], c=time), middle[:, :tokens]


def map_loss(heads: nn.ModuleList, tokens: Tensor, covered: Tensor, labels: Tensor) -> Tensor:
    """Ask tokens for the class, colour and pattern of what they show, or for the background.

    The choice behind the last says that it is not there, object or background.

    Args:
        heads: one for each of `ATTRIBUTES`.
        tokens: (b, tokens, width).
        covered: (b, tokens), how much the object covers, 0 to 255.
        labels: (b, 4), `NO_NAME` where there is no name.
    """
    is_object = covered > 127
    losses = []
    for name, head, label in zip(ATTRIBUTES, heads, labels.unbind(1), strict=True):
        there = ~is_object if name == "background" else is_object
        target = torch.where(there, label[:, None], len(ATTRIBUTES[name]))
        losses.append(
            F.cross_entropy(
                head(tokens).flatten(0, 1).float(), target.flatten(), ignore_index=NO_NAME
            )
        )
    return torch.stack(losses).sum()


def new_optimizer(model: TextToImageFlow, settings: FitSettings) -> Muon:
    """Muon for the matrices of the blocks' attention and feed-forward layers."""
    matrices, others = list[nn.Parameter](), list[nn.Parameter]()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            inner = ".attention." in name or ".feed_forward." in name
            (matrices if inner and parameter.ndim == 2 else others).append(parameter)
    return Muon(matrices, others, settings.learning_rate, settings.weight_decay)


def train_flow(model: TextToImageFlow, folder: Path, minutes: float, report: Any = None) -> None:
    """Train on ``folder``'s latents, captions and maps; the pipeline is in ``folder/pipeline``."""
    data, maps = open_latents(folder), torch.load(folder / "maps.pt", weights_only=True)
    forward = torch.compile(TextToImageFlow.forward, dynamic=False)
    read = torch.compile(Reader.states, dynamic=False)

    def loss(model: TextToImageFlow, progress: float, generator: torch.Generator) -> Tensor:
        index = torch.randint(0, len(data), (BATCH,), generator=generator)
        which = torch.randint(0, data.token_ids.shape[1], (BATCH,), generator=generator)
        mean, std = (
            _patches(data.latents[index].float().flatten(0, 1)).unflatten(0, (-1, 2)).unbind(1)
        )
        image = mean + std * torch.randn(mean.shape, generator=generator)
        noise = torch.randn(image.shape, generator=generator)
        logits = MEAN_LOGIT + LOGIT_DEVIATION * torch.randn(BATCH, generator=generator)
        share = logits.sigmoid()[:, None, None]
        token_ids = model.reader.renamed(data.token_ids[index, which].long(), generator)
        dropped = torch.rand(BATCH, generator=generator) < CAPTION_DROPOUT
        token_ids = torch.where(dropped[:, None], model.empty, token_ids)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                states, _ = read(model.reader, token_ids)
            noisy = (1 - share) * image + share * noise
            velocity, middle = forward(
                model, noisy, 1 - share.flatten(), states, token_ids != model.reader.pad
            )
            maps_loss = map_loss(
                model.map_heads, middle, maps["covered"][index], maps["labels"][index]
            )
        flow_loss = (velocity.float() - (image - noise)).square().mean()
        return flow_loss + MAPS_WEIGHT * max(0.0, 1 - progress / MAPS_UNTIL) * maps_loss

    def save(model: TextToImageFlow, progress: Progress) -> None:
        export_flow(model, folder, folder / "pipeline")
        if report is not None:
            report(folder / "pipeline", progress)

    settings = FitSettings(
        minutes, LEARNING_RATE, hold=0.3, warmup=200, ema_decay=0.9995, workers=1,
        optimizer=new_optimizer,
    )  # fmt: skip
    fit("flow", folder, model, loss, settings, save)


def export_flow(model: TextToImageFlow, folder: Path, output: Path) -> None:
    """Write a diffusers pipeline in float16 from trained weights and ``folder``'s other parts."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline
    from transformers import Qwen2Tokenizer

    vae = AutoencoderKL.from_pretrained(folder / "vae").half()
    vae.register_to_config(shift_factor=0.0)
    pipeline: Any = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        text_encoder=copy.deepcopy(model.reader.text_encoder).half(),
        tokenizer=Qwen2Tokenizer.from_pretrained(folder / "tokenizer"),
        transformer=copy.deepcopy(model.transformer).half(),
    )
    pipeline.save_pretrained(output)
