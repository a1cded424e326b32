"""Parameter groups, optimizers and learning-rate schedules."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from dora_diffusion.adapters.flat import join, split_like
from dora_diffusion.adapters.layers import adapted_layers
from dora_diffusion.adapters.targets import first_naming
from dora_diffusion.config import ConfigError, TrainConfig
from dora_diffusion.config.families import DENOISERS
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
"""Role of the parameter groups for new words."""

# Optional packages.
_LIBRARIES = {
    "adamw8bit": "bitsandbytes",
    "prodigy": "prodigyopt",
    "adamw-schedule-free": "schedulefree",
    "prodigy-schedule-free": "prodigy-plus-schedule-free",
}
_MODULES = {"prodigy-plus-schedule-free": "prodigyplus"}


def parameter_groups(trained: Mapping[str, nn.Module], config: TrainConfig) -> Groups:
    """Group the parameters of adapters by component and role, with learning rate and decay.

    The learning rate of B is ``loraplus_ratio`` times that of A (arXiv:2402.12354). The magnitude
    has no weight decay, which would shrink the pretrained weight.

    Args:
        trained: Components with adapters, by name.
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
                parameters = [p[name] for p in named for name in names if name in p]
                if parameters:
                    name = f"{component}/{role}{pattern and f' of {pattern}'}"
                    group = {"params": parameters, "lr": lr, "weight_decay": decay}
                    groups.append({"name": name, **group})
    return groups


def role_of(group: Mapping[str, Any]) -> str:
    """Return the role of a group: ``"up"`` for the name ``"unet/up of mid_block.*"``."""
    return str(group["name"]).partition("/")[2].partition(" ")[0]


def _by_pattern(model: nn.Module, config: TrainConfig) -> dict[str, list[nn.Module]]:
    """Group the adapters of a component by the pattern of ``lr_pattern`` that names their layer."""
    by_pattern: dict[str, list[nn.Module]] = {}
    for path, layer in adapted_layers(model):
        pattern = first_naming(config.lr_pattern, path, layer)
        by_pattern.setdefault(pattern, []).extend(layer.adapters.values())
    return by_pattern


