"""Blocks under torch.compile: one graph each, the results of the uncompiled layers, few graphs."""

from __future__ import annotations

import copy
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.pytorch_utils import Conv1D

from dora_diffusion.adapters.compiled import compile_blocks, require_compiler
from dora_diffusion.adapters.inject import (
    adapter_parameters,
    disabled,
    inject_adapters,
    merge_adapters,
    set_strength,
    unmerge_adapters,
)
from dora_diffusion.adapters.layers import adapted_layers
from dora_diffusion.adapters.scope import norm_scope
from dora_diffusion.adapters.stack import BASE, AdapterStack
from dora_diffusion.numerics.quantised import quantise
from tests.adapters.helpers import AXES, everything, move
from tests.conftest import unet_config
from tests.refusal import refused


class Blocks(nn.Module):
    """A residual block that widens and a transformer block, of a family's narrow UNet."""

    _no_split_modules = ("BasicTransformerBlock", "ResnetBlock2D")

    def __init__(self, family: str) -> None:
        super().__init__()
        from diffusers import UNet2DConditionModel

        unet: Any = UNet2DConditionModel(**unet_config(family))
        block = unet.down_blocks[-2 if family == "sd1" else -1]
        self.resnet = block.resnets[0]
        self.transformer = block.attentions[0].transformer_blocks[0]
        # A convolution without a bias, besides those with one.
        self.resnet.conv2.register_parameter("bias", None)

    def forward(self, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        x, temb, prompt = inputs
        tokens = self.resnet(x, temb).flatten(2).mT
        y: Tensor = self.transformer(tokens, encoder_hidden_states=prompt)
        return y


def inputs(model: Blocks, side: tuple[int, int] = (6, 4), seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [
        (2, model.resnet.conv1.in_channels, *side),
        (2, model.resnet.time_emb_proj.in_features),
        (2, 5, model.transformer.attn2.to_k.in_features),
    ]
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def blocks(family: str = "sd1", **adapter: Any) -> Blocks:
    torch.manual_seed(0)
    model = Blocks(family).requires_grad_(False)
    inject_adapters(model, everything(**{"conv_rank": 2, **adapter}))
    move(model)
    return model.train()


def compiled(model: nn.Module, backend: Any = "aot_eager") -> nn.Module:
    """A compiled copy, in which a graph break is an error."""
    model = copy.deepcopy(model)
    compile_blocks(model, backend=backend, fullgraph=True)
    return model


def results(model: nn.Module, x: tuple[Tensor, ...], scope: bool = True) -> list[Tensor]:
    """Output and gradients of input and adapters."""
    x = (x[0].clone().requires_grad_(), *x[1:])
    with norm_scope(model) if scope else nullcontext():
        y = model(x)
        y.float().square().mean().backward()
    gradients = [p.grad for p in adapter_parameters(model)]
    for parameter in adapter_parameters(model):
        parameter.grad = None
    return [y.detach(), x[0].grad, *gradients]


def worst(some: list[Tensor], others: list[Tensor]) -> float:
    return max(
        float((a.double() - b.double()).norm() / b.double().norm())
        for a, b in zip(some, others, strict=True)
    )


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("sd1", "output"),
        pytest.param("sdxl", "input", marks=pytest.mark.slow),
        pytest.param("sd1", "input", marks=pytest.mark.slow),
        pytest.param("sdxl", "output", marks=pytest.mark.slow),
        pytest.param("sd1", "lora", marks=pytest.mark.slow),
        pytest.param("sdxl", "lora", marks=pytest.mark.slow),
    ],
)
def test_each_block_is_one_graph_and_computes_the_same(family: str, kind: str) -> None:
    adapter = {"use_dora": False} if kind == "lora" else {"norm_axis": kind}
    model = blocks(family, **adapter)
    x = inputs(model)
    assert worst(results(compiled(model), x), results(model, x)) < 1e-5


# Two layers are traced in a second, where a real block takes several.
class ResnetBlock2D(nn.Module):
    """A convolution and a Linear, with what stands before them in a residual block."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.norm, self.act = nn.GroupNorm(2, channels), nn.SiLU()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.linear = nn.Linear(channels, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.conv(self.act(self.norm(x)))
        return x + self.linear(x.movedim(1, -1)).movedim(-1, 1)


class Stack(nn.Module):
    """One block behind an uncompiled layer; or of two kinds, the first of them twice."""

    _repeated_blocks = ("Stack", "ResnetBlock2D")  # Of these the innermost is compiled.

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, 1)
        self.blocks = nn.Sequential(*blocks)
        self.checkpoints = False

    def forward(self, inputs: tuple[Tensor, ...]) -> Tensor:
        x = self.first(inputs[0])
        for block in self.blocks:
            if self.checkpoints:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


def stack(
    targets: tuple[str, ...] = ("full",), *, two_kinds: bool = False, **adapter: Any
) -> Stack:
    torch.manual_seed(0)
    blocks: list[nn.Module] = [ResnetBlock2D()]
    if two_kinds:
        blocks += [ResnetBlock2D(), nn.Conv2d(8, 12, 1), ResnetBlock2D(12)]
    model = Stack(blocks).requires_grad_(False)
    config = everything(**{"conv_rank": 2, **adapter})
    inject_adapters(model, dataclasses.replace(config, targets=targets))
    move(model)
    return model.train()


def square(side: int | tuple[int, int] = 8, seed: int = 0) -> tuple[Tensor, ...]:
    height, width = (side, side) if isinstance(side, int) else side
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(2, 4, height, width, generator=generator),)


def graphs() -> CompileCounterWithBackend:
    """A backend that counts what is compiled."""
    return CompileCounterWithBackend("eager")


class Only(nn.Module):
    """A block of one layer, of any kind."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


