"""All settings of a training run, validated on construction.

The fields of `TrainConfig` are the flags of ``train_dreambooth_dora.py`` and the keys of its YAML
config files, in the order of ``--help``. Flags of Diffusers' scripts keep their names and meaning;
`dora_diffusion.config.flag_map` has answers to flags that are missing here.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import permutations
from pathlib import Path
from typing import Any

from dora_diffusion.config import learning, run, subject
from dora_diffusion.config.adapter import AdapterConfig
from dora_diffusion.config.arguments import check_arguments
from dora_diffusion.config.base import BaseModel, require_tile_size
from dora_diffusion.config.dataset_file import checked_entries, naming_entry
from dora_diffusion.config.families import DEFAULT_FAMILY
from dora_diffusion.config.fields import (
    ConfigError,
    Setting,
    require,
    require_token_length,
)
from dora_diffusion.config.file import PATHS
from dora_diffusion.config.problems import Problems
from dora_diffusion.config.prompts import SamplePrompt, parse_prompt, read_prompts
from dora_diffusion.config.wording import counted, did_you_mean, framed, quoted, whole_word


@dataclass(frozen=True)
class TrainConfig(  # A dataclass lists the fields of its last base first.
    run.OutputSettings, run.ValidationSettings, run.SampleSettings, run.DeviceSettings,
    learning.LossSettings, learning.OptimizerSettings, learning.LengthSettings,
    learning.AdapterSettings,
    subject.PriorSettings, subject.ImageSettings, subject.SliderSettings, subject.WordSettings,
    subject.SubjectSettings, subject.ModelSettings,
):  # fmt: skip
    """All settings of one DreamBooth run.

    Example:
        >>> TrainConfig(instance_data_dir="photos", instance_prompt="a photo of a sks dog").rank
        8

    Raises:
        ConfigError: If a value cannot work, or two values contradict each other.
    """

    def __post_init__(self) -> None:
        known = {setting.name: setting for setting in settings()}
        self._check_each()
        if self.method is None:
            object.__setattr__(self, "method", "lora" if self.is_slider else "dora")
        if self.dataset_config:
            entries = checked_entries(self.dataset_config, known, self.train_batch_size)
            object.__setattr__(self, "dataset_config", entries)
            for index in range(len(entries)):
                with naming_entry(index):
                    self.of_entry(index)
        require(
            not (self.use_8bit_adam and self.optimizer not in ("adamw", "adamw8bit")),
            f"use_8bit_adam contradicts optimizer {self.optimizer}; leave one of them out",
            "use_8bit_adam",
        )
        require(
            not self.push_to_hub or "/" in (self.hub_model_id or ""),
            "push_to_hub needs --hub_model_id NAME/MODEL",
            "push_to_hub",
        )
        require(
            not (self.push_to_hub and self.is_full),
            "push_to_hub publishes adapters; upload the model of full fine-tuning with "
            "'huggingface-cli upload NAME/MODEL OUTPUT_DIR/model'",
            "push_to_hub",
        )
        require(
            self.quantize == "none" or not self.is_full,
            f"quantize is {self.quantize}, but method full trains the weights themselves, which "
            "cannot be quantised; leave it out, or train an adapter",
            "quantize",
        )
        self._check_data()
        require(
            len(self.weightings) < 2,
            f"{' and '.join(self.weightings)} both weight the loss by timestep; leave one out",
            next(reversed(self.weightings), ""),
        )
        if self.is_prodigy:
            self._check_prodigy()
        if self.is_schedule_free:
            self._check_schedule_free()
        if self.parametrization == "adalora" and not self.is_full:
            self._check_allocation()
        if self.is_slider:
            self._check_slider()
        elif self.train_text_encoder_ti:
            self._check_words()
        if self.init_adapter and not self.is_full:
            self.unet_adapter.check_start()
        for targets, rank_only in ((self.targets, False), (self.text_encoder_targets, True)):
            self._adapter(tuple(targets), rank_only)

    def _check_each(self) -> None:
        problems = Problems()
        for setting in settings():
            value = getattr(self, setting.name)
            if isinstance(value, Path):  # as in a YAML file
                object.__setattr__(self, setting.name, str(value))
            try:
                setting.check(value)
            except ConfigError as error:
                problems.add(error)
        problems.raise_all()

    def _check_data(self) -> None:
        require_token_length(self.max_token_length)
        require_tile_size(self.vae_tile_size)
        for name in ("rank_dropout", "tlora_min_rank"):
            require(
                not (self.compile and getattr(self, name)),
                f"{name} masks ranks in each step, which compiled blocks would ignore; leave one "
                f"of {name} and compile out",
                name,
            )
        ranks = max(self.rank, self.conv_rank, *self.rank_pattern.values())
        require(
            (self.least_rank or 0) < ranks,
            f"tlora_min_rank is {self.tlora_min_rank}, but no layer has more than {ranks} ranks, "
            "so none would be masked; lower it, or raise rank",
            "tlora_min_rank",
        )
        require(
            bool(self.caption_separator),
            "caption_separator is empty; give a separator of tags, such as ','",
            "caption_separator",
        )
        require(
            not (self.validation_data_dir and self.validation_split),
            "validation_data_dir and validation_split both select held-out photos; leave one of "
            "them out",
            "validation_split",
        )
        require(
            self.validation_split < 1 or self.validation_split % 1 == 0,
            f"validation_split is {self.validation_split:g}; give a share below 1, or a whole "
            "number of photos",
            "validation_split",
        )
        for prompt in self.validation_prompt:
            parse_prompt(prompt)

    def _check_words(self) -> None:
        words, concepts = self.words, self.initializer_concept
        require(
            bool(words),
            "train_text_encoder_ti trains a new word, but token is ''; name it with --token or "
            "--new_words",
            "token",
        )
        for word in words:
            require(
                bool(re.fullmatch(r"[^\s./\\]+", word)) and word == word.lower(),
                f"the new word {word!r} must be in lower case, as tokenizers convert it, and "
                "without spaces, dots and slashes, since it is part of names of files and keys",
                "new_words",
            )
        for one, other in permutations(words, 2):
            require(
                one not in other,
                f"new word {other!r} contains the new word {one!r}, so tokenizers cannot separate "
                "them; choose others",
                "new_words",
            )
        adapts_table = self.train_text_encoder and not self.is_full
        require(
            not (adapts_table and "token-embedding" in self.text_encoder_targets),
            "train_text_encoder_ti adds rows to the token table, but text_encoder_targets adapts "
            "the table; leave token-embedding out of text_encoder_targets",
            "text_encoder_targets",
        )
        require(
            len(concepts) in (0, 1, len(words)) and all(concept.strip() for concept in concepts),
            f"initializer_concept has {len(concepts)} for {len(words)} new words; give one for "
            "all or one for each, without empty ones",
            "initializer_concept",
        )
        for word in words:
            require(
                not any(map(whole_word(word).search, concepts)),
                f"initializer_concept contains the new word {word!r}, which has no vectors yet; "
                "give a word that the model has, or choose another new word, such as "
                f"{f'<{word}>'!r}, with --token and in the prompts",
                "initializer_concept",
            )

    def _check_slider(self) -> None:
        for name in ("target", "positive", "negative", "anchors"):
            # Normalized like captions: the prompts become captions of generated images.
            prompts = [" ".join(prompt.split()) for prompt in getattr(self, name)]
            object.__setattr__(self, name, prompts)
            require(
                bool(prompts) or name == "anchors",
                f"teach slider has no {name}; a slider needs --target, --positive and --negative, "
                "each with a prompt",
                name,
            )
            require(all(prompts), f"{name} has an empty prompt; write it, or leave it out", name)
        count = len(self.positive)
        require(
            len(self.negative) == count,
            f"positive has {counted(count, 'prompt')} and negative {len(self.negative)}; give one "
            "of each for every pair",
            "negative",
        )
        require(
            len(self.target) in (1, count),
            f"target has {len(self.target)} prompts for {counted(count, 'pair')}; give one for "
            "all or one for each",
            "target",
        )
        for _, ends in self.slider_pairs:
            require(
                ends[0].lower() != ends[1].lower(),
                f"positive and negative are both {quoted(ends[0])}; give two prompts that differ "
                "in the concept of the slider",
                "negative",
            )
        changed = {*self.target, *self.positive, *self.negative}
        lowercase = {prompt.lower() for prompt in changed}
        both = [prompt for prompt in self.anchors if prompt.lower() in lowercase]
        require(
            not both,
            f"anchors contains {quoted(''.join(both[:1]))}, which the slider changes; leave it out",
            "anchors",
        )
        least = len({*changed, *self.anchors})
        require(
            self.num_class_images >= least,
            f"num_class_images is {self.num_class_images}, but each of this slider's {least} "
            f"different prompts needs an image; give at least {least}",
            "num_class_images",
        )
        for name in ("instance_data_dir", "dataset_config", "train_text_encoder_ti"):
            require(
                not getattr(self, name),
                f"{name} is set, but teach slider learns from prompts alone; leave it out, or "
                "--teach subject",
                name,
            )
        require(
            not self.is_full,
            "method is full, whose weights have no adjustable strength; train an adapter for "
            "teach slider: lora or dora",
            "method",
        )

    def _check_prodigy(self) -> None:
        require(
            self.unet_lr >= 0.1,
            f"learning_rate is {self.unet_lr}, but Prodigy estimates the rate and multiplies it by "
            "learning_rate; use 1",
            "learning_rate",
        )
        require(
            self.magnitude_lr is None and self.loraplus_ratio == 1 and not self.lr_pattern,
            "Prodigy has one rate for all parameters; leave out magnitude_lr, loraplus_ratio and "
            "lr_pattern",
            "optimizer",
        )

    def _check_schedule_free(self) -> None:
        name = self.optimizer_name
        require(
            self.lr_scheduler.startswith("constant"),
            f"lr_scheduler is {self.lr_scheduler}, but {name} supports no schedule, only a "
            "warm-up; leave it out",
            "lr_scheduler",
        )
        require(
            self.ema_decay is None,
            f"{name} averages the weights itself; leave ema_decay out",
            "ema_decay",
        )
        require(
            self.adam_beta1 > 0,
            f"adam_beta1 is {self.adam_beta1:g}; for {name} it must be greater than 0",
            "adam_beta1",
        )
        require(
            self.is_full or self.parametrization != "adalora",
            f"AdaLoRA switches triplets off, but the average of {name} would restore them; use "
            "optimizer adamw",
            "optimizer",
        )
        require(
            self.is_full or not self.limits_norms,
            f"scale_weight_norms limits trained weights, but {name} averages weights that are not "
            "limited; leave it out, or use optimizer adamw",
            "scale_weight_norms",
        )

    def _check_allocation(self) -> None:
        require(
            (self.target_rank or 0) <= self.rank,
            f"target_rank is {self.target_rank}, more than the initial rank {self.rank}; raise "
            "rank",
            "target_rank",
        )
        if self.max_train_steps is not None:
            warmup, final = self.allocation_phases
            require(
                warmup + final < self.max_train_steps,
                f"allocation_warmup {warmup} and allocation_final {final} leave none of "
                f"{self.max_train_steps} steps to allocate ranks in",
                "allocation_final",
            )

    def of_entry(self, index: int) -> TrainConfig:
        """Settings of the run, overridden by an entry of `dataset_config`."""
        values = {"dataset_config": [], "initializer_concept": [], **self.dataset_config[index]}
        return dataclasses.replace(self, **values)

    @cached_property
    def subjects(self) -> list[TrainConfig]:
        """Settings of each subject: one for each entry, or the run's own without entries."""
        indices = range(len(self.dataset_config))
        return [self.of_entry(index) for index in indices] or [self]

    @property
    def limits_norms(self) -> bool:
        """True if the norm of each update is limited, which needs trained A and B."""
        is_low_rank = self.parametrization == "low-rank" and self.init != "pissa"
        return self.scale_weight_norms is not None and is_low_rank

    @property
    def least_rank(self) -> int | None:
        """Number of active ranks of T-LoRA at the noisiest timestep; None: all."""
        is_low_rank = self.parametrization == "low-rank" and not self.is_full
        return self.tlora_min_rank if is_low_rank else None

    @property
    def holds_prior(self) -> bool:
        """True if any subject uses prior preservation, or the slider has anchors."""
        if self.is_slider:
            return bool(self.anchors)
        return any(subject.with_prior_preservation for subject in self.subjects)

    @property
    def is_slider(self) -> bool:
        """True if the run trains a slider from prompts, not from images."""
        return self.teach == "slider"

    @property
    def slider_pairs(self) -> list[tuple[str, tuple[str, str]]]:
        """Pairs of the slider: target, and its positive and negative prompt."""
        targets = self.target * (len(self.positive) if len(self.target) == 1 else 1)
        ends = zip(self.positive, self.negative, strict=True)
        return list(zip(targets, ends, strict=True)) if self.is_slider else []

    @property
    def allocation_phases(self) -> tuple[int, int]:
        """Number of steps before rank allocation begins, and after it ends."""
        steps, warmup, final = (
            self.max_train_steps or 0,
            self.allocation_warmup,
            self.allocation_final,
        )
        return (
            steps // 10 if warmup is None else warmup,
            steps // 2 if final is None else final,
        )

    def _adapter(self, targets: tuple[str, ...], linear_only: bool) -> AdapterConfig:
        is_vera = self.parametrization == "vera"
        return AdapterConfig(
            targets=targets,
            rank=self.vera_rank if is_vera else self.rank,
            alpha=self.lora_alpha,
            conv_rank=None if linear_only or is_vera else self.conv_rank,
            conv_alpha=None if linear_only else self.conv_alpha,
            rslora=self.rslora,
            use_dora=self.method_name == "dora",
            norm_axis=self.norm_axis,
            dropout=self.lora_dropout,
            init=self.init,
            parametrization=self.parametrization,
            projection_seed=self.seed,
            rank_pattern={} if is_vera else self.rank_pattern,
            alpha_pattern={} if is_vera else self.alpha_pattern,
        )

    @property
    def unet_adapter(self) -> AdapterConfig:
        """The adapter of the UNet."""
        return self._adapter(tuple(self.targets), linear_only=False)

    @property
    def text_encoder_adapter(self) -> AdapterConfig:
        """The adapter of each text encoder."""
        return self._adapter(tuple(self.text_encoder_targets), linear_only=True)

    @property
    def method_name(self) -> str:
        """The method, with ``use_dora`` taken into account."""
        return "lora" if self.method == "dora" and not self.use_dora else self.method

    @property
    def weightings(self) -> dict[str, float]:
        """Active loss weightings by timestep, setting -> value."""
        values = {name: getattr(self, name) for name in learning.WEIGHTINGS}
        return {name: float(value) for name, value in values.items() if value}

    @property
    def is_full(self) -> bool:
        """True for full fine-tuning."""
        return self.method_name == "full"

    @property
    def base_model(self) -> BaseModel:
        """The base model with its loading options."""
        return BaseModel.of_settings(vars(self))

    @property
    def unet_lr(self) -> float:
        """Learning rate of the denoiser."""
        return self.usual_lr if self.learning_rate is None else self.learning_rate

    @property
    def usual_lr(self) -> float:
        """Default learning rate of the denoiser, of adapters for the default family."""
        return 5e-6 if self.is_full else DEFAULT_FAMILY.default_rate

    @property
    def optimizer_name(self) -> str:
        """The optimizer, with ``use_8bit_adam`` taken into account."""
        return "adamw8bit" if self.use_8bit_adam else self.optimizer

    @property
    def is_prodigy(self) -> bool:
        """True if the optimizer estimates the learning rate."""
        return self.optimizer_name in learning.PRODIGIES

    @property
    def is_schedule_free(self) -> bool:
        """True if the optimizer averages the weights."""
        return self.optimizer_name in learning.SCHEDULE_FREE

    @property
    def lr_schedule(self) -> str:
        """Learning-rate schedule; Diffusers' plain ``constant`` would ignore the warm-up."""
        with_warmup = self.lr_scheduler == "constant" and self.lr_warmup_steps > 0
        return "constant_with_warmup" if with_warmup else self.lr_scheduler

    @property
    def words(self) -> list[str]:
        """New words to train."""
        if not self.train_text_encoder_ti:
            return []
        tokens = (subject.token.strip() for subject in self.subjects)
        return self.new_words or list(dict.fromkeys(filter(None, tokens)))

    @property
    def word_steps(self) -> int:
        """Number of steps in which new words train."""
        return math.ceil(self.train_text_encoder_ti_frac * (self.max_train_steps or 0))

    @property
    def encodes_in_steps(self) -> bool:
        """True if text encoders run in every step, since they or their new words train."""
        return self.train_text_encoder or self.train_text_encoder_ti

    @property
    def prompts(self) -> list[SamplePrompt]:
        """Prompts of sample images: the validation prompts, else the training prompts."""
        lines = self.validation_prompt or self.taught_prompts
        return [parse_prompt(line) for line in lines if line]

    @property
    def taught_prompts(self) -> list[str]:
        """Unique instance prompts of the subjects, or targets of the slider."""
        prompts = self.target if self.is_slider else map(framed_prompt, self.subjects)
        return list(dict.fromkeys(filter(None, prompts)))

    def with_sample_prompts(self) -> TrainConfig:
        """Return the settings with the lines of ``sample_prompts`` added to the validation prompts.

        Raises:
            ConfigError: If the file cannot be read, or a line is not valid.
        """
        if not self.sample_prompts or not self.num_validation_images:
            return self
        lines = [*self.validation_prompt, *read_prompts(self.sample_prompts)]
        return dataclasses.replace(self, validation_prompt=lines, sample_prompts=None)

    @property
    def prior_mode(self) -> str:
        """Mode of prior preservation; Diffusers' settings of class images select ``images``."""
        has_class_images = self.class_data_dir or self.class_prompt
        return self.prior_preservation_mode or ("images" if has_class_images else "image-free")

    @property
    def is_image_free(self) -> bool:
        """True if the prior is preserved without class images."""
        return self._uses_prior("image-free")

    @property
    def holds_unmasked(self) -> bool:
        """True if the prediction outside of masks is kept at the base model's."""
        return self.unmasked_prior > 0 and any(subject.masked_loss for subject in self.subjects)

    @property
    def uses_class_images(self) -> bool:
        """True if the prior is preserved by class images."""
        return self._uses_prior("images")

    def _uses_prior(self, mode: str) -> bool:
        return self.with_prior_preservation and self.prior_mode == mode and not self.is_slider

    @property
    def holds_out(self) -> bool:
        """True if photos are held out for the validation loss."""
        return not self.is_slider and any(
            s.validation_data_dir or s.validation_split for s in self.subjects
        )

    def to_dict(self) -> dict[str, Any]:
        """Settings as plain values, as in a YAML file."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Build a config from plain values.

        Raises:
            ConfigError: If a key is not a setting, or a value has the wrong type.
        """
        known = {setting.name: setting for setting in settings()}
        unknown = [f"{name}{did_you_mean(name, known)}" for name in values if name not in known]
        problems, cast = Problems(), dict[str, Any]()
        with problems.collect():
            hint = "; read_config_file resolves the paths of a file" if PATHS in values else ""
            require(not unknown, f"unknown settings: {', '.join(sorted(unknown))}{hint}")
        for name in (name for name in values if name in known):
            with problems.collect():
                cast[name] = known[name].cast(values[name])
        problems.raise_all()
        return cls(**cast)


def framed_prompt(config: TrainConfig) -> str:
    """Instance prompt as a caption, with prefix and suffix."""
    prefix, prompt, suffix = (
        config.caption_prefix,
        config.instance_prompt or "",
        config.caption_suffix,
    )
    return framed(prefix, prompt, suffix) if prompt and (prefix or suffix) else prompt


@lru_cache(maxsize=1)
def settings() -> tuple[Setting, ...]:
    """All settings, in the order of their fields."""
    groups: tuple[Any, ...] = TrainConfig.__bases__[::-1]
    described = (
        Setting.from_field(source, group=group.heading, **getattr(group, "common", {}))
        for group in groups
        for source in dataclasses.fields(group)
    )
    return tuple(
        dataclasses.replace(setting, needs=(need, *setting.needs))
        if (need := subject.OF_IMAGES.get(setting.name))
        else setting
        for setting in described
    )


check_arguments(
    dataset_config=str | Path | Sequence[Any],
    **{
        s.name: str | Path | None if s.default is None else str | Path
        for s in settings()
        if s.is_path and s.kind is str
    },
)(TrainConfig)
