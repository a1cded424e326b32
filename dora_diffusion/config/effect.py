"""Settings that have no effect, by the metadata of the fields, and rates that nobody takes."""

from __future__ import annotations

from collections.abc import Collection

from dora_diffusion.config.train import TrainConfig, settings

# Learning rates that are usual, generously: least and most. Adafactor's is not relative to the
# weights here, and its updates are clipped: Adam's rates. Prodigy multiplies its own by it.
_ADAPTER, _VERA, _FULL, _PRODIGY = (1e-6, 5e-3), (1e-5, 1e-1), (1e-8, 1e-4), (0.1, 10.0)


def without_effect(config: TrainConfig, given: Collection[str] | None = None) -> dict[str, str]:
    """Settings that were given, and why they have no effect.

    Args:
        config: The settings of a run.
        given: Names that were given; None means those that differ from their default.

    Example:
        >>> without_effect(TrainConfig(keep_tags=3))
        {'keep_tags': 'keep_tags has no effect because shuffle_tags is off'}
    """
    reasons = {}
    for setting in settings():
        moved = getattr(config, setting.name) != setting.default
        if not (moved if given is None else setting.name in given):
            continue
        reason = setting.idle_reason(config)
        if reason:
            reasons[setting.name] = f"{setting.name} has no effect because {reason}"
    return reasons


def unusual_rates(config: TrainConfig) -> list[str]:
    """Learning rates far outside of what the optimizer usually takes, each with what is usual.

    Example:
        >>> unusual_rates(TrainConfig(learning_rate=0.1))[0]
        'learning_rate is 0.1; for adapters adamw usually takes 1e-06 to 0.005'
    """
    name, what = config.optimizer_name, "full fine-tuning" if config.is_full else "adapters"
    least, most = _FULL if config.is_full else _ADAPTER
    if config.direction == "vera" and not config.is_full:
        (least, most), what = _VERA, "VeRA"
    if name == "prodigy":
        least, most = _PRODIGY
    rates = {"learning_rate": (config.unet_lr, most)}
    if config.train_text_encoder and name != "prodigy":
        rates["text_encoder_lr"] = (config.text_encoder_lr, most)
    if not config.is_full:
        # Each stands for a part of the adapter that takes larger steps.
        rates["magnitude_lr"] = (config.magnitude_lr or 0, 10 * most)
        rates["learning_rate times loraplus_ratio"] = (
            config.unet_lr * config.loraplus_ratio * (config.loraplus_ratio != 1), 10 * most,
        )  # fmt: skip
    return [
        f"{setting} is {rate:g}; for {what} {name} usually takes {least:g} to {limit:g}"
        for setting, (rate, limit) in rates.items()
        if rate and not least <= rate <= limit
    ]
