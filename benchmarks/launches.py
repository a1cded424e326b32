"""Operations that one training step dispatches to a GPU, counted without one.

    python benchmarks/launches.py
    python benchmarks/launches.py --family sdxl --precision float32 --text-encoders
    python benchmarks/launches.py --packs 1 2 4 8 --peers    # several subjects in one step

At batch 1 a GPU runs as fast as operations are issued, so their number is the time. Models of full
size are made of fake tensors (`fake_gpu`); nothing is computed, and every count is exact.
Forward and backward of UNet (and text encoders), norms, clipping, and AdamW. In bf16 our peers have
autocast, as Diffusers' scripts train them; training here does without.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import flow_models
import torch
from common import (
    FROZEN,
    LOOP,
    LOOP_CACHED,
    LORA,
    OUR_WAYS,
    PEFT_DORA,
    Scope,
    flat_by_role,
    kept_storages,
    markdown,
)
from fake_gpu import DEVICE, Count, fake_gpu
from full_size import CLIP_BIG_G, CLIP_L, UNETS
from torch import Tensor, nn

from dora_diffusion.adapters.inject import AdapterSet, inject_adapters
from dora_diffusion.adapters.layers import adapted_layers
from dora_diffusion.adapters.scope import NormCache, norm_scope
from dora_diffusion.adapters.stack import AdapterStack
from dora_diffusion.adapters.targets import match_targets
from dora_diffusion.config import AdapterConfig

OWN_LORA = "this LoRA"
PEERS = (FROZEN, LORA, PEFT_DORA, *OUR_WAYS, OWN_LORA)
PACK = "a pack of "
PHASES = ("norms", "forward", "backward", "clip", "optimizer")
LATENTS = {"sd1": 64, "sdxl": 128, "z-image": 128, "flux2-klein": 128,
           "flux2-klein-9b": 128, "anima": 128}  # fmt: skip
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Models:
    """A UNet and its text encoders, with what one peer trains on them.

    Attributes:
        ours: Whether the adapters are ours, which need no autocast.
        loop: Scope of a step in a training loop of another program.
    """

    unet: nn.Module
    text_encoders: list[nn.Module]
    layers: int = 0
    ours: bool = False
    is_pack: bool = False
    loop: Scope | None = None
    counts: dict[str, Count] = field(default_factory=dict)
    kept: int = 0

    def all(self) -> list[nn.Module]:
        """Every model that is in the step."""
        return [self.unet, *self.text_encoders]

    def parameters(self) -> list[nn.Parameter]:
        """Trained parameters."""
        return [p for model in self.all() for p in model.parameters() if p.requires_grad]

    def weights(self) -> int:
        """Numbers in the adapted base weights."""
        return sum(
            module.weight.numel()
            for model in self.all()
            for module in model.modules()
            if hasattr(module, "adapters")
        )


def make(name: str, family: str, dtype: torch.dtype, targets: str, text: bool) -> Models:
    """The models of a family on the fake device, with a peer's adapters on them."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    if family in UNETS:
        unet: nn.Module = UNet2DConditionModel(**UNETS[family])
    else:
        unet = flow_models.make_transformer(family)
    unet = unet.to(DEVICE, dtype)
    encoders: list[nn.Module] = []
    if text:
        encoders.append(CLIPTextModel(CLIPTextConfig(vocab_size=49408, **CLIP_L)))
    if text and family == "sdxl":
        config = CLIPTextConfig(vocab_size=49408, **CLIP_BIG_G)
        encoders.append(CLIPTextModelWithProjection(config))
    models = Models(
        unet,
        [e.to(DEVICE, dtype) for e in encoders],
        ours=name in (*OUR_WAYS, OWN_LORA) or name.startswith(PACK),
        is_pack=name.startswith(PACK),
    )
    if name in (LOOP, LOOP_CACHED):
        cache = NormCache() if name == LOOP_CACHED else None
        models.loop = lambda: norm_scope(*models.all(), cache=cache)
    for model in models.all():
        layers = targets if model is unet else "text-encoder-attention"
        models.layers += adapt(name, model.requires_grad_(False).train(), layers)
    return models


