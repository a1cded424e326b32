"""Training steps as CUDA graphs: from norms to gradients, a batch is issued with one launch.

Batches of the same shapes share a graph, which reads them from fixed tensors. Draws, clipping,
optimizer, averages and logging stay outside of it. A graph reads and writes the addresses that it
was captured with, so it is dropped when one of these tensors has moved.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields, is_dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dora_diffusion.adapters.layout import DeferredFlags, join, split_like
from dora_diffusion.config import TrainConfig, without_effect
from dora_diffusion.models.offload import send
from dora_diffusion.models.text import Conditioning
from dora_diffusion.numerics.quantised import PackedWeight
from dora_diffusion.training.conditioner import Reading
from dora_diffusion.training.hooks.hook import RankRoute
from dora_diffusion.training.prediction import Drawn, Question, encodings
from dora_diffusion.training.processes import shards_model
from dora_diffusion.training.step import Step

MOST_GRAPHS = 8
"""Number of kinds of batches with a graph; the least recently used one is dropped."""
WARM_UPS = 2
"""Number of runs on the stream of a capture, in which libraries allocate and choose kernels."""
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest error of a gradient of a replay relative to an ordinary step, by compute dtype."""


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


class Capture(Protocol):
    """Recorded operations of a function."""

    def capture(self, function: Callable[[], Outputs], other: Any) -> Outputs:
        """Record a function, in the memory of another capture if there is one."""

    def replay(self) -> None:
        """Run the recorded operations."""


class CudaCapture:
    """CUDA graph of a function."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, function: Callable[[], Outputs], other: CudaCapture | None) -> Outputs:
        current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
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
        self._graph.replay()


CAPTURES: dict[str, Callable[[], Capture]] = {"cuda": CudaCapture}
"""Type of captures by type of device."""


class Inputs(NamedTuple):
    """Batch of a step, with everything that its graph reads.

    Attributes:
        drawn: The batch and its questions.
        route: Rank masks of the batch.
        parts: Tensors of the batch, its captions and its masks, nested.
        tensors: The same tensors in a list.
        key: Shapes and dtypes of the tensors, and everything else that decides on operations.
    """

    drawn: Drawn
    route: RankRoute
    parts: tuple[Any, ...]
    tensors: list[Tensor]
    key: tuple[Any, ...]

    @classmethod
    def of(cls, drawn: Drawn, route: RankRoute, state: object) -> Inputs:
        """Read the captions of a batch, and collect its tensors.

        Args:
            drawn: The batch.
            route: Its rank masks.
            state: State of the model that decides on operations.
        """
        batch, questions, tensors = drawn.batch, drawn.distinct(), list[Tensor]()
        calls = [*encodings(drawn.of_base()), *encodings(drawn.trained())]
        readings = [encode.read(captions) for encode, captions in calls]
        parts = batch.inputs, batch.latents, batch.noise, batch.mask, batch.weights
        parts += readings, route.masks

        def signature(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
            tensors.append(tensor)
            return tensor.shape, tensor.dtype

        key = (
            state,
            _with_tensors(parts, signature),
            tuple(tuple(map(questions.index, term)) for term in drawn.questions),
            tuple((q.ask.rows, q.ask.of_base, len(q.ask.captions)) for q in questions),
            (batch.photos, *batch.class_captions),
            tuple(batch.masked_rows),
        )
        return cls(drawn, route, parts, tensors, key)

    def fixed(self) -> tuple[Drawn, RankRoute, FixedEncoder, list[Tensor]]:
        """Copy the batch to tensors that stay. Returns also the encoder of its captions."""
        batch, term = self.drawn.batch, self.drawn.questions[0]
        tensors = [send(tensor, batch.latents.device).clone() for tensor in self.tensors]
        copies = iter(tensors)
        inputs, latents, noise, mask, weights, readings, masks = _with_tensors(
            self.parts, lambda _: next(copies)
        )
        encoder: Any = FixedEncoder(term[0].encode, readings)
        batch = replace(
            batch, inputs=inputs, latents=latents, noise=noise, mask=mask, weights=weights,
            generators=(), _indices={},
        )  # fmt: skip
        questions = [
            [Question(question.ask, batch, encoder) for question in term]
            for term in self.drawn.questions
        ]
        return Drawn(batch, questions), RankRoute(masks, self.route.active), encoder, tensors


def _with_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Return a nested value with changed tensors, and tuples in place of lists."""
    if isinstance(value, Tensor):
        return change(value)
    if is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in fields(value)]
        return replace(value, **{n: _with_tensors(getattr(value, n), change) for n in names})
    if not isinstance(value, list | tuple):
        return value
    children = [_with_tensors(child, change) for child in value]
    return type(value)(*children) if hasattr(value, "_fields") else tuple(children)


