"""Settings that commands share, and those of the commands that the app has done as jobs."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dora_diffusion.cli.console.progress import say
from dora_diffusion.config.adapter import NORM_AXES
from dora_diffusion.config.base import BaseModel
from dora_diffusion.config.command import AsJob, CommandSettings
from dora_diffusion.config.families import FAMILIES, PREDICTION_TYPES
from dora_diffusion.config.fields import (
    AUTO,
    DTYPES,
    REQUIRED,
    Condition,
    flag,
    require_token_length,
    when,
)
from dora_diffusion.config.run import SampleSettings
from dora_diffusion.formats.layouts import KEY_FORMATS, LORA_RANK, PROGRAMS, TARGETS
from dora_diffusion.models.schedulers import SCHEDULERS

if TYPE_CHECKING:
    import torch

    from dora_diffusion.cluster.fleet.cluster import Share
    from dora_diffusion.formats.adapter.metadata import AdapterMetadata
    from dora_diffusion.models.components import Components
    from dora_diffusion.numerics.weights import Strengths

BASE = "Diffusers folder, hub id, single-file .safetensors checkpoint, or embedded:NAME."


@dataclass(frozen=True)
class OfModel:
    """Condition of settings that describe a model: one is given, and is loaded as they need.

    Attributes:
        setting: Which model.
        what: How it is called.
        of_hub: Whether a model that lies on this machine is loaded without it.
    """

    setting: str
    what: str
    of_hub: bool = False

    def __call__(self, config: Any) -> str | None:
        """Return why the condition does not hold; None where it does."""
        from dora_diffusion.models.locate import is_embedded

        model: str | None = getattr(config, self.setting)
        if model is None:
            without_base: str | None = config.without_base
            return without_base
        if model.endswith(".safetensors"):
            return f"the {self.what} is a single file"
        if self.of_hub and (is_embedded(model) or Path(model).expanduser().exists()):
            return f"the {self.what} is on this machine, not a hub id"
        return None


def adapter_and_strength(text: str) -> tuple[str, float]:
    """Split ``FILE:0.5`` into the file and its strength; 1 where none is given."""
    match = re.fullmatch(r"(.+):([-+]?\d*\.?\d+(?:[eE][-+]?\d+)?)", text)
    return (match[1], float(match[2])) if match else (text, 1.0)


def _adapter(config: Any) -> str | None:
    """An adapter must be there; of a list, what merges it says so."""
    return "no adapter is given" if getattr(config, "adapter", "") is None else None


def _single_file(config: Any) -> str | None:
    """A configuration is of a single file, for what is none."""
    if not config.base.endswith(".safetensors"):
        return "the base is not a single .safetensors file"
    if str(getattr(config, "output", "")).endswith(".safetensors"):
        return "the output is a single file, which holds none"
    return None


@dataclass(frozen=True, kw_only=True)
class AnyBase(CommandSettings):
    """The base model of what does without one."""

    without_base: ClassVar[str | None] = "no base is given"

    base: str | None = flag(None, BASE)
    variant: str | None = flag(
        None, "Weight variant of the base, such as fp16.", needs=(OfModel("base", "base"),)
    )
    revision: str | None = flag(
        None,
        "Branch, tag or commit of a base on the hub.",
        needs=(OfModel("base", "base", of_hub=True),),
    )

    @property
    def base_model(self) -> Any:
        """The base as a `BaseModel`, with all that is asked of it; None where there is none."""
        return None if self.base is None else BaseModel.of_settings(vars(self))


@dataclass(frozen=True, kw_only=True)
class RequiredBase(AnyBase):
    """The base model."""

    base: str = flag(REQUIRED, BASE)


@dataclass(frozen=True, kw_only=True)
class ScheduleFlags(CommandSettings):
    """Flags of the base's noise schedule."""

    prediction_type: str | None = flag(
        None,
        "What the base predicts: the noise (epsilon) or v. Default: what it says, else what the "
        "adapter says, else epsilon.",
        choices=PREDICTION_TYPES,
    )
    zero_terminal_snr: bool | None = flag(
        None,
        "Zero terminal SNR: the base's noise schedule ends in pure noise (arXiv:2305.08891). "
        "Default: what it says, else what the adapter says, else not.",
    )


