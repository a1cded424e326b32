"""Averages of weights, which a run uses in place of what it trains."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dora_diffusion.adapters.inject import layer_adapters
from dora_diffusion.config import TrainConfig, differences
from dora_diffusion.export.files import open_model
from dora_diffusion.formats.adapter.file import read_adapter
from dora_diffusion.training import recipe
from dora_diffusion.training.batch import Batches
from dora_diffusion.training.features.validation import Validation
from dora_diffusion.training.inputs.plan import plan_run
from dora_diffusion.training.metrics import TrainingError
from dora_diffusion.training.processes import make_accelerator
from dora_diffusion.training.recipe import assemble, train
from dora_diffusion.training.results import write
from dora_diffusion.training.results.checkpoint import read_state
from dora_diffusion.training.run import Run
from tests.refusal import refused
from tests.training.helpers import accelerator_of_fp16, losses, names, needs_library

Values = dict[str, Tensor]
WORDS = {
    "train_text_encoder_ti": True, "token": "zwq", "instance_prompt": "a zwq mug",
    "embedding_lr": 1e-2,
}  # fmt: skip
ALLOCATED = {
    "parametrization": "adalora", "rank": 4, "target_rank": 2, "allocation_interval": 1,
    "allocation_warmup": 1, "allocation_final": 2, "max_train_steps": 6,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "text encoder": {"train_text_encoder": True, "text_encoder_lr": 1e-3},
    "words": {**WORDS, "train_text_encoder": True, "text_encoder_lr": 1e-3},
    "vera": {"parametrization": "vera", "vera_rank": 4, "learning_rate": 1e-2},
    "pissa, adafactor": {"init": "pissa", "optimizer": "adafactor"},
    "adalora": ALLOCATED,
    "full": {"method": "full", "full_weights": "targets", "learning_rate": 1e-4},
}


AVERAGES: dict[str, dict[str, Any]] = {
    "ema": {"ema_decay": 0.9},
    "adamw": {"optimizer": "adamw-schedule-free", "lr_warmup_steps": 2},
    "prodigy": {"optimizer": "prodigy-schedule-free", "learning_rate": 1.0},
}


def pairs(*quick: tuple[str, str]) -> list[Any]:
    """Each average of each kind of weights; those that are not named are slow."""
    every = [*product(AVERAGES, ["text encoder", "words", "full"]), ("ema", "adalora")]
    assert {*quick} <= {*every}
    return [
        pytest.param(*pair, id="-".join(pair), marks=[pytest.mark.slow] * (pair not in quick))
        for pair in every
    ]


@pytest.fixture
def run(tiny_run: Callable[..., TrainConfig], photos: Path) -> Callable[..., TrainConfig]:
    """Settings of a run of any of `KINDS`, whose photos have the prompt for a caption."""
    for caption in photos.glob("*.txt"):
        caption.unlink()
    return lambda **changes: tiny_run(**{"learning_rate": 1e-3, **changes})


def session_of(config: TrainConfig) -> Run:
    return assemble(plan_run(config), make_accelerator(config))


def values(session: Run) -> Values:
    return {name: p.detach().clone() for name, p in session.weights.parameters().items()}


def used(session: Run) -> Values:
    with session.in_use():
        return values(session)


def are_equal(first: Values, second: Values) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first | second)


# A text encoder is trained beside the words.
@pytest.mark.parametrize("kind", [
    "words", "adalora", "full",
    *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("vera", "pissa, adafactor")),
])  # fmt: skip
def test_it_is_that_of_a_loop_in_float64(kind: str, run: Callable[..., TrainConfig]) -> None:
    """And what trains is that of a run without one, to the last bit."""
    # The share of the first two steps is less than the decay.
    config, decay = run(**{"max_train_steps": 3, **KINDS[kind]}), 0.3
    session, plain = session_of(replace(config, ema_decay=decay)), session_of(config)
    average = {name: value.double() for name, value in values(session).items()}
    for step in range(1, config.max_train_steps + 1):
        session.step(step)
        plain.step(step)
        live, share = values(session), min(decay, (1 + step) / (10 + step))
        for name, value in live.items():
            average[name] += (1 - share) * (value.double() - average[name])
            if "diagonal" in name:
                average[name] *= value != 0
        assert are_equal(live, values(plain))
        found = used(session)
        for name, wanted in average.items():
            torch.testing.assert_close(found[name].double(), wanted, rtol=1e-5, atol=1e-7)
        assert are_equal(live, values(session)), "what trains is put back"
    assert not are_equal(live, found)


def test_it_begins_where_the_run_does(run: Callable[..., TrainConfig], tmp_path: Path) -> None:
    settings = {"start": {"learning_rate": 0.0}, "live": {"ema_decay": 0.0},
                "average": {"ema_decay": 0.9}}  # fmt: skip
    for name, changes in settings.items():
        config = run(method="lora", max_train_steps=1, **changes)
        with contextlib.suppress(TrainingError):  # A rate of 0 moves nothing from its start.
            train(replace(config, output_dir=str(tmp_path / name)))
    start, live, average = (read_adapter(tmp_path / name).layers for name in settings)
    for name, layer in average.items():
        for part in ("down", "up"):
            first, last = (getattr(own[name], part) for own in (start, live))
            torch.testing.assert_close(
                getattr(layer, part), first + 9 / 11 * (last - first), rtol=1e-5, atol=1e-7
            )


def test_triplets_that_are_switched_off_are_so_in_the_average(
    run: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    config = run(**ALLOCATED, ema_decay=0.9, lr_pattern={"mid_block.*": 2e-3})
    train(config)
    ranks = [layer.rank for layer in read_adapter(tmp_path / "out").layers.values()]
    session = session_of(config)
    (unet,) = session.weights.modules.values()
    assert sum(ranks) <= 2 * len(list(layer_adapters(unet))) + ranks.count(1)


@pytest.mark.parametrize("average", AVERAGES)
def test_a_step_that_fp16_skips_leaves_it(average: str, run: Callable[..., TrainConfig]) -> None:
    needs_library(AVERAGES[average].get("optimizer", "adamw"))
    config = run(mixed_precision="fp16", **AVERAGES[average])
    accelerator = accelerator_of_fp16(config, scale=2.0**60)
    session = assemble(plan_run(config), accelerator)
    before = values(session)
    session.step(1)
    assert are_equal(used(session), before)
    accelerator.scaler.update(2.0**10)
    session.step(2)
    assert all(value.isfinite().all() for value in used(session).values())
    assert not are_equal(used(session), before)


@pytest.mark.parametrize("warmup", [0, 3])
def test_the_average_of_schedule_free_adamw_is_the_mean_of_its_z(
    warmup: int, run: Callable[..., TrainConfig]
) -> None:
    """Weighted by the square of the greatest rate so far (arXiv:2405.15682, section 4)."""
    needs_library("adamw-schedule-free")
    session = session_of(run(optimizer="adamw-schedule-free", lr_warmup_steps=warmup))
    names_of = {id(p): name for name, p in session.weights.parameters().items()}
    sums = {name: torch.zeros_like(value).double() for name, value in values(session).items()}
    total = 0.0
    for step in range(1, 5):
        weight = min(1.0, (step - 1) / warmup) ** 2 if warmup else 1.0
        session.step(step)
        for parameter, state in session.step.optimizer.state.items():
            sums[names_of[id(parameter)]] += weight * state["z"].double()
        total += weight
        for name, value in used(session).items() if total else ():
            torch.testing.assert_close(value.double(), sums[name] / total, rtol=1e-4, atol=1e-6)
    assert not are_equal(used(session), values(session))


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("lr_scheduler", {"lr_scheduler": "cosine"}),
        ("ema_decay", {"ema_decay": 0.9}),
        ("adam_beta1", {"adam_beta1": 0.0}),
        ("optimizer", {"parametrization": "adalora"}),
    ],
)
def test_what_a_schedule_free_run_cannot_have(setting: str, values: dict[str, Any]) -> None:
    with refused(setting, "adamw-schedule-free"):
        TrainConfig(optimizer="adamw-schedule-free", **values)


def test_the_beta1_of_a_schedule_free_run_stays() -> None:
    """Its average is defined by it, and other runs may change it."""
    for optimizer, is_kept in (("adamw-schedule-free", True), ("adamw", False)):
        before = TrainConfig(optimizer=optimizer)
        found = differences(before.to_dict(), replace(before, adam_beta1=0.8))
        assert [list(part) for part in found] == [
            ["adam_beta1"] * is_kept, ["adam_beta1"] * (not is_kept)
        ]  # fmt: skip


@pytest.fixture
def uses(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Values]]:
    """Notes of what is validated and sampled, and of the weights that it is done with."""
    sessions: list[Run] = []
    found: list[tuple[str, Values]] = []
    opened, generate, measure = recipe.assemble, write.generate_images, Validation.measure

    def assemble(*args: Any, **options: Any) -> Run:
        sessions.append(opened(*args, **options))
        return sessions[-1]

    def sampled(*args: Any, **kwargs: Any) -> Any:
        found.append(("sampled", values(sessions[-1])))
        return generate(*args, **kwargs)

    def measured(self: Validation, step: int) -> float:
        found.append((f"validated {step}", values(sessions[-1])))
        return measure(self, step)

    monkeypatch.setattr(recipe, "assemble", assemble)
    monkeypatch.setattr(write, "generate_images", sampled)
    monkeypatch.setattr(Validation, "measure", measured)
    return found


def written(folder: Path) -> set[bytes]:
    """The tensors of an adapter's file."""
    adapter = read_adapter(folder)
    tensors = [t for own in adapter.layers.values() for t in (own.down, own.up, own.magnitude)]
    tensors += [rows for vectors in adapter.tokens.values() for rows in vectors.values()]
    return {tensor.numpy().tobytes() for tensor in tensors}


