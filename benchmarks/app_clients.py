"""Slowdown of a training step by ten open pages, and how fast the app answers meanwhile.

Starts the real app, trains the embedded model in it, and measures the steps of metrics.jsonl in
turns without and with clients. A client does what a page does: it opens the page and asks for a
refresh every two seconds; it also fetches the page again every 15 seconds, which is what is timed
as "page".

With --images it measures instead what the first visit of an app with so many images and runs waits
for: the page, its first refresh, the first images and runs, and a search over all images; and the
memory of the server before and after --refreshes, each of which reads all runs, one of them new.

    python benchmarks/app_clients.py
    python benchmarks/app_clients.py --images 10000 --runs 200
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml
from PIL import Image

from dora_diffusion.config.derived import as_yaml
from dora_diffusion.sampling.images import save_image
from dora_diffusion.studio.app.settings import EMBEDDED, make_config, preset_values
from dora_diffusion.studio.jobs.queue import create_job, end_tree, worker_of
from dora_diffusion.studio.jobs.records import (
    SETTINGS,
    STOPPED_CODE,
    JobRecord,
    JobResult,
    read_metrics,
    read_record,
    train_arguments,
    write_record,
    write_result,
)
from dora_diffusion.studio.jobs.store import Workspace

ROOT = Path(__file__).resolve().parents[1]
REFRESH, RELOAD = 2.0, 15.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=10, help="Open pages.")
    parser.add_argument("--turns", type=int, default=4, help="Turns without and with clients.")
    parser.add_argument("--seconds", type=float, default=20, help="Length of a turn.")
    parser.add_argument("--images", type=int, default=0, help="Images that are there.")
    parser.add_argument("--runs", type=int, default=200, help="Runs that are there, beside images.")
    parser.add_argument("--refreshes", type=int, default=1000, help="Refreshes, beside images.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.images:
            visit(Path(folder) / "runs", args.images, args.runs, args.refreshes)
        else:
            measure(Path(folder) / "runs", args.clients, args.turns, args.seconds)


def visit(runs: Path, images: int, count: int, refreshes: int) -> None:
    """Print how long a first visit waits, and what refreshes take of memory."""
    workspace = Workspace(runs).make()
    first = workspace.images / "00000.png"
    noise = Image.effect_noise((512, 512), 60).convert("RGB")
    save_image(noise, first, "a photo of a sks mug\nSteps: 30, Seed: 1, Size: 512x512")
    run = end_run(workspace.root / start_run(workspace), noise)
    for _ in range(1, count):
        shutil.copytree(run, workspace.new_job(), copy_function=os.link)
    for number in range(1, images):
        os.link(first, first.with_name(f"{number:05d}.png"))
    with app(runs) as (address, pid), httpx.Client(base_url=address, timeout=600) as client:
        times = {"page": timed(lambda: client.get("").raise_for_status())}
        config = client.get("config").json()
        clock = next(
            one for one in config["dependencies"]
            if any(event == "tick" for _, event in one["targets"])
        )  # fmt: skip
        times["first refresh"] = timed(lambda: call(client, clock, "visit"))
        ids = {one["props"].get("elem_id"): one["id"] for one in config["components"]}
        body = {"fn_name": "list_page", "session_hash": "visit"}

        def ask(listed: str = "history", **search: str) -> None:
            data = {"search": search, "from": 0, "count": 0}
            asked = body | {"component_id": ids[listed], "data": data}
            client.post("gradio_api/component_server/", json=asked).raise_for_status()

        times["first images"] = timed(ask)
        times["the same again"] = timed(ask)
        times["first search"] = timed(lambda: ask(words="mug"))
        times["the same search"] = timed(lambda: ask(words="mug"))
        times["first runs"] = timed(lambda: ask("library"))

        def refresh(number: int) -> None:
            record = read_record(run)
            write_record(run, dataclasses.replace(record, note=f"note {number}"))
            asked = client.post("gradio_api/call/wait", json={"data": [run.name]}).json()
            # It reads all runs.
            client.get(f"gradio_api/call/wait/{asked['event_id']}").raise_for_status()
            call(client, clock, "visit")

        times |= in_browser(address)
        grown = memory_growth(pid, refresh, refreshes)
    shown = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in times.items())
    print(f"{images} images, {count} runs: {shown}; {grown}")


def in_browser(address: str) -> dict[str, float]:
    """Seconds until Chromium has drawn what a first visit sees; none without it."""
    chromium = shutil.which("chromium")
    if chromium is None:
        return {}
    from playwright.sync_api import sync_playwright

    options = {"executable_path": chromium, "args": ["--headless", "--no-sandbox"]}
    drawn = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
    with sync_playwright() as driver, driver.chromium.launch(**options) as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(address, wait_until="commit")
        page.wait_for_function("document.querySelector('#upload')")
        page.wait_for_function("!document.querySelector('.dd-connecting')")
        millis = (
            "performance.now()",
            "performance.getEntriesByName('first-contentful-paint')[0].startTime",
        )
        usable, painted = (page.evaluate(script) / 1000 for script in millis)
        times = {"first paint": painted, "usable": usable}
        for name in ("Train", "Generate", "Library", "Subject"):
            tab = page.get_by_role("tab", name=name, exact=True)
            times[f"tab {name}"] = timed(lambda tab=tab: (tab.click(), page.evaluate(drawn)))
    return times


def end_run(folder: Path, image: Image.Image) -> Path:
    """Give a run what one that was stopped at step 300 has. Returns its folder."""
    lines = (f'{{"step": {n}, "loss": 0.1, "seconds": 0.2}}\n' for n in range(1, 301))
    (folder / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "samples").mkdir()
    save_image(image, folder / "samples" / "step-300.png")
    for step in (100, 200, 300):
        (folder / f"checkpoint-{step}").mkdir()
        (folder / f"checkpoint-{step}" / "pytorch_lora_weights.safetensors").touch()
    write_result(folder, JobResult(STOPPED_CODE))
    return folder


def memory_growth(pid: int, refresh: Callable[[int], Any], count: int) -> str:
    """Refresh, and describe how the resident memory of a process has changed meanwhile."""

    def mib() -> float:
        return psutil.Process(pid).memory_info().rss / 2**20

    for number in range(100):
        refresh(number)
    before, begun = mib(), time.perf_counter()
    for number in range(count):
        refresh(number)
    pace = (time.perf_counter() - begun) / max(1, count)
    return f"memory {before:.0f} MiB, after {count} refreshes of {pace:.3f} s {mib():.0f} MiB"


def timed(work: Callable[[], Any]) -> float:
    """Seconds that it takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def measure(runs: Path, count: int, turns: int, seconds: float) -> None:
    workspace = Workspace(runs).make()
    with app(runs) as (address, _):
        job = workspace.root / start_run(workspace)
        while len(read_metrics(job)) < 20:
            time.sleep(0.5)
        steps: dict[bool, list[float]] = {False: [], True: []}
        pages: list[float] = []
        refreshes: list[float] = []
        for turn in range(2 * turns):
            watched = bool(turn % 2)
            before = len(read_metrics(job))
            with clients(address, count if watched else 0, pages, refreshes):
                time.sleep(seconds)
            # The first steps of a turn may belong to the turn before.
            new = [record["seconds"] for record in read_metrics(job)[before + 2 :]]
            steps[watched].append(statistics.median(new))
            print(f"turn {turn + 1}: {count if watched else 0} clients, {len(new)} steps, "
                  f"median {steps[watched][-1] * 1000:.1f} ms", flush=True)  # fmt: skip
        worker = worker_of(job)
        if worker:
            end_tree(worker)
    alone, watched_by = (statistics.median(steps[key]) for key in (False, True))
    print(f"step: {alone * 1000:.1f} ms alone, {watched_by * 1000:.1f} ms with {count} clients: "
          f"{watched_by / alone - 1:+.1%}")  # fmt: skip
    for name, times in (("page", pages), ("refresh", refreshes)):
        times.sort()
        print(f"{name}: median {statistics.median(times) * 1000:.0f} ms, 95% below "
              f"{times[int(0.95 * len(times))] * 1000:.0f} ms, slowest {times[-1] * 1000:.0f} ms, "
              f"of {len(times)}")  # fmt: skip


