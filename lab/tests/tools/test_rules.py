"""Rules on source text: a few lines that break one are found, and those beside them are not."""

from __future__ import annotations

import pytest

from tools.rules import code, project, settings, suite
from tools.rules.__main__ import Rule
from tools.rules.sources import Repository

FOUND = {
    code.windows_has_what_is_used: [
        "import fcntl",
        "from resource import getrusage",
        "from os import fork",
        "import os; os.killpg(1, 2)",
        "import os; os.kill(1, 2)",
        "import os; os.sysconf('SC_PAGE_SIZE')",
        "import signal; signal.SIGKILL",
        "import signal; getattr(signal, 'SIGHUP')",
        "open('/proc/meminfo')",
        "subprocess.Popen([], start_new_session=True)",
        "Popen([], **{'start_new_session': True})",
    ],
    code.text_has_an_encoding: [
        "path.read_text()",
        "path.write_text('a')",
        "open(path)",
        "open(path, 'w')",
        "open(path, mode='r+')",
        "path.open('w')",
        "path.open(mode='r')",
        "os.fdopen(3)",
        "subprocess.run(command, text=True)",
        "subprocess.Popen(command, universal_newlines=True)",
        "tempfile.NamedTemporaryFile('w')",
    ],
    code.families_are_not_told_apart_by_name: [
        'family == "sd1"',
        'WIDTHS = {"sd2": 1024}',
        'FAMILIES["sd1"]',
        'def load(family="sdxl"): ...',
        '"xl" in name',
        'name.endswith("-xl")',
        'match family:\n    case "sdxl":\n        pass',
    ],
    code.devices_are_not_named: ["torch.cuda.is_available()", "x.device.type == 'mps'"],
    code.functions_fit_on_a_screen: ["def f():\n" + "    pass\n" * 60],
    code.imports_are_requirements: ["def f():\n    import polars", "import wandb"],
    code.imports_make_no_circle: ["import dora_diffusion.config"],
    code.holders_of_weights_are_alike: ["isinstance(model, (dict, CheckpointFile))"],
    code.docstrings_begin_with_a_verb_or_a_noun: ['def f():\n    """What it does."""'],
    settings.calls_name_settings_that_exist: [
        'raise ConfigError(message, "gone")',
        'require(is_valid, message, "gone")',
        'Excluded("pack", setting="gone")',
        'config.uses("gone")',
        'form.get("gone", "")',
        'LABELS["rank"] + SETTINGS["gone"]',
        '_SAME = ("rank", "gone")',
        'LABELS = {"rank": "Rank", "gone": "Left"}',
    ],
    settings.texts_name_settings_that_exist: ['x = "leave gone_away out"', 'x = "add --gone"'],
    project.printed_commands_install_what_there_is: ["print(f'pip install {name} xyz')"],
    project.documents_and_code_speak_the_words_of_the_field: ["# goes\n  on"],
    suite.tests_wait_for_events: [
        "process.wait(60)",
        "process.communicate(timeout=2.5)",
        "page.wait_for_timeout(500)",
        "httpx.Client(timeout=60)",
        "subprocess.run(words, timeout_s=3)",
        "time.sleep(0.05)",
        "asyncio.wait_for(event.wait(), 60.0)",
        "LONG = 60\nprocess.wait(LONG)",
        "program = 'import time; time.sleep(60)'",
    ],
    suite.property_tests_leave_examples_to_profiles: ["@settings(deadline=None)\ndef test(): ..."],
}
FINE = {
    code.text_has_an_encoding: [
        "path.read_text(encoding='utf-8')",
        "path.read_text('utf-8')",
        "path.write_text('a', 'utf-8')",
        "open(path, 'rb')",
        "open(path, encoding='utf-8')",
        "path.open('rb')",
        "PipelineFolder.open(folder)",
        "Image.open(path)",
        "subprocess.run(command, capture_output=True)",
        "subprocess.run(command, text=True, encoding='utf-8')",
        "tempfile.NamedTemporaryFile()",
        "open(path, **options)",
    ],
    code.families_are_not_told_apart_by_name: [
        'def f():\n    """Of SDXL, ``"sdxl"``; sd1 too."""',
    ],
    code.devices_are_not_named: ["def f():\n    'on cuda'\n    return torch.accelerator"],
    code.functions_fit_on_a_screen: ["def f():\n" + "    pass\n" * 59],
    settings.calls_name_settings_that_exist: ['LABELS = {"rank": "left"}', 'require(a, b, f"{c}")'],
    settings.texts_name_settings_that_exist: [
        'here_it_is = "leave keep_tags out, add --rank, not here_it_is"',
        'KEYS = "gone_away"',
        'def f():\n    """Without gone_away and --gone."""',
    ],
    suite.tests_wait_for_events: [
        "serve_settings(timeout=60)",
        "process.wait(WAIT_SECONDS)\nbarrier.wait()\nopen(timeout=None, wait=True)",
        "page.set_default_timeout(0)\n', '.join('ab')\npage.wait('#x')",
    ],
}


def cases(table: dict[Rule, list[str]]) -> list[tuple[Rule, str]]:
    return [(rule, text) for rule, texts in table.items() for text in texts]


def problems(rule: Rule, text: str) -> list[str]:
    """Findings where a module of the package, or a test, is only this."""
    folder = "tests" if rule.__module__ == suite.__name__ else "dora_diffusion/config"
    sources = {f"{folder}/here.py": text, "dora_diffusion/config/__init__.py": ""}
    if rule is code.imports_make_no_circle:
        sources["dora_diffusion/config/__init__.py"] = "import dora_diffusion.config.here"
    return list(rule(Repository(sources)))


@pytest.mark.parametrize(("rule", "text"), cases(FOUND))
def test_what_breaks_a_rule_is_found(rule: Rule, text: str) -> None:
    [problem] = problems(rule, text)
    assert problem.startswith(("tests/here.py:", "dora_diffusion"))


@pytest.mark.parametrize(("rule", "text"), cases(FINE))
def test_what_keeps_a_rule_is_not(rule: Rule, text: str) -> None:
    assert problems(rule, text) == []


@pytest.mark.parametrize(
    ("address", "badge"),
    [
        ("https://github.com/somebody/project", "https://colab.research.google.com/github/somebody/"
         "project/blob/HEAD/notebooks/first_subject.ipynb"),
        ("https://example.org/project", ""),
        ("", ""),
    ],
)  # fmt: skip
def test_the_notebook_opens_from_the_address_alone(address: str, badge: str) -> None:
    image = "https://colab.research.google.com/assets/colab-badge.svg"
    line = f"[![Open in Colab]({image})]({badge})" if badge else ""
    toml = f'[project.urls]\nRepository = "{address}"\n' if address else ""
    right = {
        "pyproject.toml": toml,
        "README.md": f"# Title\n\n{line}\n",
        project.NOTEBOOK: f'"{line}" "REPOSITORY = \\"{address}\\""',
    }
    rule = project.notebook_follows_the_address
    assert list(rule(Repository(right))) == []
    other = f"[![Open in Colab]({image})](https://colab.research.google.com/github/an/other)"
    for name in ("README.md", project.NOTEBOOK):
        [problem] = rule(Repository(right | {name: right[name] + other}))
        assert problem.startswith(f"{name}:1: its badge must be {line or 'left out'}")
    wrong = right | {project.NOTEBOOK: f'"{line}" "REPOSITORY = \\"https://example.org\\""'}
    [problem] = rule(Repository(wrong))
    assert problem.startswith(f"{project.NOTEBOOK}:1: REPOSITORY must be {address!r}")
