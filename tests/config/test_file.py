"""YAML files of settings: what is wrong is said with the file's name and the line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dora_diffusion.config import ConfigError, read_config_file, read_config_lines


@pytest.fixture(autouse=True, params=["CSafeLoader", "SafeLoader"])
def loader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyYAML as it is built with libyaml, and without."""
    if request.param == "SafeLoader":
        monkeypatch.delattr(yaml, "CSafeLoader", raising=False)
    elif not hasattr(yaml, "CSafeLoader"):
        pytest.skip("PyYAML was built without libyaml")


def test_lines_are_counted_from_one(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("# a comment\nrank: 4\n\ntargets:\n  - attention\nseed: 1\n", encoding="utf-8")
    values, lines = read_config_lines(file)
    assert values == {"rank": 4, "targets": ["attention"], "seed": 1}
    assert lines == {"rank": 2, "targets": 4, "seed": 6}


def test_what_an_alias_merges_may_be_set_again(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    text = "_base: &base\n  rank: 4\n  seed: 3\n<<: *base\nrank: 8\n"
    file.write_text(text, encoding="utf-8")
    values, lines = read_config_lines(file)
    assert values == yaml.safe_load(text) == {"_base": {"rank": 4, "seed": 3}, "rank": 8, "seed": 3}
    assert lines == {"_base": 1, "<<": 4, "rank": 5}


def test_what_a_resumed_run_records_is_no_setting(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("rank: 4\nsegments:\n- from_step: 1\n  settings: {rank: 2}\n", encoding="utf-8")
    assert read_config_file(file) == {"rank": 4}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank: 4\nprompt: 'a\n", "line 3: this is not valid YAML"),
        ("rank: 4\n\trank: 5\n", "line 2: this is not valid YAML"),
        ("rank: 4\nrank: 5\n", "line 2: rank is already set in line 1; keep one of them"),
        ("rank: 4\nseed: 1\nrank: 5\nseed: 2", "line 4: seed is already set in line 2"),
        ("rank: 4\nseed: 1\nrank: 5\nseed: 2", "line 3: rank is already set in line 1"),
        ("rank: " + "[" * 2_000, "this is not valid YAML"),
        ("- " * 20_000, "this is not valid YAML"),
        ("rank: \x07", "this is not valid YAML"),
        ("just words", "must hold 'setting: value' lines"),
    ],
)
def test_a_file_that_is_wrong_is_named_with_its_line(
    text: str, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        read_config_file(file)
    assert str(file) in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
