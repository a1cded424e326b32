"""``dora-diffusion train``: flags and files of settings, and what a run says."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from dora_diffusion.cli import main as cli
from dora_diffusion.cli.commands.train import train_config
from dora_diffusion.config import PRESETS, TrainConfig, read_config_file
from dora_diffusion.export.hub import HubError
from dora_diffusion.formats.adapter.file import read_adapter
from dora_diffusion.studio.app.settings import preset_values
from dora_diffusion.system import HANGUP
from tests.refusal import refused

ROOT = Path(__file__).parents[3]


def parsed(*flags):
    return train_config(cli.build_parser().parse_args(["train", *flags]))


def test_flags_take_the_types_of_their_settings():
    config = parsed(
        "--targets", "attention", "down_blocks.*", "--learning_rate", "1e-4", "--seed", "7",
        "--no-use_dora", "--random_flip", "--snr_gamma", "0",
    )  # fmt: skip
    assert config.targets == ["attention", "down_blocks.*"]
    assert (config.learning_rate, config.seed, config.snr_gamma) == (1e-4, 7, 0.0)
    assert not config.use_dora
    assert config.random_flip


def test_flags_take_precedence_over_the_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "rank: 16\nlearning_rate: 3e-4\nuse_dora: false\ntargets: [attention]\n"
        "resolution: null\nvalidation_prompt: a sks dog\nrandom_flip: true\n",
        encoding="utf-8",
    )
    config = parsed("--config", str(file), "--rank", "8", "--no-random_flip")
    assert config.rank == 8  # the default's value, but given
    assert not config.random_flip
    assert config.learning_rate == 3e-4
    assert not config.use_dora
    assert config.targets == ["attention"]
    assert config.validation_prompt == ["a sks dog"]


def test_it_writes_an_adapter_and_says_how_to_use_it(train_flags, tmp_path, capsys):
    output = tmp_path / "run"
    assert cli.main(["train", *train_flags(output)]) == 0
    out = capsys.readouterr().out
    assert f"done: {output / 'pytorch_lora_weights.safetensors'}" in out
    assert "'sks mug'" in out
    # The last lines are the next steps, which work as they stand.
    images, comfyui, diffusers = (line.split(":", 1) for line in out.splitlines()[-3:])
    assert (images[0], comfyui[0], diffusers[0]) == ("images", "ComfyUI", "Diffusers")
    assert cli.main(shlex.split(comfyui[1], comments=True)[1:]) == 0
    assert f"then copy '{output}.safetensors' into ComfyUI/models/loras" in comfyui[1]
    assert Path(f"{output}.safetensors").is_file()
    saved = read_config_file(output / "config.yaml")
    assert TrainConfig.from_dict(saved).learning_rate == 1e-2


def test_the_script_trains_the_same(trained, train_flags, tmp_path):
    flags = train_flags(tmp_path / "run")
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_dreambooth_dora.py"), *flags],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    first, second = read_adapter(trained).layers, read_adapter(tmp_path / "run").layers
    assert all(torch.equal(layer.up, second[name].up) for name, layer in first.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"instance_data_dir": "nowhere"}, "nowhere"),
        ({"pretrained_model_name_or_path": "embedded:nothing"}, "embedded"),
        ({"targets": "no_such_layer"}, "no_such_layer"),
        ({"learning_rate": -1}, "learning_rate is -1.0"),
    ],
)
def test_what_is_wrong_is_one_line(changes, message, train_flags, photos, tmp_path, capsys):
    plain = Path(shutil.copytree(photos, tmp_path / "photos"))
    for caption in plain.glob("*.txt"):
        caption.unlink()
    flags = train_flags(tmp_path / "run", **{"instance_data_dir": plain, **changes})
    assert cli.main(["train", *flags]) == 1
    captured = capsys.readouterr()
    line = captured.err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert message in line
    assert "Traceback" not in captured.err
    assert not list(tmp_path.rglob("*lora_weights*"))


@pytest.mark.skipif(HANGUP is None, reason="signals between processes are POSIX's")
def test_an_interrupted_run_saves_and_resumes(train_flags, tmp_path):
    output = tmp_path / "run"
    flags = train_flags(output, max_train_steps=100000, checkpointing_steps=2)
    process = subprocess.Popen(
        [sys.executable, "-m", "dora_diffusion", "train", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        encoding="utf-8",
    )
    try:
        begun = any(line.startswith("checkpoint: ") for line in process.stdout)
        assert begun, "the run ended before its first checkpoint"
        process.send_signal(signal.SIGINT)
        text, _ = process.communicate()
    finally:
        process.kill()
    assert process.returncode == 130, text
    assert "--resume_from_checkpoint latest" in text
    log = output / "metrics.jsonl"
    steps = max(json.loads(line)["step"] for line in log.read_text(encoding="utf-8").splitlines())
    again = train_flags(output, max_train_steps=steps + 2)
    assert cli.main(["train", *again, "--resume_from_checkpoint", "latest"]) == 0
    lines = [json.loads(line)["step"] for line in log.read_text(encoding="utf-8").splitlines()]
    assert lines == list(range(1, steps + 3))


def quick_flags(photos, output, *more):
    return [
        "train", "--instance_prompt", "a photo of a sks mug", "--max_train_steps", "1",
        "--num_validation_images", "0", "--checkpointing_steps", "0", "--rank", "2",
        "--instance_data_dir", str(photos), "--output_dir", str(output), *more,
    ]  # fmt: skip


def test_the_toy_model_is_not_taken_silently(photos, tmp_path, capsys):
    assert cli.main(quick_flags(photos, tmp_path / "out")) == 0
    captured = capsys.readouterr()
    assert "warning: NO BASE MODEL WAS GIVEN: embedded:tiny-sd is trained" in captured.err
    assert "training embedded:tiny-sd on cpu" in captured.out


def test_the_toy_model_that_is_named_says_what_it_does_not_know(photos, tmp_path, capsys):
    toy = ["--pretrained_model_name_or_path", "embedded:tiny-sd"]
    dog = [*toy, "--class_word", "dog"]
    for name, more, expected in (("dog", dog, True), ("mug", toy, False)):
        assert cli.main(quick_flags(photos, tmp_path / name, *more)) == 0
        err = capsys.readouterr().err
        assert ("warning: embedded:tiny-sd is a toy model of a drawn world" in err) == expected
        assert ("but no dog. Trained on real photos" in err) == expected


def test_a_run_without_a_token_names_no_empty_trigger_word(train_flags, tmp_path, capsys):
    assert cli.main(["train", *train_flags(tmp_path / "out", token="")]) == 0
    last = capsys.readouterr().out.splitlines()[-4]
    assert last.startswith("it has no trigger word: write prompts like its captions")
    assert last.endswith("such as 'a photo of a sks mug'")


def test_a_flag_without_effect_is_said_at_its_default_too(train_flags, tmp_path, capsys):
    assert cli.main(["train", *train_flags(tmp_path / "out", keep_tags=1, learning_rate=1e-3)]) == 0
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("warning: ")]
    assert lines == [
        "warning: keep_tags has no effect because shuffle_tags is off and tag_dropout is 0.0"
    ]


def test_a_finished_run_is_published_privately_when_asked(
    train_flags, tmp_path, monkeypatch, capsys
):
    calls = []
    monkeypatch.setattr(
        "dora_diffusion.export.hub.check", lambda name: calls.append(("check", name))
    )

    def push(folder, name, *, private):
        assert list(Path(folder).glob("*.safetensors"))
        calls.append(("push", name, private))
        return "https://hub/me/mug"

    monkeypatch.setattr("dora_diffusion.export.hub.push", push)
    flags = train_flags(tmp_path / "out", hub_model_id="me/mug")
    assert cli.main(["train", *flags, "--push_to_hub"]) == 0
    assert calls == [("check", "me/mug"), ("push", "me/mug", True)]
    assert capsys.readouterr().out.splitlines()[-1] == "https://hub/me/mug"


def test_a_result_that_the_hub_refuses_is_there(train_flags, tmp_path, monkeypatch, capsys):
    def push(*args, **kwargs):
        raise HubError("the hub refused me/mug: it is full")

    monkeypatch.setattr("dora_diffusion.export.hub.check", lambda name: None)
    monkeypatch.setattr("dora_diffusion.export.hub.push", push)
    flags = train_flags(tmp_path / "out", hub_model_id="me/mug")
    assert cli.main(["train", *flags, "--push_to_hub"]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    reason = "was not published: the hub refused me/mug: it is full"
    assert told == f"error: the result is in {tmp_path / 'out'}, but {reason}"
    assert list((tmp_path / "out").glob("*.safetensors"))


def test_a_dry_run_lists_what_trains_and_loads_no_model(tmp_path, samples_root, capsys):
    """Also where there is no such model: nothing of it is opened."""
    teapot = Path(shutil.copytree(samples_root / "heart_teapot", tmp_path / "teapot"))
    entries = [
        {"instance_data_dir": str(samples_root / "bolt_mug"), "repeats": 2},
        {"instance_data_dir": str(teapot), "token": "", "instance_prompt": None},
    ]
    file = tmp_path / "subjects.yaml"
    words = ["--pretrained_model_name_or_path", "no/model", "--instance_prompt", "a sks mug"]
    words += ["--max_train_steps", "30", "--train_batch_size", "2", "--with_prior_preservation"]
    entries[1]["with_prior_preservation"] = False
    file.write_text(yaml.safe_dump(entries), encoding="utf-8")
    assert cli.main(["train", "--dataset_config", str(file), *words, "--dry_run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    folder = samples_root / "bolt_mug"
    assert lines[0] == f"sks mug: 5 images, 2 times an epoch, prior: image-free, in {folder}"
    assert lines[1] == "    01.jpg: a photo of a sks mug on the grass"
    assert lines[6] == f"unchanged captions: 5 images, in {teapot}"
    assert lines[8] == "    02.jpg: a photo of a sks teapot on the beach"
    assert lines[-1] == "an epoch: 15 images; 30 steps of 2 are 4 epochs"
    for flags, end in (
        (["--num_train_epochs", "3"], "an epoch: 15 images; 3 epochs: about 23 steps of 2"),
        (["--num_train_epochs", "1", "--gradient_accumulation_steps", "4"],
         "an epoch: 15 images; 1 epoch: about 2 steps of 8"),
    ):  # fmt: skip
        epochs = [word for word in words if word not in ("--max_train_steps", "30")]
        assert cli.main(["train", "--dataset_config", str(file), *epochs, *flags, "--dry_run"]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == end
    (teapot / "03.txt").unlink()
    assert cli.main(["train", "--dataset_config", str(file), *words, "--dry_run"]) == 1
    assert "1 photo without a caption (03.jpg); write a .txt file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"resolution": 64}, "at 64 px"),
        ({"shuffle_caption": True}, "tags shuffled"),
        ({"shuffle_caption": True, "keep_tokens": 2}, "tags shuffled after the first 2"),
        ({"keep_tokens": 2}, ""),
        ({"flip_aug": True}, "mirrored at random"),
        ({"enable_bucket": True, "random_crop": True}, "in buckets, cut at random"),
        ({"enable_bucket": True, "resolution": 512},
         "at 512 px, in buckets (1 of 640 x 384, 1 of 512 x 512)"),
        ({"enable_bucket": True, "resolution": [64, 64], "min_bucket_reso": 16,
          "max_bucket_reso": 128, "bucket_reso_steps": 16, "caption_tag_dropout_rate": 0.5},
         "at 64 px, in buckets (1 of 80 x 48, 1 of 64 x 64), tags left out: 0.5"),
    ],
)  # fmt: skip
def test_a_dry_run_shows_what_sd_scripts_options_do(options, facts, tmp_path, capsys):
    for name, size in (("wide", (160, 100)), ("square", (100, 100))):
        Image.new("RGB", size, "red").save(tmp_path / f"{name}.png")
    file = tmp_path / "sd.json"
    file.write_text(
        json.dumps({"general": options | {"class_tokens": "sks mug"},
                    "datasets": [{"subsets": [{"image_dir": str(tmp_path)}]}]}), encoding="utf-8"
    )  # fmt: skip
    assert cli.main(["train", "--dataset_config", str(file), "--dry_run"]) == 0
    facts = f", {facts}" if facts else ""
    first = capsys.readouterr().out.splitlines()[0]
    assert first == f"sks mug: 2 images{facts}, in {tmp_path}"


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_same_for_a_flag_a_file_and_the_app(name, sd1_folder, tmp_path):
    file = tmp_path / "run.yaml"
    ends = ["--target", "a dog", "--positive", "a big dog", "--negative", "a tiny dog"]
    for model in (str(sd1_folder), "embedded:tiny-sd"):
        base = ["--pretrained_model_name_or_path", model, *(ends if name == "slider" else ())]
        by_flag = parsed("--preset", name, *base).to_dict()
        file.write_text(f"preset: {name}\n", encoding="utf-8")
        assert parsed("--config", str(file), *base).to_dict() == by_flag
        # The app fits what it fills in to the device, too.
        fitted = {"mixed_precision", "gradient_checkpointing", "optimizer"}
        app = {n: v for n, v in preset_values(name, model).items() if n not in fitted}
        assert {n: by_flag[n] for n in app} == app
    steps = {
        "fast": 400, "fast-word": 400, "balanced": 800, "quality": 1200, "style": 1200,
        "slider": 400, "object": 600, "pet": 800, "face": 1200, "one-photo": 400,
    }  # fmt: skip
    base[1] = str(sd1_folder)
    assert parsed("--preset", name, *base).max_train_steps == steps[name]


def test_a_preset_says_that_it_is_for_other_numbers_of_photos(tmp_path, recwarn):
    advice = {name: [bool(preset.photos_advice(n)) for n in (0, 1, 2, 5, 30)]
              for name, preset in PRESETS.items()}  # fmt: skip
    of_several = {"one-photo": [False, False, True, True, True], "slider": [False] * 5}
    assert advice == {
        name: of_several.get(name, [False, True, False, False, False]) for name in PRESETS
    }
    folder = tmp_path / "photos"
    folder.mkdir()
    words = ["--preset", "one-photo", "--instance_data_dir", str(folder), "--token", "sks"]
    words += ["--class_word", "mug", "--pretrained_model_name_or_path", "embedded:tiny-sd"]
    (folder / "._0.png").touch()  # As macOS writes beside a photo.
    for number in range(3):
        Image.new("RGB", (8, 8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a sks mug", encoding="utf-8")
        parsed(*words)
    lines = [str(w.message) for w in recwarn if str(folder) in str(w.message)]
    assert [line.partition(": ")[2].partition(" and")[0] for line in lines] == [
        f"{count} photos: this preset is for a single one" for count in (2, 3)
    ]


SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


@pytest.mark.parametrize("where", ["flag", "file"])
def test_a_memory_chooses_what_fits_it_and_nothing_that_is_given(where, tmp_path):
    file = tmp_path / "run.yaml"

    def fitted(gib, *flags):
        file.write_text(f"memory: {gib}\n", encoding="utf-8")
        asked = ["--memory", str(gib)] if where == "flag" else ["--config", str(file)]
        return parsed("--pretrained_model_name_or_path", SDXL, *asked, *flags)

    names = ("gradient_checkpointing", "optimizer", "quantize", "resolution")

    def values(*asked):
        return tuple(getattr(fitted(*asked), name) for name in names)

    # The rows of docs/howto/out-of-memory.md, with their margins.
    assert values(16) == (False, "adamw", "none", None)
    assert values(12) == (True, "adamw", "none", None)
    assert values(6) == (True, "adamw8bit", "int8", None)
    assert values(4) == (True, "adamw8bit", "nf4", None)
    assert values(3.5) == (True, "adamw8bit", "nf4", 768)
    # What does not fit at half the size gets the smallest settings: it is said later.
    assert values(2) == (True, "adamw8bit", "nf4", None)
    # A class image is another one of the batch, and what is given is kept.
    assert values(16, "--preset", "pet") == (True, "adamw", "none", None)
    assert values(6, "--quantize", "nf4", "--optimizer", "adamw") == (True, "adamw", "nf4", None)


@pytest.mark.parametrize("memory", ["0", "-1", "nan", "much", "1e9"])
def test_a_memory_that_is_none_is_refused(memory):
    with refused("memory", f"'{memory}'; give GiB"):
        parsed("--pretrained_model_name_or_path", SDXL, f"--memory={memory}")


def test_a_memory_does_nothing_to_a_toy_model():
    with pytest.warns(UserWarning, match="memory has no effect because embedded:tiny-sd fits"):
        config = parsed("--memory", "4", "--pretrained_model_name_or_path", "embedded:tiny-sd")
    assert config.quantize == "none"


def test_a_preset_of_a_model_elsewhere_says_what_it_takes_it_for(tmp_path):
    line = ["--preset", "fast", "--pretrained_model_name_or_path", "someone/model"]
    with pytest.warns(UserWarning, match=r"someone/model is not on this machine; .* 400 steps"):
        assert parsed(*line).max_train_steps == 400
    assert parsed(*line, "--max_train_steps", "7").max_train_steps == 7
    file = tmp_path / "run.yaml"
    file.write_text("preset: fats\n", encoding="utf-8")
    with refused("preset", "mean fast"):
        parsed("--config", str(file))


def test_a_pack_trains_each_subject_and_says_which_failed(sd1_folder, tmp_path, capsys):
    subjects = tmp_path / "subjects"
    shutil.copytree(ROOT / "samples" / "bolt_mug", subjects / "mug")
    for name in ("empty", "wrong"):
        (subjects / name).mkdir()
    (subjects / "wrong" / "subject.yaml").write_text("rank: -1", encoding="utf-8")
    flags = [
        "--pack", str(subjects), "--pretrained_model_name_or_path", str(sd1_folder),
        "--class_word", "mug", "--output_dir", str(tmp_path / "out"), "--max_train_steps", "1",
        "--resolution", "32", "--targets", "conv_in", "--num_validation_images", "0",
        "--checkpointing_steps", "0",
    ]  # fmt: skip
    assert cli.main(["train", *flags, "--method", "full"]) == 1
    assert "method full of empty is not possible in a pack" in capsys.readouterr().err
    assert cli.main(["train", *flags]) == 1
    said = capsys.readouterr().out
    adapter = tmp_path / "out" / "mug" / "pytorch_lora_weights.safetensors"
    assert f"mug: {adapter} (sks mug)" in said
    assert read_adapter(adapter).metadata.trigger == "sks mug"
    assert "empty failed: " in said
    assert f"wrong failed: {subjects / 'wrong' / 'subject.yaml'}: rank is -1" in said
    assert not (tmp_path / "out" / "empty").exists()
    assert cli.main(["train", *flags, "--dry_run"]) == 1
    said = capsys.readouterr().out
    assert "mug:\nsks mug: 5 images" in said
    assert "wrong: " in said
