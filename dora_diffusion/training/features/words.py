"""Training of new words (textual inversion)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from dora_diffusion.config import ConfigError, TrainConfig
from dora_diffusion.config.features.words import words_of
from dora_diffusion.config.wording import counted, quoted
from dora_diffusion.data.sampler import generator_for
from dora_diffusion.formats.adapter.embeddings import Vectors
from dora_diffusion.models.components import Components
from dora_diffusion.models.words import add_tokens
from dora_diffusion.training.features.code import FeatureCode, Select
from dora_diffusion.training.hook import Hook
from dora_diffusion.training.step import Step
from dora_diffusion.training.trainable.adapters import StartingAdapter, enter_training
from dora_diffusion.training.trainable.weights import TrainedWeights
from dora_diffusion.training.trainable.words import TrainedTokens


class WordsCode(FeatureCode):
    """New words in a run."""

    def check_model(self, components: Components) -> None:
        for word, tokenizer in product(words_of(self.config), components.tokenizers):
            if len(_ids(tokenizer, word)) == 1:
                raise ConfigError(
                    f"the new word {word!r} is already a token of {components.name} with a "
                    f"meaning; choose another, such as {f'<{word}>'!r}, with --token and in the "
                    "prompts",
                    "token",
                )

    def weights(
        self, select: Select, components: Components, start: StartingAdapter | None
    ) -> TrainedWeights:
        weights, config = select(), self.config
        words = add_words(components, config, start.tokens if start else None)
        for name in words.tables if not config.train_text_encoder else ():
            enter_training(components.adaptable()[name], components, config)
        return replace(weights, words=words)

    def hooks(self, step: Step) -> Sequence[Hook]:
        return [NewWords(step)]


class NewWords(Hook):
    """Gives new words a gradient in every step.

    Args:
        step: Step of a run with new words.
    """

    def __init__(self, step: Step) -> None:
        self._words = step.weights.words

    def gradients(self, number: int) -> None:
        for vectors in self._words.parameters().values():
            if vectors.grad is None:  # No caption of the batch contained a new word.
                vectors.grad = torch.zeros_like(vectors)


def add_words(
    components: Components, config: TrainConfig, known: Mapping[str, Vectors] | None = None
) -> TrainedTokens:
    """Add the new words of a run to the model, with trainable vectors.

    Args:
        components: The model.
        config: Settings.
        known: Vectors of words in the adapter that the run starts from.

    Raises:
        ConfigError: If a known word has another number of vectors.
        ValueError: If the model already has one of the words, or an adapter is on an embedding
            table.

    Warns:
        UserWarning: If an initializer concept has several tokens in the model.
    """
    words, count = words_of(config), config.num_new_tokens_per_abstraction
    concepts = config.initializer_concept or [""]
    concepts = concepts * len(words) if len(concepts) == 1 else concepts
    had = [getattr(e.get_input_embeddings(), "rows", ()) for e in components.text_encoders]
    first = len(had[0])
    starts = {
        word: _start(components, word, concept, count, config.seed)
        | _known_start(word, (known or {}).get(word, {}), count)
        for word, concept in zip(words, concepts, strict=True)
    }
    tables = add_tokens(components, starts)
    for table in tables.values():
        table.rows.requires_grad_(True)
    places = {
        word: slice(first + number * count, first + (number + 1) * count)
        for number, word in enumerate(words)
    }
    start = {component: table.rows.detach().clone() for component, table in tables.items()}
    rate = config.unet_lr if config.is_prodigy else config.embedding_lr
    return TrainedTokens(tables, places, start, rate)


def _known_start(word: str, vectors: Vectors, count: int) -> dict[str, Tensor]:
    rows = {name: tensor.float().view(-1, tensor.shape[-1]) for name, tensor in vectors.items()}
    if wrong := {len(tensor) for tensor in rows.values()} - {count}:
        number = wrong.pop()
        raise ConfigError(
            f"the word {word!r} of init_adapter has {counted(number, 'vector')}; set "
            f"--num_new_tokens_per_abstraction {number}",
            "num_new_tokens_per_abstraction",
        )
    return rows


def _ids(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a text without start and end token."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return ids


def _start(
    components: Components, word: str, concept: str, count: int, seed: int
) -> dict[str, Tensor]:
    """Return the initial vectors of a word ``(count, C)`` by text encoder, float32 on the CPU.

    They are the vectors of the concept if it has ``count`` tokens, else their mean. Without a
    concept they are normally distributed with the standard deviation of the table.
    """
    vectors = {}
    names = components.family.text_encoder_names
    for name, encoder, tokenizer in zip(
        names, components.text_encoders, components.tokenizers, strict=True
    ):
        table = encoder.get_input_embeddings().weight.detach().to("cpu", torch.float32)
        if not concept:
            generator = generator_for("word", seed, name, word)
            noise = torch.randn(count, table.shape[1], generator=generator)
            vectors[name] = noise * table.std()
            continue
        initial = table[_ids(tokenizer, concept)]
        if len(initial) not in (1, count):
            if " " not in concept.strip():
                warnings.warn(
                    f"initializer_concept {quoted(concept)} is not a word of the model: it is "
                    f"split into {len(initial)} tokens, and the new word {word} starts from their "
                    "mean; use a common word instead",
                    stacklevel=3,
                )
            initial = initial.mean(dim=0, keepdim=True)
        vectors[name] = initial.expand(count, -1).clone()
    return vectors
