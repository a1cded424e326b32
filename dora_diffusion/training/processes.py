"""Devices, processes and precision of a run (Accelerate), and sharding of a model (FSDP2).

A model is sharded by torch's ``fully_shard``. Matrices and kernels of the denoiser and of trained
text encoders are sharded by rows. Blocks that the model's class in Diffusers or Transformers names
(``_no_split_modules``) have their weights gathered only while they compute; other weights are
gathered with the whole model. Vectors, adapters and new words are replicated, and their gradients
are averaged once per step. All processes must therefore call a sharded model equally often.

Accelerate launches the processes, and its launcher can request sharding. The model is not prepared
by Accelerate, which would prepare model and optimizer together, shard adapters, and not support CPU
processes.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dora_diffusion.adapters.flat import join, split_like
from dora_diffusion.adapters.layers import AdaptedLayer, adapted_layers
from dora_diffusion.adapters.shard import RowShard
from dora_diffusion.config import ConfigError, TrainConfig
from dora_diffusion.config.exclusions import exclusions
from dora_diffusion.config.fields import require
from dora_diffusion.models.components import Components
from dora_diffusion.models.offload import fetch, send
from dora_diffusion.models.precision import precision_of, require_trains
from dora_diffusion.models.words import WordEmbedding
from dora_diffusion.numerics.devices import default_device, torch_version
from dora_diffusion.numerics.precision import allow_tf32

_DEEPSPEED = (
    "DeepSpeed is not supported: its engine takes the optimizer's step inside of backward(), "
    "before this program has checked the gradients; launch with --use_fsdp --fsdp_version 2 "
    "instead of --use_deepspeed, which shards as ZeRO-3 does"
)
# Variables of the launcher, their unsupported values, and the reasons.
_LAUNCHED = {
    "FSDP_OFFLOAD_PARAMS": (
        "true", "--fsdp_offload_params true keeps weights off the GPU; remove it"
    ),
    "FSDP_RESHARD_AFTER_FORWARD": (
        "false", "--fsdp_reshard_after_forward false keeps every weight gathered; remove it"
    ),
    "FSDP_ACTIVATION_CHECKPOINTING": (
        "true", "use --gradient_checkpointing instead of --fsdp_activation_checkpointing"
    ),
}  # fmt: skip


# Gradients with more elements than this are averaged one at a time.
_LARGE = 2**20


def make_accelerator(config: TrainConfig) -> Any:
    """Build the accelerator, with devices, processes and precision of a run.

    Raises:
        ConfigError: If the device does not support the precision, the tracker is not installed, or
            settings and launcher contradict each other.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import AutocastKwargs, InitProcessGroupKwargs, patch_environment

    precision = precision_of(config.mixed_precision)
    require_trains(default_device(), precision)
    if config.report_to and find_spec(config.report_to) is None:
        raise ConfigError(
            f"report_to {config.report_to} needs a package that is not installed; "
            f"run 'pip install {config.report_to}'",
            "report_to",
        )
    shards = wants_sharding(config)
    # A process may train several runs with different precisions.
    AcceleratorState._reset_state(reset_partial_state=False)
    if config.allow_tf32:
        allow_tf32()
    # Adapters need no autocast: the frozen model has the precision already, and an adapted layer
    # casts its parameters. Autocast would only cast around the normalization layers.
    autocast = AutocastKwargs(enabled=not config.trains_adapters)
    # The model is sharded by `shard`, not by Accelerate.
    with patch_environment(ACCELERATE_USE_FSDP="false"):
        accelerator: Any = Accelerator(
            mixed_precision=precision,
            log_with=config.report_to,
            project_dir=str(Path(config.output_dir, config.logging_dir)),
            # The other processes wait while the first one generates class images.
            kwargs_handlers=[autocast, InitProcessGroupKwargs(timeout=timedelta(hours=12))],
        )  # fmt: skip
    accelerator.shards = shards
    return accelerator


def shards_model(accelerator: Any) -> bool:
    """Return whether the model is sharded over the processes."""
    return bool(getattr(accelerator, "shards", False))


