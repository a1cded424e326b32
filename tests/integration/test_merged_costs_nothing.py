"""A merged model is the base model with other numbers in it: nothing else runs at inference.

Time varies from run to run, what a model does does not: the test compares modules, hooks, tensors
and every operation that torch dispatches. `benchmarks/merged_step.py` measures the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dora_diffusion.adapters.inject import merge_adapters
from dora_diffusion.adapters.state import load_adapter
from dora_diffusion.export import export_checkpoint
from dora_diffusion.formats.adapter.file import AdapterFile, AdapterMetadata, write_adapter

# Each family and each form stands in one that is quick.
QUICK = [("sd1", "folder"), ("sd2", "file"), ("sdxl", "in memory")]
CASES = [
    pytest.param(*case, id="-".join(case), marks=[pytest.mark.slow] * (case not in QUICK))
    for case in product(["sd1", "sd2", "sdxl"], ["folder", "file", "in memory"])
]
COMPONENTS = ("unet", "text_encoder", "text_encoder_2", "vae")
HOOKS = [name for name in vars(nn.Module()) if name.endswith("_hooks")]


class Operations(TorchDispatchMode):
    """Every operation that torch runs, with the shapes and dtypes of its tensors, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, ...]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> torch.Tensor:
        tensors = [one for one in args if isinstance(one, torch.Tensor)]
        self.seen.append((str(func), *((tuple(one.shape), one.dtype) for one in tensors)))
        return func(*args, **(kwargs or {}))


def load(folder: Path) -> Any:
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(folder, local_files_only=True)


def components(pipeline: Any) -> Iterator[tuple[str, nn.Module]]:
    for name in COMPONENTS:
        if (model := getattr(pipeline, name, None)) is not None:
            # Torch multiplies matrices in another way where a gradient might be wanted.
            yield name, model.eval().requires_grad_(False)


def outputs(pipeline: Any) -> torch.Tensor:
    """One denoising step with guidance: text encoders, UNet and VAE."""
    extra = {"output_type": "pt", "width": 64, "height": 64, "guidance_scale": 5.0}
    generator = torch.Generator().manual_seed(0)
    return pipeline("a photo of sks dog", num_inference_steps=1, generator=generator, **extra)[0]


def operations(pipeline: Any) -> tuple[list[tuple[Any, ...]], torch.Tensor]:
    pipeline.set_progress_bar_config(disable=True)
    dict(components(pipeline))
    with Operations() as mode, torch.no_grad():
        image = outputs(pipeline)
    return mode.seen, image


def anatomy(pipeline: Any) -> dict[str, tuple[Any, ...]]:
    """Of each module: its class, its own tensors, and what hangs on it."""
    found = {}
    for component, model in components(pipeline):
        for path, module in model.named_modules():
            tensors = dict(module.named_parameters(recurse=False))
            tensors |= dict(module.named_buffers(recurse=False))
            own = {
                name: (tuple(one.shape), one.dtype, one.stride()) for name, one in tensors.items()
            }
            hooks = {name: len(getattr(module, name)) for name in HOOKS if hasattr(module, name)}
            forward = "forward" in vars(module)  # replaced on the instance
            found[f"{component}.{path}"] = (type(module), own, hooks, forward)
    return found


@pytest.fixture
def adapter(
    family: str, request: pytest.FixtureRequest, tmp_path: Path, random_adapter: Callable[..., Any]
) -> tuple[Path, Path]:
    """The base folder, and an adapter on all Linear and Conv2d layers."""
    base: Path = request.getfixturevalue(f"{family}_folder")
    layers = random_adapter(base)
    return base, write_adapter(tmp_path / "a", AdapterFile(layers, AdapterMetadata(family)))


@pytest.mark.parametrize(("family", "form"), CASES)
def test_merged_models_run_as_the_base_does(
    family: str, adapter: tuple[Path, Path], tmp_path: Path, form: str
) -> None:
    import diffusers

    folder, path = adapter
    base = load(folder)
    if form == "folder":
        merged = load(export_checkpoint(folder, path, tmp_path / "merged"))
    elif form == "file":
        file = export_checkpoint(folder, path, tmp_path / "merged.safetensors")
        name = "StableDiffusionXLPipeline" if family == "sdxl" else "StableDiffusionPipeline"
        merged = getattr(diffusers, name).from_single_file(
            str(file), config=str(folder), local_files_only=True
        )
        merged.scheduler = base.scheduler
    else:
        merged = load(folder)
        load_adapter({n: m for n, m in components(merged) if n != "vae"}, path)
        adapted, _ = operations(merged)
        for _, model in components(merged):
            merge_adapters(model)
    wanted, before = operations(base)
    seen, after = operations(merged)
    assert len(seen) > 500
    assert seen == wanted
    assert not torch.equal(before, after)
    # Afterwards, since transformers hangs hooks of its own on a model that has run.
    theirs, ours = anatomy(base), anatomy(merged)
    assert {path: one for path, one in ours.items() if theirs.get(path) != one} == {}
    assert ours.keys() == theirs.keys()
    if form == "in memory":  # what an adapter costs before it is merged is seen
        assert len(adapted) > len(wanted) + 100
