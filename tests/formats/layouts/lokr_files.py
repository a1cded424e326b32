"""Random LoKr files, and the formulas of the programs that read them, in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


def divisors(size: int) -> tuple[int, int]:
    """Return the most equal pair of divisors, the smaller first."""
    small = max(n for n in range(1, math.isqrt(size) + 1) if size % n == 0)
    return small, size // small


def lokr(
    weight: Tensor, w1: str = "whole", w2: str = "whole", *, alpha: float | None = 3.0,
    axis: str | None = None, seed: int = 0, size: float = 0.8,
) -> dict[str, Tensor]:  # fmt: skip
    """Tensors of a LoKr on a weight: each factor "whole", "low" (rank), or w2 "tucker"."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return size * torch.randn(*shape, generator=generator)

    (a, c), (b, d) = divisors(weight.shape[0]), divisors(weight.shape[1])
    kernel, taps = weight.shape[2:], weight.shape[2:].numel()
    first = {"whole": {"lokr_w1": draw(a, b)},
             "low": {"lokr_w1_a": draw(a, 1), "lokr_w1_b": draw(1, b)}}  # fmt: skip
    second = {"whole": {"lokr_w2": draw(c, d, *kernel)},
              "low": {"lokr_w2_a": draw(c, 2), "lokr_w2_b": draw(2, d * taps)},
              "tucker": {"lokr_t2": draw(2, 2, *kernel), "lokr_w2_a": draw(2, c),
                         "lokr_w2_b": draw(2, d)}}  # fmt: skip
    tensors = first[w1] | second[w2]
    if alpha is not None:
        tensors["alpha"] = torch.tensor(alpha)
    if axis:
        dim = ("output", "input").index(axis)
        norm = weight.transpose(0, dim).flatten(1).norm(dim=1)
        shape = [1] * weight.ndim
        shape[dim] = -1
        tensors["dora_scale"] = (norm * (1 + draw(len(norm)) / 4)).view(shape)
    return tensors


def delta(weight: Tensor, file: Mapping[str, Tensor]) -> Tensor:
    """The change of a weight by ComfyUI's formula (comfy/weight_adapter/lokr.py)."""
    part = {key.removeprefix("lokr_"): tensor.double() for key, tensor in file.items()}
    w1, w2, rank = part.get("w1"), part.get("w2"), None
    if w1 is None:
        rank, w1 = part["w1_b"].shape[0], part["w1_a"] @ part["w1_b"]
    if w2 is None:
        rank = part["w2_b"].shape[0]
        w2 = part["w2_a"] @ part["w2_b"] if "t2" not in part else torch.einsum(
            "ijkl,jr,ip->prkl", part["t2"], part["w2_b"], part["w2_a"]
        )  # fmt: skip
    scale = part["alpha"].item() / rank if rank and "alpha" in part else 1.0
    w1 = w1[:, :, None, None] if w2.ndim == 4 else w1
    return scale * torch.kron(w1, w2.contiguous()).reshape(weight.shape)


def changed(weight: Tensor, file: Mapping[str, Tensor], *, by_base: bool = False) -> Tensor:
    """``m (W + delta) / norm(W + delta)``; or on the output axis with ComfyUI's ``norm(W)``."""
    total = weight.double() + delta(weight, file)
    if "dora_scale" not in file:
        return total
    magnitude = file["dora_scale"].double()
    is_output = magnitude.shape[0] == weight.shape[0]
    source = weight.double() if by_base and is_output else total
    keep = 0 if is_output else 1
    norm = source.transpose(0, keep).flatten(1).norm(dim=1)
    return total * magnitude / norm.view(magnitude.shape)


def save(path: Path, layers: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """Write the tensors of layers by the name of each in the file."""
    tensors = {f"{n}.{key}": t for n, file in layers.items() for key, t in file.items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest number."""
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()
