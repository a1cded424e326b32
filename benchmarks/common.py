"""Common parts of the cost benchmarks: peers on one base, interleaved timing, kept bytes, tables.

Every figure is a ratio against a named peer of the same process: the peers take turns, round by
round, and a ratio is taken within a round, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from dora_diffusion.cli.main import tune_process

tune_process()  # As the commands do, before torch starts: for all peers.

import torch
from full_size import UNETS
from torch import Tensor, nn

from dora_diffusion.adapters.inject import inject_adapters
from dora_diffusion.adapters.layers import LayerAdapter
from dora_diffusion.adapters.scope import NormCache, norm_scope
from dora_diffusion.adapters.targets import match_targets
from dora_diffusion.config import AdapterConfig
from dora_diffusion.training.optimizer import FlatParameters

FROZEN, LORA, PEFT_DORA, LYCORIS, OURS = (
    "frozen", "PEFT LoRA", "PEFT DoRA", "LyCORIS DoRA", "this DoRA",
)  # fmt: skip
PEERS = (FROZEN, LORA, PEFT_DORA, LYCORIS, OURS)
# Training loops of other programs, which open a norm scope for each step.
LOOP, LOOP_CACHED = f"{OURS}, norm_scope", f"{OURS}, norm_scope with cache"
OUR_WAYS = (OURS, LOOP, LOOP_CACHED)
Scope = Callable[[], AbstractContextManager[None]]


def machine() -> str:
    """The processor, its cores, and what runs on it."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        names = [
            line.split(":", 1)[1].strip() for line in info.splitlines() if "model name" in line
        ]
        model = names[0] if names else model
        model += " with AMX" if "amx_tile" in info else ""
    versions = ((name, _version(name)) for name in ("torch", "peft", "lycoris-lora"))
    packages = ", ".join(f"{name} {version}" for name, version in versions if version)
    threads = torch.get_num_threads()
    used = "one thread, processor time" if threads == 1 else f"{threads} threads, wall-clock time"
    return f"{os.cpu_count()} cores of an {model}; {used}; {packages}"


def _version(package: str) -> str:
    """Return the version of an installed package, else nothing."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of the module tree over the very same frozen parameters: peers fit in memory."""
    same = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, same)


@dataclass
class Peer:
    """A model with or without adapters, and what one optimizer step opens around it."""

    model: nn.Module
    scope: Scope = nullcontext
    beside: nn.Module | None = None

    def parameters(self) -> list[nn.Parameter]:
        """Trained parameters."""
        return [p for p in (self.beside or self.model).parameters() if p.requires_grad]


def flat_by_role(
    adapters: Sequence[LayerAdapter], order: Sequence[nn.Parameter] = ()
) -> FlatParameters:
    """Parameters of adapters in groups of A, B and m, as a run has them.

    Args:
        adapters: The adapters.
        order: As in `FlatParameters`.
    """
    roles = zip(*(adapter.parameters() for adapter in adapters), strict=True)
    return FlatParameters([{"params": list(role)} for role in roles], order)


def make_peer(name: str, base: nn.Module, targets: Sequence[str], rank: int) -> Peer:
    """One of `PEERS` or `OUR_WAYS` over a frozen base, its adapter moved so that nothing is 0."""
    model = shared_copy(base.requires_grad_(False))
    torch.manual_seed(0)
    if name in OUR_WAYS:
        config = AdapterConfig(
            targets=tuple(targets), rank=rank, alpha=rank, conv_rank=rank, conv_alpha=rank
        )
        inject_adapters(model, config)
        cache = NormCache() if name == LOOP_CACHED else None
        peer = Peer(model, lambda: norm_scope(model, cache=cache))
    elif name in (LORA, PEFT_DORA):
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(
            r=rank, lora_alpha=rank, use_dora=name == PEFT_DORA, target_modules=list(targets)
        )
        peer = Peer(inject_adapter_in_model(config, model))
    elif name == LYCORIS:
        peer = Peer(model, beside=_lycoris(model, targets, rank))
    else:
        peer = Peer(model)
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(1e-3 * torch.randn_like(parameter))
    return peer


def _lycoris(model: nn.Module, targets: Sequence[str], rank: int) -> nn.Module:
    """LyCORIS keeps its modules beside the model, and replaces the forward of each layer."""
    from lycoris.modules.locon import LoConModule

    modules = []
    for path in targets:
        layer = model.get_submodule(path)
        modules.append(LoConModule(path, layer, lora_dim=rank, alpha=rank, weight_decompose=True))
        modules[-1].apply_to()
    return nn.ModuleList(modules)


