"""Number of operations a step dispatches to a GPU, exact, on a device of fake tensors."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from torch.utils import backend_registration

ROOT = Path(__file__).parents[3]

COUNTS = """
    import contextlib, json, sys
    sys.path.insert(0, "benchmarks")
    import torch
    from fake_gpu import DEVICE, Count, fake_gpu
    from torch import nn
    from dora_diffusion.adapters.inject import adapter_parameters, inject_adapters
    from dora_diffusion.adapters.layers import adapted_layers
    from dora_diffusion.adapters.scope import NormCache, norm_scope
    from dora_diffusion.adapters.stack import AdapterStack
    from dora_diffusion.config import AdapterConfig
    from dora_diffusion.training.optimizer import FlatParameters

    def layers(kind, count, bias):
        if kind == "Linear":
            return [nn.Linear(32, 32, bias=bias, device=DEVICE) for _ in range(count)]
        return [nn.Conv2d(32, 32, 3, padding=1, bias=bias, device=DEVICE) for _ in range(count)]

    def opened(model, way, cache, stack):
        scopes = contextlib.ExitStack()
        if way == "run":
            scopes.enter_context(stack.scope())
            scopes.enter_context(stack.of(0))
        else:
            scopes.enter_context(norm_scope(model, cache=cache if way == "cache" else None))
        return scopes

    def step(kind, count, bias, axis, dtype=torch.bfloat16, way="cache"):
        model = nn.Sequential(*layers(kind, count, bias)).to(dtype)
        config = AdapterConfig(targets=("full",), rank=4, conv_rank=4, norm_axis=axis)
        inject_adapters(model, config)
        shape = (2, 9, 32) if kind == "Linear" else (2, 32, 8, 8)
        x = torch.empty(shape, device=DEVICE, dtype=dtype, requires_grad=True)
        flat = FlatParameters([{"params": list(adapter_parameters(model))}])
        parameters, cache = flat.groups[0]["params"], NormCache()
        own = [layer for _, layer in adapted_layers(model)]
        stack = AdapterStack(own, [[*layer.adapters.values()] for layer in own])
        optimizer = torch.optim.AdamW(parameters, fused=True)
        for _ in range(2):
            counts = {name: Count() for name in ("norms", "forward", "backward", "rest")}
            with counts["norms"]:
                scope = opened(model, way, cache, stack)
            with counts["forward"]:
                y = model(x)
            upstream = torch.empty_like(y)
            with counts["backward"]:
                y.backward(upstream)
                scope.close()
            with counts["rest"]:
                flat.take_gradients()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                flat.finish()
        waits = sum(count.synchronisations for count in counts.values())
        return [*(count.total for count in counts.values()), waits]

    def casts(device):
        # Of a parameter, of a view of it and of an activation, each used twice in two contexts.
        weight = nn.Parameter(torch.ones(4, 4, device=device))
        x = torch.ones(2, 4, device=device, dtype=torch.bfloat16)
        made = []
        for use in (lambda: weight, lambda: weight.t(), lambda: weight * 1):
            with Count(device if device == DEVICE else None) as count:
                for _ in range(2):
                    with torch.autocast(device, torch.bfloat16):
                        second = use()
                        (x @ second) @ second
            made.append(count.operations["_to_copy"])
        return made

    found = {"casts of cpu": casts("cpu")}
    with fake_gpu():
        found["casts"] = casts(DEVICE)
        for kind in ("Linear", "Conv2d"):
            found[f"{kind} float32"] = step(kind, 3, True, "output", torch.float32)
            for way in ("run", "scope"):
                found[f"{kind} {way}"] = step(kind, 3, True, "output", way=way)
            for bias in (True, False):
                for axis in ("output", "input"):
                    found[f"{kind} {bias} {axis}"] = step(kind, 3, bias, axis)
    print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def counts() -> dict[str, Any]:
    """By kind, bias and axis: norms, forward, backward and the rest of a step, and waits."""
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch has no devices written in Python")
    command = [sys.executable, "-c", textwrap.dedent(COUNTS)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, encoding="utf-8")
    assert done.stdout, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


KINDS = [
    *(f"{kind} {bias} {axis}" for kind in ("Linear", "Conv2d") for bias in (True, False)
      for axis in ("output", "input")),
    *(f"{kind} {way}" for kind in ("Linear", "Conv2d") for way in ("float32", "run", "scope")),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["Linear", "Conv2d"])
def test_a_scope_of_ones_own_dispatches_what_a_run_does(counts: dict[str, Any], kind: str) -> None:
    """But for two operations at most, however many layers there are."""
    run, scope = (sum(counts[f"{kind} {way}"][:3]) for way in ("run", "scope"))
    assert abs(scope - run) <= 2


@pytest.mark.parametrize("kind", KINDS)
def test_clipping_and_optimizer_do_not_grow_with_layers_and_nothing_waits(
    counts: dict[str, Any], kind: str
) -> None:
    """One copy of gradients; the norm of all of them, its limit and the scaling; one AdamW."""
    *_, rest, waits = counts[kind]
    assert rest <= 12
    assert waits == 0


def test_autocast_casts_a_parameter_once_as_torchs_own_does(counts: dict[str, Any]) -> None:
    """Torch's keeps what it cast of parameters until the context ends."""
    assert counts["casts"] == counts["casts of cpu"] == [2, 4, 4]