class FixedEncoder:
    """Encoder of a graph's captions, which is called once for each forward pass, in their order.

    Args:
        encode: Encoder of the run.
        readings: Captions of each call.
    """

    def __init__(self, encode: Any, readings: Sequence[Reading]) -> None:
        self.trains = encode.trains
        self._encode, self._readings = encode.encode, readings

    def start(self) -> None:
        """Begin a step."""
        self._left = iter(self._readings)

    def __call__(self, captions: Sequence[str]) -> Conditioning:
        encoded: Conditioning = self._encode(next(self._left))
        return encoded


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
            flags = {kind: GraphFlags(own, written) for kind, own in step.stack.flags.items()}
            encoder.start()
            step.clear()
            with step.stack.scope(flags):
                losses = step.backward(drawn, route)
            return Outputs(losses, step.clear(), written)

        self._capture = CAPTURES[self._device.type]()
        self._outputs = self._capture.capture(run, other and other._capture)

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
        if self.is_off or self._is_flagged():
            return super().accumulate()
        self._drop_moved()
        words, batches = self.weights.words.tables.values(), []
        for _ in range(self.turns):
            drawn = self.draw()
            state = tuple(table.trains for table in words)
            batches.append(Inputs.of(drawn, self.route(drawn), state))
        graphs = self._graphs_of(batches)
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
            self.__dict__.pop("stack")  # Its buffers may hold parts of gradients.
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
            found = [gradients[parameter] for parameter in expected]
            error = _error([losses, *found], [loss, *expected.values()])
        graph.is_checked = error <= ROUNDING[next(self.components.unet.parameters()).dtype]
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
            parts = tensor.tensors.values() if isinstance(tensor, PackedWeight) else (tensor,)
            addresses += map(Tensor.data_ptr, parts)
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
        modules = (components.unet, *encoders)
        return [t for m in modules for t in (*m.parameters(), *m.buffers())]


def _copies(gradients: Mapping[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
    tensors = list(gradients.values())
    return dict(zip(gradients, split_like(join(tensors), tensors), strict=True))


def _error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest error of a tensor, relative to its norm and the mean norm of all."""
    errors = torch.stack(torch._foreach_norm(torch._foreach_sub(found, expected)))
    norms = torch.stack(torch._foreach_norm(expected))
    return float((errors / (norms + norms.mean())).max())


def step_kind(config: TrainConfig, accelerator: Any) -> type[Step]:
    """Return the type of the step of a run with ``cuda_graph``.

    Warns:
        UserWarning: If devices or processes exclude graphs.
    """
    if without_effect(config, {"cuda_graph"}):  # Named before the model was loaded.
        return Step
    reasons = {
        "there is no CUDA device": accelerator.device.type not in CAPTURES,
        "the gradient scaler of mixed_precision fp16 is read in each step": (
            accelerator.scaler is not None
        ),
        "the model is sharded": shards_model(accelerator),
    }
    reason = next((reason for reason, is_there in reasons.items() if is_there), None)
    if reason is None:
        return GraphedStep
    warnings.warn(f"cuda_graph has no effect because {reason}", stacklevel=2)
    return Step
