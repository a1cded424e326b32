"""Log the norm of the gradients of each component every N steps, as `metrics.jsonl` shows it."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from dora_diffusion.config.features.feature import Feature
from dora_diffusion.config.fields import Need, flag
from dora_diffusion.training.features.code import FeatureCode
from dora_diffusion.training.hook import Hook


class GradientNorms(Hook):
    def __init__(self, step):
        self.step, self.norms = step, {}

    def gradients(self, number):
        self.norms = {}
        if number % self.step.config.log_gradients:
            return
        by_component = {}
        for name, parameter in self.step.weights.parameters().items():
            if parameter.grad is not None:
                by_component.setdefault(name.split(".")[0], []).append(parameter.grad.norm())
        for component, norms in by_component.items():
            self.norms[f"norm_{component}"] = torch.stack(norms).norm()

    def clipped(self, record):
        record.update(self.norms)


class LogGradientsCode(FeatureCode):
    def hooks(self, step):
        return [GradientNorms(step)]


class LogGradients(Feature):
    on, code = Need("log_gradients"), LogGradientsCode


@dataclass(frozen=True, kw_only=True)
class LogGradientsSettings:
    heading: ClassVar = "Validation"
    belongs_to: ClassVar = LogGradients()

    log_gradients: int = flag(0, "Log norms of gradients every N steps; 0 logs none.", least=0)
