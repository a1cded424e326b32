"""Sliders: concepts from prompts, without images (arXiv:2311.12092)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

from dora_diffusion.config.features.feature import Added, Description, Excluded, Feature, Problem
from dora_diffusion.config.fields import Need, flag
from dora_diffusion.config.wording import counted, quoted

STRENGTHS = (-3.0, -1.5, 0.0, 1.5, 3.0)
"""Strengths of a slider's sample images."""
_ON = Need("teach", ("slider",))


def pairs_of(config: Any) -> list[tuple[str, tuple[str, str]]]:
    """Return the pairs of a slider: target, and its positive and negative prompt."""
    targets = config.target * (len(config.positive) if len(config.target) == 1 else 1)
    ends = zip(config.positive, config.negative, strict=True)
    return list(zip(targets, ends, strict=True))


class SliderFeature(Feature):
    """A run that trains a slider from prompts, not from images."""

    on, code, has_photos = _ON, "slider:SliderCode", False
    adds: ClassVar = {
        "method": Added(derived="; for a slider lora, whose strength is the same in every program"),
        "snr_gamma": Added(derived=" and for sliders"),
        "num_class_images": Added(
            "; for a slider, number of images that the base model generates from its prompts",
            needs=_ON,
        ),
        "prior_loss_weight": Added(
            ", and of the loss of a slider's anchors", needs=Need("anchors")
        ),
        "sample_batch_size": Added(needs=_ON),
        "validation_inference_steps": Added(needs=_ON),
        "validation_guidance_scale": Added(needs=_ON),
    }
    excludes: ClassVar = (
        Excluded("pack"),
        *(Excluded("run", f"{name} is set, but teach slider learns from prompts alone; leave it "
                   "out, or --teach subject", name)
          for name in ("instance_data_dir", "dataset_config", "train_text_encoder_ti")),
        Excluded("run", "method is {config.method}, whose weights have no adjustable strength; "
                 "train an adapter for teach slider: lora or dora", "method",
                 when=lambda config: not config.trains_adapters),
    )  # fmt: skip

    def defaults(self, config: Any) -> Mapping[str, Any]:
        # As in the paper, a slider weights all predictions alike.
        return {"method": "lora", "snr_gamma": 0.0}

    def problems(self, config: Any) -> Iterator[Problem]:
        yield from _prompt_problems(config)
        changed = {*config.target, *config.positive, *config.negative}
        lowercase = {prompt.lower() for prompt in changed}
        if both := [prompt for prompt in config.anchors if prompt.lower() in lowercase]:
            yield (
                "anchors",
                f"anchors contains {quoted(both[0])}, which the slider changes; leave it out",
            )
        least = len({*changed, *config.anchors})
        if config.num_class_images < least:
            yield (
                "num_class_images",
                f"num_class_images is {config.num_class_images}, but each of this slider's {least} "
                f"different prompts needs an image; give at least {least}",
            )

    def describe(self, config: Any, run: Description) -> Description:
        pairs = pairs_of(config)
        ends = [f"from `{low}` (-3) to `{high}` (3)" for _, (high, low) in pairs]
        return replace(
            run,
            tag="slider",
            usage=(
                f"It is a slider without a trigger word, {' and '.join(ends)}. Its strength, such "
                "as `--strength -1.5`, sets the position between the two; 0 is the base model."
            ),
            hint="it is a slider: generate with --strength -3 to 3, and a prompt",
            plan=(
                *(f"{prompt}: from {low} to {high}" for prompt, (high, low) in pairs),
                *(f"{anchor}: does not move" for anchor in config.anchors),
            ),
            prompts=config.target,
            strengths=STRENGTHS,
            strength=3,
            metadata={"slider": json.dumps(
                [[target, *ends] for target, ends in pairs], ensure_ascii=False
            )},
        )  # fmt: skip


def _prompt_problems(config: Any) -> Iterator[Problem]:
    for name in ("target", "positive", "negative", "anchors"):
        prompts = getattr(config, name)
        if not prompts and name != "anchors":
            yield (
                name,
                f"teach slider has no {name}; a slider needs --target, --positive and --negative, "
                "each with a prompt",
            )
        if not all(prompts):
            yield name, f"{name} has an empty prompt; write it, or leave it out"
    count = len(config.positive)
    if len(config.negative) != count:
        yield (
            "negative",
            f"positive has {counted(count, 'prompt')} and negative {len(config.negative)}; give "
            "one of each for every pair",
        )
    if len(config.target) not in (1, count):
        yield (
            "target",
            f"target has {len(config.target)} prompts for {counted(count, 'pair')}; give one for "
            "all or one for each",
        )
    for _, (positive, negative) in pairs_of(config):
        if positive.lower() == negative.lower():
            yield (
                "negative",
                f"positive and negative are both {quoted(positive)}; give two prompts that differ "
                "in the concept of the slider",
            )


_slider_flag = partial(flag, needs=(_ON,))
# The prompts become captions of generated images, and are normalized like captions.
_text_flag = partial(flag, needs=(_ON,), one_line=True)


@dataclass(frozen=True, kw_only=True)
class SliderSettings:
    """Sliders: concepts from prompts, without images."""

    heading: ClassVar = "Slider"
    belongs_to: ClassVar[Feature] = SliderFeature()

    teach: str = flag(
        "subject",
        "Training objective. subject: a subject or style from images. slider: the difference of "
        "two prompts, for strengths of -3 to 3 (concept sliders, arXiv:2311.12092; LECO). A slider "
        "uses no photos: settings of photos, captions and held-out photos have no effect.",
        choices=("subject", "slider"),
        costs=True,
    )
    target: list[str] = _text_flag(
        [],
        'Prompts that the slider changes: one for all pairs, or one for each: "a photo of a mug".',
        derived="none, required by --teach slider",
    )
    positive: list[str] = _text_flag(
        [],
        'Prompts at strength 3, one for each pair: "a photo of a large mug".',
        derived="none, required by --teach slider",
    )
    negative: list[str] = _text_flag(
        [],
        "Prompts at strength -3, one for each pair, in the order of --positive.",
        derived="none, required by --teach slider",
    )
    anchors: list[str] = _text_flag(
        [],
        "Prompts that the slider must not change: a loss with prior_loss_weight keeps their "
        "predictions at the base model's.",
        costs=True,
    )
    slider_guidance: float = _slider_flag(
        0.3, "Effect of strength 1: factor of the difference of the two predictions.", above=0
    )
