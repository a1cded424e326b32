"""Kill the worker, the app, or both at random moments, and look whether anything is lost.

Trains the embedded model in the real app, with a checkpoint every twenty steps. Twenty times, after
a random time, it sends SIGKILL to the worker, to the app, or to both at once, starts the app again
where it was killed, and checks what the app then serves and what is on disk:

- the state shown is true: a run whose worker lives is running, one whose worker died has crashed;
- nothing finished is lost: every checkpoint that was there opens, a finished run has its bytes;
- resume continues from the last checkpoint, and no step is missing or counted twice.

    python benchmarks/app_kills.py --seed 0
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import httpx
import torch

sys.path.insert(0, str(Path(__file__).parent))
from app_clients import ROOT

from dora_diffusion.config.derived import as_yaml
from dora_diffusion.formats.adapter.inspect import report_on
from dora_diffusion.studio.app.settings import EMBEDDED, make_config, preset_values
from dora_diffusion.studio.jobs.queue import create_job, end_tree, requeue_job, worker_of
from dora_diffusion.studio.jobs.records import (
    JOB,
    SETTINGS,
    JobRecord,
    read_metrics,
    train_arguments,
)
from dora_diffusion.studio.jobs.snapshot import Job, read_job
from dora_diffusion.studio.jobs.store import Workspace

LIMIT = 300.0
PHOTOS = ROOT / "samples" / "bolt_mug"


class App:
    """The app as ``python app.py`` starts it."""

    def __init__(self, runs: Path) -> None:
        self.runs = runs
        self.start()

    def start(self) -> None:
        """Start it, and wait until it serves."""
        self.process = subprocess.Popen(
            [sys.executable, "app.py", "--runs_dir", str(self.runs)],
            cwd=ROOT, stdout=subprocess.PIPE, text=True,
         encoding="utf-8")  # fmt: skip
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().split()[1]

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

    def shown(self) -> str:
        """All that the page is sent when it is opened."""
        with httpx.Client(base_url=self.address, timeout=60) as client:
            config = client.get("config").json()
            load = [
                one for one in config["dependencies"]
                if any(event == "load" for _, event in one["targets"])
            ][-1]  # fmt: skip
            # A session of its own: a page that was open is sent only what has changed.
            session = f"kills-{time.monotonic_ns()}"
            body = {
                "data": [None] * len(load["inputs"]),
                "fn_index": load["id"],
                "session_hash": session,
            }
            client.post("gradio_api/queue/join", json=body).raise_for_status()
            with client.stream("GET", "gradio_api/queue/data",
                               params={"session_hash": session}) as answer:  # fmt: skip
                for line in answer.iter_lines():
                    if "process_completed" in line:
                        return json.dumps(json.loads(line.removeprefix("data: "))["output"])
        raise AssertionError("the app did not answer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20, help="Kills.")
    parser.add_argument("--seed", type=int, default=0, help="Of what is killed, and when.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder) / "runs", args.rounds, random.Random(args.seed))


def run(runs: Path, rounds: int, draw: random.Random) -> None:
    """All rounds. Ends with an AssertionError at the first thing that is not as it should be."""
    workspace = Workspace(runs).make()
    app = App(runs)
    try:
        finished = workspace.root / add_run(workspace, 20)
        wait(lambda: job_at(finished).state == "done")
        result = digest(finished)
        folder = workspace.root / add_run(workspace, 100_000)
        wait(lambda: bool(job_at(folder).checkpoints))
        counts: Counter[str] = Counter()
        for number in range(rounds):
            what = draw.choice(("worker", "app", "both"))
            time.sleep(draw.uniform(0.0, 4.0))
            before = set(job_at(folder).checkpoints)
            state = strike(app, folder, what)
            check(app, folder, state, before)
            assert digest(finished) == result
            assert job_at(finished).state == "done"
            gone_on = go_on(folder, state)
            counts[what] += 1
            print(f"{number + 1}: killed {what}, shown {state}; {gone_on}", flush=True)
        print(f"{rounds} kills ({dict(counts)}): every state true, no checkpoint lost, "
              f"every run resumed; step {job_at(folder).step} in the end")  # fmt: skip
    finally:
        app.kill()
        for one in runs.glob("2*"):
            worker = worker_of(one)
            if worker:
                end_tree(worker)


def strike(app: App, folder: Path, what: str) -> str:
    """Kill at once what is named, and start the app again. Returns the state that is then true."""
    worker = worker_of(folder)
    if what != "worker":
        app.process.kill()
    if what != "app" and worker is not None:
        end_tree(worker)
        wait(lambda: worker_of(folder) is None)
    if what != "worker":
        app.process.wait()
        app.start()
    return "running" if what == "app" else "crashed"


def check(app: App, folder: Path, state: str, before: set[str]) -> None:
    """Check the page and the disk after a kill."""
    job = job_at(folder)
    assert job.state == state, (job.state, state)
    word = {"running": "training", "crashed": "crashed"}[state]
    page = app.shown()
    assert f"dd-{state}'>{word}" in page, "the page shows another state"
    assert before <= set(job.checkpoints), (before, job.checkpoints)
    for name in job.checkpoints:
        report_on(folder / name / "pytorch_lora_weights.safetensors")
        torch.load(folder / name / "training_state.pt", weights_only=True)


def go_on(folder: Path, state: str) -> str:
    """Resume a crashed run as the page's button does, and see every run go further."""
    if state == "crashed":
        at = max(int(name.removeprefix("checkpoint-")) for name in job_at(folder).checkpoints)
        requeue_job(folder)
        wait(lambda: job_at(folder).progress.first_step == at)
        wait(lambda: job_at(folder).step > at)
        said = f"resumed at step {at}"
    else:
        at = job_at(folder).step
        wait(lambda: job_at(folder).step > at)
        said = f"resumed from step {at}"
    steps = [record["step"] for record in read_metrics(folder)]
    assert steps == list(range(1, len(steps) + 1)), "a step is missing, or counted twice"
    return said


def add_run(workspace: Workspace, steps: int) -> str:
    """Queue a run with a checkpoint every twenty steps."""
    values = preset_values("fast", EMBEDDED) | {
        "max_train_steps": steps, "checkpointing_steps": 20,
        "validation_steps": None, "num_validation_images": 0, "train_batch_size": 1,
    }  # fmt: skip
    folder = workspace.new_job()
    config = make_config(EMBEDDED, PHOTOS, folder, "sks", "mug", [], values)
    record = JobRecord(train_arguments(folder), "sks mug", base=EMBEDDED)
    return create_job(folder, record, {SETTINGS: as_yaml(config)})


def job_at(folder: Path) -> Job:
    """The run as its folder tells it."""
    job = read_job(folder)
    assert job is not None, f"{folder / JOB} is gone"
    return job


def digest(folder: Path) -> str:
    """Return the digest of a finished adapter."""
    return hashlib.sha256((folder / "pytorch_lora_weights.safetensors").read_bytes()).hexdigest()


def wait(ready: Callable[[], bool]) -> None:
    """Wait until something is so; the limit is for what never comes."""
    deadline = time.monotonic() + LIMIT
    while not ready():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


if __name__ == "__main__":
    main()
