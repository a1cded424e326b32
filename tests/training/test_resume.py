"""Resuming: to the same bits, with what may change, and from nothing that does not fit."""

from __future__ import annotations

import shutil
import signal
from dataclasses import replace

import pytest
import torch

from dora_diffusion.config import ConfigError, TrainConfig
from dora_diffusion.formats.adapter.file import read_adapter
from dora_diffusion.training import inputs
from dora_diffusion.training.continuity import batches_seen, segment
from dora_diffusion.training.events import StepDone, TrainingStarted
from dora_diffusion.training.loop import train
from tests.training.helpers import assert_same_adapter, losses, make_config, names, same, steps_in


def test_a_finished_run_is_extended_from_its_last_step(tiny_run, tmp_path):
    whole = tiny_run(max_train_steps=5, checkpointing_steps=2, output_dir=str(tmp_path / "whole"))
    train(whole)
    short = tiny_run(max_train_steps=3, checkpointing_steps=2)
    assert train(short).checkpoint == tmp_path / "out" / "checkpoint-3"
    assert names(tmp_path / "out") == ["checkpoint-2", "checkpoint-3"]
    events = []
    train(replace(short, max_train_steps=5, resume_from_checkpoint="latest"), events.append)
    (start,) = (event for event in events if isinstance(event, TrainingStarted))
    assert (start.step, start.resumed_from, start.steps_dropped) == (3, "checkpoint-3", 0)
    assert same(tmp_path / "whole", tmp_path / "out")
    assert steps_in(tmp_path / "out") == [1, 2, 3, 4, 5]


def test_steps_that_are_trained_again_are_said(tiny_run, tmp_path, capsys):
    from dora_diffusion.console.training import TrainProgress

    config = tiny_run(checkpointing_steps=2)
    train(config)
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    show = TrainProgress()
    train(replace(config, max_train_steps=5, resume_from_checkpoint="latest"), show)
    show.close()
    line = "resuming from checkpoint-2, at step 2 of 5; steps 3 to 4 are repeated"
    assert line in capsys.readouterr().out.splitlines()


def test_fewer_steps_than_the_checkpoint_has_is_an_error(tiny_run, tmp_path):
    config = tiny_run(checkpointing_steps=2)
    train(config)
    before = (tmp_path / "out" / "metrics.jsonl").read_text(encoding="utf-8")
    with pytest.raises(ConfigError, match=r"checkpoint-4 has 4 steps, more than the 3 that are"):
        train(replace(config, max_train_steps=3, resume_from_checkpoint="latest"))
    assert (tmp_path / "out" / "metrics.jsonl").read_text(encoding="utf-8") == before


def test_as_many_steps_write_the_result_again(tiny_run, tmp_path):
    """What a run needs that ended between its last step and its result."""
    config = tiny_run(checkpointing_steps=2)
    adapter = train(config).adapter
    before = adapter.read_bytes()
    adapter.unlink()
    assert train(replace(config, resume_from_checkpoint="latest")).adapter.read_bytes() == before


def test_an_interrupted_run_resumes_to_the_same_bits(sd1_folder, photos, tmp_path):
    whole = make_config(
        sd1_folder, photos, tmp_path / "whole",
        max_train_steps=6, train_text_encoder=True, train_batch_size=2, lora_dropout=0.1,
        lr_scheduler="cosine", lora_alpha=3.0, random_flip=True, caption_dropout=0.2,
    )  # fmt: skip
    train(whole)
    parted = replace(whole, output_dir=str(tmp_path / "parted"))

    def interrupt(event):
        if isinstance(event, StepDone) and event.step == 2:
            signal.raise_signal(signal.SIGTERM)

    first = train(parted, interrupt)
    assert first.interrupted
    assert first.signal_number == signal.SIGTERM
    assert first.steps < 6
    assert read_adapter(tmp_path / "parted" / f"checkpoint-{first.steps}").layers
    second = train(replace(parted, resume_from_checkpoint="latest"))
    assert not second.interrupted
    assert_same_adapter(tmp_path / "whole", tmp_path / "parted")
    assert losses(tmp_path / "whole") == losses(tmp_path / "parted")


@pytest.mark.parametrize(
    ("before", "after", "is_counted"),
    [((4, 1), (1, 2), True), ((1, 2), (4, 1), False)],
)
def test_no_draw_is_repeated_when_batches_change(tiny_run, monkeypatch, before, after, is_counted):
    """Latents, noise and timestep of a row are drawn by its batch since the start of the run."""
    drawn, generator_for = [], inputs.generator_for

    def note(*parts):
        drawn.append(parts)
        return generator_for(*parts)

    monkeypatch.setattr(inputs, "generator_for", note)

    def batches(accumulation, size):
        return {"gradient_accumulation_steps": accumulation, "train_batch_size": size}

    config = tiny_run(max_train_steps=1, checkpointing_steps=1, **batches(*before))
    state_file = train(config).checkpoint / "training_state.pt"
    if not is_counted:  # as earlier versions wrote it
        state = torch.load(state_file, weights_only=True)
        del state["batches"]
        torch.save(state, state_file)
    config = replace(config, max_train_steps=3, resume_from_checkpoint="latest")
    train(replace(config, overwrite_output_dir=True, **batches(*after)))
    rows = [(number, row) for number in range(before[0]) for row in range(before[1])]
    ends = before[0], before[0] + 2 * after[0]
    rows += [(number, row) for number in range(*ends) for row in range(after[1])]
    assert [parts[2:4] for parts in drawn] == rows


