"""Questions before a deletion."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from dora_diffusion.sampling.images import save_image
from dora_diffusion.studio.jobs import deletions
from dora_diffusion.studio.jobs.image_store import ImageStore
from dora_diffusion.studio.jobs.store import GONE, UserError, Workspace
from dora_diffusion.studio.jobs.subjects import save_caption
from tests.studio.jobs.helpers import ended_run, photo, seen

MB = bytes(2**20)
ADAPTER = Path(__file__).parents[2] / "formats/golden/0.1.0/diffusers-dora-ranks.safetensors"


def test_the_question_about_a_run_has_its_files_and_their_size(workspace: Workspace) -> None:
    run = ended_run(workspace, (2, 4), 4)
    size = sum(path.stat().st_size for path in run.folder.rglob("*") if path.is_file())
    assert deletions.run_question(workspace, run.id) == (
        f"Delete sks mug with 2 checkpoints ({size / 2**20:.1f} MB)? It cannot be restored."
    )
    for folder in ("samples", "photos", "photos-2"):
        (run.folder / folder).mkdir()
    photo(run.folder / "samples" / "adapted.png", (8, 8))
    for folder in ("photos", "photos-2"):
        photo(run.folder / folder / "001.jpg", (8, 8))
        (run.folder / folder / "001.txt").write_text("a", encoding="utf-8")
    (workspace.exports / run.id / "a1111").mkdir(parents=True)
    for name in ("mug.safetensors", "more.safetensors"):
        (workspace.exports / run.id / "a1111" / name).write_bytes(MB)
    shutil.copyfile(ADAPTER, run.folder / "pytorch_lora_weights.safetensors")
    (run.folder / "result.json").write_text('{"code": 0}', encoding="utf-8")
    assert seen(run.folder).has_result
    text = deletions.run_question(workspace, run.id)
    assert text.startswith(
        "Delete sks mug with its adapter, 2 checkpoints, 1 sample image, 2 copies of photos, "
        "2 exported files (2."
    )
    (run.folder / "photos-2" / "001.jpg").unlink()
    (run.folder / "photos-2" / "001.txt").unlink()
    (run.folder / "photos-2").rmdir()
    (run.folder / "photos-2").write_bytes(b"damaged")
    assert "1 copy of a photo" in deletions.run_question(workspace, run.id)


def test_the_question_about_a_subject_or_photo_has_captions_and_masks(
    workspace: Workspace, subject: str
) -> None:
    assert deletions.subject_question(workspace, subject) == (
        "Delete Dog with 2 photos (0.0 MB)? Runs that were trained on it keep their copies. It "
        "cannot be restored."
    )
    assert "Delete 001.jpg of Dog (0.0 MB)?" in deletions.photo_question(
        workspace, subject, "001.jpg"
    )
    save_caption(workspace, subject, "001.jpg", "a sks dog")
    Image.new("L", (8, 8)).save(workspace.subject(subject) / "photos" / "001.mask.png")
    text = deletions.subject_question(workspace, subject)
    assert "Delete Dog with 2 photos, 1 caption, 1 mask (" in text
    text = deletions.photo_question(workspace, subject, "001.jpg")
    assert "Delete 001.jpg of Dog with its caption, its mask (" in text


def test_the_question_about_an_image_has_its_prompt(workspace: Workspace) -> None:
    images, parameters = ImageStore(workspace), "a sks mug\nSteps: 2, Seed: 7"
    image = Image.new("RGB", (8, 8))
    save_image(image, workspace.images / "7.png", parameters)
    save_image(image, workspace.images / "8.png")
    question = partial(deletions.image_question, images)
    assert question("7.png").startswith("Delete the image 7.png, 'a sks mug' (0.0 MB)?")
    assert question("8.png").startswith("Delete the image 8.png (0.0 MB)?")


@pytest.mark.parametrize("name", ["20260101-000000-abcdef", GONE, "../x", 3, ["a"]])
def test_no_question_is_about_what_is_gone(
    workspace: Workspace, subject: str, name: object
) -> None:
    for ask in (
        partial(deletions.run_question, workspace),
        partial(deletions.subject_question, workspace),
        partial(deletions.photo_question, workspace, subject),
        partial(deletions.photo_question, workspace, photo="001.jpg"),
        partial(deletions.image_question, ImageStore(workspace)),
    ):  # fmt: skip
        with pytest.raises(UserError, match="no longer exists"):
            ask(name)
