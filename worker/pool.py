"""Windows of all shards that are in the worker at once, waiting for the device; the back-pressure between them.

Task threads put their tokenized jobs in and wait; compute threads take batches out that mix windows of any job.
No timer delays a batch: one leaves as soon as the device is idle, and while it is busy the pool fills.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from worker.batching import Placement, place, spread
from worker.contracts.errors import EngineError
from worker.contracts.manifest import Manifest
from worker.engine import Batch
from worker.windows import SPECIAL_TOKENS, Tokens, Windows

Int = NDArray[np.int64]


@dataclass(eq=False)
class Job:
    """One shard's windows in the pool, and what comes back for them.

    Attributes:
        tokens, windows: What to compute.
        logits: float32, shape (tokens, labels); filled window by window.
        failed: Documents that made the model fail, with its words.
        computed_tokens: The job's share of all tokens computed, padding included.
        seconds: Its share of the device's time.
    """

    tokens: Tokens
    windows: Windows
    logits: NDArray[np.float32]
    failed: dict[int, str] = field(default_factory=dict)
    computed_tokens: float = 0.0
    seconds: float = 0.0
    remaining: int = 0
    error: Exception | None = None
    done: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True, slots=True)
class Work:
    """One batch on its way: where its windows lie, and whose they are.

    Attributes:
        jobs: Jobs with windows in the batch.
        owner: Index into ``jobs`` for each window, int64, shape (n,).
        number: Number of each window within its job, int64, shape (n,).
        placement: Where they lie.
    """

    jobs: Sequence[Job]
    owner: Int
    number: Int
    placement: Placement


class Pool:
    """Waiting windows, oldest first.

    Args:
        manifest: Says how windows become batches.
        limit: Tokens that may wait before ``put`` blocks.
    """

    def __init__(self, manifest: Manifest, limit: int) -> None:
        self._manifest = manifest
        self._limit = limit
        self._full_batch = max((rows * length for rows, length in manifest.shapes), default=manifest.token_budget)
        self._jobs: list[Job] = []
        self._owner = np.zeros(0, np.int64)
        self._number = np.zeros(0, np.int64)
        self._length = np.zeros(0, np.int64)
        self._running = 0
        self._unfinished: set[Job] = set()
        self._closed: Exception | None = None
        self._changed = threading.Condition()

    def put(self, job: Job) -> None:
        """Adds a job's windows; waits while the pool is over its limit."""
        lengths = job.windows.lengths
        job.remaining = len(lengths)
        if not job.remaining:
            job.done.set()
            return
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._length.sum() <= self._limit)
            if self._closed:
                raise self._closed
            self._unfinished = {other for other in self._unfinished if not other.done.is_set()} | {job}
            self._jobs.append(job)
            self._owner = np.append(self._owner, np.full(len(lengths), len(self._jobs) - 1))
            self._number = np.append(self._number, np.arange(len(lengths)))
            self._length = np.append(self._length, lengths)
            self._changed.notify_all()

    def take(self) -> Work | None:
        """The next batch: at once where the device is idle, else when it is full; None when the pool is closed."""
        with self._changed:
            self._changed.wait_for(self._ready)
            if self._closed:
                return None
            placement = place(self._length, self._manifest)
            taken = placement.window
            jobs, owner = np.unique(self._owner[taken], return_inverse=True)
            work = Work([self._jobs[j] for j in jobs.tolist()], owner, self._number[taken], placement)
            kept = np.ones(len(self._length), bool)
            kept[taken] = False
            self._owner, self._number, self._length = self._owner[kept], self._number[kept], self._length[kept]
            self._forget_empty_jobs()
            self._running += 1
            self._changed.notify_all()
            return work

    def finished(self) -> None:
        """A batch that was taken is computed."""
        with self._changed:
            self._running -= 1
            self._changed.notify_all()

    def close(self, error: Exception | None = None) -> None:
        """Wakes everybody, those whose windows are under way included; nothing goes in or out any more."""
        with self._changed:
            self._closed = error or EngineError("the pipeline was closed")
            for job in self._unfinished:
                job.error = self._closed
                job.done.set()
            self._changed.notify_all()

    def waiting_tokens(self) -> int:
        """Tokens that wait, for metrics."""
        return int(self._length.sum())

    def _ready(self) -> bool:
        if self._closed:
            return True
        return len(self._length) > 0 and (not self._running or int(self._length.sum()) >= self._full_batch)

    def _forget_empty_jobs(self) -> None:
        if not len(self._owner):
            self._jobs = []
            return
        oldest = int(self._owner[0])
        if oldest:
            self._jobs = self._jobs[oldest:]
            self._owner = self._owner - oldest


