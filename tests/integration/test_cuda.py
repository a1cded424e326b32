"""Training, sampling and merging on CUDA: on a real device where there is one, else emulated.

    pytest -m cuda

Reference is the same on the CPU, or a dense computation in float64. What asks the emulation what it
has seen is for it alone.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dora_diffusion.adapters.inject import adapter_parameters, inject_adapters
from dora_diffusion.adapters.layers import adapted_layers
from dora_diffusion.adapters.scope import norm_scope
from dora_diffusion.config import AdapterConfig, TrainConfig
from dora_diffusion.formats.adapter.file import read_adapter
from dora_diffusion.numerics.norms import widens_products
from dora_diffusion.training import optimizer as optimizer_module
from dora_diffusion.training.inputs.plan import plan_run
from dora_diffusion.training.metrics import MetricsLog, TrainingError
from dora_diffusion.training.processes import make_accelerator
from dora_diffusion.training.recipe import assemble, train
from dora_diffusion.training.run import Run
from dora_diffusion.training.step import Step
from tests.integration.emulated import (
    CHECKPOINTED,
    FULL,
    PARTS,
    assert_learned,
    figures,
)
from tests.nvidia import NvidiaGPU, nvidia_gpu
from tests.refusal import refused

pytestmark = pytest.mark.cuda
IS_REAL = torch.cuda.is_available()
# From torch 2.8 on.
WIDENS = widens_products("cuda")
emulated_only = pytest.mark.skipif(IS_REAL, reason="asks the emulation what it has seen")
# float32 on CUDA, and a CPU's, differ by their order of summing; so do two runs with atomic sums.
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 5e-3}

SMALL = {"targets": ["attention+conv"], "conv_rank": 2, "train_text_encoder": True}


@contextmanager
def cuda() -> Iterator[NvidiaGPU | None]:
    """CUDA's device; None says that it is a real one."""
    with nullcontext() if IS_REAL else nvidia_gpu() as gpu:
        yield gpu


def was_trained_on(gpu: NvidiaGPU | None) -> None:
    trains = {"convolution_backward", "native_group_norm_backward", "_fused_adamw_"}
    assert gpu is None or trains <= gpu.operators


@pytest.mark.parametrize(("family", "settings"), [("sd1", FULL), ("sdxl", CHECKPOINTED)])
def test_a_run_learns_what_it_learns_on_the_cpu(family, settings, run, request, monkeypatch):
    """Class images, text encoders and samples in one; dropout that is recomputed in the other."""
    folder = request.getfixturevalue(f"{family}_folder")
    on_cpu, on_gpu = (run(folder, output, **settings) for output in ("cpu", "gpu"))
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        expected = train(on_cpu).adapter
    with cuda() as gpu:
        adapter = train(on_gpu).adapter
        was_trained_on(gpu)
    for name in ("loss", "grad_norm"):
        assert figures(on_gpu, name) == pytest.approx(figures(on_cpu, name), rel=1e-3)
    assert_learned(adapter, expected)


@emulated_only
@pytest.mark.parametrize(
    ("has_bf16", "dtype", "tolerance"),
    [(True, torch.bfloat16, 0.03), (False, torch.float16, 0.01)],
)
def test_auto_is_the_half_precision_that_the_device_has(
    has_bf16, dtype, tolerance, run, sdxl_folder
):
    """fp16 with its gradient scaler before Ampere."""
    settings = {"targets": ["attention"], "gradient_accumulation_steps": 2}
    whole = run(sdxl_folder, "whole", **settings)
    half = run(sdxl_folder, "half", **settings, mixed_precision="auto")
    train(whole)
    with nvidia_gpu(has_bf16) as gpu:
        train(half)
        assert gpu.dtypes & {torch.bfloat16, torch.float16} == {dtype}
        # Norms of bfloat16 weights are products that widen as they read.
        assert ("mm.dtype_out" in gpu.operators) == (WIDENS and dtype == torch.bfloat16)
        assert ("_amp_update_scale_" in gpu.operators) == (dtype == torch.float16)
    assert figures(half, "loss") == pytest.approx(figures(whole, "loss"), rel=tolerance)


