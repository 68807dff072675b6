"""``python -m tests.benchmarks.fairness``: what a run of one document and a request wait for beside a large run.

One worker with the demo model; the same measurements when it is idle, and while it is at work on the large run.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nermill.producer.runs.run import send
from nermill.worker.contracts.layout import SUCCESS_FILE
from tests.benchmarks.startup import TEXT, send_and_await, time_when_idle
from tests.harness import REAL, Harness, harness, texts

REQUEST_SECONDS = 60.0


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints seconds and milliseconds, idle and beside the large run."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.fairness", description=__doc__)
    parser.add_argument("--documents", type=int, default=50_000, help="of the large run; default %(default)s")
    parser.add_argument("--runs", type=int, default=10, help="of one document; default %(default)s")
    parser.add_argument("--requests", type=int, default=200, help="of one sentence; default %(default)s")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="nm-") as folder, harness(Path(folder), lease_seconds=60.0) as mill:
        mill.worker(REAL).await_ready()
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
        print(f"| {name} | {1e3 * idle[name]:,.0f} ms | {1e3 * busy[name]:,.0f} ms | {busy[name] / idle[name]:.1f} |")


def measure(mill: Harness, name: str, runs: int, requests: int) -> dict[str, float]:
    """Seconds from sending to the part for runs of one document, and to the answer for requests of one sentence."""
    queue = mill.queue()
    planned = [mill.plan([f"{TEXT} {n}"], out=f"{mill.out}/{name}-{n}") for n in range(runs)]
    lone = [time_when_idle(send_and_await, run, plan, queue) for run, plan in planned]
    asked = []
    for number in range(requests):
        begun = time.perf_counter()
        queue.request([f"{TEXT} {number}"], {}, timeout=REQUEST_SECONDS)
        asked.append(time.perf_counter() - begun)
    p50, p99 = np.quantile(asked, [0.5, 0.99]).tolist()
    return {
        "a run of one document, median": float(np.median(lone)),
        "a run of one document, longest": max(lone),
        "a request of one sentence, p50": p50,
        "a request of one sentence, p99": p99,
    }


if __name__ == "__main__":
    main()
