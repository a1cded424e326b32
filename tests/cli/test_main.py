"""The command line: its help, and what is wrong usage."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

import pytest

from dora_diffusion.cli import main as cli
from dora_diffusion.config import settings

COMMANDS = tuple(cli.COMMANDS)


class TestHelp:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_help_names_what_it_takes(self, command, capsys):
        with pytest.raises(SystemExit) as stop:
            cli.main([command, "--help"])
        assert stop.value.code == 0
        assert "--debug" in capsys.readouterr().out

    def test_help_imports_nothing_heavy(self):
        code = (
            "import sys\nfrom dora_diffusion.cli import main as cli\n"
            f"for command in {COMMANDS}:\n"
            "    try: cli.main([command, '--help'])\n"
            "    except SystemExit as stop: assert stop.code == 0\n"
            "print(*[m for m in ('torch', 'numpy', 'PIL', 'diffusers', 'transformers', 'yaml', "
            "'gradio', 'tqdm') if m in sys.modules], file=sys.stderr)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            encoding="utf-8",
        )
        assert done.stderr.strip() == ""

    def test_every_setting_is_a_flag_with_its_help(self, capsys):
        with pytest.raises(SystemExit):
            cli.main(["train", "--help-all"])
        # Lines may end in a word's hyphen.
        text = " ".join(capsys.readouterr().out.split()).replace("- ", "-")
        for setting in settings():
            assert f"--{setting.name}" in text
            said = " ".join(setting.help.split()).replace("- ", "-")
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
            if is_shown and not action.required and action.dest not in ("help", "help_all"):
                assert "Default: " in formatter._get_help_string(action), action.option_strings

    def test_derived_defaults_are_said(self, capsys):
        with pytest.raises(SystemExit):
            cli.main(["train", "--help-all"])
        text = " ".join(capsys.readouterr().out.split())
        for words in (
            "Alpha of Linear layers. Default: rank, or init_adapter's.",
            "Training resolution in pixels. Default: the base model's own.",
            "Optimizer steps. Default: 800; SDXL and flows 1000.",
            "Learning rate of magnitudes. Default: their layer's.",
        ):
            assert words in text

    def test_names_and_defaults_in_help_texts_are_those_of_the_modules(self):
        """Their modules import torch: said twice, and compared."""
        from dora_diffusion.models.metric_models import LITE
        from dora_diffusion.sampling.settings import SamplingSettings

        texts = {
            (command, action.dest): action.help
            for command, parser in cli.build_parser()._subparsers._group_actions[0].choices.items()
            for action in parser._actions
        }
        assert f"Default: {LITE} if it is installed" in texts["evaluate", "metric_model"]
        settings = SamplingSettings()
        assert f"else {settings.guidance_scale}." in texts["evaluate", "guidance_scale"]
        words = ["generate", "--base", "b", "--prompt", "x", "--output", "x.png"]
        args = cli.read_settings(cli.build_parser().parse_args(words)).values()
        for name in ("scheduler", "width", "height", "negative_prompt"):
            assert args[name] == getattr(settings, name)
        # Left to models and adapters for few steps.
        assert f"Default: {settings.steps}, of transformers" in texts["generate", "steps"]
        assert f"Default: {settings.guidance_scale}, of" in texts["generate", "guidance_scale"]
        assert args["steps"] is None
        assert args["guidance_scale"] is None


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


def test_commands_ask_torch_for_large_pages_unless_the_user_has_a_say(monkeypatch):
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    cli.tune_process()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


def test_a_character_that_the_code_page_lacks_does_not_end_a_command(tmp_path):
    """As where Windows' output goes into a file or another program."""
    code = "import sys; from dora_diffusion.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "samples", str(tmp_path / "Käthe 猫")]
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(command, capture_output=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert b"K\xe4the \\u732b" in done.stdout
