"""Full fine-tuning: against a plain loop of torch, and what its result is."""

from __future__ import annotations

import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from dora_diffusion.adapters.targets import match_targets
from dora_diffusion.cli import main as cli
from dora_diffusion.config import TrainConfig, without_effect
from dora_diffusion.export.files import open_model
from dora_diffusion.models.load import load_components
from dora_diffusion.training.features import full
from dora_diffusion.training.inputs.plan import plan_run
from dora_diffusion.training.metrics import TrainingError
from dora_diffusion.training.processes import make_accelerator
from dora_diffusion.training.recipe import assemble, train
from dora_diffusion.training.results.checkpoint import checkpoints_in
from tests.emulation import OneDNN
from tests.refusal import refused
from tests.training.helpers import (
    accelerator_of_fp16,
    compile_without_compiler,
    losses,
    make_config,
    names,
    no_room,
)

STEPS, RATE, TEXT_RATE, DECAY = 3, 2e-3, 5e-4, 0.1


@pytest.fixture
def full_config(sd1_folder, photos, tmp_path):
    return make_config(
        sd1_folder, photos, tmp_path / "run", method="full", max_train_steps=STEPS,
        learning_rate=RATE, text_encoder_lr=TEXT_RATE, adam_weight_decay=DECAY, max_grad_norm=0.5,
        rank=8, conv_rank=4, validation_inference_steps=25,
    )  # fmt: skip


def session_of(config):
    return assemble(plan_run(config), make_accelerator(config))


def stored(source):
    with open_model(source) as model:
        return {name: model[name] for name in model.specs}


def changed(before, after):
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_three_steps_are_those_of_a_plain_loop(full_config, sd1_folder, tmp_path):
    config = replace(full_config, train_text_encoder=True, snr_gamma=0, train_batch_size=2)
    draws = session_of(replace(config, output_dir=str(tmp_path / "draws"))).step.batches
    unet = diffusers.UNet2DConditionModel.from_pretrained(sd1_folder / "unet").train()
    text = transformers.CLIPTextModel.from_pretrained(sd1_folder / "text_encoder").train()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(sd1_folder / "tokenizer")
    noise_schedule = diffusers.DDPMScheduler.from_pretrained(sd1_folder / "scheduler")
    weights = [*unet.parameters(), *text.parameters()]
    groups = [{"params": unet.parameters(), "lr": RATE}, {"params": text.parameters()}]
    optimizer = torch.optim.AdamW(groups, lr=TEXT_RATE, weight_decay=DECAY)
    expected = []
    for _ in range(STEPS):
        batch = next(draws)
        captions = list(batch.captions)
        ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        states = text(ids.input_ids)[0]
        timesteps = batch.inputs.timesteps
        noisy = noise_schedule.add_noise(batch.latents, batch.noise, timesteps)
        prediction = unet(noisy, timesteps, states).sample
        loss = torch.nn.functional.mse_loss(prediction, batch.noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 0.5)
        optimizer.step()
        expected.append(float(loss))
    result = train(config)
    assert list(losses(result.output_dir).values()) == pytest.approx(expected, rel=1e-5)
    learned = load_components(result.model)
    for ours, reference in ((learned.denoiser, unet), (learned.text_encoders[0], text)):
        wanted = dict(reference.named_parameters())
        for name, parameter in ours.named_parameters():
            torch.testing.assert_close(parameter, wanted[name], rtol=1e-4, atol=2e-5)


