"""Records: kept, and repeated only when what they depend on has changed."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from dora_diffusion.config import ConfigError, TrainConfig
from dora_diffusion.config.base import BaseModel
from dora_diffusion.config.families import DEFAULT_FAMILY
from dora_diffusion.config.presets import preset_settings
from dora_diffusion.evaluation.measures import MEASURES
from lab.study import run as module
from lab.study import trials as keys
from lab.study.config import BASE, Tuning, read_study
from lab.study.report import write_report
from lab.study.run import chosen_rate, run_study
from lab.study.subjects import find_subject
from lab.study.trials import Trial, base_digest, trials_of
from lab.tests.study.helpers import record, study
from tests.every import every

MEASUREMENTS = Path(__file__).parents[3] / "lab" / "measurements"
RECORDED = {
    "quantised": 24,
    "comparison": 218,
    "comparison-snr": 40,
    "fast-race": 96,
    "fast-finalists": 32,
    "fast": 48,
    "fast-new": 16,
    "fast-epsilon": 56,
    "steps": 40,
    "steps-photos": 12,
    "steps-balanced": 18,
}
TWIN = "d3da37d3f82aa73cdb0a9164cfafbb47cc63758899bdd0c8c803fa765fa2c32b"
"""Digest of the twin that predicts the noise, which does not ship."""


@pytest.fixture
def performed(monkeypatch):
    """Trials that were performed, each in no time; similarity grows with the rate."""
    done = []

    def perform(trial, base, output, *, with_image, load=None):
        done.append(trial)
        rate = trial.learning_rate or 0.0
        made = record(trial.row, trial.subject.name, trial.seed, subject_similarity=100 * rate)
        made |= {"digest": trial.digest, "method": trial.method, "settings": trial.settings}
        return keys.save_record(output, made | {"learning_rate": trial.learning_rate})

    monkeypatch.setattr(module, "perform", perform)
    # It draws the subjects' photos, which these trials have no use for.
    monkeypatch.setattr(module, "check_methods", lambda *_: None)
    return done


def test_a_trial_with_a_record_is_not_repeated(performed, tmp_path):
    results = run_study(study(), tmp_path)
    # Tuning: the base and two methods at two rates; then four rows, two subjects, two seeds.
    assert len(performed) == 5 + 4 * 2 * 2
    assert results.rates == {"dora": (2e-3,), "lora": (2e-3,), "half": (2e-3,)}
    again = run_study(study(), tmp_path)
    assert len(performed) == 5 + 4 * 2 * 2
    assert again.records == results.records
    assert len(results.tuning) == 5


def test_what_is_stopped_is_even(performed, tmp_path):
    """A seed of every subject and method before the next one."""
    run_study(study(), tmp_path)
    order = [(trial.seed, trial.subject.name) for trial in performed[5:]]
    names = ("star_teapot", "striped_car")
    assert order == [(seed, name) for seed in (0, 1) for name in names for _ in range(4)]
    assert [trial.row for trial in performed[5:9]] == ["base", "dora", "lora", "half"]


def test_one_more_seed_or_method_costs_only_its_own_trials(performed, tmp_path):
    run_study(study(), tmp_path)
    before = len(performed)
    run_study(study(seeds=3), tmp_path)
    assert len(performed) - before == 4 * 2
    assert {trial.seed for trial in performed[before:]} == {2}


def test_a_changed_setting_runs_again_and_a_new_name_does_not(performed, tmp_path):
    rates = {"learning_rate": 1e-3}
    first = {"dora": rates, "lora": {"method": "lora", **rates}}
    run_study(study(methods=first, tune=None), tmp_path)
    before = len(performed)
    changed = {"dora": rates, "lora": {"method": "lora", "rslora": True, **rates}}
    run_study(study(methods=changed, tune=None), tmp_path)
    assert {trial.method for trial in performed[before:]} == {"lora"}
    before = len(performed)
    renamed = {"mine": rates, "lora": first["lora"]}
    results = run_study(study(methods=renamed, tune=None), tmp_path)
    assert len(performed) == before
    assert {r["row"] for r in results.records} == {"base", "mine", "lora"}


def test_methods_of_equal_settings_are_each_a_row(performed, tmp_path):
    rates = {"learning_rate": 1e-3}
    results = run_study(study(methods={"a": rates, "b": rates}, tune=None), tmp_path)
    assert [r["row"] for r in results.records].count("a") == 4
    assert [r["row"] for r in results.records].count("b") == 4
    assert len(performed) == 2 * 4


def test_several_rates_are_rows(performed, tmp_path):
    results = run_study(study(methods={"a": {"learning_rate": [1e-3, 4e-3]}}, tune=None), tmp_path)
    assert {r["row"] for r in results.records} == {"base", "a 0.001", "a 0.004"}


@pytest.mark.parametrize("damage", ["{", '{"digest": "other"}', "[]", "{}"])
def test_a_damaged_record_is_made_again(performed, tmp_path, damage):
    run_study(study(), tmp_path)
    before = len(performed)
    file = performed[-1].file(tmp_path)
    file.write_text(damage, encoding="utf-8")
    run_study(study(), tmp_path)
    assert len(performed) == before + 1
    assert json.loads(file.read_text(encoding="utf-8"))["digest"] == performed[-1].digest


def test_a_record_without_settings_at_their_default_is_reported_as_a_whole_one(performed, tmp_path):
    whole = run_study(study(), tmp_path).records
    default = TrainConfig().to_dict()
    for trial in performed:
        short = json.loads(trial.file(tmp_path).read_text(encoding="utf-8"))
        short["settings"] = {k: v for k, v in short["settings"].items() if v != default[k]}
        trial.file(tmp_path).write_text(json.dumps(short), encoding="utf-8")
    again = run_study(study(), tmp_path)
    assert again.records == whole
    write_report(again, tmp_path)


def test_a_default_that_has_changed_makes_a_record_void(performed, tmp_path):
    """The key leaves settings at their default out; the record has them."""
    run_study(study(), tmp_path)
    before = len(performed)
    file = performed[-1].file(tmp_path)
    old = json.loads(file.read_text(encoding="utf-8"))
    old["settings"]["noise_offset"] = 0.5
    file.write_text(json.dumps(old), encoding="utf-8")
    run_study(study(), tmp_path)
    assert len(performed) == before + 1
    # A setting that this version has not, or that the record's had not, leaves it valid.
    old["settings"] |= {"noise_offset": 0.0, "of_another_version": 1}
    del old["settings"]["keep_tags"]
    file.write_text(json.dumps(old), encoding="utf-8")
    run_study(study(), tmp_path)
    assert len(performed) == before + 1


def test_keys_depend_on_all_that_figures_do(tmp_path):
    given = study()
    (first,) = [t for t in _trials(given) if t.method == "dora"]
    others = [
        dataclasses.replace(first, seed=1),
        dataclasses.replace(first, base="another"),
        dataclasses.replace(first, asked=dataclasses.replace(first.asked, inference_steps=7)),
        *(
            dataclasses.replace(first, config=dataclasses.replace(first.config, **moved))
            for moved in ({"learning_rate": 5e-3}, {"init_adapter": "a"}, {"init_adapter": "b"})
        ),
        dataclasses.replace(first, subject=_subject("bolt_mug")),
        dataclasses.replace(first, method="base"),
    ]
    assert len({t.digest for t in [first, *others]}) == 9
    moved = dataclasses.replace(first.config, output_dir="elsewhere", seed=8, logging_dir="x")
    assert dataclasses.replace(first, config=moved, row="name").digest == first.digest


def test_a_method_without_any_setting_of_its_own_is_not_the_base():
    (first,) = [t for t in _trials(study()) if t.method == "dora"]
    plain = dataclasses.replace(first, config=TrainConfig())
    assert plain.digest != dataclasses.replace(plain, method="base").digest


def test_a_setting_that_a_later_version_adds_leaves_keys_as_they_are(monkeypatch):
    (first,) = [t for t in _trials(study()) if t.method == "dora"]
    before, compared = first.digest, keys._compared
    monkeypatch.setattr(keys, "_compared", lambda values: {**compared(values), "new": 1})
    assert first.settings["new"] == 1
    assert first.digest == before


def _subject(name):
    from lab.study.subjects import find_subject

    return find_subject(name, "embedded:tiny-sd", [])


def _trials(given):
    return trials_of(given, "model", {"dora": [1e-3]}, [(_subject("star_teapot"), 0)])


def test_a_report_alone_performs_nothing(performed, tmp_path):
    given = study(methods={"a": {"learning_rate": 1e-3}}, tune=None)
    assert not run_study(given, tmp_path, only_known=True).records
    assert not performed
    with pytest.raises(ConfigError, match="no trial of dora has the figure"):
        run_study(study(), tmp_path, only_known=True)


def test_the_rate_is_the_best_that_leaves_other_classes_alone():
    tune = Tuning(("x",), learning_rates=(1e-3, 2e-3, 4e-3))
    made = [record("base", "x", 0, others_kind=1.0)]
    for rate, similar, kind in ((1e-3, 0.7, 1.0), (2e-3, 0.8, 0.99), (4e-3, 0.9, 0.9)):
        one = record("dora", "x", 0, subject_similarity=similar, others_kind=kind)
        made.append({**one, "learning_rate": rate})
    assert chosen_rate(made, "dora", tune) == 2e-3
    free = dataclasses.replace(tune, keep={})
    assert chosen_rate(made, "dora", free) == 4e-3
    strict = dataclasses.replace(tune, keep={"others_kind": -1.0})
    assert chosen_rate(made, "dora", strict) == 1e-3  # none keeps it: the smallest


def tuned(figures):
    """Records of one method at several rates, beside a base whose every figure is 0.5."""
    made = [record("base", "x", 0, **dict.fromkeys(MEASURES, 0.5))]
    return made + [{**record("dora", "x", 0, **measures), "learning_rate": rate}
                   for rate, measures in figures.items()]  # fmt: skip


def test_each_method_has_the_rate_of_its_own_trials():
    tune = Tuning(("x",), learning_rates=(1e-3, 2e-3), keep={})
    made = tuned({1e-3: {"subject_similarity": 0.5}, 2e-3: {"subject_similarity": 0.6}})
    others = ((1e-3, 0.9), (2e-3, 0.1))
    made += [{**record("lora", "x", 0, subject_similarity=similar), "learning_rate": rate}
             for rate, similar in others]  # fmt: skip
    assert chosen_rate(made, "dora", tune) == 2e-3
    assert chosen_rate(made, "lora", tune) == 1e-3


@pytest.mark.parametrize("order", [1, -1])
def test_of_equally_good_rates_the_smallest_is_taken(order):
    rates = (1e-3, 2e-3, 4e-3, 8e-3)[::order]
    tune = Tuning(("x",), learning_rates=rates, keep={})
    made = tuned({rate: {"subject_similarity": 0.9 if rate > 1e-3 else 0.8} for rate in rates})
    assert chosen_rate(made, "dora", tune) == 2e-3


def test_a_figure_that_should_be_low_is_best_where_it_is_lowest():
    tune = Tuning(("x",), learning_rates=(1e-3, 2e-3, 4e-3), best="denoising_loss", keep={})
    made = tuned({1e-3: {"denoising_loss": 0.3}, 2e-3: {"denoising_loss": 0.1},
                  4e-3: {"denoising_loss": 0.2}})  # fmt: skip
    assert chosen_rate(made, "dora", tune) == 2e-3


@pytest.mark.parametrize(
    ("name", "better", "kept", "lost"),
    [("side", "higher", (0.49, 0.9), (0.47,)), ("others_leakage", "lower", (0.51, 0.1), (0.53,)),
     ("others_kind", "base", (0.51, 0.49), (0.53, 0.47))],
)  # fmt: skip
def test_what_a_rate_must_keep_is_worse_in_the_direction_that_is(name, better, kept, lost):
    """The better rate is taken while the figure is within 0.02 of the base's, on its worse side."""
    assert MEASURES[name].better == better
    tune = Tuning(("x",), learning_rates=(1e-3, 2e-3), keep={name: 0.02})
    for figure in (*kept, *lost):
        made = tuned({1e-3: {"subject_similarity": 0.1, name: 0.5},
                      2e-3: {"subject_similarity": 0.2, name: figure}})  # fmt: skip
        assert chosen_rate(made, "dora", tune) == (2e-3 if figure in kept else 1e-3), figure


