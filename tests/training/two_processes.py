"""Trains each of several configurations by two processes, which are one until they have imported.

``python -m tests.training.two_processes CONFIGS.json OUTCOME [wrong]``: each process writes a file
``OUTCOME-RANK.json`` on what came of each configuration, and of sharded layers by themselves. With
``wrong``, the second process has a gradient of NaN at step 3 of the last one, and each tells its
error.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


def main(configs: str, outcome: str, wrong: str = "") -> None:
    from diffusers import StableDiffusionPipeline  # noqa: F401
    from transformers import CLIPTextModel  # noqa: F401

    import dora_diffusion.training.recipe

    reader, writer = os.pipe()
    child = os.fork()
    if child:
        # It listens from here on: a port that is only chosen may be another program's by then.
        options = {"is_master": True, "multi_tenant": True, "wait_for_workers": False}
        store = dist.TCPStore("127.0.0.1", 0, **options)
        port = str(store.port)
        os.write(writer, port.encode())
    else:
        port = os.read(reader, 5).decode()
    rank = str(int(child == 0))
    os.environ |= {
        "ACCELERATE_USE_CPU": "true", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank,
    }  # fmt: skip
    torch.set_num_threads(1)
    plain, recipe = json.loads(Path(configs).read_text("utf-8")), dora_diffusion.training.recipe
    last = plain.pop() if wrong else None
    told = {"layers": layers(), **train_all(plain, recipe)}
    if last is not None:
        told["error"] = error_of(last, recipe, has_nan=not child)
    told["seconds"] = sum(os.times()[:2])
    Path(f"{outcome}-{rank}.json").write_text(json.dumps(told), encoding="utf-8")
    dist.destroy_process_group()
    if child:
        os.waitpid(child, 0)


def train_all(configs: Sequence[Mapping[str, Any]], recipe: Any) -> dict[str, Any]:
    from accelerate import PartialState

    from dora_diffusion.config import TrainConfig

    sizes: list[dict[str, Any]] = []
    assemble = recipe.assemble
    recipe.assemble = lambda *args, **kwargs: _measured(assemble(*args, **kwargs), sizes)
    # The next run goes on with the same processes.
    PartialState.destroy_process_group = lambda self, group=None: None
    results = [recipe.train(TrainConfig.from_dict(settings)) for settings in configs]
    return {"sizes": sizes, "tells": [bool(made.adapter or made.model) for made in results]}


def error_of(settings: Mapping[str, Any], recipe: Any, *, has_nan: bool) -> str:
    """Result of a run of which this process has a gradient that is not finite, or not."""
    from dora_diffusion.config import TrainConfig
    from dora_diffusion.training.metrics import TrainingError
    from dora_diffusion.training.step import Step

    real, calls = Step.losses, [0]

    def losses(self: Step, *given: Any) -> Any:
        calls[0] += 1
        # The slope of a root at 0: the loss is what it was, its gradient is NaN.
        return [
            loss + (loss - loss.detach()).sqrt() if has_nan and calls[0] == 3 else loss
            for loss in real(self, *given)
        ]

    Step.losses = losses  # type: ignore[method-assign]
    try:
        recipe.train(TrainConfig.from_dict(settings))
    except TrainingError as error:
        return str(error)
    return ""


def _measured(run: Any, sizes: list[dict[str, Any]]) -> Any:
    """Note a run's matrices that are alive in this process and all, in bytes, and its units."""
    alive, whole, units = {}, 0, Counter[str]()
    for model in run.weights.modules.values():
        units.update(type(m).__name__ for m in model.modules() if type(m).__name__[:4] == "FSDP")
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and ".adapters." not in name:
                here = parameter.to_local() if hasattr(parameter, "to_local") else parameter
                storage = here.untyped_storage()
                alive[storage.data_ptr()] = storage.nbytes()
                whole += parameter.numel() * parameter.element_size()
    sizes.append({"alive": sum(alive.values()), "whole": whole, "units": units})
    return run


def layers() -> dict[str, Any]:
    """Error of gradients through sharded layers against whole ones, and their parts.

    Three and five outputs over two processes; an activation in place, after which a layer's output
    is no good for the gradient of m.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from dora_diffusion import AdapterConfig, inject_adapters
    from dora_diffusion.adapters.inject import adapter_parameters
    from dora_diffusion.adapters.layers import adapted_layers
    from dora_diffusion.adapters.scope import norm_scope
    from dora_diffusion.training import processes

    told: dict[str, Any] = {"errors": [], "norms": []}
    for axis in ("output", "input"):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True), nn.Linear(3, 5))
        inject_adapters(model, AdapterConfig(targets=("*",), rank=2, norm_axis=axis))
        with torch.no_grad():
            for parameter in adapter_parameters(model):
                parameter.add_(0.3 * torch.randn_like(parameter))
        x, before = torch.randn(6, 4), [layer.weight.clone() for _, layer in adapted_layers(model)]
        expected = _gradients(model, x, norm_scope, adapter_parameters)
        mesh = init_device_mesh("cpu", (2,))
        fully_shard(model, mesh=mesh, ignored_params=set(processes._kept_whole(model)))
        sharded = [layer for _, layer in adapted_layers(model)]
        for layer in sharded:
            layer.shard = processes._row_shard(layer.weight)
        found = _gradients(model, x, norm_scope, adapter_parameters)
        told["errors"] += [float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)]
    told["rows"] = [len(processes.local(layer.weight)) for layer in sharded]
    told["own"] = [
        torch.equal(processes.own_part(layer.weight, whole), processes.local(layer.weight))
        for layer, whole in zip(sharded, before, strict=True)
    ]
    gathered = [processes.gather(layer.weight) for layer in sharded]
    told["whole"] = [torch.equal(*pair) for pair in zip(gathered, before, strict=True)]
    return told


def _gradients(model: nn.Module, x: torch.Tensor, scope: Any, parameters: Any) -> list[Any]:
    model.zero_grad()
    with scope(model):
        model(x).square().mean().backward()
    return [parameter.grad.clone() for parameter in parameters(model)]


if __name__ == "__main__":
    main(*sys.argv[1:])
