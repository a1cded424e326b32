"""Class images: their progress as it is told, and images that are not images."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image

from dora_diffusion.cli.console.training import TrainProgress, training_summary
from dora_diffusion.config import TrainConfig
from dora_diffusion.models.memory import Device
from dora_diffusion.sampling.generate import BrokenImageError
from dora_diffusion.studio.jobs.estimates import announced_class_images, estimate
from dora_diffusion.training.events import (
    ClassImagesAnnounced,
    ClassImagesProgress,
    ModelLoading,
    StepDone,
    TrainingEnded,
    TrainingStarted,
)
from dora_diffusion.training.inputs.plan import plan_run
from dora_diffusion.training.inputs.prior import ensure_class_images, own_class_images
from dora_diffusion.training.processes import make_accelerator
from dora_diffusion.training.recipe import assemble, train
from tests.refusal import refused


def make(folder, count, told, stop_at=None, output="out", prompt="a dog"):
    made = []

    def generate(prompt, seeds):
        if stop_at is not None and len(made) >= stop_at:
            raise KeyboardInterrupt
        made.extend(seeds)
        return [Image.new("RGB", (8, 8), "red") for _ in seeds]

    config = TrainConfig(
        class_data_dir=str(folder), num_class_images=count, seed=1, sample_batch_size=2,
        output_dir=str(folder.parent / output),
    )  # fmt: skip
    prompts = [prompt, "a dog on grass"]
    ensure_class_images(config, prompts, "x", generate, lambda *numbers: told.append(numbers))


def test_progress_begins_at_what_is_there_and_ends_at_all(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "own.png")
    told = []
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, 8, told, stop_at=4)
    assert told == [(1, 8), (3, 8), (5, 8)]
    told.clear()
    make(tmp_path, 8, told)
    assert told == [(5, 8), (7, 8), (8, 8)]
    told.clear()
    make(tmp_path, 8, told)
    assert told == [], "nothing to wait for"
    make(tmp_path, 8, told, prompt="a cat")
    assert told[0] == (1, 8), "images of other prompts are not these"


def files_in(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


FOLDERS = {
    "absent": [], "generated": ["generated-0/x.png"], "photos": ["own.png"],
    "kohya": ["1_dog/own.png"], "mixed": ["own.png", "generated-0/x.png"], "notes": ["notes.txt"],
}  # fmt: skip


@pytest.mark.parametrize("kind", FOLDERS)
def test_generated_images_go_into_no_folder_with_files_of_the_user(kind, tmp_path):
    """A second run generates none of them again where both have the folder."""
    reg = tmp_path / "reg"
    for name in FOLDERS[kind]:
        (reg / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(reg / name, "PNG")
    before, told = files_in(reg), []
    make(reg, 3, told)
    own = sum(not name.startswith(("generated", "notes")) for name in FOLDERS[kind])
    assert told[0] == (own, 3)
    is_shared = kind in ("absent", "generated")
    generated = tmp_path / ("reg" if is_shared else "out/class_images")
    assert len(files_in(generated).keys() - before.keys()) == 2 * (3 - own)
    assert is_shared or files_in(reg) == before
    told.clear()
    make(reg, 3, told)
    assert told == []
    make(reg, 3, told, output="other")
    assert bool(told) != is_shared


@pytest.mark.parametrize("own", [0, 2])
def test_plan_and_run_announce_the_same_images(own, tiny_run, photos, tmp_path, capsys):
    """Count, folder, and the setting that needs fewer; a resumed run generates none."""
    reg = tmp_path / "reg"
    reg.mkdir()
    for number, photo in enumerate(sorted(photos.glob("*.jpg"))[:own]):
        with Image.open(photo) as image:
            image.rotate(180).save(reg / f"{number}.png")
    before = files_in(reg)
    config = tiny_run(
        with_prior_preservation=True, class_data_dir=str(reg), num_class_images=5,
        max_train_steps=1, checkpointing_steps=1, class_word="mug",
    )  # fmt: skip
    folder = f"{config.output_dir}/class_images" if own else str(reg)
    advice = "--prior_preservation_mode image-free is a prior without class images"
    if own:
        advice = "--num_class_images 2 uses only the 2 that are there"
    (planned, *_) = training_summary(config).splitlines()
    assert (
        f"prior: {own} of 5 class images in {reg}, {5 - own} to generate in {folder} unless a run "
        f"has done so ({advice})" in planned
    )
    place = "the run's folder" if own else str(reg)
    in_app = announced_class_images(config, estimate(config, (), tmp_path, Device()))
    assert in_app.startswith(f"{5 - own} class images come first, in {place}, which takes about")
    assert in_app.endswith(f"unless a run has generated them; {advice[2:]}.")
    show = TrainProgress()
    train(config, show)
    show.close()
    line = f"{5 - own} class images to generate before the first step, in {folder}; {advice}\n"
    assert line in capsys.readouterr().out
    assert not own or files_in(reg) == before
    told = []
    train(replace(config, max_train_steps=2, resume_from_checkpoint="latest"), told.append)
    assert not [event for event in told if isinstance(event, ClassImagesAnnounced)]


def test_a_pack_announces_the_class_images_of_each_subject(capsys):
    show = TrainProgress()
    show(ClassImagesAnnounced(3, None, "out/class_images", ""), "mug")
    show(ClassImagesAnnounced(1, 75.0, "out/class_images"), "dog")
    assert capsys.readouterr().out.splitlines() == [
        "mug: 3 class images to generate before the first step, in out/class_images",
        "dog: 1 class image: about 1 min 15 s",
    ]


def test_a_run_shows_class_images_before_its_first_step(tiny_run, capsys):
    events, show = [], TrainProgress()

    def watch(event):
        events.append(event)
        show(event)

    images = {"with_prior_preservation": True, "prior_preservation_mode": "images"}
    train(tiny_run(**images, num_class_images=6, max_train_steps=1), watch)
    show.close()
    numbers = [(e.done, e.total) for e in events if isinstance(e, ClassImagesProgress)]
    assert numbers[0] == (0, 6)
    assert numbers[-1] == (6, 6)
    kinds = list(dict.fromkeys(type(event) for event in events))
    assert kinds == [
        ModelLoading, ClassImagesAnnounced, ClassImagesProgress, TrainingStarted, StepDone,
        TrainingEnded,
    ]  # fmt: skip
    # The number before any is made, and the time while the first batch is.
    first, timed = (e for e in events if isinstance(e, ClassImagesAnnounced))
    assert (first.count, first.seconds, timed.count) == (6, None, 6)
    assert timed.seconds > 0
    assert events.index(timed) < events.index(ClassImagesProgress(4, 6))
    captured = capsys.readouterr()
    assert "class images: 100%" in captured.err
    folder = tiny_run().output_dir + "/class_images"
    assert f"6 class images to generate before the first step, in {folder}; " in captured.out
    assert "\n6 class images: about " in captured.out


def test_a_black_class_image_is_not_trained_on(tiny_run, tmp_path, monkeypatch):
    from diffusers import AutoencoderKL

    monkeypatch.setattr(
        AutoencoderKL, "decode", lambda self, latents, **_: (torch.full((1, 3, 32, 32), torch.nan),)
    )
    with pytest.raises(BrokenImageError, match="is not finite"):
        train(
            tiny_run(
                with_prior_preservation=True,
                prior_preservation_mode="images",
                num_class_images=1,
                sample_batch_size=1,
            )
        )
    assert not list((tmp_path / "out").rglob("*.png"))


STYLE = {"token": "", "class_word": "mug"}


@pytest.mark.parametrize(
    ("mode", "changes", "caption", "setting", "message"),
    [
        ("image-free", STYLE, "", "prior_preservation_mode", "with token ''"),
        ("image-free", {}, "a mug", "prior_preservation_mode", "1 caption of 5 without the token"),
        ("images", STYLE, "", "class_prompt", "prior preservation with token ''"),
        ("images", {"class_prompt": "a sks mug"}, "", "class_prompt", "contains the token 'sks'"),
    ],
)
def test_a_prior_of_what_is_trained_is_refused(
    mode, changes, caption, setting, message, config, photos
):
    if caption:
        (photos / "01.txt").write_text(caption, encoding="utf-8")
    prior = {"with_prior_preservation": True, "prior_preservation_mode": mode}
    with refused(setting, message):
        train(replace(config, **prior, **changes))


@pytest.fixture
def reg(photos, tmp_path):
    """Kohya's regularisation folder: two mugs, one of them with a caption, and a cup."""
    images = sorted(photos.glob("*.jpg"))
    for number, name in enumerate(("1_mug", "1_mug", "1_cup")):
        place = tmp_path / "reg" / name
        place.mkdir(parents=True, exist_ok=True)
        with Image.open(images[number]) as image:
            image.rotate(180).save(place / f"{number}.png")
    (tmp_path / "reg" / "1_mug" / "1.txt").write_text("an old mug", encoding="utf-8")
    return tmp_path / "reg"