def weight_groups(trained: Mapping[str, nn.Parameter], config: TrainConfig) -> Groups:
    """Group the weights of a model by component, with learning rate and decay (full fine-tuning).

    Args:
        trained: Parameters by canonical name, which begins with the component.
        config: Learning rates and weight decay.
    """
    by_component: dict[str, list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        by_component.setdefault(name.partition(".")[0], []).append(parameter)
    return [
        {"name": f"{name}/weights", "params": parameters, "lr": rate, "weight_decay": decay}
        for name, parameters in by_component.items()
        for rate, decay in [_rate_and_decay(name, config)]
    ]


def _rate_and_decay(component: str, config: TrainConfig) -> tuple[float, float]:
    """Return the learning rate and weight decay of a component."""
    has_own_rate = component not in DENOISERS and not config.is_prodigy
    rate = config.text_encoder_lr if has_own_rate else config.unet_lr
    decay = config.adam_weight_decay
    if component not in DENOISERS and config.adam_weight_decay_text_encoder is not None:
        decay = config.adam_weight_decay_text_encoder
    return rate, decay


def build_optimizer(groups: Groups, config: TrainConfig) -> torch.optim.Optimizer:
    """Build the configured optimizer over parameter groups.

    Raises:
        ConfigError: If the optimizer's library is not installed.
    """
    name, library = config.optimizer, optimizer_library(config.optimizer)
    options: dict[str, Any] = {"params": groups, "eps": config.adam_epsilon}
    options["betas"] = config.adam_beta1, config.adam_beta2
    if name == "adamw":
        # For many small parameters, one kernel over all of them is the fastest.
        kinds = {parameter.device.type for group in groups for parameter in group["params"]}
        options["fused" if all(map(has_fused_optimizers, kinds)) else "foreach"] = True
        return torch.optim.AdamW(**options)
    if name == "adamw8bit":
        return library.optim.AdamW8bit(**options)  # type: ignore[no-any-return]
    if name == "prodigy":
        return library.Prodigy(  # type: ignore[no-any-return]
            **options,
            beta3=config.prodigy_beta3,
            decouple=config.prodigy_decouple,
            use_bias_correction=config.prodigy_use_bias_correction,
            safeguard_warmup=config.prodigy_safeguard_warmup,
        )
    if name == "adamw-schedule-free":
        optimizer: Any = library.AdamWScheduleFree(**options)
        optimizer.train()
        return optimizer  # type: ignore[no-any-return]
    if name == "prodigy-schedule-free":
        options["split_groups"] = False  # One step size for all groups, as in Prodigy.
        return library.ProdigyPlusScheduleFree(**options, beta3=config.prodigy_beta3)  # type: ignore[no-any-return]
    from transformers.optimization import Adafactor

    # Groups have their own rates. The polynomial schedule scales by this one, AdamW's default.
    return Adafactor(groups, lr=1e-3, scale_parameter=False, relative_step=False)


def learning_rates(groups: Groups) -> dict[str, dict[str, float]]:
    """Return the learning rates of the next step, for its record.

    Returns:
        ``{"lr": {group: rate}}``. For Prodigy, ``"effective_lr"`` has the rates multiplied by its
        estimated step size ``d`` (arXiv:2306.06101).
    """
    rates = {"lr": {group["name"]: group["lr"] for group in groups}}
    if all("d" in group for group in groups):
        rates["effective_lr"] = {group["name"]: float(group["d"]) * group["lr"] for group in groups}
    return rates


def optimizer_library(name: str) -> Any:
    """Import the library of an optimizer.

    Raises:
        ConfigError: If the library is not installed.
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
    """Build the configured learning-rate schedule over ``max_train_steps`` optimizer steps.

    Warns:
        UserWarning: If the warm-up is longer than the run.
    """
    from diffusers.optimization import get_scheduler

    steps = config.max_train_steps or 0
    if config.lr_warmup_steps >= steps:
        warnings.warn(
            f"lr_warmup_steps is {config.lr_warmup_steps}, but the run has "
            f"{counted(steps, 'step')}: the learning rate never reaches {config.unet_lr:g}; "
            "shorten the warm-up",
            stacklevel=2,
        )
    return get_scheduler(
        config.lr_schedule,
        optimizer=optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        # The polynomial schedule divides by the number of steps after the warm-up.
        num_training_steps=max(steps, config.lr_warmup_steps + 1),
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )


def restore_optimizer(optimizer: Any, lr_schedule: Any, state: Mapping[str, Any]) -> None:
    """Restore the moments of an optimizer and the position of its schedule.

    Learning rates, weight decays, betas and eps keep the values of this run.

    Args:
        optimizer: New optimizer.
        lr_schedule: New schedule: a `LambdaLR` or Accelerate's wrapper of one.
        state: State of a checkpoint.

    Raises:
        ConfigError: If the state belongs to other parameters.
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
    """Restore bfloat16 moments, which `load_state_dict` casts to the dtype of their parameter."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, moments in saved.items():
        loaded = optimizer.state[parameters[index]]
        for key, value in moments.items():
            if isinstance(value, Tensor) and value.dtype == torch.bfloat16:
                loaded[key] = loaded[key].to(value.dtype)


class SteppedParameters:
    """Parameters of an optimizer: the trained parameters themselves.

    Attributes:
        groups: Parameter groups of the optimizer.
        whole: Parameters that are not sharded.
        memory: Memory for gradients, by trained parameter.
    """

    memory: Mapping[Tensor, Tensor] = MappingProxyType({})

    def __init__(self, groups: Groups, whole: Sequence[nn.Parameter] | None = None) -> None:
        self.groups = groups
        self.whole = list(self) if whole is None else list(whole)

    def __iter__(self) -> Iterator[nn.Parameter]:
        return (parameter for group in self.groups for parameter in group["params"])

    def take_gradients(self) -> None:
        """Prepare the gradients for the optimizer after the backward passes."""

    def share_gradients(self) -> None:
        """Make the clipped gradients available as ``.grad`` of the trained parameters."""

    def clip(self, limit: float, accelerator: Any) -> Tensor:
        """Clip the L2 norm of the gradients, unless the limit is 0. Returns the norm before."""
        if limit:
            norm: Tensor = accelerator.clip_grad_norm_(list(self), limit)
            return norm
        accelerator.unscale_gradients()
        return torch.nn.utils.get_total_norm([p.grad for p in self if p.grad is not None])

    def finish(self) -> None:
        """Drop the gradients after the optimizer's step."""

    def gather_state(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """Gather the sharded moments of an optimizer's state in the first process."""
        return state

    def own_state(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return this process's shard of a gathered optimizer state."""
        return state


class FlatGroup:
    """Flat parameter of a parameter group. The members of the group become views of it.

    Args:
        in_group: Members in the order of the group.
        members: The same members in the order in which they lie in memory.

    Attributes:
        flat: The flat parameter.
        gradient: Memory for its gradient.
        shares: Views of the gradient, by member.
    """

    def __init__(self, in_group: list[nn.Parameter], members: list[nn.Parameter]) -> None:
        self.in_group, self.members = in_group, members
        self.flat = nn.Parameter(join(members))
        self.gradient = torch.zeros_like(self.flat)
        self.shares = dict(zip(members, split_like(self.gradient, members), strict=True))
        for member, view in zip(members, split_like(self.flat, members), strict=True):
            member.data = view
        self._addresses = _addresses_of(self.flat, members)

    def take_gradients(self) -> list[nn.Parameter]:
        """Copy the gradients of the members to the flat parameter.

        Returns:
            Members without a gradient if others have one.

        Raises:
            RuntimeError: If a member is no longer a view of the flat parameter, as after ``.to()``.
        """
        if _addresses_of(self.flat, self.members) != self._addresses:
            raise RuntimeError(
                "a trained parameter was moved or replaced during training, so that the optimizer "
                "no longer reaches it; build the optimizer after moving the model"
            )
        self.flat.grad = self.gradient
        # Gradients that lie in the shares need no copy.
        pairs = [(share, member.grad) for member, share in self.shares.items()]
        copies = [(share, g) for share, g in pairs if g is not None and g is not share]
        if copies:
            torch._foreach_copy_([share for share, _ in copies], [grad for _, grad in copies])
        unused = [member for member in self.members if member.grad is None]
        if unused:
            torch._foreach_zero_([self.shares[member] for member in unused])
        if len(unused) == len(self.members):
            self.flat.grad = None
            return []
        return unused


class FlatParameters(SteppedParameters):
    """One flat parameter per group.

    Clipping and AdamW are elementwise except for the total norm, so that their results do not
    change. Optimizers that depend on the shape of a parameter cannot use flat parameters.

    Args:
        groups: Parameter groups.
        order: Parameters in the order in which their groups lie in memory; others follow. States
            of the optimizer have the order of the groups.
    """

    def __init__(self, groups: Groups, order: Sequence[nn.Parameter] = ()) -> None:
        index = {parameter: number for number, parameter in enumerate(order)}
        self._flat = []
        for group in groups:
            in_memory = sorted(group["params"], key=lambda member: index.get(member, len(index)))
            self._flat.append(FlatGroup(list(group["params"]), in_memory))
        self.memory = {m: share for flat in self._flat for m, share in flat.shares.items()}
        self._unused: list[tuple[nn.Parameter, Tensor]] = []
        pairs = zip(groups, self._flat, strict=True)
        super().__init__([group | {"params": [of_group.flat]} for group, of_group in pairs])

    def take_gradients(self) -> None:
        """Copy the gradients of the members to the flat parameters."""
        unused = [member for group in self._flat for member in group.take_gradients()]
        self._unused = [(member, member.detach().clone()) for member in unused]

    def gather_state(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        return _reordered(state, [(group.members, group.in_group) for group in self._flat])

    def own_state(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        return _reordered(state, [(group.in_group, group.members) for group in self._flat])

    def share_gradients(self) -> None:
        """Make the gradients of the members views of the clipped flat gradients."""
        for member, share in self.memory.items():
            member.grad = None if member.grad is None else share

    def finish(self) -> None:
        """Drop the members' gradients after the optimizer's step, and mark the members as modified.

        A member without a gradient keeps its value: the weight decay of the flat parameter is
        undone.
        """
        for member, value in self._unused:
            member.data.copy_(value)
        self._unused = []
        for trained in self.memory:
            trained.grad = None
        # Views assigned to ``.data`` do not share the version counter of the flat parameter.
        increment_version(list(self.memory))


def _reordered(
    state: Mapping[str, Any], orders: Sequence[tuple[list[nn.Parameter], list[nn.Parameter]]]
) -> dict[str, Any]:
    """Return an optimizer's state with the moments of each flat parameter in another order."""

    def change(moment: Tensor, index: int) -> Tensor:
        before, after = orders[index]
        moments = dict(zip(before, split_like(moment, before), strict=True))
        return join([moments[parameter] for parameter in after])

    return _with_moments(state, change)


def _with_moments(
    state: Mapping[str, Any], change: Callable[[Tensor, int], Tensor]
) -> dict[str, Any]:
    """Return an optimizer's state with changed moments, given the index of their parameter."""
    changed = {
        index: {
            key: change(value, index) if key.startswith("exp_avg") else value
            for key, value in moments.items()
        }
        for index, moments in sorted(state["state"].items())
    }
    return {**state, "state": changed}


def _addresses_of(flat: Tensor, members: Sequence[Tensor]) -> list[int]:
    return [flat.data_ptr(), *(member.data_ptr() for member in members)]


class LocalParameters(SteppedParameters):
    """Local shards of sharded weights.

    AdamW is elementwise, so that each process can update its shard by itself.
    """

    def __init__(self, groups: Groups) -> None:
        members = [parameter for group in groups for parameter in group["params"]]
        shards = {
            id(member): nn.Parameter(local(member)) if is_sharded(member) else member
            for member in members
        }
        super().__init__(
            [group | {"params": [shards[id(m)] for m in group["params"]]} for group in groups],
            whole=[member for member in members if not is_sharded(member)],
        )
        self._members = members
        self._pairs = [(m, shards[id(m)]) for m in members if is_sharded(m)]

    def take_gradients(self) -> None:
        # FSDP has averaged the gradients.
        for member, shard in self._pairs:
            shard.grad = None if member.grad is None else local(member.grad)

    def finish(self) -> None:
        for member, _ in self._pairs:
            member.grad = None

    @torch.no_grad()
    def clip(self, limit: float, accelerator: Any) -> Tensor:
        """Clip the L2 norm over all processes, unless the limit is 0. Returns the norm before."""
        sharded = [shard.grad for _, shard in self._pairs if shard.grad is not None]
        whole = [parameter.grad for parameter in self.whole if parameter.grad is not None]
        squares = [torch.nn.utils.get_total_norm(grads).square() for grads in (sharded, whole)]
        norm = (add_up(squares[0]) + squares[1]).sqrt()
        if limit:
            torch._foreach_mul_([*sharded, *whole], (limit / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def gather_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        return _with_moments(state, lambda moment, index: gather(moment, self._members[index]))

    def own_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        return _with_moments(state, lambda moment, index: own_part(self._members[index], moment))


def stepped_parameters(
    groups: Groups, config: TrainConfig, *, shards: bool, order: Sequence[nn.Parameter] = ()
) -> SteppedParameters:
    """Return the parameters of a run's optimizer, flattened if the optimizer allows it.

    AdamW is elementwise and can update flat parameters. Adafactor uses rows and columns. Prodigy
    uses the initial value of each parameter. The 8-bit AdamW does not quantise small parameters,
    which keeps the moments of magnitudes exact. The average of schedule-free optimizers must skip
    parameters without a gradient. The weights of full fine-tuning are few and large.

    Args:
        groups: Parameter groups.
        config: Method and optimizer.
        shards: Whether the model is sharded.
        order: See `FlatParameters`.
    """
    if config.trains_adapters and config.optimizer == "adamw":
        return FlatParameters(groups, order)
    is_local = shards and not config.trains_adapters
    return LocalParameters(groups) if is_local else SteppedParameters(groups)
