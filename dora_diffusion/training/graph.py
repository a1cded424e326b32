"""Training steps as CUDA graphs: from norms to gradients, a batch is issued with one launch.

Batches of the same shapes share a graph, which reads them from fixed tensors. Draws, clipping,
optimizer, averages and logging stay outside of it. A graph reads and writes the addresses that it
was captured with, so it is dropped when one of these tensors has moved.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dora_diffusion.adapters.flags import DeferredFlags
from dora_diffusion.adapters.layout import join, split_like
from dora_diffusion.config import TrainConfig, without_effect
from dora_diffusion.models.offload import send
from dora_diffusion.numerics.quantised import PackedWeight
from dora_diffusion.training.graph_inputs import Inputs
from dora_diffusion.training.processes import shards_model
from dora_diffusion.training.step import Step

MOST_GRAPHS = 8
"""Number of kinds of batches with a graph; the least recently used one is dropped."""
WARM_UPS = 2
"""Number of runs on the stream of a capture, in which libraries allocate and choose kernels."""
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Largest relative error of a replay's gradients, by compute dtype."""


class Outputs(NamedTuple):
    """Tensors that each replay of a graph overwrites.

    Attributes:
        losses: ``(loss, prior)``.
        gradients: Gradient of each parameter that has one.
        flags: Flags of each layout, with the argument ``sizes`` of `DeferredFlags.send`.
    """

    losses: Tensor
    gradients: dict[nn.Parameter, Tensor]
    flags: list[tuple[DeferredFlags, Tensor, Sequence[int]]]


