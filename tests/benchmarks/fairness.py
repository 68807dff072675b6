"""``python -m tests.benchmarks.fairness``: what a run of one document and a request wait for beside a large run.

One worker with the demo model; the same measurements when it is idle, and while it is at work on the large run. Beside
it a Celery task a document around a Hugging Face pipeline of the same model, idle and behind documents that wait.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from nermill.model_build.demo.recover import recover
from nermill.producer.local.broker import embedded_broker
from nermill.producer.runs.run import send
from nermill.worker.contracts.layout import SUCCESS_FILE
from tests.benchmarks.startup import TEXT, engine_alone, round_trip, send_and_await, time_when_idle
from tests.harness import REAL, Harness, harness, texts

REQUEST_SECONDS = 60.0
P50, P99 = "a request of one sentence, p50", "a request of one sentence, p99"


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints seconds and milliseconds, idle and beside the large run."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.fairness", description=__doc__)
    parser.add_argument("--documents", type=int, default=50_000, help="of the large run; default %(default)s")
    parser.add_argument("--runs", type=int, default=10, help="of one document; default %(default)s")
    parser.add_argument("--requests", type=int, default=200, help="of one sentence; default %(default)s")
    parser.add_argument("--waiting", type=int, default=500, help="documents before the hand-made task's request")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="nm-") as folder, harness(Path(folder), lease_seconds=60.0) as mill:
        engine = engine_alone()
        with ExitStack() as stack:
            trip = round_trip(mill, stack)
        mill.worker(REAL, OMP_NUM_THREADS=str(os.cpu_count())).await_ready()
        measure(mill, "warm", 2, 20)
        idle = measure(mill, "idle", options.runs, options.requests)
        large, plan = mill.plan(texts(options.documents), documents_per_shard=1024, out=f"{mill.out}/large")
        send(large, plan, mill.queue())
        mill.until(large.committed)
        busy = measure(mill, "busy", options.runs, options.requests)
        if large.exists(SUCCESS_FILE):
            raise SystemExit(f"the large run ended before the measurement did; take more than {options.documents:,}")
        done = len(large.committed())
    print(f"large run: {done} of {len(plan.shards)} shards were done at the end of the measurement\n")
    print("| | idle | beside the large run | ratio |\n|---|---|---|---|")
    for name in idle:
        print(f"| {name} | {1e3 * idle[name]:,.1f} ms | {1e3 * busy[name]:,.0f} ms | {busy[name] / idle[name]:.1f} |")
    alone, behind, rate = handmade(options.requests, options.waiting)
    print(
        f"| a hand-made task of one sentence, p50; behind {options.waiting:,} documents, once | {1e3 * alone:,.1f} ms "
        f"| {1e3 * behind:,.0f} ms | {behind / alone:.1f} |"
    )
    over = idle[P50] - engine - trip
    print(f"\nrequest when idle, p50: {1e3 * over:+.1f} ms to the engine's {1e3 * engine:.1f} ms and ", end="")
    print(f"{1e3 * trip:.1f} ms of an empty task and its answer")
    print(
        f"hand-made: {rate:,.0f} documents/s; 50,000 documents before a request take {50_000 / rate / 60:,.0f} minutes"
    )


def measure(mill: Harness, name: str, runs: int, requests: int) -> dict[str, float]:
    """Seconds from sending to the part for runs of one document, and to the answer for requests of one sentence."""
    queue = mill.queue()
    planned = [mill.plan([f"{TEXT} {n}"], out=f"{mill.out}/{name}-{n}") for n in range(runs)]
    lone = [time_when_idle(send_and_await, run, plan, queue) for run, plan in planned]

    def ask(number: int) -> None:
        queue.request([f"{TEXT} {number}"], {}, timeout=REQUEST_SECONDS)

    asked = [time_when_idle(ask, number) for number in range(requests)]
    p50, p99 = np.quantile(asked, [0.5, 0.99]).tolist()
    return {
        "a run of one document, median": float(np.median(lone)),
        "a run of one document, longest": max(lone),
        P50: p50,
        P99: p99,
    }


def handmade(requests: int, waiting: int) -> tuple[float, float, float]:
    """Of the hand-made task: seconds of a request when idle (median) and behind others; documents a second."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nm-")))
        recover(folder / "checkpoint")
        os.environ["BENCH_BROKER"] = stack.enter_context(embedded_broker()).removeprefix("redis+socket://")
        os.environ["BENCH_CHECKPOINT"] = str(folder / "checkpoint")
        from tests.benchmarks.handmade import app, tag

        command = [sys.executable, "-m", "celery", "-A", "tests.benchmarks.handmade", "worker"]
        quiet = {**os.environ, "PYTHONWARNINGS": "ignore"}  # who measures as root is told so by Celery
        process = stack.enter_context(
            subprocess.Popen([*command, "--pool", "solo", "--loglevel", "ERROR"], stdout=subprocess.DEVNULL, env=quiet)
        )
        stack.callback(process.terminate)
        stack.enter_context(app)

        def ask(number: int) -> None:
            tag.delay(f"{TEXT} {number}").get(timeout=REQUEST_SECONDS)

        ask(0)
        idle = float(np.median([time_when_idle(ask, number) for number in range(requests)]))
        begun = time.perf_counter()
        others = [tag.delay(f"{TEXT} {number}") for number in range(waiting)]
        asked = time.perf_counter()
        tag.delay(TEXT).get(timeout=REQUEST_SECONDS + waiting)
        done = time.perf_counter()
        for other in others:
            other.forget()
        return idle, done - asked, (waiting + 1) / (done - begun)


if __name__ == "__main__":
    main()
