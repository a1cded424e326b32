"""Flags that commands share: those that do nothing are said, those that cannot work refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from dora_diffusion.cli import main as cli
from dora_diffusion.cli.settings import adapter_and_strength
from dora_diffusion.config.base import BaseModel
from dora_diffusion.formats.adapter.file import AdapterFile, AdapterMetadata, write_adapter
from dora_diffusion.numerics.weights import MergeStrengths


def said(line: str) -> list[str]:
    args = cli.build_parser().parse_args(line.split())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cli.read_settings(args)
    return [str(warning.message) for warning in caught if warning.category is UserWarning]


EVALUATE, GENERATE = "evaluate a --subject bolt_mug", "generate --prompt x --output x.png"


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
def test_an_adapter_may_have_its_own_strength(text, expected):
    assert adapter_and_strength(text) == expected


# Every command that takes a base.
TAKING_A_BASE = {
    "convert": "convert {adapter} {out} --to lora",
    "convert exactly": "convert {adapter} {out} --to kohya",
    "extract": "extract --tuned {folder} --output {out} --rank 2",
    "combine": "combine {adapter} --output {out}",
    "inspect": "inspect {adapter}",
    "export": "export --adapter {adapter} --output {out}",
    "verify": "verify {folder} --adapter {adapter}",
    "rank-checkpoints": "rank-checkpoints {run} --output {out}",
    "evaluate": "evaluate {adapter} --subject bolt_mug --output {out}",
    "generate": "generate --adapter {adapter} --prompt x --output {out}.png",
}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, sd1_folder, random_adapter):
    layers = random_adapter(sd1_folder, every=40)
    folder = tmp_path_factory.mktemp("adapter")
    return write_adapter(folder, AdapterFile(layers, AdapterMetadata("sd1", trigger="sks mug")))


def line_of(command, adapter, folder, tmp_path, run):
    places = {"adapter": adapter, "folder": folder, "out": tmp_path / "out", "run": run}
    return TAKING_A_BASE[command].format(**places)


def test_every_command_that_takes_a_base_takes_variant_and_revision():
    (commands,) = (a.choices for a in cli.build_parser()._actions if a.dest == "command")
    dests = {name: {action.dest for action in one._actions} for name, one in commands.items()}
    bases = {"base", "pretrained_model_name_or_path"}
    taking = {name for name, found in dests.items() if bases & found}
    assert all({"variant", "revision"} <= dests[name] for name in taking)
    # Those open it in a training or in replicas.
    assert taking == {line.split()[0] for line in TAKING_A_BASE.values()} | {
        "train", "fleet", "serve", "doctor",
    }  # fmt: skip


@pytest.mark.parametrize("command", TAKING_A_BASE)
def test_a_variant_that_is_not_there_is_an_error(
    command, adapter, sd1_folder, trained, tmp_path, capsys
):
    """Never the plain weights in its place."""
    line = line_of(command, adapter, sd1_folder, tmp_path, trained)
    assert cli.main([*line.split(), "--base", str(sd1_folder), "--variant", "nope"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert "'nope'" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", TAKING_A_BASE)
def test_variant_and_revision_reach_the_hub(
    command, adapter, sd1_folder, trained, tmp_path, capsys, monkeypatch
):
    asked = []

    def snapshot_download(name, **options):
        asked.append((name, options["revision"], options["allow_patterns"]))
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    line = line_of(command, adapter, sd1_folder, tmp_path, trained)
    flags = ["--base", "someone/model", "--revision", "v2", "--variant", "fp16"]
    assert cli.main([*line.split(), *flags]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: someone/model is not")
    ((name, revision, patterns),) = asked
    assert (name, revision) == ("someone/model", "v2")
    assert "unet/*.fp16*.safetensors" in patterns
    assert "unet/*.safetensors" not in patterns


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--base b/c --variant v --revision r", []),
        ("--base b.safetensors --variant v --revision r",
         ["variant has no effect because the base is a single file",
          "revision has no effect because the base is a single file"]),
        ("--base embedded:tiny-sd --revision r",
         ["revision has no effect because the base is on this machine, not a hub id"]),
        ("--variant v", ["variant has no effect because no base is given"]),
    ],
)  # fmt: skip
def test_a_variant_or_revision_without_effect_is_said(flags, expected):
    assert said(f"inspect a {flags}") == expected


@pytest.mark.parametrize("command", ["export --output o", "verify merged"])
def test_export_and_verify_are_given_the_same_merge(command):
    words = f"{command} --base b --adapter a --unet_strength 0.5 --alpha 3 --vae v".split()
    words += ["--prediction_type", "v_prediction", "--no-zero_terminal_snr"]
    args = cli.read_settings(cli.build_parser().parse_args(words))
    assert args.merge_options == {"strength": MergeStrengths(unet_strength=0.5), "alpha": 3.0}
    asked = {"prediction_type": "v_prediction", "zero_terminal_snr": False}
    assert args.base_model == BaseModel("b", vae="v", **asked)


@pytest.mark.parametrize(
    ("line", "work"),
    [
        (
            "evaluate RUN --subject bolt_mug --output OUT",
            "sampling.load.load_adapted",
        ),
        ("generate --prompt x --output OUT/a.png", "sampling.load.load_adapted"),
        ("combine RUN --output OUT/a.safetensors", "export.derive.fit_to_adapters"),
        (
            "convert RUN OUT/a.safetensors --to smaller-rank --rank 1",
            "export.fitting.fit_to_adapters",
        ),
        ("convert RUN OUT --to peft", "export.convert.write_adapter"),
        ("rank-checkpoints RUN --output OUT/a", "sampling.load.load_model"),
        ("export --adapter RUN --output OUT/a", "export.checkpoint._Writer"),
        ("export --adapter RUN --output OUT/a.safetensors", "export.checkpoint._Writer"),
        ("extract --tuned BASE --rank 1 --output OUT/a.safetensors", "export.derive.fit_layers"),
    ],
)
def test_an_output_that_cannot_be_written_is_said_before_the_work(
    line: str, work: str, trained: Path, sd1_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, last_line: Callable[[], str],
) -> None:  # fmt: skip
    """A file lies where a folder should be."""

    def started(*_: object, **__: object) -> None:
        raise AssertionError("the work was begun")

    monkeypatch.setattr(f"dora_diffusion.{work}", started)
    in_the_way = tmp_path / "file"
    in_the_way.write_text("mine", encoding="utf-8")
    words = f"{line} --base BASE"
    places = {"RUN": trained, "BASE": sd1_folder, "OUT": in_the_way}
    for name, place in places.items():
        words = words.replace(name, str(place))
    assert cli.main(words.split()) == 1
    assert last_line() == f"error: {in_the_way}: is not a folder; give another output"
    assert in_the_way.read_text(encoding="utf-8") == "mine"