@pytest.mark.parametrize(("average", "kind"), pairs(("adamw", "words"), ("ema", "full")))
def test_what_is_used_is_what_is_saved(
    kind: str, average: str, run: Callable[..., TrainConfig], uses: Any, tmp_path: Path
) -> None:
    """And a run that looks at its weights less often learns the same."""
    needs_library(AVERAGES[average].get("optimizer", "adamw"))
    config = run(
        **{"checkpointing_steps": 2, "validation_split": 1, "validation_loss_steps": 1,
           "num_validation_images": 1, "validation_steps": 2, "validation_inference_steps": 1,
           **KINDS[kind], **AVERAGES[average]}
    )  # fmt: skip
    train(config)
    last = config.max_train_steps or 0
    states = {step: read_state(tmp_path / "out" / f"checkpoint-{step}") for step in (2, last)}
    at = dict(uses)
    by_step = [at["validated 2"], at[f"validated {last}"]]
    for state, validated in zip(states.values(), by_step, strict=True):
        assert are_equal(validated, state["parameters"])
    assert not are_equal(by_step[1], states[last]["live"])
    sampled = [value for what, value in uses if what == "sampled"]
    assert len(sampled) == last / 2 + 1  # At each second step, and of the base.
    assert are_equal(sampled[0], at["validated 2"])
    if kind == "full":
        with open_model(str(tmp_path / "out" / "model")) as model:
            assert are_equal(by_step[1], {n: model[n] for n in by_step[1]})
    elif kind != "adalora":  # Its file has products of what is trained.
        assert written(tmp_path / "out") >= {
            value.numpy().tobytes() for value in by_step[1].values()
        }
    quiet = {"checkpointing_steps": last, "validation_split": 1, "validation_loss_steps": last,
             "num_validation_images": 0, "output_dir": str(tmp_path / "quiet")}  # fmt: skip
    train(replace(config, **quiet))
    assert losses(tmp_path / "quiet") == losses(tmp_path / "out")
    state = read_state(tmp_path / "quiet" / f"checkpoint-{last}")
    assert are_equal(state["parameters"], states[last]["parameters"])
    assert are_equal(state["live"], states[last]["live"])


