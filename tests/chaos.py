"""An adversary for a run: kills, stops, lost servers, repeated messages, at random moments of a given seed."""

from __future__ import annotations

import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nermill.worker.contracts.layout import SUCCESS_FILE
from tests.harness import Harness, Worker, harness, rows, texts


@dataclass(frozen=True)
class Chaos:
    """What the adversary does in one run.

    Attributes:
        documents: Size of the run.
        kills, terms, stops: SIGKILLs, SIGTERMs and SIGSTOPs past the lease, of a random worker.
        server_kills: SIGKILLs of the server, each followed by a restart.
        repeated: Share of the bells that is sent twice.
        batch_seconds: How slow the engine is, so that the run lasts as long as the adversary.
    """

    documents: int
    kills: int
    terms: int
    stops: int
    server_kills: int
    repeated: float = 0.05
    batch_seconds: float = 0.05


SHORT = Chaos(documents=2_000, kills=4, terms=1, stops=1, server_kills=1, batch_seconds=0.9)
LONG = Chaos(documents=20_000, kills=30, terms=5, stops=3, server_kills=3, batch_seconds=0.35)


@dataclass(frozen=True)
class Outcome:
    """What came of it: the table, and how often shards were tried again."""

    table: list[dict[str, Any]]
    redeliveries: int
    duplicates: int
    seconds: float
    harmed_to_the_end: bool


def undisturbed(documents: int) -> list[dict[str, Any]]:
    """The table of a run that nobody disturbs."""
    with TemporaryDirectory(prefix="nm-") as folder, harness(Path(folder)) as mill:
        mill.worker()
        run, plan = mill.submit(texts(documents))
        mill.wait(run, plan)
        return rows(run)


def disturbed(chaos: Chaos, seed: int) -> Outcome:
    """Runs the mill with two workers against the adversary."""
    rng = random.Random(seed)
    with TemporaryDirectory(prefix="nm-") as folder, harness(Path(folder), lease_seconds=3.0) as mill:
        run, plan = mill.submit(texts(chaos.documents))
        mill.queue().ring(round(chaos.repeated * len(plan.shards)))
        workers = [mill.worker(FAULT_BATCH_SECONDS=str(chaos.batch_seconds)) for _ in range(2)]
        began = time.monotonic()
        mill.until(run.committed)
        deeds = (
            ["kill"] * chaos.kills + ["term"] * chaos.terms + ["stop"] * chaos.stops + ["server"] * chaos.server_kills
        )
        rng.shuffle(deeds)
        for deed in deeds:
            time.sleep(rng.uniform(0.3, 2.0))
            _harm(mill, deed, rng.choice(workers), rng)
            for worker in workers:
                if not worker.is_alive:
                    worker.start()
        early = run.exists(SUCCESS_FILE)
        mill.wait(run, plan, timeout=600)
        with mill.queue().ledger() as ledger:
            progress = ledger.progress(plan.run_id)
        seconds = time.monotonic() - began
        return Outcome(rows(run), progress.redeliveries, progress.duplicates, seconds, not early)


def _harm(mill: Harness, deed: str, worker: Worker, rng: random.Random) -> None:
    if deed == "kill":
        worker.kill()
    elif deed == "term":
        worker.terminate()
    elif deed == "stop":
        worker.signal(signal.SIGSTOP)
        time.sleep(mill.lease_seconds + rng.uniform(0.5, 2))
        worker.signal(signal.SIGCONT)
    else:
        mill.server.kill()
        time.sleep(rng.uniform(0.1, 1))
        mill.server.start()
