"""The report of a study: one page, as Markdown beside its images, and as one HTML file."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from dora_diffusion.config.wording import counted
from dora_diffusion.data.sheets import sheet
from dora_diffusion.evaluation.report import Section, as_html, as_markdown
from dora_diffusion.formats.files.atomic import save_text
from dora_diffusion.lab.study.plots import write_plots
from dora_diffusion.lab.study.run import Results
from dora_diffusion.lab.study.tables import (
    METHOD,
    caution,
    differences_table,
    figures_table,
    rows_in,
)
from dora_diffusion.lab.study.trials import RECORDS_FILE
from dora_diffusion.sampling.images import save_png

FILES = {"page": "report.html", "markdown": "report.md", "records": RECORDS_FILE}


def write_report(results: Results, output: Path) -> dict[str, Path]:
    """Write the page, its images, and all records in one file; returns their paths."""
    sections = _sections(results, output)
    title = f"Methods compared on {results.study.base}"
    return {
        "page": save_text(output / FILES["page"], as_html(title, sections)),
        "markdown": save_text(output / FILES["markdown"], as_markdown(title, sections)),
        "records": save_text(output / FILES["records"], as_lines(results)),
    }


def _sections(results: Results, output: Path) -> list[Section]:
    records, study = results.records, results.study
    sections = [Section("Figures", _intro(results), figures_table(records))]
    if len(rows_in(records)) > 2:
        text = f"{METHOD}; those of shares are in points. An interval that contains 0 shows none."
        sections.append(
            Section("Paired differences", text, differences_table(records, study.reference))
        )
    if results.images:
        file = save_png(image_grid(results), output / "grid.png")
        text = "Each subject's first seed; above, what was asked for."
        sections.append(Section("Images", text, image=file))
    sections += [Section(title, image=file) for title, file in write_plots(records, output).items()]
    if results.tuning:
        sections.append(_tuning(results))
    methods = [["method", "settings"]]
    methods += [[m.name, _words(m.settings)] for m in study.methods]
    sections.append(Section("Methods", f"All have: {_words(study.common)}.", methods))
    return sections


def _intro(results: Results) -> str:
    study, records = results.study, results.records
    subjects = ", ".join(subject.name for subject in results.subjects)
    machines = ", ".join(dict.fromkeys(record["machine"] for record in records))
    pairs = study.pairs()
    each = len(pairs) // len(study.subjects)
    wanted = (len(study.methods) + 1) * len(pairs)
    left = max(0, wanted - len(records))
    missing = f" {left} trials have no record yet." if left else ""
    diverged = [record["row"] for record in records if "diverged" in record]
    if diverged:
        rows = ", ".join(sorted(set(diverged)))
        missing += f" {len(diverged)} diverged and have no figures ({rows})."
    if doubt := caution(records):
        missing += f" Caution: {doubt}."
    return (
        f"Subjects: {subjects}; {counted(each, 'seed')} each, "
        f"{counted(len({seed for _, seed in pairs}), 'seed')} in all; {len(records)} trials on "
        f"{machines}.{missing} {METHOD}. Live memory: weights, gradients, the optimizer's state, "
        "and what autograd keeps of a batch."
    )


def _tuning(results: Results) -> Section:
    tune = results.study.tune
    assert tune is not None
    keep = ", ".join(f"{name} within {most:g}" for name, most in tune.keep.items())
    text = (
        f"On {', '.join(map(str, tune.subjects))}, {counted(len(tune.seeds), 'seed')} each: the "
        f"rate with the best {tune.best} that keeps {keep} of the base's. Chosen: "
        + ", ".join(f"{name} {rates[0]:g}" for name, rates in results.rates.items() if rates)
        + "."
    )
    return Section("Learning rates", text, figures_table(results.tuning))


def _words(values: object) -> str:
    items = dict(values).items() if isinstance(values, dict) else ()
    return ", ".join(f"`{name}: {value}`" for name, value in items) or "nothing of their own"


def image_grid(results: Results) -> Image.Image:
    """The first seed's image of every subject by every row, under the truth."""
    rows: dict[str, list[Image.Image]] = {"truth": [s.truth() for s in results.subjects]}
    for row in rows_in(results.records):
        files = [results.images.get((row, subject.name)) for subject in results.subjects]
        if any(files):
            rows[row] = [_opened(file) for file in files]
    return sheet(rows, [subject.label for subject in results.subjects])


def _opened(file: Path | None) -> Image.Image:
    """An image; an empty one where there is none."""
    if file is None:
        return Image.new("RGB", (64, 64), "white")
    with Image.open(file) as image:
        return image.convert("RGB")


def as_lines(results: Results) -> str:
    """All records as JSON, one a line."""
    every = [*results.tuning, *results.records]
    return "[\n" + ",\n".join(json.dumps(record) for record in every) + "\n]\n"