def adapt(name: str, model: nn.Module, targets: str) -> int:
    """Attach a peer's adapters to a model. Returns how many layers it has them on."""
    paths = match_targets(model, [targets])
    if name.startswith(PACK):
        config = AdapterConfig(targets=(targets,), rank=8, conv_rank=8)
        for number in range(subjects_of(name)):
            inject_adapters(model, config, name=str(number))
    elif name in (*OUR_WAYS, OWN_LORA):
        dora = name != OWN_LORA
        config = AdapterConfig(targets=(targets,), rank=8, conv_rank=8, use_dora=dora)
        inject_adapters(model, config)
    elif name != FROZEN:
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(r=8, lora_alpha=8, use_dora=name == PEFT_DORA, target_modules=paths)
        inject_adapter_in_model(config, model)
        # Diffusers' scripts keep what trains in float32.
        for module in model.modules():
            for key, parameter in list(module._parameters.items()):
                if parameter is not None and parameter.requires_grad:
                    module._parameters[key] = nn.Parameter(parameter.detach().float())
    return len(paths)


def subjects_of(name: str) -> int:
    """Return the number of subjects that a peer trains in a step."""
    return int(name.removeprefix(PACK)) if name.startswith(PACK) else 1


def predict(models: Models, family: str, dtype: torch.dtype, latent: int, batch: int = 1) -> Tensor:
    """The denoiser's prediction for a batch, its prompts encoded where encoders train."""
    if family not in UNETS:
        return flow_models.predict(models.unet, family, dtype, 8 * latent, batch)
    states = torch.empty(
        batch, 77, UNETS[family]["cross_attention_dim"], device=DEVICE, dtype=dtype
    )
    pooled = torch.empty(batch, 1280, device=DEVICE, dtype=dtype)
    if models.text_encoders:
        tokens = torch.zeros(batch, 77, dtype=torch.int64, device=DEVICE)
        outputs = [e(tokens, output_hidden_states=True) for e in models.text_encoders]
        states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        pooled = outputs[-1][0]
    inputs: dict[str, Any] = {}
    if family == "sdxl":
        ids = torch.empty(batch, 6, device=DEVICE)
        inputs["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids}
    latents = torch.empty(batch, 4, latent, latent, device=DEVICE, dtype=dtype)
    latents.requires_grad_(not models.parameters())
    timesteps = torch.empty(batch, device=DEVICE, dtype=torch.int64)
    output: Tensor = models.unet(latents, timesteps, states, **inputs).sample
    return output


@contextmanager
def phase(models: Models, name: str) -> Iterator[None]:
    """Count what is dispatched inside as one phase of the step."""
    models.counts[name] = Count()
    with models.counts[name]:
        yield


def count_step(
    models: Models,
    family: str,
    dtype: torch.dtype,
    latent: int,
    subjects: int = 1,
    steps: int = 2,
    passes: int = 1,
) -> None:
    """Count the second of two steps: the first makes the optimizer's state and statistics.

    Ours has an adapter, a row and an optimizer for each of so many subjects. Of several passes of
    gradient accumulation the last one is counted.
    """
    groups = [models.parameters()]
    stack, flats = None, []
    if models.ours and models.loop is None:
        layers = [layer for model in models.all() for _, layer in adapted_layers(model)]
        adapters = [[*layer.adapters.values()] for layer in layers]
        order = [] if models.is_pack else AdapterSet.of(*models.all()).parameters()
        for own in zip(*adapters, strict=True):
            flats.append(flat_by_role(own, order))
        stack = AdapterStack(layers, adapters, flats[0].memory if order else None)
        groups = [list(flat) for flat in flats]
    optimizers = [torch.optim.AdamW(own, fused=True) for own in groups if own]
    cast, rows = dtype != torch.float32 and not models.ours, list(range(subjects))
    scope = stack.scope if stack else models.loop or nullcontext
    for _ in range(steps):
        opened = ExitStack()
        with phase(models, "norms"):
            opened.enter_context(scope())
            opened.enter_context(stack.of(rows) if stack else nullcontext())
        for number in range(passes):
            with phase(models, "forward"), torch.autocast(DEVICE, dtype, enabled=cast):
                prediction = predict(models, family, dtype, latent, subjects)
            upstream = torch.empty_like(prediction)
            with phase(models, "backward"):
                prediction.backward(upstream)
                if number == passes - 1:
                    opened.close()
        with phase(models, "clip"):
            for flat in flats:
                flat.take_gradients()
            for own in groups:
                torch.nn.utils.clip_grad_norm_(own, 1.0)
        with phase(models, "optimizer"):
            for optimizer in optimizers:
                optimizer.step()
            for flat in flats:
                flat.finish()
        for parameter in (parameter for own in groups for parameter in own):
            parameter.grad = None
    frozen = (tensor for m in models.all() for tensor in (*m.parameters(), *m.buffers()))
    with ExitStack() as opened:
        opened.enter_context(Count())
        opened.enter_context(scope())
        opened.enter_context(stack.of(rows) if stack else nullcontext())
        kept = opened.enter_context(kept_storages(frozen))
        with torch.autocast(DEVICE, dtype, enabled=cast):
            prediction = predict(models, family, dtype, latent, subjects)
        models.kept = sum(kept.values())


def row(name: str, models: Models) -> list[object]:
    """A peer's line of the table."""
    counts = models.counts
    step = [counts[name] for name in ("norms", "forward", "backward")]
    whole = list(counts.values())
    traffic = counts["norms"].bytes / max(1, models.weights())
    return [
        name,
        models.layers if name != FROZEN else 0,
        *(f"{counts[name].total:,}" for name in PHASES),
        f"{sum(count.total for count in step):,}",
        f"{sum(count.views for count in whole):,}",
        f"{sum(count.copies for count in whole)}, {sum(c.synchronisations for c in whole)}",
        f"{sum(count.bytes for count in step) / 1e9:.1f}",
        f"{traffic:.1f}" if models.ours else "",
        f"{models.kept / 1e6:,.0f}",
    ]


HEADER = (
    "", "layers", *PHASES, "norms + forward + backward", "views, whole step",
    "copies, waits", "GB of operands", "bytes per weight of the norms", "kept for backward, MB",
)  # fmt: skip


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", nargs="+", choices=tuple(LATENTS), default=list(UNETS))
    parser.add_argument("--precision", nargs="+", choices=tuple(DTYPES), default=["bf16"])
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS)
    parser.add_argument("--packs", nargs="*", type=int, default=[], help="subjects in a pack")
    parser.add_argument("--targets", default="attention+conv")
    parser.add_argument("--text-encoders", action="store_true", help="train them too")
    parser.add_argument("--passes", type=int, default=1, help="of accumulation; count the last")
    parser.add_argument("--operations", type=int, default=0, help="list so many of each phase")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    for family in args.family:
        for precision in args.precision:
            rows, details = [], []
            for name in (*args.peers, *(f"{PACK}{count}" for count in args.packs)):
                with fake_gpu():
                    dtype = DTYPES[precision]
                    models = make(name, family, dtype, args.targets, args.text_encoders)
                    count_step(
                        models,
                        family,
                        dtype,
                        LATENTS[family],
                        subjects_of(name),
                        passes=args.passes,
                    )
                rows.append(row(name, models))
                for key, count in models.counts.items():
                    details.append((name, key, count.operations.most_common(args.operations)))
            encoders = ", text encoders too" if args.text_encoders else ""
            side = 8 * LATENTS[family]
            last = f", pass {args.passes}" if args.passes > 1 else ""
            print(f"\n{family}, {side} px, {precision}, {args.targets}{encoders}{last}\n")
            print(markdown(HEADER, rows), flush=True)
            for detail in details if args.operations else ():
                print(*detail)


if __name__ == "__main__":
    main()
