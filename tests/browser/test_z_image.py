"""A tiny Z-Image in the browser: trained on a sample, sampled, and converted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from dora_diffusion.sampling.images import parse_parameters, read_parameters
from dora_diffusion.studio.jobs.store import Workspace
from dora_diffusion.studio.jobs.subjects import take_sample
from tests.browser.helpers import SAMPLES, App, Visit, images_of, press, set_up_images
from tests.z_image import write_z_image


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_z_image(tmp_path_factory.mktemp("models") / "tiny-z")


@pytest.fixture
def fill() -> Callable[[Workspace], None]:
    """A sample subject."""

    def prepared(workspace: Workspace) -> None:
        take_sample(workspace, SAMPLES, "bolt_mug")

    return prepared


@pytest.mark.usefixtures("leading")
def test_it_is_trained_sampled_and_exported(
    visit: Callable[..., Visit], app: App, model: Path
) -> None:
    page = visit()
    page.tab("Train")
    page.wait("document.querySelector('#class-word input, #class-word textarea')?.value === 'mug'")
    page.fill("#base-model input", str(model))
    page.page.keyboard.press("Enter")
    page.check("Fast")
    page.unfold("Advanced settings", "Optimization", "Validation", "Output", "Adapter")
    for name, value in (
        ("max_train_steps", "4"), ("checkpointing_steps", "4"), ("validation_steps", "0"),
        ("num_validation_images", "1"), ("validation_inference_steps", "2"),
    ):  # fmt: skip
        page.set_setting(name, value)
    page.set_setting("targets", "attention")
    page.click("#start")
    page.wait_text("#status", "Write .sks mug. in a prompt")
    (run,) = app.jobs()
    assert (run.state, run.step, run.trigger) == ("done", 4, "sks mug")
    assert (run.folder / "samples" / "adapted.png").is_file()
    set_up_images(page)
    page.fill("#width input, #width textarea", "96")
    (image,) = press(page, app, "#make")
    fields = parse_parameters(read_parameters(image) or "")
    assert (fields["Size"], fields["Steps"], fields["Seed"]) == ("96x64", "2", "7")
    with Image.open(image) as opened:
        assert np.asarray(opened).std() > 5
    page.fill("#width input, #width textarea", "72")
    page.click("#make")
    assert "on Z-Image it must be a multiple of 16, such as 64" in page.toast()
    assert images_of(app) == [image]
    page.tab("Library")
    page.choose("#library-run", nth=0)
    page.choose("#format", "Diffusers")
    page.click("#convert")
    (file,) = app.until(lambda: [*(app.runs / "exports").rglob("*.safetensors")])
    app.until(lambda: app.jobs()[0].kind == "convert" and app.jobs()[0].state == "done")
    with safe_open(file, "pt") as tensors:
        names = list(tensors.keys())
    assert names
    assert all(name.startswith("transformer.") for name in names)
    assert any(name.endswith("lora_magnitude_vector.weight") for name in names)