@contextmanager
def app(runs: Path) -> Iterator[tuple[str, int]]:
    """The app as ``python app.py`` starts it: its address and process id."""
    process = subprocess.Popen(
        [sys.executable, "app.py", "--runs_dir", str(runs)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
     encoding="utf-8")  # fmt: skip
    assert process.stdout is not None
    try:
        yield process.stdout.readline().split()[1], process.pid
    finally:
        process.terminate()
        process.wait()


def start_run(workspace: Workspace) -> str:
    """Queue a run that outlasts the measurement, with the page's balanced preset; no samples."""
    values = preset_values("balanced", EMBEDDED) | {
        "max_train_steps": 100_000, "checkpointing_steps": 100_000, "validation_steps": None,
    }  # fmt: skip
    photos = ROOT / "samples" / "bolt_mug"
    word = yaml.safe_load((photos / "config.yaml").read_text(encoding="utf-8"))["class_word"]
    folder = workspace.new_job()
    config = make_config(EMBEDDED, photos, folder, "sks", word, [], values)
    record = JobRecord(train_arguments(folder), "benchmark", base=EMBEDDED)
    return create_job(folder, record, {SETTINGS: as_yaml(config)})


@contextmanager
def clients(address: str, count: int, pages: list[float], refreshes: list[float]) -> Iterator[None]:
    """Open pages in threads, until the block ends."""
    ended = threading.Event()
    threads = [
        threading.Thread(
            target=browse, args=(address, f"client{n}", n / count, ended, pages, refreshes)
        )
        for n in range(count)
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def browse(
    address: str, session: str, delay: float, ended: threading.Event, pages: list[float],
    refreshes: list[float],
) -> None:  # fmt: skip
    """One page: what Gradio's own client asks for, and when."""
    with httpx.Client(base_url=address, timeout=60) as client:
        config = client.get("config").json()
        timer = next(
            one for one in config["dependencies"]
            if any(event == "tick" for _, event in one["targets"])
        )  # fmt: skip
        ended.wait(REFRESH * delay)
        next_page = 0.0
        after = {one["trigger_after"]: one for one in config["dependencies"]}
        by_change = {
            target: after[one["id"]]  # See `studio.app.views.ui.on`.
            for one in config["dependencies"]
            for target, event in one["targets"]
            if event == "change" and one["id"] in after
        }
        while not ended.is_set():
            begun = time.perf_counter()
            if begun >= next_page:
                assert client.get("").status_code == 200
                pages.append(time.perf_counter() - begun)
                next_page = begun + RELOAD
            begun = time.perf_counter()
            answer = call(client, timer, session)
            for changed in answer.get("changed_state_ids", []):
                if changed in by_change:
                    call(client, by_change[changed], session)
            refreshes.append(time.perf_counter() - begun)
            ended.wait(max(0.0, REFRESH - (time.perf_counter() - begun)))


def call(client: httpx.Client, event: dict[str, Any], session: str) -> dict[str, Any]:
    """Send an event to the server, as Gradio's client does. Returns what it answers."""
    data = [None] * len(event["inputs"])
    body = {"data": data, "fn_index": event["id"], "session_hash": session}
    client.post("gradio_api/queue/join", json=body).raise_for_status()
    with client.stream("GET", "gradio_api/queue/data", params={"session_hash": session}) as answer:
        for line in answer.iter_lines():
            if "process_completed" in line:
                said = json.loads(line.removeprefix("data: "))
                assert said["success"] is True, line[:300]
                return dict(said["output"])
    raise AssertionError("the app did not answer")


if __name__ == "__main__":
    main()
