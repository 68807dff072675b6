"""The real worker application with an engine without a model, and with faults on demand.

``celery -A tests.doubles.app worker`` reads these environment variables:

- ``FAULT_BATCH_SECONDS``: seconds that each batch takes.
- ``FAULT_ABORT_WORD``: a batch with this word kills the process with SIGABRT.
- ``FAULT_REFUSE_WORD``: a batch with this word raises EngineError.
- ``FAULT_HANG_WORD``: a batch with this word hangs the engine for ever; where ``FAULT_ONCE_FILE`` is set, once for all
  processes that share that file.
- ``FAULT_DIE_AT``: ``sync``, ``rename``, ``done`` or ``ack``: the process is killed right after it has written a part's
  temporary file, committed the part, recorded it in the ledger, or returned from the task; once for all processes that
  share ``FAULT_ONCE_FILE``.
- ``FAULT_EVALUATION_SECONDS``: shortest time of a run's evaluation.
- ``FAULT_MEET``: a folder; a worker that has committed a part waits for another one to do so before it records it.
- ``FAULT_TRACE``: a file to which each process appends the times of ``batch``, ``evaluates`` and ``evaluated``, and of
  ``holds`` and ``drops``, with its process id and the shard, when it begins and ends one.
- ``FAULT_STORE``: folder of the ``faulty://`` store (tests.doubles.store).
- ``FAULT_STORE_SECONDS``: deadline of calls to a store.
- ``FAULT_DEFECT``: reading a shard raises an error that no store, device or ledger raises.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

import nermill.worker.tagging.pipeline
from nermill.worker.contracts.manifest import TOKENIZER_FILE
from nermill.worker.engine import Batch, Engine
from tests.doubles.engine import HashEngine, manifest

SECONDS = float(os.environ.get("FAULT_BATCH_SECONDS", "0"))


def trace(deed: str) -> None:
    """Appends a line that outlives the process."""
    if file := os.environ.get("FAULT_TRACE"):
        with open(file, "a", encoding="utf-8") as lines:
            lines.write(f"{time.time()} {deed}\n")


class FaultyEngine(HashEngine):
    """HashEngine that is slow, dies or hangs as the environment says."""

    def __init__(self, artifact: Path) -> None:
        def token(variable: str) -> int | None:
            word = os.environ.get(variable)
            return Tokenizer.from_file(str(artifact / TOKENIZER_FILE)).token_to_id(word) if word else None

        super().__init__(manifest(token_budget=1024), poison=token("FAULT_REFUSE_WORD"))
        self._abort = token("FAULT_ABORT_WORD")
        self._hang = token("FAULT_HANG_WORD")

    def run(self, batch: Batch) -> NDArray[np.float32]:
        self.batches.clear()
        if self._abort is not None and (batch.input_ids == self._abort).any():
            os.kill(os.getpid(), signal.SIGABRT)
        if self._hang is not None and (batch.input_ids == self._hang).any() and is_first():
            while True:
                time.sleep(1)
        time.sleep(SECONDS)
        trace("batch")
        return super().run(batch)


def load_engine(artifact: Path, device: str = "cpu", threads: int = 0) -> Engine:
    return FaultyEngine(artifact)


def is_first() -> bool:
    """Whether no process that shares ``FAULT_ONCE_FILE`` asked before; true where there is no such file."""
    try:
        if once := os.environ.get("FAULT_ONCE_FILE"):
            Path(once).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def die_after(owner: Any, name: str) -> None:
    """Kills the process right after the first return of a method, once for all processes."""
    method = getattr(owner, name)

    def dying(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        if is_first():
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, dying)


def evaluate(uri: str) -> str:
    trace("evaluates")
    time.sleep(float(os.environ.get("FAULT_EVALUATION_SECONDS", "0")))
    reason = evaluate_apart(uri)
    trace("evaluated")
    return reason


def trace_leases() -> None:
    """Traces which shards the process has."""
    hold = Leases.hold

    @contextmanager
    def traced(self: Leases, claim: Claim) -> Iterator[None]:
        trace(f"holds {os.getpid()} {claim.key}")
        try:
            with hold(self, claim):
                yield
        finally:
            trace(f"drops {os.getpid()} {claim.key}")

    Leases.hold = traced  # type: ignore[method-assign]


def meet(folder: Path) -> None:
    """Lets the ledger hear of two workers' shards at the same moment."""
    complete = Ledger.complete

    def together(self: Ledger, claim: Claim, worker: str, **counts: int) -> Completion:
        (folder / str(os.getpid())).touch()
        deadline = time.monotonic() + 20
        while len(list(folder.iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        return complete(self, claim, worker, **counts)

    Ledger.complete = together  # type: ignore[method-assign, assignment]


nermill.worker.tagging.pipeline.load_engine = load_engine  # type: ignore[attr-defined]  # before nermill.worker.app loads anything

import nermill.worker.app  # noqa: E402
import nermill.worker.queue.finish  # noqa: E402
import nermill.worker.queue.shards  # noqa: E402
import nermill.worker.tagging.parts  # noqa: E402
from nermill.worker.contracts import deadline  # noqa: E402
from nermill.worker.contracts.ledger import Ledger  # noqa: E402
from nermill.worker.contracts.records import Claim, Completion  # noqa: E402
from nermill.worker.queue.finish import evaluate_apart  # noqa: E402
from nermill.worker.queue.leases import Leases  # noqa: E402
from nermill.worker.queue.shards import ShardWorker  # noqa: E402
from tests.doubles import store  # noqa: E402, F401 - makes faulty:// known

nermill.worker.queue.finish.evaluate_apart = evaluate
deadline.SECONDS = float(os.environ.get("FAULT_STORE_SECONDS", deadline.SECONDS))

FAULT_POINTS = {
    "sync": (os, "fsync"),
    "rename": (nermill.worker.tagging.parts, "commit"),
    "done": (Ledger, "complete"),
    "ack": (ShardWorker, "tag_shard"),
}
if point := os.environ.get("FAULT_DIE_AT"):
    die_after(*FAULT_POINTS[point])

if os.environ.get("FAULT_TRACE"):
    trace_leases()

if folder := os.environ.get("FAULT_MEET"):
    meet(Path(folder))

if os.environ.get("FAULT_DEFECT"):

    def defect(*_: object) -> None:
        raise AttributeError("a defect")

    nermill.worker.queue.shards.read_shard = defect  # type: ignore[assignment, attr-defined]

app = nermill.worker.app.app

if __name__ == "__main__":
    app.worker_main(sys.argv[1:])
