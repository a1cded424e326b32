"""Training from settings to results: check, load, resolve, assemble, step and write."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_diffusion.adapters.inject import AdapterSet
from dora_diffusion.config import TrainConfig
from dora_diffusion.data.dataset import iterate_batches
from dora_diffusion.data.images import reading_once
from dora_diffusion.models.components import Components
from dora_diffusion.numerics.process import NoiseProcess
from dora_diffusion.training import events
from dora_diffusion.training.batch import Batches
from dora_diffusion.training.conditioner import Conditioner
from dora_diffusion.training.features.code import Select, code_of
from dora_diffusion.training.features.outside import naming_features
from dora_diffusion.training.folder import RunFolder, TrainResult
from dora_diffusion.training.inputs.base import (
    LoadBase,
    configure_reading,
    load_base,
    move_step_modules,
)
from dora_diffusion.training.inputs.plan import RunPlan, check_with_model, plan_run
from dora_diffusion.training.inputs.resolve import (
    open_data,
    resolve_settings,
    run_resolution,
)
from dora_diffusion.training.metrics import TrainingError
from dora_diffusion.training.optimizer import build_lr_schedule, build_optimizer, stepped_parameters
from dora_diffusion.training.processes import make_accelerator, shard, shards_model
from dora_diffusion.training.results.folders import output_folder
from dora_diffusion.training.run import Run
from dora_diffusion.training.signals import Stopped, StopRequest
from dora_diffusion.training.step import Step
from dora_diffusion.training.terms import Denoising, RowLoss, Term
from dora_diffusion.training.trainable.adapters import StartingAdapter, inject_trained

if TYPE_CHECKING:
    from dora_diffusion.training.trainable.weights import TrainedWeights

__all__ = ["TrainResult", "TrainingError", "train"]


def train(
    config: TrainConfig,
    on_event: events.OnEvent | None = None,
    *,
    load: LoadBase | None = None,
) -> TrainResult:
    """Train a model on photos of a subject, and write the result to ``config.output_dir``.

    With ``push_to_hub`` the result is published as a private repository. SIGINT, SIGTERM and SIGHUP
    stop the run: immediately before the first step, later with a checkpoint after the current step.
    A second SIGINT or SIGTERM is ignored with a warning; a third one ends the process.

    Args:
        config: All settings.
        on_event: Called in the main process with each event (`dora_diffusion.training.events`).
        load: Loads the base model. A `models.load.BaseCache` keeps it for the next run.

    Raises:
        ConfigError, PhotoError, AdapterFormatError, ModelNotFoundError, TargetError: Before
            training starts.
        TrainingError: If loss, gradients or weights are not finite. Nothing is written from then
            on; files that were written before are kept.
        ExportError: If the result cannot be published; before training if that is known by then.
        DiskFullError: If the disk has no space for a checkpoint or its adapter alone, or for the
            final adapter. Earlier checkpoints are kept.

    Any other error during training saves a checkpoint first.

    Example:
        >>> result = train(TrainConfig(
        ...     instance_data_dir="samples/bolt_mug", instance_prompt="a photo of a sks mug",
        ...     max_train_steps=2, num_validation_images=0, checkpointing_steps=0,
        ...     output_dir="demo-output/doctest", overwrite_output_dir=True))
        >>> result.adapter.name
        'pytorch_lora_weights.safetensors'
    """
    with naming_features(type(config)), StopRequest() as stop, reading_once():
        plan = plan_run(config)
        config = plan.config
        try:
            accelerator = make_accelerator(config)
            is_main = accelerator.is_main_process
            show = on_event if on_event and is_main else events.ignore
            with output_folder(config) if is_main else contextlib.nullcontext():
                accelerator.wait_for_everyone()
                model, device = config.pretrained_model_name_or_path, str(accelerator.device)
                show(events.ModelLoading(model, device, config.mixed_precision))
                run = assemble(plan, accelerator, show, load=load)
                result = _train(RunFolder(run, show, stop))
                accelerator.end_training()
                return _published(result, config) if is_main and config.push_to_hub else result
        except Stopped:
            return TrainResult(Path(config.output_dir), None, 0, 0, stop.signal_number, {})


def _train(folder: RunFolder) -> TrainResult:
    """Train a run and write its result."""
    try:
        folder.begin()
        while not folder.is_over:
            folder.record(folder.run.step(folder.steps + 1))
        return folder.finish()
    except Exception as error:
        folder.fail(error)
        raise


def _published(result: TrainResult, config: TrainConfig) -> TrainResult:
    """Publish a result on the hub, unless the run was interrupted."""
    from dora_diffusion.export import hub

    if result.interrupted:
        return result
    try:
        address = hub.push(config.output_dir, config.hub_model_id or "", private=True)
        return replace(result, published=address)
    except hub.HubError as error:
        raise hub.HubError(
            f"the result is in {config.output_dir}, but was not published: {error}"
        ) from error


def assemble(
    plan: RunPlan,
    accelerator: Any,
    on_event: events.OnEvent = events.ignore,
    *,
    base: Components | None = None,
    load: LoadBase | None = None,
) -> Run:
    """Load the model of a run, resolve the settings and build the training step.

    Args:
        plan: Settings and inputs (`plan_run`).
        accelerator: Devices and processes (`make_accelerator`).
        on_event: Called with `ClassImagesProgress` while class images are generated.
        base: The model without adapters, if it is loaded already (`load_base`).
        load: Loads the model (`load_base`).

    Raises:
        ConfigError, PhotoError, ModelNotFoundError, TargetError: If an input is invalid.
    """
    config, subjects = plan.config, plan.subjects
    loaded = base or load_base(config, accelerator, load)
    components = configure_reading(loaded, config)
    start = check_with_model(components, config, plan.start)
    config = replace(config, resolution=run_resolution(config, components))
    data = open_data(config, subjects, plan.photos, components, accelerator, on_event)
    config = resolve_settings(config, subjects, components, data, accelerator)
    validation = plan.validate(config, components, accelerator) if plan.validate else None
    move_step_modules(config, components)
    weights = select_trainable(components, config, start)
    samples = iterate_batches(*data, num_workers=config.dataloader_num_workers)
    if shards_model(accelerator):
        shard(components, weights.modules, weights.trained, accelerator)
    process = components.process
    batches = Batches(config, components, process, samples, accelerator.process_index)
    return Run(
        config=config,
        subjects=subjects,
        accelerator=accelerator,
        components=components,
        weights=weights,
        dataset=data.dataset,
        sampler=data.sampler,
        step=build_step(config, accelerator, components, weights, batches),
        validation=validation,
    )


def build_step(
    config: TrainConfig,
    accelerator: Any,
    components: Components,
    weights: TrainedWeights,
    batches: Batches,
) -> Step:
    """Build the training step of a run, with its loss, optimizer, schedule and hooks.

    Args:
        config: Resolved settings.
        accelerator: Devices and processes.
        components: The model.
        weights: Trained weights, on their device.
        batches: Batches of the run.
    """
    shards = shards_model(accelerator)
    adapters = AdapterSet.of(*weights.modules.values())
    groups, order = weights.groups(config), adapters.parameters()
    parameters = stepped_parameters(groups, config, shards=shards, order=order)
    optimizer = build_optimizer(parameters.groups, config)
    # Built before Accelerate wraps the optimizer, since the schedule patches its `step` method.
    lr_schedule = build_lr_schedule(optimizer, config)
    step = Step(
        config=config,
        accelerator=accelerator,
        components=components,
        weights=weights,
        adapters=adapters,
        batches=batches,
        encode=Conditioner(components, config.train_text_encoder),
        terms=build_terms(config, batches.process),
        parameters=parameters,
        optimizer=accelerator.prepare_optimizer(optimizer),
        lr_schedule=lr_schedule,
    )
    step.hooks = [hook for one in code_of(config) for hook in one.hooks(step)]
    return step


def build_terms(config: TrainConfig, process: NoiseProcess) -> list[Term]:
    """Build the terms of a run's loss."""
    loss = RowLoss(process, config.snr_gamma or 0.0)
    if config.loss_type == "huber":
        delta = partial(process.huber_delta, schedule=config.huber_schedule, c=config.huber_c)
        loss = replace(loss, delta=delta)
    parts = code_of(config)
    for one in parts:
        loss = one.loss(loss)
    terms: list[Term] = [Denoising(loss)] if config.has_photos else []
    for one in parts:
        terms += one.terms(loss)
    return terms


def select_trainable(
    components: Components, config: TrainConfig, start: StartingAdapter | None
) -> TrainedWeights:
    """Select the weights that a run trains, and set their components to training mode.

    Args:
        components: The model. Adapters and new words are added to it.
        config: Settings.
        start: Adapter that the run starts from, or None.

    Raises:
        TargetError, ValueError, AdapterFormatError: If the weights cannot be trained.
    """
    select: Select = partial(inject_trained, components, config, start)
    for one in code_of(config):
        select = partial(one.weights, select, components, start)
    return select()
