"""New words: trained token embeddings (textual inversion, arXiv:2208.01618)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import permutations
from typing import Any, ClassVar

from dora_diffusion.config.exclusions import adapts_table
from dora_diffusion.config.features.feature import Description, Excluded, Feature, Problem
from dora_diffusion.config.fields import Need, flag
from dora_diffusion.config.wording import whole_word

_ON = Need("train_text_encoder_ti")


def words_of(config: Any) -> list[str]:
    """Return the new words that a run with the feature trains."""
    tokens = (subject.token.strip() for subject in config.subjects)
    return config.new_words or list(dict.fromkeys(filter(None, tokens)))


class WordsFeature(Feature):
    """New words train together with the weights (pivotal tuning)."""

    on, code = _ON, "words:WordsCode"
    excludes: ClassVar = (
        Excluded("pack"),
        Excluded("run", "train_text_encoder_ti adds rows to the token table, but "
                 "text_encoder_targets adapts the table; leave token-embedding out of "
                 "text_encoder_targets", "text_encoder_targets", when=adapts_table),
    )  # fmt: skip

    def defaults(self, config: Any) -> Mapping[str, Any]:
        return {"new_words": words_of(config)}

    def problems(self, config: Any) -> Iterator[Problem]:
        words = words_of(config)
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
                    f"new word {word!r} contains the new word {part!r}, so tokenizers cannot "
                    "separate them; choose others",
                )
        yield from _initializers(words, config.initializer_concept)

    def describe(self, config: Any, run: Description) -> Description:
        return replace(run, words=words_of(config), encodes_in_steps=True)


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


_word_flag = partial(flag, needs=(_ON,))


def _embedding_rate(config: Any) -> str | None:
    """Condition of a rate above 0, and another optimizer than Prodigy."""
    if config.is_prodigy:
        return f"optimizer is {config.optimizer}"
    return "it is 0: no new word is trained" if config.embedding_lr == 0 else None


@dataclass(frozen=True, kw_only=True)
class WordSettings:
    """New words: trained token embeddings (textual inversion)."""

    heading: ClassVar = "Subject"
    common: ClassVar = {"of_photos": True}
    belongs_to: ClassVar[Feature] = WordsFeature()

    train_text_encoder_ti: bool = flag(
        False,
        "Train the embedding vectors of new words in every text encoder (textual inversion), "
        "together with the adapter (pivotal tuning).",
        costs=True,
    )
    new_words: list[str] = _word_flag(
        [], "New words, each in captions or prompts.", derived="the token"
    )
    num_new_tokens_per_abstraction: int = _word_flag(
        2, "Vectors of each new word in each text encoder.", above=0
    )
    initializer_concept: list[str] = _word_flag(
        [],
        "Initialization of new words: a word of the model, such as the class, for all of them or "
        "one for each. Copies its vectors if there are as many, else uses their mean.",
        derived="random vectors",
        of_run=True,
    )
    embedding_lr: float = flag(
        3e-4,
        "Learning rate of new words' vectors.",
        resume="free",
        needs=(_ON, _embedding_rate),
        least=0,
    )
