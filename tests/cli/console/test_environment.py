"""One paste for a bug report: whole where something is broken, and without secrets."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import default_environment
from packaging.specifiers import SpecifierSet

from dora_diffusion import __version__
from dora_diffusion.cli.console import environment as module
from dora_diffusion.cli.console.environment import (
    Environment,
    Package,
    ask,
    describe_environment,
    packages,
    without_names,
)
from dora_diffusion.config.base import BaseModel

whole = packages  # `quick` replaces it
ROOT = Path(__file__).parents[3]
MEMORY, SYSTEM, BUILD, CPU, THREADS, DEVICES, CACHE = module._QUESTIONS
DEVICE, TRAINING = module._TRIALS
GOOD = {
    MEMORY: {"total": 2**33, "available": 2**32},
    SYSTEM: {"os": "Debian", "cpu_info": "Architecture: x86_64\nModel name:  Zen\n",
             "nvidia_driver_version": None, "nvidia_gpu_models": None},
    BUILD: "the CPU", CPU: "AVX2", THREADS: 4, DEVICES: [], CACHE: "/hub",
    DEVICE: "cpu in float32", TRAINING: "one step",
}  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without packages to import, programs to ask, or variables."""
    answers(monkeypatch, {})
    monkeypatch.setattr(module, "packages", lambda: [Package("torch", "", ">=2", "2.5")])
    for name in os.environ:
        monkeypatch.delenv(name)


def answers(
    monkeypatch: pytest.MonkeyPatch, problems: dict[str, str], changes: dict[str, Any] | None = None
) -> None:
    known: dict[str, Any] = GOOD | (changes or {})

    def ask(names: list[str]) -> dict[str, tuple[str, Any]]:
        return {name: (problems.get(name, ""), known.get(name)) for name in names}

    monkeypatch.setattr(module, "ask", ask)


def rows(text: object) -> list[list[str]]:
    return [re.split(r"  +", line, maxsplit=1) for line in str(text).splitlines()]


def wrong(environment: Environment) -> list[tuple[str, str, str]]:
    return [(f.check, f.found, f.mend) for f in environment.findings if f.state == "PROBLEM"]


def test_each_fact_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = ["cuda:0 NVIDIA A, 8.0 GiB", "cuda:1 NVIDIA B, 6.0 GiB"]
    answers(monkeypatch, {}, {BUILD: "CUDA 12.8", DEVICES: devices})
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("HF_HOME", "/somewhere")
    shown = rows(describe_environment(tmp_path))
    names = [row[0] for row in shown]
    assert names[:7] == [
        "dora-diffusion", "system", "Python", "processor", "memory", "torch for", "device",
    ]  # fmt: skip
    assert shown[0][1].startswith(__version__)
    assert shown[names.index("torch for")][1] == "CUDA 12.8"
    first = names.index("device")
    assert [row[1] for row in shown[first : first + 2]] == devices
    assert ["packages", "torch 2.5"] in shown
    assert [row for row in shown if row[-1] == "OMP_NUM_THREADS=3"] != []
    assert [row for row in shown if row[-1] == "HF_HOME is set"] != []
    assert re.fullmatch(r".*, \d+\.\d GiB free", shown[names.index("runs")][1])
    assert shown[names.index("system")][1].startswith("Debian, ")
    assert shown[names.index("processor")][1] == f"Zen, {os.cpu_count()} cores, AVX2, 4 threads"
    assert shown[names.index("memory")][1] == "8.0 GiB, 4.0 GiB free"
    states = [row for row in names if row in ("ok", "note", "PROBLEM")]
    assert states == ["ok"]
    assert [finding.check for finding in describe_environment(tmp_path).findings] == [
        "packages", "device", "training", "hub's cache", "runs", "temporary files",
    ]  # fmt: skip


def test_json_says_the_same(tmp_path: Path) -> None:
    environment = describe_environment(tmp_path)
    facts = json.loads(json.dumps(asdict(environment)))
    assert facts["facts"] == dict(environment.facts)
    assert facts["packages"] == [
        {"name": "torch", "extra": "", "bounds": ">=2", "version": "2.5"}
    ]  # fmt: skip
    assert facts["devices"] == []
    assert facts["findings"][0] == {
        "check": "packages", "found": "all have matching versions and can be imported (1)",
        "mend": "", "fails": True,
    }  # fmt: skip
    assert facts["folders"]["hub's cache"].startswith("/hub, ")
    assert facts["folders"]["hub's cache"].endswith("GiB free, not there yet")


