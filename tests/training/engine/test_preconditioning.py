"""Riemannian preconditioning: the dense formula, and steps that do not see how B A is divided."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dora_diffusion.adapters.inject import layer_adapters
from dora_diffusion.adapters.layers import LayerAdapter
from dora_diffusion.config import TrainConfig
from dora_diffusion.config.derived import without_effect
from dora_diffusion.numerics.weights import LayerWeights
from dora_diffusion.training.engine.preconditioning import Preconditioner
from tests.training.helpers import open_run

SHAPES = [((3, 5), (4, 3)), ((2, 4, 3, 3), (6, 2, 1, 1)), ((3, 5), (4, 3)), ((3, 7), (4, 3))]


def adapter(number: int, dtype: torch.dtype = torch.float32) -> LayerAdapter:
    """An adapter of some shape, with gradients."""
    generator = torch.Generator().manual_seed(number)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    down, up = SHAPES[number]
    made = LayerAdapter(LayerWeights(draw(*down), draw(*up), draw(up[0]), alpha=2.0))
    for parameter in made.parameters():
        parameter.grad = draw(*parameter.shape)
    return made


def test_it_is_the_dense_formula_and_leaves_magnitudes_and_unused_layers_alone() -> None:
    damping = 0.3
    adapters = [adapter(number) for number in range(4)]
    expected = [adapter(number, torch.float64) for number in range(4)]
    for own in (adapters[2], expected[2]):
        for parameter in own.parameters():
            parameter.grad = None
    Preconditioner(adapters, damping)()
    for own, dense in zip(adapters, expected, strict=True):
        if dense.down.grad is None:
            assert own.down.grad is own.up.grad is None
            continue
        a, b = dense.down.detach().flatten(1), dense.up.detach().flatten(1)
        eye = damping * torch.eye(len(a), dtype=torch.float64)
        down = torch.linalg.solve(b.T @ b + eye, dense.down.grad.flatten(1))
        up = torch.linalg.solve(a @ a.T + eye, dense.up.grad.flatten(1).T).T
        torch.testing.assert_close(own.down.grad.flatten(1).double(), down, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(own.up.grad.flatten(1).double(), up, rtol=1e-5, atol=1e-5)
        assert torch.equal(own.magnitude.grad.double(), dense.magnitude.grad.float().double())


@pytest.mark.parametrize("number", [0, 1])
def test_a_step_does_not_depend_on_how_an_update_is_divided(number: int) -> None:
    """Of ``(c B, A / c)`` the gradients are ``g_B / c`` and ``c g_A``: plain steps move apart."""

    def moved(c: float, preconditions: bool) -> Tensor:
        own = adapter(number, torch.float64)
        with torch.no_grad():
            own.up.mul_(c)
            own.down.div_(c)
        own.up.grad.div_(c)
        own.down.grad.mul_(c)
        if preconditions:
            Preconditioner([own], 1e-12)()
        up, down = own.up - 0.1 * own.up.grad, own.down - 0.1 * own.down.grad
        return up.flatten(1) @ down.flatten(1)

    torch.testing.assert_close(moved(7.0, True), moved(1.0, True), rtol=1e-8, atol=1e-8)
    assert (moved(7.0, False) - moved(1.0, False)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("optimizer", "init"), [("adamw", "random"), ("adamw", "pissa"), ("adafactor", "random")]
)
def test_a_run_preconditions_its_clipped_gradients(
    sd1_folder: Path, photos: Path, tmp_path: Path, optimizer: str, init: str
) -> None:
    damping, limit = 0.05, 1e-2
    got: list[list[dict[str, Tensor]]] = []
    norms, adapters = [], []
    for preconditions in (False, True):
        session = open_run(
            sd1_folder, photos, tmp_path / "out", precondition=preconditions, init=init,
            optimizer=optimizer, train_text_encoder=True, max_grad_norm=limit,
            precondition_damping=damping,
        )  # fmt: skip
        learner, models = session.learner, session.weights.modules.values()
        adapters = [adapter for model in models for adapter in layer_adapters(model)]

        def note() -> None:
            learner.parameters.share_gradients()  # noqa: B023
            parts = [dict(own.named_parameters()).items() for own in adapters]  # noqa: B023
            got.append([{name: p.grad.double().clone() for name, p in own} for own in parts])

        learner.optimizer.step = note
        norms.append(float(session.step(1)["grad_norm"]))
    assert norms[0] == norms[1] > limit
    total = sum(grad.square().sum() for own in got[0] for grad in own.values())
    assert float(total.sqrt()) == pytest.approx(limit, rel=1e-3)
    for own, plain, changed in zip(adapters, *got, strict=True):
        start = own.parametrization
        a, b = own.down.detach().double(), own.up.detach().double()
        if init == "pissa":
            a, b = a + start.start_down, b + start.start_up
        a, b = a.flatten(1), b.flatten(1)
        eye = damping * torch.eye(len(a), dtype=torch.float64)
        down = torch.linalg.solve(b.T @ b + eye, plain["down"].flatten(1))
        up = torch.linalg.solve(a @ a.T + eye, plain["up"].flatten(1).T).T
        for name, wanted in (("down", down), ("up", up), ("magnitude", plain["magnitude"])):
            torch.testing.assert_close(
                changed[name].flatten(1) if wanted.ndim > 1 else changed[name],
                wanted, rtol=1e-3, atol=float(1e-4 * wanted.abs().max()),
            )  # fmt: skip


@pytest.mark.parametrize(
    "settings", [{"parametrization": "vera"}, {"parametrization": "adalora"}, {"method": "full"}]
)
def test_where_it_has_no_effect_that_is_said(settings: dict[str, str]) -> None:
    config = TrainConfig(precondition=True, precondition_damping=0.1, **settings)
    ((name, value),) = settings.items()
    assert not config.preconditions
    assert set(without_effect(config).values()) >= {
        f"{setting} has no effect because {name} is {value}"
        for setting in ("precondition", "precondition_damping")
    }
