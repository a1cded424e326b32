"""A study read from YAML: what is checked before anything is trained."""

from __future__ import annotations

import pytest
import yaml

from dora_diffusion.config import ConfigError
from lab.commands import QUICK
from lab.study.config import read_study
from lab.study.report import differences_table
from lab.study.subjects import find_subject
from lab.study.trials import trials_of
from lab.tests.study.helpers import STUDY, record, study
from tests.refusal import refused


def test_a_method_is_the_common_settings_with_its_own_over_them(tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(STUDY, sort_keys=False), encoding="utf-8")
    read = read_study(file)
    dora, lora, half = (read.training(method) for method in read.methods)
    assert (dora.method_name, lora.method_name) == ("dora", "lora")
    assert (dora.rank, half.rank, half.max_train_steps) == (8, 4, 20)
    assert read.seeds == (0, 1)
    assert read.reference == "lora"
    assert [method.is_tuned for method in read.methods] == [True, True, False]


def tune(**values):
    return {"tune": {"subjects": ["bolt_fish"], **values}}


@pytest.mark.parametrize(
    ("setting", "changes", "words"),
    [
        ("the study", {"subject": ["x"]}, "(did you mean subjects?)"),
        ("rnak", {"methods": {"a": {"rnak": 4}}}, "methods.a: there is no setting rnak (did you"),
        *((name, {"methods": {"a": {name: value}}}, "is set by the study")
          for name, value in (("seed", 4), ("keep_best", True), ("output_dir", "x"))),
        ("rank", {"methods": {"a": {"rank": -1}}}, "methods.a: rank is -1"),
        ("methods", {"methods": {"base": {}}}, "a method is called base"),
        ("learning_rate", {"methods": {"a": {"learning_rate": 0}}}, "methods.a: "),
        ("methods.a.rate_of", {"methods": {"a": {"rate_of": "b"}}}, "no method 'b'"),
        ("methods.adapted.rate_of", {"methods": {"adapted": {"rate_of": "adaptd"}}}, "adapted?)"),
        ("reference", {"reference": "loraa"},
         "'loraa' (did you mean lora?); there are base, dora, lora, half"),
        ("tune.method_rates", tune(method_rates={"lroa": [1e-3]}), "'lroa' (did you mean lora?)"),
        ("tune.best", tune(learning_rates=[1e-3], best="subjet_kind"), "subject_kind?)"),
        ("tune.keep", tune(learning_rates=[1e-3], keep={"other_kind": 0.1}), "others_kind?)"),
        ("methods", {"methods": {}}, "is empty"),
        ("learning_rate", {"tune": None}, "dora, lora: no learning rate"),
        ("tune", tune(subjects=["star_teapot"], learning_rates=[1e-3]), "on other subjects"),
        ("tune", {"common": {"learning_rate": 1e-3}}, "has no effect"),
        ("seeds", {"seeds": "many"}, "'many'"),
        ("seeds_per_subject", {"seeds_per_subject": 3}, "there are 2 seeds"),
        ("seeds_per_subject", {"seeds_per_subject": 0}, "there are 2 seeds"),
        ("seeds_per_subject", {"seeds_per_subject": "one"}, "'one'"),
        ("asked", {"asked": {"steps": 3}}, "has no steps"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_said_before_a_trial(setting, changes, words):
    with refused(setting, words):
        study(**changes)


def test_every_method_that_cannot_work_is_named_at_once():
    methods = {"a": {"rnak": 4, "seed": 1}, "b": {"learning_rate": 0}, "c": {}}
    with pytest.raises(ConfigError) as error:
        study(methods=methods)
    assert str(error.value) == (
        "methods.a: there is no setting rnak (did you mean rank?); methods.a: seed is set by the "
        "study; leave it out; methods.b: learning rates must be greater than 0"
    )
    methods = {"a": {"rank": -1, "snr_gamma": -1}, "b": {"rank": "many"}, "c": {}}
    with pytest.raises(ConfigError) as error:
        study(methods=methods)
    assert str(error.value) == (
        "methods.a: rank is -1; it must be greater than 0; snr_gamma is -1.0; it must not be "
        "negative; methods.b: rank is 'many'; it must be a whole number"
    )
    assert [part.setting for part in error.value.parts] == ["rank", "snr_gamma", "rank"]


@pytest.mark.parametrize(
    ("methods", "reference", "expected"),
    [
        ({"dora": 1e-3, "lora": 1e-3}, None, "lora"),
        ({"dora": 1e-3, "half": 1e-3}, None, "dora"),
        ({"dora": [1e-3, 2e-3], "lora": [1e-3, 2e-3]}, None, "dora 0.001"),
        ({"dora": [1e-3, 2e-3], "lora": [1e-3, 2e-3]}, "lora 0.002", "lora 0.002"),
        ({"dora": [1e-3, 2e-3], "lora": [1e-3, 2e-3]}, "lora", None),
        ({"dora": 1e-3, "lora": 1e-3}, "base", "base"),
        ({"dora": 1e-3, "lora": 1e-3}, "Lora", None),
    ],
)  # fmt: skip
def test_the_reference_is_a_row_of_the_report(methods, reference, expected):
    """Or the differences to it would be a table of dashes."""
    changes = {
        "methods": {name: {"learning_rate": rate} for name, rate in methods.items()},
        "reference": reference, "tune": None,
    }  # fmt: skip
    if expected is None:
        with refused("reference", "there is no row", "there are base, "):
            study(**changes)
        return
    made = study(**changes)
    assert made.reference == expected
    rows = [row for method in made.methods for row in made.rows(method)]
    taken = {m.name: m.learning_rates for m in made.methods}
    trials = trials_of(made, "digest", taken, [(find_subject("star_teapot", made.base, []), 0)])
    assert [trial.row for trial in trials] == ["base", *rows]
    figures = [record(row, "star_teapot", 0, subject_kind=1.0) for row in ("base", *rows)]
    table = differences_table(figures, made.reference)
    assert len(table[0]) > 1
    assert "-" not in table[1][1:]


def test_every_method_is_tuned_equally_often():
    rates = {"learning_rates": [1e-3, 2e-3], "subjects": ["bolt_fish"]}
    with refused("tune", "'dora': 2, 'lora': 3"):
        study(tune={**rates, "method_rates": {"lora": [1e-3, 2e-3, 4e-3]}})
    assert study(tune={**rates, "method_rates": {"lora": [3e-3, 4e-3]}}).tune.rates("lora") == (
        3e-3, 4e-3,
    )  # fmt: skip


def test_a_setting_that_does_nothing_in_its_method_is_said():
    given = study(methods={"full": {"method": "full", "rank": 4}, "lora": {"method": "lora"}})
    assert given.reasons() == ["full: rank has no effect because method is full"]


def test_the_quick_study_is_one():
    quick = read_study(QUICK)
    assert [method.learning_rates for method in quick.methods] == [(4e-3,), (4e-3,), (8e-4,)]
    assert not quick.reasons()
