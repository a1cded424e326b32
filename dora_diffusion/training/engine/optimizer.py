"""Parameter groups, optimizers and schedules."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import nn

from dora_diffusion.adapters.inject import layer_adapters
from dora_diffusion.config import ConfigError, TrainConfig
from dora_diffusion.config.wording import counted
from dora_diffusion.numerics.devices import has_fused_optimizers
from dora_diffusion.training.engine.parameters import Groups

WORDS = "words"
"""Suffix of the name of a group for new words' vectors."""

# Not everybody needs them, and they are installed apart.
_LIBRARIES = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"}


def parameter_groups(trained: Mapping[str, nn.Module], config: TrainConfig) -> Groups:
    """The adapters' parameters by component and role, each with its rate and decay.

    B's rate is ``loraplus_ratio`` times A's (arXiv:2402.12354). The magnitude never decays:
    pulling it towards 0 would shrink the pretrained weight.

    Args:
        trained: The components that carry adapters, by name.
        config: Learning rates and weight decay.
    """
    groups = []
    for component, model in trained.items():
        rate, decay_rate = _rate_and_decay(component, config)
        magnitude_rate = rate if config.magnitude_lr is None else config.magnitude_lr
        roles = {
            "down": (rate, decay_rate),
            "up": (rate * config.loraplus_ratio, decay_rate),
            "diagonal": (rate, decay_rate),
            "magnitude": (magnitude_rate, 0.0),
        }
        for role, (lr, decay) in roles.items():
            named = [dict(adapter.named_parameters()) for adapter in layer_adapters(model)]
            names = (role, f"parametrization.{role}")
            parameters = [parts[name] for parts in named for name in names if name in parts]
            if parameters:
                name = f"{component}/{role}"
                groups.append({"name": name, "params": parameters, "lr": lr, "weight_decay": decay})
    return groups


