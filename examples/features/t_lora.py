"""T-LoRA (arXiv:2507.05964, section 4.1): the noisier an image, the fewer ranks train.

At timestep t of T, ``r_min + floor((T - t) / T * (r - r_min))`` ranks are active.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from dora_diffusion.config.features.feature import Feature
from dora_diffusion.config.fields import Need, flag
from dora_diffusion.training.features.code import FeatureCode
from dora_diffusion.training.hook import Hook


class ActiveRanks(Hook):
    def __init__(self, step):
        denoiser = set(map(id, step.components.denoiser.modules()))
        pairs = zip(step.adapters.layers, step.adapters.trained(), strict=True)
        self.adapters = [adapter for (layer, *_), adapter in pairs if id(layer) in denoiser]
        self.process, self.least = step.batches.process, step.config.t_lora_least_rank

    @torch.no_grad()
    def drawn(self, number, batches):
        share = 1 - float(batches[0].inputs.timesteps[0]) / self.process.num_timesteps
        self.masked = []
        for up in (adapter.up for adapter in self.adapters):
            active = self.least + int(share * max(0, up.shape[1] - self.least))
            self.masked.append((up, active, up[:, active:].clone()))
            up[:, active:] = 0

    @torch.no_grad()
    def gradients(self, number):
        for up, active, values in self.masked:
            up[:, active:] = values
            if up.grad is not None:
                up.grad[:, active:] = 0


class TLoraCode(FeatureCode):
    def hooks(self, step):
        return [ActiveRanks(step)]


class TLora(Feature):
    on, code = Need("t_lora_least_rank"), TLoraCode

    def problems(self, config):
        for name in ("train_batch_size", "gradient_accumulation_steps"):
            if (value := getattr(config, name)) > 1:
                yield name, f"{name} is {value}, but T-LoRA needs 1"


@dataclass(frozen=True, kw_only=True)
class TLoraSettings:
    heading: ClassVar = "Adapter"
    belongs_to: ClassVar = TLora()

    t_lora_least_rank: int = flag(0, "T-LoRA: ranks in pure noise; 0 turns it off.", least=0)
