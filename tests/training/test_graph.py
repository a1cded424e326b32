"""Steps by graphs, with a stand-in for CUDA's that records operations on a CPU."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dora_diffusion
from dora_diffusion.adapters.layers import adapted_layers
from dora_diffusion.config import TrainConfig, without_effect
from dora_diffusion.training import graph as graph_module
from dora_diffusion.training.graph import GraphedStep, Outputs, step_kind
from dora_diffusion.training.inputs.subject import subjects_of
from dora_diffusion.training.processes import make_accelerator
from dora_diffusion.training.recipe import assemble, train
from dora_diffusion.training.run import Run
from dora_diffusion.training.step import Step
from tests.training.helpers import accelerator_of_fp16, losses, needs_library, open_run, same
from tests.training.test_every_setting import CASES as SETTINGS
from tests.training.test_every_setting import USUAL, filled
from tests.training.test_every_setting import places as places
from tests.z_image import write_z_image

STEPS = 6
WAITS = {f"aten::{name}" for name in ("_local_scalar_dense", "nonzero", "masked_select", "equal")}


class Tape(TorchDispatchMode):
    """Capture on a CPU: each operation with its tensors, which a replay runs again, in place.

    As with a CUDA graph, no Python of the step runs in a replay, each operation reads and writes
    the memory of its capture, and operations that wait for the device are refused.
    """

    replays = 0

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function._schema.name in WAITS:
            raise RuntimeError(f"{function} waits for the device")
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    def capture(self, function: Callable[[], Outputs], other: Tape | None) -> Outputs:
        with self:
            return function()

    def replay(self) -> None:
        Tape.replays += 1
        with torch._C._AutoDispatchBelowAutograd():
            for function, args, kwargs, before in self.calls:
                result = function(*args, **kwargs)
                for old, new in zip(tree_leaves(before), tree_leaves(result), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)

    @property
    def sequence(self) -> list[Any]:
        """Operations with the shapes, strides and dtypes of their tensors and all numbers."""
        return [
            (str(function), *(described(leaf) for leaf in tree_leaves((args, kwargs))))
            for function, args, kwargs, _ in self.calls
        ]


def described(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype
    return repr(value)


@pytest.fixture(autouse=True)
def tape(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Capture on the CPU by a tape."""
    monkeypatch.setitem(graph_module.CAPTURES, "cpu", Tape)
    Tape.replays = 0
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "cuda_graph")
        yield


@pytest.fixture
def opened(sd1_folder: Path, shaped_photos: Path, tmp_path: Path) -> Callable[..., Run]:
    """Opens runs with settings."""

    def make(name: str, folder: Path = sd1_folder, **settings: Any) -> Run:
        values = {"targets": ["attention+conv"], "learning_rate": 1e-3}
        return open_run(folder, shaped_photos, tmp_path / name, **{**values, **settings})

    return make


def records_of(run: Run, steps: int = STEPS) -> list[dict[str, float]]:
    records = [run.step(number) for number in range(1, steps + 1)]
    return [
        {name: float(value) for name, value in record.items() if not isinstance(value, dict)}
        for record in records
    ]


def both(opened: Callable[..., Run], **settings: Any) -> tuple[Run, Run, list[Any], list[Any]]:
    runs = [opened(str(on), **settings, cuda_graph=on) for on in (False, True)]
    assert isinstance(runs[1].step, GraphedStep)
    plain, graphed = map(records_of, runs)
    return *runs, plain, graphed


PRIOR = {"with_prior_preservation": True, "prior_preservation_mode": "image-free"}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"mixed_precision": "bf16"},
    "lora": {"method": "lora"},
    "input axis": {"norm_axis": "input"},
    "prior": {**PRIOR, "class_word": "mug", "train_batch_size": 2, "masked_loss": True},
    "outside of masks": {"unmasked_prior": 0.5, "masked_loss": True, "train_batch_size": 2},
    "text encoders": {"train_text_encoder": True, "caption_dropout": 0.5, "clip_skip": 1},
    "ranks": {"rank_dropout": 0.5, "train_text_encoder": True},
    "dropout": {"lora_dropout": 0.5},
    "checkpointing": {"gradient_checkpointing": True, "train_text_encoder": True},
}


