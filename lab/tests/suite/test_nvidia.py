"""The emulated NVIDIA GPU refuses what the real one refuses, and counts what waits for it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dora_diffusion.numerics.norms import widens_products
from tests.emulation import unsupported_operators
from tests.nvidia import nvidia_gpu


def test_operators_are_those_that_torch_lists():
    listed = unsupported_operators("CUDA")
    assert {"mkldnn_linear", "_scaled_dot_product_flash_attention_for_cpu"} <= listed
    assert not {"mm", "convolution", "_fused_adamw_", "_linalg_svd"} & listed


@pytest.mark.parametrize(
    ("refused", "error"),
    [
        (lambda x: x + torch.ones(3), "cuda:0 and cpu"),
        (lambda x: x @ torch.ones(3, 3), "cuda:0 and cpu"),
        (lambda x: torch.stack([x.sum(), torch.tensor(1.0)]), "cuda:0 and cpu"),
        (lambda x: nn.functional.embedding(torch.tensor([1]), x), "cuda:0 and cpu"),
        (lambda x: x.numpy(), "Use Tensor.cpu()"),
        (lambda x: x.normal_(generator=torch.Generator()), "generator"),
        (lambda x: torch.randn(2, device="cuda", generator=torch.Generator()), "generator"),
        (lambda x: x.pin_memory(), "pin memory"),
        (lambda x: x.double() * 1.5 * torch.tensor(2.0), None),
        (lambda x: x[torch.tensor([0])], None),
        (lambda x: x.cpu().pin_memory().cuda(), None),
    ],
)
def test_what_the_device_refuses(refused, error):
    with nvidia_gpu():
        x = torch.randn(3, 3).to("cuda")
        if error is None:
            refused(x)
            return
        with pytest.raises((TypeError, RuntimeError)) as raised:
            refused(x)
        assert error in str(raised.value)


@pytest.mark.parametrize(
    ("work", "waits"),
    [
        (lambda x: x.sum().item(), {"_local_scalar_dense": 1}),
        (lambda x: x.tolist(), {"tolist": 1}),
        (lambda x: x.nonzero(), {"nonzero": 1}),
        (lambda x: x[x > 0], {"index": 1}),
        (lambda x: x[torch.tensor([0])], {"index": 1}),
        (lambda x: x.cpu(), {"copy": 1}),
        (lambda x: torch.ones(3).to("cuda", non_blocking=True), {"copy": 1}),
        (lambda x: x.copy_(torch.ones(3, 3)), {"copy": 1}),
        (lambda x: torch.tensor([1.0], device="cuda"), {"tensor": 1}),
        (lambda x: torch.ones(3).pin_memory().to("cuda", non_blocking=True), {}),
        (lambda x: x.to("cpu", non_blocking=True), {}),
        (lambda x: x[x.argmax(0)].softmax(-1) * torch.tensor(2.0), {}),
    ],
)
def test_what_waits_for_the_device(work, waits):
    with nvidia_gpu() as gpu:
        x = torch.randn(3, 3).to("cuda")
        gpu.waits.clear()
        work(x)
        assert dict(gpu.waits) == waits


def test_a_copy_that_does_not_wait_arrives_when_an_event_after_it_was_waited_for():
    with nvidia_gpu():
        x = torch.arange(3.0).to("cuda")
        first, early = x.to("cpu", non_blocking=True), torch.cuda.Event()
        early.record()
        x += 1
        second = x.to("cpu", non_blocking=True)
        assert first.isnan().all()
        early.synchronize()
        assert first.tolist() == [0, 1, 2]
        assert second.isnan().all()
        torch.cuda.synchronize()
        assert second.tolist() == [1, 2, 3]


def test_its_autocast_runs_in_float32_what_cudas_does():
    with nvidia_gpu(), torch.autocast("cuda", torch.bfloat16):
        x = torch.randn(3, 3).to("cuda").bfloat16()
        norm = nn.LayerNorm(3).to("cuda")
        wide = [norm(x), x.sum(), x.softmax(-1), x**2]
        assert [t.dtype for t in wide] == [torch.float32] * 4
        assert (x @ x).dtype == torch.bfloat16


@pytest.mark.skipif(not widens_products("cuda"), reason="this torch has no such product")
def test_a_product_of_bfloat16_matrices_widens():
    with nvidia_gpu():
        a, b = (torch.randn(4, 4).to("cuda").bfloat16() for _ in range(2))
        out = torch.empty(4, 4, device="cuda")
        torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)
        torch.testing.assert_close(out.cpu(), a.cpu().float() @ b.cpu().float())
        with pytest.raises(RuntimeError, match="takes no such dtypes"):
            torch.ops.aten.mm.dtype_out(a.float(), b.float(), torch.float32, out=out)
