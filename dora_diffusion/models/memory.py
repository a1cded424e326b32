"""Memory estimate of training, and settings that fit the memory of a device.

The tables (`families`) contain measurements of processes on a CPU, and counts of live bytes for
GPUs. Only `describe_device` imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from dora_diffusion.config.base import QUANTISATIONS
from dora_diffusion.config.families import FAMILIES, GpuMemory, MemoryRow
from dora_diffusion.config.fields import require
from dora_diffusion.numerics import devices

# Memory of a process without a model, or of a GPU context. It does not double in float32.
PROCESS_GIB = 0.4
# AdamW has two float32 moments per trained weight; 8-bit moments need a quarter of that.
_EIGHT_BIT_SAVES_GIB = 0.1
# Safety margin, since the tables were measured on another machine.
_MARGIN = 1.1
# Size of a quantised weight with its scales relative to a 16-bit weight.
_SHARES = {"int8": 0.502, "nf4": 0.259}
_MOST_GIB = 10_000
_SIZES = (1024, 896, 768, 640, 512, 448, 384, 320, 256)


def training_memory(
    family: str,
    resolution: int,
    *,
    batch: int = 1,
    precision: str = "bf16",
    gradient_checkpointing: bool = False,
) -> float | None:
    """Estimate the peak memory of training on a CPU in GiB, from measurements.

    Activations grow linearly with pixels times batch size, so that the estimate interpolates
    between two measurements. float32 doubles everything except the process itself. For larger
    batches the estimate is too high: four images of 512 pixels took 4.5 GiB, with an estimate of
    5.2 GiB (Stable Diffusion 1.5, gradient checkpointing).

    Args:
        family: Name of a `Family`.
        resolution: Side in pixels.
        batch: Number of images per step, including class images.
        precision: ``"bf16"``, ``"fp16"`` or ``"no"`` (float32).
        gradient_checkpointing: Whether gradient checkpointing is on.

    Returns:
        GiB; None for an unknown family, or one that was not measured.
    """
    if family not in FAMILIES or not FAMILIES[family].memory:
        return None
    entry = FAMILIES[family]
    rows = [row for row in entry.memory if row.gradient_checkpointing == gradient_checkpointing]
    gib = _on_the_line(rows, resolution**2 * batch) + entry.more_memory_gib
    return gib if precision != "no" else PROCESS_GIB + 2 * (gib - PROCESS_GIB)


def gpu_training_memory(
    family: str,
    resolution: int,
    settings: Mapping[str, Any],
    *,
    batch: int = 1,
    precision: str = "bf16",
) -> float | None:
    """Estimate the peak memory of training on a GPU in GiB, from live bytes and the context.

    Activations grow with pixels times batch size. float32 doubles weights and activations.

    Args:
        family: Name of a `Family`.
        resolution: Side in pixels.
        settings: Settings of `TrainConfig` by name: gradient_checkpointing, train_text_encoder (or
            their words), optimizer, offload, cache_latents, quantize and quantize_convolutions.
            Missing ones have their defaults; others are ignored.
        batch: Number of images per step, including class images.
        precision: ``"bf16"``, ``"fp16"`` or ``"no"`` (float32).

    Returns:
        GiB; None for an unknown family.
    """
    if family not in FAMILIES:
        return None
    table: GpuMemory = FAMILIES[family].gpu_memory
    factor = 2 if precision == "no" else 1
    stays, trained = settings.get("offload") == "none", settings.get("train_text_encoder")
    is_whole = settings.get("quantize_convolutions")
    gib = _weights(
        table.denoiser, table.denoiser if is_whole else table.denoiser_linear, settings, factor
    )
    if trained or stays:
        gib += _weights(table.text_encoders, table.text_linear, settings, factor)
    if stays or not settings.get("cache_latents", True):
        gib += table.vae * (1 if table.vae_is_float32 else factor)
    is_8bit = settings.get("optimizer") == "adamw8bit"
    gib += table.adapter_8bit if is_8bit else table.adapter
    gib += table.text_adapter if trained else 0
    recomputes = settings.get("gradient_checkpointing")
    activations = table.recomputed if recomputes else table.activations
    pixels = resolution**2 * batch / table.resolution**2
    return PROCESS_GIB + gib + factor * activations * pixels


def _weights(gib: float, quantised: float, settings: Mapping[str, Any], factor: int) -> float:
    """Return the size of a module's weights, from sizes of all and quantised weights in 16 bits."""
    share = _SHARES.get(str(settings.get("quantize")))
    return factor * gib if share is None else factor * (gib - quantised) + share * quantised