def set_by_any(accelerator: Any, flag: bool) -> bool:
    """Return whether any process has set a flag. All processes must call this function."""
    if accelerator.num_processes == 1:
        return flag
    count = torch.tensor(float(flag), device=accelerator.device)
    return bool(accelerator.reduce(count, reduction="sum"))


class SharedFlags:
    """Flags that any process has set, so that all processes stop and save at the same step.

    With several processes, a call returns the flags of the previous call, to avoid waiting for the
    device. A flag that is returned as set is not sent again by the same call.
    """

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self._sent: Callable[[], Tensor] | None = None

    def __call__(self, *flags: bool) -> list[bool]:
        """Return the flags that any process has set. All processes must call it at every step."""
        accelerator = self._accelerator
        if accelerator.num_processes == 1:
            return list(flags)
        before = torch.zeros(len(flags)) if self._sent is None else self._sent()
        is_set = [bool(count) for count in before.tolist()]
        unsent = [float(flag and not old) for flag, old in zip(flags, is_set, strict=True)]
        counts = send(torch.tensor(unsent), accelerator.device)
        self._sent = fetch(accelerator.reduce(counts, reduction="sum"))
        return is_set


def wants_sharding(config: TrainConfig) -> bool:
    """Return whether a run shards its model, by its settings or by ``accelerate launch``.

    Raises:
        ConfigError: If the two contradict each other, or another setting excludes sharding.

    Warns:
        UserWarning: If sharding has no effect because there is one process.
    """
    require(not _is_set("ACCELERATE_USE_DEEPSPEED"), _DEEPSPEED, "sharding")
    is_launched = _is_set("ACCELERATE_USE_FSDP")
    require(
        not (is_launched and config.sharding == "none"),
        "sharding is none, but accelerate launch has --use_fsdp; remove one of them",
        "sharding",
    )
    if not is_launched and config.sharding != "fsdp":
        return False
    if is_launched:
        version = os.environ.get("FSDP_VERSION", "1")
        require(
            version == "2", f"FSDP {version} is not supported; add --fsdp_version 2", "sharding"
        )
        for variable, (value, reason) in _LAUNCHED.items():
            require(not _is_set(variable, value), f"sharding: {reason}", "sharding")
        # Otherwise Transformers would load weights in the first process only.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    _check_settings(config)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        warnings.warn(
            "sharding fsdp has no effect because there is one process; start several with "
            "accelerate launch --num_processes",
            stacklevel=3,
        )
        return False
    return True


def _is_set(variable: str, value: str = "true") -> bool:
    return os.environ.get(variable, "").lower() == value


def has_sharding() -> bool:
    """Return whether the installed torch can shard a model."""
    return torch_version() >= (2, 7)


def _check_settings(config: TrainConfig) -> None:
    """Check that no setting excludes sharding."""
    require(
        has_sharding(),
        f"sharding fsdp needs torch 2.7 or newer, this is {torch.__version__}",
        "sharding",
    )
    for _, reason in exclusions(config, "sharding"):
        raise ConfigError(f"sharding fsdp {reason}", "sharding")


