"""Settings of commands: a command line, a YAML file and Python give the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from dora_diffusion.cli import main as cli
from dora_diffusion.config import ConfigError, Setting
from dora_diffusion.config.command import CommandSettings
from dora_diffusion.sampling.images import save_image
from tests.refusal import refused

ROOT = Path(__file__).parents[2]
KINDS: dict[str, type[CommandSettings]] = {
    name: cli.settings_of(name) for name in cli.COMMANDS if name not in ("train", "fleet")
}
"""Of all commands but those of training."""
# Of these, what any other setting's value cannot be.
OTHERS: dict[str, Any] = {
    "max_token_length": 150, "vae_tile_size": 64, "host": "localhost", "auth": "Ann:a password",
    "allowed_hosts": ["studio.example"], "grid": ["steps=1, 2"],
}  # fmt: skip


@pytest.fixture(autouse=True)
def _files_of_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command reads it before any other setting is checked."""
    text = "a dog\nSteps: 2, CFG scale: 7, Seed: 3"
    image = save_image(Image.new("RGB", (8, 8)), tmp_path / "image.png", text)
    monkeypatch.setitem(OTHERS, "repeat", str(image))
    # By their names, which could be taken for flags.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "--adapter").mkdir()
    save_file({"x": torch.zeros(1)}, tmp_path / "--adapter" / "pytorch_lora_weights.safetensors")


def passes(setting: Setting, value: float) -> bool:
    try:
        setting.check([setting.kind(value)] if setting.is_list else setting.kind(value))
    except ConfigError:
        return False
    return True


def moved(setting: Setting) -> Any:
    """Another value than the default."""
    if setting.name in OTHERS:
        return OTHERS[setting.name]
    if setting.choices:
        item: Any = next(word for word in setting.choices if word != setting.default)
    elif setting.kind is bool:
        item = not setting.default
    elif setting.kind in (int, float):
        item = next(setting.kind(value) for value in (3, 0.5, 64) if passes(setting, value))
    else:
        item = setting.kind(f"--{setting.name}")  # a value that could be taken for a flag
    return [item] if setting.is_list else item


def all_moved(kind: type[CommandSettings]) -> CommandSettings:
    values = {setting.name: moved(setting) for setting in kind.settings()}
    for setting in kind.settings():
        if setting.positional:
            values[setting.name] = (
                [f"a {setting.name}"] if setting.is_list else setting.kind(f"a {setting.name}")
            )
    return kind.of(**values)


def parsed(command: str, *words: str) -> CommandSettings:
    settings: CommandSettings = cli.read_settings(cli.build_parser().parse_args([command, *words]))
    return settings


def test_every_command_has_one_home() -> None:
    homes = [command for commands in cli.HOMES.values() for command in commands]
    assert sorted(homes) == sorted(cli.COMMANDS)
    assert {name for name, kind in KINDS.items() if not kind.settings()} == set()


@pytest.mark.filterwarnings("ignore:.*has no effect")
@pytest.mark.parametrize("command", KINDS)
def test_arguments_give_the_settings_again(command: str) -> None:
    settings = all_moved(KINDS[command])
    for setting in settings.settings():
        assert settings.values()[setting.name] != setting.default
    assert parsed(command, *settings.to_arguments()) == settings


@pytest.mark.filterwarnings("ignore:.*has no effect")
@pytest.mark.parametrize("command", KINDS)
def test_a_file_gives_the_settings_again_and_flags_go_before_it(
    command: str, tmp_path: Path
) -> None:
    settings, file = all_moved(KINDS[command]), tmp_path / "settings.yaml"
    values = json.loads(json.dumps(settings.values(), default=str))
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    assert parsed(command, "--config", str(file)) == settings
    text = next((s for s in settings.settings() if s.kind is not bool and not s.positional), None)
    if text is None:  # It has no flags.
        return
    own = "no" if text.choices is None else str(text.choices[0])
    own = "5" if text.kind in (int, float) else own
    given = parsed(command, "--config", str(file), text.flag, own)
    value = [text.kind(own)] if text.is_list else text.kind(own)
    assert given == settings.changed(**{text.name: value})


def test_required_settings_are_first() -> None:
    for kind in KINDS.values():
        required = [setting.is_required for setting in kind.settings()]
        assert required == sorted(required, reverse=True)


@pytest.mark.parametrize("command", KINDS)
def test_defaults_need_no_word(command: str) -> None:
    kind = KINDS[command]
    required = {s.name: moved(s) for s in kind.settings() if s.is_required}
    given = {word.partition("=")[0].lstrip("-") for word in kind.of(**required).to_arguments()}
    values = {str(value).lstrip("-") for value in required.values()}
    assert given - values <= {*required}
    assert bool(given) == bool(required)


@pytest.mark.parametrize(
    ("setting", "text", "words"),
    [
        ("steps", "base: b\nsteps: many\n", "x.yaml, line 2: steps is 'many'"),
        ("step", "base: b\nstep: 3\n", "line 2: there is no setting step (did you mean steps"),
        ("num_images", "num_images: 0\n", "line 1: num_images is 0"),
        ("output", "base: b\n", "output must be given"),
        ("base", "output: o.png\nbase:\n", "line 2: base is empty"),
        ("step", "step: 3\nnum_images: 0\n", "{file}, line 2: num_images is 0"),
        ("steps", "steps: many\nbase: b\nsede: 3\n", "x.yaml, line 3: there is no setting sede"),
    ],
)
def test_what_a_file_cannot_say_is_told_with_its_line(
    setting: str, text: str, words: str, tmp_path: Path
) -> None:
    (file := tmp_path / "x.yaml").write_text(text, encoding="utf-8")
    with refused(setting, words.format(file=file)):
        parsed("generate", "--config", str(file))


def test_a_switch_does_not_take_the_word_behind_it() -> None:
    settings: Any = parsed("convert", "--overwrite", "in", "--no-json", "out", "--to", "kohya")
    assert (settings.overwrite, settings.json) == (True, False)
    assert (settings.input, settings.output) == ("in", "out")
