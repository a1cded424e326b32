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
from dora_diffusion.formats.layouts import NOT_TARGETS, TARGETS


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
