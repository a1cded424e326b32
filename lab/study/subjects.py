"""Subjects of trials, from the toy world or from photos."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_diffusion import system
from dora_diffusion.config import ConfigError, TrainConfig
from dora_diffusion.config.derived import class_word_in
from dora_diffusion.config.fields import require
from dora_diffusion.config.wording import whole_word
from dora_diffusion.data.images import open_photo
from dora_diffusion.data.photos import list_photos
from dora_diffusion.evaluation.denoising import HeldOutImages
from dora_diffusion.evaluation.measures import Values, seed_means
from dora_diffusion.evaluation.photos import measure_photos, photo_requests, read_subject, sample
from dora_diffusion.models.components import Components
from dora_diffusion.models.metric_models import MetricModel
from dora_diffusion.sampling.settings import SamplingSettings
from dora_diffusion.toy.benchmark_subjects import (
    SUBJECTS,
    TRIGGER,
    BenchmarkSubject,
    draw_subject,
    write_photos,
)
from dora_diffusion.toy.judges import (
    Group,
    answer,
    knows_toy_world,
    measure,
    toy_requests,
    true_images,
)
from lab.study.config import SamplingOptions

if TYPE_CHECKING:
    from PIL.Image import Image

_GROUPS: tuple[Group, ...] = ("subject", "class", "others")
_SIDE = 128


def find_subject(spec: Any, base: str, metric_models: Sequence[MetricModel]) -> StudySubject:
    """Find or build a subject from its entry in a study.

    Raises:
        ConfigError: If the subject is unknown, or the base cannot learn it.
    """
    if isinstance(spec, Mapping) and "kind" not in spec:
        return PhotoSource.read(spec, metric_models)
    subject = _drawn(spec) if isinstance(spec, Mapping) else SUBJECTS.get(str(spec))
    if subject is None:
        raise ConfigError(
            f"no toy subject is called {spec!r}; there are {', '.join(SUBJECTS)} (for photos, give "
            "photos, held_out and instance_prompt; to draw another subject, kind, seed and mark)",
            "subjects",
        )
    require(
        knows_toy_world(base),
        f"{subject.name} is a subject of the toy world, which {base} does not know",
        "subjects",
    )
    return ToySource(subject)


def _drawn(spec: Mapping[str, Any]) -> BenchmarkSubject:
    """Draw a further toy subject by the arguments of `draw_subject`."""
    try:
        return draw_subject(**spec)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"cannot draw the subject {dict(spec)}: {error}", "subjects") from error


def _settings(options: SamplingOptions) -> SamplingSettings:
    return SamplingSettings(options.inference_steps, options.guidance_scale)


def _means(values: Mapping[str, Values]) -> dict[str, float]:
    return {name: sum(means) / len(means) for name, v in values.items() if (means := seed_means(v))}


@dataclass(frozen=True)
class ToySource:
    """Subject of the toy world, with known true images."""

    subject: BenchmarkSubject

    @property
    def name(self) -> str:
        return self.subject.name

    @property
    def label(self) -> str:
        """Label with the first held-out background."""
        request = self._requests(f"{TRIGGER} {self.subject.word}", 0)[0]
        return f"{self.name} {request.wanted['background']}"

    @property
    def digest(self) -> str:
        return hashlib.sha256(repr(self.subject).encode()).hexdigest()

    def training(self, work: Path, config: TrainConfig) -> dict[str, Any]:
        """Return training settings for its photos, which are rendered once for each token.

        With a masked loss, mask files are rendered, too.
        """
        token, masked = config.token, config.masked_loss
        digest = hashlib.sha256(token.encode()).hexdigest()[:8]
        name = self.name if token == TRIGGER else f"{self.name}-{digest}"
        photos = work / "photos" / f"{name}{'-masked' * masked}"
        if not photos.is_dir():
            photos.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=photos.parent, prefix=".") as temporary:
                unfinished = Path(temporary, photos.name)
                for photo in write_photos(self.subject, unfinished, with_masks=masked):
                    file = photo.with_suffix(".txt")
                    file.write_text(_with_token(file.read_text("utf-8"), token), encoding="utf-8")
                with suppress(OSError):  # Another worker may have written the same photos.
                    system.replace(unfinished, photos)
        word = self.subject.word
        return {
            "instance_data_dir": str(photos),
            "instance_prompt": f"a photo of a {token} {word}",
            "class_word": word,
        }

    def measure(
        self, components: Components, trigger: str, seed: int, options: SamplingOptions
    ) -> tuple[dict[str, float], Image]:
        """Return the measures of `evaluate` without poses, and the image of the first request."""
        requests = self._requests(trigger, seed)
        answers = answer(components, requests, _settings(options), batch_size=options.batch_size)
        return _means(measure(self.subject, requests, answers)), answers.images[0]

    def truth(self) -> Image:
        """Return the true image of the first request."""
        request = self._requests(f"{TRIGGER} {self.subject.word}", 0)[0]
        return true_images([request], _SIDE)[0]

    def _requests(self, trigger: str, seed: int) -> list[Any]:
        return toy_requests(self.subject, trigger, [seed], _GROUPS)


@dataclass(frozen=True)
class PhotoSource:
    """Subject known from photos, some of which are held out.

    Attributes:
        name: Name of the subject.
        photos: Folder of training photos.
        held_out: Folder of held-out photos.
        instance_prompt: Caption of photos without one.
        class_word: Class of the subject.
        metric_models: Image-similarity models.
    """

    name: str
    photos: Path
    held_out: Path
    instance_prompt: str
    class_word: str
    metric_models: Sequence[MetricModel] = ()

    @classmethod
    def read(cls, spec: Mapping[str, Any], metric_models: Sequence[MetricModel]) -> PhotoSource:
        """Read a subject from its entry in a study.

        Raises:
            ConfigError: If a value is missing, or a photo is in both folders.
        """
        keys = ("name", "photos", "held_out", "instance_prompt", "class_word")
        unknown = set(spec) - set(keys)
        require(
            not unknown, f"a subject has no {', '.join(sorted(unknown))}; it has {keys}", "subjects"
        )
        for key in ("photos", "held_out", "instance_prompt"):
            require(
                bool(spec.get(key)),
                f"a subject of photos needs {key}, got {dict(spec)}",
                "subjects",
            )
        photos, held_out = (
            Path(spec[key]).expanduser().absolute() for key in ("photos", "held_out")
        )
        prompt = str(spec["instance_prompt"])
        word = str(spec.get("class_word") or class_word_in(prompt, TRIGGER))
        source = cls(
            str(spec.get("name") or photos.name), photos, held_out, prompt, word, metric_models
        )
        shared = set(_digests(photos)) & set(_digests(held_out))
        if shared:
            raise ConfigError(
                f"{len(shared)} photos of {held_out} are also in {photos}; remove them from one of "
                "the folders",
                "subjects",
            )
        return source

    @property
    def label(self) -> str:
        trigger = f"{TRIGGER} {self.class_word}".strip()
        return f"{self.name} {photo_requests(trigger, self.class_word, [0])[0].prompt}"

    @property
    def digest(self) -> str:
        """Digest of photos, prompts and metric models."""
        models = [model.name for model in self.metric_models]
        contents = [_digests(self.photos), _digests(self.held_out), self.instance_prompt, models]
        return hashlib.sha256(repr([*contents, self.class_word]).encode()).hexdigest()

    def training(self, work: Path, config: TrainConfig) -> dict[str, Any]:
        """Return training settings for its folder of photos."""
        return {
            "instance_data_dir": str(self.photos),
            "instance_prompt": _with_token(self.instance_prompt, config.token),
            "class_word": self.class_word or None,
        }

    def measure(
        self, components: Components, trigger: str, seed: int, options: SamplingOptions
    ) -> tuple[dict[str, float], Image]:
        """Return measures of `evaluate` on held-out photos, and the image of the first prompt."""
        subject = read_subject(self.held_out, trigger, self.class_word)
        requests = photo_requests(trigger, self.class_word, [seed])
        references = [open_photo(photo.path) for photo in subject.photos]
        captions = [photo.caption for photo in subject.photos]
        images = sample(components, requests, _settings(options), options.batch_size, None)
        losses = HeldOutImages(components, references, captions).losses_by_seed([seed])
        values = measure_photos(requests, images, losses, references, self.metric_models, images)
        # The base has its own row, so changes from the base are not measured.
        reported = {n: v for n, v in values.items() if not n.startswith("others_change")}
        return _means(reported), images[0]

    def truth(self) -> Image:
        return open_photo(list_photos(self.held_out)[0])


StudySubject = ToySource | PhotoSource
"""Subject of a study; its digest covers everything that its figures depend on."""


def _with_token(caption: str, token: str) -> str:
    """Replace the study's token in a caption by the token of a method."""
    return whole_word(TRIGGER).sub(lambda _: token, caption)


def _digests(folder: Path) -> list[str]:
    return sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in list_photos(folder))