def test_each_subject_may_have_seeds_of_its_own(performed, tmp_path):
    given = study(
        subjects=["star_teapot", "striped_car", "moon_robot"], seeds=[4, 5, 6], seeds_per_subject=1
    )
    results = run_study(given, tmp_path)
    pairs = {(r["subject"], r["seed"]) for r in results.records}
    assert pairs == {("star_teapot", 4), ("striped_car", 5), ("moon_robot", 6)}
    assert len(results.records) == 4 * 3
    # The rest of the same study are trials of its own.
    before = len(performed)
    full = study(subjects=["star_teapot", "striped_car", "moon_robot"], seeds=[4, 5, 6])
    assert len(run_study(full, tmp_path).records) == 4 * 9
    assert len(performed) - before == 4 * 6


def test_all_methods_that_cannot_be_trained_are_named_before_any_trial(
    performed, tmp_path, monkeypatch
):
    """With the setting; also those that only the model tells, and that would have come last."""
    monkeypatch.setattr(module, "check_methods", keys.check_methods)
    bad = {
        "layers": ({"targets": ["nothing*"]}, "targets: the pattern 'nothing*' matches no layer"),
        "large": ({"rank": 512}, "rank 512 is larger than the layer"),
        "skip": ({"clip_skip": 9}, "clip_skip is 9, but the text encoders of the model have 2"),
        "start": ({"init_adapter": "no/where"}, "init_adapter: no/where is not"),
        "full": ({"method": "full", "full_weights": "targets", "targets": ["x*"]}, "targets: the "),
        "text": ({"train_text_encoder": True, "text_encoder_targets": ["x*"]}, "text_encoder_targ"),
        "pattern": ({"rank_pattern": {"zzz": 4}}, "rank_pattern: 'zzz' names no adapted layer"),
        "word": (
            {"train_text_encoder_ti": True, "token": "dog"},
            "the new word 'dog' is already a token",
        ),
    }  # fmt: skip
    methods = {name: {"learning_rate": 1e-3, **own} for name, (own, _) in bad.items()}
    common = {"max_train_steps": 2}
    given = study(methods={"fine": {"learning_rate": 1e-3}, **methods}, common=common, tune=None)
    with pytest.raises(ConfigError) as error:
        run_study(given, tmp_path)
    parts = dict(str(part).removeprefix("methods.").split(": ", 1) for part in error.value.parts)
    with every() as case:
        for name, (_, said) in bad.items():
            with case(name):
                assert parts[name].startswith(said)
    assert parts.keys() == bad.keys()
    assert performed == []


