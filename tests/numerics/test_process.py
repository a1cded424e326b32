"""A flow against Diffusers' scheduler, and its loss weights against those of the noise."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from dora_diffusion.numerics.process import Diffusion, Flow

SHIFTS = pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
TIMES = torch.arange(999)  # Pure noise has an SNR of 0.


@SHIFTS
def test_a_flow_is_that_of_the_scheduler(shift: float) -> None:
    """To the bit: its timesteps count down from pure noise."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    flow, every = Flow(1000, shift), torch.arange(1000)
    assert torch.equal(flow.time(every), scheduler.sigmas.flip(0))
    latents, noise = torch.randn(2, 1000, 4, 2, 2)
    wanted = scheduler.scale_noise(latents, scheduler.timesteps.flip(0), noise)
    torch.testing.assert_close(flow.add_noise(latents, noise, every), wanted, rtol=0, atol=5e-7)
    assert torch.equal(flow.target(latents, noise, every), noise - latents)


def share(shift: float) -> torch.Tensor:
    """Shares of noise in float64, by the definition of the shift."""
    even = (TIMES.double() + 1) / 1000
    return shift * even / (1 + (shift - 1) * even)


@SHIFTS
def test_weights_are_those_of_the_error_of_the_noise(shift) -> None:
    """A velocity predicts noise: from x = (1 - s) x0 + s e and v = e - x0, e = x + (1 - s) v."""
    s, generator = share(shift).view(-1, 1), torch.Generator().manual_seed(1)
    clean, noise, error = torch.randn(3, len(TIMES), 8, generator=generator, dtype=torch.float64)
    noisy, predicted = (1 - s) * clean + s * noise, noise - clean + error
    predicted_noise = noisy + (1 - s) * predicted
    snr = ((1 - s) / s).square().flatten()
    by_noise = (predicted_noise - noise).square().mean(1) * snr.clamp(max=5) / snr
    weight = Flow(1000, shift).weight(TIMES, 5.0)
    assert weight is not None
    ours = error.square().mean(1) * weight.double()
    torch.testing.assert_close(ours, by_noise, rtol=2e-3, atol=1e-9)
    # At pure noise the input is the noise, so that no prediction of it has an error.
    assert Flow(1000, shift).weight(torch.tensor([999]), 5.0).tolist() == [0.0]


@SHIFTS
def test_huber_deltas_are_by_the_ratio_of_noise(shift: float) -> None:
    """As in sd-scripts, (1 - c) / (1 + sigma) ^ 2 + c, with the noise over the signal as sigma."""
    s = share(shift)
    wanted = 0.9 / (1 + s / (1 - s)).square() + 0.1
    ours = Flow(1000, shift).huber_delta(TIMES, "snr", 0.1).double()
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6)
    assert Flow(1000, shift).huber_delta(torch.tensor([999]), "snr", 0.1).item() == pytest.approx(
        0.1
    )
    exponential = Flow(1000, shift).huber_delta(TIMES, "exponential", 0.1).double()
    torch.testing.assert_close(exponential, 0.1 ** (TIMES.double() / 1000), rtol=1e-5, atol=0)


@SHIFTS
def test_measured_timesteps_are_even_in_noise(shift: float) -> None:
    flow = Flow(1000, shift)
    even = (torch.arange(10) + 0.5) / 10
    assert float((flow.time(flow.spaced(10)) - even).abs().max()) < 1.1 * shift / 1000


def test_measured_timesteps_without_a_shift_are_those_of_a_diffusion() -> None:
    diffusion, flow = Diffusion(torch.linspace(1, 0, 1000), "epsilon"), Flow(1000)
    wanted = [50, 150, 250, 350, 450, 550, 650, 750, 850, 950]
    assert diffusion.spaced(10).tolist() == flow.spaced(10).tolist() == wanted
    assert diffusion.spaced(3).tolist() == [166, 500, 833]
