"""Requests of clients, and the answers to them."""

from __future__ import annotations

import os
import traceback
from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator

from dora_diffusion.cli.console.errors import explain, explain_to_all, is_out_of_memory
from dora_diffusion.config.run import SampleSettings
from dora_diffusion.models.schedulers import SCHEDULERS

if TYPE_CHECKING:
    from dora_diffusion.sampling.generate import SamplingSettings

MAX_STEPS, MAX_SIDE = 200, 2048


class ApiAnswer(NamedTuple):
    """A PNG that says how it was made, its seed, and what of the request had no effect."""

    png: bytes
    seed: int
    notes: tuple[str, ...] = ()


class Refusal(Exception):
    """A request that is not answered with an image.

    Args:
        status: The HTTP status.
        line: Why, in one line.
        headers: Of the answer.
        defect: A traceback for the server's log.
    """

    def __init__(
        self, status: int, line: str, headers: dict[str, str] | None = None, defect: str = ""
    ) -> None:
        super().__init__(status, line, headers, defect)
        self.status, self.line, self.headers, self.defect = status, line, headers, defect


def refusal_of(error: Exception, file: Path | None) -> Refusal:
    """One line for whoever asked, without the server's folders; 422 where the request is at fault.

    Defects, and memory that ran out, are 500.
    """
    line = explain(error)[1]
    if line is None or is_out_of_memory(error):
        return Refusal(
            500, explain_to_all(error), defect="".join(traceback.format_exception(error))
        )
    return Refusal(422, line.replace(f"{file.parent}{os.sep}", "") if file else line)


class ApiRequest(BaseModel):
    """One image."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    prompt: str = Field(min_length=1, max_length=4000, examples=["a photo of a sks dog"])
    adapter: str | None = Field(
        None, max_length=255, description="A name that /v1/adapters lists; null is the base model."
    )
    strength: float = Field(1.0, ge=-2, le=3, description="Adapter strength; 0 is the base.")
    seed: int | None = Field(None, ge=0, lt=2**63, description="null draws one.")
    negative_prompt: str = Field("", max_length=4000)
    steps: int = Field(SampleSettings.validation_inference_steps, ge=1, le=MAX_STEPS)
    guidance_scale: float = Field(SampleSettings.validation_guidance_scale, ge=0, le=100)
    guidance_rescale: float = Field(0.0, ge=0, le=1)
    scheduler: str | None = Field(
        None,
        description="null is the model's own.",
        json_schema_extra={"enum": [None, *SCHEDULERS]},
    )
    width: int | None = Field(None, ge=64, le=MAX_SIDE, multiple_of=8)
    height: int | None = Field(None, ge=64, le=MAX_SIDE, multiple_of=8)

    @field_validator("scheduler")
    @classmethod
    def _is_known(cls, name: str | None) -> str | None:
        if name is not None and name not in SCHEDULERS:
            raise ValueError(f"it must be one of {', '.join(SCHEDULERS)}")
        return name

    def shared(self) -> Hashable:
        """Return the settings that all requests of a batch share."""
        own = {"prompt", "adapter", "strength", "seed"}
        return tuple(self.model_dump(exclude=own).values())

    def settings(self) -> SamplingSettings:
        """Return the sampling settings of the request."""
        from dora_diffusion.sampling.generate import SamplingSettings

        own = {"prompt", "adapter", "strength", "seed"}
        return SamplingSettings(**self.model_dump(exclude=own))
