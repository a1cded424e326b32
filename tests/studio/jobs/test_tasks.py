"""Commands that the page starts: their arguments, queued with a copy of what they need."""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from dora_diffusion.cli.main import build_parser, read_settings
from dora_diffusion.config import TrainConfig, read_config_file
from dora_diffusion.formats.layouts import PROGRAMS
from dora_diffusion.sampling.images import adapter_name
from dora_diffusion.studio.jobs import records, tasks
from dora_diffusion.studio.jobs.queue import delete_job, stop_job
from dora_diffusion.studio.jobs.snapshot import Job, chosen_adapter, read_run
from dora_diffusion.studio.jobs.store import UserError, Workspace, ids_in
from dora_diffusion.studio.jobs.subjects import read_subject, save_caption
from tests.refusal import refused
from tests.studio.jobs.helpers import about, ended_run, job_of, make, seen

GOLDEN = Path(__file__).parents[2] / "formats/golden/0.1.0/diffusers-dora-ranks.safetensors"
CONFIG = TrainConfig(instance_prompt="a photo of a sks dog", class_word="dog", rank=3)


def start(workspace: Workspace, subject: str) -> Path:
    stored = read_subject(workspace, subject)
    return workspace.root / tasks.start_training(workspace, CONFIG, [stored])


def test_a_run_has_its_own_photos_and_settings(workspace: Workspace, subject: str) -> None:
    folder = start(workspace, subject)
    job = seen(folder)
    assert job.record.base == "embedded:tiny-sd"
    assert job.record.arguments == ["train", "--config", str(folder / records.SETTINGS)]
    assert (job.state, job.trigger) == ("waiting", "sks dog")
    photos = folder / "photos"
    assert [path.name for path in sorted(photos.iterdir())] == ["001.jpg", "002.jpg"]
    settings = TrainConfig.from_dict(read_config_file(folder / records.SETTINGS))
    assert (settings.output_dir, settings.instance_data_dir) == (str(folder), str(photos))
    assert settings.rank == 3


def test_a_run_is_named_by_hand_or_by_its_subject_and_the_time(
    workspace: Workspace, subject: str
) -> None:
    stored = read_subject(workspace, subject)
    first = seen(start(workspace, subject))
    assert re.fullmatch(r"Dog \d\d:\d\d", first.title)
    assert first.label == f"{first.title} · {first.made[5:10]}"
    config = dataclasses.replace(CONFIG, seed=1)
    folder = workspace.root / tasks.start_training(workspace, config, [stored], " my  best dog ")
    named = seen(folder)
    assert named.label == f"my best dog · {named.made[5:]}"
    made = [about(folder, title=title) for title in ("Merge my best dog", "Rank a run")]
    tasks.rename_run(workspace, named.id, "Rex")
    assert [seen(job).title for job in (folder, *made)] == ["Rex", "Merge Rex", "Rank a run"]
    assert seen(first.folder).title == first.title
    for name in ("", "x" * 61):
        with pytest.raises(UserError, match="name"):
            tasks.rename_run(workspace, named.id, name)


def test_the_folder_of_a_run_is_named_by_its_words(workspace: Workspace, subject: str) -> None:
    stored = read_subject(workspace, subject)
    for seed, (name, words) in enumerate(
        (("", "dog"), ("Käthe's mug: 1/2?", "kathe-s-mug-1-2"), ("猫", "adapter"),
         ("a " * 30, "-".join("a" * 20)), ("con", "con-adapter"))
    ):  # fmt: skip
        config = dataclasses.replace(CONFIG, seed=seed)
        run = tasks.start_training(workspace, config, [stored], name)
        assert run[23:] == words
        assert workspace.job(run).name == run
        tasks.rename_run(workspace, run, "Rex")
        assert workspace.job(run).name == run


