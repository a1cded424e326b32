"""The emulated Apple GPU refuses what the real one refuses, and computes what a CPU computes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.apple import apple_gpu
from tests.emulation import unsupported_operators


def test_operators_are_those_that_torch_lists():
    listed = unsupported_operators("MPS")
    assert {"linalg_eig", "mkldnn_linear", "_scaled_dot_product_flash_attention_for_cpu"} <= listed
    assert (
        not {"mm", "convolution", "linalg_vector_norm", "_softmax", "_foreach_norm.Scalar"} & listed
    )


@pytest.mark.parametrize(
    ("refused", "error"),
    [
        (lambda x: x.double(), "doesn't support float64"),
        (lambda x: x.to("cpu", torch.float64), "doesn't support float64"),
        (lambda x: x.cpu().double().to("mps"), "doesn't support float64"),
        (lambda x: torch.zeros(2, dtype=torch.float64, device=x.device), "doesn't support float64"),
        (lambda x: torch.linspace(0, 1, 3, dtype=torch.float64).to(x), None),
        (lambda x: torch.empty(3, dtype=torch.float64).copy_(x), "doesn't support float64"),
        (lambda x: torch.linalg.eig(x @ x.t()), "'aten::linalg_eig' is not currently implemented"),
        (lambda x: x + torch.ones(3), "mps:0 and cpu"),
        (lambda x: x.numpy(), "Use Tensor.cpu()"),
        (lambda x: x.normal_(generator=torch.Generator()), "generator"),
        (lambda x: torch.randn(2, device="mps", generator=torch.Generator()), "generator"),
        (lambda x: x.cpu().pin_memory(), "pin memory"),
        (lambda x: x + 1.5 * torch.tensor(2.0), None),
        (lambda x: x[torch.tensor([0])], None),
        (lambda x: x.cpu().double().numpy(), None),
    ],
)  # fmt: skip
def test_what_the_device_refuses(refused, error):
    with apple_gpu():
        x = torch.randn(3, 3).to("mps")
        if error is None:
            refused(x)
            return
        with pytest.raises((TypeError, RuntimeError, NotImplementedError)) as raised:
            refused(x)
        assert error in str(raised.value)


def test_what_is_computed_on_the_device_is_on_it_and_is_what_a_cpu_computes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten())
    x = torch.randn(2, 3, 5, 5)
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with apple_gpu() as gpu:
        model.to("mps")
        assert str(next(model.parameters()).device) == "mps:0"
        output = model(x.to("mps"))
        output.square().sum().backward()
        gradients = [p.grad for p in model.parameters()]
        assert {str(t.device) for t in (output, output[0], *gradients)} == {"mps:0"}
        for gradient, reference in zip(gradients, expected, strict=True):
            torch.testing.assert_close(gradient.cpu(), reference)
        assert {"convolution", "convolution_backward", "native_group_norm"} <= gpu.operators
    assert str(model[0].weight.device) == "cpu"
