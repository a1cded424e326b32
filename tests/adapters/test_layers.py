"""Tensors that layers keep for the backward pass, and norms that are never from old parameters."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from dora_diffusion.adapters.inject import (
    adapter_parameters,
    disabled,
    inject_adapters,
    set_strength,
)
from dora_diffusion.adapters.layers import adapted_layers
from dora_diffusion.adapters.scope import norm_scope
from dora_diffusion.adapters.targets import match_targets
from dora_diffusion.config import AdapterConfig
from dora_diffusion.numerics.devices import default_device
from tests.adapters.helpers import (
    AXES,
    everything,
    kept_by,
    move,
)
from tests.emulation import OneDNN


class Net(nn.Module):
    """A convolution and a Linear, both large enough for either form."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 12, 3, padding=1)
        self.linear = nn.Linear(12, 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(F.silu(self.conv(x)).flatten(2).mT)


def adapted(axis: str = "output", seed: int = 0) -> Net:
    torch.manual_seed(seed)
    net = Net()
    config = AdapterConfig(targets=("full",), rank=2, conv_rank=2, norm_axis=axis)
    inject_adapters(net, config)
    with torch.no_grad():
        for parameter in adapter_parameters(net):
            parameter.add_(0.2 * torch.randn_like(parameter))
    return net


def dense(net: Net, x: torch.Tensor) -> torch.Tensor:
    """The net from its definition in float64, with nothing of ours but the tensors."""
    weights = {}
    for path, layer in adapted_layers(net):
        one = layer.adapters["default"]
        weight, magnitude = layer.weight.double(), one.magnitude.double()
        delta = (one.up.double().flatten(1) @ one.down.double().flatten(1)).view_as(weight)
        direction = weight + one.alpha / one.down.shape[0] * delta
        kept = 0 if one.norm_axis == "output" else 1
        dims = [dim for dim in range(weight.ndim) if dim != kept]
        norm = direction.square().sum(dims, keepdim=True).sqrt()
        weights[path] = magnitude.view_as(norm) * direction / norm
    hidden = F.conv2d(x.double(), weights["conv"], net.conv.bias.double(), padding=1)
    return F.linear(F.silu(hidden).flatten(2).mT, weights["linear"], net.linear.bias.double())


X = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(3))


def optimizer_step(net: Net, **kind: bool) -> None:
    optimizer = torch.optim.AdamW(adapter_parameters(net), lr=0.1, **kind)
    with norm_scope(net):
        net(X).square().mean().backward()
    optimizer.step()


def write_in_place(net: Net) -> None:
    with torch.no_grad():
        for parameter in adapter_parameters(net):
            parameter.add_(0.1)


def write_through_data(net: Net) -> None:
    for parameter in adapter_parameters(net):
        parameter.data.add_(0.1)


def write_base_in_place(net: Net) -> None:
    with torch.no_grad():
        net.conv.weight.mul_(1.5)


def write_base_through_data(net: Net) -> None:
    net.conv.weight.data.mul_(1.5)
    net.linear.weight.data = 0.5 * net.linear.weight.data


def write_one_channel_through_data(net: Net) -> None:
    """Of the output and of the input, the last one."""
    net.linear.weight.data[-1] *= 2
    net.conv.weight.data[:, -1] *= 1.5


def another(net: Net) -> dict[str, torch.Tensor]:
    return adapted(net.linear.adapters["default"].norm_axis, seed=5).state_dict()


MUTATIONS = {
    "in place": write_in_place,
    "through .data": write_through_data,
    "base in place": write_base_in_place,
    "base through .data": write_base_through_data,
    "one channel of the base through .data": write_one_channel_through_data,
    "load_state_dict": lambda net: net.load_state_dict(another(net)),
    "load_state_dict, assigned": lambda net: net.load_state_dict(another(net), assign=True),
    "to another dtype and back": lambda net: net.to(torch.bfloat16).to(torch.float32),
    "foreach optimizer": lambda net: optimizer_step(net, foreach=True),
    "fused optimizer": lambda net: optimizer_step(net, fused=True),
    "plain optimizer": lambda net: optimizer_step(net, foreach=False),
}


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("scoped", [True, False])
def test_no_norm_is_from_old_parameters(mutation, axis, scoped):
    net = adapted(axis)
    with norm_scope(net):
        before = net(X)
    MUTATIONS[mutation](net)
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    if scoped:
        with norm_scope(net):
            after = net(X)
    else:
        after = net(X)
    assert not torch.allclose(after, before, atol=1e-4), "the mutation must matter"
    torch.testing.assert_close(after.double(), dense(net, X), rtol=1e-4, atol=1e-4)


def in_two_processes(function: Callable[..., None], *args: str) -> None:
    """Call it as ``function(rank, *args)``: in forks, which have imported, where a fork can run."""
    forks = sys.platform == "linux" and hasattr(os, "fork") and default_device() == "cpu"
    method = "fork" if forks else "spawn"
    torch.multiprocessing.start_processes(function, args, nprocs=2, start_method=method)


class Blocks(nn.Module):
    """A layer, and two blocks of which each is recomputed."""

    def __init__(self, targets: tuple[str, ...], reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.reentrant = nn.Linear(6, 8), reentrant
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 8, 1))
            for _ in range(2)
        )
        inject_adapters(self, AdapterConfig(targets=targets, rank=2, conv_rank=2))
        with torch.no_grad():
            for parameter in adapter_parameters(self):
                parameter.add_(0.2 * torch.randn_like(parameter))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).mT[..., None]
        for part in self.blocks:
            if self.reentrant is None:
                x = part(x)
            else:
                x = checkpoint(part, x.requires_grad_(), use_reentrant=self.reentrant)
        return x


