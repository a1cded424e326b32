"""New words of a run (textual inversion): trained vectors in every text encoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dora_diffusion.config.wording import counted, listing
from dora_diffusion.formats.adapter.embeddings import (
    Vectors,
    embedding_files,
    field_of,
    write_embeddings,
)
from dora_diffusion.models.words import WordEmbedding
from dora_diffusion.training.optimizer import WORDS


@dataclass(frozen=True)
class TrainedTokens:
    """Trained vectors of new words. The other vectors of the embedding tables are frozen.

    Attributes:
        tables: Embedding table of each text encoder, by component.
        places: Rows of each word in every table.
        start: Rows of the tables before training.
        rate: Learning rate of the vectors.
    """

    tables: Mapping[str, WordEmbedding] = field(default_factory=dict)
    places: Mapping[str, slice] = field(default_factory=dict)
    start: Mapping[str, Tensor] = field(default_factory=dict)
    rate: float = 0.0

    def __str__(self) -> str:
        vectors = counted(max(rows.stop - rows.start for rows in self.places.values()), "vector")
        suffix = " each" if len(self.places) > 1 else ""
        return (
            f"{counted(len(self.places), 'new word')} ({listing(self.places)}) of {vectors}{suffix}"
        )

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained rows by component."""
        return {f"{component}.{WORDS}": table.rows for component, table in self.tables.items()}

    def groups(self) -> list[dict[str, Any]]:
        """Return a parameter group for each text encoder, without weight decay."""
        return [
            {"name": f"{c}/{WORDS}", "params": [table.rows], "lr": self.rate, "weight_decay": 0.0}
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
