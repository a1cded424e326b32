"""Starting tiny-sdxl from tiny-sd: its UNet becomes the core of a larger one.

A level of twice the resolution is put around a trained UNet, whose objects then have twice the
pixels and the same size in its own grid (greedy growing; Vasconcelos et al., arXiv:2405.16759). All
that is new begins as nearly nothing, so that the grown model starts as the small one, seen through
a coarser screen, and trains from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dora_diffusion.models.embedded import model_folder
from dora_diffusion.models.families.stable_diffusion import tokenize

if TYPE_CHECKING:
    from lab.pretrain.sdxl import TextToImageXL


@torch.no_grad()
def grow_from_sd(model: TextToImageXL, captions: Sequence[str]) -> None:
    """Fill a fresh model with what tiny-sd knows.

    Args:
        model: to fill, in place.
        captions: to translate tiny-sd's text states on.
    """
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    folder = model_folder("tiny-sd")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").float().eval()
    # The first encoder has one layer more, which SDXL does not read.
    missing = model.text_encoder.load_state_dict(text_encoder.state_dict(), strict=False)
    assert not missing.unexpected_keys
    translation = _translation(model, text_encoder, tokenize(tokenizer, captions).input_ids)
    core = UNet2DConditionModel.from_pretrained(folder / "unet").state_dict()
    _fill_core(model.unet, core, translation)
    _silence_new_level(model.unet)


def _translation(model: TextToImageXL, text_encoder: Any, token_ids: Tensor) -> Tensor:
    """The best linear map from SDXL's text states to tiny-sd's, (width, widths).

    SDXL reads states before the final normalization, tiny-sd after it.
    """
    wanted = text_encoder(token_ids).last_hidden_state.flatten(0, 1)
    states = model.encode_text(token_ids).encoder_hidden_states.flatten(0, 1)
    ridge = 1e-3 * len(states) * torch.eye(states.shape[1])
    solved = torch.linalg.solve(states.T @ states + ridge, states.T @ wanted)
    return solved.T


def _fill_core(unet: nn.Module, core: dict[str, Tensor], translation: Tensor) -> None:
    filled = {}
    for name, weight in core.items():
        first, _, rest = name.partition(".")
        if first == "down_blocks":
            level, _, rest = rest.partition(".")
            name = f"down_blocks.{int(level) + 1}.{rest}"
        if ".attn2.to_k" in name or ".attn2.to_v" in name:
            weight = weight @ translation
        filled[name] = weight
    unfit = unet.load_state_dict(filled, strict=False)
    assert not unfit.unexpected_keys


def _silence_new_level(unet: Any) -> None:
    """Outer resnets pass on what comes in; the new strides average and repeat."""
    down, up, last = unet.down_blocks[0], unet.up_blocks[-1], unet.up_blocks[-2]
    width = down.resnets[0].conv2.weight.shape[0]
    identity = torch.eye(width)
    for resnet in (*down.resnets, *up.resnets):
        nn.init.zeros_(resnet.conv2.weight)
        nn.init.zeros_(resnet.conv2.bias)
        if resnet.conv_shortcut is not None:
            nn.init.zeros_(resnet.conv_shortcut.weight)
            nn.init.zeros_(resnet.conv_shortcut.bias)
            resnet.conv_shortcut.weight[:, :width, 0, 0] = identity
    for conv in (down.downsamplers[0].conv, last.upsamplers[0].conv):
        nn.init.zeros_(conv.weight)
        nn.init.zeros_(conv.bias)
    # Padding is one pixel: taps 1 and 2 are the two pixels that become one.
    down.downsamplers[0].conv.weight[:, :, 1:, 1:] = identity[:, :, None, None] / 4
    last.upsamplers[0].conv.weight[:, :, 1, 1] = identity
    nn.init.zeros_(unet.add_embedding.linear_2.weight)
    nn.init.zeros_(unet.add_embedding.linear_2.bias)
