"""The command line: flags and files of settings, exit codes, one plain line per error."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from dora_diffusion import cli
from dora_diffusion.commands.flags import train_config
from dora_diffusion.config import ConfigError, TrainConfig
from dora_diffusion.console import errors
from dora_diffusion.export import CONVERSIONS
from dora_diffusion.formats.adapter.file import read_adapter
from dora_diffusion.images import parse_parameters, read_parameters
from dora_diffusion.models.components import SAMPLERS
from dora_diffusion.models.load import load_components
from dora_diffusion.training.metrics import TrainingError

ROOT = Path(__file__).parents[1]
COMMANDS = tuple(cli.build_parser()._subparsers._group_actions[0].choices)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("subject") / "photos"
    return Path(shutil.copytree(ROOT / "samples" / "bolt_mug", folder))


def train_flags(model, photos, output, **changes):
    values = {
        "pretrained_model_name_or_path": model,
        "instance_data_dir": photos,
        "instance_prompt": "a photo of a sks mug",
        "output_dir": output,
        "resolution": 32,
        "rank": 2,
        "conv_rank": 2,
        "max_train_steps": 3,
        "num_validation_images": 0,
        "checkpointing_steps": 0,
        "learning_rate": "1e-2",
        **changes,
    }
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def trained(sd1_folder, photos, tmp_path_factory):
    """The output folder of a short run of the command."""
    output = tmp_path_factory.mktemp("trained") / "run"
    assert cli.main(["train", *train_flags(sd1_folder, photos, output)]) == 0
    return output


def last_line(capsys):
    return capsys.readouterr().err.strip().splitlines()[-1]


def parsed(*flags):
    return train_config(cli.build_parser().parse_args(["train", *flags]))


class TestHelp:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_help_names_what_it_takes(self, command, capsys):
        with pytest.raises(SystemExit) as stop:
            cli.main([command, "--help"])
        assert stop.value.code == 0
        assert "--debug" in capsys.readouterr().out

    def test_help_imports_nothing_heavy(self):
        code = (
            "import sys\nfrom dora_diffusion import cli\n"
            f"for command in {COMMANDS}:\n"
            "    try: cli.main([command, '--help'])\n"
            "    except SystemExit as stop: assert stop.code == 0\n"
            "print(*[m for m in ('torch', 'numpy', 'PIL', 'diffusers', 'transformers', 'yaml', "
            "'gradio', 'tqdm') if m in sys.modules], file=sys.stderr)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert done.stderr.strip() == ""

    def test_every_setting_is_a_flag_with_its_help(self, capsys):
        with pytest.raises(SystemExit):
            cli.main(["train", "--help"])
        text = " ".join(capsys.readouterr().out.split())
        for setting in dataclasses.fields(TrainConfig):
            assert f"--{setting.name}" in text
            said = " ".join(setting.metadata["help"].split())
            assert said[:25] in text
            assert f"{said} Default: " in text
            if isinstance(setting.default, bool):
                assert f"{said} Default: {'on' if setting.default else 'off'}." in text
            elif isinstance(setting.default, int | float):
                assert f"{said} Default: {setting.default}." in text

    @pytest.mark.parametrize("command", COMMANDS)
    def test_every_optional_flag_says_its_default(self, command):
        parser = cli.build_parser()._subparsers._group_actions[0].choices[command]
        formatter = parser._get_formatter()
        for action in parser._actions:
            is_shown = action.option_strings and action.help != argparse.SUPPRESS
            if is_shown and not action.required and action.dest != "help":
                assert "Default: " in formatter._get_help_string(action), action.option_strings

    def test_derived_defaults_are_said(self, capsys):
        with pytest.raises(SystemExit):
            cli.main(["train", "--help"])
        text = " ".join(capsys.readouterr().out.split())
        for words in (
            "Alpha of Linear layers. Default: rank.",
            "Training size in pixels. Default: the base model's own.",
            "Optimizer steps. Default: 800, for SDXL 1000.",
            "Learning rate of magnitudes. Default: their layer's.",
        ):
            assert words in text

    def test_written_out_choices_are_those_of_the_modules(self):
        assert tuple(SAMPLERS) == cli.SAMPLERS
        assert tuple(CONVERSIONS) == cli.FORMATS


class TestUsage:
    @pytest.mark.parametrize(
        "argv",
        [
            [],
            ["paint"],
            ["train", "--rank", "high"],
            ["train", "--max_train", "3"],  # no abbreviations
            ["train", "--norm_axis", "sideways"],
            ["generate", "--prompt", "x"],
            ["generate", "--base", "x", "--prompt", "x", "--output", "x.png", "--scheduler", "y"],
            ["convert", "a", "b", "--to", "c"],
        ],
    )
    def test_wrong_usage_is_two(self, argv, capsys):
        with pytest.raises(SystemExit) as stop:
            cli.main(argv)
        assert stop.value.code == 2
        usage, error = capsys.readouterr().err.splitlines()
        assert usage.startswith("usage: dora-diffusion")
        assert error.startswith("error: ")


class TestSettings:
    def test_no_flags_are_the_defaults(self):
        assert parsed() == TrainConfig()

    def test_flags_take_the_types_of_their_settings(self):
        config = parsed(
            "--targets", "attention", "down_blocks.*", "--learning_rate", "1e-4", "--seed", "7",
            "--no-use_dora", "--random_flip", "--snr_gamma", "0",
        )  # fmt: skip
        assert config.targets == ["attention", "down_blocks.*"]
        assert (config.learning_rate, config.seed, config.snr_gamma) == (1e-4, 7, 0.0)
        assert not config.use_dora
        assert config.random_flip

    def test_flags_take_precedence_over_the_file(self, tmp_path):
        file = tmp_path / "run.yaml"
        file.write_text(
            "rank: 16\nlearning_rate: 3e-4\nuse_dora: false\ntargets: [attention]\n"
            "resolution: null\nvalidation_prompt: a sks dog\nrandom_flip: true\n"
        )
        config = parsed("--config", str(file), "--rank", "8", "--no-random_flip")
        assert config.rank == 8  # the default's value, but given
        assert not config.random_flip
        assert config.learning_rate == 3e-4
        assert not config.use_dora
        assert config.targets == ["attention"]
        assert config.validation_prompt == ["a sks dog"]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (
                "seed: 1\nlearning_rte: 1",
                "run.yaml, line 2: there is no setting learning_rte (did you mean learning_rate?)",
            ),
            ("seed: 1\nrank: many", "run.yaml, line 2: rank is 'many'; it must be a whole number"),
            ("use_dora: 1", "line 1: use_dora is 1; it must be true or false"),
            ("rank: 0", "line 1: rank is 0; it must be greater than 0"),
            ("optimizer: sgd", "line 1: optimizer is 'sgd'; it must be one of adamw"),
            ("optimizer: adamx", "(did you mean adamw?)"),
            ("- rank", "must hold 'setting: value' lines"),
            ("seed: 1\nrank: [", "run.yaml, line 2: this is not valid YAML"),
            ("seed: 1\nrank: 4\nseed: 2", "run.yaml, line 3: seed is already set in line 1"),
            (
                "seed: 1\nscale_lr: true",
                "line 2: scale_lr of Diffusers' scripts is not here",
            ),
            ("instance_prompt: a: b", "run.yaml, line 1: this is not valid YAML"),
        ],
    )
    def test_a_wrong_file_is_one_line(self, tmp_path, capsys, text, message):
        file = tmp_path / "run.yaml"
        file.write_text(text)
        assert cli.main(["train", "--config", str(file)]) == 1
        line = last_line(capsys)
        assert line.startswith("error: ")
        assert message in line

    def test_a_missing_file_is_one_line(self, capsys):
        assert cli.main(["train", "--config", "nowhere.yaml"]) == 1
        assert "cannot read the config file nowhere.yaml" in last_line(capsys)


class TestTrain:
    def test_it_writes_an_adapter_and_says_how_to_use_it(
        self, sd1_folder, photos, tmp_path, capsys
    ):
        output = tmp_path / "run"
        assert cli.main(["train", *train_flags(sd1_folder, photos, output)]) == 0
        out = capsys.readouterr().out
        assert f"done: {output / 'pytorch_lora_weights.safetensors'}" in out
        assert "'sks mug'" in out
        saved = yaml.safe_load((output / "config.yaml").read_text())
        assert TrainConfig.from_dict(saved).learning_rate == 1e-2

    def test_the_script_trains_the_same(self, trained, sd1_folder, photos, tmp_path):
        flags = train_flags(sd1_folder, photos, tmp_path / "run")
        done = subprocess.run(
            [sys.executable, str(ROOT / "train_dreambooth_dora.py"), *flags],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        first, second = read_adapter(trained).layers, read_adapter(tmp_path / "run").layers
        assert all(torch.equal(layer.up, second[name].up) for name, layer in first.items())

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"instance_data_dir": "nowhere"}, "nowhere"),
            ({"pretrained_model_name_or_path": "./nowhere"}, "nowhere does not exist"),
            ({"pretrained_model_name_or_path": "embedded:nothing"}, "embedded"),
            ({"targets": "no_such_layer"}, "no_such_layer"),
            ({"rank": 4096}, "use rank <= "),
            ({"instance_prompt": "a photo of a mug"}, "sks"),
            ({"mixed_precision": "fp16"}, "fp16 needs a CUDA GPU"),
            ({"learning_rate": -1}, "learning_rate is -1.0"),
        ],
    )
    def test_what_is_wrong_is_one_line(
        self, changes, message, sd1_folder, photos, tmp_path, capsys
    ):
        if changes.get("mixed_precision") and torch.cuda.is_available():
            pytest.skip("there is a GPU")
        plain = Path(shutil.copytree(photos, tmp_path / "photos"))
        for caption in plain.glob("*.txt"):
            caption.unlink()
        flags = train_flags(sd1_folder, plain, tmp_path / "run", **changes)
        assert cli.main(["train", *flags]) == 1
        captured = capsys.readouterr()
        line = captured.err.strip().splitlines()[-1]
        assert line.startswith("error: ")
        assert message in line
        assert "Traceback" not in captured.err
        assert not list(tmp_path.rglob("*lora_weights*"))

    def test_an_earlier_result_is_not_overwritten(self, trained, sd1_folder, photos, capsys):
        before = (trained / "pytorch_lora_weights.safetensors").read_bytes()
        assert cli.main(["train", *train_flags(sd1_folder, photos, trained)]) == 1
        assert "--overwrite_output_dir" in last_line(capsys)
        assert (trained / "pytorch_lora_weights.safetensors").read_bytes() == before

    @pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
    def test_an_interrupted_run_saves_and_resumes(self, sd1_folder, photos, tmp_path, capsys):
        output = tmp_path / "run"
        flags = train_flags(sd1_folder, photos, output, max_train_steps=100000)
        process = subprocess.Popen(
            [sys.executable, "-m", "dora_diffusion", "train", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        try:
            log = output / "metrics.jsonl"
            deadline = time.monotonic() + 240
            while not (log.is_file() and log.read_text().count("\n") > 1):
                assert process.poll() is None, process.communicate()[0]
                assert time.monotonic() < deadline, "the run did not start"
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            text, _ = process.communicate(timeout=240)
        finally:
            process.kill()
        assert process.returncode == 130, text
        assert "--resume_from_checkpoint latest" in text
        steps = max(json.loads(line)["step"] for line in log.read_text().splitlines())
        again = train_flags(sd1_folder, photos, output, max_train_steps=steps + 2)
        assert cli.main(["train", *again, "--resume_from_checkpoint", "latest"]) == 0
        lines = [json.loads(line)["step"] for line in log.read_text().splitlines()]
        assert lines == list(range(1, steps + 3))


class TestGenerate:
    def run(self, sd1_folder, output, *more):
        return cli.main(
            ["generate", "--base", str(sd1_folder), "--prompt", "a photo of a sks mug",
             "--steps", "2", "--output", str(output), *more]
        )  # fmt: skip

    def test_pictures_carry_their_seed_and_settings(self, sd1_folder, trained, tmp_path, capsys):
        more = ("--adapter", str(trained), "--seed", "5", "--num_images", "2", "--strength", "0.5")
        assert self.run(sd1_folder, tmp_path / "x.png", *more) == 0
        assert sorted(path.name for path in tmp_path.iterdir()) == ["x-5.png", "x-6.png"]
        assert "(seed 6)" in capsys.readouterr().out
        facts = parse_parameters(read_parameters(tmp_path / "x-6.png"))
        assert facts["Prompt"] == "a photo of a sks mug"
        assert (facts["Seed"], facts["Steps"], facts["Size"]) == ("6", "2", "64x64")
        assert (facts["Adapter strength"], facts["Adapter"]) == ("0.5", trained.name)
        assert self.run(sd1_folder, tmp_path / "y.png", *more[:2], "--seed", "6", *more[-2:]) == 0
        one, other = (
            np.asarray(Image.open(tmp_path / name), np.int16) for name in ("x-6.png", "y.png")
        )
        assert np.abs(one - other).max() <= 1

    def test_partial_strengths_are_written_into_the_picture(self, sd1_folder, trained, tmp_path):
        path, adapter = tmp_path / "x.png", ("--adapter", str(trained))
        part = ("--direction_strength", "0.5", "--magnitude_strength", "0")
        assert self.run(sd1_folder, path, *adapter, *part) == 0
        facts = parse_parameters(read_parameters(path))
        assert (facts["Direction strength"], facts["Magnitude strength"]) == ("0.5", "0")
        assert facts["Adapter strength"] == "1"
        assert self.run(sd1_folder, path, *adapter, "--overwrite") == 0
        assert "Direction" not in read_parameters(path)
        assert "Magnitude" not in read_parameters(path)

    def test_strength_zero_is_the_base(self, sd1_folder, trained, tmp_path):
        adapter = ("--adapter", str(trained), "--strength", "0")
        assert self.run(sd1_folder, tmp_path / "base.png", "--seed", "1") == 0
        assert self.run(sd1_folder, tmp_path / "off.png", "--seed", "1", *adapter) == 0
        base, off = (np.asarray(Image.open(tmp_path / n)) for n in ("base.png", "off.png"))
        assert np.array_equal(base, off)

    def test_a_random_seed_is_shown(self, sd1_folder, tmp_path, capsys):
        assert self.run(sd1_folder, tmp_path / "x.png") == 0
        seed = parse_parameters(read_parameters(tmp_path / "x.png"))["Seed"]
        assert f"(seed {seed})" in capsys.readouterr().out

    def test_a_forgotten_trigger_word_is_told(self, sd1_folder, trained, tmp_path, capsys):
        more = ("--adapter", str(trained), "--prompt", "a photo of a mug")
        assert self.run(sd1_folder, tmp_path / "x.png", *more) == 0
        error = capsys.readouterr().err
        assert "warning: the prompt lacks the adapter's trigger word; write 'sks mug'" in error

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            (("--base", "./nowhere"), "nowhere does not exist"),
            (("--adapter", "nowhere"), "there is no adapter at nowhere"),
            (("--adapter", "{photos}"), "no adapter file in it"),
            (("--adapter", "{broken}"), "broken.safetensors"),
            (("--output", "x.jpg"), "x.jpg must end in .png"),
            (("--num_images", "0"), "num_images is 0"),
            (("--steps", "0"), "steps is 0"),
            (("--width", "33"), "33"),
            (("--seed", "-4"), "seed is -4"),
        ],
    )
    def test_what_is_wrong_is_one_line(self, more, message, sd1_folder, photos, tmp_path, capsys):
        broken = tmp_path / "broken.safetensors"
        broken.write_bytes(b"not a tensor file")
        more = [part.format(photos=photos, broken=broken) for part in more]
        assert self.run(sd1_folder, tmp_path / "x.png", *more) == 1
        line = last_line(capsys)
        assert line.startswith("error: ")
        assert message in line
        assert not (tmp_path / "x.png").exists()


class TestFiles:
    def test_export_writes_a_model_that_acts_like_the_adapter(
        self, sd1_folder, trained, tmp_path, capsys
    ):
        argv = ["export", "--base", str(sd1_folder), "--adapter", str(trained)]
        merged = tmp_path / "merged"
        assert cli.main([*argv, "--output", str(merged)]) == 0
        assert f"{merged} (reopened and checked)" in capsys.readouterr().out
        base = load_components(sd1_folder).unet.state_dict()
        changed = [
            name
            for name, value in load_components(merged).unet.state_dict().items()
            if not torch.equal(value, base[name])
        ]
        layers = [name.removeprefix("unet.") for name in read_adapter(trained).layers]
        assert sorted(changed) == sorted(f"{name}.weight" for name in layers)
        assert cli.main([*argv, "--output", str(merged)]) == 1
        assert "exists" in last_line(capsys)
        single = tmp_path / "merged.safetensors"
        assert cli.main([*argv, "--output", str(single), "--dtype", "float16"]) == 0
        assert single.is_file()

    def test_convert_and_inspect(self, trained, sd1_folder, tmp_path, capsys):
        file = tmp_path / "kohya.safetensors"
        assert cli.main(["convert", str(trained), str(file), "--to", "kohya"]) == 0
        said = capsys.readouterr().out
        assert f"{file}: " in said
        assert "\nexact: LyCORIS\n" in said
        wrong = next(line for line in said.splitlines() if line.startswith("wrong: "))
        for program in ("diffusers", "ComfyUI and Forge", "A1111", "InvokeAI", "sd-scripts"):
            assert program in wrong
        assert cli.main(["inspect", str(file), "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert (facts["method"], facts["key_format"], facts["rank"]) == ("DoRA", "kohya", 2)
        assert cli.main(["inspect", str(trained)]) == 0
        assert "sks mug" in capsys.readouterr().out
        assert cli.main(["convert", str(trained), str(file), "--to", "kohya"]) == 1
        assert "exists" in last_line(capsys)
        assert cli.main(["convert", str(file), str(file), "--to", "diffusers"]) == 1
        assert "is or holds what is read for it" in last_line(capsys)
        approximation = [str(file), str(tmp_path / "lora.safetensors"), "--to", "lora"]
        assert cli.main(["convert", *approximation]) == 1
        assert "base model" in last_line(capsys)
        assert cli.main(["convert", *approximation, "--base", str(sd1_folder), "--rank", "8"]) == 0
        assert "relative error" in capsys.readouterr().out

    def test_inspect_of_something_else_is_one_line(self, tmp_path, capsys):
        assert cli.main(["inspect", str(tmp_path)]) == 1
        assert "no adapter file in it" in last_line(capsys)

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("run", ("run", 1.0)),
            ("a/b.safetensors:0.5", ("a/b.safetensors", 0.5)),
            ("run:-1", ("run", -1.0)),
            ("run:1e-3", ("run", 0.001)),
            ("run:.5", ("run", 0.5)),
            (r"C:\run", (r"C:\run", 1.0)),
        ],
    )
    def test_an_adapter_may_have_its_own_strength(self, text, expected):
        from dora_diffusion.commands.export import adapter_and_strength

        assert adapter_and_strength(text) == expected


class TestReport:
    """How errors end a command."""

    def ending(self, error, command="train", debug=False):
        with errors.reporting_errors(command, debug=debug) as outcome:
            raise error
        return outcome.code

    @pytest.mark.parametrize(
        "error",
        [
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
            MemoryError(),
            RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
        ],
    )
    def test_out_of_memory_has_its_own_code_and_advice(self, error, capsys):
        assert self.ending(error) == 3
        assert "--gradient_checkpointing" in last_line(capsys)
        assert self.ending(error, "generate") == 3
        assert "--batch_size" in last_line(capsys)

    def test_the_cpu_allocator_is_recognised(self):
        with pytest.raises(RuntimeError) as failure:
            torch.empty(10**15)
        assert errors.is_out_of_memory(failure.value)

    @pytest.mark.parametrize(
        ("error", "line"),
        [
            (ConfigError("rank is 0"), "error: rank is 0"),
            (TrainingError("the loss is nan\nat step 3"), "error: the loss is nan at step 3"),
            (FileNotFoundError(2, "No such file", "x.png"), "error: x.png does not exist"),
            (PermissionError(13, "Permission denied", "x"), "error: x: Permission denied"),
            (
                OSError(28, "the disk is full: x could not be written"),
                "error: the disk is full: x could not be written",
            ),
        ],
    )
    def test_what_a_user_can_mend_is_one_line(self, error, line, capsys):
        assert self.ending(error) == 1
        assert capsys.readouterr().err == f"{line}\n"

    def test_defects_keep_their_traceback(self):
        with pytest.raises(TypeError):
            self.ending(TypeError("a defect"))

    def test_debug_shows_every_traceback(self, monkeypatch):
        with pytest.raises(ConfigError):
            self.ending(ConfigError("rank is 0"), debug=True)
        monkeypatch.setenv("DORA_DIFFUSION_DEBUG", "1")
        with pytest.raises(ConfigError):
            self.ending(ConfigError("rank is 0"))

    def test_an_interrupt_is_130(self, capsys):
        assert self.ending(KeyboardInterrupt()) == 130
        assert "interrupted" in last_line(capsys)


def test_commands_ask_torch_for_large_pages_unless_the_user_has_a_say(monkeypatch):
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    cli.tune_process()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
