"""One optimizer step of a run: how losses add up, and what AdamW makes of their gradients."""

from __future__ import annotations

from dataclasses import replace
from itertools import repeat
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from dora_diffusion.adapters.compiled import compile_blocks
from dora_diffusion.adapters.scope import norm_scope
from dora_diffusion.config import TrainConfig
from dora_diffusion.data.captions import class_caption
from dora_diffusion.numerics.loss import min_snr
from dora_diffusion.training.batch import draw_batch
from dora_diffusion.training.inputs.plan import plan_run
from dora_diffusion.training.metrics import TrainingError
from dora_diffusion.training.pack_step import _of_one_size
from dora_diffusion.training.processes import make_accelerator
from dora_diffusion.training.recipe import assemble
from dora_diffusion.training.run import Run
from tests.training.helpers import accelerator_of_fp16, losses_by, open_run, terms_of

PRIOR_WEIGHT = 0.7


@pytest.mark.parametrize(
    ("prior", "limit"), [(None, 0.0), (None, 1e-3), ("images", 1e-3), ("image-free", 0.0)]
)
def test_one_step_is_the_mean_of_its_losses_clipped_and_taken_by_adamw(
    sd1_folder, shaped_photos, tmp_path, prior, limit
) -> None:
    settings = {
        "train_text_encoder": True,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "masked_loss": True,
        "noise_offset": 0.1,
        "learning_rate": 1e-3,
        "text_encoder_lr": 3e-4,
        "magnitude_lr": 7e-4,
        "loraplus_ratio": 4.0,
        "adam_weight_decay": 0.1,
        "max_grad_norm": limit,
        "with_prior_preservation": prior is not None,
        "prior_loss_weight": PRIOR_WEIGHT,
        "num_class_images": 3,
        "validation_inference_steps": 1,
        "class_data_dir": str(tmp_path / "class"),
    }
    if prior is not None:
        settings["prior_preservation_mode"] = prior
    session = open_run(sd1_folder, shaped_photos, tmp_path / "a", **settings)
    expected = open_run(sd1_folder, shaped_photos, tmp_path / "b", **settings)
    parameters = expected.weights.parameters()
    start = {name: p.detach().clone() for name, p in parameters.items()}
    record = session.step(1)

    losses = by_hand(expected, image_free=prior == "image-free")
    loss, prior_loss = torch.stack(losses).mean(dim=0)
    assert float(record["loss"]) == pytest.approx(float(loss), rel=1e-5)
    assert (float(prior_loss) > 0) == (prior is not None)
    assert ("prior_loss" in record) == (prior is not None)
    if prior is not None:
        assert float(record["prior_loss"]) == pytest.approx(float(prior_loss), rel=1e-5)
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in parameters.items()
    }
    total = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
    assert float(record["grad_norm"]) == pytest.approx(float(total), rel=1e-4)
    share = min(1.0, limit / float(total)) if limit else 1.0
    checked = set()
    for name, parameter in session.weights.parameters().items():
        kind = name.rsplit(".", 1)[1]
        rate = 1e-3 if name.startswith("unet.") else 3e-4
        rate = {"magnitude": 7e-4, "up": 4 * rate, "down": rate}[kind]
        decay = 0.0 if kind == "magnitude" else 0.1
        g = gradients[name] * share
        # AdamW's first step: both moments, corrected, are the gradient's.
        wanted = start[name] * (1 - rate * decay) - rate * g / (g.abs() + 1e-8)
        # A gradient near Adam's epsilon is lost in its own rounding.
        clear = (g.abs() > 1e-5 * g.abs().max()) & (g.abs() > 1e-7)
        if clear.any():
            torch.testing.assert_close(parameter[clear], wanted[clear], rtol=1e-5, atol=2e-6)
            checked.add(kind)
    assert checked == {"down", "up", "magnitude"}


def by_hand(session: Run, image_free: bool) -> list[torch.Tensor]:
    """Losses ``(total, prior)`` of the step's two batches; the mean of their gradients is left."""
    components = session.components
    terms = terms_of(components, snr_gamma=5.0)
    losses = []
    for micro_step in range(2):
        batch = next(session.step.batches.samples)
        held = [class_caption(c, "sks", "mug") for c in batch.captions] if image_free else ()
        batch = replace(batch, class_captions=held)
        config = TrainConfig(seed=3, noise_offset=0.1)
        drawn = draw_batch(components, components.process, batch, config, micro_step)
        with norm_scope(*session.weights.modules.values()):
            subject, prior = losses_by(components, terms, drawn, train_text_encoder=True)
            total = subject + PRIOR_WEIGHT * prior
            (total / 2).backward()
        losses.append(torch.stack([total.detach(), prior.detach()]))
    return losses


