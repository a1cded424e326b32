"""``python -m lab compare``: what is asked for, and what is written."""

from __future__ import annotations

import json

import pytest
import yaml

from lab import __main__ as cli
from lab.study import run as module
from lab.study.trials import save_record
from lab.tests.study.helpers import STUDY, record


@pytest.fixture
def performed(monkeypatch):
    done = []

    def perform(trial, base, output, *, with_image, load=None):
        done.append(trial)
        made = record(trial.row, trial.subject.name, trial.seed, subject_similarity=0.5)
        made |= {"digest": trial.digest, "method": trial.method, "settings": trial.settings}
        return save_record(output, made | {"learning_rate": trial.learning_rate})

    monkeypatch.setattr(module, "perform", perform)
    return done


@pytest.mark.parametrize("given", [[], ["study.yaml", "--quick"]])
def test_a_study_is_asked_for_in_one_way(given, capsys):
    assert cli.main(["compare", *given]) == 1
    assert "give a study's YAML file, or --quick" in capsys.readouterr().err


def test_a_study_is_performed_once_and_reported(performed, tmp_path, capsys):
    file, output = tmp_path / "study.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(STUDY), encoding="utf-8")
    assert cli.main(["compare", str(file), "--output", str(output)]) == 0
    out = capsys.readouterr().out
    assert "| base" in out
    assert str(output / "report.html") in out
    assert "half" in (output / "report.md").read_text(encoding="utf-8")
    count = len(performed)
    assert cli.main(["compare", str(file), "--output", str(output), "--report_only", "--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert len(performed) == count == len(records)
    assert records == json.loads((output / "records.json").read_text(encoding="utf-8"))


def test_a_report_of_nothing_is_refused(tmp_path, capsys):
    assert cli.main(["compare", "--quick", "--report_only", "--output", str(tmp_path)]) == 1
    assert "contains no record of this study" in capsys.readouterr().err