class CudaCapture:
    """CUDA graph of a function."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, function: Callable[[], Outputs], other: CudaCapture | None) -> Outputs:
        """Record a function, in the memory of another capture if there is one."""
        current, stream = torch.cuda.current_stream(), _capture_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                function()
        current.wait_stream(stream)
        options: Any = {"stream": stream, "pool": None if other is None else other._graph.pool()}
        # Other threads may use the device in the meantime.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local", **options):
            return function()

    def replay(self) -> None:
        """Run the recorded operations."""
        self._graph.replay()


@cache
def _capture_stream() -> torch.cuda.Stream:
    """Return the stream of all captures, since libraries keep a workspace for each stream."""
    return torch.cuda.Stream()


CAPTURES: dict[str, Any] = {"cuda": CudaCapture}
"""Type of captures by type of device."""


class GraphFlags(DeferredFlags):
    """Flags that stay on the device.

    Args:
        flags: Flags of the run.
        written: List to which the flags of each layout are added (`Outputs`).
    """

    def __init__(self, flags: DeferredFlags, written: list[Any]) -> None:
        super().__init__()
        self._flags, self._written = flags, written

    def layers(self, flagged: Tensor, sizes: Sequence[int]) -> set[int]:
        self._written.append((self._flags, flagged, sizes))
        return set()


class StepGraph:
    """Graph of one kind of batches.

    Args:
        step: Step of the run.
        batch: The first batch.
        other: Another graph of the run, whose memory is shared; None if there is none.

    Attributes:
        is_checked: Whether a replay was compared with an ordinary step.
    """

    def __init__(self, step: GraphedStep, batch: Inputs, other: StepGraph | None) -> None:
        self.is_checked = False
        drawn, route, encoder, self._fixed = batch.fixed()
        self._device = drawn.batch.latents.device

        def run() -> Outputs:
            written: list[Any] = []
            run_flags = step.stack.flags.items()
            flags = {kind: GraphFlags(deferred, written) for kind, deferred in run_flags}
            encoder.start()
            step.clear()
            with step.stack.scope(flags):
                losses = step.backward(drawn, route)
            return Outputs(losses, step.clear(), written)

        self._capture = CAPTURES[self._device.type]()
        self._outputs: Outputs = self._capture.capture(run, other and other._capture)

    def replay(self, batch: Inputs) -> tuple[Tensor, dict[nn.Parameter, Tensor]]:
        """Compute losses and gradients of a batch. The next replay overwrites the gradients."""
        tensors = [send(tensor, self._device) for tensor in batch.tensors]
        torch._foreach_copy_(self._fixed, tensors)
        self._capture.replay()
        for flags, flagged, sizes in self._outputs.flags:
            flags.send(flagged, sizes)
        return self._outputs.losses.clone(), self._outputs.gradients


class GraphedStep(Step):
    """Step whose gradients are computed by graphs.

    The first batch of a kind is computed without a graph, the second one after the capture, and the
    third one both ways, to compare them.
    """

    is_off = False
    _is_told = False  # Whether a warning has named flagged norms.
    _addresses: Sequence[int] = ()

    def accumulate(self) -> list[Tensor]:
        if self.is_off:
            return super().accumulate()
        self._drop_moved()
        state = tuple(table.trains for table in self.weights.words.tables.values())
        drawn = [self.draw() for _ in range(self.turns)]
        batches = [Inputs.of(batch, self.route(batch), state) for batch in drawn]
        # Flags are read after the draws, since they arrive at the end of the last replay.
        graphs = [] if self._is_flagged() else self._graphs_of(batches)
        if not graphs:
            with self.stack.scope():
                return [self.backward(batch.drawn, batch.route) for batch in batches]
        losses, total = [], dict[nn.Parameter, Tensor]()
        for index, (graph, batch) in enumerate(zip(graphs, batches, strict=True)):
            loss, gradients = graph.replay(batch)
            losses.append(loss)
            if common := [parameter for parameter in gradients if parameter in total]:
                sums = [total[parameter] for parameter in common]
                torch._foreach_add_([gradients[parameter] for parameter in common], sums)
            total = total | gradients
            if index + 1 < self.turns:
                total = _copies(total)
        for parameter, gradient in total.items():
            parameter.grad = gradient
        return losses

    def _graphs_of(self, batches: Sequence[Inputs]) -> list[StepGraph]:
        """Return the graph of each batch; an empty list if one has none yet."""
        known, graphs = set(self._graphs), list[StepGraph | None]()
        for batch in batches:
            graph = self._graphs.pop(batch.key, None)
            graphs.append(graph)
            if graph is None and batch.key in known:
                known.remove(batch.key)
                graph = self._captured(batch)
            self._graphs[batch.key] = graph
        while len(self._graphs) > MOST_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        complete = [graph for graph in graphs if graph is not None]
        if len(complete) < len(batches) or self.is_off:
            return []
        pairs = zip(complete, batches, strict=True)
        is_right = all(graph.is_checked or self._is_right(graph, batch) for graph, batch in pairs)
        return complete if is_right else []

    def _captured(self, batch: Inputs) -> StepGraph | None:
        """Capture the graph of a batch. If that fails, steps are computed without graphs."""
        other = next((graph for graph in self._graphs.values() if graph is not None), None)
        try:
            with self._same_draws():
                return StepGraph(self, batch, other)
        except RuntimeError as error:
            self._turn_off(f"its capture failed: {error}")
            self.__dict__.pop("stack", None)  # Its buffers may hold parts of gradients.
            return None
        finally:
            self.clear()

    def _is_right(self, graph: StepGraph, batch: Inputs) -> bool:
        """Compare a replay with the ordinary step."""
        with self._same_draws(), self.stack.scope():
            loss = self.backward(batch.drawn, batch.route)
        expected = _copies(self.clear())
        with self._same_draws():
            losses, gradients = graph.replay(batch)
        error = float("inf")
        if gradients.keys() == expected.keys():
            replayed = [gradients[parameter] for parameter in expected]
            error = _error([losses, *replayed], [loss, *expected.values()])
        graph.is_checked = error <= ROUNDING[next(self.components.denoiser.parameters()).dtype]
        if not graph.is_checked:
            self._turn_off(f"gradients of its first replay differ by {error:.2g} of their norm")
        return graph.is_checked

    def _same_draws(self) -> AbstractContextManager[None]:
        """Return a context after which the random state is as before."""
        device = self.accelerator.device
        return torch.random.fork_rng([] if device.type == "cpu" else [device])

    def _is_flagged(self) -> bool:
        """Drop all graphs if a norm of the last step is ill-conditioned, which graphs ignore."""
        if not any(flags.is_raised for flags in self.stack.flags.values()):
            return False
        self._graphs.clear()
        if not self._is_told:
            self._is_told = True
            warnings.warn(
                "cuda_graph: the norm of a layer is ill-conditioned, or its base weight has "
                "changed; steps are computed without graphs while norms have to be recomputed",
                stacklevel=4,
            )
        return True

    def _drop_moved(self) -> None:
        """Drop all graphs if a tensor of the model has moved, or the layouts are new."""
        addresses = list[int]()
        for tensor in self._tensors:
            packed = tensor.tensors.values() if isinstance(tensor, PackedWeight) else (tensor,)
            addresses += map(Tensor.data_ptr, packed)
        _, are_new = self.stack.settle()
        if are_new or addresses != self._addresses:
            self._graphs.clear()
        self._addresses = addresses

    def _turn_off(self, reason: str) -> None:
        self.is_off = True
        self._graphs.clear()
        warnings.warn(f"cuda_graph has no effect from now on because {reason}", stacklevel=5)

    def clear(self) -> dict[nn.Parameter, Tensor]:
        """Remove the gradients of all trained parameters. Returns them."""
        gradients = {p: p.grad for p in self._trained if p.grad is not None}
        for parameter in gradients:
            parameter.grad = None
        return gradients

    @cached_property
    def _graphs(self) -> dict[tuple[Any, ...], StepGraph | None]:
        """Graph of each kind of batches, the least recently used first; None: not captured yet."""
        return {}

    @cached_property
    def _trained(self) -> list[nn.Parameter]:
        return list(self.weights.parameters().values())

    @cached_property
    def _tensors(self) -> list[Tensor]:
        """Tensors of the modules that a graph calls."""
        components = self.components
        encoders = components.text_encoders if self.config.encodes_in_steps else ()
        modules = (components.denoiser, *encoders)
        return [t for m in modules for t in (*m.parameters(), *m.buffers())]


def _copies(gradients: Mapping[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
    tensors = list(gradients.values())
    return dict(zip(gradients, split_like(join(tensors), tensors), strict=True))


def _error(replayed: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest error of a tensor, relative to its norm and the mean norm of all."""
    errors = torch.stack(torch._foreach_norm(torch._foreach_sub(replayed, expected)))
    norms = torch.stack(torch._foreach_norm(expected))
    return float((errors / (norms + norms.mean())).max())


def step_kind(config: TrainConfig, accelerator: Any) -> type[Step]:
    """Return the type of the step of a run with ``cuda_graph``.

    Warns:
        UserWarning: If devices or processes exclude graphs.
    """
    if without_effect(config, {"cuda_graph"}):  # Named before the model was loaded.
        return Step
    reason = "the model is sharded" if shards_model(accelerator) else ""
    if accelerator.scaler is not None:
        reason = "mixed_precision is fp16, whose gradient scaler is read in each step; use bf16"
    if accelerator.device.type not in CAPTURES:
        reason = "there is no CUDA device"
    if not reason:
        return GraphedStep
    warnings.warn(f"cuda_graph has no effect because {reason}", stacklevel=2)
    return Step