@pytest.mark.parametrize(
    ("average", "kind"),
    pairs(("adamw", "words"), ("prodigy", "full"), ("ema", "adalora")),
)
def test_a_resumed_run_is_the_whole_one(
    kind: str,
    average: str,
    run: Callable[..., TrainConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the last bit: where it was stopped, and from the checkpoint of an error."""
    needs_library(AVERAGES[average].get("optimizer", "adamw"))
    config = run(
        **{"checkpointing_steps": 2, "output_dir": str(tmp_path / "whole"),
           **KINDS[kind], **AVERAGES[average]}
    )  # fmt: skip
    train(config)
    parted = replace(config, output_dir=str(tmp_path / "parted"))

    def fails(self: Batches) -> Any:
        if self.index == 3:
            raise OSError("the photo is gone")
        return real(self)

    real = Batches.__next__
    with monkeypatch.context() as patch:
        patch.setattr(Batches, "__next__", fails)
        with pytest.raises(OSError, match="gone"), pytest.warns(UserWarning, match="saved first"):
            train(parted)
    assert names(tmp_path / "parted") == ["checkpoint-2", "checkpoint-3"]
    train(replace(parted, resume_from_checkpoint="latest"))
    whole, other = (read_state(tmp_path / name / "checkpoint-4") for name in ("whole", "parted"))
    assert are_equal(whole["parameters"], other["parameters"])
    assert are_equal(whole["live"], other["live"])


def test_the_best_average_is_the_result(
    run: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = {0: 1.0, 1: 0.9, 2: 0.5, 3: 0.7, 4: 0.8}

    def measure(self: Validation, step: int) -> float:
        self.losses[step] = script[step]
        return script[step]

    monkeypatch.setattr(Validation, "measure", measure)
    config = run(ema_decay=0.9, keep_best=True, validation_split=1, validation_loss_steps=1)
    assert train(config).result_step == 2
    state = read_state(tmp_path / "out" / "checkpoint-2")
    for values, is_written in ((state["parameters"], True), (state["live"], False)):
        of_part = {value.numpy().tobytes() for value in values.values()}
        assert (written(tmp_path / "out") >= of_part) == is_written
