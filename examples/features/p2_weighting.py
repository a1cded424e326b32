"""P2 weighting of the loss (arXiv:2204.00227, section 3.3), for models that predict the noise.

Weights errors by ``1 / (k + SNR) ** gamma``: timesteps with little noise count less.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from dora_diffusion.config.features.feature import Added, Feature, Problem
from dora_diffusion.config.fields import ConfigError, Need, flag
from dora_diffusion.training.features.code import FeatureCode


@dataclass(frozen=True)
class Weighted:
    """Noise process of a model, with the weights of the paper."""

    process: Any
    gamma: float
    k: float = 1.0

    def __getattr__(self, name):
        return getattr(self.process, name)

    def weight(self, timesteps, snr_gamma):
        alpha_bar = self.process.alphas_cumprod[timesteps]
        return (self.k + alpha_bar / (1 - alpha_bar)) ** -self.gamma


class P2Code(FeatureCode):
    def check_model(self, components):
        if components.prediction_type != "epsilon":
            raise ConfigError("p2_gamma needs a base model that predicts the noise", "p2_gamma")

    def loss(self, loss):
        return replace(loss, process=Weighted(loss.process, self.config.p2_gamma))


class P2(Feature):
    on, code = Need("p2_gamma"), P2Code
    adds: ClassVar = {"snr_gamma": Added(derived=", with p2_gamma 0")}

    def defaults(self, config):
        return {"snr_gamma": 0.0}

    def problems(self, config) -> Iterator[Problem]:
        if config.snr_gamma:
            yield "snr_gamma", "snr_gamma and p2_gamma both weight the loss; leave one of them out"


@dataclass(frozen=True, kw_only=True)
class P2Settings:
    heading: ClassVar = "Optimization"
    belongs_to: ClassVar = P2()

    p2_gamma: float = flag(
        0.0, "Gamma of P2 weighting; the paper has 0.5 and 1. 0 turns it off.", least=0,
        after="snr_gamma",
    )  # fmt: skip