def test_batches_that_an_earlier_version_saw_are_told_by_its_settings():
    """It numbered those of a step from accumulation times the steps before: none may come again."""
    config = TrainConfig(gradient_accumulation_steps=4).to_dict()
    assert batches_seen({"step": 3, "config": config}) == 12
    four, one = segment(1, config), segment(11, TrainConfig().to_dict())
    state = {"step": 15, "config": TrainConfig().to_dict(), "segments": [four, one]}
    assert batches_seen(state) == 40
    assert batches_seen(state | {"step": 55}) == 55
    assert batches_seen(state | {"batches": 45}) == 45


def test_a_resume_with_other_settings_is_refused(sd1_folder, photos, tmp_path):
    config = make_config(sd1_folder, photos, tmp_path / "out", checkpointing_steps=2)
    train(config)
    with pytest.raises(ConfigError, match=r"settings differ: rank \(2 -> 3\)"):
        train(replace(config, resume_from_checkpoint="latest", rank=3))


def test_a_resumed_run_has_its_own_rates(sd1_folder, photos, tmp_path):
    config = make_config(
        sd1_folder, photos, tmp_path / "out",
        max_train_steps=2, checkpointing_steps=2, lr_scheduler="linear", lr_warmup_steps=0,
    )  # fmt: skip
    train(config)
    changed = replace(
        config, resume_from_checkpoint="latest", max_train_steps=4,
        learning_rate=4e-4, adam_weight_decay=0.5, overwrite_output_dir=True,
    )  # fmt: skip
    train(changed)
    rates = losses(tmp_path / "out", "lr")
    # Linear to 0 over 4 steps, of the new rate.
    assert [rates[step]["unet/down"] for step in (3, 4)] == pytest.approx([2e-4, 1e-4])
    state = torch.load(tmp_path / "out" / "checkpoint-4" / "training_state.pt", weights_only=True)
    decays = {group["name"]: group["weight_decay"] for group in state["optimizer"]["param_groups"]}
    assert decays == {"unet/down": 0.5, "unet/up": 0.5, "unet/magnitude": 0.0}


def test_going_back_to_an_earlier_checkpoint_drops_the_later_ones_when_asked(
    sd1_folder, photos, tmp_path
):
    config = make_config(sd1_folder, photos, tmp_path / "out", checkpointing_steps=1)
    train(config)
    back = replace(config, resume_from_checkpoint="checkpoint-2", checkpoints_total_limit=2)
    with pytest.raises(ConfigError, match=r"holds checkpoints after step 2 \(checkpoint-4\)"):
        train(back)
    assert (tmp_path / "out" / "checkpoint-4").is_dir()

    def interrupt(event):
        if isinstance(event, StepDone) and event.step == 3:
            signal.raise_signal(signal.SIGTERM)

    train(
        replace(back, overwrite_output_dir=True, learning_rate=1e-2, max_train_steps=9), interrupt
    )
    left = sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))
    assert left[-1] in ("checkpoint-3", "checkpoint-4"), "none is from the run that was left"
    assert losses(tmp_path / "out", "lr")[3]["unet/down"] == pytest.approx(1e-2)
    assert len(left) == 2


def test_a_finished_result_is_not_replaced_by_one_of_other_settings(tiny_run, tmp_path):
    """More steps alone are what a finished run is resumed for."""
    out = tmp_path / "out"
    config = tiny_run(max_train_steps=1, checkpointing_steps=1)
    before = train(config).adapter.read_bytes()
    longer = replace(config, max_train_steps=2, resume_from_checkpoint="latest")
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for changes, text in (
        ({"learning_rate": 0.1}, r"learning_rate \(8e-05 -> 0\.1\)"),
        ({"train_batch_size": 2}, r"train_batch_size \(1 -> 2\)"),
    ):
        with pytest.raises(ConfigError, match=f"a finished result.*other settings: {text}; ") as e:
            train(replace(longer, **changes))
        assert "\n" not in str(e.value)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == files
    # Neither by another run's checkpoint; elsewhere it trains, with what it likes.
    branch = replace(longer, output_dir=str(tmp_path / "b"), learning_rate=2e-4)
    branch = replace(branch, resume_from_checkpoint=str(out / "checkpoint-1"))
    assert train(branch).steps == 2
    with pytest.raises(ConfigError, match=r"holds a finished result, and .* is of another run"):
        train(replace(longer, resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2")))
    # Samples and the machine's precision are not what was learned from.
    longer = replace(longer, mixed_precision="bf16", validation_inference_steps=3)
    assert train(longer).adapter.read_bytes() != before
    other = replace(longer, max_train_steps=3, learning_rate=2e-4, overwrite_output_dir=True)
    assert train(other).steps == 3