def shard(
    components: Components,
    modules: Mapping[str, nn.Module],
    trained: dict[str, nn.Parameter],
    accelerator: Any,
) -> None:
    """Shard the trained components in place, and move them to the device block by block.

    All processes must call this function with the same weights.

    Args:
        components: The model.
        modules: Trained components, by name.
        trained: Trained weights of the model, by name. Their shards replace them.
        accelerator: Devices and processes (`make_accelerator`).

    Raises:
        ConfigError: If processes could not call the text encoders equally often.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    encodes_apart = components.clip_skip and not components.zeros_for_empty_prompt
    if encodes_apart and len(modules) > 1:
        raise ConfigError(
            "sharding fsdp cannot train text encoders with clip_skip, which encodes the empty "
            "caption separately in the processes that draw it; remove one of them",
            "sharding",
        )
    owners = {
        id(parameter): (module, name)
        for model in modules.values()
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
    }
    attributes = {name: owners[id(parameter)] for name, parameter in trained.items()}
    trained.clear()  # Otherwise every whole weight would stay in memory until all are sharded.
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for model in modules.values():
        whole = set(_kept_whole(model))
        names: Any = getattr(model, "_no_split_modules", None) or ()
        inner = [module for module in model.modules() if type(module).__name__ in names]
        for unit in [*reversed(inner), model]:
            # Reshard the outermost unit too: `TrainedWeights.base_weights` writes to the shards.
            fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
        model.to(accelerator.device)  # Moves the parameters that are not sharded.
        for _, layer in adapted_layers(model):
            if is_sharded(layer.weight):
                layer.shard = _row_shard(layer.weight)
    trained.update({name: getattr(*owner) for name, owner in attributes.items()})


def _kept_whole(model: nn.Module) -> Iterable[nn.Parameter]:
    yield from (parameter for parameter in model.parameters() if parameter.ndim < 2)
    for module in model.modules():
        if isinstance(module, WordEmbedding):
            yield module.rows
        if isinstance(module, AdaptedLayer):
            yield from module.adapters.parameters()
            if module.kind != "plain":  # Rows of its weight are not outputs.
                yield module.weight


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is sharded."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a tensor, detached and in the same memory."""
    whole: Any = tensor.detach()
    shard: Tensor = whole.to_local() if is_sharded(tensor) else whole
    return shard


def _row_shard(tensor: Tensor) -> RowShard:
    """Return this process's rows of a sharded tensor: ceil(rows / processes), fewer at the end."""
    rows, length = tensor.shape[0], len(local(tensor))
    rows_per_process = -(-rows // dist.get_world_size())
    return RowShard(min(dist.get_rank() * rows_per_process, rows), length, rows, add_up)


def add_up(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes."""
    tensor = tensor.contiguous()
    dist.all_reduce(tensor)
    return tensor


def own_part(tensor: Tensor, whole: Tensor) -> Tensor:
    """Return the rows of a whole tensor that belong to this process's shard of ``tensor``."""
    return _row_shard(tensor).own(whole) if is_sharded(tensor) else whole


def exchange(tensor: nn.Parameter, values: Tensor) -> Tensor:
    """Replace the local values of a parameter. Returns the previous values."""
    if not is_sharded(tensor):
        before, tensor.data = tensor.data, values
        return before
    shard = local(tensor)  # FSDP gathers from this memory, not from ``.data``.
    before = shard.clone()
    shard.copy_(values)
    return before


def gather(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """Gather a tensor on the CPU of the first process. Other processes get an arbitrary tensor.

    Args:
        tensor: A parameter, or the local shard of a tensor that is sharded like one.
        like: Parameter with the same sharding. Default: ``tensor`` itself.
    """
    like = tensor if like is None else like
    if not is_sharded(like):
        return tensor.detach().cpu()
    whole: Any = like.detach()
    if tensor is not like:
        layout = {"shape": whole.shape, "stride": whole.stride()}
        whole = type(whole).from_local(tensor, whole.device_mesh, whole.placements, **layout)
    gathered: Tensor = whole.full_tensor()
    return gathered.cpu() if dist.get_rank() == 0 else gathered[:0]


@torch.no_grad()
def load(values: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Copy whole values into parameters that may be sharded."""
    for name, parameter in parameters.items():
        local(parameter).copy_(own_part(parameter, values[name]))


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter], accelerator: Any) -> None:
    """Average the gradients of replicated parameters over all processes."""
    if accelerator.num_processes == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    # Large gradients are reduced one at a time, since joining them would copy them.
    for gradient in (grad for grad in gradients if grad.numel() > _LARGE):
        gradient.copy_(add_up(gradient).div_(dist.get_world_size()))
    if small := [grad for grad in gradients if grad.numel() <= _LARGE]:
        mean = add_up(join(small)).div_(dist.get_world_size())
        torch._foreach_copy_(small, list(split_like(mean, small)))