@pytest.mark.parametrize(
    "settings",
    [
        CHECKPOINTED | {"targets": ["cross-attention"]},
        SMALL | {"targets": ["cross-attention"], "mixed_precision": "fp16"},
    ],
    ids=["whole", "fp16"],
)
def test_a_run_resumes(settings, run, sd1_folder):
    settings = settings | {"checkpointing_steps": 1, "max_train_steps": 3}
    whole, parts = (run(sd1_folder, name, **settings) for name in ("whole", "parts"))
    with cuda():
        expected = read_adapter(train(whole).adapter).layers
        shutil.copytree(whole.output_dir, parts.output_dir)
        for step in (2, 3):
            shutil.rmtree(Path(parts.output_dir) / f"checkpoint-{step}")
        resumed = run(sd1_folder, "parts", **settings, resume_from_checkpoint="checkpoint-1")
        adapter = read_adapter(train(resumed).adapter).layers
    for name, layer in expected.items():
        for part in PARTS:
            rounding = {"rtol": 1e-3, "atol": 1e-4} if IS_REAL else {"rtol": 0, "atol": 0}
            torch.testing.assert_close(
                getattr(adapter[name], part), getattr(layer, part), **rounding
            )


def two_photos(config: TrainConfig) -> TrainConfig:
    """The settings of a run of two photos, which the first step of two batches encodes."""
    for photo in sorted(Path(config.instance_data_dir).glob("*.jpg"))[2:]:
        photo.unlink()
    return config


def open_on(config: TrainConfig) -> Run:
    return assemble(plan_run(config), make_accelerator(config))


@pytest.mark.parametrize(
    ("family", "checkpointing", "precision"), [("sd1", False, "bf16"), ("sdxl", True, "fp16")]
)
def test_steps_and_their_records_wait_for_nothing(
    family, checkpointing, precision, run, request, tmp_path
):
    """Text encoders, dropped captions and accumulation included, once the photos are encoded."""
    settings = SMALL | {
        "gradient_checkpointing": checkpointing, "caption_dropout": 0.5, "noise_offset": 0.05,
        "mixed_precision": precision, "center_crop": True, "gradient_accumulation_steps": 2,
        "targets": ["cross-attention"],
    }  # fmt: skip
    folder = request.getfixturevalue(f"{family}_folder")
    with cuda():
        session = open_on(two_photos(run(folder, "out", **settings)))
        seen: list[dict[str, float]] = []
        log, records = MetricsLog(tmp_path / "metrics", 0, seen.append), [session.step(1)]
        log.add(records[0])
        torch.cuda.set_sync_debug_mode("error")
        try:
            records.append(session.step(2))
            log.add(records[1])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        log.flush()
        log.close()
        for record, values in zip(records, seen, strict=True):
            assert values["loss"] == float(record["loss"].cpu())


def with_gradients(value):
    """Losses as they are, and gradients that are not what follows from them."""

    def made(step, *given):
        loss, prior = losses(step, *given)
        loss.register_hook(lambda grad: torch.full_like(grad, value))
        return loss, prior

    losses = Step.losses
    return mock.patch.object(Step, "losses", made)


def test_an_fp16_step_that_overflows_changes_nothing_but_the_scale(run, sd1_folder):
    """The next step is the one that would have come without it."""
    settings = SMALL | {"mixed_precision": "fp16", "max_train_steps": 6, "lr_warmup_steps": 4}
    with cuda():
        session = open_on(run(sd1_folder, "out", **settings))
        scaler, step = session.accelerator.scaler, session.step
        session.step(1)
        parameters = session.weights.parameters()
        before = {name: p.detach().clone() for name, p in parameters.items()}
        moments = {
            id(p): {k: v.clone() for k, v in state.items()}
            for p, state in step.optimizer.optimizer.state.items()
        }
        scale = scaler.get_scale()
        with with_gradients(float("inf")):
            record = session.step(2)
        assert not torch.isfinite(record["grad_norm"].cpu())
        assert scaler.get_scale() == scale / 2
        assert all(torch.equal(p, before[name]) for name, p in parameters.items())
        for p, state in step.optimizer.optimizer.state.items():
            assert all(torch.equal(value, moments[id(p)][k]) for k, value in state.items())
        assert all(p.grad is None for p in parameters.values())
        # Warm-up is by the number of the step, which metrics and checkpoints tell: 2 of 4.
        assert step.lr_schedule.last_epoch == 2
        record = session.step(3)
        assert torch.isfinite(record["grad_norm"].cpu())
        assert scaler.get_scale() == scale / 2
        moved = [not torch.equal(p, before[name]) for name, p in parameters.items()]
        assert any(moved)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_gradients_that_are_not_finite_move_nothing_and_are_told_a_step_later(
    optimizer, run, sd1_folder
):
    """The device is not waited for; a fused optimizer stays exactly where it was."""
    settings = SMALL | {
        "mixed_precision": "no", "max_train_steps": 6, "optimizer": optimizer,
        # The photos are encoded in the first step.
        "center_crop": True, "gradient_accumulation_steps": 2, "targets": ["cross-attention"],
    }  # fmt: skip
    with cuda():
        session = open_on(two_photos(run(sd1_folder, "out", **settings)))
        log, step = MetricsLog(None, 0, lambda record: None), session.step
        log.add(session.step(1))
        parameters = session.weights.parameters()
        before = {name: p.detach().clone() for name, p in parameters.items()}
        state = step.optimizer.optimizer.state
        moments = {}
        if optimizer == "adamw":
            moments = {id(p): {k: v.clone() for k, v in state[p].items()} for p in state}
        torch.cuda.set_sync_debug_mode("error")
        try:
            with with_gradients(float("nan")):
                log.add(session.step(2))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(bool(torch.isfinite(p).cpu().all()) for p in parameters.values())
        if moments:
            assert all(torch.equal(p, before[name]) for name, p in parameters.items())
            for p in state:
                assert all(torch.equal(v, moments[id(p)][k]) for k, v in state[p].items())
        with pytest.raises(TrainingError, match="gradients are not finite at step 2"):
            log.flush()
        session.step(3)
        assert not all(torch.equal(p, before[name]) for name, p in parameters.items())


