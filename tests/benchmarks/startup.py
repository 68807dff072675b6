"""``python -m tests.benchmarks.startup``: the first document of a cold worker, and a lone one of an idle worker."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from nermill.model_build.demo.recover import recover
from nermill.producer.runs.queue import Queue
from nermill.producer.runs.run import send
from nermill.worker import Tagger
from nermill.worker.contracts.layout import RunFolder, part_name
from nermill.worker.contracts.plan import Plan
from tests.harness import REAL, Harness, harness

ROUNDS = 5
LONE_DOCUMENTS = 100
IDLE_SECONDS = 0.02
TEXT = "The European Commission said on Thursday that it disagreed with German advice to consumers."
LOAD_IN_TORCH = """
import sys, torch
from safetensors.torch import load_file
load_file(sys.argv[1])
"""


def main() -> None:
    """Prints what was measured."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nm-")))
        recover(folder / "checkpoint")
        weights = folder / "checkpoint" / "model.safetensors"
        mill = stack.enter_context(harness(folder, lease_seconds=60.0))
        torch, cold, usage = [], [], []
        for number in range(ROUNDS):
            torch.append(_seconds(sys.executable, "-c", LOAD_IN_TORCH, str(weights)))
            cold.append(_cold(mill, number))
            usage.append(_seconds(sys.executable, "-m", "nermill.producer.cli", "--help"))
        print(f"import torch, load the weights     {median(torch):.2f} s")
        print(f"cold worker to its first part      {median(cold):.2f} s = {median(cold) / median(torch):.2f} x")
        print(f"nermill --help                     {median(usage):.2f} s")
        tagged, trip = engine_alone(), round_trip(mill, stack)
        mill.worker(REAL, OMP_NUM_THREADS=str(os.cpu_count())).await_ready()
        lone = _lone(mill)
        print(f"one document, the engine alone     {1000 * tagged:.1f} ms")
        print(f"an empty Celery task and its answer {1000 * trip:.1f} ms")
        print(f"one document to an idle worker     {1000 * lone:.1f} ms, {1000 * (lone - tagged - trip):+.1f} ms")


def _seconds(*command: str) -> float:
    begun = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def _cold(mill: Harness, number: int) -> float:
    """From the start of a worker process to the part of a document that waits for it."""
    run, _ = mill.submit([f"{TEXT} {number}"], out=f"{mill.out}/cold-{number}")
    begun = time.perf_counter()
    worker = mill.worker(REAL, within=["env"], OMP_NUM_THREADS=str(os.cpu_count()))  # a new interpreter
    await_part(run)
    seconds = time.perf_counter() - begun
    worker.terminate()
    return seconds


def round_trip(mill: Harness, stack: ExitStack) -> float:
    """Median seconds of a Celery task that does nothing, from sending it to its answer."""
    os.environ["BENCH_BROKER"] = str(mill.server.socket)
    from tests.benchmarks.echo import app, echo

    command = [sys.executable, "-m", "celery", "-A", "tests.benchmarks.echo", "worker", "--pool", "threads"]
    quiet = {**os.environ, "PYTHONWARNINGS": "ignore"}  # who measures as root is told so by Celery
    process = stack.enter_context(
        subprocess.Popen([*command, "--loglevel", "ERROR"], stdout=subprocess.DEVNULL, env=quiet)
    )
    stack.callback(process.terminate)
    with app:
        echo.delay().get(timeout=60)
        return median(time_when_idle(lambda: echo.delay().get(timeout=10)) for _ in range(LONE_DOCUMENTS))


def _lone(mill: Harness) -> float:
    """Median seconds from sending a run of one document to its part."""
    queue = mill.queue()
    planned = [mill.plan([f"{TEXT} {number}"], out=f"{mill.out}/lone-{number}") for number in range(LONE_DOCUMENTS)]
    return median(time_when_idle(send_and_await, run, plan, queue) for run, plan in planned)


def send_and_await(run: RunFolder, plan: Plan, queue: Queue) -> None:
    """Sends a run of one shard and waits for its part."""
    send(run, plan, queue)
    await_part(run)


def await_part(run: RunFolder) -> None:
    """Waits for the part of a run's first shard; it is looked for every half millisecond."""
    deadline = time.monotonic() + 120
    while not os.path.exists(run.path(part_name(0))):
        if time.monotonic() > deadline:
            raise SystemExit(f"{run}: no part")
        time.sleep(0.0005)


def time_when_idle(call: Callable[..., object], *arguments: object) -> float:
    """Seconds of a call after a pause: what is asked for without one finds its code and data in the caches."""
    time.sleep(IDLE_SECONDS)
    begun = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - begun


def engine_alone() -> float:
    """Median seconds of one document without a queue."""
    with Tagger.load("demo") as tagger:
        tagger.tag([TEXT])
        return median(time_when_idle(tagger.tag, [TEXT]) for _ in range(LONE_DOCUMENTS))


if __name__ == "__main__":
    main()