# Of these, a graph holds nothing that it does not hold of a plain run.
LONG = ("lora", "input axis")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (case in LONG)) for case in CASES]
)
def test_a_step_by_a_graph_is_the_ordinary_one(case: str, opened: Callable[..., Run]) -> None:
    """To the bit: losses, norms of gradients, and all parameters after some steps."""
    plain, graphed, expected, found = both(opened, **CASES[case])
    assert found == expected
    assert Tape.replays >= 3  # One of them is compared with an ordinary step.
    for own, other in zip(plain.step.parameters, graphed.step.parameters, strict=True):
        assert torch.equal(own, other)


def test_sdxl_and_new_words(opened: Callable[..., Run], sdxl_folder: Path) -> None:
    """Time ids and pooled outputs; captions with a word that trains, and then does not."""
    words = {
        "train_text_encoder_ti": True, "token": "zwq", "caption_prefix": "zwq",
        "embedding_lr": 1e-2, "train_text_encoder_ti_frac": 0.75,
    }  # fmt: skip
    _, graphed, expected, found = both(opened, folder=sdxl_folder, **words)
    assert found == expected
    # With the words, and for the captions without them.
    assert len({key[0] for key in graphed.step._graphs}) == 2  # type: ignore[attr-defined]


def test_captions_of_other_lengths_have_graphs_of_their_own(
    opened: Callable[..., Run], shaped_photos: Path, tmp_path: Path
) -> None:
    """On a transformer, whose mask of attention depends on them."""
    folder = write_z_image(tmp_path / "z")
    for number, file in enumerate(sorted(shaped_photos.glob("*.txt"))):
        file.write_text(f"sks mug{' on the red table' * (number % 2)}", encoding="utf-8")
    settings = {"targets": ["attention+ff"], "rank_dropout": 0.5}
    plain, graphed, expected, found = both(opened, folder=folder, **settings)
    assert found == expected
    assert Tape.replays >= 2
    assert len(graphed.step._graphs) > 1  # type: ignore[attr-defined]
    for own, other in zip(plain.step.parameters, graphed.step.parameters, strict=True):
        assert torch.equal(own, other)


def test_accumulated_gradients_are_the_sums_of_the_batches(opened: Callable[..., Run]) -> None:
    """Each batch has its graph. Rounding differs from sums in the buffers of one backward pass."""
    settings = {"gradient_accumulation_steps": 3, "caption_dropout": 0.5, "max_grad_norm": 0.0}
    plain, graphed, expected, found = both(opened, **settings)
    assert Tape.replays >= 6
    for own, other in zip(found, expected, strict=True):
        assert own == pytest.approx(other, rel=2e-5)
    start = opened("start", **settings)
    for own, other, before in zip(
        *(r.step.parameters for r in (plain, graphed, start)), strict=True
    ):
        assert (own - other).norm() <= 1e-3 * (own - before).norm()


def test_nothing_moves_from_step_to_step(opened: Callable[..., Run]) -> None:
    run = opened("run", mixed_precision="bf16", cuda_graph=True)
    step, seen = run.step, list[list[int]]()
    update = step.update

    def noted(number: int, losses: list[torch.Tensor]) -> Any:
        trained = list(run.weights.parameters().values())
        gradients = [p.grad for p in trained]
        record = update(number, losses)
        buffers = [
            tensor
            for own in step.stack._buffers.values()
            for tensor in (*own._factors, own._gain, own._shift, *own._gradients, *own._sums)
        ]
        states = [v for state in step.optimizer.state.values() for v in state.values()]
        flat = [group.gradient for group in step.parameters._flat]  # type: ignore[attr-defined]
        every = [*buffers, *gradients, *flat, *step.parameters, *trained, *states]
        seen.append([tensor.data_ptr() for tensor in every])
        return record

    step.update = noted  # type: ignore[method-assign]
    records_of(run, 6)
    assert Tape.replays == 5
    assert len(seen[-1]) > 2 * len(list(run.weights.parameters()))
    assert seen[1:] == [seen[1]] * 5


def test_other_batches_of_a_kind_issue_the_same_operations(opened: Callable[..., Run]) -> None:
    """With the same shapes, strides and numbers: a graph freezes all of them."""
    run = opened("run", **CASES["text encoders"] | {"caption_dropout": 0.0}, cuda_graph=True)
    graphs, sequences = run.step._graphs, []  # type: ignore[attr-defined]
    for number in range(1, 5):
        run.step(number)
        if number % 2 == 0:
            (graph,) = graphs.values()
            sequences.append(graph._capture.sequence)
            graphs.clear()
    assert len(sequences[0]) > 1000
    assert sequences[0] == sequences[1]


