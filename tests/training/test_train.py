"""Training runs on tiny random pipelines: what they write, resume, and agree on."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dora_diffusion.config import ConfigError, TrainConfig
from dora_diffusion.data.images import PhotoError
from dora_diffusion.formats.adapter.file import read_adapter
from dora_diffusion.training.loop import TrainingError, train
from dora_diffusion.training.session import make_accelerator

SAMPLES = Path(__file__).parents[2] / "samples"


@pytest.fixture
def photos(tmp_path):
    return Path(shutil.copytree(SAMPLES / "bolt_mug", tmp_path / "photos"))


def make_config(model, photos, output_dir, **kwargs):
    settings = {
        "pretrained_model_name_or_path": str(model),
        "instance_data_dir": str(photos),
        "instance_prompt": "a photo of a sks mug",
        "output_dir": str(output_dir),
        "resolution": 32,
        "rank": 2,
        "conv_rank": 2,
        "max_train_steps": 4,
        "learning_rate": 1e-3,
        "text_encoder_lr": 1e-3,
        "num_validation_images": 0,
        "validation_inference_steps": 2,
        "checkpointing_steps": 0,
        "seed": 3,
    }
    return TrainConfig(**{**settings, **kwargs})


def losses(folder, figure="loss"):
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return {json.loads(line)["step"]: json.loads(line)[figure] for line in lines}


def assert_same_adapter(first, second, **tolerance):
    first, second = read_adapter(first).layers, read_adapter(second).layers
    assert set(first) == set(second)
    for name, layer in first.items():
        for part in ("down", "up", "magnitude"):
            torch.testing.assert_close(
                getattr(layer, part),
                getattr(second[name], part),
                **{"rtol": 0, "atol": 0, **tolerance},
            )


@pytest.mark.parametrize("family", ["sd1_folder", "sd2_folder", "sdxl_folder"])
def test_every_family_trains_unet_and_text_encoders_with_prior(family, photos, tmp_path, request):
    folder = request.getfixturevalue(family)
    events = []
    config = make_config(
        folder, photos, tmp_path / "out",
        train_text_encoder=True,
        with_prior_preservation=True,
        num_class_images=3,
        gradient_accumulation_steps=2,
        num_validation_images=2,
        validation_prompt=["a sks mug on the moon"],
        random_flip=True,
    )  # fmt: skip
    result = train(config, events.append)
    adapter = read_adapter(result.adapter)
    parts = {name.split(".")[0] for name in adapter.layers}
    assert {"unet", "text_encoder"} <= parts
    assert ("text_encoder_2" in parts) == (family == "sdxl_folder")
    assert any(layer.down.ndim == 4 for layer in adapter.layers.values())
    moved = [layer.up.abs().sum() > 0 for layer in adapter.layers.values()]
    # SDXL reads the penultimate layers: the last layer of its first encoder gets no gradient.
    assert sum(moved) >= len(moved) - 4
    assert adapter.metadata.trigger == "sks mug"
    assert adapter.metadata.tags == ("mug",)
    captions = [path.read_text().strip() for path in Path(photos).glob("*.txt")]
    assert adapter.metadata.tag_frequency == dict.fromkeys(sorted(captions), 1)
    assert adapter.metadata.thumbnail.startswith("data:image/jpeg;base64,")
    assert str(tmp_path).encode() not in result.adapter.read_bytes()
    output = tmp_path / "out"
    assert {path.name for path in output.iterdir()} == {
        "pytorch_lora_weights.safetensors", "config.yaml", "metrics.jsonl", "samples",
        "README.md", "class_images", "photos.json", ".training.lock",
    }  # fmt: skip
    card = (output / "README.md").read_text()
    assert "sks mug" in card
    assert str(tmp_path) not in card
    assert (output / "samples" / "base_above_adapted.png").is_file()
    prompts = {path.read_text().strip() for path in output.rglob("class-*.txt")}
    assert prompts
    assert not any("sks" in prompt for prompt in prompts)
    assert [e["step"] for e in events if e["event"] == "step"] == [1, 2, 3, 4]


def test_an_interrupted_run_resumes_to_the_same_bits(sd1_folder, photos, tmp_path):
    whole = make_config(
        sd1_folder, photos, tmp_path / "whole",
        max_train_steps=6, train_text_encoder=True, train_batch_size=2, lora_dropout=0.1,
        lr_scheduler="cosine", lora_alpha=3.0, random_flip=True, caption_dropout=0.2,
    )  # fmt: skip
    train(whole)
    parted = replace(whole, output_dir=str(tmp_path / "parted"))

    def interrupt(event):
        if event["event"] == "step" and event["step"] == 2:
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


def test_gradient_checkpointing_trains_the_same_adapter(sd1_folder, photos, tmp_path):
    plain = make_config(
        sd1_folder, photos, tmp_path / "plain", train_batch_size=2, train_text_encoder=True
    )
    train(plain)
    train(replace(plain, output_dir=str(tmp_path / "saved"), gradient_checkpointing=True))
    assert_same_adapter(tmp_path / "plain", tmp_path / "saved", rtol=1e-4, atol=1e-6)


def test_checkpoints_are_limited_and_load(sd1_folder, photos, tmp_path):
    config = make_config(
        sd1_folder, photos, tmp_path / "out", checkpointing_steps=1, checkpoints_total_limit=2
    )
    train(config)
    names = sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))
    assert names == ["checkpoint-3", "checkpoint-4"]
    assert_same_adapter(tmp_path / "out", tmp_path / "out" / "checkpoint-4")


def test_an_input_axis_adapter_is_written_in_the_kohya_form(sd1_folder, photos, tmp_path):
    result = train(make_config(sd1_folder, photos, tmp_path / "out", norm_axis="input"))
    assert result.adapter.name == "dora_kohya.safetensors"
    layers = read_adapter(tmp_path / "out").layers
    assert {layer.norm_axis for layer in layers.values()} == {"input"}


def test_plain_lora_and_image_free_prior_train(sd1_folder, photos, tmp_path):
    config = make_config(
        sd1_folder, photos, tmp_path / "out", use_dora=False,
        with_prior_preservation=True, prior_preservation_mode="image-free",
    )  # fmt: skip
    train(config)
    layers = read_adapter(tmp_path / "out").layers
    assert all(layer.magnitude is None for layer in layers.values())
    lines = [json.loads(x) for x in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["prior_loss"] == 0, "a fresh adapter answers as the base does"
    assert lines[-1]["prior_loss"] > 0
    assert not (tmp_path / "out" / "class_images").exists()


def test_bfloat16_stays_near_float32(sd1_folder, photos, tmp_path):
    exact = make_config(sd1_folder, photos, tmp_path / "fp32")
    train(exact)
    train(replace(exact, mixed_precision="bf16", output_dir=str(tmp_path / "bf16")))
    for step, loss in losses(tmp_path / "fp32").items():
        assert losses(tmp_path / "bf16")[step] == pytest.approx(loss, rel=0.03)
    assert {t.up.dtype for t in read_adapter(tmp_path / "bf16").layers.values()} == {torch.float32}


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_float16_with_its_gradient_scaler_stays_near_float32(
    max_grad_norm, sd1_folder, photos, tmp_path, monkeypatch
):
    """What Accelerate sets up on a GPU for fp16, on this CPU: autocast and scaler, half weights."""
    exact = make_config(sd1_folder, photos, tmp_path / "fp32", max_grad_norm=max_grad_norm)
    train(exact)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def on_cpu(config):
        accelerator = make_accelerator(replace(config, mixed_precision="no"))
        accelerator.state._mixed_precision = "fp16"
        accelerator.native_amp, accelerator.scaler = True, scaler
        return accelerator

    monkeypatch.setattr("dora_diffusion.training.loop.make_accelerator", on_cpu)
    train(replace(exact, mixed_precision="fp16", output_dir=str(tmp_path / "fp16")))
    for step, loss in losses(tmp_path / "fp32").items():
        assert losses(tmp_path / "fp16")[step] == pytest.approx(loss, rel=0.01)
    norms, expected = (losses(tmp_path / name, "grad_norm") for name in ("fp16", "fp32"))
    assert norms[1] == pytest.approx(expected[1], rel=0.05)
    assert scaler.get_scale() > 1, "no step was skipped until nothing was left of the scale"
    halves, wholes = (read_adapter(tmp_path / name).layers for name in ("fp16", "fp32"))
    assert {layer.up.dtype for layer in halves.values()} == {torch.float32}
    moved = torch.cat([layer.up.flatten() for layer in halves.values()])
    expected = torch.cat([layer.up.flatten() for layer in wholes.values()])
    assert torch.nn.functional.cosine_similarity(moved, expected, dim=0) > 0.9


def test_magnitudes_do_not_decay_and_rates_are_separate(sd1_folder):
    from dora_diffusion.adapters.inject import inject_adapters
    from dora_diffusion.models.load import load_components
    from dora_diffusion.training.optimizer import parameter_groups

    components = load_components(str(sd1_folder))
    config = TrainConfig(
        rank=2, conv_rank=2, learning_rate=1e-4, text_encoder_lr=1e-5, magnitude_lr=3e-4,
        loraplus_ratio=4.0, adam_weight_decay=0.1,
    )  # fmt: skip
    inject_adapters(components.unet, config.unet_adapter)
    inject_adapters(components.text_encoders[0], config.text_encoder_adapter)
    groups = {g["name"]: g for g in parameter_groups(components.adaptable(), config)}
    assert {name: (g["lr"], g["weight_decay"]) for name, g in groups.items()} == {
        "unet/down": (1e-4, 0.1),
        "unet/up": (4e-4, 0.1),
        "unet/magnitude": (3e-4, 0.0),
        "text_encoder/down": (1e-5, 0.1),
        "text_encoder/up": (4e-5, 0.1),
        "text_encoder/magnitude": (3e-4, 0.0),
    }


def test_class_images_are_reused_only_for_the_same_prompts(sd1_folder, photos, tmp_path):
    config = make_config(
        sd1_folder, photos, tmp_path / "a", with_prior_preservation=True, num_class_images=2,
        class_data_dir=str(tmp_path / "classes"), max_train_steps=1,
    )  # fmt: skip
    train(config)
    first = {p: p.stat().st_mtime_ns for p in (tmp_path / "classes").rglob("*.png")}
    assert len(first) == 2
    train(replace(config, output_dir=str(tmp_path / "b")))
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "classes").rglob("*.png")} == first
    train(replace(config, output_dir=str(tmp_path / "c"), class_prompt="a painting of a mug"))
    assert len(list((tmp_path / "classes").rglob("*.png"))) == 4


def test_buckets_masks_and_tags_train_together(sd1_folder, photos, tmp_path):
    from PIL import Image

    for path in photos.glob("*.jpg"):
        size = Image.open(path).size
        mask = Image.new("L", size, 0)
        mask.paste(255, (0, 0, size[0], size[1] // 2))
        mask.save(path.with_name(f"{path.stem}.mask.png"))
    config = make_config(
        sd1_folder, photos, tmp_path / "masked", resolution=64, aspect_ratio_buckets=True,
        masked_loss=True, shuffle_tags=True, train_batch_size=2,
    )  # fmt: skip
    train(config)
    train(replace(config, masked_loss=False, output_dir=str(tmp_path / "whole")))
    masked, whole = losses(tmp_path / "masked"), losses(tmp_path / "whole")
    assert all(masked[step] != whole[step] for step in masked)


def test_a_single_file_checkpoint_trains_offline(sd1_folder, photos, tmp_path):
    from dora_diffusion.export import export_checkpoint

    first = make_config(sd1_folder, photos, tmp_path / "first", max_train_steps=1)
    train(first)
    single = tmp_path / "single.safetensors"
    export_checkpoint(str(sd1_folder), tmp_path / "first", single, strength=0.0)
    config = replace(
        first,
        pretrained_model_name_or_path=str(single),
        model_config=str(sd1_folder),
        output_dir=str(tmp_path / "second"),
    )
    train(config)
    assert losses(tmp_path / "second") == pytest.approx(losses(tmp_path / "first"), rel=1e-5)


# What is wrong, and what the one-line message must say.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"instance_prompt": "a photo of a mug"}, "does not contain the token 'sks'"),
        ({"instance_data_dir": None}, "instance_data_dir is not set"),
        ({"targets": ["nothing.*"]}, "'nothing.*' matches no layer"),
        ({"rank": 500}, "rank 500 is larger than the layer"),
        ({"pretrained_model_name_or_path": "./nowhere"}, "nowhere"),
        ({"resolution": 33}, "33"),
        ({"resume_from_checkpoint": "latest"}, "no checkpoint to resume from"),
        ({"mixed_precision": "fp16"}, "fp16 needs a CUDA GPU"),
    ],
)
def test_bad_settings_are_refused_in_one_line(settings, message, sd1_folder, photos, tmp_path):
    if "fp16" in message and torch.cuda.is_available():
        pytest.skip("fp16 works here")
    with pytest.raises(ValueError, match=r".") as error:
        train(make_config(sd1_folder, photos, tmp_path / "out", **settings))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_bad_photo_among_good_ones_is_left_out(sd1_folder, photos, tmp_path):
    (photos / "text.jpg").write_text("not a picture")
    whole = (photos / "01.jpg").read_bytes()
    (photos / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match=r"photo left out: .*(text|truncated)\.jpg"):
        train(make_config(sd1_folder, photos, tmp_path / "out", max_train_steps=1))
    for path in photos.glob("0*.jpg"):
        path.unlink()
    with pytest.raises(PhotoError, match=r"2 of 2 photos unusable.*text\.jpg"):
        train(make_config(sd1_folder, photos, tmp_path / "out2", max_train_steps=1))


def test_one_photo_trains_with_a_warning(sd1_folder, photos, tmp_path):
    for path in photos.glob("0[2-9].jpg"):
        path.unlink()
    with pytest.warns(UserWarning, match=r"only 1 photo"):
        train(make_config(sd1_folder, photos, tmp_path / "out", max_train_steps=1))


def test_a_finished_result_is_not_written_over(sd1_folder, photos, tmp_path):
    config = make_config(sd1_folder, photos, tmp_path / "out", max_train_steps=1)
    train(config)
    with pytest.raises(ConfigError, match="already holds a trained adapter"):
        train(config)
    train(replace(config, overwrite_output_dir=True))


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
        learning_rate=4e-4, adam_weight_decay=0.5,
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
        if event["event"] == "step" and event["step"] == 3:
            signal.raise_signal(signal.SIGTERM)

    train(
        replace(back, overwrite_output_dir=True, learning_rate=1e-2, max_train_steps=9), interrupt
    )
    left = sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))
    assert left[-1] in ("checkpoint-3", "checkpoint-4"), "none is from the run that was left"
    assert losses(tmp_path / "out", "lr")[3]["unet/down"] == pytest.approx(1e-2)
    assert len(left) == 2


def test_an_overwritten_result_leaves_nothing_behind(sd1_folder, photos, tmp_path):
    out = tmp_path / "out"
    config = make_config(sd1_folder, photos, out, max_train_steps=1, validation_steps=1)
    train(replace(config, max_train_steps=2, num_validation_images=1))
    (out / "samples" / "mine.png").write_bytes(b"kept")
    assert (out / "samples" / "step-000001.png").is_file()
    train(replace(config, overwrite_output_dir=True, norm_axis="input"))
    assert [path.name for path in out.glob("*.safetensors")] == ["dora_kohya.safetensors"]
    assert {layer.norm_axis for layer in read_adapter(out).layers.values()} == {"input"}
    assert [path.name for path in (out / "samples").iterdir()] == ["mine.png"]


def test_a_folder_that_is_not_a_result_keeps_its_files(sd1_folder, photos, tmp_path):
    from dora_diffusion.training.result import drop_result

    (tmp_path / "README.md").write_text("mine")
    drop_result(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_prodigy_takes_one_rate_near_one(sd1_folder, photos, tmp_path):
    config = {"optimizer": "prodigy", "train_text_encoder": True}
    with pytest.raises(ConfigError, match="Prodigy finds the rate itself"):
        make_config(sd1_folder, photos, tmp_path / "out", **config)
    config["learning_rate"] = 1.0
    with pytest.raises(ConfigError, match="one rate for everything"):
        make_config(sd1_folder, photos, tmp_path / "out", loraplus_ratio=2.0, **config)
    train(make_config(sd1_folder, photos, tmp_path / "out", checkpointing_steps=2, **config))
    rates = losses(tmp_path / "out", "lr")[4]
    assert set(rates.values()) == {1.0}
    assert {name.partition("/")[0] for name in rates} == {"unet", "text_encoder"}
    resumed = make_config(
        sd1_folder, photos, tmp_path / "out",
        resume_from_checkpoint="latest", max_train_steps=6, **config,
    )  # fmt: skip
    train(resumed)
    moved = [layer.up.abs().max() for layer in read_adapter(tmp_path / "out").layers.values()]
    assert max(moved) > 0


def test_the_card_is_valid_whatever_the_prompt_says(sd1_folder, photos, tmp_path):
    import yaml

    prompt = 'a photo of it\'s "big": sks mug # 1'
    train(
        make_config(sd1_folder, photos, tmp_path / "out", instance_prompt=prompt, max_train_steps=1)
    )
    text = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(text.split("---")[1])["instance_prompt"] == prompt


def test_a_class_prompt_with_the_token_is_refused(sd1_folder, photos, tmp_path):
    config = make_config(
        sd1_folder, photos, tmp_path / "out",
        with_prior_preservation=True, class_prompt="a photo of a sks mug",
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"class_prompt .* contains the token 'sks'"):
        train(config)


def test_captions_are_warned_of_once_and_not_kept_for_ever(sd1_folder, monkeypatch):
    from dora_diffusion.models.load import load_components
    from dora_diffusion.training import step

    components, long = load_components(str(sd1_folder)), "mug " * 200
    trains = step.Conditioner(components, trains=True)
    with pytest.warns(UserWarning, match="longer than the model's"):
        trains([long, "a mug"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trains(["a mug", long])
    monkeypatch.setattr(step, "KNOWN_CAPTIONS", 2)
    kept = step.Conditioner(components, trains=False)
    whole = kept(["a", "b", "c", "a"]).encoder_hidden_states
    assert len(kept._known) == 2
    assert torch.equal(whole[0], whole[3])
    assert torch.equal(kept(["a"]).encoder_hidden_states, whole[:1])


def test_processes_wait_as_long_as_class_images_take(sd1_folder, photos, tmp_path):
    accelerator = make_accelerator(make_config(sd1_folder, photos, tmp_path / "out"))
    assert accelerator.init_handler.timeout.total_seconds() > 3600


def test_a_loss_that_is_not_finite_stops_the_run(sd1_folder, photos, tmp_path):
    config = make_config(sd1_folder, photos, tmp_path / "out", learning_rate=1e30, max_grad_norm=0)
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at step \d"):
        train(config)


def test_a_full_disk_keeps_the_last_checkpoint(sd1_folder, photos, tmp_path, monkeypatch):
    config = make_config(sd1_folder, photos, tmp_path / "out", checkpointing_steps=2)
    train(config)
    kept = read_adapter(tmp_path / "out" / "checkpoint-4")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk is full"):
        train(replace(config, resume_from_checkpoint="latest", max_train_steps=6))
    monkeypatch.undo()
    assert set(read_adapter(tmp_path / "out" / "checkpoint-4").layers) == set(kept.layers)
    assert [path.name for path in (tmp_path / "out").glob(".*")] == [".training.lock"]
