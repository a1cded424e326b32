"""Features in a file of the user: the examples, resuming, copies, and files that cannot be run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml

from dora_diffusion.adapters.inject import AdapterSet
from dora_diffusion.cli.main import main
from dora_diffusion.config import ConfigError, TrainConfig, read_config_file
from dora_diffusion.config.features.feature import Feature
from dora_diffusion.config.features.outside import with_features
from dora_diffusion.config.fields import Need, flag
from dora_diffusion.config.train import run_values, settings, using
from dora_diffusion.formats.adapter.metadata import without_paths
from dora_diffusion.training.hook import Hook
from dora_diffusion.training.inputs.plan import plan_run
from dora_diffusion.training.metrics import TrainingError
from dora_diffusion.training.pack import train_pack
from dora_diffusion.training.processes import make_accelerator
from dora_diffusion.training.recipe import assemble, train
from tests.every import every
from tests.refusal import refused
from tests.training.helpers import assert_same_adapter, losses

EXAMPLES = Path(__file__).parents[3] / "examples" / "features"
Tiny = Callable[..., TrainConfig]


def made(tiny_run: Tiny, example: str, **changes: object) -> Any:
    """Settings of a tiny run with an example, or another file."""
    file = EXAMPLES / f"{example}.py" if "/" not in example else Path(example)
    values = tiny_run().to_dict() | {"feature": [str(file)], "learning_rate": 1e-3, **changes}
    return with_features(file)(**values)


# The examples


def test_gradients_are_logged_and_nothing_else_changes(tiny_run: Tiny, tmp_path: Path) -> None:
    plain = train(tiny_run(learning_rate=1e-3, output_dir=str(tmp_path / "plain")))
    result = train(made(tiny_run, "log_gradients", log_gradients=2))
    assert_same_adapter(plain.adapter, result.adapter)
    norms = losses(result.output_dir, "norm_unet")
    assert norms.keys() == {2, 4}
    whole = losses(result.output_dir, "grad_norm")
    for step, norm in norms.items():
        assert norm == pytest.approx(whole[step], rel=1e-5)


def test_p2_weights_the_error_by_the_formula_of_the_paper(tiny_run: Tiny) -> None:
    def loss_of(config: Any) -> tuple[Any, Any]:
        with using(type(config)):
            run = assemble(plan_run(config), make_accelerator(config))
            step = run.step
            (batch,) = step.draw(1)
            predicted = torch.zeros_like(batch.noise)
            (row,) = step.terms[0].losses(batch, predicted).rows
        return row.item(), run.components.scheduler.alphas_cumprod[batch.inputs.timesteps[0]]

    plain, alpha_bar = loss_of(tiny_run(snr_gamma=0.0))
    for gamma in (0.5, 1.0):
        weighted, _ = loss_of(made(tiny_run, "p2_weighting", p2_gamma=gamma))
        snr = (alpha_bar / (1 - alpha_bar)).item()
        assert weighted / plain == pytest.approx(1 / (1 + snr) ** gamma, rel=1e-5)
    with refused("p2_gamma"):
        loss_of(made(tiny_run, "p2_weighting", p2_gamma=0.5, prediction_type="v_prediction"))


class Seen(Hook):
    """Timestep of the last batch."""

    def drawn(self, number, batches):
        self.timestep = int(batches[0].inputs.timesteps[0])


def test_t_lora_trains_the_ranks_of_a_timestep_alone(tiny_run: Tiny) -> None:
    config = made(tiny_run, "t_lora", t_lora_least_rank=1, rank=6)
    with using(type(config)):
        run = assemble(plan_run(config), make_accelerator(config))
        adapters = AdapterSet.of(run.components.denoiser).trained()
        seen = Seen()
        run.step.hooks = [*run.step.hooks, seen]
        for number in (1, 2, 3):
            before = [adapter.up.detach().clone() for adapter in adapters]
            run.step(number)
            share = 1 - seen.timestep / run.components.process.num_timesteps
            ranks = 1 + math.floor(share * 5)
            assert 1 <= ranks < 6
            for adapter, old in zip(adapters, before, strict=True):
                moved, decayed = (
                    mask.reshape(*old.shape[:2], -1).any(dim=2).any(dim=0)
                    for mask in (adapter.up != old, old != 0)
                )
                assert moved[:ranks].all()
                assert (moved[ranks:] <= decayed[ranks:]).all()


# Runs


def test_a_run_is_repeated_and_resumed_bit_for_bit(tiny_run: Tiny, tmp_path: Path) -> None:
    config = made(tiny_run, "t_lora", t_lora_least_rank=1, rank=4, checkpointing_steps=2)
    whole = train(config)
    folder = whole.output_dir
    copy = folder / "features" / "t_lora.py"
    assert copy.read_bytes() == (EXAMPLES / "t_lora.py").read_bytes()
    values = read_config_file(folder / "config.yaml")
    assert values["feature"] == [str(copy)]
    assert values["t_lora_least_rank"] == 1
    again = with_features(copy)(**values | {"output_dir": str(tmp_path / "again")})
    assert_same_adapter(whole.adapter, train(again).adapter)
    resumed = dataclasses.replace(
        again,
        output_dir=str(tmp_path / "resumed"),
        resume_from_checkpoint=str(folder / "checkpoint-2"),
    )
    assert_same_adapter(whole.adapter, train(resumed).adapter)
    with refused("resume_from_checkpoint", "t_lora_least_rank (1 -> 2)"):
        train(dataclasses.replace(resumed, t_lora_least_rank=2, overwrite_output_dir=True))
    copy.write_text(copy.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    edited = with_features(copy)(**dataclasses.asdict(resumed))
    with refused("feature", "the file of the feature t_lora.py differs"):
        train(dataclasses.replace(edited, overwrite_output_dir=True))
    # Whoever only reads of a run needs no code of it.
    assert TrainConfig.from_dict(run_values(values)).rank == 4
    with refused("feature", "runs only where it is given"):
        TrainConfig(feature=[str(copy)])


def test_subjects_of_a_pack_have_the_same_features(tiny_run: Tiny) -> None:
    pack = {"a": made(tiny_run, "t_lora"), "b": tiny_run(output_dir="b")}
    with refused("feature", "a and b have other features from outside"):
        train_pack(pack)


def test_what_is_published_names_no_folder_and_an_older_copy_goes(
    tiny_run: Tiny, tmp_path: Path
) -> None:
    config = made(tiny_run, "log_gradients", log_gradients=2, max_train_steps=1)
    folder = train(config).output_dir
    values = without_paths(read_config_file(folder / "config.yaml"))
    assert values["feature"] == ["log_gradients.py"]
    assert str(tmp_path) not in str(values)
    train(tiny_run(learning_rate=1e-3, max_train_steps=1, overwrite_output_dir=True))
    assert not (folder / "features").exists()


def test_an_error_of_the_code_is_named_with_its_place(tiny_run: Tiny, tmp_path: Path) -> None:
    file, text = tmp_path / "mine.py", (EXAMPLES / "t_lora.py").read_text(encoding="utf-8")
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if "share = " in line)
    lines[at] = "        share = 1 / 0"
    file.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(TrainingError) as info:
        train(made(tiny_run, str(file), t_lora_least_rank=1))
    line = f"feature {file}, line {at + 1}: ZeroDivisionError: division by zero"
    assert str(info.value) == line
    failed = made(tiny_run, str(file), t_lora_least_rank=1, output_dir=str(tmp_path / "a"))
    assert {name: str(e) for name, e in train_pack({"a": failed}).failures.items()} == {"a": line}


def test_a_class_is_a_feature_too_and_is_gone_after_its_run(tiny_run: Tiny) -> None:
    class Mine(Feature):
        on = Need("my_number")

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class MySettings:
        heading: ClassVar = "Optimization"
        belongs_to: ClassVar = Mine()
        my_number: int = flag(0, "A number.", most=3)

    kind = with_features(MySettings)
    with refused("my_number", "must be at most 3"):
        kind(my_number=4)
    config = kind(my_number=2)
    assert [type(one) for one in config.features] == [Mine]
    assert config.to_dict()["my_number"] == 2
    assert "my_number" not in TrainConfig().to_dict()
    with using(kind):
        assert TrainConfig.from_dict({"my_number": "3"}).my_number == 3
        assert "my_number" in {setting.name for setting in settings()}
    result = train(kind(**tiny_run(max_train_steps=1).to_dict(), my_number=2))
    values = read_config_file(result.output_dir / "config.yaml")
    assert (values["my_number"], len(values["feature"])) == (2, 1)
    assert values["feature"][0].endswith("MySettings")
    assert TrainConfig.from_dict(run_values(values)).max_train_steps == 1
    with pytest.raises(ConfigError, match="no setting my_number"):
        TrainConfig.from_dict({"my_number": 3})


# The command line


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Exit code and output of a command."""
    try:
        code = main(list(words))
    except SystemExit as error:
        code = int(error.code or 0)
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_flags_stand_in_the_help_and_values_are_checked(
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = str(EXAMPLES / "p2_weighting.py")
    code, text = said(capsys, "train", "--feature", file, "--help-all")
    after = text.partition("--p2_gamma X")[2]
    assert code == 0
    assert "Gamma of P2 weighting" in after
    assert "--loss_type" in after
    assert "--p2_gamma" not in said(capsys, "train", "--help-all")[1]
    code, text = said(capsys, "train", "--feature", file, "--p2_gamma", "-1")
    assert (code, "p2_gamma is -1" in text) == (1, True)
    assert "there is no flag --p2_gamma" in said(capsys, "train", "--p2_gamma", "1")[1]


def test_a_settings_file_names_it_too(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_bytes((EXAMPLES / "t_lora.py").read_bytes())
    file = tmp_path / "run.yaml"
    values = {"paths": "relative to this file", "feature": ["./mine.py"], "train_batch_size": 2,
              "t_lora_least_rank": 1}  # fmt: skip
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    code, text = said(capsys, "train", "--config", str(file))
    assert (code, "train_batch_size is 2, but T-LoRA needs 1" in text) == (1, True)


def test_files_that_are_no_feature_are_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    example = (EXAMPLES / "p2_weighting.py").read_text(encoding="utf-8")
    texts = {
        "empty": ("x = 1\n", "has no settings"),
        "syntax": ("def f(:\n", "line 1: SyntaxError"),
        "raises": ("\n1 / 0\n", "line 2: ZeroDivisionError: division by zero"),
        "taken": (example.replace("p2_gamma", "rank"), "there is a setting rank already"),
        "part": (example.replace("p2_gamma", "features"), "a setting features already, or a part"),
        "missing": (None, "cannot be read: No such file or directory"),
        "binary": (b"\xff\xfe", "cannot be read"),
    }
    with every() as case:
        for name, (text, words) in texts.items():
            file = tmp_path / f"{name}.py"
            if text is not None:
                file.write_bytes(text if isinstance(text, bytes) else text.encode())
            with case(name):
                code, output = said(capsys, "train", "--feature", str(file))
                (line,) = [row for row in output.splitlines() if row.startswith("error")]
                assert code == 2
                assert str(file) in line
                assert words in line


def test_code_is_refused_where_settings_come_from_others(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = str(EXAMPLES / "log_gradients.py")
    entry = {"instance_data_dir": str(tmp_path), "feature": [file]}
    with refused("dataset_config", "feature is a setting of the whole run"):
        TrainConfig(dataset_config=[entry])
    subjects = tmp_path / "subjects.yaml"
    subjects.write_text(yaml.safe_dump([entry]), encoding="utf-8")
    code, text = said(capsys, "fleet", str(subjects), "--feature", file)
    assert (code, "runs only where it is given" in text) == (1, True)
    code, text = said(capsys, "train", "--pack", str(subjects), "--dry_run")
    assert (code, "all subjects share feature" in text) == (1, True)
    with pytest.raises(ConfigError, match="two files are named"):
        with_features(file, file)
    other = tmp_path / "other.py"
    other.write_bytes(Path(file).read_bytes())
    with pytest.raises(ConfigError, match="there is a setting log_gradients already"):
        with_features(file, other)
