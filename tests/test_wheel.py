"""Installation: the source distribution, and from it the wheel, used in an empty folder."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import urllib.request
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from email import message_from_bytes
from pathlib import Path

import pytest

from tests.waiting import WAIT_SECONDS

ROOT = Path(__file__).parents[1]
NOT_SOURCE = shutil.ignore_patterns(
    # Python's own: another worker may be renaming what it has just compiled.
    "__pycache__",
    ".*", "*.egg-info", "build", "dist", "runs", "demo-output", "dreambooth-output",
)  # fmt: skip
# Optional libraries are not what is checked, and take mypy a minute.
MYPY_CONFIG = """[mypy]
[mypy-accelerate.*,diffusers.*,gradio.*,huggingface_hub.*,peft.*,transformers.*]
follow_imports = skip
ignore_missing_imports = True
"""

# Types of settings alone, in three seconds.
QUICK_CONFIG = """[mypy]
[mypy-dora_diffusion.*,torch.*]
follow_imports = skip
[mypy-dora_diffusion,dora_diffusion.config.*]
follow_imports = normal
"""

pytest.importorskip("setuptools", minversion="77")


@dataclass(frozen=True)
class Installed:
    """A built source distribution, the wheel built from it, and where that is installed."""

    source: Path
    sdist: Path
    wheel: Path
    bin: Path
    empty: Path

    def run(self, *words: str) -> str:
        """Run an installed program in the empty folder; returns what it prints."""
        done = subprocess.run(
            [self.bin / words[0], *words[1:]],
            cwd=self.empty,
            env=environment(),
            capture_output=True,
            text=True,
            encoding="utf-8",
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def environment() -> dict[str, str]:
    """This process's, in which only the installed package is found."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def build(kind: str, source: Path, output: Path) -> Path:
    """Build an ``sdist`` or a ``wheel`` of a source tree, as pip does; returns the file."""
    output.mkdir(exist_ok=True)
    code = (
        "import sys; from setuptools import build_meta; "
        f"print(build_meta.build_{kind}(sys.argv[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(output)],
        cwd=source,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    return output / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel in an environment that sees this one's other packages."""
    folder = tmp_path_factory.mktemp("wheel")
    # Built in a copy: setuptools leaves its traces in the tree.
    shutil.copytree(ROOT, folder / "source", ignore=NOT_SOURCE)
    for name in (".ci", ".github"):
        shutil.copytree(ROOT / name, folder / "source" / name)
    for name in (".dockerignore", ".gitattributes", ".gitignore", ".pre-commit-config.yaml"):
        shutil.copy(ROOT / name, folder / "source")
    sdist = build("sdist", folder / "source", folder / "dist")
    shutil.unpack_archive(sdist, folder / "unpacked")
    (unpacked,) = (folder / "unpacked").iterdir()
    wheel = build("wheel", unpacked, folder / "dist")
    (folder / "empty").mkdir()
    bin = install(wheel, folder / "venv")
    return Installed(folder / "source", sdist, wheel, bin, folder / "empty")


def install(wheel: Path, home: Path) -> Path:
    """Install a wheel into a new environment that sees this one's other packages."""
    venv.create(home, symlinks=True)
    (packages,) = home.glob("lib/python3*/site-packages")
    found = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "others.pth").write_text("\n".join(found), encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--python", str(home), "install", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--no-compile", str(wheel)], check=True, capture_output=True)
    return home / "bin"


@pytest.fixture(scope="module")
def editable(installed: Installed) -> Installed:
    """The copied tree, installed by ``pip install --editable``."""
    folder = installed.sdist.parents[1]
    wheel = build("editable", installed.source, folder / "editable")
    return replace(installed, wheel=wheel, bin=install(wheel, folder / "editable-venv"))


