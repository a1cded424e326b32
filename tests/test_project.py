"""The project around the code: its commands, and that its documents are true."""

from __future__ import annotations

import ast
import importlib
import itertools
import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import dora_diffusion
from dora_diffusion import cli
from dora_diffusion.config import TrainConfig, read_config_file
from dora_diffusion.config.flag_map import DIFFUSERS_FLAGS
from dora_diffusion.config.prompts import OPTIONS
from dora_diffusion.data.checks import FEWEST, MOST

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands_in(path: Path) -> list[list[str]]:
    """The lines of a document's shell blocks, as words, with continued lines joined."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    blocks += re.findall(r"^\$ (.*)$", text, flags=re.MULTILINE)  # of ```console
    lines = re.split(r"\n| (?:\|\||&&|\|) ", "\n".join(blocks))
    return [words for line in lines if (words := shlex.split(line, comments=True))]


SCRIPTS = {"train_dreambooth_dora.py": "train", "app.py": "app"}


def own_command(words: list[str]) -> list[str] | None:
    """What our own parser is given by a shell command; None for other programs."""
    if "dora_diffusion" in words:
        return words[words.index("dora_diffusion") + 1 :]
    for place, word in enumerate(words):
        if command := SCRIPTS.get(Path(word).name):
            return [command, *words[place + 1 :]]
    return words[1:] if words[0] == "dora-diffusion" else None


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_in_documents_parse(path):
    for words in commands_in(path):
        command = own_command(words)
        if command:
            cli.build_parser().parse_args(command)


def test_the_training_loop_of_the_readme_runs(tmp_path, monkeypatch):
    """It stands alone, takes all its steps, and leaves a file and plain layers."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    [loop] = [block for block in blocks if "inject_adapters" in block]
    monkeypatch.chdir(tmp_path)
    held = {}
    exec(compile(loop, "README.md", "exec"), held)
    assert list(tmp_path.rglob("*.safetensors"))
    assert [type(layer).__name__ for layer in held["model"]] == ["Conv2d", "Flatten", "Linear"]
    assert held["step"] == 9


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_flags_in_documents_exist(path):
    # Not only in commands: tables and sentences name flags too.
    known = {"--help", "--extra-index-url", "--multi_gpu", "--num_processes"}
    known |= {"--torch-backend", *(f"--{name}" for name in OPTIONS)}
    for parser in cli.build_parser()._subparsers._group_actions[0].choices.values():
        known |= {name for action in parser._actions for name in action.option_strings}
    # The benchmarks have parsers of their own.
    for script in ROOT.glob("benchmarks/*.py"):
        known |= set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', script.read_text("utf-8")))
    text = path.read_text(encoding="utf-8")
    if path.name == "coming-from.md":
        # Its tables begin with the flags of other programs, and so does what is not here.
        text = re.sub(r"^\| [^|]*\|", "|", text, flags=re.MULTILINE)
        known |= {f"--{name}" for name in DIFFUSERS_FLAGS}
        text = re.sub(r"\*\*Not here\*\*:.*?\n\n", "", text, flags=re.DOTALL)
    flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", text))
    assert flags <= known


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text)
    missing = [link for link in links if not (path.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_documents_name_exist(path):
    """From the clone, or from the package; a name in capitals stands for any."""
    text = path.read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w/.<-])(?:[a-z_]+/)+\w+\.py\b", text))
    named |= set(re.findall(r"(?<![\w/])(?:tests|tools|benchmarks)/[\w/]+(?:\.(?:py|sh))?", text))
    named = {name for name in named if not re.search("[A-Z]", name)}
    assert named or path.name != "where.md"
    assert not [n for n in named if not any((top / n).exists() for top in (ROOT, PACKAGE))]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_ask_for_as_many_photos_as_the_code(path):
    text = " ".join(path.read_text(encoding="utf-8").split())
    asked = set(re.findall(r"(\d+) (?:to|-) (\d+) photos", text))
    assert asked <= {(str(FEWEST), str(MOST))}
    assert asked or path.name != "README.md"


@pytest.mark.parametrize("name", sorted(path.parent.name for path in ROOT.glob("samples/*/*.yaml")))
def test_sample_settings_are_valid(name):
    config = TrainConfig.from_dict(read_config_file(ROOT / "samples" / name / "config.yaml"))
    assert (ROOT / config.instance_data_dir).is_dir()


def test_no_test_needs_files_from_outside_the_clone():
    named = re.compile(r"parents\[\d\] / ['\"](\w+)['\"]")
    for path in (ROOT / "tests").rglob("*.py"):
        for name in named.findall(path.read_text(encoding="utf-8")):
            assert (ROOT / name).exists(), f"{path} reads {name}"


