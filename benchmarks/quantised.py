"""Adapters of a quantised base on the dense one, and a base of full size quantised while read.

    OMP_NUM_THREADS=1 python benchmarks/quantised.py --adapters quantised-adapters
    OMP_NUM_THREADS=1 python benchmarks/quantised.py --load /tmp/full

With ``--adapters``, trains subjects of lab/measurements/quantised.yaml on the base in 4 bits, as
that study does, and uses each adapter on the quantised and on the dense base: images at the same
seeds, and each layer's update ``W' - W``. The update is compared too as it would be with codes
whose rows do not keep their norm, as is and with ``m norm(W) / norm(W_q)``. A run that is there is
not trained again.

With ``--load``, loads SDXL's UNet with random weights from bfloat16 safetensors, in a process of
its own for each kind: processor seconds, and the peak of the process above what the loaded model
holds. The files (7 GB) are made where they are missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any
from unittest import mock

import numpy as np
import torch
from common import markdown
from export_speed import make_base
from live_bytes import GIB
from torch import Tensor

from dora_diffusion import TrainConfig, train
from dora_diffusion.adapters.layers import adapted_layers
from dora_diffusion.config.base import BaseModel
from dora_diffusion.models.components import Components
from dora_diffusion.models.load import load_components
from dora_diffusion.numerics.dora import adapted_weight, weight_norm
from dora_diffusion.numerics.quantised import QUANTISATIONS, PackedWeight, memory_of, quantise
from dora_diffusion.numerics.weights import LayerWeights
from dora_diffusion.sampling.load import load_adapted
from dora_diffusion.sampling.settings import SamplingSettings
from dora_diffusion.toy.judges import answer, measure, toy_requests
from lab.study.config import Study, read_study
from lab.study.subjects import ToySource, find_subject

STUDY = Path(__file__).parents[1] / "docs" / "measurements" / "quantised.yaml"
KINDS = ("nf4", "nf4-conv")


def config_of(study: Study, name: str, **changes: Any) -> TrainConfig:
    """A method's settings of training, on the study's base."""
    (method,) = (method for method in study.methods if method.name == name)
    changes |= {"learning_rate": method.learning_rates[0]}
    config = study.training(method)
    return dataclasses.replace(config, pretrained_model_name_or_path=study.base, **changes)


def trained(config: TrainConfig, subject: ToySource, output: Path, name: str) -> Path:
    """Return the folder of a subject's run, which is trained if it is not there."""
    folder = output / name
    if not (folder / "pytorch_lora_weights.safetensors").is_file():
        own = subject.training(output, config) | {"class_data_dir": str(output / "class")}
        train(
            dataclasses.replace(
                config, output_dir=str(folder), num_validation_images=0, checkpointing_steps=0,
                overwrite_output_dir=True, **own,
            )
        )  # fmt: skip
    return folder


def pairs(dense: Components, quantised: Components) -> Iterator[tuple[Tensor, Tensor, Any]]:
    """Each quantised layer's dense weight, what its codes stand for, and its adapter."""
    layers = zip(adapted_layers(dense.denoiser), adapted_layers(quantised.denoiser), strict=True)
    for (_, plain), (_, packed) in layers:
        if isinstance(packed.weight.data, PackedWeight):
            yield plain.dense(), packed.weight.data.dense(), packed.adapters["default"].weights()


@torch.no_grad()
def update_errors(dense: Components, quantised: Components, kind: str) -> list[float]:
    """The update's share of W, and how far it is off on the dense base, as shares of it.

    As it is; of codes without the rows' norms as it is; and with the magnitude corrected.
    """
    moved, whole, off = 0.0, 0.0, [0.0, 0.0, 0.0]
    for weight, ours, layer in pairs(dense, quantised):
        with mock.patch(
            "dora_diffusion.numerics.quantised._restored", lambda rows, _: torch.ones(len(rows))
        ):
            plain = quantise(weight, kind).dense()
        axis, norms = layer.norm_axis, [weight_norm(w, layer.norm_axis) for w in (weight, plain)]
        assert layer.magnitude is not None
        share = layer.magnitude / weight_norm(ours, axis)
        there = dataclasses.replace(layer, magnitude=share * norms[1])
        here = dataclasses.replace(layer, magnitude=share * norms[0])
        wanted = update(ours, layer)
        other = update(plain, there)
        found = (update(weight, layer), update(weight, there), update(weight, here))
        for place, (own, target) in enumerate(zip(found, (wanted, other, other), strict=True)):
            off[place] += float((own - target).square().sum())
        moved, whole = moved + float(wanted.square().sum()), whole + float(ours.square().sum())
    return [(moved / whole) ** 0.5, *((each / moved) ** 0.5 for each in off)]


