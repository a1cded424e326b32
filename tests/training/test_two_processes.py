"""Two processes train what one does, whether they share a model or each have it whole.

Each process takes seconds to start: one pair of them trains all that is looked at here.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dora_diffusion.training.recipe import train
from tests.flux2_klein import write_flux2_klein
from tests.training.helpers import losses, names
from tests.training.pairs import (
    EVERYTHING,
    Runs,
    agreeing,
    assert_agree,
    assert_same,
    needs_fork,
    needs_sharding,
    settings,
    shared,
    train_by_two,
)
from tests.z_image import write_z_image


@pytest.fixture(scope="module")
def small_model(sd1_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline with a UNet of two levels."""
    from diffusers import UNet2DConditionModel

    folder = Path(shutil.copytree(sd1_folder, tmp_path_factory.mktemp("small") / "model"))
    shutil.rmtree(folder / "unet")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        UNet2DConditionModel(
            sample_size=8, norm_num_groups=8, layers_per_block=1, block_out_channels=(16, 24),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=32, attention_head_dim=4,
        ).save_pretrained(folder / "unet")  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def runs(
    small_model: Path, sd1_folder: Path, small_photos: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Runs:  # fmt: skip
    """Full fine-tunings and DoRAs, by one process and by two; and one that goes wrong."""
    folder = tmp_path_factory.mktemp("runs")
    flow = {"max_train_steps": 2, "targets": ["full"], "resolution": 64, "learning_rate": 1e-3}
    z_image, klein = write_z_image(folder / "z-image"), write_flux2_klein(folder / "klein")
    configs = {
        "full": settings(small_model, folder / "full-1", **EVERYTHING),
        "dora": settings(small_model, folder / "dora-1", max_train_steps=2),
        "z-image": settings(z_image, folder / "z-image-1", **flow),
        "klein": settings(klein, folder / "klein-1", **flow, method="full"),
    }
    one, two = agreeing(sd1_folder, folder, {"ema_decay": 0.5})
    for config in (*configs.values(), one):
        train(config)
    wrong = settings(
        sd1_folder, folder / "wrong", targets=["cross-attention"], max_train_steps=9,
        checkpointing_steps=1, checkpoints_total_limit=1, train_batch_size=1,
    )  # fmt: skip
    pair = [*(shared(config, folder / f"{n}-2") for n, config in configs.items()), two, wrong]
    return Runs(folder, train_by_two(pair, folder / "two", is_last_wrong=True))


@needs_fork
@needs_sharding
def test_two_processes_train_what_one_does(runs: Runs) -> None:
    for name in ("full", "dora", "z-image", "klein"):
        assert_same(runs.folder / f"{name}-1", runs.folder / f"{name}-2")
    assert_agree(runs.folder / "agree-1", runs.folder / "agree-2")
    for look in (
        the_first_process_alone_tells_of_results,
        each_process_has_half_of_the_matrices,
        each_block_is_gathered_by_itself,
        the_files_are_those_of_one_process,
        layers_of_which_a_process_has_some_rows_have_the_gradients_of_whole_ones,
        what_goes_wrong_in_one_process_ends_both_with_what_there_is,
    ):
        look(runs)


def the_first_process_alone_tells_of_results(runs: Runs) -> None:
    assert [process["tells"] for process in runs.told] == [[True] * 5, [False] * 5]


def each_process_has_half_of_the_matrices(runs: Runs) -> None:
    for process in runs.told:
        for sizes in process["sizes"][:4]:
            assert sizes["whole"] / 2 <= sizes["alive"] <= 0.51 * sizes["whole"]


def each_block_is_gathered_by_itself(runs: Runs) -> None:
    """Blocks that the model's class names, and the model around them."""
    unet = {"BasicTransformerBlock": 4, "ResnetBlock2D": 8, "UpBlock2D": 1, "CrossAttnUpBlock2D": 1,
            "UNet2DConditionModel": 1}  # fmt: skip
    units = [
        {**unet, "CLIPTextEmbeddings": 1, "CLIPEncoderLayer": 3, "CLIPTextModel": 1},
        unet,
        {"ZImageTransformerBlock": 4, "ZImageTransformer2DModel": 1},
        {"Flux2TransformerBlock": 1, "Flux2SingleTransformerBlock": 2,
         "Flux2Transformer2DModel": 1},
    ]  # fmt: skip
    for process in runs.told:
        found = [sizes["units"] for sizes in process["sizes"][:4]]
        assert found == [{f"FSDP{n}": count for n, count in of_run.items()} for of_run in units]


def the_files_are_those_of_one_process(runs: Runs) -> None:
    one, two = (
        sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        for folder in (runs.folder / "full-1", runs.folder / "full-2")
    )
    assert one == two
    assert "samples/adapted.png" in two
    states = [
        torch.load(runs.folder / name / "checkpoint-1" / "training_state.pt", weights_only=True)
        for name in ("full-1", "full-2")
    ]
    shapes = [
        [(key, index, tuple(value.shape)) for index, moments in state["optimizer"]["state"].items()
         for key, value in moments.items()]
        for state in states
    ]  # fmt: skip
    assert shapes[0] == shapes[1]


def layers_of_which_a_process_has_some_rows_have_the_gradients_of_whole_ones(runs: Runs) -> None:
    """Outputs that two processes cannot share evenly, and a layer whose output is overwritten."""
    layers = [process["layers"] for process in runs.told]
    assert [process["rows"] for process in layers] == [[2, 3], [1, 2]]
    assert max(error for process in layers for error in process["errors"]) < 1e-6
    assert all(all(process["own"]) for process in layers)
    assert layers[0]["whole"] == [True, True]


def what_goes_wrong_in_one_process_ends_both_with_what_there_is(runs: Runs) -> None:
    """Without a launcher that ends one process when the other has ended."""
    for process in runs.told:
        assert "the gradients are not finite at step 3" in process["error"]
    output = runs.folder / "wrong"
    assert names(output) == ["checkpoint-2"]
    state = torch.load(output / "checkpoint-2" / "training_state.pt", weights_only=True)
    assert (state["step"], state["sampler"]["position"]) == (2, 4)
    assert all(torch.isfinite(value).all() for value in state["parameters"].values())
    assert not state["interim"]


@needs_fork
@needs_sharding
@pytest.mark.slow
def test_a_run_resumes_with_another_number_of_processes(runs: Runs, small_model: Path) -> None:
    folder = runs.folder
    full = settings(small_model, folder / "full-1", **EVERYTHING)
    for before, after in ((1, 2), (2, 1)):
        # Its newest checkpoint would be its end.
        checkpoint = folder / f"full-{before}" / "checkpoint-1"
        shutil.copytree(checkpoint, folder / f"resumed-{after}" / "checkpoint-1")
    resume = {"resume_from_checkpoint": "latest"}
    train_by_two([shared(full, folder / "resumed-2", **resume)], folder / "again")
    train(replace(full, output_dir=str(folder / "resumed-1"), **resume))
    for processes in (1, 2):
        resumed = folder / f"resumed-{processes}"
        assert list(losses(resumed)) == [2]
        assert_same(folder / "full-1", resumed)


# Against two processes with whole models, which too have one photo each at a time. In bfloat16 a
# norm that is summed in another order rounds a gain to its neighbour.
VARIANTS = {
    "input": {"norm_axis": "input", "train_text_encoder": True, "max_grad_norm": 0.0},
    "bf16": {"mixed_precision": "bf16", "gradient_accumulation_steps": 2},
    "full bf16": {"method": "full", "mixed_precision": "bf16", "full_weights": "targets"},
    "full checkpointing": {"method": "full", "gradient_checkpointing": True, "keep_best": True,
                           "checkpointing_steps": 1, "validation_split": 1},
    "adalora": {"parametrization": "adalora", "rank": 4, "allocation_interval": 1},
    "pissa": {"init": "pissa", "gradient_checkpointing": True},
    "dvora": {"parametrization": "vera", "learning_rate": 1e-2},
    "adafactor": {"optimizer": "adafactor"},
    "words": {"token": "<s1>", "instance_prompt": "a photo of a <s1> mug", "embedding_lr": 1e-2,
              "caption_prefix": "<s1> mug,",
              "train_text_encoder_ti": True, "caption_dropout": 0.5},
    "full words": {"method": "full", "token": "<s1>", "instance_prompt": "a photo of a <s1> mug",
                   "caption_prefix": "<s1> mug,", "embedding_lr": 1e-2,
                   "train_text_encoder_ti": True, "train_text_encoder": True,
                   "num_validation_images": 1,
                   "validation_inference_steps": 1},
}  # fmt: skip


@needs_fork
@needs_sharding
@pytest.mark.slow
def test_whatever_is_shared_is_trained_as_by_processes_with_whole_models(
    small_model: Path, tmp_path: Path
) -> None:
    configs = []
    for name, changes in VARIANTS.items():
        one = settings(small_model, tmp_path, **{"max_train_steps": 3, **changes})
        configs += [
            shared(one, tmp_path / f"{name}-{kind}", sharding=kind) for kind in ("none", "fsdp")
        ]
    train_by_two(configs, tmp_path / "two")
    for name in VARIANTS:
        tolerance = 5e-3 if "bf16" in name else 1e-5
        assert_same(tmp_path / f"{name}-none", tmp_path / f"{name}-fsdp", tolerance)
