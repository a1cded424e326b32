"""Inputs of a step, row by row; conditioning against Diffusers' own pipelines."""

from __future__ import annotations

import json
import operator
import shutil
import warnings
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from dora_diffusion.adapters.inject import adapter_parameters, inject_adapters
from dora_diffusion.config import AdapterConfig, TrainConfig
from dora_diffusion.data.crops import CropRecord
from dora_diffusion.data.dataset import SampleBatch
from dora_diffusion.models.load import load_components
from dora_diffusion.models.text import encode_prompts
from dora_diffusion.training import conditioner
from dora_diffusion.training.batch import draw_batch
from dora_diffusion.training.conditioner import Conditioner
from dora_diffusion.training.inputs.plan import plan_run
from dora_diffusion.training.processes import make_accelerator
from dora_diffusion.training.recipe import assemble
from tests.training.helpers import open_run, small_samples

CAPTIONS = ["a photo of a sks dog", "", "a red toy", ""]
FAMILIES = ("sd1_folder", "sd2_folder", "sdxl_folder", "sdxl_encoded")


class OneOf:
    """One of several processes' accelerator, with nobody to talk to."""

    def __init__(self, accelerator: Any, process_index: int, num_processes: int) -> None:
        self.accelerator = accelerator
        self.process_index, self.num_processes = process_index, num_processes

    def __getattr__(self, name: str) -> Any:
        return getattr(self.accelerator, name)

    def prepare_model(self, model: Any) -> Any:
        return model


def test_two_processes_draw_the_rows_of_one(tiny_run) -> None:
    """Photos, class images and all that is drawn for them: no process repeats another's."""

    def inputs(batch_size: int, process_index: int, num_processes: int) -> Any:
        config = tiny_run(
            train_batch_size=batch_size, with_prior_preservation=True, num_class_images=3,
            prior_preservation_mode="images", class_data_dir=str(small_samples() / "heart_teapot"),
        )  # fmt: skip
        accelerator = OneOf(make_accelerator(config), process_index, num_processes)
        session = assemble(plan_run(config), accelerator)
        next(session.step.batches)
        return next(session.step.batches)

    whole = inputs(4, 0, 1)
    parts = [inputs(2, index, 2) for index in range(2)]
    assert [part.photos for part in (whole, *parts)] == [4, 2, 2]
    for name in ("noise", "inputs.timesteps", "latents"):
        read = operator.attrgetter(name)
        drawn = [read(part) for part in parts]
        together = torch.cat([rows[:2] for rows in drawn] + [rows[2:] for rows in drawn])
        torch.testing.assert_close(together, read(whole), rtol=0, atol=1e-5)
    assert len({tuple(row.flatten().tolist()) for row in whole.noise}) == 8


def test_every_row_is_one_photo_with_its_own_caption_crop_and_mask(
    sdxl_folder, shaped_photos, tmp_path
) -> None:
    session = open_run(
        sdxl_folder, shaped_photos, tmp_path / "out",
        train_batch_size=3, masked_loss=True, random_flip=True, dataloader_num_workers=0,
    )  # fmt: skip
    # No two photos share a caption or a shape.
    files = {
        path.read_text(encoding="utf-8"): path.with_suffix(".png")
        for path in shaped_photos.glob("*.txt")
    }
    shapes, vae = set(), session.components.vae
    for _ in range(4):
        batch = next(session.step.batches.samples)
        config = TrainConfig(seed=0, noise_offset=0.0)
        inputs = draw_batch(session.components, session.components.process, batch, config, 0).inputs
        for row, caption in enumerate(batch.captions):
            path = files[caption]
            image = Image.open(path).convert("RGB")
            crop = batch.crops[row]
            assert crop.original_size == (image.height, image.width)
            (top, left), (height, width) = crop.crop_top_left, crop.target_size
            # The short side becomes 64 pixels; the crop is drawn along the long one.
            scale = 64 / min(image.size)
            size = max(64, round(image.width * scale)), max(64, round(image.height * scale))
            box = (left, top, left + width, top + height)
            source = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if crop.flipped else image
            resized = source.resize(size, Image.Resampling.LANCZOS, reducing_gap=None).crop(box)
            pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None] / 127.5 - 1
            with torch.no_grad():
                moments = vae.encode(pixels).latent_dist.parameters[0]
            torch.testing.assert_close(batch.moments[row], moments, atol=2e-2, rtol=2e-2)
            wanted = [*crop.original_size, top, left, height, width]
            assert inputs.time_ids[row].tolist() == wanted
            bright = batch.mask[row, 0].mean(dim=1)
            if path.with_suffix(".mask.png").is_file():
                # Down the photo from black to white.
                full = torch.linspace(0, 1, size[1])[top : top + height]
                rows = full.view(len(bright), -1).mean(dim=1)
                torch.testing.assert_close(bright, rows, atol=0.03, rtol=0)
            else:
                assert bool((bright == 1).all())
            shapes.add((top > 0, left > 0))
    assert len(shapes) > 1, "crops along both sides must have been compared"