def test_fp16_says_nothing_about_the_order_of_its_steps(run, sd1_folder, recwarn):
    with cuda():
        train(run(sd1_folder, "out", targets=["cross-attention"], mixed_precision="fp16"))
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]


class AdamW8bit(torch.optim.Optimizer):
    """Stand-in for bitsandbytes', where it matters here.

    It takes parameters on CUDA only; moments of large ones are whole numbers with a scale for each
    block, those of others float32.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    assert p.is_cuda
                    self._update(p, group, self.state[p])

    def _update(self, p, group, state):
        if not state:
            for name in ("state1", "state2"):
                state[name] = torch.zeros_like(p, dtype=torch.uint8)
                state[f"absmax{name[-1]}"] = p.new_zeros(())
            state["step"] = 0
        state["step"] += 1
        moments = []
        for name, beta, new in zip(
            ("1", "2"), group["betas"], (p.grad, p.grad.square()), strict=True
        ):
            codes, absmax = state[f"state{name}"], state[f"absmax{name}"]
            moment = (codes.float() / 127 - 1) * absmax if state["step"] > 1 else 0 * new
            moment = beta * moment + (1 - beta) * new
            state[f"absmax{name}"] = moment.abs().max()
            scaled = (moment / state[f"absmax{name}"].clamp_min(1e-30) + 1) * 127
            codes.copy_(scaled.round())
            moments.append(moment / (1 - beta ** state["step"]))
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.sub_(group["lr"] * moments[0] / (moments[1].clamp_min(0).sqrt() + group["eps"]))


@emulated_only
def test_eight_bit_adam_trains_and_resumes(run, sd1_folder, monkeypatch):
    """Each parameter its own, as it quantises by size; moments are saved as they are."""
    library = SimpleNamespace(optim=SimpleNamespace(AdamW8bit=AdamW8bit))
    monkeypatch.setitem(sys.modules, "bitsandbytes", library)
    settings = {
        "targets": ["attention+conv"], "conv_rank": 2, "optimizer": "adamw8bit",
        "checkpointing_steps": 1, "mixed_precision": "fp16", "learning_rate": 1e-4,
    }  # fmt: skip
    whole, parts = (run(sd1_folder, name, **settings) for name in ("whole", "parts"))
    with nvidia_gpu(has_bf16=False) as gpu:
        expected = read_adapter(train(whole).adapter).layers
        shutil.copytree(whole.output_dir, parts.output_dir)
        shutil.rmtree(Path(parts.output_dir) / "checkpoint-2")
        resumed = run(sd1_folder, "parts", **settings, resume_from_checkpoint="checkpoint-1")
        adapter = read_adapter(train(resumed).adapter).layers
        assert torch.uint8 in gpu.dtypes
    for name, layer in expected.items():
        assert all(torch.equal(getattr(layer, p), getattr(adapter[name], p)) for p in PARTS)
    assert any(layer.up.abs().max() > 0 for layer in expected.values())


def test_eight_bit_adam_that_is_not_installed_is_said_before_the_model_is_loaded(
    run, sd1_folder, monkeypatch
):
    monkeypatch.setattr(optimizer_module, "_LIBRARIES", {"adamw8bit": "no_such_library"})
    with cuda(), refused("optimizer", "no_such_library"):
        train(run(sd1_folder, "out", optimizer="adamw8bit"))


class Net(nn.Module):
    """A convolution with a stride, and Linears without and with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3, padding=1, stride=2)
        self.narrow = nn.Linear(16, 12, bias=False)
        self.wide = nn.Linear(12, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.wide(F.silu(self.narrow(F.silu(self.conv(x)).flatten(2).mT)))


def adapted_net(axis: str = "output", moved: float = 0.1) -> Net:
    torch.manual_seed(0)
    net = Net()
    config = AdapterConfig(targets=("full",), rank=4, alpha=2.0, conv_rank=3, norm_axis=axis)
    inject_adapters(net, config)
    with torch.no_grad():
        for parameter in adapter_parameters(net):
            parameter.add_(moved * torch.randn_like(parameter))
    return net


def dense_gradients(net: Net, x: torch.Tensor, upstream: torch.Tensor) -> list[torch.Tensor]:
    """Of x and all parameters: the definition, in float64 on the CPU, norms detached."""
    x = x.double().requires_grad_()
    parameters, weights = [], {}
    for path, layer in adapted_layers(net):
        adapter = layer.adapters["default"]
        own = {n: p.detach().double().requires_grad_() for n, p in adapter.named_parameters()}
        parameters += [own[name] for name, _ in adapter.named_parameters()]
        weight = layer.weight.detach().double()
        delta = (own["up"].flatten(1) @ own["down"].flatten(1)).view_as(weight)
        direction = weight + adapter.alpha / adapter.down.shape[0] * delta
        kept = 0 if adapter.norm_axis == "output" else 1
        dims = [dim for dim in range(weight.ndim) if dim != kept]
        norm = direction.detach().square().sum(dims, keepdim=True).sqrt()
        weights[path] = own["magnitude"].view_as(norm) * direction / norm
    biases = {n: m.bias.detach().double() for n, m in net.named_children() if m.bias is not None}
    hidden = F.conv2d(x, weights["conv"], biases["conv"], padding=1, stride=2)
    hidden = F.silu(F.linear(F.silu(hidden).flatten(2).mT, weights["narrow"]))
    F.linear(hidden, weights["wide"], biases["wide"]).backward(upstream.double())
    return [t.grad for t in (x, *parameters) if t.grad is not None]


@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_gradients_are_those_of_the_dense_definition(axis, dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    net = adapted_net(axis)
    for module in net.children():
        for tensor in (module.weight, module.bias):
            if tensor is not None:  # As the base is loaded: the adapter stays float32.
                tensor.data = tensor.data.to(dtype)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 8, 10, 6, generator=g).to(dtype)
    upstream = torch.randn(2, 15, 24, generator=g).to(dtype)
    expected = dense_gradients(net, x, upstream)
    with cuda() as gpu:
        net.to("cuda")
        on_gpu = x.to("cuda").requires_grad_()
        with norm_scope(net):
            with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                y = net(on_gpu)
            y.backward(upstream.to("cuda", y.dtype))
        found = [on_gpu.grad.cpu(), *(p.grad.cpu() for p in adapter_parameters(net))]
        widened = gpu is not None and "mm.dtype_out" in gpu.operators
        assert gpu is None or widened == (WIDENS and dtype == torch.bfloat16)
    for actual, reference in zip(found, expected, strict=True):
        error = (actual.double() - reference).norm() / reference.norm()
        assert error <= ROUNDING[dtype]


@pytest.mark.parametrize("axis", ["output", "input"])
def test_norms_of_bfloat16_weights_are_exact_to_float32(axis):
    net = adapted_net(axis, moved=0.5)
    for _, layer in adapted_layers(net):
        layer.weight.data = layer.weight.data.bfloat16()
    expected = {}
    for path, layer in adapted_layers(net):
        adapter = layer.adapters["default"]
        up, down = (t.detach().double().flatten(1) for t in (adapter.up, adapter.down))
        scale = adapter.alpha / adapter.down.shape[0]
        direction = layer.weight.double() + scale * (up @ down).view_as(layer.weight)
        kept = 0 if axis == "output" else 1
        dims = [dim for dim in range(direction.ndim) if dim != kept]
        expected[path] = direction.detach().square().sum(dims).sqrt()
    with cuda():
        net.to("cuda")
        with norm_scope(net):
            for path, layer in adapted_layers(net):
                norm = layer.scales("default", layer.adapters["default"]).norm.cpu()
                torch.testing.assert_close(norm.double(), expected[path], rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", ROUNDING)
def test_a_fresh_adapter_changes_no_bit(dtype):
    torch.manual_seed(0)
    with cuda():
        net = Net().to("cuda", dtype)
        x = torch.randn(2, 8, 10, 6).to("cuda", dtype)
        base = net(x)
        inject_adapters(net, AdapterConfig(targets=("full",), rank=4, conv_rank=3))
        with norm_scope(net):
            assert torch.equal(net(x), base)
        assert torch.equal(net(x), base)
