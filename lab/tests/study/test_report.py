"""The report: every method, its images, plots that say what their axes are."""

from __future__ import annotations

import base64
import re

import numpy as np
import pytest
from PIL import Image

from dora_diffusion.sampling.images import save_image
from lab.study import report
from lab.study.report import Results, write_report
from lab.study.subjects import find_subject
from lab.tests.study.helpers import record, study


@pytest.fixture
def results(tmp_path):
    given = study(
        methods={f"dora-r{rank}": {"rank": rank, "learning_rate": 1e-3} for rank in (1, 2, 4)}
        | {"lora": {"method": "lora", "learning_rate": 1e-3}},
        tune=None, seeds=1,
    )  # fmt: skip
    subjects = [find_subject(name, given.base, []) for name in given.subjects]
    records = []
    for subject in subjects:
        records.append(record("base", subject.name, 0, subject_similarity=0.1, others_kind=1.0))
        for number, method in enumerate(given.methods):
            one = record(method.name, subject.name, 0, subject_similarity=0.7 + 0.1 * number,
                         others_kind=0.9)  # fmt: skip
            one["settings"] = {"rank": 2**number, "method": method.name.partition("-")[0]}
            one["analysis"] = {
                "correlation": -0.3, "delta_m": 0.01, "delta_d": 0.002,
                "points": [{"step": 20, "delta_m": [0.1, 0.2, 0.3], "delta_d": [3e-3, 2e-3, 0]}],
            }  # fmt: skip
            records.append(one)
    image = save_image(Image.new("RGB", (64, 64), "red"), tmp_path / "images" / "a.png")
    return Results(given, records, (), {}, subjects, {("lora", subjects[0].name): image})


def test_the_page_has_every_method_and_its_images(results, tmp_path):
    files = write_report(results, tmp_path)
    for text in (files["page"].read_text(encoding="utf-8"),
                 files["markdown"].read_text(encoding="utf-8")):  # fmt: skip
        for method in ("base", "dora-r1", "dora-r2", "dora-r4", "lora"):
            assert method in text
        assert text.count("dora-r4") >= 3  # figures, differences, settings
        assert "difference to lora" in text
        assert "Subjects: star_teapot, striped_car" in text
    table = files["markdown"].read_text("utf-8").split("## Figures")[1].strip().splitlines()[2]
    assert table.replace("|", " ").split() == ["base", "dora-r1", "dora-r2", "dora-r4", "lora"]
    images = re.findall(r"data:image/png;base64,([^\"]+)", files["page"].read_text("utf-8"))
    assert len(images) == 1 + 3  # the grid, and the plots
    assert all(base64.b64decode(image).startswith(b"\x89PNG") for image in images)
    linked = re.findall(r"!\[[^]]*\]\(([^)]+)\)", files["markdown"].read_text("utf-8"))
    assert all((tmp_path / name).is_file() for name in linked)
    assert "src=" not in re.sub(r'src="data:', "", files["page"].read_text("utf-8"))


def test_plots_name_their_axes(results):
    by_method = report.by_method(results.records)
    labels = [panel.get_xlabel() for panel in by_method.axes]
    assert labels == ["subject similarity", "other classes: class (%)"]
    rank = report.over_rank(results.records)
    assert {panel.get_xlabel() for panel in rank.axes} == {"rank"}
    (line,) = report.rank_lines(results.records).items()
    assert line == ("dora", [(1, "dora-r1"), (2, "dora-r2"), (4, "dora-r4")])
    drawn = rank.axes[0].lines[0].get_xydata()
    assert drawn == pytest.approx(np.array([[1, 0.7], [2, 0.8], [4, 0.9]]))
    scatter = report.weights(results.records)
    titles = [panel.get_title() for panel in scatter.axes if panel.get_title()]
    assert titles[0].startswith("dora-r1: r = -0.30")
    assert len(titles) == 4


def test_a_page_says_what_is_missing(results, tmp_path):
    fewer = Results(results.study, results.records[:3], (), {}, results.subjects)
    text = write_report(fewer, tmp_path)["markdown"].read_text(encoding="utf-8")
    assert "7 trials have no record yet" in text


def test_a_page_says_how_much_its_intervals_are_worth(results, tmp_path):
    text = write_report(results, tmp_path)["markdown"].read_text(encoding="utf-8")
    assert "Caution: intervals of 2 runs on 2 subjects are too narrow" in text
