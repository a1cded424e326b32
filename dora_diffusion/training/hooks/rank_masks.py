"""Rank masks of adapters: rank dropout, and the timestep-dependent ranks of T-LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dora_diffusion.adapters.stack import Masks, RankRoute
from dora_diffusion.data.sampler import generator_for
from dora_diffusion.models.offload import send
from dora_diffusion.numerics.operation import timestep_ranks
from dora_diffusion.training.hooks.hook import Hook
from dora_diffusion.training.prediction import Drawn

if TYPE_CHECKING:
    from dora_diffusion.training.step import Step


class RankMasks(Hook):
    """Masks ranks of adapters in each row of a batch.

    Text encoders share one dropout mask for all rows, since a caption may occupy several rows.
    T-LoRA does not mask text encoders, since they have no timestep.

    Args:
        step: Step of a run with ``rank_dropout`` or T-LoRA.
    """

    def __init__(self, step: Step) -> None:
        config, process = step.config, step.batches.process
        unet = set(map(id, step.components.denoiser.modules()))
        self._ranks = [adapter.down.shape[0] for adapter in step.adapters.trained()]
        self._has_rows = [id(layer) in unet for layer, _, _ in step.adapters.layers]
        self._dropout, self._least_rank = config.rank_dropout, config.least_rank
        self._process = process
        self._seed = config.seed, step.accelerator.process_index

    def route(self, drawn: Drawn, route: RankRoute) -> RankRoute:
        if self._least_rank is None:
            return RankRoute(self._keep(drawn), [None] * len(self._ranks))
        active = self._active(drawn, self._least_rank)
        if not self._dropout:
            return RankRoute(active, active)
        pairs = zip(self._keep(drawn), active, strict=True)
        return RankRoute([mask if ranks is None else mask * ranks for mask, ranks in pairs], active)

    def _keep(self, drawn: Drawn) -> list[Tensor]:
        """Draw the dropout mask of each layer, with factors 0 or ``1 / (1 - p)``."""
        (seed, process), p = self._seed, self._dropout
        by_question: list[Sequence[Tensor]] = []
        for position, question in enumerate(drawn.trained()):
            name = "held" if position else ""
            generator = generator_for("ranks", seed, drawn.batch.index + 1, process, name)
            draws = torch.rand(len(question.ask.captions), sum(self._ranks), generator=generator)
            mask = send((draws >= p) / (1 - p), drawn.batch.latents.device)
            by_question.append(mask.split(self._ranks, dim=1))
        layers = zip(self._has_rows, *by_question, strict=True)
        return [torch.cat(masks) if has_rows else masks[0][:1] for has_rows, *masks in layers]

    def _active(self, drawn: Drawn, least_rank: int) -> Masks:
        """Return each layer's T-LoRA mask: 1 for active ranks, else 0; None if all are active."""
        by_rank: dict[int, Tensor] = {}
        active: list[Tensor | None] = []
        for rank, has_rows in zip(self._ranks, self._has_rows, strict=True):
            if not has_rows or rank <= least_rank:
                active.append(None)
                continue
            if rank not in by_rank:
                by_rank[rank] = self._active_ranks(drawn, rank, least_rank)
            active.append(by_rank[rank])
        return active

    def _active_ranks(self, drawn: Drawn, rank: int, least_rank: int) -> Tensor:
        batch, rows = drawn.batch, [question.ask.rows for question in drawn.trained()]
        timesteps = torch.cat([batch.select(part, batch.inputs.timesteps) for part in rows])
        levels, process = self._process.level(timesteps), self._process
        limits = timestep_ranks(levels, process.num_timesteps, rank, least_rank)
        return (torch.arange(rank, device=limits.device) < limits[:, None]).float()