@pytest.mark.parametrize("prompt", [None, "a photo of a mug"])
def test_kohyas_regularisation_folder_is_that_of_class_images(tiny_run, reg, prompt):
    """Nothing is generated while there are enough; a prompt that is given wins over the names."""
    config = tiny_run(
        with_prior_preservation=True, class_data_dir=str(reg), class_prompt=prompt,
        num_class_images=3,
    )  # fmt: skip
    session = assemble(plan_run(config), make_accelerator(config))
    (subject,) = session.dataset.subjects
    captions = {image.path.name: image.caption for image in subject.class_images}
    expected = {"2.png": "cup", "0.png": "mug", "1.png": "an old mug"}
    if prompt:  # in the order of the folders
        expected |= {"2.png": prompt, "0.png": prompt}
    assert captions == expected
    assert not list(reg.glob("generated-*"))
    assert "3 of 3 class images" in training_summary(config).splitlines()[0]


def test_class_images_that_are_left_out_are_said(reg):
    assert [path.name for path, _ in own_class_images(reg)] == ["2.png", "0.png", "1.png"]
    (reg / "generated-0").mkdir()
    for place in (reg / "generated-0", reg / "old", reg / "4_jug"):
        place.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(place / "x.png")
    with pytest.warns(UserWarning, match="ignored") as told:
        assert len(own_class_images(reg)) == 4
    said = [str(w.message) for w in told if w.category is UserWarning]
    assert [line.removeprefix(str(reg)) for line in said] == [
        "/4_jug: its 4 repeats have no effect, since all class images are used equally often",
        ": ignored 1 photo in old; put class images into the folder itself, or into folders "
        "with names such as '1_dog'",
    ]
    with pytest.warns(UserWarning, match="has 4 class images, but num_class_images 2 are"):
        make(reg, 2, [])