def test_make_offers_what_the_documents_say():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    named = {
        word
        for path in DOCUMENTS
        for words in commands_in(path)
        for name, word in itertools.pairwise(words)
        if name == "make"
    }
    assert {"demo", "test", "lint"} <= targets
    assert named <= targets


def test_ci_runs_exactly_what_the_readme_says():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = [
        line for line in script.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"
    ]
    assert lines[-1] == "exec make test test-portable"


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", ["demo", "test", "test-portable"])
def test_a_fresh_machine_gets_an_environment_first(target, tmp_path):
    """Dry: what make would do where there is no virtual environment."""
    done = subprocess.run(
        ["make", "--dry-run", target, f"VENV={tmp_path}/venv"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        encoding="utf-8",
    )
    steps = done.stdout
    # Gigabytes come: pip shows what it does.
    assert "--quiet" not in steps
    assert steps.index("-m venv") < steps.index("pip install")
    last = {"demo": "-m dora_diffusion demo", "test": "-m pytest"}.get(target, "tests/portable")
    assert steps.index("pip install") < steps.index(last)


def test_the_version_is_written_once():
    """In the package; the citation and the newest part of the changelog agree with it."""
    version = dora_diffusion.__version__
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert version not in project
    assert 'version = { attr = "dora_diffusion.__version__" }' in project
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == version
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## \[(.+?)\]", changelog, flags=re.MULTILINE)[0] == version


def test_the_entry_point_exists():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    module, name = re.search(r'^dora-diffusion = "(.+):(.+)"$', text, flags=re.MULTILINE).groups()
    assert callable(getattr(importlib.import_module(module), name))


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "dora_diffusion", "--version"],
        capture_output=True,
        text=True,
        check=True,
        encoding="utf-8",
    )
    assert done.stdout.strip() == dora_diffusion.__version__


def test_the_walks_name_what_there_is() -> None:
    """Dotted names under "Three walks" are modules of the package, or what they hold."""
    text = (ROOT / "docs" / "contributing" / "architecture.md").read_text(encoding="utf-8")
    walks = text.partition("## Three walks")[2].partition("\n## ")[0]
    names = re.findall(r"`([a-z_]+(?:\.\w+)+)`", walks)
    assert len(names) > 20
    for name in names:
        pkgutil.resolve_name(f"dora_diffusion.{name}")


PACKAGE = ROOT / "dora_diffusion"
# What a user calls with keywords, each documented.
KEYWORD_INTERFACES = {
    "evaluation.photos.evaluate_photos",
    "evaluation.toy.evaluate.evaluate_toy",
    "export.checkpoint.export_checkpoint",
    "export.combine.combine_adapters",
    "export.convert.convert_adapter",
    "export.extract.extract_adapter",
    "export.verify.verify_checkpoint",
    "generate.load_adapted",
}
MANY_PARAMETERS = KEYWORD_INTERFACES
LONG = {"export.checkpoint.export_checkpoint"}


def definitions() -> Iterator[tuple[str, ast.AST]]:
    """Every class and function of the package, with its module's name before its own."""
    for path in sorted(PACKAGE.rglob("*.py")):
        module = path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield f"{module.removesuffix('.__init__')}.{node.name}", node


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Their number, without a method's own object."""
    args = function.args
    names = [arg.arg for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs)]
    names += ["*"] * ((args.vararg is not None) + (args.kwarg is not None))
    return len(names) - (names[:1] in (["self"], ["cls"], ["ctx"]))


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for name, node in definitions():
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield name, node


def test_functions_fit_on_a_screen() -> None:
    """60 lines, docstring and all."""
    long = {name for name, node in functions() if (node.end_lineno or 0) - node.lineno >= 60}
    assert long <= LONG


def test_signatures_are_short() -> None:
    """Eight parameters; what belongs together is an object."""
    many = {name for name, node in functions() if parameters(node) > 8}
    assert many <= MANY_PARAMETERS


def test_no_two_classes_have_one_name() -> None:
    homes = defaultdict(list)
    for name, node in definitions():
        if isinstance(node, ast.ClassDef):
            homes[node.name].append(name)
    twice = {name: places for name, places in homes.items() if len(places) > 1}
    assert not twice


def test_what_the_makefile_names_is_there() -> None:
    """A file that has moved would end the command that names it."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = re.findall(r"\btests/[\w/.]*\w", text)
    assert len(named) > 20
    missing = [name for name in named if not name.endswith("_") and not (ROOT / name).exists()]
    assert not missing