@dataclass(frozen=True, kw_only=True)
class Alpha(CommandSettings):
    """Alpha of an adapter whose file may not state it."""

    alpha: float | None = flag(
        None,
        "Alpha that the adapter was trained with, if its file does not say it. Default: its rank, "
        "with a warning.",
        needs=(_adapter,),
    )


@dataclass(frozen=True, kw_only=True)
class Overwrite(CommandSettings):
    """Handling of an output that exists."""

    overwrite: bool = flag(False, "Replace an output that exists.")


@dataclass(frozen=True, kw_only=True)
class Sampling(CommandSettings):
    """Settings of image sampling."""

    steps: int = flag(SampleSettings.validation_inference_steps, "Denoising steps.")
    scheduler: str | None = flag(
        None, "Scheduler. Default: the model's own.", choices=tuple(SCHEDULERS)
    )
    batch_size: int = flag(8, "Batch size.", least=1)


@dataclass(frozen=True, kw_only=True)
class StrengthFlags(CommandSettings):
    """Strengths of an adapter."""

    strength: float = flag(1.0, "Adapter strength: 0 is the base, 1 as trained.", needs=(_adapter,))
    direction_strength: float = flag(
        1.0, "Scale of the low-rank update inside the norm.", needs=(_adapter,)
    )
    magnitude_strength: float = flag(
        1.0, "Share of the magnitude's change that is applied.", needs=(_adapter,)
    )

    @property
    def strengths(self) -> Strengths:
        """All of them.

        Raises:
            ValueError: If one is out of its limits.
        """
        from dora_diffusion.numerics.weights import Strengths

        return Strengths(self.strength, self.direction_strength, self.magnitude_strength)


_STATED = "Default: what the adapter's file says, else that of the base."


