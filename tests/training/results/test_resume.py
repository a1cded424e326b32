"""Resuming: bit-equal, refused on other images and settings, recorded where something changes."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from dora_diffusion.cli.console.training import TrainProgress
from dora_diffusion.config import TrainConfig, read_config_file
from dora_diffusion.formats.adapter.file import read_adapter
from dora_diffusion.training import batch
from dora_diffusion.training.events import StepDone, TrainingStarted
from dora_diffusion.training.recipe import train
from dora_diffusion.training.results.checkpoint import FORMAT, STATE_FILE, read_state
from dora_diffusion.training.results.resume import changed_segments, check_same_run
from tests.refusal import refused
from tests.training.helpers import (
    assert_same_adapter,
    losses,
    make_config,
    names,
    same,
    small_samples,
    steps_in,
)


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


@pytest.fixture(scope="module")
def finished(sd1_folder, tmp_path_factory):
    """The settings of a run of four steps with a checkpoint of every second one."""
    root = tmp_path_factory.mktemp("finished")
    config = make_config(
        sd1_folder, small_samples() / "bolt_mug", root / "run",
        targets=["cross-attention"], checkpointing_steps=2,
    )  # fmt: skip
    train(config)
    return config


@pytest.fixture
def copied(finished, tmp_path):
    """The settings of a copy of it."""
    shutil.copytree(finished.output_dir, tmp_path / "out")
    return replace(finished, output_dir=str(tmp_path / "out"))


def test_steps_that_are_trained_again_are_said(copied, tmp_path, capsys):
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    show = TrainProgress()
    train(replace(copied, max_train_steps=5, resume_from_checkpoint="latest"), show)
    show.close()
    line = "resuming from checkpoint-2, at step 2 of 5; steps 3 to 4 are repeated"
    assert line in capsys.readouterr().out.splitlines()


def test_fewer_steps_than_the_checkpoint_has_is_an_error(copied, tmp_path):
    before = (tmp_path / "out" / "metrics.jsonl").read_text(encoding="utf-8")
    with refused("max_train_steps", "checkpoint-4 has 4 steps"):
        train(replace(copied, max_train_steps=3, resume_from_checkpoint="latest"))
    assert (tmp_path / "out" / "metrics.jsonl").read_text(encoding="utf-8") == before


def test_as_many_steps_write_the_result_again(copied, tmp_path):
    """The state of a run that ended between its last step and its result."""
    (adapter,) = (tmp_path / "out").glob("*.safetensors")
    before = adapter.read_bytes()
    adapter.unlink()
    assert train(replace(copied, resume_from_checkpoint="latest")).adapter.read_bytes() == before


def test_an_interrupted_run_resumes_to_the_same_bits(sd1_folder, photos, tmp_path):
    whole = make_config(
        sd1_folder, photos, tmp_path / "whole",
        max_train_steps=6, train_text_encoder=True, train_batch_size=2, lora_dropout=0.1,
        lr_scheduler="cosine", lora_alpha=3.0, random_flip=True, caption_dropout=0.2,
        tag_dropout=0.3, keep_tags=0, caption_prefix="a new sks,",
        max_token_length=150, clip_skip=1, timestep_distribution="logit_normal",
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


@pytest.mark.parametrize(("before", "after"), [((4, 1), (1, 2)), ((1, 2), (4, 1))])
def test_no_draw_is_repeated_when_batches_change(tiny_run, monkeypatch, before, after):
    """Latents, noise and timestep of a row are drawn by its batch since the start of the run."""
    drawn, generator_for = [], batch.generator_for

    def note(*parts):
        drawn.append(parts)
        return generator_for(*parts)

    monkeypatch.setattr(batch, "generator_for", note)

    def batches(accumulation, size):
        return {"gradient_accumulation_steps": accumulation, "train_batch_size": size}

    config = tiny_run(max_train_steps=1, checkpointing_steps=1, **batches(*before))
    train(config)
    config = replace(config, max_train_steps=3, resume_from_checkpoint="latest")
    train(replace(config, overwrite_output_dir=True, **batches(*after)))
    rows = [(number, row) for number in range(before[0]) for row in range(before[1])]
    ends = before[0], before[0] + 2 * after[0]
    rows += [(number, row) for number in range(*ends) for row in range(after[1])]
    assert [parts[2:4] for parts in drawn] == rows


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
    with refused("resume_from_checkpoint", "after step 2 (checkpoint-4)"):
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
        ({"learning_rate": 0.1}, "learning_rate (8e-05 -> 0.1)"),
        ({"train_batch_size": 2}, "train_batch_size (1 -> 2)"),
    ):
        with refused("output_dir", "contains a result", text):
            train(replace(longer, **changes))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == files
    # Neither by another run's checkpoint; elsewhere it trains, with what it likes.
    branch = replace(longer, output_dir=str(tmp_path / "b"), learning_rate=2e-4)
    branch = replace(branch, resume_from_checkpoint=str(out / "checkpoint-1"))
    assert train(branch).steps == 2
    with refused("output_dir", "belongs to another run"):
        train(replace(longer, resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2")))
    # Samples and the machine's precision are not what was learned from.
    longer = replace(longer, mixed_precision="bf16", validation_inference_steps=3)
    assert train(longer).adapter.read_bytes() != before
    other = replace(longer, max_train_steps=3, learning_rate=2e-4, overwrite_output_dir=True)
    assert train(other).steps == 3


PROMPT = "a photo of a sks mug"


@pytest.fixture(scope="module")
def first(sd1_folder, tmp_path_factory):
    """A run of two steps with a checkpoint, its photos (one of them with a mask), its config."""
    root = tmp_path_factory.mktemp("continuity")
    photos = Path(shutil.copytree(small_samples() / "bolt_mug", root / "photos"))
    for caption in photos.glob("*.txt"):
        caption.unlink()
    for photo in photos.glob("*.jpg"):
        size = Image.open(photo).size
        Image.new("L", size, 255).save(photo.with_name(f"{photo.stem}.mask.png"))
    config = TrainConfig(
        pretrained_model_name_or_path=str(sd1_folder),
        instance_data_dir=str(photos),
        instance_prompt=PROMPT,
        output_dir=str(root / "run"),
        resolution=32,
        rank=2,
        conv_rank=2,
        max_train_steps=2,
        num_validation_images=0,
        checkpointing_steps=2,
        masked_loss=True,
    )
    train(config)
    return config


@pytest.fixture
def again(first, tmp_path):
    """The config of a run that resumes, on a copy of its folder and its photos."""
    shutil.copytree(first.output_dir, tmp_path / "run")
    shutil.copytree(first.instance_data_dir, tmp_path / "photos")
    return replace(
        first,
        output_dir=str(tmp_path / "run"),
        instance_data_dir=str(tmp_path / "photos"),
        max_train_steps=3,
        resume_from_checkpoint="latest",
    )


def another_image(photos):
    image = Image.open(photos / "01.jpg")
    image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(photos / "01.jpg")


def another_caption(photos):
    (photos / "01.txt").write_text("a sks mug on the moon", encoding="utf-8")


def another_mask(photos):
    mask = Image.open(photos / "03.mask.png")
    mask.paste(0, (0, 0, 5, 5))
    mask.save(photos / "03.mask.png")


def one_image_less(photos):
    (photos / "02.jpg").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (another_image, "1 image missing (01.jpg); 1 image new (01.jpg)"),
        (another_caption, "caption of 01.jpg ('a photo of a sks mug' -> 'a sks mug on the moon')"),
        (another_mask, "other masks (03.jpg)"),
        (one_image_less, "1 image missing (02.jpg)"),
    ],
)
def test_other_images_captions_and_masks_are_refused(spoil, message, again):
    spoil(Path(again.instance_data_dir))
    with refused("resume_from_checkpoint", message):
        train(again)


CHANGES = {
    "caption_dropout": 0.5, "snr_gamma": 0.0, "prediction_type": "epsilon", "noise_offset": 0.1,
    "loss_type": "huber", "unmasked_prior": 1.0, "timestep_distribution": "power",
    "lora_dropout": 0.1, "lr_scheduler": "linear", "instance_prompt": "a photo of a sks cup",
    "lora_alpha": 1.0, "rank": 3,
}  # fmt: skip


def test_other_settings_that_change_the_training_are_refused(first):
    folder = Path(first.output_dir, "checkpoint-2")
    state = read_state(folder)
    used = TrainConfig.from_dict(state["config"])
    check_same_run(folder.name, state, used, state["contents"])
    for name, value in CHANGES.items():
        with refused("resume_from_checkpoint", f"{name} ("):
            changed = replace(used, **{name: value})
            check_same_run(folder.name, state, changed, state["contents"])


def test_a_checkpoint_of_a_removed_setting_is_refused():
    config = TrainConfig()
    state = {"config": {**config.to_dict(), "nearest_noise": 4, "init": "lora-one"}}
    with refused("resume_from_checkpoint") as error:
        check_same_run("checkpoint-2", state, config, {})
    assert str(error.value) == (
        "cannot resume checkpoint-2: it was trained with init lora-one, nearest_noise 4 "
        "(no gain was measured; leave it out), which this version of dora-diffusion does not have; "
        "start over in another --output_dir, or resume with the version that wrote it"
    )


def test_photos_that_were_moved_and_renamed_resume_with_a_warning(again):
    photos = Path(again.instance_data_dir)
    (photos / "01.jpg").rename(photos / "zz.jpg")
    (photos / "01.mask.png").rename(photos / "zz.mask.png")
    with pytest.warns(UserWarning, match="have another order"):
        assert not train(again).interrupted


def test_what_may_change_is_said_and_recorded_with_its_step(again, capsys):
    progress = TrainProgress()
    train(replace(again, learning_rate=4e-5, overwrite_output_dir=True), progress)
    progress.close()
    said = capsys.readouterr().out
    changes = "max_train_steps (2 -> 3), learning_rate (8e-05 -> 4e-05)"
    assert f"changed from step 3 on: {changes}" in said
    file = Path(again.output_dir) / "config.yaml"
    record = yaml.safe_load(file.read_text(encoding="utf-8"))["segments"]
    assert record == [
        {"from_step": 1, "settings": {"max_train_steps": 2, "learning_rate": 8e-5}},
        {"from_step": 3, "settings": {"max_train_steps": 3, "learning_rate": 4e-5}},
    ]
    assert TrainConfig.from_dict(read_config_file(file)).learning_rate == 4e-5


def test_segments_grow_from_checkpoint_to_checkpoint(again):
    train(replace(again, checkpointing_steps=1))
    changed = {"max_grad_norm": 0.5, "overwrite_output_dir": True}
    train(replace(again, max_train_steps=4, checkpointing_steps=1, **changed))
    state = torch.load(
        Path(again.output_dir) / "checkpoint-4" / "training_state.pt", weights_only=True
    )
    assert [segment["from_step"] for segment in state["segments"]] == [1, 3, 4]
    apart = changed_segments(state["segments"])
    assert [segment["settings"]["max_grad_norm"] for segment in apart] == [1.0, 1.0, 0.5]
    assert [segment["settings"]["max_train_steps"] for segment in apart] == [2, 3, 4]


def test_the_saved_settings_resume_their_own_run(again):
    """config.yaml is what was used, and stays valid input."""
    saved = read_config_file(Path(again.output_dir) / "config.yaml")
    assert (saved["lora_alpha"], saved["class_word"], saved["resolution"]) == (2.0, "mug", 32)
    own = {
        "output_dir": again.output_dir,
        "instance_data_dir": again.instance_data_dir,
        "resume_from_checkpoint": "latest",
        "max_train_steps": 3,
    }
    assert train(TrainConfig.from_dict(saved | own)).steps == 3


def test_a_base_that_was_copied_with_the_run_is_the_same_base(copied, tmp_path):
    """The checkpoint finds it beside the run in its new place; elsewhere it is another one."""
    file = tmp_path / "out" / "checkpoint-4" / STATE_FILE
    state = torch.load(file, weights_only=True)
    assert state["paths"]["output_dir"] == "./"
    name = "pretrained_model_name_or_path"
    state["config"][name], state["paths"][name] = "/gone/base", "../base"
    torch.save(state, file)
    config = TrainConfig.from_dict({**state["config"], name: str(tmp_path / "base")})
    with refused("resume_from_checkpoint", f"{name} (/gone/base -> "):
        check_same_run("checkpoint-4", read_state(file.parent), config, state["contents"])
    (tmp_path / "base").mkdir()
    check_same_run("checkpoint-4", read_state(file.parent), config, state["contents"])


def test_class_images_are_compared_by_content():
    row = {"name": "class-00000.png", "image": "a", "caption": "a mug", "mask": ""}
    before = {"images": [], "class_images": [row]}
    now = {"images": [], "class_images": [row | {"image": "b"}]}
    state = {"config": TrainConfig().to_dict(), "contents": before}
    check_same_run("checkpoint-2", state, TrainConfig(), before)
    missing = "1 class image missing (class-00000.png); 1 class image new"
    with refused("resume_from_checkpoint", missing, "they depend on validation_inference_steps"):
        check_same_run("checkpoint-2", state, TrainConfig(), now)
    captioned = {"images": [], "class_images": [row | {"caption": "a cup"}]}
    with refused("resume_from_checkpoint", "new caption of class-00000.png ('a mug' -> "):
        check_same_run("checkpoint-2", state, TrainConfig(), captioned)


def test_settings_for_which_no_step_is_left_are_said_and_not_recorded(again, capsys):
    """A finished run that is asked for again trains nothing at the new rate, and says so."""
    progress = TrainProgress()
    train(replace(again, max_train_steps=2, learning_rate=4e-5, num_validation_images=0), progress)
    progress.close()
    said = capsys.readouterr().out
    assert "at step 2 of 2; nothing is left to train" in said
    assert "without effect, since no step is left: learning_rate (8e-05 -> 4e-05)\n" in said
    assert "changed from" not in said
    saved = yaml.safe_load((Path(again.output_dir) / "config.yaml").read_text(encoding="utf-8"))
    assert saved["learning_rate"] == 8e-5
    assert "segments" not in saved


def test_a_checkpoint_that_is_not_there_is_refused_before_the_model_is_loaded(again):
    missing = replace(
        again, resume_from_checkpoint="checkpoint-9", pretrained_model_name_or_path="no-such/model"
    )
    with refused("resume_from_checkpoint", "checkpoint-9 does not exist", "is checkpoint-2"):
        train(missing)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("start"), "is from an older version of"),
        (lambda state: state.update(format=FORMAT + 1), "is from a newer version of"),
    ],
)
def test_a_checkpoint_of_another_version_is_refused_in_one_line(change, words, again):
    """With what to do instead, which works."""
    folder = Path(again.output_dir, "checkpoint-2")
    state = torch.load(folder / STATE_FILE, weights_only=True)
    assert state["format"] == FORMAT
    change(state)
    torch.save(state, folder / STATE_FILE)
    with refused("resume_from_checkpoint", words) as error:
        train(again)
    text = str(error.value)
    assert text.endswith(f"start a new run with --init_adapter {folder}")
    output = str(folder.parent.with_name("new"))
    fresh = replace(again, resume_from_checkpoint=None, output_dir=output, init_adapter=str(folder))
    assert train(fresh).steps == 3
    assert json.loads(Path(output, "run.json").read_text(encoding="utf-8"))["format"] == FORMAT