def pair(opened: Callable[..., Run], steps: int = 3, **settings: Any) -> tuple[Run, Run]:
    """A plain run and one whose graph was replayed, after some steps."""
    runs = [opened(str(on), **settings, cuda_graph=on) for on in (False, True)]
    for run in runs:
        records_of(run, steps)
    return runs[0], runs[1]


def continued(runs: tuple[Run, Run], numbers: range) -> None:
    """Take the next steps of both runs, which are the same."""
    plain, graphed = ([float(run.step(n)["loss"]) for n in numbers] for run in runs)
    assert plain == graphed


def moved_weight(run: Run) -> None:
    norm = run.components.denoiser.conv_norm_out
    norm.weight.data = norm.weight.data * 1.1


def other_layout(run: Run) -> None:
    _, layer = next(adapted_layers(run.components.denoiser))
    layer.adapters["default"].alpha *= 3


@pytest.mark.parametrize("change", [moved_weight, other_layout])
def test_a_graph_is_dropped_when_what_it_reads_has_moved(
    change: Callable[[Run], None], opened: Callable[..., Run]
) -> None:
    runs = pair(opened)
    before = Tape.replays
    for run in runs:
        change(run)
    continued(runs, range(4, 6))
    assert Tape.replays == before  # Seen, and captured.
    continued(runs, range(6, 8))
    assert Tape.replays == before + 3


def test_steps_whose_norms_are_recomputed_have_no_graph(opened: Callable[..., Run]) -> None:
    runs = pair(opened)
    magnitudes = [p for n, p in runs[1].weights.parameters().items() if n.endswith("magnitude")]
    before, value = Tape.replays, magnitudes[0].detach().clone()
    with torch.no_grad():
        magnitudes[0].mul_(1e-5)  # A small gain.
    runs[1].step(4)
    assert Tape.replays == before + 1
    with pytest.warns(UserWarning, match="cuda_graph: the norm of a layer is ill-conditioned"):
        runs[1].step(5)
    runs[1].step(6)
    assert Tape.replays == before + 1
    assert not runs[1].step._graphs  # type: ignore[attr-defined]
    with torch.no_grad():
        magnitudes[0].copy_(value)
    for number in range(7, 11):  # Without its flags, seen, captured, and compared.
        runs[1].step(number)
    assert Tape.replays == before + 3


def scaled_gradient(tape: Tape, outputs: Outputs) -> None:
    next(iter(outputs.gradients.values())).mul_(1.01)


def stale_input(tape: Tape, outputs: Outputs) -> None:
    outputs.losses.add_(1e-2)


@pytest.mark.parametrize("fault", [scaled_gradient, stale_input])
def test_a_graph_that_computes_something_else_is_not_used(
    fault: Callable[[Tape, Outputs], None], opened: Callable[..., Run], monkeypatch
) -> None:
    replay, capture = Tape.replay, Tape.capture

    def noted(self: Tape, *given: Any) -> Outputs:
        self.outputs = capture(self, *given)
        return self.outputs

    def wrong(self: Tape) -> None:
        replay(self)
        fault(self, self.outputs)

    monkeypatch.setattr(Tape, "capture", noted)
    monkeypatch.setattr(Tape, "replay", wrong)
    runs = pair(opened, 2, lora_dropout=0.5)
    with pytest.warns(UserWarning, match="cuda_graph has no effect from now on because gradients"):
        continued(runs, range(3, 4))
    continued(runs, range(4, 6))
    assert Tape.replays == 1


def test_a_step_that_cannot_be_captured_is_computed_without_a_graph(
    opened: Callable[..., Run], monkeypatch
) -> None:
    real = Step.losses

    def waits(step: Step, *given: Any) -> Any:
        loss, prior = real(step, *given)
        return loss * (float(loss) > 0), prior

    runs = pair(opened, 1)
    monkeypatch.setattr(Step, "losses", waits)
    with pytest.warns(UserWarning, match="capture failed: aten._local_scalar_dense"):
        continued(runs, range(2, 3))
    continued(runs, range(3, 6))
    assert Tape.replays == 0