def test_the_weights_of_targets_leave_the_others_bit_identical(full_config, sd1_folder):
    config = replace(full_config, full_weights="targets", targets=["attention"])
    before, after = stored(sd1_folder), stored(train(config).model)
    paths = match_targets(load_components(sd1_folder).denoiser, ["attention"])
    moved = changed(before, after)
    assert moved
    assert moved == {
        name for name in before for path in paths if name.startswith(f"unet.{path}.")
    }  # weights and biases


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_no_learning_rate_gives_the_bits_of_the_base(full_config, sd1_folder, tmp_path, dtype):
    base = tmp_path / "half"
    load_components(sd1_folder, dtype=dtype).pipeline().save_pretrained(base)
    config = replace(
        full_config, pretrained_model_name_or_path=str(base), learning_rate=0.0,
        mixed_precision="bf16",
    )  # fmt: skip
    with pytest.raises(TrainingError, match="nothing was learned"):  # It is written all the same.
        train(config)
    before, after = stored(base), stored(Path(config.output_dir, "model"))
    assert {tensor.dtype for name, tensor in after.items() if "unet" in name} == {dtype}
    assert changed(before, after) == set()


def test_weights_train_in_float32_whatever_is_computed_in(full_config, sd1_folder):
    session = session_of(replace(full_config, mixed_precision="bf16"))
    seen = set()
    session.components.denoiser.conv_out.register_forward_hook(lambda *a: seen.add(a[2].dtype))
    session.step(1)
    assert seen == {torch.bfloat16}
    parameters = session.weights.parameters()
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    assert len(parameters) == len(list(session.components.denoiser.parameters()))


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_resumed_run_is_that_of_one_piece_bit_for_bit(full_config, tmp_path, optimizer):
    config = replace(
        full_config, optimizer=optimizer, gradient_accumulation_steps=2, max_train_steps=4,
        gradient_checkpointing=True, train_text_encoder=True, checkpointing_steps=2,
    )  # fmt: skip
    whole = train(config)
    halves = replace(config, output_dir=str(tmp_path / "halves"))
    early, _ = checkpoints_in(whole.output_dir)
    shutil.copytree(early, tmp_path / "halves" / early.name)
    resumed = train(replace(halves, resume_from_checkpoint="latest"))
    assert losses(resumed.output_dir) == {s: losses(whole.output_dir)[s] for s in (3, 4)}
    assert changed(stored(whole.model), stored(resumed.model)) == set()
    # Each checkpoint is a model at its step.
    assert changed(stored(early), stored(whole.model))


def test_compiled_blocks_train_the_same_weights(full_config, tmp_path, monkeypatch):
    counter = CompileCounterWithBackend("aot_eager")  # without a C++ compiler
    compile_without_compiler(monkeypatch, counter)
    config = replace(
        full_config, with_prior_preservation=True, prior_preservation_mode="image-free",
    )  # fmt: skip
    plain, compiled = (
        train(config),
        train(replace(config, output_dir=str(tmp_path / "compiled"), compile=True)),
    )
    assert counter.frame_count
    for figure in ("loss", "prior_loss"):
        expected = losses(plain.output_dir, figure)
        assert losses(compiled.output_dir, figure) == pytest.approx(expected, rel=1e-5)
    before, after = stored(plain.model), stored(compiled.model)
    assert all(torch.allclose(before[name], after[name], atol=1e-4) for name in before)


def test_the_image_free_prior_is_held_at_the_base(full_config, sd1_folder):
    config = replace(
        full_config, with_prior_preservation=True, prior_preservation_mode="image-free",
    )  # fmt: skip
    session = session_of(config)
    base_weights = {n: p.detach().clone() for n, p in session.weights.parameters().items()}
    # Nothing has been learned yet: what is left is rounding, of rows in batches of other sizes.
    assert float(session.step(1)["prior_loss"]) < 1e-11
    assert float(session.step(2)["prior_loss"]) > 1e-10
    trained = {n: p.detach().clone() for n, p in session.weights.parameters().items()}
    with session.weights.base_weights():
        assert changed(base_weights, session.weights.parameters()) == set()
    assert changed(trained, session.weights.parameters()) == set()