def test_subjects_of_one_name_are_refused(performed, tmp_path):
    # Differences are paired by name.
    mugs = [{"kind": "mug", "seed": seed, "mark": "cross", "word": "mug"} for seed in (1, 2)]
    with pytest.raises(ConfigError, match="two subjects have one name: cross_mug, cross_mug"):
        run_study(study(subjects=mugs), tmp_path)
    run_study(study(subjects=[mugs[0], {**mugs[1], "mark": "star"}]), tmp_path)


def test_an_image_is_of_each_subject_s_first_seed(performed, tmp_path, monkeypatch):
    imaged = set()
    inner = module.perform

    def perform(trial, base, output, *, with_image, load=None):
        if with_image:
            imaged.add((trial.subject.name, trial.seed))
        return inner(trial, base, output, with_image=with_image)

    monkeypatch.setattr(module, "perform", perform)
    run_study(study(seeds=3, seeds_per_subject=2), tmp_path)
    assert imaged == {("star_teapot", 0), ("striped_car", 1)}


def test_a_report_s_file_is_enough_to_continue(performed, tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    write_report(run_study(study(seeds=1), there), there)
    here.mkdir()
    shutil.copy(there / "records.json", here)
    before = len(performed)
    results = run_study(study(), here)
    assert len(performed) - before == 4 * 2
    assert {trial.seed for trial in performed[before:]} == {1}
    assert len(results.records) == 4 * 2 * 2


def test_a_record_of_its_own_is_kept_where_a_report_has_an_older_one(performed, tmp_path):
    write_report(run_study(study(seeds=1), tmp_path), tmp_path)
    file = performed[-1].file(tmp_path)
    own = json.loads(file.read_text(encoding="utf-8")) | {"machine": "another"}
    file.write_text(json.dumps(own), encoding="utf-8")
    assert run_study(study(seeds=1), tmp_path).records[-1]["machine"] == "another"


@pytest.mark.parametrize("text", ["{", "[1]", '[{"row": "dora"}]'])
def test_a_file_that_holds_no_records_is_said(performed, tmp_path, text):
    (tmp_path / "records.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="is not a list of records"):
        run_study(study(), tmp_path)


@pytest.mark.parametrize(("name", "count"), RECORDED.items())
def test_the_documents_records_are_of_the_documents_study(name, count):
    """A default that changes would make them void: the study says all that it needs."""
    shown = read_study(MEASUREMENTS / f"{name}.yaml")
    methods = {method.name: shown.training(method) for method in shown.methods}
    methods[BASE] = TrainConfig()
    base = TWIN if name == "fast-epsilon" else base_digest(BaseModel(shown.base))
    records = json.loads((MEASUREMENTS / f"{name}-records.json").read_text(encoding="utf-8"))
    given = [*shown.subjects, *(shown.tune.subjects if shown.tune else ())]
    drawn_by = (find_subject(of, "embedded:tiny-sd", []) for of in given)
    subjects = {one.name: one for one in drawn_by}
    for made in records:
        config = methods[made["method"]]
        if made["method"] != BASE:
            config = dataclasses.replace(config, learning_rate=made["learning_rate"])
        drawn = subjects[made["subject"]], made["seed"]
        trial = Trial(made["row"], made["method"], config, *drawn, base, shown.asked)
        assert trial.digest == made["digest"], made["row"]
        settings, recorded = trial.settings, made["settings"]
        # Settings that were removed since then had their default, or the digest was another.
        assert {name: settings[name] for name in recorded if name in settings} == {
            name: value for name, value in recorded.items() if name in settings
        }
    assert len(records) == count


@pytest.mark.parametrize("name", ["fast", "fast-word"])
@pytest.mark.parametrize("file", ["fast", "fast-new", "fast-epsilon"])
def test_the_fast_presets_are_what_was_measured(file, name):
    shown = read_study(MEASUREMENTS / f"{file}.yaml")
    (method,) = (one for one in shown.methods if one.name == name)
    measured = shown.training(method).to_dict()
    preset = preset_settings(name, DEFAULT_FAMILY, is_embedded=True)
    started = TrainConfig.from_dict({**preset, "output_dir": measured["output_dir"]}).to_dict()
    other = {name for name, value in started.items() if measured[name] != value}
    # Toy photos are square, and min-SNR is what follows for a model that predicts the same. The
    # eight pairs are compared with the usual prior; the name of a word means nothing.
    idle = {"center_crop", "snr_gamma", "validation_steps", "checkpointing_steps", "token"}
    idle |= {"prior_preservation_mode", "num_class_images"} if file == "fast" else set()
    assert other - idle == {"learning_rate"}
    assert (started["learning_rate"],) == method.learning_rates


def test_the_balanced_preset_is_what_was_measured():
    shown = read_study(MEASUREMENTS / "steps-balanced.yaml")
    (method,) = (one for one in shown.methods if one.name == shown.reference)
    measured = shown.training(method).to_dict() | {"learning_rate": method.learning_rates[0]}
    preset = preset_settings("balanced", DEFAULT_FAMILY, is_embedded=True)
    # Samples and checkpoints change no weights.
    idle = {"validation_steps", "checkpointing_steps", "validation_guidance_scale"}
    assert {name: measured[name] for name in preset if name not in idle} == {
        name: value for name, value in preset.items() if name not in idle
    }


def stop():
    raise KeyboardInterrupt


def test_a_variant_of_the_base_is_the_one_that_is_known_again(sd1_folder, tmp_path, monkeypatch):
    """A folder of two variants: what is trained on is what the records are of."""
    folder = tmp_path / "model"
    shutil.copytree(sd1_folder, folder)
    plain = base_digest(BaseModel(folder))
    for path in list(folder.glob("*/*.safetensors")):
        half = {name: tensor.half() for name, tensor in load_file(path).items()}
        save_file(half, path.with_name(f"{path.stem}.fp16.safetensors"), {"format": "pt"})
    assert base_digest(BaseModel(folder)) == plain != base_digest(BaseModel(folder, "fp16"))
    of = []
    monkeypatch.setattr(module, "perform", lambda trial, *_, **__: of.append(trial.base) or stop())
    monkeypatch.setattr(module, "find_subject", lambda name, *_: _subject(name))
    given = study(base=str(folder), common={"variant": "fp16"})
    with pytest.raises(KeyboardInterrupt):
        run_study(given, tmp_path)
    assert of == [base_digest(BaseModel(folder, "fp16"))]