def clock() -> float:
    """Seconds: processor time where one thread works, which a busy machine does not stretch."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def seconds(function: Callable[[], object], repeats: int = 1) -> float:
    """Time of one call, as the mean of some."""
    begun = clock()
    for _ in range(repeats):
        function()
    return (clock() - begun) / repeats


def interleaved(
    functions: Mapping[str, Callable[[], object]], rounds: int, at_least: float = 0.0
) -> dict[str, list[float]]:
    """Seconds per call, round by round in turns.

    Before each sample comes a call that does not count: whoever follows a peer that uses much
    memory would pay for getting its own back from the system.

    Args:
        functions: What to time, by name.
        rounds: Samples of each.
        at_least: A sample repeats its call until it lasts about so many seconds.
    """
    repeats = 1
    if at_least:
        for function in functions.values():
            function()
        fastest = min(seconds(function) for function in functions.values())
        repeats = max(1, round(at_least / fastest))
    samples: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for number in range(rounds):
        # Each round starts with another peer: no one always runs after the same neighbour.
        start = number % len(names)
        for name in names[start:] + names[:start]:
            functions[name]()
            samples[name].append(seconds(functions[name], repeats))
    return samples


@dataclass(frozen=True)
class Ratio:
    """Median of the ratios of all rounds, and half of their interquartile range."""

    median: float
    spread: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ± {self.spread:.2f}"


def ratio(samples: Mapping[str, Sequence[float]], name: str, to: str = LORA) -> Ratio:
    """Time of one peer relative to another's."""
    ratios = sorted(a / b for a, b in zip(samples[name], samples[to], strict=True))
    if len(ratios) < 3:
        return Ratio(statistics.median(ratios), (ratios[-1] - ratios[0]) / 2)
    low, _, high = statistics.quantiles(ratios, n=4)
    return Ratio(statistics.median(ratios), (high - low) / 2)


def step(peer: Peer, forward: Callable[[nn.Module], Tensor], upstream: Tensor) -> None:
    """Forward and backward of one optimizer step, gradients dropped as ``zero_grad`` does."""
    with peer.scope():
        y = forward(peer.model)
        if y.requires_grad:
            y.backward(upstream)
    for parameter in peer.parameters():
        parameter.grad = None


@contextmanager
def kept_storages(own: Iterable[Tensor]) -> Iterator[dict[int, int]]:
    """Bytes of each storage that autograd keeps inside, but for those of ``own``."""
    known = {tensor.untyped_storage()._cdata for tensor in own}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def kept_bytes(peer: Peer, forward: Callable[[nn.Module], Tensor]) -> int:
    """Bytes that the forward pass keeps for the backward pass, parameters not counted."""
    model = peer.model
    own = (*model.parameters(), *model.buffers(), *peer.parameters())
    with peer.scope(), kept_storages(own) as kept:
        y = forward(model)
        total = sum(kept.values())
        del y
    return total


@dataclass(frozen=True)
class LayerShape:
    """A layer as the UNet uses it: what it is, and what it sees."""

    weight: tuple[int, ...]
    stride: int
    bias: bool
    input: tuple[int, ...]

    def make(self) -> nn.Module:
        """A layer of this shape with random weights."""
        out, fan_in = self.weight[:2]
        if len(self.weight) == 2:
            return nn.Linear(fan_in, out, bias=self.bias)
        kernel = self.weight[2]
        return nn.Conv2d(
            fan_in, out, kernel, stride=self.stride, padding=kernel // 2, bias=self.bias
        )

    def __str__(self) -> str:
        out, fan_in = self.weight[:2]
        if len(self.weight) == 2:
            return f"Linear {fan_in} → {out}, {self.input[1]} rows"
        kernel, side = self.weight[2], self.input[2]
        strided = f" / {self.stride}" if self.stride > 1 else ""
        return f"Conv {kernel}x{kernel}{strided} {fan_in} → {out}, {side}x{side}"


def unet(family: str) -> nn.Module:
    """The UNet of a family with random weights, on the current default device."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(**UNETS[family]).requires_grad_(False)


def unet_inputs(family: str, latent: int, batch: int = 1) -> dict[str, object]:
    """Keyword arguments of one call of the UNet, latents requiring a gradient."""
    width = UNETS[family]["cross_attention_dim"]
    inputs: dict[str, object] = {
        "sample": torch.randn(batch, 4, latent, latent).requires_grad_(),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": torch.randn(batch, 77, width),
    }
    if family == "sdxl":
        ids = torch.full((batch, 6), 1024.0)
        inputs["added_cond_kwargs"] = {"text_embeds": torch.randn(batch, 1280), "time_ids": ids}
    return inputs


def layer_shapes(family: str, latent: int) -> dict[LayerShape, int]:
    """The adapted layer shapes of a family's UNet and how often each occurs, without computing."""
    with torch.device("meta"):
        model = unet(family)
        counts: dict[LayerShape, int] = {}

        def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            stride = module.stride[0] if isinstance(module, nn.Conv2d) else 1
            shape = LayerShape(
                tuple(module.weight.shape), stride, module.bias is not None, tuple(args[0].shape)
            )
            counts[shape] = counts.get(shape, 0) + 1

        for path in match_targets(model, ["attention+conv"]):
            model.get_submodule(path).register_forward_pre_hook(see)
        model(**unet_inputs(family, latent))
    return counts


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table as the documents print it."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def save(path: Path | None, figures: object) -> None:
    """Write the figures as JSON, with the machine that they come from."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            json.dumps({"machine": machine(), "figures": figures}, indent=1) + "\n",
            encoding="utf-8",
        )