class Alone(nn.Sequential):
    """A model of such a block."""

    _repeated_blocks = ("Only",)


def quantised(layer: nn.Module, kind: Any) -> nn.Module:
    layer.weight = nn.Parameter(quantise(layer.weight, kind), requires_grad=False)  # type: ignore[arg-type]
    return layer


IDS, LINE, IMAGE = (2, 5), (2, 6, 9), (2, 6, 7, 8)
KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Embedding": (lambda: nn.Embedding(11, 8, padding_idx=0), IDS),
    "Conv1D": (lambda: Conv1D(7, 9), LINE),
    "Conv1d": (lambda: nn.Conv1d(6, 9, 3, padding=2, padding_mode="reflect"), LINE),
    "Conv1d, grouped": (lambda: nn.Conv1d(6, 9, 3, stride=2, groups=3, bias=False), LINE),
    "Conv2d, grouped": (lambda: nn.Conv2d(6, 4, 3, padding=1, groups=2), IMAGE),
    "Linear in int8": (lambda: quantised(nn.Linear(9, 7), "int8"), LINE),
    "Linear in nf4": (lambda: quantised(nn.Linear(9, 7), "nf4"), LINE),
    "Conv2d in int8": (lambda: quantised(nn.Conv2d(6, 4, 3, padding=1), "int8"), IMAGE),
    "Conv2d in nf4": (lambda: quantised(nn.Conv2d(6, 4, 3, padding=1), "nf4"), IMAGE),
}


QUICK = [
    ("Embedding", "input"), ("Conv2d, grouped", "input"), ("Linear in nf4", "output"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "axis"),
    [
        pytest.param(kind, axis, marks=[pytest.mark.slow] * ((kind, axis) not in QUICK))
        for kind in KINDS
        for axis in AXES
    ],
)
def test_every_kind_of_layer_is_one_graph(kind: str, axis: str) -> None:
    """Within a norm scope, and without: forward and backward of the uncompiled layer."""
    make, shape = KINDS[kind]
    torch.manual_seed(0)
    model = Alone(Only(make())).requires_grad_(False)
    config = everything(conv_rank=2, norm_axis=axis)
    inject_adapters(model, dataclasses.replace(config, targets=("0.layer",)))
    move(model)
    x = torch.randint(11, shape) if shape == IDS else torch.randn(shape, requires_grad=True)
    other = compiled(model, counter := CompileCounterWithBackend("aot_eager"))

    def results(net: nn.Module, scope: bool) -> list[Tensor]:
        with norm_scope(net) if scope else nullcontext():
            y = net(x)
            leaves = [*adapter_parameters(net), *([x] if x.requires_grad else [])]
            return [y.detach(), *torch.autograd.grad(y.square().mean(), leaves)]

    for scope in (True, False):
        assert worst(results(other, scope), results(model, scope)) < 1e-5
    assert 1 <= counter.frame_count <= 2


def test_blocks_of_a_kind_share_a_graph_and_sizes_become_dynamic() -> None:
    model, counter = stack(two_kinds=True), graphs()
    other = compiled(model, counter)
    for number, side in enumerate([(8, 8), (6, 10), (10, 6), (4, 12), (8, 8)]):
        x = square(side, seed=number)
        assert worst(results(other, x), results(model, x)) < 1e-5
        # Two kinds: of one size first, then of any.
        assert counter.frame_count == (2 if number == 0 else 4)


@pytest.mark.parametrize("axis", AXES)
def test_compiled_layers_compute_from_what_the_scope_made(axis: str, monkeypatch) -> None:
    # Adapted layers that run uncompiled would have it made.
    plain = stack(("blocks.?.conv", "blocks.?.linear"), norm_axis=axis)
    model, reference = compiled(plain, "eager"), results(plain, square())
    monkeypatch.setattr("dora_diffusion.adapters.layers.factors_of", None)
    assert worst(results(model, square()), reference) < 1e-5


