"""Lines of sample prompts: what their options mean, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from dora_diffusion.config import TrainConfig
from dora_diffusion.config.images import (
    SamplePrompt,
    parse_prompt,
    read_prompts,
)
from tests.refusal import refused


def test_options_are_read_as_sd_scripts_has_them() -> None:
    line = "a sks dog, on a beach --n low quality, blurry --w 768 --h 512 --d 7 --l 5.5 --s 30"
    assert parse_prompt(f"{line} --ss k_euler_a --drift") == SamplePrompt(
        "a sks dog, on a beach", 7, negative_prompt="low quality, blurry", width=768, height=512,
        steps=30, guidance_scale=5.5, scheduler="euler_a", is_drift=True,
    )  # fmt: skip
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