@dataclass(frozen=True, kw_only=True)
class Model(ScheduleFlags, RequiredBase):
    """A base model that is loaded to sample from."""

    dtype: str = flag(
        AUTO,
        "Precision. auto: bfloat16 on a GPU that computes it, else float16; float32 on a CPU.",
        choices=(AUTO, *DTYPES),
    )
    model_config: str | None = flag(
        None,
        "Diffusers folder with the configuration of a single-file base. Default: the released "
        "model's.",
        needs=(_single_file,),
    )
    clip_skip: int | None = flag(
        None,
        "Last layers of the text encoders to leave out, as Diffusers counts: 1 is Clip skip 2 of "
        f"web UIs; of SDXL their Clip skip 2 is 0 here. {_STATED}",
        least=0,
    )
    max_token_length: int | None = flag(
        None, f"Tokens of a prompt that are read, in chunks of 75; 0 reads all. {_STATED}"
    )
    compile: bool = flag(
        False,
        "Compile the UNet's repeated blocks with torch.compile: a longer start, then faster steps "
        "on a GPU. Pays from some hundred steps on.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_token_length is not None:
            require_token_length(self.max_token_length)

    @property
    def model_options(self) -> dict[str, Any]:
        """Keyword arguments of `load_adapted` for loading the base."""
        from dora_diffusion.models.precision import dtype_of

        names = ("compile", "clip_skip", "max_token_length")
        return {name: getattr(self, name) for name in names} | {"dtype": dtype_of(self.dtype)}


@dataclass(frozen=True, kw_only=True)
class AdaptedModel(StrengthFlags, Alpha, Model):
    """A base model with an adapter on it."""

    def load(
        self, adapter: str | None, *, offload: str = "none"
    ) -> tuple[Components, AdapterMetadata]:
        """The base with an adapter on it, ready to sample from.

        Raises:
            ValueError: If a strength is out of its limits, before anything is loaded.
        """
        strengths, options = self.strengths, self.model_options
        from dora_diffusion.sampling.generate import load_adapted

        components, metadata = load_adapted(
            self.base_model,
            adapter,
            strength=strengths,
            alpha=self.alpha,
            offload=offload,
            **options,
        )
        if components.schedule is not None and not components.schedule.is_configured:
            say(f"noise schedule of {self.base}: {components.schedule}", sys.stderr)
        return components, metadata


@dataclass(frozen=True, kw_only=True)
class Merge(StrengthFlags, ScheduleFlags, Alpha, RequiredBase):
    """Settings of a merge into a base."""

    adapter: list[str] = flag(
        [],
        "Adapter files or output folders; FILE:0.5 gives one its own strength. May be repeated. "
        "Default: none, the base as it is.",
        repeated=True,
    )
    vae: str | None = flag(None, "Another VAE: folder, hub id or .safetensors file.")
    unet_strength: float = flag(1.0, "Multiplies --strength for the UNet.")
    text_encoder_strength: float = flag(1.0, "Multiplies --strength for the text encoders.")

    @property
    def adapters(self) -> list[tuple[str, float]]:
        """The adapters with their own strengths."""
        return [adapter_and_strength(text) for text in self.adapter]

    @property
    def merge_options(self) -> dict[str, Any]:
        """Keyword arguments of the merge, for `export_checkpoint` and `verify_checkpoint`."""
        from dora_diffusion.numerics.weights import MergeStrengths

        own: dict[str, float] = {name: getattr(self, name) for name in vars(MergeStrengths())}
        return {"strength": MergeStrengths(**own), "alpha": self.alpha}


@dataclass(frozen=True, kw_only=True)
class Written(Overwrite):
    """Format of a written adapter."""

    json: bool = flag(False, "Print JSON, with the error of every layer.")
    dtype: str | None = flag(
        None, "Precision of the low-rank factors. Default: float32.", choices=DTYPES
    )

    @property
    def written_dtype(self) -> torch.dtype | None:
        """The precision as torch has it."""
        from dora_diffusion.models.precision import dtype_of

        return dtype_of(self.dtype) if self.dtype else None


@dataclass(frozen=True, kw_only=True)
class Limits(CommandSettings):
    """Limits on the rank of each layer."""

    rank: int | None = flag(None, "Largest rank. Default: the sum of the adapters' in each layer.")
    conv_rank: int | None = flag(None, "Largest rank of convolutions. Default: --rank.")
    energy: float | None = flag(
        None,
        "Use each layer's smallest rank that keeps this share of the squared singular values, "
        "such as 0.95. Default: the largest rank.",
    )


def magnitudes(config: Any) -> str | None:
    """A LoRA has none."""
    return "a LoRA has no magnitudes" if config.method == "lora" else None


@dataclass(frozen=True, kw_only=True)
class Fit(Written, Limits, RequiredBase):
    """Settings for fitting and writing an adapter."""

    output: str = flag(REQUIRED, "The file or folder to write.")
    method: str = flag("dora", "lora: without magnitudes.", choices=("dora", "lora"))
    norm_axis: str | None = flag(
        None,
        "Axis of the magnitudes. Default: the adapters' own, output where they differ.",
        choices=NORM_AXES,
        needs=(magnitudes,),
    )
    format: str | None = flag(
        None,
        "Key format. Default: diffusers; kohya on the input axis, which it alone can hold.",
        choices=KEY_FORMATS,
    )

    @property
    def fit_options(self) -> dict[str, Any]:
        """Keyword arguments of `extract_adapter` and `combine_adapters`."""
        names = ("rank", "conv_rank", "energy", "method", "norm_axis", "overwrite")
        options = {name: getattr(self, name) for name in names}
        return options | {"key_format": self.format, "dtype": self.written_dtype}


@dataclass(frozen=True, kw_only=True)
class ExportSettings(Overwrite, Merge):
    """Settings of ``export``."""

    job = AsJob(
        "export", "merging", "Merge", heading="One file without an adapter",
        about="A merged checkpoint, for web UIs.", asked=("strength",),
        output="strength-{strength:g}-merged.safetensors",
    )  # fmt: skip

    output: str = flag(
        REQUIRED, "X.safetensors for one file that web UIs read; else a Diffusers folder."
    )
    dtype: str = flag(
        AUTO,
        "Precision of the result. auto: the base's own, whatever machine merges it.",
        choices=(AUTO, *DTYPES),
    )
    model_config: str | None = flag(
        None,
        "Diffusers folder with the configuration, for a folder made from a single file. Default: "
        "the released model's.",
        needs=(_single_file,),
    )


@dataclass(frozen=True, kw_only=True)
class ConvertSettings(Written, Alpha, Limits, AnyBase):
    """Settings of ``convert``."""

    job = AsJob("convert", "converting", "Convert")

    input: str = flag(REQUIRED, "An adapter file or folder.", positional=True)
    output: str = flag(
        REQUIRED, "The file or folder to write; of peft, a .zip too.", positional=True
    )
    to: str = flag(
        REQUIRED,
        f"Program that gets the format it needs of this adapter: {', '.join(PROGRAMS)}. Or a "
        "format: diffusers, peft; kohya, for LyCORIS; for one --base: comfyui, dense (large), and "
        "lora, lora-diffusers, which approximate it without magnitudes; dora: a smaller rank, "
        "nearest with --base.",
        choices=TARGETS,
    )
    family: str | None = flag(
        None, "Model family, for files that do not say it.", choices=tuple(FAMILIES)
    )
    rank: int | None = flag(
        None, f"Largest rank, of dora and the lora targets. Default: {LORA_RANK} for lora."
    )
    tags: list[str] = flag([], "Tags that adapter managers show.")
    thumbnail: str | None = flag(None, "An image that adapter managers show.")


@dataclass(frozen=True, kw_only=True)
class AnalyzeSettings(Alpha, RequiredBase):
    """Settings of ``analyze``."""

    job = AsJob(
        "analyze", "analyzing", "Analyze", heading="What training did to the weights",
        about="How far magnitude and direction moved in each layer, at all checkpoints: tables, "
        "and plots.",
        output="analysis",
    )  # fmt: skip

    source: list[str] = flag(
        REQUIRED,
        "Output folder of a run (all its checkpoints), an adapter, or a model that was trained "
        "from the base or merged; several are compared.",
        positional=True,
    )
    norm_axis: str = flag(
        "output",
        "Axis of a weight's channels, whatever an adapter's own axis is.",
        choices=NORM_AXES,
    )
    layers: list[str] = flag(
        ["*"],
        "Layers by patterns of their names, such as '*.to_q'; * spans dots. Default: all.",
        metavar="PATTERN",
    )
    title: list[str] = flag([], "Titles of the sources. Default: their names.")
    output: str = flag("analysis", "Folder of the results.")
    overwrite: bool = flag(False, "Replace results that exist.")
    json: bool = flag(False, "Print JSON instead of tables.")


@dataclass(frozen=True, kw_only=True)
class RankSettings(Overwrite, AnyBase):
    """Settings of ``rank-checkpoints``."""

    job = AsJob("rank-checkpoints", "ranking", "Rank", is_listed=False)

    without_base = None  # It is the run's then, which may be of the hub.

    run: Path = flag(REQUIRED, "The output folder of a run.", positional=True)
    checkpoints: list[str] = flag(
        [],
        "Checkpoints to rank, such as checkpoint-100, or result. Default: up to eight, spread over "
        "the run, and its result.",
        metavar="NAME",
    )
    subject: str | None = flag(
        None,
        "Folder of photos to be similar to; or, for an embedded model, a subject of the toy world "
        "such as bolt_mug. Default: the run's held-out photos, else those it trained on.",
    )
    output: Path = flag(Path("ranking"), "Folder of the results.")


@dataclass(frozen=True, kw_only=True)
class PushSettings(CommandSettings):
    """Settings of ``push``."""

    job = AsJob(
        "push", "publishing", "Publish", heading="Publish on the Hugging Face hub",
        about="Adapter, model card, settings, loss and samples; never the photos. Needs HF_TOKEN "
        "in the environment that the app was started in.",
        asked=("repository", "public"),
    )  # fmt: skip

    folder: Path = flag(REQUIRED, "The output folder of a run.", positional=True)
    repository: str = flag(
        REQUIRED, "NAME/MODEL on the hub; made where there is none.", positional=True
    )
    adapter: Path | None = flag(
        None,
        "An adapter file of another checkpoint, with a card of its own. Default: the run's.",
    )
    public: bool = flag(False, "Let everybody see it.")


_RAY = when(
    lambda config: config.address is not None,
    "no address is given: there is one worker, this process",
)


@dataclass(frozen=True, kw_only=True)
class WorkerFlags(CommandSettings):
    """Workers for the parts of a large task, and their share of a node."""

    address: str | None = flag(
        None,
        "Ray cluster: local (workers on this machine), auto (the cluster that runs here), "
        "HOST:PORT or ray://HOST:PORT. Default: no Ray, one after another in this process.",
    )
    workers: int | None = flag(
        None,
        "Most workers at once. Default: as many as the nodes have room for.",
        needs=(_RAY,),
    )
    num_cpus: float = flag(1.0, "Processors of each worker.", needs=(_RAY,))
    num_gpus: float | None = flag(
        None,
        "GPUs of each worker; 0.5 has two share one. Default: 1 where the cluster has GPUs.",
        needs=(_RAY,),
    )

    @property
    def share(self) -> Share:
        """The share of each worker."""
        from dora_diffusion.cluster.fleet.cluster import Share

        return Share(self.num_cpus, self.num_gpus, self.workers)


@dataclass(frozen=True, kw_only=True)
class CompareSettings(WorkerFlags):
    """Settings of ``compare``."""

    job = AsJob("compare", "comparing", "Compare", is_listed=False)

    study: str | None = flag(
        None, "YAML file: methods, subjects, seeds, learning rates.", positional=True
    )
    quick: bool = flag(
        False, "A study of two minutes on an embedded model, to see what a report is."
    )
    output: str = flag(
        "comparison",
        "Folder of records and the report, shared by all workers. Trials that have a record there "
        "are not repeated.",
    )
    report_only: bool = flag(False, "Only report existing records; train nothing.")
    json: bool = flag(False, "Print the records as JSON.")


def _given(name: str) -> Condition:
    """Condition that another setting is given."""
    return when(attrgetter(name), f"no --{name} is given")


@dataclass(frozen=True, kw_only=True)
class PrepareSettings(CommandSettings):
    """Settings of ``prepare``; a model is a folder or a hub id."""

    job = AsJob("prepare", "looking at photos", "Check", is_listed=False)

    photos: list[str] = flag(
        REQUIRED, "Folder of photos; several folders are several subjects.", positional=True
    )
    output: str | None = flag(
        None,
        "Folder of the photos with captions and masks, to train on; of several subjects a "
        "sub-folder each. Default: none, photos are only checked.",
    )
    similarity_model: str | None = flag(
        None,
        "Image-similarity model that finds more duplicates: efficientnet-lite0, CLIP or DINO.",
    )
    caption_model: str | None = flag(
        None, "Write missing captions: image-to-text model or WD tagger, folder or hub id."
    )
    caption: str | None = flag(None, "Caption of every photo, instead of its own.")
    find: str | None = flag(None, "Text to replace in every caption, letter by letter.")
    replace: str | None = flag(
        None, "Replacement of the text found. Default: nothing.", needs=(_given("find"),)
    )
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
        "Write missing captions and masks next to the photos, change captions there, and no "
        "output folder.",
    )
    only_copies: bool = flag(
        False, "Leave the photos themselves out of the output.", needs=(_given("background"),)
    )
    json: bool = flag(False, "Print JSON instead of a table.")


JOBS: Mapping[str, type[CommandSettings]] = {
    kind.job.command: kind
    for kind in list(vars().values())
    if isinstance(kind, type) and issubclass(kind, CommandSettings) and kind.job is not None
}
"""The commands that the app has done as jobs, besides ``train``."""
