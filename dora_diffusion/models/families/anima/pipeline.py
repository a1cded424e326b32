"""Anima's pipeline: Diffusers' blocks, with the parts and arguments of its other pipelines."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from diffusers.modular_pipelines import AnimaAutoBlocks, ModularPipelineBlocks
from diffusers.modular_pipelines import AnimaModularPipeline as _Pipeline

OnStep = Callable[[Any, int, Any, dict[str, Any]], Any]


class AnimaModularPipeline(_Pipeline):
    """Diffusers' pipeline of given parts.

    Args:
        parts: Modules, tokenizers and scheduler, by component.
    """

    def __init__(self, **parts: Any) -> None:
        super().__init__(AnimaAutoBlocks())
        self.update_components(**parts)

    def __call__(
        self,
        *,
        guidance_scale: float,
        guidance_rescale: float = 0.0,
        prompt_embeds: Any = None,
        callback_on_step_end: OnStep,
        width: int | None = None,
        height: int | None = None,
        strength: float = 1.0,
        **inputs: Any,
    ) -> SimpleNamespace:
        """Sample images.

        Args:
            guidance_scale: Scale of classifier-free guidance; 1: none.
            guidance_rescale: Share of the rescaling of guidance (arXiv:2305.08891).
            prompt_embeds: Output of the text conditioner, ``(B, 512, D)``, in place of a prompt.
            callback_on_step_end: Called with the pipeline, the step, its timestep and no tensors.
            width: Width in pixels.
            height: Height in pixels.
            strength: Share of the steps, for images that are painted over.
            inputs: Other inputs of Diffusers' blocks.

        Returns:
            The images, as attribute ``images``.
        """
        self.guider.guidance_scale = guidance_scale
        self.guider.guidance_rescale = guidance_rescale
        self._blocks = _blocks(callback_on_step_end, encodes=prompt_embeds is None)
        if prompt_embeds is not None:
            inputs["prompt_embeds"] = prompt_embeds
        if "image" in inputs:
            inputs["strength"] = strength
        images = super().__call__(width=width, height=height, output="images", **inputs)
        return SimpleNamespace(images=images)


class _Report(ModularPipelineBlocks):
    """Last block of a denoising step, which reports it.

    Args:
        on_step: Diffusers' ``callback_on_step_end``.
    """

    def __init__(self, on_step: OnStep) -> None:
        super().__init__()
        self._on_step = on_step

    def __call__(self, pipeline: Any, state: Any, i: int, t: Any) -> tuple[Any, Any]:
        pipeline.num_timesteps = state.num_inference_steps
        self._on_step(pipeline, i, t, {})
        return pipeline, state


def _blocks(on_step: OnStep, *, encodes: bool) -> Any:
    """Return Diffusers' blocks, with a report of each step, and with or without those of text."""
    blocks = AnimaAutoBlocks()
    if not encodes:
        blocks.sub_blocks.pop("text_encoder")
    for workflow in blocks.sub_blocks["denoise"].sub_blocks.values():
        if not encodes:
            workflow.sub_blocks.pop("text_conditioning")
        loop = workflow.sub_blocks["denoise"]
        loop.set_progress_bar_config(disable=True)
        loop.sub_blocks["report"] = _Report(on_step)
    return blocks
