"""Small grids: what a rank, a strength, the number of steps, the prior and the token do.

Every grid shows images of ``embedded:tiny-sd``. The same seed is used in all columns of a row.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from dora_diffusion import TrainConfig, load_components, train
from dora_diffusion.config import read_config_file
from dora_diffusion.data.sheets import labelled_sheet
from dora_diffusion.models.embedded import samples_folder
from dora_diffusion.sampling.generate import generate_images
from dora_diffusion.sampling.load import load_adapted
from dora_diffusion.toy.judges import SAMPLING

BASE = "embedded:tiny-sd"
SUBJECT, TOKEN, COMMON_WORD = "bolt_mug", "sks", "blue"
SCALE, SEED = 2, 7
PLACE, NIGHT = "a photo of a {} mug on the snow", "a photo of a {} mug at night"
CLASS, OTHER = "a photo of a mug on the snow", "a photo of a car on the snow"


@dataclass(frozen=True)
class Column:
    """A column of a grid.

    Attributes:
        label: What is written above it.
        run: The training whose adapter is shown; empty for the base model.
        settings: In which that training differs from the sample's settings.
        checkpoint: Of these steps; None is the result.
        strength: Of the adapter.
        token: What prompts write in the place of ``{}``.
    """

    label: str
    run: str = ""
    settings: dict[str, Any] | None = None
    checkpoint: int | None = None
    strength: float = 1.0
    token: str = TOKEN


def _of_rank(rank: int) -> Column:
    run = "plain" if rank == 8 else f"rank-{rank}"
    return Column(f"rank {rank}", run, {"rank": rank, "conv_rank": rank})


_LONG = {"max_train_steps": 400, "lr_scheduler": "constant_with_warmup", "checkpointing_steps": 25}
_PRIOR = {"with_prior_preservation": True}
_BASE_COLUMN = Column("base model")
# Name -> title, prompts of the rows, columns.
GRIDS: dict[str, tuple[str, Sequence[str], Sequence[Column]]] = {
    "rank": (
        "Rank: how much the adapter can learn. 300 steps each.",
        (PLACE, NIGHT, CLASS),
        [_BASE_COLUMN, *(_of_rank(rank) for rank in (1, 8, 32))],
    ),
    "strength": (
        "Strength of one adapter, chosen when images are made",
        (PLACE, NIGHT, CLASS),
        [Column(f"{s:g}", "plain", strength=s) for s in (0, 0.25, 0.5, 0.75, 1, 1.5, 2)],
    ),
    "steps": (
        "Steps of one training without a prior, at a constant learning rate",
        (PLACE, NIGHT, CLASS, OTHER),
        [
            _BASE_COLUMN,
            *(Column(f"{s} steps", "long", _LONG, checkpoint=s) for s in (25, 50, 100, 200, 400)),
        ],
    ),
    "no-prior": (
        "Prior preservation: what other prompts become",
        (PLACE, CLASS, "a photo of a bottle on the grass", OTHER),
        [
            _BASE_COLUMN,
            Column("without", "plain"),
            Column("with", "prior", _PRIOR),
        ],
    ),
    "bad-token": (
        f"Token: a rare word ({TOKEN}), or a word that the model knows ({COMMON_WORD})",
        (PLACE, NIGHT, f"a photo of a {COMMON_WORD} mug on the snow",
         f"a photo of a {COMMON_WORD} car on the snow"),
        [
            _BASE_COLUMN,
            Column(f"token {TOKEN}", "plain"),
            Column(f"token {COMMON_WORD}", COMMON_WORD, {}, token=COMMON_WORD),
        ],
    ),
}  # fmt: skip


def draw(name: str, output: Path, work: Path, steps: int | None = None) -> list[Path]:
    """Write the grid ``what-NAME.png``, after the trainings that it needs.

    Args:
        name: Of `GRIDS`.
        output: Folder of the image.
        work: Folder of the trainings; those that are there are not repeated.
        steps: In the place of each training's own number, for a look at the layout.
    """
    title, prompts, columns = GRIDS[name]
    made = [_images(column, prompts, work, steps) for column in columns]
    rows = [prompt.format("[token]") for prompt in prompts]
    cells = [images[row] for row in range(len(prompts)) for images in made]
    sheet = labelled_sheet(cells, title, rows, [column.label for column in columns])
    file = output / f"what-{name}.png"
    sheet.save(file, optimize=True)
    return [file]


def _images(
    column: Column, prompts: Sequence[str], work: Path, steps: int | None
) -> list[Image.Image]:
    """A column's images, each prompt by the same seed, enlarged without smoothing."""
    if column.run:
        folder = trained(column.run, column.settings or {}, column.token, work, steps)
        at = column.checkpoint and min(column.checkpoint, steps or column.checkpoint)
        adapter = folder / f"checkpoint-{at}" if at else folder
        components = load_adapted(BASE, adapter, strength=column.strength)[0]
    else:
        components = load_components(BASE)
    texts = [prompt.format(column.token) for prompt in prompts]
    images = generate_images(components, texts, seeds=[SEED] * len(texts), settings=SAMPLING)
    size = (images[0].width * SCALE, images[0].height * SCALE)
    return [image.resize(size, Image.Resampling.NEAREST) for image in images]


def trained(name: str, settings: dict[str, Any], token: str, work: Path, steps: int | None) -> Path:
    """The folder of a training on the sample, which is done, or continued, if it is not complete.

    Args:
        name: Of its folder.
        settings: In which it differs from the sample's own.
        token: Written for the sample's token in all its captions.
        work: Holds the folder.
        steps: Optimizer steps; None is the sample's or the setting's own number.
    """
    folder, photos = work / name, work / f"{SUBJECT}-{token}"
    if list(folder.glob("*.safetensors")):
        return folder
    shutil.copytree(samples_folder() / SUBJECT, photos, dirs_exist_ok=True)
    for caption in photos.glob("*.txt"):
        text = caption.read_text(encoding="utf-8").replace(f" {TOKEN} ", f" {token} ")
        caption.write_text(text, encoding="utf-8")
    values = read_config_file(samples_folder() / SUBJECT / "config.yaml") | {
        "instance_data_dir": str(photos),
        "instance_prompt": f"a photo of a {token} mug",
        "token": token,
        "output_dir": str(folder),
        "validation_prompt": [],
        "checkpointing_steps": 50,
        **settings,
    }
    if steps is not None:
        values |= {"max_train_steps": steps, "checkpointing_steps": steps}
    if list(folder.glob("checkpoint-*")):
        values["resume_from_checkpoint"] = "latest"
    if train(TrainConfig.from_dict(values)).adapter is None:
        raise SystemExit(f"{folder} was stopped; the same command continues it")
    return folder