def test_sizes_of_large_photos_stay_exact(sdxl_folder) -> None:
    """Half precision holds no odd number above 2048: sizes and corners are never cast to it."""
    batch = SampleBatch(
        ["photo"],
        ["a photo"],
        [CropRecord((4001, 3003), (2049, 257), (128, 96))],
        torch.tensor([False]),
        moments=torch.zeros(1, 8, 16, 12),
    )
    components = load_components(sdxl_folder, dtype=torch.bfloat16)
    config = TrainConfig(seed=0, noise_offset=0.0)
    inputs = draw_batch(components, components.process, batch, config, 0).inputs
    assert inputs.time_ids.tolist() == [[4001, 3003, 2049, 257, 128, 96]]


@pytest.fixture
def folder(request, tmp_path):
    """A pipeline folder; ``sdxl_encoded`` is an SDXL whose guidance encodes the empty prompt."""
    if request.param != "sdxl_encoded":
        return request.getfixturevalue(request.param)
    folder = shutil.copytree(request.getfixturevalue("sdxl_folder"), tmp_path / "sdxl")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    (folder / "model_index.json").write_text(
        json.dumps(index | {"force_zeros_for_empty_prompt": False}), encoding="utf-8"
    )
    return folder


def expected(folder, captions):
    """Diffusers' embeddings: of each caption, and of guidance where the caption was dropped."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    rows = []
    for caption in captions:
        encoded = pipeline.encode_prompt(
            caption or "anything", device="cpu", num_images_per_prompt=1,
            do_classifier_free_guidance=True, negative_prompt=None,
        )  # fmt: skip
        half = len(encoded) // 2  # (hidden, negative) or (hidden, negative, pooled, negative)
        rows.append([encoded[2 * part + (not caption)] for part in range(half)])
    return [torch.cat(parts) for parts in zip(*rows, strict=True)]


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("folder", FAMILIES, indirect=True)
def test_a_dropped_caption_is_conditioned_as_guidance_samples_it(folder, trains):
    conditioning = Conditioner(load_components(folder), trains)(CAPTIONS)
    found = conditioning.encoder_hidden_states, conditioning.pooled
    for ours, theirs in zip(filter(None.__ne__, found), expected(folder, CAPTIONS), strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("folder", "learns"),
    [("sd1_folder", True), ("sdxl_folder", False), ("sdxl_encoded", True)],
    indirect=["folder"],
)
def test_text_encoders_learn_from_a_dropped_caption_only_where_it_is_encoded(folder, learns):
    """Beside a kept caption, whose gradient must be what it is without the dropped one."""
    components = load_components(folder)
    encoders = components.text_encoders
    for encoder in encoders:
        inject_adapters(encoder, AdapterConfig(targets=("text-encoder-attention",), rank=2))
    parameters = [p for encoder in encoders for p in adapter_parameters(encoder)]
    condition = Conditioner(components, trains=True)

    def gradients(captions):
        hidden = condition(captions).encoder_hidden_states
        grads = torch.autograd.grad(
            hidden.square().sum(), parameters, allow_unused=True, materialize_grads=True
        )
        return torch.cat([grad.flatten() for grad in grads])

    kept, both, dropped = gradients(["a dog"]), gradients(["a dog", ""]), gradients([""])
    assert kept.abs().max() > 0
    torch.testing.assert_close(both, kept + dropped, rtol=1e-4, atol=1e-4)
    assert (dropped.abs().max() > 0) == learns


def test_captions_are_warned_of_once_and_not_kept_for_ever(sd1_folder, monkeypatch):

    components, long = load_components(str(sd1_folder)), "mug " * 200
    trains = Conditioner(components, trains=True)
    with pytest.warns(UserWarning, match="longer than the model's"):
        trains([long, "a mug"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trains(["a mug", long])
    monkeypatch.setattr(conditioner, "KNOWN_CAPTIONS", 2)
    kept = Conditioner(components, trains=False)
    whole = kept(["a", "b", "c", "a"]).encoder_hidden_states
    assert len(kept._cache) == 2
    assert torch.equal(whole[0], whole[3])
    assert torch.equal(kept(["a"]).encoder_hidden_states, whole[:1])


@pytest.mark.parametrize("trains", [False, True])
def test_a_dropped_caption_is_read_as_guidance_reads_it(sd1_folder, trains):
    """Without clip skip, as Diffusers' pipelines read their negative prompt."""
    components = load_components(sd1_folder)
    skipping = components.reading(1, 150)
    rows = Conditioner(skipping, trains)(["", "a dog", "a cat " * 80])
    alone = [components, skipping, skipping]
    for row, (model, caption) in enumerate(zip(alone, ["", "a dog", "a cat " * 80], strict=True)):
        expected = encode_prompts(model, [caption]).encoder_hidden_states
        states = rows.encoder_hidden_states[row : row + 1]
        assert states.shape[1] == 154
        repeated = expected.repeat(1, 154 // expected.shape[1], 1)
        torch.testing.assert_close(states, repeated, atol=1e-5, rtol=1e-5)


def test_what_is_drawn_anew_is_encoded_anew(tiny_run, photos, monkeypatch):
    """Losses with cached encodings are those of fresh ones; class captions follow each draw."""
    long = ", made of" + " wood and old tin" * 20
    for path in photos.glob("*.txt"):
        text = f"red sks mug, grass, sun{long}\nthe sks mug, day, a table, wood{long}"
        path.write_text(text, encoding="utf-8")
    config = tiny_run(
        caption_per_line=True, shuffle_tags=True, tag_dropout=0.3, caption_dropout=0.1,
        max_token_length=150, clip_skip=1, with_prior_preservation=True, train_batch_size=2,
        caption_prefix="my,",
    )  # fmt: skip
    seen = []

    def losses_of(name):
        session = assemble(plan_run(config), make_accelerator(config))
        questions = session.step.questions

        def drawn(batch):
            made = questions(batch)
            class_captions = [*made.batch.class_captions.values()]
            seen.append((name, made.batch.captions, class_captions))
            return made

        monkeypatch.setattr(session.step, "questions", drawn)
        return [session.step(step)["loss"] for step in (1, 2, 3)]

    cached = losses_of("cached")

    def encode(self, caption):
        with torch.no_grad():
            return self._encode([caption])

    monkeypatch.setattr(Conditioner, "_cached", encode)
    assert losses_of("fresh") == cached
    assert [row[1:] for row in seen[:3]] == [row[1:] for row in seen[3:]]
    assert len({caption for _, captions, _ in seen for caption in captions}) >= 5
    for _, captions, class_captions in seen:
        assert [c.replace("sks mug", "mug") for c in captions] == class_captions
        assert all("mug" in c and "sks" not in c for c in class_captions if c)