def lay_out(work: Work, manifest: Manifest) -> Batch:
    """The batch's arrays: each window as [CLS] tokens [SEP] at its place, numbered within its row."""
    placement = work.placement
    shape = (placement.rows, placement.length)
    ids = np.full(shape, manifest.pad_id, np.int64).reshape(-1)
    segments = np.zeros(shape, np.int64).reshape(-1)
    positions = np.zeros(shape, np.int64).reshape(-1)
    begin = placement.row * placement.length + placement.column
    start, content = np.empty_like(begin), np.empty_like(begin)
    for index, job in enumerate(work.jobs):
        mine = np.flatnonzero(work.owner == index)
        number = work.number[mine]
        start[mine] = job.windows.start[number]
        content[mine] = job.windows.end[number] - start[mine]
        ids[spread(begin[mine] + 1, content[mine])] = job.tokens.ids[spread(start[mine], content[mine])]
    ids[begin] = manifest.cls_id
    ids[begin + content + 1] = manifest.sep_id
    length = content + SPECIAL_TOKENS
    everywhere = spread(begin, length)
    segments[everywhere] = np.repeat(_number_in_row(placement), length)
    positions[everywhere] = spread(np.full_like(begin, manifest.position_offset), length)
    return Batch(ids.reshape(shape), segments.reshape(shape), positions.reshape(shape))


def _number_in_row(placement: Placement) -> Int:
    order = np.lexsort((placement.column, placement.row))
    row = placement.row[order]
    first_of_row = np.searchsorted(row, row)
    number = np.empty_like(row)
    number[order] = np.arange(len(row)) - first_of_row + 1
    return number


def hand_out(work: Work, logits: NDArray[np.float32], seconds: float) -> None:
    """Gives every job its tokens' logits and its share of the batch's cost.

    Args:
        work: The batch.
        logits: float32, shape (rows, length, labels).
        seconds: How long the device had it.
    """
    placement = work.placement
    flat = logits.reshape(-1, logits.shape[-1])
    begin = placement.row * placement.length + placement.column
    real = [int(job.windows.lengths[work.number[work.owner == i]].sum()) for i, job in enumerate(work.jobs)]
    for index, job in enumerate(work.jobs):
        mine = np.flatnonzero(work.owner == index)
        number = work.number[mine]
        windows = job.windows
        keep = windows.keep_start[number]
        count = windows.keep_end[number] - keep
        source = begin[mine] + 1 + keep - windows.start[number]
        job.logits[spread(keep, count)] = flat[spread(source, count)]
        share = real[index] / sum(real)
        with job.lock:
            job.computed_tokens += share * placement.rows * placement.length
            job.seconds += share * seconds
        _settle(job, len(mine))


def give_up(work: Work, message: str) -> None:
    """Marks the documents of a batch as those that made the model fail."""
    for index, job in enumerate(work.jobs):
        numbers = work.number[work.owner == index]
        for document in job.windows.document[numbers].tolist():
            job.failed[document] = message
        _settle(job, len(numbers))


def _settle(job: Job, windows: int) -> None:
    with job.lock:
        job.remaining -= windows
        if not job.remaining:
            job.done.set()


def alone(work: Work) -> list[Work]:
    """The batch's windows one by one, each in the shape that the batch had."""
    placement = work.placement
    zero = np.zeros(1, np.int64)
    return [
        Work(
            [work.jobs[int(owner)]],
            zero,
            np.array([number]),
            Placement(placement.rows, placement.length, zero, zero, zero),
        )
        for owner, number in zip(work.owner.tolist(), work.number.tolist(), strict=True)
    ]