def test_each_step_draws_dropout_from_a_seed_of_its_own(tiny_run) -> None:
    seeds = []
    for seed in (3, 3, 4):
        config = tiny_run(seed=seed)
        learner = assemble(plan_run(config), make_accelerator(config)).step
        for step in (1, 2, 1):
            learner.begin(step)
            seeds.append(torch.initial_seed())
    first, second, again = seeds[:3]
    assert first == again != second
    assert seeds[3:6] == seeds[:3]
    assert not {*seeds[6:]} & {*seeds[:3]}


def test_each_process_draws_dropout_of_its_own(tiny_run) -> None:
    config, seeds = tiny_run(), []
    step = assemble(plan_run(config), make_accelerator(config)).step
    for index in (0, 1, 0):
        step.accelerator = SimpleNamespace(process_index=index)
        step.begin(1)
        seeds.append(torch.initial_seed())
    assert seeds[0] == seeds[2] != seeds[1]


def test_a_loss_that_is_not_finite_moves_nothing(tiny_run) -> None:
    config = tiny_run()
    session = assemble(plan_run(config), make_accelerator(config))
    step = session.step
    batch = next(step.batches)
    broken = replace(batch, noise=torch.full_like(batch.noise, torch.nan))
    step.batches = repeat(broken)
    parameters = session.weights.parameters()
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    with pytest.raises(TrainingError, match="loss"):
        session.step(1)
    assert all(torch.equal(parameter, before[name]) for name, parameter in parameters.items())
    assert not step.optimizer.state


def test_batches_of_one_size_are_computed_together() -> None:
    shapes = {0: (2, 4, 8, 8), 1: (2, 4, 8, 16), 2: (1, 4, 8, 8)}
    given = {
        k: SimpleNamespace(batch=SimpleNamespace(latents=torch.empty(shape)))
        for k, shape in shapes.items()
    }
    groups = list(_of_one_size(given))  # type: ignore[arg-type]
    assert groups == [{0: given[0], 2: given[2]}, {1: given[1]}]


def test_in_fp16_gradients_are_unscaled_before_their_norm_is_measured_and_limited(tiny_run) -> None:
    limit, norms = 1e-3, []
    for precision, max_grad_norm in [("no", 0.0), ("fp16", 0.0), ("fp16", limit)]:
        config = tiny_run(mixed_precision=precision, max_grad_norm=max_grad_norm)
        made = (accelerator_of_fp16 if precision == "fp16" else make_accelerator)(config)
        session = assemble(plan_run(config), made)
        session.step.optimizer.zero_grad = lambda set_to_none: None
        norms.append(float(session.step(1)["grad_norm"]))
        left = float(torch.nn.utils.get_total_norm([p.grad for p in session.step.parameters]))
        assert left == pytest.approx(max_grad_norm or norms[0], rel=0.05)
    assert norms == pytest.approx([norms[0]] * 3, rel=0.05)
    assert norms[0] > 2 * limit


def test_min_snr_reaches_the_loss(tiny_run) -> None:
    """The loss is that of the samples times their weights."""
    session, plain = (
        assemble(plan_run(config), make_accelerator(config))
        for config in (tiny_run(snr_gamma=1e-3), tiny_run(snr_gamma=0.0))
    )
    timesteps = next(plain.step.batches).inputs.timesteps
    alpha_bar = plain.components.scheduler.alphas_cumprod[timesteps]
    expected = min_snr(alpha_bar / (1 - alpha_bar), "epsilon", 1e-3)
    again = assemble(plan_run(plain.config), plain.accelerator)
    ratio = float(session.step(1)["loss"]) / float(again.step(1)["loss"])
    assert ratio == pytest.approx(float(expected), rel=1e-5)
    assert ratio != pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize(
    "settings", [{}, pytest.param({"use_dora": False}, marks=pytest.mark.slow)], ids=str
)
def test_compiled_blocks_learn_what_others_do_and_are_compiled_once(
    settings: dict[str, Any], tiny_run
) -> None:
    """The adapters' pass and that of the base, for the image-free prior; with no later step."""
    config = tiny_run(
        with_prior_preservation=True, prior_preservation_mode="image-free", class_word="mug",
        gradient_accumulation_steps=2, **settings,
    )  # fmt: skip
    plain, compiled = (assemble(plan_run(config), make_accelerator(config)) for _ in range(2))
    torch._dynamo.reset()
    counters.clear()
    # One kind of block, which has adapters here: each takes seconds.
    block = compiled.components.denoiser.mid_block
    block._repeated_blocks = ["BasicTransformerBlock"]
    compile_blocks(block, backend="aot_eager")
    graphs = []
    for step in (1, 2, 3):
        records = plain.step(step), compiled.step(step)
        assert float(records[0]["loss"]) == pytest.approx(float(records[1]["loss"]), rel=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[2] > 0
    parameters = (session.weights.parameters().values() for session in (plain, compiled))
    for own, other in zip(*parameters, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-5)
