"""Mistakes on the command line: the last line says what is wrong and what was meant."""

from __future__ import annotations

import re

import pytest

from dora_diffusion.cli import main as cli
from dora_diffusion.cli.commands.train import FIRST, train_config
from dora_diffusion.config import settings

MISUSES = [
    ("convert a b --to AUTOMATIC1111", "(did you mean a1111?)"),
    ("convert a b --to webui", "(did you mean a1111?)"),
    ("convert a b --to kohya_ss", "(did you mean sd-scripts?)"),
    ("convert a b --to comfy", "(did you mean comfyui?)"),
    ("convert a b --to invoke", "(did you mean invokeai?)"),
    ("train --lr 1e-4", "there is no flag --lr (did you mean --learning_rate?)"),
    ("train --steps 9", "there is no flag --steps (did you mean --max_train_steps?)"),
    ("train --network_dim 8", "--network_dim of sd-scripts is not here: use --rank"),
    ("train --instance-prompt x", "(did you mean --instance_prompt?)"),
    ("train --max_train 3 --rnk 4", "there is no flag --max_train (did you mean "
     "--max_train_steps?); there is no flag --rnk (did you mean --rank?)"),
    ("train --rank=high", "--rank is 'high'; it must be a whole number"),
    ("train --learning_rate 1,5", "--learning_rate is '1,5'; it must be a number"),
    ("train --norm_axis inptu", "--norm_axis cannot be 'inptu' (did you mean input?); choose "
     "output, input"),
    ("train --report_to tensorbord", "(did you mean tensorboard?); choose tensorboard, wandb"),
    ("train --instance_prompt a photo", "1 word too many: photo; put a value that has spaces in "
     "quotes"),
    ("train README.md", "1 word too many: README.md; a file of settings is given as --config "
     "README.md"),
    ("train --rank", "--rank needs a value"),
    ("train --use_dora maybe", "--use_dora takes no value 'maybe'; write --use_dora or "
     "--no-use_dora"),
    ("train --use_dora=maybe", "--use_dora takes no value 'maybe'"),
    ("train --no-use_dora true", "--no-use_dora takes no value 'true'"),
    ("train --hub_token x", "set the environment variable HF_TOKEN"),
    ("generate --model x --promt y", "there is no flag --model (did you mean --base?); there is no "
     "flag --promt (did you mean --prompt?)"),
    ("generate --base x --prompt y", "--output must be given"),
    ("convert a b --to comfy", "--to cannot be 'comfy' (did you mean comfyui?); choose comfyui"),
    ("app --prot 8000", "there is no flag --prot (did you mean --port?)"),
    ("trainn", "there is no command 'trainn' (did you mean train?); choose train, generate"),
    ("compare study.yaml --quick", "it is in the laboratory; run python -m lab compare ... in a "),
    ("analyze a --base b", "it is in the laboratory; run python -m lab analyze ... in a clone"),
    ("simulate --rate 1", "it is in the laboratory; run python -m lab simulate ... in a clone of"),
    ("--rank 4", "there is no flag --rank before the command"),
    ("", "name a command: train, generate, "),
]  # fmt: skip


@pytest.mark.parametrize(("line", "message"), MISUSES, ids=[line for line, _ in MISUSES])
def test_a_mistake_is_answered_in_one_line(line, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(line.split())
    assert stop.value.code == 2
    usage, error = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: dora-diffusion")
    assert len(usage) < 150
    assert error.startswith("error: ")
    assert message in error


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--mixed_precision fp32", "no"),
        ("--mixed_precision bfloat16", "bf16"),
        ("--mixed_precision FP16", "fp16"),
    ],
)
def test_precisions_are_taken_under_their_other_names(words, expected):
    args = cli.build_parser().parse_args(["train", *words.split()])
    assert train_config(args).mixed_precision == expected


def test_a_switch_takes_a_value_as_in_scripts_with_type_bool():
    for words, value in (
        ("--use_dora", True), ("--no-use_dora", False), ("--use_dora TRUE", True),
        ("--use_dora=1", True), ("--use_dora off", False), ("--use_dora=no --rank 4", False),
    ):  # fmt: skip
        args = cli.build_parser().parse_args(["train", *words.split()])
        assert train_config(args).use_dora is value, words


def test_a_tracker_may_be_none():
    args = cli.build_parser().parse_args(["train", "--report_to", "none"])
    assert train_config(args).report_to is None


def test_a_file_of_settings_leaves_the_parser_as_it_was():
    """Help can be shown with it, and the next command needs what is required again."""
    (commands,) = (a for a in cli.build_parser()._actions if isinstance(a.choices, dict))
    parsers = [command for command in commands.choices.values() if command.has_file]
    assert len(parsers) > 10
    for command in parsers:
        before = command.format_help()
        with pytest.raises(SystemExit) as stop:
            command.parse_args(["--config", "x.yaml", "--help"])
        assert stop.value.code == 0
        assert command.format_help() == before


def shown(capsys, flag):
    """The help of train: its text, headings, and settings."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", flag])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    return text, re.findall(r"^(\w.*):$", text, re.M)[1:], re.findall(r"^  --(\w+)", text, re.M)


def test_help_lists_settings_under_their_headings_those_that_matter_first_alone(capsys):
    text, headings, names = shown(capsys, "--help")
    assert text.startswith("usage: dora-diffusion train [--config FILE] [--SETTING VALUE ...]\n")
    expected = [
        "Model", "Subject", "Data", "Adapter", "Optimization", "Memory and precision",
        "Validation", "Output",
    ]  # fmt: skip
    assert headings == expected
    every, all_headings, all_names = shown(capsys, "--help-all")
    assert all_headings == [*expected[:2], "Slider", *expected[2:]]
    known = [setting.name for setting in settings()]
    assert [name for name in all_names if name in known] == known
    assert [name for name in names if name in known] == [n for n in known if n in FIRST]
    assert len(FIRST) == len(set(FIRST)) == 20
    assert f"These are 20 of {len(known)} settings; --help-all shows all." in text
    assert "enable_xformers" not in every
    assert len(text.splitlines()) < 100 < len(every.splitlines())


def test_every_command_that_reads_an_adapter_takes_its_alpha():
    base = ["--base", "b", "--alpha", "3"]
    for words in (
        ["generate", "--prompt", "x", "--output", "x.png", "--adapter", "a"],
        ["evaluate", "a", "--subject", "s"],
        ["export", "--adapter", "a", "--output", "o"],
        ["verify", "m", "--adapter", "a"],
        ["convert", "a", "o", "--to", "kohya"],
    ):
        assert cli.build_parser().parse_args([*words, *base]).alpha == 3.0