@pytest.mark.parametrize(
    ("precision", "full_weights", "text_encoders", "checkpointing"),
    [
        pytest.param("bf16", "all", False, False, marks=pytest.mark.slow),
        ("bf16", "targets", True, True),
        ("fp16", "all", True, True),
        pytest.param("fp16", "targets", False, False, marks=pytest.mark.slow),
    ],
)
def test_in_half_precision_the_image_free_prior_is_that_of_float32(
    full_config, tmp_path, precision, full_weights, text_encoders, checkpointing
):
    """Loss and gradients of a prior that outweighs all else, on weights that have moved."""
    config = replace(
        full_config, with_prior_preservation=True, prior_preservation_mode="image-free",
        prior_loss_weight=100.0, full_weights=full_weights, train_text_encoder=text_encoders,
        gradient_checkpointing=checkpointing, max_grad_norm=0,
    )  # fmt: skip
    prior_losses, gradients = [], []
    for kind in ("no", precision):
        given = replace(config, mixed_precision=kind, output_dir=str(tmp_path / kind))
        accelerator = (accelerator_of_fp16 if kind == "fp16" else make_accelerator)(given)
        session = assemble(plan_run(given), accelerator)
        parameters = session.weights.parameters().values()
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in parameters:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(parameter * (1 + 0.3 * noise))
        session.step.optimizer.zero_grad = lambda set_to_none: None
        prior_losses.append(float(session.step(1)["prior_loss"]))
        gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
    assert prior_losses[0] > 0.01
    assert prior_losses[1] == pytest.approx(prior_losses[0], rel=0.05)
    error = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    assert error < 0.05


def test_samples_show_the_written_model_beside_the_base(full_config, sd1_folder, tmp_path):
    config = replace(full_config, num_validation_images=1, validation_inference_steps=2)
    result = train(replace(config, single_file=True))
    assert set(result.samples) == {"adapted", "base", "base_above_adapted"}
    assert result.adapter is None
    card = (result.output_dir / "README.md").read_text(encoding="utf-8")
    assert "Full fine-tuning on" in card
    assert "--base run/model" in card
    # One file in the original layout, and the run's folder in place of a model.
    single = stored(result.output_dir / "model.safetensors")
    folder = stored(result.output_dir)
    names_of_unet = [name for name in folder if name.startswith("unet.")]
    assert all(torch.equal(single[name], folder[name]) for name in names_of_unet)
    with refused("output_dir", "already contains a trained adapter or model"):
        train(config)


def test_a_disk_without_room_is_said_before_and_costs_no_run(full_config, monkeypatch):
    no_room(monkeypatch, 2**20)
    config = replace(full_config, checkpointing_steps=2)
    with pytest.warns(UserWarning, match="this run writes .* or more"):
        session_of(config)
    monkeypatch.setattr(full, "_check_disk", lambda *args: None)
    with pytest.raises(OSError, match="nothing can be saved at step 2: it needs"):
        train(config)
    folder = Path(config.output_dir)
    assert names(folder) == []
    assert not (folder / "model").exists()


