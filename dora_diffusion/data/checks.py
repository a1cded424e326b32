"""Checks of photos before training (few, small, blurred, duplicate), and a report of them."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

from dora_diffusion.config.wording import aligned, counted, listing
from dora_diffusion.data.crops import Buckets, covering_size
from dora_diffusion.data.images import open_photo
from dora_diffusion.data.photos import MASK_SUFFIX, Photo, mask_path
from dora_diffusion.data.sheets import sheet

if TYPE_CHECKING:
    from dora_diffusion.models.metric_models import MetricModel

FEWEST, MOST = 3, 30
WANTED = f"{FEWEST} to {MOST} photos, from different sides and in different places"
# Sharp photos of the DreamBooth dataset measure 0.18 to 0.36; blurred by 3 pixels, 0.58 and more.
BLURRED = 0.55
# Differing bits, of 64, below which two photos look the same (a copy, resized or re-encoded).
NEAR_DUPLICATE_BITS = 6
LEAST_AREA, MOST_AREA = 0.01, 0.95
# On 16 photos of the DreamBooth dataset, U2-Net's good masks agree by 0.946 and more with the masks
# of the mirrored photos; two masks that miss half of the dog agree by 0.63 and 0.78.
LEAST_AGREEMENT = 0.9
# Least size of a second large piece, as a fraction of the largest.
_LARGE_PIECE = 0.25
# Modified z-score of an outlier (Iglewicz and Hoaglin, 1993).
_OUTLIER = 3.5
_FEWEST = 4
# Least cosine similarity of near-duplicates. With efficientnet-lite0, on 16 photos of the
# DreamBooth dataset: copies that are mirrored, cropped by a tenth, brightened or recompressed have
# 0.89 and more; different photos of one subject have 0.78 at most.
SIMILAR = 0.85
# Least sharpness as a fraction of the set's median. On the same photos, sharp ones have a third and
# more; photos blurred by 1.5 pixels have 0.15 at most.
_SOFT = 0.2
_SIDE = 160
_WHITE, _MASKED = "learned as white", "masked, not learned"
_WHITE_IN_MASK = f"{_WHITE} where the mask is bright"


class PhotoWarning(NamedTuple):
    """Warning about photos that would affect the result.

    Attributes:
        kind: ``"few"``, ``"many"``, ``"small"``, ``"blurred"``, ``"soft"``, ``"duplicate"``,
            ``"transparent"``, ``"unreadable"``, or a problem of masks.
        names: Names of the files; empty for the whole set.
        message: One line with the problem and the advice.
    """

    kind: str
    names: Sequence[str]
    message: str


def check_photos(
    photos: Sequence[Photo], resolution: int, *, uses_masks: bool | None = None
) -> list[PhotoWarning]:
    """Check photos for common problems; none of them stops a run.

    Args:
        photos: The photos, read with ``measure=True``.
        resolution: Training resolution in pixels.
        uses_masks: Whether the run uses masks (masked_loss); None: not known yet.

    Raises:
        ValueError: If a photo was not measured.
    """
    many = f"{len(photos)} photos: more than {MOST} rarely help; choose the best"
    whole_set = {"few": too_few(photos), "many": many if len(photos) > MOST else ""}
    problems = [PhotoWarning(kind, (), text) for kind, text in whole_set.items() if text]
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
            problems.append(PhotoWarning("small", (name,), message))
        if photo.appearance.blur > BLURRED:
            message = f"{name}: looks blurred, and the subject will too; use a sharper photo"
            problems.append(PhotoWarning("blurred", (name,), message))
        fingerprints[name] = photo.appearance.fingerprint
    for names in near_duplicates(fingerprints):
        listed = f"{', '.join(names[:-1])} and {names[-1]}" if len(names) < 7 else listing(names, 5)
        message = f"{listed} are nearly the same photo; keep one of them"
        problems.append(PhotoWarning("duplicate", names, message))
    by_use: dict[str, list[str]] = {}
    for photo in photos:
        by_use.setdefault(transparency_use(photo, uses_masks), []).append(photo.path.name)
    by_use.pop("", None)
    for use, affected in by_use.items():
        count, advice = counted(len(affected), "image"), "; use masked_loss to exclude them"
        message = f"transparent parts of {count} are {use}: {listing(affected, 5)}"
        message += advice if use == _WHITE else ""
        problems.append(PhotoWarning("transparent", affected, message))
    return problems


def near_duplicates(fingerprints: Mapping[str, int]) -> list[tuple[str, ...]]:
    """Groups of near-duplicates; a photo joins a group if it resembles any member.

    Args:
        fingerprints: Name -> `fingerprint`.
    """
    group_of = {name: [name] for name in fingerprints}
    for (first, left), (second, right) in combinations(fingerprints.items(), 2):
        group, other = group_of[first], group_of[second]
        if group is not other and (left ^ right).bit_count() < NEAR_DUPLICATE_BITS:
            group.extend(other)
            group_of.update(dict.fromkeys(other, group))
    order = {name: position for position, name in enumerate(fingerprints)}
    groups = {id(group): group for group in group_of.values() if len(group) > 1}
    return [tuple(sorted(group, key=order.__getitem__)) for group in groups.values()]


def copies(photos: Sequence[Photo]) -> str:
    """Return a message about files with the same content; empty without any."""
    files: dict[str, list[str]] = {}
    for photo in photos:
        files.setdefault(photo.digest, []).append(photo.path.name)
    if len(files) == len(photos):
        return ""
    same = next(names for names in files.values() if len(names) > 1)
    return (
        f"{counted(len(photos), 'photo')}, but only {len(files)} different: {listing(same, 3)} are "
        "the same file; copies only add weight to their photo, keep one of each"
    )


def too_few(photos: Sequence[Photo]) -> str:
    """Return a message about too few photos, without copies; empty if there are enough."""
    count = len({photo.digest for photo in photos})
    if count >= FEWEST:
        return ""
    return (
        f"only {counted(count, 'photo')}: the background will be learned with the subject, and "
        f"images will repeat the photos; use {WANTED}"
    )


def transparency_use(photo: Photo, uses_masks: bool | None) -> str:
    """Return what becomes of a photo's transparent parts in training; empty without any.

    Args:
        photo: The photo.
        uses_masks: Whether the run uses masks (masked_loss); None: not known yet.
    """
    if not photo.has_transparency:
        return ""
    masked = _WHITE_IN_MASK if mask_path(photo.path).is_file() else _MASKED
    if uses_masks is None:
        return f"{_WHITE} (with masked_loss: {masked})"
    return masked if uses_masks else _WHITE


def transparency_message(photos: Sequence[Photo]) -> str:
    """Return a message about images with transparent parts, which are white; empty without any."""
    names = [photo.path.name for photo in photos if photo.has_transparency]
    if not names:
        return ""
    return f"transparent parts of {counted(len(names), 'image')} are white: {listing(names, 5)}"


def warn_of_unused_masks(photos: Sequence[Photo]) -> None:
    """Warn about unused mask files, and about transparent parts that are learned as white."""
    if transparent := transparency_message(photos):
        warnings.warn(
            f"{transparent}; they are learned as a white background; use masked_loss to exclude "
            "them, or save the images without transparency",
            stacklevel=3,
        )
    count = sum(mask_path(photo.path).is_file() for photo in photos)
    if count:
        warnings.warn(
            f"{counted(count, 'mask file')} (NAME{MASK_SUFFIX}) next to the images "
            f"{'has' if count == 1 else 'have'} no effect because masked_loss is off",
            stacklevel=3,
        )


@dataclass
class Report:
    """Report on a folder's photos, and on written files.

    Attributes:
        photos: Result of `look_at` for each photo; ``"look_at"`` lists the kinds of its cautions.
        images: Thumbnails of each photo for the contact sheet, by row.
        unreadable: Reasons why other photos cannot be used, one line each.
        cautions: Warnings about the photos.
        written: Kind of file -> number of written files.
    """

    photos: list[dict[str, Any]] = field(default_factory=list)
    images: list[dict[str, Image.Image]] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    cautions: list[PhotoWarning] = field(default_factory=list)
    written: Counter[str] = field(default_factory=Counter)

    def caution(self, kind: str, names: Sequence[str], message: str) -> None:
        """Add a warning; empty names: about all photos."""
        self.cautions.append(PhotoWarning(kind, names, message))
        for photo in self.photos:
            if photo["name"] in names and kind not in photo["look_at"]:
                photo["look_at"].append(kind)

    def to_dict(self) -> dict[str, Any]:
        """Return all attributes except the images."""
        return {name: value for name, value in vars(self).items() if name != "images"}

    def text(self) -> str:
        """Table of the photos, with the cautions below it."""
        rows = [["photo", "size", "square", "bucket", "sharpness", "caption", "mask", "look at"]]
        for photo in self.photos:
            rows.append([
                photo["name"],
                "{} x {}".format(*photo["size"]),
                f"{photo['square'][2]:.0%}",
                "{} x {}, {:.0%}".format(*photo["bucket"]),
                f"{photo['sharpness']:.0f}",
                "yes" if photo["caption"] else "no",
                f"{photo['mask']['area']:.0%}" if photo["mask"] else "no",
                ", ".join(photo["look_at"]),
            ])  # fmt: skip
        lines = [f"caution: {message}" for _, _, message in self.cautions]
        lines += [f"skipped: {reason}" for reason in self.unreadable]
        return "\n".join([aligned(rows), *([""] if lines else []), *lines])

    def contact_sheet(self) -> Image.Image:
        """Sheet of the photos with their square crops, the masked photos, and the plain copies."""
        labels = [" ".join([photo["name"], *photo["look_at"]]) for photo in self.photos]
        blank = Image.new("RGB", (_SIDE, _SIDE), "white")
        kinds = [k for k in ("photo", "mask", "plain") if any(k in row for row in self.images)]
        rows = {kind: [images.get(kind, blank) for images in self.images] for kind in kinds}
        return sheet(rows, labels, columns=8, side=_SIDE)


def look_at(
    photo: Photo, image: Image.Image, mask: dict[str, Any] | None, resolution: int
) -> dict[str, Any]:
    """Describe one photo, as plain values.

    Returns:
        ``name``; ``size`` (width, height); ``square`` and ``bucket``, each the width and height of
        a crop and the fraction of the photo in it; ``sharpness``; ``caption``; ``mask``.
    """
    facts = {
        "name": photo.path.name, "size": photo.size[::-1], "sharpness": sharpness(image),
        "caption": photo.caption or None, "mask": mask, "look_at": [],
    }  # fmt: skip
    crops = {"square": (resolution, resolution), "bucket": Buckets(resolution)(photo.size)}
    for name, (rows, columns) in crops.items():
        share = rows * columns / math.prod(covering_size(photo.size, (rows, columns)))
        facts[name] = (columns, rows, share)
    return facts


def sharpness(image: Image.Image, side: int = 512) -> float:
    """Variance of the Laplacian of grey values (0 to 255), with a shorter side of ``side``.

    It also depends on the content, so only photos of one set are comparable.
    """
    size = covering_size(image.size, (side, side))
    grey = np.asarray(image.convert("L").resize(size, Image.Resampling.LANCZOS), np.float32)
    around = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
    return float((around - 4 * grey[1:-1, 1:-1]).var())


def small_image(image: Image.Image) -> Image.Image:
    """Thumbnail for the contact sheet, with an outline of the square crop."""
    small = ImageOps.contain(image, (_SIDE, _SIDE))
    side = min(small.size)
    left, top = (small.width - side) // 2, (small.height - side) // 2
    ImageDraw.Draw(small).rectangle((left, top, left + side - 1, top + side - 1), outline="yellow")
    return ImageOps.pad(small, (_SIDE, _SIDE), color="white")


def add_cautions(
    report: Report, photos: Sequence[Photo], resolution: int, model: MetricModel | None = None
) -> None:
    """Add cautions about photos to a report.

    Args:
        report: Report on the photos.
        photos: The photos in the report's order, read with ``measure=True``.
        resolution: Training resolution in pixels.
        model: Image-similarity model that finds further near-duplicates.
    """
    for check in check_photos(photos, resolution):
        report.caution(*check)
    middle = median([photo["sharpness"] for photo in report.photos])
    for photo in report.photos:
        name, sharp = photo["name"], photo["sharpness"]
        if sharp < _SOFT * middle and "blurred" not in photo["look_at"]:
            message = f"{name}: its sharpness is {sharp:.0f}, the median is {middle:.0f}: "
            report.caution("soft", [name], f"{message}out of focus, or enlarged; use a sharper one")
    masks = {photo["name"]: photo["mask"] for photo in report.photos if photo["mask"]}
    for name, doubt in doubts(masks).items():
        report.caution("doubtful mask", [name], f"{name}: check its mask, which {doubt}")
    if model is not None:
        # One at a time, to save memory.
        vectors = torch.cat([model.image_features([open_photo(p.path)]) for p in photos])
        cosines = (vectors @ vectors.T).triu(1)
        for pair in (cosines >= SIMILAR).nonzero().tolist():
            names, value = [photos[index].path.name for index in pair], cosines[tuple(pair)]
            message = f"{' and '.join(names)} are nearly the same photo, {value:.2f} by "
            report.caution("duplicate", names, f"{message}{model.name}; keep one of them")


def measure_mask(mask: Image.Image, mirrored: Image.Image | None = None) -> dict[str, Any]:
    """Measure a mask ("L").

    Args:
        mask: The mask.
        mirrored: The mask of the mirrored photo, mirrored back.

    Returns:
        ``area``: the fraction of the photo that it covers; ``pieces``: the fractions of its
        connected components, largest first; ``agreement``: its intersection over union with
        ``mirrored``, or None.
    """
    values, agreement = np.asarray(mask, np.float32), None
    if mirrored is not None:
        other = np.asarray(mirrored, np.float32)
        agreement = float(np.minimum(values, other).sum() / np.maximum(values, other).sum())
    area = float(values.mean() / 255)
    return {"area": area, "pieces": _pieces(mask), "agreement": agreement}


def _pieces(mask: Image.Image, side: int = 64) -> list[float]:
    """Areas of the connected components above half brightness, at 64 x 64 pixels."""
    small = mask.resize((side, side), Image.Resampling.BOX).point(lambda v: 255 * (v > 127))
    shares = []
    while bright := np.argwhere(np.asarray(small) == 255).tolist():
        ImageDraw.floodfill(small, (bright[0][1], bright[0][0]), 1)
        shares.append(small.histogram()[1] / side**2)
        small = small.point(lambda value: 255 * (value > 1))
    return sorted(shares, reverse=True)


def doubts(masks: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return reasons why masks of one subject's photos may be wrong, by photo.

    Args:
        masks: Photo -> result of `measure_mask`.
    """
    logs = {name: math.log(max(mask["area"], 1e-6)) for name, mask in masks.items()}
    median_log = median(logs.values() or [0])
    # Standard deviation of a normal distribution from its median absolute deviation.
    spread = 1.4826 * median([abs(log - median_log) for log in logs.values()] or [0])
    far = max(math.log(2), _OUTLIER * spread) if len(logs) >= _FEWEST else math.inf
    reasons = {}
    for name, mask in masks.items():
        area, agreement = mask["area"], 1 if mask["agreement"] is None else mask["agreement"]
        large = sum(piece > _LARGE_PIECE * mask["pieces"][0] for piece in mask["pieces"])
        is_far, median_area = abs(logs[name] - median_log) > far, math.exp(median_log)
        checks = {
            f"covers {area:.1%} of the photo": not LEAST_AREA <= area <= MOST_AREA,
            f"covers {area:.0%} of the photo, but the median is {median_area:.0%}": is_far,
            f"has {large} large pieces": large > 1,
            f"has {agreement:.0%} in common with the mirrored photo's": agreement < LEAST_AGREEMENT,
        }
        reasons[name] = ", ".join(text for text, is_so in checks.items() if is_so)
    return {name: text for name, text in reasons.items() if text}
