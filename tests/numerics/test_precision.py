"""Precision that torch is set to, by either of its ways; and what rounding must not lose."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dora_diffusion.adapters.scales import make_scales
from dora_diffusion.adapters.site import Site, WeightStatistics
from dora_diffusion.numerics import precision
from dora_diffusion.numerics.dora import dora_forward
from dora_diffusion.numerics.operation import ConvOperation, Operation
from dora_diffusion.numerics.precision import (
    allow_tf32,
    full_precision,
    rounds_float32,
)
from dora_diffusion.numerics.weights import LayerWeights
from tests.numerics.test_threads import Visitor

B = torch.backends
HAS_NEW = hasattr(B.cuda.matmul, "fp32_precision")


@pytest.fixture(autouse=True)
def as_torch_starts() -> Iterator[None]:
    """The settings are the process's own."""
    reset()
    yield
    reset()


def reset() -> None:
    torch.set_float32_matmul_precision("highest")
    B.cudnn.allow_tf32 = True
    if HAS_NEW:
        for setting in (B, B.cuda.matmul, B.cudnn, B.mkldnn, B.mkldnn.matmul, B.mkldnn.conv):
            setting.fp32_precision = "none"


def everything(newer: bool = HAS_NEW) -> dict[str, Any]:
    """All settings as they read; the older ones may refuse to be read."""
    found: dict[str, Any] = {"rounds": [rounds_float32(device) for device in DEVICES]}
    reads: dict[str, Callable[[], Any]] = {
        "matmul switch": lambda: B.cuda.matmul.allow_tf32,
        "conv switch": lambda: B.cudnn.allow_tf32,
        "word": torch.get_float32_matmul_precision,
    }
    if newer:
        reads |= {
            "matmul": lambda: B.cuda.matmul.fp32_precision,
            "conv": lambda: B.cudnn.conv.fp32_precision,
            "cpu": lambda: (B.mkldnn.matmul.fp32_precision, B.mkldnn.conv.fp32_precision),
        }
    for name, read in reads.items():
        try:
            found[name] = read()
        except RuntimeError:
            found[name] = RuntimeError
    return found


DEVICES = ("cuda", "cpu")


def put(owner: Any, name: str, value: Any) -> Callable[[], None]:
    return lambda: setattr(owner, name, value)


# What a program may have set -> whether it rounds products of matrices on each of DEVICES.
OLDER: dict[str, tuple[Callable[[], Any], tuple[bool, ...]]] = {
    "nothing": (lambda: None, (False, False)),
    "allow_tf32": (put(B.cuda.matmul, "allow_tf32", True), (True, False)),
    "our own": (allow_tf32, (True, False)),
    "convolutions": (put(B.cudnn, "allow_tf32", False), (False, False)),
    "medium": (lambda: torch.set_float32_matmul_precision("medium"), (True, True)),
}
NEWER: dict[str, tuple[Callable[[], Any], tuple[bool, ...]]] = {}
if HAS_NEW:
    NEWER = {
        "high": (lambda: torch.set_float32_matmul_precision("high"), (True, True)),
        "matmul": (put(B.cuda.matmul, "fp32_precision", "tf32"), (True, False)),
        "all of cuda": (put(B.cudnn, "fp32_precision", "tf32"), (True, False)),
        "all": (put(B, "fp32_precision", "tf32"), (True, True)),
        "conv": (put(B.cudnn.conv, "fp32_precision", "ieee"), (False, False)),
        "cpu": (put(B.mkldnn.matmul, "fp32_precision", "bf16"), (False, True)),
    }


@pytest.mark.parametrize("name", [*OLDER, *NEWER])
def test_what_is_set_is_read_whichever_way_it_was_set(name: str) -> None:
    """The older way raises where the newer one was used."""
    apply, expected = (OLDER | NEWER)[name]
    apply()
    assert tuple(rounds_float32(device) for device in DEVICES) == expected
    assert not rounds_float32("mps")


@pytest.mark.parametrize("name", [*OLDER, *NEWER])
@pytest.mark.parametrize("device", DEVICES)
def test_full_precision_rounds_no_product_and_puts_everything_back(name: str, device: str) -> None:
    apply, _ = (OLDER | NEWER)[name]
    apply()
    before = everything()
    with full_precision(torch.device(device)):
        assert not rounds_float32(device)
    assert everything() == before
    with pytest.raises(KeyError), full_precision(torch.device(device)):
        raise KeyError
    assert everything() == before


@pytest.mark.parametrize("first_out", [0, 1])
@pytest.mark.parametrize("device", DEVICES)
def test_two_threads_round_nothing_until_the_last_one_leaves(device: str, first_out: int) -> None:
    torch.set_float32_matmul_precision("medium")
    before = everything()
    visitors = [Visitor(lambda: full_precision(torch.device(device))) for _ in range(2)]
    for visitor in visitors:
        visitor.enter()
    visitors[first_out].leave()
    assert not rounds_float32(device)
    visitors[1 - first_out].leave()
    assert rounds_float32(device)
    assert everything() == before


