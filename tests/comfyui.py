"""The formula of DoRA, and what ComfyUI computes from a file."""

from __future__ import annotations

import torch
from torch import Tensor

from dora_diffusion.numerics.weights import LayerWeights

SUFFIXES = ("lora_down.weight", "lora_up.weight", "alpha", "dora_scale", "diff")


def meant(weight: Tensor, layer: LayerWeights) -> Tensor:
    """The formula of the paper, dense and in float64."""
    changed = weight.double() + layer.scale * layer.up.double() @ layer.down.double()
    if layer.magnitude is None:
        return changed
    dim, shape = (1, (-1, 1)) if layer.norm_axis == "output" else (0, (1, -1))
    return changed * layer.magnitude.double().view(shape) / changed.norm(dim=dim, keepdim=True)


def comfyui(weight: Tensor, file: dict[str, Tensor], *, mended: bool = False) -> Tensor:
    """Return what ComfyUI makes of a weight or of some rows of it.

    ``mended`` divides by the norm after the change, as its pull request 15458 does.
    """
    if "diff" in file:
        return weight + file["diff"].double()
    up, down = file["lora_up.weight"].double(), file["lora_down.weight"].double()
    changed = weight + file["alpha"].item() / down.shape[0] * (up @ down)
    if "dora_scale" not in file:
        return changed
    magnitude = file["dora_scale"].double()
    if magnitude.shape[0] == weight.shape[0]:
        norm = (changed if mended else weight).norm(dim=1, keepdim=True)
    else:
        norm = changed.norm(dim=0, keepdim=True)
    return changed * magnitude / (norm + torch.finfo(torch.float32).eps)


def by_name(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Group a file's tensors by the name of their module, with its prefix."""
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        suffix = next(suffix for suffix in SUFFIXES if key.endswith(f".{suffix}"))
        modules.setdefault(key.removesuffix(f".{suffix}"), {})[suffix] = tensor
    return modules
