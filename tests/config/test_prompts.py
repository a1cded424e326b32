"""Lines of sample prompts: what their options mean, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from dora_diffusion.config import TrainConfig
from dora_diffusion.config.prompts import (
    SamplePrompt,
    parse_prompt,
    read_prompts,
    read_styles,
    with_styles,
)
from tests.refusal import refused


def test_options_are_read_as_sd_scripts_has_them() -> None:
    line = "a sks dog, on a beach --n low quality, blurry --w 768 --h 512 --d 7 --l 5.5 --s 30"
    assert parse_prompt(f"{line} --ss k_euler_a --drift") == SamplePrompt(
        "a sks dog, on a beach", "low quality, blurry", 7, 768, 512, 30, 5.5, "euler_a", True
    )
    assert parse_prompt(" a well-known -- sks dog - at night ") == SamplePrompt(
        "a well-known -- sks dog - at night"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--w 700", "--w is 700; it must be a multiple of 8"),
        ("--h 0", "--h is 0; it must be at least 16"),
        ("--h 8200", "--h is 8200; it must be at most 8192"),
        ("--s 1001", "--s is 1001; it must be at most 1000"),
        ("--d x", "--d is 'x'; it must be a whole number"),
        ("--l nan", "--l is nan; it must be a finite number"),
        ("--s", "--s is ''; it must be a whole number"),
        ("--n", "--n needs a value"),
        ("--d 1 --d 2", "has --d twice"),
        ("--drift yes", "--drift takes no value 'yes'"),
        ("--ar 2:1", "--ar is not an option here; there is --n (negative prompt), --d (seed), --w"),
    ],
)
def test_an_option_that_cannot_work_is_refused(options: str, message: str) -> None:
    with refused("validation_prompt") as error:
        TrainConfig(validation_prompt=["a dog", f"a sks dog {options}"])
    assert message in str(error.value)


def test_a_file_holds_a_prompt_a_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeff# of the subject\na sks dog --d 3\n\n  a dog --drift \n", "utf-8")
    assert read_prompts(file) == ["a sks dog --d 3", "a dog --drift"]
    config = TrainConfig(validation_prompt=["x"], sample_prompts=str(file)).with_sample_prompts()
    assert config.validation_prompt == ["x", "a sks dog --d 3", "a dog --drift"]
    assert config.sample_prompts is None
    assert config == config.with_sample_prompts()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read"),
        (b"\xff\xfe\xff", "is not UTF-8 text"),
        (b"# nothing\n\n", "has no prompt"),
        (b"a dog\n\na cat --w x\n", "line 3: the sample prompt 'a cat --w x'"),
        (b"--n blurry\n", "line 1: the sample prompt '--n blurry' has no text"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(
    tmp_path: Path, text: bytes | None, message: str
) -> None:
    file = tmp_path / "prompts.txt"
    if text is not None:
        file.write_bytes(text)
    with refused("sample_prompts", message, "prompts.txt"):
        read_prompts(file)


STYLES = """\ufeffname,prompt,negative_prompt
ink, ink drawing ,"color, \"\"photo\"\""
paper,"{prompt}, on\npaper. {prompt}!",{prompt} -- glossy
only negative,,blurry
ink twice,first,
ink twice,"second ",
short
"""


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_styles_are_applied_one_after_the_other(newline: str, tmp_path: Path) -> None:
    (tmp_path / "styles.csv").write_bytes(STYLES.replace("\n", newline).encode())
    cases = {
        (): ("a dog ", "cat"),
        ("ink",): ("a dog, ink drawing", 'cat, color, "photo"'),
        ("paper",): ("a dog , on\npaper. a dog !", "cat -- glossy"),
        ("ink", "paper"): (
            "a dog, ink drawing, on\npaper. a dog, ink drawing!",
            'cat, color, "photo" -- glossy',
        ),
        ("paper", "ink"): (
            "a dog , on\npaper. a dog !, ink drawing",
            'cat -- glossy, color, "photo"',
        ),
        ("only negative",): ("a dog", "cat, blurry"),
        ("ink twice", "short"): ("a dog, second", "cat"),
    }
    for names, expected in cases.items():
        styles = read_styles(tmp_path / "styles.csv", names)
        prompt = with_styles("a dog ", [style.prompt for style in styles])
        negative = with_styles("cat", [style.negative_prompt for style in styles])
        assert (prompt, negative) == expected
    (style,) = read_styles(tmp_path / "styles.csv", ["ink"])
    assert with_styles(" ", style[:1]) == "ink drawing"


def test_old_files_of_styles_are_read(tmp_path: Path) -> None:
    (tmp_path / "styles.csv").write_text("name,text\nink,an ink drawing\n", encoding="utf-8")
    assert read_styles(tmp_path / "styles.csv", ["ink"]) == [("an ink drawing", "")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read"),
        (b"\x89PNG\r\n\x1a\n", "is not UTF-8 text"),
        (b"name,prompt\0", "is not UTF-8 text"),
        (b"", "must begin with the line name,prompt,negative_prompt"),
        (b"ink,an ink drawing,\n", "must begin with the line name,prompt,negative_prompt"),
        (b"name,prompt\nink," + b"x" * 200_000, "line 2: field larger than"),
        (b"name,prompt\nInk,x\noil,x\n", "no style 'ink' (did you mean Ink?); there are Ink, oil"),
        (bytes([65]) * (2**24 + 1), "larger than 16 MiB"),
    ],
    ids=["missing", "image", "null", "empty", "headless", "long", "unknown", "large"],
)
def test_a_file_of_styles_that_cannot_be_used_is_refused(
    tmp_path: Path, text: bytes | None, message: str
) -> None:
    file = tmp_path / "styles.csv"
    if text is not None:
        file.write_bytes(text)
    with refused("style" if "no style" in message else "styles", message, "styles.csv"):
        read_styles(file, ["ink"])