def update(weight: Tensor, layer: LayerWeights) -> Tensor:
    """``W' - W``."""
    return adapted_weight(weight, layer) - weight


def requests_of(subject: ToySource, seed: int) -> Any:
    """The subject on held-out backgrounds."""
    return toy_requests(subject.subject, f"sks {subject.subject.word}", [seed], ["subject"])


def print_adapters(output: Path, subjects: int) -> None:
    """The table of adapters that were trained on codes and are used on the dense base."""
    study = read_study(STUDY)
    settings = SamplingSettings(study.asked.inference_steps, study.asked.guidance_scale)
    rows: list[list[Any]] = []
    for method in KINDS:
        found: list[list[float]] = []
        for seed, name in enumerate(study.subjects[:subjects]):
            config = config_of(study, method, seed=seed)
            source = find_subject(name, study.base, ())
            assert isinstance(source, ToySource)
            folder = trained(config, source, output, f"{name}-{method}")
            models = [
                load_adapted(base, folder)[0] for base in (BaseModel(study.base), config.base_model)
            ]
            asked = requests_of(source, seed)
            answers = [answer(model, asked, settings) for model in models]
            likeness = [
                mean(measure(source.subject, asked, each)["subject_similarity"][0])
                for each in answers
            ]
            pixels = [np.stack([np.asarray(i, float) for i in each.images]) for each in answers]
            found.append(
                [*reversed(likeness), np.abs(pixels[0] - pixels[1]).mean(),
                 *update_errors(*models, config.quantize)]
            )  # fmt: skip
            rows.append([method, name, *(f"{value:.3f}" for value in found[-1])])
            print(*rows[-1], flush=True)
        rows.append([method, "mean", *(f"{mean(each):.3f}" for each in zip(*found, strict=True))])
    header = [
        "base", "subject", "similarity on codes", "on the dense base", "pixels, mean of 255",
        "update, of W", "off", "off, norms not kept", "off, m corrected",
    ]  # fmt: skip
    print(markdown(header, rows))


def load(folder: Path, kind: str, found: Any) -> None:
    """Load a model; queue numbers, processor seconds, bytes held and the process's peak."""
    # What imports and first calls take is no part of it.
    load_components(BaseModel("embedded:tiny-sd", quantize=kind))
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before, started = memory_now("VmRSS"), time.process_time()
    components = load_components(BaseModel(folder, quantize=kind), dtype=torch.float16)
    seconds, peak = time.process_time() - started, memory_now("VmHWM") - before
    weights = [p.data for module in components.modules().values() for p in module.parameters()]
    parts = [part for weight in weights for part in memory_of(weight)]
    packed = sum(weight.numel() for weight in weights if isinstance(weight, PackedWeight))
    found.put((packed, seconds, sum(part.nbytes for part in parts), peak))


def memory_now(name: str) -> int:
    """Bytes of this process: resident ones, or their peak."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def print_load(work: Path) -> None:
    """The table of loading SDXL."""
    base, spawn = work / "sdxl-float16", multiprocessing.get_context("spawn")
    if not (base / "model_index.json").is_file():
        make_base("sdxl", base)
    rows: list[list[Any]] = []
    for kind in ("none", *QUANTISATIONS):
        queue = spawn.Queue()
        process = spawn.Process(target=load, args=(base, kind, queue))
        process.start()
        packed, seconds, held, peak = queue.get()
        process.join()
        above = f"{(peak - held) / 2**20:.0f}"
        rows.append([kind, f"{packed / 1e9:.3f}", f"{seconds:.0f}", f"{held / GIB:.3f}", above])
        print(*rows[-1], flush=True)
    header = ["quantize", "1e9 numbers", "processor seconds", "held, GiB", "peak above, MiB"]
    print(markdown(header, rows))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=Path, help="folder of the trainings")
    parser.add_argument("--subjects", type=int, default=4)
    parser.add_argument("--load", type=Path, help="folder of the model")
    args = parser.parse_args()
    if args.load is not None:
        print_load(args.load)
    if args.adapters is not None:
        print_adapters(args.adapters, args.subjects)


if __name__ == "__main__":
    main()