def test_a_finished_run_is_queued_again_with_more_steps(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dora_diffusion.studio.jobs.snapshot._unusable_result", lambda *_: "")
    job = ended_run(workspace, (4, 8), 8, code=0)
    for more in (0, 0.5, -1, None, "9", float("nan"), 1e9):
        with pytest.raises(UserError, match="it must be between 1 and"):
            tasks.continue_run(job.folder, more)
    assert seen(job.folder) == job
    tasks.continue_run(job.folder, 4)
    again = seen(job.folder)
    assert (again.state, again.total, again.settings["max_train_steps"]) == ("waiting", 12, 12)
    assert again.record.arguments[3:] == ["--resume_from_checkpoint", "latest"]
    changed = {name for name in job.settings if again.settings[name] != job.settings[name]}
    assert changed == {"max_train_steps"}
    for other in (again, ended_run(workspace, (4,), 8, code=0), ended_run(workspace, (8,), 8)):
        with pytest.raises(UserError, match="only a finished run that kept a checkpoint"):
            tasks.continue_run(other.folder, 4)


def test_the_same_run_is_queued_once(workspace: Workspace, subject: str) -> None:
    folder, stored = start(workspace, subject), read_subject(workspace, subject)
    with pytest.raises(UserError, match="is number 1 in the queue already; change a setting"):
        start(workspace, subject)
    assert ids_in(workspace.root) == [folder.name]
    tasks.start_training(workspace, dataclasses.replace(CONFIG, seed=7), [stored])
    save_caption(workspace, subject, "001.jpg", "a photo of a sks dog on grass")
    start(workspace, subject)
    for job in ids_in(workspace.root):
        stop_job(workspace.root / job)
    start(workspace, subject)
    assert len(ids_in(workspace.root)) == 4


def run_of(workspace: Workspace, **settings: Any) -> Job:
    """A run with a checkpoint, of a base that is loaded in a way of its own."""
    folder = make(workspace, max_train_steps=3, token="sks", class_word="mug", **settings)
    (folder / "checkpoint-3").mkdir()
    for name in ("training_state.pt", "pytorch_lora_weights.safetensors"):
        (folder / "checkpoint-3" / name).write_bytes(b"x")
    records.write_result(folder, records.JobResult(143))
    return seen(folder)


def parsed(job_id: str, workspace: Workspace) -> Any:
    """The arguments of a job as its command has them."""
    args = build_parser().parse_args(list(seen(workspace.root / job_id).record.arguments))
    return read_settings(args)


OWN = {
    "pretrained_model_name_or_path": "org/model", "variant": "fp16", "revision": "v2",
    "pretrained_vae_model_name_or_path": "/a vae", "model_config": "/config",
}  # fmt: skip


@pytest.mark.parametrize(
    "start",
    [
        lambda w, run: tasks.start_merge(w, run, "0.5"),
        tasks.start_ranking,
    ],
    ids=["export", "rank-checkpoints"],
)
def test_a_job_about_a_run_loads_the_base_as_the_run_did(workspace: Workspace, start: Any) -> None:
    run = run_of(workspace, **OWN)
    job = seen(workspace.root / start(workspace, run))
    args = parsed(job.id, workspace)
    assert (args.base, args.variant, args.revision) == ("org/model", "fp16", "v2")
    assert getattr(args, "vae", "/a vae") == "/a vae"
    assert args.overwrite
    assert (job.record.run, job.record.base, job.state) == (run.id, "org/model", "waiting")
    assert job.record.output == str(args.output)
    assert job.trigger == ("sks mug" if job.kind == "export" else "")
    assert Path(args.output).is_relative_to(workspace.exports / run.id)


def test_merges_of_a_run_do_not_replace_each_other(finished: tuple[Workspace, str]) -> None:
    workspace, job = finished[0], job_of(finished)
    outputs = []
    for strength, chosen in [(1.0, ""), (0.5, ""), (0.5, "checkpoint-2")]:
        run = dataclasses.replace(job, chosen=chosen)
        merge = tasks.start_merge(workspace, run, f"{strength:g}")
        args = parsed(merge, workspace)
        assert (args.strength, len(args.adapter)) == (strength, 1)
        outputs.append(Path(args.output).name)
        delete_job(workspace, merge)
    named = job.id
    assert outputs == [
        f"{named}-step-3-strength-1-merged.safetensors",
        f"{named}-step-3-strength-0.5-merged.safetensors",
        f"{named}-step-2-strength-0.5-merged.safetensors",
    ]
    for strength in (-10.5, 10.5, float("nan")):
        with pytest.raises(ValueError, match="must be between -10 and 10"):
            tasks.start_merge(workspace, job, str(strength))


def test_what_needs_an_adapter_or_a_checkpoint_says_so(workspace: Workspace) -> None:
    run = ended_run(workspace, (), 3)
    for start in (
        lambda w, run: tasks.start_merge(w, run, "1"),
        lambda w, run: tasks.start_conversion(w, run, "kohya"),
    ):
        with pytest.raises(UserError, match="no adapter yet"):
            start(workspace, run)
    with pytest.raises(UserError, match="no checkpoint yet"):
        tasks.start_ranking(workspace, run)
    assert ids_in(workspace.root) == [run.id]


@pytest.mark.parametrize("base", ["embedded:tiny-sd", "org/model"])
def test_a_sample_is_ranked_by_its_truth_where_the_model_knows_it(
    workspace: Workspace, base: str
) -> None:
    run = run_of(workspace, pretrained_model_name_or_path=base)
    record = dataclasses.replace(run.record, sample="bolt_mug")
    args = parsed(
        tasks.start_ranking(workspace, dataclasses.replace(run, record=record)), workspace
    )
    assert args.subject == ("bolt_mug" if base.startswith("embedded") else None)
    assert args.checkpoints == ["checkpoint-3"]


@pytest.mark.parametrize("target", [*PROGRAMS, "kohya", "peft"])
def test_a_download_is_named_and_lies_in_the_exports(
    finished: tuple[Workspace, str], target: str
) -> None:
    workspace, run = finished[0], job_of(finished)
    job = tasks.start_conversion(workspace, run, target)
    args = parsed(job, workspace)
    title = read_run(workspace, job).title
    delete_job(workspace, job)
    # By the words that were chosen from.
    assert tasks.targets()[target].startswith(title.removeprefix(f"Convert {run.title} for "))
    suffix = "zip" if target == "peft" else "safetensors"
    name = f"{adapter_name(chosen_adapter(run))}.{suffix}"
    assert Path(args.output) == workspace.exports / run.id / target / name
    assert (args.input, args.to) == (str(chosen_adapter(run)), target)
    assert (args.base, args.overwrite) == (run.base, True)
    weaker = parsed(tasks.start_conversion(workspace, run, target, " 0.70 "), workspace)
    assert (weaker.strength, args.strength) == (0.7, 1.0)
    name = f"{adapter_name(chosen_adapter(run))}-strength-0.7.{suffix}"
    assert Path(weaker.output) == workspace.exports / run.id / target / name
    with pytest.raises(UserError, match="there is no such program"):
        tasks.start_conversion(workspace, run, "../../etc")
    for text, problem in (("strong", "must be a number"), ("0", "must be greater than 0")):
        with refused("strength", problem):
            tasks.start_conversion(workspace, run, target, text)


def test_no_conversion_downloads_a_base(
    workspace: Workspace, sd1_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base that is not on the disk is told of with the command; what needs none is queued."""
    cached: list[Path] = []

    def snapshot_download(name: str, **options: Any) -> str:
        assert (name, options["revision"]) == ("org/model", "v2")
        assert options["local_files_only"]
        if not cached:
            raise FileNotFoundError("not in the cache")
        return str(cached[0])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    run = run_of(workspace, **{**OWN, "variant": None})
    shutil.copyfile(GOLDEN, chosen_adapter(run))
    configs = shutil.copytree(
        sd1_folder, tmp_path / "configs", ignore=shutil.ignore_patterns("*.safetensors")
    )
    for there in ([], [configs]):
        cached[:] = there
        for target in ("a1111", "comfyui", "civitai"):
            with pytest.raises(UserError, match="is not on this machine") as raised:
                tasks.start_conversion(workspace, run, target)
            command = str(raised.value).partition("python -m dora_diffusion ")[2]
            args = read_settings(build_parser().parse_args(shlex.split(command)))
            assert (args.base, args.revision, args.to) == ("org/model", "v2", target)
            assert args.input == str(chosen_adapter(run))
        args = parsed(tasks.start_conversion(workspace, run, "kohya"), workspace)
        assert (args.base, args.revision) == (None, None)
        with pytest.raises(UserError, match=r"strength 0\.5 of a DoRA depends on its"):
            tasks.start_conversion(workspace, run, "kohya", "0.5")
    cached[:] = [sd1_folder]
    args = parsed(tasks.start_conversion(workspace, run, "a1111"), workspace)
    assert (args.base, args.revision) == (str(sd1_folder), None)  # what the revision stood for
