"""Conditioning of a denoiser on a batch of prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Conditioning:
    """Conditioning of the UNet on a batch of prompts.

    Attributes:
        encoder_hidden_states: Hidden states ``(B, tokens, C)``. For SDXL, the channels of both
            encoders are concatenated; for long prompts, the tokens of all chunks.
        pooled: Pooled output ``(B, P)``; None for families without it.
        lengths: Number of tokens of each prompt, which zeros follow. None: the denoiser attends to
            all states.
    """

    encoder_hidden_states: Tensor
    pooled: Tensor | None = None
    lengths: tuple[int, ...] | None = None

    def __len__(self) -> int:
        """Number of prompts."""
        return self.encoder_hidden_states.shape[0]

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Conditioning:
        """Select rows, always with a batch dimension."""
        rows = [index] if isinstance(index, int) else index
        selected = self._with(lambda tensor: tensor[rows])
        if self.lengths is None:
            return selected
        # The index may be a tensor on a GPU.
        lengths = torch.tensor(self.lengths)[rows.cpu() if isinstance(rows, Tensor) else rows]
        return replace(selected, lengths=tuple(lengths.tolist()))

    def by_prompt(self) -> list[Tensor]:
        """Return the hidden states of each prompt without padding, ``(tokens, C)``."""
        lengths = self.lengths or (self.encoder_hidden_states.shape[1],) * len(self)
        rows = zip(self.encoder_hidden_states, lengths, strict=True)
        return [states[:length] for states, length in rows]

    def to(self, *args: Any, **kwargs: Any) -> Conditioning:
        """Move or cast the tensors (``Tensor.to``)."""
        return self._with(lambda tensor: tensor.to(*args, **kwargs))

    def detach(self) -> Conditioning:
        """Detach the tensors from the autograd graph."""
        return self._with(Tensor.detach)

    def zeros(self) -> Conditioning:
        """Return zeros of the same shapes."""
        return self._with(torch.zeros_like)

    def _with(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        pooled = None if self.pooled is None else change(self.pooled)
        return replace(
            self, encoder_hidden_states=change(self.encoder_hidden_states), pooled=pooled
        )

    def added_cond_kwargs(self, time_ids: Tensor | None) -> dict[str, Tensor] | None:
        """Return ``added_cond_kwargs`` for the UNet; None without pooled output or time ids."""
        if self.pooled is None or time_ids is None:
            return None
        # Time ids stay float32, since bfloat16 cannot represent all sizes above 256.
        return {"text_embeds": self.pooled, "time_ids": time_ids.to(self.pooled.device)}

    @staticmethod
    def cat(batches: Sequence[Conditioning]) -> Conditioning:
        """Concatenate batches of conditioning.

        Sequences with lengths are padded. Other shorter sequences are repeated until all have the
        same length. Repeating all states k times does not change attention to them, so that no row
        depends on the other rows. Padding would change it.
        """
        if len(batches) == 1:
            return batches[0]
        pooled = [batch.pooled for batch in batches if batch.pooled is not None]
        if pooled and len(pooled) != len(batches):
            raise ValueError("some of the conditioning has a pooled output and some has none")
        states = [batch.encoder_hidden_states for batch in batches]
        if batches[0].lengths is not None:
            most = max(tensor.shape[1] for tensor in states)
            padded = [pad(tensor, (0, 0, 0, most - tensor.shape[1])) for tensor in states]
            lengths = tuple(n for batch in batches for n in batch.lengths or ())
            return Conditioning(torch.cat(padded), None, lengths)
        tokens = math.lcm(*{s.shape[1] for s in states})
        hidden = torch.cat(
            [s if s.shape[1] == tokens else s.repeat(1, tokens // s.shape[1], 1) for s in states]
        )
        return Conditioning(hidden, torch.cat(pooled) if pooled else None)
