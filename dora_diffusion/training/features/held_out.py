"""Held-out photos of a run: their division from the training photos."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from dora_diffusion.config import ConfigError, TrainConfig
from dora_diffusion.config.features.held_out import holds_out
from dora_diffusion.config.wording import counted, listing, quoted
from dora_diffusion.data.captions import contains_token, read_caption, require_token
from dora_diffusion.data.images import PhotoError, digest_of, read_bytes
from dora_diffusion.data.photos import list_photos
from dora_diffusion.data.sampler import generator_for
from dora_diffusion.training.features.code import FeatureCode, Validate
from dora_diffusion.training.features.validation import Validation
from dora_diffusion.training.inputs.subject import Subject, caption_rules


class HeldOutCode(FeatureCode):
    """Held-out photos in a run."""

    def hold_out(
        self, subjects: Sequence[Subject], photos: list[list[Path]]
    ) -> tuple[list[list[Path]], list[list[Path]], Validate]:
        trained_on, held_out = divide_all(subjects, photos)
        pairs = list(zip(subjects, held_out, strict=True))
        for subject, excluded in pairs:
            check_held_out(subject, excluded)
        return trained_on, held_out, partial(Validation, pairs)


def divide_all(
    subjects: Sequence[Subject], paths: Sequence[Sequence[Path]]
) -> tuple[list[list[Path]], list[list[Path]]]:
    """Divide the photos of each subject into training photos and held-out photos.

    Raises:
        PhotoError, ConfigError: As in `divide`; also if a subject trains on a held-out photo of
            another one, or if two subjects share a held-out photo.
    """
    pairs = zip(subjects, paths, strict=True)
    sides = [divide(subject.settings, photos) for subject, photos in pairs]
    trained_on, held_out = [side[0] for side in sides], [side[1] for side in sides]
    if len(subjects) > 1:
        everything = [path for photos in held_out for path in photos]
        if len(set(everything)) < len(everything):
            raise ConfigError(
                "two subjects have the same validation_data_dir; give each its own folder in the "
                "dataset file",
                "validation_data_dir",
            )
        _check_apart([path for photos in trained_on for path in photos], everything)
    return trained_on, held_out


def divide(
    config: TrainConfig, paths: Sequence[Path] | None = None
) -> tuple[list[Path], list[Path]]:
    """Divide photos into training photos and held-out photos, without decoding.

    Copies of a photo stay on one side. ``validation_split`` draws photos by their content and the
    seed, not by their names or their order.

    Args:
        config: Settings of one subject.
        paths: Photos of the subject. Default: they are listed.

    Raises:
        PhotoError: If a folder is missing or has no photo.
        ConfigError: If no training photo would be left, or a training photo is held out too.
    """
    paths = list_photos(config.instance_data_dir or "") if paths is None else list(paths)
    if not holds_out(config):
        return paths, []
    if config.validation_data_dir:
        held_out = list_photos(config.validation_data_dir, setting="validation_data_dir")
        _check_apart(paths, held_out)
        return paths, held_out
    digests = [_digest(path) for path in paths]
    distinct, split = set(digests), config.validation_split
    count = max(1, round(split * len(distinct))) if split < 1 else int(split)
    if count >= len(distinct):
        raise ConfigError(
            f"validation_split {split:g} holds out {count} of {counted(len(distinct), 'photo')} in "
            f"{config.instance_data_dir}, which leaves none to train on; hold out fewer, or give "
            "more photos",
            "validation_split",
        )

    def draw(digest: str) -> int:
        return generator_for("validation split", config.seed, digest).initial_seed()

    drawn = set(sorted(distinct, key=draw)[:count])
    content = dict(zip(paths, digests, strict=True))
    trained_on = [path for path in paths if content[path] not in drawn]
    return trained_on, [path for path in paths if content[path] in drawn]


def check_held_out(subject: Subject, paths: Sequence[Path]) -> None:
    """Check that captions of held-out photos contain the token, before a model is loaded.

    Raises:
        ConfigError: If no caption contains it.

    Warns:
        UserWarning: If some of the captions lack the token.
    """
    config, rules = subject.settings, caption_rules(subject.settings)
    prompt, per_line = config.instance_prompt or "", config.caption_per_line
    captions = [rules.plain(read_caption(path, prompt, per_line=per_line)) for path in paths]
    if not captions or not subject.token:
        return
    if not any(contains_token(caption, subject.token) for caption in captions):
        raise ConfigError(
            f"the token {subject.token!r} is in no caption of the held-out photos in "
            f"{paths[0].parent} (first: {quoted(captions[0])}); add it to the .txt files there, or "
            "remove the files to use the instance prompt",
            "validation_data_dir",
        )
    require_token(captions, subject.token)


def _digest(path: Path) -> str:
    try:
        return digest_of(read_bytes(path))
    except PhotoError:
        return str(path)  # Reading the photo reports the error.


def _check_apart(trained_on: Sequence[Path], held_out: Sequence[Path]) -> None:
    known = {_digest(path): path for path in trained_on}
    shared = [(path, known[digest]) for path in held_out if (digest := _digest(path)) in known]
    if shared:
        names = [p.name if p.name == t.name else f"{p.name} (as {t.name})" for p, t in shared]
        raise ConfigError(
            f"{counted(len(shared), 'photo')} in validation_data_dir {held_out[0].parent} "
            f"{'is' if len(shared) == 1 else 'are'} trained on too: {listing(names, 5)}; remove "
            f"{'it' if len(shared) == 1 else 'them'} from one of the folders",
            "validation_data_dir",
        )
