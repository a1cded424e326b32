"""Cautions before training: photos that are few, small, blurred or nearly the same."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from dora_diffusion.config.wording import counted, listing
from dora_diffusion.data.photos import MASK_SUFFIX, Photo, mask_path

FEWEST, MOST = 3, 30
WANTED = f"{FEWEST} to {MOST} photos, from different sides and in different places"
# Sharp photos of the DreamBooth dataset measure 0.18 to 0.36; blurred by 3 pixels, 0.58 and more.
BLURRED = 0.55
# Differing bits, of 64, below which two photos look the same (a copy, resized or re-encoded).
NEAR_DUPLICATE_BITS = 6


@dataclass(frozen=True)
class PhotoWarning:
    """Warning about photos that will show in the result.

    Attributes:
        kind: What is wrong.
        names: Files it is about; empty for the set as a whole.
        message: One line with what to do.
    """

    kind: Literal["few", "many", "small", "blurred", "duplicate", "transparent", "unreadable"]
    names: tuple[str, ...]
    message: str


def check_photos(photos: Sequence[Photo], resolution: int) -> list[PhotoWarning]:
    """Check for what commonly spoils a run; none of it stops one.

    Args:
        photos: The photos, read with ``measure=True``.
        resolution: Side that they will be trained at.

    Raises:
        ValueError: If a photo was not measured.
    """
    found = []
    if message := too_few(photos):
        found.append(PhotoWarning("few", (), message))
    if len(photos) > MOST:
        message = f"{len(photos)} photos: more than {MOST} rarely help; choose the best"
        found.append(PhotoWarning("many", (), message))
    fingerprints: dict[str, int] = {}
    for photo in photos:
        name, (height, width) = photo.path.name, photo.size
        if photo.appearance is None:
            raise ValueError(f"{name} was read without measure=True")
        if min(height, width) < resolution:
            message = (
                f"{name}: {width} x {height} is smaller than the training size {resolution} and "
                "will be enlarged; use a larger photo"
            )
            found.append(PhotoWarning("small", (name,), message))
        if photo.appearance.blur > BLURRED:
            message = f"{name}: looks blurred, and the subject will too; use a sharper photo"
            found.append(PhotoWarning("blurred", (name,), message))
        fingerprints[name] = photo.appearance.fingerprint
    for names in near_duplicates(fingerprints):
        listed = f"{', '.join(names[:-1])} and {names[-1]}" if len(names) < 7 else listing(names, 5)
        message = f"{listed} are nearly the same photo; keep one of them"
        found.append(PhotoWarning("duplicate", names, message))
    if message := said_of_transparency(photos):
        names = tuple(photo.path.name for photo in photos if photo.has_transparency)
        message += (
            "; where masks are used (masked_loss, or a painted mask on any photo), they are not "
            "learned unless the photo has a painted mask of its own"
        )
        found.append(PhotoWarning("transparent", names, message))
    return found


def near_duplicates(fingerprints: Mapping[str, int]) -> list[tuple[str, ...]]:
    """Groups of photos that look the same, each joined to the group by one of it.

    Args:
        fingerprints: Name -> `fingerprint`.
    """
    group_of = {name: [name] for name in fingerprints}
    for (first, left), (second, right) in combinations(fingerprints.items(), 2):
        group, other = group_of[first], group_of[second]
        if group is not other and (left ^ right).bit_count() < NEAR_DUPLICATE_BITS:
            group.extend(other)
            group_of.update(dict.fromkeys(other, group))
    order = {name: place for place, name in enumerate(fingerprints)}
    groups = {id(group): group for group in group_of.values() if len(group) > 1}
    return [tuple(sorted(group, key=order.__getitem__)) for group in groups.values()]


def copies(photos: Sequence[Photo]) -> str:
    """Return a message on files with the same content; empty where there are none."""
    files: dict[str, list[str]] = {}
    for photo in photos:
        files.setdefault(photo.digest, []).append(photo.path.name)
    if len(files) == len(photos):
        return ""
    same = next(names for names in files.values() if len(names) > 1)
    return (
        f"{counted(len(photos), 'photo')}, but only {len(files)} different: {listing(same, 3)} are "
        "the same file; a copy adds nothing but its photo's weight, keep one of each"
    )


def too_few(photos: Sequence[Photo]) -> str:
    """Return a message on too few photos, copies not counted; empty where there are enough."""
    count = len({photo.digest for photo in photos})
    if count >= FEWEST:
        return ""
    return (
        f"only {counted(count, 'photo')}: the background will be learned with the subject, and the "
        f"result will repeat them; use {WANTED}"
    )


def said_of_transparency(photos: Sequence[Photo]) -> str:
    """Return a message on images whose transparent parts became white; empty if there are none."""
    names = [photo.path.name for photo in photos if photo.has_transparency]
    if not names:
        return ""
    return f"transparent parts of {counted(len(names), 'image')} are white: {listing(names, 5)}"


def warn_of_unused_masks(photos: Sequence[Photo]) -> None:
    """Warn of masks beside photos that are not read, and of what became of transparent parts."""
    if transparent := said_of_transparency(photos):
        warnings.warn(
            f"{transparent}; they are learned as a white background: masked_loss leaves them out, "
            "or save the images without transparency",
            stacklevel=3,
        )
    count = sum(mask_path(photo.path).is_file() for photo in photos)
    if count:
        warnings.warn(
            f"{counted(count, 'mask file')} (NAME{MASK_SUFFIX}) next to the images "
            f"{'has' if count == 1 else 'have'} no effect because masked_loss is off",
            stacklevel=3,
        )