def _on_the_line(rows: list[MemoryRow], pixels: int) -> float:
    """Interpolate between the two rows around a number of pixels, or extrapolate."""
    points = sorted({row.resolution**2: row.gib for row in rows}.items())
    upper = next((i for i, (x, _) in enumerate(points) if x >= pixels), len(points) - 1)
    (x0, y0), (x1, y1) = points[max(0, upper - 1) : max(0, upper - 1) + 2]
    # At small resolutions, the memory of the weights remains.
    return max(y0 + (pixels - x0) * (y1 - y0) / (x1 - x0), 0.8 * points[0][1])


@dataclass(frozen=True)
class Device:
    """Device for training.

    Attributes:
        kind: ``"cpu"`` or torch's name of an accelerator: ``"cuda"`` (NVIDIA and AMD), ``"xpu"``
            (Intel), ``"mps"`` (Apple).
        name: Name for messages.
        free_gib: Free memory; None if unknown.
        has_bf16: Whether the device computes in bfloat16.
        has_8bit_adam: Whether bitsandbytes is installed and supports the device.
        has_gradient_scaler: Whether the device can train in fp16.
    """

    kind: str = "cpu"
    name: str = "CPU"
    free_gib: float | None = None
    has_bf16: bool = True
    has_8bit_adam: bool = False
    has_gradient_scaler: bool = True


def gpu_of(memory: str) -> Device:
    """Return a GPU with the given GiB of memory, half a GiB of which is used by the display.

    Raises:
        ConfigError: If the value is not a number above 0.
    """
    try:
        gib = float(memory)
    except ValueError:
        gib = 0.0
    require(0 < gib < _MOST_GIB, f"memory is {memory!r}; give GiB, such as 8, or auto", "memory")
    return Device("cuda", f"a GPU of {gib:g} GiB", gib - 0.5, has_8bit_adam=True)


def describe_device() -> Device:
    """Return the default device with its present free memory."""
    kind = devices.default_device()
    return Device(
        kind,
        devices.device_name(kind),
        _free_memory(kind),
        devices.has_bf16(kind),
        devices.has_8bit_adam(kind),
        devices.has_gradient_scaler(kind),
    )


def _free_memory(kind: str) -> float:
    """Return the free memory of a device in GiB: its own, or its share of the machine's."""
    import psutil

    free = devices.free_device_memory(kind)
    if free is None:
        free, limit = psutil.virtual_memory().available, devices.memory_limit(kind)
        free = free if limit is None else min(free, limit)
    return float(free) / 2**30


