"""New words of a run (textual inversion): trained vectors in every text encoder."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dora_diffusion.config import ConfigError, TrainConfig
from dora_diffusion.config.features.words import words_of
from dora_diffusion.config.wording import counted, listing, quoted
from dora_diffusion.data.sampler import generator_for
from dora_diffusion.formats.adapter.embeddings import (
    Vectors,
    embedding_files,
    field_of,
    write_embeddings,
)
from dora_diffusion.models.components import Components
from dora_diffusion.models.words import WordEmbedding, add_tokens
from dora_diffusion.training.optimizer import WORDS


@dataclass(frozen=True)
class TrainedTokens:
    """Trained vectors of new words. The other vectors of the embedding tables are frozen.

    Attributes:
        tables: Embedding table of each text encoder, by component.
        places: Rows of each word in every table.
        start: Rows of the tables before training.
    """

    tables: Mapping[str, WordEmbedding] = field(default_factory=dict)
    places: Mapping[str, slice] = field(default_factory=dict)
    start: Mapping[str, Tensor] = field(default_factory=dict)

    def __str__(self) -> str:
        vectors = counted(max(rows.stop - rows.start for rows in self.places.values()), "vector")
        suffix = " each" if len(self.places) > 1 else ""
        return (
            f"{counted(len(self.places), 'new word')} ({listing(self.places)}) of {vectors}{suffix}"
        )

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained rows by component."""
        return {f"{component}.{WORDS}": table.rows for component, table in self.tables.items()}

    def groups(self, config: TrainConfig) -> list[dict[str, Any]]:
        """Return a parameter group for each text encoder, without weight decay."""
        rate = config.unet_lr if config.is_prodigy else config.embedding_lr
        return [
            {"name": f"{c}/{WORDS}", "params": [table.rows], "lr": rate, "weight_decay": 0.0}
            for c, table in self.tables.items()
        ]

    def tokens(self) -> dict[str, Vectors]:
        """Return copies of the words' vectors, on the CPU."""
        return {
            word: {
                component: table.rows.detach()[rows].to("cpu", copy=True)
                for component, table in self.tables.items()
            }
            for word, rows in self.places.items()
        }

    def load(self, tokens: Mapping[str, Vectors]) -> None:
        """Load vectors into the tables."""
        with torch.no_grad():
            for word, rows in self.places.items():
                for component, table in self.tables.items():
                    table.rows[rows] = tokens[word][component].to(table.rows)

    @contextmanager
    def at_start(self) -> Iterator[None]:
        """Restore the initial vectors inside the block."""
        trained = {component: table.rows.data for component, table in self.tables.items()}
        try:
            for component, table in self.tables.items():
                table.rows.data = self.start[component]
            yield
        finally:
            for component, table in self.tables.items():
                table.rows.data = trained[component]

    def files(self, folder: Path) -> dict[str, Path]:
        """Return the files of `write`, by word."""
        return embedding_files(folder, "", self.places)

    def write(self, folder: Path) -> dict[str, str]:
        """Write the embedding files of a result. Returns the metadata that name them."""
        files = self.files(folder)
        write_embeddings(files, self.tokens())
        return field_of(files.values())


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
    if not words:
        return TrainedTokens()
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
    return TrainedTokens(tables, places, start)


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


def require_new(components: Components, words: Sequence[str]) -> None:
    """Check that no word is a token of the model.

    Raises:
        ConfigError: If a word is.
    """
    for word, tokenizer in product(words, components.tokenizers):
        if len(_ids(tokenizer, word)) == 1:
            raise ConfigError(
                f"the new word {word!r} is already a token of {components.name} with a meaning; "
                f"choose another, such as {f'<{word}>'!r}, with --token and in the prompts",
                "token",
            )


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
