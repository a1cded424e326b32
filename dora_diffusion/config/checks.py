"""Contradictions between the settings of a training run."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import chain, permutations
from typing import Any

from dora_diffusion.config.features.feature import Problem
from dora_diffusion.config.images import PIXELS, SAFE_STEP, near_side
from dora_diffusion.config.wording import whole_word


def contradictions(config: Any) -> Iterator[Problem]:
    """Yield the contradictions of a `TrainConfig`; later checks rely on the earlier ones."""
    checks: dict[Callable[[Any], Iterator[Problem]], bool] = {
        _resolution: bool(config.resolution),
        _hub: config.push_to_hub,
        _validation: True,
        _prodigy: config.is_prodigy,
        _schedule_free: config.is_schedule_free,
        _allocation: config.parametrization == "adalora" and config.trains_adapters,
        _new_words: config.train_text_encoder_ti and config.has_photos,
    }
    own = (check(config) for check, applies in checks.items() if applies)
    return chain(chain.from_iterable(own), *(one.problems(config) for one in config.features))


def _resolution(config: Any) -> Iterator[Problem]:
    if config.resolution % PIXELS:
        yield (
            "resolution",
            f"resolution is {config.resolution}; it must be a multiple of {PIXELS}, such as "
            f"{near_side(config.resolution, SAFE_STEP)}",
        )


def _hub(config: Any) -> Iterator[Problem]:
    if "/" not in (config.hub_model_id or ""):
        yield "push_to_hub", "push_to_hub needs --hub_model_id NAME/MODEL"


def _validation(config: Any) -> Iterator[Problem]:
    if config.validation_data_dir and config.validation_split:
        yield (
            "validation_split",
            "validation_data_dir and validation_split both select held-out photos; leave one of "
            "them out",
        )
    if config.validation_split > 1 and config.validation_split % 1:
        yield (
            "validation_split",
            f"validation_split is {config.validation_split:g}; give a share below 1, or a whole "
            "number of photos",
        )


def _prodigy(config: Any) -> Iterator[Problem]:
    if config.unet_lr < 0.1:
        yield (
            "learning_rate",
            f"learning_rate is {config.unet_lr}, but Prodigy estimates the rate and multiplies it "
            "by learning_rate; use 1",
        )
    if config.magnitude_lr is not None or config.loraplus_ratio != 1 or config.lr_pattern:
        yield (
            "optimizer",
            "Prodigy has one rate for all parameters; leave out magnitude_lr, loraplus_ratio and "
            "lr_pattern",
        )


def _schedule_free(config: Any) -> Iterator[Problem]:
    name = config.optimizer
    if not config.lr_scheduler.startswith("constant"):
        yield (
            "lr_scheduler",
            f"lr_scheduler is {config.lr_scheduler}, but {name} supports no schedule, only a "
            "warm-up; leave it out",
        )
    if config.ema_decay is not None:
        yield "ema_decay", f"{name} averages the weights itself; leave ema_decay out"
    if config.adam_beta1 <= 0:
        yield (
            "adam_beta1",
            f"adam_beta1 is {config.adam_beta1:g}; for {name} it must be greater than 0",
        )
    if config.parametrization == "adalora" and config.trains_adapters:
        yield (
            "optimizer",
            f"AdaLoRA switches triplets off, but the average of {name} would restore them; use "
            "optimizer adamw",
        )


def _allocation(config: Any) -> Iterator[Problem]:
    if (config.target_rank or 0) > config.rank:
        yield (
            "target_rank",
            f"target_rank is {config.target_rank}, more than the initial rank {config.rank}; raise "
            "rank",
        )
    warmup, final = config.allocation_phases
    if config.max_train_steps is not None and warmup + final >= config.max_train_steps:
        yield (
            "allocation_final",
            f"allocation_warmup {warmup} and allocation_final {final} leave none of "
            f"{config.max_train_steps} steps to allocate ranks in",
        )


def _new_words(config: Any) -> Iterator[Problem]:
    words = config.words
    if not words:
        yield (
            "token",
            "train_text_encoder_ti trains a new word, but token is ''; name it with --token or "
            "--new_words",
        )
    for word in words:
        if not re.fullmatch(r"[^\s./\\]+", word) or word != word.lower():
            yield (
                "new_words",
                f"the new word {word!r} must be in lower case, as tokenizers convert it, and "
                "without spaces, dots and slashes, since it is part of names of files and keys",
            )
    for part, word in permutations(words, 2):
        if part in word:
            yield (
                "new_words",
                f"new word {word!r} contains the new word {part!r}, so tokenizers cannot separate "
                "them; choose others",
            )
    adapts_table = config.train_text_encoder and config.trains_adapters
    if adapts_table and "token-embedding" in config.text_encoder_targets:
        yield (
            "text_encoder_targets",
            "train_text_encoder_ti adds rows to the token table, but text_encoder_targets adapts "
            "the table; leave token-embedding out of text_encoder_targets",
        )
    yield from _initializers(words, config.initializer_concept)


def _initializers(words: list[str], concepts: list[str]) -> Iterator[Problem]:
    is_complete = all(concept.strip() for concept in concepts)
    if len(concepts) not in (0, 1, len(words)) or not is_complete:
        yield (
            "initializer_concept",
            f"initializer_concept has {len(concepts)} for {len(words)} new words; give one for "
            "all or one for each, without empty ones",
        )
    for word in words:
        if any(map(whole_word(word).search, concepts)):
            yield (
                "initializer_concept",
                f"initializer_concept contains the new word {word!r}, which has no vectors yet; "
                "give a word that the model has, or choose another new word, such as "
                f"{f'<{word}>'!r}, with --token and in the prompts",
            )