def test_the_least_recently_used_graph_is_dropped(opened: Callable[..., Run], monkeypatch) -> None:
    monkeypatch.setattr(graph_module, "MOST_GRAPHS", 1)
    settings = {"caption_dropout": 0.5, "train_text_encoder": True, "clip_skip": 1}
    _, graphed, expected, found = both(opened, **settings)
    assert found == expected
    assert len(graphed.step._graphs) == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"method": "full"}, "method is full"),
        ({"parametrization": "vera"}, "parametrization is vera"),
        ({"parametrization": "adalora"}, "parametrization is adalora"),
        ({"init": "pissa"}, "init is pissa"),
        ({"compile": True}, "compile is on"),
        ({"tlora_min_rank": 1}, "tlora_min_rank is 1"),
        ({"gradient_checkpointing": True, "lora_dropout": 0.1}, "gradient_checkpointing reads"),
    ],
)
def test_settings_that_exclude_graphs_say_so(settings: dict[str, Any], reason: str) -> None:
    config = TrainConfig(cuda_graph=True, **settings)
    assert reason in without_effect(config)["cuda_graph"]
    assert step_kind(config, SimpleNamespace()) is Step


def test_devices_and_processes_that_exclude_graphs_say_so(tmp_path: Path, monkeypatch) -> None:
    config = TrainConfig(cuda_graph=True, mixed_precision="no", output_dir=str(tmp_path))
    accelerator = make_accelerator(config)
    assert step_kind(config, accelerator) is GraphedStep
    with pytest.warns(
        UserWarning, match="cuda_graph has no effect because mixed_precision is fp16"
    ):
        assert step_kind(config, accelerator_of_fp16(config)) is Step
    accelerator = make_accelerator(config)
    accelerator.shards = True
    with pytest.warns(UserWarning, match="cuda_graph has no effect because the model is sharded"):
        assert step_kind(config, accelerator) is Step
    monkeypatch.delitem(graph_module.CAPTURES, "cpu")
    with pytest.warns(UserWarning, match="cuda_graph has no effect because there is no CUDA"):
        assert step_kind(config, make_accelerator(config)) is Step


def test_only_runs_with_the_setting_import_the_module() -> None:
    for path in Path(dora_diffusion.__file__).parent.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            assert getattr(node, "module", "") != graph_module.__name__, path


def test_a_whole_run_and_a_resumed_one_are_as_without_graphs(
    tiny_run: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    """Samples, validation, averages and checkpoints between the steps."""
    config = tiny_run(
        max_train_steps=6, checkpointing_steps=4, num_validation_images=1, validation_steps=3,
        validation_split=1, ema_decay=0.5, lora_dropout=0.2,
    )  # fmt: skip
    plain, graphed, again = (
        replace(config, output_dir=str(tmp_path / name), cuda_graph=name != "plain")
        for name in ("plain", "graphed", "again")
    )
    folders = [Path(c.output_dir) for c in (plain, graphed)]
    for each in (plain, graphed):
        train(each)
    assert Tape.replays >= 3
    assert losses(folders[0]) == losses(folders[1])
    assert same(*(folder / "pytorch_lora_weights.safetensors" for folder in folders))
    train(replace(again, resume_from_checkpoint=str(folders[1] / "checkpoint-4")))
    assert same(folders[0], Path(again.output_dir))


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_every_other_setting_is_the_same_with_graphs(
    name: str,
    places: dict[str, Path],
    tmp_path: Path,
    monkeypatch,
) -> None:
    """Losses and norms of gradients, or a reason why there are no graphs."""
    case = SETTINGS[name]
    values = {**USUAL, **case.beside, name: case.value, "max_train_steps": STEPS}
    values |= {"output_dir": str(tmp_path / "out"), "num_train_epochs": None}
    if name == "use_8bit_adam":
        needs_library("adamw8bit")
    if "keep_best" in values or "early_stopping_patience" in values:
        values["learning_rate"] = 1e-3  # With a larger one, norms have to be recomputed.
    monkeypatch.setattr("dora_diffusion.adapters.compiled.require_compiler", lambda device: None)
    monkeypatch.setattr("dora_diffusion.adapters.compiled.compile_blocks", lambda unet: 0)
    runs = []
    for on in (False, True):
        config = TrainConfig(**filled({**values, "cuda_graph": on}, places))
        runs.append(assemble(config, subjects_of(config), make_accelerator(config)))
    if not isinstance(runs[1].step, GraphedStep):
        assert "cuda_graph" in without_effect(config)
        return
    # Batches of up to three sizes.
    steps = 9 if config.aspect_ratio_buckets else STEPS
    plain, graphed = (records_of(run, steps) for run in runs)
    for own, other in zip(graphed, plain, strict=True):
        assert own == pytest.approx(other, rel=1e-4)
    assert Tape.replays >= 2
