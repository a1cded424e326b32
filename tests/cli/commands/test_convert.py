"""``dora-diffusion convert``: what it writes, and lines that agree with what `inspect` says."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from dora_diffusion.cli import main as cli
from dora_diffusion.cli.main import main
from dora_diffusion.export import ExportError, convert_adapter
from dora_diffusion.formats.layouts import NOT_TARGETS, PROGRAMS, TARGETS


def test_every_conversion_can_be_asked_for() -> None:
    for name in TARGETS:
        for word in (name, name.upper(), name.title(), name.replace("-", "_")):
            assert cli.build_parser().parse_args(["convert", "a", "b", "--to", word]).to == name


@pytest.mark.parametrize("word", [*NOT_TARGETS, "DoRA"])
def test_a_word_that_is_no_target_is_answered_with_what_is(
    word: str, tmp_path: Path, last_line: Callable[[], str]
) -> None:
    """On the command line, in a file and in Python, alike; and no list has it."""
    advice = NOT_TARGETS[word.lower()]
    assert word.lower() not in TARGETS
    assert {"comfyui", "diffusers", "smaller-rank"} <= {*re.split(r"[\s,;]+", advice)} & {*TARGETS}
    with pytest.raises(SystemExit):
        main(["convert", "a", "b", "--to", word])
    assert last_line() == f"error: --to cannot be {word!r}: {advice}"
    (tmp_path / "to.yaml").write_text(f"to: {word}\n", encoding="utf-8")
    assert main(["convert", "a", "b", "--config", str(tmp_path / "to.yaml")]) == 1
    assert last_line().endswith(f"to.yaml, line 1: to cannot be {word!r}: {advice}")
    with pytest.raises(ExportError, match=re.escape(advice)):
        convert_adapter(tmp_path, tmp_path / "b", word)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_file_for_a_program_says_in_one_line_what_it_costs(
    name: str, trained: Path, sd1_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["convert", str(trained), str(tmp_path / "a.safetensors"), "--to", name]
    rank = ["--rank", "1"] if PROGRAMS[name].output_axis == "lora" else []
    assert main([*command, "--base", str(sd1_folder), *rank]) == 0
    start, cost = capsys.readouterr().out.splitlines()[-1].split(": exact", 1)
    assert start == f"for {PROGRAMS[name].title} ({PROGRAMS[name].place})"
    costs = {
        "comfyui": "for its base: wrong with any other", "forge": "bypass mode",
        "a1111": "times as large as the adapter", "invokeai": "wrong with any other",
        "diffusers": "", "sd-scripts": "which is off the DoRA by",
        "civitai": "; a merged model is exact",
    }  # fmt: skip
    assert costs[name] in cost


def test_it_says_where_the_file_is_exact(trained, sd1_folder, tmp_path, capsys, last_line):
    file = tmp_path / "kohya.safetensors"
    assert main(["convert", str(trained), str(file), "--to", "kohya"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{file}: ")
    assert (
        'exact: LyCORIS (with LycorisNetwork.LORA_PREFIX = "lora_unet", without which it finds no '
        "layer)"
    ) in lines
    (wrong,) = (line for line in lines if line.startswith("wrong: "))
    for program in ("diffusers", "ComfyUI and Forge", "A1111", "InvokeAI", "sd-scripts"):
        assert program in wrong
    assert main(["convert", str(trained), str(file), "--to", "kohya"]) == 1
    assert "exists" in last_line()
    assert main(["convert", str(file), str(file), "--to", "diffusers"]) == 1
    assert "contains the input" in last_line()


def test_a_folder_can_be_packed(trained, tmp_path, capsys, last_line):
    """Nothing else is written, and what lies beside it stays."""
    beside = tmp_path / "mug"
    beside.mkdir()
    (beside / "mine.txt").write_text("mine", encoding="utf-8")
    command = ["convert", str(trained), str(tmp_path / "mug.zip"), "--to", "peft"]
    assert main(command) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'mug.zip'}: ")
    names = zipfile.ZipFile(tmp_path / "mug.zip").namelist()
    assert "unet/adapter_model.safetensors" in names
    assert main(command) == 1
    assert last_line().endswith("mug.zip exists; choose another output, or --overwrite")
    assert main([*command, "--overwrite"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"mug", "mug.zip"}
    assert [path.name for path in beside.iterdir()] == ["mine.txt"]


def test_an_approximation_says_its_error(trained, sd1_folder, tmp_path, capsys, last_line):
    command = ["convert", str(trained), str(tmp_path / "lora.safetensors"), "--to", "lora"]
    assert main(command) == 1
    assert "give that model with --base" in last_line()
    assert main([*command, "--base", str(sd1_folder), "--rank", "8"]) == 0
    assert "relative error of the change: median " in capsys.readouterr().out


def test_a_plain_lora_is_not_described_as_a_dora(
    lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The verdicts say how exact a file is: they know what it holds."""
    output = tmp_path / "k.safetensors"
    assert main(["convert", str(lora), str(output), "--to", "kohya", "--family", "sd1"]) == 0
    first, *others = capsys.readouterr().out.splitlines()
    assert first.endswith(" layers, in the key format of kohya's sd-scripts and LyCORIS")
    assert any(line.startswith("exact: ") and "LyCORIS" in line for line in others)


def test_a_rank_without_effect_is_said(
    lora: Path, tmp_path: Path, last_line: Callable[[], str]
) -> None:
    words = ["convert", str(lora), str(tmp_path / "k"), "--to", "kohya", "--family", "sd1"]
    assert main([*words, "--rank", "4"]) == 0
    assert last_line().startswith("warning: rank has no effect because kohya files keep")


def test_pickles_are_not_written(
    lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["convert", str(lora), str(tmp_path / "k.ckpt"), "--to", "kohya", "--family", "sd1"]
    assert main(words) == 1
    assert "k.ckpt: pickles are not written" in capsys.readouterr().err
    assert not (tmp_path / "k.ckpt").exists()


def test_a_base_that_is_missing_is_asked_for_by_its_flag(
    lora: Path, tmp_path: Path, last_line: Callable[[], str]
) -> None:
    assert main(["convert", str(lora), str(tmp_path / "x"), "--to", "dense"]) == 1
    assert "give that model with --base" in last_line()


def test_a_smaller_rank_is_asked_for(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], last_line: Callable[[], str]
) -> None:
    words = ["convert", str(trained), str(tmp_path / "a"), "--to", "smaller-rank"]
    assert main(words) == 1
    assert last_line() == ("error: smaller-rank needs a rank: give --rank, --conv_rank or --energy")
    assert main([*words, "--rank", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(" layers, with a smaller rank")
    assert any("with --base the nearest DoRA is fitted" in line for line in lines)


def test_limits_without_effect_are_said(
    lora: Path, tmp_path: Path, last_line: Callable[[], str]
) -> None:
    words = ["convert", str(lora), str(tmp_path / "k"), "--to", "kohya", "--family", "sd1"]
    assert main([*words, "--energy", "0.9"]) == 0
    assert last_line().startswith("warning: energy has no effect because kohya files keep")
