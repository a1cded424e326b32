"""Parameter groups, what an optimizer sees of them, optimizers and schedules."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from dora_diffusion.adapters.layers import adapted_layers
from dora_diffusion.adapters.layout import join, split_like
from dora_diffusion.adapters.targets import first_naming
from dora_diffusion.config import ConfigError, TrainConfig
from dora_diffusion.config.wording import counted
from dora_diffusion.numerics.devices import has_fused_optimizers
from dora_diffusion.training.processes import (
    add_up,
    gather,
    is_sharded,
    local,
    own_part,
)

Groups = list[dict[str, Any]]
WORDS = "words"
"""Suffix of the name of a group for new words' vectors."""

# Not everybody needs them, and they are installed apart.
_LIBRARIES = {
    "adamw8bit": "bitsandbytes",
    "prodigy": "prodigyopt",
    "adamw-schedule-free": "schedulefree",
    "prodigy-schedule-free": "prodigy-plus-schedule-free",
}
_MODULES = {"prodigy-plus-schedule-free": "prodigyplus"}


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
        usual, decay_rate = _rate_and_decay(component, config)
        for pattern, adapters in _by_pattern(model, config).items():
            rate = config.lr_pattern.get(pattern, usual)
            magnitude_rate = rate if config.magnitude_lr is None else config.magnitude_lr
            roles = {
                "down": (rate, decay_rate),
                "up": (rate * config.loraplus_ratio, decay_rate),
                "diagonal": (rate, decay_rate),
                "magnitude": (magnitude_rate, 0.0),
            }
            for role, (lr, decay) in roles.items():
                named = [dict(adapter.named_parameters()) for adapter in adapters]
                names = (role, f"parametrization.{role}")
                parameters = [parts[name] for parts in named for name in names if name in parts]
                if parameters:
                    name = f"{component}/{role}{pattern and f' of {pattern}'}"
                    group = {"params": parameters, "lr": lr, "weight_decay": decay}
                    groups.append({"name": name, **group})
    return groups


def role_of(group: Mapping[str, Any]) -> str:
    """The role of a group's parameters: ``"up"`` of ``"unet/up of mid_block.*"``."""
    return str(group["name"]).partition("/")[2].partition(" ")[0]


def _by_pattern(model: nn.Module, config: TrainConfig) -> dict[str, list[nn.Module]]:
    """A component's adapters by the pattern of ``lr_pattern`` that names their layer, or none."""
    parts: dict[str, list[nn.Module]] = {}
    for path, layer in adapted_layers(model):
        pattern = first_naming(config.lr_pattern, path, layer)
        parts.setdefault(pattern, []).extend(layer.adapters.values())
    return parts


