"""``python -m lab simulate``: tables, files, and what is refused before anything is simulated."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from lab.__main__ import main
from lab.simulation import forecasts
from lab.simulation.forecasts import Demand, TrainingTimes
from lab.simulation.queue import HOUR, QueuePlan, simulate_queue

GIVEN = ["--seconds", "100", "--variation", "1", "--subjects", "3000"]


def command(tmp_path, *flags):
    return ["simulate", *flags, "--output", str(tmp_path / "out")]


@pytest.fixture(autouse=True)
def one_load(monkeypatch):
    """The plot at one load."""
    monkeypatch.setattr(forecasts, "LOADS", (0.8,))


def test_a_table_json_and_a_plot(tmp_path, capsys):
    flags = [*GIVEN, "--rate", "60", "--workers", "2", "4", "--price", "2"]
    words = command(tmp_path, *flags, "--gpus_per_worker", "0.5")
    assert main(words) == 0
    printed = capsys.readouterr().out
    document = json.loads((tmp_path / "out" / "simulation.json").read_text(encoding="utf-8"))
    demand = Demand(TrainingTimes(100, 1), 3000, rate=60)
    arrivals, work = demand.draw()
    for result, workers in zip(document["results"], (2, 4), strict=True):
        outcome = simulate_queue(QueuePlan(workers=workers), arrivals, work)
        assert result["workers"] == workers
        assert result["turnaround"]["p50"] > 0
        assert result["subjects_per_hour"] == pytest.approx(3000 / outcome.seconds * HOUR)
        assert result["utilisation"] == pytest.approx(work.sum() / workers / outcome.seconds)
        assert result["gpu_hours"] == pytest.approx(0.5 * workers * outcome.seconds / HOUR)
        assert result["cost_per_subject"] == pytest.approx(2 * result["gpu_hours"] / 3000)
        assert result["capacity_per_hour"] == pytest.approx(36 * workers, rel=0.1)
        assert f"| {workers} " in printed
    # M/M/2 at a load of 5/6: two thirds of what one worker of both's speed would have.
    assert document["results"][0]["wait_by_formula"] == pytest.approx(100 * 25 / 11)
    assert document["results"][0]["formula_is_exact"]
    assert "by the formula 227.3 s" in printed
    assert Image.open(tmp_path / "out" / "load.png").width > 500
    before = (tmp_path / "out" / "simulation.json").read_bytes()
    assert main([*words, "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == document["results"]
    assert (tmp_path / "out" / "simulation.json").read_bytes() == before


def test_a_backlog_by_the_records_of_a_fleet(tmp_path, capsys):
    records = tmp_path / "fleet.jsonl"
    lines = [
        {"name": str(i), "status": "done", "worker": "w", "start_seconds": 40 if i == 0 else 4,
         "train_seconds": 96} for i in range(3)
    ]  # fmt: skip
    records.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    words = command(tmp_path, "--records", str(records), "--workers", "2", "--subjects", "10")
    assert main(words) == 0
    assert "2 workers: all are done after 8 min 56 s" in capsys.readouterr().out
    arrivals = tmp_path / "arrivals"
    arrivals.write_text("0\n1000\n", encoding="utf-8")
    words += ["--cold_start", "10", "--arrivals", str(arrivals), "--overwrite"]
    assert main(words) == 0
    # The worker that was busy before takes the second too.
    captured = capsys.readouterr()
    assert "all are done after 18 min 20 s" in captured.out
    assert "subjects has no effect because all arrivals of the file are simulated" in captured.err


def test_a_queue_that_grows_is_said(tmp_path, capsys):
    assert main(command(tmp_path, "--seconds", "100", "--rate", "90", "--subjects", "500")) == 0
    assert "1 worker: load 250%" in (printed := capsys.readouterr().out)
    assert "the queue grows without end, more than 3 workers are needed" in printed


def test_flags_without_effect_are_said(tmp_path, capsys):
    flags = ["--window", "5", "--recovery", "5", "--preempted_for", "5", "--pack_throughput", "4:2"]
    assert main(command(tmp_path, "--seconds", "9", "--subjects", "9", *flags)) == 0
    said = capsys.readouterr().err
    for name in ("window", "recovery", "preempted_for", "pack_throughput"):
        assert f"{name} has no effect because no --" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "the cost of a subject is missing: give --records FILE of a fleet, or --seconds of"),
        (["--seconds", "9", "--rate", "1", "--arrivals", "x"], "--rate or --arrivals, not both"),
        (["--seconds", "0"], "seconds is 0.0; it must be greater than 0"),
        (["--seconds", "9", "--rate", "-1"], "rate is -1.0; it must be greater than 0"),
        (["--seconds", "9", "--failures", "1e6"], "failures is 1000000.0 per worker and hour"),
        (["--records", "none.jsonl"], "none.jsonl"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(tmp_path, flags, message, capsys):
    assert main(command(tmp_path, *flags)) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert not (tmp_path / "out").exists()


def test_a_pack_without_its_factor_is_wrong(capsys):
    assert main(["simulate", "--seconds", "9", "--pack", "4", "--pack_throughput", "4"]) == 1
    assert "'4' is not SIZE:FACTOR, such as 4:2.2" in capsys.readouterr().err
