"""Diffusers' classes of Anima's parts, with the interface of other families' parts.

Its transformer and autoencoder are of a video model: they read one frame. Configurations that are
written to files are those of Diffusers' classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from dora_diffusion.config.fields import require
from dora_diffusion.config.images import PIXELS

if not hasattr(diffusers, "AnimaTextConditioner"):
    raise ImportError(
        f"Diffusers {diffusers.__version__} has no Anima; install a later version with pip"
    )


class CosmosTransformer3DModel(diffusers.CosmosTransformer3DModel):
    """Transformer whose padding mask has the size of its latents, all zeros.

    Diffusers' class resizes a mask of the image's pixels, for which it needs torchvision. The
    pipeline's mask is always zero.
    """

    @property
    def config(self) -> Any:
        """Configuration, in which the mask is not concatenated by Diffusers' class."""
        return type(self._internal_dict)({**self._internal_dict, "concat_padding_mask": False})

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        padding_mask: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Return the velocity ``(B, C, 1, h, w)`` of latents of this shape.

        Args:
            hidden_states: Noisy latents, ``(B, C, 1, h, w)``.
            timestep: Share of noise, ``(B,)``.
            encoder_hidden_states: Output of the text conditioner, ``(B, 512, D)``.
            padding_mask: Not read.
            options: Other arguments of Diffusers' class.

        Raises:
            ConfigError: If a side has more patches than the model has positions.
        """
        patch = PIXELS * max(self.rope.patch_size)
        longest = patch * max(self.rope.max_size)
        sides = [PIXELS * side for side in hidden_states.shape[:-3:-1]]
        require(
            max(sides) <= longest,
            f"an image of {sides[0]} x {sides[1]} pixels is larger than {longest} on a side, the "
            "most that the model has positions for; choose a smaller size",
            "resolution",
        )
        mask = hidden_states[:, :1]
        options["condition_mask"] = torch.zeros_like(mask) if self._concatenates else None
        return super().forward(hidden_states, timestep, encoder_hidden_states, **options)

    @property
    def _concatenates(self) -> bool:
        return bool(self._internal_dict["concat_padding_mask"])


class AutoencoderKLQwenImage(diffusers.AutoencoderKLQwenImage):
    """Autoencoder of images ``(B, 3, H, W)``; videos of one frame pass, too."""

    @property
    def config(self) -> Any:
        """Configuration, with the names that other autoencoders have."""
        own = self._internal_dict
        names = {
            "latent_channels": own["z_dim"],
            "block_out_channels": [own["base_dim"] * factor for factor in own["dim_mult"]],
            "scaling_factor": 1.0,
            "sample_size": None,
        }
        return type(own)({**own, **names})

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """Encode images to a distribution of latents ``(B, C, h, w)``."""
        if x.ndim == 5:
            return super().encode(x, return_dict)
        posterior = super().encode(x.unsqueeze(2)).latent_dist
        image = type(posterior)(posterior.parameters.squeeze(2))
        return SimpleNamespace(latent_dist=image) if return_dict else (image,)

    def decode(self, z: Tensor, return_dict: bool = True) -> Any:
        """Decode latents ``(B, C, h, w)`` to images."""
        if z.ndim == 5:
            return super().decode(z, return_dict)
        images = super().decode(z.unsqueeze(2)).sample.squeeze(2)
        return SimpleNamespace(sample=images) if return_dict else (images,)

    @property
    def tile_sample_min_size(self) -> int:
        """Side of a tile in pixels. Tiles overlap by a quarter, as other autoencoders'."""
        return int(self.tile_sample_min_height)

    @tile_sample_min_size.setter
    def tile_sample_min_size(self, size: int) -> None:
        self.tile_sample_min_height = self.tile_sample_min_width = size
        ratio = self.spatial_compression_ratio
        stride = size * 3 // 4 // ratio * ratio
        self.tile_sample_stride_height = self.tile_sample_stride_width = stride


class AnimaTextConditioner(diffusers.AnimaTextConditioner):
    """Second text encoder: it reads T5's tokens and the states of the language model."""

    @property
    def config(self) -> Any:
        """Configuration, with the name that language models have."""
        own: Mapping[str, Any] = self._internal_dict
        return type(own)({**own, "num_hidden_layers": own["num_layers"]})  # type: ignore[call-arg]

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding of tokens."""
        embedding: nn.Module = self.embed
        return embedding