@pytest.mark.parametrize("name", OLDER)
def test_a_torch_without_the_newer_settings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_setting", lambda *_: None)
    apply, expected = OLDER[name]
    apply()
    before = everything(newer=False)
    assert tuple(before["rounds"]) == expected
    for device in DEVICES:
        with full_precision(torch.device(device)):
            assert not rounds_float32(device)
        assert everything(newer=False) == before


def test_settings_of_torch_before_its_newer_ones_are_not_found() -> None:
    class Older:
        allow_tf32 = True

    class Backends:
        class cuda:
            matmul = Older()

        cudnn = mkldnn = Older()

    precision._setting.cache_clear()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "backends", Backends)
            assert [precision._setting(device) for device in DEVICES] == [None] * 2
            assert rounds_float32("cuda")
    finally:
        precision._setting.cache_clear()


@pytest.mark.parametrize(
    ("is_available", "capability", "is_said"),
    [(False, None, True), (True, (7, 5), True), (True, (8, 0), False), (True, (9, 0), False)],
)
def test_tf32_without_a_gpu_that_has_it_is_said(is_available, capability, is_said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        allow_tf32()
    expected = "allow_tf32 has no effect because there is no NVIDIA GPU of Ampere or later"
    assert [str(warning.message) for warning in caught] == [expected] * is_said


def tf32(tensor: Tensor) -> Tensor:
    """Rounded to 10 bits of mantissa, half to even, as CUDA rounds operands."""
    bits = tensor.float().contiguous().view(torch.int32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


@pytest.fixture
def tensor_float(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that multiplies as CUDA does, and says so."""
    monkeypatch.setattr(precision, "rounds_float32", lambda *_: True)
    conv2d, linear = F.conv2d, F.linear
    monkeypatch.setattr(F, "conv2d", lambda x, w, *a, **k: conv2d(tf32(x), tf32(w), *a, **k))
    monkeypatch.setattr(F, "linear", lambda x, w, b=None: linear(tf32(x), tf32(w), b))
    for call in ("apply", "down_project", "up_project"):
        monkeypatch.setattr(Operation, call, staticmethod(F.linear))


def share(found: Tensor, wanted: Tensor) -> float:
    """Share of a wanted change that is there: noise averages out, a lost update does not."""
    return ((found * wanted).sum() / wanted.square().sum()).item()


@pytest.mark.usefixtures("tensor_float")
@pytest.mark.parametrize("size", [1e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_tensor_float_32_does_not_lose_a_small_update(
    size: float, axis: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = torch.Generator().manual_seed(0)
    if kind == "conv":
        shape, x = (64, 64, 3, 3), torch.randn(1, 64, 24, 24, generator=g)
        op, plain = ConvOperation(padding=(1, 1)), lambda x, w: F.conv2d(x, w, None, 1, 1)
    else:
        shape, x = (128, 128), torch.randn(2048, 128, generator=g)
        op, plain = Operation(), F.linear
    weight = torch.randn(shape, generator=g) / 24
    down = torch.randn(4, *shape[1:], generator=g)
    up = torch.randn(shape[0], 4, *[1] * (len(shape) - 2), generator=g)
    delta = (up.flatten(1) @ down.flatten(1)).view(shape)
    up = up * (size * weight.norm() / delta.norm())
    delta = (up.double().flatten(1) @ down.double().flatten(1)).view(shape)
    statistics = WeightStatistics(weight, axis)
    magnitude = torch.ones(len(statistics.squared_norm))
    for _ in range(2):  # The second time, the magnitude is the norm: the gain is 1.
        layer = LayerWeights(down, up, magnitude, 4.0, axis)
        (scales,) = make_scales([Site(weight, None, [layer], statistics)])
        magnitude = scales.norm
    gain = scales.factors(torch.float32).gain
    assert gain is not None
    assert torch.equal(gain, torch.ones_like(magnitude))

    def change() -> Tensor:
        y = dora_forward(op, x, weight, None, scales.factors(x.dtype))
        return y.double() - plain(x, weight).double()

    with monkeypatch.context() as patch:
        patch.undo()
        wanted = plain(x.double(), delta)
    found = change()
    assert abs(share(found, wanted) - 1) < 0.05
    assert ((found - wanted).norm() / wanted.norm()).item() < (0.3 if size == 1e-5 else 0.05)
    # What is guarded against: a merged weight loses most of it.
    lost = plain(x, weight + delta.float()).double() - plain(x, weight).double()
    assert ((lost - wanted).norm() / wanted.norm()).item() > (0.25 if size == 1e-3 else 1)