def fitting_settings(
    family: str, resolution: int, device: Device, *, batch: int = 1
) -> dict[str, Any]:
    """Choose the fastest settings that fit the free memory of a device.

    Memory is saved in this order: gradient checkpointing, 8-bit Adam, on a GPU a base model in 8
    and in 4 bits, on a CPU bfloat16, and last a resolution down to half. If nothing fits, the
    smallest settings at full resolution are returned.

    Args:
        family: Family of the base model. A family that is unknown, or was not measured on such a
            device, gets safe settings.
        resolution: Side in pixels.
        device: Device for training.
        batch: Number of images per step, including class images.

    Returns:
        Settings of `TrainConfig` by name.
    """
    first = auto_precision(device)
    precisions = (first, "bf16") if device.kind == "cpu" else (first,)
    choices: list[dict[str, Any]] = [
        {"mixed_precision": precision, "gradient_checkpointing": on, "optimizer": "adamw"}
        for precision in precisions
        for on in (False, True)
    ]
    if needed_memory(family, resolution, choices[0], device) is None or device.free_gib is None:
        return choices[1]
    if device.has_8bit_adam:
        choices.append(choices[-1] | {"optimizer": "adamw8bit"})
    if devices.has_own_memory(device.kind):
        choices += [choices[-1] | {"quantize": kind} for kind in QUANTISATIONS]
    # Below half its resolution a model generates images of poor quality.
    sizes = (size for size in _SIZES if resolution // 2 <= size < resolution)
    every = [*choices, *(choices[-1] | {"resolution": size} for size in sizes)]
    fitting = (c for c in every if _fits(family, c.get("resolution", resolution), c, device, batch))
    return next(fitting, choices[-1])


def auto_precision(device: Device) -> str:
    """Return the precision of ``auto`` on a device: no, fp16 or bf16.

    Accelerators use bfloat16 if they support it, else float16 if they can train in it. CPUs use
    float32, since they emulate half precision slowly.
    """
    if device.kind == "cpu":
        return "no"
    if device.has_bf16:
        return "bf16"
    return "fp16" if device.has_gradient_scaler else "no"


def needed_memory(
    family: str, resolution: int, settings: Mapping[str, Any], device: Device, *, batch: int = 1
) -> float | None:
    """Return the free memory that settings need in GiB, with a margin of a tenth."""
    precision = str(settings["mixed_precision"])
    precision = auto_precision(device) if precision == "auto" else precision
    if devices.has_own_memory(device.kind):
        gib = gpu_training_memory(family, resolution, settings, batch=batch, precision=precision)
        return None if gib is None else _MARGIN * gib
    gib = training_memory(
        family,
        resolution,
        batch=batch,
        precision=precision,
        gradient_checkpointing=bool(settings["gradient_checkpointing"]),
    )
    if gib is None:
        return None
    saved = _EIGHT_BIT_SAVES_GIB if settings.get("optimizer") == "adamw8bit" else 0
    return _MARGIN * (gib - saved)


def what_would_fit(
    family: str,
    resolution: int,
    settings: Mapping[str, Any],
    device: Device,
    *,
    batch: int = 1,
    without_prior: str = "",
) -> str:
    """Return the smallest number of changes that make settings fit a device, as text.

    Kinds of changes are added in this order, until they suffice: slower training, a base model in
    fewer bits, fewer images per step, smaller images.

    Args:
        family: Family of the base model.
        resolution: Side in pixels.
        settings: Settings that do not fit.
        device: Device for training.
        batch: Number of photos per step.
        without_prior: Text for the change that removes the class image of each photo; empty if
            the run has none.

    Returns:
        The changes; empty if no changes suffice.
    """
    settings = {**settings, "train_batch_size": batch, "prior": bool(without_prior)}
    if settings["mixed_precision"] == "auto":
        settings["mixed_precision"] = auto_precision(device)
    possible: list[tuple[str, Any]] = []

    def fewest(size: int) -> str:
        for subset in (c for n in range(len(possible) + 1) for c in combinations(possible, n)):
            changed = settings | dict(subset)
            images = changed["train_batch_size"] * (1 + changed["prior"])
            if _fits(family, size, changed, device, images):
                texts = [f"{name} {'on' if value is True else value}" for name, value in subset]
                texts = [without_prior if text == "prior False" else text for text in texts]
                texts += [f"resolution {size}"] if size < resolution else []
                return " and ".join(texts)
        return ""

    for changes in _changes(settings, device):
        possible += changes
        if text := fewest(resolution):
            return text
    return next(filter(None, (fewest(size) for size in _SIZES if size < resolution)), "")


def _changes(settings: Mapping[str, Any], device: Device) -> Iterator[list[tuple[str, Any]]]:
    """Yield the changes of `what_would_fit` that save memory, one kind at a time."""
    # CPUs support bfloat16, but slowly: `auto` does not choose it.
    half = "bf16" if device.kind == "cpu" else auto_precision(device)
    owns, kinds = devices.has_own_memory(device.kind), ("none", *QUANTISATIONS)
    is_sharded, is_adam = settings.get("sharding") == "fsdp", settings.get("optimizer") == "adamw"
    more = kinds[kinds.index(settings.get("quantize", "none")) + 1 :]
    slower = (
        ("offload", "auto", owns and settings.get("offload") == "none"),
        ("mixed_precision", half, settings["mixed_precision"] == "no" != half),
        ("gradient_checkpointing", True, not settings["gradient_checkpointing"]),
        ("optimizer", "adamw8bit", is_adam and device.has_8bit_adam),
    )
    fewer_bits = (
        *(("quantize", kind, owns and not is_sharded) for kind in more),
        ("quantize_convolutions", True, owns and not settings.get("quantize_convolutions")),
    )
    fewer_images = (
        ("train_batch_size", 1, settings["train_batch_size"] > 1),
        ("prior", False, settings["prior"]),
    )
    for kind in (slower, fewer_bits, fewer_images):
        yield [(name, value) for name, value, saves in kind if saves]


def _fits(
    family: str, resolution: int, settings: Mapping[str, Any], device: Device, batch: int
) -> bool:
    needed = needed_memory(family, resolution, settings, device, batch=batch)
    return needed is not None and device.free_gib is not None and needed <= device.free_gib
