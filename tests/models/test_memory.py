"""Memory estimate of training: the measured rows, what follows from them, and what fits."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from dora_diffusion.config.families import FAMILIES
from dora_diffusion.models.memory import (
    PROCESS_GIB,
    Device,
    describe_device,
    fitting_settings,
    gpu_training_memory,
    needed_memory,
    training_memory,
    what_would_fit,
)

# What was measured, with the family that it was measured on.
TABLE = [
    (name, row)
    for name, family in FAMILIES.items()
    for row in family.memory
    if not family.more_memory_gib and not family.image_arguments
]
A100 = Device("cuda", "A100", 38.0, has_bf16=True, has_8bit_adam=True)
HALF = {"mixed_precision": "bf16", "gradient_checkpointing": False, "optimizer": "adamw"}


def card(free: float, *, bf16: bool = True, adam: bool = False) -> Device:
    return Device("cuda", "a card", free, has_bf16=bf16, has_8bit_adam=adam)


def test_activations_grow_with_pixels_and_float32_doubles_all_but_the_process() -> None:
    small, large = (
        next(r.gib for name, r in TABLE
             if (name, r.resolution, r.gradient_checkpointing) == ("sd1", side, False))
        for side in (512, 768)
    )  # fmt: skip
    slope = (large - small) / (768**2 - 512**2)
    assert training_memory("sd1", 640) == pytest.approx(small + slope * (640**2 - 512**2))
    assert training_memory("sd1", 1024) == pytest.approx(large + slope * (1024**2 - 768**2))
    assert training_memory("sd1", 512, batch=2) == pytest.approx(small + slope * 512**2)
    full = training_memory("sd1", 512, precision="no")
    assert full == pytest.approx(2 * small - PROCESS_GIB)
    assert training_memory("sd2", 512) == pytest.approx(small + 0.42)
    assert training_memory("", 512) is training_memory("sd3", 512) is None


def test_a_batch_that_was_measured_is_not_understated() -> None:
    said = training_memory("sd1", 512, batch=4, gradient_checkpointing=True)
    assert said is not None
    assert 4.47 <= said <= 1.2 * 4.47


def test_the_document_states_the_table() -> None:
    """Each precision's columns, float32's derived from bfloat16's."""
    page = document("lab", "measurements", "gpu-memory.md")
    titles = {"sd1": "Stable Diffusion 1.5", "sdxl": "SDXL"}
    for family, size in {(name, row.resolution) for name, row in TABLE}:
        half, single = [], []
        for on in (True, False):
            [row] = [
                r
                for name, r in TABLE
                if (name, r.resolution, r.gradient_checkpointing) == (family, size, on)
            ]
            half.append(f"{row.gib:.1f} GiB" + ("" if row.is_measured else " (derived)"))
            derived = training_memory(family, size, precision="no", gradient_checkpointing=on)
            single.append(f"{derived:.1f} GiB")
        line = " | ".join([titles[family], f"{size} px", *half, *single])
        assert f"| {line} |\n" in page, line


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_gpu_holds_what_a_run_computes_with(family: str) -> None:
    table = FAMILIES[family].gpu_memory
    size = table.resolution
    saving = {"gradient_checkpointing": True, "optimizer": "adamw8bit"}
    least = gpu_training_memory(family, size, saving)
    parts = PROCESS_GIB + table.denoiser + table.adapter_8bit + table.recomputed
    assert least == pytest.approx(parts)
    plain = gpu_training_memory(family, size, {})
    assert plain == pytest.approx(PROCESS_GIB + table.denoiser + table.adapter + table.activations)

    def more(batch: int = 1, precision: str = "bf16", **settings: object) -> float:
        found = gpu_training_memory(family, size, settings, batch=batch, precision=precision)
        return found - plain

    assert more(offload="none") == pytest.approx(table.text_encoders + table.vae)
    assert more(cache_latents=False) == pytest.approx(table.vae)
    trained = table.text_encoders + table.text_adapter
    assert more(train_text_encoder=True) == pytest.approx(trained)
    assert more(train_text_encoder=True, offload="none") == pytest.approx(trained + table.vae)
    assert more(batch=3) == pytest.approx(2 * table.activations)
    assert more(precision="no") == pytest.approx(table.denoiser + table.activations)
    single = more(precision="no", offload="none") - more(precision="no")
    vae = table.vae * (1 if family == "sdxl" else 2)  # SDXL's is in float32 anyway.
    assert single == pytest.approx(2 * table.text_encoders + vae)
    quarter = gpu_training_memory(family, size // 2, {})
    assert plain - quarter == pytest.approx(0.75 * table.activations)
    assert gpu_training_memory("sd3", size, {}) is None


def test_weights_are_those_of_the_released_models() -> None:
    """Parameters in millions, in two bytes each; SDXL's VAE in four."""
    sizes = {"sd1": ((859.5, 123.1, 83.65), 2), "sdxl": ((2567.5, 123.1 + 694.7, 83.65), 4)}
    for family, ((unet, text_encoders, vae), width) in sizes.items():
        table = FAMILIES[family].gpu_memory
        for gib, millions, size in (
            (table.denoiser, unet, 2), (table.text_encoders, text_encoders, 2),
            (table.vae, vae, width),
        ):  # fmt: skip
            assert gib == pytest.approx(millions * 1e6 * size / 2**30, abs=0.006)


def test_sdxl_at_1024_fits_a_card_of_8_gb() -> None:
    table = FAMILIES["sdxl"].gpu_memory
    assert table.denoiser + table.adapter_8bit + table.recomputed <= 7
    settings = {**HALF, "gradient_checkpointing": True, "optimizer": "adamw8bit"}
    assert needed_memory("sdxl", 1024, settings, A100) <= 7.5


def test_the_document_states_what_was_counted() -> None:
    text = document("lab", "measurements", "gpu-memory.md")
    titles = {"sd1": "SD1.5", "sdxl": "SDXL", "z-image": "Z-Image", "flux2-klein": "FLUX.2-klein",
              "flux2-klein-9b": "FLUX.2-klein 9B", "anima": "Anima"}  # fmt: skip
    for family, title in titles.items():
        size = FAMILIES[family].gpu_memory.resolution
        for on in (True, False):
            cells = [
                gpu_training_memory(
                    family,
                    size,
                    {"gradient_checkpointing": on, "optimizer": optimizer, "offload": offload},
                )
                for optimizer in ("adamw", "adamw8bit")
                for offload in ("none", "model")
            ]
            figures = " | ".join(f"{gib - PROCESS_GIB:.2f}" for gib in cells)
            assert f"| {title}, {size} px | {'on' if on else 'off'} | {figures} |" in text


def test_a_cpu_and_apples_gpu_take_the_measured_table() -> None:
    for kind in ("cpu", "mps"):
        needed = needed_memory("sd1", 512, HALF, Device(kind, "shared", 9.0))
        assert needed == pytest.approx(1.1 * training_memory("sd1", 512))
    assert needed_memory("sd1", 512, HALF, A100) == pytest.approx(
        1.1 * gpu_training_memory("sd1", 512, {})
    )


def test_settings_follow_the_free_memory_step_by_step() -> None:
    plain = needed_memory("sdxl", 1024, HALF, A100)
    saving = needed_memory("sdxl", 1024, HALF | {"gradient_checkpointing": True}, A100)

    low = HALF | {"gradient_checkpointing": True, "optimizer": "adamw8bit"}
    eight, int8, nf4 = (
        needed_memory("sdxl", 1024, low | {"quantize": kind}, A100)
        for kind in ("none", "int8", "nf4")
    )

    def chosen(free: float, *, adam: bool = True) -> tuple[bool, str, str]:
        found = fitting_settings("sdxl", 1024, card(free, adam=adam))
        assert found["mixed_precision"] == "bf16"
        kind = found.get("quantize", "none")
        return found["gradient_checkpointing"], found["optimizer"], kind

    assert chosen(plain) == (False, "adamw", "none")
    assert chosen(plain - 0.01) == (True, "adamw", "none")
    assert chosen(saving) == (True, "adamw", "none")
    assert chosen(saving - 0.01) == (True, "adamw8bit", "none")
    assert chosen(saving - 0.01, adam=False) == (True, "adamw", "int8")
    assert chosen(eight - 0.01) == (True, "adamw8bit", "int8")
    assert chosen(int8) == (True, "adamw8bit", "int8")
    assert chosen(int8 - 0.01) == (True, "adamw8bit", "nf4")
    assert chosen(nf4) == (True, "adamw8bit", "nf4")
    assert chosen(1.0) == (True, "adamw8bit", "nf4")


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_quantised_base_takes_the_bytes_of_its_codes(family: str) -> None:
    """A byte, or half of one, and 8 bits for 64 numbers, in place of two; not all is quantised."""
    table = FAMILIES[family].gpu_memory
    size = table.resolution

    def saves(precision: str = "bf16", **settings: object) -> float:
        plain, small = (
            gpu_training_memory(family, size, {**settings, "quantize": kind}, precision=precision)
            for kind in ("none", settings["quantize"])
        )
        return plain - small

    for kind, bits in (("int8", 8), ("nf4", 4 + 8 / 64)):
        share = 1 - bits / 16
        unet, whole = table.denoiser_linear, table.denoiser
        assert saves(quantize=kind) == pytest.approx(share * unet, abs=0.02)
        every = saves(quantize=kind, quantize_convolutions=True)
        assert every == pytest.approx(share * whole, abs=0.02)
        text = saves(quantize=kind, train_text_encoder=True)
        assert text == pytest.approx(share * (unet + table.text_linear), abs=0.02)
        # Codes of a model in float32 take no more.
        single = saves("no", quantize=kind)
        assert single == pytest.approx((1 + share) * unet, abs=0.02)


def test_what_is_not_known_gets_settings_that_are_safe() -> None:
    for device, family in ((card(38), ""), (Device("cuda", "a card", None), "sdxl")):
        found = fitting_settings(family, 1024, device)
        assert found["gradient_checkpointing"]
        assert found["mixed_precision"] == "bf16"


def test_what_to_change_is_said_and_then_fits() -> None:
    single = {"mixed_precision": "no", "gradient_checkpointing": False}
    halved = needed_memory("sdxl", 1024, HALF, A100)
    assert what_would_fit("sdxl", 1024, single, card(halved)) == "mixed_precision bf16"
    saving = HALF | {"gradient_checkpointing": True}
    saved = needed_memory("sdxl", 1024, saving, A100)
    said = what_would_fit("sdxl", 1024, single, card(saved))
    assert said == "mixed_precision bf16 and gradient_checkpointing on"
    eight = needed_memory("sdxl", 1024, saving | {"optimizer": "adamw8bit"}, A100)
    assert what_would_fit("sdxl", 1024, saving, card(eight, adam=True)) == "optimizer adamw8bit"
    assert what_would_fit("sdxl", 1024, saving, card(eight)) == "quantize int8"
    for kind in ("int8", "nf4"):
        some = saving | {"quantize": kind}
        needed = needed_memory("sdxl", 1024, some, A100)
        assert what_would_fit("sdxl", 1024, saving, card(needed)) == f"quantize {kind}"
    eight_bits = saving | {"quantize": "int8"}
    assert what_would_fit("sdxl", 1024, eight_bits, card(needed)) == "quantize nf4"
    small = some | {"quantize_convolutions": True}
    least = needed_memory("sdxl", 1024, small, A100)
    assert what_would_fit("sdxl", 1024, some, card(least)) == "quantize_convolutions on"
    smaller = needed_memory("sdxl", 768, small, A100)
    assert what_would_fit("sdxl", 1024, small, card(smaller)) == "resolution 768"
    said = what_would_fit("sdxl", 1024, saving, card(smaller))
    assert said == "quantize nf4 and quantize_convolutions on and resolution 768"
    assert what_would_fit("sdxl", 1024, small, card(least), batch=4) == "train_batch_size 1"
    smaller = needed_memory("sdxl", 768, saving, A100)
    sharded = saving | {"sharding": "fsdp"}
    assert what_would_fit("sdxl", 1024, sharded, card(smaller)) == "resolution 768"
    assert what_would_fit("sdxl", 1024, saving, card(0.5)) == ""


def test_a_change_without_effect_is_not_proposed() -> None:
    saved = needed_memory("sdxl", 1024, HALF | {"gradient_checkpointing": True}, A100)
    for precision in ("auto", "bf16", "fp16"):
        settings = HALF | {"mixed_precision": precision}
        said = what_would_fit("sdxl", 1024, settings, card(saved))
        assert said == "gradient_checkpointing on"
    old = Device("mps", "Apple GPU", 1.0, has_bf16=False, has_gradient_scaler=False)
    single = HALF | {"mixed_precision": "no"}
    old = replace(old, free_gib=needed_memory("sdxl", 1024, single, old) - 0.01)
    assert what_would_fit("sdxl", 1024, single, old) == "gradient_checkpointing on"


def test_auto_is_what_the_device_makes_of_it() -> None:
    auto = {"mixed_precision": "auto", "gradient_checkpointing": False}
    for device, precision in ((A100, "bf16"), (Device("cpu", "CPU", 9.0), "no")):
        same = auto | {"mixed_precision": precision}
        assert needed_memory("sd1", 512, auto, device) == needed_memory("sd1", 512, same, device)


def test_this_machine_is_described() -> None:
    device = describe_device()
    assert device.kind in ("cpu", "cuda", "mps", "xpu")
    assert device.name
    assert device.free_gib is None or device.free_gib > 0


def document(*path: str) -> str:
    return Path(__file__).parents[2].joinpath(*path).read_text(encoding="utf-8")


def test_the_readme_names_for_each_card_the_quickest_flags_that_fit_it() -> None:
    """From the peaks that lab/measurements/gpu-memory.md has for each, quickest first.

    Each row has other flags than the one before, and the command above fits the cards that it says.
    """
    rows = re.findall(
        r"^\| `(--with_prior_preservation|)\s?(--[^|`]+)?` \| (?:([\d.]+) )?\| ([\d.]+) \|$",
        document("lab", "measurements", "gpu-memory.md").partition("## One training step")[0],
        re.MULTILINE,
    )
    assert len(rows) == 8
    # Whoever needs a smaller card does without the prior.
    rows.sort(key=lambda row: not row[0])
    readme = document("README.md")
    table = re.findall(r"^\| (\d+(?: to \d+)?) GB \| (.+) \| (.+) \|$", readme, re.MULTILINE)
    assert [named for named, *_ in table] == ["4", "6", "8 to 16", "24"]
    assert len({(*cells,) for _, *cells in table}) == len(table)
    [(fits, flags)] = [(named, row[-1]) for named, *row in table if "8" in named]
    assert f"SDXL on a card of {fits} GB" in readme
    assert f"--with_prior_preservation {flags.split('`')[1]}\n" in readme
    cards = [(card, cells) for named, *cells in table for card in named.split(" to ")]
    for card, cells in cards:
        for cell, place in zip(cells, (2, 3), strict=True):
            assert cell == next(
                f"{f'`{row[1]}`' if row[1] else 'no other flag'}{'' if row[0] else ', no prior'}: "
                f"{row[place]} GiB"
                for row in rows
                if row[place] and 1.1 * (float(row[place]) + PROCESS_GIB) + 0.5 <= int(card)
            )


@pytest.mark.parametrize(
    ("family", "resolution", "checkpointing", "counted"),
    [("sd1", 512, False, 3.52), ("sdxl", 1024, False, 17.15), ("sdxl", 1024, True, 6.37)],
)
def test_what_the_app_asks_for_with_a_prior_is_what_was_counted_or_a_little_more(
    family: str, resolution: int, checkpointing: bool, counted: float
) -> None:
    settings = HALF | {"gradient_checkpointing": checkpointing}
    asked = gpu_training_memory(family, resolution, settings, batch=2)
    assert asked is not None
    assert counted <= asked - PROCESS_GIB <= counted + 0.3
