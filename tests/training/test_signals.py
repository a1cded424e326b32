"""Signals, and files that ask for something: what each does, in which phase, in which words."""

from __future__ import annotations

import os
import select
import signal
import sys

import pytest
import yaml

from dora_diffusion.formats.files.runs import REQUESTS
from dora_diffusion.system import BREAK, HANGUP, STOP_SIGNALS, let_break_interrupt
from dora_diffusion.training.events import CheckpointSaved, SampleSaved, SamplingProgress, StepDone
from dora_diffusion.training.recipe import train
from dora_diffusion.training.results.checkpoint import CheckpointSaver
from dora_diffusion.training.signals import Stopped, StopRequest
from tests.training.helpers import assert_same_adapter, losses

needs_hangup = pytest.mark.skipif(HANGUP is None, reason="closed terminals send no signal")


@pytest.fixture
def quiet_hangup():
    """SIGHUP as a terminal's process has it, whatever the test runner was started by."""
    if HANGUP is None:
        yield
        return
    before = signal.signal(HANGUP, signal.SIG_DFL)
    yield
    signal.signal(HANGUP, before)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_the_first_signal_is_answered_and_kept(number, quiet_hangup, capsys):
    with StopRequest() as stop:
        stop.answer_with("saving")
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.signal_number == number
    assert capsys.readouterr().err == "\nsaving\n"


@pytest.mark.parametrize("before", [signal.default_int_handler, signal.SIG_IGN])
def test_the_third_interrupt_leaves_at_once_as_the_second_one_says(before, capsys):
    """In a shell's background job, too, where SIGINT was ignored."""
    outer = signal.signal(signal.SIGINT, before)
    try:
        with StopRequest() as stop:
            stop.answer_with("saving")
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == before
        assert capsys.readouterr().err.splitlines() == [
            "", "saving", "", "still saving; press Ctrl-C once more to leave without that",
        ]  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, outer)


@pytest.mark.skipif(BREAK is None, reason="there is no Ctrl-Break")
def test_ctrl_break_is_an_interrupt():
    """It saves and leaves; the third one, and one outside of training, is a KeyboardInterrupt."""
    before = signal.getsignal(BREAK)
    try:
        let_break_interrupt()
        with StopRequest() as stop:
            stop.answer_with("saving")
            signal.raise_signal(BREAK)
            signal.raise_signal(BREAK)
            assert stop.signal_number == BREAK
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(BREAK)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(BREAK)
    finally:
        signal.signal(BREAK, before)


