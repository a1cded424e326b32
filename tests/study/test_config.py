"""A study read from YAML: what is checked before anything is trained."""

from __future__ import annotations

import pytest
import yaml

from dora_diffusion.commands.compare import QUICK
from dora_diffusion.config import ConfigError
from dora_diffusion.study.config import Study, read_study
from tests.study.helpers import STUDY, study


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subject": ["x"]}, "has no subject.*did you mean subjects"),
        ({"methods": {"a": {"rnak": 4}}}, "there is no setting rnak.*did you mean rank"),
        ({"methods": {"a": {"seed": 4}}}, "seed is set by the study"),
        ({"methods": {"a": {"keep_best": True}}}, "keep_best is set by the study"),
        ({"methods": {"a": {"output_dir": "x"}}}, "output_dir is set by the study"),
        ({"methods": {"a": {"rank": -1}}}, "methods.a: rank is -1"),
        ({"methods": {"base": {}}}, "a method is called base"),
        ({"methods": {"a": {"learning_rate": 0}}}, "greater than 0"),
        ({"methods": {"a": {"rate_of": "b"}}}, "rate_of names 'b', which is no method"),
        ({"methods": {}}, "methods is empty"),
        ({"tune": None}, "dora, lora: no learning rate"),
        ({"tune": {"subjects": ["star_teapot"], "learning_rates": [1e-3]}}, "on other subjects"),
        ({"common": {"learning_rate": 1e-3}}, "tune has no effect"),
        ({"seeds": "many"}, "seeds is 'many'"),
        ({"seeds_per_subject": 3}, "seeds_per_subject is 3; there are 2 seeds"),
        ({"seeds_per_subject": 0}, "seeds_per_subject is 0"),
        ({"seeds_per_subject": "one"}, "seeds_per_subject is 'one'"),
        ({"asked": {"steps": 3}}, "asked has no steps"),
    ],
)
def test_what_cannot_work_is_said_before_a_trial(changes, message):
    with pytest.raises(ConfigError, match=message):
        study(**changes)


def test_every_method_is_tuned_equally_often():
    rates = {"learning_rates": [1e-3, 2e-3], "subjects": ["bolt_fish"]}
    with pytest.raises(ConfigError, match=r"as many rates.*'dora': 2, 'lora': 3"):
        study(tune={**rates, "method_rates": {"lora": [1e-3, 2e-3, 4e-3]}})
    assert study(tune={**rates, "method_rates": {"lora": [3e-3, 4e-3]}}).tune.rates("lora") == (
        3e-3, 4e-3,
    )  # fmt: skip


def test_a_setting_that_does_nothing_in_its_method_is_said():
    given = study(methods={"full": {"method": "full", "rank": 4}, "lora": {"method": "lora"}})
    assert given.reasons() == ["full: rank has no effect because method is full"]


def test_the_quick_study_is_one():
    quick = Study.from_dict(QUICK)
    assert [method.learning_rates for method in quick.methods] == [(4e-3,), (4e-3,), (8e-4,)]
    assert not quick.reasons()