def weight_groups(trained: Mapping[str, nn.Parameter], config: TrainConfig) -> Groups:
    """Weights of a model itself by component, each with its rate and decay.

    Args:
        trained: Parameters by canonical name, which begins with the component.
        config: Learning rates and weight decay.
    """
    parts: dict[str, list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        parts.setdefault(name.partition(".")[0], []).append(parameter)
    return [
        {"name": f"{name}/weights", "params": part, "lr": rate, "weight_decay": decay}
        for name, part in parts.items()
        for rate, decay in [_rate_and_decay(name, config)]
    ]


def _rate_and_decay(component: str, config: TrainConfig) -> tuple[float, float]:
    """Learning rate and weight decay of a component."""
    has_own_rate = component != "unet" and not config.is_prodigy
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
    betas, name = (config.adam_beta1, config.adam_beta2), config.optimizer_name
    library = optimizer_library(name)
    if name == "adamw":
        # One kernel that updates every parameter is the fastest for many small ones.
        kinds = {parameter.device.type for group in groups for parameter in group["params"]}
        kind = "fused" if all(map(has_fused_optimizers, kinds)) else "foreach"
        return torch.optim.AdamW(groups, betas=betas, eps=config.adam_epsilon, **{kind: True})
    if name == "adamw8bit":
        return library.optim.AdamW8bit(groups, betas=betas, eps=config.adam_epsilon)  # type: ignore[no-any-return]
    if name == "prodigy":
        return library.Prodigy(  # type: ignore[no-any-return]
            groups,
            betas=betas,
            beta3=config.prodigy_beta3,
            eps=config.adam_epsilon,
            decouple=config.prodigy_decouple,
            use_bias_correction=config.prodigy_use_bias_correction,
            safeguard_warmup=config.prodigy_safeguard_warmup,
        )
    if name == "adamw-schedule-free":
        optimizer: Any = library.AdamWScheduleFree(groups, betas=betas, eps=config.adam_epsilon)
        optimizer.train()
        return optimizer  # type: ignore[no-any-return]
    if name == "prodigy-schedule-free":
        return library.ProdigyPlusScheduleFree(  # type: ignore[no-any-return]
            groups,
            betas=betas,
            beta3=config.prodigy_beta3,
            eps=config.adam_epsilon,
            split_groups=False,  # One step size for all, as Prodigy has it.
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


def optimizer_library(name: str) -> Any:
    """The module that an optimizer is from.

    Raises:
        ConfigError: If it is not installed.
    """
    package = _LIBRARIES.get(name, "torch.optim")
    try:
        return import_module(_MODULES.get(package, package))
    except ImportError as error:
        raise ConfigError(
            f"the optimizer {name} needs {package}, which is not installed; "
            f"run 'pip install {package}' or use --optimizer adamw",
            "optimizer",
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
        if role_of(group) == WORDS and config.word_steps < steps:
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
        raise ConfigError(
            f"the checkpoint's optimizer does not fit this run's: {error}", "resume_from_checkpoint"
        ) from error
    _restore_dtypes(optimizer, state["optimizer"]["state"])
    lr_schedule.load_state_dict(state["lr_schedule"])
    plain = getattr(lr_schedule, "scheduler", lr_schedule)
    plain.base_lrs = [group["initial_lr"] for group in fresh]
    for group, values, factor in zip(optimizer.param_groups, fresh, plain.lr_lambdas, strict=True):
        group.update(values)
        group["lr"] = values["initial_lr"] * factor(plain.last_epoch)


def _restore_dtypes(optimizer: Any, saved: Mapping[int, Mapping[str, Any]]) -> None:
    """Restore what an optimizer keeps in bfloat16, which torch reads in its parameter's dtype."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, moments in saved.items():
        own = optimizer.state[parameters[index]]
        for key, value in moments.items():
            if isinstance(value, Tensor) and value.dtype == torch.bfloat16:
                own[key] = own[key].to(value.dtype)


class SteppedParameters:
    """Parameters that an optimizer sees: those that train themselves.

    Attributes:
        groups: The parameter groups, with what the optimizer is given.
        whole: Of these, what every process has whole.
    """

    def __init__(self, groups: Groups, whole: Sequence[nn.Parameter] | None = None) -> None:
        self.groups = groups
        self.whole = list(self) if whole is None else list(whole)

    def __iter__(self) -> Iterator[nn.Parameter]:
        return (parameter for group in self.groups for parameter in group["params"])

    def take_gradients(self) -> None:
        """Prepare the gradients for the optimizer after the backward passes."""

    def share_gradients(self) -> None:
        """Make clipping change the parameters' own gradients."""

    def clip(self, limit: float, accelerator: Any) -> Tensor:
        """Limit the gradients' L2 norm; return it as it was; 0: no limit."""
        if limit:
            norm: Tensor = accelerator.clip_grad_norm_(list(self), limit)
            return norm
        accelerator.unscale_gradients()
        return torch.nn.utils.get_total_norm([p.grad for p in self if p.grad is not None])

    def finish(self) -> None:
        """Drop the gradients after the optimizer's step."""

    def gather_state(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """An optimizer's state with whole moments, in the first process."""
        return state

    def own_state(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """The part of a whole state that is this process's."""
        return state


class FlatParameters(SteppedParameters):
    """One flat parameter for each parameter group; the group's own become views of it.

    Clipping and AdamW treat every number alike, so they see the flat ones, and do the same. Not for
    optimizers to which a parameter's size matters.

    Args:
        groups: The groups.
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
        flat_groups = zip(groups, self._flat, strict=True)
        super().__init__([group | {"params": [flat]} for group, flat in flat_groups])
        for flat, members in zip(self._flat, self._members, strict=True):
            for member, view in zip(members, split_like(flat, members), strict=True):
                member.data = view

    def take_gradients(self) -> None:
        """Copy the gradients of their members to the flat parameters.

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
        """Make the members' gradients views of the flat ones, which clipping then changes too."""
        for shares, members in zip(self._shares, self._members, strict=True):
            for share, member in zip(shares, members, strict=True):
                member.grad = None if member.grad is None else share

    def finish(self) -> None:
        """Drop the members' gradients after the optimizer's step, and count them as written.

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


class LocalParameters(SteppedParameters):
    """The parts of this process, of weights that train sharded.

    AdamW treats every number alike, so that each process steps its own.
    """

    def __init__(self, groups: Groups) -> None:
        members = [parameter for group in groups for parameter in group["params"]]
        own = {
            id(member): nn.Parameter(local(member)) if is_sharded(member) else member
            for member in members
        }
        super().__init__(
            [group | {"params": [own[id(m)] for m in group["params"]]} for group in groups],
            whole=[member for member in members if not is_sharded(member)],
        )
        self._members = members
        self._pairs = [(m, own[id(m)]) for m in members if is_sharded(m)]

    def take_gradients(self) -> None:
        # FSDP has averaged them.
        for member, own in self._pairs:
            own.grad = None if member.grad is None else local(member.grad)

    def finish(self) -> None:
        for member, _ in self._pairs:
            member.grad = None

    @torch.no_grad()
    def clip(self, limit: float, accelerator: Any) -> Tensor:
        """Limit the gradients' L2 norm over all processes; return it as it was; 0: no limit."""
        own = [part.grad for _, part in self._pairs if part.grad is not None]
        whole = [parameter.grad for parameter in self.whole if parameter.grad is not None]
        squares = [torch.nn.utils.get_total_norm(part).square() for part in (own, whole)]
        norm = (add_up(squares[0]) + squares[1]).sqrt()
        if limit:
            torch._foreach_mul_([*own, *whole], (limit / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def gather_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        return self._with_moments(state, gather)

    def own_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        return self._with_moments(state, lambda moment, member: own_part(member, moment))

    def _with_moments(self, state: Mapping[str, Any], change: Any) -> dict[str, Any]:
        changed = {
            index: {
                key: change(value, self._members[index]) if key.startswith("exp_avg") else value
                for key, value in moments.items()
            }
            for index, moments in sorted(state["state"].items())
        }
        return {**state, "state": changed}


def stepped_parameters(groups: Groups, config: TrainConfig, *, shards: bool) -> SteppedParameters:
    """The form in which a run's optimizer sees the parameters that train.

    AdamW treats every number alike, whatever parameter it belongs to. Adafactor knows
    rows and columns, Prodigy each parameter's start, the 8-bit AdamW quantises no small ones, which
    keeps the magnitudes' moments whole, and the schedule-free one's own average must know those
    without a gradient. A model's own weights are few and large.

    Args:
        groups: The parameter groups.
        config: Method and optimizer.
        shards: Whether the model is sharded.
    """
    if not config.is_full and config.optimizer_name == "adamw":
        return FlatParameters(groups)
    return LocalParameters(groups) if shards and config.is_full else SteppedParameters(groups)