@needs_hangup
def test_a_second_hangup_does_not_lose_the_checkpoint(quiet_hangup):
    """The terminal sends one, and the shell in it another."""
    with StopRequest() as stop:
        stop.answer_with("saving")
        signal.raise_signal(HANGUP)
        signal.raise_signal(HANGUP)
        assert stop.signal_number == HANGUP
        signal.raise_signal(signal.SIGINT)  # still a first one
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@needs_hangup
def test_nohup_is_respected():
    before = signal.signal(HANGUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(HANGUP)
            assert not stop.requested
        assert signal.getsignal(HANGUP) == signal.SIG_IGN
    finally:
        signal.signal(HANGUP, before)


def test_the_handlers_before_come_back(quiet_hangup):
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with StopRequest() as stop:
        stop.answer_with("saving")
        assert all(signal.getsignal(number) == stop._ask for number in STOP_SIGNALS)
        signal.raise_signal(STOP_SIGNALS[-1])
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_with_nothing_to_save_the_first_signal_leaves():
    with pytest.raises(Stopped), StopRequest():
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(
    "place", ["inputs.base.load_components", "inputs.prior.ensure_class_images"]
)
def test_a_signal_before_the_first_step_leaves_nothing_to_resume(
    place, tiny_run, tmp_path, monkeypatch, capsys
):
    """While a model is loaded and class images are made, which takes minutes."""

    def long_operation(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        pytest.fail("it went on")

    monkeypatch.setattr(f"dora_diffusion.training.{place}", long_operation)
    result = train(tiny_run(with_prior_preservation=True, prior_preservation_mode="images"))
    assert (result.signal_number, result.steps, result.checkpoint) == (signal.SIGINT, 0, None)
    assert "stopping: nothing has been trained yet" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_a_signal_ends_sampling_and_the_run_is_saved(tiny_run, tmp_path):
    """Sampling in the middle of a run: the rest of it is left out, the step is not lost."""
    events = []

    def interrupt(event):
        events.append(event)
        if isinstance(event, SamplingProgress):
            signal.raise_signal(signal.SIGTERM)

    config = tiny_run(validation_steps=2, num_validation_images=1, validation_inference_steps=9)
    result = train(config, interrupt)
    assert [event.done for event in events if isinstance(event, SamplingProgress)] == [1]
    assert not [event for event in events if isinstance(event, SampleSaved)]
    assert (result.steps, result.signal_number) == (2, signal.SIGTERM)
    assert result.checkpoint == tmp_path / "out" / "checkpoint-2"


@pytest.mark.parametrize(
    ("second", "numbers"),
    [
        ("in the step", (signal.SIGINT, signal.SIGINT)),
        ("in the checkpoint", (signal.SIGTERM, signal.SIGTERM)),
        ("in the checkpoint", (signal.SIGTERM, signal.SIGINT)),
    ],
)
def test_two_signals_lose_no_step(second, numbers, tiny_run, tmp_path, monkeypatch):
    """The second one comes before saving, or within it."""
    save = CheckpointSaver.save

    def interrupted_save(*args, **kwargs):
        if second == "in the checkpoint":
            signal.raise_signal(numbers[1])
        return save(*args, **kwargs)

    def interrupt(event):
        if isinstance(event, StepDone) and event.step == 2:
            for number in numbers[: 2 if second == "in the step" else 1]:
                signal.raise_signal(number)

    monkeypatch.setattr(CheckpointSaver, "save", interrupted_save)
    result = train(tiny_run(max_train_steps=9), interrupt)
    assert result.signal_number == numbers[0]
    assert 2 <= result.steps < 9
    assert result.checkpoint == tmp_path / "out" / f"checkpoint-{result.steps}"
    assert (result.checkpoint / "training_state.pt").is_file()
    log = (tmp_path / "out" / "metrics.jsonl").read_text(encoding="utf-8")
    assert log.count("\n") == result.steps


def test_a_signal_at_the_end_leaves_the_samples_out_and_the_result_whole(tiny_run, tmp_path):
    def interrupt(event):
        if isinstance(event, SamplingProgress):
            signal.raise_signal(signal.SIGINT)

    result = train(tiny_run(num_validation_images=1, max_train_steps=1), interrupt)
    assert not result.interrupted
    assert result.adapter.is_file()
    assert (tmp_path / "out" / "README.md").is_file()
    assert result.samples == {}


@needs_hangup
def test_the_output_to_a_closed_terminal_is_thrown_away(quiet_hangup):
    """One that closes after it was written to; what follows would raise an error."""
    pty = pytest.importorskip("pty")
    master, terminal = pty.openpty()
    with StopRequest() as stop:
        stop._terminals = [terminal]
        stop.answer_with("saving")
        os.close(master)
        with pytest.raises(OSError):
            os.write(terminal, b"step 1")
        signal.raise_signal(HANGUP)
        assert os.write(terminal, b"step 2") == 6
    os.close(terminal)


@pytest.mark.slow
def test_a_closed_terminal_leaves_a_checkpoint(tiny_run, tmp_path):
    """A real terminal that goes away: output to it fails from then on."""
    pty = pytest.importorskip("pty")
    settings = tmp_path / "settings.yaml"
    settings.write_text(
        yaml.safe_dump(tiny_run(max_train_steps=100_000).to_dict()), encoding="utf-8"
    )
    pid, master = pty.fork()
    if pid == 0:
        signal.signal(HANGUP, signal.SIG_DFL)
        os.environ["OMP_NUM_THREADS"] = "1"
        command = [sys.executable, "-m", "dora_diffusion", "train", "--config", str(settings)]
        os.execv(sys.executable, command)
    log = tmp_path / "out" / "metrics.jsonl"
    shown = b""
    while not (log.is_file() and log.read_text(encoding="utf-8").count("\n") > 1):
        readable, _, _ = select.select([master], [], [], 0.05)
        try:
            shown += os.read(master, 4096) if readable else b""
        except OSError:
            pytest.fail(f"the run ended by itself: {shown.decode(errors='replace')[-2000:]}")
    os.close(master)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + HANGUP
    assert log.read_text(encoding="utf-8").endswith("}\n")
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    assert (checkpoint / "training_state.pt").is_file()


def test_files_in_the_folder_save_and_sample_once_and_change_nothing(tiny_run, tmp_path):
    settings = {"max_train_steps": 6, "num_validation_images": 1, "lora_dropout": 0.1,
                "ema_decay": 0.5}  # fmt: skip
    train(tiny_run(output_dir=str(tmp_path / "whole"), **settings))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "SAVE").touch()  # of an earlier run
    events = []

    def ask(event):
        events.append(event)
        if isinstance(event, StepDone) and event.step == 2:
            for name in REQUESTS:
                (tmp_path / "out" / name).touch()

    train(tiny_run(**settings), ask)
    (checkpoint,) = (event for event in events if isinstance(event, CheckpointSaved))
    assert 2 <= checkpoint.step < 6
    samples = tmp_path / "out" / "samples"
    assert [path.name for path in samples.glob("step-*")] == [f"step-{checkpoint.step:06d}.png"]
    assert not any((tmp_path / "out" / name).exists() for name in REQUESTS)
    assert_same_adapter(tmp_path / "whole", tmp_path / "out")
    assert losses(tmp_path / "whole") == losses(tmp_path / "out")
    train(tiny_run(resume_from_checkpoint=str(checkpoint.path), overwrite_output_dir=True,
                   **settings))  # fmt: skip
    assert_same_adapter(tmp_path / "whole", tmp_path / "out")


def test_samples_that_no_setting_has_are_said(tiny_run, tmp_path):
    def ask(event):
        if isinstance(event, StepDone) and event.step == 1:
            (tmp_path / "out" / "SAMPLE").touch()

    with pytest.warns(UserWarning, match="SAMPLE requests .* num_validation_images is 0"):
        train(tiny_run(), ask)
    assert not (tmp_path / "out" / "samples").exists()
