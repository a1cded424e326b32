"""Devices, processes and precision of a run, by Accelerate; one model over several devices.

A model is sharded by torch's ``fully_shard`` (FSDP2). Matrices and kernels of the UNet, and of text
encoders that train, are sharded by rows: each process has a part of every weight, and a block's
weights are whole only while that block computes. Vectors, adapters and new words are whole in every
process, and their gradients are averaged once for each step. All processes must therefore call a
sharded model equally often.

Accelerate launches the processes, and its launcher may ask for this too. Its own preparation of
FSDP2 takes model and optimizer together, shards adapters, and knows no CPU processes.
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

from dora_diffusion.adapters.layers import AdaptedLayer, adapted_layers
from dora_diffusion.adapters.layout import RowShard, join, split_like
from dora_diffusion.config import ConfigError, TrainConfig
from dora_diffusion.config.fields import require
from dora_diffusion.models.components import Components
from dora_diffusion.models.offload import fetch, send
from dora_diffusion.models.precision import precision_of, require_trains
from dora_diffusion.models.words import WordEmbedding
from dora_diffusion.numerics.devices import default_device, torch_version
from dora_diffusion.numerics.precision import allow_tf32

# By name: importing their classes imports Diffusers. What is in none of these is gathered with the
# whole model.
UNITS = (
    "BasicTransformerBlock", "Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D",
    "CLIPEncoderLayer",
)  # fmt: skip
_DEEPSPEED = (
    "DeepSpeed is not supported: its engine takes the optimizer's step inside of backward(), "
    "before this program has looked at the gradients; launch with --use_fsdp --fsdp_version 2 in "
    "place of --use_deepspeed, which shards what ZeRO-3 shards"
)
# Variables that the launcher sets, the values that are refused, and why.
_LAUNCHED = {
    "FSDP_OFFLOAD_PARAMS": (
        "true", "--fsdp_offload_params true keeps weights off the GPU; leave it out"
    ),
    "FSDP_RESHARD_AFTER_FORWARD": (
        "false", "--fsdp_reshard_after_forward false keeps every weight whole; leave it out"
    ),
    "FSDP_ACTIVATION_CHECKPOINTING": (
        "true", "in place of --fsdp_activation_checkpointing, use --gradient_checkpointing"
    ),
}  # fmt: skip


# Numbers of a gradient from which on it is averaged by itself.
_LARGE = 2**20


def make_accelerator(config: TrainConfig) -> Any:
    """The accelerator, which knows devices, processes and precision.

    Raises:
        ConfigError: If the precision is not possible here, the tracker is not installed, or what
            it is launched with and the settings do not go together.
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
    # A process may train more than once, with another precision.
    AcceleratorState._reset_state(reset_partial_state=False)
    if config.allow_tf32:
        allow_tf32()
    # Adapters do without: their frozen model is in the precision already, where autocast would
    # widen what norms make and cast it back, and an adapted layer casts its own parameters.
    autocast = AutocastKwargs(enabled=config.is_full)
    # `shard` does what it asks for.
    with patch_environment(ACCELERATE_USE_FSDP="false"):
        accelerator: Any = Accelerator(
            mixed_precision=precision,
            log_with=config.report_to,
            project_dir=str(Path(config.output_dir, config.logging_dir)),
            # The other processes wait while the first one makes class images.
            kwargs_handlers=[autocast, InitProcessGroupKwargs(timeout=timedelta(hours=12))],
        )  # fmt: skip
    accelerator.shards = shards
    return accelerator


def shards_model(accelerator: Any) -> bool:
    """Return whether the processes share one model, which all of them call equally often."""
    return bool(getattr(accelerator, "shards", False))


def set_by_any(accelerator: Any, flag: bool) -> bool:
    """Return whether any process has set a flag; all wait for the answer."""
    if accelerator.num_processes == 1:
        return flag
    count = torch.tensor(float(flag), device=accelerator.device)
    return bool(accelerator.reduce(count, reduction="sum"))


class SharedFlags:
    """Flags that any process has set, so that all of them stop, and save, at the same step.

    Of several processes each reads what was asked for a step before, which has arrived by then:
    nothing waits. What is answered is not asked for again by the same call.
    """

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self._sent: Callable[[], Tensor] | None = None

    def __call__(self, *flags: bool) -> list[bool]:
        """Return the flags that any process has set. Every process calls it at every step."""
        accelerator = self._accelerator
        if accelerator.num_processes == 1:
            return list(flags)
        before = torch.zeros(len(flags)) if self._sent is None else self._sent()
        is_set = [bool(count) for count in before.tolist()]
        asked = [float(flag and not old) for flag, old in zip(flags, is_set, strict=True)]
        counts = send(torch.tensor(asked), accelerator.device)
        self._sent = fetch(accelerator.reduce(counts, reduction="sum"))
        return is_set


