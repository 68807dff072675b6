"""``python -m tests.benchmarks.ledger``: the ledger's steps beside thousands of cancelled and abandoned runs."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from statistics import median

from nermill.producer.local.broker import embedded_broker
from nermill.worker.contracts.broker import redis_client
from nermill.worker.contracts.ledger import Ledger
from nermill.worker.contracts.message import QUEUE, queue_of
from nermill.worker.contracts.plan import Options, Shard
from nermill.worker.contracts.records import Claim, RunState, WorkerProcess

SHARDS = 4  # of each forgotten run: one is leased, others wait
WORKER = WorkerProcess("bench", "cpu", "bench", "ab" * 32)
URI = "/data/run=bench"


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints microseconds a step, with no other run in Redis and with many."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.ledger", description=__doc__)
    parser.add_argument("--runs", type=int, default=10_000, help="half cancelled, half abandoned; default %(default)s")
    parser.add_argument("--leases", type=int, default=1_000, help="to measure; default %(default)s")
    options = parser.parse_args(arguments)
    with embedded_broker() as url, redis_client(url) as client:
        ledgers = {"none": Ledger(client, "none:"), "many": Ledger(client, "many:")}
        before = int(client.info("memory")["used_memory"])
        forget(ledgers["many"], options.runs)
        held = int(client.info("memory")["used_memory"]) - before
        for ledger in ledgers.values():
            open_run(ledger, "bench", options.leases)
        found: dict[str, dict[str, list[float]]] = {}
        for number in range(options.leases):  # in turn, so that both meet the same machine
            order = list(ledgers.items())
            for name, ledger in order if number % 2 else order[::-1]:
                for step, seconds in measure(ledger, number).items():
                    found.setdefault(step, {}).setdefault(name, []).append(seconds)
    print(f"{options.runs:,} cancelled and abandoned runs of {SHARDS} shards: {held / options.runs:,.0f} bytes a run\n")
    print(f"| step, median | no other run | {options.runs:,} | ratio |\n|---|---|---|---|")
    for step, times in found.items():
        none, many = median(times["none"]), median(times["many"])
        print(f"| {step} | {1e6 * none:.0f} µs | {1e6 * many:.0f} µs | {many / none:.2f} |")


def open_run(ledger: Ledger, run: str, shards: int, state: RunState = RunState.CLOSED) -> None:
    """A run of one artifact with shards of one document."""
    ledger.open(run, URI, Options(), artifact=WORKER.artifact, state=state)
    ledger.add(run, (Shard(n, n, 1, "0" * 64) for n in range(shards)))


def forget(ledger: Ledger, runs: int) -> None:
    """Runs that nobody will end: every second one cancelled, the others streams whose producer went away."""
    ledger.register(WORKER, 3600)
    for number in range(runs):
        run = f"old-{number}"
        open_run(ledger, run, SHARDS, RunState.OPEN)
        ledger.promote(queue_of(WORKER.artifact))
        if not isinstance(ledger.lease(run, 0, WORKER, 3600), Claim):
            raise SystemExit(f"{run}: not leased")
        if number % 2:
            ledger.cancel(run)


def measure(ledger: Ledger, shard: int) -> dict[str, float]:
    """Seconds of each step that a worker takes for one shard, and of two that look at all runs."""
    claims: list[Claim | str] = []
    seconds = {"lease": _time(lambda: claims.append(ledger.lease("bench", shard, WORKER, 60)))}
    (claim,) = claims
    if isinstance(claim, str):
        raise SystemExit(f"shard {shard}: {claim}")
    seconds["renew"] = _time(lambda: ledger.renew(claim, 60))
    seconds["complete"] = _time(lambda: ledger.complete(claim, WORKER.name, ok=1, rejected=0, tokens=9, computed=9))
    seconds["promote"] = _time(lambda: ledger.promote(queue_of(WORKER.artifact)))
    seconds["recover"] = _time(lambda: ledger.recover(QUEUE, 0))
    seconds["load, the metrics' numbers"] = _time(ledger.load)
    return seconds


def _time(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
