"""The page of a fleet: its figures, what failed and why, and each subject's sample images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from urllib.parse import quote

from dora_diffusion.cluster.fleet.records import DONE, FAILED, SubjectRecord
from dora_diffusion.config.wording import counted, duration
from dora_diffusion.evaluation.page import LinkedImage, Section, as_html

PAGE_FILE = "index.html"
# Which sheet of a subject is shown.
_SHEETS = ("samples/base_above_adapted.png", "samples/adapted.png")


def fleet_page(names: Sequence[str], records: Mapping[str, SubjectRecord]) -> str:
    """The page as HTML, with the images of the folders beside it.

    Args:
        names: All subjects, in their order.
        records: Of those that have ended.
    """
    ended = [records[name] for name in names if name in records]
    done = [record for record in ended if record.status == DONE]
    failed = [record for record in ended if record.status == FAILED]
    text = f"{counted(len(names), 'subject')}: {len(done)} done, {len(failed)} failed."
    if done:
        seconds = sum(record.seconds for record in done)
        cpu = sum(record.cpu_seconds for record in done)
        text += (
            f" Those that are done took {duration(seconds / len(done))} each, "
            f"{duration(cpu / len(done))} of processor time."
        )
    sections = [Section("Subjects", text, _table(ended))]
    if failed:
        table = [["subject", "cause"], *([record.name, record.cause] for record in failed)]
        sections.insert(0, Section("Failed", table=table))
    images = [image for record in done if (image := _image(record))]
    if images:
        sections.append(Section("Images", images=images))
    return as_html("A fleet", sections)


def _table(records: Sequence[SubjectRecord]) -> list[list[str]]:
    head = ["subject", "status", "steps", "time", "start", "processor time", "workers", "node"]
    rows = [
        [
            record.name, record.status, str(record.steps), duration(record.seconds),
            f"{record.start_seconds:.1f} s", duration(record.cpu_seconds), str(record.attempts),
            record.node or "-",
        ]
        for record in records
    ]  # fmt: skip
    return [head, *rows]


def _image(record: SubjectRecord) -> LinkedImage | None:
    sheet = next((sheet for sheet in _SHEETS if sheet in record.samples), None)
    return None if sheet is None else LinkedImage(record.name, quote(f"{record.name}/{sheet}"))
