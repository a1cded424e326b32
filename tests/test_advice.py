"""Values that messages advise: each is tried, and accepted where the refused one was given."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dora_diffusion.adapters.inject import inject_adapters
from dora_diffusion.cli.main import HOMES
from dora_diffusion.cluster.commands import ServeSettings
from dora_diffusion.config import AdapterConfig, TrainConfig
from dora_diffusion.config.base import require_tile_size
from dora_diffusion.config.command import CommandSettings
from dora_diffusion.config.families import FAMILIES
from dora_diffusion.config.fields import Setting, require_token_length
from dora_diffusion.config.images import MOST_SIDE, parse_prompt
from dora_diffusion.config.kohya import _side
from dora_diffusion.config.problems import Problems
from dora_diffusion.config.train import settings_by_name
from dora_diffusion.data.crops import plan_crop
from dora_diffusion.export.fitting import FitSettings
from dora_diffusion.models.load import load_components, load_empty
from dora_diffusion.models.memory import gpu_of
from dora_diffusion.sampling.settings import SamplingSettings
from dora_diffusion.studio.app.launch import Launch
from dora_diffusion.training.inputs.plan import check_with_model
from tests.anima import write_anima
from tests.every import every
from tests.flux2_klein import write_flux2_klein, write_flux2_klein_9b
from tests.z_image import write_z_image
from tools.messages import messages

ADVICE = re.compile(
    r"such as (\d|'|\"|\{)|at (least|most) (\d|\{)|<= \{|; try \{|multiple of \{|choose 0 to"
)
"""Text of a template that advises a value."""
VALUE = re.compile(r"(?:such as|at least|at most|try|write|<=|, or) ('[^']+'|[\w.:-]+)")
"""Values of a message, after such words."""


def rank_of(value: str) -> None:
    config = AdapterConfig(["full"], rank=int(value))
    inject_adapters(nn.Sequential(nn.Linear(6, 4)), config, generator=torch.Generator())


def of_side(value: str) -> None:
    problems = Problems()
    for name in ("width", "height"):
        with problems.collect():
            SamplingSettings(**{name: int(value)})
    with problems.collect():
        parse_prompt(f"a dog --w {value} --h {value}")
    problems.raise_all()


def at_auth(password: str) -> None:
    Launch(host="0.0.0.0", auth="me:" + "x" * int(password)).logins  # noqa: B018


# The beginning of a message -> what takes a value, and values that it refuses.
FOLLOWED: dict[str, tuple[Callable[[str], object], Iterable[str]]] = {
    "{setting} {rank} is larger than the layer": (rank_of, ["5", "99"]),
    "vae_tile_size is": (lambda v: require_tile_size(int(v)), ["31", "500", "-32"]),
    "max_token_length is": (lambda v: require_token_length(int(v)), ["74", "100", "1"]),
    "{self.name} is {word}; it must be PATTERN=VALUE": (
        lambda v: settings_by_name()["rank_pattern"].read([v]), ["16", "mid_block"]
    ),
    "resolution {resolution} is not supported": (
        lambda v: _side(int(v) if v.isdigit() else list(map(int, v.split("x")))),
        ["512x768", "10x30", "1000x1001"],
    ),
    "resolution {size} must be a multiple": (
        lambda v: plan_crop((900, 900), int(v), multiple=16), ["8", "500", "72"]
    ),
    "{name} is {rank}; it must be at least 1": (lambda v: FitSettings(int(v)), ["0", "-3"]),
    "memory is {memory}": (gpu_of, ["0", "much", "-1"]),
    "{name} is {side}; {subject} must be a multiple": (of_side, ["17", "70", "500", "700", "8191"]),
    "resolution is {side}": (lambda v: TrainConfig(resolution=int(v)), ["1", "63", "509"]),
    "host is {self.host}": (
        lambda v: Launch(host=v, auth="me:12345678"), ["http://x", "a b"]
    ),
    "--auth must be": (at_auth, ["1", "7"]),
    "replica_gpus is": (
        lambda v: ServeSettings(base="x", adapters=["x"], replica_gpus=float(v)), ["1.5", "2.25"]
    ),
    "size is {wrong}": (of_side, []),  # Its example, below.
}  # fmt: skip
OTHERS = (
    # They name a layer, a folder, a text or a line as an example.
    "targets leave out", "the adapter has {len(unexpected)} layers",
    "grid is", "{name} must be a list", "{quoted(str(entry))} is not a subject",
    "dataset_config {folder} holds no folder", "{name} was distilled",
    "{folder}: ignored", "instance_prompt is not set", "the new word",
    # They count what there is.
    "the {what} has", "{len(files)} files were chosen", "the token of {where}",
    # Their range is the setting's own, or they are tried with a model below.
    "clip_skip is", "{name} {side} of the sample prompt",
    "bucket_reso_steps is", "size must be above 0",
)  # fmt: skip


def test_every_message_that_advises_a_value_is_tried() -> None:
    texts = {message.text for message in messages() if ADVICE.search(message.text)}
    known = (*FOLLOWED, *OTHERS)
    assert {text for text in texts if not text.startswith(known)} == set()
    assert [start for start in known if not any(text.startswith(start) for text in texts)] == []


def follow(call: Callable[[str], object], value: str) -> None:
    """Refuse a value, and try each one that its message advises."""
    with pytest.raises(ValueError) as info:
        call(value)
    advised = [text.strip("'") for text in VALUE.findall(str(info.value))]
    advised = [text for text in advised if re.search(r"[\d=*.]", text)]
    assert advised, f"no value in: {info.value}"
    for text in advised:
        call(text)


def test_advised_values_are_accepted(tmp_path: Path) -> None:
    with every() as case:
        for start, (call, values) in FOLLOWED.items():
            for value in values:
                with case(f"{start}, {value}"):
                    follow(call, value)


def commands() -> dict[str, type[CommandSettings]]:
    """Settings of each command that is made of a `CommandSettings`."""
    found = {}
    for home, names in HOMES.items():
        module = import_module(f"dora_diffusion.{home}")
        for name in names:
            kind = getattr(module, f"{name.title().replace('-', '')}Settings", None)
            if kind is not None and hasattr(kind, "settings"):
                found[name] = kind
    return found


def given(setting: Setting, value: float) -> Any:
    """A value in the form of its setting."""
    if setting.is_map:
        return {"*": value}
    return [value] if setting.is_list else value


def test_the_bounds_that_a_refused_setting_names_are_accepted() -> None:
    """Every setting with a range, of every command: a value beyond it, then the bound."""
    known = [("train", setting) for setting in settings_by_name().values()]
    known += [(name, s) for name, kind in commands().items() for s in kind.settings()]
    tried = 0
    with every() as case:
        for command, setting in known:
            beyond = [setting.least - 1] if setting.least is not None else []
            beyond += [setting.most + 1] if setting.most is not None else []
            for value in beyond if setting.kind in (int, float) else []:
                tried += 1
                with case(f"{command} {setting.name} {value}"), pytest.raises(ValueError) as info:
                    setting.check(given(setting, value))
                bound = re.search(r"must be at (?:least|most) (\S+)$", str(info.value))
                at = setting.kind(bound[1]) if bound else setting.kind(0)
                with case(f"{command} {setting.name}, {at}"):
                    setting.check(given(setting, at))
    assert tried > 60


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models of the families with the largest patches."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "anima": write_anima(folder / "anima"),
        "z-image": write_z_image(folder / "z-image"),
        "flux2-klein": write_flux2_klein(folder / "flux2-klein"),
        "flux2-klein-9b": write_flux2_klein_9b(folder / "flux2-klein-9b"),
    }


def test_an_advised_size_suits_every_family(models: dict[str, Path], sd1_folder: Path) -> None:
    """The advice before the family is known holds with it, for `generate` and sample prompts."""
    assert models.keys() == {name for name, family in FAMILIES.items() if family.patch > 1}
    for folder in (*models.values(), sd1_folder):
        components = load_empty(str(folder))
        step = components.size_step

        def size(value: str, step: int = step) -> None:
            SamplingSettings(width=int(value)).check_sides(step, "a model")

        def sample(value: str, components: Any = components, folder: Path = folder) -> None:
            prompt = f"a dog --w {value}"
            config = TrainConfig(
                pretrained_model_name_or_path=str(folder), validation_prompt=[prompt],
                instance_prompt="a dog", rank=2, targets=["attention"],
            )  # fmt: skip
            check_with_model(components, config)

        with pytest.raises(ValueError, match=r"such as 64$"):
            SamplingSettings(width=16).check_sides(64, "a model")
        values = [str(side) for side in (1, 9, 70, 100, 500, MOST_SIDE + 1)]
        values += [str(side) for side in (72, 88, 24) if side % step]
        for value in values:
            follow(size, value)
            follow(sample, value)


def test_an_advised_clip_skip_is_accepted(sd1_folder: Path) -> None:
    components = load_components(sd1_folder)
    with pytest.raises(ValueError, match=r"choose 0 to \d+$") as info:
        components.reading(99, None)
    components.reading(int(str(info.value).rpartition(" ")[2]), None)
