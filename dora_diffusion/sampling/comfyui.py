"""Settings of ComfyUI's images: the plain ones of its workflows, by A1111's names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dora_diffusion.formats.parameters import lora_tag

# ComfyUI's samplers and schedulers -> A1111's.
_SAMPLERS = {
    "ddim": "DDIM", "ddpm": "DDPM", "dpm_2": "DPM2", "dpm_2_ancestral": "DPM2 a",
    "dpmpp_2m": "DPM++ 2M", "dpmpp_2m_sde": "DPM++ 2M SDE", "dpmpp_2s_ancestral": "DPM++ 2S a",
    "dpmpp_3m_sde": "DPM++ 3M SDE", "dpmpp_sde": "DPM++ SDE", "euler": "Euler",
    "euler_ancestral": "Euler a", "heun": "Heun", "lcm": "LCM", "lms": "LMS", "uni_pc": "UniPC",
}  # fmt: skip
_SCHEDULES = {
    "normal": "Uniform", "karras": "Karras", "exponential": "Exponential", "simple": "Simple",
    "sgm_uniform": "SGM Uniform", "ddim_uniform": "DDIM", "beta": "Beta",
}  # fmt: skip
# Nodes that say nothing of how an image was made.
_SILENT = {"SaveImage", "PreviewImage", "VAEDecode", "Note", "MarkdownNote"}
_MOST_NODES = 1000


def workflow_parameters(text: str) -> tuple[str, str, dict[str, str]] | None:
    """The settings of a plain workflow: one KSampler, its model, adapters and prompts.

    Args:
        text: The JSON of an image's ``prompt`` chunk: nodes by number, each with its
            ``class_type`` and its ``inputs``, of which a list is [number of a node, output].

    Returns:
        The prompt with tags of adapters, the negative prompt, and the fields of A1111's text, in
        which ``Other nodes`` names what these do not say; None of any other JSON.
    """
    try:
        nodes = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(nodes, dict) or len(nodes) > _MOST_NODES:
        return None
    graph = _Graph(nodes)
    samplers = [number for number in nodes if graph.kind(number) == "KSampler"]
    if len(samplers) != 1:
        return None
    (number,) = samplers
    tags, model = graph.adapters(graph.input(number, "model"))
    prompts = [graph.prompt(graph.input(number, name)) for name in ("positive", "negative")]
    latents = graph.input(number, "latent_image")
    size = ""
    if graph.kind(latents) == "EmptyLatentImage":
        graph.seen.add(latents)
        size = "x".join(str(graph.input(latents, name)) for name in ("width", "height"))
    sampler, schedule = (str(graph.input(number, n)) for n in ("sampler_name", "scheduler"))
    denoise = graph.input(number, "denoise")
    graph.seen.add(number)
    fields = {
        "Steps": graph.input(number, "steps"),
        "Sampler": _SAMPLERS.get(sampler, sampler),
        "Schedule type": _SCHEDULES.get(schedule, schedule),
        "CFG scale": graph.input(number, "cfg"),
        "Seed": graph.input(number, "seed"),
        "Size": size,
        "Model": model,
        "Denoising strength": "" if denoise == 1 else denoise,
        "Other nodes": ", ".join(sorted(graph.unseen())),
    }
    kept = {name: str(value) for name, value in fields.items() if value not in ("", None)}
    return " ".join([prompts[0], *tags]).strip(), prompts[1], kept


class _Graph:
    """The nodes of a workflow, and which of them were read."""

    def __init__(self, nodes: Mapping[str, Any]) -> None:
        self.nodes, self.seen = nodes, set[str]()

    def kind(self, number: Any) -> str:
        node = self.nodes.get(number) if isinstance(number, str) else None
        return str(node.get("class_type", "")) if isinstance(node, dict) else ""

    def input(self, number: Any, name: str) -> Any:
        """An input's value, or the number of the node that it comes from; None if it has none."""
        node = self.nodes.get(number) if isinstance(number, str) else None
        inputs = node.get("inputs") if isinstance(node, dict) else None
        value = inputs.get(name) if isinstance(inputs, dict) else None
        return str(value[0]) if isinstance(value, list) and value else value

    def adapters(self, number: Any) -> tuple[list[str], str]:
        """The tags of the adapters between a model and what it is for, and the model's name."""
        tags: list[str] = []
        while self.kind(number) in ("LoraLoader", "LoraLoaderModelOnly") and (
            number not in self.seen
        ):
            self.seen.add(number)
            name = str(self.input(number, "lora_name")).removesuffix(".safetensors")
            unet, text = (self.input(number, f"strength_{n}") for n in ("model", "clip"))
            text = text if self.kind(number) == "LoraLoader" else 0
            strengths = [text] if text == unet else [text, unet]
            tags.append(lora_tag(name, *strengths))
            number = self.input(number, "model")
        if self.kind(number) != "CheckpointLoaderSimple":
            return tags[::-1], ""
        self.seen.add(number)
        return tags[::-1], str(self.input(number, "ckpt_name")).removesuffix(".safetensors")

    def prompt(self, number: Any) -> str:
        """The text of a prompt; empty where it is made in another way, which is left unread."""
        text = self.input(number, "text")
        is_plain = self.kind(number) == "CLIPTextEncode" and isinstance(text, str)
        if not is_plain or text in self.nodes:
            return ""
        self.seen.add(number)
        return str(text).strip()

    def unseen(self) -> set[str]:
        """The kinds of the nodes that were not read and say something."""
        kinds = {self.kind(number) for number in self.nodes if number not in self.seen}
        return kinds - _SILENT - {""}
