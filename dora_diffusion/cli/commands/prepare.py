"""``dora-diffusion prepare``: makes a training set from photos."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_diffusion.cli.console.output import print_json, progress
from dora_diffusion.config import ConfigError
from dora_diffusion.config.command import CommandSettings
from dora_diffusion.config.fields import REQUIRED, Condition, flag, when
from dora_diffusion.formats.files.atomic import atomic_file, require_writable

if TYPE_CHECKING:
    from dora_diffusion.data.captions import CaptionEdit
    from dora_diffusion.data.prepare import Preparation


def _given(name: str) -> Condition:
    """Return the condition that another setting is given."""
    return when(attrgetter(name), f"no --{name} is given")


@dataclass(frozen=True, kw_only=True)
class PrepareSettings(CommandSettings):
    """Settings of ``prepare``; a model is a folder or a hub id."""

    photos: list[str] = flag(
        REQUIRED, "Folder of photos; several folders are several subjects.", positional=True
    )
    output: str | None = flag(
        None,
        "Folder of the photos with captions and masks, to train on; several subjects get a "
        "sub-folder each. Default: none, photos are only checked.",
    )
    similarity_model: str | None = flag(
        None, "Image-similarity model that finds more duplicates: efficientnet-lite0, CLIP or DINO."
    )
    caption_model: str | None = flag(
        None, "Write missing captions: image-to-text model or WD tagger, folder or hub id."
    )
    caption: str | None = flag(None, "Caption of every photo, in place of its existing one.")
    find: str | None = flag(None, "Text to replace in every caption, matched exactly.")
    replace: str | None = flag(
        None, "Replacement of the text found. Default: nothing.", needs=(_given("find"),)
    )
    remove_tag: str | None = flag(None, "Tag to remove from every caption.")
    first_tag: str | None = flag(None, "Tag to put first in every existing caption.")
    add_tag: str | None = flag(None, "Tag to append to every caption that lacks it.")
    caption_prefix: str | None = flag(
        None, "Text in front of every caption that does not begin with it."
    )
    caption_prompt: str | None = flag(
        None,
        "Question to a chat model. Default: to describe the image in one sentence.",
        needs=(_given("caption_model"),),
    )
    masks: str | None = flag(
        None, "Make missing masks: rembg, rembg:MODEL, or a segmentation model (folder or hub id)."
    )
    mask_label: str | None = flag(
        None,
        "The subject's label of a segmentation model. Default: --class_word.",
        needs=(_given("masks"),),
    )
    token: str = flag("", "Trigger word, put into new captions.")
    class_word: str = flag("", "Class of the subject, before which the token is put.")
    background: str | None = flag(
        None,
        "random: add a copy of each photo on a plain random colour, which its caption names, so "
        "that backgrounds are not learned with the subject.",
        choices=("random",),
    )
    seed: int = flag(0, "Random seed of the colours.", needs=(_given("background"),))
    resolution: int = flag(512, "Training resolution, a multiple of 64.")
    sheets: str = flag(
        ".", "Folder of contact sheets, NAME-sheet.jpg, which are replaced. Default: the current."
    )
    in_place: bool = flag(
        False,
        "Write missing captions and masks next to the photos and change captions there, without "
        "an output folder.",
    )
    only_copies: bool = flag(
        False, "Leave the photos themselves out of the output.", needs=(_given("background"),)
    )
    json: bool = flag(False, "Print JSON instead of a table.")

    def perform(self) -> int:
        """Inspect the photos, write captions, masks and copies, and print a table or JSON."""
        _check(self)
        from dora_diffusion.data.photos import list_photos
        from dora_diffusion.data.prepare import INSTRUCTION, open_captioner, open_masker
        from dora_diffusion.models.metric_models import open_metric_model

        subjects = {Path(f).expanduser().resolve().name: list_photos(f) for f in self.photos}
        if len(subjects) < len(self.photos):
            raise ConfigError(
                "two folders of photos have the same name; give each subject another name", "photos"
            )
        plans = {name: _plan(self, name, paths) for name, paths in subjects.items()}
        prompt, label = self.caption_prompt or INSTRUCTION, self.mask_label or self.class_word
        models: dict[str, Any] = {
            "similarity": self.similarity_model and open_metric_model(self.similarity_model),
            "caption": self.caption_model and open_captioner(self.caption_model, prompt),
            "mask": self.masks and open_masker(self.masks, label=label),
        }
        reports = {}
        for name, plan in plans.items():
            with progress(name, "photo") as show:
                report = reports[name] = replace(plan, **models).run(subjects[name], show)
            with atomic_file(sheet := Path(self.sheets, f"{name}-sheet.jpg")) as temporary:
                report.contact_sheet().save(temporary, format="JPEG", quality=85)
            if not self.json:
                written = [f"{number} {kind}" for kind, number in report.written.items()]
                print(f"{name}:\n\n{report.text()}\n\ncontact sheet: {sheet}")
                print(f"written: {', '.join(written) or 'nothing'}\n")
        _warn_of_imbalance(Counter({name: len(r.photos) for name, r in reports.items()}))
        if self.json:
            print_json({name: report.to_dict() for name, report in reports.items()})
        return 0


def _check(args: PrepareSettings) -> None:
    """Check that the settings do not conflict."""
    makes = args.caption_model or args.masks or args.background or _edit(args)
    if args.caption is not None and args.caption_model:
        raise ConfigError(
            "caption and caption_model both write captions; give one of them", "caption_model"
        )
    if (makes and not args.output and not args.in_place) or (args.output and args.in_place):
        raise ConfigError(
            "captions, masks and copies need either --output FOLDER or --in_place", "output"
        )


def _edit(args: PrepareSettings) -> CaptionEdit:
    """Return the edit of captions; a replacement has no effect without a text to find."""
    from dora_diffusion.data.captions import CaptionEdit

    tags = (args.remove_tag, args.first_tag, args.add_tag)
    replace = args.replace if args.find else ""
    texts = (args.find, replace, *tags, args.caption_prefix)
    return CaptionEdit(args.caption, *(part or "" for part in texts))


def _plan(args: PrepareSettings, name: str, paths: Sequence[Path]) -> Preparation:
    """Check and plan the preparation of a subject, without loading models."""
    from dora_diffusion.data.prepare import Preparation

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
        raise ConfigError(
            "a contact sheet among photos would be trained on; give another --sheets", "sheets"
        )
    require_writable(Path(args.sheets, f"{name}-sheet.jpg"))
    return plan


def _warn_of_imbalance(counts: Counter[str]) -> None:
    # Twice, so that a single subject has a first and a last too.
    (largest, most), *_, (fewest, least) = 2 * counts.most_common()
    if most > 2 * least:
        message = f"{most} photos of {largest} and {least} of {fewest}: trained together, {largest}"
        message += f" is seen {most / least:.1f} times as often; give each about as many"
        warnings.warn(message, stacklevel=3)