def weight_groups(trained: Mapping[str, nn.Parameter], config: TrainConfig) -> Groups:
    """Weights of a model itself by component, each with its rate and decay.

    Args:
        trained: Parameters by canonical name, which begins with the component.
        config: Learning rates and weight decay.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in trained.items():
        component = name.partition(".")[0]
        if component not in groups:
            rate, decay = _rate_and_decay(component, config)
            group = {"params": [], "lr": rate, "weight_decay": decay}
            groups[component] = {"name": f"{component}/weights", **group}
        groups[component]["params"].append(parameter)
    return list(groups.values())


def _rate_and_decay(component: str, config: TrainConfig) -> tuple[float, float]:
    """Learning rate and weight decay of a component."""
    has_own_rate = component != "unet" and config.optimizer_name != "prodigy"
    rate = config.text_encoder_lr if has_own_rate else config.unet_lr
    decay = config.adam_weight_decay
    if component != "unet" and config.adam_weight_decay_text_encoder is not None:
        decay = config.adam_weight_decay_text_encoder
    return rate, decay


def build_optimizer(groups: Groups, config: TrainConfig) -> torch.optim.Optimizer:
    """The configured optimizer over parameter groups.

    Raises:
        ConfigError: If the optimizer's library is not installed.
    """
    betas = (config.adam_beta1, config.adam_beta2)
    name = config.optimizer_name
    if name == "adamw":
        kind = "fused" if _can_fuse(groups) else "foreach"
        return torch.optim.AdamW(groups, betas=betas, eps=config.adam_epsilon, **{kind: True})
    if name == "adamw8bit":
        library = optimizer_library(name)
        return library.optim.AdamW8bit(groups, betas=betas, eps=config.adam_epsilon)  # type: ignore[no-any-return]
    if name == "prodigy":
        library = optimizer_library(name)
        return library.Prodigy(  # type: ignore[no-any-return]
            groups,
            betas=betas,
            beta3=config.prodigy_beta3,
            eps=config.adam_epsilon,
            decouple=config.prodigy_decouple,
            use_bias_correction=config.prodigy_use_bias_correction,
            safeguard_warmup=config.prodigy_safeguard_warmup,
        )
    from transformers.optimization import Adafactor

    # Each group has its own rate; the polynomial schedule takes that of AdamW's defaults for scale.
    return Adafactor(groups, lr=1e-3, scale_parameter=False, relative_step=False)


def learning_rates(groups: Groups) -> dict[str, dict[str, float]]:
    """The rates of the step that comes, as a step's record holds them.

    Returns:
        ``{"lr": {group: rate}}``. Prodigy multiplies its rate by ``d``, the step size that it has
        found (arXiv:2306.06101): that product is in ``"effective_lr"``.
    """
    rates = {"lr": {group["name"]: group["lr"] for group in groups}}
    if all("d" in group for group in groups):
        rates["effective_lr"] = {group["name"]: float(group["d"]) * group["lr"] for group in groups}
    return rates


def _can_fuse(groups: Groups) -> bool:
    """Return whether one kernel can update every parameter, the fastest for many small ones."""
    kinds = {parameter.device.type for group in groups for parameter in group["params"]}
    return all(has_fused_optimizers(kind) for kind in kinds)


def optimizer_library(name: str) -> Any:
    """The module that an optimizer is from.

    Raises:
        ConfigError: If it is not installed.
    """
    module = _LIBRARIES.get(name, "torch.optim")
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"the optimizer {name} needs {module}, which is not installed; "
            f"run 'pip install {module}' or use --optimizer adamw"
        ) from error


def build_lr_schedule(optimizer: torch.optim.Optimizer, config: TrainConfig) -> Any:
    """The configured learning-rate schedule over ``max_train_steps`` optimizer steps.

    Warns:
        UserWarning: Of a warm-up that is longer than the run.
    """
    from diffusers.optimization import get_scheduler

    steps = config.max_train_steps or 0
    if config.lr_warmup_steps >= steps:
        warnings.warn(
            f"lr_warmup_steps is {config.lr_warmup_steps}, and the run has "
            f"{counted(steps, 'step')}: the learning rate never reaches {config.unet_lr:g}; "
            "make the warm-up shorter",
            stacklevel=2,
        )
    schedule = get_scheduler(
        config.lr_schedule,
        optimizer=optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        # The polynomial divides by what is left after the warm-up.
        num_training_steps=max(steps, config.lr_warmup_steps + 1),
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )
    for number, group in enumerate(optimizer.param_groups):
        if group["name"].endswith(f"/{WORDS}") and config.word_steps < steps:
            factor = schedule.lr_lambdas[number]
            schedule.lr_lambdas[number] = _until(config.word_steps, factor)
    return schedule


def _until(last: int, factor: Callable[[int], float]) -> Callable[[int], float]:
    """A schedule that is 0 once so many steps are done."""
    return lambda done: 0.0 if done >= last else factor(done)


def restore_optimizer(optimizer: Any, lr_schedule: Any, state: Mapping[str, Any]) -> None:
    """Restore saved moments and the schedule's place; rates and decays stay those of this run.

    Args:
        optimizer: This run's, fresh.
        lr_schedule: This run's, fresh: a `LambdaLR`, or Accelerate's wrapper of one.
        state: What a checkpoint holds.

    Raises:
        ConfigError: If it is of other parameters.
    """
    settings = ("initial_lr", "weight_decay", "betas", "eps")
    fresh = [{k: group[k] for k in settings if k in group} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state["optimizer"])
    except ValueError as error:
        raise ConfigError(f"the checkpoint's optimizer does not fit this run's: {error}") from error
    lr_schedule.load_state_dict(state["lr_schedule"])
    plain = getattr(lr_schedule, "scheduler", lr_schedule)
    plain.base_lrs = [group["initial_lr"] for group in fresh]
    for group, values, factor in zip(optimizer.param_groups, fresh, plain.lr_lambdas, strict=True):
        group.update(values)
        group["lr"] = values["initial_lr"] * factor(plain.last_epoch)