def test_rows_without_an_adapter_are_the_base_in_compiled_blocks() -> None:
    """As where prior preservation without images trains."""
    model, x = compiled(stack(("blocks.?.conv", "blocks.?.linear")), "eager"), square()
    with disabled(model):
        base = model(x)
    layers = [layer for _, layer in adapted_layers(model)]
    rows = AdapterStack(layers, [[layer.adapters["default"]] for layer in layers])
    with rows.scope():
        for _ in range(2):
            with rows.of(0):
                assert not torch.allclose(model(x), base)
            with rows.of(BASE):
                torch.testing.assert_close(model(x), base)


@pytest.mark.parametrize("axis", [AXES[0], pytest.param(AXES[1], marks=pytest.mark.slow)])
def test_what_no_plan_serves_is_the_page_without_a_graph_break(axis: str) -> None:
    model = stack(norm_axis=axis)
    other, x = compiled(model, "eager"), square()
    assert worst(results(other, x, scope=False), results(model, x, scope=False)) < 1e-5
    for net in (model, other):
        # Its direction cannot be taken from an output that is all but 0.
        net.blocks[0].conv.adapters["default"].magnitude.data[3] = 1e-12
    assert worst(results(other, x), results(model, x)) < 1e-5
    for net in (model, other):
        set_strength(net, direction=0.5)
    assert worst(results(other, x, scope=False), results(model, x, scope=False)) < 1e-5


def test_switching_merging_and_strengths_reach_compiled_blocks() -> None:
    model = stack()
    other, x = compiled(model, "eager"), square()

    def outputs(net: nn.Module) -> list[Tensor]:
        made = []
        with torch.no_grad():
            with norm_scope(net):
                made.append(net(x))
                with disabled(net):
                    made.append(net(x))
                set_strength(net, 0.5)
                made.append(net(x))
                set_strength(net, 1.0)
            merge_adapters(net, keep_base=True)
            made.append(net(x))
            unmerge_adapters(net)
            with torch.compiler.set_stance("force_eager"):
                made.append(net(x))
        return made

    for ours, reference in zip(outputs(other), outputs(model), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)


def test_checkpointing_autocast_and_an_exception_in_a_step() -> None:
    model = stack()
    other, x = compiled(model), square()
    for net in (model, other):
        net.checkpoints = True
    assert worst(results(other, x), results(model, x)) < 1e-5
    with pytest.raises(RuntimeError, match="expected input"):
        results(other, (torch.ones(2, 5, 8, 8),))
    assert worst(results(other, x), results(model, x)) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        assert worst(results(other, x), results(model, x)) < 3e-2


def test_no_compiled_weight_gradient_in_bf16_is_of_a_map_smaller_than_its_kernel() -> None:
    """OneDNN leaves garbage there: the graph has it in float32."""
    dtypes: list[torch.dtype] = []

    def read(graph: torch.fx.GraphModule, _: Any) -> Any:
        for node in graph.graph.nodes:
            if node.target is torch.ops.aten.convolution_backward.default and node.args[-1][1]:
                grad, _, weight = (argument.meta["val"] for argument in node.args[:3])
                dtypes.extend([grad.dtype] if weight.shape[-1] > 1 else [])  # A's, not B's.
        return make_boxed_func(graph.forward)

    model = Alone(Only(nn.Conv2d(6, 8, 3, padding=1))).bfloat16()
    inject_adapters(model, dataclasses.replace(everything(conv_rank=2), targets=("0.layer",)))
    other = compiled(model, aot_autograd(fw_compiler=read, bw_compiler=read))
    with norm_scope(other):
        other(torch.ones(2, 6, 1, 1).bfloat16()).float().sum().backward()
    assert dtypes == [torch.float32]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_inductor_computes_the_same() -> None:
    model = stack()
    other = copy.deepcopy(model)
    require_compiler("cpu")
    compile_blocks(other, fullgraph=True)
    assert worst(results(other, square()), results(model, square())) < 1e-5


def test_a_missing_compiler_is_one_line_that_says_what_to_install() -> None:
    from torch._inductor import config

    missing = {"cpp.cxx": (None, "no-such-compiler"), "force_disable_caches": True}
    with config.patch(missing), refused("compile", "cpu", "apt install g++", "leave it out"):
        require_compiler("cpu")


def test_on_a_gpu_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise RuntimeError("Cannot find a working triton installation.\nMore information ...")

    monkeypatch.setattr(torch, "compile", refuse)
    with refused("compile", "pip install triton", "(torch says: Cannot find a working triton"):
        require_compiler("cuda")


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="Sequential names no blocks to compile in _repeated"):
        compile_blocks(nn.Sequential(nn.Linear(4, 4)))


def test_what_is_compiled_is_kept_where_nobody_else_writes(monkeypatch, tmp_path) -> None:
    """Torch's own folder has a name that another user can make first, and loads code from it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that it is as before afterwards
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    require_compiler("cpu")
    (folder,) = tmp_path.iterdir()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    require_compiler("cpu")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "mine"
