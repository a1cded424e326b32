"""``dora-diffusion prepare``: photos to a training set."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_diffusion.cli.console.progress import progress
from dora_diffusion.cli.console.tables import print_json
from dora_diffusion.cli.settings import PrepareSettings
from dora_diffusion.config import ConfigError
from dora_diffusion.formats.files.atomic import atomic_file, require_writable

if TYPE_CHECKING:
    from dora_diffusion.data.captions import CaptionEdit
    from dora_diffusion.data.curate.run import Preparation

SETTINGS = PrepareSettings


def run(args: PrepareSettings) -> int:
    """Inspect the photos, write what is asked for, and print a table or JSON."""
    _check(args)
    from dora_diffusion.data.curate.models import INSTRUCTION, open_captioner, open_masker
    from dora_diffusion.data.photos import list_photos
    from dora_diffusion.models.metric_models import open_metric_model

    subjects = {Path(f).expanduser().resolve().name: list_photos(f) for f in args.photos}
    if len(subjects) < len(args.photos):
        raise ConfigError("two folders of photos have one name; each subject needs its own")
    plans = {name: _plan(args, name, paths) for name, paths in subjects.items()}
    prompt, label = args.caption_prompt or INSTRUCTION, args.mask_label or args.class_word
    models: dict[str, Any] = {
        "similarity": args.similarity_model and open_metric_model(args.similarity_model),
        "caption": args.caption_model and open_captioner(args.caption_model, prompt),
        "mask": args.masks and open_masker(args.masks, label=label),
    }
    reports = {}
    for name, plan in plans.items():
        with progress(name, "photo") as show:
            report = reports[name] = replace(plan, **models).run(subjects[name], show)
        with atomic_file(sheet := Path(args.sheets, f"{name}-sheet.jpg")) as temporary:
            report.contact_sheet().save(temporary, format="JPEG", quality=85)
        if not args.json:
            written = [f"{number} {kind}" for kind, number in report.written.items()]
            print(f"{name}:\n\n{report.text()}\n\ncontact sheet: {sheet}")
            print(f"written: {', '.join(written) or 'nothing'}\n")
    _warn_of_imbalance(Counter({name: len(r.photos) for name, r in reports.items()}))
    if args.json:
        print_json({name: report.to_dict() for name, report in reports.items()})
    return 0


def _check(args: PrepareSettings) -> None:
    """Refuse what does not go together."""
    makes = args.caption_model or args.masks or args.background or _edit(args)
    if args.caption is not None and args.caption_model:
        raise ConfigError("caption and caption_model both write captions; give one of them")
    if (makes and not args.output and not args.in_place) or (args.output and args.in_place):
        raise ConfigError("captions, masks and copies need either --output FOLDER or --in_place")


def _edit(args: PrepareSettings) -> CaptionEdit:
    """Return the edit of captions; a replacement of nothing is warned of."""
    from dora_diffusion.data.captions import CaptionEdit

    find, prefix = args.find or "", args.caption_prefix or ""
    return CaptionEdit(args.caption, find, (args.replace or "") if find else "", prefix)


def _plan(args: PrepareSettings, name: str, paths: Sequence[Path]) -> Preparation:
    """Plan the preparation of a subject after all checks, without loading models."""
    from dora_diffusion.data.curate.run import Preparation

    target = paths[0].parent if args.in_place else None
    if args.output:
        target = Path(args.output, name if len(args.photos) > 1 else "").expanduser()
    same = ("resolution", "token", "class_word", "seed")
    settings: dict[str, Any] = {name: getattr(args, name) for name in same}
    settings["plain_copies"] = args.background is not None
    settings["originals"] = not (args.background and args.only_copies)
    plan = Preparation(target, edit=_edit(args), **settings)
    plan.check_target(paths)
    if Path(args.sheets).resolve() in (paths[0].parent.resolve(), target and target.resolve()):
        raise ConfigError("a contact sheet among photos would be trained on; give another --sheets")
    require_writable(Path(args.sheets, f"{name}-sheet.jpg"))
    return plan


def _warn_of_imbalance(counts: Counter[str]) -> None:
    # Of one subject too there must be two ends.
    (largest, most), *_, (fewest, least) = 2 * counts.most_common()
    if most > 2 * least:
        message = f"{most} photos of {largest} and {least} of {fewest}: trained together, {largest}"
        message += f" is seen {most / least:.1f} times as often; give each about as many"
        warnings.warn(message, stacklevel=3)
