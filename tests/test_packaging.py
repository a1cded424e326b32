"""Workflows, the container and the forms name what there is."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from dora_diffusion.cli import main as cli

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def jobs(path: Path) -> dict[str, Any]:
    """A workflow's jobs by name."""
    found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
    return found


def commands(job: dict[str, Any]) -> list[str]:
    """Commands of a job, with every value of its matrix put in."""
    matrix = job.get("strategy", {}).get("matrix", {})
    values = [row for key, rows in matrix.items() if key == "include" for row in rows]
    values += [{key: value} for key, rows in matrix.items() if key != "include" for value in rows]
    lines = []
    for step in job["steps"]:
        for chosen in values or [{}]:
            line = step.get("run", "")
            for key, value in chosen.items():
                line = line.replace(f"${{{{ matrix.{key} }}}}", value)
            lines.append(line)
    return sorted({line for line in lines if line and "${{" not in line})


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_nothing_but_targets_of_the_makefile_and_the_ci_script(path: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    lines = [line for job in jobs(path).values() for line in commands(job)]
    assert lines
    for line in lines:
        program, *words = shlex.split(line)
        if program == ".ci/run":
            assert (ROOT / program).is_file()
        else:
            assert program == "make"
            named = {word for word in words if "=" not in word}
            assert named
            assert named <= targets


def test_ci_runs_on_every_system_and_python_that_the_project_names() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    named = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project)
    found = jobs(ROOT / ".github" / "workflows" / "ci.yml")
    assert found["linux"]["strategy"]["matrix"]["python"] == named
    matrix = found["macos-windows"]["strategy"]["matrix"]
    assert matrix["python"] == named
    assert [name.partition("-")[0] for name in matrix["os"]] == ["macos", "windows"]
    targets = {line for line in commands(found["versions"]) if line.startswith("make")}
    assert targets == {"make test-lowest", "make test-newest", "make test-bare"}


def test_actions_are_pinned_and_only_publishing_may_prove_who_it_is() -> None:
    for path in WORKFLOWS:
        workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert workflow["permissions"] == {"contents": "read"}
        for name, job in workflow["jobs"].items():
            granted = job.get("permissions", {})
            assert granted == ({"id-token": "write"} if name == "publish" else {})
            for step in job["steps"]:
                assert re.search(r"@[0-9a-f]{40}$", step.get("uses", "@" + "0" * 40))
    [publish] = [
        step
        for step in jobs(ROOT / ".github" / "workflows" / "release.yml")["publish"]["steps"]
        if "pypi-publish" in step["uses"]
    ]
    assert publish["with"] == {"attestations": True}


def test_the_forms_ask_for_the_environment() -> None:
    for name in ("bug", "question"):
        text = (ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text(encoding="utf-8")
        fields = {field["id"]: field for field in yaml.safe_load(text)["body"]}
        assert "dora-diffusion doctor" in fields["environment"]["attributes"]["label"]
    assert "doctor" in cli.build_parser()._subparsers._group_actions[0].choices


def dockerfile() -> list[tuple[str, str]]:
    """Its instructions with their arguments, comments left out."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    lines = (line.strip() for line in text.splitlines())
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in lines if line]


def test_the_container_copies_what_there_is_and_what_its_builder_is_sent() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    sent = [line[1:] for line in ignored if line.startswith("!")]
    copied = [name for word, rest in dockerfile() if word == "COPY" for name in rest.split()[:-1]]
    assert sorted(copied) == sorted(sent)
    assert not [name for name in copied if not (ROOT / name).exists()]
    # Whatever setup.py and pyproject.toml read is there when the package is installed.
    read = re.findall(r'ROOT / "([\w.]+)"', (ROOT / "setup.py").read_text(encoding="utf-8"))
    assert {*read, "LICENSE"} <= set(copied)
    assert ignored[1] == "*"


def test_the_container_runs_the_app_where_its_health_is_asked() -> None:
    words: dict[str, list[str]] = {}
    for word, rest in dockerfile():
        words.setdefault(word, []).append(rest)
    [entry], [command] = words["ENTRYPOINT"], words["CMD"]
    assert json.loads(entry) == ["dora-diffusion"]
    args = cli.build_parser().parse_args(json.loads(command))
    [health] = words["HEALTHCHECK"]
    assert words["EXPOSE"] == [str(args.port)]
    assert f"http://127.0.0.1:{args.port}/" in health
    compile(json.loads(health[health.index("[") :])[-1], "HEALTHCHECK", "exec")
    assert words["USER"] == ["1000"]
    assert args.runs_dir == Path("/work/runs")


def test_the_container_has_the_extras_that_are_asked_for_and_lets_any_user_write() -> None:
    words: dict[str, list[str]] = {}
    for word, rest in dockerfile():
        words.setdefault(word, []).append(rest)
    assert 'EXTRAS=""' in words["ARG"]
    install = next(rest for rest in words["RUN"] if "EXTRAS" in rest)
    what = re.search(r'pip install --no-cache-dir (".*?")', install)[1]
    for extras, expected in (("", "."), ("ray,heic", ".[ray,heic]")):
        command = ["sh", "-c", f"EXTRAS='{extras}'; printf %s {what}"]
        if shutil.which("sh"):
            assert subprocess.check_output(command, text=True, encoding="utf-8") == expected
    folders = install.partition("--mode=1777")[2].split()
    # A volume inside of a folder that is mounted would take what is written there away.
    assert "VOLUME" not in words
    assert {"/work/runs", *words["WORKDIR"][-1:]} <= {*folders}
    [environment] = words["ENV"]
    values = dict(pair.split("=") for pair in environment.split())
    # Without a name of its own, a user id has no home, and `getpass.getuser` fails.
    assert {values["HOME"], values["HF_HOME"]} <= {*folders}
    assert values["USER"]
