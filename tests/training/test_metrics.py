"""metrics.jsonl: lines that wait for room, and losses that are no numbers."""

from __future__ import annotations

import errno

import pytest

from dora_diffusion.training.loop import TrainingError, train
from tests.training.helpers import make_config, steps_in


def test_metrics_that_a_full_disk_refuses_are_written_later(tmp_path, monkeypatch):
    from dora_diffusion.training.metrics import MetricsLog

    log = MetricsLog(tmp_path / "metrics.jsonl", 0, lambda record: None)
    real, refused = log._file._file.write, []

    class Full:
        """A disk that takes half of a line and then nothing."""

        def write(self, data):
            if not refused:
                refused.append(data)
                return real(data[:5])
            raise OSError(errno.ENOSPC, "No space left on device")

        def __getattr__(self, name):
            return getattr(disk, name)

    disk, log._file._file = log._file._file, Full()
    log.add({"step": 1, "loss": 0.5})
    with pytest.warns(UserWarning, match="metrics.jsonl cannot be written: No space left"):
        log.add({"step": 2, "loss": 0.5})
    log.add({"step": 3, "loss": 0.5})
    assert (tmp_path / "metrics.jsonl").read_text(encoding="utf-8") == "", "no half line"
    log._file._file = disk
    log.flush()
    log.close()
    assert steps_in(tmp_path) == [1, 2, 3]


def test_a_loss_that_is_not_finite_stops_the_run(sd1_folder, photos, tmp_path):
    config = make_config(sd1_folder, photos, tmp_path / "out", learning_rate=1e30, max_grad_norm=0)
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at step \d"):
        train(config)