def wants_sharding(config: TrainConfig) -> bool:
    """Return whether a run shards its model: by its settings, or by ``accelerate launch``.

    Raises:
        ConfigError: If the two do not agree, or something else is asked for that sharding excludes.

    Warns:
        UserWarning: If it has no effect.
    """
    require(not _is_set("ACCELERATE_USE_DEEPSPEED"), _DEEPSPEED, "sharding")
    is_launched = _is_set("ACCELERATE_USE_FSDP")
    require(
        not (is_launched and config.sharding == "none"),
        "sharding is none, and accelerate launch was given --use_fsdp; leave one of them out",
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
        # Transformers would read no weights in processes other than the first.
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
    """Refuse what sharding excludes."""
    holds = {subject.is_image_free for subject in config.subjects}
    is_full, optimizer = config.is_full, config.optimizer_name
    problems = {
        f"needs torch 2.7 or newer, this is {torch.__version__}": not has_sharding(),
        "excludes compile: compiled blocks do not gather their weights": config.compile,
        "excludes quantize: codes are not cut into parts": config.quantize != "none",
        "excludes tlora_min_rank: each process would take norms of other ranks": (
            config.least_rank is not None
        ),
        "excludes offload model: each process keeps its part on its device": (
            config.offload == "model"
        ),
        f"of full fine-tuning excludes optimizer {optimizer}, which looks at whole weights; use "
        "adamw": is_full and optimizer != "adamw",
        "of full fine-tuning excludes mixed_precision fp16; use bf16": (
            is_full and config.mixed_precision == "fp16"
        ),
        "excludes unmasked_prior: processes would pass the base model different numbers of "
        "times": config.holds_unmasked,
        "needs with_prior_preservation of all subjects or of none, where it is without images": (
            len(holds) > 1
        ),
    }
    for problem, is_there in problems.items():
        require(not is_there, f"sharding fsdp {problem}", "sharding")


def shard(
    components: Components,
    modules: Mapping[str, nn.Module],
    trained: dict[str, nn.Parameter],
    base: dict[str, Tensor],
    accelerator: Any,
) -> None:
    """Shard the components that train, in place, and bring them to the device, a block at a time.

    Every process calls it with the same weights.

    Args:
        components: The model.
        modules: The components that train, by name.
        trained: Weights of the model that train, by name: what they become replaces them.
        base: Their values before training, which are cut to the rows of this process.
        accelerator: What `make_accelerator` made.

    Raises:
        ConfigError: If processes could not call the text encoders equally often.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    encodes_apart = components.clip_skip and not components.zeros_for_empty_prompt
    if encodes_apart and len(modules) > 1:
        raise ConfigError(
            "sharding fsdp cannot train text encoders with clip_skip, which encodes the empty "
            "caption apart, where a process draws it; leave one of them out",
            "sharding",
        )
    places = {
        id(parameter): (module, name)
        for model in modules.values()
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
    }
    names = {name: places[id(parameter)] for name, parameter in trained.items()}
    trained.clear()  # Or each whole weight would live until all are sharded.
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for model in modules.values():
        whole = set(_kept_whole(model))
        inner = [part for part in model.modules() if type(part).__name__ in UNITS]
        for unit in [*reversed(inner), model]:
            # The outermost too: `FullWeights.base_weights` writes to what is sharded.
            fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
        model.to(accelerator.device)  # What is whole follows.
        for _, layer in adapted_layers(model):
            if is_sharded(layer.weight):
                layer.shard = _row_shard(layer.weight)
    trained.update({name: getattr(*place) for name, place in names.items()})
    for name in base:
        base[name] = local(trained[name]).clone()


def _kept_whole(model: nn.Module) -> Iterable[nn.Parameter]:
    yield from (parameter for parameter in model.parameters() if parameter.ndim < 2)
    for module in model.modules():
        if isinstance(module, WordEmbedding):
            yield module.rows
        if isinstance(module, AdaptedLayer):
            yield from module.adapters.parameters()
            if module.kind != "plain":  # Its rows are not outputs.
                yield module.weight


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is one process's part of a whole."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor, detached: the same memory."""
    whole: Any = tensor.detach()
    part: Tensor = whole.to_local() if is_sharded(tensor) else whole
    return part


def _row_shard(tensor: Tensor) -> RowShard:
    """Return this process's rows of a sharded tensor; torch gives the first ones one more."""
    rows, length = tensor.shape[0], len(local(tensor))
    each = -(-rows // dist.get_world_size())
    return RowShard(min(dist.get_rank() * each, rows), length, rows, add_up)


def add_up(tensor: Tensor) -> Tensor:
    """The sum over all processes."""
    tensor = tensor.contiguous()
    dist.all_reduce(tensor)
    return tensor


def own_part(tensor: Tensor, whole: Tensor) -> Tensor:
    """The part of a whole that a tensor has in this process."""
    return _row_shard(tensor).own(whole) if is_sharded(tensor) else whole


def exchange(tensor: nn.Parameter, values: Tensor) -> Tensor:
    """Exchange a parameter's values, of the rows of this process. Returns those that it had."""
    if not is_sharded(tensor):
        before, tensor.data = tensor.data, values
        return before
    part = local(tensor)  # What is gathered lies here, wherever ``.data`` points.
    before = part.clone()
    part.copy_(values)
    return before


def gather(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """The whole of a tensor on the CPU, in the first process; in others what is there is no use.

    Args:
        tensor: A parameter, or the local part of something that is sharded as one.
        like: That parameter.
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
    """Copy whole values into parameters, of which a process may have a part."""
    for name, parameter in parameters.items():
        local(parameter).copy_(own_part(parameter, values[name]))


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter], accelerator: Any) -> None:
    """Average the gradients of parameters that each process has whole over all processes."""
    if accelerator.num_processes == 1:
        return
    found = [parameter.grad for parameter in parameters if parameter.grad is not None]
    # Large ones one by one: joined, there would be a second copy of them.
    for gradient in (grad for grad in found if grad.numel() > _LARGE):
        gradient.copy_(add_up(gradient).div_(dist.get_world_size()))
    if small := [grad for grad in found if grad.numel() <= _LARGE]:
        mean = add_up(join(small)).div_(dist.get_world_size())
        torch._foreach_copy_(small, list(split_like(mean, small)))
