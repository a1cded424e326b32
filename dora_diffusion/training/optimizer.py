"""Parameter groups, optimizers, what they see of many small parameters, and schedules."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from dora_diffusion.adapters.inject import layer_adapters
from dora_diffusion.config import ConfigError, TrainConfig
from dora_diffusion.devices import has_fused_optimizers
from dora_diffusion.numerics.prepare.layout import join, split_like
from dora_diffusion.numerics.prepare.stack_layout import Vector
from dora_diffusion.wording import counted

Groups = list[dict[str, Any]]
WORDS = "words"
"""What ends the name of a group of new words' vectors."""

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
    """Whether one kernel can update every parameter, which is fastest for many small ones."""
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


class FlatParameters:
    """One flat parameter for each parameter group; the group's own become views of it.

    Clipping and AdamW treat every number alike, so they see the flat ones, and do the same. Not for
    optimizers to which a parameter's shape or size matters.

    Attributes:
        groups: The parameter groups, with a flat parameter each.
    """

    def __init__(self, groups: Groups) -> None:
        self._members: list[list[nn.Parameter]] = [list(group["params"]) for group in groups]
        self._flat = [nn.Parameter(join(members)) for members in self._members]
        self._gradients = [torch.zeros_like(flat) for flat in self._flat]
        self._shares = [
            split_like(gradient, members)
            for gradient, members in zip(self._gradients, self._members, strict=True)
        ]
        self._unused: list[tuple[nn.Parameter, Tensor]] = []
        self.groups: Groups = [
            group | {"params": [flat]} for group, flat in zip(groups, self._flat, strict=True)
        ]
        for flat, members in zip(self._flat, self._members, strict=True):
            for member, view in zip(members, split_like(flat, members), strict=True):
                member.data = view

    def vector(self) -> Vector:
        """All parameters, flat ones in their order."""
        offsets, start = {}, 0
        for members in self._members:
            for member in members:
                offsets[id(member)] = start
                start += member.numel()
        return Vector([flat.detach() for flat in self._flat], offsets)

    def give_gradients(self, gradient: Tensor, unused: Collection[Tensor] = ()) -> None:
        """Give the flat parameters their parts of a gradient of `vector`.

        Args:
            gradient: Of all parameters.
            unused: Parameters that have none, and stay as they are.

        Raises:
            RuntimeError: As `take_gradients` does.
        """
        without, self._unused = {id(parameter) for parameter in unused}, []
        parts = gradient.split([flat.numel() for flat in self._flat])
        for flat, part, members in zip(self._flat, parts, self._members, strict=True):
            _check_memory(flat, members)
            left = [member for member in members if id(member) in without]
            flat.grad = part if len(left) < len(members) else None
            if flat.grad is not None:
                self._unused += [(member, member.detach().clone()) for member in left]

    def take_gradients(self) -> None:
        """Give the flat parameters the gradients of their members.

        Raises:
            RuntimeError: If a member's memory was exchanged, as ``.to()`` does it.
        """
        self._unused = []
        each = zip(self._flat, self._gradients, self._shares, self._members, strict=True)
        for flat, gradient, shares, members in each:
            _check_memory(flat, members)
            found = [member.grad for member in members]
            pairs = [(s, grad) for s, grad in zip(shares, found, strict=True) if grad is not None]
            unused = [m for m, grad in zip(members, found, strict=True) if grad is None]
            if unused:
                gradient.zero_()
                self._unused += [(m, m.detach().clone()) for m in unused if pairs]
            if pairs:
                torch._foreach_copy_([share for share, _ in pairs], [grad for _, grad in pairs])
            flat.grad = gradient if pairs else None

    def share_gradients(self) -> None:
        """Let the members' gradients be views of the flat ones, which clipping then changes too."""
        for shares, members in zip(self._shares, self._members, strict=True):
            for share, member in zip(shares, members, strict=True):
                member.grad = None if member.grad is None else share

    def finish(self) -> None:
        """After the optimizer's step: drop the members' gradients, and count them as written.

        A member that had none is what it was before: no weight decay acts on it.
        """
        for member, value in self._unused:
            member.data.copy_(value)
        self._unused = []
        for members in self._members:
            for member in members:
                member.grad = None
            # Memory that is given by ``.data`` brings no version counter along.
            increment_version(members)


def _check_memory(flat: Tensor, members: Sequence[Tensor]) -> None:
    place, size = flat.data_ptr(), flat.element_size()
    for member in members:
        if member.data_ptr() != place:
            raise RuntimeError(
                "a trained parameter was moved or replaced while it trains, so that the optimizer "
                "no longer reaches it; build the optimizer after the model is where it stays"
            )
        place += member.numel() * size


def restore_optimizer(optimizer: Any, lr_schedule: Any, state: Mapping[str, Any]) -> None:
    """Put saved moments and the schedule's place back; rates and decays stay those of this run.

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
        optimizer.load_state_dict(join_states(state["optimizer"], optimizer.param_groups))
    except ValueError as error:
        raise ConfigError(f"the checkpoint's optimizer does not fit this run's: {error}") from error
    lr_schedule.load_state_dict(state["lr_schedule"])
    plain = getattr(lr_schedule, "scheduler", lr_schedule)
    plain.base_lrs = [group["initial_lr"] for group in fresh]
    for group, values, factor in zip(optimizer.param_groups, fresh, plain.lr_lambdas, strict=True):
        group.update(values)
        group["lr"] = values["initial_lr"] * factor(plain.last_epoch)


def join_states(state: dict[str, Any], groups: Groups) -> dict[str, Any]:
    """A saved optimizer's state; earlier versions kept each parameter's moments apart.

    Args:
        state: Of an optimizer over many parameters, or over flat ones, which is returned as it is.
        groups: The present optimizer's.
    """
    saved = state["param_groups"]
    is_flat = all(len(group["params"]) == 1 for group in groups)
    if not is_flat or len(saved) != len(groups) or all(len(g["params"]) == 1 for g in saved):
        return state
    joined: dict[int, dict[str, Any]] = {}
    saved_groups = []
    for number, (group, flat) in enumerate(zip(saved, groups, strict=True)):
        found = [state["state"].get(index) for index in group["params"]]
        saved_groups.append(group | {"params": [number]})
        if not any(found):
            continue
        if not all(found):
            raise ValueError("some of its parameters were never trained")
        joined[number] = {"step": found[0]["step"]}
        for key in ("exp_avg", "exp_avg_sq"):
            joined[number][key] = torch.cat([moments[key].reshape(-1) for moments in found])
        if joined[number]["exp_avg"].numel() != flat["params"][0].numel():
            raise ValueError("its parameters have other sizes")
    return state | {"state": joined, "param_groups": saved_groups}
