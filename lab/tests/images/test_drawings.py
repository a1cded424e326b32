"""Content of the grids, the walk and the arrows."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from tools.images import grids
from tools.images.directions import rows_of
from tools.images.grids import GRIDS, trained

IMAGES = Path(__file__).parents[3] / "docs" / "images"


@pytest.mark.parametrize("name", GRIDS)
def test_the_grid_in_the_documents_has_its_rows_and_columns(name: str) -> None:
    _, prompts, columns = GRIDS[name]
    with Image.open(IMAGES / f"what-{name}.png") as image:
        side = 64 * grids.SCALE
        assert image.width == len(columns) * (side + 2) - 2
        # Its images, with a line of text above each row and two above them all.
        assert len(prompts) * side < image.height < len(prompts) * (side + 24) + 60


def test_a_training_has_its_token_in_every_caption_and_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = []

    def train(config: Any) -> Any:
        configs.append(config)
        folder = Path(config.output_dir)
        (folder / "checkpoint-50").mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(adapter=folder if len(configs) > 1 else None)

    monkeypatch.setattr(grids, "train", train)
    with pytest.raises(SystemExit, match="the same command continues it"):
        trained("blue", {"rank": 2}, "blue", tmp_path, None)
    captions = [path.read_text(encoding="utf-8") for path in tmp_path.glob("*/*.txt")]
    assert len(captions) == 5
    assert all(text.startswith("a photo of a blue mug ") for text in captions)
    [config] = configs
    assert (config.rank, config.token) == (2, "blue")
    assert config.instance_prompt == "a photo of a blue mug"
    assert config.max_train_steps == 300
    # What was stopped continues, and what is complete stays.
    folder = trained("blue", {}, "blue", tmp_path, None)
    assert configs[1].resume_from_checkpoint == "latest"
    (folder / "pytorch_lora_weights.safetensors").touch()
    trained("blue", {}, "blue", tmp_path, None)
    assert len(configs) == 2


def test_rows_are_compared_by_norm_and_angle() -> None:
    weight = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    angle = math.radians(30)
    tuned = torch.tensor([[4.5 * math.cos(angle), 4.5 * math.sin(angle)], [0.0, 1.0]])
    rows = rows_of("a", weight, tuned)
    torch.testing.assert_close(rows.before, torch.tensor([3.0, 2.0]).double())
    torch.testing.assert_close(rows.after, torch.tensor([4.5, 1.0]).double())
    torch.testing.assert_close(rows.angle, torch.tensor([30.0, 0.0]).double(), atol=1e-4, rtol=0)