def test_a_broken_torch_is_told_of_and_all_else_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "ann"
    monkeypatch.setenv("HOME", str(home))
    broken = f"OSError: {home}/lib/libtorch.so: cannot open"
    names = (SYSTEM, BUILD, CPU, THREADS, DEVICES, DEVICE, TRAINING)
    answers(monkeypatch, dict.fromkeys(("torch", *names), broken), dict.fromkeys(names))
    environment = describe_environment(tmp_path)
    assert wrong(environment) == [
        (
            "packages",
            "torch 2.5 cannot be imported: OSError: ~/lib/libtorch.so: cannot open",
            "pip install --force-reinstall 'torch>=2'",
        ),
        *(
            (check, "OSError: ~/lib/libtorch.so: cannot open",
             "fix the problems above, or report this with all lines")
            for check in ("device", "training")
        ),
    ]  # fmt: skip
    shown = rows(environment)
    assert ["torch for", "unknown"] in shown
    assert ["device", "unknown"] in shown
    assert [row[0] for row in shown].count("hub's cache") == 1


def test_an_nvidia_gpu_beside_a_torch_for_the_cpu_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = "GPU 0: NVIDIA GeForce RTX 3060\nGPU 1: NVIDIA A"
    gpu = {SYSTEM: {"nvidia_driver_version": "570.1", "nvidia_gpu_models": models}}
    answers(monkeypatch, {}, gpu)
    environment = describe_environment(tmp_path)
    driver = "570.1; GPU 0: NVIDIA GeForce RTX 3060; GPU 1: NVIDIA A"
    assert environment.facts["NVIDIA driver"] == driver
    ((_, found, mend),) = wrong(environment)
    assert "built for the CPU and cannot use the NVIDIA GPU" in found
    assert mend.startswith("install the one for CUDA, as https://pytorch.org/")
    answers(monkeypatch, {}, {**gpu, BUILD: "CUDA 12.8"})
    assert wrong(describe_environment(tmp_path)) == []


def test_no_psutil_is_no_reason_to_say_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(monkeypatch, {}, {MEMORY: None})
    memory = describe_environment(tmp_path).facts["memory"]
    assert memory == "unknown (no psutil)"


SECRETS = {
    "HF_TOKEN": "hf_telling",
    "HUGGING_FACE_HUB_TOKEN": "hf_telling",
    "HTTP_PROXY": "http://ann:telling@proxy.example:3128",
    "https_proxy": "http://ann:telling@proxy.example:3128",
    "WANDB_API_KEY": "telling",
    "DORA_DIFFUSION_AUTH": "ann:telling-password",
    "HF_ENDPOINT": "https://ann:telling@mirror.example",
    "PIP_INDEX_URL": "https://ann:telling@packages.example",
    "LOGNAME": "telling-name",
    "USER": "telling-name",
    "HF_HUB_OFFLINE": "1",
}


BROKEN = {"torch": "raise OSError('DLL load failed')", "gradio": "os._exit(9)"}


def test_the_whole_command_shows_every_requirement_and_nothing_private(tmp_path: Path) -> None:
    """In a process of its own, with a package that cannot be imported and one that ends Python."""
    home, stubs = tmp_path / "telling-home", tmp_path / "telling-name"
    for name, code in BROKEN.items():
        (stubs / name).mkdir(parents=True)
        (stubs / name / "__init__.py").write_text(f"import os; {code}", encoding="utf-8")
    private = {"HOME": str(home), "HF_HOME": str(home / "hub"), "TMPDIR": "/tmp/telling-name"}
    path = os.pathsep.join([str(ROOT), str(stubs)])
    done = subprocess.run(
        [sys.executable, "-m", "dora_diffusion", "doctor", "--runs_dir", str(home / "runs")],
        env={**SECRETS, **private, "PYTHONPATH": path, "PATH": os.defpath},
        cwd=ROOT, capture_output=True, text=True, check=False, encoding="utf-8",
    )  # fmt: skip
    assert done.returncode == 1
    assert "telling" not in done.stdout + done.stderr
    shown = rows(done.stdout)
    hidden = {"HF_HUB_OFFLINE", "PIP_INDEX_URL", "LOGNAME", "USER"}
    expected = sorted({*SECRETS, "HF_HOME", "PYTHONPATH", "TMPDIR"} - hidden)
    assert [row[-1] for row in shown if "is set" in row[-1]] == [f"{n} is set" for n in expected]
    for text in ("HF_HUB_OFFLINE=1\n", "~/hub/hub, ", "~/runs, "):
        assert text in done.stdout
    versions = [row[-1] for row in shown if re.match("packages|extra", row[0])]
    listed = re.findall(r"[\w-]+", " ".join(versions))
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    project = project.partition("\ndependencies = [")[2].partition("[project.urls]")[0]
    # Python 3.10 alone needs a library for TOML.
    named = re.findall(r'"([\w-]+)(?:[<>=!~; ].*?)?"', project)
    required = [name for name in named if name != "tomli" or sys.version_info < (3, 11)]
    assert {"torch", "pillow-heif", "hypothesis", "codespell", "types-PyYAML"} <= {*required}
    assert [name for name in required if name not in listed] == []
    problems = [row[-1] for row in shown if "cannot be imported" in row[-1]]
    for name, reason in (
        ("torch", "OSError: DLL load failed"), ("gradio", "it ends Python, with exit code 9")
    ):  # fmt: skip
        found = rf"(packages: )?{name} \S+ cannot .*: {reason}; to fix it: pip install .*'{name}>="
        assert any(re.match(found, problem) for problem in problems)