def test_taps_that_meet_padding_alone_get_no_gradient_in_bf16():
    """Of a 3x3 kernel on a map of one pixel; the others' are what float32 computes, rounded."""
    conv = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1))
    full.widen_small_convolutions(conv)
    x = torch.randn(2, 16, 1, 1, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(x)
        small = conv(torch.ones(1, 16, 4, 4))
    assert (y.dtype, small.dtype) == (torch.bfloat16, torch.bfloat16)
    with OneDNN():
        y.float().sum().backward()
    expected = x.sum((0, 2, 3)).expand(24, 16)
    gradient = conv[0].weight.grad
    torch.testing.assert_close(gradient[:, :, 1, 1], expected, rtol=1e-6, atol=1e-6)
    gradient[:, :, 1, 1] = 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.fixture
def half_base(sd1_folder, tmp_path):
    base = tmp_path / "half"
    load_components(sd1_folder, dtype=torch.float16).pipeline().save_pretrained(base)
    return base


def test_the_share_of_what_was_learned_that_a_file_keeps(full_config, half_base, tmp_path):
    """Against the float32 values of the same steps; the resumed run writes them, too."""
    config = replace(
        full_config, pretrained_model_name_or_path=str(half_base), learning_rate=1e-5,
        checkpointing_steps=STEPS, train_text_encoder=True, text_encoder_lr=3e-5,
    )  # fmt: skip
    with pytest.warns(UserWarning, match=r"saved in float16, which preserves \d+% of the changes"):
        rounded = train(config)
    whole = train(replace(config, save_precision="float32", output_dir=str(tmp_path / "whole")))
    before, after, learned = (stored(m) for m in (half_base, rounded.model, whole.model))
    trained = [name for name in before if name.startswith(("unet.", "text_encoder."))]

    def distance(one, other):
        return sum((one[n].double() - other[n].double()).square().sum() for n in trained) ** 0.5

    expected = 1 - distance(after, learned) / distance(learned, before)
    assert 0.02 < expected < 0.9
    assert rounded.kept == pytest.approx(expected.item(), abs=1e-4)
    assert whole.kept == 1.0
    assert {learned[name].dtype for name in trained} == {torch.float32}
    assert {learned[n].dtype for n in before if n.startswith("vae.")} == {torch.float16}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        again = train(replace(config, save_precision="float32", resume_from_checkpoint="latest"))
    assert not any("saved in" in str(warning.message) for warning in said)
    assert again.kept == 1.0
    assert changed(stored(again.model), learned) == set()


@pytest.mark.parametrize(
    "word", ["float32", "bfloat16", pytest.param("float16", marks=pytest.mark.slow)]
)
def test_the_precision_of_a_model_is_that_which_is_asked_for(full_config, word, tmp_path):
    config = replace(full_config, save_precision=word, single_file=True, checkpointing_steps=STEPS)
    result = train(config)
    dtype = getattr(torch, word)
    (checkpoint,) = checkpoints_in(result.output_dir)
    for written in (result.model, result.output_dir / "model.safetensors", checkpoint):
        found = {name: t.dtype for name, t in stored(written).items()}
        assert {kind for n, kind in found.items() if n.startswith("unet.")} == {dtype}
        assert {kind for n, kind in found.items() if n.startswith("vae.")} == {torch.float32}
    size = sum(file.stat().st_size for file in result.model.rglob("*.safetensors"))
    report = session_of(config).weights.report
    assert report.model_bytes == pytest.approx(size, rel=0.1)
    size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    assert report.checkpoint_bytes == pytest.approx(size, rel=0.1)
    assert f"{report.parameters:,} parameters" in str(report)
    assert (result.kept == 1.0) == (word == "float32")


def test_words_for_a_precision(full_config):
    words = {
        "float32": ("float", "fp32", "FLOAT32"), "float16": ("fp16", "FP16"), "bfloat16": ("bf16",),
    }  # fmt: skip
    for name, spellings in words.items():
        for word in (name, *spellings):
            config = TrainConfig.from_dict({"method": "full", "save_precision": word})
            assert config.save_precision == name
    said = without_effect(replace(full_config, method="dora", save_precision="bfloat16"))
    assert said["save_precision"] == "save_precision has no effect because method is dora"


def test_the_last_line_says_what_the_file_keeps(full_config, half_base, tmp_path, capsys):
    flags = [
        "train", "--method", "full", "--pretrained_model_name_or_path", str(half_base),
        "--instance_data_dir", str(full_config.instance_data_dir), "--instance_prompt", "a sks mug",
        "--resolution", "32", "--max_train_steps", "1", "--num_validation_images", "0",
        "--checkpointing_steps", "0", "--output_dir",
    ]  # fmt: skip
    assert cli.main([*flags, str(tmp_path / "a")]) == 0
    printed = capsys.readouterr()
    share = float(re.fullmatch(
        r"the file keeps (.*)% of what training changed", printed.out.splitlines()[-1]
    )[1])  # fmt: skip
    assert 0 <= share < 90
    assert printed.err.count("--save_precision float32 to preserve all of them") == 1
