"""New words that a run trains: vectors in every text encoder, beside its adapters or weights."""

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
    """Vectors of new words that train, by themselves: their tables do not.

    Attributes:
        tables: The table of each text encoder, by component.
        places: Each word's rows in every table.
        start: The tables' rows before training.
    """

    tables: Mapping[str, WordEmbedding] = field(default_factory=dict)
    places: Mapping[str, slice] = field(default_factory=dict)
    start: Mapping[str, Tensor] = field(default_factory=dict)

    def __str__(self) -> str:
        counts = {place.stop - place.start for place in self.places.values()}
        each = " each" if len(self.places) > 1 else ""
        vectors = counted(max(counts), "vector")
        return (
            f"{counted(len(self.places), 'new word')} ({listing(self.places)}) of {vectors}{each}"
        )

    def parameters(self) -> dict[str, nn.Parameter]:
        """The rows that train by component."""
        return {f"{component}.{WORDS}": table.rows for component, table in self.tables.items()}

    def groups(self, config: TrainConfig) -> list[dict[str, Any]]:
        """A parameter group for each text encoder: vectors never decay."""
        rate = config.unet_lr if config.is_prodigy else config.embedding_lr
        return [
            {"name": f"{c}/{WORDS}", "params": [table.rows], "lr": rate, "weight_decay": 0.0}
            for c, table in self.tables.items()
        ]

    def train(self, trains: bool) -> None:
        """Set whether the next step moves the words."""
        for table in self.tables.values():
            table.trains = trains

    def tokens(self) -> dict[str, Vectors]:
        """Return the words' present values, on the CPU."""
        return {
            word: {
                component: table.rows.detach()[place].to("cpu", copy=True)
                for component, table in self.tables.items()
            }
            for word, place in self.places.items()
        }

    def load(self, tokens: Mapping[str, Vectors]) -> None:
        """Load values that were written."""
        with torch.no_grad():
            for word, place in self.places.items():
                for component, table in self.tables.items():
                    table.rows[place] = tokens[word][component].to(table.rows)

    @contextmanager
    def at_start(self) -> Iterator[None]:
        """Use the vectors from before training inside the block."""
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
        """Write their files into a folder's own for such; returns the metadata that name them."""
        files = self.files(folder)
        write_embeddings(files, self.tokens())
        return field_of(files.values())


def add_words(
    components: Components, config: TrainConfig, known: Mapping[str, Vectors] | None = None
) -> TrainedTokens:
    """Add a run's new words to its model, and let their vectors train.

    Args:
        components: The model.
        config: The settings.
        known: Vectors that words start from, of an adapter that the run starts from.

    Raises:
        ConfigError: If a known word has another number of vectors.
        ValueError: If the model has such a word already, or an adapter is on a table of token
            vectors.

    Warns:
        UserWarning: Of a word to start from that the model spells in several tokens.
    """
    words, count = config.words, config.num_new_tokens_per_abstraction
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
    rows = {name: part.float().view(-1, part.shape[-1]) for name, part in vectors.items()}
    if wrong := {len(part) for part in rows.values()} - {count}:
        number = wrong.pop()
        raise ConfigError(
            f"the word {word!r} of init_adapter has {counted(number, 'vector')}; give "
            f"--num_new_tokens_per_abstraction {number}",
            "num_new_tokens_per_abstraction",
        )
    return rows


def require_new(components: Components, words: Sequence[str]) -> None:
    """Check that a model has none of the words as a token of its own.

    Raises:
        ConfigError: If it has.
    """
    for word, tokenizer in product(words, components.tokenizers):
        if len(_ids(tokenizer, word)) == 1:
            raise ConfigError(
                f"the new word {word!r} is one token of {components.name} already, which means "
                f"something: choose another, such as {f'<{word}>'!r}, with --token and in the "
                "prompts",
                "token",
            )


def _ids(tokenizer: Any, text: str) -> list[int]:
    """A text's token ids without those of its start and end."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return ids


def _start(
    components: Components, word: str, concept: str, count: int, seed: int
) -> dict[str, Tensor]:
    """A word's first vectors ``(count, C)`` by text encoder, float32 on the CPU.

    The concept's own where it has as many, else their mean for each; without a concept normal
    ones of the table's standard deviation.
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
        found = table[_ids(tokenizer, concept)]
        if len(found) not in (1, count):
            if " " not in concept.strip():
                warnings.warn(
                    f"initializer_concept {quoted(concept)} is not a word of the model: it is "
                    f"split into {len(found)} tokens, whose mean the new word {word} starts from; "
                    "a common word for the same says more",
                    stacklevel=3,
                )
            found = found.mean(dim=0, keepdim=True)
        vectors[name] = found.expand(count, -1).clone()
    return vectors
