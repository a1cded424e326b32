"""Behaviour of model families: a module for each `config.families.Family.code`.

Facts of a family are in ``config/families.json``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, Protocol, cast

from torch import Tensor

from dora_diffusion.models.conditioning import Conditioning
from dora_diffusion.models.words import Encoders


class LoadedModel(Encoders, Protocol):
    """Loaded model as its family sees it (`models.components.Components`)."""

    @property
    def denoiser(self) -> Any: ...
    @property
    def process(self) -> Any: ...
    @property
    def clip_skip(self) -> int: ...
    @property
    def max_token_length(self) -> int: ...
    @property
    def most_chunks(self) -> int | None: ...


class Tokens(Protocol):
    """Tokens of B prompts."""

    def encode(self, components: LoadedModel, clip_skip: int | None = None) -> Conditioning:
        """Encode the tokens, with gradients if the text encoders train.

        Args:
            components: The loaded model.
            clip_skip: Number of layers to skip. Default: ``components.clip_skip``.
        """


class FamilyCode(Protocol):
    """Functions of a family's module."""

    def predict(
        self,
        components: LoadedModel,
        noisy_latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        time_ids: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """Return the prediction of noise or velocity, ``(B, C, h, w)``.

        Args:
            components: The loaded model. Inputs are cast to the dtype of its denoiser.
            noisy_latents: ``(B, C, h, w)``.
            timesteps: ``(B,)`` int64.
            conditioning: Conditioning of B prompts.
            time_ids: Size and crop conditioning of SDXL, ``(B, 6)``; None for other families.
            condition: Further input channels (`condition_from_moments`), ``(B, n, h, w)``.
        """

    def tokenize_prompts(
        self, components: LoadedModel, prompts: Sequence[str], adapters: Sequence[str | None]
    ) -> Tokens:
        """Tokenize B prompts, each with the own tokens of an adapter."""

    def chunk_count(self, components: LoadedModel, prompt: str, adapter: str | None = None) -> int:
        """Return the number of chunks of a prompt, the largest over all tokenizers."""

    def truncated_text(
        self, components: LoadedModel, prompt: str, own_tokens: Mapping[str, str] | None = None
    ) -> str:
        """Return the end of a prompt beyond the token limit, or an empty string.

        Args:
            components: The loaded model.
            prompt: The prompt.
            own_tokens: Tokens of one adapter (`own_words`).
        """

    def token_limit(self, components: LoadedModel) -> str:
        """Return the token limit as text."""

    def embedding_arguments(self, positive: Conditioning, negative: Conditioning) -> dict[str, Any]:
        """Return B encoded prompts and B negative prompts as arguments of the pipeline."""


def load_code(name: str) -> FamilyCode:
    """Import the module of a family."""
    return cast("FamilyCode", import_module(f"{__name__}.{name}"))


def find_class(code: str, name: str) -> Any:
    """Return a class by name: a family's own, or else that of Diffusers or Transformers.

    A family has own classes where those of the libraries have another interface than other code
    expects of pipelines, denoisers, autoencoders or text encoders.

    Args:
        code: Module of the family.
        name: Name of the class.

    Raises:
        ImportError: If the installed libraries have no such class.
    """
    import diffusers
    import transformers

    for module in (load_code(code), diffusers, transformers):
        if hasattr(module, name):
            return getattr(module, name)
    raise ImportError(
        f"{name} is not in Diffusers {diffusers.__version__} and Transformers "
        f"{transformers.__version__}; install later versions"
    )
