"""Fault injection during a run, from a seed: killed and stopped workers, killed servers, lost and repeated messages."""

from __future__ import annotations

import json
import math
import random
import signal
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from redis import Redis
from redis.exceptions import RedisError

from nermill.worker.contracts.layout import SUCCESS_FILE
from nermill.worker.contracts.message import TAG_SHARD
from tests.harness import Harness, Worker, harness, rows, texts


@dataclass(frozen=True)
class Chaos:
    """The faults of one run.

    Attributes:
        documents: Size of the run.
        kills, terms, stops: SIGKILLs, SIGTERMs and SIGSTOPs past the lease, of a random worker.
        server_kills: SIGKILLs of the server, each followed by a restart.
        repeated: Share of the shards' messages that are sent twice.
        stolen: Share of the shards' messages that are removed from the queue.
        lease_seconds: Lease of both workers.
        batch_seconds: Seconds for each batch of the engine, so that the run lasts as long as the faults.
    """

    documents: int
    kills: int
    terms: int
    stops: int
    server_kills: int
    repeated: float = 0.05
    stolen: float = 0.05
    lease_seconds: float = 3.0
    batch_seconds: float = 0.05


SHORT = Chaos(documents=2_000, kills=4, terms=1, stops=1, server_kills=1, batch_seconds=0.9)
LONG = Chaos(documents=20_000, kills=30, terms=5, stops=3, server_kills=3, lease_seconds=10.0, batch_seconds=0.35)


@dataclass(frozen=True)
class Outcome:
    """The result: the table, and how often shards were tried again.

    Attributes:
        restarts: Seconds from a SIGKILL to the next start of each shard that the process held.
        harmed_to_the_end: Whether the run was still going when the last fault was injected.
    """

    table: list[dict[str, Any]]
    redeliveries: int
    duplicates: int
    stolen: int
    repeated: int
    seconds: float
    restarts: list[float]
    harmed_to_the_end: bool


def undisturbed(documents: int) -> list[dict[str, Any]]:
    """The table of a run without faults."""
    with TemporaryDirectory(prefix="nm-") as folder, harness(Path(folder)) as fleet:
        fleet.worker()
        run, plan = fleet.submit(texts(documents))
        fleet.wait(run, plan)
        return rows(run)


def disturbed(chaos: Chaos, seed: int) -> Outcome:
    """Runs two workers with the faults."""
    rng = random.Random(seed)
    with TemporaryDirectory(prefix="nm-") as folder, harness(Path(folder), lease_seconds=chaos.lease_seconds) as fleet:
        run, plan = fleet.submit(texts(chaos.documents))
        trace, kills = fleet.folder / "trace", dict[int, float]()
        faults = {"FAULT_BATCH_SECONDS": str(chaos.batch_seconds), "FAULT_TRACE": str(trace)}
        workers = [fleet.worker(**faults) for _ in range(2)]
        began = time.monotonic()
        with Thief(fleet, chaos, len(plan.shards), seed) as thief:
            fleet.until(run.committed)
            deeds = (
                ["kill"] * chaos.kills
                + ["term"] * chaos.terms
                + ["stop"] * chaos.stops
                + ["server"] * chaos.server_kills
            )
            rng.shuffle(deeds)
            for deed in deeds:
                time.sleep(rng.uniform(0.3, 2.0))
                worker = rng.choice(workers)
                if deed == "kill":
                    kills[worker.process.pid] = time.time()
                _harm(fleet, deed, worker, rng)
                for worker in workers:
                    if not worker.is_alive:
                        worker.start()
            early = run.exists(SUCCESS_FILE)
            fleet.wait(run, plan, timeout=600)
        with fleet.queue().ledger() as ledger:
            progress = ledger.progress(plan.run_id)
        seconds = time.monotonic() - began
        table = rows(run)
        restarts = seconds_to_restart(trace.read_text("utf-8"), kills)
    return Outcome(
        table, progress.redeliveries, progress.duplicates, thief.stolen, thief.repeated, seconds, restarts, not early
    )


