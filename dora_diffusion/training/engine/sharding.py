"""One model over several devices: weights in parts, by torch's ``fully_shard`` (FSDP2).

Matrices and kernels of the UNet, and of text encoders that train, are sharded by rows: each process
has a part of every weight, and a block's weights are whole only while that block computes. Vectors,
adapters and new words are whole in every process, and their gradients are averaged once for each
step. All processes must therefore call a sharded model equally often.

Accelerate launches the processes, and its launcher may ask for this too. Its own preparation of
FSDP2 takes model and optimizer together, shards adapters, and knows no CPU processes.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dora_diffusion.adapters.layers import AdaptedLayer, adapted_layers
from dora_diffusion.adapters.norms.factors import RowShard
from dora_diffusion.adapters.norms.layout import join, split_like
from dora_diffusion.config import ConfigError, TrainConfig
from dora_diffusion.config.fields import require
from dora_diffusion.models.components import Components
from dora_diffusion.models.words import WordEmbedding
from dora_diffusion.training.engine.parameters import Groups, SteppedParameters

# By name: importing their classes imports Diffusers. What is in none of these is gathered with the
# whole model.
UNITS = (
    "BasicTransformerBlock",
    "Transformer2DModel",
    "ResnetBlock2D",
    "Downsample2D",
    "Upsample2D",
    "CLIPEncoderLayer",
)
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
        _check_launch()
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


def _check_launch() -> None:
    version = os.environ.get("FSDP_VERSION", "1")
    require(version == "2", f"FSDP {version} is not supported; add --fsdp_version 2", "sharding")
    for variable, (value, reason) in _LAUNCHED.items():
        require(not _is_set(variable, value), f"sharding: {reason}", "sharding")


def _check_settings(config: TrainConfig) -> None:
    """Refuse what sharding excludes."""
    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    holds = {subject.is_image_free for subject in config.subjects}
    is_full, optimizer = config.is_full, config.optimizer_name
    problems = {
        f"needs torch 2.7 or newer, this is {torch.__version__}": release < (2, 7),
        "excludes compile: compiled blocks do not gather their weights": config.compile,
        "excludes offload model: each process keeps its part on its device": (
            config.offload == "model"
        ),
        f"of full fine-tuning excludes optimizer {optimizer}, which looks at whole weights; use "
        "adamw": is_full and optimizer != "adamw",
        "of full fine-tuning excludes mixed_precision fp16; use bf16": (
            is_full and config.mixed_precision == "fp16"
        ),
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
        options: dict[str, Any] = {
            "mesh": mesh,
            # The outermost too: `FullWeights.base_weights` writes to what is sharded.
            "reshard_after_forward": True,
            "ignored_params": set(_kept_whole(model)),
        }
        inner = [part for part in model.modules() if type(part).__name__ in UNITS]
        for unit in [*reversed(inner), model]:
            fully_shard(unit, **options)
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
    part, each = local(tensor), -(-like.shape[0] // dist.get_world_size())
    padded = part.new_zeros(each, *part.shape[1:])
    padded[: len(part)] = part
    is_first = dist.get_rank() == 0
    parts = [torch.empty_like(padded) for _ in range(dist.get_world_size())] if is_first else None
    dist.gather(padded, parts, dst=0)
    return torch.cat(parts)[: like.shape[0]].cpu() if parts else part


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """The mean over all processes of the gradients of parameters that each has whole."""
    found = [parameter.grad for parameter in parameters if parameter.grad is not None]
    # Large ones one by one: joined, there would be a second copy of them.
    for gradient in (grad for grad in found if grad.numel() > _LARGE):
        gradient.copy_(add_up(gradient).div_(dist.get_world_size()))
    if small := [grad for grad in found if grad.numel() <= _LARGE]:
        mean = add_up(join(small)).div_(dist.get_world_size())
        torch._foreach_copy_(small, list(split_like(mean, small)))


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
        return self._with_moments(state, lambda moment, member: gather(moment, member))

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