@pytest.mark.parametrize(("python", "named"), [((3, 10), True), ((3, 11), False), ((3, 14), False)])
def test_what_only_older_pythons_need_is_no_requirement(
    python: tuple[int, int], named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    lines = ["torch>=2", 'tomli>=2; python_version < "3.11"', "x; extra == 'heic'"]
    this = default_environment() | {"python_version": ".".join(map(str, python))}
    monkeypatch.setattr(module.metadata, "requires", lambda name: lines)
    monkeypatch.setattr("packaging.markers.default_environment", lambda: this)
    listed = [package.name for package in module.packages() if package.extra != "none"]
    assert listed == ["torch", *(["tomli"] if named else []), "x"]


MODULES = {
    "fine": "value = 1",
    "noisy": "import os; print('hello'); os.write(1, b'no newline')",
    "lacks": "raise ImportError('libcudart.so.12:\\n cannot open')",
    "leaves": "import sys; sys.exit('no display')",
    "dies": "import os; os._exit(132)",
}


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages that do what packages do when they are imported."""
    for name, code in MODULES.items():
        (tmp_path / f"{name}_module.py").write_text(code, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}")


def test_each_answers_for_itself_whatever_the_others_do(modules: None) -> None:
    names = ["dies", "noisy", "lacks", "leaves", "missing", "fine"]
    answers = ask([*(f"{name}_module" for name in names), "fine_module:value", "fine_module:none"])
    assert list(answers.values()) == [
        ("it ends Python, with exit code 132", None),
        ("", None),
        ("ImportError: libcudart.so.12: cannot open", None),
        ("SystemExit: no display", None),
        ("ModuleNotFoundError: No module named 'missing_module'", None),
        ("", None),
        ("", None),
        ("AttributeError: module 'fine_module' has no attribute 'none'", None),
    ]


def test_one_that_never_answers_is_named_and_the_others_are_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(command: list[str], timeout: float, **_: object) -> None:
        assert command[-3:] == ["a", "b", "c"]
        raise subprocess.TimeoutExpired(command, timeout, output=b'["", null]\n')

    monkeypatch.setattr(module.subprocess, "run", run)
    assert ask(["a", "b", "c"]) == {
        "a": ("", None),
        "b": ("it does nothing for 180 seconds", None),
        "c": ("", None),
    }


def test_what_is_tried_of_a_package_is_there() -> None:
    assert {"torch", "diffusers", "pillow"} <= {package.name for package in whole()}
    for name in module._IMPORTED_AS.values():
        imported, _, attribute = name.partition(":")
        if find_spec(imported.partition(".")[0]):
            assert not attribute or attribute in dir(import_module(imported)), name


def test_each_package_is_tried_by_a_name_that_it_has() -> None:
    owners = metadata.packages_distributions()
    for package in whole():
        if not package.version or package.extra in module._NOT_TRIED:
            continue
        name = module._IMPORTED_AS.get(package.name, package.name.replace("-", "_"))
        # Python 3.10 knows the modules of packages that list them, and no others.
        found = owners.get(re.match(r"\w+", name)[0], [package.name])
        own = {re.sub(r"[-_.]+", "-", owner).lower() for owner in found}
        assert package.name.replace("_", "-") in own or name == "torch.utils.tensorboard"


def test_requirements_are_those_of_the_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "torch>=2.4",
        f"psutil>=6; sys_platform == '{sys.platform}'",
        "colorama>=6; sys_platform == 'another'",
        'pillow-heif<9,>=0.1; extra == "heic"',
    ]
    monkeypatch.setattr(module.metadata, "requires", lambda name: lines)
    monkeypatch.setattr(module, "_version", {"torch": "2.5", "triton": "3"}.get)
    assert whole() == [
        Package("torch", "", ">=2.4", "2.5"),
        Package("psutil", "", ">=6", None),
        Package("pillow-heif", "heic", "<9,>=0.1", None),
        Package("triton", "none", "", "3"),
    ]


def test_without_packaging_it_alone_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    (finding,) = (finding for package in whole() for finding in package.findings)
    assert (finding.found, finding.mend) == (
        "packaging is not installed", "pip install 'packaging'"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("extra", "bounds", "version", "state", "found"),
    [
        ("", ">=2.4", "2.4.0+cpu", "", ""),
        ("", ">=2.4", "2.10.0.dev1", "", ""),
        ("", ">=2.4", "2.3.9", "PROBLEM", "torch 2.3.9 is installed, but >=2.4 is needed"),
        ("heic", ">=2.4", "2.3.9", "PROBLEM", "torch 2.3.9 is installed, but >=2.4 is needed"),
        ("", ">=2.4", None, "PROBLEM", "torch is not installed"),
        ("heic", ">=2.4", None, "", ""),
        ("", "", "1", "", ""),
        ("", ">=2.4", "2.11.3", "", ""),
        ("", ">=2.4", "2.12.0", "note", "torch 2.12.0 is newer than 2.11, the newest tested"),
        ("", ">=2.4", "3.0", "note", "torch 3.0 is newer than 2.11, the newest tested"),
    ],
)
def test_what_is_missing_too_old_or_newer_than_tested_is_told(
    extra: str, bounds: str, version: str | None, state: str, found: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(module, "_TESTED", {"torch": "2.11"})
    findings = Package("torch", extra, bounds, version).findings
    assert [(f.state, f.found) for f in findings] == ([(state, found)] if state else [])
    assert all("'torch" in finding.mend for finding in findings)


def test_the_versions_that_were_tested_are_within_the_bounds() -> None:
    bounds = {package.name: package.bounds for package in whole() if not package.extra}
    for name, version in module._TESTED.items():
        assert SpecifierSet(bounds[name]).contains(version), name


@pytest.mark.parametrize("name", list(module._ELSEWHERE))
def test_a_folder_that_cannot_be_written_to_or_is_full_is_a_problem(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "not" / "there"
    text, found = module._examine_folder(name, place)
    assert found.state == "ok"
    assert re.fullmatch(r".*not.there, \d+\.\d GiB free, not there yet", text)
    assert list(tmp_path.iterdir()) == [], "nothing is left of the trial"
    monkeypatch.setattr(module, "_LITTLE", 2**80)
    _, full = module._examine_folder(name, place)
    assert (full.state, full.mend) == ("PROBLEM", f"free some space, or {module._ELSEWHERE[name]}")
    (tmp_path / "not").write_text("a file", encoding="utf-8")
    _, found = module._examine_folder(name, place)
    assert found.found.startswith(f"{tmp_path / 'not'} cannot be written to: ")
    assert (found.state, found.mend) == ("PROBLEM", module._ELSEWHERE[name])


@pytest.fixture
def ann(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ann's home, which is a link, on a machine of hers."""
    (tmp_path / "disk" / "smith-ann").mkdir(parents=True)
    home = tmp_path / "ann smith"
    home.symlink_to(tmp_path / "disk" / "smith-ann")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("LOGNAME", "ann")
    monkeypatch.setattr(module.platform, "node", lambda: "anns-tower")
    return home


def test_the_home_folder_is_a_tilde_however_it_is_written(ann: Path) -> None:
    text = f"no {ann}/runs/a.png or '{ann.resolve()}', {ann}"
    assert without_names(text) == "no ~/runs/a.png or '~', ~"
    for other in (f"{ann}e/x", f"{ann}.old"):
        assert without_names(other).endswith(other[-4:])
        assert "~" not in without_names(other)


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/data/ann/cache", "/data/NAME/cache"),
        (r"D:\ann\cache", r"D:\NAME\cache"),
        ("'/data/ann', and", "'/data/NAME', and"),
        ("/net/anns-tower/data", "/net/NAME/data"),
        ("/data/anna/ann.safetensors", "/data/anna/ann.safetensors"),
        ("ann says that ann/b is a model", "ann says that ann/b is a model"),
    ],
)
def test_names_are_taken_out_of_paths_and_of_nothing_else(ann: Path, path: str, shown: str) -> None:
    assert without_names(path) == shown


def test_a_home_that_is_the_root_and_a_user_that_has_no_name_change_nothing(
    ann: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 1234")

    monkeypatch.setenv("HOME", "/")
    monkeypatch.setattr(module.getpass, "getuser", nobody)
    assert without_names("/usr/lib and /data/ann") == "/usr/lib and /data/ann"


@pytest.mark.parametrize("is_offline", [False, True])
def test_a_model_that_is_not_downloaded_yet_is_no_problem(
    monkeypatch: pytest.MonkeyPatch, is_offline: bool
) -> None:
    """`ask` is offline by itself; only who set that is told to change it."""
    told = "OfflineError: some/model is not in the cache, and HF_HUB_OFFLINE is set; unset it"
    monkeypatch.setattr("dora_diffusion.models.locate.is_offline", lambda: is_offline)
    (finding,) = module._of_base(BaseModel("some/model"), told, None)
    assert finding.state == ("PROBLEM" if is_offline else "ok")
    downloads = "some/model is not downloaded yet; `train` downloads it"
    assert finding.found == (told.partition(": ")[2] if is_offline else downloads)