def one_of_two(kills: int, lease_seconds: float) -> list[float]:
    """Kills one of two workers that both hold shards, again and again, each time when all was begun again.

    Returns:
        Seconds from a SIGKILL to the next start of each shard that the process held.
    """
    found: list[float] = []
    with TemporaryDirectory(prefix="nm-") as folder, harness(Path(folder), lease_seconds=lease_seconds) as fleet:
        _, plan = fleet.submit(texts(60_000))  # more than the two tag meanwhile
        trace = fleet.folder / "trace"
        trace.touch()
        workers = [fleet.worker(FAULT_BATCH_SECONDS="0.5", FAULT_TRACE=str(trace)) for _ in range(2)]

        def holds(worker: Worker) -> set[str]:
            return _held(worker.process.pid, _events(trace.read_text("utf-8")))

        with fleet.queue().ledger() as ledger:
            for number in range(kills):
                victim = workers[number % 2]
                fleet.until(lambda: all(map(holds, workers)))
                pid, when = victim.process.pid, time.time()
                victim.kill()
                lost = holds(victim)
                victim.start()

                def again(pid: int = pid, when: float = when, lost: set[str] = lost) -> bool:
                    recorded = lost & {str(shard) for shard in ledger.done(plan.run_id)}
                    return _restarts(pid, when, trace.read_text("utf-8")).keys() | recorded >= lost

                fleet.until(again)
                found += _restarts(pid, when, trace.read_text("utf-8")).values()
    return found


def seconds_to_restart(trace: str, kills: dict[int, float]) -> list[float]:
    """Seconds from a SIGKILL to the next start of each shard that the process held; recorded shards have none.

    Args:
        trace: What the workers wrote into ``FAULT_TRACE``.
        kills: When each killed process was killed, by its id; Unix seconds.
    """
    return [seconds for pid, when in kills.items() for seconds in _restarts(pid, when, trace).values()]


def _restarts(killed: int, when: float, trace: str) -> dict[str, float]:
    events = _events(trace)
    lost, found = _held(killed, events), dict[str, float]()
    for at, deed, _, shard in events:
        if deed == "holds" and at > when and shard in lost:
            found.setdefault(shard, at - when)
    return found


def _events(trace: str) -> list[tuple[float, str, int, str]]:
    lines = [line.split() for line in trace.splitlines()]
    return [(float(at), deed, int(pid), shard) for at, deed, pid, shard in (line for line in lines if len(line) == 4)]


def _held(process: int, events: list[tuple[float, str, int, str]]) -> set[str]:
    held: set[str] = set()
    for _, deed, pid, shard in events:
        if pid == process:
            (held.add if deed == "holds" else held.discard)(shard)
    return held


class Thief:
    """Removes messages of shards from the queues, and repeats others, while a run lasts.

    Every 10 ms it pops the next message of each list. It drops or repeats some of them, until it has done so with the
    wanted shares of the run's shards, and pushes all others back to their place.

    Attributes:
        stolen, repeated: Number of messages dropped and repeated so far.
    """

    def __init__(self, fleet: Harness, chaos: Chaos, shards: int, seed: int) -> None:
        self._mill = fleet
        self._rng = random.Random(seed)
        self._steal, self._repeat = math.ceil(chaos.stolen * shards), math.ceil(chaos.repeated * shards)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work)
        self.stolen = self.repeated = 0

    def __enter__(self) -> Thief:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _work(self) -> None:
        with self._mill.server.client() as client:
            while not self._stop.wait(0.01) and (self.stolen, self.repeated) != (self._steal, self._repeat):
                with suppress(RedisError, OSError):  # the server was killed
                    for key in self._mill.message_lists(client):
                        self._meddle(client, key)

    def _meddle(self, client: Redis, key: str) -> None:
        message = client.rpop(key)  # the next that a worker would receive
        if not isinstance(message, str):
            return
        is_shard = json.loads(message)["headers"]["task"] == TAG_SHARD
        deed = self._rng.choice(["steal", "repeat", "leave", "leave"]) if is_shard else "leave"
        if deed == "steal" and self.stolen < self._steal:
            self.stolen += 1
            return
        client.rpush(key, message)
        if deed == "repeat" and self.repeated < self._repeat:
            self.repeated += 1
            client.rpush(key, message)


def _harm(fleet: Harness, deed: str, worker: Worker, rng: random.Random) -> None:
    if deed == "kill":
        worker.kill()
    elif deed == "term":
        worker.terminate()
    elif deed == "stop":
        worker.signal(signal.SIGSTOP)
        time.sleep(fleet.lease_seconds + rng.uniform(0.5, 2))
        worker.signal(signal.SIGCONT)
    else:
        fleet.server.kill()
        time.sleep(rng.uniform(0.1, 1))
        fleet.server.start()
