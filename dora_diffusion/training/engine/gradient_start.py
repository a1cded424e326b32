"""LoRA-One's start of A and B (arXiv:2502.01235): the leading part of the loss's gradient.

``-G = U S V'`` of the gradient ``G`` of each weight, and ``B = U_r sqrt(S_r / S_1) / sqrt(gamma)``,
``A = sqrt(S_r / S_1) / sqrt(gamma) V_r'``: the first step of full fine-tuning, cut to rank r, whose
spectral norm is ``1 / gamma``. No gradient of a weight is ever made. `torch.svd_lowrank` finds its
leading part by products with a few vectors, and those are the gradients of an adapter: with
``B = 0`` that of B is ``G A'``, with ``A = 0`` that of A is ``B' G``, both at the base weights.
So it takes the memory of a step with four times the rank, whatever the weights are stored as.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dora_diffusion.adapters.inject import DEFAULT_NAME, AdapterSet
from dora_diffusion.adapters.layers import AdaptedLayer, LayerAdapter
from dora_diffusion.adapters.stack import BASE
from dora_diffusion.data.sampler import generator_for
from dora_diffusion.numerics.dora import adapted_norm
from dora_diffusion.numerics.weights import LayerWeights
from dora_diffusion.training.engine.accelerator import average_gradients
from dora_diffusion.training.engine.objective import StepInputs, noisy_batches, predictions_of
from dora_diffusion.training.engine.step import Learner, TrainingEngine
from dora_diffusion.training.results.metrics import TrainingError

# The paper's gamma, and what its authors' code takes for the sketch, as a multiple of the rank.
GAMMA, OVERSAMPLING = 128.0, 4


def start_from_gradient(learner: Learner, own: AdapterSet, batches: Sequence[StepInputs]) -> float:
    """Give the fresh adapters of a run LoRA-One's start, and m = norm(W + delta).

    Layers that the loss does not reach keep A random and B zero.

    Args:
        learner: Of the run, before its first step.
        own: Its adapters, which are on the model.
        batches: What the gradient is of.

    Returns:
        The drift: how far the start moves the predictions of these batches, relative to them.

    Raises:
        TrainingError: If a gradient is not finite.
    """
    # Or compiled blocks would be compiled for the shapes of three passes.
    with torch.compiler.set_stance("force_eager"):
        probes = _probes(own, learner.config.seed)
        try:
            probes.attach()
            sketches = _sketch(learner, probes, batches)
        finally:
            own.attach()
        layers = [layer for layer, _, _ in own.layers]
        for layer, adapter, sketch in zip(layers, own.trained(), sketches, strict=True):
            _start(layer, adapter, *sketch)
        return _drift(learner, own, batches)


def _probes(own: AdapterSet, seed: int) -> AdapterSet:
    """LoRA in place of adapters, of four times their rank where a layer has as much, with B = 0."""
    generator, made = generator_for("gradient", seed), []
    for (layer, _, keep_output), adapter in zip(own.layers, own.trained(), strict=True):
        weight = layer.dense()
        out, fan_in = weight.shape[0], weight[0].numel()
        rank = min(OVERSAMPLING * adapter.down.shape[0], out, fan_in)
        down = torch.randn(rank, fan_in, generator=generator).view(rank, *weight.shape[1:])
        up = torch.zeros(out, rank, *[1] * (weight.ndim - 2))
        probe = LayerAdapter(LayerWeights(down, up, None, rank, kind=layer.kind))
        probe.dropout = adapter.dropout
        held = nn.ModuleDict({DEFAULT_NAME: probe.to(weight.device)})
        made.append((layer, held, keep_output))
    return AdapterSet(made)


def _sketch(
    learner: Learner, probes: AdapterSet, batches: Sequence[StepInputs]
) -> list[tuple[Tensor, Tensor]]:
    """``G A'`` and ``A`` of each layer, whose orthonormal rows span the leading ones of G."""
    engine, adapters = TrainingEngine([learner], [probes]), probes.trained()
    for part, other in (("up", "down"), ("down", "up")):
        gradients = _gradients(learner, engine, batches, [getattr(a, part) for a in adapters])
        for adapter, gradient in zip(adapters, gradients, strict=True):
            matrix = gradient if part == "up" else gradient.mT
            basis = torch.linalg.qr(matrix)[0]
            kept: Tensor = getattr(adapter, part).data
            kept.copy_((basis if part == "up" else basis.mT).view(kept.shape))
            getattr(adapter, other).data.zero_()
    products = _gradients(learner, engine, batches, [adapter.up for adapter in adapters])
    rows = [adapter.down.detach().flatten(1).cpu() for adapter in adapters]
    return list(zip(products, rows, strict=True))


def _gradients(
    learner: Learner,
    engine: TrainingEngine,
    batches: Sequence[StepInputs],
    parts: list[nn.Parameter],
) -> list[Tensor]:
    """Gradients of some parameters as matrices, on the CPU; 0 of those that no loss reaches.

    Only their directions count, so that fp16's loss scale stays in them; an overflow halves it.
    """
    scaler = learner.accelerator.scaler
    while True:
        engine.accumulate(batches)
        if learner.accelerator.num_processes > 1:
            average_gradients(parts)
        made = [torch.zeros_like(part) if part.grad is None else part.grad for part in parts]
        is_finite = all(bool(gradient.isfinite().all()) for gradient in made)
        for rows in (*engine.parameters(), *learner.words.parameters().values()):
            rows.grad = None
        if is_finite:
            return [gradient.flatten(1).float().cpu() for gradient in made]
        if scaler is None or scaler.get_scale() <= 1:
            raise TrainingError(
                "init lora-one: the gradient of the first batches is not finite; take another "
                "mixed_precision, or init random"
            )
        scaler.update(scaler.get_scale() / 2)


@torch.no_grad()
def _start(layer: AdaptedLayer, adapter: LayerAdapter, product: Tensor, rows: Tensor) -> None:
    """Write the start of a layer; ``product @ rows`` is the leading part of its gradient."""
    rank = adapter.down.shape[0]
    u, s, vh = torch.linalg.svd(product, full_matrices=False)
    if not s[0]:
        return
    share = (s[:rank] / s[0] / GAMMA).sqrt()
    adapter.down.copy_((share[:, None] * (vh[:rank] @ rows)).view(adapter.down.shape))
    adapter.up.copy_((-share * u[:, :rank]).view(adapter.up.shape))
    if adapter.magnitude is not None:
        adapter.magnitude.copy_(adapted_norm(layer.dense(), adapter.weights()))


@torch.no_grad()
def _drift(learner: Learner, own: AdapterSet, batches: Sequence[StepInputs]) -> float:
    """The change of predictions by the adapters, relative to the base model's."""
    stack = TrainingEngine([learner], [own]).stack
    change = total = 0.0
    with stack.scope(), learner.accelerator.autocast():
        for inputs in batches:
            made = []
            for rows in (0, BASE):  # The adapters, and none.
                with stack.of(rows):
                    batch, _ = noisy_batches([learner.objective], [inputs])
                    made.append(predictions_of(batch)[0].double())
            change += float((made[0] - made[1]).square().sum())
            total += float(made[1].square().sum())
    return (change / total) ** 0.5