# What is adapted, how blocks are recomputed, and whether torch is told that nothing changes.
DISTRIBUTED = [
    (("full",), False, False),
    (("blocks.*",), True, False),
    (("full",), True, True),
    (("full",), True, False),
]


def _gradients_of_two(rank: int, store: str, results: str) -> None:
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found: list[Any] = []
    for targets, reentrant, static in DISTRIBUTED:
        net = Blocks(targets, reentrant)
        wrapped = DistributedDataParallel(net, static_graph=static)
        try:
            for _ in range(2):
                net.zero_grad()
                with norm_scope(net):
                    wrapped(INPUTS[rank]).square().mean().backward()
            found.append([p.grad for p in adapter_parameters(net)])
        except RuntimeError as error:
            found.append(str(error))
    torch.save(found, f"{results}/{rank}")
    dist.destroy_process_group()


INPUTS = torch.randn(2, 3, 5, 6, generator=torch.Generator().manual_seed(4))


def test_two_processes_have_the_mean_of_their_gradients_with_recomputed_blocks(tmp_path):
    """Reentrant ones too, or torch says what to do: gradients are never those of one process."""
    in_two_processes(_gradients_of_two, str(tmp_path / "store"), str(tmp_path))
    for rank in (0, 1):
        found = torch.load(tmp_path / str(rank))
        for (targets, *_), shared in zip(DISTRIBUTED[:3], found, strict=False):
            alone = Blocks(targets, None)
            for x in INPUTS:
                with norm_scope(alone):
                    (alone(x).square().mean() / 2).backward()
            torch.testing.assert_close(shared, [p.grad for p in adapter_parameters(alone)])
        assert "_set_static_graph" in found[3]
        assert "reentrant backward passes" in found[3]


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("shape", [(2, 640, 12), (3, 7, 12), (2, 12, 40, 40), (2, 12, 3, 3)])
def test_the_backward_pass_keeps_what_lora_keeps_and_the_output(axis, shape):
    """On either path; the output is what the next layer usually keeps too."""
    layer = nn.Linear(12, 16) if len(shape) == 3 else nn.Conv2d(12, 16, 3, padding=1)
    model = nn.Sequential(layer)
    config = AdapterConfig(targets=("full",), rank=2, conv_rank=2, norm_axis=axis)
    inject_adapters(model, config)
    x = torch.randn(shape, requires_grad=True)
    with norm_scope(model):
        y, kept = kept_by(model, x, model)
    positions = y.numel() // 16
    # On the input axis the scaled input takes the place of the input.
    allowed = x.nbytes + (y.nbytes if axis == "output" else 0)
    assert sum(kept.values()) - allowed <= 2 * 4 * positions, "the rank-wide A x, as LoRA keeps it"


def test_switching_adapters_copies_no_base():
    net = adapted()
    config = AdapterConfig(targets=("full",), rank=2, conv_rank=2)
    inject_adapters(net, config, name="other", generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        for parameter in adapter_parameters(net, "other"):
            parameter.add_(0.1)
    weights = {path: layer.weight.data_ptr() for path, layer in adapted_layers(net)}
    outputs = []
    for off in ("other", "default"):
        with disabled(net, name=off), norm_scope(net):
            outputs.append(net(X))
    set_strength(net, 0.0, name="other")
    assert torch.equal(net(X), outputs[0])
    assert not torch.allclose(*outputs)
    assert {path: layer.weight.data_ptr() for path, layer in adapted_layers(net)} == weights


def unet_keeps(adapt) -> int:
    """Bytes that a UNet of two levels keeps for the backward pass."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    model = UNet2DConditionModel(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    ).requires_grad_(False)
    adapt(model)
    latents = torch.randn(1, 4, 32, 32, requires_grad=True)
    with norm_scope(model):
        _, kept = kept_by(lambda x: model(x, 5, torch.randn(1, 7, 32)).sample, latents, model)
    return sum(kept.values())


def test_a_unet_keeps_the_outputs_of_its_layers_beyond_what_it_keeps_with_peft_lora():
    """Measured where nothing else keeps them; at full size by benchmarks/live_bytes.py."""
    from peft import LoraConfig, inject_adapter_in_model

    def ours(model: nn.Module) -> None:
        inject_adapters(model, AdapterConfig(targets=("attention+conv",), rank=2, conv_rank=2))

    def lora(model: nn.Module) -> None:
        paths = match_targets(model, ["attention+conv"])
        inject_adapter_in_model(LoraConfig(r=2, target_modules=paths), model)

    assert unet_keeps(ours) <= 1.2 * unet_keeps(lora)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d])
@pytest.mark.parametrize("path", ["dora", "lora", "dropout", "several", "no scope"])
def test_taps_that_meet_padding_alone_get_no_gradient_in_bf16(path, kind):
    """A kernel of 3 on a map of one pixel: oneDNN leaves there what it finds in memory."""
    torch.manual_seed(0)
    layer = nn.Sequential(kind(6, 8, 3, padding=1)).bfloat16().train()
    dropout = 1e-6 if path == "dropout" else 0.0
    inject_adapters(layer, everything(use_dora=path != "lora", dropout=dropout))
    if path == "several":
        inject_adapters(layer, everything(), name="second")
    move(layer)
    x = torch.randn(2, 6, *[1] * (layer[0].weight.ndim - 2)).bfloat16()
    with nullcontext() if path == "no scope" else norm_scope(layer), OneDNN():
        layer(x).float().square().sum().backward()
    taps = layer[0].adapters["default"].down.grad.flatten(2)
    center = taps.shape[-1] // 2
    assert taps[..., center].count_nonzero() > 0
    assert torch.equal(taps.count_nonzero(), taps[..., center].count_nonzero())