def test_the_source_distribution_is_the_repository(installed):
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    if tracked.returncode:
        pytest.skip("this is not a clone")
    with tarfile.open(installed.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    links = {name for name in tracked.stdout.splitlines() if (ROOT / name).is_symlink()}
    assert set(tracked.stdout.splitlines()) - links <= names


def test_the_wheel_holds_models_samples_and_types_and_nothing_else(installed):
    with zipfile.ZipFile(installed.wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    for sample in (ROOT / "samples").rglob("*"):
        if sample.is_file():
            name = f"dora_diffusion/samples/{sample.relative_to(ROOT / 'samples').as_posix()}"
            assert files[name] == sample.read_bytes()
    for model in ("tiny-sd", "tiny-sdxl"):
        weights = f"models/embedded/{model}/unet/diffusion_pytorch_model.safetensors"
        assert f"dora_diffusion/{weights}" in files
    assert "dora_diffusion/py.typed" in files
    tops = {name.partition("/")[0] for name in files}
    assert tops == {"dora_diffusion", next(top for top in tops if top.endswith(".dist-info"))}
    assert not [name for name in files if name.endswith(".pyc")]
    # What only made the embedded models is in the source distribution alone.
    assert [name for name in files if "pretrain" in name] == []
    # Every module and all that modules read, to the byte: installed, it does what the clone does.
    for file in (ROOT / "dora_diffusion").rglob("*"):
        if file.is_file() and file.suffix != ".pyc":
            assert files[file.relative_to(ROOT).as_posix()] == file.read_bytes(), file
    released = ROOT / "dora_diffusion" / "models" / "released"
    licences = {files[name] for name in files if name.endswith("/LICENSE")}
    assert licences == {(place / "LICENSE").read_bytes() for place in (ROOT, released)}


def test_the_package_page_has_no_link_that_leads_nowhere(installed):
    with zipfile.ZipFile(installed.wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = message_from_bytes(archive.read(name))
    page = str(metadata.get_payload())
    assert page.startswith("# dora_diffusion")
    assert re.findall(r"\]\((?!https?:)[^)#]*\)", page) == []
    assert all("https://" in url for url in metadata.get_all("Project-URL"))
    assert "Typing :: Typed" in metadata.get_all("Classifier")


@pytest.mark.parametrize(
    ("repository", "expected"),
    [
        (None, "see a page and [a site](https://example.org/a.png)\n\nthe end"),
        (
            "https://example.org/repo",
            "see [a page](https://example.org/repo/blob/HEAD/docs/a.md) and "
            "[a site](https://example.org/a.png)"
            "\n\n![an image](https://example.org/repo/raw/HEAD/docs/b.png)\n\n"
            "*Its\ncaption.*\n\nthe end",
        ),
    ],
)
def test_links_follow_the_repository_s_address(repository, expected):
    package_page = runpy.run_path(str(ROOT / "setup.py"))["package_page"]
    readme = (
        "see [a page](docs/a.md) and [a site](https://example.org/a.png)\n\n"
        "![an image](docs/b.png)\n\n*Its\ncaption.*\n\nthe end"
    )
    assert package_page(readme, repository) == expected


@pytest.fixture(scope="module")
def sample(installed) -> str:
    """Copy the samples, and return the command that trains on one, as it is printed."""
    printed = installed.run("dora-diffusion", "samples", "mine")
    command = "dora-diffusion train --config mine/bolt_mug/config.yaml"
    assert command in printed.splitlines()
    return command


def test_it_is_the_installed_package_and_brings_its_samples(installed, sample):
    home = installed.run("python", "-c", "import dora_diffusion; print(dora_diffusion.__file__)")
    assert Path(home).is_relative_to(installed.bin.parent)
    for file in (ROOT / "samples" / "bolt_mug").iterdir():
        copy = installed.empty / "mine" / "bolt_mug" / file.name
        assert file.suffix == ".yaml" or copy.read_bytes() == file.read_bytes()
    assert "instance_data_dir: mine/bolt_mug" in (copy.with_name("config.yaml")).read_text("utf-8")


@pytest.mark.slow
def test_it_trains_on_a_sample_from_an_empty_folder(installed, sample):
    less = "--max_train_steps 2 --num_validation_images 1 --validation_inference_steps 1"
    installed.run(*sample.split(), *less.split())
    results = installed.empty / "dreambooth-output" / "bolt_mug"
    assert (results / "pytorch_lora_weights.safetensors").is_file()
    assert "instance_data_dir: mine/bolt_mug" in (results / "config.yaml").read_text(
        encoding="utf-8"
    )


@pytest.mark.slow
def test_the_demo_runs_from_an_empty_folder(installed):
    said = installed.run("dora-diffusion", "demo", "--max_train_steps", "1", "--seeds", "1")
    assert "subject similarity" in said
    results = installed.empty / "demo-output"
    assert (results / "bolt_mug.png").is_file()
    assert (results / "merged" / "model_index.json").is_file()
    assert (results / "scores.json").is_file()


@pytest.fixture
def app(installed) -> Iterator[subprocess.Popen[str]]:
    """The installed app as a process."""
    process = subprocess.Popen(
        [installed.bin / "dora-diffusion", "app"],
        cwd=installed.empty,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    yield process
    process.kill()
    process.wait()


@pytest.mark.slow
def test_the_app_opens_from_an_empty_folder_with_the_samples(installed, app):
    line = app.stdout.readline()
    assert line.startswith("open http://127.0.0.1:"), line
    address = line.split()[1]
    page = json.dumps(json.loads(urllib.request.urlopen(address + "config").read()))
    (photo,) = re.findall(r"gradio_api/file=[^'\"?]*bolt_mug/01\.jpg", page)
    assert all(f"data-value='{name}'" in page for name in ("heart_teapot", "ring_robot"))
    answer = urllib.request.urlopen(address + photo)
    assert answer.read() == (ROOT / "samples" / "bolt_mug" / "01.jpg").read_bytes()
    app.send_signal(signal.SIGTERM)
    assert app.wait(WAIT_SECONDS) == 0


def test_an_editable_install_is_the_tree_with_its_samples(editable):
    code = "from dora_diffusion.models import embedded as e; print(e.__file__, e.samples_folder())"
    home, samples = editable.run("python", "-c", code).split()
    assert Path(home).is_relative_to(editable.source)
    assert Path(samples) == editable.source / "samples"


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("editable", QUICK_CONFIG),
        pytest.param("editable", MYPY_CONFIG, marks=pytest.mark.slow),
        pytest.param("installed", MYPY_CONFIG, marks=pytest.mark.slow),
    ],
    ids=["editable-quick", "editable", "wheel"],
)
def test_a_user_s_program_passes_mypy_strictly(kind, config, request):
    pytest.importorskip("mypy")
    installed = request.getfixturevalue(kind)
    shutil.copy(ROOT / "tests" / "user_program.py", installed.empty)
    (installed.empty / "mypy.ini").write_text(config, encoding="utf-8")
    wrong = """import dora_diffusion as dd
dd.nothing
dd.TrainConfig(rank="8")
dd.TrainConfig(output_dir=3)
dd.TrainConfig().rank = 8
"""
    (installed.empty / "wrong.py").write_text(wrong, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable"]
    done = subprocess.run(
        [*command, str(installed.bin / "python"), "user_program.py", "wrong.py"],
        cwd=installed.empty,
        env=environment(),
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    places = [line.partition(": error: ")[0] for line in errors]
    assert places == [f"wrong.py:{number}" for number in range(2, 6)]
