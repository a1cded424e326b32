"""Full fine-tuning: the weights of the model itself train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

from dora_diffusion.config.base import QUANTISATIONS
from dora_diffusion.config.features.feature import Added, Description, Excluded, Feature
from dora_diffusion.config.fields import DTYPES, Need, flag

_ON = Need("method", ("full",))
_TARGETS = Need("full_weights", ("targets",))


class FullFeature(Feature):
    """Full fine-tuning of the denoiser, and of the text encoders with ``train_text_encoder``."""

    on, code, trains_adapters = _ON, "full:FullCode", False
    adds: ClassVar = {
        "method": Added(
            ". full: full fine-tuning of the weights themselves; the result is a whole model",
            choices=("full",),
        ),
        "learning_rate": Added(derived=", for full fine-tuning 5e-6"),
        "checkpointing_steps": Added(derived=", for full fine-tuning 500"),
        "targets": Added(needs=_TARGETS),
        "text_encoder_targets": Added(needs=_TARGETS),
    }
    excludes: ClassVar = (
        Excluded("pack"),
        Excluded("run", "quantize is {config.quantize}, but method full trains the weights "
                 "themselves, which cannot be quantised; leave it out, or train an adapter",
                 "quantize", QUANTISATIONS),
        Excluded("run", "push_to_hub publishes adapters; upload the model of full fine-tuning with "
                 "'huggingface-cli upload NAME/MODEL OUTPUT_DIR/model'", "push_to_hub"),
        Excluded("sharding", "with full fine-tuning excludes optimizers but adamw, which need "
                 "whole weights; use adamw", when=lambda config: config.optimizer != "adamw"),
        Excluded("sharding", "with full fine-tuning excludes mixed_precision fp16; use bf16",
                 "mixed_precision", ("fp16",)),
    )  # fmt: skip

    def defaults(self, config: Any) -> Mapping[str, Any]:
        # A checkpoint of a whole model takes gigabytes.
        return {"learning_rate": 5e-6, "checkpointing_steps": 500}

    def describe(self, config: Any, run: Description) -> Description:
        method = "full-finetuning", "Full fine-tuning"
        return replace(run, method=method, trained="full fine-tuning", rates=(1e-8, 1e-4))


_full_flag = partial(flag, needs=(_ON,))


@dataclass(frozen=True, kw_only=True)
class FullSettings:
    """Full fine-tuning."""

    heading: ClassVar = "Adapter"
    belongs_to: ClassVar[Feature] = FullFeature()

    full_weights: str = _full_flag(
        "all",
        "Weights that full fine-tuning trains: all of the denoiser, or only the layers in targets.",
        choices=("all", "targets"),
        costs=True,
        after="init_adapter",
    )
    single_file: bool = _full_flag(
        False,
        "Also write the model of full fine-tuning as one .safetensors file, in the original layout "
        "that web UIs read.",
        resume="ignored",
        after="resume_from_checkpoint",
    )
    save_precision: str | None = _full_flag(
        None,
        "Precision of the model that full fine-tuning writes. float32 keeps everything that was "
        "learned, at twice the size of half precision.",
        derived="the base model's",
        choices=DTYPES,
        resume="ignored",
        after="single_file",
    )
